//! What the server tells of itself.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderValue, Uri, header};
use axum::response::Response;
use serde_json::{Value, json};

use super::Id;
use crate::error::{ApiError, DEAD};
use crate::request::Api;
use crate::server::Server;

/// Names of DeepSeek's hosted models that stand for the one that is loaded.
const ALIASES: [&str; 2] = ["deepseek-chat", "deepseek-reasoner"];

/// The parameters that a model listing names.
const PARAMETERS: [&str; 17] = [
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "stop",
    "seed",
    "stream",
    "response_format",
    "reasoning_effort",
];

/// The model in OpenAI's form, with what Anthropic's clients look for.
fn about_model(server: &Server) -> Value {
    let facts = &server.wiring.facts;
    let context = server.wiring.engine.context().tokens();
    json!({
        "id": facts.id,
        "object": "model",
        "created": 1_767_225_600,
        "owned_by": "infall",
        "type": "model",
        "name": facts.name,
        "display_name": facts.name,
        "created_at": "2026-01-01T00:00:00Z",
        "context_length": context,
        "top_provider": {
            "context_length": context,
            "max_completion_tokens": server.options.max_tokens.min(context),
            "is_moderated": false,
        },
        "supported_parameters": PARAMETERS,
    })
}

/// `GET /v1/models`.
pub async fn models(State(server): State<Arc<Server>>) -> Response {
    let id = &server.wiring.facts.id;
    let data = [about_model(&server)];
    super::json(200, &json!({"object": "list", "data": data, "first_id": id, "last_id": id, "has_more": false}))
}

/// `GET /v1/models/{id}`.
pub async fn model(State(server): State<Arc<Server>>, uri: Uri, id: Id) -> Response {
    let id = match super::id(id) {
        Ok(id) => id,
        Err(error) => return super::error(uri.path(), &error),
    };
    if id == server.wiring.facts.id || ALIASES.contains(&id.as_str()) {
        return super::json(200, &about_model(&server));
    }
    let message = format!("there is no model {id:?} here, only {:?}", server.wiring.facts.id);
    super::error(uri.path(), &ApiError::new(404, message))
}

/// `GET /health`.
pub async fn health(State(server): State<Arc<Server>>) -> Response {
    match server.wiring.engine.death() {
        None => super::json(200, &json!({"status": "ok"})),
        Some(_) => super::json(503, &json!({"status": "error", "reason": DEAD})),
    }
}

/// `GET /metrics`.
pub async fn metrics(State(server): State<Arc<Server>>) -> Response {
    text("application/openmetrics-text; version=1.0.0; charset=utf-8", server.metrics.text())
}

/// `GET /props`.
pub async fn props(State(server): State<Arc<Server>>) -> Response {
    let (facts, defaults) = (&server.wiring.facts, &server.defaults);
    let (stats, figures) = (server.wiring.engine.stats(), (server.wiring.figures)());
    let sampling = &defaults.sampling;
    super::json(
        200,
        &json!({
            "version": env!("CARGO_PKG_VERSION"),
            "uptime_s": server.started.elapsed().as_secs(),
            "model": facts.id,
            "name": facts.name,
            "encoding": facts.encoding.to_string(),
            "precision": facts.precision,
            "arithmetic": facts.arithmetic,
            "device": facts.device,
            "experts": facts.experts,
            "file_bytes": facts.file_bytes,
            "context_tokens": server.wiring.engine.context().tokens(),
            "defaults": {
                "effort": server.options.effort,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "min_p": sampling.min_p,
                "top_k": sampling.top_k,
                "max_tokens": defaults.max_tokens,
                "respect_sampling": defaults.respect_sampling,
                "always_constrain": defaults.always_constrain,
                "raw_completions": defaults.raw_completions,
            },
            "engine": {
                "waiting": stats.waiting,
                "active": stats.active,
                "idle_sessions": stats.idle_sessions,
                "prefill_tokens": stats.prefill_tokens,
                "cached_tokens": stats.cached_tokens,
                "decode_tokens": stats.decode_tokens,
                "prefill_s": stats.prefill_time.as_secs_f64(),
                "decode_s": stats.decode_time.as_secs_f64(),
            },
            "figures": {
                "experts_hits": figures.experts_hits,
                "experts_misses": figures.experts_misses,
                "experts_read_bytes": figures.experts_read_bytes,
                "memory_bytes": figures.memory_bytes,
            },
        }),
    )
}

/// `GET /openapi.json`.
pub async fn openapi() -> Response {
    text("application/json", include_str!("../openapi.json"))
}

/// What the page may load: itself, and nothing else from anywhere.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
                           base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// `GET /`.
pub async fn page() -> Response {
    of_page("text/html; charset=utf-8", include_str!("../page/index.html"))
}

/// `GET /app.js`.
pub async fn script() -> Response {
    of_page("text/javascript; charset=utf-8", include_str!("../page/app.js"))
}

/// `GET /style.css`.
pub async fn style() -> Response {
    of_page("text/css; charset=utf-8", include_str!("../page/style.css"))
}

/// A file of the page.
fn of_page(kind: &'static str, file: &'static str) -> Response {
    let mut response = text(kind, file);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(PAGE_POLICY));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

/// Any other path.
pub async fn not_found(uri: Uri) -> Response {
    let served = Api::ALL.map(Api::path).join(", ");
    let message = format!("there is nothing at this path: see /openapi.json. Requests to generate go to {served}");
    super::error(uri.path(), &ApiError::new(404, message))
}

/// Any other method.
pub async fn method_not_allowed(uri: Uri) -> Response {
    super::error(uri.path(), &ApiError::new(405, "this path does not take this method: see /openapi.json"))
}

/// An answer of text.
fn text(kind: &'static str, text: impl Into<axum::body::Body>) -> Response {
    let mut response = Response::new(text.into());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
