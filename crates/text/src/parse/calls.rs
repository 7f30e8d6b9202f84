//! The calls of a block as they are written out: arguments as JSON text, a piece at a time.

use super::events::{Event, Sink};
use super::value::Argument;
use crate::prompt::Call;

/// The calls so far. The last of them may be open.
#[derive(Debug, Default)]
pub(super) struct Calls {
    calls: Vec<Call>,
    /// The objects open in the arguments of the last call, outermost first: whether each has a member yet.
    objects: Vec<bool>,
}

impl Calls {
    /// The calls.
    pub(super) fn into_calls(self) -> Vec<Call> {
        self.calls
    }

    /// Whether no call has begun.
    pub(super) fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// Whether the open call has no argument yet.
    pub(super) fn has_no_argument(&self) -> bool {
        self.objects == [false]
    }

    /// Number of objects that are open inside the arguments of the open call.
    pub(super) fn nested(&self) -> usize {
        self.objects.len().saturating_sub(1)
    }

    /// A call begins.
    pub(super) fn begin(&mut self, name: String, sink: &mut Sink<'_>) {
        sink.push(Event::CallBegin { index: self.calls.len(), name: name.clone() });
        self.calls.push(Call { id: None, name, arguments: String::new() });
        self.open_object(sink);
    }

    /// The open call ends.
    pub(super) fn end(&mut self, sink: &mut Sink<'_>) {
        self.close_object(sink);
        sink.push(Event::CallEnd { index: self.calls.len() - 1 });
    }

    /// The open call, which has no arguments yet, ends with these: the text of a JSON object.
    pub(super) fn end_with_object(&mut self, object: &str, sink: &mut Sink<'_>) {
        self.objects.clear();
        self.write(sink, |text| text.push_str(&object[1..])); // `{` was written when the call began
        sink.push(Event::CallEnd { index: self.calls.len() - 1 });
    }

    /// A whole parameter.
    pub(super) fn parameter(&mut self, name: &str, value: &Argument, sink: &mut Sink<'_>) {
        self.name(name, sink);
        match value {
            Argument::Json(json) => self.write(sink, |text| text.push_str(json)),
            Argument::Text(value) => {
                self.quote(sink);
                self.string_piece(value, sink);
                self.quote(sink);
            }
        }
    }

    /// The name of a parameter; its value follows.
    pub(super) fn name(&mut self, name: &str, sink: &mut Sink<'_>) {
        let has_member = self.objects.last_mut().is_some_and(|has_member| std::mem::replace(has_member, true));
        self.write(sink, |text| {
            text.push_str(if has_member { ", \"" } else { "\"" });
            escape_into(text, name);
            text.push_str("\": ");
        });
    }

    /// Begins or ends a string.
    pub(super) fn quote(&mut self, sink: &mut Sink<'_>) {
        self.write(sink, |text| text.push('"'));
    }

    /// A piece of a string's value.
    pub(super) fn string_piece(&mut self, piece: &str, sink: &mut Sink<'_>) {
        if !piece.is_empty() {
            self.write(sink, |text| escape_into(text, piece));
        }
    }

    /// Begins an object.
    pub(super) fn open_object(&mut self, sink: &mut Sink<'_>) {
        self.objects.push(false);
        self.write(sink, |text| text.push('{'));
    }

    /// Ends the object begun last.
    pub(super) fn close_object(&mut self, sink: &mut Sink<'_>) {
        self.objects.pop();
        self.write(sink, |text| text.push('}'));
    }

    /// Appends to the arguments of the last call.
    fn write(&mut self, sink: &mut Sink<'_>, append: impl FnOnce(&mut String)) {
        let index = self.calls.len() - 1;
        let arguments = &mut self.calls[index].arguments;
        let before = arguments.len();
        append(arguments);
        sink.arguments(index, &arguments[before..]);
    }
}

/// Appends `text` as it stands inside a JSON string.
fn escape_into(json: &mut String, text: &str) {
    let is_special = |byte: u8| byte < 0x20 || byte == b'"' || byte == b'\\';
    let mut rest = text;
    while let Some(at) = rest.bytes().position(is_special) {
        json.push_str(&rest[..at]);
        match rest.as_bytes()[at] {
            b'"' => json.push_str("\\\""),
            b'\\' => json.push_str("\\\\"),
            b'\n' => json.push_str("\\n"),
            b'\r' => json.push_str("\\r"),
            b'\t' => json.push_str("\\t"),
            8 => json.push_str("\\b"),
            12 => json.push_str("\\f"),
            control => json.push_str(&format!("\\u{control:04x}")),
        }
        rest = &rest[at + 1..];
    }
    json.push_str(rest);
}
