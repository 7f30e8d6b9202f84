//! Writes a GGUF file: header first, then each tensor's data as the caller streams them.
//!
//! What this writer wrote and the reader parsed, it writes again byte for byte: value types, key order and tensor
//! order are kept, and everything else (offsets, padding with zeros) follows from them.

use std::io::{self, Write};

use crate::MAGIC;
use crate::error::{Error, ErrorKind};
use crate::file::Gguf;
use crate::metadata::Metadata;
use crate::tensor::{TensorDirectory, TensorInfo};
use crate::tensor_type::TensorType;
use crate::value::{Array, Number, Value};

/// The version that is written.
const VERSION: u32 = 3;

/// A file to be written: metadata and tensor descriptions, no data.
#[derive(Clone, Debug, Default)]
pub struct Writer {
    metadata: Metadata,
    tensors: TensorDirectory,
}

/// The keys and tensors of a parsed model. A split model becomes one file, so it loses its `split.*` keys.
impl From<&Gguf> for Writer {
    fn from(model: &Gguf) -> Writer {
        let mut metadata = model.metadata.clone();
        if model.files.len() > 1 {
            metadata.retain(|key| !key.starts_with("split."));
        }
        Writer { metadata, tensors: model.tensors.clone() }
    }
}

impl Writer {
    /// A file without keys and tensors.
    pub fn new() -> Writer {
        Writer::default()
    }

    /// Sets a metadata key; a key that is there keeps its place and gets the new value. `general.alignment`
    /// (a power of two) rules how tensor data are aligned.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> Result<&mut Writer, Error> {
        self.metadata.set(key, value.into())?;
        Ok(self)
    }

    /// Adds a tensor of dimensions `dims` (fastest first). Its data follow in [`Writer::write`].
    pub fn tensor(&mut self, name: &str, dims: &[u64], ty: TensorType) -> Result<&mut Writer, Error> {
        let tensor = TensorInfo { name: name.into(), dims: dims.into(), ty, file: 0, offset: 0 };
        tensor.size_bytes()?;
        self.tensors.add(tensor)?;
        Ok(self)
    }

    /// Writes the file to `out` and returns its size in bytes. `data` is called once per tensor, in order, with
    /// the tensor (its offset is that in the new file) and where to write its `size_bytes` bytes: no more, no less.
    /// On an error the output is incomplete and should be deleted.
    pub fn write<W: Write>(
        &self,
        out: &mut W,
        mut data: impl FnMut(&TensorInfo, &mut dyn Write) -> io::Result<()>,
    ) -> Result<u64, Error> {
        let alignment = self.metadata.alignment()?;
        let tensors = self.laid_out(alignment)?;
        let mut out = Counted { out, bytes: 0 };
        out.put(&self.header(&tensors))?;
        if !tensors.is_empty() {
            out.pad_to(alignment)?;
        }
        for tensor in tensors {
            let tensor = TensorInfo { offset: out.bytes, ..tensor };
            data(&tensor, &mut out).map_err(|error| Error::io(error, format!("data for tensor {:?}", tensor.name)))?;
            let (written, size_bytes) = (out.bytes - tensor.offset, tensor.size_bytes()?);
            if written != size_bytes {
                let found = format!("{written} bytes of data for tensor {:?}", tensor.name);
                return Err(Error::new(ErrorKind::DataSize, found, format!("{size_bytes} bytes")));
            }
            out.pad_to(alignment)?;
        }
        out.flush().map_err(|error| Error::io(error, "to write the file"))?;
        Ok(out.bytes)
    }

    /// The tensors with their offsets in the data section: in order, without gaps but for alignment.
    fn laid_out(&self, alignment: u64) -> Result<Vec<TensorInfo>, Error> {
        let mut offset = 0_u64;
        let place = |tensor: &TensorInfo| {
            let placed = TensorInfo { offset, file: 0, ..tensor.clone() };
            let end = offset.checked_add(tensor.size_bytes()?).and_then(|end| end.checked_next_multiple_of(alignment));
            offset = end.ok_or_else(|| {
                let found = format!("tensor {:?} that ends beyond it", tensor.name);
                Error::new(ErrorKind::Dimensions, found, "a file size within 64 bits")
            })?;
            Ok(placed)
        };
        self.tensors.iter().map(place).collect()
    }

    fn header(&self, tensors: &[TensorInfo]) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        VERSION.push_le(&mut out);
        (tensors.len() as u64).push_le(&mut out);
        (self.metadata.len() as u64).push_le(&mut out);
        for (key, value) in self.metadata.iter() {
            push_string(key, &mut out);
            (value.value_type() as u32).push_le(&mut out);
            push_value(value, &mut out);
        }
        for tensor in tensors {
            push_string(&tensor.name, &mut out);
            (tensor.dims.len() as u32).push_le(&mut out);
            tensor.dims.iter().for_each(|dim| dim.push_le(&mut out));
            tensor.ty.id().push_le(&mut out);
            tensor.offset.push_le(&mut out);
        }
        out
    }
}

