//! The loop: what is computed next, for whom.

use std::borrow::Cow;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::mpsc::TryRecvError;
use std::time::{Duration, Instant};

use model::{Backend, Cancel};
use rayon::prelude::*;

use super::active::{Active, Chooser};
use super::archive::{self, Archive, Loading};
use super::shelf::{self, Kind, Live, Saved, Shelf};
use super::{EngineEvent, Inbox, Request, Shared, Waiting};
use crate::snapshots::{self, Snapshots};
use crate::{Error, Session, StopReason, pass_rows, read_together};

/// A session is forked or taken from another conversation for so many tokens at least.
const LEAST_REUSED_TOKENS: usize = 32;
/// Rows of a pass over a prompt while turns wait for their next token, where a backend's bits do not depend on it: its layers are
/// short then.
const BUSY_PASS_ROWS: usize = 64;

/// Most tokens of a turn in a pass that turns share: an opener that is put into a model's mouth is read in several.
pub const MOST_ROWS: usize = 8;

/// The loop of an engine.
pub struct Runner {
    shared: Arc<Shared>,
}

impl Runner {
    pub(super) fn new(shared: Arc<Shared>) -> Runner {
        Runner { shared }
    }

    /// Computes on the calling thread until [`super::Engine::stop`]. Sessions are saved to `snapshots`, if there are any, and loaded from
    /// there, on a thread of their own; when this returns, all that was worth it is saved.
    pub fn run<B: Backend + Sync + 'static>(self, backend: &B, snapshots: Option<Snapshots>)
    where
        B::State: Send,
    {
        let _guard = Guard(&self.shared);
        std::thread::scope(|scope| {
            let archive = snapshots.map(|snapshots| Archive::new(scope, backend, snapshots, &self.shared));
            let mut work = Work::new(backend, &self.shared, archive);
            while work.admit() {
                work.drop_cancelled();
                work.take_loaded();
                work.save_quiet();
                if !work.step() {
                    work.wait();
                }
            }
            work.stop();
        });
    }
}

/// Says so if the loop ends in a panic.
struct Guard<'s>(&'s Shared);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.inbox().dead = Some("the thread that computes has panicked; its message says more".to_owned());
        }
    }
}

/// What the loop has in hand.
struct Work<'b, B: Backend> {
    backend: &'b B,
    shared: &'b Shared,
    archive: Option<Archive<'b, B>>,
    shelf: Shelf<B>,
    active: Vec<Active<'b, B>>,
    /// Requests whose sessions come from the disk.
    loading: Vec<(Waiting, Loading<B>)>,
    /// When quiet conversations were last looked for.
    looked: Instant,
    /// Requests and slices so far.
    count: u64,
    /// How long prompts may be read before turns go on: as long as their last pass took.
    reading_credit: Duration,
}

