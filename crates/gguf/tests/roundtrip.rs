//! What is written is read back equal, and written again gives the same bytes.

mod common;

use std::time::{Duration, Instant};

use common::{Raw, data, parse, pattern, sample, to_bytes};
use gguf::{Array, ErrorKind, Gguf, Strings, TensorType, Value, Writer};
use proptest::collection::vec;
use proptest::prelude::*;

fn strings() -> impl Strategy<Value = Strings> {
    vec(any::<String>(), 0..5).prop_map(|strings| strings.into_iter().collect())
}

fn array() -> impl Strategy<Value = Array> {
    let flat = prop_oneof![
        vec(any::<u8>(), 0..9).prop_map(Array::U8),
        vec(any::<i8>(), 0..9).prop_map(Array::I8),
        vec(any::<u16>(), 0..9).prop_map(Array::U16),
        vec(any::<i16>(), 0..9).prop_map(Array::I16),
        vec(any::<u32>(), 0..9).prop_map(Array::U32),
        vec(any::<i32>(), 0..9).prop_map(Array::I32),
        vec(any::<f32>(), 0..9).prop_map(Array::F32),
        vec(any::<u64>(), 0..9).prop_map(Array::U64),
        vec(any::<i64>(), 0..9).prop_map(Array::I64),
        vec(any::<f64>(), 0..9).prop_map(Array::F64),
        vec(any::<bool>(), 0..9).prop_map(Array::Bool),
        strings().prop_map(Array::String),
    ];
    flat.prop_recursive(3, 16, 4, |inner| vec(inner, 0..4).prop_map(Array::Array))
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        any::<f32>().prop_map(Value::F32),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        any::<f64>().prop_map(Value::F64),
        any::<bool>().prop_map(Value::Bool),
        any::<String>().prop_map(Value::String),
        array().prop_map(Value::Array),
    ]
}

/// Type and dimensions that fit each other.
fn shape() -> impl Strategy<Value = (TensorType, Vec<u64>)> {
    (prop::sample::select(TensorType::KNOWN), vec(1_u64..4, 1..=4)).prop_map(|(ty, mut dims)| {
        dims[0] *= ty.block().expect("a known type").elements;
        (ty, dims)
    })
}

prop_compose! {
    fn model()(
        keys in prop::collection::btree_map(any::<String>(), value(), 0..8),
        tensors in prop::collection::btree_map(any::<String>(), shape(), 0..6),
        alignment in prop::option::of(0_u32..8),
    ) -> Writer {
        let mut writer = Writer::new();
        for (key, value) in keys {
            writer.set(&key, value).expect("a valid key");
        }
        if let Some(log) = alignment {
            writer.set("general.alignment", 1_u32 << log).expect("a valid key");
        }
        for (name, (ty, dims)) in tensors {
            writer.tensor(&name, &dims, ty).expect("a valid tensor");
        }
        writer
    }
}

