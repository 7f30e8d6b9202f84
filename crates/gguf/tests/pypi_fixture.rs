//! A file written by PyPI gguf 0.19.0 (`fixtures/make_every_value.py`) reads as what that script wrote.

mod common;

use common::{data, parse};
use gguf::{Array, TensorType, Value};

const FILE: &[u8] = include_bytes!("fixtures/every_value.gguf");

#[test]
fn every_value_is_the_same() {
    let strings = |list: &[&str]| Value::Array(Array::String(list.iter().collect()));
    let expected: Vec<(&str, Value)> = vec![
        ("general.architecture", "deepseek4".into()),
        ("a.u8", 200_u8.into()),
        ("a.i8", (-100_i8).into()),
        ("a.u16", 60_000_u16.into()),
        ("a.i16", (-30_000_i16).into()),
        ("a.u32", 4_000_000_000_u32.into()),
        ("a.i32", (-2_000_000_000_i32).into()),
        ("a.f32", 1e-6_f32.into()),
        ("a.bool", true.into()),
        ("a.string", "<｜User｜> naïve \n\0".into()),
        ("a.u64", u64::MAX.into()),
        ("a.i64", i64::MIN.into()),
        ("a.f64", 0.1_f64.into()),
        ("b.u8", vec![0, u8::MAX].into()),
        ("b.i8", vec![i8::MIN, i8::MAX].into()),
        ("b.u16", vec![0, u16::MAX].into()),
        ("b.i16", vec![i16::MIN, i16::MAX].into()),
        ("b.u32", vec![0, u32::MAX].into()),
        ("b.i32", vec![i32::MIN, i32::MAX].into()),
        ("b.f32", vec![0.5_f32, -0.0].into()),
        ("b.bool", Array::Bool(vec![true, false, true]).into()),
        ("b.string", strings(&["", "a", "Ġthe", "▁"])),
        ("b.u64", vec![0, u64::MAX].into()),
        ("b.i64", vec![i64::MIN, i64::MAX].into()),
        ("b.f64", vec![0.1_f64, 1e300].into()),
        ("b.nested", Array::Array(vec![Array::I32(vec![1, 2]), Array::I32(vec![3])]).into()),
    ];
    let model = parse(FILE);
    assert_eq!(model.version, 3);
    assert_eq!(model.metadata.len(), expected.len());
    for ((key, value), (expected_key, expected)) in model.metadata.iter().zip(&expected) {
        assert_eq!((key, value), (*expected_key, expected));
    }
}

#[test]
fn every_tensor_is_the_same() {
    let f32s: Vec<u8> = (0..6_u8).flat_map(|x| f32::from(x).to_le_bytes()).collect();
    let f16s: Vec<u8> = [0_u16, 0x3c00, 0x4000, 0x4200, 0x4400, 0x4500, 0x4600, 0x4700] // 0 to 7
        .iter()
        .flat_map(|bits| bits.to_le_bytes())
        .collect();
    let i32s: Vec<u8> = (-3_i32..3).flat_map(|x| x.to_le_bytes()).collect();
    let q8_0_row = [0x00, 0x3c].into_iter().chain((-127_i16..128).step_by(8).map(|x| x as u8)); // scale 1.0, codes
    let q8_0: Vec<u8> = std::iter::repeat_n(q8_0_row, 3).flatten().collect();
    let counted = |bytes: u16| (0..bytes).map(|x| x as u8).collect::<Vec<u8>>();
    let expected: [(&str, TensorType, &[u64], Vec<u8>); 7] = [
        ("f32", TensorType::F32, &[3, 2], f32s),
        ("f16", TensorType::F16, &[2, 2, 2], f16s),
        ("i32", TensorType::I32, &[6, 1], i32s),
        ("q8_0", TensorType::Q8_0, &[32, 3], q8_0),
        ("bf16", TensorType::Bf16, &[4, 1], [0x00, 0xc0].repeat(4)),
        ("q4_k", TensorType::Q4K, &[256, 2], counted(2 * 144)),
        ("mxfp4", TensorType::Mxfp4, &[32, 2, 3], counted(6 * 17)),
    ];
    let model = parse(FILE);
    assert_eq!(model.tensors.len(), expected.len());
    for (tensor, (name, ty, dims, bytes)) in model.tensors.iter().zip(expected) {
        assert_eq!((tensor.name.as_str(), tensor.ty, tensor.dims.as_slice()), (name, ty, dims));
        assert_eq!(data(FILE, tensor), bytes, "{name}");
    }
}
