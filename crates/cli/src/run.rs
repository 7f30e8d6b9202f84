//! `infall run`: one prompt, one answer.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::Read;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use cpu::CpuBackend;
use model::{Arithmetic, Cancel};
use session::{Context, Limits, Sampler, Sampling, Session, StopReason, generate};
use text::Tokenizer;
use text::prompt::{ControlTokens, Encoding, Message, Mode, PromptOptions, render};

use crate::load::{self, ModelFile};
use crate::terminal::{self, Unit};
use crate::words::Words;
use crate::{Outcome, flags, interrupt};

/// Tokens of the prompt read in one pass: enough to use each weight many times, few enough for the bar to move.
const CHUNK_TOKENS: usize = 256;

/// Runs the command. What needs no weights is checked before they are loaded.
pub fn run(flags: &flags::Run) -> anyhow::Result<Outcome> {
    let prompt = prompt_text(flags)?;
    let file = ModelFile::open(flags.model.as_deref())?;
    let tokenizer = file.tokenizer()?;
    let control = ControlTokens::find(&tokenizer).map_err(|error| anyhow::anyhow!("{}: {error}", file.name))?;
    let tokens = encode(flags, &tokenizer, &prompt)?;
    let context = Context::new(&file.model.config, flags.context_tokens)?;
    context.check(0, tokens.len())?;
    let seed = flags.seed.unwrap_or_else(new_seed);
    let sampling = sampling(flags);
    let sampler = Sampler::new(sampling, seed)?;

    let backend = file.load(flags.machine.threads, Arithmetic::Official)?;
    let cancel = interrupt::cancel_on_interrupt()?;
    let session = Session::new(&backend, context)?;
    let mut turn = Turn { backend: &backend, tokenizer: &tokenizer, control, cancel: &cancel, session, sampler };
    let mut figures = Figures::default();
    let ended = turn.run(flags, &tokens, &mut figures);
    match ended {
        Ok(ended) => {
            figures.print(&turn, ended, (sampling.temperature > 0.0).then_some(seed));
            Ok(if ended == StopReason::Cancelled { Outcome::Interrupted } else { Outcome::Done })
        }
        Err(error) => Err(match error.downcast() {
            Ok(session::Error::Model(error)) => load::in_file(&file.name, error),
            Ok(error) => error.into(),
            Err(error) => error,
        }),
    }
}

/// The prompt as text, from the command line or from standard input.
fn prompt_text(flags: &flags::Run) -> anyhow::Result<String> {
    let prompt = if flags.prompt == "-" { read_standard_input(flags.raw)? } else { flags.prompt.clone() };
    if prompt.is_empty() {
        anyhow::bail!(
            "found an empty prompt, expected some text. Give it as an argument, or with `-` on standard input"
        );
    }
    Ok(prompt)
}

fn read_standard_input(raw: bool) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes).map_err(|error| {
        anyhow::anyhow!("cannot read the prompt from standard input: {error}. Check where it comes from")
    })?;
    let mut prompt = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let byte = error.as_bytes()[at];
        anyhow::anyhow!(
            "standard input: found the byte 0x{byte:02x} at offset {at}, which is not UTF-8; expected a prompt in UTF-8. \
             Convert it, for instance with iconv"
        )
    })?;
    if !raw && prompt.ends_with('\n') {
        prompt.pop();
        if prompt.ends_with('\r') {
            prompt.pop();
        }
    }
    Ok(prompt)
}

/// The prompt as the model reads it.
fn encode(flags: &flags::Run, tokenizer: &Tokenizer, prompt: &str) -> anyhow::Result<Vec<u32>> {
    if flags.raw {
        return Ok(tokenizer.encode_with_control(prompt));
    }
    let file_name = flags.model.as_deref().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
    let options = PromptOptions {
        encoding: flags.encoding.unwrap_or_else(|| Encoding::guess(&file_name)),
        mode: if flags.nothink { Mode::Chat } else { Mode::Thinking { effort: None } },
        drop_reasoning: true,
    };
    let segments = render(tokenizer, &[Message::user(prompt)], &options)?;
    Ok(tokenizer.encode_segments(&segments))
}

fn sampling(flags: &flags::Run) -> Sampling {
    let default_temperature = if flags.model.is_none() { 0.0 } else { 1.0 };
    Sampling {
        temperature: flags.temperature.unwrap_or(default_temperature),
        top_p: flags.top_p,
        min_p: flags.min_p,
        ..Sampling::default()
    }
}

/// A seed short enough to be typed again.
fn new_seed() -> u64 {
    RandomState::new().build_hasher().finish() >> 32
}

