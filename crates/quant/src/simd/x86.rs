//! The 16 lanes of the exact kernels on x86-64.

use super::Simd;
use crate::blocks::{Half, Iq2Xxs, QK_K};
use crate::integer::avx2;
use std::arch::x86_64::*;

/// Two 8-lane registers. Only [`Avx2::detect`] makes one.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The proof that this machine has AVX2, FMA and F16C, or `None`.
    pub(crate) fn detect() -> Option<Avx2> {
        let found =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        found.then_some(Avx2(()))
    }
}

impl Simd for Avx2 {
    type V = [__m256; 2];

    #[inline(always)]
    fn splat(self, value: f32) -> [__m256; 2] {
        // SAFETY: `self` exists only where `detect` found AVX2.
        unsafe { [_mm256_set1_ps(value); 2] }
    }

    #[inline(always)]
    fn load(self, a: &[f32; 16]) -> [__m256; 2] {
        // SAFETY: `self` exists only where `detect` found AVX2; both unaligned loads lie inside `a`.
        unsafe { [_mm256_loadu_ps(a.as_ptr()), _mm256_loadu_ps(a.as_ptr().add(8))] }
    }

    #[inline(always)]
    fn load_i8(self, a: &[i8; 16]) -> [__m256; 2] {
        // SAFETY: `self` exists only where `detect` found AVX2; the unaligned load is all of `a`.
        unsafe {
            let bytes = _mm_loadu_si128(a.as_ptr().cast());
            let low = _mm256_cvtepi8_epi32(bytes);
            let high = _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes));
            [_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)]
        }
    }

    #[inline(always)]
    fn load_half(self, a: &[Half; 16]) -> [__m256; 2] {
        // SAFETY: `self` exists only where `detect` found F16C; both unaligned loads lie inside `a`.
        unsafe {
            let halves = a.as_ptr().cast::<__m128i>();
            [_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves.add(1)))]
        }
    }

    #[inline(always)]
    fn store(self, v: [__m256; 2], out: &mut [f32; 16]) {
        // SAFETY: `self` exists only where `detect` found AVX2; both unaligned stores lie inside `out`.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), v[1]);
        }
    }

    #[inline(always)]
    fn add(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: `self` exists only where `detect` found AVX2.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn sub(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: `self` exists only where `detect` found AVX2.
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: `self` exists only where `detect` found AVX2.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn fma(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: `self` exists only where `detect` found FMA.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn iq2_codes(self, block: &Iq2Xxs) -> [i8; QK_K] {
        avx2::iq2_codes(self, &block.groups)
    }
}

/// One 16-lane register. Only [`Avx512::detect`] makes one.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// The proof that this machine has the features of [`Level::Avx512`](super::Level), or `None`.
    pub(crate) fn detect() -> Option<Avx512> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("avx512bitalg")
            && is_x86_feature_detected!("gfni")
            && Avx2::detect().is_some();
        found.then_some(Avx512(()))
    }

    /// What has AVX-512 has AVX2.
    #[inline(always)]
    pub(crate) fn avx2(self) -> Avx2 {
        Avx2(())
    }
}

impl Simd for Avx512 {
    type V = __m512;
    const HELD: usize = 32;

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        // SAFETY: `self` exists only where `detect` found AVX-512.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn load(self, a: &[f32; 16]) -> __m512 {
        // SAFETY: `self` exists only where `detect` found AVX-512; the unaligned load is all of `a`.
        unsafe { _mm512_loadu_ps(a.as_ptr()) }
    }

    #[inline(always)]
    fn load_i8(self, a: &[i8; 16]) -> __m512 {
        // SAFETY: `self` exists only where `detect` found AVX-512; the unaligned load is all of `a`.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(a.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn load_half(self, a: &[Half; 16]) -> __m512 {
        // SAFETY: `self` exists only where `detect` found AVX-512; the unaligned load is all of `a`.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(a.as_ptr().cast())) }
    }

    #[inline(always)]
    fn store(self, v: __m512, out: &mut [f32; 16]) {
        // SAFETY: `self` exists only where `detect` found AVX-512; the unaligned store is all of `out`.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` exists only where `detect` found AVX-512.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` exists only where `detect` found AVX-512.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` exists only where `detect` found AVX-512.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` exists only where `detect` found AVX-512.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn reduce_all<const N: usize>(self, v: [__m512; N]) -> [f32; N] {
        let mut sums = [0.0; N];
        for (i, sums) in sums.chunks_mut(4).enumerate() {
            // At the end the last one stands in for those that are not there.
            let four = std::array::from_fn(|k| v[(4 * i + k).min(N - 1)]);
            // SAFETY: `self` exists only where `detect` found AVX-512.
            sums.copy_from_slice(&unsafe { reduce_4(four) }[..sums.len()]);
        }
        sums
    }

    #[inline(always)]
    fn iq2_codes(self, block: &Iq2Xxs) -> [i8; QK_K] {
        avx2::iq2_codes(self.avx2(), &block.groups)
    }
}

/// The tree of [`Simd::reduce`] for four registers at once.
#[target_feature(enable = "avx512f")]
#[inline]
fn reduce_4(v: [__m512; 4]) -> [f32; 4] {
    // l[i] + l[i + 8], of two registers in one.
    let two = |a, b| _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
    let (ab, cd) = (two(v[0], v[1]), two(v[2], v[3]));
    // l[i] + l[i + 4], of all four: 128 bits each. Then 2 and 1 apart, there.
    let all = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xdd>(ab, cd));
    let all = _mm512_add_ps(all, _mm512_permute_ps::<0b01_00_11_10>(all));
    let all = _mm512_add_ps(all, _mm512_movehdup_ps(all));
    let firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    let mut sums = [0.0; 4];
    // SAFETY: the unaligned store is all of `sums`.
    unsafe { _mm_storeu_ps(sums.as_mut_ptr(), _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, all))) }
    sums
}
