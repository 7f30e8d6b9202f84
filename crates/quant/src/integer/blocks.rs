//! Weight blocks as whole numbers and a scale, and the dot of one block with an activation block: the definition.

use super::Rows;
use crate::blocks::*;
use crate::decode::mxfp4_scale;
use bytemuck::Pod;
#[cfg(target_arch = "x86_64")]
use {
    super::{avx2, avx512},
    crate::simd::{Avx2, Avx512},
    std::arch::x86_64::{__m128, __m256i, __m512, __m512i},
};

/// A weight block that has an integer dot.
pub trait IntegerDot: Pod {
    /// The activation block of the same length.
    type Activation;
    /// `sum` plus the dot of the block.
    fn add_dot(&self, x: &Self::Activation, sum: f32) -> f32;
}

/// 32 values: x = scale · code.
pub(super) trait ShortBlock: IntegerDot<Activation = ActivationQ8_0> {
    fn scale(&self) -> f32;
    fn codes(&self) -> [i8; 32];
    /// The codes in a register.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn register(&self, simd: Avx2) -> __m256i {
        avx2::load(simd, &self.codes())
    }
    /// What [`unsigned_512`](Self::unsigned_512) adds to a code.
    #[cfg(target_arch = "x86_64")]
    const OFFSET: u8;
    /// The codes, unsigned, in a register.
    #[cfg(target_arch = "x86_64")]
    fn unsigned_512(&self, simd: Avx512) -> __m256i;
    /// The scales of four blocks.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn scales_4(_: Avx2, blocks: [&Self; 4]) -> __m128 {
        avx2::floats(blocks.map(|block| block.scale()))
    }
    /// The scales of sixteen blocks.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn scales_16(simd: Avx512, blocks: [&Self; 16]) -> __m512 {
        avx512::floats(simd, blocks.map(|block| block.scale()))
    }
}

/// 256 values in sixteen sub-blocks j: x = d · FACTOR · `scales[j]` · code − dmin · `minimums[j]`.
pub(super) trait LongBlock: IntegerDot<Activation = ActivationQ8K> {
    /// A power of two.
    const FACTOR: f32 = 1.0;
    /// Whether codes may be negative.
    #[cfg(target_arch = "x86_64")]
    const SIGNED: bool;
    /// Whether there are minimums.
    const MINIMUMS: bool = false;
    /// Which rows meet, where few rows of activations do.
    const ROWS: Rows = Rows::Apart;
    fn d(&self) -> Half;
    fn scales(&self) -> [i8; 16];
    fn dmin(&self) -> Half {
        Half([0; 2])
    }
    fn minimums(&self) -> [i8; 16] {
        [0; 16]
    }
    fn codes(&self) -> [i8; QK_K];
    /// The codes in registers of 32.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn registers(&self, simd: Avx2) -> [__m256i; 8] {
        let codes = self.codes();
        std::array::from_fn(|g| avx2::load(simd, &codes.as_chunks().0[g]))
    }
    /// Where in the block the halves of each register of [`unsigned_512`](Self::unsigned_512) begin.
    #[cfg(target_arch = "x86_64")]
    const ORDER: [[usize; 2]; 4] = [[0, 32], [64, 96], [128, 160], [192, 224]];
    /// What [`unsigned_512`](Self::unsigned_512) adds to a code.
    #[cfg(target_arch = "x86_64")]
    const OFFSET: i32 = 0;
    /// Values that share a scale: 16 or 32.
    #[cfg(target_arch = "x86_64")]
    const SUB_BLOCK: usize = 16;
    /// The codes, unsigned, in registers of 64.
    #[cfg(target_arch = "x86_64")]
    fn unsigned_512(&self, simd: Avx512) -> [__m512i; 4];
    /// The dots of rows with few rows of activations.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn few_512(simd: Avx512, weights: &[Self], x: &[ActivationQ8K], batch: usize, out: &mut [f32]) {
        avx512::few(simd, weights, x, batch, out);
    }
}

/// Σ a·b.
fn dot_i8(a: &[i8], b: &[i8]) -> i32 {
    a.iter().zip(b).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum()
}

