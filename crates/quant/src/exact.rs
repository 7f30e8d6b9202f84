//! The canonical f32 arithmetic of `Exact`: one dot product with one order of operations, whatever the
//! instruction set, the number of rows or the format of the weights.
//!
//! Sixteen f32 lanes start at zero; element i is added to lane i mod 16 in ascending i by one fused multiply-add,
//! `lane = fma(w[i], x[i], lane)`; then the lanes are added in a fixed tree, `l[i] += l[i + 8]` (i < 8), then 4,
//! 2, 1. Every function here that returns dots returns exactly those bits, so a batch equals its rows one by one.

use crate::decode::{Format, dequantize_at, for_format, row_bytes};
use crate::simd::{Level, Simd, kernel, level, prefetch};
use gguf::TensorType;
use std::ops::Range;

kernel! {
    /// The canonical dot product of two vectors of one length.
    pub fn dot, dot_at(w: &[f32], x: &[f32]) -> f32 = dot_body
}
kernel! {
    /// The sum of a vector, over the lanes and the tree of [`dot`] with plain additions.
    pub fn sum, sum_at(x: &[f32]) -> f32 = sum_body
}
kernel! {
    /// `sums[h] += Σ_i weights[h · stride + i] · rows[i]` for H sums of n rows of `width` values each, in ascending i, by one
    /// fused multiply-add for each term.
    ///
    /// Panics if the lengths do not agree.
    pub fn add_weighted, add_weighted_at(weights: &[f32], stride: usize, rows: &[f32], width: usize, sums: &mut [f32])
        = add_weighted_body
}
kernel! {
    /// [`dot`] of a dequantised row and `x`, without writing the row to memory.
    ///
    /// Panics if `row` is not exactly the bytes of `x.len()` values of `ty`.
    pub fn dot_row, dot_row_at(ty: TensorType, row: &[u8], x: &[f32]) -> f32 = dot_row_body
}
kernel! {
    /// The dots of one vector with n consecutive rows: `out[i] = dot_row(ty, row i, x)`.
    ///
    /// Panics if `rows` is not exactly the bytes of `out.len()` rows of `x.len()` values of `ty`.
    pub fn matvec, matvec_at(ty: TensorType, rows: &[u8], x: &[f32], out: &mut [f32]) = matvec_body
}
kernel! {
    /// The dots of n f32 rows with R vectors: `out[i * R + r] = dot(w row i, x row r)`, all rows `cols` long.
    ///
    /// Panics if the lengths do not agree.
    pub fn matmul_f32, matmul_f32_at(w: &[f32], cols: usize, x: &[f32], out: &mut [f32]) = matmul_f32_body
}

/// The dots of n weight rows with R vectors: `out[i * R + r] = dot_row(ty, row i, x row r)`, all rows `cols` long.
///
/// `out` is laid out `[n][R]`, so that threads can share it by disjoint ranges of weight rows; with one vector it
/// is the result itself. `scratch` holds a few dequantised rows and is reused between calls.
///
/// Panics if `weights` is not whole rows of `cols` values of `ty`, or `x` or `out` do not have n and R rows.
pub fn matmul(ty: TensorType, weights: &[u8], cols: usize, x: &[f32], out: &mut [f32], scratch: &mut Vec<f32>) {
    matmul_at(level(), ty, weights, cols, x, out, scratch);
}

/// [`matmul`] at a chosen level. Panics where the machine does not have it.
pub fn matmul_at(
    level: Level,
    ty: TensorType,
    weights: &[u8],
    cols: usize,
    x: &[f32],
    out: &mut [f32],
    scratch: &mut Vec<f32>,
) {
    if x.len() == cols {
        return matvec_at(level, ty, weights, x, out);
    }
    let row_bytes = row_bytes(ty, cols);
    let rows = weights.len() / row_bytes;
    let batch = x.len() / cols;
    assert!(weights.len() == rows * row_bytes, "{} bytes are not whole rows of {row_bytes}", weights.len());
    assert!(out.len() == rows * batch, "{rows} × {batch} dots, found room for {}", out.len());
    scratch.resize(TILE_ROWS * cols, 0.0);
    for (weights, out) in weights.chunks(TILE_ROWS * row_bytes).zip(out.chunks_mut(TILE_ROWS * batch)) {
        let tile = &mut scratch[..weights.len() / row_bytes * cols];
        dequantize_at(level, ty, weights, tile);
        matmul_f32_at(level, tile, cols, x, out);
    }
}

