//! A turn: from the logits after a prompt to reasoning, answer and calls (docs/spec/conversation.md §4 to §5).
//!
//! ```text
//! logits -> constraint, syntax, sampling -> token -> bytes -> parser -> stop strings -> events
//! ```
//!
//! *Syntax-aware sampling* (§4.6): where the parser expects markup of calls or JSON outside of strings the likeliest token is
//! taken; everywhere else the request's sampling chooses.
//!
//! *What the session holds afterwards*: the prompt and [`TurnOutcome::tokens`] but for the last [`TurnOutcome::unread_tokens`] of
//! them. That is none if the model ended the turn, one where something else did after a token it chose, and more only if that
//! happened inside an opener put into its mouth. [`Session::reuse`] finds what is there again in the next prompt.

mod constrain;
mod output;

use std::ops::ControlFlow;
use std::sync::Arc;

use model::{Backend, Cancel};
use text::parse::{EngineFinish, Event, ParseOptions, Position, Turn};

pub use self::constrain::Constrain;
use self::constrain::Constraints;
use self::output::Output;
use crate::{Choice, Error, Logprobs, Sampler, Sampling, Session, StopReason, Vocabulary};

/// Most tokens in a row that a block of calls may go on with markup that leads nowhere. The longest of real use, a header with a
/// long name, is some fifty.
const MAX_IDLE_TOKENS: usize = 256;

/// Whether the model may, must or must not call tools.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ToolChoice {
    /// It decides.
    #[default]
    Auto,
    /// It must not: markup of calls is text.
    None,
    /// It must call some tool: the opener of a call is put into its mouth once its reasoning is over.
    Required,
    /// It must call this one first.
    Named(String),
}

/// How a turn is generated.
#[derive(Clone, Debug)]
pub struct TurnOptions {
    /// What the turn may hold.
    pub parse: ParseOptions,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// What random choices follow from.
    pub seed: u64,
    /// Most tokens to generate, those put into the model's mouth included.
    pub max_tokens: usize,
    /// Texts that end the turn where one occurs in the answer's content; reasoning and calls may hold them.
    pub stop_strings: Vec<String>,
    /// Whether tools are called.
    pub choice: ToolChoice,
    /// What holds the turn to a grammar.
    pub constrain: Constrain,
    /// Whether the turn ends after its first call.
    pub single_call: bool,
    /// Added to the logits of these tokens, -100 to 100.
    pub logit_bias: Vec<(u32, f32)>,
    /// Whether events tell log probabilities, and of how many of the likeliest tokens: at most [`Logprobs::MAX_TOP`].
    pub logprobs: Option<usize>,
}

impl Default for TurnOptions {
    fn default() -> TurnOptions {
        TurnOptions {
            parse: ParseOptions::default(),
            sampling: Sampling::default(),
            seed: 0,
            max_tokens: usize::MAX,
            stop_strings: Vec::new(),
            choice: ToolChoice::default(),
            constrain: Constrain::default(),
            single_call: false,
            logit_bias: Vec::new(),
            logprobs: None,
        }
    }
}

/// Something that happened in a turn.
#[derive(Clone, Debug, PartialEq)]
pub enum TurnEvent {
    /// A token became part of the turn. What it says follows as [`TurnEvent::Text`], perhaps only after further tokens. The token
    /// that ends a turn is no part of it.
    Token {
        /// The token.
        token: u32,
        /// Asked for by [`TurnOptions::logprobs`]; `None` for a token that was put into the model's mouth.
        logprobs: Option<Logprobs>,
    },
    /// What tokens say.
    Text(Event),
}

/// A turn that has ended.
#[derive(Clone, Debug)]
pub struct TurnOutcome {
    /// What the model made of it.
    pub turn: Turn,
    /// Why it ended.
    pub reason: StopReason,
    /// The turn's tokens, without the one that ended it.
    pub tokens: Vec<u32>,
    /// How many of these, the last ones, the session has not read.
    pub unread_tokens: usize,
    /// How many of [`TurnOutcome::tokens`] are reasoning, its `</think>` included.
    pub reasoning_tokens: usize,
    /// The stop string that ended the turn.
    pub stop_string: Option<String>,
}

/// Generates a turn from `logits`, those after the last token of `session`, and hands what happens to `receive`.
///
/// # Errors
/// As [`PreparedTurn::new`] and [`PreparedTurn::run`].
pub fn run_turn<B: Backend>(
    backend: &B,
    vocabulary: &Arc<Vocabulary>,
    session: &mut Session<B>,
    logits: Vec<f32>,
    options: &TurnOptions,
    cancel: &Cancel,
    receive: &mut dyn FnMut(TurnEvent) -> ControlFlow<()>,
) -> Result<TurnOutcome, Error> {
    PreparedTurn::new(vocabulary.clone(), options)?.run(backend, session, logits, cancel, receive)
}

