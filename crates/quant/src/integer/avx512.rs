//! The integer dots for AVX-512 with VNNI: `dpbusd` multiplies unsigned by signed bytes and adds four products to each
//! lane of i32. Signed codes of weights get an offset that makes them unsigned, and what that adds to a dot, the offset
//! times the sum of the activations, is taken away again.
//!
//! Few rows of activations meet four weight rows at a time, whose blocks stay in registers. Many meet
//! sixteen, transposed so that each lane belongs to a weight row: nothing is ever summed across lanes.

use super::blocks::{LongBlock, ShortBlock};
use super::{IntegerSimd, Rows, avx2, tiles};
use crate::blocks::*;
use crate::iq2_grid::{self, PACKED};
use crate::simd::Avx512;
use std::arch::x86_64::*;
use std::array::from_fn;

/// Weight rows that meet few rows of activations.
const ROWS: usize = 4;
/// Weight rows that meet many.
const LANES: usize = 16;
/// From here on rows of activations are many.
const MANY: usize = 8;
/// Rows of activations for which weight blocks stay transposed.
const BATCH: usize = 128;
/// Rows of activations that share a load of transposed codes.
const SHARING: usize = 4;

impl IntegerSimd for Avx512 {
    #[inline(always)]
    fn short<W: ShortBlock>(self, weights: &[W], x: &[ActivationQ8_0], batch: usize, out: &mut [f32]) {
        // SAFETY: `self` exists only where `detect` found these features.
        unsafe {
            if batch < MANY { short(self, weights, x, batch, out) } else { short_many(self, weights, x, batch, out) }
        }
    }

    #[inline(always)]
    fn long<W: LongBlock>(self, weights: &[W], x: &[ActivationQ8K], batch: usize, out: &mut [f32]) {
        if batch < MANY {
            return W::few_512(self, weights, x, batch, out);
        }
        // SAFETY: `self` exists only where `detect` found these features.
        unsafe { long_many(self, weights, x, batch, out) }
    }
}

#[target_feature(enable = "avx512vl,avx512vnni,avx512vbmi,avx512bitalg,gfni")]
fn short<W: ShortBlock>(simd: Avx512, weights: &[W], x: &[ActivationQ8_0], batch: usize, out: &mut [f32]) {
    tiles::<_, _, _, ROWS, MANY>(Rows::Apart, weights, x, batch, out, _mm_setzero_ps(), avx2::lanes, |w, x, sums| {
        let codes = w.map(|w| w.unsigned_512(simd));
        let scales = W::scales_4(simd.avx2(), w);
        for (x, sum) in x.iter().zip(sums) {
            let values = avx2::load(simd.avx2(), &x.q);
            let offset = _mm256_zextsi128_si256(_mm_cvtsi32_si128(-i32::from(W::OFFSET) * x.sum));
            let dots = codes.map(|codes| _mm256_dpbusd_epi32(offset, codes, values));
            *sum = _mm_fmadd_ps(_mm_mul_ps(scales, _mm_set1_ps(x.d)), _mm_cvtepi32_ps(across_256(dots)), *sum);
        }
    });
}

#[target_feature(enable = "avx512vl,avx512vnni,avx512vbmi,avx512bitalg,gfni")]
fn short_many<W: ShortBlock>(simd: Avx512, weights: &[W], x: &[ActivationQ8_0], batch: usize, out: &mut [f32]) {
    tiles::<_, _, _, LANES, BATCH>(
        Rows::Neighbours,
        weights,
        x,
        batch,
        out,
        _mm512_setzero_ps(),
        |v| lanes_16(v),
        |w, x, sums| {
            let mut codes = [_mm512_setzero_si512(); LANES];
            for (codes, w) in codes.iter_mut().zip(w) {
                *codes = _mm512_zextsi256_si512(w.unsigned_512(simd));
            }
            let codes = transpose(codes);
            let scales = W::scales_16(simd, w);
            for (x, sum) in x.iter().zip(sums) {
                let mut dots = _mm512_set1_epi32(-i32::from(W::OFFSET) * x.sum);
                for (codes, x) in codes.iter().zip(x.q.as_chunks().0) {
                    dots = _mm512_dpbusd_epi32(dots, *codes, four(*x));
                }
                *sum = _mm512_fmadd_ps(_mm512_mul_ps(scales, _mm512_set1_ps(x.d)), _mm512_cvtepi32_ps(dots), *sum);
            }
        },
    );
}

