//! Chat completions.

use serde_json::{Value, json};

use super::logprobs::TokenLog;
use super::{About, Delta, Finished, Prompted, Reply, finish_reason, timings, usage};
use crate::frame::Frame;
use crate::request::Conversation;

/// A chat completion.
pub struct Chat {
    about: About,
    id: String,
    include_usage: bool,
    tokens: Option<TokenLog>,
    has_told_call: bool,
}

impl Chat {
    pub fn new(conversation: &Conversation, mut about: About) -> Chat {
        Chat {
            id: about.id("chatcmpl-"),
            include_usage: conversation.include_usage,
            tokens: conversation.logprobs.map(|_| TokenLog::new(about.vocabulary.clone())),
            about,
            has_told_call: false,
        }
    }

    /// A chunk with these choices.
    fn chunk(&self, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.about.created,
            "model": self.about.model,
            "choices": choices,
        })
    }

    /// A chunk that adds `delta`.
    fn add(&self, delta: Value, logprobs: Option<Value>) -> Vec<Frame> {
        let mut choice = json!({"index": 0, "delta": delta, "finish_reason": null});
        if let Some(logprobs) = logprobs {
            choice["logprobs"] = logprobs;
        }
        vec![Frame::Data(self.chunk(json!([choice])))]
    }
}

impl Reply for Chat {
    fn id(&self) -> &str {
        &self.id
    }

    fn start(&mut self, _: Prompted) -> Vec<Frame> {
        self.add(json!({"role": "assistant"}), None)
    }

    fn delta(&mut self, delta: &Delta) -> Vec<Frame> {
        match delta {
            Delta::Token { token, logprobs } => {
                if let Some(tokens) = &mut self.tokens {
                    tokens.token(*token, logprobs.as_ref());
                }
                Vec::new()
            }
            Delta::Reasoning(text) => {
                let logprobs = self.tokens.as_mut().map(TokenLog::reasoned);
                self.add(json!({"reasoning_content": text}), logprobs)
            }
            Delta::Content(text) => {
                let logprobs = self.tokens.as_mut().map(TokenLog::answered);
                self.add(json!({"content": text}), logprobs)
            }
            Delta::CallBegin { index, id, name } => {
                self.has_told_call = true;
                let function = json!({"name": name, "arguments": ""});
                let call = json!({"index": index, "id": id, "type": "function", "function": function});
                self.add(json!({"tool_calls": [call]}), None)
            }
            Delta::CallArguments { index, delta } => {
                let call = json!({"index": index, "function": {"arguments": delta}});
                self.add(json!({"tool_calls": [call]}), None)
            }
            Delta::CallEnd { .. } => {
                if let Some(tokens) = &mut self.tokens {
                    tokens.other();
                }
                Vec::new()
            }
        }
    }

    fn end(&mut self, finished: &Finished) -> Vec<Frame> {
        let choice = json!({"index": 0, "delta": {}, "finish_reason": finish_reason(finished.finish)});
        let mut last = self.chunk(json!([choice]));
        last["timings"] = timings(&finished.usage);
        let mut frames = vec![Frame::Data(last)];
        if self.include_usage {
            let mut chunk = self.chunk(json!([]));
            chunk["usage"] = usage(&finished.usage);
            frames.push(Frame::Data(chunk));
        }
        frames.push(Frame::Done);
        frames
    }

    fn whole(&mut self, finished: &Finished) -> Value {
        let mut message = json!({"role": "assistant", "content": finished.content});
        if !finished.reasoning.is_empty() {
            message["reasoning_content"] = json!(finished.reasoning);
        }
        if !finished.calls.is_empty() {
            let call = |call: &text::prompt::Call| {
                let function = json!({"name": call.name, "arguments": call.arguments});
                json!({"id": call.id, "type": "function", "function": function})
            };
            message["tool_calls"] = finished.calls.iter().map(call).collect();
        }
        let mut choice = json!({"index": 0, "message": message, "finish_reason": finish_reason(finished.finish)});
        if let Some(tokens) = &self.tokens {
            choice["logprobs"] = tokens.whole();
        }
        json!({
            "id": self.id,
            "object": "chat.completion",
            "created": self.about.created,
            "model": self.about.model,
            "choices": [choice],
            "usage": usage(&finished.usage),
            "timings": timings(&finished.usage),
        })
    }

    fn has_told_call(&self) -> bool {
        self.has_told_call
    }
}