/// A turn whose options are known to be good, so that a long prompt is not read in vain.
///
/// [`PreparedTurn::run`] drives it on one session. Who has several turns to go on with drives them itself: [`PreparedTurn::next`]
/// takes the logits of a turn, [`PreparedTurn::unread`] is what its session reads then, [`PreparedTurn::end`] settles it.
pub struct PreparedTurn {
    vocabulary: Arc<Vocabulary>,
    sampler: Sampler,
    constraints: Constraints,
    output: Output,
    /// Tokens to put into the model's mouth once its reasoning is over.
    opener: Vec<u32>,
    logprobs: Option<usize>,
    single_call: bool,
    max_tokens: usize,
    reasoning_tokens: usize,
    /// Tokens in a row that were markup and led nowhere.
    idle_tokens: usize,
    tokens: Vec<u32>,
    /// How many of `tokens` the session has not read.
    unread: usize,
}

impl PreparedTurn {
    /// Checks the options and makes everything ready.
    ///
    /// # Errors
    /// [`Error::Sampling`], [`Error::ToolChoice`], [`Error::SchemaAndCall`] and [`Error::Grammar`] if the options cannot be met.
    pub fn new(vocabulary: Arc<Vocabulary>, options: &TurnOptions) -> Result<PreparedTurn, Error> {
        let sampler = Sampler::new(options.sampling, options.seed)?.with_bias(options.logit_bias.clone())?;
        let mut parse = options.parse.clone();
        let is_json = matches!(options.constrain, Constrain::Schema(_));
        if is_json && matches!(options.choice, ToolChoice::Required | ToolChoice::Named(_)) {
            return Err(Error::SchemaAndCall);
        }
        if is_json || options.choice == ToolChoice::None {
            parse.tools = None;
        }
        let output = Output::new(&parse, options.constrain == Constrain::Calls, options.stop_strings.clone());
        Ok(PreparedTurn {
            opener: constrain::opener(&vocabulary, &options.choice, parse.tools.as_deref())?,
            constraints: Constraints::new(&vocabulary, &options.constrain, parse.tools.as_deref())?,
            output,
            vocabulary,
            sampler,
            logprobs: options.logprobs.map(|top| top.min(Logprobs::MAX_TOP)),
            single_call: options.single_call,
            max_tokens: options.max_tokens,
            reasoning_tokens: 0,
            idle_tokens: 0,
            tokens: Vec::new(),
            unread: 0,
        })
    }

    /// Generates the turn from `logits`, those after the last token of `session`.
    ///
    /// # Errors
    /// [`Error::NoFiniteLogit`], [`Error::BiasToken`], [`Error::Grammar`], or [`Error::Model`] if a pass failed; the session holds what
    /// was computed before.
    pub fn run<B: Backend>(
        mut self,
        backend: &B,
        session: &mut Session<B>,
        mut logits: Vec<f32>,
        cancel: &Cancel,
        receive: &mut dyn FnMut(TurnEvent) -> ControlFlow<()>,
    ) -> Result<TurnOutcome, Error> {
        let reason = loop {
            let next = match self.next(&logits, session.room_tokens(), receive)? {
                ControlFlow::Continue(()) => self.read(backend, session, cancel),
                ControlFlow::Break(reason) => break reason,
            };
            logits = match next {
                Ok(logits) => logits,
                Err(error) if error.is_cancelled() => break StopReason::Cancelled,
                Err(error) => return Err(error),
            };
        };
        Ok(self.end(reason, receive))
    }

    /// Reads the tokens that the session has not seen; the logits after the last of them.
    fn read<B: Backend>(&mut self, backend: &B, session: &mut Session<B>, cancel: &Cancel) -> Result<Vec<f32>, Error> {
        let logits = session.prefill(backend, self.unread(), B::PASS_ROWS, cancel, &mut |_| ())?;
        self.was_read();
        Ok(logits)
    }

    /// The turn's tokens that its session is to read before [`PreparedTurn::next`].
    pub fn unread(&self) -> &[u32] {
        &self.tokens[self.tokens.len() - self.unread..]
    }

    /// The session has read [`PreparedTurn::unread`].
    pub fn was_read(&mut self) {
        self.unread = 0;
    }

