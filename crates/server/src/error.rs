//! What a client is told when something went wrong, in the shape that its API has for it.

use serde_json::{Value, json};
use session::engine::SubmitError;

use crate::request::Api;

/// What clients learn of an engine that has failed. The reason may name files.
pub const DEAD: &str = "the engine has failed and computes nothing any more: see the server's log, and restart it";

/// An answer that is an error.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    /// The HTTP status.
    pub status: u16,
    /// What was found, what was expected, and what to do.
    pub message: String,
    /// The field that is wrong, by its path.
    pub param: Option<String>,
    /// OpenAI's name of the error.
    pub code: Option<&'static str>,
    /// Tokens of the prompt and of the context, where these are the error.
    pub tokens: Option<(usize, usize)>,
}

impl ApiError {
    /// An error without a field.
    pub fn new(status: u16, message: impl Into<String>) -> ApiError {
        ApiError { status, message: message.into(), param: None, code: None, tokens: None }
    }

    /// A request that cannot be met because of the field `param`.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> ApiError {
        let param = param.into();
        ApiError { message: format!("{param}: {}", message.into()), param: Some(param), ..ApiError::new(400, "") }
    }

    /// A prompt that leaves no room for an answer.
    pub fn context(api: Api, found: usize, context: usize) -> ApiError {
        ApiError {
            param: Some(api.input_field().to_owned()),
            code: Some("context_length_exceeded"),
            tokens: Some((found, context)),
            ..ApiError::new(
                400,
                format!("Prompt has {found} tokens, but the configured context size is {context} tokens"),
            )
        }
    }

    /// A request that the engine did not take.
    pub fn submit(api: Api, error: SubmitError) -> ApiError {
        match error {
            SubmitError::QueueFull { .. } => ApiError::new(429, error.to_string()),
            SubmitError::Stopping => ApiError::new(503, error.to_string()),
            SubmitError::Dead(_) => {
                tracing::error!(%error, "refused");
                ApiError::new(503, DEAD)
            }
            SubmitError::Prompt(error) => ApiError::session(api, &error),
        }
    }

    /// An error of a turn: the client's fault if its options cannot be met.
    pub fn session(api: Api, error: &session::Error) -> ApiError {
        use session::Error;
        let param = match error {
            Error::PromptTooLong { found, limit, .. } => return ApiError::context(api, *found, *limit),
            Error::Sampling { setting, .. } => setting,
            Error::BiasToken { .. } => "logit_bias",
            Error::ToolChoice { .. } | Error::SchemaAndCall => "tool_choice",
            Error::Grammar(text::grammar::GrammarError::Tool { .. }) => "tools",
            Error::Grammar(text::grammar::GrammarError::Schema { .. }) => api.format_field(),
            Error::EmptyPrompt => api.input_field(),
            // What else goes wrong may name files.
            _ => {
                tracing::error!(%error, "a turn failed");
                return ApiError::new(500, "the turn failed inside the server: see its log");
            }
        };
        ApiError::field(param, error.to_string())
    }

    /// The error's type, by OpenAI's or Anthropic's name.
    fn kind(&self, is_anthropic: bool) -> &'static str {
        match self.status {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            503 if is_anthropic => "overloaded_error",
            _ if is_anthropic => "api_error",
            _ => "server_error",
        }
    }

    /// The body of the answer, and the data of a frame that says the same in a stream.
    pub fn body(&self, is_anthropic: bool) -> Value {
        let mut error = json!({"type": self.kind(is_anthropic), "message": self.message});
        if !is_anthropic {
            error["param"] = json!(self.param);
            error["code"] = json!(self.code);
        }
        if let Some((prompt, context)) = self.tokens {
            error["n_prompt_tokens"] = json!(prompt);
            error["n_ctx"] = json!(context);
        }
        if is_anthropic { json!({"type": "error", "error": error}) } else { json!({"error": error}) }
    }
}
