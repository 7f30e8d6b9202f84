//! A block of calls, read as it comes in (docs/spec/conversation.md §4.3, rules 4 to 8).
//!
//! ```text
//! Invokes --header--> Parameters --header--> Text | Collected --closer--> Parameters --closer--> Invokes --closer--> Closed
//!                         |                                                   ^
//!                         +--"{"--> Object --closer of the call---------------+
//! ```
//! Anything else is [`State::Failed`]. A block reads the same text again and again as it grows, and keeps in
//! [`Block::cursor`] and [`Block::scanned`] how far it has come, so that no byte is looked at twice.

use std::sync::Arc;
use std::{iter, mem};

use super::Position;
use super::calls::Calls;
use super::events::Sink;
use super::header::{Header, HeaderEnd, Scan};
use super::tags::{Form, Match, Opener, Tags, compare};
use super::value::{Argument, JsonKind, JsonStrings, Reading, may_wrap, unwrap};
use crate::dsml;
use crate::prompt::{Call, Tool};

/// The most bytes of markup between two steps: a model that writes more of it (spaces, a name without end) is lost.
const MAX_MARKUP_BYTES: usize = 4096;
/// The deepest nesting of parameters.
const MAX_NESTED: usize = 32;

/// A block of calls that has begun.
#[derive(Debug)]
pub(super) struct Block {
    form: Form,
    tags: &'static Tags,
    tools: Arc<[Tool]>,
    /// Whether the block stands in reasoning: it must be of declared tools and followed by nothing.
    in_reasoning: bool,
    state: State,
    /// Up to here the text is dealt with.
    cursor: usize,
    /// Up to here, at or after `cursor`, the text is searched for the end of what stands at `cursor`.
    scanned: usize,
    /// Where the last step ended.
    step_end: usize,
    /// Grows with everything that leads on: a tag, a header, a byte of a value.
    progress: usize,
    calls: Calls,
    /// The tool of the call begun last, if it is declared: its place among `tools`.
    tool: Option<usize>,
    /// Number of calls that have ended.
    ended_calls: usize,
    /// The first parameter of the open call, while it may turn out to hold all of its arguments.
    wrapper: Option<(String, Argument)>,
}

#[derive(Debug)]
enum State {
    /// Between calls.
    Invokes,
    /// In the header of a call or a parameter.
    Header(Head, HeaderEnd),
    /// Between parameters. `first`: none has come yet.
    Parameters {
        first: bool,
    },
    /// In a string, which is written out as it comes.
    Text,
    /// In a value that is written out when it is complete.
    Collected(Collected),
    /// In arguments given as one JSON object.
    Object(JsonStrings),
    /// After the closer, which ended at this byte.
    Closed(usize),
    Failed(Failure),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Head {
    Invoke,
    Parameter,
}

/// A value in the making.
#[derive(Debug)]
struct Collected {
    name: String,
    reading: Reading,
    /// Whether it may hold parameters instead: nothing but space has come.
    may_nest: bool,
    /// Whether it may be all of the call's arguments.
    may_wrap: bool,
    strings: JsonStrings,
}

/// What a block that failed means for the text after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    /// Where another block may begin.
    pub(super) resume: usize,
    /// Whether the model wrote markup without end.
    pub(super) runaway: bool,
}

/// What became of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// It goes on.
    Open,
    /// It ended at this byte.
    Closed(usize),
    Failed(Failure),
}

/// A tag inside a block.
#[derive(Clone, Copy, Debug)]
enum Tag {
    Invoke,
    EndInvoke,
    Parameter,
    EndParameter,
    /// Spelt like this.
    EndBlock(&'static str),
}

impl Block {
    /// A block whose text begins with `opener`.
    pub(super) fn new(opener: &'static Opener, tools: Arc<[Tool]>, in_reasoning: bool) -> Self {
        let cursor = if opener.form == Form::Bare { 0 } else { opener.text.len() };
        Self {
            form: opener.form,
            tags: opener.tags,
            tools,
            in_reasoning,
            state: State::Invokes,
            cursor,
            scanned: cursor,
            step_end: cursor,
            progress: 0,
            calls: Calls::default(),
            tool: None,
            ended_calls: 0,
            wrapper: None,
        }
    }

