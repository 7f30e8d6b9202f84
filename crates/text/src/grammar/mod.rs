//! Grammar mode: which tokens may come next so that a call fits its tool's declaration, or an answer its JSON schema.
//!
//! A [`Compiler`] is built once for a tokenizer. It makes a [`Constraint`] for a turn, and the constraint says before each
//! token which ones are allowed. It only takes tokens away: how a text is cut into tokens remains the model's choice.
//!
//! A block of calls has exactly the form of docs/spec/conversation.md §4.1 (`calls`):
//!
//! - a call names a declared tool; it has declared parameters only, each at most once and in any order (in declared order if
//!   there are more than 64), and every required one;
//! - a value that may be a text is written `string="true"` and runs freely up to its closer, or is one of the texts of its
//!   `enum`; length and `pattern` hold, `format` is a remark;
//! - any other value is JSON by its schema, in Python's spelling (`", "` and `": "`), keys in declared order.
//!
//! Regular expressions, JSON schemas and the search through the vocabulary are `llguidance`'s. What it does not support is an
//! error before anything is generated.

mod calls;
mod spelt;

use std::fmt::Write;
use std::sync::Arc;

use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{JsonCompileOptions, Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::prompt::Tool;
use crate::{Tokenizer, dsml};
use spelt::Spelt;

/// A constraint that cannot be made or followed.
#[derive(Debug, thiserror::Error)]
pub enum GrammarError {
    /// The vocabulary cannot be searched.
    #[error("grammar mode cannot use this vocabulary: {0}")]
    Vocabulary(String),
    /// The vocabulary has no token for the markup of calls.
    #[error("the vocabulary has no control token `{}`, so there are no calls to constrain", dsml::TOKEN)]
    NoDsml,
    /// No tool to call.
    #[error("calls cannot be constrained without tools: declare at least one")]
    NoTools,
    /// A tool's parameters use what cannot be enforced.
    #[error("grammar mode cannot enforce the parameters of the tool `{tool}`: {what}. Simplify them, or turn it off")]
    Tool {
        /// The tool.
        tool: String,
        /// What is not supported.
        what: String,
    },
    /// A response schema uses what cannot be enforced.
    #[error("grammar mode cannot enforce the response format: {what}. Simplify the schema, or turn it off")]
    Schema {
        /// What is not supported.
        what: String,
    },
    /// The constraint grew beyond its limits, or a token came that it does not allow.
    #[error("the constraint on the answer cannot go on: {what}")]
    Stuck {
        /// What the library says.
        what: String,
    },
}

/// Makes constraints for one tokenizer. Building it sorts the vocabulary: do it once, and only where it is needed.
pub struct Compiler {
    factory: ParserFactory,
    dsml: Option<u32>,
    spelt: Arc<Spelt>,
}

impl Compiler {
    /// # Errors
    /// [`GrammarError::Vocabulary`] if the library refuses it.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, GrammarError> {
        let count = tokenizer.vocab_size() as u32;
        let words: Vec<Vec<u8>> = (0..count).map(|id| trie_word(tokenizer, id)).collect();
        let trie = TokTrie::from(&TokRxInfo::new(count, tokenizer.eos()), &words);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory =
            ParserFactory::new_simple(&environment).map_err(|error| GrammarError::Vocabulary(error.to_string()))?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Self { factory, dsml: tokenizer.control(dsml::TOKEN), spelt: Arc::new(Spelt::new(tokenizer)) })
    }

    /// What may follow `<` and the control token `｜DSML｜` until the block of calls is closed.
    ///
    /// # Errors
    /// [`GrammarError::Tool`], [`GrammarError::NoTools`], [`GrammarError::NoDsml`].
    pub fn calls(&self, tools: &[Tool]) -> Result<Constraint, GrammarError> {
        let grammar = calls::grammar(tools, self.dsml.ok_or(GrammarError::NoDsml)?)?;
        self.constraint(grammar).map_err(|what| {
            let faulty = tools.iter().find(|tool| self.check(tool).is_err());
            let tool = faulty.map_or_else(|| all_names(tools), |tool| tool.name().to_owned());
            GrammarError::Tool { tool, what }
        })
    }

    /// Compiles the calls of one tool.
    fn check(&self, tool: &Tool) -> Result<Constraint, String> {
        let grammar = calls::grammar(std::slice::from_ref(tool), self.dsml.unwrap_or_default());
        self.constraint(grammar.map_err(|error| error.to_string())?)
    }

    /// An answer that is JSON by `schema`, then the end of the turn.
    ///
    /// # Errors
    /// [`GrammarError::Schema`].
    pub fn json(&self, schema: &Value) -> Result<Constraint, GrammarError> {
        let unsupported = |what: String| GrammarError::Schema { what };
        let grammar = python_json(schema).map_err(unsupported)?;
        self.constraint(TopLevelGrammar::from_json_schema(grammar)).map_err(unsupported)
    }

    fn constraint(&self, grammar: TopLevelGrammar) -> Result<Constraint, String> {
        let matcher = Matcher::new(self.factory.create_parser(grammar));
        match matcher.get_error() {
            Some(what) => Err(first_line(&what)),
            None => Ok(Constraint { matcher, spelt: self.spelt.clone(), text: Vec::new() }),
        }
    }
}