/// Weight rows that [`matmul`] dequantises at a time, so a good share for a thread is a multiple of them: enough to use a block of vectors while it is in the L1 cache.
pub const TILE_ROWS: usize = 16;

/// Elements that the fused dots decode at a time: one super-block.
const CHUNK: usize = 256;

/// Rows whose product with one vector is computed together.
const INTERLEAVED: usize = 4;

/// Adds `w[i] · x[i]` to the lanes. Only the last call on the same lanes may have a length not a multiple of 16.
#[inline(always)]
fn accumulate<S: Simd>(simd: S, mut acc: S::V, w: &[f32], x: &[f32]) -> S::V {
    let (w, w_tail) = w.as_chunks::<16>();
    let (x, x_tail) = x.as_chunks::<16>();
    for (w, x) in w.iter().zip(x) {
        acc = simd.fma(simd.load(w), simd.load(x), acc);
    }
    accumulate_tail(simd, acc, w_tail, x_tail)
}

/// Adds the last, incomplete sixteen.
#[inline(always)]
fn accumulate_tail<S: Simd>(simd: S, acc: S::V, w: &[f32], x: &[f32]) -> S::V {
    if w.is_empty() {
        return acc;
    }
    let mut lanes = simd.to_array(acc);
    for ((lane, w), x) in lanes.iter_mut().zip(w).zip(x) {
        *lane = w.mul_add(*x, *lane);
    }
    simd.load(&lanes)
}

#[inline(always)]
fn dot_body<S: Simd>(simd: S, w: &[f32], x: &[f32]) -> f32 {
    assert!(w.len() == x.len(), "a dot of {} and {} values", w.len(), x.len());
    simd.reduce(accumulate(simd, simd.splat(0.0), w, x))
}

#[inline(always)]
fn sum_body<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let (chunks, tail) = x.as_chunks::<16>();
    let mut acc = simd.splat(0.0);
    for chunk in chunks {
        acc = simd.add(acc, simd.load(chunk));
    }
    let mut lanes = simd.to_array(acc);
    for (lane, x) in lanes.iter_mut().zip(tail) {
        *lane += x;
    }
    simd.reduce(simd.load(&lanes))
}

#[inline(always)]
fn dot_row_body<S: Simd>(simd: S, ty: TensorType, row: &[u8], x: &[f32]) -> f32 {
    let mut out = [0.0];
    matvec_body(simd, ty, row, x, &mut out);
    out[0]
}

#[inline(always)]
fn matvec_body<S: Simd>(simd: S, ty: TensorType, rows: &[u8], x: &[f32], out: &mut [f32]) {
    let row_bytes = row_bytes(ty, x.len());
    let expected = row_bytes * out.len();
    assert!(rows.len() == expected, "{} rows of {ty} take {expected} bytes, found {}", out.len(), rows.len());
    for_format!(ty, matvec_format(simd, rows, x, out))
}

#[inline(always)]
fn matvec_format<S: Simd, F: Format>(simd: S, rows: &[u8], x: &[f32], out: &mut [f32]) {
    let rows = bytemuck::cast_slice::<u8, F>(rows);
    let blocks_per_row = x.len() / F::ELEMENTS;
    let mut buffers = [[0.0; CHUNK]; INTERLEAVED];
    // A quarter of all rows apart, so that each of the four streams is read on and on.
    let apart = out.len().div_ceil(INTERLEAVED);
    for n in 0..apart {
        // At the end the last row stands in for rows that are not there.
        let start: [usize; INTERLEAVED] = std::array::from_fn(|i| (n + i * apart).min(out.len() - 1) * blocks_per_row);
        let mut acc = [simd.splat(0.0); INTERLEAVED];
        for (c, x) in x.chunks(CHUNK).enumerate() {
            let (first, count) = (c * (CHUNK / F::ELEMENTS), x.len() / F::ELEMENTS);
            for (start, buffer) in start.iter().zip(&mut buffers) {
                F::decode_all(simd, &rows[start + first..][..count], buffer);
                prefetch(rows, start + first + blocks_per_row, count);
            }
            acc = accumulate_rows(simd, acc, &buffers, x);
        }
        for (i, acc) in acc.into_iter().enumerate() {
            if let Some(out) = out.get_mut(n + i * apart) {
                *out = simd.reduce(acc);
            }
        }
    }
}

