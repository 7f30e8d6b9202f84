//! The quantisers against `ggml_quantize_chunk` (fixtures made by tools/make_quant_fixtures.py), and bad input.

mod common;

use common::{Random, fixture};
use gguf::TensorType;
use proptest::prelude::*;
use quant::{QuantizeError, quantize};

/// Σ importance · (x − x̂)², importance repeating over rows.
fn weighted_error(ty: TensorType, blocks: &[u8], x: &[f32], importance: &[f32]) -> f64 {
    let mut values = vec![0.0; x.len()];
    quant::dequantize(ty, blocks, &mut values);
    let squares = x.iter().zip(&values).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2));
    squares.zip(importance.iter().cycle()).map(|(square, w)| square * f64::from(*w)).sum()
}

fn quantized(ty: TensorType, x: &[f32], importance: Option<&[f32]>) -> Vec<u8> {
    let mut blocks = vec![0; quant::row_bytes(ty, x.len())];
    quantize(ty, x, importance, &mut blocks).unwrap();
    blocks
}

#[test]
fn errors_are_at_most_1_05_of_ggml() {
    const NAMES: [&str; 5] = ["gaussian", "student t", "outliers", "uniform positive", "near zero"];
    let mut names = NAMES.iter();
    let (mut name, mut x, mut importance) = ("", Vec::new(), Vec::new());
    let mut failures = Vec::new();
    let mut compared = 0;
    for record in fixture("quantize.bin") {
        if record.tag == 0 {
            name = names.next().unwrap();
            importance = record.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            x = record.values;
            continue;
        }
        let ty = TensorType::from_id(record.tag % 256);
        let (weights, given) =
            if record.tag >= 256 { (importance.clone(), "importance") } else { (vec![1.0], "plain") };
        let theirs = weighted_error(ty, &record.bytes, &x, &weights);
        let blocks = quantized(ty, &x, (weights.len() > 1).then_some(weights.as_slice()));
        let ours = weighted_error(ty, &blocks, &x, &weights);
        let ratio = ours / theirs;
        println!("{ty:8} {name:16} {given:10} ours {ours:10.4e} ggml {theirs:10.4e} ratio {ratio:.3}");
        compared += 1;
        if ratio > 1.05 {
            failures.push(format!("{ty} {name} {given}: {ratio:.3}"));
        }
    }
    assert_eq!(compared, 45);
    assert!(failures.is_empty(), "{failures:?}");
}

#[test]
fn floats_are_rounded_to_nearest() {
    let x = Random(7).normals(999);
    let f16: Vec<u8> = x.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect();
    let bf16: Vec<u8> = x.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect();
    let f32: Vec<u8> = x.iter().flat_map(|&x| x.to_le_bytes()).collect();
    assert_eq!(quantized(TensorType::F16, &x, None), f16);
    assert_eq!(quantized(TensorType::Bf16, &x, None), bf16);
    assert_eq!(quantized(TensorType::F32, &x, None), f32);
}

#[test]
fn bad_input_is_refused() {
    use TensorType::*;
    let x = vec![1.0; 256];
    let mut out = vec![0; quant::row_bytes(Q2K, 256)];
    let message = |result: Result<(), QuantizeError>| result.unwrap_err().to_string();
    assert!(message(quantize(Q6K, &x, None, &mut out)).contains("no quantiser for Q6_K"));
    assert!(message(quantize(Q2K, &x[..255], None, &mut out)).contains("255 values where blocks of 256"));
    assert!(message(quantize(Q2K, &x, None, &mut out[..9])).contains("9 bytes where 84"));
    assert!(message(quantize(Q2K, &x, Some(&[1.0]), &mut out)).contains("1 importance weights where blocks of 256"));
    assert!(message(quantize(Q2K, &x, Some(&[]), &mut out)).contains("0 importance weights"));
    assert!(message(quantize(Q2K, &x, Some(&[1.0; 512]), &mut out)).contains("512 importance weights"));
    let mut grids = vec![0; quant::row_bytes(Iq2Xxs, 256)];
    assert!(message(quantize(Iq2Xxs, &x, None, &mut grids)).contains("IQ2_XXS needs the importance"));
    let mut bad = x.clone();
    bad[7] = f32::NAN;
    assert!(message(quantize(Q2K, &bad, None, &mut out)).contains("value 7 is NaN, not within -6.5504e4 to 6.5504e4"));
    bad[7] = 70_000.0;
    assert!(message(quantize(Q2K, &bad, None, &mut out)).contains("value 7 is 70000, not within"));
    bad[7] = -1.0;
    assert!(message(quantize(Q2K, &x, Some(&bad), &mut out)).contains("importance 7 is -1, not within 0e0 to"));
}

