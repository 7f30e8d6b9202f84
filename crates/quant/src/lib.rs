//! Block formats and the arithmetic on them: layouts, dequantise, quantise, dots, and the small-float roundings
//! of the model's state. Knows nothing of files or models.
//!
//! - [`blocks`]: what the bytes of each format are.
//! - [`dequantize`]: blocks to f32.
//! - [`exact`]: the canonical f32 dot and everything built on it.
//! - [`simd`]: instruction sets. Every kernel has the same bits on each of them.

pub mod blocks;
mod decode;
pub mod exact;
mod iq2_grid;
pub mod simd;

pub use decode::{dequantize, dequantize_at, is_supported, row_bytes};
