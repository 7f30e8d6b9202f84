//! A request at work.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use model::{Backend, Cancel};

use super::shelf::Live;
use super::{Ended, EngineEvent, MOST_ROWS, Prompt, Usage};
use crate::{Error, PreparedTurn, Slice, StopReason};

/// A request that reads its prompt or generates its turn.
pub struct Active<'b, B: Backend> {
    /// Its number.
    pub id: u64,
    /// What it reads and generates in.
    pub live: Live<B>,
    /// The prompt.
    pub prompt: Prompt,
    /// The turn, which chooses tokens once the prompt is read.
    pub turn: PreparedTurn,
    /// Asks it to stop.
    pub cancel: Arc<Cancel>,
    /// The pass over the prompt that is under way.
    pub slice: Option<Slice<'b, B>>,
    /// When its last slice began, by the engine's count of slices.
    pub slice_number: u64,
    /// How many of the turn's unread tokens its session has read all the same, because there are many.
    pub begun_tokens: usize,
    /// What it has cost.
    pub usage: Usage,
    receive: Box<dyn FnMut(EngineEvent) + Send>,
    /// When the present phase began.
    since: Instant,
    is_decoding: bool,
}

impl<'b, B: Backend> Active<'b, B> {
    /// A request whose session holds the first tokens of its prompt; it is told so.
    pub fn begin(id: u64, live: Live<B>, request: super::Request, queued: std::time::Duration) -> Active<'b, B> {
        let super::Request { prompt, turn, cancel, mut receive } = request;
        let cached_tokens = live.session.tokens().len();
        let usage = Usage { prompt_tokens: prompt.tokens.len(), cached_tokens, queued, ..Usage::default() };
        receive(EngineEvent::Begun { cached_tokens });
        Active {
            id,
            live,
            prompt,
            turn,
            cancel,
            slice: None,
            slice_number: 0,
            begun_tokens: 0,
            usage,
            receive,
            since: Instant::now(),
            is_decoding: false,
        }
    }

    /// Whether its prompt is read.
    pub fn is_decoding(&self) -> bool {
        self.is_decoding
    }

    /// Tokens of the prompt that its session does not hold.
    pub fn unread_prompt(&self) -> &[u32] {
        &self.prompt.tokens[self.live.session.tokens().len()..]
    }

    /// Tells how far the prompt is read: the session's tokens, and the share of a pass of `rows` that is through.
    pub fn tell_progress(&mut self, rows: usize, layers: usize, of_layers: usize) {
        let tokens = self.live.session.tokens().len() + rows * layers / of_layers;
        (self.receive)(EngineEvent::Read { tokens });
    }

    /// Takes the logits after the prompt, which is read; whether the turn goes on, or why it ends.
    pub fn begin_turn(&mut self, logits: &[f32]) -> Result<ControlFlow<StopReason>, Error> {
        self.usage.prefill = self.since.elapsed();
        (self.since, self.is_decoding) = (Instant::now(), true);
        self.chooser().next(logits)
    }

    /// The turn without its session, to choose its next token on any thread.
    pub fn chooser(&mut self) -> Chooser<'_> {
        Chooser {
            turn: &mut self.turn,
            begun_tokens: &mut self.begun_tokens,
            room_tokens: self.live.session.room_tokens(),
            receive: &mut self.receive,
        }
    }

    /// Settles the turn and tells what came of it, once `keep` has the session: whoever is told may ask again at once.
    pub fn end(mut self, reason: StopReason, keep: impl FnOnce(Live<B>, Usage)) {
        let receive = &mut self.receive;
        let outcome = self.turn.end(reason, &mut |event| {
            receive(EngineEvent::Turn(event));
            ControlFlow::Continue(())
        });
        self.usage.decode = self.since.elapsed();
        self.usage.completion_tokens = outcome.tokens.len();
        self.usage.reasoning_tokens = outcome.reasoning_tokens;
        keep(self.live, self.usage);
        (self.receive)(EngineEvent::Ended(Box::new(Ended { outcome, usage: self.usage })));
    }

    /// Tells that nothing more will come, once `keep` has the session.
    pub fn fail(mut self, error: Error, keep: impl FnOnce(Live<B>)) {
        keep(self.live);
        (self.receive)(EngineEvent::Failed(error));
    }
}

/// A turn whose next token is chosen.
pub struct Chooser<'a> {
    turn: &'a mut PreparedTurn,
    begun_tokens: &'a mut usize,
    room_tokens: usize,
    receive: &'a mut (dyn FnMut(EngineEvent) + Send),
}

impl Chooser<'_> {
    /// Takes the logits after up to [`MOST_ROWS`] of the turn's unread tokens; whether the turn goes on, or why it ends.
    pub fn was_read(mut self, logits: &[f32]) -> Result<ControlFlow<StopReason>, Error> {
        let unread = self.turn.unread().len();
        *self.begun_tokens = (*self.begun_tokens + MOST_ROWS).min(unread);
        if *self.begun_tokens < unread {
            return Ok(ControlFlow::Continue(()));
        }
        *self.begun_tokens = 0;
        self.turn.was_read();
        self.next(logits)
    }

    fn next(&mut self, logits: &[f32]) -> Result<ControlFlow<StopReason>, Error> {
        let receive = &mut self.receive;
        self.turn.next(logits, self.room_tokens, &mut |event| {
            receive(EngineEvent::Turn(event));
            ControlFlow::Continue(())
        })
    }
}
