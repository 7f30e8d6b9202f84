//! Text completions. Reasoning is left out, but for raw prompts: their continuation stands as the model wrote it.

use serde_json::{Value, json};

use super::{About, Delta, Finished, Prompted, Reply, finish_reason, timings, usage};
use crate::frame::Frame;

/// A text completion.
pub struct Completion {
    about: About,
    id: String,
    include_usage: bool,
    is_raw: bool,
    /// Whether reasoning was opened in a raw text.
    in_reasoning: bool,
    text: String,
}

impl Completion {
    pub fn new(is_raw: bool, include_usage: bool, mut about: About) -> Completion {
        let id = about.id("cmpl-");
        Completion { about, id, include_usage, is_raw, in_reasoning: false, text: String::new() }
    }

    /// A completion or a piece of one.
    fn object(&self, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.about.created,
            "model": self.about.model,
            "choices": choices,
        })
    }

    /// What a delta adds to the text.
    fn added(&mut self, delta: &Delta) -> String {
        match delta {
            Delta::Reasoning(text) if self.is_raw => {
                let opener = if std::mem::replace(&mut self.in_reasoning, true) { "" } else { "<think>" };
                format!("{opener}{text}")
            }
            Delta::Content(text) => {
                let closer = if std::mem::take(&mut self.in_reasoning) { "</think>" } else { "" };
                format!("{closer}{text}")
            }
            _ => String::new(),
        }
    }
}

impl Reply for Completion {
    fn id(&self) -> &str {
        &self.id
    }

    fn start(&mut self, _: Prompted) -> Vec<Frame> {
        Vec::new()
    }

    fn delta(&mut self, delta: &Delta) -> Vec<Frame> {
        let text = self.added(delta);
        if text.is_empty() {
            return Vec::new();
        }
        self.text.push_str(&text);
        let choice = json!({"text": text, "index": 0, "logprobs": null, "finish_reason": null});
        vec![Frame::Data(self.object(json!([choice])))]
    }

    fn end(&mut self, finished: &Finished) -> Vec<Frame> {
        let finish_reason = finish_reason(finished.finish);
        let choice = json!({"text": "", "index": 0, "logprobs": null, "finish_reason": finish_reason});
        let mut last = self.object(json!([choice]));
        last["timings"] = timings(&finished.usage);
        let mut frames = vec![Frame::Data(last)];
        if self.include_usage {
            let mut chunk = self.object(json!([]));
            chunk["usage"] = usage(&finished.usage);
            frames.push(Frame::Data(chunk));
        }
        frames.push(Frame::Done);
        frames
    }

    fn whole(&mut self, finished: &Finished) -> Value {
        let finish_reason = finish_reason(finished.finish);
        let choice = json!({"text": self.text, "index": 0, "logprobs": null, "finish_reason": finish_reason});
        let mut object = self.object(json!([choice]));
        object["usage"] = usage(&finished.usage);
        object["timings"] = timings(&finished.usage);
        object
    }

    fn has_told_call(&self) -> bool {
        false
    }
}
