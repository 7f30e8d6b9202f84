//! The rounding of stored rows on the reference's own inputs (tools/oracle/make_probes.py): every code equal, unless
//! the value lies within 1e-5 relative of a border between two codes or two scales.

mod common;

use common::References;
use model::kv::RowFormat;

const BORDER: f32 = 1e-5;

fn same_codes(format: RowFormat, name: &str) {
    let probes = References::open("rounding");
    let [input, expected, margin] = ["in", "out", "margin"].map(|part| probes.floats(&format!("{name}.{part}")));
    let width = format.width();
    let (mut packed, mut values) = (vec![0; format.row_bytes()], vec![0.0; width]);
    let (mut near, mut near_and_other) = (0, 0);
    for (row, input) in input.chunks_exact(width).enumerate() {
        format.pack(input, &mut packed);
        format.unpack(&packed, &mut values);
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
