//! Requests to generate, and to count what would be read.

use std::convert::Infallible;
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use serde_json::{Value, json};
use text::parse::Finish;
use tokio::runtime::Handle;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::body;
use crate::error::ApiError;
use crate::frame::Frame;
use crate::generation::{Generation, Happening, blocking};
use crate::reply::{About, Delta, Finished, Prompted, Reply, per_second, reply};
use crate::request::{self, Api, Conversation};
use crate::responses_store::StoredResponse;
use crate::server::{Server, now};
use crate::trace::Entry;
use crate::{ids, json as bounded, prepare};

/// Chunks of a stream that wait for the socket; what comes after them waits in the engine's channel, which is bounded, too.
const CHUNKS: usize = 64;

/// A request to generate.
pub async fn generate(api: Api, State(server): State<Arc<Server>>, request: Request) -> Response {
    let begun = begin(api, &server, request.into_body()).await;
    let answer = match begun {
        Ok(work) if work.is_stream => stream(work).await,
        Ok(work) => whole(work).await,
        Err(error) => Err(error),
    };
    let response = answer.unwrap_or_else(|error| {
        tracing::info!(api = api.name(), status = error.status, "refused");
        super::error(api.path(), &error)
    });
    server.metrics.answered(api, response.status().as_u16());
    response
}

/// `POST /v1/messages/count_tokens`.
pub async fn count_messages(State(server): State<Arc<Server>>, request: Request) -> Response {
    count(Api::Messages, server, request.into_body(), |tokens| json!({"input_tokens": tokens})).await
}

/// `POST /v1/responses/input_tokens`.
pub async fn count_responses(State(server): State<Arc<Server>>, request: Request) -> Response {
    let answer = |tokens| json!({"object": "response.input_tokens", "input_tokens": tokens});
    count(Api::Responses, server, request.into_body(), answer).await
}

async fn count(api: Api, server: Arc<Server>, body: Body, answer: fn(usize) -> Value) -> Response {
    let counted = prepared(&server, api, body, move |server, _, body| {
        let earlier = |id: &str| server.responses.chain(id);
        let mut conversation = request::read_to_count(api, body, &server.defaults, &earlier)?;
        Ok(prepare::prompt(&mut conversation, &server.wiring)?.tokens.len())
    });
    match counted.await {
        Ok(tokens) => super::json(200, &answer(tokens)),
        Err(error) => super::error(api.path(), &error),
    }
}

/// Receives a body and makes something of it when its turn comes. A client that leaves ends the wait, not the work: the body's
/// room and its turn are therefore given back by the work itself.
async fn prepared<T: Send + 'static>(
    server: &Arc<Server>,
    api: Api,
    body: Body,
    work: impl FnOnce(&Arc<Server>, &[u8], Value) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let (bytes, share) = body::receive(&server.large_bodies, &server.options.limits, body).await?;
    // Nobody closes the semaphores.
    let turn = server.preparing.clone().acquire_owned().await.ok();
    let server = server.clone();
    blocking(move || {
        let _held = (share, turn);
        let bad = |message| ApiError::new(400, message);
        let answer = bounded::check(&bytes).map_err(bad).and_then(|text| {
            let values = server.values.acquire_many(text.values() as u32);
            let _values = Handle::current().block_on(values).ok();
            work(&server, &bytes, text.parse().map_err(bad)?)
        });
        if let (Err(error), Some(trace)) = (&answer, &server.trace) {
            trace.write(&Entry {
                path: api.path(),
                request: String::from_utf8_lossy(&bytes).into_owned(),
                result: format!("refused with {}: {}", error.status, error.message),
                ..Entry::default()
            });
        }
        answer
    })
    .await
}

/// A request that the engine has taken.
struct Work {
    generation: Generation,
    reply: Box<dyn Reply>,
    record: Record,
    is_stream: bool,
    /// What is to be stored with the response.
    stored: Option<(Vec<Value>, Option<String>)>,
}

/// Reads, translates and submits a request.
async fn begin(api: Api, server: &Arc<Server>, body: Body) -> Result<Work, ApiError> {
    let arrived = Instant::now();
    prepared(server, api, body, move |server, bytes, body| {
        let earlier = |id: &str| server.responses.chain(id);
        let mut conversation = request::read(api, body, &server.defaults, &earlier)?;
        let stored = to_store(&mut conversation, server);
        let about = About {
            model: conversation.model.clone().unwrap_or_else(|| server.wiring.facts.id.clone()),
            created: now(),
            numbers: Box::new(ids::random),
            vocabulary: server.wiring.vocabulary.clone(),
        };
        let reply = reply(&conversation, about);
        let is_stream = conversation.stream;
        let generation = Generation::begin(server.clone(), conversation)?;
        let trace = server.trace.is_some().then(|| Entry {
            id: reply.id().to_owned(),
            path: api.path(),
            request: String::from_utf8_lossy(bytes).into_owned(),
            prompt: generation.prompt_text(),
            prompt_tokens: generation.prompt_tokens(),
            ..Entry::default()
        });
        let id = reply.id().to_owned();
        let record = Record { server: server.clone(), api, id, arrived, has_text: false, is_over: false, trace };
        Ok(Work { generation, reply, record, is_stream, stored })
    })
    .await
}

