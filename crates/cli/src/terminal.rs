//! Standard output and standard error: colour, progress, and what happens when they cannot be written to.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::mpsc::{RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::markdown::wrap;

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

    /// Columns of the terminal that shows it, as wide as it is now.
    pub fn columns(self) -> Option<usize> {
        let size = match self {
            Stream::Out => rustix::termios::tcgetwinsize(io::stdout()),
            Stream::Err => rustix::termios::tcgetwinsize(io::stderr()),
        };
        Some(size.ok()?.ws_col.into()).filter(|&columns| columns > 0)
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

/// `c`, or a picture of it if it is a control character that could move the cursor or worse.
pub fn harmless(c: char) -> char {
    match c {
        '\n' | '\t' => c,
        '\0'..='\x1f' => char::from_u32(0x2400 + u32::from(c)).expect("U+2400 to U+241F are characters"),
        '\x7f' => '\u{2421}',
        '\u{80}'..='\u{9f}' => char::REPLACEMENT_CHARACTER,
        c => c,
    }
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

/// What went wrong, on standard error.
pub fn error(error: &anyhow::Error) {
    note(&wrap(&escape_controls(&format!("error: {error}")), Stream::Err.columns()));
}

/// `bytes` for people.
pub fn bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

/// How the terminal at standard input was before [`MutedKeys`].
static KEYS: Mutex<Option<Termios>> = Mutex::new(None);

/// As long as this lives, keys typed are not shown, so that they do not stand in the middle of a reply; they are not lost
/// either. Nothing happens if standard input is no terminal.
pub struct MutedKeys(());

impl MutedKeys {
    /// From here on.
    pub fn new() -> MutedKeys {
        if let Ok(before) = tcgetattr(io::stdin()) {
            let mut muted = before.clone();
            muted.local_modes -= LocalModes::ECHO;
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, &muted);
            *KEYS.lock().expect("nothing panics in between") = Some(before);
        }
        MutedKeys(())
    }
}

impl Drop for MutedKeys {
    fn drop(&mut self) {
        unmute_keys();
    }
}

/// Keys are shown again; for a process that ends while [`MutedKeys`] lives.
pub fn unmute_keys() {
    if let Some(before) = KEYS.lock().expect("nothing panics in between").take() {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &before);
    }
}

/// A line on standard error, if that is a terminal, with the time since its beginning and its position in tokens.
pub fn live_line(what: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:.dim}{figures:.dim}").expect("the template is fixed");
    let figures = |state: &ProgressState, out: &mut dyn std::fmt::Write| {
        let _ = write!(out, ", {:.0} s, {} tokens", state.elapsed().as_secs_f64(), state.pos());
    };
    let bar = ProgressBar::new_spinner().with_style(style.with_key("figures", figures));
    let bar = bar.with_message(format!("▸ {what}"));
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
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
        Unit::Tokens => (256, "{pos}/{len} tokens, {speed}"),
    };
    if total < worth_showing {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(&format!("{{msg}} {{wide_bar}} {counters}, {{eta}} left"));
    let speed = |state: &ProgressState, out: &mut dyn std::fmt::Write| {
        let _ = write!(out, "{:.1} t/s", state.per_sec());
    };
    let style = style.expect("the template is fixed").with_key("speed", speed);
    ProgressBar::new(total).with_style(style).with_message(what)
}

/// How long reading a prompt may take before a bar appears.
const PATIENCE: Duration = Duration::from_millis(300);

/// A progress bar over the tokens of a prompt on standard error, if that is a terminal. It appears once reading takes long
/// enough to be waited for, moves by itself from then on, and vanishes when it is dropped.
pub struct ReadingBar {
    bar: ProgressBar,
    /// Dropping the sender ends the thread that waits to show the bar.
    waiter: Option<(Sender<()>, JoinHandle<()>)>,
}

impl ReadingBar {
    /// A bar over `total` tokens.
    pub fn new(total: usize) -> ReadingBar {
        let bar = ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::hidden());
        let template = "reading {wide_bar} {pos}/{len} tokens, {seconds}{speed}";
        let seconds = |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            let _ = write!(out, "{:.0} s", state.elapsed().as_secs_f64());
        };
        let speed = |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            let (read, total) = (state.pos() as f64, state.len().unwrap_or(0) as f64);
            let per_second = read / state.elapsed().as_secs_f64();
            if read > 0.0 {
                let _ = write!(out, ", {per_second:.1} t/s, {:.0} s left", (total - read) / per_second);
            }
        };
        let style = ProgressStyle::with_template(template).expect("the template is fixed");
        bar.set_style(style.with_key("seconds", seconds).with_key("speed", speed));
        let (sender, ended) = std::sync::mpsc::channel();
        let shown = bar.clone();
        let waiter = std::thread::spawn(move || {
            if ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                shown.set_draw_target(ProgressDrawTarget::stderr());
                shown.enable_steady_tick(Duration::from_millis(100));
            }
        });
        ReadingBar { bar, waiter: Some((sender, waiter)) }
    }

    /// So many tokens have been read.
    pub fn set(&self, tokens: usize) {
        self.bar.set_position(tokens as u64);
    }
}

impl Drop for ReadingBar {
    fn drop(&mut self) {
        if let Some((sender, waiter)) = self.waiter.take() {
            drop(sender);
            let _ = waiter.join();
        }
        self.bar.finish_and_clear();
    }
}
