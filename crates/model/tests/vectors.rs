//! Rotary tables and stored rows against docs/spec/model-vectors.json.

mod common;

use common::flash;
use model::kv::RowFormat;
use model::rope::Rope;
use quant::elementwise::{rotate, rotate_back};
use serde_json::Value;

fn vectors(name: &str) -> Value {
    let file = include_str!("../../../docs/spec/model-vectors.json");
    serde_json::from_str::<Value>(file).unwrap()[name].take()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("an array").iter().map(|value| value.as_f64().expect("a number")).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    numbers(value).into_iter().map(|number| number as f32).collect()
}

#[test]
fn rotary_frequencies() {
    for (rope, name) in
        [(Rope::plain(&flash()), "rope_inv_freq_ratio0"), (Rope::yarn(&flash()), "rope_inv_freq_compressed")]
    {
        for (i, (ours, expected)) in rope.frequencies().iter().zip(numbers(&vectors(name))).enumerate() {
            assert!((ours / expected - 1.0).abs() < 1e-12, "{name}[{i}] is {ours}, expected {expected}");
        }
    }
}

#[test]
fn rotation_of_a_row() {
    let example = vectors("rope_example");
    let position = example["pos"].as_u64().unwrap() as usize;
    let x = floats(&example["x_tail64"]);
    for (rope, name) in [(Rope::plain(&flash()), "ratio0_out"), (Rope::yarn(&flash()), "compressed_out")] {
        let mut row = x.clone();
        rotate(&mut row, &rope.at(position));
        let expected = floats(&example[name]);
        let worst = row.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-6, "{name} is off by {worst:e}");
        rotate_back(&mut row, &rope.at(position));
        let worst = row.iter().zip(&x).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-6, "{name} rotated back is off by {worst:e}");
    }
}

#[test]
fn rows_have_the_sizes_of_the_specification() {
    assert_eq!(RowFormat::Fp8Bf16 { nope: 448, rope: 64 }.row_bytes(), 584);
    assert_eq!(RowFormat::HadamardFp4 { width: 128 }.row_bytes(), 68);
}

/// In f32 the angle of the fastest pair would be off by 0.06 rad at the end of the context.
#[test]
fn angles_are_right_at_the_end_of_the_context() {
    let position = (1 << 20) - 1;
    for rope in [Rope::plain(&flash()), Rope::yarn(&flash())] {
        for (i, ((cos, sin), frequency)) in rope.at(position).into_iter().zip(rope.frequencies()).enumerate() {
            let angle = (position as f64 * frequency) % (2.0 * std::f64::consts::PI);
            let (expected_sin, expected_cos) = angle.sin_cos();
            let off = (f64::from(cos) - expected_cos).abs().max((f64::from(sin) - expected_sin).abs());
            assert!(off < 1e-6, "pair {i} is off by {off:e}");
        }
    }
}
