//! Activations quantised to 8 bits, as the integer dots take them.

use bytemuck::Zeroable;
use gguf::TensorType;

use crate::blocks::*;
use crate::simd::{Level, Simd, kernel, level};

/// How activations are cut into blocks, each with a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocking {
    /// 32 values.
    Short,
    /// 256 values.
    Long,
}

impl Blocking {
    /// Values in a block.
    pub fn elements(self) -> usize {
        match self {
            Blocking::Short => 32,
            Blocking::Long => QK_K,
        }
    }
}

/// What weights of this type are multiplied with; `None` if not in whole numbers.
pub fn blocking(ty: TensorType) -> Option<Blocking> {
    use TensorType::*;
    match ty {
        Q8_0 | Mxfp4 => Some(Blocking::Short),
        Q2K | Q3K | Q4K | Q5K | Q6K | Iq2Xxs => Some(Blocking::Long),
        _ => None,
    }
}

/// Rows of quantised activations.
pub struct Activations {
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Block b of row r at `b * rows + r`, for a kernel takes a block of many rows at a time.
    pub(super) blocks: Blocks,
}

pub(super) enum Blocks {
    Short(Vec<ActivationQ8_0>),
    Long(Vec<ActivationQ8K>),
}

/// Some blocks of every row of [`Activations`], to be filled.
pub struct Piece<'a> {
    rows: usize,
    cols: usize,
    first_block: usize,
    blocks: BlocksMut<'a>,
}

enum BlocksMut<'a> {
    Short(&'a mut [ActivationQ8_0]),
    Long(&'a mut [ActivationQ8K]),
}

impl Activations {
    /// Room for `rows` rows of `cols` values.
    ///
    /// Panics if `cols` is not a whole number of blocks.
    pub fn zeroed(blocking: Blocking, rows: usize, cols: usize) -> Activations {
        let elements = blocking.elements();
        assert!(cols.is_multiple_of(elements), "a row has blocks of {elements} values, found {cols} values");
        let count = rows * cols / elements;
        let blocks = match blocking {
            Blocking::Short => Blocks::Short(vec![ActivationQ8_0::zeroed(); count]),
            Blocking::Long => Blocks::Long(vec![ActivationQ8K::zeroed(); count]),
        };
        Activations { rows, cols, blocks }
    }

    /// The rows in about `count` pieces, which may be filled at the same time.
    pub fn pieces(&mut self, count: usize) -> Vec<Piece<'_>> {
        fn cut<B>(blocks: &mut [B], rows: usize, count: usize) -> impl Iterator<Item = (usize, &mut [B])> {
            let each = (blocks.len() / rows).div_ceil(count).max(1);
            blocks.chunks_mut(each * rows).enumerate().map(move |(i, blocks)| (i * each, blocks))
        }
        let (rows, cols) = (self.rows, self.cols);
        if rows == 0 {
            return Vec::new();
        }
        let piece = |first_block, blocks| Piece { rows, cols, first_block, blocks };
        match &mut self.blocks {
            Blocks::Short(all) => cut(all, rows, count).map(|(b, blocks)| piece(b, BlocksMut::Short(blocks))).collect(),
            Blocks::Long(all) => cut(all, rows, count).map(|(b, blocks)| piece(b, BlocksMut::Long(blocks))).collect(),
        }
    }

    /// Some of the rows, in the order of `rows`.
    pub fn select(&self, rows: &[usize]) -> Activations {
        fn select<B: Copy>(blocks: &[B], stride: usize, rows: &[usize]) -> Vec<B> {
            let mut selected = Vec::with_capacity(blocks.len() / stride * rows.len());
            blocks.chunks_exact(stride).for_each(|all| selected.extend(rows.iter().map(|&row| all[row])));
            selected
        }
        let blocks = match &self.blocks {
            Blocks::Short(blocks) => Blocks::Short(select(blocks, self.rows, rows)),
            Blocks::Long(blocks) => Blocks::Long(select(blocks, self.rows, rows)),
        };
        Activations { rows: rows.len(), cols: self.cols, blocks }
    }
}

impl Piece<'_> {
    /// Quantises this piece's part of `x`, which is all rows.
    ///
    /// Panics if `x` is not as many rows of as many values as room was made for.
    pub fn quantize_at(&mut self, level: Level, x: &[f32]) {
        assert!(x.len() == self.rows * self.cols, "{} values are not {} rows of {}", x.len(), self.rows, self.cols);
        match &mut self.blocks {
            BlocksMut::Short(blocks) => quantize_short_at(level, x, self.cols, self.first_block, self.rows, blocks),
            BlocksMut::Long(blocks) => quantize_long_at(level, x, self.cols, self.first_block, self.rows, blocks),
        }
    }
}

/// Rows of `cols` values, quantised for weights of type `ty`.
///
/// Panics if `x` is not whole rows, or `ty` has no [blocking] or does not divide a row into blocks.
pub fn quantize_activations(ty: TensorType, x: &[f32], cols: usize) -> Activations {
    quantize_activations_at(level(), ty, x, cols)
}

/// [`quantize_activations`] at a chosen level. Panics where the machine does not have it.
pub fn quantize_activations_at(level: Level, ty: TensorType, x: &[f32], cols: usize) -> Activations {
    let blocking = blocking(ty).unwrap_or_else(|| panic!("{ty} has no integer dot"));
    assert!(x.len().is_multiple_of(cols), "{} values are not whole rows of {cols}", x.len());
    let mut activations = Activations::zeroed(blocking, x.len() / cols, cols);
    activations.pieces(1).iter_mut().for_each(|piece| piece.quantize_at(level, x));
    activations
}

kernel! {
    /// Blocks of 32 of all rows, from `first` on.
    fn quantize_short_at(x: &[f32], cols: usize, first: usize, rows: usize, out: &mut [ActivationQ8_0])
        = quantize_short_body
}
kernel! {
    /// Blocks of 256 of all rows, from `first` on.
    fn quantize_long_at(x: &[f32], cols: usize, first: usize, rows: usize, out: &mut [ActivationQ8K])
        = quantize_long_body
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
#[inline(always)]
fn quantize_short_body<S: Simd>(
    _simd: S,
    x: &[f32],
    cols: usize,
    first: usize,
    rows: usize,
    out: &mut [ActivationQ8_0],
) {
    by_block(x, cols, first, rows, out, quantize_block_q8_0);
}

#[inline(always)]
fn quantize_long_body<S: Simd>(_simd: S, x: &[f32], cols: usize, first: usize, rows: usize, out: &mut [ActivationQ8K]) {
    by_block(x, cols, first, rows, out, quantize_block_q8_k);
}

/// `quantize` of every N values of every row, all rows' block `first` first.
#[inline(always)]
fn by_block<const N: usize, B>(
    x: &[f32],
    cols: usize,
    first: usize,
    rows: usize,
    out: &mut [B],
    quantize: impl Fn(&[f32; N], &mut B),
) {
    for (b, out) in (first..).zip(out.chunks_exact_mut(rows)) {
        for (x, out) in x.chunks_exact(cols).zip(out) {
            quantize(&x.as_chunks::<N>().0[b], out);
        }
    }
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
