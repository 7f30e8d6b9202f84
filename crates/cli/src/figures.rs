//! What a reply cost, for the line below it.

use std::time::Duration;

use session::StopReason;

use crate::device::Device;
use crate::engine::Engine;
use crate::stats::Traffic;
use crate::terminal;

/// Counts and times of one reply.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// Tokens of the prompt that the session held already.
    pub kept_tokens: usize,
    /// Passes over the tokens of the prompt that were read.
    pub prefill: Traffic,
    /// How many of these the session had held before, behind the place where the new prompt parts from it.
    pub again_tokens: usize,
    /// Tokens generated.
    pub answer_tokens: usize,
    /// Passes of the answer: its last token needs none unless the turn went on to end itself.
    pub decode: Traffic,
    /// Why the reply ended; `None` while it goes on.
    pub ended: Option<StopReason>,
}

impl Figures {
    /// Adds what another reply cost.
    pub fn add(&mut self, other: &Figures) {
        self.kept_tokens += other.kept_tokens;
        self.again_tokens += other.again_tokens;
        self.prefill.add(&other.prefill);
        self.answer_tokens += other.answer_tokens;
        self.decode.add(&other.decode);
    }

    /// Prints the line of a single prompt. The `seed` is told where it had an effect.
    pub fn print_for_prompt<D: Device>(&self, engine: &Engine<D>, seed: Option<u64>) {
        let memory = format!(
            "memory {} weights + {} session",
            terminal::bytes(engine.backend.weight_bytes()),
            terminal::bytes(engine.session_bytes())
        );
        self.print(vec![format!("prompt {}", self.read()), format!("generated {}", self.generated()), memory], seed);
    }

    /// Prints the line of a turn of a conversation.
    pub fn print_for_turn<D: Device>(&self, engine: &Engine<D>, seed: Option<u64>) {
        let again = if self.again_tokens > 0 { format!(" ({} again)", self.again_tokens) } else { String::new() };
        let kept = if self.kept_tokens > 0 { format!(", {} kept", self.kept_tokens) } else { String::new() };
        let read = format!("{} read{again}{}{kept}", self.prefill.tokens, speed(&self.prefill));
        let generated = format!("{} generated{}", self.answer_tokens, self.answer_speed());
        let context = format!("context {}/{}", engine.session.tokens().len(), engine.context.tokens());
        self.print(vec![read, generated, context], seed);
    }

    /// `18 tokens at 320.0 t/s`.
    pub fn read(&self) -> String {
        tokens(self.prefill.tokens) + &speed(&self.prefill)
    }

    /// `9 tokens at 205.1 t/s`.
    pub fn generated(&self) -> String {
        tokens(self.answer_tokens) + &self.answer_speed()
    }

    /// One pass is no measure of a speed.
    fn answer_speed(&self) -> String {
        if self.answer_tokens < 2 { String::new() } else { speed(&self.decode) }
    }

    fn print(&self, mut parts: Vec<String>, seed: Option<u64>) {
        parts.extend(seed.map(|seed| format!("seed {seed}")));
        parts.extend(self.ended.and_then(why).map(str::to_owned));
        terminal::dim_note(&parts.join(" | "));
    }
}

/// `12 tokens`.
pub fn tokens(count: usize) -> String {
    format!("{count} {}", if count == 1 { "token" } else { "tokens" })
}

/// `3.2 s`.
pub fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

/// ` at 34.5 t/s`, of tokens that went through the model; nothing where none did.
fn speed(passes: &Traffic) -> String {
    match passes.tokens {
        0 => String::new(),
        tokens => format!(" at {:.1} t/s", tokens as f64 / passes.time.as_secs_f64().max(1e-9)),
    }
}

/// Why a reply ended, where the model did not end it.
fn why(reason: StopReason) -> Option<&'static str> {
    match reason {
        StopReason::EndOfTurn(_) | StopReason::Receiver | StopReason::CallsClosed | StopReason::StopString => None,
        StopReason::Runaway => Some("stopped: a tool call that never ends"),
        StopReason::TokenLimit => Some("stopped at -n"),
        StopReason::ContextFull => Some("stopped: the context is full"),
        StopReason::Cancelled => Some("interrupted"),
    }
}
