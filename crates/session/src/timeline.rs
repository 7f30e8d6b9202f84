//! One timeline: tokens, and the state of a backend that has seen exactly these.

use model::{Backend, Batch, Cancel, Config, Forward, NoObserver, Observer, Row, Stage, SubLayer, forward};

use crate::Error;

/// How many tokens a session may hold. Known from a model's header, so that what does not fit is refused before any
/// weight is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    tokens: usize,
    model_tokens: usize,
}

impl Context {
    /// `asked` tokens, or all that the model was made for. A session's state grows with what it holds, so a large
    /// context costs nothing by itself.
    ///
    /// # Errors
    /// [`Error::ContextSize`] if the model was made for fewer tokens, or for 0.
    pub fn new(config: &Config, asked: Option<usize>) -> Result<Context, Error> {
        let model_tokens = config.context_length;
        let tokens = asked.unwrap_or(model_tokens);
        if tokens == 0 || tokens > model_tokens {
            return Err(Error::ContextSize { asked: tokens, limit: model_tokens });
        }
        Ok(Context { tokens, model_tokens })
    }

    /// How many tokens a session may hold.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Whether a prompt of `prompt` tokens can follow `held` tokens.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], [`Error::PromptTooLong`].
    pub fn check(&self, held: usize, prompt: usize) -> Result<(), Error> {
        let (room, limit, model_limit) = (self.tokens - held, self.tokens, self.model_tokens);
        match prompt {
            0 => Err(Error::EmptyPrompt),
            found if found > room => Err(Error::PromptTooLong { found, room, limit, model_limit }),
            _ => Ok(()),
        }
    }
}

/// Receives the logits `[vocab]` of a pass.
pub type OnLogits = Box<dyn FnMut(&[f32]) + Send>;

/// The tokens of one conversation and what a backend keeps of them.
///
/// Whatever fails or is cancelled, tokens and state stay in step: they hold the passes that succeeded.
pub struct Session<B: Backend> {
    tokens: Vec<u32>,
    state: B::State,
    context: Context,
    observer: Box<dyn Observer<B> + Send>,
    on_logits: OnLogits,
}

impl<B: Backend> Session<B> {
    /// A session that has seen nothing.
    ///
    /// # Errors
    /// The backend has no memory for it.
    pub fn new(backend: &B, context: Context) -> Result<Session<B>, Error> {
        Ok(Session::from_parts(Vec::new(), backend.new_state()?, context))
    }

    /// A session whose `state` has seen exactly `tokens`.
    pub(crate) fn from_parts(tokens: Vec<u32>, state: B::State, context: Context) -> Session<B> {
        Session { tokens, state, context, observer: Box::new(NoObserver), on_logits: Box::new(|_| ()) }
    }

    /// Lets `observer` look at every pass from now on.
    pub fn observe(&mut self, observer: Box<dyn Observer<B> + Send>) {
        self.observer = observer;
    }

    /// Every token seen, first to last.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// What the backend keeps of them.
    pub fn state(&self) -> &B::State {
        &self.state
    }

    /// Allows `context` from now on.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] if the session holds more already.
    pub fn set_context(&mut self, context: Context) -> Result<(), Error> {
        if !self.tokens.is_empty() {
            context.check(0, self.tokens.len())?;
        }
        self.context = context;
        Ok(())
    }

    /// Tokens that still fit.
    pub fn room_tokens(&self) -> usize {
        self.context.tokens - self.tokens.len()
    }

    /// Hands the logits of every pass to `receive` from now on: none of a pass that only makes way for the next.
    pub fn on_logits(&mut self, receive: OnLogits) {
        self.on_logits = receive;
    }

    /// Reads `tokens` in passes that end at multiples of `chunk_tokens` in the session, and returns the logits `[vocab]` after the last one. After each layer and
    /// each pass `done` is told how many of the tokens have been read; those of the pass under way count by the share of
    /// its layers that are done.
    ///
    /// Chunks sit on a fixed absolute grid, so that a backend whose bits depend on the number of rows computes the same
    /// whatever was read before.
    ///
    /// Panics if `chunk_tokens` is 0.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] and [`Error::PromptTooLong`] before anything is computed. [`Error::Model`] if a pass
    /// failed or was cancelled: the passes before it stay.
    pub fn prefill(
        &mut self,
        backend: &B,
        tokens: &[u32],
        chunk_tokens: usize,
        cancel: &Cancel,
        done: &mut dyn FnMut(usize),
    ) -> Result<Vec<f32>, Error> {
        self.context.check(self.tokens.len(), tokens.len())?;
        let (mut logits, mut read) = (Vec::new(), 0);
        while read < tokens.len() {
            let rows = pass_rows(self.tokens.len(), tokens.len() - read, chunk_tokens);
            let (chunk, layers) = (&tokens[read..read + rows], backend.config().layers);
            let is_last = read + rows == tokens.len();
            logits = self.pass(backend, chunk, is_last, cancel, &mut |layer| done(read + rows * layer / layers))?;
            read += rows;
            done(read);
        }
        Ok(logits)
    }

