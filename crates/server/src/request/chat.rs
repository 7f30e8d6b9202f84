//! `/v1/chat/completions`.

use serde_json::{Value, json};
use session::ToolChoice;
use text::prompt::{AssistantMessage, Call, Message, Tool};

use super::settings::{self, Demands, Reasoning};
use super::{Api, Conversation, Defaults, Input};
use crate::error::ApiError;
use crate::fields::{Fields, wrong};

/// Reads a request.
pub fn read(mut fields: Fields, defaults: &Defaults) -> Result<Conversation, ApiError> {
    let model = fields.text("model")?;
    let mut messages = messages(&mut fields)?;
    settings::check_last(Api::Chat, &messages, "add a user message, or `\"prefix\": true` to have it continued")?;

    let (tools, strict) = tools(&mut fields)?;
    let (choice, schema) = (tool_choice(&mut fields)?, response_format(&mut fields)?);
    let mut conversation = Conversation::new(Api::Chat, Input::Messages(Vec::new()), defaults);
    Demands { choice, schema, strict }.apply(&mut conversation, &mut messages, tools, defaults)?;
    conversation.input = Input::Messages(messages);
    conversation.single_call = fields.flag("parallel_tool_calls")? == Some(false);

    conversation.mode = reasoning(&mut fields, defaults)?.mode(model.as_deref(), defaults);
    conversation.model = model;
    let wants_logprobs = fields.flag("logprobs")?;
    conversation.logprobs = match (wants_logprobs, settings::take_top_logprobs(&mut fields)?) {
        (Some(true), top) => Some(top.unwrap_or(0)),
        (_, None | Some(0)) => None,
        (_, Some(_)) => return Err(fields.error("top_logprobs", "needs `logprobs` to be true")),
    };
    common(&mut fields, &mut conversation, defaults)?;

    fields.only("modalities", &json!(["text"]), "only text is supported")?;
    for name in ["functions", "function_call"] {
        fields.only(name, &json!("none"), "is not supported: use `tools` and `tool_choice`")?;
    }
    for name in ["audio", "prediction", "web_search_options"] {
        fields.only(name, &Value::Null, "is not supported: leave it out")?;
    }
    fields.end(&[Api::Chat.ignored()], &defaults.ignored_fields)?;
    Ok(conversation)
}

/// What chat and text completions have in common.
pub fn common(fields: &mut Fields, conversation: &mut Conversation, defaults: &Defaults) -> Result<(), ApiError> {
    let limits = (fields.count("max_completion_tokens")?, fields.count("max_tokens")?);
    conversation.max_tokens = limits.0.or(limits.1).unwrap_or(defaults.max_tokens);
    conversation.sampling = settings::take_sampling(fields, conversation.mode, defaults)?;
    conversation.seed = fields.seed("seed")?;
    conversation.stop_strings = settings::take_stops(fields, "stop")?;
    conversation.logit_bias = settings::take_bias(fields)?;
    settings::take_n(fields, "n")?;
    conversation.stream = fields.flag("stream")?.unwrap_or(false);
    if let Some(mut options) = fields.object("stream_options")? {
        conversation.include_usage = options.flag("include_usage")?.unwrap_or(false);
        options.end(&[&["include_obfuscation"]], &defaults.ignored_fields)?;
    }
    Ok(())
}

/// Takes everything that says whether and how long the model reasons.
pub fn reasoning(fields: &mut Fields, defaults: &Defaults) -> Result<Reasoning, ApiError> {
    let mut reasoning = Reasoning::default();
    reasoning.take_thinking(fields, "think")?;
    reasoning.take_thinking(fields, "thinking")?;
    reasoning.take_effort(fields, "reasoning_effort", defaults)?;
    Ok(reasoning)
}

/// The messages.
fn messages(fields: &mut Fields) -> Result<Vec<Message>, ApiError> {
    let list = fields.list("messages")?.ok_or_else(|| fields.error("messages", "is missing"))?;
    let message = |(index, value)| message(Fields::new(format!("messages[{index}]"), value)?);
    list.into_iter().enumerate().map(message).collect()
}

fn message(mut fields: Fields) -> Result<Message, ApiError> {
    let role = fields.text("role")?.unwrap_or_else(|| "user".to_owned());
    let content = content(&mut fields, "content")?;
    Ok(match role.as_str() {
        "system" | "developer" => Message::system(content),
        "user" => Message::user(content),
        "tool" | "function" => Message::Tool { call_id: fields.text("tool_call_id")?, content },
        "assistant" => Message::Assistant(assistant(fields, content)?),
        other => {
            let expected = "expected `system`, `developer`, `user`, `assistant` or `tool`";
            return Err(fields.error("role", format!("is {other:?}, {expected}")));
        }
    })
}

