//! What several APIs ask for in the same way.

use serde_json::Value;
use session::{Constrain, Logprobs, Sampling, ToolChoice};
use text::prompt::{Message, Mode, Tool};

use super::{Conversation, Defaults};
use crate::error::ApiError;
use crate::fields::{Fields, wrong};

/// Most stop strings of a request, and most bytes of one: every token's text is held against all of them.
const MAX_STOPS: usize = 64;
const MAX_STOP_BYTES: usize = 4096;
/// Longest name of a tool: MCP's limit, with its namespace.
const MAX_NAME_BYTES: usize = 128;

/// How the client asks for reasoning; `None` where it says nothing.
#[derive(Default)]
pub struct Reasoning {
    /// On or off.
    pub on: Option<bool>,
    /// How much.
    pub effort: Option<Mode>,
}

impl Reasoning {
    /// Takes `thinking`: a flag, or an object whose `type` is `enabled` or `disabled`; any other type leaves the choice to the rest.
    pub fn take_thinking(&mut self, fields: &mut Fields, name: &str) -> Result<(), ApiError> {
        let on = match fields.take(name) {
            None => None,
            Some(Value::Bool(on)) => Some(on),
            Some(Value::Object(object)) => match object.get("type").and_then(Value::as_str) {
                Some("enabled") => Some(true),
                Some("disabled") => Some(false),
                Some("adaptive" | "auto") => None,
                _ => {
                    let message = "expected `enabled`, `disabled` or `adaptive`";
                    return Err(fields.error(&format!("{name}.type"), message));
                }
            },
            Some(other) => return Err(wrong(&fields.path(name), &other, "true, false or {\"type\": …}")),
        };
        self.on = on.or(self.on);
        Ok(())
    }

    /// Takes the name of an effort.
    pub fn take_effort(&mut self, fields: &mut Fields, name: &str, defaults: &Defaults) -> Result<(), ApiError> {
        if let Some(effort) = fields.text(name)? {
            let mode = Mode::from_effort_name(&effort, defaults.encoding);
            self.effort = Some(mode.map_err(|error| fields.error(name, error.to_string()))?);
        }
        Ok(())
    }

    /// The mode that follows. `thinking` outranks effort, and the names of DeepSeek's hosted models count only where neither is given.
    pub fn mode(&self, model: Option<&str>, defaults: &Defaults) -> Mode {
        let thinking = |mode: Mode| match mode {
            Mode::Chat => Mode::default(),
            thinking => thinking,
        };
        match (self.on, self.effort, model) {
            (Some(false), _, _) => Mode::Chat,
            (Some(true), effort, _) => thinking(effort.unwrap_or(defaults.mode)),
            (None, Some(effort), _) => effort,
            (None, None, Some("deepseek-chat")) => Mode::Chat,
            (None, None, Some("deepseek-reasoner")) => thinking(defaults.mode),
            (None, None, _) => defaults.mode,
        }
    }
}

/// Takes the settings of sampling. In thinking mode they are checked and then left alone, unless they are to be respected.
pub fn take_sampling(fields: &mut Fields, mode: Mode, defaults: &Defaults) -> Result<Sampling, ApiError> {
    let default = defaults.sampling;
    let sampling = Sampling {
        temperature: fields.number("temperature", 0.0, 2.0)?.unwrap_or(default.temperature),
        top_p: fields.number("top_p", 0.0, 1.0)?.unwrap_or(default.top_p),
        min_p: fields.number("min_p", 0.0, 1.0)?.unwrap_or(default.min_p),
        top_k: fields.count("top_k")?.unwrap_or(default.top_k),
        presence_penalty: fields.number("presence_penalty", -2.0, 2.0)?.unwrap_or(default.presence_penalty),
        frequency_penalty: fields.number("frequency_penalty", -2.0, 2.0)?.unwrap_or(default.frequency_penalty),
    };
    let is_used = mode == Mode::Chat || defaults.respect_sampling;
    Ok(if is_used { sampling } else { default })
}

/// Takes stop strings: one, or a list.
pub fn take_stops(fields: &mut Fields, name: &str) -> Result<Vec<String>, ApiError> {
    let list = match fields.take(name) {
        None => Vec::new(),
        Some(Value::Array(list)) => list,
        Some(one) => vec![one],
    };
    if list.len() > MAX_STOPS {
        return Err(fields.error(name, format!("has {} strings, expected at most {MAX_STOPS}", list.len())));
    }
    let text = |value: Value| match value {
        Value::String(text) if text.len() <= MAX_STOP_BYTES => Ok(text),
        Value::String(text) => {
            let message = format!("holds a string of {} bytes, expected at most {MAX_STOP_BYTES}", text.len());
            Err(fields.error(name, message))
        }
        other => Err(wrong(&fields.path(name), &other, "a string or an array of strings")),
    };
    let stops: Vec<String> = list.into_iter().map(text).collect::<Result<_, _>>()?;
    Ok(stops.into_iter().filter(|stop| !stop.is_empty()).collect())
}

