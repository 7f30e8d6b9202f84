//! The arithmetic of `Fast`: quantised weights times activations quantised to 8 bits (docs/spec/model.md §5.8).
//!
//! Within a block everything is whole numbers, exact in i32. Only then come f32 operations: a block's number, scaled,
//! is added to the row's sum by one fused multiply-add, blocks in ascending order from 0. So neither the instruction
//! set nor the layout in which a kernel sums a block can change a bit, and a batch equals its rows one by one.
//!
//! [`dot`] is that definition in plain code; [`matmul`] is what computes, in the same bits.

mod activations;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocks;
#[cfg(target_arch = "aarch64")]
mod neon;

use crate::blocks::*;
use crate::decode::row_bytes;
use crate::simd::{Scalar, Simd, kernel, prefetch};
use gguf::TensorType;

use activations::Blocks;
pub use activations::{
    Activations, Blocking, Piece, blocking, quantize_activations, quantize_activations_at, quantize_q8_0,
    quantize_q8_0_at, quantize_q8_k, quantize_q8_k_at,
};
pub use blocks::IntegerDot;
use blocks::{LongBlock, ShortBlock};

/// The dot of a row of weight blocks and as many activation blocks: the definition.
pub fn dot<W: IntegerDot>(row: &[W], x: &[W::Activation]) -> f32 {
    assert!(row.len() == x.len(), "a dot of {} and {} blocks", row.len(), x.len());
    row.iter().zip(x).fold(0.0, |sum, (w, x)| w.add_dot(x, sum))
}

kernel! {
    /// The dots of n weight rows with the R rows of `x`: `out[i * R + r]` is [`dot`] of weight row i and row r.
    ///
    /// Panics if `x` was quantised for another kind of weights, or `weights` or `out` do not have as many rows.
    pub fn matmul, matmul_at(ty: TensorType, weights: &[u8], x: &Activations, out: &mut [f32]) = matmul_body
}

/// What a level brings: the dots of n weight rows with R activation rows, `[n, R]`, with the bits of [`dot`].
trait IntegerSimd: Simd {
    /// For blocks of 32.
    fn short<W: ShortBlock>(self, weights: &[W], x: &[ActivationQ8_0], batch: usize, out: &mut [f32]);
    /// For blocks of 256.
    fn long<W: LongBlock>(self, weights: &[W], x: &[ActivationQ8K], batch: usize, out: &mut [f32]);
}

#[inline(always)]
fn matmul_body<S: IntegerSimd>(simd: S, ty: TensorType, weights: &[u8], x: &Activations, out: &mut [f32]) {
    let batch = x.rows;
    let row_bytes = row_bytes(ty, x.cols);
    assert!(weights.len().is_multiple_of(row_bytes), "{} bytes are not rows of {row_bytes}", weights.len());
    let rows = weights.len() / row_bytes;
    assert!(out.len() == rows * batch, "{rows} rows × {batch} are not {} dots", out.len());
    if out.is_empty() {
        return;
    }
    match (&x.blocks, ty) {
        (Blocks::Short(x), TensorType::Q8_0) => simd.short::<Q8_0>(view(weights), x, batch, out),
        (Blocks::Short(x), TensorType::Mxfp4) => simd.short::<Mxfp4>(view(weights), x, batch, out),
        (Blocks::Long(x), TensorType::Q2K) => simd.long::<Q2K>(view(weights), x, batch, out),
        (Blocks::Long(x), TensorType::Q3K) => simd.long::<Q3K>(view(weights), x, batch, out),
        (Blocks::Long(x), TensorType::Q4K) => simd.long::<Q4K>(view(weights), x, batch, out),
        (Blocks::Long(x), TensorType::Q5K) => simd.long::<Q5K>(view(weights), x, batch, out),
        (Blocks::Long(x), TensorType::Q6K) => simd.long::<Q6K>(view(weights), x, batch, out),
        (Blocks::Long(x), TensorType::Iq2Xxs) => simd.long::<Iq2Xxs>(view(weights), x, batch, out),
        _ => panic!("activations of another kind than {ty} takes"),
    }
}

impl IntegerSimd for Scalar {
    fn short<W: ShortBlock>(self, weights: &[W], x: &[ActivationQ8_0], batch: usize, out: &mut [f32]) {
        dots(weights, x, batch, out);
    }

    fn long<W: LongBlock>(self, weights: &[W], x: &[ActivationQ8K], batch: usize, out: &mut [f32]) {
        dots(weights, x, batch, out);
    }
}

/// [`dot`] of every weight row with every activation row.
fn dots<W: IntegerDot>(weights: &[W], x: &[W::Activation], batch: usize, out: &mut [f32]) {
    let per_row = x.len() / batch;
    for (row, out) in weights.chunks_exact(per_row).zip(out.chunks_exact_mut(batch)) {
        for (r, out) in out.iter_mut().enumerate() {
            let blocks = row.iter().zip(x[r..].iter().step_by(batch));
            *out = blocks.fold(0.0, |sum, (w, x)| w.add_dot(x, sum));
        }
    }
}

/// Which N weight rows meet: N neighbours, or N that lie a Nth of all rows apart. Then each of them is read on and on, row
/// after row, and a processor that reads ahead sees N long streams; of neighbours it sees N that end with every row. For
/// Q8_0 and AVX-512 that is 33 against 25 GB/s of memory (docs/performance.md; not measured for each format and level). A kernel that computes for longer than it waits gains nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rows {
    Neighbours,
    Apart,
}

/// The loops of every vector kernel. Calls `add(blocks, activations, sums)` for every block of every N weight rows and up
/// to `BATCH` rows of activations, blocks ascending; lane i of a sum belongs to the ith of the weight rows. Then writes the
/// lanes of the sums, which begin as `zero`, to `out`, `[n, R]`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn tiles<W, X, S: Copy, const N: usize, const BATCH: usize>(
    which: Rows,
    weights: &[W],
    x: &[X],
    batch: usize,
    out: &mut [f32],
    zero: S,
    lanes: impl Fn(S) -> [f32; N],
    add: impl Fn([&W; N], &[X], &mut [S]),
) {
    let per_row = x.len() / batch;
    let rows = weights.len() / per_row;
    let (firsts, step, apart) = match which {
        Rows::Neighbours => (rows, N, 1),
        Rows::Apart => (rows.div_ceil(N), 1, rows.div_ceil(N)),
    };
    for n in (0..firsts).step_by(step) {
        // At the end the last row stands in for rows that are not there.
        let start: [usize; N] = std::array::from_fn(|i| (n + i * apart).min(rows - 1) * per_row);
        let w: [&[W]; N] = start.map(|start| &weights[start..][..per_row]);
        for r in (0..batch).step_by(BATCH) {
            let mut sums = [zero; BATCH];
            let sums = &mut sums[..BATCH.min(batch - r)];
            for b in 0..per_row {
                // What is read a tile later, in the order in which it lies in memory.
                match which {
                    _ if r > 0 => {}
                    Rows::Neighbours => prefetch(weights, start[0] + N * (per_row + b), N),
                    Rows::Apart => start.iter().for_each(|start| prefetch(weights, start + per_row + b, 1)),
                }
                add(w.map(|row| &row[b]), &x[b * batch + r..][..sums.len()], sums);
            }
            for (r, sum) in (r..).zip(sums) {
                let places = (0..N).map(|i| (n + i * apart) * batch + r);
                for (place, lane) in places.zip(lanes(*sum)) {
                    if let Some(out) = out.get_mut(place) {
                        *out = lane;
                    }
                }
            }
        }
    }
}
