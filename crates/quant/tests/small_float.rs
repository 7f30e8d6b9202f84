//! The small floats against their definition in f64, the oracle and the specification's vectors.

mod common;

use common::{Random, assert_same_bits, fixture, model_vectors, numbers};
use proptest::prelude::*;
use quant::simd::Level;
use quant::small_float::*;

/// The values of E4M3 from 0 to 448, by the format's definition.
fn e4m3_grid() -> Vec<f64> {
    (0..127)
        .map(|code| (code / 8, f64::from(code % 8)))
        .map(|(e, m)| if e == 0 { m * 2f64.powi(-9) } else { (1.0 + m / 8.0) * 2f64.powi(e - 7) })
        .collect()
}

const E2M1_GRID: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// Nearest code of `grid` for `x`, ties to even, by search; and the relative distance of |x| from the nearest border.
fn nearest(x: f64, grid: &[f64]) -> (u8, f64) {
    let m = x.abs().min(grid[grid.len() - 1]);
    let above = grid.partition_point(|&g| g < m).clamp(1, grid.len() - 1);
    let (low, high) = (grid[above - 1], grid[above]);
    let border = (low + high) / 2.0;
    let up = m > border || m == border && above.is_multiple_of(2);
    (if up { above } else { above - 1 } as u8, (m - border).abs() / border)
}

/// The scale exponent as the model defines it, in f64.
fn scale_exponent(block: &[f32], max: f64, floor: f64) -> i32 {
    let amax = block.iter().fold(floor, |a, &x| a.max(f64::from(x).abs()));
    (amax / max).log2().ceil() as i32
}

fn fp8_round_trip(level: Level, x: &[f32; 64]) -> [f32; 64] {
    let (scale, codes) = fp8_encode_at(level, x);
    let mut out = [0.0; 64];
    fp8_decode_at(level, scale, &codes, &mut out);
    out
}

fn fp4_round_trip(level: Level, x: &[f32; 32]) -> [f32; 32] {
    let (scale, codes) = fp4_encode_at(level, x);
    let mut out = [0.0; 32];
    fp4_decode_at(level, scale, &codes, &mut out);
    out
}

fn blocks<const N: usize>(x: &[f32]) -> &[[f32; N]] {
    let (blocks, []) = x.as_chunks() else { panic!("whole blocks") };
    blocks
}

fn to_f32(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

/// `found` is `expected`, except that where `x / scale` is within 1e-5 of a border it may be the grid's neighbour.
fn assert_codes_equal(x: &[f64], found: &[f32], expected: &[f64], scale: f64, grid: &[f64]) {
    for ((&x, &found), &expected) in x.iter().zip(found).zip(expected) {
        let (_, distance) = nearest(x / scale, grid);
        assert!(f64::from(found) == expected || distance < 1e-5, "{x}: {found}, expected {expected}");
    }
}

#[test]
fn specification_vectors() {
    let vectors = model_vectors();
    let fp8 = &vectors["fp8_block64_example"];
    let qat = &vectors["indexer_qat_example"];
    for level in Level::available() {
        let x = to_f32(&numbers(&fp8["in"]));
        assert_same_bits(&fp8_round_trip(level, &blocks(&x)[0]), &to_f32(&numbers(&fp8["out"])), "fp8");

        let mut x = blocks::<128>(&to_f32(&numbers(&qat["in128"])))[0];
        hadamard_at(level, &mut x);
        for (found, expected) in x.iter().zip(numbers(&qat["hadamard"])) {
            assert!((f64::from(*found) - expected).abs() < 1e-6, "{found}, expected {expected}");
        }
        let found: Vec<f32> = blocks(&x).iter().flat_map(|x| fp4_round_trip(level, x)).collect();
        let found: Vec<f64> = found.iter().map(|&x| f64::from(x)).collect();
        assert_eq!(found, numbers(&qat["out128"]));
    }
}

#[test]
fn equals_the_oracle() {
    let grid = e4m3_grid();
    for record in fixture("kv.bin") {
        let x: Vec<f32> = record.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let expected: Vec<f64> = record.values.iter().map(|&x| f64::from(x)).collect();
        for level in Level::available() {
            if record.tag == 8 {
                for (x, expected) in blocks(&x).iter().zip(expected.chunks_exact(64)) {
                    let scale = 2f64.powi(scale_exponent(x, 448.0, 1e-4));
                    assert_codes_equal(&x.map(f64::from), &fp8_round_trip(level, x), expected, scale, &grid);
                }
                continue;
            }
            for (x, expected) in blocks::<128>(&x).iter().zip(expected.chunks_exact(128)) {
                let mut x = *x;
                hadamard_at(level, &mut x);
                for (x, expected) in blocks(&x).iter().zip(expected.chunks_exact(32)) {
                    let scale = 2f64.powi(scale_exponent(x, 6.0, 0.0));
                    assert_codes_equal(&x.map(f64::from), &fp4_round_trip(level, x), expected, scale, &E2M1_GRID);
                }
            }
        }
    }
}

#[test]
fn hadamard_is_the_sylvester_matrix() {
    let mut random = Random(5);
    let x = random.normals(128);
    let expected: Vec<f64> = (0..128usize)
        .map(|row| {
            let sign = |i: usize| if (row & i).count_ones() % 2 == 1 { -1.0 } else { 1.0 };
            (0..128).map(|i| sign(i) * f64::from(x[i])).sum::<f64>() / 128f64.sqrt()
        })
        .collect();
    let mut first = blocks::<128>(&x)[0];
    hadamard_at(Level::Scalar, &mut first);
    for (found, expected) in first.iter().zip(expected) {
        assert!((f64::from(*found) - expected).abs() < 2e-6, "{found}, expected {expected}");
    }
    for level in Level::available() {
        let mut found = blocks::<128>(&x)[0];
        hadamard_at(level, &mut found);
        assert_same_bits(&found, &first, &format!("{level:?}"));
    }
}

#[test]
fn every_fp8_code_decodes_and_encodes() {
    let grid = e4m3_grid();
    for level in Level::available() {
        for code in 0..=255u8 {
            let mut out = [0.0; 64];
            fp8_decode_at(level, 127, &[code; 64], &mut out);
            if code & 0x7f == 0x7f {
                assert!(out[0].is_nan());
                continue;
            }
            let magnitude = grid[usize::from(code & 0x7f)] as f32;
            let value = if code < 128 { magnitude } else { -magnitude };
            assert_same_bits(&out, &[value; 64], "decoded");
            // 448 fixes the scale at 1.
            let mut x = [value; 64];
            x[63] = 448.0;
            let (scale, codes) = fp8_encode_at(level, &x);
            assert_eq!((scale, &codes[..63]), (127, &[code; 63][..]));
        }
    }
}

#[test]
fn scales_change_exactly_at_the_limit() {
    for exponent in -22..=119 {
        let limit = 448.0 * 2f32.powi(exponent);
        for (amax, expected) in [(limit.next_down(), exponent), (limit, exponent), (limit.next_up(), exponent + 1)] {
            let mut x = [0.0; 64];
            x[17] = -amax;
            assert_eq!(i32::from(fp8_encode(&x).0) - 127, expected, "{amax:e}");
            assert_eq!(scale_exponent(&x, 448.0, 1e-4), expected, "the definition at {amax:e}");
        }
    }
    for exponent in -126..=125 {
        let limit = 6.0 * 2f32.powi(exponent);
        for (amax, expected) in [(limit.next_down(), exponent), (limit, exponent), (limit.next_up(), exponent + 1)] {
            let mut x = [0.0; 32];
            x[17] = -amax;
            assert_eq!(i32::from(fp4_encode(&x).0) - 127, expected, "{amax:e}");
        }
    }
    assert_eq!((fp8_encode(&[0.0; 64]).0, fp4_encode(&[0.0; 32]).0), (127 - 22, 1));
}

#[test]
fn a_block_with_an_infinity_or_nan_is_nan() {
    for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        for level in Level::available() {
            let (mut x8, mut x4) = ([1.0; 64], [1.0; 32]);
            (x8[40], x4[20]) = (bad, bad);
            assert_eq!((fp8_encode_at(level, &x8).0, fp4_encode_at(level, &x4).0), (SCALE_NAN, SCALE_NAN));
            assert!(fp8_round_trip(level, &x8).iter().all(|x| x.is_nan()));
            assert!(fp4_round_trip(level, &x4).iter().all(|x| x.is_nan()));
        }
    }
}

