//! Metadata: keys in the order of the file, and getters that say what is wrong with a key.
//!
//! Converters disagree on widths (a count may be u32 or u64, a factor f32 or f64), so getters ask for a kind of
//! value and a range, not for a stored type.

use indexmap::IndexMap;

use crate::error::{Error, ErrorKind};
use crate::value::{Array, Strings, Value};
use crate::{DEFAULT_ALIGNMENT, MAX_ARRAY_DEPTH, MAX_KEY_BYTES};

/// The key-value pairs of a GGUF file.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    /// Named in the getters' errors.
    file: Box<str>,
    entries: IndexMap<String, Value>,
}

impl Metadata {
    /// No keys yet; errors will name `file`.
    pub(crate) fn new(file: &str) -> Metadata {
        Metadata { file: file.into(), entries: IndexMap::new() }
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no keys.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Keys and values in the order of the file.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The value of `key`, as stored.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.get(key)
    }

    /// Any unsigned or signed integer that fits a u64.
    pub fn u64(&self, key: &str) -> Result<u64, Error> {
        self.integer(key, "an integer of at least 0, of at most 64 bits")
    }

    /// Any unsigned or signed integer that fits a u32.
    pub fn u32(&self, key: &str) -> Result<u32, Error> {
        self.integer(key, "an integer from 0 to 4294967295")
    }

    /// An f32, or an f64 rounded to f32 (which may not overflow).
    pub fn f32(&self, key: &str) -> Result<f32, Error> {
        let value = self.require(key, "a float (f32 or f64)")?;
        value.as_float().and_then(narrow).ok_or_else(|| self.wrong(key, value, "a float within the range of f32"))
    }

    /// A bool.
    pub fn bool(&self, key: &str) -> Result<bool, Error> {
        match self.require(key, "a bool")? {
            Value::Bool(value) => Ok(*value),
            other => Err(self.wrong(key, other, "a bool")),
        }
    }

    /// A string.
    pub fn str(&self, key: &str) -> Result<&str, Error> {
        match self.require(key, "a string")? {
            Value::String(value) => Ok(value),
            other => Err(self.wrong(key, other, "a string")),
        }
    }

    /// An array of integers of any width, each at least 0.
    pub fn u64_array(&self, key: &str) -> Result<Vec<u64>, Error> {
        self.integers(key, "an array of integers of at least 0")
    }

    /// An array of integers of any width, each within the range of i64.
    pub fn i64_array(&self, key: &str) -> Result<Vec<i64>, Error> {
        self.integers(key, "an array of integers of at most 63 bits and a sign")
    }

    /// An array of floats of either width, rounded to f32 (which may not overflow).
    pub fn f32_array(&self, key: &str) -> Result<Vec<f32>, Error> {
        let expected = "an array of floats (f32 or f64) within the range of f32";
        let value = self.require(key, expected)?;
        let Value::Array(array) = value else { return Err(self.wrong(key, value, expected)) };
        let floats = array.as_floats().ok_or_else(|| self.wrong(key, value, expected))?;
        floats.into_iter().map(narrow).collect::<Option<_>>().ok_or_else(|| self.wrong(key, value, expected))
    }

    /// An array of strings.
    pub fn str_array(&self, key: &str) -> Result<&Strings, Error> {
        match self.require(key, "an array of strings")? {
            Value::Array(Array::String(strings)) => Ok(strings),
            other => Err(self.wrong(key, other, "an array of strings")),
        }
    }

    /// An array of floats as it is, or one float repeated `len` times.
    pub fn f32_array_or_scalar(&self, key: &str, len: usize) -> Result<Vec<f32>, Error> {
        match self.get(key) {
            Some(Value::Array(_)) => self.f32_array(key),
            _ => Ok(vec![self.f32(key)?; len]),
        }
    }

    /// What `getter` gives for a key that may be absent, e.g. `metadata.optional("a.b", Metadata::u64)`.
    /// A key that is there with a wrong type is still an error.
    pub fn optional<'a, T>(
        &'a self,
        key: &str,
        getter: impl FnOnce(&'a Metadata, &str) -> Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        self.get(key).map(|_| getter(self, key)).transpose()
    }

