//! The integer dots for NEON: four weight rows at a time, whose sums are the four lanes of a register. What multiplies
//! the bytes is the machine's: widening products, `sdot`, or, for rows of activations in pairs, `smmla`.

use super::blocks::{LongBlock, ShortBlock};
use super::{IntegerSimd, Rows, tiles};
use crate::blocks::*;
use crate::simd::{Dotprod, I8mm, Multiply, Neon};
use std::arch::{aarch64::*, asm};
use std::array::from_fn;

/// Weight rows that are computed together.
const ROWS: usize = 4;
/// Activation rows for which a weight block stays unpacked.
const BATCH: usize = 32;

/// How a machine multiplies signed bytes. A value is the proof that it can.
pub(crate) trait Bytes: Copy {
    /// Whether there is [`two_by_two`](Self::two_by_two).
    const PAIRS: bool = false;
    /// `sum` plus the sixteen products, four to a lane or in pairs of lanes: only the sum of all lanes has a meaning.
    fn dot(self, sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t;
    /// With `a` and `b` two rows of eight each: `sum` plus the dots a₀·b₀, a₀·b₁, a₁·b₀, a₁·b₁.
    fn two_by_two(self, _sum: int32x4_t, _a: int8x16_t, _b: int8x16_t) -> int32x4_t {
        unreachable!("only called where PAIRS is true")
    }
}

impl Bytes for Multiply {
    #[inline(always)]
    fn dot(self, sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        // SAFETY: every AArch64 has NEON.
        unsafe {
            let sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(a), vget_low_s8(b)));
            vpadalq_s16(sum, vmull_high_s8(a, b))
        }
    }
}

impl Bytes for Dotprod {
    #[inline(always)]
    fn dot(self, sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        // SAFETY: `self` exists only where `detect` found `sdot`.
        unsafe { sdot(sum, a, b) }
    }
}

impl Bytes for I8mm {
    const PAIRS: bool = true;

    #[inline(always)]
    fn dot(self, sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        // SAFETY: `self` exists only where `detect` found `sdot`.
        unsafe { sdot(sum, a, b) }
    }

    #[inline(always)]
    fn two_by_two(self, sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        // SAFETY: `self` exists only where `detect` found `smmla`.
        unsafe { smmla(sum, a, b) }
    }
}

// The intrinsics of these two are not stable.

