//! Where experts live changes no bit: every cell's logits are compared with those of the resident model.

mod common;

use std::path::PathBuf;

use common::{References, advance, test_data};
use cpu::{CpuBackend, Options, Residency};
use gguf::Gguf;
use model::{Backend, Model};
use store::ReaderKind;
use store::reader::Simulation;

/// Rows of the prompt, and of the tokens decoded one by one after it.
const PROMPT: usize = 140;
const DECODED: usize = 6;

fn path(name: &str) -> PathBuf {
    match name {
        "nano" => concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/nano.gguf").into(),
        name => test_data(&format!("oracle/{name}.gguf")),
    }
}

fn open(name: &str) -> (Model, store::Source) {
    let file = Gguf::open(&path(name)).unwrap();
    let source = store::Source::open(file.files.iter().map(|part| (&part.path, part.bytes))).unwrap();
    (Model::from_gguf(&file).unwrap(), source)
}

fn load(name: &str, options: Options) -> CpuBackend {
    let (model, source) = open(name);
    CpuBackend::load(&model, &source, options, &mut |_| {}).unwrap()
}

fn tokens(name: &str) -> Vec<u32> {
    match name {
        "nano" => (0..PROMPT + DECODED).map(|i| 3 + (i * i * 31 % 2000) as u32).collect(),
        name => References::open(&format!("{name}.refs")).tokens()[..PROMPT + DECODED].to_vec(),
    }
}

fn run(backend: &CpuBackend, tokens: &[u32], chunk: usize) -> Vec<u32> {
    let (prompt, decoded) = tokens.split_at(PROMPT);
    let mut state = backend.new_state().unwrap();
    let mut all = Vec::new();
    prompt.chunks(chunk).for_each(|chunk| all.extend(advance(backend, &mut state, chunk)));
    decoded.chunks(1).for_each(|token| all.extend(advance(backend, &mut state, token)));
    all.iter().map(|logit: &f32| logit.to_bits()).collect()
}

const READERS: [(ReaderKind, &str); 3] =
    [(ReaderKind::Buffered, "pread, buffered"), (ReaderKind::Direct, "pread, direct"), (ReaderKind::Uring, "io_uring")];

/// Slots of one cell, of a model with `layers` layers of `experts` experts, `used` chosen by a row.
#[derive(Clone, Copy, Debug)]
enum Slots {
    OnePerClass,
    Used,
    UsedPlusOne,
    Percent(usize),
}

fn slots(of: Slots, config: &model::Config) -> usize {
    match of {
        Slots::OnePerClass => 1,
        Slots::Used => config.experts_used,
        Slots::UsedPlusOne => config.experts_used + 1,
        Slots::Percent(percent) => config.layers * config.experts * percent / 100,
    }
}

/// Every pair of reader and number of slots once, over the three models; threads and chunks take turns.
fn cells(model: usize) {
    let simulated = |seed| (ReaderKind::Simulated(Simulation::reordering(seed)), "simulated");
    let readers = [READERS[0], READERS[1], READERS[2], simulated(1), simulated(2)];
    let sizes = [
        Slots::OnePerClass,
        Slots::Used,
        Slots::UsedPlusOne,
        Slots::Percent(25),
        Slots::Percent(50),
        Slots::Percent(100),
    ];
    let name = ["tiny-iq2", "mixed3-mixed", "nano"][model];
    let tokens = tokens(name);
    let expected = run(&load(name, Options::default()), &tokens, PROMPT);
    let pairs = (0..sizes.len()).flat_map(|i| (0..readers.len()).map(move |j| (i, j)));
    for (i, j) in pairs.filter(|(i, j)| (i + j) % 3 == model) {
        let (of, (reader, reader_name)) = (sizes[i], readers[j]);
        let (threads, chunk) = (1 + (i + j) % 2, [1, 17, 128, PROMPT][(i + 3 * j) % 4]);
        let (model, _) = open(name);
        let residency = Residency::Streamed { slots: slots(of, &model.config) };
        let backend = load(name, Options { threads, residency, reader, ..Options::default() });
        let ours = run(&backend, &tokens, chunk);
        let stats = backend.stats();
        let what = format!("{name}, {of:?} slots, {reader_name}, {threads} threads, chunks of {chunk}");
        println!("{what}: {stats:?}");
        let differ = ours.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(differ.map(|at| at / model.config.vocab_size), None, "{what}: first row with other bits");
        assert_eq!(ours.len(), expected.len());
        // The path that was asked for is the path that ran.
        match backend.note() {
            Some(note) => println!("not all of the cell was run: {note}"),
            None => assert_eq!(backend.reader(), reader_name, "{what}"),
        }
        let (counts, whole) = (stats.cache, matches!(of, Slots::Percent(100)));
        assert!(counts.misses + counts.prefetched > 0, "{what}: nothing was read");
        assert!(whole || counts.misses > 0 && counts.evictions > 0, "{what}: {counts:?}");
        assert!(!whole || counts.evictions == 0, "{what}: {counts:?}");
        if matches!(of, Slots::OnePerClass) {
            assert_eq!((counts.hits, counts.prefetched), (0, 0), "{what}: with one slot every expert is read");
        }
    }
}

#[test]
fn streaming_changes_no_bit_of_tiny() {
    cells(0);
}

#[test]
fn streaming_changes_no_bit_of_mixed_sizes() {
    cells(1);
}

#[test]
fn streaming_changes_no_bit_of_nano() {
    cells(2);
}