/// [`IntegerSimd::long`] for few rows of activations.
#[inline(always)]
pub(super) fn few<W: LongBlock>(simd: Avx512, weights: &[W], x: &[ActivationQ8K], batch: usize, out: &mut [f32]) {
    // SAFETY: `simd` exists only where `detect` found these features.
    unsafe { long(simd, weights, x, batch, out) }
}

#[target_feature(enable = "avx512vl,avx512vnni,avx512vbmi,avx512bitalg,gfni")]
fn long<W: LongBlock>(simd: Avx512, weights: &[W], x: &[ActivationQ8K], batch: usize, out: &mut [f32]) {
    tiles::<_, _, _, ROWS, MANY>(W::ROWS, weights, x, batch, out, _mm_setzero_ps(), avx2::lanes, |w, x, sums| {
        let (d, dmin) = (avx2::halves(w.map(|w| w.d())), avx2::halves(w.map(|w| w.dmin())));
        for (x, sum) in x.iter().zip(sums) {
            let values = W::ORDER.map(|[low, high]| pair(load_32(&x.q, low), load_32(&x.q, high)));
            let dots = across(w.map(|w| dot(simd, w, x, &values)));
            let d_x = _mm_set1_ps(x.d);
            *sum = _mm_fmadd_ps(_mm_mul_ps(d, d_x), _mm_cvtepi32_ps(dots), *sum);
            if W::MINIMUMS {
                let sums = load_sums(x);
                let minimums = across_256(w.map(|w| _mm256_madd_epi16(avx2::widen(&w.minimums()), sums)));
                *sum = _mm_fnmadd_ps(_mm_mul_ps(dmin, d_x), _mm_cvtepi32_ps(minimums), *sum);
            }
        }
    });
}

/// Σ_j scale_j·Σ code·x of a block in sixteen parts, `values` being `x` in the order of the block's registers.
#[target_feature(enable = "avx512vl,avx512vnni,avx512vbmi,avx512bitalg,gfni")]
#[inline]
fn dot<W: LongBlock>(simd: Avx512, w: &W, x: &ActivationQ8K, values: &[__m512i; 4]) -> __m512i {
    let scales = avx2::widen(&w.scales());
    let offset = _mm256_mullo_epi32(_mm256_madd_epi16(scales, load_sums(x)), _mm256_set1_epi32(-W::OFFSET));
    let scales = _mm512_zextsi256_si512(scales);
    let codes = w.unsigned_512(simd);
    let mut sum = if W::OFFSET == 0 { _mm512_setzero_si512() } else { _mm512_zextsi256_si512(offset) };
    for i in 0..4 {
        // Four products together fit in i16: the lower half of a lane is the sum, and the upper half is multiplied by 0.
        let dots = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes[i], values[i]);
        let scales = _mm512_permutexvar_epi16(load_words(&Spread::<W>::INDICES[i]), scales);
        sum = _mm512_dpwssd_epi32(sum, dots, scales);
    }
    sum
}

/// For each register of codes: of which of 32 words each of its words is the scale. Words from 16 on are 0.
struct Spread<W>(W);

impl<W: LongBlock> Spread<W> {
    const INDICES: [[i16; 32]; 4] = {
        let mut indices = [[16; 32]; 4];
        let mut i = 0;
        while i < 4 * 16 {
            let (register, lane) = (i / 16, i % 16);
            indices[register][2 * lane] = (W::ORDER[register][lane / 8] / 16 + lane % 8 / 4) as i16;
            i += 1;
        }
        indices
    };
}

