//! Messages in the form that DeepSeek's encoder takes: OpenAI's, with tools, tasks and `wo_eos` on the message.

use serde_json::Value;
use text::prompt::{AssistantMessage, Call, Message, Tool};

/// Reads a message.
pub fn message(json: &Value) -> Message {
    let content = text(json, "content");
    let task = json.get("task").map(|task| serde_json::from_value(task.clone()).unwrap());
    let tools = || list(json, "tools").map(|tool| Tool::from_value(tool.clone()).unwrap()).collect();
    let response_format = || json.get("response_format").cloned();
    match json["role"].as_str().unwrap() {
        "system" => Message::System { content, tools: tools(), response_format: response_format() },
        "developer" => Message::Developer { content, tools: tools(), response_format: response_format() },
        "user" => Message::User { content, task },
        "tool" => Message::Tool { call_id: optional_text(json, "tool_call_id"), content },
        "latest_reminder" => Message::Reminder { content },
        "assistant" => Message::Assistant(AssistantMessage {
            reasoning: text(json, "reasoning_content"),
            content,
            calls: list(json, "tool_calls").map(call).collect(),
            raw_block: None,
            continued: json.get("wo_eos").is_some_and(|value| value.as_bool().unwrap()),
            task,
        }),
        role => panic!("a role without a message: {role}"),
    }
}

fn call(json: &Value) -> Call {
    let function = &json["function"];
    Call { id: optional_text(json, "id"), name: text(function, "name"), arguments: text(function, "arguments") }
}

fn list<'a>(json: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    json.get(key).into_iter().flat_map(|list| list.as_array().unwrap())
}

fn optional_text(json: &Value, key: &str) -> Option<String> {
    json.get(key).map(|value| value.as_str().unwrap().to_owned())
}

fn text(json: &Value, key: &str) -> String {
    optional_text(json, key).unwrap_or_default()
}
