//! Anthropic's messages.
//!
//! A block of a call is told when the call is complete, not as it is written: a client that reads half a call in good faith, as
//! one does that repairs JSON, must not be able to run it.

use serde_json::{Value, json};
use session::engine::Usage;
use text::parse::Finish;

use super::{About, Delta, Finished, Prompted, Reply, parsed};
use crate::error::ApiError;
use crate::frame::Frame;

/// A message.
pub struct Message {
    about: About,
    id: String,
    prompted: Prompted,
    /// The block under way, and the index of the next one.
    open: Option<Block>,
    index: usize,
    /// The call under way.
    call: Option<(String, String, Vec<String>)>,
    has_told_call: bool,
    /// Whether there was a block of text or of a call.
    has_answer: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Block {
    Thinking,
    Text,
}

impl Message {
    pub fn new(mut about: About) -> Message {
        let id = about.id("msg_");
        let prompted = Prompted::default();
        Message { about, id, prompted, open: None, index: 0, call: None, has_told_call: false, has_answer: false }
    }

    /// A frame about the block under way, or the next one.
    fn block(&self, event: &'static str, key: &str, value: Value) -> Frame {
        Frame::Event(event, json!({"type": event, "index": self.index, key: value}))
    }

    fn stop(&self) -> Frame {
        Frame::Event("content_block_stop", json!({"type": "content_block_stop", "index": self.index}))
    }

    /// Ends the block under way. Thinking is signed, since clients insist; they send it back and nobody checks it.
    fn close(&mut self, frames: &mut Vec<Frame>) {
        if let Some(block) = self.open.take() {
            if block == Block::Thinking {
                let delta = json!({"type": "signature_delta", "signature": self.id});
                frames.push(self.block("content_block_delta", "delta", delta));
            }
            frames.push(self.stop());
            self.index += 1;
        }
    }

    /// Makes `block` the one under way.
    fn open(&mut self, block: Block, frames: &mut Vec<Frame>) {
        if self.open == Some(block) {
            return;
        }
        self.close(frames);
        let start = match block {
            Block::Thinking => json!({"type": "thinking", "thinking": "", "signature": ""}),
            Block::Text => json!({"type": "text", "text": ""}),
        };
        frames.push(self.block("content_block_start", "content_block", start));
        self.has_answer |= block == Block::Text;
        self.open = Some(block);
    }

    /// A whole call.
    fn tell_call(&mut self, frames: &mut Vec<Frame>) {
        let Some((id, name, arguments)) = self.call.take() else { return };
        self.close(frames);
        let start = json!({"type": "tool_use", "id": id, "name": name, "input": {}});
        frames.push(self.block("content_block_start", "content_block", start));
        for text in arguments {
            let delta = json!({"type": "input_json_delta", "partial_json": text});
            frames.push(self.block("content_block_delta", "delta", delta));
        }
        frames.push(self.stop());
        self.index += 1;
        (self.has_told_call, self.has_answer) = (true, true);
    }

    /// The message with this content.
    fn object(&self, content: Value, stop: &Stop, usage: Value) -> Value {
        json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.about.model,
            "content": content,
            "stop_reason": stop.reason,
            "stop_sequence": stop.sequence,
            "usage": usage,
        })
    }
}

/// Why a message ended.
#[derive(Default)]
struct Stop {
    reason: Option<&'static str>,
    sequence: Option<String>,
}

impl Stop {
    fn new(finished: &Finished) -> Stop {
        let reason = match finished.finish {
            Finish::ToolCalls => "tool_use",
            Finish::Length => "max_tokens",
            Finish::Stop if finished.stop_string.is_some() => "stop_sequence",
            Finish::Stop => "end_turn",
        };
        Stop { reason: Some(reason), sequence: finished.stop_string.clone() }
    }
}

/// The usage: what was read anew counts as written to the cache, so nothing of the prompt is left to be plain input.
fn usage(prompted: Prompted, output_tokens: usize) -> Value {
    let cached = prompted.cached_tokens.min(prompted.prompt_tokens);
    json!({
        "input_tokens": 0,
        "output_tokens": output_tokens,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": prompted.prompt_tokens - cached,
    })
}

fn final_usage(found: &Usage) -> Value {
    let Usage { prompt_tokens, cached_tokens, .. } = *found;
    usage(Prompted { prompt_tokens, cached_tokens }, found.completion_tokens)
}

impl Reply for Message {
    fn id(&self) -> &str {
        &self.id
    }

    fn start(&mut self, prompted: Prompted) -> Vec<Frame> {
        self.prompted = prompted;
        let message = self.object(json!([]), &Stop::default(), usage(prompted, 0));
        vec![Frame::Event("message_start", json!({"type": "message_start", "message": message}))]
    }

    fn ping(&self) -> Frame {
        Frame::Event("ping", json!({"type": "ping"}))
    }

    fn delta(&mut self, delta: &Delta) -> Vec<Frame> {
        let mut frames = Vec::new();
        match delta {
            Delta::Token { .. } => {}
            Delta::Reasoning(text) => {
                self.open(Block::Thinking, &mut frames);
                let delta = json!({"type": "thinking_delta", "thinking": text});
                frames.push(self.block("content_block_delta", "delta", delta));
            }
            Delta::Content(text) => {
                self.open(Block::Text, &mut frames);
                let delta = json!({"type": "text_delta", "text": text});
                frames.push(self.block("content_block_delta", "delta", delta));
            }
            Delta::CallBegin { id, name, .. } => self.call = Some((id.clone(), name.clone(), Vec::new())),
            Delta::CallArguments { delta, .. } => {
                if let Some((.., arguments)) = &mut self.call {
                    arguments.push(delta.clone());
                }
            }
            Delta::CallEnd { .. } => self.tell_call(&mut frames),
        }
        frames
    }

    fn end(&mut self, finished: &Finished) -> Vec<Frame> {
        let mut frames = Vec::new();
        if !self.has_answer {
            self.open(Block::Text, &mut frames);
        }
        self.close(&mut frames);
        let stop = Stop::new(finished);
        let data = json!({
            "type": "message_delta",
            "delta": {"stop_reason": stop.reason, "stop_sequence": stop.sequence},
            "usage": final_usage(&finished.usage),
        });
        frames.push(Frame::Event("message_delta", data));
        frames.push(Frame::Event("message_stop", json!({"type": "message_stop"})));
        frames
    }

    fn fail(&mut self, error: &ApiError) -> Vec<Frame> {
        vec![Frame::Event("error", error.body(true))]
    }

    fn whole(&mut self, finished: &Finished) -> Value {
        let mut content = Vec::new();
        if !finished.reasoning.is_empty() {
            content.push(json!({"type": "thinking", "thinking": finished.reasoning, "signature": self.id}));
        }
        if !finished.content.is_empty() || finished.calls.is_empty() {
            content.push(json!({"type": "text", "text": finished.content}));
        }
        for call in &finished.calls {
            let input = parsed(&call.arguments);
            content.push(json!({"type": "tool_use", "id": call.id, "name": call.name, "input": input}));
        }
        self.object(json!(content), &Stop::new(finished), final_usage(&finished.usage))
    }

    fn has_told_call(&self) -> bool {
        self.has_told_call
    }
}
