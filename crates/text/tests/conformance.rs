//! The cases of docs/spec/conversation_cases.json: prompts byte for byte, and their ids.

mod common;

use serde_json::Value;
use text::prompt::{AssistantMessage, Effort, Encoding, Message, Mode, PromptError, PromptOptions, render};

fn cases(kind: &str) -> Vec<Value> {
    let all = common::read_json(&common::repository_file("docs/spec/conversation_cases.json"));
    all["cases"].as_array().unwrap().iter().filter(|case| case["kind"] == kind).cloned().collect()
}

#[test]
fn tokenize_cases() {
    let tokenizer = common::v4();
    let cases = cases("tokenize");
    assert_eq!(cases.len(), 2);
    for case in cases {
        assert_eq!(case["input"]["parse_special"], true, "{}", case["id"]);
        let ids = tokenizer.encode_with_control(case["input"]["text"].as_str().unwrap());
        assert_eq!(ids, common::ids(&case["expected"]["token_ids"]), "{}", case["id"]);
    }
}

#[test]
fn render_cases_without_tools() {
    let tokenizer = common::v4();
    let mut passed = Vec::new();
    for case in cases("render") {
        let id = case["id"].as_str().unwrap();
        let messages = case["input"]["messages"].as_array().unwrap();
        if messages.iter().any(|message| message.get("tools").is_some()) {
            println!("skipped {id}: tools are not rendered yet");
            continue;
        }
        let messages: Vec<Message> = messages.iter().map(message).collect();
        let segments = render(&tokenizer, &messages, &options(&case["input"])).unwrap();
        assert_eq!(common::spelt_out(&tokenizer, &segments), case["expected"]["prompt"], "{id}");
        let ids = tokenizer.encode_segments(&segments);
        assert_eq!(ids.len() as u64, case["expected"]["n_tokens"].as_u64().unwrap(), "{id}");
        if let Some(expected) = case["expected"].get("token_ids") {
            assert_eq!(ids, common::ids(expected), "{id}");
        }
        passed.push(id.to_owned());
    }
    let expected = [
        "render-official-2",
        "render-chat-min",
        "render-chat-system-multiturn",
        "render-consecutive-users",
        "render-0731-high",
        "render-assistant-prefix",
    ];
    assert_eq!(passed, expected);
}

fn message(json: &Value) -> Message {
    let text = |key: &str| json.get(key).map_or("", |value| value.as_str().unwrap()).to_owned();
    match json["role"].as_str().unwrap() {
        "system" => Message::system(text("content")),
        "user" => Message::user(text("content")),
        "assistant" => Message::Assistant(AssistantMessage {
            reasoning: text("reasoning_content"),
            content: text("content"),
            continued: json.get("wo_eos").is_some_and(|value| value.as_bool().unwrap()),
            ..AssistantMessage::default()
        }),
        role => panic!("a role without a message: {role}"),
    }
}

fn options(input: &Value) -> PromptOptions {
    let effort = input["reasoning_effort"].as_str().map(|level| match level {
        "low" => Effort::Low,
        "high" => Effort::High,
        "max" => Effort::Max,
        _ => panic!("an unknown level: {level}"),
    });
    PromptOptions {
        encoding: input["encoding_variant"].as_str().unwrap().parse().unwrap(),
        mode: match input["thinking_mode"].as_str().unwrap() {
            "chat" => Mode::Chat,
            _ => Mode::Thinking { effort },
        },
        drop_reasoning: input["drop_thinking"].as_bool().unwrap(),
    }
}

/// The prefix of each level has the length in tokens that the spec gives (§3.7).
#[test]
fn effort_prefixes() {
    let tokenizer = common::v4();
    let prefix_tokens = |encoding, effort| {
        let options = PromptOptions { encoding, mode: Mode::Thinking { effort }, drop_reasoning: true };
        let messages = [Message::user("")];
        render(&tokenizer, &messages, &options).map(|segments| tokenizer.encode_segments(&segments).len() - 4)
    };
    let (low, high, max) = (Some(Effort::Low), Some(Effort::High), Some(Effort::Max));
    for (encoding, effort, expected) in [
        (Encoding::V4_2604, None, 0),
        (Encoding::V4_2604, high, 0),
        (Encoding::V4_2604, max, 79),
        (Encoding::V4_0731, None, 0),
        (Encoding::V4_0731, low, 0),
        (Encoding::V4_0731, high, 79),
        (Encoding::V4_0731, max, 92),
    ] {
        assert_eq!(prefix_tokens(encoding, effort).unwrap(), expected, "{encoding} {effort:?}");
    }
    let refused = prefix_tokens(Encoding::V4_2604, low);
    assert!(matches!(refused, Err(PromptError::UnknownEffort { .. })), "{refused:?}");
}
