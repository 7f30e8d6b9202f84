//! Block layouts, in one place: what the bytes of each format are. All fields are bytes or arrays of bytes, so a
//! block has alignment 1 and its size is the sum of its fields. Numbers are little endian.
//!
//! How a value is made of these fields stands in `decode.rs` (docs/spec/model.md §5).

use crate::iq2_grid::{GRID, SIGNS};
use bytemuck::{Pod, Zeroable};
use gguf::TensorType;

/// Elements of a super-block (K and IQ formats, activation block Q8_K).
pub const QK_K: usize = 256;

/// A half-precision float as stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct Half(pub [u8; 2]);

impl Half {
    /// The value as f32 (exact).
    #[inline(always)]
    pub fn to_f32(self) -> f32 {
        half_to_f32(u16::from_le_bytes(self.0))
    }

    /// `value` rounded to nearest, ties to even.
    pub fn from_f32(value: f32) -> Half {
        Half(half::f16::from_f32(value).to_le_bytes())
    }
}

/// An IEEE half's bits as f32, exactly, in branch-free operations that vectorise.
#[inline(always)]
fn half_to_f32(bits: u16) -> f32 {
    const REBIAS: u32 = (127 - 15) << 23;
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff) << 13;
    // An exponent field of 0 is m · 2^-24: put m below a 2^-14 and take the 2^-14 away.
    let subnormal = f32::from_bits(magnitude + REBIAS + (1 << 23)) - f32::from_bits(REBIAS + (1 << 23));
    let normal = magnitude + REBIAS + if magnitude >= 0x7c00 << 13 { REBIAS } else { 0 };
    let value = if magnitude < 0x0400 << 13 { subnormal.to_bits() } else { normal };
    f32::from_bits(value | sign)
}

macro_rules! block {
    ($(#[$doc:meta])* $name:ident: $tensor_type:ident, $elements:expr, $bytes:literal { $($(#[$field_doc:meta])* $field:ident: $ty:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $ty,)* }

        impl $name {
            /// The GGUF type of this block.
            pub const TYPE: TensorType = TensorType::$tensor_type;
            /// Values in a block.
            pub const ELEMENTS: usize = $elements;
        }

        const _: () = assert!(size_of::<$name>() == $bytes && align_of::<$name>() == 1);
    };
}

block! {
    /// One f32.
    F32: F32, 1, 4 {
        /// The value.
        value: [u8; 4],
    }
}
block! {
    /// One half-precision float.
    F16: F16, 1, 2 {
        /// The value.
        value: Half,
    }
}
block! {
    /// One bfloat16: the upper half of an f32.
    Bf16: Bf16, 1, 2 {
        /// The value.
        value: [u8; 2],
    }
}
block! {
    /// 8 bits per value, one scale: x = d·q.
    Q8_0: Q8_0, 32, 34 {
        /// Scale.
        d: Half,
        /// Signed codes.
        q: [i8; 32],
    }
}
block! {
    /// 2 bits per value, 16 sub-blocks of 16 with a 4-bit scale and minimum: x = d·scale·q − dmin·min.
    Q2K: Q2K, QK_K, 84 {
        /// Sub-block scale (low nibble) and minimum (high nibble).
        scales: [u8; 16],
        /// Element 128h + 32g + l at bits 2g of byte 32h + l.
        q: [u8; 64],
        /// Scale of the scales.
        d: Half,
        /// Scale of the minimums.
        dmin: Half,
    }
}
block! {
    /// 3 bits per value, 16 sub-blocks of 16 with a 6-bit scale: x = d·(scale − 32)·(q − 4).
    Q3K: Q3K, QK_K, 110 {
        /// Bit 2 of the codes: element 32k + l at bit k of byte l.
        high: [u8; 32],
        /// Bits 0 and 1 of the codes: element 128h + 32g + l at bits 2g of byte 32h + l.
        q: [u8; 64],
        /// 6-bit scales: bits 0–3 in nibbles of bytes 0–7, bits 4–5 in bytes 8–11.
        scales: [u8; 12],
        /// Scale of the scales.
        d: Half,
    }
}
block! {
    /// 4 bits per value, 8 sub-blocks of 32 with a 6-bit scale and minimum: x = d·scale·q − dmin·min.
    Q4K: Q4K, QK_K, 144 {
        /// Scale of the scales.
        d: Half,
        /// Scale of the minimums.
        dmin: Half,
        /// 6-bit scales and minimums, packed: see `scales_and_minimums`.
        scales: [u8; 12],
        /// Element 64p + l in the low, 64p + 32 + l in the high nibble of byte 32p + l.
        q: [u8; 128],
    }
}
block! {
    /// 5 bits per value, otherwise as [`Q4K`].
    Q5K: Q5K, QK_K, 176 {
        /// Scale of the scales.
        d: Half,
        /// Scale of the minimums.
        dmin: Half,
        /// 6-bit scales and minimums, packed as in [`Q4K`].
        scales: [u8; 12],
        /// Bit 4 of the codes: element 32k + l at bit k of byte l.
        high: [u8; 32],
        /// Bits 0–3 of the codes, as in [`Q4K`].
        q: [u8; 128],
    }
}
block! {
    /// 6 bits per value, 16 sub-blocks of 16 with an 8-bit scale: x = d·scale·(q − 32).
    Q6K: Q6K, QK_K, 210 {
        /// Bits 0–3: element 128h + 32k + l in byte 64h + 32(k mod 2) + l, low nibble for k < 2.
        low: [u8; 128],
        /// Bits 4–5: element 128h + 32k + l at bits 2k of byte 32h + l.
        high: [u8; 64],
        /// Signed sub-block scales.
        scales: [i8; 16],
        /// Scale of the scales.
        d: Half,
    }
}
block! {
    /// Groups of 32 = 4 code-book points of 8 magnitudes, 4 sign patterns and a 4-bit scale.
    Iq2Xxs: Iq2Xxs, QK_K, 66 {
        /// Scale.
        d: Half,
        /// Per group: four code-book indices, then a u32: 7-bit sign patterns at bits 0, 7, 14, 21, scale at 28.
        groups: [[u8; 8]; 8],
    }
}
block! {
    /// OCP MXFP4: one power-of-two scale, 4-bit floats (E2M1): x = 2^(e−128)·{0,1,2,3,4,6,8,12}, bit 3 the sign.
    Mxfp4: Mxfp4, 32, 17 {
        /// Scale exponent (E8M0).
        e: u8,
        /// Element j in the low, element j + 16 in the high nibble of byte j.
        q: [u8; 16],
    }
}

/// Activations quantised per 32 for the integer dots with Q8_0 and MXFP4 weights: x = d·q. Lives in memory only.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct ActivationQ8_0 {
    /// Scale.
    pub d: f32,
    /// Codes.
    pub q: [i8; 32],
    /// Sum of the codes.
    pub sum: i32,
}