fn assistant(mut fields: Fields, content: String) -> Result<AssistantMessage, ApiError> {
    let mut reasoning = self::content(&mut fields, "reasoning_content")?;
    if reasoning.is_empty() {
        reasoning = self::content(&mut fields, "reasoning")?;
    }
    let mut calls = Vec::new();
    for (index, value) in fields.list("tool_calls")?.unwrap_or_default().into_iter().enumerate() {
        calls.push(call(Fields::new(fields.path(&format!("tool_calls[{index}]")), value)?)?);
    }
    let continued = fields.flag("prefix")?.unwrap_or(false);
    Ok(AssistantMessage { reasoning, content, calls, continued, ..AssistantMessage::default() })
}

fn call(mut fields: Fields) -> Result<Call, ApiError> {
    let id = fields.text("id")?;
    let mut function = fields.object("function")?.ok_or_else(|| fields.error("function", "is missing"))?;
    let name = function.text("name")?.ok_or_else(|| function.error("name", "is missing"))?;
    let arguments = match function.take("arguments") {
        None => String::new(),
        Some(Value::String(text)) => text,
        Some(object @ Value::Object(_)) => object.to_string(),
        Some(other) => return Err(wrong(&function.path("arguments"), &other, "JSON in a string, or an object")),
    };
    Ok(Call { id, name, arguments })
}

/// A text, or the texts of a list of parts.
fn content(fields: &mut Fields, name: &str) -> Result<String, ApiError> {
    let parts = match fields.take(name) {
        None => return Ok(String::new()),
        Some(Value::String(text)) => return Ok(text),
        Some(Value::Array(parts)) => parts,
        Some(other) => return Err(wrong(&fields.path(name), &other, "a string or an array of parts")),
    };
    let mut whole = String::new();
    for (index, part) in parts.into_iter().enumerate() {
        if let Value::String(text) = part {
            whole.push_str(&text);
            continue;
        }
        let mut part = Fields::new(fields.path(&format!("{name}[{index}]")), part)?;
        match part.text("type")?.as_deref() {
            None | Some("text" | "input_text" | "output_text" | "refusal") => {
                let text = part.text("text")?;
                whole.push_str(&text.or(part.text("refusal")?).unwrap_or_default());
            }
            Some(other) => return Err(part.error("type", format!("is {other:?}, but only text is supported"))),
        }
    }
    Ok(whole)
}

/// The tools, and whether one of them is strict.
fn tools(fields: &mut Fields) -> Result<(Vec<Tool>, bool), ApiError> {
    let list = fields.list("tools")?.unwrap_or_default();
    let tool = |(index, value)| settings::tool(&format!("tools[{index}]"), value);
    let tools = list.into_iter().enumerate().map(tool).collect::<Result<Vec<Tool>, _>>()?;
    let strict = tools.iter().any(settings::is_strict);
    Ok((tools, strict))
}

fn tool_choice(fields: &mut Fields) -> Result<ToolChoice, ApiError> {
    match fields.take("tool_choice") {
        None => Ok(ToolChoice::Auto),
        Some(Value::String(choice)) => choice_by_name(fields, &choice),
        Some(value) => {
            let mut choice = Fields::new("tool_choice", value)?;
            match choice.text("type")?.as_deref() {
                Some("function") => {
                    let mut function =
                        choice.object("function")?.ok_or_else(|| choice.error("function", "is missing"))?;
                    let name = function.text("name")?.ok_or_else(|| function.error("name", "is missing"))?;
                    Ok(ToolChoice::Named(name))
                }
                _ => Err(choice.error("type", "expected \"function\": no other kind of choice is supported")),
            }
        }
    }
}

/// A choice that is one word.
pub fn choice_by_name(fields: &Fields, choice: &str) -> Result<ToolChoice, ApiError> {
    match choice {
        "auto" => Ok(ToolChoice::Auto),
        "none" => Ok(ToolChoice::None),
        "required" => Ok(ToolChoice::Required),
        other => {
            let message =
                format!("is {other:?}, expected `auto`, `none`, `required` or a function's name in an object");
            Err(fields.error("tool_choice", message))
        }
    }
}

/// The schema of the answer, if it is to be JSON.
fn response_format(fields: &mut Fields) -> Result<Option<Value>, ApiError> {
    let Some(mut format) = fields.object("response_format")? else { return Ok(None) };
    match format.text("type")?.as_deref() {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(json!({"type": "object"}))),
        Some("json_schema") => {
            let mut wrapper = format.object("json_schema")?.ok_or_else(|| format.error("json_schema", "is missing"))?;
            settings::schema(&mut wrapper, "schema").map(Some)
        }
        _ => Err(format.error("type", "expected `text`, `json_object` or `json_schema`")),
    }
}
