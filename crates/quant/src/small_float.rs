//! The small floats of the model's stored state (docs/spec/model.md §2.8): FP8 (E4M3) and FP4 (E2M1) with one
//! power-of-two scale (E8M0) per block, bfloat16, and the Walsh–Hadamard rotation in front of FP4.
//!
//! A scale is the smallest power of two that brings the block's largest magnitude within the format's range,
//! found on the bits of the float, never through a logarithm. A block with an infinity or a NaN gets the scale
//! [`SCALE_NAN`] and zero codes, and decodes to NaN throughout, as OCP MX defines it.

use crate::simd::{Simd, kernel};

/// The E8M0 code that stands for NaN.
pub const SCALE_NAN: u8 = 0xff;

/// Values of an FP8 block.
pub const FP8_BLOCK: usize = 64;
/// Values of an FP4 block.
pub const FP4_BLOCK: usize = 32;
/// Size of the rotation.
pub const HADAMARD: usize = 128;

/// Largest E4M3 magnitude, and the floor of a block's largest magnitude.
const FP8_MAX: f32 = 448.0;
const FP8_FLOOR: f32 = 1e-4;
/// Largest E2M1 magnitude, and the floor of a block's largest magnitude: 6·2⁻¹²⁶.
const FP4_MAX: f32 = 6.0;
const FP4_FLOOR: f32 = 6.0 * f32::MIN_POSITIVE;

kernel! {
    /// FP8 of a block: E8M0 scale and E4M3 codes (sign in bit 7), rounded to nearest, ties to even.
    pub fn fp8_encode, fp8_encode_at(x: &[f32; FP8_BLOCK]) -> (u8, [u8; FP8_BLOCK]) = fp8_encode_body
}
kernel! {
    /// The values of an FP8 block.
    pub fn fp8_decode, fp8_decode_at(scale: u8, codes: &[u8; FP8_BLOCK], out: &mut [f32; FP8_BLOCK]) = fp8_decode_body
}
kernel! {
    /// FP4 of a block: E8M0 scale and E2M1 codes, element 2j in the low and 2j + 1 in the high nibble of byte j
    /// (sign in bit 3), rounded to nearest, ties to the even code.
    pub fn fp4_encode, fp4_encode_at(x: &[f32; FP4_BLOCK]) -> (u8, [u8; FP4_BLOCK / 2]) = fp4_encode_body
}
kernel! {
    /// The values of an FP4 block.
    pub fn fp4_decode, fp4_decode_at(scale: u8, codes: &[u8; FP4_BLOCK / 2], out: &mut [f32; FP4_BLOCK]) = fp4_decode_body
}
kernel! {
    /// Walsh–Hadamard transform in natural (Sylvester) order, times 128^−½: butterflies of distance 1, 2, … 64.
    pub fn hadamard, hadamard_at(x: &mut [f32; HADAMARD]) = hadamard_body
}

/// bfloat16 of `x`, rounded to nearest, ties to even; a NaN stays one.
#[inline(always)]
pub fn bf16_encode(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    // Rounding must not carry a NaN's bits away: keep its upper half and make it quiet.
    (if x.is_nan() { bits >> 16 | 0x40 } else { rounded }) as u16
}

/// The value of a bfloat16 (exact).
#[inline(always)]
pub fn bf16_decode(code: u16) -> f32 {
    f32::from_bits(u32::from(code) << 16)
}

