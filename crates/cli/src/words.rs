//! What the model writes, on its way to the terminal: reasoning apart from the answer.
//!
//! | standard output is | answer | reasoning |
//! |---|---|---|
//! | a terminal | there | there, above the answer |
//! | a file or a pipe | there | on standard error |
//!
//! Reasoning is dimmed where that is possible, else it stands between `<think>` and `</think>`.

use text::Utf8Stream;
use text::prompt::ControlTokens;

use crate::terminal::{Stream, WriteError, dim};

/// The two parts of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Before `</think>`.
    Reasoning,
    /// After it.
    Answer,
}

/// Prints a turn, token by token.
pub struct Words {
    /// The tags that part reasoning from the answer; `None` if everything is printed exactly as it was generated.
    tags: Option<ControlTokens>,
    part: Part,
    /// Whether a token has come.
    begun: bool,
    characters: Utf8Stream,
    printer: Printer,
}

impl Words {
    /// For a turn that `prompt` opens: inside reasoning if its last `<think>` has no `</think>` behind it.
    pub fn new(tags: ControlTokens, prompt: &[u32]) -> Words {
        let last = prompt.iter().rev().find(|&&token| token == tags.think || token == tags.end_think);
        let part = if last == Some(&tags.think) { Part::Reasoning } else { Part::Answer };
        Words { tags: Some(tags), part, ..Words::raw() }
    }

    /// For text that is printed exactly as it was generated; a last line break is added only on a terminal.
    pub fn raw() -> Words {
        let (characters, printer) = (Utf8Stream::default(), Printer::new());
        Words { tags: None, part: Part::Answer, begun: false, characters, printer }
    }

    /// Prints the next token, whose bytes are `bytes`. The tags around reasoning are not part of the text.
    pub fn push(&mut self, token: u32, bytes: &[u8]) -> Result<(), WriteError> {
        let is_first = !std::mem::replace(&mut self.begun, true);
        match self.tags {
            Some(tags) if token == tags.end_think => self.switch(Part::Answer),
            Some(tags) if token == tags.think && is_first => self.switch(Part::Reasoning),
            _ => {
                let text = self.characters.push(bytes);
                self.printer.print(self.part, &text)
            }
        }
    }

    /// Ends the turn.
    pub fn finish(mut self) -> Result<(), WriteError> {
        self.flush_characters()?;
        if self.tags.is_some() || Stream::Out.is_terminal() { self.printer.end_part() } else { Ok(()) }
    }

    fn switch(&mut self, part: Part) -> Result<(), WriteError> {
        self.flush_characters()?;
        self.part = part;
        Ok(())
    }

    fn flush_characters(&mut self) -> Result<(), WriteError> {
        let text = std::mem::take(&mut self.characters).finish();
        self.printer.print(self.part, &text)
    }
}

/// Where text goes, and what stands between the parts.
struct Printer {
    reasoning_stream: Stream,
    is_dimmed: bool,
    /// The part printed last, once something has been printed.
    last: Option<Part>,
    /// Whether the last text printed ended a line.
    line_ended: bool,
}

impl Printer {
    fn new() -> Printer {
        let reasoning_stream = if Stream::Out.is_terminal() { Stream::Out } else { Stream::Err };
        Printer { reasoning_stream, is_dimmed: reasoning_stream.is_colored(), last: None, line_ended: true }
    }

    fn stream(&self, part: Part) -> Stream {
        match part {
            Part::Reasoning => self.reasoning_stream,
            Part::Answer => Stream::Out,
        }
    }

    fn print(&mut self, part: Part, text: &str) -> Result<(), WriteError> {
        if text.is_empty() {
            return Ok(());
        }
        if self.last != Some(part) {
            self.end_part()?;
            if part == Part::Reasoning && !self.is_dimmed {
                self.reasoning_stream.write("<think>\n")?;
            }
            self.last = Some(part);
        }
        let stream = self.stream(part);
        let shown = shown(stream, text);
        self.line_ended = text.ends_with('\n');
        stream.write(&if part == Part::Reasoning && self.is_dimmed { dim(&shown) } else { shown })
    }

    /// Ends the line, and sets reasoning off from what follows.
    fn end_part(&mut self) -> Result<(), WriteError> {
        let Some(part) = self.last else { return Ok(()) };
        let line_end = if self.line_ended { "" } else { "\n" };
        let tag = if part == Part::Reasoning && !self.is_dimmed { "</think>\n" } else { "" };
        let gap = if part == Part::Reasoning && self.reasoning_stream == Stream::Out { "\n" } else { "" };
        self.line_ended = true;
        self.stream(part).write(&format!("{line_end}{tag}{gap}"))
    }
}

/// `text` as a stream may show it: on a terminal, control characters that could move the cursor or worse are shown as
/// pictures.
fn shown(stream: Stream, text: &str) -> String {
    let harmless = |c: char| match c {
        '\n' | '\t' => c,
        '\0'..='\x1f' => char::from_u32(0x2400 + u32::from(c)).expect("U+2400 to U+241F are characters"),
        '\x7f' => '\u{2421}',
        '\u{80}'..='\u{9f}' => char::REPLACEMENT_CHARACTER,
        c => c,
    };
    if stream.is_terminal() { text.chars().map(harmless).collect() } else { text.into() }
}
