//! The CPU backend: every stage of the model, in `Exact` or in `Fast` arithmetic.
//!
//! Exact is f32 activations times dequantised weights, summed by `quant::exact`'s one canonical order; Fast multiplies quantised
//! weights with activations of 8 bits (`quant::integer`) and is Exact in all else. In neither does a result
//! depend on the number of threads, on how rows are cut into passes, on other rows in the pass, or on the instruction
//! set; so this backend is also what every other implementation of a stage is compared with.

mod attention;
mod backend;
mod experts;
mod hyper;
mod memory;
mod parallel;
mod pass;
mod pool;
pub mod rows;
#[cfg(test)]
mod vectors;
mod weights;

pub use backend::{CpuBackend, Options, WeightBytes};
pub use experts::{Selection, SimulatedRoutes};
pub use memory::{PassShape, pass_bytes, static_bytes};
pub use pass::Pass;
pub use quant::simd::Level;
