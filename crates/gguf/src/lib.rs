//! The GGUF container: header, metadata, tensor directory, writer.
mod tensor_type;
pub use tensor_type::{Block, TensorType};
