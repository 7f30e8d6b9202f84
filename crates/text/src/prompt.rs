//! Messages to a prompt in DeepSeek V4's format (docs/spec/conversation.md §3).
//!
//! ```text
//! BOS [effort prefix] ⟨system⟩ {turns}
//! user turn      = <｜User｜>⟨texts joined by a blank line⟩
//! opener         = <｜Assistant｜> + (<think> when thinking | </think> in chat)
//! assistant turn = opener [⟨reasoning⟩</think>] ⟨content⟩ EOS
//! ```
//!
//! What clients write becomes ordinary text. What the model once wrote (assistant messages) is searched for
//! control tokens, so that a turn reads again as it was generated.

use std::fmt;
use std::str::FromStr;

use crate::{Segment, Tokenizer};

/// A message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Instructions, rendered where they stand.
    System {
        /// The text.
        content: String,
    },
    /// What the user says. Messages that follow each other are one turn.
    User {
        /// The text.
        content: String,
    },
    /// What the model answered.
    Assistant {
        /// The reasoning before the answer; empty if there was none.
        reasoning: String,
        /// The answer.
        content: String,
        /// Whether the model is to go on with this message: it is left open, without EOS. Only for the
        /// last message.
        continued: bool,
    },
}

/// The prompt format of a checkpoint. The two differ in the effort prefix alone (§3.7), and no key of a
/// model file tells them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// The weights of April 2026.
    V4_2604,
    /// The weights of 31 July 2026.
    V4_0731,
}

impl Encoding {
    /// Guesses from a model's file name: it holds `0731`, or the weights are those of April.
    pub fn guess(file_name: &str) -> Self {
        if file_name.contains("0731") { Self::V4_0731 } else { Self::V4_2604 }
    }

    /// The text after BOS that asks for `effort`; `None` if these weights do not know the level.
    fn effort_prefix(self, effort: Effort) -> Option<&'static str> {
        match (self, effort) {
            (Self::V4_2604, Effort::Low) => None,
            (Self::V4_2604, Effort::High) | (Self::V4_0731, Effort::Low) => Some(""),
            (Self::V4_2604, Effort::Max) | (Self::V4_0731, Effort::High) => Some(ABSOLUTE_MAXIMUM),
            (Self::V4_0731, Effort::Max) => Some(BEYOND_MAXIMUM),
        }
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4_2604 => "v4-2604",
            Self::V4_0731 => "v4-0731",
        })
    }
}

/// A name that is no [`Encoding`].
#[derive(Debug, thiserror::Error)]
#[error(
    "the encoding is `{found}`, expected `v4-2604` (the weights of April 2026) or `v4-0731` (those of 31 July 2026)"
)]
pub struct UnknownEncoding {
    /// The name.
    found: String,
}

impl FromStr for Encoding {
    type Err = UnknownEncoding;

    fn from_str(name: &str) -> Result<Self, UnknownEncoding> {
        [Self::V4_2604, Self::V4_0731]
            .into_iter()
            .find(|encoding| encoding.to_string() == name)
            .ok_or_else(|| UnknownEncoding { found: name.to_owned() })
    }
}

/// How long the model is asked to reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// Only for [`Encoding::V4_0731`], where it is the same as no level.
    Low,
    /// Long.
    High,
    /// As long as it takes.
    Max,
}

/// Whether the next turn reasons before it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Answers at once.
    Chat,
    /// Reasons first.
    Thinking {
        /// How long; `None` adds nothing to the prompt.
        effort: Option<Effort>,
    },
}

/// How [`render`] writes a prompt.
#[derive(Clone, Copy, Debug)]
pub struct PromptOptions {
    /// The format of the model's weights.
    pub encoding: Encoding,
    /// What the next turn does.
    pub mode: Mode,
    /// Leave out the reasoning of assistant turns before the last user message, as the model was trained
    /// (§3.4).
    pub drop_reasoning: bool,
}

/// A conversation that has no prompt.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// Nothing to render.
    #[error("the conversation is empty, expected at least one message")]
    NoMessages,
    /// A message left open before the end.
    #[error(
        "message {index} is to be continued, but {count} messages follow it: only the last message can be continued"
    )]
    ContinuedTooEarly {
        /// Its index.
        index: usize,
        /// Number of messages after it.
        count: usize,
    },
    /// The weights do not know the effort level.
    #[error(
        "effort {effort:?} is not known to weights of the encoding {encoding}: use `high` or `max`, or leave it out"
    )]
    UnknownEffort {
        /// The level.
        effort: Effort,
        /// The encoding.
        encoding: Encoding,
    },
    /// The tokenizer is not one of V4.
    #[error(transparent)]
    NotV4(#[from] NotV4),
}

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
        "token {DSML_ID} of the vocabulary is {found:?}, expected `{DSML}`: these are not the control tokens of DeepSeek V4 (V3 and R1 \
         have a vocabulary of the same size), use a GGUF file of a DeepSeek V4 model"
    )]
    OtherModel {
        /// The text of the token there.
        found: String,
    },
}

/// The size of DeepSeek V4's vocabulary.
const V4_VOCAB_SIZE: usize = 129_280;
/// The control token that V3 does not have, and its id in V4's vocabulary.
const DSML: &str = "｜DSML｜";
const DSML_ID: u32 = 128_825;

