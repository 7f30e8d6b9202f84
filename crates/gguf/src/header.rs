//! Parses the header of one file: front to back, from any `Read`, once.
//!
//! The rule of this file: no count or length is used before [`Cursor`] has compared it with the bytes that
//! remain, and buffers grow with the bytes that arrive, so that a lie costs an error and no memory.

use std::io::{self, Read};

use crate::error::{Error, ErrorKind};
use crate::metadata::{Metadata, key_too_long, nested_too_deep};
use crate::tensor::{TensorDirectory, TensorInfo};
use crate::tensor_type::TensorType;
use crate::value::{Array, Number, Strings, Value, ValueType};
use crate::{MAGIC, MAX_ARRAY_DEPTH, MAX_KEY_BYTES};

/// What one file says about itself. Tensors' offsets are absolute, their `file` is 0.
pub(crate) struct Header {
    pub version: u32,
    pub metadata: Metadata,
    pub tensors: TensorDirectory,
    pub data_start: u64,
    pub alignment: u64,
}

/// The fewest bytes a key-value pair can take: key length, value type, a one-byte value.
const MIN_KEY_VALUE_BYTES: u64 = 8 + 4 + 1;

/// The fewest bytes a tensor info can take: name length, dimension count, one dimension, type, offset.
const MIN_TENSOR_INFO_BYTES: u64 = 8 + 4 + 8 + 4 + 8;

/// The most bytes a header may take. A DeepSeek V4 header takes 5 MB; without a limit one wrong length in a file of
/// 80 GiB could ask for as much memory.
pub(crate) const MAX_HEADER_BYTES: u64 = 256 << 20;

impl Header {
    /// Reads the header of a file of `length_bytes` bytes from its start. `file` is its name, for errors.
    pub fn read<R: Read>(file: &str, reader: R, length_bytes: u64) -> Result<Header, Error> {
        if length_bytes == 0 {
            return Err(Error::new(ErrorKind::Empty, "an empty file", "a GGUF model").in_file(file));
        }
        let mut cursor = Cursor { reader, file, offset: 0, length_bytes, subject: String::new() };
        let version = cursor.magic_and_version()?;
        let tensor_count = cursor.count("tensors", MIN_TENSOR_INFO_BYTES)?;
        let key_count = cursor.count("metadata keys", MIN_KEY_VALUE_BYTES)?;
        let metadata = cursor.metadata(key_count)?;
        let alignment = metadata.alignment()?;
        let (mut tensors, info_offsets) = cursor.tensor_infos(tensor_count)?;
        let data_start = cursor.offset.next_multiple_of(alignment);
        let data = DataSection { file, start: data_start, alignment, end: length_bytes };
        data.place(&mut tensors, &info_offsets)?;
        Ok(Header { version, metadata, tensors, data_start, alignment })
    }
}

/// A reader that knows where it is and how much there can still be.
struct Cursor<'a, R> {
    reader: R,
    file: &'a str,
    offset: u64,
    length_bytes: u64,
    /// The key or tensor being read, for errors.
    subject: String,
}

