//! Element by element work between the products: plain loops, which the compiler turns into each instruction set's
//! vectors, with the same bits on all of them. Panics where the machine does not have the level asked for.

use crate::math;
use crate::simd::{Simd, kernel};

kernel! {
    /// `x · factor` in place.
    pub fn scale_at(x: &mut [f32], factor: f32) = scale_body
}
kernel! {
    /// `x · factor · w` in place, multiplied in this order.
    ///
    /// Panics if `w` is not as long as `x`.
    pub fn scale_by_at(x: &mut [f32], factor: f32, w: &[f32]) = scale_by_body
}
kernel! {
    /// Adds `v` to `sum`.
    ///
    /// Panics if they are not of one length.
    pub fn add_at(sum: &mut [f32], v: &[f32]) = add_body
}
kernel! {
    /// The largest of the values that are numbers; −∞ if there is none.
    pub fn largest_at(x: &[f32]) -> f32 = largest_body
}
kernel! {
    /// `exp(x · factor − shift)` in place.
    pub fn exp_of_at(x: &mut [f32], factor: f32, shift: f32) = exp_of_body
}
kernel! {
    /// `silu(min(gate, limit)) · clamp(up, ±limit) · weight`, into `gate`. NaN stays NaN.
    ///
    /// Panics if `up` is not as long as `gate`.
    pub fn swiglu_at(gate: &mut [f32], up: &[f32], limit: f32, weight: f32) = swiglu_body
}
kernel! {
    /// Rotates neighbouring pairs of `tail` forward by the angles whose `(cos, sin)` is given.
    pub fn rotate, rotate_at(tail: &mut [f32], rotation: &[(f32, f32)]) = rotate_body
}
kernel! {
    /// Undoes [`rotate`].
    pub fn rotate_back, rotate_back_at(tail: &mut [f32], rotation: &[(f32, f32)]) = rotate_back_body
}
kernel! {
    /// `scores[i] = Σ_h weights[h] · max(0, dots[h][i])`, h ascending from 0, one fused multiply-add each; a NaN stays one.
    ///
    /// Panics if `dots` is not as many rows of `scores.len()` as there are weights.
    pub fn rectified_sums_at(weights: &[f32], dots: &[f32], scores: &mut [f32]) = rectified_sums_body
}

#[inline(always)]
fn scale_body<S: Simd>(_simd: S, x: &mut [f32], factor: f32) {
    x.iter_mut().for_each(|x| *x *= factor);
}

#[inline(always)]
fn scale_by_body<S: Simd>(_simd: S, x: &mut [f32], factor: f32, w: &[f32]) {
    assert!(x.len() == w.len(), "{} values and {} weights", x.len(), w.len());
    x.iter_mut().zip(w).for_each(|(x, w)| *x = *x * factor * w);
}

#[inline(always)]
fn add_body<S: Simd>(_simd: S, sum: &mut [f32], v: &[f32]) {
    assert!(sum.len() == v.len(), "{} and {} values", sum.len(), v.len());
    sum.iter_mut().zip(v).for_each(|(sum, v)| *sum += v);
}

#[inline(always)]
fn largest_body<S: Simd>(_simd: S, x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for chunk in chunks.iter().map(<[f32; 16]>::as_slice).chain([rest]) {
        lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane = lane.max(*x));
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

#[inline(always)]
fn exp_of_body<S: Simd>(_simd: S, x: &mut [f32], factor: f32, shift: f32) {
    x.iter_mut().for_each(|x| *x = math::exp(*x * factor - shift));
}

#[inline(always)]
fn swiglu_body<S: Simd>(_simd: S, gate: &mut [f32], up: &[f32], limit: f32, weight: f32) {
    assert!(gate.len() == up.len(), "{} gates and {} values", gate.len(), up.len());
    for (gate, up) in gate.iter_mut().zip(up) {
        // Not `f32::min`, which would turn the NaN of a damaged weight into a good-looking number.
        let limited = if *gate > limit { limit } else { *gate };
        *gate = math::silu(limited) * up.clamp(-limit, limit) * weight;
    }
}

#[inline(always)]
fn rotate_body<S: Simd>(_simd: S, tail: &mut [f32], rotation: &[(f32, f32)]) {
    for (pair, &(cos, sin)) in tail.as_chunks_mut::<2>().0.iter_mut().zip(rotation) {
        *pair = [pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos];
    }
}

#[inline(always)]
fn rotate_back_body<S: Simd>(_simd: S, tail: &mut [f32], rotation: &[(f32, f32)]) {
    for (pair, &(cos, sin)) in tail.as_chunks_mut::<2>().0.iter_mut().zip(rotation) {
        *pair = [pair[0] * cos + pair[1] * sin, pair[1] * cos - pair[0] * sin];
    }
}

#[inline(always)]
fn rectified_sums_body<S: Simd>(_simd: S, weights: &[f32], dots: &[f32], scores: &mut [f32]) {
    let keys = scores.len();
    assert!(dots.len() == weights.len() * keys, "{} dots of {} heads and {keys} keys", dots.len(), weights.len());
    scores.fill(0.0);
    for (&weight, dots) in weights.iter().zip(dots.chunks_exact(keys.max(1))) {
        for (score, &dot) in scores.iter_mut().zip(dots) {
            // Not `f32::max`, which would turn the NaN of a damaged weight into 0.
            *score = weight.mul_add(if dot < 0.0 { 0.0 } else { dot }, *score);
        }
    }
}
