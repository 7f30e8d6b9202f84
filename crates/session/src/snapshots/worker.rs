//! A thread that saves and loads, so that the one that computes never waits for the disk.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Scope, ScopedJoinHandle};

use model::Backend;

use super::{Found, Kind, Saved, Snapshots, SnapshotsError};
use crate::{Context, Session};

/// Is told what became of a save, on the worker's thread.
pub type OnSaved = Box<dyn FnOnce(Result<Saved, SnapshotsError>) + Send>;
/// Is given a loaded session, on the worker's thread.
pub type OnLoaded<B> = Box<dyn FnOnce(Result<Session<B>, SnapshotsError>) + Send>;

/// Saves and loads on a thread of its own, one at a time, loads first: a request waits for them. Dropping it saves what is waiting.
pub struct SnapshotWorker<'scope, B: Backend> {
    queue: Arc<Queue<B>>,
    thread: Option<ScopedJoinHandle<'scope, ()>>,
}

struct Queue<B: Backend> {
    jobs: Mutex<Jobs<B>>,
    changed: Condvar,
}

struct Jobs<B: Backend> {
    loads: VecDeque<(Found, OnLoaded<B>)>,
    saves: VecDeque<(Session<B>, Kind, OnSaved)>,
    ended: bool,
}

enum Job<B: Backend> {
    Load(Found, OnLoaded<B>),
    Save(Session<B>, Kind, OnSaved),
}

impl<'scope, B: Backend + Sync> SnapshotWorker<'scope, B>
where
    B::State: Send,
{
    /// Starts the thread. Sessions are loaded for `context`.
    pub fn spawn(
        scope: &'scope Scope<'scope, '_>,
        backend: &'scope B,
        snapshots: Snapshots,
        context: Context,
    ) -> SnapshotWorker<'scope, B> {
        let jobs = Jobs { loads: VecDeque::new(), saves: VecDeque::new(), ended: false };
        let queue = Arc::new(Queue { jobs: Mutex::new(jobs), changed: Condvar::new() });
        let theirs = queue.clone();
        let thread = scope.spawn(move || {
            while let Some(job) = theirs.next() {
                match job {
                    Job::Load(found, reply) => reply(snapshots.load(backend, found.id, context)),
                    Job::Save(session, kind, reply) => reply(snapshots.save(backend, &session, kind)),
                }
            }
        });
        SnapshotWorker { queue, thread: Some(thread) }
    }

    /// Saves a session, which is best a fork of one that lives. A save that still waits is dropped, with its `reply`, if this session begins
    /// with its tokens, unless others may begin with them as well.
    pub fn save(&self, session: Session<B>, kind: Kind, reply: OnSaved) {
        let mut jobs = self.queue.jobs();
        jobs.saves
            .retain(|(waiting, kind, _)| *kind == Kind::Common || !session.tokens().starts_with(waiting.tokens()));
        jobs.saves.push_back((session, kind, reply));
        self.queue.changed.notify_one();
    }

    /// Loads a session that was found.
    pub fn load(&self, found: Found, reply: OnLoaded<B>) {
        self.queue.jobs().loads.push_back((found, reply));
        self.queue.changed.notify_one();
    }
}

impl<B: Backend> Drop for SnapshotWorker<'_, B> {
    fn drop(&mut self) {
        self.queue.jobs().ended = true;
        self.queue.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic there is the scope's to tell.
            let _ = thread.join();
        }
    }
}

impl<B: Backend> Queue<B> {
    fn jobs(&self) -> MutexGuard<'_, Jobs<B>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next job; `None` after the last.
    fn next(&self) -> Option<Job<B>> {
        let mut jobs = self.jobs();
        loop {
            if let Some((found, reply)) = jobs.loads.pop_front() {
                return Some(Job::Load(found, reply));
            }
            if let Some((session, kind, reply)) = jobs.saves.pop_front() {
                return Some(Job::Save(session, kind, reply));
            }
            if jobs.ended {
                return None;
            }
            jobs = self.changed.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