/// `accumulate` of several rows with the same `x`: their chains of additions, each waiting for its last, go on together.
#[inline(always)]
fn accumulate_rows<S: Simd>(
    simd: S,
    mut acc: [S::V; INTERLEAVED],
    w: &[[f32; CHUNK]; INTERLEAVED],
    x: &[f32],
) -> [S::V; INTERLEAVED] {
    let (chunks, tail) = x.as_chunks::<16>();
    for (i, x) in chunks.iter().enumerate() {
        let x = simd.load(x);
        for (acc, w) in acc.iter_mut().zip(w) {
            *acc = simd.fma(simd.load(&w.as_chunks().0[i]), x, *acc);
        }
    }
    for (acc, w) in acc.iter_mut().zip(w) {
        *acc = accumulate_tail(simd, *acc, &w[16 * chunks.len()..x.len()], tail);
    }
    acc
}

#[inline(always)]
fn matmul_f32_body<S: Simd>(simd: S, w: &[f32], cols: usize, x: &[f32], out: &mut [f32]) {
    if cols == 0 {
        return out.fill(0.0);
    }
    let (rows, batch) = (w.len() / cols, x.len() / cols);
    assert!(w.len() == rows * cols && x.len() == batch * cols, "{} and {} values in rows of {cols}", w.len(), x.len());
    assert!(out.len() == rows * batch, "{rows} × {batch} dots, found room for {}", out.len());
    // As many dots at a time as registers hold: each lane of a weight and of an activation is then loaded least often.
    if S::HELD >= 32 {
        // 24 registers of lanes, 5 of operands.
        tiles::<S, 4, 6>(simd, w, cols, x, out, 0..rows / 4 * 4);
        tiles::<S, 1, 6>(simd, w, cols, x, out, rows / 4 * 4..rows);
    } else {
        // On AVX2 12 registers of lanes, 3 of operands.
        tiles::<S, 2, 3>(simd, w, cols, x, out, 0..rows / 2 * 2);
        tiles::<S, 1, 3>(simd, w, cols, x, out, rows / 2 * 2..rows);
    }
}

/// Rows `range` of `w`, a multiple of N, with all of `x`, in tiles of N × R dots; what is left of `x` two rows at a time, and
/// then the last.
#[inline(always)]
fn tiles<S: Simd, const N: usize, const R: usize>(
    simd: S,
    w: &[f32],
    cols: usize,
    x: &[f32],
    out: &mut [f32],
    range: Range<usize>,
) {
    let batch = x.len() / cols;
    let mut r = 0;
    while r < batch {
        let left = batch - r;
        let together = [R, 2].into_iter().find(|&rows| rows <= left).unwrap_or(1);
        for n in range.clone().step_by(N) {
            let (w, x, out) = (&w[n * cols..], &x[r * cols..], &mut out[n * batch + r..]);
            match together {
                1 => tile::<S, N, 1>(simd, w, x, cols, out, batch),
                2 => tile::<S, N, 2>(simd, w, x, cols, out, batch),
                _ => tile::<S, N, R>(simd, w, x, cols, out, batch),
            }
        }
        r += together;
    }
}

