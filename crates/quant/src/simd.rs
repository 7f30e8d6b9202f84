//! Instruction sets: which one runs, and the 16 lanes of f32 that every exact kernel is written in.
//!
//! A kernel is written once, as an `#[inline(always)]` function generic over `Simd`, and instantiated by the
//! `kernel!` macro once per [`Level`] under the matching `#[target_feature]`. All operations here are exactly
//! rounded IEEE 754, so every level gives the same bits (NaN payloads aside); a level changes speed only.

use crate::blocks::Half;
use std::sync::OnceLock;

/// An instruction set that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// What the target guarantees: SSE2 on x86-64, NEON on AArch64.
    Scalar,
    /// AVX2, FMA and F16C of x86-64 (2013 and later).
    #[cfg(target_arch = "x86_64")]
    Avx2,
}

impl Level {
    /// The levels this machine can run, slowest first.
    pub fn available() -> impl Iterator<Item = Level> {
        let all = [
            Level::Scalar,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2,
        ];
        all.into_iter().filter(|level| level.is_available())
    }

    fn is_available(self) -> bool {
        match self {
            Level::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => Avx2::detect().is_some(),
        }
    }
}

/// The fastest level of this machine, detected once.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| Level::available().last().expect("Scalar is always available"))
}

/// Sixteen f32 lanes and the few operations of the exact kernels. A value of an implementing type is the proof
/// that the machine has the instructions, so the methods are safe.
pub(crate) trait Simd: Copy {
    /// Sixteen lanes.
    type V: Copy;
    /// All lanes `value`.
    fn splat(self, value: f32) -> Self::V;
    /// Lane i is `a[i]`.
    fn load(self, a: &[f32; 16]) -> Self::V;
    /// Lane i is `a[i]`, converted exactly.
    fn load_i8(self, a: &[i8; 16]) -> Self::V;
    /// Lane i is `a[i]`, converted exactly.
    fn load_half(self, a: &[Half; 16]) -> Self::V;
    /// Writes the lanes to `out`.
    fn store(self, v: Self::V, out: &mut [f32; 16]);
    /// `a + b` in each lane.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a − b` in each lane.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b` in each lane.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b + c` in each lane, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;

    /// The lanes as an array.
    #[inline(always)]
    fn to_array(self, v: Self::V) -> [f32; 16] {
        let mut a = [0.0; 16];
        self.store(v, &mut a);
        a
    }

    /// The fixed reduction tree: `l[i] += l[i + 8]` for i < 8, then 4, 2, 1.
    #[inline(always)]
    fn reduce(self, v: Self::V) -> f32 {
        let mut l = self.to_array(v);
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                l[i] += l[i + half];
            }
        }
        l[0]
    }
}

/// The twin of every vector type: plain arrays. Without hardware FMA, `mul_add` is the library's exact one.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

impl Simd for Scalar {
    type V = [f32; 16];

    #[inline(always)]
    fn splat(self, value: f32) -> [f32; 16] {
        [value; 16]
    }

    #[inline(always)]
    fn load(self, a: &[f32; 16]) -> [f32; 16] {
        *a
    }

    #[inline(always)]
    fn load_i8(self, a: &[i8; 16]) -> [f32; 16] {
        a.map(f32::from)
    }

    #[inline(always)]
    fn load_half(self, a: &[Half; 16]) -> [f32; 16] {
        a.map(Half::to_f32)
    }

    #[inline(always)]
    fn store(self, v: [f32; 16], out: &mut [f32; 16]) {
        *out = v;
    }

    #[inline(always)]
    fn add(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn fma(self, a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::Avx2;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Simd;
    use crate::blocks::Half;
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
    }
}

/// Makes the two entry points of a kernel from its body, an `#[inline(always)]` function whose first
/// argument is a [`Simd`]: `name(args)` runs at [`level()`], `name_at(level, args)` at a level of choice.
macro_rules! kernel {
    ($(#[$attr:meta])* $vis:vis fn $name:ident, $name_at:ident ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident) => {
        $(#[$attr])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            $name_at($crate::simd::level(), $($arg),*)
        }

        #[doc = concat!("[`", stringify!($name), "`] at a chosen level. Panics where the machine does not have it.")]
        $vis fn $name_at(level: $crate::simd::Level, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2(simd: $crate::simd::Avx2, $($arg: $ty),*) $(-> $ret)? {
                $body(simd, $($arg),*)
            }
            match level {
                $crate::simd::Level::Scalar => $body($crate::simd::Scalar, $($arg),*),
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Level::Avx2 => {
                    let simd = $crate::simd::Avx2::detect().expect("level Avx2 needs AVX2, FMA and F16C");
                    // SAFETY: `simd` proves that the machine has every feature `avx2` is compiled for.
                    unsafe { avx2(simd, $($arg),*) }
                }
            }
        }
    };
}
pub(crate) use kernel;
