//! `/v1/messages`, Anthropic's API.

use std::collections::HashSet;

use serde_json::{Map, Value};
use session::ToolChoice;
use text::prompt::{AssistantMessage, Call, Message, Tool};

use super::settings::{self, Demands, Reasoning};
use super::{Api, Conversation, Defaults, Input};
use crate::error::ApiError;
use crate::fields::{Fields, wrong};

/// Beginnings of system texts that change from request to request and say nothing to the model.
const BILLING: &str = "x-anthropic-";

/// Reads a request.
pub fn read(mut fields: Fields, defaults: &Defaults) -> Result<Conversation, ApiError> {
    let max_tokens = fields.count("max_tokens")?.ok_or_else(|| fields.error("max_tokens", "is missing"))?;
    let conversation = read_to_count(fields, defaults)?;
    Ok(Conversation { max_tokens, ..conversation })
}

/// Reads a request that need not say how much to generate.
pub fn read_to_count(mut fields: Fields, defaults: &Defaults) -> Result<Conversation, ApiError> {
    fields.count("max_tokens")?;
    let model = fields.text("model")?;
    let mut messages = messages(&mut fields)?;
    if let Some(system) = system(&mut fields)? {
        messages.insert(0, Message::system(system));
    }
    continue_last(&mut messages);
    settings::check_last(Api::Messages, &messages, "add the results of its calls")?;

    let (tools, strict) = tools(&mut fields)?;
    let (choice, single_call) = tool_choice(&mut fields)?;
    let mut reasoning = Reasoning::default();
    reasoning.take_thinking(&mut fields, "thinking")?;
    reasoning.take_effort(&mut fields, "reasoning_effort", defaults)?;
    let mut schema = format(&mut fields, "output_format")?;
    if let Some(mut config) = fields.object("output_config")? {
        reasoning.take_effort(&mut config, "effort", defaults)?;
        schema = format(&mut config, "format")?.or(schema);
        config.end(&[&["task_budget"]], &defaults.ignored_fields)?;
    }

    let mut conversation = Conversation::new(Api::Messages, Input::Messages(Vec::new()), defaults);
    Demands { choice, schema, strict }.apply(&mut conversation, &mut messages, tools, defaults)?;
    conversation.input = Input::Messages(messages);
    conversation.single_call = single_call;
    conversation.mode = reasoning.mode(model.as_deref(), defaults);
    conversation.model = model;
    conversation.sampling = settings::take_sampling(&mut fields, conversation.mode, defaults)?;
    conversation.seed = fields.seed("seed")?;
    conversation.stop_strings = settings::take_stops(&mut fields, "stop_sequences")?;
    conversation.stream = fields.flag("stream")?.unwrap_or(false);
    for name in ["mcp_servers", "container"] {
        fields.only(name, &Value::Null, "is not supported: leave it out")?;
    }
    fields.end(&[Api::Messages.ignored()], &defaults.ignored_fields)?;
    Ok(conversation)
}

/// The system text: blocks on lines of their own, without those that only bill.
fn system(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let texts = match fields.take("system") {
        None => return Ok(None),
        Some(Value::String(text)) => vec![text],
        Some(Value::Array(blocks)) => {
            let text = |(index, block)| {
                let mut block = Fields::new(format!("system[{index}]"), block)?;
                block.text("text")?.ok_or_else(|| block.error("text", "is missing"))
            };
            blocks.into_iter().enumerate().map(text).collect::<Result<_, _>>()?
        }
        Some(other) => return Err(wrong("system", &other, "a string or an array of text blocks")),
    };
    let kept: Vec<String> = texts.into_iter().filter(|text| !text.starts_with(BILLING)).collect();
    Ok((!kept.is_empty()).then(|| kept.join("\n")))
}

/// The messages. A result must answer a call before it.
fn messages(fields: &mut Fields) -> Result<Vec<Message>, ApiError> {
    let list = fields.list("messages")?.ok_or_else(|| fields.error("messages", "is missing"))?;
    let (mut messages, mut calls) = (Vec::new(), HashSet::new());
    for (index, value) in list.into_iter().enumerate() {
        let mut message = Fields::new(format!("messages[{index}]"), value)?;
        let content = message.need("content")?;
        let blocks = blocks(&message.path("content"), content)?;
        match message.text("role")?.as_deref() {
            Some("user") => user(blocks, &calls, &mut messages)?,
            Some("assistant") => {
                let message = assistant(blocks)?;
                calls.extend(message.calls.iter().filter_map(|call| call.id.clone()));
                messages.push(Message::Assistant(message));
            }
            Some("system") => messages.push(Message::system(texts(blocks, "")?)),
            _ => return Err(message.error("role", "expected `user` or `assistant`")),
        }
    }
    Ok(messages)
}

/// The blocks of a content at `path`, a text being one.
fn blocks(path: &str, content: Value) -> Result<Vec<Fields>, ApiError> {
    match content {
        Value::String(text) => {
            let map = Map::from_iter([("type".into(), "text".into()), ("text".into(), text.into())]);
            Ok(vec![Fields::new(path, Value::Object(map))?])
        }
        Value::Array(blocks) => {
            let block = |(index, block)| Fields::new(format!("{path}[{index}]"), block);
            blocks.into_iter().enumerate().map(block).collect()
        }
        other => Err(wrong(path, &other, "a string or an array of blocks")),
    }
}

