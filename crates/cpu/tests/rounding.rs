//! The rounding of stored rows on the reference's own inputs (tools/oracle/make_probes.py): every code equal, unless
//! the value lies within 1e-5 relative of a border between two codes or two scales.

mod common;

use common::{References, floats, vectors};
use cpu::{Level, rows};
use model::kv::RowFormat;

const BORDER: f32 = 1e-5;

/// Stores a row and reads it back, at every instruction set of this machine.
fn round_trip(format: RowFormat, row: &[f32]) -> Vec<f32> {
    let (mut packed, mut values) = (vec![0; format.row_bytes()], vec![0.0; row.len()]);
    rows::pack(Level::Scalar, format, row, &mut packed);
    rows::unpack(Level::Scalar, format, &packed, &mut values);
    for level in Level::available() {
        let (mut packed_here, mut values_here) = (vec![1; format.row_bytes()], vec![0.0; row.len()]);
        rows::pack(level, format, row, &mut packed_here);
        rows::unpack(level, format, &packed, &mut values_here);
        assert!(packed == packed_here && values == values_here, "{level:?} differs");
    }
    values
}

fn same_codes(format: RowFormat, name: &str) {
    let probes = References::open("rounding");
    let [input, expected, margin] = ["in", "out", "margin"].map(|part| probes.floats(&format!("{name}.{part}")));
    let width = format.width();
    let (mut near, mut near_and_other) = (0, 0);
    for (row, input) in input.chunks_exact(width).enumerate() {
        let values = round_trip(format, input);
        for (column, &ours) in values.iter().enumerate() {
            let i = row * width + column;
            let close = margin[i] <= BORDER;
            assert!(close || ours == expected[i], "{name} row {row}, {column}: {ours}, expected {}", expected[i]);
            near += close as usize;
            near_and_other += (ours != expected[i]) as usize;
        }
    }
    let count = input.len();
    println!(
        "{name}: {count} values, {near} within {BORDER:e} of a border, {near_and_other} of them rounded otherwise"
    );
    assert!(count > 400_000 && near * 100 < count, "{name}: {near} of {count} values lie on a border");
}

#[test]
fn key_value_rows_round_like_the_reference() {
    same_codes(RowFormat::Fp8Bf16 { nope: 192, rope: 64 }, "kv");
}

#[test]
fn indexer_rows_round_like_the_reference() {
    same_codes(RowFormat::HadamardFp4 { width: 128 }, "index");
}

#[test]
fn stored_rows_give_back_the_rounded_values() {
    let fp8 = vectors("fp8_block64_example");
    let format = RowFormat::Fp8Bf16 { nope: 64, rope: 4 };
    let tail = [1.0, -2.5, 1.001, 3.0e-3];
    let row = [floats(&fp8["in"]), tail.to_vec()].concat();
    let values = round_trip(format, &row);
    assert_eq!(values[..64], floats(&fp8["out"])[..]);
    assert_eq!(values[64..], [1.0, -2.5, 1.0, 0.003_005_981_4]);

    let fp4 = vectors("indexer_qat_example");
    let format = RowFormat::HadamardFp4 { width: 128 };
    assert_eq!(round_trip(format, &floats(&fp4["in128"])), floats(&fp4["out128"]));
}
