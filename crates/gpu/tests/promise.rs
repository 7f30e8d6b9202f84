//! Where experts live changes no bit: logits with slots on the device, filled from host memory or from the file, equal those
//! with everything resident. And neither do checks in kernels.

mod common;

use common::{PRECISIONS, assert_same, checked_on_gpu, in_precision, on_gpu, open, rows, tokens};
use gpu::{Checks, GpuBackend, GpuPass, Options, Placement, Slabs};
use model::{Backend, Cancel, Error, Model, Observer, Precision, Stage, forward};
use store::{ExpertExtents, Residency};

/// Rows of each pass: more than a ring has room for, as many as compute by tiles all but routed experts, a few, and a single token.
const LARGE: [usize; 4] = [66, 10, 5, 1];

/// The same, but in Exact, whose every row takes a processor long, only a few more than share weights in place of the first.
fn passes(precision: Precision) -> [usize; 4] {
    match precision {
        Precision::Fast => LARGE,
        Precision::Exact => [12, 5, 1, 1],
    }
}

/// Which kernels a pass ran, by the names under which their time is taken.
#[derive(Default)]
struct Stages(Vec<&'static str>);

impl Stages {
    fn count(&self, name: &str) -> usize {
        self.0.iter().filter(|stage| **stage == name).count()
    }
}

impl Observer<GpuBackend> for Stages {
    fn after(&mut self, _: Option<usize>, stage: Stage, backend: &GpuBackend, pass: &GpuPass) -> Result<(), Error> {
        match stage {
            Stage::Embed => backend.time_stages(pass),
            Stage::Head => self.0.extend(backend.stage_times(pass)?.0.into_iter().map(|(name, _)| name)),
            _ => {}
        }
        Ok(())
    }
}

/// In how many groups the experts of a layer run, each as large as there are slots for.
#[derive(Clone, Copy, Debug)]
enum Groups {
    One,
    Several,
    Any,
}

/// Logits of all passes. Each must have run the kernels that its size and the precision ask for, and all experts of a layer
/// in `groups`.
fn read(backend: &GpuBackend, precision: Precision, passes: [usize; 4], groups: Groups, tokens: &[u32]) -> Vec<f32> {
    let (mut state, mut logits) = (backend.new_state().unwrap(), Vec::new());
    for count in passes {
        let at = backend.position(&state);
        let (mut stages, batch) = (Stages::default(), rows(0, at, &tokens[at..][..count]));
        logits.extend(forward(backend, batch, &mut [&mut state], &Cancel::default(), &mut stages).unwrap());
        let layers = backend.config().layers;
        let by_tiles = if precision == Precision::Fast && count > 8 { layers } else { 0 };
        assert_eq!(stages.count("shared expert"), by_tiles, "{precision:?}, {count} rows: layers computed by tiles");
        let config = backend.config();
        let is_by_choice = count * config.experts_used <= 4 * config.experts;
        let grouped = if is_by_choice { 0 } else { by_tiles };
        assert_eq!(stages.count("group"), grouped, "{precision:?}, {count} rows: layers with experts by tiles");
        assert_eq!(stages.count("experts' inputs"), by_tiles - grouped, "{precision:?}, {count} rows: by choice");
        let ran = stages.count("experts up");
        let as_expected = match groups {
            Groups::One => ran == layers,
            Groups::Several => ran > layers,
            Groups::Any => ran >= layers,
        };
        assert!(as_expected, "{count} rows, {layers} layers: experts ran {ran} times, expected {groups:?} a layer");
    }
    logits
}

/// How many slots there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slots {
    /// One in each slab.
    Fewest,
    Quarter,
    All,
}

/// So many slots in several slabs, of which each serves a layer or more.
fn slabs(model: &Model, slots: Slots) -> Slabs {
    let (bytes, experts) = (gpu::slot_bytes(model).unwrap(), model.config.experts);
    let all_bytes = bytes.iter().sum::<u64>() * experts as u64;
    let plan = |part: u64, slab: u64| Slabs::plan(&bytes, experts, all_bytes / part, all_bytes.div_ceil(slab)).unwrap();
    let slabs = match slots {
        Slots::Fewest => Slabs { slots: plan(1, 2).slots.iter().map(|_| 1).collect(), ..plan(1, 2) },
        Slots::Quarter => plan(4, 8),
        Slots::All => {
            Slabs { of_layer: (0..bytes.len()).collect(), slots: vec![experts; bytes.len()], slot_bytes: bytes }
        }
    };
    assert!(slabs.slots.len() > 1, "{slots:?}: {slabs:?}");
    slabs
}