    /// Whether the block can no longer turn out to be ordinary text.
    pub(super) fn is_certain(&self) -> bool {
        !self.in_reasoning
            && match self.form {
                Form::Marked => true,
                Form::Plain | Form::Bare => self.ended_calls > 0,
            }
    }

    /// Whether it must have been meant as a block, even if it turns out to be none.
    pub(super) fn is_meant(&self) -> bool {
        !self.in_reasoning && (self.form != Form::Plain || !self.calls.is_empty())
    }

    /// Grows while the block leads on, and stands still in markup that is not complete and in space.
    pub(super) fn progress(&self) -> usize {
        self.progress
    }

    /// What became of it.
    pub(super) fn status(&self) -> Status {
        match self.state {
            State::Closed(end) => Status::Closed(end),
            State::Failed(failure) => Status::Failed(failure),
            _ => Status::Open,
        }
    }

    /// Whether `text` is a block as it stands: closed, or in no need of a closer.
    pub(super) fn is_complete(&self, text: &str) -> bool {
        match self.state {
            State::Closed(_) => true,
            State::Invokes => self.form == Form::Bare && self.ended_calls > 0 && self.cursor == text.len(),
            _ => false,
        }
    }

    /// Where the byte after `text` will fall.
    pub(super) fn position(&self, text: &str) -> Position {
        let in_tag = |from: usize| text[from..].starts_with('<') && text.len() - from >= 2;
        match &self.state {
            State::Text if !in_tag(self.cursor) => Position::StringValue,
            State::Collected(value) if !in_tag(self.scanned) && !value.reading.is_json() => Position::StringValue,
            State::Collected(Collected { strings, .. }) | State::Object(strings) if !in_tag(self.scanned) => {
                if strings.inside() { Position::JsonString } else { Position::JsonStructure }
            }
            State::Closed(_) if self.in_reasoning => Position::ClosedInReasoning,
            State::Closed(_) => Position::Done,
            State::Failed(_) => Position::Free,
            _ => Position::Structure,
        }
    }

    /// The calls that have begun.
    pub(super) fn into_calls(self) -> Vec<Call> {
        self.calls.into_calls()
    }

    /// Reads on in `text`, which is all of the block's text so far.
    pub(super) fn advance(&mut self, text: &str, sink: &mut Sink<'_>) {
        while self.step(text, sink) {}
    }

    /// Ends a block that the turn's end cut off, if only closers are missing: those of the call and of the block.
    pub(super) fn repair(&mut self, text: &str, sink: &mut Sink<'_>) -> bool {
        // A closer may be cut off. An opener is another matter: something is missing that was to be part of the calls.
        let ends_at = |at: usize| text[at..].is_empty() || text[at..].starts_with("</");
        match self.state {
            State::Invokes => self.ended_calls > 0 && ends_at(self.cursor),
            State::Parameters { .. } if self.calls.nested() == 0 && ends_at(self.cursor) => {
                self.end_call(sink);
                true
            }
            State::Object(_) => ends_at(self.scanned) && self.end_object_call(&text[self.cursor..self.scanned], sink),
            _ => false,
        }
    }

    /// Takes one step; whether there may be another.
    fn step(&mut self, text: &str, sink: &mut Sink<'_>) -> bool {
        match &self.state {
            State::Invokes => self.between_invokes(text, sink),
            State::Parameters { first } => self.between_parameters(*first, text, sink),
            State::Header(..) => self.header(text, sink),
            State::Text => {
                let from = self.cursor;
                let goes_on = self.text(text, sink);
                self.progress += self.cursor - from;
                goes_on
            }
            State::Collected(_) => self.collected(text, sink),
            State::Object(_) => self.object(text, sink),
            State::Closed(end) => self.after_closer(*end, text),
            State::Failed(_) => false,
        }
    }

    fn between_invokes(&mut self, text: &str, sink: &mut Sink<'_>) -> bool {
        let Some(rest) = self.skip_space(text) else { return false };
        let tags = self.tags;
        match compare(rest, iter::once((tags.invoke_opener, Tag::Invoke)).chain(block_closers(tags))) {
            Match::Whole(tag) => self.tag(tag, sink),
            Match::Partial => false,
            // Nothing tells where a block without an opener ends but that it does not go on.
            Match::No if self.form == Form::Bare && self.ended_calls > 0 => {
                self.become_state(State::Closed(self.step_end))
            }
            Match::No => self.fail(self.cursor),
        }
    }

