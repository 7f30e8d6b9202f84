//! `/v1/responses`.

use std::collections::{HashMap, HashSet};
use std::mem;

use serde_json::{Map, Value, json};
use session::ToolChoice;
use text::prompt::{AssistantMessage, Call, Message, Tool};

use super::settings::{self, Demands, Reasoning};
use super::{Api, Conversation, Defaults, Earlier, Input, chat};
use crate::error::ApiError;
use crate::fields::{Fields, wrong};

/// Tools that run on OpenAI's servers and that clients offer unasked: they are left out, so that the model does not know of them.
const LEFT_OUT: [&str; 4] = ["image_generation", "web_search", "web_search_2025_08_26", "web_search_preview"];

/// Fields of a request that its response repeats.
const ECHOED: [&str; 12] = [
    "instructions",
    "max_output_tokens",
    "metadata",
    "parallel_tool_calls",
    "previous_response_id",
    "reasoning",
    "store",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_p",
];

/// What a call is to the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A function.
    Function,
    /// A tool that takes free text.
    Custom,
    /// A function of a namespace.
    Namespaced {
        /// The namespace.
        namespace: String,
        /// The function's name in it.
        name: String,
    },
    /// The client's search for tools.
    ToolSearch,
}

/// What only this API has.
#[derive(Clone, Debug, Default)]
pub struct ResponsesExtra {
    /// Tools that are not plain functions, by the name that the model knows.
    pub kinds: HashMap<String, Kind>,
    /// Whether reasoning is shown.
    pub shows_reasoning: bool,
    /// Whether the response is stored.
    pub store: bool,
    /// The response that this one goes on from.
    pub previous: Option<String>,
    /// The input items of this request alone.
    pub items: Vec<Value>,
    /// What the response repeats of the request.
    pub echo: Map<String, Value>,
}

/// Reads a request.
pub fn read(mut fields: Fields, defaults: &Defaults, earlier: Earlier<'_>) -> Result<Conversation, ApiError> {
    let mut echo = echo(&mut fields);
    let model = fields.text("model")?;
    let items = items(&mut fields)?;
    let previous = fields.text("previous_response_id")?;
    let mut history = previous.as_deref().map(earlier).transpose()?.unwrap_or_default();
    let earlier_items = history.len();
    history.extend(items.iter().cloned());

    let mut tools = Tools::default();
    for (index, value) in fields.list("tools")?.unwrap_or_default().into_iter().enumerate() {
        tools.declare(Fields::new(format!("tools[{index}]"), value)?)?;
    }
    let mut messages = History::read(history, earlier_items, &mut tools)?;
    if let Some(instructions) = fields.text("instructions")? {
        messages.insert(0, Message::system(instructions));
    }
    settings::check_last(Api::Responses, &messages, "add a user message, or the outputs of its calls")?;

    let choice = tool_choice(&mut fields)?;
    let schema = text_format(&mut fields, defaults)?;
    let mut conversation = Conversation::new(Api::Responses, Input::Messages(Vec::new()), defaults);
    let demands = Demands { choice, schema, strict: tools.strict };
    demands.apply(&mut conversation, &mut messages, tools.list, defaults)?;
    conversation.input = Input::Messages(messages);
    conversation.single_call = fields.flag("parallel_tool_calls")? == Some(false);

    let mut reasoning = Reasoning::default();
    let mut shows_reasoning = false;
    if let Some(mut object) = fields.object("reasoning")? {
        reasoning.take_effort(&mut object, "effort", defaults)?;
        for name in ["summary", "generate_summary"] {
            shows_reasoning |= match object.text(name)?.as_deref() {
                None | Some("none") => false,
                Some("auto" | "concise" | "detailed") => true,
                Some(_) => return Err(object.error(name, "expected `auto`, `concise` or `detailed`")),
            };
        }
        object.end(&[&["context", "mode"]], &defaults.ignored_fields)?;
    }
    conversation.mode = reasoning.mode(model.as_deref(), defaults);
    conversation.model = model;
    let limits = (fields.count("max_output_tokens")?, fields.count("max_tokens")?);
    conversation.max_tokens = limits.0.or(limits.1).unwrap_or(defaults.max_tokens);
    // As it was read: a client may write a whole number in any way.
    limits.0.into_iter().for_each(|limit| drop(echo.insert("max_output_tokens".into(), limit.into())));
    conversation.sampling = settings::take_sampling(&mut fields, conversation.mode, defaults)?;
    conversation.seed = fields.seed("seed")?;
    conversation.stream = fields.flag("stream")?.unwrap_or(false);
    conversation.responses = ResponsesExtra {
        kinds: tools.kinds,
        shows_reasoning,
        store: fields.flag("store")?.unwrap_or(true),
        previous,
        items,
        echo,
    };

    fields.only("background", &json!(false), "is not supported: responses are made at once")?;
    fields.only("top_logprobs", &json!(0), "is not supported here: use /v1/chat/completions")?;
    fields.only("conversation", &Value::Null, "is not supported: use previous_response_id, or send the whole input")?;
    fields.only("prompt", &Value::Null, "is not supported: send the prompt's text as instructions")?;
    take_metadata(&mut fields)?;
    fields.end(&[Api::Responses.ignored()], &defaults.ignored_fields)?;
    Ok(conversation)
}

