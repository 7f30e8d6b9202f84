//! Messages to a prompt in DeepSeek V4's format (docs/spec/conversation.md §3).
//!
//! ```text
//! BOS [effort prefix] ⟨system⟩ {turns}
//! user turn      = <｜User｜>⟨texts and tool results joined by a blank line⟩
//! opener         = <｜Assistant｜> + (<think> when thinking | </think> in chat)
//! assistant turn = opener [⟨reasoning⟩</think>] ⟨content⟩ ⟨calls⟩ EOS
//! ```
//!
//! What clients write (instructions, questions, tool schemas and outputs, names and values of calls) becomes
//! ordinary text. What the model once wrote (reasoning, content, a call's block as it was generated) is searched
//! for control tokens, so that a turn reads again as it was generated, and so are the fixed texts of the format.

mod control;
mod encoding;
mod message;
mod template;
mod turns;

use crate::{Segment, Tokenizer, dsml, json};

pub use control::{ControlTokens, NotV4};
pub use encoding::{Effort, Encoding, Mode, UnknownEffortName, UnknownEncoding};
pub use message::{AssistantMessage, Call, Message, Task, Tool, ToolError};
use template::{
    ESCAPED_RESULT_CLOSER, REMINDER, RESPONSE_FORMAT, RESULT_CLOSER, RESULT_OPENER, TOOLS_HEAD, TOOLS_TAIL,
};
use turns::{Block, Instructions, Turn, turns};

/// How [`render`] writes a prompt.
#[derive(Clone, Copy, Debug)]
pub struct PromptOptions {
    /// The format of the model's weights.
    pub encoding: Encoding,
    /// What the next turn does.
    pub mode: Mode,
    /// Leave out the reasoning of assistant turns before the last user message, as the model was trained
    /// (§3.4). A conversation with tools keeps all of it in any case.
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
        "effort `{effort}` is not known to weights of the encoding {encoding}: use `high` or `max`, or leave it out"
    )]
    UnknownEffort {
        /// The level.
        effort: Effort,
        /// The encoding.
        encoding: Encoding,
    },
    /// The tokenizer is not one of V4, or a small model's without a token that this conversation needs.
    #[error(transparent)]
    NotV4(#[from] NotV4),
}

/// Renders a conversation. The prompt ends with the opener of the next assistant turn if the last message
/// is the user's, a tool's or a system message.
///
/// # Errors
/// [`PromptError`] if the conversation or the options have no form in this format.
pub fn render(
    tokenizer: &Tokenizer,
    messages: &[Message],
    options: &PromptOptions,
) -> Result<Vec<Segment>, PromptError> {
    check(messages)?;
    let thinking = matches!(options.mode, Mode::Thinking { .. });
    let dropping = thinking && options.drop_reasoning && !turns::uses_tools(messages);
    let mut turns = turns(messages);
    if dropping {
        drop_developers(&mut turns);
    }
    let first_kept = if dropping { turns.iter().rposition(Turn::is_users).unwrap_or(0) } else { 0 };

    let mut prompt = Prompt { tokenizer, tokens: ControlTokens::find(tokenizer)?, thinking, segments: Vec::new() };
    prompt.control(prompt.tokens.bos);
    prompt.text(effort_prefix(options)?);
    for (index, turn) in turns.iter().enumerate() {
        let reasons = thinking && index >= first_kept;
        let after_task = index > 0 && turns[index - 1].task().is_some();
        prompt.turn(turn, reasons && !after_task)?;
        if calls_for_answer(turn, turns.get(index + 1)) {
            prompt.transition(turn, reasons)?;
        }
    }
    Ok(prompt.segments)
}

/// Refuses conversations that no prompt stands for.
fn check(messages: &[Message]) -> Result<(), PromptError> {
    let (_, earlier) = messages.split_last().ok_or(PromptError::NoMessages)?;
    let continued = |message: &Message| matches!(message, Message::Assistant(message) if message.continued);
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

/// Whether the model speaks next. A system message calls for it too: the first encoders left such turns without an
/// opener, for the model to go on with the instructions; later ones agree on this (§3.1).
fn calls_for_answer(turn: &Turn<'_>, next: Option<&Turn<'_>>) -> bool {
    match next {
        None | Some(Turn::Assistant(_)) => true,
        Some(Turn::Reminder(_)) => !matches!(turn, Turn::System(_)),
        Some(_) => false,
    }
}

/// Where reasoning is dropped, so are developer turns before the last turn of a user.
fn drop_developers(turns: &mut Vec<Turn<'_>>) {
    let Some(last) = turns.iter().rposition(Turn::is_users) else { return };
    let mut index = 0;
    turns.retain(|turn| {
        index += 1;
        index > last || !matches!(turn, Turn::Developer(_))
    });
}

/// A prompt in the making.
struct Prompt<'a> {
    tokenizer: &'a Tokenizer,
    tokens: ControlTokens,
    thinking: bool,
    segments: Vec<Segment>,
}