/// What a stored response keeps of its request, which is no more needed elsewhere.
fn to_store(conversation: &mut Conversation, server: &Server) -> Option<(Vec<Value>, Option<String>)> {
    let extra = &mut conversation.responses;
    extra.store &= server.options.stored_responses > 0;
    let items = mem::take(&mut extra.items);
    (conversation.api == Api::Responses && extra.store).then(|| (items, extra.previous.clone()))
}

/// Stores a response, so that it is there when the client learns of it. One that cannot be stored is an answer all the same, and
/// says so.
async fn store(server: &Arc<Server>, stored: Option<(Vec<Value>, Option<String>)>, response: &mut Value) {
    let Some((items, previous)) = stored else { return };
    let (to, record) = (server.clone(), StoredResponse { response: response.clone(), items, previous });
    let put = blocking(move || {
        let id = record.response["id"].as_str().unwrap_or_default();
        to.responses.put(id, &record).map_err(|error| ApiError::new(500, error.to_string()))
    });
    if let Err(error) = put.await {
        tracing::warn!(%error.message, "a response was not stored");
        server.metrics.record_failed();
        response["store"] = json!(false);
    }
}

/// The answer in one piece. A client that leaves drops this, and with it the generation.
async fn whole(mut work: Work) -> Result<Response, ApiError> {
    loop {
        match work.generation.next().await {
            Happening::Begun(prompted) => work.record.begun(prompted),
            Happening::Delta(delta) => {
                work.record.delta(&delta);
                work.reply.delta(&delta);
            }
            Happening::Ended(finished) => {
                let mut body = work.reply.whole(&finished);
                store(&work.record.server, work.stored.take(), &mut body).await;
                work.record.ended(&finished, &work.generation);
                return Ok(super::json(200, &body));
            }
            Happening::Failed(error) => {
                work.record.failed(&error, &work.generation);
                return Err(error);
            }
        }
    }
}

/// What a stream's task tells the socket: text, or before any text that there is none.
type Chunk = Result<String, ApiError>;

