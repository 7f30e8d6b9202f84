//! Sessions that nobody computes with: conversations that may go on, and beginnings that many share.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use model::Backend;

use crate::Session;

/// Most beginnings that are kept beside conversations.
pub const COMMON_SESSIONS: usize = 4;

/// What a session on the shelf is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A conversation, which goes on from its end.
    Conversation,
    /// A beginning that other conversations share: it is forked and stays.
    Common,
}

/// A session, and how much of it is on the disk.
pub struct Live<B: Backend> {
    /// The session.
    pub session: Session<B>,
    /// What of it is on the disk, or on its way there.
    pub saved: Saved,
}

/// How many tokens a session had when it was saved last; none if that failed.
#[derive(Clone, Default)]
pub struct Saved(Arc<AtomicUsize>);

impl Saved {
    /// A save of so many tokens.
    pub fn new(tokens: usize) -> Saved {
        Saved(Arc::new(AtomicUsize::new(tokens)))
    }

    /// The save has failed.
    pub fn was_not(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    /// Tokens.
    pub fn tokens(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl<B: Backend> Live<B> {
    /// Steps back to where `tokens` can be read from.
    pub fn reuse(&mut self, backend: &B, tokens: &[u32]) {
        let reached = self.session.reuse(backend, tokens);
        if reached < self.saved.tokens() {
            self.saved = Saved::default();
        }
    }

    /// Tokens that are not on the disk.
    pub fn unsaved_tokens(&self) -> usize {
        self.session.tokens().len() - self.saved.tokens()
    }
}

impl<B: Backend> From<Session<B>> for Live<B> {
    fn from(session: Session<B>) -> Live<B> {
        Live { session, saved: Saved::default() }
    }
}

/// A session on the shelf.
struct Idle<B: Backend> {
    id: u64,
    live: Live<B>,
    kind: Kind,
    since: Instant,
    /// The shelf's clock when it was used last.
    used: u64,
}

/// Sessions by what they hold.
pub struct Shelf<B: Backend> {
    idle: Vec<Idle<B>>,
    clock: u64,
}

/// A session on the shelf that shares a beginning with a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Which one.
    pub id: u64,
    /// Tokens that would be kept.
    pub reach: usize,
    /// Whether nothing of it would be lost by going on with it.
    pub is_continued: bool,
}

impl<B: Backend> Shelf<B> {
    /// An empty one.
    pub fn new() -> Shelf<B> {
        Shelf { idle: Vec::new(), clock: 0 }
    }

    /// Conversations on it.
    pub fn conversations(&self) -> usize {
        self.idle.iter().filter(|idle| idle.kind == Kind::Conversation).count()
    }

    /// Puts a session on the shelf. Of beginnings the one that was used least lately makes way if there are too many.
    pub fn put(&mut self, live: Live<B>, kind: Kind) {
        if live.session.tokens().is_empty() {
            return;
        }
        self.clock += 1;
        self.idle.push(Idle { id: self.clock, live, kind, since: Instant::now(), used: self.clock });
        if self.idle.iter().filter(|idle| idle.kind == Kind::Common).count() > COMMON_SESSIONS {
            self.oldest(Kind::Common).map(|id| self.take(id));
        }
    }

    /// The session of which the most tokens can be kept; among equals the one that loses nothing, then the latest.
    pub fn best(&self, backend: &B, tokens: &[u32]) -> Option<Found> {
        let found = self.idle.iter().map(|idle| {
            let (reach, is_continued) = reach(backend, &idle.live.session, tokens);
            let is_continued = is_continued && idle.kind == Kind::Conversation;
            (reach, is_continued, idle.used, idle.id)
        });
        let (reach, is_continued, _, id) = found.max()?;
        Some(Found { id, reach, is_continued })
    }

    /// Whether a beginning of exactly `tokens` is kept.
    pub fn has_common(&self, tokens: &[u32]) -> bool {
        self.idle.iter().any(|idle| idle.kind == Kind::Common && idle.live.session.tokens() == tokens)
    }

    /// Takes the session `id` off the shelf.
    pub fn take(&mut self, id: u64) -> Live<B> {
        let at = self.idle.iter().position(|idle| idle.id == id).expect("an id that was found");
        self.idle.remove(at).live
    }

    /// The conversations that nobody has gone on with for `quiet`, and of which `tokens` at least are not on the disk.
    pub fn unsaved(&mut self, quiet: Duration, tokens: usize) -> impl Iterator<Item = &mut Live<B>> {
        let is_quiet = move |idle: &&mut Idle<B>| idle.kind == Kind::Conversation && idle.since.elapsed() >= quiet;
        let lives = self.idle.iter_mut().filter(is_quiet).map(|idle| &mut idle.live);
        lives.filter(move |live| live.unsaved_tokens() >= tokens)
    }

    /// The session `id`, which is being used now.
    pub fn touch(&mut self, id: u64) -> &Session<B> {
        self.clock += 1;
        let idle = self.idle.iter_mut().find(|idle| idle.id == id).expect("an id that was found");
        idle.used = self.clock;
        &idle.live.session
    }

    /// The conversation that was used least lately.
    pub fn oldest_conversation(&self) -> Option<u64> {
        self.oldest(Kind::Conversation)
    }

    fn oldest(&self, kind: Kind) -> Option<u64> {
        self.idle.iter().filter(|idle| idle.kind == kind).min_by_key(|idle| idle.used).map(|idle| idle.id)
    }
}

/// How many of `tokens` a session would keep, and whether it would lose nothing.
pub fn reach<B: Backend>(backend: &B, session: &Session<B>, tokens: &[u32]) -> (usize, bool) {
    let held = session.tokens();
    let shared = held.iter().zip(tokens).take_while(|(held, wanted)| held == wanted).count();
    // Logits come from reading a token: one is always left to read.
    let reach = backend.reach(session.state(), shared.min(tokens.len().saturating_sub(1)));
    (reach, shared == held.len())
}