fn push_string(string: &str, out: &mut Vec<u8>) {
    (string.len() as u64).push_le(out);
    out.extend_from_slice(string.as_bytes());
}

fn push_value(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::U8(x) => x.push_le(out),
        Value::I8(x) => x.push_le(out),
        Value::U16(x) => x.push_le(out),
        Value::I16(x) => x.push_le(out),
        Value::U32(x) => x.push_le(out),
        Value::I32(x) => x.push_le(out),
        Value::F32(x) => x.push_le(out),
        Value::U64(x) => x.push_le(out),
        Value::I64(x) => x.push_le(out),
        Value::F64(x) => x.push_le(out),
        Value::Bool(x) => out.push(u8::from(*x)),
        Value::String(x) => push_string(x, out),
        Value::Array(x) => push_array(x, out),
    }
}

fn push_array(array: &Array, out: &mut Vec<u8>) {
    (array.element_type() as u32).push_le(out);
    (array.len() as u64).push_le(out);
    match array {
        Array::U8(x) => push_numbers(x, out),
        Array::I8(x) => push_numbers(x, out),
        Array::U16(x) => push_numbers(x, out),
        Array::I16(x) => push_numbers(x, out),
        Array::U32(x) => push_numbers(x, out),
        Array::I32(x) => push_numbers(x, out),
        Array::F32(x) => push_numbers(x, out),
        Array::U64(x) => push_numbers(x, out),
        Array::I64(x) => push_numbers(x, out),
        Array::F64(x) => push_numbers(x, out),
        Array::Bool(x) => out.extend(x.iter().map(|&bool| u8::from(bool))),
        Array::String(x) => x.iter().for_each(|string| push_string(string, out)),
        Array::Array(x) => x.iter().for_each(|array| push_array(array, out)),
    }
}

fn push_numbers<T: Number>(numbers: &[T], out: &mut Vec<u8>) {
    numbers.iter().for_each(|number| number.push_le(out));
}

/// A `Write` that knows how many bytes have gone through it.
struct Counted<'a, W> {
    out: &'a mut W,
    bytes: u64,
}

impl<W: Write> Counted<'_, W> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.write_all(bytes).map_err(|error| Error::io(error, "to write the file"))
    }

    /// Writes zeros up to the next multiple of `alignment`.
    fn pad_to(&mut self, alignment: u64) -> Result<(), Error> {
        const ZEROS: [u8; 4096] = [0; 4096];
        let mut missing = self.bytes.next_multiple_of(alignment) - self.bytes;
        while missing > 0 {
            let piece_bytes = missing.min(ZEROS.len() as u64);
            self.put(&ZEROS[..piece_bytes as usize])?;
            missing -= piece_bytes;
        }
        Ok(())
    }
}

impl<W: Write> Write for Counted<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
