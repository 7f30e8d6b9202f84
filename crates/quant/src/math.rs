//! Deterministic f32 functions: made of exactly rounded IEEE operations in a fixed order, so that the scalar
//! functions, the slice functions and every instruction set give the same bits. The platform's own are not used.

use crate::simd::{Simd, kernel};

/// eˣ within 1 ulp; overflow gives infinity, underflow goes through the subnormals to 0, NaN stays NaN.
///
/// Cody–Waite: n = round(x·log₂e), r = x − n·ln 2 in two parts, eʳ by a polynomial (coefficients of Cephes
/// `expf`), and the result scaled by 2ⁿ in two exact steps of which only the last can round.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    /// Adding 1.5·2²³ leaves the rounded integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = std::f32::consts::LN_2;
    const LN2_LOW: f32 = -1.904_654_3e-9;
    // Past these the result is infinite or 0 for certain; comparisons let a NaN through.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.0 { -104.0 } else { x };

    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));

    let p = 1.987_569_1e-4_f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 5e-1);
    let p = p.mul_add(r * r, r) + 1.0;

    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n >> 1;
    let power_of_two = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    p * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

/// 1 / (1 + e⁻ˣ). Below −88.7, where the result is under 2⁻¹²⁷, it is 0.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// x · sigmoid(x), computed as x / (1 + e⁻ˣ).
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// ln(1 + eˣ): x above 20, eˣ below −20, in between by `libm`'s `log1pf` (portable code).
#[inline(always)]
pub fn softplus(x: f32) -> f32 {
    if x > 20.0 {
        x
    } else if x < -20.0 {
        exp(x)
    } else {
        libm::log1pf(exp(x))
    }
}

macro_rules! slice_kernel {
    ($name:ident, $name_at:ident, $body:ident = $function:ident) => {
        kernel! {
            #[doc = concat!("[`", stringify!($function), "`] of every element, in place, with the same bits.")]
            pub fn $name, $name_at(x: &mut [f32]) = $body
        }

        #[inline(always)]
        fn $body<S: Simd>(_simd: S, x: &mut [f32]) {
            for x in x {
                *x = $function(*x);
            }
        }
    };
}

slice_kernel!(exp_slice, exp_slice_at, exp_body = exp);
slice_kernel!(sigmoid_slice, sigmoid_slice_at, sigmoid_body = sigmoid);
slice_kernel!(silu_slice, silu_slice_at, silu_body = silu);
slice_kernel!(softplus_slice, softplus_slice_at, softplus_body = softplus);
