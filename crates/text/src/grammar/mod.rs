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
//!   `enum` or `const`; length and `pattern` hold;
//! - any other value is JSON by its schema, in Python's spelling (`", "` and `": "`), keys in declared order;
//! - nothing spells `｜DSML｜`: a name or a listed value that contains it is an error.
//!
//! `format` is a remark everywhere, as JSON schema has it unless told otherwise. `oneOf` is supported where types or listed
//! values exclude each other, and `allOf` of one schema is that schema.
//!
//! Regular expressions, JSON schemas and the search through the vocabulary are `llguidance`'s. What it does not support is an
//! error before anything is generated.

mod calls;
mod pattern;
mod schema;
mod spelt;

use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};

use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::Value;

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

/// How many constraints on calls are kept: a conversation repeats its tools in each turn.
const KEPT_CONSTRAINTS: usize = 4;

/// Makes constraints for one tokenizer. Building it sorts the vocabulary: do it once, and only where it is needed.
pub struct Compiler {
    factory: ParserFactory,
    dsml: Option<u32>,
    spelt: Arc<Spelt>,
    /// Constraints on calls, none of them begun, by their tools; the latest last.
    kept: Mutex<Vec<(Vec<Tool>, Constraint)>>,
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
        let (dsml, spelt) = (tokenizer.control(dsml::TOKEN), Arc::new(Spelt::new(tokenizer)));
        Ok(Self { factory, dsml, spelt, kept: Mutex::default() })
    }

    /// What may follow `<` and the control token `｜DSML｜` until the block of calls is closed.
    ///
    /// The constraints of the latest lists of tools are kept, so that asking again is quick.
    ///
    /// # Errors
    /// [`GrammarError::Tool`], [`GrammarError::NoTools`], [`GrammarError::NoDsml`].
    pub fn calls(&self, tools: &[Tool]) -> Result<Constraint, GrammarError> {
        let kept = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let find = |kept: &[(Vec<Tool>, Constraint)]| kept.iter().position(|(of, _)| of == tools);
        let mut known = kept();
        if let Some(at) = find(&known) {
            known[at..].rotate_left(1);
            return Ok(known.last().expect("just found").1.fresh());
        }
        drop(known);
        let constraint = self.new_calls(tools)?;
        let mut known = kept();
        if find(&known).is_none() {
            known.push((tools.to_vec(), constraint.fresh()));
            let surplus = known.len().saturating_sub(KEPT_CONSTRAINTS);
            known.drain(..surplus);
        }
        Ok(constraint)
    }

    fn new_calls(&self, tools: &[Tool]) -> Result<Constraint, GrammarError> {
        let dsml = self.dsml.ok_or(GrammarError::NoDsml)?;
        let grammar = calls::grammar(tools, dsml)?;
        self.constraint(top_level(&grammar)).map_err(|what| {
            self.fault(tools, dsml, &grammar).unwrap_or_else(|| {
                let tool = all_names(tools);
                GrammarError::Tool { tool, what }
            })
        })
    }

    /// Which parameter, or else which tool, the library does not take.
    fn fault(&self, tools: &[Tool], dsml: u32, grammar: &calls::Grammar) -> Option<GrammarError> {
        let value = grammar.json.iter().find_map(|value| {
            let what = self.constraint(TopLevelGrammar::from_json_schema(value.schema.clone())).err()?;
            let what = format!("parameter `{}`: {what}", value.parameter);
            Some(GrammarError::Tool { tool: value.tool.clone(), what })
        });
        value.or_else(|| {
            tools.iter().find_map(|tool| {
                let grammar = calls::grammar(std::slice::from_ref(tool), dsml).ok()?;
                let what = self.constraint(top_level(&grammar)).err()?;
                Some(GrammarError::Tool { tool: tool.name().to_owned(), what })
            })
        })
    }

    /// An answer that is JSON by `schema`, then the end of the turn.
    ///
    /// # Errors
    /// [`GrammarError::Schema`].
    pub fn json(&self, schema: &Value) -> Result<Constraint, GrammarError> {
        let unsupported = |what: String| GrammarError::Schema { what };
        let grammar = schema::standalone(schema, schema).map_err(unsupported)?;
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
    /// The same constraint for another turn; `self` must not have begun.
    fn fresh(&self) -> Self {
        // The copy has its own caches: what one turn's search costs is not counted against another.
        Self { matcher: self.matcher.deep_clone(), spelt: self.spelt.clone(), text: Vec::new() }
    }

    /// The tokens that may come next: token `t` is bit `t % 32` of word `t / 32`. Only the end of the turn once nothing more
    /// may come.
    ///
    /// # Errors
    /// [`GrammarError::Stuck`] if the search grew beyond its limits, or if nothing may come next.
    pub fn allowed(&mut self) -> Result<Vec<u32>, GrammarError> {
        let mut allowed = self.matcher.compute_mask_or_eos().map_err(stuck)?;
        self.spelt.completing(&self.text).for_each(|&token| allowed.disallow_token(token));
        if allowed.is_zero() {
            return Err(GrammarError::Stuck { what: "no token may come next".to_owned() });
        }
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

/// A grammar as the library takes it, with those that it names.
fn top_level(grammar: &calls::Grammar) -> TopLevelGrammar {
    let named = |value: &calls::JsonValue| GrammarWithLexer {
        name: Some(value.name.clone()),
        ..GrammarWithLexer::from_json_schema(value.schema.clone())
    };
    let calls = GrammarWithLexer::from_lark(grammar.lark.clone());
    TopLevelGrammar {
        grammars: std::iter::once(calls).chain(grammar.json.iter().map(named)).collect(),
        max_tokens: None,
    }
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