    /// Reads one token and returns the logits `[vocab]` after it.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn step(&mut self, backend: &B, token: u32, cancel: &Cancel) -> Result<Vec<f32>, Error> {
        self.prefill(backend, &[token], 1, cancel, &mut |_| ())
    }

    /// Steps back to `target` tokens or to the nearest earlier place the state still knows; returns the tokens left.
    pub fn rewind(&mut self, backend: &B, target: usize) -> usize {
        let reached = backend.rewind(&mut self.state, target);
        self.tokens.truncate(reached);
        reached
    }

    /// Steps back to where the session's tokens and `tokens` part, or to the nearest earlier place the state still knows,
    /// so that `tokens` can be read from there. Returns how many of them are kept: always less than all (none if there
    /// are none), because logits come from reading a token.
    pub fn reuse(&mut self, backend: &B, tokens: &[u32]) -> usize {
        let shared = self.tokens.iter().zip(tokens).take_while(|(held, wanted)| held == wanted).count();
        self.rewind(backend, shared.min(tokens.len().saturating_sub(1)))
    }

    /// A second session that goes on from the same place.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn fork(&self, backend: &B) -> Result<Session<B>, Error> {
        Ok(Session::from_parts(self.tokens.clone(), backend.fork(&self.state)?, self.context))
    }

    /// Begins a pass over `tokens` that goes on a layer at a time. Until it is over the session may be looked at and forked; it must
    /// not read anything else, and not step back.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn begin_slice<'b>(&self, backend: &'b B, tokens: Vec<u32>, logits: bool) -> Result<Slice<'b, B>, Error> {
        self.context.check(self.tokens.len(), tokens.len())?;
        let forward =
            Forward::begin(backend, rows(0, self.tokens.len(), &tokens, logits), &[&self.state], &mut NoObserver)?;
        Ok(Slice { backend, forward, tokens })
    }

    /// One forward pass over `tokens`; logits after the last of them, or none. `done` is told how many
    /// layers the pass has been through.
    fn pass(
        &mut self,
        backend: &B,
        tokens: &[u32],
        last_logits: bool,
        cancel: &Cancel,
        done: &mut dyn FnMut(usize),
    ) -> Result<Vec<f32>, model::Error> {
        let rows = rows(0, self.tokens.len(), tokens, last_logits);
        let mut observer = Layers { observer: &mut *self.observer, done };
        let logits = forward(backend, rows, &mut [&mut self.state], cancel, &mut observer)?;
        self.tokens.extend_from_slice(tokens);
        let logits = backend.read_logits(logits)?;
        (self.on_logits)(&logits);
        Ok(logits)
    }
}

/// Rows of session number `session` from `position` on; the last one wants logits or none does.
fn rows(session: usize, position: usize, tokens: &[u32], last_logits: bool) -> Vec<Row> {
    let end = position + tokens.len();
    let row = |(position, &token)| Row { session, position, token, logits: last_logits && position + 1 == end };
    (position..end).zip(tokens).map(row).collect()
}

/// A pass over tokens of one session that goes on a layer at a time.
pub struct Slice<'b, B: Backend> {
    backend: &'b B,
    forward: Forward<'b, B>,
    tokens: Vec<u32>,
}

impl<B: Backend> Slice<'_, B> {
    /// Tokens that it reads.
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Layers done.
    pub fn layers(&self) -> usize {
        self.forward.layers()
    }

    /// Computes the next layer; whether it was the last.
    ///
    /// # Errors
    /// [`Error::Model`] if it failed or was cancelled: the session is as it was before the pass.
    pub fn layer(&mut self, session: &Session<B>, cancel: &Cancel) -> Result<bool, Error> {
        self.forward.layer(&[&session.state], cancel, &mut NoObserver)?;
        Ok(self.forward.is_through())
    }

    /// Makes the pass part of its session. The logits `[vocab]` after its last token, if they were asked for.
    ///
    /// # Errors
    /// As [`Slice::layer`].
    pub fn end(self, session: &mut Session<B>) -> Result<Vec<f32>, Error> {
        let logits = self.forward.end(&mut [&mut session.state], &mut NoObserver)?;
        session.tokens.extend(self.tokens);
        Ok(self.backend.read_logits(logits)?)
    }
}

/// Reads the tokens of several sessions in one pass, each at least one, and returns the logits `[sessions, vocab]` after the last
/// token of each. What experts they choose is read once.
///
/// # Errors
/// As [`Session::prefill`]; no session has changed then.
pub fn read_together<B: Backend>(
    backend: &B,
    parts: &mut [(&mut Session<B>, &[u32])],
    cancel: &Cancel,
) -> Result<Vec<f32>, Error> {
    for (session, tokens) in parts.iter() {
        session.context.check(session.tokens.len(), tokens.len())?;
    }
    let of = |(number, (session, tokens)): (usize, &(&mut Session<B>, &[u32]))| {
        rows(number, session.tokens.len(), tokens, true)
    };
    let rows = parts.iter().enumerate().flat_map(of).collect();
    let mut states: Vec<&mut B::State> = parts.iter_mut().map(|(session, _)| &mut session.state).collect();
    let logits = forward(backend, rows, &mut states, cancel, &mut NoObserver)?;
    for (session, tokens) in parts {
        session.tokens.extend_from_slice(tokens);
    }
    Ok(backend.read_logits(logits)?)
}

/// Rows of the pass at `position` when `left` tokens are to be read: it ends at the next multiple of `chunk_tokens`, or
/// with them.
///
/// Panics if `chunk_tokens` is 0.
pub fn pass_rows(position: usize, left: usize, chunk_tokens: usize) -> usize {
    left.min(chunk_tokens - position % chunk_tokens)
}

/// Tells how many layers a pass has been through; shows all to another observer.
struct Layers<'a, B: Backend> {
    observer: &'a mut dyn Observer<B>,
    done: &'a mut dyn FnMut(usize),
}

impl<B: Backend> Observer<B> for Layers<'_, B> {
    fn begin(&mut self, batch: &Batch) {
        self.observer.begin(batch);
    }

    fn after(&mut self, layer: Option<usize>, stage: Stage, backend: &B, pass: &B::Pass) -> Result<(), model::Error> {
        if let (Some(layer), Stage::HcPost(SubLayer::Experts)) = (layer, stage) {
            (self.done)(layer + 1);
        }
        self.observer.after(layer, stage, backend, pass)
    }
}