#[target_feature(enable = "avx512vl,avx512vnni,avx512vbmi,avx512bitalg,gfni")]
fn long_many<W: LongBlock>(simd: Avx512, weights: &[W], x: &[ActivationQ8K], batch: usize, out: &mut [f32]) {
    tiles::<_, _, _, LANES, BATCH>(
        Rows::Neighbours,
        weights,
        x,
        batch,
        out,
        _mm512_setzero_ps(),
        |v| lanes_16(v),
        |w, x, sums| {
            let w = Transposed::new(simd, w);
            let (shared, rest) = x.as_chunks::<SHARING>();
            let (shared_sums, rest_sums) = sums.as_chunks_mut::<SHARING>();
            shared.iter().zip(shared_sums).for_each(|(x, sums)| w.add::<W, SHARING>(x, sums));
            for (x, sum) in rest.iter().zip(rest_sums) {
                w.add::<W, 1>(std::array::from_ref(x), std::array::from_mut(sum));
            }
        },
    );
}

/// A block of each of sixteen rows, lane i for row i.
struct Transposed {
    /// Four unsigned codes a lane, in the order of the block's registers.
    codes: [[__m512i; 16]; 4],
    scales: [__m512i; 16],
    /// What the sums of 16 activations are multiplied by, two i16 a lane: minimums, or scales where codes have an offset.
    minimums: [__m512i; 16],
    d: __m512,
    dmin: __m512,
}

impl Transposed {
    #[target_feature(enable = "avx512vl,avx512vnni,avx512vbmi,avx512bitalg,gfni")]
    #[inline]
    fn new<W: LongBlock>(simd: Avx512, w: [&W; LANES]) -> Transposed {
        let zero = _mm512_setzero_si512();
        let (mut codes, mut scales, mut minimums) = ([[zero; LANES]; 4], [zero; LANES], [zero; LANES]);
        for (i, w) in w.iter().enumerate() {
            for (codes, unpacked) in codes.iter_mut().zip(w.unsigned_512(simd)) {
                codes[i] = unpacked;
            }
            scales[i] = _mm512_cvtepi8_epi32(load_128(&w.scales()));
            minimums[i] = _mm512_zextsi256_si512(avx2::widen(&if W::MINIMUMS { w.minimums() } else { w.scales() }));
        }
        for codes in &mut codes {
            *codes = transpose(*codes);
        }
        Transposed {
            codes,
            scales: transpose(scales),
            minimums: transpose(minimums),
            d: halves(w.map(|w| w.d())),
            dmin: halves(w.map(|w| w.dmin())),
        }
    }

    /// Adds the dots with R rows of activations.
    #[target_feature(enable = "avx512vl,avx512vnni,avx512vbmi,avx512bitalg,gfni")]
    #[inline]
    fn add<W: LongBlock, const R: usize>(&self, x: &[ActivationQ8K; R], sums: &mut [__m512; R]) {
        let zero = _mm512_setzero_si512();
        let mut dots = [zero; R];
        // Sub-blocks whose scales are equal in pairs are as good as one.
        let lanes = W::SUB_BLOCK / 4;
        for (codes, [low, high]) in self.codes.iter().zip(W::ORDER) {
            for (i, codes) in codes.chunks_exact(lanes).enumerate() {
                let first = if i * lanes < 8 { low + 4 * i * lanes } else { high + 4 * (i * lanes - 8) };
                let mut parts = [zero; R];
                for (k, codes) in codes.iter().enumerate() {
                    for r in 0..R {
                        parts[r] = _mm512_dpbusd_epi32(parts[r], *codes, four(x[r].q.as_chunks().0[first / 4 + k]));
                    }
                }
                for r in 0..R {
                    dots[r] = _mm512_add_epi32(dots[r], _mm512_mullo_epi32(parts[r], self.scales[first / 16]));
                }
            }
        }
        for r in 0..R {
            let d_x = _mm512_set1_ps(x[r].d);
            let mut minimums = zero;
            if W::MINIMUMS || W::OFFSET != 0 {
                for (weights, sums) in self.minimums.iter().zip(x[r].sums.as_chunks::<2>().0) {
                    minimums = _mm512_dpwssd_epi32(minimums, *weights, four(bytemuck::cast(*sums)));
                }
            }
            if !W::MINIMUMS {
                let offset = _mm512_mullo_epi32(minimums, _mm512_set1_epi32(W::OFFSET));
                dots[r] = _mm512_sub_epi32(dots[r], offset);
            }
            let d = _mm512_mul_ps(_mm512_mul_ps(self.d, _mm512_set1_ps(W::FACTOR)), d_x);
            sums[r] = _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(dots[r]), sums[r]);
            if W::MINIMUMS {
                let dmin = _mm512_mul_ps(self.dmin, d_x);
                sums[r] = _mm512_fnmadd_ps(dmin, _mm512_cvtepi32_ps(minimums), sums[r]);
            }
        }
    }
}

