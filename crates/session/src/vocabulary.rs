//! What a turn needs to know of a model's tokens.

use std::sync::{Arc, OnceLock};

use text::Tokenizer;
use text::grammar::{Compiler, GrammarError};
use text::prompt::{ControlTokens, NotV4};

/// A tokenizer with what turns derive from it. One serves all turns of a model.
pub struct Vocabulary {
    tokenizer: Arc<Tokenizer>,
    control: ControlTokens,
    compiler: OnceLock<Compiler>,
}

impl Vocabulary {
    /// Looks up the control tokens. Grammar mode is made ready when a turn first asks for it.
    ///
    /// # Errors
    /// [`NotV4`] if the vocabulary is not one of DeepSeek V4.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Result<Vocabulary, NotV4> {
        Ok(Vocabulary { control: ControlTokens::find(&tokenizer)?, tokenizer, compiler: OnceLock::new() })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Its control tokens.
    pub fn control(&self) -> &ControlTokens {
        &self.control
    }

    /// What makes constraints; built at the first call.
    ///
    /// # Errors
    /// [`GrammarError::Vocabulary`].
    pub fn compiler(&self) -> Result<&Compiler, GrammarError> {
        match self.compiler.get() {
            Some(compiler) => Ok(compiler),
            None => {
                let compiler = Compiler::new(&self.tokenizer)?;
                Ok(self.compiler.get_or_init(|| compiler))
            }
        }
    }
}