impl<'b, B: Backend + Sync + 'static> Work<'b, B>
where
    B::State: Send,
{
    fn new(backend: &'b B, shared: &'b Shared, archive: Option<Archive<'b, B>>) -> Self {
        Work {
            backend,
            shared,
            archive,
            shelf: Shelf::new(),
            active: Vec::new(),
            loading: Vec::new(),
            looked: Instant::now(),
            count: 0,
            reading_credit: Duration::ZERO,
        }
    }

    /// Takes requests from the queue as long as there are sessions for them; false when the engine is to stop.
    fn admit(&mut self) -> bool {
        loop {
            let mut inbox = self.shared.inbox();
            if inbox.stopping {
                return false;
            }
            if self.active.len() + self.loading.len() >= self.shared.options.sessions {
                return true;
            }
            let Some(waiting) = inbox.waiting.pop_front() else { return true };
            drop(inbox);
            match self.load_for(&waiting.request) {
                Some(loading) => self.loading.push((waiting, loading)),
                None => self.begin(waiting, None),
            }
            self.count_sessions();
        }
    }

    /// Begins to load a session for a request, where one on the disk holds more of its prompt than any that lives.
    fn load_for(&self, request: &Request) -> Option<Loading<B>> {
        let (archive, tokens) = (self.archive.as_ref()?, &request.prompt.tokens);
        let busy = self.active.iter().map(|active| shelf::reach(self.backend, &active.live.session, tokens).0);
        let idle = self.shelf.best(self.backend, tokens).map(|found| found.reach);
        let held = busy.chain(idle).max().unwrap_or(0);
        archive.better(tokens, held).map(|found| archive.load(found))
    }

    /// Begins with sessions that have come from the disk; without, where that failed.
    fn take_loaded(&mut self) {
        self.shared.inbox().loaded = false;
        let mut at = 0;
        while at < self.loading.len() {
            let arrived = self.loading[at].1.try_recv();
            if matches!(arrived, Err(TryRecvError::Empty)) {
                at += 1;
                continue;
            }
            let (waiting, _) = self.loading.remove(at);
            match arrived {
                Ok(Ok(session)) => {
                    let saved = Saved::new(session.tokens().len());
                    self.begin(waiting, Some(Live { session, saved }));
                }
                Ok(Err(error)) => {
                    tracing::warn!("a saved session was not used: {error}");
                    self.begin(waiting, None);
                }
                Err(_) => self.begin(waiting, None),
            }
        }
    }

    /// Finds a session for a request that brings none.
    fn begin(&mut self, Waiting { mut request, since }: Waiting, loaded: Option<Live<B>>) {
        let queued = since.elapsed();
        let tokens = &request.prompt.tokens;
        let live = match loaded {
            Some(live) => {
                self.make_room();
                Ok(live)
            }
            None => self.session_for(tokens),
        };
        match live {
            Ok(mut live) => {
                live.reuse(self.backend, tokens);
                self.count += 1;
                self.active.push(Active::begin(self.count, live, request, queued));
            }
            Err(error) => {
                self.note_death(&error);
                (request.receive)(EngineEvent::Failed(error));
            }
        }
        self.count_sessions();
    }

    /// A session that holds as much of the beginning of `tokens` as can be had.
    fn session_for(&mut self, tokens: &[u32]) -> Result<Live<B>, Error> {
        let reach = |active: &Active<'_, B>| (shelf::reach(self.backend, &active.live.session, tokens).0, active.id);
        let busy = self.active.iter().map(reach).max().filter(|&(reach, _)| reach >= LEAST_REUSED_TOKENS);
        let idle = self.shelf.best(self.backend, tokens).filter(|found| found.reach >= LEAST_REUSED_TOKENS);
        let session = match (idle, busy) {
            (Some(found), busy) if busy.is_none_or(|(reach, _)| reach <= found.reach) => {
                if found.is_continued {
                    return Ok(self.shelf.take(found.id));
                }
                if self.victim() == Some(found.id) {
                    let mut live = self.shelf.take(found.id);
                    self.save_before_loss(&mut live);
                    return Ok(live);
                }
                self.make_room();
                self.shelf.touch(found.id).fork(self.backend)
            }
            (_, Some((_, id))) => {
                self.make_room();
                let at = self.active.iter().position(|active| active.id == id).expect("it is at work");
                self.active[at].live.session.fork(self.backend)
            }
            _ => {
                self.make_room();
                Session::new(self.backend, self.shared.options.context)
            }
        };
        session.map(Live::from)
    }

    /// The conversation that has to make way for another session.
    fn victim(&self) -> Option<u64> {
        let held = self.active.len() + self.loading.len() + self.shelf.conversations();
        self.shelf.oldest_conversation().filter(|_| held >= self.shared.options.sessions)
    }

    /// Makes way for another session.
    fn make_room(&mut self) {
        if let Some(id) = self.victim() {
            let live = self.shelf.take(id);
            if let Some(archive) = &self.archive {
                archive.save_last(live, snapshots::Kind::Evicted);
            }
        }
    }

    /// Saves a conversation whose end is about to be forgotten.
    fn save_before_loss(&self, live: &mut Live<B>) {
        if let Some(archive) = &self.archive
            && live.unsaved_tokens() >= archive::LEAST_SAVED_TOKENS
        {
            archive.save_fork(self.backend, live, snapshots::Kind::Evicted);
        }
    }

    /// Saves conversations that pause.
    fn save_quiet(&mut self) {
        let Some(archive) = &self.archive else { return };
        if self.looked.elapsed() < archive::QUIET / 4 {
            return;
        }
        self.looked = Instant::now();
        for live in self.shelf.unsaved(archive::QUIET, archive::LEAST_SAVED_TOKENS) {
            archive.save_fork(self.backend, live, snapshots::Kind::Idle);
        }
    }

    /// Saves a session that grows without a pause.
    fn save_grown(&mut self, id: u64) {
        if let (Some(archive), Some(active)) = (&self.archive, self.active.iter_mut().find(|active| active.id == id)) {
            archive.save_grown(self.backend, &mut active.live);
        }
    }

    fn has_unsaved(&mut self) -> bool {
        self.shelf.unsaved(Duration::ZERO, archive::LEAST_SAVED_TOKENS).next().is_some()
    }

    /// Ends what nobody wants any more.
    fn drop_cancelled(&mut self) {
        let is_cancelled = |cancel: &Cancel| cancel.check().is_err();
        let mut inbox = self.shared.inbox();
        let waiting = std::mem::take(&mut inbox.waiting);
        let (gone, left) = waiting.into_iter().partition(|waiting| is_cancelled(&waiting.request.cancel));
        inbox.waiting = left;
        drop(inbox);
        fail_all(gone);
        let ids: Vec<u64> = self.active.iter().filter(|active| is_cancelled(&active.cancel)).map(|a| a.id).collect();
        ids.into_iter().for_each(|id| self.cancelled(id));
    }

    /// Computes what is next; false if there is nothing.
    fn step(&mut self) -> bool {
        let decodes = self.active.iter().any(Active::is_decoding);
        let reads = self.active.iter().any(|active| !active.is_decoding());
        match (decodes, reads) {
            (false, false) => return false,
            (true, true) if self.reading_credit.is_zero() => self.decode(),
            (true, false) => self.decode(),
            (_, true) => self.read_layer(),
        }
        true
    }

    /// Reads the next tokens of every turn that decodes, in one pass. Where that fails each is tried alone, so that the fault stays
    /// with whose it is.
    fn decode(&mut self) {
        let begun = Instant::now();
        let mut ids = Vec::new();
        let mut parts = Vec::new();
        let own = self.active.iter().filter(|active| active.is_decoding()).map(|active| active.cancel.clone());
        let cancels: Vec<_> = own.collect();
        for active in self.active.iter_mut().filter(|active| active.is_decoding()) {
            ids.push(active.id);
            let unread = &active.turn.unread()[active.begun_tokens..];
            parts.push((&mut active.live.session, &unread[..unread.len().min(MOST_ROWS)]));
        }
        // What others wait for is not thrown away because one of them has gone.
        let shared = Cancel::default();
        let cancel = if let [cancel] = &cancels[..] { cancel } else { &shared };
        let all;
        let results: Vec<AfterPass<'_>> = match read_together(self.backend, &mut parts, cancel) {
            Ok(logits) => {
                all = logits;
                all.chunks_exact(self.backend.config().vocab_size).map(|logits| Ok(logits.into())).collect()
            }
            Err(error) if parts.len() == 1 => vec![Err(error)],
            Err(_) => parts.iter_mut().map(|part| alone(self.backend, part, &shared).map(Cow::Owned)).collect(),
        };
        let decoding = self.active.iter_mut().filter(|active| active.is_decoding());
        let outcomes = choose(decoding.map(Active::chooser).zip(results).collect());
        for (id, outcome) in ids.iter().zip(outcomes) {
            self.go_on(*id, outcome);
            self.save_grown(*id);
        }
        self.reading_credit = begun.elapsed();
        let mut stats = self.shared.stats();
        stats.decode_passes += 1;
        stats.decode_rows += ids.len() as u64;
        stats.decode_time += begun.elapsed();
    }

    /// Computes a layer of the pass over a prompt that is under way, or begins one for who has waited longest.
    fn read_layer(&mut self) {
        let begun = Instant::now();
        let under_way = self.active.iter().position(|active| active.slice.is_some());
        let reading = self.active.iter().enumerate().filter(|(_, active)| !active.is_decoding());
        let next = || reading.min_by_key(|(_, active)| (active.slice_number, active.id)).map(|(at, _)| at);
        let at = under_way.or_else(next).expect("a prompt is being read");
        if let Err(error) = self.read_layer_of(at) {
            let id = self.active[at].id;
            self.failed(id, error);
        }
        let took = begun.elapsed();
        self.reading_credit = self.reading_credit.saturating_sub(took);
        self.shared.stats().prefill_time += took;
    }

    fn read_layer_of(&mut self, at: usize) -> Result<(), Error> {
        let rows = self.slice_rows(at);
        let layers = self.backend.config().layers;
        let active = &mut self.active[at];
        let mut slice = match active.slice.take() {
            Some(slice) => slice,
            None => {
                self.count += 1;
                active.slice_number = self.count;
                let unread = active.unread_prompt();
                active.live.session.begin_slice(self.backend, unread[..rows].to_vec(), rows == unread.len())?
            }
        };
        let (is_through, rows) = (slice.layer(&active.live.session, &active.cancel)?, slice.tokens());
        active.tell_progress(rows, slice.layers(), layers);
        if !is_through {
            active.slice = Some(slice);
            return Ok(());
        }
        let logits = slice.end(&mut active.live.session)?;
        self.shared.stats().prefill_tokens += rows as u64;
        self.keep_common(at);
        let id = self.active[at].id;
        self.save_grown(id);
        if !logits.is_empty() {
            let outcome = self.of(id).begin_turn(&logits);
            self.go_on(id, outcome);
        }
        Ok(())
    }

    /// Rows of the next pass over a prompt.
    fn slice_rows(&self, at: usize) -> usize {
        let is_busy = self.active.iter().any(Active::is_decoding);
        let free = is_busy && self.backend.passes_are_free();
        let chunk = if free { BUSY_PASS_ROWS.min(B::PASS_ROWS) } else { B::PASS_ROWS };
        let active = &self.active[at];
        pass_rows(active.live.session.tokens().len(), active.unread_prompt().len(), chunk)
    }

    /// Keeps the beginning that other conversations may share, where a pass has just ended at it.
    fn keep_common(&mut self, at: usize) {
        let Active { live: Live { session, .. }, prompt, .. } = &self.active[at];
        // Not more often than passes end when nothing else runs, so that what is kept does not depend on that.
        let common = prompt.common_tokens / B::PASS_ROWS * B::PASS_ROWS;
        let held = session.tokens();
        if held.len() == common && common > 0 && !self.shelf.has_common(held) {
            // Without memory for it nothing is lost but the chance.
            if let Ok(fork) = session.fork(self.backend) {
                let mut live = Live::from(fork);
                if let Some(archive) = &self.archive {
                    archive.save_fork(self.backend, &mut live, snapshots::Kind::Common);
                }
                self.shelf.put(live, Kind::Common);
            }
        }
    }

    /// Leaves a turn that goes on at work, and ends one that does not.
    fn go_on(&mut self, id: u64, outcome: Result<ControlFlow<StopReason>, Error>) {
        match outcome {
            Ok(ControlFlow::Continue(())) => (),
            Ok(ControlFlow::Break(reason)) => self.end(id, reason),
            Err(error) => self.failed(id, error),
        }
    }

    fn cancelled(&mut self, id: u64) {
        self.shared.stats().cancelled += 1;
        if self.of(id).is_decoding() {
            self.end(id, StopReason::Cancelled);
        } else {
            self.fail(id, model::Error::Cancelled.into());
        }
    }

    fn failed(&mut self, id: u64, error: Error) {
        if error.is_cancelled() {
            return self.cancelled(id);
        }
        self.shared.stats().failed += 1;
        self.note_death(&error);
        self.fail(id, error);
    }

    /// A device that has failed computes nothing any more.
    fn note_death(&self, error: &Error) {
        if let Error::Model(model::Error::Device(reason)) = error {
            self.shared.inbox().dead = Some(reason.to_string());
        }
    }

    fn end(&mut self, id: u64, reason: StopReason) {
        let active = self.remove(id);
        active.end(reason, |live, usage| {
            self.shelf.put(live, Kind::Conversation);
            self.count_sessions();
            let mut stats = self.shared.stats();
            stats.ended += 1;
            stats.cached_tokens += usage.cached_tokens as u64;
            stats.decode_tokens += usage.completion_tokens as u64;
        });
    }

    fn fail(&mut self, id: u64, error: Error) {
        let active = self.remove(id);
        active.fail(error, |live| {
            self.shelf.put(live, Kind::Conversation);
            self.count_sessions();
        });
    }

    fn of(&mut self, id: u64) -> &mut Active<'b, B> {
        self.active.iter_mut().find(|active| active.id == id).expect("it is at work")
    }

    fn remove(&mut self, id: u64) -> Active<'b, B> {
        let at = self.active.iter().position(|active| active.id == id).expect("it is at work");
        self.active.remove(at)
    }

    fn count_sessions(&self) {
        let mut stats = self.shared.stats();
        stats.active = self.active.len() + self.loading.len();
        stats.idle_sessions = self.shelf.conversations();
    }

    /// Sleeps until there is something to do.
    fn wait(&mut self) {
        let is_full = self.active.len() + self.loading.len() >= self.shared.options.sessions;
        let is_quiet = |inbox: &mut Inbox| (inbox.waiting.is_empty() || is_full) && !inbox.stopping && !inbox.loaded;
        // What has to be saved is saved once it has been quiet.
        let has_unsaved = self.archive.is_some() && self.has_unsaved();
        match has_unsaved {
            false => drop(self.shared.arrived.wait_while(self.shared.inbox(), is_quiet)),
            true => drop(self.shared.arrived.wait_timeout_while(self.shared.inbox(), archive::QUIET / 4, is_quiet)),
        }
    }

    /// Ends everything.
    fn stop(mut self) {
        while let Some(active) = self.active.first() {
            let id = active.id;
            self.cancelled(id);
        }
        fail_all(self.loading.drain(..).map(|(waiting, _)| waiting));
        let waiting = std::mem::take(&mut self.shared.inbox().waiting);
        fail_all(waiting);
        while let (Some(archive), Some(id)) = (&self.archive, self.shelf.oldest_conversation()) {
            archive.save_last(self.shelf.take(id), snapshots::Kind::Shutdown);
        }
    }
}