/// Activations quantised per 256 for the integer dots with K and IQ weights: x = d·q. Lives in memory only.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct ActivationQ8K {
    /// Scale.
    pub d: f32,
    /// Codes.
    pub q: [i8; QK_K],
    /// Sums of 16 codes each.
    pub sums: [i16; QK_K / 16],
}

const _: () = assert!(size_of::<ActivationQ8_0>() == 40 && size_of::<ActivationQ8K>() == 292);

/// The blocks that `bytes` are. Panics if they are not whole blocks.
pub fn view<B: Pod>(bytes: &[u8]) -> &[B] {
    assert!(align_of::<B>() == 1, "blocks of a file are bytes");
    bytemuck::cast_slice(bytes)
}

/// Point `index` of the code book of IQ2_XXS: eight magnitudes, a byte each.
pub fn iq2_point(index: u8) -> [u8; 8] {
    GRID[usize::from(index)].map(|magnitude| magnitude as u8)
}

/// The 6-bit scales and minimums of the eight sub-blocks of a [`Q4K`] or [`Q5K`] block.
#[inline(always)]
pub fn scales_and_minimums(packed: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let [scales, minimums, rest] = words(packed);
    let upper = |word: u32| word >> 2 & 0x3030_3030;
    let scales = [scales & 0x3f3f_3f3f, (rest & 0x0f0f_0f0f) | upper(scales)];
    let minimums = [minimums & 0x3f3f_3f3f, (rest >> 4 & 0x0f0f_0f0f) | upper(minimums)];
    (bytemuck::cast(scales.map(u32::to_le_bytes)), bytemuck::cast(minimums.map(u32::to_le_bytes)))
}

/// The signed scales (−32 taken away) of the sixteen sub-blocks of a [`Q3K`] block.
#[inline(always)]
pub fn q3_scales(packed: &[u8; 12]) -> [i8; 16] {
    let [first, second, high] = words(packed);
    let low = [first, second, first >> 4, second >> 4];
    let scales: [u32; 4] = std::array::from_fn(|i| (low[i] & 0x0f0f_0f0f) | (high >> (2 * i) & 0x0303_0303) << 4);
    bytemuck::cast::<_, [u8; 16]>(scales.map(u32::to_le_bytes)).map(|scale| scale as i8 - 32)
}

/// Four bytes at a time.
#[inline(always)]
fn words(packed: &[u8; 12]) -> [u32; 3] {
    bytemuck::cast::<_, [[u8; 4]; 3]>(*packed).map(u32::from_le_bytes)
}

// The integer codes of a block in element order, offset taken away: the part that the dequantising and the
// integer dots share. Loops over 32 bytes with one shift: they vectorise.

/// The 2-bit codes of 64 bytes: element 128h + 32g + l from bits 2g of byte 32h + l.
#[inline(always)]
fn planes(packed: &[u8; 64]) -> [i8; QK_K] {
    let mut codes = [0; QK_K];
    for (j, codes) in codes.chunks_exact_mut(32).enumerate() {
        for (code, &byte) in codes.iter_mut().zip(&packed[32 * (j / 4)..][..32]) {
            *code = (byte >> (2 * (j % 4)) & 3) as i8;
        }
    }
    codes
}