/// The value of an E8M0 scale code: 2^(code − 127).
#[inline(always)]
pub fn scale_decode(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        SCALE_NAN => f32::NAN,
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

/// The E8M0 code of the smallest 2^e with `amax ≤ max · 2^e`, `amax` being the largest magnitude of `x` or
/// `floor` if that is larger: e = ceil(log2(amax / max)).
#[inline(always)]
fn scale_encode(x: &[f32], max: f32, floor: f32) -> u8 {
    const FRACTION: u32 = (1 << 23) - 1;
    // Magnitudes order as their bits do; infinities and NaN come last.
    let amax = x.iter().fold(floor.to_bits(), |amax, x| amax.max(x.to_bits() & !(1 << 31)));
    if amax >= f32::INFINITY.to_bits() {
        return SCALE_NAN;
    }
    // A fraction above that of `max` carries into the exponent.
    let exponent = (amax + (FRACTION - (max.to_bits() & FRACTION))) >> 23;
    (exponent + 127 - (max.to_bits() >> 23)) as u8
}

/// 1 / scale, exact. The codes that `scale_encode` makes lie within 1..=253.
#[inline(always)]
fn scale_inverse(code: u8) -> f32 {
    f32::from_bits((254 - u32::from(code)) << 23)
}

/// E4M3 code of `x`, |x| ≤ 448: magnitudes below 2⁻⁶ are multiples of 2⁻⁹.
#[inline(always)]
fn e4m3_encode(x: f32) -> u8 {
    /// The last place of 2¹⁴ is 2⁻⁹: adding it rounds to the multiple of a subnormal.
    const ROUND_SUBNORMAL: f32 = 16384.0;
    let magnitude = x.to_bits() & !(1 << 31);
    let sign = x.to_bits() >> 24 & 0x80;
    let subnormal = (f32::from_bits(magnitude) + ROUND_SUBNORMAL).to_bits().wrapping_sub(ROUND_SUBNORMAL.to_bits());
    let rounded = magnitude + 0x7_ffff + (magnitude >> 20 & 1);
    let normal = (rounded >> 20).wrapping_sub((127 - 7) << 3);
    (sign | if magnitude < 0x3c80_0000 { subnormal } else { normal }) as u8
}

/// Value of an E4M3 code.
#[inline(always)]
fn e4m3_decode(code: u8) -> f32 {
    const REBIAS: u32 = (127 - 7) << 23;
    let sign = u32::from(code & 0x80) << 24;
    let magnitude = u32::from(code & 0x7f) << 20;
    // An exponent field of 0 is m · 2⁻⁹: put m below a 2⁻⁶ and take the 2⁻⁶ away.
    let subnormal = f32::from_bits(magnitude + REBIAS + (1 << 23)) - f32::from_bits(REBIAS + (1 << 23));
    let normal = if magnitude == 0x7f << 20 { f32::NAN.to_bits() } else { magnitude + REBIAS };
    f32::from_bits(sign | if magnitude < 8 << 20 { subnormal.to_bits() } else { normal })
}

/// E2M1 code of `x`: how many borders its magnitude is past. A border itself belongs to the even code.
#[inline(always)]
pub(crate) fn e2m1_encode(x: f32) -> u8 {
    let m = x.abs();
    let code = u8::from(m > 0.25)
        + u8::from(m >= 0.75)
        + u8::from(m > 1.25)
        + u8::from(m >= 1.75)
        + u8::from(m > 2.5)
        + u8::from(m >= 3.5)
        + u8::from(m > 5.0);
    code | u8::from(x.is_sign_negative()) << 3
}

/// Value of an E2M1 code.
#[inline(always)]
fn e2m1_decode(code: u8) -> f32 {
    const VALUES: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];
    VALUES[usize::from(code & 15)]
}

#[inline(always)]
fn fp8_encode_body<S: Simd>(_simd: S, x: &[f32; FP8_BLOCK]) -> (u8, [u8; FP8_BLOCK]) {
    let scale = scale_encode(x, FP8_MAX, FP8_FLOOR);
    if scale == SCALE_NAN {
        return (SCALE_NAN, [0; FP8_BLOCK]);
    }
    let inverse = scale_inverse(scale);
    (scale, x.map(|x| e4m3_encode((x * inverse).clamp(-FP8_MAX, FP8_MAX))))
}

#[inline(always)]
fn fp8_decode_body<S: Simd>(_simd: S, scale: u8, codes: &[u8; FP8_BLOCK], out: &mut [f32; FP8_BLOCK]) {
    let scale = scale_decode(scale);
    for (x, &code) in out.iter_mut().zip(codes) {
        *x = e4m3_decode(code) * scale;
    }
}

#[inline(always)]
fn fp4_encode_body<S: Simd>(_simd: S, x: &[f32; FP4_BLOCK]) -> (u8, [u8; FP4_BLOCK / 2]) {
    let scale = scale_encode(x, FP4_MAX, FP4_FLOOR);
    if scale == SCALE_NAN {
        return (SCALE_NAN, [0; FP4_BLOCK / 2]);
    }
    let inverse = scale_inverse(scale);
    let codes = x.map(|x| e2m1_encode(x * inverse));
    (scale, std::array::from_fn(|j| codes[2 * j] | codes[2 * j + 1] << 4))
}

#[inline(always)]
fn fp4_decode_body<S: Simd>(_simd: S, scale: u8, codes: &[u8; FP4_BLOCK / 2], out: &mut [f32; FP4_BLOCK]) {
    let scale = scale_decode(scale);
    for (x, &byte) in out.chunks_exact_mut(2).zip(codes) {
        x[0] = e2m1_decode(byte) * scale;
        x[1] = e2m1_decode(byte >> 4) * scale;
    }
}

#[inline(always)]
fn hadamard_body<S: Simd>(_simd: S, x: &mut [f32; HADAMARD]) {
    for distance in [1, 2, 4, 8, 16, 32, 64] {
        for pair in x.chunks_exact_mut(2 * distance) {
            let (low, high) = pair.split_at_mut(distance);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
    }
    /// 128^−½ to the nearest f32.
    const NORM: f32 = 0.088_388_346;
    for x in x {
        *x *= NORM;
    }
}