    /// `general.alignment` or the format's default: a power of two.
    pub(crate) fn alignment(&self) -> Result<u64, Error> {
        const KEY: &str = "general.alignment";
        let alignment = self.optional(KEY, Metadata::u32)?.map_or(DEFAULT_ALIGNMENT, u64::from);
        if alignment.is_power_of_two() {
            return Ok(alignment);
        }
        let found = format!("key {KEY:?} with the value {alignment}");
        Err(Error::new(ErrorKind::Alignment, found, "a power of two").in_file(&self.file))
    }

    /// Adds `key` and says whether it was new. A known key keeps its place and its old value.
    pub(crate) fn add(&mut self, key: String, value: Value) -> bool {
        match self.entries.entry(key) {
            indexmap::map::Entry::Occupied(_) => false,
            indexmap::map::Entry::Vacant(entry) => {
                entry.insert(value);
                true
            }
        }
    }

    /// Sets `key`, replacing its value if there is one. Refuses what a reader would refuse.
    pub(crate) fn set(&mut self, key: &str, value: Value) -> Result<(), Error> {
        if key.len() as u64 > MAX_KEY_BYTES {
            return Err(key_too_long(key.len() as u64));
        }
        if let Value::Array(array) = &value {
            check_depth(array, MAX_ARRAY_DEPTH)?;
        }
        self.entries.insert(key.to_owned(), value);
        Ok(())
    }

    /// Drops the keys for which `keep` is false.
    pub(crate) fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.entries.retain(|key, _| keep(key));
    }

    fn integer<T: TryFrom<i128>>(&self, key: &str, expected: &str) -> Result<T, Error> {
        let value = self.require(key, expected)?;
        let fitting = value.as_integer().and_then(|integer| T::try_from(integer).ok());
        fitting.ok_or_else(|| self.wrong(key, value, expected))
    }

    fn integers<T: TryFrom<i128>>(&self, key: &str, expected: &str) -> Result<Vec<T>, Error> {
        let value = self.require(key, expected)?;
        let Value::Array(array) = value else { return Err(self.wrong(key, value, expected)) };
        let integers = array.as_integers().ok_or_else(|| self.wrong(key, value, expected))?;
        let element = |(index, integer): (usize, i128)| {
            T::try_from(integer).map_err(|_| {
                let found = format!("key {key:?} whose element {index} is {integer}");
                Error::new(ErrorKind::WrongType, found, expected).in_file(&self.file)
            })
        };
        integers.into_iter().enumerate().map(element).collect()
    }

    fn require(&self, key: &str, expected: &str) -> Result<&Value, Error> {
        self.get(key).ok_or_else(|| {
            Error::new(ErrorKind::MissingKey, format!("no key {key:?} in the metadata"), expected).in_file(&self.file)
        })
    }

    fn wrong(&self, key: &str, value: &Value, expected: &str) -> Error {
        Error::new(ErrorKind::WrongType, format!("key {key:?} with the value {value}"), expected).in_file(&self.file)
    }
}

/// The refusal of a key longer than the format allows.
pub(crate) fn key_too_long(bytes: u64) -> Error {
    Error::new(ErrorKind::Malformed, format!("a key of {bytes} bytes"), format!("at most {MAX_KEY_BYTES} bytes"))
}

/// The refusal of an array nested deeper than a reader follows.
pub(crate) fn nested_too_deep() -> Error {
    let expected = format!("at most {MAX_ARRAY_DEPTH} levels of arrays");
    Error::new(ErrorKind::Malformed, "an array nested deeper than that", expected)
}

fn check_depth(array: &Array, levels_left: usize) -> Result<(), Error> {
    let Some(levels_left) = levels_left.checked_sub(1) else { return Err(nested_too_deep()) };
    match array {
        Array::Array(inner) => inner.iter().try_for_each(|array| check_depth(array, levels_left)),
        _ => Ok(()),
    }
}

/// To f32, unless a finite value would become infinite.
fn narrow(value: f64) -> Option<f32> {
    let narrow = value as f32;
    (narrow.is_finite() || !value.is_finite()).then_some(narrow)
}
