//! Log lines on standard error.

use std::io::{self, IsTerminal};

use crate::options::LogFormat;

/// Sends what the server logs, from `INFO` up, to standard error. A program that has a subscriber of its own does not need this.
pub fn start(format: LogFormat) {
    let lines = tracing_subscriber::fmt().with_writer(io::stderr).with_max_level(tracing::Level::INFO);
    // Escapes of colour are for eyes: a file, or what reads a pipe, takes them for text.
    let lines = lines.with_ansi(io::stderr().is_terminal());
    // A second start changes nothing.
    let _ = match format {
        LogFormat::Text => lines.with_target(false).try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
}