impl<R: Read> Cursor<'_, R> {
    fn magic_and_version(&mut self) -> Result<u32, Error> {
        let mut start = vec![];
        self.append(&mut start, self.length_bytes.min(MAGIC.len() as u64))?;
        if !MAGIC.starts_with(&start) {
            let text = if start.iter().all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace()) {
                ", which looks like text"
            } else {
                ""
            };
            let found = format!("a file that starts with \"{}\"{text}", start.escape_ascii());
            return Err(self.error(ErrorKind::NotGguf, 0, found, "the four bytes \"GGUF\""));
        }
        if start.len() < MAGIC.len() {
            return Err(self.too_short(MAGIC.len() as u64, "the magic"));
        }
        let offset = self.offset;
        match self.number::<u32>()? {
            version @ 2..=3 => Ok(version),
            version if matches!(version.swap_bytes(), 1..=0xffff) => {
                let found = format!("a big-endian GGUF file of version {}", version.swap_bytes());
                Err(self.error(ErrorKind::BigEndian, offset, found, "little-endian byte order"))
            }
            version => Err(self.error(ErrorKind::Version, offset, format!("version {version}"), "version 2 or 3")),
        }
    }

    fn metadata(&mut self, count: u64) -> Result<Metadata, Error> {
        let mut metadata = Metadata::new(self.file);
        for index in 0..count {
            let key_offset = self.offset;
            self.subject = format!("the name of metadata key {index}");
            let key = self.string(MAX_KEY_BYTES)?;
            self.subject = format!("metadata key {key:?}");
            let ty = self.value_type()?;
            let value = self.value(ty)?;
            if !metadata.add(key, value) {
                let error = Error::new(ErrorKind::Duplicate, format!("a second {}", self.subject), "each key once");
                return Err(error.in_file(self.file).at(key_offset));
            }
        }
        self.subject.clear();
        Ok(metadata)
    }

    /// The infos, their offsets still relative to the data section, and where in the file each info starts.
    fn tensor_infos(&mut self, count: u64) -> Result<(TensorDirectory, Vec<u64>), Error> {
        let mut tensors = TensorDirectory::default();
        let mut info_offsets = vec![];
        for index in 0..count {
            let info_offset = self.offset;
            self.subject = format!("the name of tensor {index}");
            let name = self.string(u64::MAX)?;
            self.subject = format!("tensor {name:?}");
            let dims = self.dims()?;
            let ty = TensorType::from_id(self.number()?);
            let tensor = TensorInfo { name, dims, ty, file: 0, offset: self.number()? };
            tensor
                .check_dims()
                .and_then(|()| tensors.add(tensor))
                .map_err(|error| error.in_file(self.file).at(info_offset))?;
            info_offsets.push(info_offset);
        }
        Ok((tensors, info_offsets))
    }

    fn dims(&mut self) -> Result<Vec<u64>, Error> {
        let offset = self.offset;
        let count = self.number::<u32>()?;
        if count == 0 || count as usize > crate::MAX_DIMS {
            let expected = format!("1 to {} dimensions", crate::MAX_DIMS);
            return Err(self.error(ErrorKind::Dimensions, offset, format!("{count} dimensions"), expected));
        }
        (0..count).map(|_| self.number()).collect()
    }

    fn value(&mut self, ty: ValueType) -> Result<Value, Error> {
        Ok(match ty {
            ValueType::U8 => Value::U8(self.number()?),
            ValueType::I8 => Value::I8(self.number()?),
            ValueType::U16 => Value::U16(self.number()?),
            ValueType::I16 => Value::I16(self.number()?),
            ValueType::U32 => Value::U32(self.number()?),
            ValueType::I32 => Value::I32(self.number()?),
            ValueType::F32 => Value::F32(self.number()?),
            ValueType::U64 => Value::U64(self.number()?),
            ValueType::I64 => Value::I64(self.number()?),
            ValueType::F64 => Value::F64(self.number()?),
            ValueType::Bool => Value::Bool(self.bool()?),
            ValueType::String => Value::String(self.string(u64::MAX)?),
            ValueType::Array => Value::Array(self.array(MAX_ARRAY_DEPTH)?),
        })
    }

    fn array(&mut self, levels_left: usize) -> Result<Array, Error> {
        let offset = self.offset;
        let Some(levels_left) = levels_left.checked_sub(1) else {
            return Err(nested_too_deep().in_file(self.file).at(offset));
        };
        Ok(match self.value_type()? {
            ValueType::U8 => Array::U8(self.numbers()?),
            ValueType::I8 => Array::I8(self.numbers()?),
            ValueType::U16 => Array::U16(self.numbers()?),
            ValueType::I16 => Array::I16(self.numbers()?),
            ValueType::U32 => Array::U32(self.numbers()?),
            ValueType::I32 => Array::I32(self.numbers()?),
            ValueType::F32 => Array::F32(self.numbers()?),
            ValueType::U64 => Array::U64(self.numbers()?),
            ValueType::I64 => Array::I64(self.numbers()?),
            ValueType::F64 => Array::F64(self.numbers()?),
            ValueType::Bool => {
                let count = self.count("bools", 1)?;
                Array::Bool((0..count).map(|_| self.bool()).collect::<Result<_, _>>()?)
            }
            ValueType::String => Array::String(self.strings()?),
            ValueType::Array => {
                let count = self.count("arrays", 4 + 8)?;
                Array::Array((0..count).map(|_| self.array(levels_left)).collect::<Result<_, _>>()?)
            }
        })
    }

    fn value_type(&mut self) -> Result<ValueType, Error> {
        let offset = self.offset;
        let id = self.number()?;
        ValueType::from_id(id).ok_or_else(|| {
            self.error(ErrorKind::Malformed, offset, format!("value type {id}"), "a value type from 0 to 12")
        })
    }

    fn bool(&mut self) -> Result<bool, Error> {
        let offset = self.offset;
        match self.number::<u8>()? {
            byte @ 0..=1 => Ok(byte == 1),
            byte => Err(self.error(ErrorKind::Malformed, offset, format!("a bool of {byte}"), "0 or 1")),
        }
    }

    fn string(&mut self, max_bytes: u64) -> Result<String, Error> {
        let length_offset = self.offset;
        let bytes = self.count("bytes of a string", 1)?;
        if bytes > max_bytes {
            return Err(key_too_long(bytes).in_file(self.file).at(length_offset));
        }
        let offset = self.offset;
        let mut buffer = vec![];
        self.append(&mut buffer, bytes)?;
        String::from_utf8(buffer).map_err(|error| {
            let at = offset + error.utf8_error().valid_up_to() as u64;
            self.error(ErrorKind::Malformed, at, "a string that is not UTF-8", "UTF-8")
        })
    }

    fn strings(&mut self) -> Result<Strings, Error> {
        let count = self.count("strings", 8)?;
        let mut strings = Strings::default();
        for _ in 0..count {
            strings.push(&self.string(u64::MAX)?);
        }
        Ok(strings)
    }

    fn number<T: Number>(&mut self) -> Result<T, Error> {
        let mut bytes = [0; 8];
        let bytes = &mut bytes[..T::BYTES];
        if self.remaining_bytes() < T::BYTES as u64 {
            return Err(self.too_short(T::BYTES as u64, "a number"));
        }
        self.fill(bytes)?;
        Ok(T::from_le(bytes))
    }

    fn numbers<T: Number>(&mut self) -> Result<Vec<T>, Error> {
        let count = self.count("array elements", T::BYTES as u64)?;
        let mut bytes = vec![];
        self.append(&mut bytes, count * T::BYTES as u64)?;
        Ok(bytes.chunks_exact(T::BYTES).map(T::from_le).collect())
    }

    /// Reads a 64-bit count of things that take at least `least_bytes` each, and refuses one that the rest of
    /// the file cannot hold. Afterwards `count * least_bytes` cannot overflow.
    fn count(&mut self, things: &str, least_bytes: u64) -> Result<u64, Error> {
        let offset = self.offset;
        let count = self.number::<u64>()?;
        let most = self.remaining_bytes() / least_bytes;
        if count <= most {
            return Ok(count);
        }
        let room_bytes = self.remaining_bytes();
        let expected = format!("at most {most}, for which the remaining {room_bytes} bytes of the header have room");
        Err(self.error(ErrorKind::Truncated, offset, format!("a count of {count} {things}"), expected))
    }

    /// Appends the next `bytes` bytes, which the caller has compared with what remains. The buffer grows in
    /// pieces as they arrive: should the file be shorter than it was said to be, no more is allocated.
    fn append(&mut self, buffer: &mut Vec<u8>, bytes: u64) -> Result<(), Error> {
        const PIECE_BYTES: u64 = 64 << 10;
        let end = self.offset + bytes;
        while self.offset < end {
            let piece_bytes = (end - self.offset).min(PIECE_BYTES) as usize;
            let start = buffer.len();
            buffer.resize(start + piece_bytes, 0);
            self.fill(&mut buffer[start..])?;
        }
        Ok(())
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), Error> {
        match self.reader.read_exact(bytes) {
            Ok(()) => {
                self.offset += bytes.len() as u64;
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                let expected = format!("a file of {} bytes", self.length_bytes);
                Err(self.error(ErrorKind::Truncated, self.offset, "the end of the file", expected))
            }
            Err(error) => Err(Error::io(error, "to read the header").in_file(self.file).at(self.offset)),
        }
    }

    /// Bytes that the header can still have.
    fn remaining_bytes(&self) -> u64 {
        self.length_bytes.min(MAX_HEADER_BYTES) - self.offset
    }

    fn too_short(&self, bytes: u64, what: &str) -> Error {
        let found = match self.length_bytes {
            length_bytes @ ..=MAX_HEADER_BYTES => format!("the end of the file, which has {length_bytes} bytes"),
            _ => format!("the end of the {MAX_HEADER_BYTES} bytes that a header may have"),
        };
        self.error(ErrorKind::Truncated, self.offset, found, format!("{what} of {bytes} bytes"))
    }

    fn error(&self, kind: ErrorKind, offset: u64, found: impl Into<String>, expected: impl Into<Box<str>>) -> Error {
        let mut found = found.into();
        if !self.subject.is_empty() {
            found = format!("{found} in {}", self.subject);
        }
        Error::new(kind, found, expected).in_file(self.file).at(offset)
    }
}

