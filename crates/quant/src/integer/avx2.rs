//! The integer dots for AVX2.
//!
//! Four weight rows at a time, against every row of activations: a weight block is unpacked once, and the four sums
//! of whole numbers of an activation block share its loads and end in the four lanes of one register.
//!
//! Products are made by `maddubs`, unsigned times signed bytes into i16: the sign of a weight goes over to the
//! activation. Its pairwise sums stay within i16, for magnitudes of weights are at most 128 and of activations 127.

use super::IntegerSimd;
use super::blocks::{LongBlock, ShortBlock, iq2_indices};
use crate::blocks::*;
use crate::iq2_grid::{GRID, SIGNS};
use crate::simd::Avx2;
use std::arch::x86_64::*;
use std::array::from_fn;

/// Weight rows that are computed together.
const ROWS: usize = 4;
/// Activation rows for which a weight block stays unpacked.
const BATCH: usize = 32;

impl IntegerSimd for Avx2 {
    #[inline(always)]
    fn short<W: ShortBlock>(self, weights: &[W], x: &[ActivationQ8_0], batch: usize, out: &mut [f32]) {
        // SAFETY: `self` exists only where `detect` found these features.
        unsafe { short(self, weights, x, batch, out) }
    }

    #[inline(always)]
    fn long<W: LongBlock>(self, weights: &[W], x: &[ActivationQ8K], batch: usize, out: &mut [f32]) {
        // SAFETY: `self` exists only where `detect` found these features.
        unsafe { long(self, weights, x, batch, out) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn short<W: ShortBlock>(simd: Avx2, weights: &[W], x: &[ActivationQ8_0], batch: usize, out: &mut [f32]) {
    tiles(weights, x, batch, out, |w: [&W; ROWS], x, sums| {
        let codes = w.map(|w| w.register(simd));
        let magnitudes = codes.map(|codes| _mm256_abs_epi8(codes));
        let scales = floats(w.map(|w| w.scale()));
        for (x, sum) in x.iter().zip(sums) {
            let values = load(simd, &x.q);
            let dots = from_fn(|i| {
                let pairs = _mm256_maddubs_epi16(magnitudes[i], _mm256_sign_epi8(values, codes[i]));
                _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
            });
            *sum = _mm_fmadd_ps(_mm_mul_ps(scales, _mm_set1_ps(x.d)), across(dots), *sum);
        }
    });
}

#[target_feature(enable = "avx2,fma,f16c")]
fn long<W: LongBlock>(simd: Avx2, weights: &[W], x: &[ActivationQ8K], batch: usize, out: &mut [f32]) {
    tiles(weights, x, batch, out, |w: [&W; ROWS], x, sums| {
        let d = _mm_mul_ps(halves(w.map(|w| w.d())), _mm_set1_ps(W::FACTOR));
        let dmin = halves(w.map(|w| w.dmin()));
        let add = |dots, minimums: [__m256i; ROWS], x: &ActivationQ8K, sum: &mut __m128| {
            let d_x = _mm_set1_ps(x.d);
            *sum = _mm_fmadd_ps(_mm_mul_ps(d, d_x), across(dots), *sum);
            if W::MINIMUMS {
                let x = load_i16(&x.sums);
                let minimums = minimums.map(|minimums| _mm256_madd_epi16(minimums, x));
                *sum = _mm_fnmadd_ps(_mm_mul_ps(dmin, d_x), across(minimums), *sum);
            }
        };
        if let ([x], [sum]) = (x, &mut *sums) {
            // Used once, a block need not be written down.
            let dots = w.map(|w| {
                let (codes, scales) = (w.registers(simd), spread(widen(&w.scales())));
                let group = |g: usize| dot_group::<W>(simd, magnitudes::<W>(codes[g]), codes[g], scales[g], x, g);
                (1..8).fold(group(0), |dot, g| _mm256_add_epi32(dot, group(g)))
            });
            return add(dots, w.map(|w| widen(&w.minimums())), x, sum);
        }
        let w = w.map(|w| Unpacked::new(simd, w));
        for (x, sum) in x.iter().zip(sums) {
            let mut dots = [_mm256_setzero_si256(); ROWS];
            for g in 0..8 {
                for (dot, w) in dots.iter_mut().zip(&w) {
                    let group = dot_group::<W>(simd, w.magnitudes[g], w.codes[g], w.scales[g], x, g);
                    *dot = _mm256_add_epi32(*dot, group);
                }
            }
            add(dots, w.each_ref().map(|w| w.minimums), x, sum);
        }
    });
}

/// Σ scale·code·x of 32 values, in eight parts.
#[target_feature(enable = "avx2")]
#[inline]
fn dot_group<W: LongBlock>(
    simd: Avx2,
    magnitudes: __m256i,
    codes: __m256i,
    scales: __m256i,
    x: &ActivationQ8K,
    g: usize,
) -> __m256i {
    let x = load(simd, &x.q.as_chunks().0[g]);
    let x = if W::SIGNED { _mm256_sign_epi8(x, codes) } else { x };
    _mm256_madd_epi16(_mm256_maddubs_epi16(magnitudes, x), scales)
}

#[target_feature(enable = "avx2")]
#[inline]
fn magnitudes<W: LongBlock>(codes: __m256i) -> __m256i {
    if W::SIGNED { _mm256_abs_epi8(codes) } else { codes }
}

/// Calls `add(blocks, activations, sums)` for every block of every four weight rows and up to `BATCH` rows of
/// activations; lane i of a sum belongs to weight row i. Then writes the sums to `out`, `[n, R]`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn tiles<W, X>(weights: &[W], x: &[X], batch: usize, out: &mut [f32], add: impl Fn([&W; ROWS], &[X], &mut [__m128])) {
    let per_row = x.len() / batch;
    let rows = weights.len() / per_row;
    for n in (0..rows).step_by(ROWS) {
        // At the end the last row stands in for rows that are not there.
        let w: [&[W]; ROWS] = from_fn(|i| &weights[(n + i).min(rows - 1) * per_row..][..per_row]);
        for r in (0..batch).step_by(BATCH) {
            let mut sums = [_mm_setzero_ps(); BATCH];
            let sums = &mut sums[..BATCH.min(batch - r)];
            for b in 0..per_row {
                add(w.map(|row| &row[b]), &x[b * batch + r..][..sums.len()], sums);
            }
            for (r, sum) in (r..).zip(sums) {
                let mut lanes = [0.0; ROWS];
                // SAFETY: the unaligned store is all of `lanes`.
                unsafe { _mm_storeu_ps(lanes.as_mut_ptr(), *sum) };
                let out = out[n * batch + r..].iter_mut().step_by(batch);
                lanes.iter().zip(out).for_each(|(lane, out)| *out = *lane);
            }
        }
    }
}

/// A block of 256 as `maddubs` and `madd` take it, 32 values a register.
struct Unpacked {
    magnitudes: [__m256i; 8],
    codes: [__m256i; 8],
    /// The scale of each pair of values, as i16.
    scales: [__m256i; 8],
    /// One i16 for each 16 values.
    minimums: __m256i,
}

impl Unpacked {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn new<W: LongBlock>(simd: Avx2, w: &W) -> Unpacked {
        let codes = w.registers(simd);
        Unpacked {
            magnitudes: codes.map(|codes| magnitudes::<W>(codes)),
            codes,
            scales: spread(widen(&w.scales())),
            minimums: widen(&w.minimums()),
        }
    }
}

/// From i16 j for each 16 values, those of each 32: number 2g eight times, then number 2g + 1.
#[target_feature(enable = "avx2")]
#[inline]
fn spread(numbers: __m256i) -> [__m256i; 8] {
    let halves =
        [_mm256_permute2x128_si256::<0x00>(numbers, numbers), _mm256_permute2x128_si256::<0x11>(numbers, numbers)];
    from_fn(|g| {
        let bytes = |j: usize| (2 * j + ((2 * j + 1) << 8)) as i16;
        let pattern = _mm256_set_m128i(_mm_set1_epi16(bytes(2 * (g % 4) + 1)), _mm_set1_epi16(bytes(2 * (g % 4))));
        _mm256_shuffle_epi8(halves[g / 4], pattern)
    })
}

/// The sums of the eight lanes of each register, as f32.
#[target_feature(enable = "avx2")]
#[inline]
fn across(v: [__m256i; ROWS]) -> __m128 {
    let sums = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    _mm_cvtepi32_ps(_mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums)))
}

