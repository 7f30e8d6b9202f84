//! The states of a turn: reasoning, answer, block of calls.

use std::mem;
use std::sync::Arc;

use super::block::{Block, Status};
use super::events::{Event, Sink};
use super::tags::{self, END_OF_TURN, END_THINK, MARKED, Match, OPENERS, Opener, THINK, compare};
use super::{EngineFinish, Finish, ParseOptions, Position, Turn};
use crate::Utf8Stream;
use crate::prompt::{Call, Tool};

/// Reads a turn as it is generated.
#[derive(Debug)]
pub struct TurnParser {
    /// Whether a `</think>` in the answer is dropped.
    thinking: bool,
    tools: Option<Arc<[Tool]>>,
    blocks: Blocks,
    utf8: Utf8Stream,
    /// Text of which something is not dealt with.
    buffer: String,
    /// What the buffer holds before this is dealt with.
    start: usize,
    /// In the buffer: no tag begins between `start` and here.
    scanned: usize,
    /// In the buffer: what follows may be the literal that ends the turn.
    visible: usize,
    /// The space at the end of the text so far, which may be the separator of a block.
    space: String,
    in_reasoning: bool,
    /// Whether what came last led nowhere.
    is_idle: bool,
    state: State,
    reasoning: String,
    content: String,
}

/// Which openers begin a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blocks {
    /// Every one.
    All,
    /// The canonical one in the answer, once it was announced.
    Announced(bool),
}

#[derive(Debug)]
enum State {
    /// A think tag may lead.
    Start,
    /// In reasoning or answer.
    Text,
    /// In a block, which begins at `start`.
    Block(Box<Pending>),
    /// In the text of a block that went wrong, and that begins at `start`.
    Malformed { runaway: bool },
    /// After a block.
    Done { calls: Vec<Call>, raw_block: String },
}

/// A block that goes on.
#[derive(Debug)]
struct Pending {
    block: Block,
    /// The block's text is searched for `</think>` up to here.
    searched: usize,
    /// Events of a block that may turn out to be text.
    withheld: Vec<Event>,
}

/// What a `<` in the text begins.
enum Tag {
    EndThink,
    Opener(&'static Opener),
}

impl TurnParser {
    /// A parser for a turn that has not begun.
    pub fn new(options: &ParseOptions) -> Self {
        Self {
            thinking: options.thinking,
            tools: options.tools.as_deref().map(Arc::from),
            blocks: Blocks::All,
            utf8: Utf8Stream::default(),
            buffer: String::new(),
            start: 0,
            scanned: 0,
            visible: 0,
            space: String::new(),
            in_reasoning: options.thinking,
            is_idle: false,
            state: State::Start,
            reasoning: String::new(),
            content: String::new(),
        }
    }

    /// A parser that takes no block but one in the answer with the canonical opener and announced by
    /// [`TurnParser::announce_block`]: so there are no calls but those that grammar mode watched over.
    pub fn strict(options: &ParseOptions) -> Self {
        Self { blocks: Blocks::Announced(false), ..Self::new(options) }
    }

    /// Tells that the bytes pushed next are the marker of a block's opener, of which `<` has come: [`TurnParser::strict`].
    pub fn announce_block(&mut self) {
        if let Blocks::Announced(announced) = &mut self.blocks {
            *announced = true;
        }
    }

    /// Takes the next bytes, cut anywhere, and appends what they settle to `events`.
    pub fn push(&mut self, bytes: &[u8], events: &mut Vec<Event>) {
        if matches!(self.state, State::Done { .. }) {
            return;
        }
        let before = self.block_progress();
        self.utf8.push_to(bytes, &mut self.buffer);
        self.visible = self.buffer.len() - tags::end_of_turn_bytes(&self.buffer);
        self.advance(&mut Sink::new(events));
        self.is_idle = before.is_some() && before == self.block_progress();
    }

    /// Whether the bytes pushed last, in a block of calls, led nowhere: markup that is not complete, or space that is no
    /// value's. A block that goes on like this should be stopped.
    pub fn is_idle(&self) -> bool {
        self.is_idle
    }

    /// How far a block has come.
    fn block_progress(&self) -> Option<usize> {
        match &self.state {
            State::Block(pending) => Some(pending.block.progress()),
            _ => None,
        }
    }

    /// Whether what comes next is reasoning.
    pub fn in_reasoning(&self) -> bool {
        self.in_reasoning
    }

    /// Where the next byte will fall.
    pub fn position(&self) -> Position {
        match &self.state {
            // Half an opener counts as soon as it can be nothing else.
            State::Text if self.buffer[self.scanned..].starts_with(MARKED) && self.may_open() => Position::Structure,
            State::Start | State::Text | State::Malformed { runaway: false } => Position::Free,
            State::Block(pending) => pending.block.position(self.live()),
            State::Malformed { runaway: true } => Position::Runaway,
            State::Done { .. } => Position::Done,
        }
    }

