//! The messages so far, and the model that has read them.

use std::path::Path;

use model::Cancel;
use session::{Sampling, StopReason, TurnOptions};
use text::parse::{ParseOptions, Turn};
use text::prompt::{AssistantMessage, Call, Encoding, Message, Mode, PromptOptions, Tool, render};

use super::saved::{Format, Saved};
use crate::device::Device;
use crate::engine::{self, Engine};
use crate::figures::Figures;
use crate::flags::Effort;
use crate::screen::Screen;

/// A conversation under way.
pub struct Conversation<D: Device> {
    /// What answers.
    pub engine: Engine<D>,
    /// Everything said, instructions and tools included.
    pub messages: Vec<Message>,
    /// How messages become a prompt.
    pub format: Format,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Most tokens of a reply.
    pub max_tokens: usize,
    /// What all replies together have cost.
    pub total: Figures,
    /// Number of replies.
    pub replies: u64,
}

/// What a reply came to.
pub struct Reply {
    /// What it changed.
    pub change: Change,
    /// What it cost.
    pub figures: Figures,
}

/// What a reply changed of the conversation.
pub enum Change {
    /// The model said something.
    Said(Said),
    /// It was interrupted before it said anything, and the user's message was taken back.
    TakenBack,
    /// It was interrupted before it said anything; the results of tools stay, to be answered by [`Conversation::retry`].
    Unanswered,
    /// It was interrupted before it said anything anew: the reply before stays.
    Nothing,
}

/// What the model said, besides text.
pub struct Said {
    /// The calls whose results it waits for.
    pub calls: Vec<Call>,
    /// Whether it wrote calls that cannot be made.
    pub malformed: bool,
}

/// What flags say of the format; it stands above what a file says.
#[derive(Clone, Copy, Default)]
pub struct Given {
    /// The prompt format of the weights.
    pub encoding: Option<Encoding>,
    /// Whether to reason.
    pub thinks: Option<bool>,
    /// How long.
    pub effort: Option<Effort>,
}

impl Given {
    fn over(self, format: Format) -> Format {
        Format {
            encoding: self.encoding.unwrap_or(format.encoding),
            thinks: self.thinks.unwrap_or(format.thinks),
            effort: self.effort.or(format.effort),
        }
    }
}

impl<D: Device> Conversation<D> {
    /// Adds `news` (a message of the user, or results of tools) and lets the model answer. What it said stays in the
    /// conversation, even if it was interrupted. If it failed, `news` are taken back.
    ///
    /// # Errors
    /// As [`Engine::reply`]; besides, an effort that the weights do not know.
    pub fn say(
        &mut self,
        news: Vec<Message>,
        seed: u64,
        cancel: &Cancel,
        screen: &mut Screen,
    ) -> anyhow::Result<Reply> {
        let before = self.messages.len();
        let are_results = news.iter().all(|message| matches!(message, Message::Tool { .. }));
        self.messages.extend(news);
        let nothing = if are_results { Change::Unanswered } else { Change::TakenBack };
        let reply = self.reply(nothing, seed, cancel, screen);
        if !matches!(reply, Ok(Reply { change: Change::Said(_) | Change::Unanswered, .. })) {
            self.messages.truncate(before);
        }
        reply
    }

    /// Takes the last reply back and lets the model answer anew.
    ///
    /// # Errors
    /// As [`Conversation::say`]; besides, there is nothing to answer. The conversation is then as it was.
    pub fn retry(&mut self, seed: u64, cancel: &Cancel, screen: &mut Screen) -> anyhow::Result<Reply> {
        let is_asked = |message: &Message| matches!(message, Message::User { .. } | Message::Tool { .. });
        let Some(last) = self.messages.iter().rposition(is_asked) else {
            anyhow::bail!("there is no message to answer anew; type one");
        };
        let before = self.messages.split_off(last + 1);
        let reply = self.reply(Change::Nothing, seed, cancel, screen);
        if !matches!(reply, Ok(Reply { change: Change::Said(_), .. })) {
            self.messages.extend(before);
        }
        reply
    }