/// Where tensor data may lie in the file.
struct DataSection<'a> {
    file: &'a str,
    start: u64,
    alignment: u64,
    end: u64,
}

impl DataSection<'_> {
    /// Makes the tensors' offsets absolute, and refuses tensors that are misaligned, out of the file or overlap.
    fn place(&self, tensors: &mut TensorDirectory, info_offsets: &[u64]) -> Result<(), Error> {
        let mut ranges = vec![];
        for (tensor, &info_offset) in tensors.iter_mut().zip(info_offsets) {
            let range = self.place_one(tensor).map_err(|error| error.in_file(self.file).at(info_offset))?;
            ranges.push((range, tensor.name.as_str(), info_offset));
        }
        ranges.sort_by_key(|(range, _, _)| range.start);
        for pair in ranges.windows(2) {
            let [(first, first_name, _), (second, second_name, info_offset)] = pair else { unreachable!() };
            if second.start < first.end {
                let found = format!("data of tensor {second_name:?} at bytes {second:?}");
                let expected = format!("no bytes shared with tensor {first_name:?} at bytes {first:?}");
                return Err(Error::new(ErrorKind::Overlap, found, expected).in_file(self.file).at(*info_offset));
            }
        }
        Ok(())
    }

    /// The bytes of one tensor. One of unknown type has an unknown size and is held to take at least a byte.
    fn place_one(&self, tensor: &mut TensorInfo) -> Result<std::ops::Range<u64>, Error> {
        let relative = tensor.offset;
        if !relative.is_multiple_of(self.alignment) {
            let found = format!("tensor {:?} at offset {relative} of the data", tensor.name);
            let expected = format!("a multiple of the alignment {}", self.alignment);
            return Err(Error::new(ErrorKind::Alignment, found, expected));
        }
        let size_bytes = match tensor.ty {
            TensorType::Unknown(_) => 1,
            _ => tensor.size_bytes()?,
        };
        let start = self.start.checked_add(relative);
        let end = start.and_then(|start| start.checked_add(size_bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= self.end => {
                tensor.offset = start;
                Ok(start..end)
            }
            _ => {
                let found = format!(
                    "tensor {:?} with {size_bytes} bytes at offset {relative} of the data, which start at byte {}",
                    tensor.name, self.start
                );
                Err(Error::new(ErrorKind::Truncated, found, format!("an end within the file's {} bytes", self.end)))
            }
        }
    }
}
