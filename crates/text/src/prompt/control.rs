//! The control tokens of DeepSeek V4 in a model's vocabulary.

use crate::{Tokenizer, dsml};

/// The control tokens that prompts are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlTokens {
    /// Begins every prompt.
    pub bos: u32,
    /// Ends every assistant turn.
    pub eos: u32,
    /// `<｜User｜>`, before a user turn.
    pub user: u32,
    /// `<｜Assistant｜>`, before an assistant turn.
    pub assistant: u32,
    /// `<think>`, before reasoning.
    pub think: u32,
    /// `</think>`, after reasoning and before a turn without it.
    pub end_think: u32,
    /// `｜DSML｜`, the word in the markup of tool calls; a small model may not have it.
    pub dsml: Option<u32>,
}

/// A tokenizer that is not DeepSeek V4's.
#[derive(Debug, thiserror::Error)]
pub enum NotV4 {
    /// A control token is missing.
    #[error(
        "the vocabulary has no control token `{text}`, which prompts of DeepSeek V4 need: use a GGUF file of a DeepSeek V4 model"
    )]
    Missing {
        /// Its text.
        text: &'static str,
    },
    /// BOS or EOS is another token than V4's.
    #[error("{key} is token {found}, expected {expected}, `{text}`: use a GGUF file of a DeepSeek V4 model")]
    Different {
        /// The metadata key.
        key: &'static str,
        /// Its value.
        found: u32,
        /// The id of V4's token.
        expected: u32,
        /// The text of V4's token.
        text: &'static str,
    },
    /// A vocabulary of V4's size with other control tokens, most likely that of V3 or R1.
    #[error(
        "token {DSML_ID} of the vocabulary is {found:?}, expected `{token}`: these are not the control tokens of DeepSeek V4 (V3 and R1 \
         have a vocabulary of the same size), use a GGUF file of a DeepSeek V4 model",
        token = dsml::TOKEN
    )]
    OtherModel {
        /// The text of the token there.
        found: String,
    },
}

/// The size of DeepSeek V4's vocabulary.
const V4_VOCAB_SIZE: usize = 129_280;
/// The id in V4's vocabulary of [`dsml::TOKEN`], which V3 does not have.
const DSML_ID: u32 = 128_825;

impl ControlTokens {
    /// Looks the control tokens up in a tokenizer, by their texts: a small model may give them other ids.
    ///
    /// # Errors
    /// [`NotV4`] if one is missing, or if a vocabulary of V4's size is another model's.
    pub fn find(tokenizer: &Tokenizer) -> Result<Self, NotV4> {
        if tokenizer.vocab_size() == V4_VOCAB_SIZE && tokenizer.control(dsml::TOKEN) != Some(DSML_ID) {
            let found = String::from_utf8_lossy(tokenizer.token_bytes(DSML_ID)).into_owned();
            return Err(NotV4::OtherModel { found });
        }
        let find = |text| tokenizer.control(text).ok_or(NotV4::Missing { text });
        let same = |key, found, text| match find(text)? {
            expected if expected == found => Ok(found),
            expected => Err(NotV4::Different { key, found, expected, text }),
        };
        Ok(Self {
            bos: same("tokenizer.ggml.bos_token_id", tokenizer.bos(), "<｜begin▁of▁sentence｜>")?,
            eos: same("tokenizer.ggml.eos_token_id", tokenizer.eos(), "<｜end▁of▁sentence｜>")?,
            user: find("<｜User｜>")?,
            assistant: find("<｜Assistant｜>")?,
            think: find("<think>")?,
            end_think: find("</think>")?,
            dsml: tokenizer.control(dsml::TOKEN),
        })
    }

    /// The tokens that end a turn when the model generates them: EOS, and the role tokens, which are never
    /// part of an answer (§5).
    pub fn stop_set(&self) -> [u32; 3] {
        [self.eos, self.user, self.assistant]
    }
}
