//! What goes wrong with a disk, or is called off, in any phase of a request whose experts are streamed: the request fails with an
//! error that says what happened, or waits; the session is as it was, to the bit; later requests are right.

#[path = "common/cells.rs"]
#[allow(dead_code)]
mod cells;
mod common;

use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use cells::streamed;
use common::{advance, export, load, open, rows, test_data, tokens};
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

/// A copy of the session, made by saving and loading it, gives the right logits.
fn assert_goes_on(backend: &CpuBackend, saved: &[u8], expected: &[u32], what: &str) {
    let mut state = backend.import(&mut &saved[..]).unwrap();
    assert!(bits(advance(backend, &mut state, &tokens(MODEL, HELD + NEXT)[HELD..])) == expected, "{what}");
}

/// A stage of a layer, or of none.
type Place = (Option<usize>, Stage);

/// Does something to the disk or the request after one stage of one layer, and tells of that one and of those after it.
struct After<'a> {
    at: Place,
    act: &'a dyn Fn(),
    has_acted: bool,
    ended: mpsc::Sender<Place>,
}

impl<'a> After<'a> {
    /// And where stages are told of.
    fn new(at: Place, act: &'a dyn Fn()) -> (After<'a>, mpsc::Receiver<Place>) {
        let (ended, stages) = mpsc::channel();
        (After { at, act, has_acted: false, ended }, stages)
    }
}

impl Observer<CpuBackend> for After<'_> {
    fn after(&mut self, layer: Option<usize>, stage: Stage, _: &CpuBackend, _: &Pass) -> Result<(), Error> {
        if (layer, stage) == self.at {
            (self.act)();
            self.has_acted = true;
        }
        if self.has_acted {
            // Nobody listens where it does not matter.
            let _ = self.ended.send((layer, stage));
        }
        Ok(())
    }
}

/// Calls a request off once it has begun to wait, that is, once no further stage ends for far longer than one computes.
/// Returns after which stage that was; nothing if the request ended by itself.
fn cancel_waiting(stages: &mpsc::Receiver<Place>, cancel: &Cancel) -> Option<Stage> {
    const STILL: Duration = Duration::from_millis(15);
    let (_, mut last) = stages.recv().ok()?;
    loop {
        match stages.recv_timeout(STILL) {
            Ok((_, stage)) => last = stage,
            Err(RecvTimeoutError::Timeout) => {
                cancel.cancel();
                return Some(last);
            }
            Err(RecvTimeoutError::Disconnected) => return None,
        }
    }
}

/// What breaks, and whether an error is the one it must give.
#[derive(Clone, Copy, Debug)]
enum Break {
    /// Reads fail from here on.
    Reads,
    /// The disk is stuck, and while the request waits for it, another thread calls it off.
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
            let (mut failed, mut waited) = ([0; 3], 0);
            for (&at, breaks) in places
                .iter()
                .flat_map(|at| [Break::Reads, Break::CancelWaiting, Break::CancelComputing].map(|b| (at, b)))
            {
                let what = format!("{precision:?}, {count} rows, {breaks:?} after {at:?}");
                let cancel = Cancel::default();
                let act = || match breaks {
                    Break::Reads => faults.failing_reads.store(1000, Ordering::Relaxed),
                    Break::CancelWaiting => faults.stuck.store(true, Ordering::Relaxed),
                    Break::CancelComputing => cancel.cancel(),
                };
                let rows = rows(0, HELD, &tokens[HELD..HELD + count]);
                let result = std::thread::scope(|scope| {
                    let (mut after, stages) = After::new(at, &act);
                    let canceller = matches!(breaks, Break::CancelWaiting)
                        .then(|| scope.spawn(|| cancel_waiting(&{ stages }, &cancel)));
                    let result = forward(&backend, rows, &mut [&mut state], &cancel, &mut after);
                    drop(after);
                    let last = canceller.and_then(|canceller| canceller.join().expect("it does not panic"));
                    // Experts are waited for after the shared one.
                    waited += usize::from(last == Some(Stage::SharedExpert));
                    result
                });
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
            assert!(waited > Stage::LAYER.len(), "only {waited} passes were called off while they waited");
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

/// The file loses all its experts in the middle of a request: that one fails where it needs one of them, a later one before it
/// reads anything, and both errors name the file. The session goes on with a whole copy.
#[test]
fn a_file_truncated_in_use_fails_the_request() {
    let expected = expected(Precision::Exact);
    let (model, _) = open(MODEL);
    let parts = model.experts.iter().flat_map(|layer| layer.extents.parts);
    let end = parts.map(|part| part.offset).min().unwrap() + 10;
    let last_experts = (Some(model.config.layers - 1), Stage::RoutedExperts);
    let simulated = ReaderKind::Simulated(Simulation::reordering(3));
    for (reader, count) in [ReaderKind::Buffered, ReaderKind::Direct, ReaderKind::Uring, simulated]
        .iter()
        .flat_map(|&reader| [NEXT, 1].map(|count| (reader, count)))
    {
        let what = format!("{reader:?}, {count} rows");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        std::fs::copy(test_data(&format!("oracle/{MODEL}.gguf")), &path).unwrap();
        let backend = load_copy(&path, reader);
        let mut state = held(&backend);
        let before = export(&backend, &state);
        let mut pass = |observer: &mut dyn Observer<CpuBackend>| {
            let rows = rows(0, HELD, &tokens(MODEL, HELD + NEXT)[HELD..HELD + count]);
            let result = forward(&backend, rows, &mut [&mut state], &Cancel::default(), observer);
            assert!(before == export(&backend, &state), "{what}: it left a trace");
            result.expect_err("nothing can be computed without experts")
        };

        let truncate = || std::fs::File::options().write(true).open(&path).unwrap().set_len(end).unwrap();
        let (mut after, stages) = After::new((Some(0), Stage::Route), &truncate);
        let error = pass(&mut after);
        drop(after);
        let named = match &error {
            Error::Store(StoreError::Short { path, .. } | StoreError::Changed { path }) => Some(path),
            _ => None,
        };
        assert_eq!(named, Some(&path), "{what}: {error}");
        assert!(stages.iter().all(|place| place != last_experts), "{what}: it went on with what it had not read");

        let error = pass(&mut NoObserver);
        let is_noticed = matches!(&error, Error::Store(StoreError::Changed { path: named }) if *named == path);
        assert!(is_noticed, "{what}, a later request: {error}");

        std::fs::copy(test_data(&format!("oracle/{MODEL}.gguf")), &path).unwrap();
        assert_goes_on(&load_copy(&path, reader), &before, &expected, &format!("{what}, with a whole copy"));
    }
}
