//! What a conversation consists of.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "role", rename_all = "snake_case")]
pub enum Message {
    /// Instructions, rendered where they stand.
    System {
        /// The text.
        content: String,
        /// The tools that the model may call.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        tools: Vec<Tool>,
        /// The JSON schema that answers must follow.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        response_format: Option<Value>,
    },
    /// Instructions as DeepSeek's search pipeline gives them, in a user turn of their own. What OpenAI's clients
    /// call `developer` is [`Message::System`] (§3.2).
    Developer {
        /// The text.
        content: String,
        /// The tools that the model may call.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        tools: Vec<Tool>,
        /// The JSON schema that answers must follow.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        response_format: Option<Value>,
    },
    /// What the user says. Messages of users and tools that follow each other are one turn.
    User {
        /// The text.
        content: String,
        /// A task of one word that the model is to do with the turn instead of answering it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        task: Option<Task>,
    },
    /// What a tool put out.
    Tool {
        /// The id of the call that it answers.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        call_id: Option<String>,
        /// The output.
        content: String,
    },
    /// Facts of the moment (date, place) for the turn that follows.
    #[serde(rename = "latest_reminder")]
    Reminder {
        /// The text.
        content: String,
    },
    /// What the model answered.
    Assistant(AssistantMessage),
}

impl Message {
    /// A system message without tools.
    pub fn system(content: impl Into<String>) -> Self {
        Self::System { content: content.into(), tools: Vec::new(), response_format: None }
    }

    /// A user message.
    pub fn user(content: impl Into<String>) -> Self {
        Self::User { content: content.into(), task: None }
    }

    /// The output of the tool called with `call_id`.
    pub fn tool(call_id: impl Into<String>, content: impl Into<String>) -> Self {
        Self::Tool { call_id: Some(call_id.into()), content: content.into() }
    }

    /// The tools that the message declares.
    pub fn tools(&self) -> &[Tool] {
        match self {
            Self::System { tools, .. } | Self::Developer { tools, .. } => tools,
            _ => &[],
        }
    }
}

/// What the model answered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AssistantMessage {
    /// The reasoning before the answer; empty if there was none.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reasoning: String,
    /// The answer.
    pub content: String,
    /// The tools that it called after the answer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub calls: Vec<Call>,
    /// The calls' block exactly as it was generated, separator included; replayed instead of the canonical
    /// form.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub raw_block: Option<String>,
    /// Whether the model is to go on with this message: it is left open, without EOS. Only for the last
    /// message.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub continued: bool,
    /// A task that the model is to do after this message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task: Option<Task>,
}

/// A call of a tool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// The id by which the tool's output names the call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The tool's name.
    pub name: String,
    /// JSON object text, as OpenAI's API has it.
    pub arguments: String,
}

/// A quick instruction: the model answers with a few words and without reasoning (§3.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// Decide what to do next.
    Action,
    /// Words to search for.
    Query,
    /// Whether authoritative sources are called for.
    Authority,
    /// The domain of the question.
    Domain,
    /// A title of the conversation.
    Title,
    /// Whether to read an address.
    ReadUrl,
}

impl Task {
    /// The text of the task's control token.
    pub(super) fn token(self) -> &'static str {
        match self {
            Self::Action => "<｜action｜>",
            Self::Query => "<｜query｜>",
            Self::Authority => "<｜authority｜>",
            Self::Domain => "<｜domain｜>",
            Self::Title => "<｜title｜>",
            Self::ReadUrl => "<｜read_url｜>",
        }
    }
}

/// A tool that the model may call: OpenAI's `function` object, its keys in the order received.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub struct Tool {
    schema: Map<String, Value>,
}

/// JSON that declares no tool.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// Not an object at all.
    #[error("a tool is {found}, expected an object like {{\"type\": \"function\", \"function\": {{\"name\": …}}}}")]
    NotAnObject {
        /// The JSON.
        found: Value,
    },
    /// A tool of another type than `function`.
    #[error("a tool's type is {found}, expected \"function\": no other type can be called")]
    NotAFunction {
        /// The type.
        found: Value,
    },
    /// No name to call it by.
    #[error("a tool has the name {found:?}, expected a text that is not empty: give it a \"name\"")]
    NoName {
        /// What stands at `name`, if anything.
        found: Option<Value>,
    },
    /// The parameters are no JSON schema.
    #[error("the parameters of the tool `{tool}` are {found}, expected a JSON schema (an object)")]
    ParametersNotAnObject {
        /// The tool's name.
        tool: String,
        /// What stands at `parameters`.
        found: Value,
    },
}

impl Tool {
    /// Reads a tool in OpenAI's form `{"type": "function", "function": {…}}`, the inner object alone, or
    /// Anthropic's form, whose `input_schema` becomes `parameters`.
    ///
    /// # Errors
    /// [`ToolError`] if it is neither, or has no name.
    pub fn from_value(value: Value) -> Result<Self, ToolError> {
        let Value::Object(mut object) = value else { return Err(ToolError::NotAnObject { found: value }) };
        if let Some(function) = object.remove("function") {
            if let Some(found) = object.remove("type").filter(|kind| kind != "function") {
                return Err(ToolError::NotAFunction { found });
            }
            return Self::from_value(function);
        }
        let schema = match object.remove("input_schema") {
            Some(parameters) => openai_form(&mut object, parameters),
            None => object,
        };
        let tool = match schema.get("name") {
            Some(Value::String(name)) if !name.is_empty() => name.clone(),
            found => return Err(ToolError::NoName { found: found.cloned() }),
        };
        match schema.get("parameters") {
            None | Some(Value::Object(_) | Value::Null) => Ok(Self { schema }),
            Some(found) => Err(ToolError::ParametersNotAnObject { tool, found: found.clone() }),
        }
    }

    /// The name that calls use.
    pub fn name(&self) -> &str {
        self.schema["name"].as_str().expect("from_value let only texts pass")
    }

    /// The JSON schema of the arguments, if declared.
    pub fn parameters(&self) -> Option<&Value> {
        self.schema.get("parameters").filter(|parameters| parameters.is_object())
    }

    /// The whole `function` object.
    pub fn schema(&self) -> &Map<String, Value> {
        &self.schema
    }
}

/// A tool of Anthropic's API under the names of OpenAI's.
fn openai_form(object: &mut Map<String, Value>, parameters: Value) -> Map<String, Value> {
    let description = object.remove("description").map(|text| ("description", text));
    let name = object.remove("name").map(|name| ("name", name));
    let entries = name.into_iter().chain(description).chain([("parameters", parameters)]);
    entries.map(|(key, value)| (key.to_owned(), value)).collect()
}

impl TryFrom<Value> for Tool {
    type Error = ToolError;

    fn try_from(value: Value) -> Result<Self, ToolError> {
        Self::from_value(value)
    }
}

impl From<Tool> for Value {
    fn from(tool: Tool) -> Self {
        Value::Object(tool.schema)
    }
}