    /// Ends the turn: appends the last events and returns what it came to.
    pub fn finish(mut self, finish: EngineFinish, events: &mut Vec<Event>) -> Turn {
        let sink = &mut Sink::new(events);
        if !matches!(self.state, State::Done { .. }) {
            self.buffer.push_str(&std::mem::take(&mut self.utf8).finish());
            self.visible = self.buffer.strip_suffix(END_OF_TURN).unwrap_or(&self.buffer).len();
            self.advance(sink);
        }
        self.end(finish, sink)
    }

    /// Takes every step that the buffer allows.
    fn advance(&mut self, sink: &mut Sink<'_>) {
        while match self.state {
            State::Start => self.lead(),
            State::Text => self.text(sink),
            State::Block(_) => self.block(sink),
            State::Malformed { .. } | State::Done { .. } => false,
        } {}
        self.buffer.drain(..self.start);
        self.scanned = self.scanned.saturating_sub(self.start);
        self.visible -= self.start;
        self.start = 0;
    }

    /// The text that is not dealt with.
    fn live(&self) -> &str {
        &self.buffer[self.start..self.visible]
    }

    /// The turn's first bytes: a think tag there says how the turn was opened, whatever the prompt did.
    fn lead(&mut self) -> bool {
        let end_think = (!self.thinking).then_some((END_THINK, false));
        match compare(self.live(), [(THINK, true)].into_iter().chain(end_think)) {
            Match::Partial => return false,
            Match::Whole(true) => (self.start, self.in_reasoning) = (THINK.len(), true),
            Match::Whole(false) => self.start = END_THINK.len(),
            Match::No => {}
        }
        self.scanned = self.start;
        self.state = State::Text;
        true
    }

    /// Hands out text up to the next tag.
    fn text(&mut self, sink: &mut Sink<'_>) -> bool {
        while let Some(found) = memchr::memchr(b'<', &self.buffer.as_bytes()[self.scanned..self.visible]) {
            self.scanned += found;
            match self.tag() {
                Match::No => self.scanned += 1,
                Match::Partial => {
                    self.hand_out(self.scanned, sink);
                    return false;
                }
                Match::Whole(Tag::EndThink) => self.end_think(self.scanned, sink),
                Match::Whole(Tag::Opener(opener)) => {
                    self.hand_out(self.scanned, sink);
                    let tools = self.tools.clone().unwrap_or_default();
                    let block = Block::new(opener, tools, self.in_reasoning);
                    let pending = Pending { block, searched: 0, withheld: Vec::new() };
                    self.state = State::Block(Box::new(pending));
                    return true;
                }
            }
        }
        self.scanned = self.visible;
        self.hand_out(self.visible, sink);
        false
    }

    /// What the `<` at `scanned` begins.
    fn tag(&self) -> Match<Tag> {
        let end_think = (self.in_reasoning || self.thinking).then_some((END_THINK, Tag::EndThink));
        let openers = self.openers().iter().map(|opener| (opener.text, Tag::Opener(opener)));
        match compare(&self.buffer[self.scanned..self.visible], end_think.into_iter().chain(openers)) {
            Match::Whole(Tag::Opener(_)) if !self.may_open() => Match::No,
            found => found,
        }
    }

    /// The openers to look for.
    fn openers(&self) -> &'static [Opener] {
        match self.blocks {
            _ if self.tools.is_none() => &[],
            Blocks::All => &OPENERS,
            Blocks::Announced(_) if self.in_reasoning => &[],
            Blocks::Announced(_) => &OPENERS[..1],
        }
    }

    /// Whether an opener that comes now begins a block.
    fn may_open(&self) -> bool {
        !self.openers().is_empty() && self.blocks != Blocks::Announced(false)
    }

    /// Deals with a `</think>` at `at`. In the answer it is dropped; what precedes it is still the end of the text so far.
    fn end_think(&mut self, at: usize, sink: &mut Sink<'_>) {
        self.hand_out(at, sink);
        if self.in_reasoning {
            self.hand_out_space(sink);
            self.in_reasoning = false;
        }
        self.start = at + END_THINK.len();
        self.scanned = self.start;
    }

