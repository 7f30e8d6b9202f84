//! Whole models on software Vulkan: as near to the CPU's Exact as f32 allows, and the same bytes wherever experts live.

use gguf::Gguf;
use gpu::{Checks, Choice, GpuBackend, Options, Placement, Slabs};
use model::{Arithmetic, Backend, Cancel, Model, NoObserver, Precision, Row, forward};
use store::{Residency, Source};

/// A model of the oracle.
fn open(name: &str) -> (Model, Source) {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/test-data/oracle");
    let path = folder.join(format!("{name}.gguf"));
    assert!(path.exists(), "{} is missing: run scripts/test-data first", path.display());
    let file = Gguf::open(&path).unwrap();
    let source = Source::open(file.files.iter().map(|part| (&part.path, part.bytes))).unwrap();
    (Model::from_gguf(&file).unwrap(), source)
}

/// The software adapter, which scripts/test installs.
fn software() -> Choice {
    let found = gpu::adapters().into_iter().find(|adapter| adapter.kind == "software");
    Choice::Index(found.expect("Mesa's software Vulkan is installed (mesa-vulkan-drivers, libvulkan1)").index)
}

fn on_gpu(model: &Model, source: &Source, options: Options) -> GpuBackend {
    GpuBackend::load(model, source, (software(), Checks::On), options, &mut |_| ()).unwrap()
}

/// Logits after each pass over made-up tokens, in passes of these sizes.
fn logits<B: Backend>(backend: &B, sizes: &[usize]) -> Vec<Vec<f32>> {
    let mut state = backend.new_state().unwrap();
    let vocab = backend.config().vocab_size;
    let mut after = Vec::new();
    for &size in sizes {
        let start = backend.position(&state);
        let row = |position: usize| Row {
            session: 0,
            position,
            token: ((position * 37 + 11) % vocab) as u32,
            logits: position + 1 == start + size,
        };
        let rows = (start..start + size).map(row).collect();
        let logits = forward(backend, rows, &mut [&mut state], &Cancel::default(), &mut NoObserver).unwrap();
        after.push(backend.read_logits(logits).unwrap());
    }
    after
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let off = square(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    (off / square(&mut b.iter().map(|&b| f64::from(b)))).sqrt()
}

/// A pass of more rows than a ring holds, single tokens, few rows and many.
const SIZES: [usize; 6] = [100, 1, 1, 3, 10, 20];

#[test]
fn logits_are_near_those_of_the_cpu() {
    for (name, precision, bound) in [
        ("tiny-q8", Precision::Exact, 5e-6),
        ("tiny-iq2", Precision::Exact, 5e-6),
        ("tiny-q4", Precision::Exact, 5e-6),
        ("tiny-iq2", Precision::Fast, 1e-2),
    ] {
        let (model, source) = open(name);
        let arithmetic = Arithmetic::Plain;
        let ours = on_gpu(&model, &source, Options { arithmetic, precision, ..Options::default() });
        let exact = cpu::Options { arithmetic, precision: Precision::Exact, ..cpu::Options::default() };
        let cpu = cpu::CpuBackend::load(&model, &source, exact, &mut |_| ()).unwrap();
        for (ours, expected) in logits(&ours, &SIZES).iter().zip(&logits(&cpu, &SIZES)) {
            let distance = distance(ours, expected);
            println!("{name} {precision:?}: {distance:.1e}");
            assert!(
                distance <= bound,
                "{name} {precision:?}: relative distance {distance:e}, expected at most {bound:e}"
            );
        }
    }
}

#[test]
fn where_experts_live_changes_no_bit() {
    let (model, source) = open("tiny-iq2");
    let (bytes, experts) = (gpu::slot_bytes(&model).unwrap(), model.config.experts);
    let all: u64 = bytes.iter().map(|bytes| bytes * experts as u64).sum();
    for precision in [Precision::Exact, Precision::Fast] {
        let expected = logits(&on_gpu(&model, &source, Options { precision, ..Options::default() }), &SIZES);
        for part in [0, 25, 100] {
            let memory = (all * part / 100).max(bytes.iter().max().unwrap() * bytes.len() as u64);
            let mut slabs = Slabs::plan(&bytes, experts, memory, all / 3).unwrap();
            if part == 0 {
                slabs.slots.iter_mut().for_each(|slots| *slots = 1);
            }
            let host = Residency::Streamed { slots: vec![1] };
            let placement = Placement::Streamed { slabs: slabs.clone(), host };
            let backend = on_gpu(&model, &source, Options { precision, placement, ..Options::default() });
            assert!(logits(&backend, &SIZES) == expected, "{precision:?} with {:?} slots", slabs.slots);
            let counts = backend.stats().cache;
            assert!(counts.misses > 0 && (part > 0 || counts.evictions > 0), "{part} %: {counts:?}");
        }
    }
}