/// `out[n * stride + r]` = canonical dot of row n of `w` and row r of `x`, for N × R rows of `cols` values.
#[inline(always)]
fn tile<S: Simd, const N: usize, const R: usize>(
    simd: S,
    w: &[f32],
    x: &[f32],
    cols: usize,
    out: &mut [f32],
    stride: usize,
) {
    let w: [(&[[f32; 16]], &[f32]); N] = std::array::from_fn(|n| w[n * cols..][..cols].as_chunks());
    let x: [(&[[f32; 16]], &[f32]); R] = std::array::from_fn(|r| x[r * cols..][..cols].as_chunks());
    let chunks = cols / 16;
    let mut acc = [[simd.splat(0.0); R]; N];
    for i in 0..chunks {
        let w: [S::V; N] = std::array::from_fn(|n| simd.load(&w[n].0[i]));
        for r in 0..R {
            let x = simd.load(&x[r].0[i]);
            for n in 0..N {
                acc[n][r] = simd.fma(w[n], x, acc[n][r]);
            }
        }
    }
    for n in 0..N {
        let lanes = std::array::from_fn(|r| accumulate_tail(simd, acc[n][r], w[n].1, x[r].1));
        out[n * stride..][..R].copy_from_slice(&simd.reduce_all::<R>(lanes));
    }
}

#[inline(always)]
fn add_weighted_body<S: Simd>(simd: S, weights: &[f32], stride: usize, rows: &[f32], width: usize, sums: &mut [f32]) {
    let (count, heads) = (rows.len() / width, sums.len() / width);
    assert!(rows.len() == count * width && sums.len() == heads * width, "rows of {width} values");
    assert!(
        stride >= count && (heads == 0 || weights.len() >= (heads - 1) * stride + count),
        "{heads} sums of {count} rows take other than {} weights, {stride} each",
        weights.len()
    );
    if rows.is_empty() {
        return;
    }
    let whole = if S::HELD >= 32 {
        sum_tiles::<S, 4, 4>(simd, weights, stride, rows, width, sums)
    } else {
        sum_tiles::<S, 2, 2>(simd, weights, stride, rows, width, sums)
    };
    for (h, sums) in sums.chunks_exact_mut(width).enumerate() {
        for (sum, element) in sums[whole..].iter_mut().zip(whole..) {
            let terms = weights[h * stride..].iter().zip(rows.iter().skip(element).step_by(width));
            *sum = terms.fold(*sum, |sum, (weight, row)| weight.mul_add(*row, sum));
        }
    }
}

/// All sums, in tiles of H sums and L sixteens of elements, which stay in registers while the rows go by; returns the
/// elements for which that is done.
#[inline(always)]
fn sum_tiles<S: Simd, const H: usize, const L: usize>(
    simd: S,
    weights: &[f32],
    stride: usize,
    rows: &[f32],
    width: usize,
    sums: &mut [f32],
) -> usize {
    let heads = sums.len() / width;
    let whole = width - width % (16 * L);
    for first in (0..whole).step_by(16 * L) {
        let (rows, mut h) = (&rows[first..], 0);
        while h < heads {
            let (weights, sums) = (&weights[h * stride..], &mut sums[h * width + first..]);
            if heads - h >= H {
                sum_tile::<S, H, L>(simd, weights, stride, rows, width, sums);
                h += H;
            } else {
                sum_tile::<S, 1, L>(simd, weights, stride, rows, width, sums);
                h += 1;
            }
        }
    }
    whole
}

/// `16 · L` elements of H sums. `rows` and `sums` begin with these elements.
#[inline(always)]
fn sum_tile<S: Simd, const H: usize, const L: usize>(
    simd: S,
    weights: &[f32],
    stride: usize,
    rows: &[f32],
    width: usize,
    sums: &mut [f32],
) {
    let load = |from: &[f32]| -> [S::V; L] {
        let from = from[..16 * L].as_chunks().0;
        std::array::from_fn(|l| simd.load(&from[l]))
    };
    let mut acc: [[S::V; L]; H] = std::array::from_fn(|h| load(&sums[h * width..]));
    for (i, row) in rows.chunks(width).enumerate() {
        let row = load(row);
        for h in 0..H {
            let weight = simd.splat(weights[h * stride + i]);
            for l in 0..L {
                acc[h][l] = simd.fma(weight, row[l], acc[h][l]);
            }
        }
    }
    for h in 0..H {
        let sums = sums[h * width..][..16 * L].as_chunks_mut().0;
        (0..L).for_each(|l| simd.store(acc[h][l], &mut sums[l]));
    }
}
