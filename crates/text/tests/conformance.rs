//! The cases of docs/spec/conversation_cases.json: prompts byte for byte, their ids, and turns as they come in.

mod common;
#[path = "common/conformance.rs"]
mod conformance;

use text::prompt::{Effort, Encoding, Message, Mode, PromptError, PromptOptions, render};

#[test]
fn every_shared_case_passes() {
    let cases = common::read_json(&common::repository_file("docs/spec/conversation_cases.json"));
    let report = conformance::run(&cases, Some(&common::v4()));
    assert_eq!((&report.failed, &report.skipped), (&vec![], &vec![]));
    assert_eq!(report.passed.len(), 25);
}

/// A runner that passed everything would be of no use.
#[test]
fn a_wrong_case_fails() {
    let mut cases = common::read_json(&common::repository_file("docs/spec/conversation_cases.json"));
    for case in cases["cases"].as_array_mut().unwrap() {
        for value in case["expected"].as_object_mut().unwrap().values_mut() {
            *value = serde_json::json!(["something else"]);
        }
    }
    let report = conformance::run(&cases, Some(&common::v4()));
    assert_eq!((report.failed.len(), report.passed.len()), (25, 0));
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
