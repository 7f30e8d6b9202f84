//! Items of a nano model's held-out sets (models/nano/heldout).

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use text::{Segment, Tokenizer};

/// One item: a prompt as segments (`"c"` control token, `"t"` text) and the exact answer.
#[derive(Deserialize)]
pub struct Item {
    prompt: Vec<(String, String)>,
    answer: String,
}

impl Item {
    /// Reads a line of a set.
    ///
    /// # Errors
    /// The line is not an item.
    pub fn parse(line: &str) -> Result<Item> {
        Ok(serde_json::from_str(line)?)
    }

    /// Tokens of the prompt.
    ///
    /// # Errors
    /// A segment is of another kind, or the vocabulary lacks a control token.
    pub fn prompt(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let segment = |(kind, text): &(String, String)| match kind.as_str() {
            "t" => Ok(Segment::Text(text.clone())),
            "c" => tokenizer.control(text).map(Segment::Control).with_context(|| format!("no control token {text}")),
            other => bail!("segment kind {other}, expected c or t"),
        };
        let segments = self.prompt.iter().map(segment).collect::<Result<Vec<_>>>()?;
        Ok(tokenizer.encode_segments(&segments))
    }

    /// The prompt's ordinary text.
    pub fn text(&self) -> String {
        self.prompt.iter().filter(|(kind, _)| kind == "t").map(|(_, text)| text.as_str()).collect()
    }

    /// Whether the prompt opens a turn with reasoning.
    pub fn thinking(&self) -> bool {
        self.prompt.last().is_some_and(|(_, text)| text == "<think>")
    }

    /// Tokens of the answer.
    pub fn answer(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        tokenizer.encode_with_control(&self.answer)
    }

    /// Tokens of prompt and answer.
    ///
    /// # Errors
    /// As [`Item::prompt`].
    pub fn whole(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        Ok([self.prompt(tokenizer)?, self.answer(tokenizer)].concat())
    }
}
