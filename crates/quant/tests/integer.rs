//! The integer dots against f64 dots of what weights and activations stand for, the kernels of every level against the
//! definition to the bit, and the activation formats against the specification.

mod common;

use common::{Random, assert_same_bits, model_vectors, numbers};
use gguf::TensorType;
use proptest::prelude::*;
use quant::TYPES;
use quant::blocks::*;
use quant::integer::*;
use quant::simd::Level;

fn activations_q8_0(x: &[f32]) -> Vec<ActivationQ8_0> {
    let mut out = vec![ActivationQ8_0 { d: 0.0, q: [0; 32], sum: 0 }; x.len() / 32];
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
fn check<W: IntegerDot>(ty: TensorType, row: &[u8], activations: &[W::Activation], x: &[f64]) {
    let mut w = vec![0.0; x.len()];
    quant::dequantize(ty, row, &mut w);
    let products: Vec<f64> = w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).collect();
    // What the minimums take away may cancel the rest, but not its rounding.
    let mut without_minimums = row.to_vec();
    if let Some(dmin) = common::dmin_offset(ty) {
        without_minimums.chunks_exact_mut(size_of::<W>()).for_each(|block| block[dmin..dmin + 2].fill(0));
    }
    let mut scaled = vec![0.0; x.len()];
    quant::dequantize(ty, &without_minimums, &mut scaled);
    let sizes =
        w.iter().zip(&scaled).zip(x).map(|((w, scaled), x)| f64::from(scaled.abs() + (w - scaled).abs()) * x.abs());
    let (exact, size) = (products.iter().sum::<f64>(), sizes.sum::<f64>());
    let found = f64::from(dot(view::<W>(row), activations));
    assert!((found - exact).abs() <= 1e-6 * size, "{ty}: {found}, expected {exact} (of {size})");
}

