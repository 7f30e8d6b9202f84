//! Integer dots: quantised weights times activations quantised to 8 bits (docs/spec/model.md §5.8). These are
//! the scalar definitions that vector kernels must match.
//!
//! Within a block all is exact in i32; a block's value is then made of f32 operations in a stated order, and the
//! values of a row are added in ascending order from 0. So the result does not depend on who computes it.

use crate::blocks::*;
use crate::decode::mxfp4_scale;
use crate::iq2_grid::{GRID, sign_bits};
use bytemuck::Pod;

/// A weight block that has an integer dot.
pub trait IntegerDot: Pod {
    /// The activation block of the same length.
    type Activation;
    /// The dot of one block.
    fn dot_block(&self, x: &Self::Activation) -> f32;
}

/// The dot of a row of weight blocks and as many activation blocks.
pub fn dot<W: IntegerDot>(row: &[W], x: &[W::Activation]) -> f32 {
    assert!(row.len() == x.len(), "a dot of {} and {} blocks", row.len(), x.len());
    row.iter().zip(x).fold(0.0, |acc, (w, x)| acc + w.dot_block(x))
}

/// Quantises activations per 32: d = amax/127, q = round(x · (1/d)) to nearest, ties to even. A block with an
/// infinity or a NaN gets the scale NaN, and so does every dot with it.
///
/// Panics if `x` does not fill `out`.
pub fn quantize_q8_0(x: &[f32], out: &mut [ActivationQ8_0]) {
    let (blocks, rest) = x.as_chunks::<32>();
    assert!(rest.is_empty() && blocks.len() == out.len(), "{} values for {} blocks of 32", x.len(), out.len());
    for (x, out) in blocks.iter().zip(out) {
        let d = largest(x).abs() / 127.0;
        *out = ActivationQ8_0 { d, q: codes(x, if d == 0.0 { 0.0 } else { 1.0 / d }) };
    }
}

/// Quantises activations per 256: with M the value of largest magnitude (the first of equals), the factor is
/// −127/M, q = round(x · factor) to nearest, ties to even, and d = 1/factor. Infinities and NaN as in
/// [`quantize_q8_0`].
///
/// Panics if `x` does not fill `out`.
pub fn quantize_q8_k(x: &[f32], out: &mut [ActivationQ8K]) {
    let (blocks, rest) = x.as_chunks::<QK_K>();
    assert!(rest.is_empty() && blocks.len() == out.len(), "{} values for {} blocks of 256", x.len(), out.len());
    for (x, out) in blocks.iter().zip(out) {
        let m = largest(x);
        let factor = if m == 0.0 { 0.0 } else { -127.0 / m };
        let q = codes(x, factor);
        let sums = std::array::from_fn(|j| q[16 * j..][..16].iter().map(|&q| i16::from(q)).sum());
        *out = ActivationQ8K { d: if m == 0.0 { 0.0 } else { 1.0 / factor }, q, sums };
    }
}

/// The value of largest magnitude, the first of equals; NaN if any value is not finite.
fn largest(x: &[f32]) -> f32 {
    let mut largest = 0f32;
    for &x in x {
        if !x.is_finite() {
            return f32::NAN;
        }
        if x.abs() > largest.abs() {
            largest = x;
        }
    }
    largest
}

/// round(x · factor); NaN gives 0.
fn codes<const N: usize>(x: &[f32; N], factor: f32) -> [i8; N] {
    x.map(|x| (x * factor).round_ties_even().clamp(-128.0, 127.0) as i8)
}

/// Σ a·b.
fn dot_i8(a: &[i8], b: &[i8]) -> i32 {
    a.iter().zip(b).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum()
}

/// Σ over sub-blocks of scale · Σ q·x.
fn scaled_dot<const SUBS: usize>(codes: &[i8; QK_K], scales: [i32; SUBS], x: &[i8; QK_K]) -> i32 {
    let sub = QK_K / SUBS;
    scales.iter().zip(codes.chunks_exact(sub).zip(x.chunks_exact(sub))).map(|(s, (q, x))| s * dot_i8(q, x)).sum()
}

impl IntegerDot for Q8_0 {
    type Activation = ActivationQ8_0;
    /// d·d_x · Σ q·x
    fn dot_block(&self, x: &ActivationQ8_0) -> f32 {
        self.d.to_f32() * x.d * dot_i8(&self.q, &x.q) as f32
    }
}

