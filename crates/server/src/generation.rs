//! A request at work: the engine's events to what a client is told, a second try after a malformed call, and the end of it all.
//!
//! ```text
//! engine --EngineEvent--> channel --Generation::next--> Happening --> Reply
//! ```
//! The channel never blocks the engine. What a client does not take piles up in it, and beyond a limit the request is cancelled.
//! A generation that is dropped is cancelled, too: its client is gone.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use model::Cancel;
use session::engine::{Ended, EngineEvent, Prompt, Request, Usage};
use session::{PreparedTurn, StopReason, TurnEvent, TurnOutcome};
use text::parse::{Event, Finish};
use text::prompt::Call;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::error::ApiError;
use crate::ids;
use crate::prepare::{self, Job};
use crate::recovery;
use crate::reply::{Delta, Finished, Prompted, call_prefix};
use crate::request::{Api, Conversation};
use crate::server::Server;
use crate::wiring::Wiring;

/// What becomes of a request.
#[derive(Debug)]
pub enum Happening {
    /// It has left the queue.
    Begun(Prompted),
    /// Something that the client is told.
    Delta(Delta),
    /// The turn is over.
    Ended(Box<Finished>),
    /// Nothing more comes.
    Failed(ApiError),
}

/// A request at work.
pub struct Generation {
    server: Arc<Server>,
    api: Api,
    has_tools: bool,
    /// Whether the model goes on with a turn that it began earlier.
    is_continuation: bool,
    job: Job,
    run: Run,
    deadline: Option<Instant>,
    timed_out: bool,
    call_ids: Vec<String>,
    /// Content that may be the text of a malformed block, until the next event tells.
    held: Option<Delta>,
    /// What to hand out before the next event is waited for.
    ready: Option<Happening>,
    /// Whether the client was told of a call that cannot be taken back.
    pub has_told_call: bool,
    first: Option<FirstTry>,
    /// Whether the client has been told reasoning of the first try, and none of the second.
    owes_break: bool,
    /// What was generated, for the trace.
    pub outcome_text: String,
}

/// Between the reasoning of two tries.
const BREAK: &str = "\n\n";

/// A try that ended in a malformed block of calls.
struct FirstTry {
    reasoning: String,
    content: String,
    /// The try's tokens and those of the message that told the model what was wrong.
    tokens: Vec<u32>,
    usage: Usage,
}

/// A request that the engine has; dropped, it is cancelled.
struct Run {
    events: UnboundedReceiver<EngineEvent>,
    cancel: Arc<Cancel>,
    /// Events that wait in the channel, and whether they were too many.
    waiting: Arc<AtomicUsize>,
    overrun: Arc<AtomicBool>,
}

impl Drop for Run {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

impl Run {
    /// Hands a request to the engine.
    fn submit(server: &Server, api: Api, prompt: Prompt, turn: PreparedTurn) -> Result<Run, ApiError> {
        let (sender, events) = unbounded_channel();
        let cancel = Arc::new(Cancel::default());
        let (waiting, overrun) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let run = Run { events, cancel: cancel.clone(), waiting: waiting.clone(), overrun: overrun.clone() };
        let most = server.options.limits.buffered_events;
        let on_overrun = cancel.clone();
        let receive = Box::new(move |event| {
            if waiting.fetch_add(1, Ordering::Relaxed) >= most {
                overrun.store(true, Ordering::Relaxed);
                on_overrun.cancel();
            }
            // Nobody listens any more: the request is cancelled already.
            let _ = sender.send(event);
        });
        let request = Request { prompt, turn, cancel, receive };
        let submitted = server.wiring.engine.submit(request);
        submitted.map_err(|error| ApiError::submit(api, error))?;
        Ok(run)
    }

    async fn next(&mut self) -> Option<EngineEvent> {
        let event = self.events.recv().await;
        self.waiting.fetch_sub(usize::from(event.is_some()), Ordering::Relaxed);
        event
    }
}

impl Generation {
    /// Prepares and submits a request. This takes time in proportion to the prompt: it is not for a thread that serves sockets.
    ///
    /// # Errors
    /// [`ApiError`]: nothing will come of it.
    pub fn begin(server: Arc<Server>, mut conversation: Conversation) -> Result<Generation, ApiError> {
        let job = prepare::job(&mut conversation, &server.wiring)?;
        let turn = prepare::turn(&job, &server.wiring.vocabulary, conversation.api)?;
        let run = Run::submit(&server, conversation.api, job.prompt.clone(), turn)?;
        Ok(Generation {
            deadline: server.options.limits.request().map(|limit| Instant::now() + limit),
            server,
            api: conversation.api,
            has_tools: !conversation.tools.is_empty(),
            is_continuation: conversation.is_continuation(),
            job,
            run,
            timed_out: false,
            call_ids: Vec::new(),
            held: None,
            ready: None,
            has_told_call: false,
            first: None,
            owes_break: false,
            outcome_text: String::new(),
        })
    }

