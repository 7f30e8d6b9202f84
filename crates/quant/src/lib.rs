//! Block formats and the arithmetic on them: layouts, dequantise, quantise, dots, and the small-float roundings
//! of the model's state. Knows nothing of files or models.
//!
//! - [`blocks`]: what the bytes of each format are.
//! - [`dequantize`], [`quantize()`]: blocks to f32 and back.
//! - [`elementwise`]: element by element work between the products.
//! - [`exact`]: the canonical f32 dot and everything built on it.
//! - [`integer`]: dots of blocks with activations quantised to 8 bits.
//! - [`math`]: deterministic `exp`, `sigmoid`, `silu`, `softplus`.
//! - [`small_float`]: FP8, FP4 and bfloat16 of stored state, and the rotation in front of FP4.
//! - [`simd`]: instruction sets. Every kernel has the same bits on each of them.

pub mod blocks;
mod decode;
pub mod elementwise;
pub mod exact;
pub mod integer;
mod iq2_grid;
pub mod math;
mod quantize;
pub mod simd;
pub mod small_float;

pub use decode::{TYPES, dequantize, dequantize_at, is_supported, row_bytes};
pub use quantize::{QuantizeError, quantize};
