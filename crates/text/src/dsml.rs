//! DSML, the markup of tool calls: its words, and calls written in the form that the model was trained on
//! (docs/spec/conversation.md §4.1, §4.2).
//!
//! ```text
//! <｜DSML｜tool_calls>
//! <｜DSML｜invoke name="NAME">
//! <｜DSML｜parameter name="P" string="true">raw text</｜DSML｜parameter>
//! <｜DSML｜parameter name="Q" string="false">JSON</｜DSML｜parameter>
//! </｜DSML｜invoke>
//! </｜DSML｜tool_calls>
//! ```
//!
//! The reference encoder escapes nothing, so that a value with [`PARAMETER_CLOSER`] in it reads back as something
//! else. Here it is written [`ESCAPED_PARAMETER_CLOSER`], or with `\u003c` in JSON, and in a name `"`, `<`, `>` and
//! `&` are entities.

use serde_json::{Map, Value};

use crate::json;
use crate::prompt::Call;

/// The word that the vocabulary has a control token for. The rest of the markup is ordinary text.
pub const TOKEN: &str = "｜DSML｜";

/// What parts the block from the text before it.
pub const SEPARATOR: &str = "\n\n";
/// Begins a block of calls.
pub const BLOCK_OPENER: &str = "<｜DSML｜tool_calls>";
/// Ends a block of calls.
pub const BLOCK_CLOSER: &str = "</｜DSML｜tool_calls>";
/// Begins the header of a call; attributes and `>` follow.
pub const INVOKE_OPENER: &str = "<｜DSML｜invoke";
/// Ends a call.
pub const INVOKE_CLOSER: &str = "</｜DSML｜invoke>";
/// Begins the header of a parameter; attributes and `>` follow.
pub const PARAMETER_OPENER: &str = "<｜DSML｜parameter";
/// Ends a parameter.
pub const PARAMETER_CLOSER: &str = "</｜DSML｜parameter>";
/// How [`PARAMETER_CLOSER`] is spelt inside the value of a string parameter.
pub const ESCAPED_PARAMETER_CLOSER: &str = "&lt;/｜DSML｜parameter>";

/// The one parameter of a call whose arguments are no JSON object.
const UNSTRUCTURED: &str = "arguments";

/// A piece of a written block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'a> {
    /// Markup: [`TOKEN`] in it is the control token.
    Markup(&'a str),
    /// A name or a value: what looks like a control token in it is text.
    Text(&'a str),
}

/// Writes the block of `calls`, separator included, in the order of the calls and of their arguments.
pub fn write(calls: &[Call], emit: &mut impl FnMut(Part<'_>)) {
    emit(Part::Markup(SEPARATOR));
    emit(Part::Markup(BLOCK_OPENER));
    emit(Part::Markup("\n"));
    for call in calls {
        write_call(call, emit);
    }
    emit(Part::Markup(BLOCK_CLOSER));
}

/// The block of `calls` as one text.
pub fn to_string(calls: &[Call]) -> String {
    let mut text = String::new();
    write(calls, &mut |(Part::Markup(part) | Part::Text(part))| text.push_str(part));
    text
}

fn write_call(call: &Call, emit: &mut impl FnMut(Part<'_>)) {
    emit(Part::Markup(INVOKE_OPENER));
    write_name(&call.name, emit);
    emit(Part::Markup(">\n"));
    let arguments = arguments(&call.arguments);
    for (name, value) in &arguments {
        write_parameter(name, value, emit);
    }
    if arguments.is_empty() {
        emit(Part::Markup("\n"));
    }
    emit(Part::Markup(INVOKE_CLOSER));
    emit(Part::Markup("\n"));
}

/// The arguments by name. Text that is no JSON object is a single argument.
fn arguments(text: &str) -> Map<String, Value> {
    if text.trim().is_empty() {
        return Map::new();
    }
    match serde_json::from_str(text) {
        Ok(Value::Object(arguments)) => arguments,
        Ok(Value::Null) => Map::new(),
        _ => Map::from_iter([(UNSTRUCTURED.to_owned(), Value::String(text.to_owned()))]),
    }
}

fn write_parameter(name: &str, value: &Value, emit: &mut impl FnMut(Part<'_>)) {
    emit(Part::Markup(PARAMETER_OPENER));
    write_name(name, emit);
    match value {
        // Text with the escape itself in it would read back with the closer in its place: it goes as JSON.
        Value::String(text) if !text.contains(ESCAPED_PARAMETER_CLOSER) => {
            emit(Part::Markup(" string=\"true\">"));
            emit(Part::Text(&text.replace(PARAMETER_CLOSER, ESCAPED_PARAMETER_CLOSER)));
        }
        other => {
            emit(Part::Markup(" string=\"false\">"));
            let escaped = PARAMETER_CLOSER.replacen('<', "\\u003c", 1);
            emit(Part::Text(&json::to_string(other).replace(PARAMETER_CLOSER, &escaped)));
        }
    }
    emit(Part::Markup(PARAMETER_CLOSER));
    emit(Part::Markup("\n"));
}

fn write_name(name: &str, emit: &mut impl FnMut(Part<'_>)) {
    emit(Part::Markup(" name=\""));
    emit(Part::Text(&escaped_name(name)));
    emit(Part::Markup("\""));
}

/// A tool's or parameter's name as it stands in its attribute.
pub fn escaped_name(name: &str) -> String {
    name.replace('&', "&amp;").replace('"', "&quot;").replace('<', "&lt;").replace('>', "&gt;")
}
