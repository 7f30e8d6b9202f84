//! JSON the way Python's `json.dumps(value, ensure_ascii=False)` writes it (docs/spec/conversation.md §3.5).
//!
//! Tool schemas and argument values stand in the prompt as the reference encoder's `json.dumps` wrote them in
//! training: `", "` and `": "` between, keys in the order received, integers as they were spelt, floats as
//! Python's `repr`.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, Serializer};

/// The text of a value.
pub fn to_string(value: &impl Serialize) -> String {
    let mut bytes = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut bytes, Python);
    value.serialize(&mut serializer).expect("JSON values have string keys, and a vector takes every byte");
    String::from_utf8(bytes).expect("the serializer writes UTF-8")
}

/// Control characters come out as in Python without our doing.
struct Python;

impl Formatter for Python {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    /// A number of a [`Value`], as it was spelt.
    fn write_number_str<W: ?Sized + Write>(&mut self, writer: &mut W, spelling: &str) -> io::Result<()> {
        writer.write_all(number(spelling).as_bytes())
    }
}

/// What Python makes of a number: an integer keeps its digits, whatever their number, and a float is the shortest
/// text that reads back as the same double.
fn number(spelling: &str) -> String {
    let is_integer = !spelling.contains(['.', 'e', 'E']);
    match spelling.parse::<f64>() {
        Ok(_) if is_integer => if spelling == "-0" { "0" } else { spelling }.to_owned(),
        // Python would write `Infinity`, which is no JSON.
        Ok(float) if float.is_finite() => float_repr(float),
        _ => spelling.to_owned(),
    }
}

/// Python's `repr` of a float: the shortest digits that read back, with an exponent if the first one stands
/// more than four places behind the point or more than sixteen before it.
fn float_repr(float: f64) -> String {
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').expect("Rust's `e` format has an exponent");
    let exponent: i32 = exponent.parse().expect("an exponent of a double is a small integer");
    if (-4..16).contains(&exponent) {
        // Debug is decimal up to 1e16 and down to 1e-5, and never without a point.
        return format!("{float:?}");
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// Whether a value says nothing: a `response_format` of this form is none.
pub(crate) fn is_empty(value: &Value) -> bool {
    value.is_null() || value.as_object().is_some_and(serde_json::Map::is_empty)
}
