//! The bits of Exact and of Fast, pinned: hashes of the built-in nano's logits. Every instruction set, thread count and
//! chunking must give them. They change only with the weights of models/nano.gguf or, for a reason worth writing down,
//! with a definition. A failing test prints what it found.

mod common;
#[path = "../../quant/tests/common/levels.rs"]
mod levels;

use common::{exact, fast, logits, plain};
use cpu::{CpuBackend, Level, Options};
use gguf::Gguf;
use levels::levels;
use model::Model;
use store::Source;

/// XXH3-64 of the little-endian logits of [`tokens`].
const OFFICIAL: u64 = 0xa541_8586_c023_1e4d;
const PLAIN: u64 = 0xc488_2103_c6b4_eac3;
const FAST: u64 = 0x14d8_48ec_f7b6_423f;
/// Of the first [`FEW`] alone.
const FEW_OFFICIAL: u64 = 0x8b79_87c1_c4ba_b09b;
const FEW_FAST: u64 = 0xf81b_79f2_8a8a_b6b2;

/// Few enough for an emulated processor: `scripts/test-arm` runs them.
const FEW: usize = 24;

/// Tokens enough that the indexer chooses and a ratio-128 window closes twice.
fn tokens() -> Vec<u32> {
    (0..300).map(|i: u32| 3 + i * i * 31 % 2000).collect()
}

/// Of passes of `chunks` rows, the last of which repeats.
fn hash(options: Options, chunks: &[usize], tokens: &[u32]) -> u64 {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/nano.gguf");
    let file = Gguf::open(path.as_ref()).unwrap();
    let source = Source::open(file.files.iter().map(|part| (&part.path, part.bytes))).unwrap();
    let backend = CpuBackend::load(&Model::from_gguf(&file).unwrap(), &source, options, &mut |_| {}).unwrap();
    let bytes: Vec<u8> = logits(&backend, tokens, chunks).iter().flat_map(|logit| logit.to_le_bytes()).collect();
    xxhash_rust::xxh3::xxh3_64(&bytes)
}

#[test]
fn nano_has_the_pinned_bits() {
    for (options, expected) in [(exact(), OFFICIAL), (plain(), PLAIN), (fast(), FAST)] {
        let found = hash(Options { threads: 2, ..options.clone() }, &[64], &tokens());
        assert_eq!(found, expected, "{options:?}, chunks of 64: {found:#018x}");
    }
}

/// Scalar's fused multiply-adds are calls: in Exact it has the few tokens of the next test, and more in `invariance`.
#[test]
fn nano_has_the_pinned_bits_at_every_level() {
    for level in levels() {
        println!("{level:?}");
        let exact = (level != Level::Scalar).then(|| (exact(), OFFICIAL));
        for (options, expected) in exact.into_iter().chain([(fast(), FAST)]) {
            let options = Options { level, threads: 1, ..options };
            let found = hash(options.clone(), &[300], &tokens());
            assert_eq!(found, expected, "{options:?}: {found:#018x}");
        }
    }
}

#[test]
fn few_tokens_have_the_pinned_bits_at_every_level() {
    for level in levels() {
        for (options, expected) in [(exact(), FEW_OFFICIAL), (fast(), FEW_FAST)] {
            let options = Options { level, threads: 1, ..options };
            let found = hash(options.clone(), &[16, 1], &tokens()[..FEW]);
            assert_eq!(found, expected, "{options:?}: {found:#018x}");
        }
    }
}
