//! What a session of Flash costs, measured at the allocator.

mod common;

use std::sync::Arc;

use common::flash;
use model::kv::CompressorLayout;
use model::state::{CompressorDelta, Delta, LayerDelta, StateBytes};
use model::{Arithmetic, KvLayout, Precision, State};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// What a pass of `tokens` tokens from `start` would add.
fn delta(layout: &KvLayout, start: usize, tokens: usize) -> Delta {
    let compressor = |compressor: Option<CompressorLayout>| {
        compressor.map_or_else(CompressorDelta::default, |c| CompressorDelta {
            inputs: vec![0.5; tokens * 2 * c.width],
            rows: vec![7; ((start + tokens) / c.ratio - start / c.ratio) * c.row.row_bytes()],
        })
    };
    let layers = layout.layers.iter().map(|layer| LayerDelta {
        raw: vec![3; tokens * layer.raw.row_bytes()],
        main: compressor(layer.main),
        index: compressor(layer.index),
    });
    Delta { tokens, layers: layers.collect() }
}

#[test]
fn a_token_of_flash_costs_at_most_3600_bytes() {
    let layout = Arc::new(KvLayout::new(&flash(), 0, Arithmetic::Official, Precision::Exact));
    let before_bytes = ALLOCATOR.current_usage();
    let mut state = State::new(layout.clone());
    let grow = |state: &mut State, to: usize| {
        while state.position() < to {
            state.commit(&delta(&layout, state.position(), 256));
        }
        ALLOCATOR.current_usage()
    };
    let early_bytes = grow(&mut state, 4096);
    let late_bytes = grow(&mut state, 20_480);
    let a_token = (late_bytes - early_bytes) as f64 / (20_480.0 - 4096.0);
    let bytes = state.bytes();
    println!("growth {a_token:.1} B a token between 4,096 and 20,480 tokens; {bytes:?}");
    assert!(a_token <= 3600.0, "{a_token} B a token");
    let (counted, held) = (bytes.total(), late_bytes - before_bytes);
    assert!(held.abs_diff(counted) * 100 < held, "counted {counted} B, the allocator says {held} B");
    // What a plan reserves beforehand: a checkpoint more, for the moment when one replaces another.
    let planned = StateBytes::at_most(&layout, 20_480);
    let a_checkpoint = bytes.checkpoints / 8;
    assert_eq!(planned, StateBytes { checkpoints: 9 * a_checkpoint, ..bytes });
    let peak = ALLOCATOR.peak_usage() - before_bytes;
    let of_the_test = 256 * 330_000;
    assert!(peak < planned.total() + of_the_test, "planned {} B, the peak was {peak} B", planned.total());
    // What stepping back gives up is given back.
    let reached = state.rewind(4096 + 64);
    assert!(ALLOCATOR.current_usage() < early_bytes + (1 << 20), "after stepping back to {reached}");
}

/// A clone costs little, and nothing that it or the original does is seen by the other: both are then what they would
/// be had the other never been.
#[test]
fn a_clone_shares_rows_and_nothing_else() {
    let layout = Arc::new(KvLayout::new(&flash(), 0, Arithmetic::Official, Precision::Exact));
    let bytes = |state: &State| {
        let mut bytes = Vec::new();
        state.export(&mut bytes).unwrap();
        bytes
    };
    // `fill` tells rows of one from those of the other.
    let commit = |state: &mut State, tokens: usize, fill: u8| {
        let mut delta = delta(&layout, state.position(), tokens);
        for layer in &mut delta.layers {
            [&mut layer.raw, &mut layer.main.rows, &mut layer.index.rows].into_iter().for_each(|rows| rows.fill(fill));
        }
        state.commit(&delta);
    };
    let begin = || {
        let mut state = State::new(layout.clone());
        (0..37).for_each(|_| commit(&mut state, 100, 1));
        state
    };
    let (mut alone, mut other_alone, mut state) = (begin(), begin(), begin());
    let before_bytes = ALLOCATOR.current_usage();
    let mut clone = state.clone();
    commit(&mut clone, 40, 2);
    let held = ALLOCATOR.current_usage() - before_bytes;
    let planned = StateBytes::of_clone(&layout, state.position()).total();
    let new_pages = StateBytes::at_most(&layout, 3740).rows - StateBytes::at_most(&layout, 3700).rows;
    println!("a clone holds {held} B; planned {planned} B, and {new_pages} B for what is new");
    // The allocator also counts the lists of pages and rings.
    assert!(held < planned + new_pages + (1 << 20), "{held}");
    commit(&mut state, 70, 3);
    commit(&mut clone, 300, 4);
    state.rewind(3690);
    commit(&mut state, 500, 5);

    commit(&mut alone, 70, 3);
    alone.rewind(3690);
    commit(&mut alone, 500, 5);
    assert!(bytes(&state) == bytes(&alone), "what the clone did is seen");
    commit(&mut other_alone, 40, 2);
    commit(&mut other_alone, 300, 4);
    assert!(bytes(&clone) == bytes(&other_alone), "what the original did is seen");
}

#[test]
fn rows_are_packed_as_the_specification_says() {
    let layout = KvLayout::new(&flash(), 0, Arithmetic::Official, Precision::Exact);
    let a_token: f64 = layout
        .layers
        .iter()
        .flat_map(|layer| [layer.main, layer.index])
        .flatten()
        .map(|compressor| compressor.row.row_bytes() as f64 / compressor.ratio as f64)
        .sum();
    assert_eq!(a_token.round(), 3514.0, "docs/spec/model.md §7");
}

/// The formula of docs/spec/model.md §7, which counts elements.
#[test]
fn a_token_reads_the_rows_of_the_specification() {
    let layout = KvLayout::new(&flash(), 0, Arithmetic::Plain, Precision::Exact);
    let (window, top_k) = (128, 512);
    for n in [256, 2048, 4096, 65_536, 1 << 20] {
        let scored = if n / 4 > top_k { n / 4 * 128 } else { 0 };
        let elements = 43 * window * 512 + 21 * (top_k.min(n / 4) * 512 + scored) + 20 * (n / 128) * 512;
        assert_eq!(layout.read_bytes(n, top_k), 4 * elements, "{n}");
    }
    assert_eq!(layout.read_bytes(0, top_k), 43 * 512 * 4, "the first token reads itself");
}
