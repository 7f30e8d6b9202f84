//! Bytes to events, and the content up to a stop string.

use text::StopStrings;
use text::parse::{EngineFinish, Event, Finish, ParseOptions, Position, Turn, TurnParser};

/// A parser whose content ends at a stop string.
pub struct Output {
    parser: TurnParser,
    content: Content,
}

/// The content up to a stop string.
struct Content {
    stop: StopStrings,
    /// What was handed out.
    shown: String,
}

impl Output {
    /// `strict`: the parser is [`TurnParser::strict`].
    pub fn new(parse: &ParseOptions, strict: bool, stop_strings: Vec<String>) -> Output {
        let parser = if strict { TurnParser::strict(parse) } else { TurnParser::new(parse) };
        Output { parser, content: Content { stop: StopStrings::new(stop_strings), shown: String::new() } }
    }

    /// See [`TurnParser::announce_block`].
    pub fn announce_block(&mut self) {
        self.parser.announce_block();
    }

    pub fn in_reasoning(&self) -> bool {
        self.parser.in_reasoning()
    }

    pub fn position(&self) -> Position {
        self.parser.position()
    }

    /// See [`TurnParser::is_idle`].
    pub fn is_idle(&self) -> bool {
        self.parser.is_idle()
    }

    /// Whether a stop string occurred.
    pub fn is_stopped(&self) -> bool {
        self.content.stop.matched().is_some()
    }

    /// Takes a token's bytes; what they settle.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        self.parser.push(bytes, &mut events);
        self.content.up_to_stop(events)
    }

    /// Ends the turn: what it came to, its last events, and the stop string that occurred.
    pub fn finish(self, finish: EngineFinish) -> (Turn, Vec<Event>, Option<String>) {
        let Output { parser, mut content } = self;
        let mut events = Vec::new();
        let mut turn = parser.finish(finish, &mut events);
        // The text of a malformed block is none that the client's stop strings are for.
        let block = match events.last_mut() {
            Some(Event::Content(text)) => text.split_off(text.len() - turn.malformed_bytes),
            _ => String::new(),
        };
        let mut events = content.up_to_stop(events);
        content.release(&mut events);
        let stop_string = content.stop.matched().map(str::to_owned);
        if stop_string.is_none() {
            content.show(block, &mut events);
        } else {
            (turn.calls, turn.raw_block, turn.finish) = (Vec::new(), None, Finish::Stop);
            (turn.malformed, turn.malformed_bytes) = (false, 0);
        }
        turn.content = content.shown;
        (turn, events, stop_string)
    }
}

impl Content {
    /// The events with the content up to a stop string, and none after it. What comes after content ends it.
    fn up_to_stop(&mut self, events: Vec<Event>) -> Vec<Event> {
        let mut shown = Vec::new();
        for event in events {
            if self.stop.matched().is_some() {
                break;
            }
            match event {
                Event::Content(text) => {
                    let (text, _) = self.stop.push(&text);
                    self.show(text, &mut shown);
                }
                other => {
                    self.release(&mut shown);
                    shown.push(other);
                }
            }
        }
        shown
    }

    /// Hands out the content that was kept back.
    fn release(&mut self, shown: &mut Vec<Event>) {
        let text = self.stop.finish();
        self.show(text, shown);
    }

    fn show(&mut self, text: String, shown: &mut Vec<Event>) {
        if !text.is_empty() {
            self.shown.push_str(&text);
            shown.push(Event::Content(text));
        }
    }
}