/// The rows of a matrix of 16 × 16 numbers to its columns.
#[target_feature(enable = "avx512f")]
#[inline]
fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    let pairs: [__m512i; 16] = from_fn(|i| match i % 2 {
        0 => _mm512_unpacklo_epi32(rows[i], rows[i + 1]),
        _ => _mm512_unpackhi_epi32(rows[i - 1], rows[i]),
    });
    // Number 4i + c: in each 128 bits j, column 4j + c of rows 4i to 4i + 3.
    let fours: [__m512i; 16] = from_fn(|i| match (i / 4 * 4, i % 4) {
        (i, 0) => _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]),
        (i, 1) => _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]),
        (i, 2) => _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]),
        (i, _) => _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]),
    });
    let even = |i: usize, j: usize| _mm512_shuffle_i32x4::<0x88>(fours[i], fours[j]);
    let odd = |i: usize, j: usize| _mm512_shuffle_i32x4::<0xdd>(fours[i], fours[j]);
    from_fn(|i| match (i / 4, i % 4) {
        (0, c) => _mm512_shuffle_i32x4::<0x88>(even(c, c + 4), even(c + 8, c + 12)),
        (1, c) => _mm512_shuffle_i32x4::<0x88>(odd(c, c + 4), odd(c + 8, c + 12)),
        (2, c) => _mm512_shuffle_i32x4::<0xdd>(even(c, c + 4), even(c + 8, c + 12)),
        (_, c) => _mm512_shuffle_i32x4::<0xdd>(odd(c, c + 4), odd(c + 8, c + 12)),
    })
}

/// The sums of the lanes of each register.
#[target_feature(enable = "avx512f,avx512vl")]
#[inline]
fn across(v: [__m512i; ROWS]) -> __m128i {
    let two = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let (a, b) = (two(v[0], v[1]), two(v[2], v[3]));
    let four = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    fold(_mm256_add_epi32(_mm512_castsi512_si256(four), _mm512_extracti64x4_epi64::<1>(four)))
}

/// The sums of the lanes of each register.
#[target_feature(enable = "avx2")]
#[inline]
fn across_256(v: [__m256i; ROWS]) -> __m128i {
    let two = |a, b| _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    let (a, b) = (two(v[0], v[1]), two(v[2], v[3]));
    fold(_mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)))
}

/// The sum of the two halves.
#[target_feature(enable = "avx2")]
#[inline]
fn fold(v: __m256i) -> __m128i {
    _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v))
}

/// Four bytes in every lane.
#[target_feature(enable = "avx512f")]
#[inline]
fn four(bytes: [i8; 4]) -> __m512i {
    _mm512_set1_epi32(i32::from_le_bytes(bytemuck::cast(bytes)))
}

#[target_feature(enable = "avx512f")]
#[inline]
fn pair(low: __m256i, high: __m256i) -> __m512i {
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
}

/// Sixteen numbers as lanes.
#[inline(always)]
pub(super) fn floats(_: Avx512, v: [f32; LANES]) -> __m512 {
    // SAFETY: the first argument exists only where `detect` found AVX-512; the unaligned load is all of `v`.
    unsafe { _mm512_loadu_ps(v.as_ptr()) }
}