    /// Tokens of the prompt.
    pub fn prompt_tokens(&self) -> usize {
        self.job.prompt.tokens.len()
    }

    /// The prompt as text.
    pub fn prompt_text(&self) -> String {
        String::from_utf8_lossy(&self.server.wiring.vocabulary.tokenizer().decode(&self.job.prompt.tokens)).into_owned()
    }

    /// What happens next. After [`Happening::Ended`] or [`Happening::Failed`] there is nothing more to ask for.
    pub async fn next(&mut self) -> Happening {
        if let Some(ready) = self.ready.take() {
            return ready;
        }
        loop {
            let Some(event) = self.event().await else {
                return Happening::Failed(ApiError::new(500, "the engine dropped the request without a word"));
            };
            let happening = match event {
                EngineEvent::Begun { cached_tokens } => {
                    let prompted = Prompted { prompt_tokens: self.prompt_tokens(), cached_tokens };
                    self.first.is_none().then_some(Happening::Begun(prompted))
                }
                EngineEvent::Read { .. } => None,
                EngineEvent::Turn(event) => self.turn(event),
                EngineEvent::Ended(ended) => self.end(*ended).await,
                EngineEvent::Failed(error) => Some(Happening::Failed(self.failure(&error))),
            };
            if let Some(happening) = happening {
                return happening;
            }
        }
    }

    /// The engine's next event. When the time is over the engine is asked to stop, and its last event comes soon.
    async fn event(&mut self) -> Option<EngineEvent> {
        let Some(deadline) = self.deadline.filter(|_| !self.timed_out) else { return self.run.next().await };
        match tokio::time::timeout_at(deadline.into(), self.run.next()).await {
            Ok(event) => event,
            Err(_) => {
                self.timed_out = true;
                self.run.cancel.cancel();
                self.run.next().await
            }
        }
    }

    /// What a client is told of an event, after what was held back before it.
    fn turn(&mut self, event: TurnEvent) -> Option<Happening> {
        let delta = match event {
            TurnEvent::Token { token, logprobs } => Delta::Token { token, logprobs },
            TurnEvent::Text(Event::Reasoning(text)) if mem::take(&mut self.owes_break) => {
                Delta::Reasoning(format!("{BREAK}{text}"))
            }
            TurnEvent::Text(Event::Reasoning(text)) => Delta::Reasoning(text),
            TurnEvent::Text(Event::Content(text)) => Delta::Content(text),
            TurnEvent::Text(Event::CallBegin { index, name }) => {
                Delta::CallBegin { index, id: self.call_id(index), name }
            }
            TurnEvent::Text(Event::CallArguments { index, delta }) => Delta::CallArguments { index, delta },
            TurnEvent::Text(Event::CallEnd { index }) => Delta::CallEnd { index },
        };
        let may_be_block = matches!(&delta, Delta::Content(text) if text.trim_start().starts_with('<'));
        let held = self.held.take();
        if may_be_block && self.has_tools {
            self.held = Some(delta);
            return held.map(Happening::Delta);
        }
        match held {
            Some(held) => {
                self.ready = Some(Happening::Delta(delta));
                Some(Happening::Delta(held))
            }
            None => Some(Happening::Delta(delta)),
        }
    }

    /// The id of a call.
    fn call_id(&mut self, index: usize) -> String {
        while self.call_ids.len() <= index {
            self.call_ids.push(ids::id(call_prefix(self.api), 32, ids::random()));
        }
        self.call_ids[index].clone()
    }

    /// The engine has ended the turn.
    async fn end(&mut self, ended: Ended) -> Option<Happening> {
        let Ended { outcome, usage } = ended;
        let text = self.server.wiring.vocabulary.tokenizer().decode(&outcome.tokens);
        self.outcome_text.push_str(&String::from_utf8_lossy(&text));
        if outcome.reason == StopReason::Cancelled && !self.timed_out {
            return Some(Happening::Failed(self.cancelled()));
        }
        if recovery::is_due(&outcome) && self.first.is_none() && !self.has_told_call && !self.timed_out {
            match self.try_again(&outcome, usage).await {
                Ok(()) => return None,
                Err(error) => tracing::debug!(%error.message, "a malformed call could not be tried again"),
            }
        }
        let finished = self.finish(outcome, usage).await;
        Some(match self.held.take() {
            Some(held) => {
                self.ready = Some(finished);
                Happening::Delta(held)
            }
            None => finished,
        })
    }