/// Takes `metadata`, within OpenAI's limits; it is repeated and stored.
fn take_metadata(fields: &mut Fields) -> Result<(), ApiError> {
    const MOST: (usize, usize, usize) = (16, 64, 512);
    let Some(metadata) = fields.object("metadata")? else { return Ok(()) };
    let (path, map) = metadata.into_parts();
    let is_good = |(key, value): (&String, &Value)| {
        let text = value.as_str();
        key.chars().count() <= MOST.1 && text.is_some_and(|text| text.chars().count() <= MOST.2)
    };
    if map.len() <= MOST.0 && map.iter().all(is_good) {
        return Ok(());
    }
    let (pairs, key, value) = MOST;
    let message = format!("expected at most {pairs} pairs of a key of {key} characters and a string of {value}");
    Err(ApiError::field(path, message))
}

/// What the response will repeat.
fn echo(fields: &mut Fields) -> Map<String, Value> {
    let mut echo: Map<String, Value> =
        ECHOED.iter().filter_map(|name| Some(((*name).to_owned(), fields.peek(name)?.clone()))).collect();
    if let Some(Value::Array(tools)) = echo.get_mut("tools") {
        tools.iter_mut().filter_map(Value::as_object_mut).for_each(say_all_of_function);
    }
    echo
}

/// Gives a function the form that responses have: its fields at the top, and its type.
fn say_all_of_function(tool: &mut Map<String, Value>) {
    if tool.get("type").is_none_or(|kind| kind.is_null() || kind == "function") {
        let function = tool.shift_remove("function");
        tool.insert("type".into(), "function".into());
        if let Some(Value::Object(function)) = function {
            tool.extend(function);
        }
    }
}

/// The input items; a text is a user's message.
fn items(fields: &mut Fields) -> Result<Vec<Value>, ApiError> {
    match fields.need("input")? {
        Value::String(text) => Ok(vec![json!({"type": "message", "role": "user", "content": text})]),
        Value::Array(items) => Ok(items),
        other => Err(wrong("input", &other, "a string or an array of items")),
    }
}

/// The tools declared so far.
#[derive(Default)]
struct Tools {
    list: Vec<Tool>,
    kinds: HashMap<String, Kind>,
    strict: bool,
}

impl Tools {
    /// Adds what an entry of `tools` declares.
    fn declare(&mut self, mut entry: Fields) -> Result<(), ApiError> {
        match entry.text("type")?.as_deref() {
            None | Some("function") => {
                let function = entry.object("function")?.unwrap_or(entry);
                self.function(function, None)
            }
            Some("custom") => self.custom(entry),
            Some("namespace") => self.namespace(entry),
            Some("tool_search") => self.tool_search(entry),
            Some(hosted) if LEFT_OUT.contains(&hosted) => Ok(()),
            Some(other) => Err(entry.error(
                "type",
                format!("is {other:?}, expected `function`, `custom`, `namespace` or `tool_search`: no other tool can be called"),
            )),
        }
    }

    /// Adds a function, whose name in `namespace` is given.
    fn function(&mut self, mut function: Fields, namespace: Option<&str>) -> Result<(), ApiError> {
        let path = function.path("name");
        if let Some(namespace) = namespace {
            let name = function.text("name")?.ok_or_else(|| ApiError::field(path, "is missing"))?;
            let whole = format!("{namespace}{name}");
            self.kinds.insert(whole.clone(), Kind::Namespaced { namespace: namespace.to_owned(), name });
            function.set_first("name", whole.into());
        }
        let (path, map) = function.into_parts();
        let tool = settings::tool(&path, Value::Object(map))?;
        self.strict |= settings::is_strict(&tool);
        self.list.push(tool);
        Ok(())
    }

