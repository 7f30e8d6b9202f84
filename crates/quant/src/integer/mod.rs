//! The arithmetic of `Fast`: quantised weights times activations quantised to 8 bits (docs/spec/model.md §5.8).
//!
//! Within a block everything is whole numbers, exact in i32. Only then come f32 operations: a block's number, scaled,
//! is added to the row's sum by one fused multiply-add, blocks in ascending order from 0. So neither the instruction
//! set nor the layout in which a kernel sums a block can change a bit, and a batch equals its rows one by one.
//!
//! [`dot`] is that definition in plain code; [`matmul`] is what computes, in the same bits.

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
use bytemuck::Zeroable;
use gguf::TensorType;

pub use blocks::IntegerDot;
use blocks::{LongBlock, ShortBlock};

/// Whether weights of this type are multiplied in whole numbers.
pub fn is_supported(ty: TensorType) -> bool {
    activation_elements(ty).is_some()
}

/// Values in an activation block for weights of this type.
fn activation_elements(ty: TensorType) -> Option<usize> {
    use TensorType::*;
    match ty {
        Q8_0 | Mxfp4 => Some(32),
        Q2K | Q3K | Q4K | Q5K | Q6K | Iq2Xxs => Some(QK_K),
        _ => None,
    }
}

/// The dot of a row of weight blocks and as many activation blocks: the definition.
pub fn dot<W: IntegerDot>(row: &[W], x: &[W::Activation]) -> f32 {
    assert!(row.len() == x.len(), "a dot of {} and {} blocks", row.len(), x.len());
    row.iter().zip(x).fold(0.0, |sum, (w, x)| w.add_dot(x, sum))
}

/// Rows of activations, quantised for weights of one type.
pub struct Activations {
    rows: usize,
    cols: usize,
    /// Block b of row r at `b * rows + r`, for a kernel takes a block of many rows at a time.
    blocks: Blocks,
}

enum Blocks {
    Short(Vec<ActivationQ8_0>),
    Long(Vec<ActivationQ8K>),
}

kernel! {
    /// Rows of `cols` values, quantised for weights of type `ty`.
    ///
    /// Panics if `x` is not whole rows, or `ty` is not [supported](is_supported) or does not divide a row into blocks.
    pub fn quantize_activations, quantize_activations_at(ty: TensorType, x: &[f32], cols: usize) -> Activations
        = quantize_activations_body
}
kernel! {
    /// Quantises activations per 32: d = amax/127, q = round(x · (1/d)) to nearest, ties to even. A block with an
    /// infinity or a NaN gets the scale NaN, and so does every dot with it; where 1/d overflows, all is 0.
    ///
    /// Panics if `x` does not fill `out`.
    pub fn quantize_q8_0, quantize_q8_0_at(x: &[f32], out: &mut [ActivationQ8_0]) = quantize_q8_0_body
}
kernel! {
    /// Quantises activations per 256: with M the value of largest magnitude (the first of equals), the factor is
    /// −127/M, q = round(x · factor) to nearest, ties to even, and d = 1/factor. Infinities, NaN and values too
    /// small for a factor as in [`quantize_q8_0`].
    ///
    /// Panics if `x` does not fill `out`.
    pub fn quantize_q8_k, quantize_q8_k_at(x: &[f32], out: &mut [ActivationQ8K]) = quantize_q8_k_body
}
kernel! {
    /// The dots of n weight rows with the R rows of `x`: `out[i * R + r]` is [`dot`] of weight row i and row r.
    ///
    /// Panics if `x` was quantised for another kind of weights, or `weights` or `out` do not have as many rows.
    pub fn matmul, matmul_at(ty: TensorType, weights: &[u8], x: &Activations, out: &mut [f32]) = matmul_body
}

#[inline(always)]
fn quantize_activations_body<S: Simd>(_simd: S, ty: TensorType, x: &[f32], cols: usize) -> Activations {
    let elements = activation_elements(ty).unwrap_or_else(|| panic!("{ty} has no integer dot"));
    assert!(cols.is_multiple_of(elements), "a {ty} row has blocks of {elements} values, found {cols} values");
    let rows = x.len() / cols;
    assert!(x.len() == rows * cols, "{} values are not whole rows of {cols}", x.len());
    let blocks = match elements {
        32 => Blocks::Short(by_block(x, cols, quantize_block_q8_0)),
        _ => Blocks::Long(by_block(x, cols, quantize_block_q8_k)),
    };
    Activations { rows, cols, blocks }
}