#[target_feature(enable = "avx2")]
#[inline]
fn floats(v: [f32; ROWS]) -> __m128 {
    _mm_set_ps(v[3], v[2], v[1], v[0])
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn halves(v: [Half; ROWS]) -> __m128 {
    let bits = v.map(|half| i16::from_le_bytes(half.0));
    _mm_cvtph_ps(_mm_set_epi16(0, 0, 0, 0, bits[3], bits[2], bits[1], bits[0]))
}

#[target_feature(enable = "avx2")]
#[inline]
fn load_i16(numbers: &[i16; 16]) -> __m256i {
    // SAFETY: the unaligned load is all of `numbers`.
    unsafe { _mm256_loadu_si256(numbers.as_ptr().cast()) }
}

/// Sixteen bytes as i16.
#[target_feature(enable = "avx2")]
#[inline]
fn widen(bytes: &[i8; 16]) -> __m256i {
    // SAFETY: the unaligned load is all of `bytes`.
    _mm256_cvtepi8_epi16(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
}

/// All of `bytes`.
#[inline(always)]
pub(super) fn load(_: Avx2, bytes: &[i8; 32]) -> __m256i {
    // SAFETY: the first argument exists only where `detect` found AVX2; the unaligned load is all of `bytes`.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// The codes of an IQ2_XXS block: points of the code book under patterns of signs.
#[inline(always)]
pub(super) fn iq2_registers(_: Avx2, groups: &[[u8; 8]; 8]) -> [__m256i; 8] {
    // SAFETY: the first argument exists only where `detect` found AVX2.
    unsafe { iq2_codes(groups) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn iq2_codes(groups: &[[u8; 8]; 8]) -> [__m256i; 8] {
    from_fn(|g| {
        let (points, patterns) = iq2_indices(&groups[g]);
        _mm256_sign_epi8(look_up(&GRID, points), look_up(&SIGNS, patterns))
    })
}

/// Four entries of a table, one after the other. Broadcasts and blends, for inserts would all wait for one port.
#[target_feature(enable = "avx2")]
#[inline]
fn look_up<const N: usize>(table: &[[i8; 8]; N], indices: [usize; 4]) -> __m256i {
    let entry = |l: usize| _mm256_set1_epi64x(i64::from_le_bytes(bytemuck::cast(table[indices[l]])));
    let low = _mm256_blend_epi32::<0b1100>(entry(0), entry(1));
    let high = _mm256_blend_epi32::<0b1100_0000>(entry(2), entry(3));
    _mm256_blend_epi32::<0b1111_0000>(low, high)
}

/// The entries of a table for the low nibbles of 16 bytes, then for the high ones.
#[inline(always)]
pub(super) fn look_up_nibbles(_: Avx2, table: &[i8; 16], bytes: &[u8; 16]) -> __m256i {
    // SAFETY: the first argument exists only where `detect` found AVX2; the unaligned loads are all of `table` and
    // of `bytes`.
    unsafe {
        let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
        let low = _mm_loadu_si128(bytes.as_ptr().cast());
        let nibbles = _mm256_set_m128i(_mm_srli_epi16::<4>(low), low);
        _mm256_shuffle_epi8(table, _mm256_and_si256(nibbles, _mm256_set1_epi8(15)))
    }
}
