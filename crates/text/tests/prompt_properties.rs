//! What holds for the prompt of any conversation (docs/spec/conversation.md §7).

mod common;

use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use text::prompt::{AssistantMessage, Call, Encoding, Message, Mode, PromptOptions, Tool, render};
use text::{Segment, Tokenizer};

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let mut data = common::tiny_vocabulary();
    data.tokens.push("<｜latest_reminder｜>".to_owned());
    data.token_types.push(3);
    Tokenizer::new(data).unwrap()
});

const KEEPING: PromptOptions =
    PromptOptions { encoding: Encoding::V4_0731, mode: Mode::Thinking { effort: None }, drop_reasoning: false };
const DROPPING: PromptOptions = PromptOptions { drop_reasoning: true, ..KEEPING };
const CHAT: PromptOptions = PromptOptions { mode: Mode::Chat, ..KEEPING };

/// Text with every control token's text in it, and with the markup of calls and results.
fn hostile_text() -> impl Strategy<Value = String> {
    let ids = 0..TOKENIZER.vocab_size() as u32;
    let controls = ids.filter(|&id| TOKENIZER.is_control(id));
    let mut parts: Vec<String> =
        controls.map(|id| String::from_utf8(TOKENIZER.token_bytes(id).to_vec()).unwrap()).collect();
    parts.extend(
        [
            "</tool_result>",
            "</｜DSML｜parameter>",
            "&lt;/｜DSML｜parameter>",
            "<｜",
            "｜",
            "DSML",
            "think>",
            " ",
            "\n",
            "\"",
        ]
        .map(str::to_owned),
    );
    let part = prop_oneof![prop::sample::select(parts), any::<char>().prop_map(String::from)];
    prop::collection::vec(part, 0..12).prop_map(|parts| parts.concat())
}

fn tool(name: &str, text: &str) -> Tool {
    Tool::from_value(json!({"name": format!("f{name}"), "description": text, "parameters": {text: text}})).unwrap()
}

/// A call whose name, argument and nested argument are the texts.
fn call(name: &str, value: &str) -> Call {
    let arguments: Map<String, Value> =
        [(format!("a{name}"), json!(value)), (format!("b{name}"), json!([value, 1.5, {value: null}]))]
            .into_iter()
            .collect();
    Call { id: Some(name.to_owned()), name: name.to_owned(), arguments: Value::from(arguments).to_string() }
}

/// A conversation in which whatever a client can write is `text`.
fn written_by_clients(text: &str) -> Vec<Message> {
    let instructions = text.to_owned();
    let calls = vec![call(text, text), call("g", text)];
    vec![
        Message::System {
            content: instructions.clone(),
            tools: vec![tool(text, text)],
            response_format: Some(json!([text])),
        },
        Message::user(text),
        Message::Assistant(AssistantMessage { calls, ..AssistantMessage::default() }),
        Message::tool(text, text),
        Message::Tool { call_id: None, content: text.to_owned() },
        Message::Reminder { content: text.to_owned() },
        Message::Developer { content: instructions, tools: vec![tool("g", text)], response_format: None },
        Message::user(text),
    ]
}

/// A conversation of questions and answers. `texts` are those of the model.
fn history(texts: &'static [&'static str]) -> impl Strategy<Value = Vec<Message>> {
    let text = || prop::sample::select(vec!["", "a", "b c", "\n", "</think>", "é"]).prop_map(str::to_owned);
    let models_text = || prop::sample::select(texts).prop_map(str::to_owned);
    let answer = (models_text(), models_text(), prop::bool::weighted(0.1)).prop_map(|(reasoning, content, calls)| {
        let calls = if calls { vec![call("1", "x"), call("2", "y")] } else { Vec::new() };
        Message::Assistant(AssistantMessage { reasoning, content, calls, ..AssistantMessage::default() })
    });
    let preface = prop_oneof![
        text().prop_map(Message::system),
        text().prop_map(|content| Message::Reminder { content }),
        text().prop_map(Message::user),
    ];
    let question = prop_oneof![
        6 => text().prop_map(Message::user),
        1 => text().prop_map(|content| Message::tool("2", content)),
        1 => text().prop_map(|content| Message::tool("1", content)),
    ];
    let exchange = (prop::option::of(preface), prop::collection::vec(question, 1..4), answer)
        .prop_map(|(preface, questions, answer)| [preface.into_iter().collect(), questions, vec![answer]].concat());
    prop::collection::vec(exchange, 1..5).prop_map(|exchanges| exchanges.concat())
}