/// Sixteen halves as lanes.
#[inline(always)]
pub(super) fn scales(_: Avx512, v: [Half; LANES]) -> __m512 {
    // SAFETY: the first argument exists only where `detect` found AVX-512.
    unsafe { halves(v) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn halves(v: [Half; LANES]) -> __m512 {
    // SAFETY: the unaligned load is all of `v`.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(v.as_ptr().cast()) })
}

#[target_feature(enable = "avx2")]
#[inline]
fn load_sums(x: &ActivationQ8K) -> __m256i {
    // SAFETY: the unaligned load is all of `x.sums`.
    unsafe { _mm256_loadu_si256(x.sums.as_ptr().cast()) }
}

/// 32 bytes of a block from `first` on.
#[target_feature(enable = "avx2")]
#[inline]
fn load_32(bytes: &[i8; QK_K], first: usize) -> __m256i {
    let bytes: &[i8; 32] = bytes[first..][..32].try_into().expect("32 bytes");
    // SAFETY: the unaligned load is all of `bytes`.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn load_128(bytes: &[i8; 16]) -> __m128i {
    // SAFETY: the unaligned load is all of `bytes`.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load_words(words: &[i16; 32]) -> __m512i {
    // SAFETY: the unaligned load is all of `words`.
    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
}

/// 64 bytes, of whichever type.
#[target_feature(enable = "avx512f")]
#[inline]
fn load_64<T: bytemuck::Pod>(bytes: &[T; 64]) -> __m512i {
    const { assert!(size_of::<T>() == 1) };
    // SAFETY: the unaligned load is all of `bytes`.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn lanes_16(v: __m512) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    // SAFETY: the unaligned store is all of `lanes`.
    unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), v) };
    lanes
}

/// The 2-bit codes of 64 bytes: element 128h + 32g + l from bits 2g of byte 32h + l.
#[inline(always)]
pub(super) fn planes(_: Avx512, packed: &[u8; 64]) -> [__m512i; 4] {
    // SAFETY: the first argument exists only where `detect` found AVX-512.
    unsafe {
        let bits = _mm512_set1_epi8(3);
        let packed = load_64(packed);
        [
            _mm512_and_si512(packed, bits),
            _mm512_and_si512(_mm512_srli_epi16::<2>(packed), bits),
            _mm512_and_si512(_mm512_srli_epi16::<4>(packed), bits),
            _mm512_and_si512(_mm512_srli_epi16::<6>(packed), bits),
        ]
    }
}

/// The order of [`planes`].
pub(super) const PLANES: [[usize; 2]; 4] = [[0, 128], [32, 160], [64, 192], [96, 224]];

/// The 4-bit codes of 128 bytes: element 64p + l from the low, 64p + 32 + l from the high nibble of byte 32p + l.
#[inline(always)]
pub(super) fn nibbles(_: Avx512, packed: &[u8; 128]) -> [__m512i; 4] {
    let [first, second] = bytemuck::cast_ref::<_, [[u8; 64]; 2]>(packed);
    // SAFETY: the first argument exists only where `detect` found AVX-512.
    unsafe {
        let bits = _mm512_set1_epi8(15);
        let (first, second) = (load_64(first), load_64(second));
        [
            _mm512_and_si512(first, bits),
            _mm512_and_si512(_mm512_srli_epi16::<4>(first), bits),
            _mm512_and_si512(second, bits),
            _mm512_and_si512(_mm512_srli_epi16::<4>(second), bits),
        ]
    }
}

/// The order of [`nibbles`].
pub(super) const NIBBLES: [[usize; 2]; 4] = [[0, 64], [32, 96], [128, 192], [160, 224]];

/// The codes of a Q3_K block, 4 added, in the order of [`planes`].
#[inline(always)]
pub(super) fn q3_codes(simd: Avx512, block: &Q3K) -> [__m512i; 4] {
    let [a, b, c, d] = planes(simd, &block.q);
    // SAFETY: `simd` exists only where `detect` found AVX-512; the unaligned load is all of `block.high`.
    unsafe {
        // Bits g of the two halves are those of register g.
        let high = _mm256_loadu_si256(block.high.as_ptr().cast());
        let high = pair(high, _mm256_srli_epi16::<4>(high));
        let bit = _mm512_set1_epi8(4);
        [
            _mm512_or_si512(a, _mm512_and_si512(_mm512_slli_epi16::<2>(high), bit)),
            _mm512_or_si512(b, _mm512_and_si512(_mm512_slli_epi16::<1>(high), bit)),
            _mm512_or_si512(c, _mm512_and_si512(high, bit)),
            _mm512_or_si512(d, _mm512_and_si512(_mm512_srli_epi16::<1>(high), bit)),
        ]
    }
}

