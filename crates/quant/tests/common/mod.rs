//! What several test files need: fixtures, seeded random numbers, comparison to the bit.
#![allow(dead_code, reason = "each test file uses a part of it")]

use gguf::TensorType;
use std::path::Path;

/// One record of a fixture (see tools/make_quant_fixtures.py).
pub struct Record {
    pub tag: u32,
    pub bytes: Vec<u8>,
    pub values: Vec<f32>,
}

pub fn fixture(name: &str) -> Vec<Record> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    let data = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut rest = data.as_slice();
    let mut records = Vec::new();
    while !rest.is_empty() {
        let word = |i: usize| u32::from_le_bytes(rest[4 * i..][..4].try_into().unwrap());
        let (tag, bytes, values) = (word(0), word(1) as usize, word(2) as usize);
        records.push(Record {
            tag,
            bytes: rest[12..][..bytes].to_vec(),
            values: rest[12 + bytes..][..4 * values]
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                .collect(),
        });
        rest = &rest[12 + bytes + 4 * values..];
    }
    records
}

/// docs/spec/model-vectors.json.
pub fn model_vectors() -> serde_json::Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/spec/model-vectors.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// The numbers of a JSON array.
pub fn numbers(v: &serde_json::Value) -> Vec<f64> {
    v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// A small seeded generator (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn normal(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        (radius * (2.0 * std::f64::consts::PI * self.unit()).cos()) as f32
    }

    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }

    /// A row of `cols` values: random codes under scales of a sensible size.
    pub fn row(&mut self, ty: TensorType, cols: usize) -> Vec<u8> {
        let mut row: Vec<u8> = (0..quant::row_bytes(ty, cols)).map(|_| self.bits() as u8).collect();
        tame(ty, &mut row);
        row
    }
}

/// Gives every block of a row scales near 1/100, keeping sign and mantissa.
pub fn tame(ty: TensorType, row: &mut [u8]) {
    for block in row.chunks_exact_mut(ty.block().unwrap().bytes as usize) {
        match ty {
            TensorType::F32 => block[3] = (block[3] & 0x80) | 0x3f,
            TensorType::Mxfp4 => block[0] = 120 + block[0] % 8,
            _ => {
                for offset in scale_offsets(ty) {
                    // Bfloat16 has its exponent in the same place as a half, shorter.
                    block[offset + 1] = (block[offset + 1] & 0x83) | 0x20;
                }
            }
        }
    }
}

/// Where a block of `ty` has the scale of its minimums.
pub fn dmin_offset(ty: TensorType) -> Option<usize> {
    match ty {
        TensorType::Q2K => Some(82),
        TensorType::Q4K | TensorType::Q5K => Some(2),
        _ => None,
    }
}

/// Where a block of `ty` has its half-precision (or bfloat16) numbers.
fn scale_offsets(ty: TensorType) -> Vec<usize> {
    match ty {
        TensorType::Q2K => vec![80, 82],
        TensorType::Q3K => vec![108],
        TensorType::Q6K => vec![208],
        TensorType::Q4K | TensorType::Q5K => vec![0, 2],
        _ => vec![0],
    }
}

/// Equal to the bit, any NaN equal to any NaN.
#[track_caller]
pub fn assert_same_bits(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!(a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(), "{what}: value {i} is {a:e}, expected {b:e}");
    }
}