impl IntegerDot for Mxfp4 {
    type Activation = ActivationQ8_0;
    /// 2^(e − 128)·d_x · Σ q·x, q the doubled values
    fn dot_block(&self, x: &ActivationQ8_0) -> f32 {
        mxfp4_scale(self.e) * x.d * dot_i8(&self.codes(), &x.q) as f32
    }
}

impl IntegerDot for Q2K {
    type Activation = ActivationQ8K;
    /// d·d_x · Σ scale·Σ q·x − dmin·d_x · Σ min·Σ x
    fn dot_block(&self, x: &ActivationQ8K) -> f32 {
        let dot = scaled_dot(&self.codes(), self.scales.map(|s| i32::from(s & 15)), &x.q);
        let minimums: i32 = self.scales.iter().zip(x.sums).map(|(s, sum)| i32::from(s >> 4) * i32::from(sum)).sum();
        self.d.to_f32() * x.d * dot as f32 - self.dmin.to_f32() * x.d * minimums as f32
    }
}

impl IntegerDot for Q3K {
    type Activation = ActivationQ8K;
    /// d·d_x · Σ scale·Σ q·x
    fn dot_block(&self, x: &ActivationQ8K) -> f32 {
        let dot = scaled_dot(&self.codes(), q3_scales(&self.scales).map(i32::from), &x.q);
        self.d.to_f32() * x.d * dot as f32
    }
}

/// d·d_x · Σ scale·Σ q·x − dmin·d_x · Σ min·Σ x for eight sub-blocks of 32.
fn dot_q4_q5(d: Half, dmin: Half, packed: &[u8; 12], codes: &[i8; QK_K], x: &ActivationQ8K) -> f32 {
    let (scales, minimums) = scales_and_minimums(packed);
    let dot = scaled_dot(codes, scales.map(i32::from), &x.q);
    let sums = x.sums.as_chunks::<2>().0.iter().map(|[a, b]| i32::from(*a) + i32::from(*b));
    let minimums: i32 = minimums.iter().zip(sums).map(|(&m, sum)| i32::from(m) * sum).sum();
    d.to_f32() * x.d * dot as f32 - dmin.to_f32() * x.d * minimums as f32
}

impl IntegerDot for Q4K {
    type Activation = ActivationQ8K;
    /// As [`Q2K`], with sub-blocks of 32.
    fn dot_block(&self, x: &ActivationQ8K) -> f32 {
        dot_q4_q5(self.d, self.dmin, &self.scales, &self.codes(), x)
    }
}

impl IntegerDot for Q5K {
    type Activation = ActivationQ8K;
    /// As [`Q4K`].
    fn dot_block(&self, x: &ActivationQ8K) -> f32 {
        dot_q4_q5(self.d, self.dmin, &self.scales, &self.codes(), x)
    }
}

impl IntegerDot for Q6K {
    type Activation = ActivationQ8K;
    /// d·d_x · Σ scale·Σ q·x
    fn dot_block(&self, x: &ActivationQ8K) -> f32 {
        let dot = scaled_dot(&self.codes(), self.scales.map(i32::from), &x.q);
        self.d.to_f32() * x.d * dot as f32
    }
}

impl IntegerDot for Iq2Xxs {
    type Activation = ActivationQ8K;
    /// d·d_x/8 · Σ (2s + 1)·Σ ±grid·x
    fn dot_block(&self, x: &ActivationQ8K) -> f32 {
        let mut dot = 0;
        for (group, x) in self.groups.iter().zip(x.q.as_chunks::<32>().0) {
            let [indices @ .., s0, s1, s2, s3] = *group;
            let word = u32::from_le_bytes([s0, s1, s2, s3]);
            let mut sum = 0;
            for (l, x) in x.as_chunks::<8>().0.iter().enumerate() {
                let signs = sign_bits((word >> (7 * l) & 127) as u8);
                for (j, (&v, &x)) in GRID[usize::from(indices[l])].iter().zip(x).enumerate() {
                    let product = i32::from(v) * i32::from(x);
                    sum += if signs >> j & 1 == 1 { -product } else { product };
                }
            }
            dot += (2 * (word >> 28) + 1) as i32 * sum;
        }
        0.125 * self.d.to_f32() * x.d * dot as f32
    }
}
