//! The messages so far, and the model that has read them.

use std::path::Path;

use model::Cancel;
use session::{Sampling, StopReason, TurnOptions};
use text::parse::{ParseOptions, Turn};
use text::prompt::{AssistantMessage, Call, Encoding, Message, Mode, PromptOptions, Tool, render};

use super::saved::Saved;
use crate::engine::Engine;
use crate::figures::Figures;
use crate::flags::Effort;
use crate::screen::Screen;

/// A conversation under way.
pub struct Conversation {
    /// What answers.
    pub engine: Engine,
    /// Everything said, instructions and tools included.
    pub messages: Vec<Message>,
    /// The prompt format of the weights.
    pub encoding: Encoding,
    /// Whether the next reply reasons first.
    pub thinks: bool,
    /// How long it is asked to.
    pub effort: Option<Effort>,
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
pub struct Said {
    /// The calls whose results the model waits for.
    pub calls: Vec<Call>,
    /// Whether the model wrote calls that cannot be made.
    pub malformed: bool,
    /// Whether nothing was said: it was interrupted before, and what was asked has been taken back.
    pub is_nothing: bool,
    /// What it cost.
    pub figures: Figures,
}

impl Conversation {
    /// Adds `news` (a message of the user, or results of tools) and lets the model answer. What it said stays in the
    /// conversation, even if it was interrupted. If it said nothing or failed, `news` are taken back.
    ///
    /// # Errors
    /// As [`Engine::reply`]; besides, an effort that the weights do not know.
    pub fn say(&mut self, news: Vec<Message>, seed: u64, cancel: &Cancel, screen: &mut Screen) -> anyhow::Result<Said> {
        let before = self.messages.len();
        self.messages.extend(news);
        let said = self.reply(seed, cancel, screen);
        if said.as_ref().map_or(true, |said| said.is_nothing) {
            self.messages.truncate(before);
        }
        said
    }

    /// Takes the last reply back and lets the model answer anew.
    ///
    /// # Errors
    /// As [`Conversation::say`]; besides, there is nothing to answer. The conversation is then as it was.
    pub fn retry(&mut self, seed: u64, cancel: &Cancel, screen: &mut Screen) -> anyhow::Result<Said> {
        let is_asked = |message: &Message| matches!(message, Message::User { .. } | Message::Tool { .. });
        let Some(last) = self.messages.iter().rposition(is_asked) else {
            anyhow::bail!("there is no message to answer anew; type one");
        };
        let reply = self.messages.split_off(last + 1);
        let said = self.reply(seed, cancel, screen);
        if said.as_ref().map_or(true, |said| said.is_nothing) {
            self.messages.extend(reply);
        }
        said
    }

    fn reply(&mut self, seed: u64, cancel: &Cancel, screen: &mut Screen) -> anyhow::Result<Said> {
        let prompt = self.prompt(&self.messages)?;
        let tools: Vec<Tool> = self.messages.iter().flat_map(Message::tools).cloned().collect();
        let parse = ParseOptions { thinking: self.thinks, tools: Some(tools).filter(|tools| !tools.is_empty()) };
        let (sampling, max_tokens) = (self.sampling, self.max_tokens);
        let options = TurnOptions { parse, sampling, seed, max_tokens, ..TurnOptions::default() };
        let reply = self.engine.reply(&prompt, &options, cancel, screen)?;
        let figures = reply.figures;
        self.count(&figures);
        let is_interrupted = figures.ended == Some(StopReason::Cancelled);
        let is_something = |turn: &Turn| !is_interrupted || !turn.reasoning.is_empty() || !turn.content.is_empty();
        let Some(turn) = reply.turn.filter(is_something) else {
            return Ok(Said { calls: Vec::new(), malformed: false, is_nothing: true, figures });
        };
        let calls = self.with_ids(turn.calls);
        self.messages.push(Message::Assistant(AssistantMessage {
            reasoning: turn.reasoning,
            content: turn.content,
            calls: calls.clone(),
            raw_block: turn.raw_block,
            ..AssistantMessage::default()
        }));
        Ok(Said { calls, malformed: turn.malformed, is_nothing: false, figures })
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
        let effort = self.effort.map(text::prompt::Effort::from);
        let mode = if self.thinks { Mode::Thinking { effort } } else { Mode::Chat };
        let options = PromptOptions { encoding: self.encoding, mode, drop_reasoning: true };
        let tokenizer = &self.engine.tokenizer;
        Ok(tokenizer.encode_segments(&render(tokenizer, messages, &options)?))
    }

    /// Reasons from now on, or not.
    ///
    /// # Errors
    /// The weights do not know the effort; nothing is changed then.
    pub fn set_thinking(&mut self, thinks: bool, effort: Option<Effort>) -> anyhow::Result<()> {
        let before = (self.thinks, self.effort);
        (self.thinks, self.effort) = (thinks, effort);
        if let Err(error) = self.prompt(&[Message::user("")]) {
            (self.thinks, self.effort) = before;
            return Err(error);
        }
        Ok(())
    }

    /// Forgets everything but the instructions and the tools.
    pub fn begin_anew(&mut self) {
        self.messages.retain(|message| matches!(message, Message::System { .. }));
    }

    /// Writes everything to a file.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        let saved = Saved { messages: self.messages.clone(), thinks: self.thinks, effort: self.effort };
        saved.write(&self.engine.session, &self.engine.backend, path)
    }

    /// Goes on with what [`Conversation::save`] wrote.
    ///
    /// # Errors
    /// The file cannot be used; the conversation stays as it was.
    pub fn load(&mut self, path: &Path) -> anyhow::Result<()> {
        let (saved, session) = Saved::read(path, &self.engine.backend, self.engine.context)?;
        self.set_thinking(saved.thinks, saved.effort)?;
        self.messages = saved.messages;
        self.engine.set_session(session);
        Ok(())
    }

    fn count(&mut self, figures: &Figures) {
        self.replies += 1;
        self.total.kept_tokens += figures.kept_tokens;
        self.total.again_tokens += figures.again_tokens;
        self.total.prefill.add(&figures.prefill);
        self.total.answer_tokens += figures.answer_tokens;
        self.total.decode.add(&figures.decode);
    }
}