/// The codes of a Q5_K block in the order of [`nibbles`].
#[inline(always)]
pub(super) fn q5_codes(simd: Avx512, block: &Q5K) -> [__m512i; 4] {
    let [a, b, c, d] = nibbles(simd, &block.q);
    // SAFETY: `simd` exists only where `detect` found AVX-512; the unaligned load is all of `block.high`.
    unsafe {
        // Bits 0, 1, 4 and 5 of the two halves are those of the four registers.
        let high = _mm256_loadu_si256(block.high.as_ptr().cast());
        let high = pair(high, _mm256_srli_epi16::<2>(high));
        let bit = _mm512_set1_epi8(16);
        [
            _mm512_or_si512(a, _mm512_and_si512(_mm512_slli_epi16::<4>(high), bit)),
            _mm512_or_si512(b, _mm512_and_si512(_mm512_slli_epi16::<3>(high), bit)),
            _mm512_or_si512(c, _mm512_and_si512(high, bit)),
            _mm512_or_si512(d, _mm512_and_si512(_mm512_srli_epi16::<1>(high), bit)),
        ]
    }
}

/// The codes of a Q6_K block, 32 added, in order.
#[inline(always)]
pub(super) fn q6_codes(simd: Avx512, block: &Q6K) -> [__m512i; 4] {
    let [low_0, low_1] = bytemuck::cast_ref(&block.low);
    let [high_0, high_1] = bytemuck::cast_ref(&block.high);
    let [[a, b], [c, d]] = [q6_half(simd, low_0, high_0), q6_half(simd, low_1, high_1)];
    [a, b, c, d]
}

/// 128 of them.
#[inline(always)]
fn q6_half(_: Avx512, low: &[u8; 64], high: &[u8; 32]) -> [__m512i; 2] {
    // SAFETY: the first argument exists only where `detect` found AVX-512; the unaligned load is all of `high`.
    unsafe {
        let (nibble, bits) = (_mm512_set1_epi8(0x0f), _mm512_set1_epi8(0x30));
        let low = load_64(low);
        let high = _mm256_loadu_si256(high.as_ptr().cast());
        let high = pair(high, _mm256_srli_epi16::<2>(high));
        let (low, upper) = (_mm512_and_si512(low, nibble), _mm512_and_si512(_mm512_srli_epi16::<4>(low), nibble));
        [
            _mm512_or_si512(low, _mm512_and_si512(_mm512_slli_epi16::<4>(high), bits)),
            _mm512_or_si512(upper, _mm512_and_si512(high, bits)),
        ]
    }
}

/// The codes of an IQ2_XXS block, 64 added, in order.
#[inline(always)]
pub(super) fn iq2_codes(simd: Avx512, block: &Iq2Xxs) -> [__m512i; 4] {
    let [a, b, c, d, e, f, g, h] = avx2::iq2_registers(simd.avx2(), &block.groups);
    // SAFETY: `simd` exists only where `detect` found AVX-512.
    unsafe {
        let offset = _mm512_set1_epi8(64);
        [
            _mm512_add_epi8(pair(a, b), offset),
            _mm512_add_epi8(pair(c, d), offset),
            _mm512_add_epi8(pair(e, f), offset),
            _mm512_add_epi8(pair(g, h), offset),
        ]
    }
}

/// All of `bytes`, 128 added.
#[inline(always)]
pub(super) fn flip(_: Avx512, bytes: &[i8; 32]) -> __m256i {
    // SAFETY: the first argument exists only where `detect` found AVX-512; the unaligned load is all of `bytes`.
    unsafe { _mm256_xor_si256(_mm256_loadu_si256(bytes.as_ptr().cast()), _mm256_set1_epi8(-128)) }
}

/// [`IntegerSimd::long`] of IQ2_XXS for few rows of activations.
#[inline(always)]
pub(super) fn few_iq2(_: Avx512, weights: &[Iq2Xxs], x: &[ActivationQ8K], batch: usize, out: &mut [f32]) {
    // SAFETY: the first argument exists only where `detect` found these features.
    unsafe { iq2(weights, x, batch, out) }
}