    fn between_parameters(&mut self, first: bool, text: &str, sink: &mut Sink<'_>) -> bool {
        let Some(rest) = self.skip_space(text) else { return false };
        if first && rest.starts_with('{') {
            self.scanned = self.cursor;
            return self.become_state(State::Object(JsonStrings::default()));
        }
        let tags = self.tags;
        let parameter = iter::once((tags.parameter_opener, Tag::Parameter));
        let found = if self.calls.nested() > 0 {
            compare(rest, parameter.chain([(tags.parameter_closer, Tag::EndParameter)]))
        } else {
            let call = [(tags.invoke_closer, Tag::EndInvoke), (tags.invoke_opener, Tag::Invoke)];
            compare(rest, parameter.chain(call).chain(block_closers(tags)))
        };
        match found {
            Match::Whole(tag) => self.tag(tag, sink),
            Match::Partial => false,
            Match::No => self.fail(self.cursor),
        }
    }

    /// Takes a tag at `cursor`, where it may stand. The opener of a call and the closer of the block close an open call.
    fn tag(&mut self, tag: Tag, sink: &mut Sink<'_>) -> bool {
        let in_call = matches!(self.state, State::Parameters { .. });
        let tags = self.tags;
        if in_call && matches!(tag, Tag::Invoke | Tag::EndInvoke | Tag::EndBlock(_)) {
            self.end_call(sink);
        }
        match tag {
            Tag::Invoke => self.begin_header(Head::Invoke, tags.invoke_opener),
            Tag::Parameter => self.begin_header(Head::Parameter, tags.parameter_opener),
            Tag::EndInvoke => self.finish_step(self.cursor + tags.invoke_closer.len(), State::Invokes),
            Tag::EndParameter => {
                self.calls.close_object(sink);
                self.finish_step(self.cursor + tags.parameter_closer.len(), State::Parameters { first: false })
            }
            Tag::EndBlock(_) if self.ended_calls == 0 => self.fail(self.cursor),
            Tag::EndBlock(closer) => {
                let end = self.cursor + closer.len();
                self.finish_step(end, State::Closed(end))
            }
        }
    }

    fn begin_header(&mut self, head: Head, opener: &str) -> bool {
        self.scanned = self.cursor + opener.len();
        self.become_state(State::Header(head, HeaderEnd::default()))
    }

    fn header(&mut self, text: &str, sink: &mut Sink<'_>) -> bool {
        let State::Header(head, end) = &mut self.state else { return false };
        let (head, opener) = match head {
            Head::Invoke => (Head::Invoke, self.tags.invoke_opener),
            Head::Parameter => (Head::Parameter, self.tags.parameter_opener),
        };
        let (scan, bytes) = end.scan(&text[self.scanned..]);
        self.scanned += bytes;
        if self.scanned - self.step_end > MAX_MARKUP_BYTES {
            return self.run_away();
        }
        if scan == Scan::More {
            return false;
        }
        let header = Header::read(&text[self.cursor + opener.len()..self.scanned]).filter(|_| scan == Scan::End);
        match (header, head) {
            (None, _) => self.fail(self.cursor),
            (Some(header), Head::Invoke) => self.begin_call(header, self.scanned + 1, sink),
            (Some(header), Head::Parameter) => self.begin_parameter(header, self.scanned + 1, sink),
        }
    }

    fn begin_call(&mut self, header: Header, end: usize, sink: &mut Sink<'_>) -> bool {
        // Text that only might be a block must name tools that there are.
        let must_be_declared = self.in_reasoning || self.form != Form::Marked && self.ended_calls == 0;
        self.tool = self.tools.iter().position(|tool| tool.name() == header.name);
        if header.name.is_empty() || must_be_declared && self.tool.is_none() {
            return self.fail(self.cursor);
        }
        self.calls.begin(header.name, sink);
        if header.self_closing {
            self.end_call(sink);
            return self.finish_step(end, State::Invokes);
        }
        self.finish_step(end, State::Parameters { first: true })
    }

