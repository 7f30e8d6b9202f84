//! Sessions on the disk: which are worth saving when, and which begins a prompt.

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Scope;
use std::time::{Duration, Instant};

use model::Backend;

use super::Shared;
use super::shelf::{Live, Saved};
use crate::Session;
use crate::snapshots::{Found, Kind, SnapshotWorker, Snapshots, SnapshotsError};

/// A conversation is saved once nobody has gone on with it for so long: while one goes on, the next save would follow at once.
pub const QUIET: Duration = Duration::from_secs(2);
/// A session is saved if so many tokens of it are not on the disk.
pub const LEAST_SAVED_TOKENS: usize = 64;
/// One that never pauses is saved when it has grown by as many, and to twice what it was: a long prompt is not written over and over.
const INTERVAL_TOKENS: usize = 8192;
/// After a save has failed, none that could wait is tried for so long.
const PAUSE: Duration = Duration::from_secs(10);
/// A session is loaded if it holds as many more of a prompt's tokens than any that lives.
const LEAST_LOADED_TOKENS: usize = 64;

/// The snapshots, and the thread that reads and writes them.
pub struct Archive<'scope, B: Backend> {
    snapshots: Snapshots,
    worker: SnapshotWorker<'scope, B>,
    shared: Arc<Shared>,
    /// When a save failed last.
    failed: Arc<Mutex<Option<Instant>>>,
}

/// A session on its way from the disk.
pub type Loading<B> = Receiver<Result<Session<B>, SnapshotsError>>;

impl<'scope, B: Backend + Sync + 'static> Archive<'scope, B>
where
    B::State: Send,
{
    /// Starts the thread.
    pub fn new(
        scope: &'scope Scope<'scope, '_>,
        backend: &'scope B,
        snapshots: Snapshots,
        shared: &Arc<Shared>,
    ) -> Archive<'scope, B> {
        let worker = SnapshotWorker::spawn(scope, backend, snapshots.clone(), shared.options.context);
        Archive { snapshots, worker, shared: shared.clone(), failed: Arc::default() }
    }

    /// The snapshot that `tokens` begin with, if it holds a good deal more of them than the `held` that a live session does.
    pub fn better(&self, tokens: &[u32], held: usize) -> Option<Found> {
        self.snapshots.longest(tokens).filter(|found| found.tokens >= held + LEAST_LOADED_TOKENS)
    }

    /// Begins to load what was found. The loop is woken when it is there.
    pub fn load(&self, found: Found) -> Loading<B> {
        let (to, loading) = channel();
        let shared = self.shared.clone();
        self.worker.load(
            found,
            Box::new(move |loaded| {
                shared.stats().loaded_snapshots += u64::from(loaded.is_ok());
                // Nobody waits any more if the engine has ended.
                let _ = to.send(loaded);
                shared.inbox().loaded = true;
                shared.arrived.notify_one();
            }),
        );
        loading
    }

    /// Saves a session that goes on living; if that fails, it counts as unsaved again.
    pub fn save_fork(&self, backend: &B, live: &mut Live<B>, kind: Kind) {
        if self.has_just_failed() {
            return;
        }
        match live.session.fork(backend) {
            Ok(fork) => {
                live.saved = Saved::new(fork.tokens().len());
                self.save(fork, kind, live.saved.clone());
            }
            Err(error) => {
                self.note_failure();
                tracing::warn!("a session was not saved: {error}");
            }
        }
    }

    fn has_just_failed(&self) -> bool {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.is_some_and(|at| at.elapsed() < PAUSE)
    }

    fn note_failure(&self) {
        *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Saves a session of which enough is not on the disk.
    pub fn save_last(&self, live: Live<B>, kind: Kind) {
        if live.unsaved_tokens() >= LEAST_SAVED_TOKENS {
            self.save(live.session, kind, live.saved);
        }
    }

    /// Saves a session that has grown by a good deal since it was saved last.
    pub fn save_grown(&self, backend: &B, live: &mut Live<B>) {
        if live.unsaved_tokens() >= INTERVAL_TOKENS.max(live.saved.tokens()) {
            self.save_fork(backend, live, Kind::Interval);
        }
    }

    fn save(&self, session: Session<B>, kind: Kind, mark: Saved) {
        let (shared, failed) = (self.shared.clone(), self.failed.clone());
        let tokens = session.tokens().len();
        self.worker.save(
            session,
            kind,
            Box::new(move |saved| match saved {
                Ok(saved) => {
                    shared.stats().saved_snapshots += 1;
                    tracing::debug!("saved a session of {tokens} tokens, {} bytes: {}", saved.bytes, saved.id);
                }
                // The longer one is counted.
                Err(SnapshotsError::Superseded) => (),
                Err(error) => {
                    mark.was_not();
                    *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
                    shared.stats().failed_snapshots += 1;
                    tracing::warn!("a session of {tokens} tokens was not saved: {error}");
                }
            }),
        );
    }
}