/// A user's blocks in their order.
fn user(content: Vec<Fields>, calls: &HashSet<String>, messages: &mut Vec<Message>) -> Result<(), ApiError> {
    for mut block in content {
        match block.text("type")?.as_deref() {
            Some("text") => messages.push(Message::user(needed(&mut block, "text")?)),
            Some("tool_result") => {
                let id = needed(&mut block, "tool_use_id")?;
                if !calls.contains(&id) {
                    let message = "answers no call of the messages before it: send the whole history";
                    return Err(block.error("tool_use_id", message));
                }
                let content = match block.take("content") {
                    None => String::new(),
                    Some(content) => texts(blocks(&block.path("content"), content)?, "\n\n")?,
                };
                messages.push(Message::tool(id, content));
            }
            _ => return Err(block.error("type", "expected `text` or `tool_result`: no other block is supported here")),
        }
    }
    Ok(())
}

/// The texts of blocks that are nothing else.
fn texts(blocks: Vec<Fields>, separator: &str) -> Result<String, ApiError> {
    let text = |mut block: Fields| match block.text("type")?.as_deref() {
        Some("text") => needed(&mut block, "text"),
        Some("tool_reference") => needed(&mut block, "tool_name"),
        _ => Err(block.error("type", "expected `text`: no other block is supported here")),
    };
    Ok(blocks.into_iter().map(text).collect::<Result<Vec<_>, _>>()?.join(separator))
}

fn assistant(blocks: Vec<Fields>) -> Result<AssistantMessage, ApiError> {
    let mut message = AssistantMessage::default();
    for mut block in blocks {
        match block.text("type")?.as_deref() {
            Some("text") => message.content.push_str(&needed(&mut block, "text")?),
            Some("thinking") => message.reasoning.push_str(&needed(&mut block, "thinking")?),
            Some("redacted_thinking") => {}
            Some("tool_use") => {
                let (id, name) = (needed(&mut block, "id")?, needed(&mut block, "name")?);
                let arguments = match block.take("input") {
                    None => "{}".to_owned(),
                    Some(object @ Value::Object(_)) => object.to_string(),
                    // So are arguments told that are no JSON.
                    Some(Value::String(text)) => text,
                    Some(other) => return Err(wrong(&block.path("input"), &other, "an object")),
                };
                message.calls.push(Call { id: Some(id), name, arguments });
            }
            _ => {
                return Err(
                    block.error("type", "expected `text`, `thinking` or `tool_use`: no other block is supported here")
                );
            }
        }
    }
    Ok(message)
}

/// A text that must be there.
fn needed(block: &mut Fields, name: &str) -> Result<String, ApiError> {
    block.text(name)?.ok_or_else(|| block.error(name, "is missing"))
}

/// A last message of the assistant's without calls is one to go on with.
fn continue_last(messages: &mut [Message]) {
    if let Some(Message::Assistant(message)) = messages.last_mut() {
        message.continued = message.calls.is_empty();
    }
}

/// The tools, and whether one of them is strict. Those that run on Anthropic's servers have no schema and are left out.
fn tools(fields: &mut Fields) -> Result<(Vec<Tool>, bool), ApiError> {
    let (mut tools, mut strict) = (Vec::new(), false);
    for (index, value) in fields.list("tools")?.unwrap_or_default().into_iter().enumerate() {
        let path = format!("tools[{index}]");
        let mut tool = Fields::new(&path, value)?;
        let kind = tool.text("type")?;
        let Some(schema) = tool.take("input_schema") else {
            match kind.as_deref() {
                None | Some("custom") => return Err(tool.error("input_schema", "is missing")),
                Some(_) => continue,
            }
        };
        strict |= tool.flag("strict")?.unwrap_or(false);
        let mut declared = Map::new();
        declared.insert("name".into(), tool.need("name")?);
        if let Some(description) = tool.text("description")? {
            declared.insert("description".into(), description.into());
        }
        declared.insert("input_schema".into(), schema);
        tools.push(settings::tool(&path, Value::Object(declared))?);
    }
    Ok((tools, strict))
}

/// The choice, and whether only one call may be made.
fn tool_choice(fields: &mut Fields) -> Result<(ToolChoice, bool), ApiError> {
    let Some(mut choice) = fields.object("tool_choice")? else { return Ok((ToolChoice::Auto, false)) };
    let single = choice.flag("disable_parallel_tool_use")?.unwrap_or(false);
    let choice = match choice.text("type")?.as_deref() {
        Some("auto") => ToolChoice::Auto,
        Some("none") => ToolChoice::None,
        Some("any") => ToolChoice::Required,
        Some("tool") => ToolChoice::Named(needed(&mut choice, "name")?),
        _ => return Err(choice.error("type", "expected `auto`, `none`, `any` or `tool`")),
    };
    Ok((choice, single))
}

/// The schema of the answer, if it is to be JSON.
fn format(fields: &mut Fields, name: &str) -> Result<Option<Value>, ApiError> {
    let Some(mut format) = fields.object(name)? else { return Ok(None) };
    match format.text("type")?.as_deref() {
        Some("json_schema") => settings::schema(&mut format, "schema").map(Some),
        _ => Err(format.error("type", "expected `json_schema`")),
    }
}
