//! What happens in a turn to answers of the four APIs, whole or as frames of a stream, without sockets and without an engine.
//!
//! ```text
//! start, then delta*, then end | fail      (a stream)
//!        delta*, then whole                (one answer)
//! ```

mod chat;
mod completions;
mod logprobs;
mod messages;
mod responses;

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use session::engine::Usage;
use session::{Logprobs, Vocabulary};
use text::parse::Finish;
use text::prompt::Call;

use crate::error::ApiError;
use crate::frame::Frame;
use crate::ids::{self, Numbers};
use crate::request::{Api, Conversation, Input};

/// The next thing that a client is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Delta {
    /// A token, before what it says.
    Token {
        /// The token.
        token: u32,
        /// If asked for.
        logprobs: Option<Logprobs>,
    },
    /// Text of the reasoning.
    Reasoning(String),
    /// Text of the answer.
    Content(String),
    /// A call begins.
    CallBegin {
        /// Its place.
        index: usize,
        /// Its id.
        id: String,
        /// The tool.
        name: String,
    },
    /// Text of a call's arguments.
    CallArguments {
        /// The call's place.
        index: usize,
        /// The text.
        delta: String,
    },
    /// A call's arguments are complete.
    CallEnd {
        /// The call's place.
        index: usize,
    },
}

/// A turn that is over.
#[derive(Clone, Debug)]
pub struct Finished {
    /// The reasoning.
    pub reasoning: String,
    /// The answer.
    pub content: String,
    /// The calls, each with its id.
    pub calls: Vec<Call>,
    /// How it ended.
    pub finish: Finish,
    /// The stop string that ended it.
    pub stop_string: Option<String>,
    /// What it cost.
    pub usage: Usage,
}

/// How much of a prompt there is, and how much of it a session held; before the turn begins.
#[derive(Clone, Copy, Debug, Default)]
pub struct Prompted {
    /// Tokens.
    pub prompt_tokens: usize,
    /// Those of them that a session held already.
    pub cached_tokens: usize,
}

/// An answer in the making.
pub trait Reply: Send {
    /// The answer's id.
    fn id(&self) -> &str;

    /// The frames that begin a stream.
    fn start(&mut self, prompted: Prompted) -> Vec<Frame>;

    /// What keeps a stream alive while nothing happens.
    fn ping(&self) -> Frame {
        Frame::Comment("prefill")
    }

    /// Something happened.
    fn delta(&mut self, delta: &Delta) -> Vec<Frame>;

    /// The frames that end a stream.
    fn end(&mut self, finished: &Finished) -> Vec<Frame>;

    /// The frames that end a stream which failed.
    fn fail(&mut self, error: &ApiError) -> Vec<Frame> {
        vec![Frame::Event("error", error.body(false)), Frame::Done]
    }

    /// The answer in one piece; every delta has been told before.
    fn whole(&mut self, finished: &Finished) -> Value;

    /// Whether the client has been told of a call.
    fn has_told_call(&self) -> bool;
}

/// What an answer is made of besides the turn.
pub struct About {
    /// What the client calls the model.
    pub model: String,
    /// Unix time in seconds.
    pub created: u64,
    /// Where ids come from.
    pub numbers: Numbers,
    /// What tokens say, for log probabilities.
    pub vocabulary: Arc<Vocabulary>,
}

impl About {
    /// An id with `prefix` and 24 digits.
    fn id(&mut self, prefix: &str) -> String {
        ids::id(prefix, 24, (self.numbers)())
    }
}

/// The answer to a conversation.
pub fn reply(conversation: &Conversation, about: About) -> Box<dyn Reply> {
    match conversation.api {
        Api::Chat => Box::new(chat::Chat::new(conversation, about)),
        Api::Completions => {
            let is_raw = matches!(conversation.input, Input::Raw(_));
            Box::new(completions::Completion::new(is_raw, conversation.include_usage, about))
        }
        Api::Responses => Box::new(responses::Response::new(conversation.responses.clone(), about)),
        Api::Messages => Box::new(messages::Message::new(about)),
    }
}

/// What the ids of an API's calls begin with.
pub fn call_prefix(api: Api) -> &'static str {
    if api.is_anthropic() { "toolu_" } else { "call_" }
}

/// A call's arguments as JSON; what is none is told as the text that it is.
fn parsed(arguments: &str) -> Value {
    serde_json::from_str(arguments).unwrap_or_else(|_| arguments.into())
}

/// OpenAI's word for how a turn ended.
fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
        Finish::ToolCalls => "tool_calls",
    }
}

/// The usage of chat and text completions.
fn usage(usage: &Usage) -> Value {
    let cached = usage.cached_tokens.min(usage.prompt_tokens);
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": cached,
            "cache_write_tokens": usage.prompt_tokens - cached,
        },
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    })
}

/// How long things took, by llama.cpp's names.
fn timings(usage: &Usage) -> Value {
    let read = usage.prompt_tokens - usage.cached_tokens.min(usage.prompt_tokens);
    json!({
        "cache_n": usage.cached_tokens,
        "prompt_n": read,
        "prompt_ms": milliseconds(usage.prefill),
        "prompt_per_second": per_second(read, usage.prefill),
        "predicted_n": usage.completion_tokens,
        "predicted_ms": milliseconds(usage.decode),
        "predicted_per_second": per_second(usage.completion_tokens, usage.decode),
    })
}

fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// Tokens in a second, 0 if no time passed.
pub fn per_second(tokens: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { (tokens as f64 / time.as_secs_f64() * 100.0).round() / 100.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_never_invented() {
        assert_eq!(parsed("{\"city\": 1}"), json!({"city": 1}));
        assert_eq!(parsed("{\"city\": Rome}"), json!("{\"city\": Rome}"));
    }
}