/// A tier of host memory with one slot for each size of experts.
fn smallest_tier(model: &Model) -> Residency {
    let extents: Vec<ExpertExtents> = model.experts.iter().map(|layer| layer.extents).collect();
    Residency::Streamed { slots: store::size_classes(&extents).1.iter().map(|_| 1).collect() }
}

/// Some numbers of slots in both precisions, from host memory and from the file.
fn streaming_changes_no_bit(name: &str, wanted: &[Slots]) {
    let (model, _) = open(name);
    for precision in PRECISIONS {
        let (tokens, vocab) = (tokens(name, passes(precision).iter().sum()), model.config.vocab_size);
        let resident = on_gpu(name, in_precision(precision));
        let expected = read(&resident, precision, passes(precision), Groups::One, &tokens);
        assert_eq!(
            (resident.stats(), resident.host_stats()),
            Default::default(),
            "resident experts are not copied again"
        );
        for (slots, groups, host) in [
            (Slots::Fewest, Groups::Several, smallest_tier(&model)),
            (Slots::Quarter, Groups::Any, Residency::Resident),
            (Slots::All, Groups::One, smallest_tier(&model)),
        ] {
            if !wanted.contains(&slots) {
                continue;
            }
            let what = format!("{name}, {precision:?}, {slots:?}, host {host:?}");
            let (slabs, is_from_file) = (slabs(&model, slots), host != Residency::Resident);
            let placement = Placement::Streamed { slabs: slabs.clone(), host };
            let backend = on_gpu(name, Options { placement, ..in_precision(precision) });
            assert_eq!(backend.weight_bytes().1, slabs.bytes(), "{what}");
            let ours = read(&backend, precision, passes(precision), groups, &tokens);
            assert_same(&ours, &expected, vocab, &what);
            let (counts, copied, host) = (backend.stats().cache, backend.stats().read_bytes, backend.host_stats());
            println!("{what}: {counts:?}, {copied} bytes copied, {} read", host.read_bytes);
            assert!(counts.misses > 0, "{what}: {counts:?}");
            if let Slots::All = slots {
                assert_eq!(counts.evictions, 0, "{what}: everything has a slot");
            } else {
                assert!(counts.evictions > 0, "{what}: {counts:?}");
            }
            assert!(copied >= counts.misses * gpu::slot_bytes(&model).unwrap().into_iter().min().unwrap(), "{what}");
            assert_eq!(host.read_bytes > 0, is_from_file, "{what}: {host:?}");
        }
    }
}

#[test]
fn streaming_changes_no_bit_of_tiny() {
    streaming_changes_no_bit("tiny-iq2", &[Slots::Fewest, Slots::Quarter, Slots::All]);
}

#[test]
fn streaming_changes_no_bit_of_three_sizes_of_experts() {
    streaming_changes_no_bit("mixed3-mixed", &[Slots::Fewest]);
}

#[test]
fn streaming_changes_no_bit_of_nano() {
    streaming_changes_no_bit("nano", &[Slots::Fewest, Slots::Quarter, Slots::All]);
}

/// Kernels without checks keep their indices within their buffers: a check that ever acted would change bits.
#[test]
fn checks_change_no_bit() {
    use Precision::{Exact, Fast};
    let cases = [
        ("tiny-iq2", Exact, LARGE, true),
        ("tiny-iq2", Fast, LARGE, true),
        ("tiny-q4", Exact, passes(Exact), false),
        ("nano", Fast, LARGE, false),
    ];
    for (name, precision, passes, is_streamed) in cases {
        let (model, _) = open(name);
        let tokens = tokens(name, passes.iter().sum());
        let streamed = Placement::Streamed { slabs: slabs(&model, Slots::Quarter), host: Residency::Resident };
        let placement = if is_streamed { streamed } else { Placement::Resident };
        let unchecked = checked_on_gpu(name, Checks::Off, Options { placement, ..in_precision(precision) });
        let expected = read(&on_gpu(name, in_precision(precision)), precision, passes, Groups::Any, &tokens);
        let ours = read(&unchecked, precision, passes, Groups::Any, &tokens);
        assert_same(&ours, &expected, model.config.vocab_size, &format!("{name}, {precision:?}, unchecked"));
    }
}
