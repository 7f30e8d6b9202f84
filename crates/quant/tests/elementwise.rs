//! Element by element work: its definitions written out, with every instruction set held to them, to the bit.

mod common;

use common::{Random, assert_same_bits};
use proptest::prelude::*;
use quant::elementwise::*;
use quant::math;
use quant::simd::Level;

/// `kernel` on copies of `x` at all levels gives `expected`.
fn check(x: &[f32], expected: &[f32], kernel: impl Fn(Level, &mut [f32])) {
    for level in Level::available() {
        let mut found = x.to_vec();
        kernel(level, &mut found);
        assert_same_bits(&found, expected, &format!("{level:?}"));
    }
}

proptest! {
    #[test]
    fn scaled_added_and_raised(len in 0usize..100, factor in -3.0f32..3.0, shift in -3.0f32..3.0, seed: u64) {
        let mut random = Random(seed);
        let (x, w) = (random.normals(len), random.normals(len));
        let map = |f: &dyn Fn(f32, f32) -> f32| -> Vec<f32> { x.iter().zip(&w).map(|(&x, &w)| f(x, w)).collect() };
        check(&x, &map(&|x, _| x * factor), |level, x| scale_at(level, x, factor));
        check(&x, &map(&|x, w| x * factor * w), |level, x| scale_by_at(level, x, factor, &w));
        check(&x, &map(&|x, w| x + w), |level, x| add_at(level, x, &w));
        check(&x, &map(&|x, _| math::exp(x * factor - shift)), |level, x| exp_of_at(level, x, factor, shift));
        let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        for level in Level::available() {
            prop_assert_eq!(largest_at(level, &x), largest);
        }
    }

    #[test]
    fn swiglu_limits_what_it_multiplies(len in 0usize..100, limit in 0.1f32..3.0, weight in -2.0f32..2.0, seed: u64) {
        let mut random = Random(seed);
        let (gate, up) = (random.normals(len), random.normals(len));
        let one = |(&gate, &up): (&f32, &f32)| math::silu(gate.min(limit)) * up.max(-limit).min(limit) * weight;
        let expected: Vec<f32> = gate.iter().zip(&up).map(one).collect();
        check(&gate, &expected, |level, gate| swiglu_at(level, gate, &up, limit, weight));
    }

    #[test]
    fn pairs_turn_forth_and_back(pairs in 0usize..50, seed: u64) {
        let mut random = Random(seed);
        let (tail, angles) = (random.normals(2 * pairs), random.normals(pairs));
        let rotation: Vec<(f32, f32)> = angles.iter().map(|angle| (angle.cos(), angle.sin())).collect();
        let turned = |sign: f32| -> Vec<f32> {
            let pair = |(pair, &(cos, sin)): (&[f32], &(f32, f32))| {
                let sin = sign * sin;
                [pair[0] * cos + -pair[1] * sin, pair[1] * cos + pair[0] * sin]
            };
            tail.chunks_exact(2).zip(&rotation).flat_map(pair).collect()
        };
        check(&tail, &turned(1.0), |level, tail| rotate_at(level, tail, &rotation));
        check(&tail, &turned(-1.0), |level, tail| rotate_back_at(level, tail, &rotation));
    }

    #[test]
    fn rectified_sums_follow_their_order(heads in 0usize..20, keys in 0usize..70, seed: u64) {
        let mut random = Random(seed);
        let (weights, dots) = (random.normals(heads), random.normals(heads * keys));
        let of_key = |key: usize| {
            let terms = weights.iter().zip(dots.iter().skip(key).step_by(keys));
            terms.fold(0.0, |sum, (&weight, &dot)| libm::fmaf(weight, dot.max(0.0), sum))
        };
        let expected: Vec<f32> = (0..keys).map(of_key).collect();
        check(&vec![f32::NAN; keys], &expected, |level, scores| rectified_sums_at(level, &weights, &dots, scores));
    }
}

#[test]
fn what_is_no_number_stays_so() {
    for level in Level::available() {
        let mut gate = [f32::NAN, 1.0];
        swiglu_at(level, &mut gate, &[1.0, f32::NAN], 10.0, 1.0);
        assert!(gate.iter().all(|value| value.is_nan()), "{level:?}: {gate:?}");
        let mut score = [0.0];
        rectified_sums_at(level, &[1.0], &[f32::NAN], &mut score);
        assert!(score[0].is_nan(), "{level:?}");
        assert_eq!(largest_at(level, &[f32::NAN, 2.0, 1.0]), 2.0, "{level:?}");
    }
}
