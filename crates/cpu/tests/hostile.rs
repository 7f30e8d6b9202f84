//! Metadata that nobody would write on purpose: every number of a model's header replaced by extreme ones, one at a time.
//! Each file is refused with an error or computes a token; nothing panics and nothing asks for absurd memory.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};

use common::{rows, test_data};
use cpu::{CpuBackend, Options};
use gguf::{Gguf, Metadata, Value, Writer};
use model::{Backend, Cancel, Error, Model, NoObserver, forward};
use peak_alloc::PeakAlloc;
use store::Source;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// A model of 13 MB needs a few times its size while it is written, parsed and loaded again.
const MOST_BYTES: usize = 256 << 20;

/// A value that extreme numbers can take the place of.
fn is_number(value: &Value) -> bool {
    !matches!(value, Value::Bool(_) | Value::String(_) | Value::Array(_))
}

/// The model with one key changed, its weights as they are.
fn changed(file: &Gguf, bytes: &[u8], key: &str, value: &Value) -> Vec<u8> {
    let mut writer = Writer::new();
    for (other, old) in file.metadata.iter() {
        writer.set(other, if other == key { value.clone() } else { old.clone() }).unwrap();
    }
    for tensor in file.tensors.iter() {
        writer.tensor(&tensor.name, &tensor.dims, tensor.ty).unwrap();
    }
    let mut out = Vec::with_capacity(bytes.len() + (1 << 16));
    let data = |info: &gguf::TensorInfo, to: &mut dyn std::io::Write| {
        let original = file.tensors.get(&info.name).expect("the same tensors");
        let size_bytes = original.size_bytes().expect("a known type") as usize;
        to.write_all(&bytes[original.offset as usize..][..size_bytes])
    };
    writer.write(&mut out, data).unwrap();
    out
}

/// Binds, loads and computes one token.
fn run(bytes: &[u8]) -> Result<(), Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("changed.gguf");
    std::fs::write(&path, bytes).unwrap();
    let file = Gguf::open(&path)?;
    let model = Model::from_gguf(&file)?;
    let source = Source::open(file.files.iter().map(|part| (&part.path, part.bytes)))?;
    let backend = CpuBackend::load(&model, &source, Options { threads: 1, ..Options::default() }, &mut |_| ())?;
    let mut state = backend.new_state()?;
    forward(&backend, rows(0, 0, &[1]), &mut [&mut state], &Cancel::default(), &mut NoObserver)?;
    Ok(())
}

/// The extreme values for one key, each in the type that says it best.
fn extremes() -> Vec<Value> {
    let whole = [0, 1, 2, 1 << 31, u64::from(u32::MAX), u64::MAX].map(Value::U64);
    let broken = [-1.0, 0.0, 1e-30, 3e38, f32::NAN, f32::INFINITY].map(Value::F32);
    whole.into_iter().chain(broken).chain([Value::I32(-1)]).collect()
}

#[test]
fn extreme_numbers_in_the_metadata_are_refused_or_computed_with() {
    let bytes = std::fs::read(test_data("oracle/tiny-q4.gguf")).unwrap();
    let file = Gguf::parse("tiny-q4.gguf", &bytes).unwrap();
    let keys = |metadata: &Metadata| -> Vec<String> {
        let numbers = metadata.iter().filter(|(key, value)| key.starts_with("deepseek4.") && is_number(value));
        numbers.map(|(key, _)| key.to_owned()).chain(["deepseek4.swiglu_clamp_exp".to_owned()]).collect()
    };
    let (mut refused, mut computed, mut faults) = (0, 0, Vec::new());
    std::panic::set_hook(Box::new(|_| ()));
    for key in keys(&file.metadata) {
        for value in extremes() {
            let changed = changed(&file, &bytes, &key, &value);
            ALLOCATOR.reset_peak_usage();
            let before_bytes = ALLOCATOR.current_usage();
            let result = catch_unwind(AssertUnwindSafe(|| run(&changed)));
            let peak_bytes = ALLOCATOR.peak_usage() - before_bytes;
            if peak_bytes >= MOST_BYTES {
                faults.push(format!("{key} = {value:?} asked for {peak_bytes} bytes"));
            }
            match result {
                Ok(Ok(())) => computed += 1,
                Ok(Err(_)) => refused += 1,
                Err(_) => faults.push(format!("{key} = {value:?} panicked")),
            }
        }
    }
    drop(std::panic::take_hook());
    assert!(faults.is_empty(), "{faults:#?}");
    println!("{refused} files refused, {computed} computed with");
    assert!(refused > 200 && computed > 20);
}
