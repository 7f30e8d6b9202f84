//! What several tests need: models to write, and raw headers that no writer would write.
#![allow(dead_code, reason = "each test binary uses its own part of this")]

use std::io::Write;

use gguf::{Array, Gguf, Strings, TensorInfo, TensorType, Writer};

/// The file that `writer` describes. Tensor data are bytes counted up from the length of the tensor's name.
pub fn to_bytes(writer: &Writer) -> Vec<u8> {
    let mut file = vec![];
    let size = writer.write(&mut file, write_pattern).expect("a valid model");
    assert_eq!(size, file.len() as u64);
    file
}

fn write_pattern(tensor: &TensorInfo, out: &mut dyn Write) -> std::io::Result<()> {
    out.write_all(&pattern(tensor))
}

/// The data that [`to_bytes`] gives a tensor.
pub fn pattern(tensor: &TensorInfo) -> Vec<u8> {
    let size_bytes = tensor.size_bytes().expect("a known type");
    (0..size_bytes).map(|index| (index + tensor.name.len() as u64) as u8).collect()
}

/// The bytes of one tensor in a single file.
pub fn data<'a>(file: &'a [u8], tensor: &TensorInfo) -> &'a [u8] {
    &file[tensor.offset as usize..][..tensor.size_bytes().expect("a known type") as usize]
}

/// A small model with every value type, arrays of every type and tensors of several.
pub fn sample() -> Writer {
    let mut writer = Writer::new();
    let set: Result<(), gguf::Error> = (|| {
        writer.set("general.architecture", "deepseek4")?;
        writer.set("a.u8", 200_u8)?.set("a.i8", -100_i8)?;
        writer.set("a.u16", 60_000_u16)?.set("a.i16", -30_000_i16)?;
        writer.set("a.u32", 4_000_000_000_u32)?.set("a.i32", -2_000_000_000)?;
        writer.set("a.u64", u64::MAX)?.set("a.i64", i64::MIN)?;
        writer.set("a.f32", 1.5_f32)?.set("a.f64", -2.5_f64)?;
        writer.set("a.yes", true)?.set("a.no", false)?;
        writer.set("b.u8", vec![1_u8, 2, 3])?.set("b.i8", vec![-1_i8])?;
        writer.set("b.u16", vec![7_u16; 5])?.set("b.i16", Vec::<i16>::new())?;
        writer.set("b.u32", vec![1_u32, 2])?.set("b.i32", vec![0, 4, 128])?;
        writer.set("b.u64", vec![1_u64 << 40])?.set("b.i64", vec![-1_i64, 1])?;
        writer.set("b.f32", vec![0.5_f32; 3])?.set("b.f64", vec![0.25_f64; 2])?;
        writer.set("b.bool", Array::Bool(vec![true, false]))?;
        writer.set("b.strings", ["", "<think>", "｜User｜"].into_iter().collect::<Strings>())?;
        let inner = vec![Array::I32(vec![1]), Array::String(Strings::default()), Array::Array(vec![])];
        writer.set("b.nested", Array::Array(inner))?;
        writer.tensor("token_embd.weight", &[64, 3], TensorType::F16)?;
        writer.tensor("blk.0.ffn_gate_exps.weight", &[256, 2, 3], TensorType::Iq2Xxs)?;
        writer.tensor("blk.0.attn_q_a.weight", &[32, 5], TensorType::Q8_0)?;
        writer.tensor("blk.0.attn_sinks.weight", &[1], TensorType::F32)?;
        writer.tensor("blk.0.ffn_gate_tid2eid.weight", &[6, 7], TensorType::I32)?;
        Ok(())
    })();
    set.expect("a valid model");
    writer
}

/// Small files of every sort, from which mutations and the fuzzer start.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let with = |keys: &[(&str, u32)]| {
        let mut writer = sample();
        for &(key, value) in keys {
            writer.set(key, value).expect("a valid key");
        }
        to_bytes(&writer)
    };
    let mut version_2 = to_bytes(&sample());
    version_2[4] = 2;
    vec![
        ("no_keys_no_tensors", to_bytes(&Writer::new())),
        ("one_tensor", Raw::header(1, 0).tensor("t", &[8], 0, 0).zeros(32 + 7).0),
        ("unknown_tensor_type", Raw::header(1, 0).tensor("t", &[8], 99, 0).zeros(32 + 7).0),
        ("every_value_type", with(&[])),
        ("version_2", version_2),
        ("aligned_to_64", with(&[("general.alignment", 64)])),
        ("split_part", with(&[("split.no", 0), ("split.count", 2), ("split.tensors.count", 9)])),
        ("pypi_gguf", include_bytes!("../fixtures/every_value.gguf").to_vec()),
    ]
}

/// Parses what must be a valid single file.
pub fn parse(bytes: &[u8]) -> Gguf {
    Gguf::parse("test.gguf", bytes).expect("a valid file")
}

/// Bytes put together by hand.
#[derive(Clone)]
pub struct Raw(pub Vec<u8>);

impl Raw {
    /// Magic, version 3 and the two counts.
    pub fn header(tensors: u64, keys: u64) -> Raw {
        Raw(b"GGUF".to_vec()).u32(3).u64(tensors).u64(keys)
    }

    pub fn u8(mut self, x: u8) -> Raw {
        self.0.push(x);
        self
    }

    pub fn u32(mut self, x: u32) -> Raw {
        self.0.extend(x.to_le_bytes());
        self
    }

    pub fn u64(mut self, x: u64) -> Raw {
        self.0.extend(x.to_le_bytes());
        self
    }

    pub fn string(mut self, string: &[u8]) -> Raw {
        self = self.u64(string.len() as u64);
        self.0.extend(string);
        self
    }

    pub fn tensor(mut self, name: &str, dims: &[u64], ty: u32, offset: u64) -> Raw {
        self = self.string(name.as_bytes()).u32(dims.len() as u32);
        for &dim in dims {
            self = self.u64(dim);
        }
        self.u32(ty).u64(offset)
    }

    /// `bytes` zeros.
    pub fn zeros(mut self, bytes: usize) -> Raw {
        self.0.resize(self.0.len() + bytes, 0);
        self
    }
}