/// `quantize` of every N values of every row, all rows' first blocks first.
#[inline(always)]
fn by_block<const N: usize, B: Zeroable + Clone>(
    x: &[f32],
    cols: usize,
    quantize: impl Fn(&[f32; N], &mut B),
) -> Vec<B> {
    let rows = x.len() / cols;
    let mut blocks = vec![B::zeroed(); x.len() / N];
    for (r, row) in x.chunks_exact(cols).enumerate() {
        for (b, x) in row.as_chunks::<N>().0.iter().enumerate() {
            quantize(x, &mut blocks[b * rows + r]);
        }
    }
    blocks
}

#[inline(always)]
fn quantize_q8_0_body<S: Simd>(_simd: S, x: &[f32], out: &mut [ActivationQ8_0]) {
    let (blocks, rest) = x.as_chunks();
    assert!(rest.is_empty() && blocks.len() == out.len(), "{} values for {} blocks of 32", x.len(), out.len());
    blocks.iter().zip(out).for_each(|(x, out)| quantize_block_q8_0(x, out));
}

#[inline(always)]
fn quantize_q8_k_body<S: Simd>(_simd: S, x: &[f32], out: &mut [ActivationQ8K]) {
    let (blocks, rest) = x.as_chunks();
    assert!(rest.is_empty() && blocks.len() == out.len(), "{} values for {} blocks of 256", x.len(), out.len());
    blocks.iter().zip(out).for_each(|(x, out)| quantize_block_q8_k(x, out));
}

#[inline(always)]
fn quantize_block_q8_0(x: &[f32; 32], out: &mut ActivationQ8_0) {
    let d = largest(x).abs() / 127.0;
    (out.d, out.q) = scaled_codes(x, d, 1.0 / d);
    out.sum = out.q.iter().map(|&q| i32::from(q)).sum();
}

#[inline(always)]
fn quantize_block_q8_k(x: &[f32; QK_K], out: &mut ActivationQ8K) {
    let factor = -127.0 / largest(x);
    (out.d, out.q) = scaled_codes(x, 1.0 / factor, factor);
    for (sum, q) in out.sums.iter_mut().zip(out.q.as_chunks::<16>().0) {
        *sum = q.iter().map(|&q| i16::from(q)).sum();
    }
}

/// The value of largest magnitude, the first of equals; NaN if any value is not finite.
#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    // Without their sign, floats order as their bits do, and what is not finite comes last.
    let magnitude = |x: f32| x.to_bits() & 0x7fff_ffff;
    let largest = x.iter().fold(0, |largest, &x| largest.max(magnitude(x)));
    if largest >= f32::INFINITY.to_bits() {
        return f32::NAN;
    }
    x.iter().copied().find(|&x| magnitude(x) == largest).unwrap_or(0.0)
}

/// Scale `d` and round(x · factor), at most 127 in magnitude; without a finite factor, all is zero but a NaN.
#[inline(always)]
fn scaled_codes<const N: usize>(x: &[f32; N], d: f32, factor: f32) -> (f32, [i8; N]) {
    /// Adding 1.5·2²³ leaves the rounded integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    if !factor.is_finite() {
        return (if factor.is_nan() { f32::NAN } else { 0.0 }, [0; N]);
    }
    (d, x.map(|x| (x * factor + ROUND).to_bits() as i8))
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

/// The loops of every vector kernel. Calls `add(blocks, activations, sums)` for every block of every N weight rows and up
/// to `BATCH` rows of activations, blocks ascending; lane i of a sum belongs to weight row i. Then writes the lanes of
/// the sums, which begin as `zero`, to `out`, `[n, R]`.
#[inline(always)]
fn tiles<W, X, S: Copy, const N: usize, const BATCH: usize>(
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
    for n in (0..rows).step_by(N) {
        // At the end the last row stands in for rows that are not there.
        let w: [&[W]; N] = std::array::from_fn(|i| &weights[(n + i).min(rows - 1) * per_row..][..per_row]);
        for r in (0..batch).step_by(BATCH) {
            let mut sums = [zero; BATCH];
            let sums = &mut sums[..BATCH.min(batch - r)];
            for b in 0..per_row {
                // Rows lie one after the other, and the N after these are read next: to the processor, N streams at
                // once within few pages look like no stream at all.
                prefetch(&weights[n * per_row..], N * (per_row + b), N);
                add(w.map(|row| &row[b]), &x[b * batch + r..][..sums.len()], sums);
            }
            for (r, sum) in (r..).zip(sums) {
                let out = out[n * batch + r..].iter_mut().step_by(batch);
                lanes(*sum).iter().zip(out).for_each(|(lane, out)| *out = *lane);
            }
        }
    }
}