proptest! {
    #[test]
    fn reading_gives_what_was_written(
        keys in prop::collection::btree_map("[a-z.]{1,20}", value(), 0..8),
        shapes in vec(shape(), 0..6),
    ) {
        let mut writer = Writer::new();
        for (key, value) in &keys {
            writer.set(key, value.clone()).expect("a valid key");
        }
        for (index, (ty, dims)) in shapes.iter().enumerate() {
            writer.tensor(&format!("t{index}"), dims, *ty).expect("a valid tensor");
        }
        let file = to_bytes(&writer);
        let model = parse(&file);
        prop_assert_eq!(model.version, 3);
        prop_assert!(model.metadata.iter().eq(keys.iter().map(|(key, value)| (key.as_str(), value))));
        prop_assert_eq!(model.tensors.len(), shapes.len());
        for (index, (tensor, (ty, dims))) in model.tensors.iter().zip(&shapes).enumerate() {
            prop_assert_eq!(&tensor.name, &format!("t{index}"));
            prop_assert_eq!((tensor.ty, &tensor.dims), (*ty, dims));
            prop_assert_eq!(tensor.offset % 32, 0);
            prop_assert_eq!(data(&file, tensor), pattern(tensor));
        }
    }

    #[test]
    fn writing_what_was_read_gives_the_same_bytes(writer in model()) {
        let file = to_bytes(&writer);
        prop_assert_eq!(to_bytes(&Writer::from(&parse(&file))), file);
    }

    /// Float bits, NaNs and their payloads included, survive (which `==` on floats cannot tell).
    #[test]
    fn float_bits_survive(bits32 in any::<u32>(), bits64 in any::<u64>()) {
        let mut writer = Writer::new();
        writer.set("f32", f32::from_bits(bits32)).expect("a valid key");
        writer.set("f64", vec![f64::from_bits(bits64)]).expect("a valid key");
        let model = parse(&to_bytes(&writer));
        let Some(Value::F32(single)) = model.metadata.get("f32") else { panic!("an f32") };
        let Some(Value::Array(Array::F64(double))) = model.metadata.get("f64") else { panic!("an f64 array") };
        prop_assert_eq!((single.to_bits(), double[0].to_bits()), (bits32, bits64));
    }
}

#[test]
fn every_value_type_survives() {
    let file = to_bytes(&sample());
    assert_eq!(to_bytes(&Writer::from(&parse(&file))), file);
}

#[test]
fn a_version_2_file_reads_the_same() {
    let mut file = to_bytes(&sample());
    let newer = parse(&file);
    file[4] = 2;
    let older = parse(&file);
    assert_eq!(older.version, 2);
    assert!(older.metadata.iter().eq(newer.metadata.iter()));
    assert_eq!(older.tensors, newer.tensors);
}

#[test]
fn the_alignment_key_rules_offsets() {
    let mut writer = sample();
    writer.set("general.alignment", 4096_u32).expect("a valid key");
    let file = to_bytes(&writer);
    let model = parse(&file);
    assert_eq!((model.files[0].data_start, model.files[0].alignment), (4096, 4096));
    for (index, tensor) in model.tensors.iter().enumerate() {
        assert_eq!(tensor.offset, 4096 * (index as u64 + 1));
        assert_eq!(data(&file, tensor), pattern(tensor));
    }
}

/// Only the header is read: the reader ends where the data start, and the rest is only promised.
#[test]
fn tensor_data_are_not_touched() {
    let file = to_bytes(&sample());
    let data_start = parse(&file).files[0].data_start as usize;
    let model = Gguf::read("header only", &file[..data_start], file.len() as u64).expect("a valid header");
    assert_eq!(model.tensors, parse(&file).tensors);
}

/// Terabytes are described, not allocated: sizes and offsets are 64 bits wide.
#[test]
fn a_model_of_terabytes_has_exact_sizes() {
    let first_bytes = 7168 * 3072 * 384 * 60 * 2_u64;
    let header = Raw::header(2, 0).tensor("f16", &[7168, 3072, 384, 60], 1, 0).tensor("q2_k", &[256], 10, first_bytes);
    let data_start = header.0.len().next_multiple_of(32) as u64;
    let length_bytes = data_start + first_bytes + 84;
    let model = Gguf::read("huge", &header.0[..], length_bytes).expect("a valid header");
    let [first, second] = model.tensors.iter().collect::<Vec<_>>()[..] else { panic!("two tensors") };
    assert_eq!((first.elements(), first.size_bytes().ok()), (507_343_011_840, Some(1_014_686_023_680)));
    assert_eq!((first.row_bytes().ok(), second.row_bytes().ok()), (Some(14_336), Some(84)));
    assert_eq!(second.offset, data_start + first_bytes);
    let error = Gguf::read("huge", &header.0[..], length_bytes - 1).expect_err("a byte too short");
    assert_eq!(error.kind, ErrorKind::Truncated);
}

