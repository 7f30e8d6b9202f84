//! Instruction sets: which one runs, and the 16 lanes of f32 that every exact kernel is written in.
//!
//! A kernel is written once, as an `#[inline(always)]` function generic over `Simd`, and instantiated by the
//! `kernel!` macro once per [`Level`] under the matching `#[target_feature]`. All operations here are exactly
//! rounded IEEE 754, so every level gives the same bits (NaN payloads aside); a level changes speed only.

#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "x86_64")]
mod x86;

use crate::blocks::{Half, Iq2Xxs, QK_K};
use std::sync::OnceLock;

#[cfg(target_arch = "aarch64")]
pub(crate) use neon::{Dotprod, I8mm, Multiply, Neon};
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

/// An instruction set that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// What the target guarantees, in plain code: SSE2 on x86-64, NEON on AArch64.
    Scalar,
    /// AVX2, FMA and F16C of x86-64 (Intel Haswell, AMD Zen and later).
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, VL, VNNI, VBMI and BITALG, and GFNI (Intel Ice Lake, AMD Zen 4 and later).
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// NEON of AArch64: every one has it.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// NEON and `sdot` (Cortex-A76, Graviton 2, Apple M1 and later).
    #[cfg(target_arch = "aarch64")]
    Dotprod,
    /// NEON, `sdot` and `smmla` (Cortex-X2, Graviton 3, Apple M2 and later).
    #[cfg(target_arch = "aarch64")]
    I8mm,
}

impl Level {
    /// The levels this machine can run, slowest first.
    pub fn available() -> impl Iterator<Item = Level> {
        let all = [
            Level::Scalar,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512,
            #[cfg(target_arch = "aarch64")]
            Level::Neon,
            #[cfg(target_arch = "aarch64")]
            Level::Dotprod,
            #[cfg(target_arch = "aarch64")]
            Level::I8mm,
        ];
        all.into_iter().filter(|level| level.is_available())
    }

    fn is_available(self) -> bool {
        match self {
            Level::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => Avx2::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => Avx512::detect().is_some(),
            #[cfg(target_arch = "aarch64")]
            Level::Neon => true,
            #[cfg(target_arch = "aarch64")]
            Level::Dotprod => Neon::<Dotprod>::detect().is_some(),
            #[cfg(target_arch = "aarch64")]
            Level::I8mm => Neon::<I8mm>::detect().is_some(),
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
    /// How many `V` the machine's registers hold.
    const HELD: usize = 8;
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
    /// `block.codes()`, looked up by vector instructions where that is faster.
    #[inline(always)]
    fn iq2_codes(self, block: &Iq2Xxs) -> [i8; QK_K] {
        block.codes()
    }

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

    /// [`reduce`](Simd::reduce) of each.
    #[inline(always)]
    fn reduce_all<const N: usize>(self, v: [Self::V; N]) -> [f32; N] {
        v.map(|v| self.reduce(v))
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

/// Asks for `count` items from `first` on to be brought into the cache; they need not exist.
#[inline(always)]
pub(crate) fn prefetch<T>(items: &[T], first: usize, count: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..count * size_of::<T>()).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every x86-64 has SSE, and a prefetch of any address is allowed.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(items.as_ptr().wrapping_add(first).wrapping_byte_add(line).cast()) }
    }
    // AArch64 has no stable intrinsic for it.
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (items, first, count);
}

/// Makes the two entry points of a kernel from its body, an `#[inline(always)]` function whose first
/// argument is a [`Simd`]: `name(args)` runs at [`level()`], `name_at(level, args)` at a level of choice. With one name it
/// makes the latter alone.
macro_rules! kernel {
    ($(#[$attr:meta])* $vis:vis fn $name:ident, $name_at:ident ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident) => {
        $(#[$attr])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            $name_at($crate::simd::level(), $($arg),*)
        }

        $crate::simd::kernel! {
            #[doc = concat!("[`", stringify!($name), "`] at a chosen level. Panics where the machine does not have it.")]
            $vis fn $name_at($($arg: $ty),*) $(-> $ret)? = $body
        }
    };
    ($(#[$attr:meta])* $vis:vis fn $name_at:ident ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident) => {
        $(#[$attr])*
        $vis fn $name_at(level: $crate::simd::Level, $($arg: $ty),*) $(-> $ret)? {
            match level {
                $crate::simd::Level::Scalar => $body($crate::simd::Scalar, $($arg),*),
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Level::Avx2 => $crate::simd::instance!(
                    $crate::simd::Avx2, "avx2,fma,f16c", $body($($arg: $ty),*) $(-> $ret)?
                ),
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Level::Avx512 => $crate::simd::instance!(
                    $crate::simd::Avx512,
                    "avx512vl,avx512vnni,avx512vbmi,avx512bitalg,gfni",
                    $body($($arg: $ty),*) $(-> $ret)?
                ),
                #[cfg(target_arch = "aarch64")]
                $crate::simd::Level::Neon => $body($crate::simd::Neon::baseline(), $($arg),*),
                #[cfg(target_arch = "aarch64")]
                $crate::simd::Level::Dotprod => $crate::simd::instance!(
                    $crate::simd::Neon::<$crate::simd::Dotprod>, "neon,dotprod", $body($($arg: $ty),*) $(-> $ret)?
                ),
                #[cfg(target_arch = "aarch64")]
                $crate::simd::Level::I8mm => $crate::simd::instance!(
                    $crate::simd::Neon::<$crate::simd::I8mm>, "neon,dotprod,i8mm", $body($($arg: $ty),*) $(-> $ret)?
                ),
            }
        }
    };
}
pub(crate) use kernel;

/// Calls a kernel's body compiled with the features that the `Simd` stands for.
macro_rules! instance {
    ($simd:ty, $features:literal, $body:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?) => {{
        #[target_feature(enable = $features)]
        fn instance(simd: $simd, $($arg: $ty),*) $(-> $ret)? {
            $body(simd, $($arg),*)
        }
        let simd = <$simd>::detect().expect(concat!("this level needs a machine with ", $features));
        // SAFETY: `simd` proves that the machine has every feature that `instance` is compiled for.
        unsafe { instance(simd, $($arg),*) }
    }};
}
pub(crate) use instance;
