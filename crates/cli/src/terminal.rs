//! Standard output and standard error: colour, progress, and what happens when they cannot be written to.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};

/// Output that could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write to {}: {cause}. Check the path, the free space and the permissions", .path.as_ref().map_or("standard output".into(), |path| path.display().to_string()))]
pub struct WriteError {
    /// Where to; `None` is standard output.
    pub path: Option<PathBuf>,
    /// What the system said.
    pub cause: io::Error,
}

impl WriteError {
    /// The error of writing to `path`.
    pub fn to(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> WriteError {
        move |cause| WriteError { path: Some(path.into()), cause }
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

    /// Writes `text`, which arrives before this returns. That standard error cannot be written to, or that nobody is
    /// there to read it, is no error: the answer must not suffer from it.
    pub fn write(self, text: &str) -> Result<(), WriteError> {
        let put = |stream: &mut dyn Write| stream.write_all(text.as_bytes()).and_then(|()| stream.flush());
        match self {
            Stream::Out => put(&mut io::stdout().lock()).map_err(|cause| WriteError { path: None, cause }),
            Stream::Err => {
                let _ = put(&mut io::stderr().lock());
                Ok(())
            }
        }
    }
}

/// `text` in the terminal's faint style.
pub fn dim(text: &str) -> String {
    format!("\x1b[2m{text}\x1b[22m")
}

/// `text` with control characters as JSON escapes them (`\u001b`), so that text out of a file cannot drive the terminal
/// or forge a line.
pub fn escape_controls(text: &str) -> String {
    let escaped = |c: char| if c.is_control() { format!("\\u{:04x}", u32::from(c)) } else { c.into() };
    text.chars().map(escaped).collect()
}

/// A line on standard error, for people.
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