impl Prompt<'_> {
    fn control(&mut self, token: u32) {
        self.segments.push(Segment::Control(token));
    }

    /// A control token that only some conversations need.
    fn rare_control(&mut self, text: &'static str) -> Result<(), NotV4> {
        self.control(self.tokenizer.control(text).ok_or(NotV4::Missing { text })?);
        Ok(())
    }

    /// Ordinary text.
    fn text(&mut self, text: &str) {
        match self.segments.last_mut() {
            _ if text.is_empty() => {}
            Some(Segment::Text(before)) => before.push_str(text),
            _ => self.segments.push(Segment::Text(text.to_owned())),
        }
    }

    /// Text of the format itself, whose control tokens are meant.
    fn template(&mut self, text: &str) {
        for segment in self.tokenizer.split_control(text) {
            self.segment(segment);
        }
    }

    /// Refuses what is said in DSML where the vocabulary has no word for it.
    fn need_dsml(&self) -> Result<(), NotV4> {
        self.tokens.dsml.map(drop).ok_or(NotV4::Missing { text: dsml::TOKEN })
    }

    /// Text that the model is said to have written, with the control tokens it can write inside a turn. Those that begin
    /// or end a turn are not among them, so a history cannot forge turns.
    fn replay(&mut self, text: &str) {
        let ControlTokens { bos, eos, user, assistant, .. } = self.tokens;
        let forbidden = [Some(bos), Some(eos), Some(user), Some(assistant), self.tokenizer.control(REMINDER)];
        for segment in self.tokenizer.split_control(text) {
            match segment {
                Segment::Control(id) if forbidden.contains(&Some(id)) => {
                    let literal = String::from_utf8_lossy(self.tokenizer.token_bytes(id));
                    self.text(&literal);
                }
                other => self.segment(other),
            }
        }
    }

    fn segment(&mut self, segment: Segment) {
        match segment {
            Segment::Control(token) => self.control(token),
            Segment::Text(text) => self.text(&text),
        }
    }

    /// A turn without what follows it. `reasons`: an assistant turn shows its reasoning.
    fn turn(&mut self, turn: &Turn<'_>, reasons: bool) -> Result<(), NotV4> {
        match turn {
            Turn::System(instructions) => self.instructions(instructions)?,
            Turn::Developer(instructions) => {
                self.control(self.tokens.user);
                self.instructions(instructions)?;
            }
            Turn::User { blocks, .. } => {
                self.control(self.tokens.user);
                self.blocks(blocks);
            }
            Turn::Reminder(content) => {
                self.rare_control(REMINDER)?;
                self.text(content);
            }
            Turn::Assistant(message) => self.assistant(message, reasons)?,
        }
        Ok(())
    }

    /// The content, the tools section and the response format.
    fn instructions(&mut self, instructions: &Instructions<'_>) -> Result<(), NotV4> {
        self.text(instructions.content);
        if !instructions.tools.is_empty() {
            self.need_dsml()?;
            self.text("\n\n");
            self.template(TOOLS_HEAD);
            for (index, tool) in instructions.tools.iter().enumerate() {
                self.text(if index == 0 { "" } else { "\n" });
                self.text(&json::to_string(tool.schema()));
            }
            self.template(TOOLS_TAIL);
        }
        if let Some(schema) = instructions.response_format.filter(|schema| !json::is_empty(schema)) {
            self.text("\n\n");
            self.text(RESPONSE_FORMAT);
            self.text(&json::to_string(schema));
        }
        Ok(())
    }

    /// The parts of a user turn. A tool's output cannot end its own frame.
    fn blocks(&mut self, blocks: &[Block<'_>]) {
        for (index, block) in blocks.iter().enumerate() {
            self.text(if index == 0 { "" } else { "\n\n" });
            match block {
                Block::Text(text) => self.text(text),
                Block::Result { content, .. } => {
                    self.text(RESULT_OPENER);
                    self.text(&content.replace(RESULT_CLOSER, ESCAPED_RESULT_CLOSER));
                    self.text(RESULT_CLOSER);
                }
            }
        }
    }

    /// An assistant turn after its opener.
    fn assistant(&mut self, message: &AssistantMessage, reasons: bool) -> Result<(), NotV4> {
        if reasons {
            self.replay(&message.reasoning);
            self.control(self.tokens.end_think);
        }
        self.replay(&message.content);
        match &message.raw_block {
            Some(block) => self.replay(block),
            None if message.calls.is_empty() => {}
            None => self.calls(&message.calls)?,
        }
        if !message.continued {
            self.control(self.tokens.eos);
        }
        Ok(())
    }

    /// The calls in canonical form.
    fn calls(&mut self, calls: &[Call]) -> Result<(), NotV4> {
        self.need_dsml()?;
        dsml::write(calls, &mut |part| match part {
            dsml::Part::Markup(text) => self.template(text),
            dsml::Part::Text(text) => self.text(text),
        });
        Ok(())
    }

    /// What calls for the model after a turn: the opener of its turn, or the token of a task.
    fn transition(&mut self, turn: &Turn<'_>, reasons: bool) -> Result<(), NotV4> {
        match turn.task() {
            None if turn.is_users() || matches!(turn, Turn::System(_)) => self.opener(reasons),
            None => {}
            Some(task @ Task::Action) => {
                self.opener(self.thinking);
                self.rare_control(task.token())?;
            }
            Some(task) => self.rare_control(task.token())?,
        }
        Ok(())
    }

    /// The beginning of an assistant turn.
    fn opener(&mut self, reasons: bool) {
        self.control(self.tokens.assistant);
        self.control(if reasons { self.tokens.think } else { self.tokens.end_think });
    }
}
