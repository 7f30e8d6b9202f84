//! Q2_K and Q4_K: x̂ = d·scale·q − dmin·min, with small integers per sub-block and d, dmin per super-block.
//!
//! First every sub-block is fitted alone with real numbers. Then, in turn: each sub-block takes the best integers
//! near where it is (its codes following by rounding), and d and dmin take the least-squares solution for the
//! integers. The best state met is kept, all zeros among them.

use super::{round, scale_to_half, total};
use crate::blocks::*;

/// How far from where it is a sub-block looks for better integers, round by round.
const REACH: [i32; 4] = [2, 1, 1, 1];

#[inline(always)]
pub(super) fn q2_k(x: &[f32; QK_K], weights: &[f32; QK_K]) -> Q2K {
    let fit = fit::<16, 16>(x, weights, 3.0, 15.0);
    let mut q = [0; 64];
    for (i, code) in fit.codes.iter().enumerate() {
        q[32 * (i / 128) + i % 32] |= code << (2 * (i % 128 / 32));
    }
    let scales = std::array::from_fn(|j| fit.scales[j] | fit.minimums[j] << 4);
    Q2K { scales, q, d: fit.d, dmin: fit.dmin }
}

#[inline(always)]
pub(super) fn q4_k(x: &[f32; QK_K], weights: &[f32; QK_K]) -> Q4K {
    let fit = fit::<32, 8>(x, weights, 15.0, 63.0);
    let q = std::array::from_fn(|i| fit.codes[64 * (i / 32) + i % 32] | fit.codes[64 * (i / 32) + 32 + i % 32] << 4);
    let (s, m) = (fit.scales, fit.minimums);
    let scales = std::array::from_fn(|i| match i {
        0..4 => s[i] | s[i + 4] >> 4 << 6,
        4..8 => m[i - 4] | m[i] >> 4 << 6,
        _ => (s[i - 4] & 15) | (m[i - 4] & 15) << 4,
    });
    Q4K { d: fit.d, dmin: fit.dmin, scales, q }
}

/// A super-block of `SUBS` sub-blocks.
#[derive(Clone)]
struct Fit<const SUBS: usize> {
    d: Half,
    dmin: Half,
    scales: [u8; SUBS],
    minimums: [u8; SUBS],
    codes: [u8; QK_K],
    error: f32,
}

/// Fits a super-block with codes 0..=`q_max` and integer scales and minimums 0..=`s_max`.
#[inline(always)]
fn fit<const SUB: usize, const SUBS: usize>(
    x: &[f32; QK_K],
    weights: &[f32; QK_K],
    q_max: f32,
    s_max: f32,
) -> Fit<SUBS> {
    let (subs, _) = x.as_chunks::<SUB>();
    let (sub_weights, _) = weights.as_chunks::<SUB>();
    let alone: [(f32, f32); SUBS] = std::array::from_fn(|j| fit_alone(&subs[j], &sub_weights[j], q_max));
    let largest = alone.iter().fold((0f32, 0f32), |a, b| (a.0.max(b.0), a.1.max(b.1)));
    let (mut d, mut dmin) = (scale_to_half(largest.0 / s_max), scale_to_half(largest.1 / s_max));
    let nearest = |value: f32, unit: Half| match unit.to_f32() {
        0.0 => 0.0,
        unit => round((value / unit).min(s_max)),
    };
    let mut integers = alone.map(|(scale, minimum)| (nearest(scale, d), nearest(minimum, dmin)));

    // Zeros are the first state met, so that nothing worse is kept.
    let (scales, minimums, codes) = ([0; SUBS], [0; SUBS], [0; QK_K]);
    let error = total::<QK_K>(|i| weights[i] * x[i] * x[i]);
    let mut best = Fit { d: Half([0; 2]), dmin: Half([0; 2]), scales, minimums, codes, error };
    for reach in REACH {
        let (unit, unit_min) = (d.to_f32(), dmin.to_f32());
        let mut codes = [0.0; QK_K];
        let mut error = 0.0;
        for (j, codes) in codes.as_chunks_mut::<SUB>().0.iter_mut().enumerate() {
            let near =
                |center: f32| (-reach..=reach).map(move |k| center + k as f32).filter(|&s| (0.0..=s_max).contains(&s));
            let (x, weights) = (&subs[j], &sub_weights[j]);
            let mut lowest = f32::INFINITY;
            let (center, center_min) = integers[j];
            for (scale, minimum) in near(center).flat_map(|s| near(center_min).map(move |m| (s, m))) {
                let (candidate, error) = encode(x, weights, unit * scale, unit_min * minimum, q_max);
                if error < lowest {
                    (lowest, integers[j], *codes) = (error, (scale, minimum), candidate);
                }
            }
            error += lowest;
        }
        if error < best.error {
            best = Fit {
                d,
                dmin,
                scales: integers.map(|i| i.0 as u8),
                minimums: integers.map(|i| i.1 as u8),
                codes: codes.map(|q| q as u8),
                error,
            };
        }
        let a: [f32; QK_K] = std::array::from_fn(|i| integers[i / SUB].0 * codes[i]);
        let b: [f32; QK_K] = std::array::from_fn(|i| integers[i / SUB].1);
        let (scale, minimum) = least_squares(x, weights, &a, &b);
        (d, dmin) = (scale_to_half(scale), scale_to_half(minimum));
    }
    best
}

