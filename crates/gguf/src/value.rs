//! Metadata values: every type of the format, kept exactly as stored, so that writing gives the same bytes.

use std::fmt;

/// A number of the format: how many bytes it takes and how they are ordered (little endian).
pub(crate) trait Number: Copy {
    const BYTES: usize;
    fn from_le(bytes: &[u8]) -> Self;
    fn push_le(self, out: &mut Vec<u8>);
}

macro_rules! value_types {
    ($($variant:ident($rust:ty) = $id:literal;)*) => {
        /// The type of a metadata value, with its id in the file.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ValueType {
            $(#[doc = concat!("`", stringify!($rust), "`")] $variant = $id,)*
            /// A byte, 0 or 1.
            Bool = 7,
            /// A UTF-8 string.
            String = 8,
            /// A sequence of values of one type.
            Array = 9,
        }

        impl ValueType {
            /// The type with this id, if there is one.
            pub fn from_id(id: u32) -> Option<ValueType> {
                match id {
                    $($id => Some(ValueType::$variant),)*
                    7 => Some(ValueType::Bool),
                    8 => Some(ValueType::String),
                    9 => Some(ValueType::Array),
                    _ => None,
                }
            }
        }

        impl fmt::Display for ValueType {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self {
                    $(ValueType::$variant => stringify!($rust),)*
                    ValueType::Bool => "bool",
                    ValueType::String => "string",
                    ValueType::Array => "array",
                })
            }
        }

        /// A metadata value.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Value {
            $(#[doc = concat!("A `", stringify!($rust), "`.")] $variant($rust),)*
            /// A bool.
            Bool(bool),
            /// A string.
            String(String),
            /// An array.
            Array(Array),
        }

        /// A sequence of values of one type, stored densely.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Array {
            $(#[doc = concat!("Elements of type `", stringify!($rust), "`.")] $variant(Vec<$rust>),)*
            /// Bools.
            Bool(Vec<bool>),
            /// Strings.
            String(Strings),
            /// Arrays, which need not be of one type among themselves.
            Array(Vec<Array>),
        }

        impl Value {
            /// The value's type.
            pub fn value_type(&self) -> ValueType {
                match self {
                    $(Value::$variant(_) => ValueType::$variant,)*
                    Value::Bool(_) => ValueType::Bool,
                    Value::String(_) => ValueType::String,
                    Value::Array(_) => ValueType::Array,
                }
            }
        }

        impl Array {
            /// The type of the elements, known even if there are none.
            pub fn element_type(&self) -> ValueType {
                match self {
                    $(Array::$variant(_) => ValueType::$variant,)*
                    Array::Bool(_) => ValueType::Bool,
                    Array::String(_) => ValueType::String,
                    Array::Array(_) => ValueType::Array,
                }
            }

            /// Number of elements.
            pub fn len(&self) -> usize {
                match self {
                    $(Array::$variant(elements) => elements.len(),)*
                    Array::Bool(elements) => elements.len(),
                    Array::String(elements) => elements.len(),
                    Array::Array(elements) => elements.len(),
                }
            }
        }

        $(
            impl Number for $rust {
                const BYTES: usize = size_of::<$rust>();
                fn from_le(bytes: &[u8]) -> $rust {
                    <$rust>::from_le_bytes(bytes.try_into().expect("the caller passes BYTES bytes"))
                }
                fn push_le(self, out: &mut Vec<u8>) {
                    out.extend_from_slice(&self.to_le_bytes());
                }
            }

            impl From<$rust> for Value {
                fn from(value: $rust) -> Value {
                    Value::$variant(value)
                }
            }

            impl From<Vec<$rust>> for Value {
                fn from(elements: Vec<$rust>) -> Value {
                    Value::Array(Array::$variant(elements))
                }
            }
        )*
    };
}

value_types! {
    U8(u8) = 0;
    I8(i8) = 1;
    U16(u16) = 2;
    I16(i16) = 3;
    U32(u32) = 4;
    I32(i32) = 5;
    F32(f32) = 6;
    U64(u64) = 10;
    I64(i64) = 11;
    F64(f64) = 12;
}