    fn begin_parameter(&mut self, header: Header, end: usize, sink: &mut Sink<'_>) -> bool {
        if header.self_closing {
            return self.fail(self.cursor);
        }
        let first = self.wrapper.is_none() && self.calls.has_no_argument();
        self.write_wrapper(sink);
        // The schema is consulted for the call's own parameters, not for what is nested in them.
        let tool = self.tool.filter(|_| self.calls.nested() == 0).map(|tool| &self.tools[tool]);
        let reading = Reading::of(header.string, tool, &header.name);
        let may_wrap = first && tool.is_some_and(|tool| may_wrap(tool, &header.name));
        if reading == Reading::Text && !may_wrap {
            self.calls.name(&header.name, sink);
            self.calls.quote(sink);
            return self.finish_step(end, State::Text);
        }
        let may_nest = matches!(reading, Reading::Schema(_));
        let value = Collected { name: header.name, reading, may_nest, may_wrap, strings: JsonStrings::default() };
        self.finish_step(end, State::Collected(value))
    }

    /// Writes a string out as far as it has come.
    fn text(&mut self, text: &str, sink: &mut Sink<'_>) -> bool {
        let closer = self.tags.parameter_closer;
        let mut at = self.cursor;
        while let Some(found) = memchr::memchr2(b'<', b'&', &text.as_bytes()[at..]) {
            at += found;
            match compare(&text[at..], [(closer, true), (dsml::ESCAPED_PARAMETER_CLOSER, false)]) {
                Match::No => at += 1,
                Match::Partial => {
                    self.calls.string_piece(&text[self.cursor..at], sink);
                    self.cursor = at;
                    return false;
                }
                Match::Whole(true) => {
                    self.calls.string_piece(&text[self.cursor..at], sink);
                    self.calls.quote(sink);
                    return self.finish_step(at + closer.len(), State::Parameters { first: false });
                }
                Match::Whole(false) => {
                    self.calls.string_piece(&text[self.cursor..at], sink);
                    self.calls.string_piece(dsml::PARAMETER_CLOSER, sink);
                    at += dsml::ESCAPED_PARAMETER_CLOSER.len();
                    self.cursor = at;
                }
            }
        }
        self.calls.string_piece(&text[self.cursor..], sink);
        self.cursor = text.len();
        false
    }

    fn collected(&mut self, text: &str, sink: &mut Sink<'_>) -> bool {
        let State::Collected(value) = &mut self.state else { return false };
        if value.may_nest {
            self.scanned = text.len() - text[self.scanned..].trim_ascii_start().len();
            match compare(&text[self.scanned..], [(self.tags.parameter_opener, ())]) {
                Match::Partial => return false,
                Match::Whole(()) => return self.begin_nested(sink),
                Match::No => value.may_nest = false,
            }
        }
        let closer = self.tags.parameter_closer;
        let from = self.scanned;
        let end = find_tag(text, &mut self.scanned, [(closer, ())]);
        let piece = &text[from..self.scanned];
        let is_space = value.reading.is_json() && !value.strings.inside() && piece.trim_ascii().is_empty();
        self.progress += if is_space { 0 } else { piece.len() };
        value.strings.follow(piece.as_bytes());
        if end.is_none() {
            return false;
        }
        let argument = value.reading.read(&text[self.cursor..self.scanned]);
        let name = mem::take(&mut value.name);
        if value.may_wrap {
            self.wrapper = Some((name, argument));
        } else {
            self.calls.parameter(&name, &argument, sink);
        }
        self.finish_step(self.scanned + closer.len(), State::Parameters { first: false })
    }

    /// A value that begins with a parameter is an object of its parameters.
    fn begin_nested(&mut self, sink: &mut Sink<'_>) -> bool {
        let State::Collected(value) = &self.state else { return false };
        if self.calls.nested() == MAX_NESTED {
            return self.fail(self.scanned);
        }
        self.calls.name(&value.name, sink);
        self.calls.open_object(sink);
        self.finish_step(self.scanned, State::Parameters { first: false })
    }