/// What came of reading a turn's tokens: the logits after them.
type AfterPass<'a> = Result<Cow<'a, [f32]>, Error>;

/// Chooses the next token of every turn; of several at the same time on threads of a pool, because among so many tokens it takes as long
/// as layers of a GPU do.
fn choose(turns: Vec<(Chooser<'_>, AfterPass<'_>)>) -> Vec<Result<ControlFlow<StopReason>, Error>> {
    let next = |(chooser, logits): (Chooser<'_>, AfterPass<'_>)| chooser.was_read(&logits?);
    match turns.len() {
        1 => turns.into_iter().map(next).collect(),
        _ => turns.into_par_iter().map(next).collect(),
    }
}

/// A pass for one of those whose shared pass failed.
fn alone<B: Backend>(backend: &B, part: &mut (&mut Session<B>, &[u32]), cancel: &Cancel) -> Result<Vec<f32>, Error> {
    let mut part = [(&mut *part.0, part.1)];
    read_together(backend, &mut part, cancel)
}

/// Tells requests that never left the queue that they will not.
fn fail_all(waiting: impl IntoIterator<Item = Waiting>) {
    for Waiting { request: Request { mut receive, .. }, .. } in waiting {
        receive(EngineEvent::Failed(model::Error::Cancelled.into()));
    }
}
