//! Many requests, one backend: a queue, live sessions that are reused, and one thread that computes passes.
//!
//! ```text
//! Engine (any thread) --submit--> queue --admit--> reading the prompt --> decoding --> Ended
//! ```
//! An [`Engine`] is a handle; [`Runner::run`] is the loop, which owns the calling thread. A step of the loop is one layer of a pass
//! that reads a prompt, or one pass with the next token of every turn that decodes: a prompt is read in the same passes whatever
//! else runs, and what experts several turns choose is leased once. Their next tokens are chosen at the same time, on threads of a
//! pool. No lock is held while anything is computed.

mod active;
mod archive;
mod runner;
mod shelf;

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use model::Cancel;

use crate::{Context, Error, PreparedTurn, TurnEvent, TurnOutcome};

pub use runner::{MOST_ROWS, Runner};
pub use shelf::COMMON_SESSIONS;

/// What an engine is started with.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Tokens that a session may hold.
    pub context: Context,
    /// Most sessions that are kept, those at work included: at least one.
    pub sessions: usize,
    /// Most requests that wait for one of them.
    pub queue: usize,
}

/// A prompt as the model reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// How many of them, the first ones, other conversations are likely to begin with as well: instructions and tools.
    pub common_tokens: usize,
}

/// What a client asks for.
pub struct Request {
    /// What is read.
    pub prompt: Prompt,
    /// How the turn after it is generated.
    pub turn: PreparedTurn,
    /// Asks the engine to stop; what has been computed is kept for a next request.
    pub cancel: Arc<Cancel>,
    /// Is told what happens, by one thread at a time: the engine's, or one that chooses a token of this turn while others choose those
    /// of others. It must not wait for anything.
    pub receive: Box<dyn FnMut(EngineEvent) + Send>,
}

/// What becomes of a request. [`EngineEvent::Ended`] or [`EngineEvent::Failed`] is the last one, and comes in any case.
#[derive(Debug)]
pub enum EngineEvent {
    /// It has left the queue.
    Begun {
        /// Tokens of the prompt that a session held already.
        cached_tokens: usize,
    },
    /// So many tokens of the prompt have been read, the cached ones included; those of the pass under way count by the share of
    /// its layers that are done.
    Read {
        /// Tokens.
        tokens: usize,
    },
    /// Something happened in the turn.
    Turn(TurnEvent),
    /// The turn is over.
    Ended(Box<Ended>),
    /// Nothing more will come of it: a pass failed, or it was cancelled before its turn began.
    Failed(Error),
}

/// A turn that is over.
#[derive(Debug)]
pub struct Ended {
    /// What came of it.
    pub outcome: TurnOutcome,
    /// What it cost.
    pub usage: Usage,
}

/// What a request cost.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that a session held already.
    pub cached_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
    /// Those of them that are reasoning.
    pub reasoning_tokens: usize,
    /// From submission to leaving the queue.
    pub queued: Duration,
    /// From leaving the queue to the prompt's logits.
    pub prefill: Duration,
    /// From there to the end.
    pub decode: Duration,
}

/// Why a request was not taken.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// Too many are waiting.
    #[error("{waiting} requests are waiting already, expected at most {limit}: try again later")]
    QueueFull {
        /// How many wait.
        waiting: usize,
        /// How many may.
        limit: usize,
    },
    /// The engine is being stopped.
    #[error("the server is shutting down and takes no more requests")]
    Stopping,
    /// The engine cannot compute any more.
    #[error("the engine has failed and computes nothing any more: {0}. Restart the server")]
    Dead(String),
    /// The prompt does not fit.
    #[error(transparent)]
    Prompt(#[from] Error),
}

/// What an engine has done since it was started, and what it is doing.
#[derive(Clone, Copy, Debug, Default)]
pub struct EngineStats {
    /// Requests that wait.
    pub waiting: usize,
    /// Requests that read or generate.
    pub active: usize,
    /// Sessions that wait for their conversation to go on.
    pub idle_sessions: usize,
    /// Requests that ended with a turn.
    pub ended: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Requests cancelled.
    pub cancelled: u64,
    /// Tokens of prompts that were read.
    pub prefill_tokens: u64,
    /// Tokens of prompts that sessions held already.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub decode_tokens: u64,
    /// Passes that decoded, and the rows in them: their quotient is the mean number of turns in a pass.
    pub decode_passes: u64,
    /// Rows of those passes.
    pub decode_rows: u64,
    /// Sessions that were saved.
    pub saved_snapshots: u64,
    /// Sessions that could not be.
    pub failed_snapshots: u64,
    /// Sessions that were loaded.
    pub loaded_snapshots: u64,
    /// Time spent reading prompts.
    pub prefill_time: Duration,
    /// Time spent decoding.
    pub decode_time: Duration,
}

/// A handle to the engine; clones are of the same.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

/// What handles and loop share.
struct Shared {
    options: EngineOptions,
    inbox: Mutex<Inbox>,
    arrived: Condvar,
    stats: Mutex<EngineStats>,
}

/// What waits for the loop.
#[derive(Default)]
struct Inbox {
    waiting: VecDeque<Waiting>,
    stopping: bool,
    /// A session has come from the disk.
    loaded: bool,
    /// Why nothing can be computed any more.
    dead: Option<String>,
}

/// A request, and since when it waits.
struct Waiting {
    request: Request,
    since: std::time::Instant,
}

impl Engine {
    /// An engine and the loop that makes it work.
    pub fn new(options: EngineOptions) -> (Engine, Runner) {
        assert!(options.sessions > 0, "an engine has at least one session");
        let shared =
            Arc::new(Shared { options, inbox: Mutex::default(), arrived: Condvar::new(), stats: Mutex::default() });
        (Engine { shared: shared.clone() }, Runner::new(shared))
    }

    /// Tokens that a session may hold.
    pub fn context(&self) -> Context {
        self.shared.options.context
    }

    /// Queues a request. Its events begin when it has left the queue.
    ///
    /// # Errors
    /// [`SubmitError`]: nothing will come of it.
    pub fn submit(&self, request: Request) -> Result<(), SubmitError> {
        self.context().check(0, request.prompt.tokens.len())?;
        let mut inbox = self.shared.inbox();
        if let Some(reason) = &inbox.dead {
            return Err(SubmitError::Dead(reason.clone()));
        }
        if inbox.stopping {
            return Err(SubmitError::Stopping);
        }
        let (waiting, limit) = (inbox.waiting.len(), self.shared.options.queue);
        let free = self.shared.options.sessions.saturating_sub(self.shared.stats().active);
        if waiting >= limit + free {
            return Err(SubmitError::QueueFull { waiting, limit });
        }
        inbox.waiting.push_back(Waiting { request, since: std::time::Instant::now() });
        self.shared.arrived.notify_one();
        Ok(())
    }

    /// What the engine has done and is doing.
    pub fn stats(&self) -> EngineStats {
        let waiting = self.shared.inbox().waiting.len();
        EngineStats { waiting, ..*self.shared.stats() }
    }

    /// Why nothing can be computed any more, if so.
    pub fn death(&self) -> Option<String> {
        self.shared.inbox().dead.clone()
    }

    /// Asks the loop to end: it takes no more requests, cancels those it has, and saves its sessions.
    pub fn stop(&self) {
        self.shared.inbox().stopping = true;
        self.shared.arrived.notify_one();
    }
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stats(&self) -> MutexGuard<'_, EngineStats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