/// One prompt and its answer under way.
struct Turn<'a> {
    backend: &'a CpuBackend,
    tokenizer: &'a Tokenizer,
    control: ControlTokens,
    cancel: &'a Cancel,
    session: Session<CpuBackend>,
    sampler: Sampler,
}

impl Turn<'_> {
    fn run(&mut self, flags: &flags::Run, prompt: &[u32], figures: &mut Figures) -> anyhow::Result<StopReason> {
        let start = Instant::now();
        let logits = self.read_prompt(prompt);
        figures.prompt_tokens = self.session.tokens().len();
        figures.prompt_time = start.elapsed();
        let logits = match logits {
            Err(error) if error.is_cancelled() => return Ok(StopReason::Cancelled),
            logits => logits?,
        };
        let start = Instant::now();
        let mut words = if flags.raw { Words::raw() } else { Words::new(self.control, prompt) };
        let ended = self.answer(flags, logits, figures, &mut words);
        figures.answer_time = start.elapsed();
        figures.answer_passes = self.session.tokens().len() - figures.prompt_tokens;
        words.finish()?;
        ended
    }

    fn read_prompt(&mut self, prompt: &[u32]) -> Result<Vec<f32>, session::Error> {
        let bar = terminal::progress("reading", prompt.len() as u64, Unit::Tokens);
        let read = &mut |tokens| bar.set_position(tokens as u64);
        let logits = self.session.prefill(self.backend, prompt, CHUNK_TOKENS, self.cancel, read);
        bar.finish_and_clear();
        logits
    }

    /// Generates, and prints each token as it comes.
    fn answer(
        &mut self,
        flags: &flags::Run,
        logits: Vec<f32>,
        figures: &mut Figures,
        words: &mut Words,
    ) -> anyhow::Result<StopReason> {
        let stop = self.control.stop_set();
        let limits = Limits { stop: &stop, max_tokens: flags.max_tokens.unwrap_or(usize::MAX) };
        let mut unwritable = None;
        let ended =
            generate(self.backend, &mut self.session, logits, &mut self.sampler, limits, self.cancel, &mut |token| {
                figures.answer_tokens += 1;
                match words.push(token, self.tokenizer.token_bytes(token)) {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(error) => {
                        unwritable = Some(error);
                        ControlFlow::Break(())
                    }
                }
            })?;
        unwritable.map_or(Ok(ended), |error| Err(error.into()))
    }
}

/// What the last line tells.
#[derive(Default)]
struct Figures {
    prompt_tokens: usize,
    prompt_time: Duration,
    answer_tokens: usize,
    /// Forward passes of the answer: its last token needs none unless the turn went on to end itself.
    answer_passes: usize,
    answer_time: Duration,
}

impl Figures {
    fn print(&self, turn: &Turn<'_>, ended: StopReason, seed: Option<u64>) {
        let weights = turn.backend.weight_bytes();
        let state = turn.session.state().bytes();
        let session_bytes = state.rows + state.windows + state.inputs + state.checkpoints;
        let mut parts = vec![
            format!("prompt {}{}", tokens(self.prompt_tokens), speed(self.prompt_tokens, self.prompt_time)),
            // One pass is no measure of a speed.
            match self.answer_tokens {
                0..2 => format!("generated {}", tokens(self.answer_tokens)),
                count => format!("generated {}{}", tokens(count), speed(self.answer_passes, self.answer_time)),
            },
            format!(
                "memory {} weights + {} session",
                terminal::bytes(weights.fixed + weights.experts),
                terminal::bytes(session_bytes as u64)
            ),
        ];
        parts.extend(seed.map(|seed| format!("seed {seed}")));
        parts.extend(why(ended).map(str::to_owned));
        terminal::dim_note(&parts.join(" | "));
    }
}

/// `12 tokens`.
fn tokens(count: usize) -> String {
    format!("{count} {}", if count == 1 { "token" } else { "tokens" })
}

/// ` at 34.5 t/s`, of `passed` tokens that went through the model; nothing where none did.
fn speed(passed: usize, time: Duration) -> String {
    match passed {
        0 => String::new(),
        _ => format!(" at {:.1} t/s", passed as f64 / time.as_secs_f64().max(1e-9)),
    }
}

/// Why a turn ended, where the model did not end it.
fn why(reason: StopReason) -> Option<&'static str> {
    match reason {
        StopReason::EndOfTurn(_) | StopReason::Receiver | StopReason::CallsClosed | StopReason::StopString => None,
        StopReason::Runaway => Some("stopped: a tool call that never ends"),
        StopReason::TokenLimit => Some("stopped at -n"),
        StopReason::ContextFull => Some("stopped: the context is full"),
        StopReason::Cancelled => Some("interrupted"),
    }
}