impl ControlTokens {
    /// Looks the control tokens up in a tokenizer, by their texts: a small model may give them other ids.
    ///
    /// # Errors
    /// [`NotV4`] if one is missing, or if a vocabulary of V4's size is another model's.
    pub fn find(tokenizer: &Tokenizer) -> Result<Self, NotV4> {
        if tokenizer.vocab_size() == V4_VOCAB_SIZE && tokenizer.control(DSML) != Some(DSML_ID) {
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
        })
    }

    /// The tokens that end a turn when the model generates them: EOS, and the role tokens, which are never
    /// part of an answer (§5).
    pub fn stop_set(&self) -> [u32; 3] {
        [self.eos, self.user, self.assistant]
    }
}

/// Renders a conversation. The prompt ends with the opener of the next assistant turn if the last message
/// is the user's.
///
/// # Errors
/// [`PromptError`] if the conversation or the options have no form in this format.
pub fn render(
    tokenizer: &Tokenizer,
    messages: &[Message],
    options: &PromptOptions,
) -> Result<Vec<Segment>, PromptError> {
    check(messages)?;
    let mut prompt = Prompt { tokenizer, tokens: ControlTokens::find(tokenizer)?, segments: Vec::new() };
    prompt.control(prompt.tokens.bos);
    prompt.text(effort_prefix(options)?);
    let is_user = |message: &Message| matches!(message, Message::User { .. });
    let last_user = messages.iter().rposition(is_user);
    for (index, message) in messages.iter().enumerate() {
        let thinking = matches!(options.mode, Mode::Thinking { .. });
        let reasons = thinking && (!options.drop_reasoning || Some(index) >= last_user);
        match message {
            Message::System { content } => prompt.text(content),
            Message::User { content } => {
                let continues_turn = index.checked_sub(1).is_some_and(|before| is_user(&messages[before]));
                prompt.user(content, continues_turn);
                if matches!(messages.get(index + 1), None | Some(Message::Assistant { .. })) {
                    prompt.opener(reasons);
                }
            }
            Message::Assistant { reasoning, content, continued } => {
                prompt.assistant(reasons.then_some(reasoning), content, !continued);
            }
        }
    }
    Ok(prompt.segments)
}

/// Refuses conversations that no prompt stands for.
fn check(messages: &[Message]) -> Result<(), PromptError> {
    let (_, earlier) = messages.split_last().ok_or(PromptError::NoMessages)?;
    let continued = |message: &Message| matches!(message, Message::Assistant { continued: true, .. });
    match earlier.iter().position(continued) {
        Some(index) => Err(PromptError::ContinuedTooEarly { index, count: messages.len() - index - 1 }),
        None => Ok(()),
    }
}

/// The text that follows BOS.
fn effort_prefix(options: &PromptOptions) -> Result<&'static str, PromptError> {
    let Mode::Thinking { effort: Some(effort) } = options.mode else { return Ok("") };
    let encoding = options.encoding;
    encoding.effort_prefix(effort).ok_or(PromptError::UnknownEffort { effort, encoding })
}

/// A prompt in the making.
struct Prompt<'a> {
    tokenizer: &'a Tokenizer,
    tokens: ControlTokens,
    segments: Vec<Segment>,
}

impl Prompt<'_> {
    fn control(&mut self, token: u32) {
        self.segments.push(Segment::Control(token));
    }

    /// Ordinary text.
    fn text(&mut self, text: &str) {
        if !text.is_empty() {
            self.segments.push(Segment::Text(text.to_owned()));
        }
    }

    /// A user message, as a turn of its own or as a further text of the one before.
    fn user(&mut self, content: &str, continues_turn: bool) {
        if continues_turn {
            self.text("\n\n");
        } else {
            self.control(self.tokens.user);
        }
        self.text(content);
    }

    /// The beginning of an assistant turn.
    fn opener(&mut self, reasons: bool) {
        self.control(self.tokens.assistant);
        self.control(if reasons { self.tokens.think } else { self.tokens.end_think });
    }

    /// Text that the model is said to have written, with the control tokens it can write inside a turn. Those that begin
    /// or end a turn are not among them, so a history cannot forge turns.
    fn replay(&mut self, text: &str) {
        let ControlTokens { bos, eos, user, assistant, .. } = self.tokens;
        for segment in self.tokenizer.split_control(text) {
            match segment {
                Segment::Control(id) if [bos, eos, user, assistant].contains(&id) => {
                    let literal = String::from_utf8_lossy(self.tokenizer.token_bytes(id));
                    self.segments.push(Segment::Text(literal.into_owned()));
                }
                other => self.segments.push(other),
            }
        }
    }

    /// The rest of an assistant turn; `reasoning` is `None` if the turn was opened without.
    fn assistant(&mut self, reasoning: Option<&String>, content: &str, ended: bool) {
        if let Some(reasoning) = reasoning {
            self.replay(reasoning);
            self.control(self.tokens.end_think);
        }
        self.replay(content);
        if ended {
            self.control(self.tokens.eos);
        }
    }
}

/// Text A of §3.7.
const ABSOLUTE_MAXIMUM: &str = "\
Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.

";

/// Text B of §3.7.
const BEYOND_MAXIMUM: &str = "\
Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that no assumption remains unchecked and no error remains undiscovered.

";
