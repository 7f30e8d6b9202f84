//! Messages to turns: what stands together between two role tokens (docs/spec/conversation.md §3.3, §3.4).

use std::collections::HashMap;

use serde_json::Value;

use super::message::{AssistantMessage, Message, Task, Tool};

/// A part of a user turn.
#[derive(Clone, Copy)]
pub(super) enum Block<'a> {
    /// What the user says.
    Text(&'a str),
    /// What a tool put out.
    Result { call_id: Option<&'a str>, content: &'a str },
}

/// Instructions and what is appended to them.
#[derive(Clone, Copy)]
pub(super) struct Instructions<'a> {
    pub content: &'a str,
    pub tools: &'a [Tool],
    pub response_format: Option<&'a Value>,
}

/// One turn.
pub(super) enum Turn<'a> {
    System(Instructions<'a>),
    Developer(Instructions<'a>),
    User { blocks: Vec<Block<'a>>, task: Option<Task> },
    Reminder(&'a str),
    Assistant(&'a AssistantMessage),
}

impl Turn<'_> {
    /// Whether the turn begins with the user's role token.
    pub fn is_users(&self) -> bool {
        matches!(self, Self::User { .. } | Self::Developer(_))
    }

    /// The task that the model is to do after the turn.
    pub fn task(&self) -> Option<Task> {
        match self {
            Self::User { task, .. } => *task,
            Self::Assistant(message) => message.task,
            _ => None,
        }
    }
}

/// The turns of a conversation, tool results in the order of their calls.
pub(super) fn turns(messages: &[Message]) -> Vec<Turn<'_>> {
    let mut turns = Vec::with_capacity(messages.len());
    for message in messages {
        match message {
            Message::System { content, tools, response_format } => {
                turns.push(Turn::System(Instructions { content, tools, response_format: response_format.as_ref() }));
            }
            Message::Developer { content, tools, response_format } => {
                turns.push(Turn::Developer(Instructions { content, tools, response_format: response_format.as_ref() }));
            }
            Message::User { content, task } => push_text(&mut turns, content, *task),
            Message::Tool { call_id, content } => push_result(&mut turns, call_id.as_deref(), content),
            Message::Reminder { content } => turns.push(Turn::Reminder(content)),
            Message::Assistant(message) => turns.push(Turn::Assistant(message)),
        }
    }
    sort_results(&mut turns);
    turns
}

/// A user message joins the user turn before it, unless that one ends in a task.
fn push_text<'a>(turns: &mut Vec<Turn<'a>>, content: &'a str, new_task: Option<Task>) {
    match turns.last_mut() {
        Some(Turn::User { blocks, task: task @ None }) => {
            blocks.push(Block::Text(content));
            *task = new_task;
        }
        _ => turns.push(Turn::User { blocks: vec![Block::Text(content)], task: new_task }),
    }
}

/// A tool result joins the user turn before it.
fn push_result<'a>(turns: &mut Vec<Turn<'a>>, call_id: Option<&'a str>, content: &'a str) {
    let block = Block::Result { call_id, content };
    match turns.last_mut() {
        Some(Turn::User { blocks, .. }) => blocks.push(block),
        _ => turns.push(Turn::User { blocks: vec![block], task: None }),
    }
}

/// Puts the tool results of each turn into the order of the calls they answer, those of the latest assistant
/// turn with calls. Texts keep their places; an unknown id counts as the first call's.
fn sort_results(turns: &mut [Turn<'_>]) {
    let mut order: HashMap<&str, usize> = HashMap::new();
    for turn in turns {
        match turn {
            Turn::Assistant(message) if !message.calls.is_empty() => {
                let ids = message.calls.iter().map(|call| call.id.as_deref().unwrap_or_default()).enumerate();
                order = ids.filter(|(_, id)| !id.is_empty()).map(|(index, id)| (id, index)).collect();
            }
            Turn::User { blocks, .. } => {
                let position = |block: &Block<'_>| match block {
                    Block::Result { call_id: Some(id), .. } => order.get(id).copied().unwrap_or(0),
                    _ => 0,
                };
                let is_result = |block: &Block<'_>| matches!(block, Block::Result { .. });
                let mut results: Vec<_> = blocks.iter().copied().filter(is_result).collect();
                results.sort_by_key(position);
                for (place, result) in blocks.iter_mut().filter(|block| is_result(block)).zip(results) {
                    *place = result;
                }
            }
            _ => {}
        }
    }
}

/// Whether the conversation uses tools: then no reasoning is dropped. The reference encoder looks at declared
/// tools alone; here a history of calls or results counts too, whether or not this request declares any.
pub(super) fn uses_tools(messages: &[Message]) -> bool {
    messages.iter().any(|message| match message {
        Message::Tool { .. } => true,
        Message::Assistant(message) => !message.calls.is_empty() || message.raw_block.is_some(),
        other => !other.tools().is_empty(),
    })
}
