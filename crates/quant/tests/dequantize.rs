//! Dequantise against PyPI `gguf` and the specification's vectors, to the bit, at every level.

mod common;

use common::{assert_same_bits, fixture, model_vectors, numbers};
use gguf::TensorType;
use quant::dequantize_at;
use quant::simd::Level;

#[test]
fn equals_pypi_gguf() {
    let records = fixture("dequantize.bin");
    assert_eq!(records.len(), quant::TYPES.len());
    for record in records {
        let ty = TensorType::from_id(record.tag);
        for level in Level::available() {
            let mut values = vec![0.0; record.values.len()];
            dequantize_at(level, ty, &record.bytes, &mut values);
            assert_same_bits(&values, &record.values, &format!("{ty} at {level:?}"));
        }
    }
}

#[test]
fn equals_the_specification() {
    let vectors = model_vectors();
    for (name, vector) in vectors["quant_vectors"].as_object().unwrap() {
        let ty = TensorType::from_id(vector["type_id"].as_u64().unwrap() as u32);
        let hex = vector["bytes_hex"].as_str().unwrap();
        let bytes: Vec<u8> =
            (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect();
        let mut values = vec![0.0; ty.block().unwrap().elements as usize];
        quant::dequantize(ty, &bytes, &mut values);
        let f64s: Vec<f64> = values.iter().map(|&x| f64::from(x)).collect();
        assert_eq!(&f64s[..16], numbers(&vector["first16"]), "{name}");
        assert_eq!(&f64s[f64s.len() - 4..], numbers(&vector["last4"]), "{name}");
        assert_eq!(f64s.iter().sum::<f64>(), vector["sum_f64"].as_f64().unwrap(), "{name}");
    }
}
