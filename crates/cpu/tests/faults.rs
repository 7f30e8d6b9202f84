//! What goes wrong with a disk, or is called off, in any phase of a request whose experts are streamed: the request fails with an
//! error that says what happened, or waits; the session is as it was, to the bit; later requests are right.

#[path = "common/cells.rs"]
#[allow(dead_code)]
mod cells;
mod common;

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cells::{open, streamed, tokens};
use common::{advance, load, rows, test_data};
use cpu::{CpuBackend, Options, Pass};
use gguf::Gguf;
use model::{Backend, Cancel, Error, Model, NoObserver, Observer, Precision, Stage, State, forward};
use store::reader::{Faults, Simulation};
use store::{ReaderKind, Source, StoreError};

const MODEL: &str = "tiny-iq2";
/// Tokens that the session holds before anything breaks, and those after them.
const HELD: usize = 20;
const NEXT: usize = 10;

fn bits(logits: Vec<f32>) -> Vec<u32> {
    logits.into_iter().map(f32::to_bits).collect()
}

/// Few slots and a disk made up: what is not broken still comes in another order and in pieces.
fn options(precision: Precision, faults: &'static Faults, latency_us: u64) -> Options {
    let residency = streamed(&open(MODEL).0, 4);
    let reader = ReaderKind::Simulated(Simulation { faults, latency_us, ..Simulation::reordering(5) });
    Options { precision, residency, reader, ..Options::default() }
}

/// Faults of a test, for the time the program runs.
fn faults() -> &'static Faults {
    Box::leak(Box::new(Faults::none()))
}

/// Bits of the logits of the `NEXT` tokens after the first `HELD`, from resident experts.
fn expected(precision: Precision) -> Vec<u32> {
    let backend = load(MODEL, Options { precision, ..Options::default() });
    let (tokens, mut state) = (tokens(MODEL, HELD + NEXT), backend.new_state().unwrap());
    advance(&backend, &mut state, &tokens[..HELD]);
    bits(advance(&backend, &mut state, &tokens[HELD..]))
}

/// A session that has read the first `HELD` tokens.
fn held(backend: &CpuBackend) -> State {
    let mut state = backend.new_state().unwrap();
    advance(backend, &mut state, &tokens(MODEL, HELD));
    state
}

fn export(backend: &CpuBackend, state: &State) -> Vec<u8> {
    let mut bytes = Vec::new();
    backend.export(state, &mut bytes).unwrap();
    bytes
}

/// A copy of the session, made by saving and loading it, gives the right logits.
fn assert_goes_on(backend: &CpuBackend, saved: &[u8], expected: &[u32], what: &str) {
    let mut state = backend.import(&mut &saved[..]).unwrap();
    assert!(bits(advance(backend, &mut state, &tokens(MODEL, HELD + NEXT)[HELD..])) == expected, "{what}");
}

/// Does something to the disk or the request after one stage of one layer.
struct After<'a> {
    at: (Option<usize>, Stage),
    act: &'a dyn Fn(),
}

impl Observer<CpuBackend> for After<'_> {
    fn after(&mut self, layer: Option<usize>, stage: Stage, _: &CpuBackend, _: &Pass) -> Result<(), Error> {
        if (layer, stage) == self.at {
            (self.act)();
        }
        Ok(())
    }
}

/// What breaks, and whether an error is the one it must give.
#[derive(Clone, Copy, Debug)]
enum Break {
    /// Reads fail from here on.
    Reads,
    /// The disk is stuck, and somebody who waits for it calls the request off.
    CancelWaiting,
    /// The request is called off while it computes.
    CancelComputing,
}

impl Break {
    fn is_right(self, error: &Error) -> bool {
        match self {
            Break::Reads => {
                matches!(error, Error::Store(StoreError::Read { cause, .. }) if cause.raw_os_error() == Some(5))
            }
            Break::CancelWaiting | Break::CancelComputing => matches!(error, Error::Cancelled),
        }
    }
}

/// A broken disk, a cancel that ends a wait and one that ends computing: after the embedding and after each stage of the first
/// and the last layer, in a pass of a prompt and in one of a decoded token. After each, a later request is right.
#[test]
fn faults_in_any_phase_leave_the_session_as_it_was() {
    for precision in [Precision::Exact, Precision::Fast] {
        let (faults, expected, tokens) = (faults(), expected(precision), tokens(MODEL, HELD + NEXT));
        let backend = load(MODEL, options(precision, faults, 5000));
        let mut state = held(&backend);
        let before = export(&backend, &state);
        let last = backend.config().layers - 1;
        let layers = [Some(0), Some(last)].map(|layer| Stage::LAYER.map(|stage| (layer, stage)));
        let places = [vec![(None, Stage::Embed)], layers.concat()].concat();
        for count in [NEXT, 1] {
            let mut failed = [0; 3];
            for (&at, breaks) in places
                .iter()
                .flat_map(|at| [Break::Reads, Break::CancelWaiting, Break::CancelComputing].map(|b| (at, b)))
            {
                let what = format!("{precision:?}, {count} rows, {breaks:?} after {at:?}");
                let cancel = Cancel::default();
                let act = || match breaks {
                    Break::Reads => faults.failing_reads.store(1000, Ordering::Relaxed),
                    Break::CancelWaiting => {
                        faults.stuck.store(true, Ordering::Relaxed);
                        cancel.cancel();
                    }
                    Break::CancelComputing => cancel.cancel(),
                };
                let rows = rows(0, HELD, &tokens[HELD..HELD + count]);
                let result = forward(&backend, rows, &mut [&mut state], &cancel, &mut After { at, act: &act });
                faults.failing_reads.store(0, Ordering::Relaxed);
                faults.stuck.store(false, Ordering::Relaxed);
                match result {
                    // What was broken was needed no more.
                    Ok(_) => state = backend.import(&mut &before[..]).unwrap(),
                    Err(error) => {
                        failed[breaks as usize] += 1;
                        assert!(breaks.is_right(&error), "{what}: {error}");
                    }
                }
                assert!(before == export(&backend, &state), "{what}: it left a trace");
                assert_goes_on(&backend, &before, &expected, &what);
            }
            assert!(failed.iter().all(|&failed| failed > Stage::LAYER.len()), "only {failed:?} passes failed");
        }
        assert!(bits(advance(&backend, &mut state, &tokens[HELD..])) == expected, "other bits after faults");
    }
}