/// A turn's constraint and how far the turn is.
pub struct Constraint {
    matcher: Matcher,
    spelt: Arc<Spelt>,
    /// The last bytes of the text so far.
    text: Vec<u8>,
}

impl Constraint {
    /// The tokens that may come next: token `t` is bit `t % 32` of word `t / 32`. Only the end of the turn once nothing more
    /// may come.
    ///
    /// # Errors
    /// [`GrammarError::Stuck`] if the search grew beyond its limits.
    pub fn allowed(&mut self) -> Result<Vec<u32>, GrammarError> {
        let mut allowed = self.matcher.compute_mask_or_eos().map_err(stuck)?;
        self.spelt.completing(&self.text).for_each(|&token| allowed.disallow_token(token));
        Ok(allowed.as_slice().to_vec())
    }

    /// Goes on past `token`.
    ///
    /// # Errors
    /// [`GrammarError::Stuck`] if the token is not allowed.
    pub fn accept(&mut self, token: u32) -> Result<(), GrammarError> {
        self.matcher.consume_token(token).map_err(stuck)?;
        self.spelt.extend(&mut self.text, token);
        Ok(())
    }
}

/// The library's error while it follows a turn.
fn stuck(error: impl std::fmt::Display) -> GrammarError {
    GrammarError::Stuck { what: first_line(&error.to_string()) }
}

/// A token as the library wants it: control tokens begin with a byte that no text has.
fn trie_word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id);
    if tokenizer.is_control(id) { [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat() } else { bytes.to_vec() }
}

/// `schema` with the instruction to write JSON as Python does, once the library has understood it.
fn python_json(schema: &Value) -> Result<Value, String> {
    let mut schema = match schema {
        Value::Object(_) => schema.clone(),
        Value::Bool(true) => json!({}),
        other => return Err(format!("a schema is {other}, expected an object")),
    };
    schema["x-guidance"] = json!({
        "whitespace_flexible": false,
        "item_separator": ", ",
        "key_separator": ": ",
    });
    let builder = llguidance::GrammarBuilder::new(None, Default::default());
    JsonCompileOptions::default()
        .json_to_llg_with_overrides(builder, schema.clone())
        .map_err(|error| first_line(&error.to_string()))?;
    Ok(schema)
}

/// A grammar of the library's language that other grammars are named in.
fn with_json(lark: String, json: Vec<(String, Value)>) -> TopLevelGrammar {
    let named = |(name, schema)| GrammarWithLexer { name: Some(name), ..GrammarWithLexer::from_json_schema(schema) };
    let grammars = std::iter::once(GrammarWithLexer::from_lark(lark)).chain(json.into_iter().map(named)).collect();
    TopLevelGrammar { grammars, max_tokens: None }
}

fn all_names(tools: &[Tool]) -> String {
    tools.iter().fold(String::new(), |mut names, tool| {
        let separator = if names.is_empty() { "" } else { "`, `" };
        write!(names, "{separator}{}", tool.name()).expect("a String takes everything");
        names
    })
}

/// The library adds its whole state to some messages.
fn first_line(message: &str) -> String {
    message.lines().find(|line| !line.is_empty()).unwrap_or_default().to_owned()
}
