//! Requests of the four APIs to one [`Conversation`], without sockets and without an engine.
//!
//! | file | API |
//! |---|---|
//! | `chat` | `/v1/chat/completions` |
//! | `completions` | `/v1/completions` |
//! | `responses` | `/v1/responses` |
//! | `messages` | `/v1/messages` |
//!
//! Parameters are read strictly: one that is neither supported nor listed in [`IGNORED`] is an error that names it. History
//! (messages, their parts, input items) is read by what is known of it, as clients send back whatever any server once said;
//! a part of another type, such as an image, is an error.

mod chat;
mod completions;
mod messages;
mod responses;
mod settings;

use serde_json::Value;
use session::{Constrain, Sampling, ToolChoice};
use text::prompt::{Encoding, Message, Mode, Tool};

use crate::error::ApiError;
use crate::fields::Fields;

pub use responses::{Kind, ResponsesExtra};

/// Parameters that are accepted and change nothing, by API. (`cache_control`, wherever it stands, belongs to them.)
pub const IGNORED: [(Api, &[&str]); 4] = [
    (
        Api::Chat,
        &[
            "metadata",
            "prompt_cache_key",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "store",
            "user",
            "verbosity",
        ],
    ),
    (Api::Completions, &["metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"]),
    (
        Api::Responses,
        &[
            "client_metadata",
            "include",
            "max_tool_calls",
            "prompt_cache_key",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "stream_options",
            "truncation",
            "user",
        ],
    ),
    (
        Api::Messages,
        &[
            "anthropic_beta",
            "anthropic_version",
            "betas",
            "cache_control",
            "context_management",
            "diagnostics",
            "inference_geo",
            "metadata",
            "service_tier",
            "speed",
        ],
    ),
];

/// One of the APIs that generate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Api {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions,
    /// `/v1/responses`.
    Responses,
    /// `/v1/messages`.
    Messages,
}

impl Api {
    /// All of them.
    pub const ALL: [Api; 4] = [Api::Chat, Api::Completions, Api::Responses, Api::Messages];

    /// Its name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Api::Chat => "chat",
            Api::Completions => "completions",
            Api::Responses => "responses",
            Api::Messages => "messages",
        }
    }

    /// Where it is served.
    pub fn path(self) -> &'static str {
        match self {
            Api::Chat => "/v1/chat/completions",
            Api::Completions => "/v1/completions",
            Api::Responses => "/v1/responses",
            Api::Messages => "/v1/messages",
        }
    }

    /// Whether errors have Anthropic's shape.
    pub fn is_anthropic(self) -> bool {
        self == Api::Messages
    }

    /// The field that holds the prompt.
    pub fn input_field(self) -> &'static str {
        match self {
            Api::Chat | Api::Messages => "messages",
            Api::Completions => "prompt",
            Api::Responses => "input",
        }
    }

    /// The field that asks for JSON.
    pub fn format_field(self) -> &'static str {
        match self {
            Api::Chat | Api::Completions => "response_format",
            Api::Responses => "text.format",
            Api::Messages => "output_config.format",
        }
    }

    /// Parameters that change nothing.
    fn ignored(self) -> &'static [&'static str] {
        IGNORED.iter().find(|(api, _)| *api == self).map_or(&[], |(_, names)| names)
    }
}

/// What holds where a request says nothing.
#[derive(Clone, Debug)]
pub struct Defaults {
    /// The format of the model's weights.
    pub encoding: Encoding,
    /// Whether and how long the model reasons.
    pub mode: Mode,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Whether a request's sampling holds in thinking mode, too, which the model was trained to do without.
    pub respect_sampling: bool,
    /// Most tokens of an answer.
    pub max_tokens: usize,
    /// Whether calls are held to the schemas of tools that do not say `strict`.
    pub always_constrain: bool,
    /// Whether `/v1/completions` continues its prompt as it stands.
    pub raw_completions: bool,
    /// More parameters that change nothing.
    pub ignored_fields: Vec<String>,
}