/// An activation block as two weight rows at a time take it: register 4e + l has the eight values at point l of groups
/// e, e + 2, e + 4 and e + 6, each twice.
struct Doubled {
    d: f32,
    q: [__m512i; 8],
}

impl Doubled {
    #[target_feature(enable = "avx512f")]
    fn new(x: &ActivationQ8K) -> Doubled {
        let points = x.q.as_chunks::<8>().0;
        let q = from_fn(|i| {
            let octets: [[i8; 8]; 8] = from_fn(|j| points[4 * (i / 4 + j / 2 * 2) + i % 4]);
            load_64(&bytemuck::cast::<_, [i8; 64]>(octets))
        });
        Doubled { d: x.d, q }
    }
}

/// Code book, signs and products stay in registers. Two weight rows, A and B, go together: in each 64 bits there is a
/// group of A or of B, alternately.
#[target_feature(enable = "avx512vl,avx512vnni,avx512vbmi,avx512bitalg,gfni")]
fn iq2(weights: &[Iq2Xxs], x: &[ActivationQ8K], batch: usize, out: &mut [f32]) {
    let x: Vec<Doubled> = x.iter().map(|x| Doubled::new(x)).collect();
    let book = CodeBook::new();
    tiles::<_, _, _, ROWS, MANY>(Iq2Xxs::ROWS, weights, &x, batch, out, _mm_setzero_ps(), avx2::lanes, |w, x, sums| {
        let d = _mm_mul_ps(avx2::halves(w.map(|w| w.d())), _mm_set1_ps(Iq2Xxs::FACTOR));
        for (x, sum) in x.iter().zip(sums) {
            // In each 128 bits two numbers of A, two of B.
            let ab = iq2_pair(&book, &w[0].groups, &w[1].groups, x);
            let cd = iq2_pair(&book, &w[2].groups, &w[3].groups, x);
            let (ac, bd) = (_mm512_unpacklo_epi32(ab, cd), _mm512_unpackhi_epi32(ab, cd));
            let acbd = _mm512_add_epi32(_mm512_unpacklo_epi64(ac, bd), _mm512_unpackhi_epi64(ac, bd));
            let acbd = fold(_mm256_add_epi32(_mm512_castsi512_si256(acbd), _mm512_extracti64x4_epi64::<1>(acbd)));
            let dots = _mm_cvtepi32_ps(_mm_shuffle_epi32::<0b11_01_10_00>(acbd));
            *sum = _mm_fmadd_ps(_mm_mul_ps(d, _mm_set1_ps(x.d)), dots, *sum);
        }
    });
}

/// The packed points of the code book: bytes 2i and 2i + 1 of point i in `low` and `high`, 64 points a register.
struct CodeBook {
    low: [__m512i; 4],
    high: [__m512i; 4],
}

impl CodeBook {
    #[target_feature(enable = "avx512f")]
    fn new() -> CodeBook {
        let byte = |n: usize| from_fn(|i| load_64(&from_fn::<_, 64, _>(|j| PACKED[64 * i + j].to_le_bytes()[n])));
        CodeBook { low: byte(0), high: byte(1) }
    }
}

