//! The GGUF container: header, metadata, tensor directory, writer.
//!
//! A file is `magic, version, tensor count, key count, keys, tensor infos, padding, tensor data`, all little
//! endian (format description: `docs/gguf.md` of ggml). Reading parses the header only; where a tensor's bytes
//! lie is told by [`TensorInfo`], and what they mean is the business of other crates.
//!
//! Nothing a file says is believed before it is checked: every count, length, offset and product is compared
//! with the bytes that are really there, so a damaged or hostile file gives an [`Error`], never a panic, and
//! never an allocation larger than a small multiple of the file's own bytes.
//!
//! ```
//! # fn main() -> Result<(), gguf::Error> {
//! let mut writer = gguf::Writer::new();
//! writer.set("general.architecture", "example")?;
//! writer.tensor("ones", &[4], gguf::TensorType::I8)?;
//! let mut file = Vec::new();
//! writer.write(&mut file, |_tensor, out| out.write_all(&[1; 4]))?;
//!
//! let model = gguf::Gguf::parse("example.gguf", &file)?;
//! assert_eq!(model.metadata.str("general.architecture")?, "example");
//! let ones = model.tensors.get("ones").expect("it was written");
//! assert_eq!(&file[ones.offset as usize..][..ones.size_bytes()? as usize], [1; 4]);
//! # Ok(())
//! # }
//! ```

mod error;
mod file;
mod header;
mod metadata;
mod tensor;
mod tensor_type;
mod value;
mod writer;

pub use error::{Error, ErrorKind};
pub use file::{FilePart, Gguf};
pub use metadata::Metadata;
pub use tensor::{TensorDirectory, TensorInfo};
pub use tensor_type::{Block, TensorType};
pub use value::{Array, Strings, Value, ValueType};
pub use writer::Writer;

/// The first four bytes of every GGUF file.
const MAGIC: [u8; 4] = *b"GGUF";

/// Alignment of tensor data when `general.alignment` is absent.
const DEFAULT_ALIGNMENT: u64 = 32;

/// Longest metadata key the format allows.
const MAX_KEY_BYTES: u64 = 65_535;

/// Most dimensions a tensor may have.
const MAX_DIMS: usize = 4;

/// Arrays may hold arrays, this many levels of array in all. (No known file has more than one.)
const MAX_ARRAY_DEPTH: usize = 4;