/// The largest values allowed come back finite and about as large.
#[test]
fn limits_are_held() {
    use TensorType::*;
    for (ty, limit) in [
        (F16, 65504.0),
        (Q8_0, 65504.0),
        (Q2K, 65504.0),
        (Q4K, 65504.0),
        (Iq2Xxs, 65504.0),
        (Bf16, 3e38),
        (Mxfp4, 3e38),
    ] {
        let x: Vec<f32> = (0..256).map(|i| if i % 2 == 0 { limit } else { -limit }).collect();
        let mut values = vec![0.0; 256];
        quant::dequantize(ty, &quantized(ty, &x, Some(&[1.0; 256])), &mut values);
        let mean = values.iter().zip(&x).map(|(y, x)| (x - y).abs() / 256.0).sum::<f32>();
        assert!(mean < 0.3 * limit, "{ty}: mean error {mean}");
    }
}

#[test]
fn zeros_stay_zero() {
    use TensorType::*;
    for ty in [F32, F16, Bf16, Q8_0, Q2K, Q4K, Mxfp4, Iq2Xxs] {
        let blocks = quantized(ty, &[0.0; 512], Some(&[1.0; 256]));
        let mut values = vec![f32::NAN; 512];
        quant::dequantize(ty, &blocks, &mut values);
        assert!(values.iter().all(|&x| x == 0.0), "{ty}");
    }
}

/// A block of about 10^`exponent`, the given shares of it zero and of no importance, is finite and not worse than zeros.
fn check_against_zeros(seed: u64, exponent: i32, sparse: f64, weightless: f64) {
    use TensorType::*;
    let mut random = Random(seed);
    let size = 10f32.powi(exponent);
    let x: Vec<f32> = (0..256).map(|_| if random.unit() < sparse { 0.0 } else { random.normal() * size }).collect();
    let importance: Vec<f32> =
        (0..256).map(|_| if random.unit() < weightless { 0.0 } else { random.normal().exp() }).collect();
    // The quantiser counts a column of no importance as 1e-5 of the mean.
    let mean = importance.iter().sum::<f32>() / 256.0;
    let counted: Vec<f32> = importance.iter().map(|w| if mean == 0.0 { 1.0 } else { w + 1e-5 * mean }).collect();
    for ty in [Q8_0, Q2K, Q4K, Mxfp4, Iq2Xxs] {
        let blocks = quantized(ty, &x, Some(&importance));
        let error = weighted_error(ty, &blocks, &x, &counted);
        let zeros = weighted_error(TensorType::F32, &[0; 1024], &x, &counted);
        assert!(error.is_finite() && error <= zeros * 1.001, "{ty}: {error:e} of {zeros:e}");
    }
}

/// Found by the test of any block: what was stored was worse than zeros.
#[test]
fn a_block_that_no_scale_fits_is_stored_as_zeros() {
    check_against_zeros(10829201031989478375, -3, 0.9744039738505234, 0.7340957313388651);
}

proptest! {
    #[test]
    fn any_block_is_better_than_zeros(seed: u64, exponent in -12i32..5, sparse in 0f64..1.0, weightless in 0f64..1.0) {
        check_against_zeros(seed, exponent, sparse, weightless);
    }
}
