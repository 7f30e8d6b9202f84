//! Log lines on standard error.

use crate::options::LogFormat;

/// Sends what the server logs, from `INFO` up, to standard error. A program that has a subscriber of its own does not need this.
pub fn start(format: LogFormat) {
    let lines = tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(tracing::Level::INFO);
    // A second start changes nothing.
    let _ = match format {
        LogFormat::Text => lines.with_target(false).try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
}