#[target_feature(enable = "neon,dotprod")]
#[inline]
fn sdot(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction changes nothing but `sum`, and this function is compiled where it exists.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

#[target_feature(enable = "neon,i8mm")]
#[inline]
fn smmla(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction changes nothing but `sum`, and this function is compiled where it exists.
    unsafe {
        asm!(
            "smmla {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

impl<M: Bytes> IntegerSimd for Neon<M> {
    #[inline(always)]
    fn short<W: ShortBlock>(self, weights: &[W], x: &[ActivationQ8_0], batch: usize, out: &mut [f32]) {
        let zero = load_f32([0.0; ROWS]);
        tiles::<_, _, _, ROWS, BATCH>(Rows::Apart, weights, x, batch, out, zero, lanes, |w, x, sums| {
            let codes = w.map(|w| w.codes());
            let scales = load_f32(w.map(|w| w.scale()));
            let add = |dots, x: &ActivationQ8_0, sum: &mut float32x4_t| *sum = add_scaled(*sum, scales, x.d, dots);
            let (pairs, rest) = in_pairs::<M, _>(x);
            let (pair_sums, rest_sums) = sums.split_at_mut(2 * pairs.len());
            for ([x0, x1], sums) in pairs.iter().zip(pair_sums.as_chunks_mut::<2>().0) {
                let (mut ab, mut cd) = (zero_i32(), zero_i32());
                for i in 0..2 {
                    let [a, b, c, d] = codes.each_ref().map(|codes| sixteen(codes, i));
                    let x = interleave(sixteen(&x0.q, i), sixteen(&x1.q, i));
                    ab = self.two_by_two_16(ab, interleave(a, b), x);
                    cd = self.two_by_two_16(cd, interleave(c, d), x);
                }
                let [dots_0, dots_1] = by_activation(ab, cd);
                add(dots_0, x0, &mut sums[0]);
                add(dots_1, x1, &mut sums[1]);
            }
            for (x, sum) in rest.iter().zip(rest_sums) {
                let dots = codes.each_ref().map(|codes| {
                    (0..2).fold(zero_i32(), |dot, i| self.bytes().dot(dot, sixteen(codes, i), sixteen(&x.q, i)))
                });
                add(across(dots), x, sum);
            }
        });
    }

    #[inline(always)]
    fn long<W: LongBlock>(self, weights: &[W], x: &[ActivationQ8K], batch: usize, out: &mut [f32]) {
        let zero = load_f32([0.0; ROWS]);
        tiles::<_, _, _, ROWS, BATCH>(W::ROWS, weights, x, batch, out, zero, lanes, |w, x, sums| {
            let (codes, scales) = (w.map(|w| w.codes()), w.map(|w| w.scales().map(i32::from)));
            let minimums = w.map(|w| w.minimums().map(i16::from));
            let d = load_f32(w.map(|w| w.d().to_f32() * W::FACTOR));
            let minus_dmin = load_f32(w.map(|w| -w.dmin().to_f32()));
            let add = |dots, x: &ActivationQ8K, sum: &mut float32x4_t| {
                *sum = add_scaled(*sum, d, x.d, dots);
                if W::MINIMUMS {
                    let minimums = across(minimums.each_ref().map(|minimums| dot_i16(minimums, &x.sums)));
                    *sum = add_scaled(*sum, minus_dmin, x.d, minimums);
                }
            };
            let (pairs, rest) = in_pairs::<M, _>(x);
            let (pair_sums, rest_sums) = sums.split_at_mut(2 * pairs.len());
            for ([x0, x1], sums) in pairs.iter().zip(pair_sums.as_chunks_mut::<2>().0) {
                let (mut ab, mut cd) = (zero_i32(), zero_i32());
                for j in 0..QK_K / 16 {
                    let [a, b, c, d] = codes.each_ref().map(|codes| sixteen(codes, j));
                    let [s_a, s_b, s_c, s_d] = scales.each_ref().map(|scales| scales[j]);
                    let x = interleave(sixteen(&x0.q, j), sixteen(&x1.q, j));
                    ab = add_product(ab, self.two_by_two_16(zero_i32(), interleave(a, b), x), [s_a, s_a, s_b, s_b]);
                    cd = add_product(cd, self.two_by_two_16(zero_i32(), interleave(c, d), x), [s_c, s_c, s_d, s_d]);
                }
                let [dots_0, dots_1] = by_activation(ab, cd);
                add(dots_0, x0, &mut sums[0]);
                add(dots_1, x1, &mut sums[1]);
            }
            for (x, sum) in rest.iter().zip(rest_sums) {
                let dots = from_fn(|i| {
                    (0..QK_K / 16).fold(zero_i32(), |dot, j| {
                        let part = self.bytes().dot(zero_i32(), sixteen(&codes[i], j), sixteen(&x.q, j));
                        add_product(dot, part, [scales[i][j]; 4])
                    })
                });
                add(across(dots), x, sum);
            }
        });
    }
}

impl<M: Bytes> Neon<M> {
    /// [`Bytes::two_by_two`] of rows of sixteen.
    #[inline(always)]
    fn two_by_two_16(self, sum: int32x4_t, a: [int8x16_t; 2], b: [int8x16_t; 2]) -> int32x4_t {
        let sum = self.bytes().two_by_two(sum, a[0], b[0]);
        self.bytes().two_by_two(sum, a[1], b[1])
    }
}

/// The rows of activations that go in pairs, and the others.
#[inline(always)]
fn in_pairs<M: Bytes, X>(x: &[X]) -> (&[[X; 2]], &[X]) {
    if M::PAIRS { x.as_chunks() } else { (&[], x) }
}

// Every AArch64 has NEON: what its intrinsics ask for is always there.

#[inline(always)]
fn zero_i32() -> int32x4_t {
    // SAFETY: every AArch64 has NEON.
    unsafe { vdupq_n_s32(0) }
}

#[inline(always)]
fn load_f32(v: [f32; ROWS]) -> float32x4_t {
    // SAFETY: every AArch64 has NEON; the load is all of `v`.
    unsafe { vld1q_f32(v.as_ptr()) }
}

#[inline(always)]
fn lanes(v: float32x4_t) -> [f32; ROWS] {
    let mut lanes = [0.0; ROWS];
    // SAFETY: every AArch64 has NEON; the store is all of `lanes`.
    unsafe { vst1q_f32(lanes.as_mut_ptr(), v) };
    lanes
}

/// Bytes 16i to 16i + 15.
#[inline(always)]
fn sixteen<const N: usize>(bytes: &[i8; N], i: usize) -> int8x16_t {
    // SAFETY: every AArch64 has NEON; the load is all of a chunk.
    unsafe { vld1q_s8(bytes.as_chunks::<16>().0[i].as_ptr()) }
}

/// The first eight bytes of both, and the last eight of both.
#[inline(always)]
fn interleave(a: int8x16_t, b: int8x16_t) -> [int8x16_t; 2] {
    // SAFETY: every AArch64 has NEON.
    unsafe {
        let (a, b) = (vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b));
        [vreinterpretq_s8_s64(vzip1q_s64(a, b)), vreinterpretq_s8_s64(vzip2q_s64(a, b))]
    }
}

/// From the dots of weight rows a and b, and c and d, with activations 0 and 1: those of each activation.
#[inline(always)]
fn by_activation(ab: int32x4_t, cd: int32x4_t) -> [int32x4_t; 2] {
    // SAFETY: every AArch64 has NEON.
    unsafe { [vuzp1q_s32(ab, cd), vuzp2q_s32(ab, cd)] }
}

/// The sums of the lanes of each register.
#[inline(always)]
fn across(v: [int32x4_t; ROWS]) -> int32x4_t {
    // SAFETY: every AArch64 has NEON.
    unsafe { vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3])) }
}

/// `sum + a · b`.
#[inline(always)]
fn add_product(sum: int32x4_t, a: int32x4_t, b: [i32; 4]) -> int32x4_t {
    // SAFETY: every AArch64 has NEON; the load is all of `b`.
    unsafe { vmlaq_s32(sum, a, vld1q_s32(b.as_ptr())) }
}

/// Σ a·b in four parts.
#[inline(always)]
fn dot_i16(a: &[i16; 16], b: &[i16; 16]) -> int32x4_t {
    (0..4).fold(zero_i32(), |sum, i| {
        // SAFETY: every AArch64 has NEON; the loads are all of a chunk.
        unsafe {
            let load = |v: &[i16; 16]| vld1_s16(v.as_chunks::<4>().0[i].as_ptr());
            vmlal_s16(sum, load(a), load(b))
        }
    })
}

/// `sum + scales · d_x · dots`, the last step fused.
#[inline(always)]
fn add_scaled(sum: float32x4_t, scales: float32x4_t, d_x: f32, dots: int32x4_t) -> float32x4_t {
    // SAFETY: every AArch64 has NEON.
    unsafe { vfmaq_f32(sum, vmulq_n_f32(scales, d_x), vcvtq_f32_s32(dots)) }
}