/// Σ scale·code·x of a block of two rows, A in lanes 0 and 1 of each four, B in lanes 2 and 3.
#[target_feature(enable = "avx512vl,avx512vnni,avx512vbmi,avx512bitalg,gfni")]
#[inline]
fn iq2_pair(book: &CodeBook, a: &[[u8; 8]; 8], b: &[[u8; 8]; 8], x: &Doubled) -> __m512i {
    /// The upper halves of 64 bits.
    const UPPER: __mmask16 = 0xaaaa;
    let (a, b) = (load_64(bytemuck::cast_ref::<_, [u8; 64]>(a)), load_64(bytemuck::cast_ref::<_, [u8; 64]>(b)));

    // In each 64 bits the indices of four points of A, then of B: look up both bytes of each point.
    let indices = _mm512_mask_blend_epi32(UPPER, a, _mm512_slli_epi64::<32>(b));
    let second_half = _mm512_movepi8_mask(indices);
    let look_up = |t: &[__m512i; 4]| {
        let first = _mm512_permutex2var_epi8(t[0], indices, t[1]);
        _mm512_mask_blend_epi8(second_half, first, _mm512_permutex2var_epi8(t[2], indices, t[3]))
    };
    let (low, high) = (look_up(&book.low), look_up(&book.high));
    // Four packed points of A, then of B: of groups 0, 2, 4 and 6, and of groups 1, 3, 5 and 7.
    let points = [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)];

    // In each 64 bits four patterns of A, then of B; bit 7 becomes the parity of the others.
    let words = load_64(&WORDS);
    let patterns = [_mm512_multishift_epi64_epi8(words, a), _mm512_multishift_epi64_epi8(words, b)];
    let patterns = _mm512_mask_blend_epi32(UPPER, patterns[0], patterns[1]);
    let signs = _mm512_gf2p8affine_epi64_epi8::<0>(patterns, _mm512_set1_epi64(PARITY));
    let signs = [_mm512_unpacklo_epi64(signs, signs), _mm512_unpackhi_epi64(signs, signs)];

    // 2s + 1, s being the upper four bits of a word: the bit below them is set.
    let scale = |words| _mm512_or_si512(_mm512_srli_epi32::<27>(words), _mm512_set1_epi32(1));
    let (a, b) = (_mm512_castsi512_ps(a), _mm512_castsi512_ps(b));
    let scales = [
        scale(_mm512_castps_si512(_mm512_shuffle_ps::<0b01_01_01_01>(a, b))),
        scale(_mm512_castps_si512(_mm512_shuffle_ps::<0b11_11_11_11>(a, b))),
    ];

    let magnitudes = load_64(&MAGNITUDES);
    let parts: [__m512i; 2] = from_fn(|e| {
        let mut sum = _mm512_setzero_si512();
        for l in 0..4 {
            let codes = _mm512_multishift_epi64_epi8(load_64(&POINTS[l]), points[e]);
            let codes = _mm512_permutexvar_epi8(codes, magnitudes);
            let minus = _mm512_bitshuffle_epi64_mask(signs[e], load_64(&SIGN_BITS[l]));
            let x = x.q[4 * e + l];
            let x = _mm512_mask_sub_epi8(x, minus, _mm512_setzero_si512(), x);
            sum = _mm512_dpbusd_epi32(sum, codes, x);
        }
        _mm512_mullo_epi32(sum, scales[e])
    });
    _mm512_add_epi32(parts[0], parts[1])
}

/// Where the bits of each byte begin, for `multishift`: the four patterns of a group, twice.
static WORDS: [u8; 64] = {
    let mut starts = [0; 64];
    let mut i = 0;
    while i < 64 {
        starts[i] = 32 + 7 * (i as u8 % 4);
        i += 1;
    }
    starts
};

/// The same for the eight codes of packed point l.
static POINTS: [[u8; 64]; 4] = {
    let mut starts = [[0; 64]; 4];
    let mut i = 0;
    while i < 4 * 64 {
        starts[i / 64][i % 64] = (16 * (i / 64) + 2 * (i % 8)) as u8;
        i += 1;
    }
    starts
};

/// Which bits of 64 are the signs of point l: of row A in even places, of B in odd ones.
static SIGN_BITS: [[u8; 64]; 4] = {
    let mut bits = [[0; 64]; 4];
    let mut i = 0;
    while i < 4 * 64 {
        bits[i / 64][i % 64] = (8 * (i / 64) + i % 8 + 32 * (i / 8 % 2)) as u8;
        i += 1;
    }
    bits
};

/// The magnitude for each code, whatever stands above its two bits.
static MAGNITUDES: [i8; 64] = {
    let mut magnitudes = [0; 64];
    let mut i = 0;
    while i < 64 {
        magnitudes[i] = iq2_grid::MAGNITUDES[i % 4];
        i += 1;
    }
    magnitudes
};

/// The matrix over GF(2) that keeps bits 0 to 6 of a byte and makes bit 7 their parity. Byte 0 makes bit 7.
const PARITY: i64 = i64::from_le_bytes([0x7f, 0x40, 0x20, 0x10, 0x08, 0x04, 0x02, 0x01]);