    /// Takes the `logits` after the session's last token: chooses the next token, and puts a pending opener behind it. The session
    /// has room for `room` more. Breaks with the reason if that ends the turn.
    ///
    /// # Errors
    /// [`Error::NoFiniteLogit`], [`Error::BiasToken`], [`Error::Grammar`].
    pub fn next(
        &mut self,
        logits: &[f32],
        room: usize,
        receive: &mut dyn FnMut(TurnEvent) -> ControlFlow<()>,
    ) -> Result<ControlFlow<StopReason>, Error> {
        let opener_is_due = |turn: &Self| !turn.opener.is_empty() && !turn.output.in_reasoning();
        if !opener_is_due(self) {
            let token = self.choose(logits)?;
            let ends = self.vocabulary.control().stop_set().contains(&token);
            if ends && !self.owes_answer() {
                return Ok(ControlFlow::Break(StopReason::EndOfTurn(token)));
            }
            // What would end the turn ends the reasoning.
            let token = if ends { self.vocabulary.control().end_think } else { token };
            let logprobs = self.logprobs.filter(|_| !ends).map(|top| Logprobs::new(logits, token, top));
            if let ControlFlow::Break(reason) = self.push(token, logprobs, room, receive)? {
                return Ok(ControlFlow::Break(reason));
            }
        }
        if opener_is_due(self) {
            let room = room.saturating_sub(self.unread);
            for (i, token) in std::mem::take(&mut self.opener).into_iter().enumerate() {
                if let ControlFlow::Break(reason) = self.push(token, None, room.saturating_sub(i), receive)? {
                    return Ok(ControlFlow::Break(reason));
                }
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Whether the turn reasons and must not end without the call or the JSON that was asked for.
    fn owes_answer(&self) -> bool {
        self.output.in_reasoning() && (!self.opener.is_empty() || matches!(self.constraints, Constraints::Answer(_)))
    }

    /// The token that constraint, syntax and sampling choose.
    fn choose(&mut self, logits: &[f32]) -> Result<u32, Error> {
        let allowed = self.constraints.allowed(self.output.in_reasoning())?;
        let greedy = matches!(self.output.position(), Position::Structure | Position::JsonStructure);
        self.sampler.choose(logits, Choice { allowed: allowed.as_deref(), greedy })
    }

    /// Makes `token` part of the turn, if there is room for it.
    fn push(
        &mut self,
        token: u32,
        logprobs: Option<Logprobs>,
        room: usize,
        receive: &mut dyn FnMut(TurnEvent) -> ControlFlow<()>,
    ) -> Result<ControlFlow<StopReason>, Error> {
        if self.tokens.len() == self.max_tokens {
            return Ok(ControlFlow::Break(StopReason::TokenLimit));
        }
        if room == 0 {
            return Ok(ControlFlow::Break(StopReason::ContextFull));
        }
        self.tokens.push(token);
        self.unread += 1;
        self.reasoning_tokens += usize::from(self.output.in_reasoning());
        self.constraints.accept(&self.vocabulary, token, self.output.in_reasoning())?;
        if self.constraints.has_opened() {
            self.output.announce_block();
        }
        let events = self.output.push(self.vocabulary.tokenizer().token_bytes(token));
        let has_call = self.single_call && events.iter().any(|event| matches!(event, Event::CallEnd { .. }));
        self.idle_tokens = if self.output.is_idle() { self.idle_tokens + 1 } else { 0 };
        let mut events =
            std::iter::once(TurnEvent::Token { token, logprobs }).chain(events.into_iter().map(TurnEvent::Text));
        if events.any(|event| receive(event).is_break()) {
            return Ok(ControlFlow::Break(StopReason::Receiver));
        }
        Ok(match self.output.position() {
            _ if self.output.is_stopped() => ControlFlow::Break(StopReason::StopString),
            _ if has_call => ControlFlow::Break(StopReason::CallsClosed),
            Position::Done => ControlFlow::Break(StopReason::CallsClosed),
            Position::Runaway => ControlFlow::Break(StopReason::Runaway),
            _ if self.idle_tokens > MAX_IDLE_TOKENS => ControlFlow::Break(StopReason::Runaway),
            _ if self.tokens.len() == self.max_tokens => ControlFlow::Break(StopReason::TokenLimit),
            _ => ControlFlow::Continue(()),
        })
    }

    /// Settles what the turn came to.
    pub fn end(self, reason: StopReason, receive: &mut dyn FnMut(TurnEvent) -> ControlFlow<()>) -> TurnOutcome {
        let finish = match reason {
            StopReason::EndOfTurn(_) | StopReason::CallsClosed | StopReason::StopString => EngineFinish::Stop,
            StopReason::Runaway => EngineFinish::Runaway,
            StopReason::TokenLimit | StopReason::ContextFull => EngineFinish::Length,
            StopReason::Cancelled | StopReason::Receiver => EngineFinish::Interrupted,
        };
        let Self { output, tokens, unread: unread_tokens, reasoning_tokens, .. } = self;
        let (turn, events, stop_string) = output.finish(finish);
        if reason != StopReason::Receiver {
            // The turn is over: there is nothing left that a break could stop.
            events
                .into_iter()
                .map(TurnEvent::Text)
                .take_while(|event| receive(event.clone()).is_continue())
                .for_each(drop);
        }
        // A stop string in what was kept back to the end ended the turn as well.
        let reason = match finish {
            EngineFinish::Stop | EngineFinish::Length if stop_string.is_some() => StopReason::StopString,
            _ => reason,
        };
        TurnOutcome { turn, reason, tokens, unread_tokens, reasoning_tokens, stop_string }
    }
}
