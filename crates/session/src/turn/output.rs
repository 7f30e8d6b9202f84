//! Bytes to events, and the content up to a stop string.

use text::StopStrings;
use text::parse::{EngineFinish, Event, Finish, ParseOptions, Position, Turn, TurnParser};

/// A parser whose content ends at a stop string.
pub struct Output {
    parser: TurnParser,
    stop: StopStrings,
    /// The content handed out.
    content: String,
}

impl Output {
    pub fn new(parse: &ParseOptions, stop_strings: Vec<String>) -> Output {
        Output { parser: TurnParser::new(parse), stop: StopStrings::new(stop_strings), content: String::new() }
    }

    pub fn in_reasoning(&self) -> bool {
        self.parser.in_reasoning()
    }

    pub fn position(&self) -> Position {
        self.parser.position()
    }

    /// The stop string that occurred.
    pub fn stop_string(&self) -> Option<&str> {
        self.stop.matched()
    }

    /// Takes a token's bytes; what they settle.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        self.parser.push(bytes, &mut events);
        self.up_to_stop(events)
    }

    /// Ends the turn; the last events.
    pub fn finish(mut self, finish: EngineFinish) -> (Turn, Vec<Event>) {
        let mut events = Vec::new();
        let parser = std::mem::replace(&mut self.parser, TurnParser::new(&ParseOptions::default()));
        let mut turn = parser.finish(finish, &mut events);
        let mut events = self.up_to_stop(events);
        self.release(&mut events);
        if self.stop_string().is_some() {
            (turn.calls, turn.raw_block, turn.malformed, turn.finish) = (Vec::new(), None, false, Finish::Stop);
        }
        turn.content = self.content;
        (turn, events)
    }

    /// The events with the content up to a stop string, and none after it. What comes after content ends it.
    fn up_to_stop(&mut self, events: Vec<Event>) -> Vec<Event> {
        let mut shown = Vec::new();
        for event in events {
            if self.stop_string().is_some() {
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
            self.content.push_str(&text);
            shown.push(Event::Content(text));
        }
    }
}