fn segments(messages: &[Message], options: &PromptOptions) -> Vec<Segment> {
    render(&TOKENIZER, messages, options).unwrap()
}

/// A turn in a prompt that keeps reasoning, and in one that drops it: the same, or the same without reasoning.
fn differs_by_reasoning_at_most(kept: &[Segment], dropped: &[Segment]) -> bool {
    let token = |text| Segment::Control(TOKENIZER.control(text).unwrap());
    let [assistant, think, end_think] = ["<｜Assistant｜>", "<think>", "</think>"].map(token);
    let Some(opener) = kept.iter().position(|segment| *segment == assistant) else { return kept == dropped };
    let (before, answer) = kept.split_at(opener + 1);
    let without_reasoning = || {
        let end = answer.iter().position(|segment| *segment == end_think)?;
        Some([before, &answer[end..]].concat())
    };
    kept == dropped || (answer.first() == Some(&think) && without_reasoning().is_some_and(|turn| turn == dropped))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1_000) })]

    /// The control tokens of a prompt are the same whatever its clients write.
    #[test]
    fn no_client_text_becomes_a_control_token(text in hostile_text()) {
        for options in [KEEPING, DROPPING, CHAT] {
            let controls = |text: &str| {
                let mut segments = segments(&written_by_clients(text), &options);
                segments.retain(|segment| matches!(segment, Segment::Control(_)));
                segments
            };
            prop_assert_eq!(controls(&text), controls("x"));
        }
    }

    /// The model's answer goes on from the prompt that it answered, and the next question from the answer.
    #[test]
    fn a_longer_conversation_begins_with_the_shorter(history in history(&["", "a", "<think>", "</think>"])) {
        let (answer, question) = history.split_last().unwrap();
        let next = [&history[..], &[Message::user("next")]].concat();
        for options in [KEEPING, CHAT] {
            let answered = segments(&history, &options);
            prop_assert!(answered.starts_with(&segments(question, &options)));
            prop_assert!(segments(&next, &options).starts_with(&answered));
        }
        // Undeclared tools are known by the first call: from it on, reasoning is kept.
        if matches!(answer, Message::Assistant(answer) if answer.calls.is_empty()) {
            prop_assert!(segments(&history, &DROPPING).starts_with(&segments(question, &DROPPING)));
        }
    }

    #[test]
    fn dropping_takes_reasoning_out_and_nothing_else(messages in history(&["", "why", "é\n"])) {
        let eos = Segment::Control(TOKENIZER.eos());
        let [kept, dropped] = [KEEPING, DROPPING].map(|options| segments(&messages, &options));
        let turns = |prompt: &[Segment]| prompt.split(|segment| *segment == eos).map(<[_]>::to_vec).collect::<Vec<_>>();
        let (kept, dropped) = (turns(&kept), turns(&dropped));
        prop_assert_eq!(kept.len(), dropped.len());
        for (kept, dropped) in kept.iter().zip(&dropped) {
            prop_assert!(differs_by_reasoning_at_most(kept, dropped), "{:?} {:?}", kept, dropped);
        }
    }

    #[test]
    fn conversations_are_saved_and_read_again(text in hostile_text(), history in history(&["", "a"])) {
        for messages in [written_by_clients(&text), history] {
            let saved = serde_json::to_string(&messages).unwrap();
            prop_assert_eq!(serde_json::from_str::<Vec<Message>>(&saved).unwrap(), messages);
        }
    }
}
