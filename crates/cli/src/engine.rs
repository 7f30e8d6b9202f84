//! A loaded model and one session: what answers prompts.

use std::ops::ControlFlow;
use std::sync::Arc;

use model::{Cancel, NoObserver};
use session::{Context, Session, StopReason, TurnEvent, TurnOptions, Vocabulary, run_turn};
use text::Tokenizer;
use text::parse::Turn;

use crate::device::Device;
use crate::figures::Figures;
use crate::load::{self, ModelFile};
use crate::output::Output;
use crate::placement::{Setting, Work};
use crate::record::Recording;
use crate::screen::Screen;
use crate::setup;
use crate::stats::Meter;
use crate::terminal::{self, ReadingBar};

/// A model ready to answer, and what it has read so far.
pub struct Engine<D: Device> {
    /// The vocabulary.
    pub tokenizer: Arc<Tokenizer>,
    /// What computes.
    pub backend: D,
    /// What it has read.
    pub session: Session<D>,
    /// How much it may read.
    pub context: Context,
    /// How it runs.
    pub setting: Setting,
    file: ModelFile,
    recording: Option<Recording>,
}

/// What came of a prompt.
pub struct Reply {
    /// What the model said; `None` if reading the prompt was interrupted.
    pub turn: Option<Turn>,
    /// What it cost.
    pub figures: Figures,
}

impl<D: Device> Engine<D> {
    /// Reads the weights, and tells how they are used where that is out of the ordinary.
    ///
    /// # Errors
    /// They cannot be read, there is no memory for them, or `cancel` came.
    pub fn load(
        file: ModelFile,
        tokenizer: Tokenizer,
        context: Context,
        work: &Work,
        on: &D::Adapter,
        cancel: &Arc<Cancel>,
    ) -> anyhow::Result<Engine<D>> {
        let (backend, setting) = file.load::<D>(work, on, cancel)?;
        if !setting.is_default() {
            terminal::dim_note(&setting.line());
        }
        let session = Session::new(&backend, context)?;
        Ok(Engine { tokenizer: Arc::new(tokenizer), backend, session, context, setting, file, recording: None })
    }

    /// Goes on with another session.
    pub fn set_session(&mut self, session: Session<D>) {
        self.session = session;
        if let Some(recording) = &self.recording {
            self.session.observe(recording.observer());
        }
    }

    /// Writes the routes of every pass from now on to `output`.
    ///
    /// # Errors
    /// It cannot be written to.
    pub fn record_routes(&mut self, output: Output) -> anyhow::Result<()> {
        let recording = Recording::begin(output, self.file.trace_header()?)?;
        self.session.observe(recording.observer());
        self.recording = Some(recording);
        Ok(())
    }

    /// Lets the file of routes, if one is written, take its place.
    ///
    /// # Errors
    /// It could not be written.
    pub fn end_recording(&mut self) -> anyhow::Result<()> {
        self.session.observe(Box::new(NoObserver));
        self.recording.take().map_or(Ok(()), Recording::end)
    }

    /// Reads `prompt`, of which the session may hold a beginning, and shows what the model says.
    ///
    /// # Errors
    /// The prompt is too long, a pass failed, or what the model says cannot be shown. The session holds what was computed
    /// before.
    pub fn reply(
        &mut self,
        prompt: &[u32],
        options: &TurnOptions,
        cancel: &Cancel,
        screen: &mut Screen,
    ) -> anyhow::Result<Reply> {
        let mut figures = Figures::default();
        let Some(logits) = self.read(prompt, cancel, &mut figures)? else {
            return Ok(Reply { turn: None, figures });
        };
        let vocabulary = Arc::new(Vocabulary::new(self.tokenizer.clone())?);
        let (meter, held) = (Meter::start(&self.backend), self.session.tokens().len());
        let mut unwritable = None;
        let outcome = run_turn(&self.backend, &vocabulary, &mut self.session, logits, options, cancel, &mut |event| {
            let shown = match event {
                TurnEvent::Text(event) => screen.event(&event),
                TurnEvent::Token { .. } => {
                    screen.token();
                    Ok(())
                }
            };
            unwritable = shown.err();
            if unwritable.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        screen.end()?;
        if let Some(error) = unwritable {
            return Err(error.into());
        }
        let outcome = outcome.map_err(|error| self.name(error))?;
        figures.answer_tokens = outcome.tokens.len();
        figures.decode = meter.stop(&self.backend, self.session.tokens().len() - held);
        figures.ended = Some(outcome.reason);
        Ok(Reply { turn: Some(outcome.turn), figures })
    }

    /// Reads what the session does not hold of `prompt`; returns the logits after it, or nothing if it was interrupted.
    ///
    /// # Errors
    /// As [`Engine::reply`].
    pub fn read(&mut self, prompt: &[u32], cancel: &Cancel, figures: &mut Figures) -> anyhow::Result<Option<Vec<f32>>> {
        self.context.check(0, prompt.len())?;
        let meter = Meter::start(&self.backend);
        let shared = self.session.tokens().iter().zip(prompt).take_while(|(held, wanted)| held == wanted).count();
        figures.kept_tokens = self.session.reuse(&self.backend, prompt);
        let rest = &prompt[figures.kept_tokens..];
        let bar = ReadingBar::new(rest.len());
        let logits = self.session.prefill(&self.backend, rest, D::PASS_ROWS, cancel, &mut |tokens| bar.set(tokens));
        drop(bar);
        let passes = self.session.tokens().len() - figures.kept_tokens;
        figures.again_tokens = (shared - figures.kept_tokens).min(passes);
        figures.prefill = meter.stop(&self.backend, passes);
        match logits {
            Err(error) if error.is_cancelled() => {
                figures.ended = Some(StopReason::Cancelled);
                Ok(None)
            }
            logits => logits.map(Some).map_err(|error| self.name(error)),
        }
    }

    /// Allows `tokens` of context from now on.
    ///
    /// # Errors
    /// The model was made for fewer, or the session holds more.
    pub fn set_context(&mut self, tokens: usize) -> anyhow::Result<()> {
        let context = Context::new(&self.file.model.config, Some(tokens))?;
        let held = self.session.tokens().len();
        if held > tokens {
            anyhow::bail!(
                "found a context of {tokens} tokens, expected at least the {held} that the conversation holds. Ask for \
                 more, or begin anew with /new"
            );
        }
        self.session.set_context(context)?;
        self.context = context;
        Ok(())
    }

    /// Bytes above which no text fits the context.
    pub fn most_text_bytes(&self) -> u64 {
        setup::most_text_bytes(&self.tokenizer, self.context)
    }

    /// Bytes that the session holds.
    pub fn session_bytes(&self) -> u64 {
        self.backend.session_bytes(self.session.state())
    }

    /// `error` with the name of the model's file, where that helps.
    pub fn name(&self, error: session::Error) -> anyhow::Error {
        match error {
            session::Error::Model(error) => load::in_file(&self.file.name, error),
            error => error.into(),
        }
    }
}
