//! The model's file while a backend uses it: written to, replaced, not waited for.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use common::{advance, exact, rows, test_data};
use cpu::{CpuBackend, Options};
use gguf::Gguf;
use model::{Backend, Cancel, Error, Model, NoObserver, Observer, Stage, forward};
use store::{Residency, Source, StoreError};
use tempfile::TempDir;

/// A copy of a model that a test may spoil.
struct Copy {
    _dir: TempDir,
    path: PathBuf,
}

impl Copy {
    fn new() -> Copy {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        std::fs::copy(test_data("oracle/tiny-q8.gguf"), &path).unwrap();
        Copy { _dir: dir, path }
    }

    fn load(&self, options: Options, loaded: &mut dyn FnMut(u64)) -> Result<CpuBackend, Error> {
        let file = Gguf::open(&self.path).unwrap();
        let source = Source::open(file.files.iter().map(|part| (&part.path, part.bytes))).unwrap();
        CpuBackend::load(&Model::from_gguf(&file).unwrap(), &source, options, loaded)
    }

    /// Writes the same bytes again: whoever notices does not go by what is computed.
    fn rewrite(&self) {
        std::thread::sleep(Duration::from_millis(20));
        let bytes = std::fs::read(&self.path).unwrap();
        File::options().write(true).open(&self.path).unwrap().write_all_at(&bytes, 0).unwrap();
    }
}

fn streamed() -> Options {
    Options { residency: Residency::Streamed { slots: vec![3] }, ..exact() }
}

fn is_changed<T>(result: Result<T, Error>) -> bool {
    matches!(result, Err(Error::Store(StoreError::Changed { .. })))
}

#[test]
fn a_file_written_to_in_place_fails_the_pass_and_all_later_ones() {
    let copy = Copy::new();
    let (streamed, resident) = (copy.load(streamed(), &mut |_| ()).unwrap(), copy.load(exact(), &mut |_| ()).unwrap());
    let [mut state, mut resident_state] = [&streamed, &resident].map(|backend| backend.new_state().unwrap());
    let mut pass = |tokens: &[u32], observer: &mut dyn Observer<CpuBackend>| {
        let rows = rows(0, state.position(), tokens);
        let result = forward(&streamed, rows, &mut [&mut state], &Cancel::default(), observer);
        (result, state.position())
    };
    let (logits, position) = pass(&[5, 6, 7], &mut NoObserver);
    assert_eq!((logits.unwrap(), position), (advance(&resident, &mut resident_state, &[5, 6, 7]), 3));

    /// Writes to the file in the middle of a pass.
    struct Rewriting<'a>(&'a Copy);
    impl Observer<CpuBackend> for Rewriting<'_> {
        fn after(
            &mut self,
            layer: Option<usize>,
            stage: Stage,
            _: &CpuBackend,
            _: &<CpuBackend as Backend>::Pass,
        ) -> Result<(), Error> {
            if (layer, stage) == (Some(1), Stage::Route) {
                self.0.rewrite();
            }
            Ok(())
        }
    }
    let (result, position) = pass(&[8], &mut Rewriting(&copy));
    assert!(position == 3 && is_changed(result));
    let demands = || streamed.stats().cache.hits + streamed.stats().cache.misses;
    let demands_before = demands();
    for _ in 0..2 {
        let (result, position) = pass(&[8], &mut NoObserver);
        assert!(position == 3 && is_changed(result));
    }
    assert_eq!(demands(), demands_before, "a pass that cannot be right does not begin");
    // Who has read everything needs the file no more.
    assert_eq!(advance(&resident, &mut resident_state, &[8]).len(), resident.config().vocab_size);
}

#[test]
fn a_file_replaced_by_renaming_changes_nothing() {
    let copy = Copy::new();
    let backend = copy.load(streamed(), &mut |_| ()).unwrap();
    let other = copy.path.with_extension("other");
    std::fs::write(&other, vec![0; copy.path.metadata().unwrap().len() as usize]).unwrap();
    std::fs::rename(&other, &copy.path).unwrap();
    let resident = common::load("tiny-q8", exact());
    let [streamed, resident] = [&backend, &resident].map(|backend| {
        let mut state = backend.new_state().unwrap();
        (0..6).flat_map(|i| advance(backend, &mut state, &[30 + i, 40 + i])).collect::<Vec<f32>>()
    });
    assert!(streamed == resident && backend.stats().cache.misses > 0);
}

#[test]
fn loading_is_stopped_and_notices_a_change() {
    let copy = Copy::new();
    let options = streamed();
    let cancel = options.cancel.clone();
    let cancelled = copy.load(options, &mut |_| cancel.cancel());
    assert!(matches!(cancelled, Err(Error::Cancelled)));
    let mut written = false;
    let changed = copy.load(exact(), &mut |_| {
        if !std::mem::replace(&mut written, true) {
            copy.rewrite();
        }
    });
    assert!(is_changed(changed));
}

#[test]
fn locked_weights_are_the_same_weights() {
    let copy = Copy::new();
    match copy.load(Options { lock: true, ..streamed() }, &mut |_| ()) {
        Err(Error::Store(error @ StoreError::Lock { .. })) => println!("skipped: {error}"),
        locked => {
            let logits = |backend: CpuBackend| advance(&backend, &mut backend.new_state().unwrap(), &[1, 2, 3]);
            let locked = logits(locked.unwrap());
            assert!(locked == logits(copy.load(streamed(), &mut |_| ()).unwrap()));
        }
    }
}
