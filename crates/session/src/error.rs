//! What can go wrong between a prompt and its continuation.

use std::io;

use crate::SavedError;

/// An error of a session.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A context larger than the model's.
    #[error(
        "found a context of {asked} tokens, expected 1 to {limit}, for which the model was made. Choose one of these"
    )]
    ContextSize {
        /// Tokens asked for.
        asked: usize,
        /// The model's limit.
        limit: usize,
    },
    /// No tokens where at least one is needed.
    #[error("the prompt has no tokens, but a model can only go on from something. Give a prompt that is not empty")]
    EmptyPrompt,
    /// More tokens than the context has room for. Nothing was computed.
    #[error(
        "the prompt is too long for the context: found {found} tokens, room for {room} of {limit}. \
             Shorten the prompt{}", larger_context(*limit, *model_limit)
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        found: usize,
        /// Tokens that still fit.
        room: usize,
        /// The session's context.
        limit: usize,
        /// The model's context.
        model_limit: usize,
    },
    /// A sampling setting outside its range.
    #[error("{setting} is {found}, expected {expected}")]
    Sampling {
        /// The setting.
        setting: &'static str,
        /// Its value.
        found: f32,
        /// Its range.
        expected: &'static str,
    },
    /// A bias for a token that the model does not have.
    #[error("logit_bias names token {token}, expected less than {vocab_size}, the model's vocabulary")]
    BiasToken {
        /// The token.
        token: u32,
        /// The model's vocabulary.
        vocab_size: usize,
    },
    /// A call was asked for that cannot be made.
    #[error(
        "the tool choice asks for {}, but the declared tools are [{}]: declare it, or choose another",
        found.as_ref().map_or("any tool".to_owned(), |name| format!("`{name}`")), declared.join(", ")
    )]
    ToolChoice {
        /// The tool asked for, or any.
        found: Option<String>,
        /// The tools there are.
        declared: Vec<String>,
    },
    /// A call and an answer in JSON were asked for at once.
    #[error("a response format and a tool choice that requires a call exclude each other: ask for one of them")]
    SchemaAndCall,
    /// The turn cannot be held to a grammar.
    #[error(transparent)]
    Grammar(#[from] text::grammar::GrammarError),
    /// Nothing can be sampled.
    #[error("none of the {0} logits that may be chosen is a finite number. The computation or its input is broken")]
    NoFiniteLogit(usize),
    /// The session could not be written.
    #[error("writing the session failed: {0}")]
    Save(io::Error),
    /// A saved session could not be used.
    #[error(transparent)]
    Saved(#[from] SavedError),
    /// The pass failed or was cancelled; the session is as it was before it.
    #[error(transparent)]
    Model(#[from] model::Error),
}

impl Error {
    /// Whether the caller itself asked for the end.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Error::Model(model::Error::Cancelled))
    }
}

/// The other remedy, where there is one.
fn larger_context(limit: usize, model_limit: usize) -> String {
    match limit < model_limit {
        true => format!(" or choose a larger context: the model allows {model_limit} tokens"),
        false => "; the model was made for no larger context".into(),
    }
}
