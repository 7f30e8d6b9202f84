//! What the tests of the whole model share: the oracle's files, and short ways to run a backend. Other backends' tests
//! include it too.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use cpu::{CpuBackend, Options};
use gguf::Gguf;
use model::{Arithmetic, Backend, Cancel, Error, Model, NoObserver, Precision, Row, forward};
use safetensors::SafeTensors;
use serde_json::Value;
use store::Source;

/// A file that `scripts/test-data` makes.
pub fn test_data(name: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/test-data").join(name);
    assert!(path.exists(), "{} is missing: run scripts/test-data first", path.display());
    path
}

/// The model of the oracle's file `name`, or the built-in `nano`, and where its bytes are.
pub fn open(name: &str) -> (Model, Source) {
    match name {
        "nano" => open_file(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/nano.gguf").as_ref()).unwrap(),
        name => open_file(&test_data(&format!("oracle/{name}.gguf"))).unwrap(),
    }
}

/// A file's model, and where its bytes are.
pub fn open_file(path: &Path) -> Result<(Model, Source), Error> {
    let file = Gguf::open(path)?;
    let source = Source::open(file.files.iter().map(|part| (&part.path, part.bytes)))?;
    Ok((Model::from_gguf(&file)?, source))
}

/// `count` tokens to read with a model.
pub fn tokens(name: &str, count: usize) -> Vec<u32> {
    match name {
        "nano" => (0..count).map(|i| 3 + (i * i * 31 % 2000) as u32).collect(),
        name => References::open(&format!("{name}.refs")).tokens()[..count].to_vec(),
    }
}

/// A model loaded onto the processor.
pub fn load(name: &str, options: Options) -> CpuBackend {
    let (model, source) = open(name);
    CpuBackend::load(&model, &source, options, &mut |_| {}).unwrap()
}

pub fn exact() -> Options {
    Options { precision: Precision::Exact, ..Options::default() }
}

pub fn fast() -> Options {
    Options { precision: Precision::Fast, ..Options::default() }
}

/// Exact, and without the model's own roundings: what the float64 reference computes.
pub fn plain() -> Options {
    Options { arithmetic: Arithmetic::Plain, ..exact() }
}

/// Rows of `tokens` for session `session` from `position`, all with logits.
pub fn rows(session: usize, position: usize, tokens: &[u32]) -> Vec<Row> {
    let row = |(i, &token)| Row { session, position: position + i, token, logits: true };
    tokens.iter().enumerate().map(row).collect()
}

/// Continues `state` by `tokens` in one pass; logits of all of them.
pub fn advance<B: Backend>(backend: &B, state: &mut B::State, tokens: &[u32]) -> Vec<f32> {
    if tokens.is_empty() {
        return Vec::new();
    }
    let rows = rows(0, backend.position(state), tokens);
    let logits = forward(backend, rows, &mut [state], &Cancel::default(), &mut NoObserver).unwrap();
    backend.read_logits(logits).unwrap()
}

/// All logits of `tokens` from an empty session, in passes of the given sizes (the last size repeats).
pub fn logits(backend: &impl Backend, tokens: &[u32], sizes: &[usize]) -> Vec<f32> {
    let mut state = backend.new_state().unwrap();
    let (mut logits, mut at, mut sizes) = (Vec::new(), 0, sizes.iter().copied());
    let mut size = sizes.next().unwrap();
    while at < tokens.len() {
        let end = tokens.len().min(at + size);
        logits.extend(advance(backend, &mut state, &tokens[at..end]));
        (at, size) = (end, sizes.next().unwrap_or(size));
    }
    logits
}

/// A session's bytes.
pub fn export<B: Backend>(backend: &B, state: &B::State) -> Vec<u8> {
    let mut bytes = Vec::new();
    backend.export(state, &mut bytes).unwrap();
    bytes
}

/// Fails with the first position whose logits have other bits, rather than with two pages of numbers.
#[track_caller]
pub fn assert_same(ours: &[f32], expected: &[f32], vocab: usize, what: &str) {
    assert_eq!(ours.len(), expected.len(), "{what}: number of logits");
    let differ = ours.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
    assert_eq!(differ.map(|i| i / vocab), None, "{what}: first position with other bits");
}

/// ‖ours − theirs‖ / ‖theirs‖.
#[track_caller]
pub fn distance(ours: &[f32], theirs: &[f32]) -> f64 {
    assert_eq!(ours.len(), theirs.len(), "number of values");
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let off = square(&mut ours.iter().zip(theirs).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    (off / square(&mut theirs.iter().map(|&b| f64::from(b)))).sqrt()
}

/// The reference outputs of one model.
pub struct References {
    bytes: Vec<u8>,
}

impl References {
    pub fn open(name: &str) -> References {
        References { bytes: std::fs::read(test_data(&format!("oracle/{name}.safetensors"))).unwrap() }
    }

    fn raw(&self, name: &str) -> Vec<[u8; 4]> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = tensors.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(tensor.dtype().bitsize(), 32, "{name} has elements of 4 bytes");
        tensor.data().as_chunks().0.to_vec()
    }

    pub fn floats(&self, name: &str) -> Vec<f32> {
        self.raw(name).into_iter().map(f32::from_le_bytes).collect()
    }

    pub fn ints(&self, name: &str) -> Vec<i32> {
        self.raw(name).into_iter().map(i32::from_le_bytes).collect()
    }

    pub fn tokens(&self) -> Vec<u32> {
        self.ints("tokens").into_iter().map(|token| token as u32).collect()
    }

    pub fn has(&self, name: &str) -> bool {
        SafeTensors::deserialize(&self.bytes).unwrap().names().contains(&name)
    }
}

/// One entry of docs/spec/model-vectors.json.
pub fn vectors(name: &str) -> Value {
    let file = include_str!("../../../../docs/spec/model-vectors.json");
    serde_json::from_str::<Value>(file).unwrap()[name].take()
}

/// An array of numbers as f32.
pub fn floats(value: &Value) -> Vec<f32> {
    let number = |value: &Value| value.as_f64().expect("a number") as f32;
    value.as_array().expect("an array").iter().map(number).collect()
}

/// Index of the largest value; the first of equals.
pub fn argmax(row: &[f32]) -> usize {
    row.iter().enumerate().fold(0, |best, (i, &value)| if value > row[best] { i } else { best })
}