/// The 4-bit codes of 128 bytes: element 64p + l from the low, 64p + 32 + l from the high nibble of byte 32p + l.
#[inline(always)]
fn nibbles(packed: &[u8; 128]) -> [i8; QK_K] {
    let mut codes = [0; QK_K];
    for (j, codes) in codes.chunks_exact_mut(32).enumerate() {
        for (code, &byte) in codes.iter_mut().zip(&packed[32 * (j / 2)..][..32]) {
            *code = (byte >> (4 * (j % 2)) & 15) as i8;
        }
    }
    codes
}

impl Q2K {
    /// Codes 0..=3.
    #[inline(always)]
    pub(crate) fn codes(&self) -> [i8; QK_K] {
        planes(&self.q)
    }
}

impl Q3K {
    /// Codes −4..=3.
    #[inline(always)]
    pub(crate) fn codes(&self) -> [i8; QK_K] {
        let mut codes = planes(&self.q);
        for (j, codes) in codes.chunks_exact_mut(32).enumerate() {
            for (code, &high) in codes.iter_mut().zip(&self.high) {
                *code |= ((high >> j & 1) << 2) as i8;
                *code -= 4;
            }
        }
        codes
    }
}

impl Q4K {
    /// Codes 0..=15.
    #[inline(always)]
    pub(crate) fn codes(&self) -> [i8; QK_K] {
        nibbles(&self.q)
    }
}

impl Q5K {
    /// Codes 0..=31.
    #[inline(always)]
    pub(crate) fn codes(&self) -> [i8; QK_K] {
        let mut codes = nibbles(&self.q);
        for (j, codes) in codes.chunks_exact_mut(32).enumerate() {
            for (code, &high) in codes.iter_mut().zip(&self.high) {
                *code |= ((high >> j & 1) << 4) as i8;
            }
        }
        codes
    }
}

impl Q6K {
    /// Codes −32..=31.
    #[inline(always)]
    pub(crate) fn codes(&self) -> [i8; QK_K] {
        let mut codes = planes(&self.high);
        for (j, codes) in codes.chunks_exact_mut(32).enumerate() {
            let (half, group) = (j / 4, j % 4);
            let low = &self.low[64 * half + 32 * (group % 2)..][..32];
            for (code, &low) in codes.iter_mut().zip(low) {
                *code = (*code << 4 | (low >> (4 * (group / 2)) & 15) as i8) - 32;
            }
        }
        codes
    }
}

impl Iq2Xxs {
    /// Magnitudes 8, 25 and 43 under their signs.
    #[inline(always)]
    pub(crate) fn codes(&self) -> [i8; QK_K] {
        let mut codes = [0; QK_K];
        for (i, codes) in codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let [points @ .., s0, s1, s2, s3] = self.groups[i / 4];
            let pattern = u32::from_le_bytes([s0, s1, s2, s3]) >> (7 * (i % 4)) & 127;
            let (magnitudes, signs) = (GRID[usize::from(points[i % 4])], SIGNS[pattern as usize]);
            *codes = std::array::from_fn(|j| magnitudes[j] * signs[j]);
        }
        codes
    }
}

impl Mxfp4 {
    /// Doubled E2M1 values, −12..=12.
    #[inline(always)]
    pub(crate) fn codes(&self) -> [i8; 32] {
        let mut codes = [0; 32];
        for (j, &byte) in self.q.iter().enumerate() {
            codes[j] = doubled_e2m1(byte & 15);
            codes[j + 16] = doubled_e2m1(byte >> 4);
        }
        codes
    }
}

/// Twice the value of an E2M1 code: 0, 1, 2, 3, 4, 6, 8, 12, bit 3 the sign. Arithmetic, for it vectorises.
#[inline(always)]
pub(crate) fn doubled_e2m1(code: u8) -> i8 {
    let m = code & 7;
    let magnitude = (m + m.saturating_sub(4) + 2 * (m / 7)) as i8;
    if code < 8 { magnitude } else { -magnitude }
}

/// [`doubled_e2m1`] of every code.
#[cfg(target_arch = "x86_64")]
pub(crate) const DOUBLED_E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_the_containers() {
        macro_rules! check {
            ($($name:ident),*) => {
                $(
                    let block = $name::TYPE.block().unwrap();
                    assert_eq!(block.elements, $name::ELEMENTS as u64, "{}", $name::TYPE);
                    assert_eq!(block.bytes, size_of::<$name>() as u64, "{}", $name::TYPE);
                )*
            };
        }
        check!(F32, F16, Bf16, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K, Iq2Xxs, Mxfp4);
    }

    #[test]
    fn every_half_converts_exactly() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (half_to_f32(bits), half::f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(), "{bits:#06x}");
        }
    }
}
