//! What the text of a parameter stands for: a string or JSON, by its header, the tool's schema, or what it looks like.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::dsml;
use crate::prompt::Tool;

/// How a parameter's text is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reading {
    /// As it stands.
    Text,
    /// As JSON, or as it stands if it is none.
    Json,
    /// As what the schema allows; by what it looks like if that says nothing.
    Schema(Vec<String>),
}

impl Reading {
    /// How the parameter `name` of `tool` is read, given the header's attribute `string`.
    pub(super) fn of(string: Option<bool>, tool: Option<&Tool>, name: &str) -> Self {
        match string {
            Some(true) => Self::Text,
            Some(false) => Self::Json,
            None => match tool.map_or_else(Vec::new, |tool| types(tool, name)) {
                types if types == ["string"] => Self::Text,
                types => Self::Schema(types),
            },
        }
    }

    /// Whether JSON is expected.
    pub(super) fn is_json(&self) -> bool {
        match self {
            Self::Text => false,
            Self::Json => true,
            Self::Schema(types) => !types.is_empty() && types.iter().all(|name| name != "string"),
        }
    }

    /// What `text`, a parameter's whole text, stands for.
    pub(super) fn read(&self, text: &str) -> Argument {
        let kind = || JsonKind::of(text.trim_ascii());
        let is_json = match self {
            Self::Text => false,
            Self::Json => kind().is_some(),
            Self::Schema(types) if types.iter().any(|name| name == "string") => {
                kind().is_some_and(|kind| types.iter().any(|name| kind.is(name)))
            }
            Self::Schema(_) => kind().is_some(),
        };
        if is_json { Argument::Json(text.trim_ascii().to_owned()) } else { Argument::Text(unescape(text)) }
    }
}

/// A parameter's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Argument {
    /// A string.
    Text(String),
    /// JSON as the model wrote it: numbers keep their digits.
    Json(String),
}

/// The one escape that values know.
fn unescape(text: &str) -> String {
    text.replace(dsml::ESCAPED_PARAMETER_CLOSER, dsml::PARAMETER_CLOSER)
}

/// The JSON types that `tool` allows for the parameter `name`; none if it does not say.
fn types(tool: &Tool, name: &str) -> Vec<String> {
    let of = |value: &Value| value.as_str().map(str::to_owned);
    match properties(tool).and_then(|properties| properties.get(name)?.get("type")) {
        Some(Value::Array(types)) => types.iter().filter_map(of).collect(),
        Some(one) => of(one).into_iter().collect(),
        None => Vec::new(),
    }
}

fn properties(tool: &Tool) -> Option<&Map<String, Value>> {
    tool.parameters()?.get("properties")?.as_object()
}

/// Whether the parameter `name`, which `tool` does not declare, may be a wrapper around all of the call's arguments.
pub(super) fn may_wrap(tool: &Tool, name: &str) -> bool {
    ["arguments", "input"].contains(&name) && properties(tool).is_some_and(|properties| !properties.contains_key(name))
}

/// The arguments inside a wrapper: a JSON object, if it has only parameters that `tool` declares and all that it requires.
pub(super) fn unwrap<'a>(tool: &Tool, wrapper: &'a Argument) -> Option<&'a str> {
    let (Argument::Text(text) | Argument::Json(text)) = wrapper;
    let declared = properties(tool)?;
    let object: Map<String, Value> = serde_json::from_str(text).ok()?;
    let required = tool.parameters()?.get("required").and_then(Value::as_array);
    let has = |name: &Value| name.as_str().is_some_and(|name| object.contains_key(name));
    let fits =
        object.keys().all(|name| declared.contains_key(name)) && required.is_none_or(|names| names.iter().all(has));
    fits.then(|| text.trim_ascii())
}

/// The type of a JSON value, in the words of JSON Schema.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum JsonKind {
    Null,
    Boolean,
    Integer,
    Number,
    String,
    Array,
    Object,
}

impl JsonKind {
    /// The type of `text`, which has no space around it; `None` if it is no JSON.
    pub(super) fn of(text: &str) -> Option<Self> {
        serde_json::from_str::<AnyJson>(text).ok()?;
        Some(match text.as_bytes()[0] {
            b'n' => Self::Null,
            b't' | b'f' => Self::Boolean,
            b'"' => Self::String,
            b'[' => Self::Array,
            b'{' => Self::Object,
            _ if text.contains(['.', 'e', 'E']) => Self::Number,
            _ => Self::Integer,
        })
    }

    /// Whether a schema's `name` of a type takes it.
    fn is(self, name: &str) -> bool {
        match self {
            Self::Null => name == "null",
            Self::Boolean => name == "boolean",
            Self::Integer => name == "integer" || name == "number",
            Self::Number => name == "number",
            Self::String => name == "string",
            Self::Array => name == "array",
            Self::Object => name == "object",
        }
    }
}

/// Any JSON value, checked and forgotten. Unlike [`serde::de::IgnoredAny`] it looks into strings, so that half a
/// surrogate pair is no JSON.
struct AnyJson;

impl<'de> Deserialize<'de> for AnyJson {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Self)
    }
}

impl<'de> Visitor<'de> for AnyJson {
    type Value = Self;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self, A::Error> {
        while items.next_element::<Self>()?.is_some() {}
        Ok(self)
    }

    /// Objects, and numbers: serde_json hands out a number of arbitrary precision as a map of its own.
    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self, A::Error> {
        while entries.next_entry::<Self, Self>()?.is_some() {}
        Ok(self)
    }
}

/// Follows JSON a piece at a time, as far as to know whether it is inside a string.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct JsonStrings {
    inside: bool,
    /// A backslash ended the last piece.
    escaped: bool,
}

impl JsonStrings {
    /// Whether the next byte falls into a string.
    pub(super) fn inside(self) -> bool {
        self.inside
    }

    /// Goes on with `piece`.
    pub(super) fn follow(&mut self, piece: &[u8]) {
        let mut rest = piece;
        if self.escaped && !rest.is_empty() {
            rest = &rest[1..];
            self.escaped = false;
        }
        loop {
            let next = if self.inside { memchr::memchr2(b'"', b'\\', rest) } else { memchr::memchr(b'"', rest) };
            let Some(at) = next else { return };
            let taken = match rest[at] {
                b'\\' => 2,
                _ => {
                    self.inside = !self.inside;
                    1
                }
            };
            self.escaped = at + taken > rest.len();
            rest = &rest[(at + taken).min(rest.len())..];
        }
    }
}