    fn object(&mut self, text: &str, sink: &mut Sink<'_>) -> bool {
        let State::Object(strings) = &mut self.state else { return false };
        let closers = iter::once((self.tags.invoke_closer, Tag::EndInvoke)).chain(block_closers(self.tags));
        let end = loop {
            let from = self.scanned;
            let end = find_tag(text, &mut self.scanned, closers.clone());
            let piece = &text[from..self.scanned];
            self.progress += if !strings.inside() && piece.trim_ascii().is_empty() { 0 } else { piece.len() };
            strings.follow(piece.as_bytes());
            if !strings.inside() || self.scanned == text.len() {
                break end;
            }
            // A tag inside a string is text.
            strings.follow(b"<");
            self.scanned += 1;
        };
        let Some(tag) = end else { return false };
        let body = &text[self.cursor..self.scanned];
        self.cursor = self.scanned;
        if !self.end_object_call(body, sink) {
            return self.fail(self.cursor);
        }
        self.state = State::Invokes;
        self.tag(tag, sink)
    }

    /// After the closer: in reasoning the block is one only if nothing follows.
    fn after_closer(&mut self, end: usize, text: &str) -> bool {
        if self.in_reasoning {
            self.cursor = text.len() - text[self.cursor..].trim_ascii_start().len();
            if self.cursor < text.len() {
                return self.fail(end);
            }
        }
        false
    }

    fn end_call(&mut self, sink: &mut Sink<'_>) {
        self.ended_calls += 1;
        let wrapped = match (self.tool, &self.wrapper) {
            (Some(tool), Some((_, wrapper))) => unwrap(&self.tools[tool], wrapper),
            _ => None,
        };
        if let Some(object) = wrapped {
            self.calls.end_with_object(object, sink);
            self.wrapper = None;
        } else {
            self.write_wrapper(sink);
            self.calls.end(sink);
        }
    }

    /// Ends a call whose arguments are the JSON object in `body`; whether it is one.
    fn end_object_call(&mut self, body: &str, sink: &mut Sink<'_>) -> bool {
        let is_object = JsonKind::of(body.trim_ascii()) == Some(JsonKind::Object);
        if is_object {
            self.ended_calls += 1;
            self.calls.end_with_object(body.trim_ascii(), sink);
        }
        is_object
    }

    /// What might have been a wrapper is an ordinary parameter.
    fn write_wrapper(&mut self, sink: &mut Sink<'_>) {
        if let Some((name, argument)) = self.wrapper.take() {
            self.calls.parameter(&name, &argument, sink);
        }
    }

    /// Passes the space at `cursor`; what follows it, if that has come.
    fn skip_space<'a>(&mut self, text: &'a str) -> Option<&'a str> {
        let space = text[self.cursor..].len() - text[self.cursor..].trim_ascii_start().len();
        self.cursor += space;
        if self.cursor - self.step_end > MAX_MARKUP_BYTES {
            self.cursor = self.step_end + MAX_MARKUP_BYTES;
            self.run_away();
            return None;
        }
        Some(&text[self.cursor..]).filter(|rest| !rest.is_empty())
    }

    fn finish_step(&mut self, end: usize, state: State) -> bool {
        (self.cursor, self.scanned, self.step_end) = (end, end, end);
        self.become_state(state)
    }

    fn become_state(&mut self, state: State) -> bool {
        self.progress += 1;
        self.state = state;
        true
    }

    fn fail(&mut self, resume: usize) -> bool {
        self.state = State::Failed(Failure { resume, runaway: false });
        false
    }

    fn run_away(&mut self) -> bool {
        self.state = State::Failed(Failure { resume: self.cursor, runaway: true });
        false
    }
}

fn block_closers(tags: &'static Tags) -> impl Iterator<Item = (&'static str, Tag)> + Clone {
    tags.block_closers.iter().map(|&closer| (closer, Tag::EndBlock(closer)))
}

/// Searches `text` from `scanned` on for the first of `tags`, which all begin with `<`. Leaves `scanned` at the tag, at what
/// may become one, or at the end.
fn find_tag<T>(
    text: &str,
    scanned: &mut usize,
    tags: impl IntoIterator<Item = (&'static str, T)> + Clone,
) -> Option<T> {
    while let Some(found) = memchr::memchr(b'<', &text.as_bytes()[*scanned..]) {
        *scanned += found;
        match compare(&text[*scanned..], tags.clone()) {
            Match::Whole(tag) => return Some(tag),
            Match::Partial => return None,
            Match::No => *scanned += 1,
        }
    }
    *scanned = text.len();
    None
}