#[test]
fn bf16_is_the_half_crate_s() {
    let mut random = Random(6);
    for _ in 0..200_000 {
        let x = f32::from_bits(random.bits() as u32);
        assert_eq!(bf16_encode(x), half::bf16::from_f32(x).to_bits(), "{x:e}");
        assert_eq!(bf16_decode(bf16_encode(x)).to_bits(), half::bf16::from_f32(x).to_f32().to_bits());
    }
}

/// Any finite f32, with values on grid points and borders made likely.
fn value() -> impl Strategy<Value = f32> {
    let dyadic = (-64i32..=64, -20i32..20).prop_map(|(n, e)| n as f32 * 2f32.powi(e));
    prop_oneof![dyadic, proptest::num::f32::NORMAL, proptest::num::f32::SUBNORMAL, -1e3f32..1e3]
}

proptest! {
    #[test]
    fn fp8_codes_are_the_nearest(x in prop::array::uniform32(value()), y in prop::array::uniform32(value())) {
        let x: [f32; 64] = std::array::from_fn(|i| if i < 32 { x[i] } else { y[i - 32] });
        let (scale, codes) = fp8_encode_at(Level::Scalar, &x);
        prop_assert_eq!(i32::from(scale) - 127, scale_exponent(&x, 448.0, 1e-4));
        for (x, code) in x.iter().zip(codes) {
            let (expected, _) = nearest(f64::from(*x) / 2f64.powi(i32::from(scale) - 127), &e4m3_grid());
            prop_assert_eq!((code & 0x7f, code >= 128), (expected, x.is_sign_negative()));
        }
        for level in Level::available() {
            prop_assert_eq!((scale, codes), fp8_encode_at(level, &x));
            assert_same_bits(&fp8_round_trip(level, &x), &fp8_round_trip(Level::Scalar, &x), "decoded");
        }
    }

    #[test]
    fn fp4_codes_are_the_nearest(x in prop::array::uniform32(value())) {
        let (scale, codes) = fp4_encode_at(Level::Scalar, &x);
        prop_assert_eq!(i32::from(scale) - 127, scale_exponent(&x, 6.0, 6.0 * 2f64.powi(-126)));
        for (i, x) in x.iter().enumerate() {
            let code = codes[i / 2] >> (4 * (i % 2)) & 15;
            let (expected, _) = nearest(f64::from(*x) / 2f64.powi(i32::from(scale) - 127), &E2M1_GRID);
            prop_assert_eq!((code & 7, code >= 8), (expected, x.is_sign_negative()));
        }
        for level in Level::available() {
            prop_assert_eq!((scale, codes), fp4_encode_at(level, &x));
            assert_same_bits(&fp4_round_trip(level, &x), &fp4_round_trip(Level::Scalar, &x), "decoded");
        }
    }
}
