//! The deterministic functions against f64, and the levels against each other.

mod common;

use common::{Random, assert_same_bits};
use quant::math::*;
use quant::simd::Level;

/// Distance of `found` from `exact` in units of `found`'s last place.
fn ulps(found: f32, exact: f64) -> f64 {
    let exponent = (exact.abs() as f32).max(f32::MIN_POSITIVE).log2().floor() as i32;
    (f64::from(found) - exact).abs() / 2f64.powi(exponent - 23)
}

/// Every `stride`-th f32 of both signs up to `limit`.
fn sweep(limit: f32, stride: usize) -> impl Iterator<Item = f32> {
    (0..limit.to_bits()).step_by(stride).flat_map(|bits| [f32::from_bits(bits), -f32::from_bits(bits)])
}

fn worst(values: impl Iterator<Item = f32>, function: fn(f32) -> f32, exact: fn(f64) -> f64) -> f64 {
    values.map(|x| ulps(function(x), exact(f64::from(x)))).fold(0.0, f64::max)
}

#[test]
fn errors_are_small() {
    let exp_error = worst(sweep(88.72, 997), exp, f64::exp);
    assert!(exp_error <= 1.0, "exp: {exp_error} ulp");
    let underflow = worst((0..200_000).map(|i| -87.0 - 17.0 * i as f32 / 200_000.0), exp, f64::exp);
    assert!(underflow <= 1.0, "exp near underflow: {underflow} ulp");
    let sigmoid_error = worst(sweep(87.0, 997), sigmoid, |x| 1.0 / (1.0 + (-x).exp()));
    assert!(sigmoid_error <= 2.5, "sigmoid: {sigmoid_error} ulp");
    let silu_error = worst(sweep(87.0, 997).filter(|x| x.abs() > 1e-30), silu, |x| x / (1.0 + (-x).exp()));
    assert!(silu_error <= 2.5, "silu: {silu_error} ulp");
    let softplus_error = worst(sweep(87.0, 997), softplus, |x| x.exp().ln_1p());
    assert!(softplus_error <= 2.5, "softplus: {softplus_error} ulp");
    println!(
        "ulp: exp {exp_error:.3} {underflow:.3} sigmoid {sigmoid_error:.3} silu {silu_error:.3} softplus {softplus_error:.3}"
    );
}

#[test]
fn limits() {
    assert_eq!(exp(0.0), 1.0);
    assert_eq!(exp(-0.0), 1.0);
    assert_eq!(exp(88.722_84), f64::exp(f64::from(88.722_84f32)) as f32);
    assert_eq!(exp(88.73), f32::INFINITY);
    assert_eq!(exp(f32::MAX), f32::INFINITY);
    assert_eq!(exp(f32::INFINITY), f32::INFINITY);
    assert_eq!(exp(-103.9), f32::from_bits(1));
    assert_eq!(exp(-104.1), 0.0);
    assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    assert!(exp(f32::NAN).is_nan());
    assert_eq!((sigmoid(f32::INFINITY), sigmoid(f32::NEG_INFINITY)), (1.0, 0.0));
    assert_eq!((softplus(f32::INFINITY), softplus(f32::NEG_INFINITY)), (f32::INFINITY, 0.0));
    assert!(sigmoid(f32::NAN).is_nan() && silu(f32::NAN).is_nan() && softplus(f32::NAN).is_nan());
}

#[test]
fn levels_and_scalars_agree() {
    type Pair = (&'static str, fn(f32) -> f32, fn(Level, &mut [f32]));
    let functions: [Pair; 4] = [
        ("exp", exp, exp_slice_at),
        ("sigmoid", sigmoid, sigmoid_slice_at),
        ("silu", silu, silu_slice_at),
        ("softplus", softplus, softplus_slice_at),
    ];
    let mut random = Random(4);
    let mut values: Vec<f32> = (0..500_003).map(|_| f32::from_bits(random.bits() as u32)).collect();
    values.extend((0..500_003).map(|_| 30.0 * random.normal()));
    for (name, function, slice) in functions {
        let expected: Vec<f32> = values.iter().map(|&x| function(x)).collect();
        for level in Level::available() {
            let mut found = values.clone();
            slice(level, &mut found);
            assert_same_bits(&found, &expected, &format!("{name} at {level:?}"));
        }
    }
}

/// Pins the bits of `exp` and of what is made from it, on every instruction set and machine.
#[test]
fn golden_bits() {
    let hash = |function: fn(f32) -> f32| {
        sweep(f32::INFINITY, 65_537).fold(0xcbf2_9ce4_8422_2325_u64, |hash, x| {
            (hash ^ u64::from(function(x).to_bits())).wrapping_mul(0x0000_0100_0000_01b3)
        })
    };
    assert_eq!(
        [exp, sigmoid, silu, softplus].map(hash),
        [15_230_155_986_233_151_214, 2_260_758_468_985_499_779, 8_376_810_332_784_648_257, 13_576_517_196_246_271_917]
    );
}
