//! The fields of a JSON object: each is taken once, with its type checked, and what is left over is an error that names it.

use serde_json::{Map, Value};

use crate::error::ApiError;

/// An object of a request that is being read.
#[derive(Debug)]
pub struct Fields {
    /// Where the object stands, like `messages[3]`; empty for the body itself.
    path: String,
    map: Map<String, Value>,
}

impl Fields {
    /// The object at `path`.
    ///
    /// # Errors
    /// If it is none.
    pub fn new(path: impl Into<String>, value: Value) -> Result<Fields, ApiError> {
        let path = path.into();
        match value {
            Value::Object(map) => Ok(Fields { path, map }),
            other => Err(wrong(if path.is_empty() { "body" } else { &path }, &other, "an object")),
        }
    }

    /// The path of a field.
    pub fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// An error about a field.
    pub fn error(&self, name: &str, message: impl Into<String>) -> ApiError {
        ApiError::field(self.path(name), message)
    }

    /// A field, unless it is null.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.map.shift_remove(name).filter(|value| !value.is_null())
    }

    /// A field, left where it is.
    pub fn peek(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Puts a field in front of the others.
    pub fn set_first(&mut self, name: &str, value: Value) {
        self.map.shift_insert(0, name.to_owned(), value);
    }

    /// The path, and what was not taken.
    pub fn into_parts(self) -> (String, Map<String, Value>) {
        (self.path, self.map)
    }

    /// A field that must be there.
    ///
    /// # Errors
    /// If it is not.
    pub fn need(&mut self, name: &str) -> Result<Value, ApiError> {
        self.take(name).ok_or_else(|| self.error(name, "is missing"))
    }

    /// What `read` makes of a field.
    fn read<T>(
        &mut self,
        name: &str,
        expected: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        read(&value).map(Some).ok_or_else(|| wrong(&self.path(name), &value, expected))
    }

    /// A text.
    pub fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(&self.path(name), &other, "a string")),
        }
    }

    /// True or false.
    pub fn flag(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        self.read(name, "true or false", Value::as_bool)
    }

    /// A number from `low` to `high`.
    pub fn number(&mut self, name: &str, low: f64, high: f64) -> Result<Option<f32>, ApiError> {
        let expected = format!("a number from {low} to {high}");
        let within = |number: &f64| (low..=high).contains(number);
        self.read(name, &expected, |value| value.as_f64().filter(within).map(|number| number as f32))
    }

    /// A whole number; what is larger than 2^31 − 1 counts as that.
    pub fn count(&mut self, name: &str) -> Result<Option<usize>, ApiError> {
        const MAX: f64 = 2_147_483_647.0;
        let whole = |number: &f64| *number >= 0.0 && number.fract() == 0.0;
        self.read(name, "a whole number, 0 or more", |value| {
            value.as_f64().filter(whole).map(|number| number.min(MAX) as usize)
        })
    }

    /// A seed: any integer of 64 bits.
    pub fn seed(&mut self, name: &str) -> Result<Option<u64>, ApiError> {
        self.read(name, "an integer of 64 bits", |value| value.as_u64().or(value.as_i64().map(|seed| seed as u64)))
    }

    /// A list.
    pub fn list(&mut self, name: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => Err(wrong(&self.path(name), &other, "an array")),
        }
    }

    /// An object.
    pub fn object(&mut self, name: &str) -> Result<Option<Fields>, ApiError> {
        self.take(name).map(|value| Fields::new(self.path(name), value)).transpose()
    }

    /// A field that is not supported, unless it says what is done anyway.
    ///
    /// # Errors
    /// If it asks for something else than `only`.
    pub fn only(&mut self, name: &str, only: &Value, why: &str) -> Result<(), ApiError> {
        match self.take(name) {
            Some(found) if found != *only && !is_empty(&found) => Err(self.error(name, why)),
            _ => Ok(()),
        }
    }

    /// Everything has been read that is known. What remains must be among those that are `ignored`.
    ///
    /// # Errors
    /// For the first field that is not.
    pub fn end(self, ignored: &[&[&str]], also: &[String]) -> Result<(), ApiError> {
        let is_ignored =
            |key: &str| ignored.iter().any(|list| list.contains(&key)) || also.iter().any(|name| name == key);
        match self.map.iter().find(|(key, value)| !value.is_null() && !is_ignored(key)) {
            Some((key, _)) => Err(self.error(key, "is not supported: leave it out, or name it in `ignored_fields`")),
            None => Ok(()),
        }
    }
}

/// Whether a value asks for nothing: an empty list or object.
fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(Map::is_empty)
}

/// An error about a value of the wrong type or range.
pub fn wrong(path: &str, found: &Value, expected: &str) -> ApiError {
    let found = match found {
        Value::Null => "null".to_owned(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => number.to_string().chars().take(40).collect(),
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "an array".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    };
    ApiError::field(path, format!("is {found}, expected {expected}"))
}