    /// Tells the model what was wrong with its calls, and submits the whole again.
    async fn try_again(&mut self, outcome: &TurnOutcome, usage: Usage) -> Result<(), ApiError> {
        let added =
            recovery::tokens(&self.server.wiring.vocabulary, &self.job.prompt.tokens, &self.job.options, outcome);
        let tokens = [outcome.tokens.as_slice(), &added].concat();
        let whole = [self.job.prompt.tokens.as_slice(), &tokens].concat();
        let room = self.server.wiring.engine.context().tokens().saturating_sub(whole.len());
        let mut options = self.job.options.clone();
        options.max_tokens = options.max_tokens.saturating_sub(outcome.tokens.len()).min(room);
        if options.max_tokens == 0 {
            return Err(ApiError::new(500, "there is no room for a second try"));
        }
        let prompt = Prompt { tokens: whole, common_tokens: self.job.prompt.common_tokens };
        let (server, api) = (self.server.clone(), self.api);
        self.run = blocking(move || {
            let job = Job { prompt, options };
            let turn = prepare::turn(&job, &server.wiring.vocabulary, api)?;
            Run::submit(&server, api, job.prompt, turn)
        })
        .await?;
        self.held = None;
        let turn = &outcome.turn;
        let kept = turn.content.len() - turn.malformed_bytes;
        self.first = Some(FirstTry {
            reasoning: turn.reasoning.clone(),
            content: turn.content[..kept].to_owned(),
            tokens,
            usage,
        });
        self.owes_break = !turn.reasoning.is_empty();
        self.call_ids.clear();
        self.server.metrics.recovered();
        Ok(())
    }

    /// Settles and records a turn.
    async fn finish(&mut self, mut outcome: TurnOutcome, usage: Usage) -> Happening {
        let mut usage = Usage { prompt_tokens: self.prompt_tokens(), ..usage };
        if let Some(first) = self.first.take() {
            let second = mem::take(&mut outcome.turn.reasoning);
            let between = if first.reasoning.is_empty() || second.is_empty() { "" } else { BREAK };
            outcome.turn.reasoning = [&first.reasoning, between, &second].concat();
            outcome.turn.content.insert_str(0, &first.content);
            outcome.tokens.splice(0..0, first.tokens);
            usage = sum(first.usage, usage);
        }
        let turn = &outcome.turn;
        let calls = turn.calls.iter().enumerate();
        let calls = calls.map(|(index, call)| Call { id: Some(self.call_id(index)), ..call.clone() }).collect();
        self.call_ids.truncate(turn.calls.len());
        let finished = Finished {
            reasoning: turn.reasoning.clone(),
            content: turn.content.clone(),
            calls,
            finish: if outcome.reason == StopReason::Cancelled { Finish::Length } else { turn.finish },
            stop_string: outcome.stop_string.clone(),
            usage,
        };
        if !self.is_continuation {
            self.remember(outcome).await;
        }
        Happening::Ended(Box::new(finished))
    }

    /// Records a turn, so that its history is read in the tokens that were sampled.
    async fn remember(&self, outcome: TurnOutcome) {
        let (server, prompt, ids) = (self.server.clone(), self.job.prompt.tokens.clone(), self.call_ids.clone());
        let remembered = blocking(move || {
            let Wiring { replay, vocabulary, .. } = &server.wiring;
            let remembered = replay.remember(vocabulary.tokenizer(), &prompt, &outcome, &ids);
            remembered.map_err(|error| ApiError::new(500, error.to_string()))
        });
        if let Err(error) = remembered.await {
            tracing::warn!(%error.message, "a turn was not recorded: its history will be read as text");
            self.server.metrics.record_failed();
        }
    }

    /// Why the engine gave up.
    fn failure(&self, error: &session::Error) -> ApiError {
        if error.is_cancelled() { self.cancelled() } else { ApiError::session(self.api, error) }
    }

    /// Why a request was cancelled, if not by its client.
    fn cancelled(&self) -> ApiError {
        if self.timed_out {
            let limit = self.server.options.limits.request().unwrap_or(Duration::ZERO).as_secs();
            ApiError::new(504, format!("the prompt was not read within the limit of {limit} s"))
        } else if self.run.overrun.load(Ordering::Relaxed) {
            ApiError::new(503, "the client took too little of the stream, which was stopped")
        } else {
            ApiError::new(503, "the server is shutting down")
        }
    }
}

/// What two tries cost together. The second one's prompt is not the client's: neither its tokens count, nor the time to read it.
fn sum(first: Usage, second: Usage) -> Usage {
    Usage {
        prompt_tokens: first.prompt_tokens,
        cached_tokens: first.cached_tokens,
        completion_tokens: first.completion_tokens + second.completion_tokens,
        reasoning_tokens: first.reasoning_tokens + second.reasoning_tokens,
        queued: first.queued + second.queued,
        prefill: first.prefill,
        decode: first.decode + second.decode,
    }
}

/// Does what takes long where it holds up no socket.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => {
            tracing::error!(%error, "a request failed in a way that it should not");
            Err(ApiError::new(500, "the request failed inside the server: see its log"))
        }
    }
}
