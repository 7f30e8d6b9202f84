//! JSON from strangers: at most [`MAX_DEPTH`] levels and [`MAX_VALUES`] values, no key twice, and lone surrogates as U+FFFD.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Most levels of arrays and objects inside each other.
pub const MAX_DEPTH: usize = 256;
/// Most values in a text. In memory each takes a hundred bytes or more, however short it is.
pub const MAX_VALUES: usize = 1_000_000;

/// A text within the limits, ready to be parsed.
pub struct Checked<'a> {
    text: Cow<'a, str>,
    values: usize,
}

/// Looks through a text without making anything of it.
///
/// # Errors
/// If it is not UTF-8, or beyond a limit.
pub fn check(bytes: &[u8]) -> Result<Checked<'_>, String> {
    let text = std::str::from_utf8(bytes).map_err(|error| format!("the body is not UTF-8: {error}"))?;
    repaired(text)
}

impl Checked<'_> {
    /// How many values there are at most; none is missed, and an empty array or object counts for one too many.
    pub fn values(&self) -> usize {
        self.values
    }

    /// Reads the one value that the text is.
    ///
    /// # Errors
    /// What is wrong with the text, and where.
    pub fn parse(&self) -> Result<Value, String> {
        let mut deserializer = serde_json::Deserializer::from_str(&self.text);
        deserializer.disable_recursion_limit();
        let Unique(value) = Unique::deserialize(&mut deserializer).map_err(|error| bad_json(&error))?;
        deserializer.end().map_err(|error| bad_json(&error))?;
        Ok(value)
    }
}

/// Checks and reads one JSON value.
///
/// # Errors
/// As [`check`] and [`Checked::parse`].
pub fn parse(bytes: &[u8]) -> Result<Value, String> {
    check(bytes)?.parse()
}

fn bad_json(error: &serde_json::Error) -> String {
    format!("the body is not valid JSON: {error}")
}

/// The text without lone surrogates.
///
/// # Errors
/// If it is nested too deeply, or has too many values: the first one, and one for every comma and opening bracket at most.
fn repaired(text: &str) -> Result<Checked<'_>, String> {
    let bytes = text.as_bytes();
    let (mut depth, mut values, mut in_string, mut at) = (0_usize, 1, false, 0);
    let mut repairs = Vec::new();
    while at < bytes.len() {
        match bytes[at] {
            b'"' => in_string = !in_string,
            b'\\' if in_string => match surrogate(&bytes[at..]) {
                None => at += 1,
                Some(Surrogate::Pair) => at += 11,
                Some(Surrogate::Lone) => {
                    repairs.push(at);
                    at += 5;
                }
            },
            b'[' | b'{' if !in_string => (depth, values) = (depth + 1, values + 1),
            b',' if !in_string => values += 1,
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_DEPTH {
            return Err(format!("the body is nested more than {MAX_DEPTH} levels deep at byte {at}"));
        }
        if values > MAX_VALUES {
            return Err(format!("the body has more than {MAX_VALUES} values, the limit: put long data into strings"));
        }
        at += 1;
    }
    if repairs.is_empty() {
        return Ok(Checked { text: Cow::Borrowed(text), values });
    }
    let (mut whole, mut from) = (String::with_capacity(text.len()), 0);
    for at in repairs {
        whole.push_str(&text[from..at]);
        whole.push_str("\\ufffd");
        from = at + 6;
    }
    whole.push_str(&text[from..]);
    Ok(Checked { text: Cow::Owned(whole), values })
}

/// What an escape that names half a character begins.
enum Surrogate {
    Pair,
    Lone,
}

/// What stands at the beginning of `bytes`, if it is the escape of a surrogate.
fn surrogate(bytes: &[u8]) -> Option<Surrogate> {
    match escaped_unit(bytes)? {
        0xD800..=0xDBFF => match bytes.get(6..).and_then(escaped_unit) {
            Some(0xDC00..=0xDFFF) => Some(Surrogate::Pair),
            _ => Some(Surrogate::Lone),
        },
        0xDC00..=0xDFFF => Some(Surrogate::Lone),
        _ => None,
    }
}

