//! The integer dots for AVX2.
//!
//! Four weight rows at a time, against every row of activations: a weight block is unpacked once, and the four sums
//! of whole numbers of an activation block share its loads and end in the four lanes of one register.
//!
//! Products are made by `maddubs`, unsigned times signed bytes into i16: the sign of a weight goes over to the
//! activation. Its pairwise sums stay within i16, for magnitudes of weights are at most 128 and of activations 127.

use super::blocks::{LongBlock, ShortBlock};
use super::{IntegerSimd, Rows, tiles};
use crate::blocks::*;
use crate::iq2_grid::GRID;
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
    tiles::<_, _, _, ROWS, BATCH>(Rows::Apart, weights, x, batch, out, _mm_setzero_ps(), lanes, |w, x, sums| {
        let codes = w.map(|w| w.register(simd));
        let magnitudes = codes.map(|codes| _mm256_abs_epi8(codes));
        let scales = W::scales_4(simd, w);
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
    tiles::<_, _, _, ROWS, BATCH>(W::ROWS, weights, x, batch, out, _mm_setzero_ps(), lanes, |w, x, sums| {
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

/// The lanes as an array.
#[inline(always)]
pub(super) fn lanes(v: __m128) -> [f32; ROWS] {
    let mut lanes = [0.0; ROWS];
    // SAFETY: every x86-64 has SSE; the unaligned store is all of `lanes`.
    unsafe { _mm_storeu_ps(lanes.as_mut_ptr(), v) };
    lanes
}

/// Four numbers as lanes.
#[inline(always)]
pub(super) fn floats(v: [f32; ROWS]) -> __m128 {
    // SAFETY: every x86-64 has SSE.
    unsafe { _mm_set_ps(v[3], v[2], v[1], v[0]) }
}

/// Four halves as lanes.
#[inline(always)]
pub(super) fn scales(_: Avx2, v: [Half; ROWS]) -> __m128 {
    // SAFETY: the first argument exists only where `detect` found F16C.
    unsafe { halves(v) }
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(super) fn halves(v: [Half; ROWS]) -> __m128 {
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
pub(super) fn widen(bytes: &[i8; 16]) -> __m256i {
    // SAFETY: the unaligned load is all of `bytes`.
    _mm256_cvtepi8_epi16(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
}

/// All of `bytes`.
#[inline(always)]
pub(super) fn load(_: Avx2, bytes: &[i8; 32]) -> __m256i {
    // SAFETY: the first argument exists only where `detect` found AVX2; the unaligned load is all of `bytes`.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// The codes of an IQ2_XXS block.
#[inline(always)]
pub(crate) fn iq2_codes(simd: Avx2, groups: &[[u8; 8]; 8]) -> [i8; QK_K] {
    let mut codes = [0; QK_K];
    for (codes, register) in codes.as_chunks_mut::<32>().0.iter_mut().zip(iq2_registers(simd, groups)) {
        // SAFETY: `simd` exists only where `detect` found AVX2; the unaligned store is all of `codes`.
        unsafe { _mm256_storeu_si256(codes.as_mut_ptr().cast(), register) };
    }
    codes
}

/// The codes of an IQ2_XXS block: points of the code book under patterns of signs.
#[inline(always)]
pub(super) fn iq2_registers(_: Avx2, groups: &[[u8; 8]; 8]) -> [__m256i; 8] {
    // SAFETY: the first argument exists only where `detect` found AVX2.
    unsafe { iq2(groups) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn iq2(groups: &[[u8; 8]; 8]) -> [__m256i; 8] {
    let signs: [[u8; 4]; 8] = bytemuck::cast(iq2_signs(groups));
    let bits = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64.cast_signed());
    // In each 128 bits, two bytes of signs eight times.
    let place = _mm256_set_epi64x(0x0303_0303_0303_0303, 0x0202_0202_0202_0202, 0x0101_0101_0101_0101, 0);
    let mut registers = [_mm256_setzero_si256(); 8];
    for (g, register) in registers.iter_mut().enumerate() {
        let [points @ .., _, _, _, _] = groups[g];
        let signs = _mm256_shuffle_epi8(_mm256_set1_epi32(i32::from_le_bytes(signs[SIGN_ORDER[g]])), place);
        let minus = _mm256_cmpeq_epi8(_mm256_and_si256(signs, bits), bits);
        *register = _mm256_sub_epi8(_mm256_xor_si256(look_up(points), minus), minus);
    }
    registers
}

/// Where [`iq2_signs`] has the signs of each group.
const SIGN_ORDER: [usize; 8] = [0, 1, 4, 5, 2, 3, 6, 7];

/// The 32 sign bits of each group: patterns of 7 bits, each followed by their parity.
#[target_feature(enable = "avx2")]
#[inline]
fn iq2_signs(groups: &[[u8; 8]; 8]) -> __m256i {
    // SAFETY: the two unaligned loads are all of `groups`.
    let (low, high) = unsafe {
        let groups = groups.as_ptr().cast::<__m256i>();
        (_mm256_loadu_si256(groups), _mm256_loadu_si256(groups.add(1)))
    };
    let words = _mm256_shuffle_ps::<0b11_01_11_01>(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high));
    let words = _mm256_castps_si256(words);
    let pattern = |shifted, mask| _mm256_and_si256(shifted, _mm256_set1_epi32(mask));
    let patterns = _mm256_or_si256(
        _mm256_or_si256(pattern(words, 0x7f), pattern(_mm256_slli_epi32::<1>(words), 0x7f << 8)),
        _mm256_or_si256(
            pattern(_mm256_slli_epi32::<2>(words), 0x7f << 16),
            pattern(_mm256_slli_epi32::<3>(words), 0x7f << 24),
        ),
    );
    let nibbles = _mm256_xor_si256(patterns, _mm256_srli_epi16::<4>(patterns));
    let nibbles = _mm256_and_si256(nibbles, _mm256_set1_epi8(15));
    // Bit 7 set for each nibble of odd parity.
    let parity =
        _mm256_broadcastsi128_si256(_mm_set_epi64x(0x0080_8000_8000_0080, 0x8000_0080_0080_8000_u64.cast_signed()));
    _mm256_or_si256(patterns, _mm256_shuffle_epi8(parity, nibbles))
}

/// Four points of the code book, one after the other. Broadcasts and blends, for inserts would all wait for one port.
#[target_feature(enable = "avx2")]
#[inline]
fn look_up(points: [u8; 4]) -> __m256i {
    let point = |l: usize| _mm256_set1_epi64x(i64::from_le_bytes(bytemuck::cast(GRID[usize::from(points[l])])));
    let low = _mm256_blend_epi32::<0b1100>(point(0), point(1));
    let high = _mm256_blend_epi32::<0b1100_0000>(point(2), point(3));
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
