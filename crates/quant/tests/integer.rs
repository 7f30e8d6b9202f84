//! The integer dots against f64 dots of what weights and activations stand for, and the activation formats
//! against the specification.

mod common;

use common::{Random, model_vectors, numbers};
use proptest::prelude::*;
use quant::blocks::*;
use quant::integer::{IntegerDot, dot, quantize_q8_0, quantize_q8_k};

fn activations_q8_0(x: &[f32]) -> Vec<ActivationQ8_0> {
    let mut out = vec![ActivationQ8_0 { d: 0.0, q: [0; 32] }; x.len() / 32];
    quantize_q8_0(x, &mut out);
    out
}

fn activations_q8_k(x: &[f32]) -> Vec<ActivationQ8K> {
    let mut out = vec![ActivationQ8K { d: 0.0, q: [0; 256], sums: [0; 16] }; x.len() / 256];
    quantize_q8_k(x, &mut out);
    out
}

/// What activations stand for, in f64.
fn values(d: f32, q: &[i8]) -> impl Iterator<Item = f64> {
    q.iter().map(move |&q| f64::from(d) * f64::from(q))
}

/// The integer dot of a row against f64; `x` is what the activations stand for.
fn check<W: IntegerDot>(ty: gguf::TensorType, row: &[u8], activations: &[W::Activation], x: &[f64]) {
    let mut w = vec![0.0; x.len()];
    quant::dequantize(ty, row, &mut w);
    let products: Vec<f64> = w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).collect();
    let (exact, size) = (products.iter().sum::<f64>(), products.iter().map(|p| p.abs()).sum::<f64>());
    let found = f64::from(dot(view::<W>(row), activations));
    assert!((found - exact).abs() <= 1e-6 * size, "{ty}: {found}, expected {exact} (of {size})");
}

/// Every format's dot with `x`, on rows that `row` makes.
fn check_all(x: &[f32], mut row: impl FnMut(gguf::TensorType) -> Vec<u8>) {
    let q8_k = activations_q8_k(x);
    let q8_0 = activations_q8_0(x);
    let x_k: Vec<f64> = q8_k.iter().flat_map(|b| values(b.d, &b.q)).collect();
    let x_0: Vec<f64> = q8_0.iter().flat_map(|b| values(b.d, &b.q)).collect();
    macro_rules! check_formats {
        ($x:ident, $activations:ident: $($block:ident),*) => {
            $(check::<$block>($block::TYPE, &row($block::TYPE), &$activations, &$x);)*
        };
    }
    check_formats!(x_k, q8_k: Q2K, Q3K, Q4K, Q5K, Q6K, Iq2Xxs);
    check_formats!(x_0, q8_0: Q8_0, Mxfp4);
}

proptest! {
    #[test]
    fn dots_are_the_dots_of_the_values(blocks in 1usize..12, seed: u64) {
        let mut random = Random(seed);
        let x = random.normals(256 * blocks);
        check_all(&x, |ty| random.row(ty, x.len()));
    }

    #[test]
    fn activations_are_within_half_a_step(seed: u64, exponent in -30i32..30) {
        let mut random = Random(seed);
        let x: Vec<f32> = random.normals(512).iter().map(|x| x * 10f32.powi(exponent)).collect();
        let decoded_0: Vec<(f32, f64)> =
            activations_q8_0(&x).iter().flat_map(|b| values(b.d, &b.q).map(|v| (b.d, v))).collect();
        let decoded_k: Vec<(f32, f64)> =
            activations_q8_k(&x).iter().flat_map(|b| values(b.d, &b.q).map(|v| (b.d, v))).collect();
        for decoded in [decoded_0, decoded_k] {
            for (x, (d, value)) in x.iter().zip(decoded) {
                prop_assert!((f64::from(*x) - value).abs() <= 0.50002 * f64::from(d.abs()), "{} {} {}", x, d, value);
            }
        }
    }
}

#[test]
fn q8_k_equals_the_specification() {
    let vectors = model_vectors();
    let example = &vectors["q8_K_example"];
    let x: Vec<f32> = numbers(&example["x256"]).iter().map(|&x| x as f32).collect();
    let block = activations_q8_k(&x)[0];
    assert_eq!(block.d, example["d"].as_f64().unwrap() as f32);
    assert_eq!(block.q.map(f64::from).to_vec(), numbers(&example["q"]));
    assert_eq!(block.sums.map(f64::from).to_vec(), numbers(&example["bsums16"]));
}

#[test]
fn zeros_and_what_is_not_finite() {
    assert_eq!(activations_q8_0(&[0.0; 32])[0], ActivationQ8_0 { d: 0.0, q: [0; 32] });
    assert_eq!(activations_q8_k(&[0.0; 256])[0], ActivationQ8K { d: 0.0, q: [0; 256], sums: [0; 16] });
    let mut random = Random(8);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = vec![1.0; 256];
        x[99] = bad;
        let row = random.row(Q4K::TYPE, 256);
        assert!(dot(view::<Q4K>(&row), &activations_q8_k(&x)).is_nan());
        let row = random.row(Q8_0::TYPE, 256);
        assert!(dot(view::<Q8_0>(&row), &activations_q8_0(&x)).is_nan());
    }
}

/// Codes and scales at their limits: nothing overflows (the test profile checks), nothing is lost.
#[test]
fn extreme_codes() {
    for x in [vec![1.0; 512], (0..512).map(|i| if i % 3 == 0 { -1.0 } else { 1.0 }).collect()] {
        for byte in [0x00, 0xff, 0x7f, 0x80, 0x55] {
            check_all(&x, |ty| {
                let mut row = vec![byte; quant::row_bytes(ty, x.len())];
                common::tame(ty, &mut row);
                row
            });
        }
    }
}