/// Scale and minimum of one sub-block in real numbers: the best of a row of first guesses at the scale, each
/// followed by one least-squares step.
#[inline(always)]
fn fit_alone<const N: usize>(x: &[f32; N], weights: &[f32; N], q_max: f32) -> (f32, f32) {
    let low = x.iter().fold(0f32, |a, &b| a.min(b));
    let high = x.iter().fold(low, |a, &b| a.max(b));
    if high == low {
        return (0.0, -low);
    }
    let mut best = (f32::INFINITY, (0.0, 0.0));
    for step in 0..=16 {
        let guess = (high - low) / (q_max + 0.125 * (step - 10) as f32);
        let (codes, _) = encode(x, weights, guess, -low, q_max);
        let (scale, minimum) = least_squares(x, weights, &codes, &[1.0; N]);
        let (_, error) = encode(x, weights, scale, minimum, q_max);
        if error < best.0 {
            best = (error, (scale, minimum));
        }
    }
    best.1
}

/// The nearest codes of a sub-block and their weighted squared error.
#[inline(always)]
fn encode<const N: usize>(x: &[f32; N], weights: &[f32; N], scale: f32, minimum: f32, q_max: f32) -> ([f32; N], f32) {
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let codes = x.map(|x| round(((x + minimum) * inverse).clamp(0.0, q_max)));
    let error = total::<N>(|i| {
        let difference = x[i] - (scale * codes[i] - minimum);
        weights[i] * difference * difference
    });
    (codes, error)
}

/// (s, m), neither negative, that minimise Σ w·(x − s·a + m·b)².
#[inline(always)]
fn least_squares<const N: usize>(x: &[f32; N], w: &[f32; N], a: &[f32; N], b: &[f32; N]) -> (f32, f32) {
    let sum = |f: &[f32; N], g: &[f32; N]| f64::from(total::<N>(|i| w[i] * f[i] * g[i]));
    let (aa, ab, bb, ax, bx) = (sum(a, a), sum(a, b), sum(b, b), sum(a, x), sum(b, x));
    let ratio = |p: f64, q: f64| if q > 0.0 { (p / q).max(0.0) } else { 0.0 };
    let determinant = aa * bb - ab * ab;
    if determinant > 1e-6 * aa * bb {
        let (s, m) = ((ax * bb - bx * ab) / determinant, (ax * ab - bx * aa) / determinant);
        if s >= 0.0 && m >= 0.0 {
            return (s as f32, m as f32);
        }
        if s < 0.0 {
            return (0.0, ratio(-bx, bb) as f32);
        }
    }
    (ratio(ax, aa) as f32, 0.0)
}
