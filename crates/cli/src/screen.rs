//! What the model says, on its way to the terminal: reasoning apart from the answer.
//!
//! | standard output is | answer and calls | reasoning |
//! |---|---|---|
//! | a terminal | there | there, above the answer |
//! | a file or a pipe | there | on standard error |
//!
//! On a terminal Markdown is rendered and reasoning is dimmed. Where there may be no styles, text is shown as it was
//! written and reasoning stands between `<think>` and `</think>`. Folded reasoning is one line that tells how much of it
//! there is.

use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use text::parse::Event;

use crate::figures::{seconds, tokens};
use crate::markdown::{Markdown, Style};
use crate::terminal::{self, Stream, WriteError, dim, harmless};

/// The two parts of a turn that are text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Before `</think>`.
    Reasoning,
    /// After it.
    Answer,
}

impl Part {
    /// The stream that gets it.
    fn stream(self) -> Stream {
        match self {
            Part::Reasoning if !Stream::Out.is_terminal() => Stream::Err,
            _ => Stream::Out,
        }
    }
}

/// Shows one turn.
pub struct Screen {
    folds: bool,
    now: Shown,
    tokens: usize,
}

/// What the last line of the screen is.
enum Shown {
    Nothing,
    Text(Part, Printer),
    /// Reasoning of which only this line is shown.
    Folded(LiveLine),
    /// A call that is still being written.
    Call(LiveLine),
}

impl Screen {
    /// A turn whose reasoning is folded or shown.
    pub fn new(folds: bool) -> Screen {
        Screen { folds, now: Shown::Nothing, tokens: 0 }
    }

    /// The model has generated one more token.
    pub fn token(&mut self) {
        self.tokens += 1;
        if let Shown::Folded(line) | Shown::Call(line) = &self.now {
            line.set_tokens(self.tokens);
        }
    }

    /// Shows what has come of the turn.
    pub fn event(&mut self, event: &Event) -> Result<(), WriteError> {
        match event {
            Event::Reasoning(text) => self.text(Part::Reasoning, text),
            Event::Content(text) => self.text(Part::Answer, text),
            Event::CallBegin { name, .. } => {
                self.end()?;
                self.now =
                    Shown::Call(LiveLine::begin(&format!("calling {}", terminal::escape_controls(name)), self.tokens));
                Ok(())
            }
            Event::CallArguments { .. } | Event::CallEnd { .. } => Ok(()),
        }
    }

    /// Shows the next `text` of `part`.
    pub fn text(&mut self, part: Part, text: &str) -> Result<(), WriteError> {
        if text.is_empty() {
            return Ok(());
        }
        if part == Part::Reasoning && self.folds {
            if !matches!(self.now, Shown::Folded(_)) {
                self.end()?;
                self.now = Shown::Folded(LiveLine::begin("reasoning", self.tokens));
            }
            return Ok(());
        }
        if !matches!(self.now, Shown::Text(current, _) if current == part) {
            self.end()?;
            self.now = Shown::Text(part, Printer::begin(part)?);
        }
        match &mut self.now {
            Shown::Text(_, printer) => printer.print(text),
            _ => unreachable!("just begun"),
        }
    }

    /// Ends what is under way, and sets reasoning off from what follows.
    pub fn end(&mut self) -> Result<(), WriteError> {
        match std::mem::replace(&mut self.now, Shown::Nothing) {
            Shown::Nothing => Ok(()),
            Shown::Text(_, printer) => printer.end(),
            Shown::Call(line) => {
                line.end();
                Ok(())
            }
            Shown::Folded(line) => {
                let (time, count) = line.end();
                let told = format!("▸ reasoned for {}, {}", seconds(time), tokens(count));
                let stream = Part::Reasoning.stream();
                stream.write(&format!("{}\n", if stream.is_colored() { dim(&told) } else { told }))
            }
        }
    }
}

/// A line on standard error, if that is a terminal, that tells what goes on unseen, for how long, and in how many tokens.
struct LiveLine {
    bar: ProgressBar,
    start: Instant,
    /// Tokens generated before it.
    tokens_before: usize,
}

impl LiveLine {
    /// A line that begins with the last of `tokens`.
    fn begin(what: &str, tokens: usize) -> LiveLine {
        let line =
            LiveLine { bar: terminal::live_line(what), start: Instant::now(), tokens_before: tokens.saturating_sub(1) };
        line.set_tokens(tokens);
        line
    }

    fn set_tokens(&self, tokens: usize) {
        self.bar.set_position((tokens - self.tokens_before) as u64);
    }

    fn end(self) -> (Duration, usize) {
        self.bar.finish_and_clear();
        (self.start.elapsed(), self.bar.position() as usize)
    }
}

/// Prints one part.
struct Printer {
    part: Part,
    stream: Stream,
    /// The renderer, where there may be styles.
    markdown: Option<Markdown>,
    /// Whether the last text printed ended a line.
    line_ended: bool,
}

impl Printer {
    fn begin(part: Part) -> Result<Printer, WriteError> {
        let stream = part.stream();
        let style = if part == Part::Reasoning { Style::DIM } else { Style::default() };
        let markdown = stream.is_colored().then(|| Markdown::new(style, stream.columns()));
        if part == Part::Reasoning && markdown.is_none() {
            stream.write("<think>\n")?;
        }
        Ok(Printer { part, stream, markdown, line_ended: true })
    }

    fn print(&mut self, text: &str) -> Result<(), WriteError> {
        self.line_ended = text.ends_with('\n');
        match &mut self.markdown {
            Some(markdown) => {
                // The terminal may have been resized.
                markdown.set_columns(self.stream.columns());
                self.stream.write(&markdown.push(text))
            }
            None if self.stream.is_terminal() => self.stream.write(&text.chars().map(harmless).collect::<String>()),
            None => self.stream.write(text),
        }
    }

    fn end(self) -> Result<(), WriteError> {
        let gap = if self.part == Part::Reasoning && self.stream == Stream::Out { "\n" } else { "" };
        let rest = match self.markdown {
            Some(markdown) => markdown.finish(),
            None => {
                let line_end = if self.line_ended { "" } else { "\n" };
                let tag = if self.part == Part::Reasoning { "</think>\n" } else { "" };
                format!("{line_end}{tag}")
            }
        };
        self.stream.write(&format!("{rest}{gap}"))
    }
}