    /// A tool that takes free text is a function of one text.
    fn custom(&mut self, mut custom: Fields) -> Result<(), ApiError> {
        let name = custom.text("name")?.ok_or_else(|| custom.error("name", "is missing"))?;
        let mut description = custom.text("description")?.unwrap_or_default();
        let mut format = custom.object("format")?;
        if let Some(definition) = format.as_mut().map(|format| format.text("definition")).transpose()?.flatten() {
            description.push_str("\n\nThe input must follow this grammar:\n");
            description.push_str(&definition);
        }
        let parameters = json!({"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]});
        let path = custom.path("name");
        self.list
            .push(settings::tool(&path, json!({"name": name, "description": description, "parameters": parameters}))?);
        self.kinds.insert(name, Kind::Custom);
        Ok(())
    }

    fn namespace(&mut self, mut entry: Fields) -> Result<(), ApiError> {
        let namespace = entry.text("name")?.ok_or_else(|| entry.error("name", "is missing"))?;
        for (index, value) in entry.list("tools")?.unwrap_or_default().into_iter().enumerate() {
            let mut function = Fields::new(entry.path(&format!("tools[{index}]")), value)?;
            match function.text("type")?.as_deref() {
                None | Some("function") => self.function(function, Some(&namespace))?,
                Some(_) => return Err(function.error("type", "expected `function`")),
            }
        }
        Ok(())
    }

    fn tool_search(&mut self, mut entry: Fields) -> Result<(), ApiError> {
        let name = "tool_search";
        let description = entry.text("description")?.unwrap_or_else(|| "Searches for tools.".to_owned());
        let parameters = entry.take("parameters").unwrap_or_else(
            || json!({"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}),
        );
        let path = entry.path("parameters");
        let function = json!({"name": name, "description": description, "parameters": parameters});
        self.list.push(settings::tool(&path, function)?);
        self.kinds.insert(name.to_owned(), Kind::ToolSearch);
        Ok(())
    }
}

/// Input items that become messages.
#[derive(Default)]
struct History {
    messages: Vec<Message>,
    /// The assistant's turn that items still add to.
    turn: Option<AssistantMessage>,
    /// Ids of the calls so far.
    calls: HashSet<String>,
}

impl History {
    /// Reads `items`, the first `earlier` of which are not this request's.
    fn read(items: Vec<Value>, earlier: usize, tools: &mut Tools) -> Result<Vec<Message>, ApiError> {
        let mut history = History::default();
        for (index, value) in items.into_iter().enumerate() {
            let path = match index.checked_sub(earlier) {
                Some(index) => format!("input[{index}]"),
                None => format!("previous_response_id[{index}]"),
            };
            history.item(Fields::new(path, value)?, tools)?;
        }
        history.end_turn();
        Ok(history.messages)
    }

    fn item(&mut self, mut item: Fields, tools: &mut Tools) -> Result<(), ApiError> {
        let kind = item.text("type")?.unwrap_or_else(|| "message".to_owned());
        let is_text = matches!(kind.as_str(), "message" | "reasoning");
        match item.text("status")?.as_deref() {
            None | Some("completed") => {}
            Some("incomplete") if is_text => {}
            Some(_) => return Err(item.error("status", "expected `completed`")),
        }
        match kind.as_str() {
            "message" => self.message(item),
            "reasoning" => {
                let text = reasoning(&mut item)?;
                self.turn().reasoning.push_str(&text);
                Ok(())
            }
            "function_call" => {
                let namespace = item.text("namespace")?.unwrap_or_default();
                let name = needed(&mut item, "name")?;
                let arguments = needed(&mut item, "arguments")?;
                self.call(&mut item, format!("{namespace}{name}"), arguments)
            }
            "custom_tool_call" => {
                let (name, input) = (needed(&mut item, "name")?, needed(&mut item, "input")?);
                self.call(&mut item, name, json!({"input": input}).to_string())
            }
            "local_shell_call" | "web_search_call" | "tool_search_call" | "image_generation_call" => {
                let name = kind.trim_end_matches("_call").to_owned();
                let arguments = item.take("arguments").or_else(|| item.take("action")).unwrap_or_else(|| json!({}));
                self.call(&mut item, name, arguments.to_string())
            }
            "function_call_output" | "custom_tool_call_output" | "local_shell_call_output" => {
                let output = output(&mut item)?;
                self.output(&mut item, output)
            }
            "tool_search_output" => {
                let found = item.list("tools")?.unwrap_or_default();
                let names: Vec<_> = found.iter().filter_map(|tool| tool["name"].as_str()).map(str::to_owned).collect();
                for (index, value) in found.into_iter().enumerate() {
                    tools.declare(Fields::new(item.path(&format!("tools[{index}]")), value)?)?;
                }
                self.output(&mut item, format!("Tools found: {}", names.join(", ")))
            }
            "compaction" | "context_compaction" | "compaction_summary" => Ok(()),
            other => Err(item.error("type", format!("is {other:?}, which is not supported"))),
        }
    }

    fn message(&mut self, mut item: Fields) -> Result<(), ApiError> {
        let content = match item.take("content") {
            None => String::new(),
            Some(value) => content(&item.path("content"), value)?,
        };
        let message = match item.text("role")?.as_deref() {
            Some("assistant") => {
                self.turn().content.push_str(&content);
                return Ok(());
            }
            Some("user") => Message::user(content),
            Some("system" | "developer") => Message::system(content),
            _ => return Err(item.error("role", "expected `user`, `assistant`, `system` or `developer`")),
        };
        self.end_turn();
        self.messages.push(message);
        Ok(())
    }

    /// The assistant's turn under way.
    fn turn(&mut self) -> &mut AssistantMessage {
        self.turn.get_or_insert_default()
    }

    fn end_turn(&mut self) {
        if let Some(turn) = mem::take(&mut self.turn) {
            self.messages.push(Message::Assistant(turn));
        }
    }

    fn call(&mut self, item: &mut Fields, name: String, arguments: String) -> Result<(), ApiError> {
        let id = item.text("call_id")?.or(item.text("id")?);
        self.calls.extend(id.clone());
        self.turn().calls.push(Call { id, name, arguments });
        Ok(())
    }

    fn output(&mut self, item: &mut Fields, output: String) -> Result<(), ApiError> {
        let id = item.text("call_id")?.or(item.text("id")?).unwrap_or_default();
        if !self.calls.contains(&id) {
            let message = "answers no call of the input before it: send the whole history";
            return Err(item.error("call_id", message));
        }
        self.end_turn();
        self.messages.push(Message::tool(id, output));
        Ok(())
    }
}

/// A text that must be there.
fn needed(item: &mut Fields, name: &str) -> Result<String, ApiError> {
    item.text(name)?.ok_or_else(|| item.error(name, "is missing"))
}

/// The text of a reasoning item.
fn reasoning(item: &mut Fields) -> Result<String, ApiError> {
    let mut whole = String::new();
    for name in ["summary", "content"] {
        if let Some(value) = item.take(name) {
            whole.push_str(&content(&item.path(name), value)?);
        }
    }
    Ok(whole)
}

/// A text, or the texts of a list of parts.
fn content(path: &str, value: Value) -> Result<String, ApiError> {
    let parts = match value {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        other => return Err(wrong(path, &other, "a string or an array of parts")),
    };
    let mut whole = String::new();
    for (index, part) in parts.into_iter().enumerate() {
        let mut part = Fields::new(format!("{path}[{index}]"), part)?;
        match part.text("type")?.as_deref() {
            Some("input_text" | "output_text" | "text" | "summary_text" | "reasoning_text") => {
                whole.push_str(&needed(&mut part, "text")?);
            }
            Some("refusal") => whole.push_str(&needed(&mut part, "refusal")?),
            _ => return Err(part.error("type", "expected a type of text: nothing else is supported")),
        }
    }
    Ok(whole)
}

/// What a tool put out: a text, parts, or any other JSON.
fn output(item: &mut Fields) -> Result<String, ApiError> {
    match item.need("output")? {
        Value::Array(parts) if parts.iter().all(|part| part["type"].is_string()) => {
            content(&item.path("output"), Value::Array(parts))
        }
        Value::String(text) => Ok(text),
        other => Ok(other.to_string()),
    }
}

fn tool_choice(fields: &mut Fields) -> Result<ToolChoice, ApiError> {
    match fields.take("tool_choice") {
        None => Ok(ToolChoice::Auto),
        Some(Value::String(choice)) => chat::choice_by_name(fields, &choice),
        Some(value) => {
            let mut choice = Fields::new("tool_choice", value)?;
            match choice.text("type")?.as_deref() {
                Some("function" | "custom") => Ok(ToolChoice::Named(needed(&mut choice, "name")?)),
                _ => Err(choice.error("type", "expected `function` or `custom`: no other kind of choice is supported")),
            }
        }
    }
}

/// The schema of the answer, if it is to be JSON.
fn text_format(fields: &mut Fields, defaults: &Defaults) -> Result<Option<Value>, ApiError> {
    let Some(mut text) = fields.object("text")? else { return Ok(None) };
    let schema = match text.object("format")? {
        None => None,
        Some(mut format) => match format.text("type")?.as_deref() {
            Some("text") => None,
            Some("json_object") => Some(json!({"type": "object"})),
            Some("json_schema") => Some(settings::schema(&mut format, "schema")?),
            _ => return Err(format.error("type", "expected `text`, `json_object` or `json_schema`")),
        },
    };
    text.end(&[&["verbosity"]], &defaults.ignored_fields)?;
    Ok(schema)
}
