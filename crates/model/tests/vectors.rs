//! Rotary tables and stored rows against docs/spec/model-vectors.json.

mod common;

use common::flash;
use model::kv::RowFormat;
use model::rope::{Rope, rotate, rotate_back};
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
fn stored_rows_give_back_the_rounded_values() {
    let fp8 = vectors("fp8_block64_example");
    let format = RowFormat::Fp8Bf16 { nope: 64, rope: 4 };
    let tail = [1.0, -2.5, 1.001, 3.0e-3];
    let row = [floats(&fp8["in"]), tail.to_vec()].concat();
    let mut packed = vec![0; format.row_bytes()];
    format.pack(&row, &mut packed);
    let mut values = vec![0.0; 68];
    format.unpack(&packed, &mut values);
    assert_eq!(values[..64], floats(&fp8["out"])[..]);
    assert_eq!(values[64..], [1.0, -2.5, 1.0, 0.003_005_981_4]);

    let fp4 = vectors("indexer_qat_example");
    let format = RowFormat::HadamardFp4 { width: 128 };
    let mut packed = vec![0; format.row_bytes()];
    format.pack(&floats(&fp4["in128"]), &mut packed);
    let mut values = vec![0.0; 128];
    format.unpack(&packed, &mut values);
    assert_eq!(values, floats(&fp4["out128"]));
}

#[test]
fn rows_have_the_sizes_of_the_specification() {
    assert_eq!(RowFormat::Fp8Bf16 { nope: 448, rope: 64 }.row_bytes(), 584);
    assert_eq!(RowFormat::HadamardFp4 { width: 128 }.row_bytes(), 68);
}
