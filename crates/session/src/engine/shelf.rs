//! Sessions that nobody computes with: conversations that may go on, and beginnings that many share.

use model::Backend;

use crate::Session;

/// Most beginnings that are kept.
const COMMON_SESSIONS: usize = 4;

/// What a session on the shelf is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A conversation, which goes on from its end.
    Conversation,
    /// A beginning that other conversations share: it is forked and stays.
    Common,
}

/// A session on the shelf.
struct Idle<B: Backend> {
    id: u64,
    session: Session<B>,
    kind: Kind,
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
    pub fn put(&mut self, session: Session<B>, kind: Kind) {
        if session.tokens().is_empty() {
            return;
        }
        self.clock += 1;
        self.idle.push(Idle { id: self.clock, session, kind, used: self.clock });
        if self.idle.iter().filter(|idle| idle.kind == Kind::Common).count() > COMMON_SESSIONS {
            self.drop_oldest(Kind::Common);
        }
    }

    /// The session of which the most tokens can be kept; among equals the one that loses nothing, then the latest.
    pub fn best(&self, backend: &B, tokens: &[u32]) -> Option<Found> {
        let found = self.idle.iter().map(|idle| {
            let (reach, is_continued) = reach(backend, &idle.session, tokens);
            let is_continued = is_continued && idle.kind == Kind::Conversation;
            (reach, is_continued, idle.used, idle.id)
        });
        let (reach, is_continued, _, id) = found.max()?;
        Some(Found { id, reach, is_continued })
    }

    /// Whether a beginning of exactly `tokens` is kept.
    pub fn has_common(&self, tokens: &[u32]) -> bool {
        self.idle.iter().any(|idle| idle.kind == Kind::Common && idle.session.tokens() == tokens)
    }

    /// Takes the session `id` off the shelf.
    pub fn take(&mut self, id: u64) -> Session<B> {
        let at = self.idle.iter().position(|idle| idle.id == id).expect("an id that was found");
        self.idle.remove(at).session
    }

    /// The session `id`, which is being used now.
    pub fn touch(&mut self, id: u64) -> &Session<B> {
        self.clock += 1;
        let idle = self.idle.iter_mut().find(|idle| idle.id == id).expect("an id that was found");
        idle.used = self.clock;
        &idle.session
    }

    /// The conversation that was used least lately.
    pub fn oldest_conversation(&self) -> Option<u64> {
        self.oldest(Kind::Conversation)
    }

    /// Forgets whatever was used least lately, to make room for something else; whether there was anything.
    pub fn drop_any(&mut self) -> bool {
        self.drop_oldest(Kind::Conversation) || self.drop_oldest(Kind::Common)
    }

    fn oldest(&self, kind: Kind) -> Option<u64> {
        self.idle.iter().filter(|idle| idle.kind == kind).min_by_key(|idle| idle.used).map(|idle| idle.id)
    }

    fn drop_oldest(&mut self, kind: Kind) -> bool {
        self.oldest(kind).map(|id| self.take(id)).is_some()
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