/// The answer as a stream. The status waits for the stream's first frames.
async fn stream(work: Work) -> Result<Response, ApiError> {
    let (sender, mut chunks) = channel(CHUNKS);
    tokio::spawn(drive(work, sender));
    let first = match chunks.recv().await {
        Some(first) => first?,
        None => return Err(ApiError::new(500, "the stream ended before it began: see the server's log")),
    };
    let rest = |(first, mut chunks): (Option<String>, Receiver<Chunk>)| async move {
        let text = match first {
            Some(first) => first,
            None => chunks.recv().await?.ok()?,
        };
        Some((Ok::<_, Infallible>(Bytes::from(text)), (None, chunks)))
    };
    let mut response = Response::new(Body::from_stream(futures_util::stream::unfold((Some(first), chunks), rest)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies of the nginx kind hold streams back unless they are told not to.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// A stream's frames, on their way to the socket.
struct Frames {
    sender: Sender<Chunk>,
    has_begun: bool,
    last: Instant,
}

impl Frames {
    /// Sends frames; whether the client is still there.
    async fn send(&mut self, frames: &[Frame]) -> bool {
        if frames.is_empty() {
            return true;
        }
        self.has_begun = true;
        self.last = Instant::now();
        let text = frames.iter().map(Frame::text).collect();
        self.sender.send(Ok(text)).await.is_ok()
    }

    /// Tells of an error: as a status if nothing was sent yet.
    async fn fail(&mut self, error: ApiError, reply: &mut dyn Reply) {
        if self.has_begun {
            let frames = reply.fail(&error);
            self.send(&frames).await;
        } else {
            // A client that left does not miss it.
            let _ = self.sender.send(Err(error)).await;
        }
    }
}

/// Writes a stream from beginning to end, with a sign of life where nothing else comes for a while. Ends early, and so cancels the
/// request, when the client is gone.
async fn drive(mut work: Work, sender: Sender<Chunk>) {
    let closed = sender.clone();
    let mut frames = Frames { sender, has_begun: false, last: Instant::now() };
    let ping = Duration::from_secs(work.record.server.options.ping_s);
    let mut prompted = Prompted { prompt_tokens: work.generation.prompt_tokens(), cached_tokens: 0 };
    let mut has_started = false;
    loop {
        let happening = {
            let next = work.generation.next();
            tokio::pin!(next);
            loop {
                tokio::select! {
                    happening = &mut next => break happening,
                    () = closed.closed() => return,
                    () = tokio::time::sleep_until((frames.last + ping).into()) => {
                        let mut signs = if has_started { Vec::new() } else { work.reply.start(prompted) };
                        has_started = true;
                        signs.push(work.reply.ping());
                        if !frames.send(&signs).await {
                            return;
                        }
                    }
                }
            }
        };
        let mut next = Vec::new();
        if !has_started && !matches!(happening, Happening::Failed(_)) {
            if let Happening::Begun(known) = &happening {
                prompted = *known;
            }
            next = work.reply.start(prompted);
            has_started = true;
        }
        match happening {
            Happening::Begun(prompted) => work.record.begun(prompted),
            Happening::Delta(delta) => {
                work.record.delta(&delta);
                next.extend(work.reply.delta(&delta));
                work.generation.has_told_call = work.reply.has_told_call();
            }
            Happening::Ended(finished) => {
                next.extend(work.reply.end(&finished));
                if let Some(response) = next.iter_mut().rev().find_map(final_response) {
                    store(&work.record.server, work.stored.take(), response).await;
                }
                if frames.send(&next).await {
                    work.record.ended(&finished, &work.generation);
                }
                return;
            }
            Happening::Failed(error) => {
                work.record.failed(&error, &work.generation);
                return frames.fail(error, &mut *work.reply).await;
            }
        }
        if !frames.send(&next).await {
            return;
        }
    }
}

/// The response that a stream of the responses API ends with.
fn final_response(frame: &mut Frame) -> Option<&mut Value> {
    match frame {
        Frame::Event("response.completed" | "response.incomplete", data) => Some(&mut data["response"]),
        _ => None,
    }
}

/// What the log, the metrics and the trace learn of a request. One that is dropped before its end had its client leave.
struct Record {
    server: Arc<Server>,
    api: Api,
    id: String,
    arrived: Instant,
    has_text: bool,
    is_over: bool,
    trace: Option<Entry>,
}

impl Record {
    fn begun(&mut self, prompted: Prompted) {
        if let Some(trace) = &mut self.trace {
            trace.cached_tokens = prompted.cached_tokens;
        }
    }

    fn delta(&mut self, delta: &Delta) {
        if !self.has_text && !matches!(delta, Delta::Token { .. }) {
            self.has_text = true;
            self.server.metrics.first_text(self.api, self.arrived.elapsed());
        }
    }

    fn ended(&mut self, finished: &Finished, generation: &Generation) {
        self.is_over = true;
        self.server.metrics.ended(self.api, self.arrived.elapsed());
        let usage = &finished.usage;
        let finish = match finished.finish {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::ToolCalls => "tool_calls",
        };
        tracing::info!(
            id = self.id,
            api = self.api.name(),
            prompt = usage.prompt_tokens,
            cached = usage.cached_tokens,
            generated = usage.completion_tokens,
            prefill_tps = per_second(usage.prompt_tokens - usage.cached_tokens.min(usage.prompt_tokens), usage.prefill),
            decode_tps = per_second(usage.completion_tokens, usage.decode),
            seconds = (self.arrived.elapsed().as_secs_f64() * 1000.0).round() / 1000.0,
            finish,
            "done"
        );
        self.write(generation, finish.to_owned());
    }

    fn failed(&mut self, error: &ApiError, generation: &Generation) {
        self.is_over = true;
        tracing::warn!(id = self.id, api = self.api.name(), status = error.status, "failed");
        self.write(generation, format!("failed: {}", error.message));
    }

    /// Writes the trace, where there is one.
    fn write(&mut self, generation: &Generation, result: String) {
        if let Some(entry) = self.trace.take() {
            self.write_entry(Entry { generated: generation.outcome_text.clone(), result, ..entry });
        }
    }

    /// Writes where it holds up no socket; at once if the server is no more.
    fn write_entry(&self, entry: Entry) {
        let server = self.server.clone();
        let write = move || server.trace.iter().for_each(|trace| trace.write(&entry));
        match Handle::try_current() {
            Ok(handle) => drop(handle.spawn_blocking(write)),
            Err(_) => write(),
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.is_over {
            self.server.metrics.disconnected();
            tracing::info!(id = self.id, api = self.api.name(), finish = "disconnected", "done");
            if let Some(entry) = self.trace.take() {
                self.write_entry(Entry { result: "the client left".to_owned(), ..entry });
            }
        }
    }
}