/// The number in `\uXXXX`.
fn escaped_unit(bytes: &[u8]) -> Option<u32> {
    let digits = bytes.strip_prefix(b"\\u")?.get(..4)?;
    let digits = digits.iter().all(u8::is_ascii_hexdigit).then_some(digits)?;
    u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// A value in which no object has a key twice.
struct Unique(Value);

/// The key under which `serde_json` hands out a number that keeps its spelling.
const NUMBER_KEY: &str = "$serde_json::private::Number";

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Unique, D::Error> {
        deserializer.deserialize_any(UniqueVisitor).map(Unique)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Unique(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if key == NUMBER_KEY && map.is_empty() {
                let spelling: String = entries.next_value()?;
                return Number::from_str(&spelling).map(Value::Number).map_err(de::Error::custom);
            }
            let Unique(value) = entries.next_value()?;
            if map.contains_key(&key) {
                return Err(de::Error::custom(format_args!("the key {key:?} stands twice in one object")));
            }
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_read_as_they_stand() {
        let text = r#" {"a": [1, -2.50, 1e+400, 12345678901234567890123, "x\n\u00e9", true, null], "b": {}} "#;
        let value = parse(text.as_bytes()).unwrap();
        assert_eq!(value.to_string(), r#"{"a":[1,-2.50,1e+400,12345678901234567890123,"x\né",true,null],"b":{}}"#);
    }

    #[test]
    fn a_lone_surrogate_is_a_replacement_character() {
        let cases = [
            (r#""\ud83d\ude00""#, "😀"),
            (r#""\ud83d""#, "\u{fffd}"),
            (r#""\ude00x""#, "\u{fffd}x"),
            (r#""\ud83d\u0041""#, "\u{fffd}A"),
            (r#""\ud83d\ud83d\ude00""#, "\u{fffd}😀"),
            (r#""\\ud83d""#, "\\ud83d"),
        ];
        for (text, expected) in cases {
            assert_eq!(parse(text.as_bytes()), Ok(json!(expected)), "{text}");
        }
    }

    #[test]
    fn what_is_no_json_is_refused() {
        for text in ["", "{", "[1,]", "NaN", "Infinity", "{'a': 1}", "1 2", "\"\\ud8\"", "\u{feff}{}", "\"\u{1}\""] {
            parse(text.as_bytes()).unwrap_err();
        }
        assert!(parse(b"\"\xff\"").unwrap_err().contains("UTF-8"));
    }

    #[test]
    fn a_key_twice_is_refused_at_every_level() {
        let error = parse(br#"{"a": [{"b": 1, "b": 2}]}"#).unwrap_err();
        assert!(error.contains("\"b\" stands twice"), "{error}");
    }

    #[test]
    fn values_are_limited_before_they_take_memory() {
        let zeros = |count: usize| format!("[0{}]", ",0".repeat(count - 1));
        assert_eq!(check(b"[{\"a,[\": 1, \"b\": [2]}]").unwrap().values(), 5);
        check(zeros(MAX_VALUES - 1).as_bytes()).unwrap();
        assert!(parse(zeros(MAX_VALUES).as_bytes()).unwrap_err().contains("more than 1000000 values"));
        check(format!("\"{}\"", ",".repeat(MAX_VALUES)).as_bytes()).unwrap();
    }

    #[test]
    fn depth_is_limited() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        parse(nested(MAX_DEPTH).as_bytes()).unwrap();
        assert!(parse(nested(MAX_DEPTH + 1).as_bytes()).unwrap_err().contains("256 levels"));
        parse("[".repeat(1 << 20).as_bytes()).unwrap_err();
        parse(format!("\"{}\"", "[".repeat(1000)).as_bytes()).unwrap();
    }
}
