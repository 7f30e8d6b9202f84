//! Any bytes: importing a saved state returns, and what it accepts is exported the same.
//!
//!     mkdir -p fuzz/corpus/state
//!     cargo +nightly fuzz run state fuzz/corpus/state -- -max_total_time=60

#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use model::kv::{CompressorLayout, LayerLayout, RowFormat};
use model::state::Delta;
use model::{Arithmetic, KvLayout, Precision, State};

/// A layer of each kind, with rows as short as they can be.
fn layout() -> Arc<KvLayout> {
    let raw = RowFormat::F32 { width: 2 };
    let compressor = |ratio: usize| {
        let overlaps = ratio == 4;
        CompressorLayout { ratio, overlaps, row: raw, width: if overlaps { 4 } else { 2 } }
    };
    let layer = |main: Option<usize>, index: Option<usize>| LayerLayout {
        raw,
        main: main.map(compressor),
        index: index.map(compressor),
    };
    let layers = vec![layer(None, None), layer(Some(4), Some(4)), layer(Some(128), None)];
    let (arithmetic, precision) = (Arithmetic::Plain, Precision::Exact);
    Arc::new(KvLayout { identity: 7, arithmetic, precision, window: 4, layers })
}

fuzz_target!(|bytes: &[u8]| {
    let layout = layout();
    // The checksum would stop every guess: give each input the right one.
    let mut bytes = bytes.to_vec();
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    let Ok(mut state) = State::import(layout.clone(), &mut bytes.as_slice()) else { return };
    let mut exported = Vec::new();
    state.export(&mut exported).expect("writing to memory");
    assert!(bytes.starts_with(&exported[..exported.len() - 4]));
    state.rewind(state.position() / 2);
    state.commit(&Delta::new(&layout, 0));
});