/// `sum + scale·d_x · Σ code·x`, the last step fused.
fn add_short(w: &impl ShortBlock, x: &ActivationQ8_0, sum: f32) -> f32 {
    (w.scale() * x.d).mul_add(dot_i8(&w.codes(), &x.q) as f32, sum)
}

/// `sum + d·d_x · Σ_j scale_j·Σ code·x − dmin·d_x · Σ_j minimum_j·Σ x`, both steps fused.
fn add_long<W: LongBlock>(w: &W, x: &ActivationQ8K, sum: f32) -> f32 {
    let codes = w.codes();
    let scaled = w.scales().into_iter().zip(codes.as_chunks::<16>().0).zip(x.q.as_chunks::<16>().0);
    let dot: i32 = scaled.map(|((scale, codes), x)| i32::from(scale) * dot_i8(codes, x)).sum();
    let sum = (w.d().to_f32() * W::FACTOR * x.d).mul_add(dot as f32, sum);
    if !W::MINIMUMS {
        return sum;
    }
    let minimums: i32 = w.minimums().iter().zip(x.sums).map(|(&m, sum)| i32::from(m) * i32::from(sum)).sum();
    (-(w.dmin().to_f32() * x.d)).mul_add(minimums as f32, sum)
}

impl ShortBlock for Q8_0 {
    #[inline(always)]
    fn scale(&self) -> f32 {
        self.d.to_f32()
    }
    #[inline(always)]
    fn codes(&self) -> [i8; 32] {
        self.q
    }
    #[cfg(target_arch = "x86_64")]
    const OFFSET: u8 = 128;
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn unsigned_512(&self, simd: Avx512) -> __m256i {
        avx512::flip(simd, &self.q)
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn scales_4(simd: Avx2, blocks: [&Q8_0; 4]) -> __m128 {
        avx2::scales(simd, blocks.map(|block| block.d))
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn scales_16(simd: Avx512, blocks: [&Q8_0; 16]) -> __m512 {
        avx512::scales(simd, blocks.map(|block| block.d))
    }
}

impl ShortBlock for Mxfp4 {
    #[inline(always)]
    fn scale(&self) -> f32 {
        mxfp4_scale(self.e)
    }
    #[inline(always)]
    fn codes(&self) -> [i8; 32] {
        self.codes()
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn register(&self, simd: Avx2) -> __m256i {
        avx2::look_up_nibbles(simd, &DOUBLED_E2M1, &self.q)
    }
    #[cfg(target_arch = "x86_64")]
    const OFFSET: u8 = 12;
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn unsigned_512(&self, simd: Avx512) -> __m256i {
        const UNSIGNED: [i8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];
        avx2::look_up_nibbles(simd.avx2(), &UNSIGNED, &self.q)
    }
}

/// One number for each 32 values as one for each 16.
#[inline(always)]
fn twice(numbers: [u8; 8]) -> [i8; 16] {
    std::array::from_fn(|j| numbers[j / 2] as i8)
}

impl LongBlock for Q2K {
    #[cfg(target_arch = "x86_64")]
    const SIGNED: bool = false;
    const MINIMUMS: bool = true;
    #[inline(always)]
    fn d(&self) -> Half {
        self.d
    }
    #[inline(always)]
    fn scales(&self) -> [i8; 16] {
        self.scales.map(|s| (s & 15) as i8)
    }
    #[inline(always)]
    fn dmin(&self) -> Half {
        self.dmin
    }
    #[inline(always)]
    fn minimums(&self) -> [i8; 16] {
        self.scales.map(|s| (s >> 4) as i8)
    }
    #[inline(always)]
    fn codes(&self) -> [i8; QK_K] {
        self.codes()
    }
    #[cfg(target_arch = "x86_64")]
    const ORDER: [[usize; 2]; 4] = avx512::PLANES;
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn unsigned_512(&self, simd: Avx512) -> [__m512i; 4] {
        avx512::planes(simd, &self.q)
    }
}

macro_rules! long_with_6_bit_minimums {
    ($block:ident, $unsigned_512:expr) => {
        impl LongBlock for $block {
            #[cfg(target_arch = "x86_64")]
            const SIGNED: bool = false;
            const MINIMUMS: bool = true;
            #[inline(always)]
            fn d(&self) -> Half {
                self.d
            }
            #[inline(always)]
            fn scales(&self) -> [i8; 16] {
                twice(scales_and_minimums(&self.scales).0)
            }
            #[inline(always)]
            fn dmin(&self) -> Half {
                self.dmin
            }
            #[inline(always)]
            fn minimums(&self) -> [i8; 16] {
                twice(scales_and_minimums(&self.scales).1)
            }
            #[inline(always)]
            fn codes(&self) -> [i8; QK_K] {
                self.codes()
            }
            #[cfg(target_arch = "x86_64")]
            const ORDER: [[usize; 2]; 4] = avx512::NIBBLES;
            #[cfg(target_arch = "x86_64")]
            const SUB_BLOCK: usize = 32;
            #[cfg(target_arch = "x86_64")]
            #[inline(always)]
            fn unsigned_512(&self, simd: Avx512) -> [__m512i; 4] {
                $unsigned_512(simd, self)
            }
        }
    };
}
long_with_6_bit_minimums!(Q4K, |simd, block: &Q4K| avx512::nibbles(simd, &block.q));
long_with_6_bit_minimums!(Q5K, avx512::q5_codes);

macro_rules! long_signed {
    ($block:ident, $scales:expr, $order:expr, $offset:literal, $unsigned_512:expr) => {
        impl LongBlock for $block {
            #[cfg(target_arch = "x86_64")]
            const SIGNED: bool = true;
            #[inline(always)]
            fn d(&self) -> Half {
                self.d
            }
            #[inline(always)]
            fn scales(&self) -> [i8; 16] {
                $scales(self)
            }
            #[inline(always)]
            fn codes(&self) -> [i8; QK_K] {
                self.codes()
            }
            #[cfg(target_arch = "x86_64")]
            const ORDER: [[usize; 2]; 4] = $order;
            #[cfg(target_arch = "x86_64")]
            const OFFSET: i32 = $offset;
            #[cfg(target_arch = "x86_64")]
            #[inline(always)]
            fn unsigned_512(&self, simd: Avx512) -> [__m512i; 4] {
                $unsigned_512(simd, self)
            }
        }
    };
}
long_signed!(Q3K, |block: &Q3K| q3_scales(&block.scales), avx512::PLANES, 4, avx512::q3_codes);
long_signed!(Q6K, |block: &Q6K| block.scales, [[0, 32], [64, 96], [128, 160], [192, 224]], 32, avx512::q6_codes);

/// x = d/8 · (2s + 1) · ±grid.
impl LongBlock for Iq2Xxs {
    const FACTOR: f32 = 0.125;
    const ROWS: Rows = Rows::Neighbours;
    #[cfg(target_arch = "x86_64")]
    const SIGNED: bool = true;
    #[inline(always)]
    fn d(&self) -> Half {
        self.d
    }
    #[inline(always)]
    fn scales(&self) -> [i8; 16] {
        twice(self.groups.map(|group| 2 * (group[7] >> 4) + 1))
    }
    #[inline(always)]
    fn codes(&self) -> [i8; QK_K] {
        self.codes()
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn registers(&self, simd: Avx2) -> [__m256i; 8] {
        avx2::iq2_registers(simd, &self.groups)
    }
    #[cfg(target_arch = "x86_64")]
    const OFFSET: i32 = 64;
    #[cfg(target_arch = "x86_64")]
    const SUB_BLOCK: usize = 32;
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn unsigned_512(&self, simd: Avx512) -> [__m512i; 4] {
        avx512::iq2_codes(simd, self)
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn few_512(simd: Avx512, weights: &[Iq2Xxs], x: &[ActivationQ8K], batch: usize, out: &mut [f32]) {
        avx512::few_iq2(simd, weights, x, batch, out);
    }
}

macro_rules! integer_dot {
    ($activation:ty, $add:ident: $($block:ident),*) => {
        $(
            impl IntegerDot for $block {
                type Activation = $activation;
                fn add_dot(&self, x: &$activation, sum: f32) -> f32 {
                    $add(self, x, sum)
                }
            }
        )*
    };
}
integer_dot!(ActivationQ8_0, add_short: Q8_0, Mxfp4);
integer_dot!(ActivationQ8K, add_long: Q2K, Q3K, Q4K, Q5K, Q6K, Iq2Xxs);
