//! What is planned for a pass against what the allocator saw.

mod common;

use common::{exact, fast, load, rows};
use cpu::{Options, PassShape, pass_bytes};
use model::{Backend, Cancel, KvLayout, NoObserver, forward};
use peak_alloc::PeakAlloc;
use store::Residency;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Peak of one pass beyond what was held before it, and what was planned.
fn pass(name: &str, options: Options, chunk: usize, wanted_rows: usize) -> (f64, f64) {
    let threads = options.threads;
    let backend = load(name, options.clone());
    let config = backend.config();
    let layout = KvLayout::new(config, 0, options.arithmetic, options.precision);
    let mut state = backend.new_state().unwrap();
    let mut peak_bytes = 0;
    for start in (0..3 * chunk).step_by(chunk) {
        let tokens: Vec<u32> = (start..start + chunk).map(|i| (i * 31 % config.vocab_size) as u32).collect();
        let mut batch = rows(0, start, &tokens);
        batch.iter_mut().take(chunk - wanted_rows).for_each(|row| row.logits = false);
        ALLOCATOR.reset_peak_usage();
        let before = ALLOCATOR.current_usage();
        drop(forward(&backend, batch, &mut [&mut state], &Cancel::default(), &mut NoObserver).unwrap());
        // Committing replaces the pass by what the session keeps of it, which is planned as state.
        peak_bytes = peak_bytes.max(ALLOCATOR.peak_usage() - before);
    }
    let shape = PassShape { rows: chunk, wanted_rows, end_tokens: 3 * chunk, threads };
    (peak_bytes as f64, pass_bytes(config, &layout, shape) as f64)
}

/// The plan is a bound, and of the passes that it is made for a near one. Small passes use less: nothing is dequantised
/// ahead for one row, no expert is chosen by every row, and not every row has to choose what it attends to, all of which the
/// plan has to allow for.
#[test]
fn a_pass_takes_what_was_planned() {
    for name in ["tiny-q8", "pro-iq2", "mixed3-mixed"] {
        for (chunk, wanted, threads) in [(1, 1, 1), (17, 17, 1), (128, 1, 2), (256, 256, 2)] {
            for options in [exact(), fast()].map(|options| Options { threads, ..options }) {
                let (peak, planned) = pass(name, options.clone(), chunk, wanted);
                println!("{name} {chunk} rows, {options:?}: {peak} B of {planned} B, {:.3}", peak / planned);
                assert!(peak <= planned, "more than planned");
                assert!(chunk < 128 || peak > planned * 0.9, "far less than planned");
            }
        }
    }
}

#[test]
fn static_weights_are_counted_from_the_header() {
    for name in ["tiny-q8", "pro-iq2", "mixed3-mixed"] {
        let file = gguf::Gguf::open(&common::test_data(&format!("oracle/{name}.gguf"))).unwrap();
        let model = model::Model::from_gguf(&file).unwrap();
        let extents: Vec<_> = model.experts.iter().map(|layer| layer.extents).collect();
        let slots = vec![2; store::size_classes(&extents).1.len()];
        for (streamed, residency) in [(false, Residency::Resident), (true, Residency::Streamed { slots })] {
            let loaded = load(name, Options { residency, ..Options::default() }).weight_bytes();
            assert_eq!(cpu::static_bytes(&model, streamed), loaded.fixed, "{name}, streamed: {streamed}");
        }
    }
}