    /// Reads on in a block.
    fn block(&mut self, sink: &mut Sink<'_>) -> bool {
        let text = &self.buffer[self.start..self.visible];
        let State::Block(pending) = &mut self.state else { return false };
        if self.in_reasoning {
            let found = memchr::memmem::find(&text.as_bytes()[pending.searched..], END_THINK.as_bytes());
            if let Some(found) = found {
                let at = self.start + pending.searched + found;
                self.state = State::Text;
                self.end_think(at, sink);
                return true;
            }
            pending.searched = pending.searched.max(text.len().saturating_sub(END_THINK.len() - 1));
        }
        if pending.block.is_certain() {
            pending.block.advance(text, sink);
        } else {
            pending.block.advance(text, &mut Sink::unseen(&mut pending.withheld));
        }
        let is_certain = pending.block.is_certain();
        if is_certain {
            sink.release(&mut pending.withheld);
        }
        match pending.block.status() {
            Status::Closed(end) if is_certain => self.accept(self.start + end),
            Status::Open | Status::Closed(_) => false,
            Status::Failed(failure) if is_certain => {
                self.state = State::Malformed { runaway: failure.runaway };
                false
            }
            Status::Failed(failure) => {
                self.scanned = self.start + failure.resume.max(1);
                self.state = State::Text;
                true
            }
        }
    }

    /// The block's calls are those of the turn; its text ends at `end`.
    fn accept(&mut self, end: usize) -> bool {
        let mut raw_block = mem::take(&mut self.space);
        raw_block.push_str(&self.buffer[self.start..end]);
        self.start = self.visible;
        if let State::Block(pending) = mem::replace(&mut self.state, State::Text) {
            self.state = State::Done { calls: pending.block.into_calls(), raw_block };
        }
        false
    }

    /// Hands out the text before `end`, except for space at its end where that may part a block from it.
    fn hand_out(&mut self, end: usize, sink: &mut Sink<'_>) {
        let text = &self.buffer[self.start..end];
        let now = if self.tools.is_some() { text.trim_ascii_end() } else { text };
        let space = &text[now.len()..];
        if !now.is_empty() {
            let whole = if self.in_reasoning { &mut self.reasoning } else { &mut self.content };
            for part in [self.space.as_str(), now].into_iter().filter(|part| !part.is_empty()) {
                whole.push_str(part);
                if self.in_reasoning { sink.reasoning(part) } else { sink.content(part) }
            }
            self.space.clear();
        }
        self.space.push_str(space);
        self.start = end;
    }

    /// Hands out the space that was kept back.
    fn hand_out_space(&mut self, sink: &mut Sink<'_>) {
        let space = mem::take(&mut self.space);
        if space.is_empty() {
            return;
        }
        if self.in_reasoning {
            self.reasoning.push_str(&space);
            sink.reasoning(&space);
        } else {
            self.content.push_str(&space);
            sink.content(&space);
        }
    }

    /// Hands out everything.
    fn hand_out_all(&mut self, sink: &mut Sink<'_>) {
        self.hand_out(self.visible, sink);
        self.hand_out_space(sink);
    }

    /// Settles what the end of the turn settles.
    fn end(mut self, finish: EngineFinish, sink: &mut Sink<'_>) -> Turn {
        let content_bytes = self.content.len();
        let malformed = match &self.state {
            State::Start | State::Text => {
                self.hand_out_all(sink);
                false
            }
            State::Block(_) => !self.end_block(finish, sink),
            State::Malformed { .. } => {
                self.hand_out_all(sink);
                true
            }
            State::Done { .. } => finish == EngineFinish::Interrupted,
        };
        let malformed_bytes = if malformed { self.content.len() - content_bytes } else { 0 };
        let Self { reasoning, content, state, .. } = self;
        let (finish, calls, raw_block) = match (state, finish) {
            (State::Done { calls, raw_block }, _) if !malformed => (Finish::ToolCalls, calls, Some(raw_block)),
            (_, EngineFinish::Stop | EngineFinish::Runaway) => (Finish::Stop, Vec::new(), None),
            (_, EngineFinish::Length | EngineFinish::Interrupted) => (Finish::Length, Vec::new(), None),
        };
        Turn { reasoning, content, calls, finish, malformed, malformed_bytes, raw_block }
    }

    /// Settles what a block is that the end of the turn found open, or closed inside reasoning. False if it is malformed.
    fn end_block(&mut self, finish: EngineFinish, sink: &mut Sink<'_>) -> bool {
        let text = &self.buffer[self.start..self.visible];
        let State::Block(pending) = &mut self.state else { return true };
        let block = &mut pending.block;
        let is_certain = block.is_certain();
        let is_good = match finish {
            EngineFinish::Stop => block.is_complete(text) || is_certain && block.repair(text, sink),
            EngineFinish::Length => block.is_complete(text),
            EngineFinish::Runaway | EngineFinish::Interrupted => false,
        };
        if is_good {
            sink.release(&mut pending.withheld);
            let end = self.start + text.trim_ascii_end().len();
            self.accept(end);
            return true;
        }
        let is_text = !block.is_meant() && finish != EngineFinish::Runaway;
        let is_cut_off = matches!(finish, EngineFinish::Length | EngineFinish::Interrupted);
        if !(is_certain && is_cut_off) {
            self.hand_out_all(sink);
        }
        is_text
    }
}