/// Takes `logit_bias`: an object from token numbers to biases.
pub fn take_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>, ApiError> {
    let name = "logit_bias";
    let map = match fields.take(name) {
        None => return Ok(Vec::new()),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(wrong(&fields.path(name), &other, "an object from token to bias")),
    };
    let entry = |(key, value): (&String, &Value)| {
        let token = key.parse().map_err(|_| fields.error(name, format!("{key:?} is no token's number")))?;
        let bias = value.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        let bias = bias.ok_or_else(|| wrong(&format!("{name}.{token}"), value, "a number from -100 to 100"))?;
        Ok((token, bias as f32))
    };
    map.iter().map(entry).collect()
}

/// Takes `top_logprobs`, how many of the likeliest tokens are told.
pub fn take_top_logprobs(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    match fields.count("top_logprobs")? {
        Some(top) if top > Logprobs::MAX_TOP => {
            Err(fields.error("top_logprobs", format!("is {top}, expected at most {}", Logprobs::MAX_TOP)))
        }
        top => Ok(top),
    }
}

/// Refuses everything but one answer.
pub fn take_n(fields: &mut Fields, name: &str) -> Result<(), ApiError> {
    match fields.count(name)? {
        None | Some(1) => Ok(()),
        Some(n) => Err(fields.error(name, format!("is {n}, but only 1 is supported: send the request {n} times"))),
    }
}

/// A schema of the answer.
pub fn schema(format: &mut Fields, name: &str) -> Result<Value, ApiError> {
    match format.take(name) {
        Some(schema @ Value::Object(_)) => Ok(schema),
        Some(other) => Err(wrong(&format.path(name), &other, "a JSON schema (an object)")),
        None => Err(format.error(name, "is missing")),
    }
}

/// A tool as the model sees it.
pub fn tool(path: &str, value: Value) -> Result<Tool, ApiError> {
    if let Some(description) = value.get("description").filter(|value| !value.is_string() && !value.is_null()) {
        return Err(wrong(&format!("{path}.description"), description, "a string"));
    }
    let tool = Tool::from_value(value).map_err(|error| ApiError::field(path, error.to_string()))?;
    let name = tool.name();
    let is_good = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.:/".contains(&byte);
    if name.len() <= MAX_NAME_BYTES && name.bytes().all(is_good) {
        return Ok(tool);
    }
    let shown: String = name.chars().take(MAX_NAME_BYTES).collect();
    let message = format!("has the name {shown:?}, expected at most {MAX_NAME_BYTES} of A-Z, a-z, 0-9, _ - . : /");
    Err(ApiError::field(path, message))
}

/// Whether a tool's calls are to fit its schema.
pub fn is_strict(tool: &Tool) -> bool {
    tool.schema().get("strict").and_then(Value::as_bool) == Some(true)
}

/// What a client asks of calls and answers, besides the tools themselves.
pub struct Demands {
    /// Whether tools are called.
    pub choice: ToolChoice,
    /// The schema of the answer.
    pub schema: Option<Value>,
    /// Whether calls are to fit their tools' schemas.
    pub strict: bool,
}

impl Demands {
    /// Writes tools and format into the first system message, one that is made if there is none, and what they ask for into the
    /// conversation.
    pub fn apply(
        self,
        conversation: &mut Conversation,
        messages: &mut Vec<Message>,
        tools: Vec<Tool>,
        defaults: &Defaults,
    ) -> Result<(), ApiError> {
        let tools = if self.choice == ToolChoice::None { Vec::new() } else { tools };
        if self.schema.is_some() && !tools.is_empty() {
            let message = "cannot be combined with tools: an answer that must be JSON cannot call any. \
                           Leave one of them out, or set tool_choice to none";
            return Err(ApiError::field(conversation.api.format_field(), message));
        }
        conversation.constrain = match &self.schema {
            Some(schema) => Constrain::Schema(schema.clone()),
            None if !tools.is_empty() && (self.strict || defaults.always_constrain) => Constrain::Calls,
            None => Constrain::Off,
        };
        conversation.choice = self.choice;
        conversation.tools.clone_from(&tools);
        if !tools.is_empty() || self.schema.is_some() {
            let is_system = |message: &Message| matches!(message, Message::System { .. });
            let at = messages.iter().position(is_system).unwrap_or_else(|| {
                messages.insert(0, Message::system(""));
                0
            });
            if let Message::System { tools: declared, response_format, .. } = &mut messages[at] {
                *declared = tools;
                *response_format = self.schema;
            }
        }
        Ok(())
    }
}

/// Refuses a conversation that ends with the model's turn, which it could only repeat.
pub fn check_last(api: super::Api, messages: &[Message], remedy: &str) -> Result<(), ApiError> {
    match messages.last() {
        None => Err(ApiError::field(api.input_field(), "is empty, expected at least one message")),
        Some(Message::Assistant(message)) if !message.continued => {
            Err(ApiError::field(api.input_field(), format!("ends with the assistant's turn: {remedy}")))
        }
        Some(_) => Ok(()),
    }
}
