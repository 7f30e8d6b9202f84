//! More than 100,000 damaged headers, always the same ones: the parser neither panics nor allocates more than a
//! small multiple of the bytes it was given. (Alone in its binary, so that the allocator sees no other test.)

mod common;

use std::collections::BTreeMap;
use std::panic::catch_unwind;
use std::time::{Duration, Instant};

use common::{Raw, seeds};
use gguf::{Gguf, Metadata, Writer};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const CASES: u64 = 120_000;

/// No case may have this much memory at once.
const LIMIT_BYTES: usize = 64 << 20;

/// The tighter bound that the parser really keeps: this many bytes for each byte of the file, plus a constant.
const PER_FILE_BYTE: usize = 40;
const CONSTANT_BYTES: usize = 64 << 10;

const TIME_LIMIT: Duration = Duration::from_secs(30);

/// SplitMix64 (Steele, Lea, Flood 2014): small, seeded, the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

fn flip_bits(file: &mut [u8], random: &mut Random) {
    for _ in 0..=random.below(4) {
        let at = random.below(file.len());
        if let Some(byte) = file.get_mut(at) {
            *byte ^= 1 << random.below(8);
        }
    }
}

fn truncate(file: &mut Vec<u8>, random: &mut Random) {
    file.truncate(random.below(file.len()));
}

/// Overwrites what looks like a count, a length, an offset or a type id with a number that breaks careless code.
fn attack_length(file: &mut [u8], random: &mut Random) {
    let small = |at: &usize| u64::from_le_bytes(file[*at..at + 8].try_into().expect("8 bytes")) < 1 << 16;
    let targets: Vec<usize> = (0..file.len().saturating_sub(7)).filter(small).collect();
    if targets.is_empty() {
        return;
    }
    let at = random.pick(&targets);
    let length = file.len() as u64;
    let near = (length - at as u64).wrapping_add(random.next() % 64).wrapping_sub(32);
    let hostile = [0, 1, 2, length, near, near / 8, 1 << 16, 1 << 31, 1 << 32, 1 << 40, 1 << 61, 1 << 63, u64::MAX / 8];
    let value = match random.below(4) {
        0 => random.pick(&hostile).wrapping_neg(),
        1 => random.next() % 100,
        _ => random.pick(&hostile),
    };
    let width = random.pick(&[1, 4, 8]);
    file[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
}

/// Replaces a piece of the file by a piece of another.
fn splice(file: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let mut piece = |bytes: &[u8]| {
        let start = random.below(bytes.len());
        start..start + random.below((bytes.len() - start).min(128))
    };
    let (to, from) = (piece(file), piece(other));
    file.splice(to, other[from].iter().copied());
}

fn mutated(seeds: &[(&str, Vec<u8>)], random: &mut Random) -> Vec<u8> {
    let mut file = seeds[random.below(seeds.len())].1.clone();
    for _ in 0..=random.below(3) {
        match random.below(8) {
            0..=1 => flip_bits(&mut file, random),
            2 => truncate(&mut file, random),
            3..=5 => attack_length(&mut file, random),
            _ => splice(&mut file, &seeds[random.below(seeds.len())].1, random),
        }
    }
    file
}

/// Parses, asks everything that can be asked, and says what came of it.
fn exercise(file: &[u8]) -> String {
    match Gguf::parse("mutated.gguf", file) {
        Err(error) => {
            assert!(error.to_string().starts_with("mutated.gguf: "));
            format!("{:?}", error.kind)
        }
        Ok(model) => {
            ask_everything(&model.metadata);
            let known = model.tensors.iter().all(|tensor| tensor.size_bytes().is_ok());
            if known && !model.tensors.is_empty() {
                let written = common::to_bytes(&Writer::from(&model));
                assert!(
                    common::parse(&written)
                        .metadata
                        .iter()
                        .map(|(key, _)| key)
                        .eq(model.metadata.iter().map(|(key, _)| key))
                );
            }
            "parsed".to_owned()
        }
    }
}

fn ask_everything(metadata: &Metadata) {
    for (key, value) in metadata.iter() {
        assert!(!value.to_string().is_empty());
        let answers = [
            metadata.u64(key).is_ok(),
            metadata.u32(key).is_ok(),
            metadata.f32(key).is_ok(),
            metadata.bool(key).is_ok(),
            metadata.str(key).is_ok(),
            metadata.i64_array(key).is_ok(),
            metadata.f32_array(key).is_ok(),
            metadata.str_array(key).is_ok(),
        ];
        assert!(answers.iter().filter(|&&answer| answer).count() <= 2, "{key:?} is of many types");
    }
}

/// Valid headers of about a megabyte that ask for as much memory per byte as the format allows.
fn dense_headers() -> Vec<Vec<u8>> {
    const COUNT: u64 = 30_000;
    let array = |ty: u32| Raw::header(0, 1).string(b"k").u32(9).u32(ty).u64(COUNT);
    let numbered = |raw, add: fn(Raw, &str) -> Raw| (0..COUNT).fold(raw, |raw, index| add(raw, &format!("{index:x}")));
    vec![
        array(8).zeros(8 * COUNT as usize).0,
        array(9).zeros(12 * COUNT as usize).0,
        numbered(Raw::header(0, COUNT), |raw, name| raw.string(name.as_bytes()).u32(0).u8(0)).0,
        numbered(Raw::header(COUNT, 0), |raw, name| {
            let offset = 32 * u64::from_str_radix(name, 16).expect("a number");
            raw.tensor(name, &[1], 99, offset)
        })
        .zeros(32 * COUNT as usize)
        .0,
    ]
}

#[test]
fn no_damaged_header_panics_or_wastes_memory() {
    let start = Instant::now();
    let seeds = seeds();
    let mut outcomes = BTreeMap::<String, u64>::new();
    let mut largest_bytes = 0;
    let dense = dense_headers();
    let mutations = (0..CASES).map(|case| mutated(&seeds, &mut Random(case)));
    for (case, file) in mutations.chain(dense).enumerate() {
        let before_bytes = ALLOCATOR.current_usage();
        ALLOCATOR.reset_peak_usage();
        let outcome = catch_unwind(|| exercise(&file)).unwrap_or_else(|_| panic!("case {case} panics: {file:?}"));
        let used_bytes = ALLOCATOR.peak_usage() - before_bytes;
        assert!(used_bytes < LIMIT_BYTES, "case {case} takes {used_bytes} bytes");
        let bound_bytes = PER_FILE_BYTE * file.len() + CONSTANT_BYTES;
        assert!(used_bytes < bound_bytes, "case {case} of {} bytes takes {used_bytes} bytes", file.len());
        largest_bytes = largest_bytes.max(used_bytes);
        *outcomes.entry(outcome).or_default() += 1;
    }
    let elapsed = start.elapsed();
    println!("{CASES} mutated headers in {elapsed:?}, at most {largest_bytes} bytes at once: {outcomes:?}");
    assert!(elapsed < TIME_LIMIT, "{elapsed:?}");
    for kind in
        ["parsed", "Truncated", "Malformed", "Duplicate", "Dimensions", "Alignment", "Overlap", "NotGguf", "Split"]
    {
        assert!(outcomes.get(kind).is_some_and(|&count| count > 10), "hardly any case ends as {kind}: {outcomes:?}");
    }
}
