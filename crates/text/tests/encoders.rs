//! Prompts against those of other encoders of the format, on conversations that `tools/encoders` generated.

mod common;
#[path = "common/official.rs"]
mod official;

use std::collections::BTreeMap;
use std::fs;

use serde_json::Value;
use sha2::{Digest, Sha256};
use text::prompt::{Effort, Message, Mode, PromptOptions, render};
use text::{Segment, Tokenizer, TokenizerData};

/// Every encoder's prompt of every conversation, byte for byte.
#[test]
fn prompts_equal_those_of_other_encoders() {
    let tokenizer = tokenizer();
    let mut compared: BTreeMap<String, usize> = BTreeMap::new();
    let mut different = Vec::new();
    let lines = lines("conversations.jsonl");
    for (index, line) in lines.iter().enumerate() {
        let segments = segments(&tokenizer, line);
        let prompt = common::spelt_out(&tokenizer, &segments);
        for (encoder, expected) in line["prompts"].as_object().unwrap() {
            let found = if encoder == "recipe" { with_controls_marked(&tokenizer, &segments) } else { prompt.clone() };
            if &digest(&found) != expected {
                different.push(format!("conversation {} by {encoder}: {}\n{found}\n", index + 1, line["messages"]));
            }
            *compared.entry(encoder.clone()).or_default() += 1;
        }
    }
    assert!(
        different.is_empty(),
        "{} differ, the first of them\n{}",
        different.len(),
        different[..different.len().min(3)].concat()
    );
    let expected = [("recipe", 431), ("sglang 0.5.12", 991), ("sglang 0.5.22", 994), ("vllm", 1157)];
    assert_eq!(compared, expected.map(|(encoder, count)| (encoder.to_owned(), count)).into());
    assert_eq!(lines.len(), 2148);
}

/// The rules by which prompts differ from those of DeepSeek's encoder of April, one conversation for each.
#[test]
fn differences_are_those_we_mean() {
    let tokenizer = tokenizer();
    let lines = lines("differences.jsonl");
    for line in &lines {
        let mut expected = line["reference"].as_str().unwrap().to_owned();
        for edit in line["edits"].as_array().unwrap() {
            let [theirs, ours] = [&edit[0], &edit[1]].map(|text| text.as_str().unwrap());
            assert_eq!(expected.matches(theirs).count(), 1, "{}", line["reason"]);
            expected = expected.replace(theirs, ours);
        }
        let found = common::spelt_out(&tokenizer, &segments(&tokenizer, line));
        assert_eq!(found, expected, "{}", line["reason"]);
    }
    assert_eq!(lines.len(), 10);
}

fn segments(tokenizer: &Tokenizer, line: &Value) -> Vec<Segment> {
    let messages: Vec<Message> = line["messages"].as_array().unwrap().iter().map(official::message).collect();
    let effort = line["effort"].as_str().map(|level| match level {
        "low" => Effort::Low,
        "high" => Effort::High,
        "max" => Effort::Max,
        _ => panic!("an unknown level: {level}"),
    });
    let options = PromptOptions {
        encoding: line["encoding"].as_str().unwrap().parse().unwrap(),
        mode: if line["mode"] == "chat" { Mode::Chat } else { Mode::Thinking { effort } },
        drop_reasoning: line["drop"].as_bool().unwrap(),
    };
    render(tokenizer, &messages, &options).unwrap()
}

/// The prompt with each control token between U+0001 and U+0002.
fn with_controls_marked(tokenizer: &Tokenizer, segments: &[Segment]) -> String {
    let spelt = segments.iter().map(|segment| match segment {
        Segment::Control(id) => format!("\u{1}{}\u{2}", String::from_utf8_lossy(tokenizer.token_bytes(*id))),
        Segment::Text(text) => text.clone(),
    });
    spelt.collect()
}

/// Length in bytes and the first 16 digits of SHA-256.
fn digest(prompt: &str) -> Value {
    let hash: String = Sha256::digest(prompt).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    serde_json::json!([prompt.len(), hash])
}

fn lines(file: &str) -> Vec<Value> {
    let path = common::repository_file("crates/text/tests/fixtures").join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The tiny vocabulary with the control tokens that it lacks: texts do not depend on ids.
fn tokenizer() -> Tokenizer {
    let mut data: TokenizerData = common::tiny_vocabulary();
    for task in ["action", "query", "authority", "domain", "title", "read_url", "latest_reminder"] {
        data.tokens.push(format!("<｜{task}｜>"));
        data.token_types.push(3);
    }
    Tokenizer::new(data).unwrap()
}