#[test]
fn a_provider_of_the_wrong_size_is_refused() {
    let mut writer = Writer::new();
    writer.tensor("x", &[4], TensorType::F32).expect("a valid tensor");
    for wrong in [0, 15, 17] {
        let error = writer.write(&mut vec![], |_, out| out.write_all(&vec![0; wrong])).expect_err("a wrong size");
        assert_eq!(error.kind, ErrorKind::DataSize);
        assert!(error.to_string().contains(&format!("{wrong} bytes")), "{error}");
    }
    let failed =
        writer.write(&mut vec![], |_, _| Err(std::io::Error::other("disk on fire"))).expect_err("failing data");
    assert_eq!(failed.kind, ErrorKind::Io);
    assert!(failed.to_string().contains("disk on fire") && failed.to_string().contains("\"x\""), "{failed}");
}

/// The writer refuses to describe what a reader would refuse.
#[test]
fn the_writer_refuses_what_cannot_be_read() {
    let mut writer = Writer::new();
    let mut deep = Array::U8(vec![1]);
    for _ in 0..4 {
        deep = Array::Array(vec![deep]);
    }
    assert_eq!(writer.set("deep", deep).expect_err("too deep").kind, ErrorKind::Malformed);
    assert_eq!(writer.set(&"k".repeat(65_536), 1_u8).expect_err("too long").kind, ErrorKind::Malformed);
    let mut tensor = |dims: &[u64], ty| writer.tensor("t", dims, ty).map(|_| ()).map_err(|error| error.kind);
    assert_eq!(tensor(&[], TensorType::F32), Err(ErrorKind::Dimensions));
    assert_eq!(tensor(&[1; 5], TensorType::F32), Err(ErrorKind::Dimensions));
    assert_eq!(tensor(&[0], TensorType::F32), Err(ErrorKind::Dimensions));
    assert_eq!(tensor(&[33], TensorType::Q8_0), Err(ErrorKind::Dimensions));
    assert_eq!(tensor(&[1 << 62, 4], TensorType::F32), Err(ErrorKind::Dimensions));
    assert_eq!(tensor(&[1], TensorType::Unknown(99)), Err(ErrorKind::TensorType));
    assert_eq!(tensor(&[1], TensorType::F32), Ok(()));
    assert_eq!(tensor(&[1], TensorType::F32), Err(ErrorKind::Duplicate));
    let mut writer = Writer::new();
    writer.set("general.alignment", 48_u32).expect("a valid key");
    let error = writer.write(&mut vec![], |_, _| Ok(())).expect_err("not a power of two");
    assert_eq!(error.kind, ErrorKind::Alignment);
}

/// A header as large as DeepSeek V4's (129,280 tokens, 127,741 merges, 1,328 tensors) is no delay.
#[test]
fn a_large_vocabulary_parses_quickly() {
    let mut writer = Writer::new();
    let tokens: Strings = (0..129_280).map(|index| format!("token{index}")).collect();
    let merges: Strings = (0..127_741).map(|index| format!("left{index} right")).collect();
    writer.set("tokenizer.ggml.tokens", tokens).expect("a valid key");
    writer.set("tokenizer.ggml.token_type", vec![1_i32; 129_280]).expect("a valid key");
    writer.set("tokenizer.ggml.merges", merges).expect("a valid key");
    for index in 0..1_328 {
        writer.tensor(&format!("blk.{index}.weight"), &[1], TensorType::F32).expect("a valid tensor");
    }
    let file = to_bytes(&writer);
    let once = || {
        let start = Instant::now();
        let model = parse(&file);
        assert_eq!(
            model.metadata.str_array("tokenizer.ggml.tokens").expect("strings").get(129_279),
            Some("token129279")
        );
        start.elapsed()
    };
    let fastest = (0..5).map(|_| once()).min().expect("five runs");
    println!("a header of {} bytes parses in {fastest:?}", file.len());
    assert!(fastest < Duration::from_millis(100), "{fastest:?}");
}