    /// Lets the model answer the messages; `nothing` is what it comes to if it is interrupted before it says anything.
    fn reply(&mut self, nothing: Change, seed: u64, cancel: &Cancel, screen: &mut Screen) -> anyhow::Result<Reply> {
        let prompt = self.prompt(&self.messages)?;
        let tools: Vec<Tool> = self.messages.iter().flat_map(Message::tools).cloned().collect();
        let parse = ParseOptions { thinking: self.format.thinks, tools: Some(tools).filter(|tools| !tools.is_empty()) };
        let (sampling, max_tokens) = (self.sampling, self.max_tokens);
        let options = TurnOptions { parse, sampling, seed, max_tokens, ..TurnOptions::default() };
        let engine::Reply { turn, figures } = self.engine.reply(&prompt, &options, cancel, screen)?;
        self.replies += 1;
        self.total.add(&figures);
        let is_interrupted = figures.ended == Some(StopReason::Cancelled);
        let is_something = |turn: &Turn| {
            !is_interrupted || !turn.reasoning.is_empty() || !turn.content.is_empty() || !turn.calls.is_empty()
        };
        let Some(turn) = turn.filter(is_something) else {
            return Ok(Reply { change: nothing, figures });
        };
        let calls = self.with_ids(turn.calls);
        self.messages.push(Message::Assistant(AssistantMessage {
            reasoning: turn.reasoning,
            content: turn.content,
            calls: calls.clone(),
            raw_block: turn.raw_block,
            ..AssistantMessage::default()
        }));
        Ok(Reply { change: Change::Said(Said { calls, malformed: turn.malformed }), figures })
    }

    /// Calls with ids that no other call of the conversation has, by which results find them.
    fn with_ids(&self, calls: Vec<Call>) -> Vec<Call> {
        let id = |index| Some(format!("call_{}_{index}", self.messages.len()));
        calls.into_iter().enumerate().map(|(index, call)| Call { id: id(index), ..call }).collect()
    }

    /// The prompt for these messages.
    ///
    /// # Errors
    /// The weights do not know the effort.
    fn prompt(&self, messages: &[Message]) -> anyhow::Result<Vec<u32>> {
        let Format { encoding, thinks, effort } = self.format;
        let effort = effort.map(text::prompt::Effort::from);
        let mode = if thinks { Mode::Thinking { effort } } else { Mode::Chat };
        let options = PromptOptions { encoding, mode, drop_reasoning: true };
        let tokenizer = &self.engine.tokenizer;
        Ok(tokenizer.encode_segments(&render(tokenizer, messages, &options)?))
    }

    /// Makes prompts in this format from now on.
    ///
    /// # Errors
    /// The weights do not know the effort; nothing is changed then.
    pub fn set_format(&mut self, format: Format) -> anyhow::Result<()> {
        let before = std::mem::replace(&mut self.format, format);
        if let Err(error) = self.prompt(&[Message::user("")]) {
            self.format = before;
            return Err(error);
        }
        Ok(())
    }

    /// Forgets everything but the instructions and the tools, and what all cost.
    pub fn begin_anew(&mut self) {
        self.messages.retain(|message| matches!(message, Message::System { .. }));
        self.engine.session.rewind(&self.engine.backend, 0);
        self.total = Figures::default();
        self.replies = 0;
    }

    /// Writes everything to a file.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        let saved = Saved { messages: self.messages.clone(), format: self.format };
        saved.write(&self.engine.session, &self.engine.backend, path)
    }

    /// Goes on with what [`Conversation::save`] wrote, where `given` does not say otherwise.
    ///
    /// # Errors
    /// The file cannot be used; the conversation stays as it was.
    pub fn load(&mut self, path: &Path, given: Given) -> anyhow::Result<()> {
        let (saved, session) = Saved::read(path, &self.engine.backend, self.engine.context)?;
        self.set_format(given.over(saved.format))?;
        self.messages = saved.messages;
        self.engine.set_session(session);
        Ok(())
    }
}
