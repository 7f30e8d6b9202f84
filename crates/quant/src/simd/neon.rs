//! The 16 lanes of the exact kernels on AArch64, and which instructions multiply bytes there.

use super::Simd;
use crate::blocks::Half;
use std::arch::aarch64::*;
use std::arch::is_aarch64_feature_detected;

/// Four 4-lane registers. `M` says how bytes are multiplied; only `detect` makes one of what a machine may lack.
#[derive(Clone, Copy)]
pub(crate) struct Neon<M>(M);

/// Multiplication of bytes that every AArch64 has: widening, with pairwise additions.
#[derive(Clone, Copy)]
pub(crate) struct Multiply(());

/// `sdot`: four products a lane.
#[derive(Clone, Copy)]
pub(crate) struct Dotprod(());

/// `sdot`, and `smmla`: the four dots of two rows with two rows.
#[derive(Clone, Copy)]
pub(crate) struct I8mm(());

impl Neon<Multiply> {
    /// What every AArch64 has.
    pub(crate) fn baseline() -> Neon<Multiply> {
        Neon(Multiply(()))
    }
}

impl Neon<Dotprod> {
    /// The proof that this machine has `sdot`, or `None`.
    pub(crate) fn detect() -> Option<Neon<Dotprod>> {
        is_aarch64_feature_detected!("dotprod").then_some(Neon(Dotprod(())))
    }
}

impl Neon<I8mm> {
    /// The proof that this machine has `sdot` and `smmla`, or `None`.
    pub(crate) fn detect() -> Option<Neon<I8mm>> {
        let found = is_aarch64_feature_detected!("dotprod") && is_aarch64_feature_detected!("i8mm");
        found.then_some(Neon(I8mm(())))
    }
}

impl<M: Copy> Neon<M> {
    /// What multiplies bytes.
    #[inline(always)]
    pub(crate) fn bytes(self) -> M {
        self.0
    }
}

impl<M: Copy> Simd for Neon<M> {
    type V = [float32x4_t; 4];

    #[inline(always)]
    fn splat(self, value: f32) -> [float32x4_t; 4] {
        // SAFETY: every AArch64 has NEON.
        unsafe { [vdupq_n_f32(value); 4] }
    }

    #[inline(always)]
    fn load(self, a: &[f32; 16]) -> [float32x4_t; 4] {
        // SAFETY: every AArch64 has NEON; the loads lie inside `a`.
        std::array::from_fn(|i| unsafe { vld1q_f32(a.as_ptr().add(4 * i)) })
    }

    #[inline(always)]
    fn load_i8(self, a: &[i8; 16]) -> [float32x4_t; 4] {
        // SAFETY: every AArch64 has NEON; the load is all of `a`.
        unsafe {
            let bytes = vld1q_s8(a.as_ptr());
            let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
            [
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                vcvtq_f32_s32(vmovl_high_s16(low)),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                vcvtq_f32_s32(vmovl_high_s16(high)),
            ]
        }
    }

    #[inline(always)]
    fn load_half(self, a: &[Half; 16]) -> [float32x4_t; 4] {
        // The instruction's type, `float16x4_t`, is not stable; the compiler vectorises the twin's code.
        self.load(&a.map(Half::to_f32))
    }

    #[inline(always)]
    fn store(self, v: [float32x4_t; 4], out: &mut [f32; 16]) {
        for (v, out) in v.into_iter().zip(out.as_chunks_mut::<4>().0) {
            // SAFETY: every AArch64 has NEON; the store is all of `out`.
            unsafe { vst1q_f32(out.as_mut_ptr(), v) }
        }
    }

    #[inline(always)]
    fn add(self, a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
        // SAFETY: every AArch64 has NEON.
        std::array::from_fn(|i| unsafe { vaddq_f32(a[i], b[i]) })
    }

    #[inline(always)]
    fn sub(self, a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
        // SAFETY: every AArch64 has NEON.
        std::array::from_fn(|i| unsafe { vsubq_f32(a[i], b[i]) })
    }

    #[inline(always)]
    fn mul(self, a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
        // SAFETY: every AArch64 has NEON.
        std::array::from_fn(|i| unsafe { vmulq_f32(a[i], b[i]) })
    }

    #[inline(always)]
    fn fma(self, a: [float32x4_t; 4], b: [float32x4_t; 4], c: [float32x4_t; 4]) -> [float32x4_t; 4] {
        // SAFETY: every AArch64 has NEON.
        std::array::from_fn(|i| unsafe { vfmaq_f32(c[i], a[i], b[i]) })
    }
}
