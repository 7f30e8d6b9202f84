//! From logits to tokens until something ends the turn.

use std::ops::ControlFlow;

use model::{Backend, Cancel};

use crate::{Error, Sampler, Session};

/// What ends a turn that the model does not end itself.
#[derive(Clone, Copy, Debug)]
pub struct Limits<'a> {
    /// Tokens that end the turn when the model chooses them: EOS and the role tokens
    /// (docs/spec/conversation.md §5).
    pub stop: &'a [u32],
    /// Most tokens to generate.
    pub max_tokens: usize,
}

/// Why a turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The model chose this token of [`Limits::stop`].
    EndOfTurn(u32),
    /// [`Limits::max_tokens`] tokens were generated.
    TokenLimit,
    /// The session holds as many tokens as its context allows.
    ContextFull,
    /// The caller cancelled.
    Cancelled,
    /// The receiver of the tokens wants no more.
    Receiver,
    /// The block of calls was closed ([`crate::run_turn()`] only, as those below).
    CallsClosed,
    /// A stop string occurred in the content.
    StopString,
    /// A block of calls stayed open with markup that leads nowhere.
    Runaway,
}

/// Continues `session`, whose next token follows from `logits`, and hands each new token to `receive`.
///
/// Stop tokens are not handed out. The session then holds every token handed out but the last, whose logits nobody
/// asked for (all of them if a stop token came or the context is full: prompt and answer together are at most the
/// context).
///
/// # Errors
/// [`Error::NoFiniteLogit`], or [`Error::Model`] if a pass failed; the session holds what was computed before.
pub fn generate<B: Backend>(
    backend: &B,
    session: &mut Session<B>,
    mut logits: Vec<f32>,
    sampler: &mut Sampler,
    limits: Limits<'_>,
    cancel: &Cancel,
    receive: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<StopReason, Error> {
    for generated in 1..=limits.max_tokens {
        let token = sampler.sample(&logits)?;
        if limits.stop.contains(&token) {
            return Ok(StopReason::EndOfTurn(token));
        }
        if session.room_tokens() == 0 {
            return Ok(StopReason::ContextFull);
        }
        if receive(token).is_break() {
            return Ok(StopReason::Receiver);
        }
        if generated == limits.max_tokens {
            break;
        }
        logits = match session.step(backend, token, cancel) {
            Ok(logits) => logits,
            Err(error) if error.is_cancelled() => return Ok(StopReason::Cancelled),
            Err(error) => return Err(error),
        };
    }
    Ok(StopReason::TokenLimit)
}