impl From<bool> for Value {
    fn from(value: bool) -> Value {
        Value::Bool(value)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Value {
        Value::String(value.into())
    }
}

impl From<String> for Value {
    fn from(value: String) -> Value {
        Value::String(value)
    }
}

impl From<Strings> for Value {
    fn from(value: Strings) -> Value {
        Value::Array(Array::String(value))
    }
}

impl From<Array> for Value {
    fn from(value: Array) -> Value {
        Value::Array(value)
    }
}

impl Value {
    /// The value as an integer, whatever its width and sign; `None` if it is not an integer.
    pub fn as_integer(&self) -> Option<i128> {
        match *self {
            Value::U8(x) => Some(x.into()),
            Value::I8(x) => Some(x.into()),
            Value::U16(x) => Some(x.into()),
            Value::I16(x) => Some(x.into()),
            Value::U32(x) => Some(x.into()),
            Value::I32(x) => Some(x.into()),
            Value::U64(x) => Some(x.into()),
            Value::I64(x) => Some(x.into()),
            _ => None,
        }
    }

    /// The value as a float, of either width; `None` if it is not a float.
    pub fn as_float(&self) -> Option<f64> {
        match *self {
            Value::F32(x) => Some(x.into()),
            Value::F64(x) => Some(x),
            _ => None,
        }
    }
}

impl Array {
    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as integers, whatever their width and sign; `None` if they are not integers.
    pub fn as_integers(&self) -> Option<Vec<i128>> {
        fn widen<T: Copy + Into<i128>>(elements: &[T]) -> Option<Vec<i128>> {
            Some(elements.iter().map(|&x| x.into()).collect())
        }
        match self {
            Array::U8(x) => widen(x),
            Array::I8(x) => widen(x),
            Array::U16(x) => widen(x),
            Array::I16(x) => widen(x),
            Array::U32(x) => widen(x),
            Array::I32(x) => widen(x),
            Array::U64(x) => widen(x),
            Array::I64(x) => widen(x),
            _ => None,
        }
    }

    /// The elements as floats, of either width; `None` if they are not floats.
    pub fn as_floats(&self) -> Option<Vec<f64>> {
        match self {
            Array::F32(elements) => Some(elements.iter().map(|&x| x.into()).collect()),
            Array::F64(elements) => Some(elements.clone()),
            _ => None,
        }
    }
}

/// The value in words, for messages and listings: long strings are cut, arrays are counted.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN_CHARS: usize = 60;
        match self {
            Value::Array(array) => return write!(f, "array of {} {}", array.len(), array.element_type()),
            Value::String(text) if text.chars().nth(SHOWN_CHARS).is_some() => {
                let start: String = text.chars().take(SHOWN_CHARS).collect();
                return write!(f, "string {start:?}… of {} bytes", text.len());
            }
            Value::String(text) => return write!(f, "string {text:?}"),
            Value::Bool(x) => return write!(f, "bool {x}"),
            _ => write!(f, "{} ", self.value_type())?,
        }
        match (self.as_integer(), self.as_float()) {
            (Some(integer), _) => write!(f, "{integer}"),
            (_, Some(float)) => write!(f, "{float}"),
            _ => unreachable!("every other variant is a number"),
        }
    }
}

/// Many strings in one buffer: a vocabulary of 129,280 entries is two allocations, not 129,280.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Strings {
    text: String,
    /// Where string `i` ends in `text`; it starts where the one before it ends.
    ends: Vec<usize>,
}

impl Strings {
    /// Adds a string at the end.
    pub fn push(&mut self, string: &str) {
        self.text.push_str(string);
        self.ends.push(self.text.len());
    }

    /// Number of strings.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// String `index`, if there is one.
    pub fn get(&self, index: usize) -> Option<&str> {
        let end = *self.ends.get(index)?;
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        Some(&self.text[start..end])
    }

    /// The strings in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &str> {
        (0..self.len()).map(|index| self.get(index).expect("index is below len"))
    }
}

impl<S: AsRef<str>> FromIterator<S> for Strings {
    fn from_iter<I: IntoIterator<Item = S>>(strings: I) -> Strings {
        let mut all = Strings::default();
        strings.into_iter().for_each(|string| all.push(string.as_ref()));
        all
    }
}