/// A broken disk while weights are loaded: an error, and the next attempt is right.
#[test]
fn a_model_that_cannot_be_loaded_is_an_error() {
    let (faults, expected) = (faults(), expected(Precision::Exact));
    let (model, source) = open(MODEL);
    faults.failing_reads.store(1, Ordering::Relaxed);
    let load = || CpuBackend::load(&model, &source, options(Precision::Exact, faults, 5000), &mut |_| {});
    let error = load().err().expect("a read failed");
    assert!(Break::Reads.is_right(&error), "{error}");
    let backend = load().unwrap();
    assert_goes_on(&backend, &export(&backend, &held(&backend)), &expected, "after a failed attempt");
}

/// Every read takes up to 5 s of the disk's own time.
#[test]
fn a_slow_disk_changes_no_bit() {
    for precision in [Precision::Exact, Precision::Fast] {
        let backend = load(MODEL, options(precision, faults(), 5_000_000));
        assert_goes_on(&backend, &export(&backend, &held(&backend)), &expected(precision), "a slow disk");
    }
}

/// A disk that gives nothing for 5 s, in real time, and then goes on: the request waits, and counts that it did.
#[test]
fn a_stalled_disk_is_waited_for() {
    const STALL: Duration = Duration::from_secs(5);
    let (faults, expected) = (faults(), expected(Precision::Exact));
    let backend = load(MODEL, options(Precision::Exact, faults, 0));
    let before = export(&backend, &held(&backend));
    faults.stuck.store(true, Ordering::Relaxed);
    let (began, stalled_us) = (Instant::now(), backend.stats().stall_us);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(STALL);
            faults.stuck.store(false, Ordering::Relaxed);
        });
        assert_goes_on(&backend, &before, &expected, "after a stall");
    });
    let stalled = Duration::from_micros(backend.stats().stall_us - stalled_us);
    assert!(began.elapsed() >= STALL && stalled >= STALL - Duration::from_secs(1), "stalled for {stalled:?}");
}

/// A copy of the model at `path`, loaded with few slots.
fn load_copy(path: &Path, reader: ReaderKind) -> CpuBackend {
    let file = Gguf::open(path).unwrap();
    let source = Source::open(file.files.iter().map(|part| (&part.path, part.bytes))).unwrap();
    let model = Model::from_gguf(&file).unwrap();
    let residency = streamed(&model, 4);
    let options = Options { precision: Precision::Exact, residency, reader, ..Options::default() };
    CpuBackend::load(&model, &source, options, &mut |_| {}).unwrap()
}

/// The file loses all its experts between two requests: an error that names the file. The session goes on with a whole copy.
#[test]
fn a_file_truncated_in_use_fails_the_request() {
    let expected = expected(Precision::Exact);
    let simulated = ReaderKind::Simulated(Simulation::reordering(3));
    for reader in [ReaderKind::Buffered, ReaderKind::Direct, ReaderKind::Uring, simulated] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        std::fs::copy(test_data(&format!("oracle/{MODEL}.gguf")), &path).unwrap();
        let backend = load_copy(&path, reader);
        let mut state = held(&backend);
        let before = export(&backend, &state);

        let (model, _) = open(MODEL);
        let parts = model.experts.iter().flat_map(|layer| layer.extents.parts);
        let end = parts.map(|part| part.offset).min().unwrap() + 10;
        std::fs::File::options().write(true).open(&path).unwrap().set_len(end).unwrap();
        for count in [NEXT, 1] {
            let rows = rows(0, HELD, &tokens(MODEL, HELD + NEXT)[HELD..HELD + count]);
            let result = forward(&backend, rows, &mut [&mut state], &Cancel::default(), &mut NoObserver);
            let error = result.expect_err("nothing can be computed without experts");
            let is_noticed = matches!(&error, Error::Store(StoreError::Changed { path: named }) if *named == path);
            assert!(is_noticed, "{reader:?}, {count} rows: {error}");
            assert!(before == export(&backend, &state), "{reader:?}, {count} rows: it left a trace");
        }

        std::fs::copy(test_data(&format!("oracle/{MODEL}.gguf")), &path).unwrap();
        assert_goes_on(&load_copy(&path, reader), &before, &expected, "with a whole copy");
    }
}
