//! A thread that saves and loads, so that the one that computes never waits for the disk.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Scope, ScopedJoinHandle};

use model::Backend;

use super::{Found, Kind, Saved, Snapshots, SnapshotsError};
use crate::{Context, Session};

/// Most saves that wait, each with a session in memory; those of a program that ends do not count, as all of them are to be saved.
pub const MOST_WAITING_SAVES: usize = 4;

/// Is told what became of a save: on the worker's thread if it was tried, and on the caller's or the worker's if not.
pub type OnSaved = Box<dyn FnOnce(Result<Saved, SnapshotsError>) + Send>;
/// Is given a loaded session, on the worker's thread; or the error on the caller's if that thread has ended.
pub type OnLoaded<B> = Box<dyn FnOnce(Result<Session<B>, SnapshotsError>) + Send>;

/// Saves and loads on a thread of its own, one at a time, loads first: a request waits for them. Dropping it saves what is waiting. Every
/// reply is called once, whatever happens.
pub struct SnapshotWorker<'scope, B: Backend> {
    queue: Arc<Queue<B>>,
    thread: Option<ScopedJoinHandle<'scope, ()>>,
}

struct Queue<B: Backend> {
    jobs: Mutex<Jobs<B>>,
    changed: Condvar,
}

struct Jobs<B: Backend> {
    loads: VecDeque<Load<B>>,
    saves: VecDeque<Save<B>>,
    /// Nothing more comes.
    ended: bool,
    /// Nothing more is done.
    dead: bool,
}

struct Load<B: Backend> {
    found: Found,
    reply: Reply<Session<B>>,
}

struct Save<B: Backend> {
    session: Session<B>,
    kind: Kind,
    reply: Reply<Saved>,
}

enum Job<B: Backend> {
    Load(Load<B>),
    Save(Save<B>),
}

type OnDone<T> = Box<dyn FnOnce(Result<T, SnapshotsError>) + Send>;

/// Answers that the thread has ended if it is dropped, as by a panic, before anything else was answered.
struct Reply<T>(Option<OnDone<T>>);

impl<T> Reply<T> {
    fn send(mut self, result: Result<T, SnapshotsError>) {
        if let Some(reply) = self.0.take() {
            reply(result);
        }
    }
}

impl<T> Drop for Reply<T> {
    fn drop(&mut self) {
        if let Some(reply) = self.0.take() {
            reply(Err(SnapshotsError::Ended));
        }
    }
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
        let jobs = Jobs { loads: VecDeque::new(), saves: VecDeque::new(), ended: false, dead: false };
        let queue = Arc::new(Queue { jobs: Mutex::new(jobs), changed: Condvar::new() });
        let working = Working(queue.clone());
        let thread = scope.spawn(move || {
            while let Some(job) = working.0.next() {
                match job {
                    Job::Load(Load { found, reply }) => reply.send(snapshots.load(backend, found.id, context)),
                    Job::Save(Save { session, kind, reply }) => reply.send(snapshots.save(backend, &session, kind)),
                }
            }
        });
        SnapshotWorker { queue, thread: Some(thread) }
    }

    /// Saves a session, which is best a fork of one that lives. A save that still waits is [`SnapshotsError::Superseded`] if this session
    /// begins with its tokens, unless others may begin with them as well. If too many wait, the oldest is [`SnapshotsError::Busy`], first of
    /// those whose sessions live on.
    pub fn save(&self, session: Session<B>, kind: Kind, reply: OnSaved) {
        let reply = Reply(Some(reply));
        let mut jobs = self.queue.jobs();
        if jobs.dead {
            drop(jobs);
            return reply.send(Err(SnapshotsError::Ended));
        }
        let is_superseded =
            |save: &Save<B>| save.kind != Kind::Common && session.tokens().starts_with(save.session.tokens());
        let (superseded, waiting) = jobs.saves.drain(..).partition(is_superseded);
        jobs.saves = waiting;
        jobs.saves.push_back(Save { session, kind, reply });
        let crowded_out = jobs.crowded_out();
        drop(jobs);
        self.queue.changed.notify_one();
        let superseded: VecDeque<Save<B>> = superseded;
        superseded.into_iter().for_each(|save| save.reply.send(Err(SnapshotsError::Superseded)));
        crowded_out.into_iter().for_each(|save| save.reply.send(Err(SnapshotsError::Busy)));
    }

    /// Loads a session that was found.
    pub fn load(&self, found: Found, reply: OnLoaded<B>) {
        let reply = Reply(Some(reply));
        let mut jobs = self.queue.jobs();
        if jobs.dead {
            drop(jobs);
            return reply.send(Err(SnapshotsError::Ended));
        }
        jobs.loads.push_back(Load { found, reply });
        drop(jobs);
        self.queue.changed.notify_one();
    }
}

impl<B: Backend> Drop for SnapshotWorker<'_, B> {
    fn drop(&mut self) {
        self.queue.jobs().ended = true;
        self.queue.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic there has told its message, and everybody who waited.
            let _ = thread.join();
        }
    }
}

impl<B: Backend> Jobs<B> {
    /// Takes out the save that must not wait, if there is one too many.
    fn crowded_out(&mut self) -> Option<Save<B>> {
        let counts = |save: &Save<B>| save.kind != Kind::Shutdown;
        if self.saves.iter().filter(|save| counts(save)).count() <= MOST_WAITING_SAVES {
            return None;
        }
        let lives_on = |save: &Save<B>| matches!(save.kind, Kind::Idle | Kind::Interval);
        let oldest = self.saves.iter().position(lives_on).or_else(|| self.saves.iter().position(counts))?;
        self.saves.remove(oldest)
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
            if let Some(load) = jobs.loads.pop_front() {
                return Some(Job::Load(load));
            }
            if let Some(save) = jobs.saves.pop_front() {
                return Some(Job::Save(save));
            }
            if jobs.ended {
                return None;
            }
            jobs = self.changed.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Held while the thread works: when it ends, however it does, nobody waits for it in vain.
struct Working<B: Backend>(Arc<Queue<B>>);

impl<B: Backend> Drop for Working<B> {
    fn drop(&mut self) {
        let mut jobs = self.0.jobs();
        jobs.dead = true;
        let unanswered = (std::mem::take(&mut jobs.loads), std::mem::take(&mut jobs.saves));
        drop(jobs);
        // Their replies answer when they are dropped.
        drop(unanswered);
    }
}
