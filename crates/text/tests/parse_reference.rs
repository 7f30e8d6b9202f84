//! Turns against SGLang's parser, which `tools/parsers/make_turns.py` ran. Where the two differ the specification says why.

mod common;

use std::collections::BTreeMap;

use serde_json::{Value, json};
use text::parse::{EngineFinish, ParseOptions, TurnParser};
use text::prompt::Tool;

/// Kinds of turns on which the parsers differ, in how many of 16, and the rule by which ours is right
/// (docs/spec/conversation.md §4.3, §4.4).
const DIFFERENCES: [(&str, usize, &str); 12] = [
    ("attributes in another order", 16, "rule 5 takes attributes in any order; SGLang drops the call"),
    ("cut inside a value", 16, "rules 8 and 9: the raw text is content and malformed; SGLang drops the text"),
    ("lost first bar", 16, "rule 4 knows this opener; SGLang leaves it in the content"),
    ("nested parameters", 16, "rule 5 makes an object of them; SGLang drops the call"),
    ("no block closer", 16, "rule 8 repairs what has all parameters closed; SGLang drops the calls"),
    ("no invoke closer", 16, "rule 5: the block's closer closes the call; SGLang drops the call"),
    ("no string attribute", 16, "rule 6 reads by schema, or as what it looks like; SGLang drops the call"),
    ("one newline before the block", 16, "rule 4 strips all space before the block; SGLang strips two newlines only"),
    ("plain XML", 16, "rule 4 knows these tags; SGLang leaves them in the content"),
    ("prose between tags", 16, "rule 9: malformed, never executed; SGLang skips the prose and makes the call"),
    ("space around a string", 16, "rule 6 keeps every byte; SGLang strips the value"),
    ("unknown tool", 16, "rule 10 surfaces it, so that the client can answer; SGLang drops the call"),
];

/// Content and calls of a turn whose markup is complete but for closers, by plain searching: what the rule of its kind asks for.
fn by_searching(kind: &str, turn: &Value) -> (Value, Value) {
    let text = turn["text"].as_str().unwrap();
    let marker = match kind {
        "lost first bar" => "DSML｜",
        "plain XML" => "",
        _ => "｜DSML｜",
    };
    let (content, block) = text.split_once(&format!("<{marker}tool_calls>")).unwrap();
    let [opener, parameter_opener, closer] =
        [format!("<{marker}invoke name=\""), format!("<{marker}parameter "), format!("</{marker}parameter>")];
    let calls = block.split(&opener).skip(1).map(|call| {
        let name = call.split('"').next().unwrap();
        let mut arguments = json!({});
        for parameter in call.split(&parameter_opener).skip(1) {
            let (header, value) = parameter.split_once('>').unwrap();
            let key = header.split("name=\"").nth(1).unwrap().split('"').next().unwrap();
            let Some((value, _)) = value.split_once(&closer) else { continue };
            let is_json = header.contains("string=\"false\"");
            arguments[key] = if is_json { serde_json::from_str(value).unwrap() } else { json!(value) };
        }
        json!([name, if kind == "nested parameters" { json!({"o": arguments}) } else { arguments }])
    });
    (json!(content.trim_ascii_end()), calls.collect())
}

#[test]
fn turns_parse_as_sglang_parses_them_but_for_known_differences() {
    let path = common::repository_file("crates/text/tests/fixtures/sglang_turns.json");
    let turns = common::read_json(&path);
    let tool = |name: &str| Tool::from_value(json!({"name": name})).unwrap();
    let options = ParseOptions { thinking: false, tools: Some(["read_file", "run", "search"].map(tool).into()) };
    let mut differences: BTreeMap<&str, usize> = BTreeMap::new();
    for turn in turns.as_array().unwrap() {
        let mut parser = TurnParser::new(&options);
        parser.push(turn["text"].as_str().unwrap().as_bytes(), &mut Vec::new());
        let found = parser.finish(EngineFinish::Stop, &mut Vec::new());
        let arguments = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        let calls: Vec<Value> = found.calls.iter().map(|call| json!([call.name, arguments(&call.arguments)])).collect();
        if (json!(found.content), json!(calls)) != (turn["content"].clone(), turn["calls"].clone()) {
            println!(
                "{}: {}\n  ours   {:?} {}\n  theirs {} {}",
                turn["kind"],
                turn["text"],
                found.content,
                json!(calls),
                turn["content"],
                turn["calls"]
            );
            let kind = turn["kind"].as_str().unwrap();
            let is_malformed = ["cut inside a value", "prose between tags"].contains(&kind);
            let expected = if is_malformed { (turn["text"].clone(), json!([])) } else { by_searching(kind, turn) };
            assert_eq!((json!(found.content), json!(calls), found.malformed), (expected.0, expected.1, is_malformed));
            *differences.entry(kind).or_default() += 1;
        }
    }
    assert_eq!(turns.as_array().unwrap().len(), 416);
    let expected: BTreeMap<&str, usize> = DIFFERENCES.iter().map(|&(kind, count, _)| (kind, count)).collect();
    assert_eq!(differences, expected);
}
