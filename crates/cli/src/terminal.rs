//! Standard output and standard error: colour, progress, and what happens when they cannot be written to.

use std::io::{self, IsTerminal, Write};

use indicatif::{ProgressBar, ProgressStyle};

/// Output that could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write to {place}: {cause}. Check the path, the free space and the permissions")]
pub struct WriteError {
    /// Where to.
    pub place: String,
    /// What the system said.
    pub cause: io::Error,
}

impl WriteError {
    /// The error of writing to `place`.
    pub fn to(place: impl Into<String>) -> impl FnOnce(io::Error) -> WriteError {
        move |cause| WriteError { place: place.into(), cause }
    }
}

/// One of the two standard streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

impl Stream {
    /// Whether a terminal shows it.
    pub fn is_terminal(self) -> bool {
        match self {
            Stream::Out => io::stdout().is_terminal(),
            Stream::Err => io::stderr().is_terminal(),
        }
    }

    /// Whether text in it may be dimmed: on a terminal, unless NO_COLOR is set (<https://no-color.org>).
    pub fn is_colored(self) -> bool {
        self.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
    }

    /// Writes `text`, which arrives before this returns.
    pub fn write(self, text: &str) -> Result<(), WriteError> {
        let put = |stream: &mut dyn Write| stream.write_all(text.as_bytes()).and_then(|()| stream.flush());
        match self {
            Stream::Out => put(&mut io::stdout().lock()).map_err(WriteError::to("standard output")),
            Stream::Err => put(&mut io::stderr().lock()).map_err(WriteError::to("standard error")),
        }
    }
}

/// `text` in the terminal's faint style.
pub fn dim(text: &str) -> String {
    format!("\x1b[2m{text}\x1b[22m")
}

/// A line on standard error, for people. That nobody may be there to read it is no error.
pub fn note(text: &str) {
    let _ = Stream::Err.write(&format!("{text}\n"));
}

/// The same, dimmed where that is possible.
pub fn dim_note(text: &str) {
    note(&if Stream::Err.is_colored() { dim(text) } else { text.into() });
}

/// `bytes` for people.
pub fn bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

/// What a progress bar counts.
#[derive(Clone, Copy, Debug)]
pub enum Unit {
    /// Bytes of weights.
    Bytes,
    /// Tokens of a prompt.
    Tokens,
}

/// A progress bar on standard error, if that is a terminal and `total` is large enough to wait for; it vanishes at
/// the end.
pub fn progress(what: &'static str, total: u64, unit: Unit) -> ProgressBar {
    let (worth_showing, counters) = match unit {
        Unit::Bytes => (256 << 20, "{binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}"),
        Unit::Tokens => (256, "{pos}/{len} tokens"),
    };
    if total < worth_showing {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(&format!("{{msg}} {{wide_bar}} {counters}, {{eta}} left"));
    ProgressBar::new(total).with_style(style.expect("the template is fixed")).with_message(what)
}
