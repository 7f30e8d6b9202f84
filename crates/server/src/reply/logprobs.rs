//! Log probabilities of tokens, put to the text that they say.

use std::mem;
use std::sync::Arc;

use serde_json::{Value, json};
use session::{Logprobs, Vocabulary};

/// The tokens of an answer.
pub struct TokenLog {
    vocabulary: Arc<Vocabulary>,
    /// Tokens of which it is not known yet what they say.
    pending: Vec<Value>,
    /// Those of the reasoning, and of the content.
    reasoning: Vec<Value>,
    content: Vec<Value>,
}

impl TokenLog {
    pub fn new(vocabulary: Arc<Vocabulary>) -> TokenLog {
        TokenLog { vocabulary, pending: Vec::new(), reasoning: Vec::new(), content: Vec::new() }
    }

    /// A token. The one that ends reasoning is none of the text.
    pub fn token(&mut self, token: u32, logprobs: Option<&Logprobs>) {
        let Some(logprobs) = logprobs.filter(|_| token != self.vocabulary.control().end_think) else { return };
        let top: Vec<Value> = logprobs.top.iter().map(|&(token, logprob)| self.entry(token, logprob)).collect();
        let mut entry = self.entry(token, logprobs.chosen);
        entry["top_logprobs"] = json!(top);
        self.pending.push(entry);
    }

    fn entry(&self, token: u32, logprob: f64) -> Value {
        let bytes = self.vocabulary.tokenizer().token_bytes(token);
        // JSON has no infinity; OpenAI writes this for what cannot be chosen.
        json!({"token": String::from_utf8_lossy(bytes), "logprob": logprob.max(-9999.0), "bytes": bytes})
    }

    /// The pending tokens said some of the reasoning: they alone, in OpenAI's form.
    pub fn reasoned(&mut self) -> Value {
        let tokens = mem::take(&mut self.pending);
        self.reasoning.extend(tokens.iter().cloned());
        json!({"content": null, "reasoning_content": tokens, "refusal": null})
    }

    /// The pending tokens said some of the content.
    pub fn answered(&mut self) -> Value {
        let tokens = mem::take(&mut self.pending);
        self.content.extend(tokens.iter().cloned());
        json!({"content": tokens, "refusal": null})
    }

    /// The pending tokens said something else.
    pub fn other(&mut self) {
        self.pending.clear();
    }

    /// All tokens.
    pub fn whole(&self) -> Value {
        json!({"content": self.content, "reasoning_content": self.reasoning, "refusal": null})
    }
}