/// What the model reads.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// A conversation, to be rendered in the model's format.
    Messages(Vec<Message>),
    /// A text, to be continued as it stands; its control tokens are meant.
    Raw(String),
}

/// A request, whichever API it came by.
#[derive(Clone, Debug)]
pub struct Conversation {
    /// The API.
    pub api: Api,
    /// What the client calls the model.
    pub model: Option<String>,
    /// What the model reads.
    pub input: Input,
    /// The tools that may be called.
    pub tools: Vec<Tool>,
    /// Whether it reasons.
    pub mode: Mode,
    /// Whether tools are called.
    pub choice: ToolChoice,
    /// What holds the answer to a grammar.
    pub constrain: Constrain,
    /// Whether the turn ends after its first call.
    pub single_call: bool,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// What random choices follow from; the server chooses if there is none.
    pub seed: Option<u64>,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Texts that end the turn.
    pub stop_strings: Vec<String>,
    /// Added to the logits of tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Whether log probabilities are told, and of how many of the likeliest tokens.
    pub logprobs: Option<usize>,
    /// Whether the answer is a stream.
    pub stream: bool,
    /// Whether a stream of chat or text completions ends with the usage.
    pub include_usage: bool,
    /// What only the responses API has.
    pub responses: ResponsesExtra,
}

impl Conversation {
    /// A request that says no more than what the model reads.
    fn new(api: Api, input: Input, defaults: &Defaults) -> Conversation {
        Conversation {
            api,
            model: None,
            input,
            tools: Vec::new(),
            mode: defaults.mode,
            choice: ToolChoice::Auto,
            constrain: Constrain::Off,
            single_call: false,
            sampling: defaults.sampling,
            seed: None,
            max_tokens: defaults.max_tokens,
            stop_strings: Vec::new(),
            logit_bias: Vec::new(),
            logprobs: None,
            stream: false,
            include_usage: false,
            responses: ResponsesExtra::default(),
        }
    }

    /// Whether the model goes on with the last message, which is its own.
    pub fn is_continuation(&self) -> bool {
        match &self.input {
            Input::Messages(messages) => {
                matches!(messages.last(), Some(Message::Assistant(message)) if message.continued)
            }
            Input::Raw(_) => true,
        }
    }

    /// Whether the turn is opened with `<think>`.
    pub fn opens_thinking(&self) -> bool {
        matches!(self.mode, Mode::Thinking { .. }) && !self.is_continuation()
    }
}

/// Items of earlier responses, for `previous_response_id`: the whole chain, oldest first.
pub type Earlier<'a> = &'a dyn Fn(&str) -> Result<Vec<Value>, ApiError>;

/// Reads a request's body.
///
/// # Errors
/// [`ApiError`] of status 400, or what `earlier` says.
pub fn read(api: Api, body: Value, defaults: &Defaults, earlier: Earlier<'_>) -> Result<Conversation, ApiError> {
    let fields = Fields::new("", body)?;
    match api {
        Api::Chat => chat::read(fields, defaults),
        Api::Completions => completions::read(fields, defaults),
        Api::Responses => responses::read(fields, defaults, earlier),
        Api::Messages => messages::read(fields, defaults),
    }
}

/// Reads what is to be counted: a request to generate that may lack `max_tokens`.
///
/// # Errors
/// As [`read`].
pub fn read_to_count(
    api: Api,
    body: Value,
    defaults: &Defaults,
    earlier: Earlier<'_>,
) -> Result<Conversation, ApiError> {
    match api {
        Api::Messages => messages::read_to_count(Fields::new("", body)?, defaults),
        _ => read(api, body, defaults, earlier),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_lists_what_is_ignored() {
        let page = include_str!("../../../../docs/server.md");
        for (api, names) in IGNORED {
            let row = page.lines().find(|line| line.starts_with(&format!("| {} |", api.name()))).unwrap();
            names.iter().for_each(|name| assert!(row.contains(&format!("`{name}`")), "{name} in {row}"));
        }
    }
}
