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