/// Every format's dot with `x`, on rows that `row` makes.
fn check_all(x: &[f32], mut row: impl FnMut(TensorType) -> Vec<u8>) {
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
    assert_eq!(activations_q8_0(&[0.0; 32])[0], ActivationQ8_0 { d: 0.0, q: [0; 32], sum: 0 });
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

/// Where no factor is finite, all is zero; just above, nothing overflows.
#[test]
fn the_smallest_activations() {
    for (x, zero) in [(f32::from_bits(1), true), (1e-40, true), (2e-38, true), (4e-37, false)] {
        let (short, long) = (activations_q8_0(&[x; 32])[0], activations_q8_k(&[x; 256])[0]);
        assert_eq!((short.q[0] == 0, short.d == 0.0), (zero, zero), "{x:e}: {short:?}");
        assert_eq!((long.q[0] == 0, long.d == 0.0), (zero, zero), "{x:e}: {long:?}");
    }
}

#[test]
fn every_quantised_type_has_an_integer_dot() {
    let supported: Vec<TensorType> = TYPES.into_iter().filter(|&ty| blocking(ty).is_some()).collect();
    assert_eq!(supported, TYPES[3..]);
}

/// The definition for each pair of rows, `[n, R]`.
fn defined(ty: TensorType, weights: &[u8], x: &[f32], cols: usize) -> Vec<f32> {
    fn rows<W: IntegerDot>(weights: &[u8], x: &[Vec<W::Activation>]) -> Vec<f32> {
        let (blocks, per_row) = (view::<W>(weights), x[0].len());
        blocks.chunks_exact(per_row).flat_map(|row| x.iter().map(move |x| dot(row, x))).collect()
    }
    let short: Vec<_> = x.chunks_exact(cols).map(activations_q8_0).collect();
    let long = || x.chunks_exact(cols).map(activations_q8_k).collect::<Vec<_>>();
    match ty {
        TensorType::Q8_0 => rows::<Q8_0>(weights, &short),
        TensorType::Mxfp4 => rows::<Mxfp4>(weights, &short),
        TensorType::Q2K => rows::<Q2K>(weights, &long()),
        TensorType::Q3K => rows::<Q3K>(weights, &long()),
        TensorType::Q4K => rows::<Q4K>(weights, &long()),
        TensorType::Q5K => rows::<Q5K>(weights, &long()),
        TensorType::Q6K => rows::<Q6K>(weights, &long()),
        TensorType::Iq2Xxs => rows::<Iq2Xxs>(weights, &long()),
        other => panic!("{other}"),
    }
}

/// Every level's kernel against the definition.
#[track_caller]
fn check_kernels(ty: TensorType, weights: &[u8], x: &[f32], cols: usize, what: &str) {
    let expected = defined(ty, weights, x, cols);
    for level in Level::available() {
        let activations = quantize_activations_at(level, ty, x, cols);
        let mut found = vec![f32::NAN; expected.len()];
        matmul_at(level, ty, weights, &activations, &mut found);
        assert_same_bits(&found, &expected, &format!("{ty} {what} at {level:?}"));
    }
}

#[test]
fn kernels_follow_the_definition_in_every_shape() {
    let mut random = Random(4);
    for ty in TYPES.into_iter().filter(|&ty| blocking(ty).is_some()) {
        let block = ty.block().unwrap().elements as usize;
        for (rows, blocks) in [(1, 1), (2, 3), (3, 1), (4, 2), (5, 9), (7, 1), (15, 2), (16, 2), (17, 2), (33, 1)] {
            for batch in [1, 2, 3, 7, 8, 9, 31, 33, 65, 129, 134] {
                let weights: Vec<u8> = (0..rows).flat_map(|_| random.row(ty, blocks * block)).collect();
                let x = random.normals(batch * blocks * block);
                check_kernels(ty, &weights, &x, blocks * block, &format!("{rows} × {blocks} blocks × {batch}"));
            }
        }
    }
}

/// Any bytes as weights, infinite and NaN scales included, and the largest, smallest and worst activations.
#[test]
fn kernels_follow_the_definition_at_the_extremes() {
    let mut random = Random(5);
    for ty in TYPES.into_iter().filter(|&ty| blocking(ty).is_some()) {
        let row_bytes = quant::row_bytes(ty, 512);
        // Three rows of activations are few, eleven are many; seventeen of weights are one more than a tile.
        for (turn, batch) in (0..64).flat_map(|turn| [(turn, 3), (turn, 11)]) {
            let weights: Vec<u8> = match turn {
                0..32 => (0..17 * row_bytes).map(|_| random.bits() as u8).collect(),
                _ => vec![[0x00, 0xff, 0x7f, 0x80][turn % 4]; 17 * row_bytes],
            };
            let mut x = random.normals(batch * 512);
            let last = x.len() - 1;
            match turn % 8 {
                0 => x.fill(1.0),
                1 => x.iter_mut().enumerate().for_each(|(i, x)| *x = if i % 3 == 0 { -127.0 } else { 127.0 }),
                2 => [700, last - 700].into_iter().for_each(|i| x[i] = f32::NAN),
                3 => [100, last - 100].into_iter().for_each(|i| x[i] = f32::NEG_INFINITY),
                4 => x.iter_mut().for_each(|x| *x *= 1e-38),
                5 => x.iter_mut().for_each(|x| *x *= 1e-44),
                6 => x.iter_mut().for_each(|x| *x *= 1e37),
                _ => x[..256].fill(0.0),
            }
            check_kernels(ty, &weights, &x, 512, &format!("extreme {turn} × {batch}"));
        }
    }
}

#[test]
fn no_rows_give_no_dots() {
    let cols = 512;
    let (weights, x) = (Random(6).row(TensorType::Q4K, cols), Random(7).normals(cols));
    for level in Level::available() {
        for (weights, x) in [(&[][..], &x[..]), (&weights[..], &[][..]), (&[], &[])] {
            let activations = quantize_activations_at(level, TensorType::Q4K, x, cols);
            matmul_at(level, TensorType::Q4K, weights, &activations, &mut []);
        }
    }
}

#[test]
fn a_matmul_refuses_other_sizes() {
    let weights = vec![0; 2 * quant::row_bytes(TensorType::Q4K, 256)];
    let activations = quantize_activations(TensorType::Q4K, &[0.0; 3 * 256], 256);
    for (bytes, dots) in [(weights.len(), 5), (weights.len(), 7), (weights.len() - 1, 6), (0, 1), (weights.len(), 0)] {
        let refused = std::panic::catch_unwind(|| {
            matmul(TensorType::Q4K, &weights[..bytes], &activations, &mut vec![0.0; dots]);
        });
        assert!(refused.is_err(), "{bytes} bytes for {dots} dots");
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
