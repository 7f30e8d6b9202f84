//! What a parser tells its caller as bytes come in.

/// Something that a piece of the turn settled. No event is ever taken back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The next text of the reasoning.
    Reasoning(String),
    /// The next text of the answer.
    Content(String),
    /// A call begins.
    CallBegin {
        /// Its place among the turn's calls.
        index: usize,
        /// The tool's name.
        name: String,
    },
    /// The next text of a call's arguments, which are one JSON object.
    CallArguments {
        /// The call's place.
        index: usize,
        /// The text.
        delta: String,
    },
    /// A call's arguments are complete. Whether the call is to be made is known when the turn is: see
    /// [`Turn::calls`](super::Turn::calls).
    CallEnd {
        /// The call's place.
        index: usize,
    },
}

/// The end of a list of events. What continues the last of them is joined to it, unless the caller may have seen it.
pub(super) struct Sink<'a> {
    events: &'a mut Vec<Event>,
    /// The events from here on are still to be seen.
    unseen: usize,
}

impl<'a> Sink<'a> {
    /// Appends to `events`, of which the caller may have seen all.
    pub(super) fn new(events: &'a mut Vec<Event>) -> Self {
        let unseen = events.len();
        Self { events, unseen }
    }

    /// Appends to `events`, none of which anybody has seen.
    pub(super) fn unseen(events: &'a mut Vec<Event>) -> Self {
        Self { events, unseen: 0 }
    }

    pub(super) fn reasoning(&mut self, text: &str) {
        match self.last() {
            Some(Event::Reasoning(before)) => before.push_str(text),
            _ => self.events.push(Event::Reasoning(text.to_owned())),
        }
    }

    pub(super) fn content(&mut self, text: &str) {
        match self.last() {
            Some(Event::Content(before)) => before.push_str(text),
            _ => self.events.push(Event::Content(text.to_owned())),
        }
    }

    pub(super) fn arguments(&mut self, index: usize, text: &str) {
        match self.last() {
            Some(Event::CallArguments { index: before, delta }) if *before == index => delta.push_str(text),
            _ => self.events.push(Event::CallArguments { index, delta: text.to_owned() }),
        }
    }

    /// Appends an event that continues none.
    pub(super) fn push(&mut self, event: Event) {
        self.events.push(event);
    }

    /// Moves the events of `withheld` here.
    pub(super) fn release(&mut self, withheld: &mut Vec<Event>) {
        self.events.append(withheld);
    }

    fn last(&mut self) -> Option<&mut Event> {
        self.events[self.unseen..].last_mut()
    }
}
