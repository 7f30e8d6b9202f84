//! Runs the cases of a file like docs/spec/conversation_cases.json: render, tokenize and parse. The test
//! program `conformance` and the example of the same name share it.

use serde_json::{Value, json};
use text::Tokenizer;
use text::parse::{EngineFinish, Event, Finish, ParseOptions, Turn, TurnParser};
use text::prompt::{AssistantMessage, Call, Effort, Message, Mode, PromptOptions, Task, Tool, render};

use crate::common;

/// Sizes of the pieces, in characters, in which a parse case is fed.
const PIECES_CHARACTERS: [usize; 6] = [1, 2, 3, 5, 7, 13];
/// Sizes in bytes, which cut characters.
const PIECES_BYTES: [usize; 3] = [1, 2, 3];

/// What became of the cases.
#[derive(Debug, Default)]
pub struct Report {
    /// The cases that passed, by id.
    pub passed: Vec<String>,
    /// The cases that failed, by id, with the difference.
    pub failed: Vec<(String, String)>,
    /// The cases that were not run, by id, with the reason.
    pub skipped: Vec<(String, String)>,
}

/// What keeps a case from passing.
enum Fault {
    Failed(String),
    Skipped(String),
}

impl From<String> for Fault {
    fn from(difference: String) -> Self {
        Self::Failed(difference)
    }
}

/// Runs every case of `file`.
pub fn run(file: &Value, tokenizer: Option<&Tokenizer>) -> Report {
    let mut report = Report::default();
    for (index, case) in file["cases"].as_array().into_iter().flatten().enumerate() {
        let id = case["id"].as_str().map_or_else(|| format!("case {index}"), str::to_owned);
        let needed = || tokenizer.ok_or_else(|| Fault::Skipped("no tokenizer".to_owned()));
        let outcome = match case["kind"].as_str() {
            Some("render") => needed().and_then(|tokenizer| render_case(case, tokenizer)),
            Some("tokenize") => needed().and_then(|tokenizer| tokenize_case(case, tokenizer)),
            Some("parse") => parse_case(case).map_err(Fault::Failed),
            kind => Err(Fault::Failed(format!("the kind is {kind:?}, expected render, tokenize or parse"))),
        };
        match outcome {
            Ok(()) => report.passed.push(id),
            Err(Fault::Failed(difference)) => report.failed.push((id, difference)),
            Err(Fault::Skipped(reason)) => report.skipped.push((id, reason)),
        }
    }
    report
}

fn render_case(case: &Value, tokenizer: &Tokenizer) -> Result<(), Fault> {
    let messages = array(&case["input"], "messages")?.iter().map(message).collect::<Result<Vec<_>, _>>()?;
    let segments = render(tokenizer, &messages, &prompt_options(&case["input"])?).map_err(|error| error.to_string())?;
    equal("the prompt", &json!(common::spelt_out(tokenizer, &segments)), &case["expected"]["prompt"])?;
    compare_ids(case, tokenizer, &tokenizer.encode_segments(&segments))
}

fn tokenize_case(case: &Value, tokenizer: &Tokenizer) -> Result<(), Fault> {
    let text = text(&case["input"], "text")?;
    let with_control = case["input"]["parse_special"] != false;
    let ids = if with_control { tokenizer.encode_with_control(text) } else { tokenizer.encode(text) };
    compare_ids(case, tokenizer, &ids)
}

fn compare_ids(case: &Value, tokenizer: &Tokenizer, ids: &[u32]) -> Result<(), Fault> {
    let expected = &case["expected"];
    if tokenizer.vocab_size() != 129_280 {
        return Err(Fault::Skipped(format!("ids of another vocabulary, of {} tokens", tokenizer.vocab_size())));
    }
    if let Some(count) = expected.get("n_tokens") {
        equal("the number of tokens", &json!(ids.len()), count)?;
    }
    if let Some(expected) = expected.get("token_ids") {
        equal("the ids", &json!(ids), expected)?;
    }
    Ok(())
}

fn parse_case(case: &Value) -> Result<(), String> {
    let input = &case["input"];
    let text = text(input, "text")?;
    let options = parse_options(input)?;
    let finish = match input["engine_finish"].as_str() {
        Some("length") => EngineFinish::Length,
        _ => EngineFinish::Stop,
    };
    let characters: Vec<String> = text.chars().map(String::from).collect();
    let by_characters = PIECES_CHARACTERS.map(|size| {
        let pieces: Vec<Vec<u8>> = characters.chunks(size).map(|piece| piece.concat().into_bytes()).collect();
        (format!("in pieces of {size} characters"), pieces)
    });
    let by_bytes = PIECES_BYTES.map(|size| {
        let pieces: Vec<Vec<u8>> = text.as_bytes().chunks(size).map(<[u8]>::to_vec).collect();
        (format!("in pieces of {size} bytes"), pieces)
    });
    let whole = ("whole".to_owned(), vec![text.as_bytes().to_vec()]);
    for (how, pieces) in [whole].into_iter().chain(by_characters).chain(by_bytes) {
        let mut parser = TurnParser::new(&options);
        let mut events = Vec::new();
        for piece in &pieces {
            parser.push(piece, &mut events);
        }
        let turn = parser.finish(finish, &mut events);
        compare_turn(&turn, &case["expected"])
            .and_then(|()| compare_deltas(&turn, &events))
            .map_err(|fault| format!("{how}: {fault}"))?;
    }
    Ok(())
}

fn parse_options(input: &Value) -> Result<ParseOptions, String> {
    let declared = input["tools"].as_array().map(|tools| tools.iter().cloned().map(tool).collect());
    let named = || input["tool_names"].as_array().map(|names| names.iter().map(|n| tool(json!({"name": n}))).collect());
    let tools: Option<Result<_, _>> = declared.or_else(named);
    Ok(ParseOptions { thinking: input["thinking"] == true, tools: tools.transpose()? })
}

fn compare_turn(turn: &Turn, expected: &Value) -> Result<(), String> {
    equal("the reasoning", &json!(turn.reasoning), &expected["reasoning"])?;
    equal("the content", &json!(turn.content), &expected["content"])?;
    let calls = turn.calls.iter().map(|call| {
        let arguments: Value = serde_json::from_str(&call.arguments)
            .map_err(|error| format!("the arguments {:?} are no JSON: {error}", call.arguments))?;
        Ok(json!({"name": call.name, "arguments": arguments}))
    });
    let calls = calls.collect::<Result<Vec<_>, String>>()?;
    equal("the calls", &Value::Array(calls), &expected["tool_calls"])?;
    let finish = match turn.finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
        Finish::ToolCalls => "tool_calls",
    };
    equal("the finish", &json!(finish), &expected["finish_reason"])?;
    match expected.get("malformed") {
        Some(malformed) => equal("malformed", &json!(turn.malformed), malformed),
        None => Ok(()),
    }
}

/// What was streamed is what the turn holds, and all of it.
fn compare_deltas(turn: &Turn, events: &[Event]) -> Result<(), String> {
    let (mut reasoning, mut content) = (String::new(), String::new());
    let mut calls: Vec<Call> = Vec::new();
    for event in events {
        match event {
            Event::Reasoning(delta) => reasoning.push_str(delta),
            Event::Content(delta) => content.push_str(delta),
            Event::CallBegin { name, .. } => calls.push(Call { name: name.clone(), ..Call::default() }),
            Event::CallArguments { index, delta } => calls[*index].arguments.push_str(delta),
            Event::CallEnd { .. } => {}
        }
    }
    equal("the streamed reasoning", &json!(reasoning), &json!(turn.reasoning))?;
    equal("the streamed content", &json!(content), &json!(turn.content))?;
    if turn.finish == Finish::ToolCalls {
        equal("the streamed calls", &json!(calls), &json!(turn.calls))?;
    }
    Ok(())
}

fn equal(what: &str, found: &Value, expected: &Value) -> Result<(), String> {
    if found == expected { Ok(()) } else { Err(format!("{what}: found\n  {found}\nexpected\n  {expected}")) }
}

/// A message in the reference encoder's form.
fn message(json: &Value) -> Result<Message, String> {
    let content = joined_text(&json["content"]);
    let tools = || json["tools"].as_array().into_iter().flatten().cloned().map(tool).collect::<Result<Vec<_>, _>>();
    let response_format = json.get("response_format").filter(|format| !format.is_null()).cloned();
    let task = match json.get("task").filter(|task| !task.is_null()) {
        Some(task) => Some(serde_json::from_value::<Task>(task.clone()).map_err(|error| error.to_string())?),
        None => None,
    };
    Ok(match text(json, "role")? {
        "system" => Message::System { content, tools: tools()?, response_format },
        "developer" => Message::Developer { content, tools: tools()?, response_format },
        "user" => Message::User { content, task },
        "tool" => Message::Tool { call_id: json["tool_call_id"].as_str().map(str::to_owned), content },
        "latest_reminder" => Message::Reminder { content },
        "assistant" => Message::Assistant(AssistantMessage {
            reasoning: joined_text(&json["reasoning_content"]),
            content,
            calls: json["tool_calls"].as_array().into_iter().flatten().map(call).collect::<Result<_, _>>()?,
            raw_block: None,
            continued: json["wo_eos"] == true || json["prefix"] == true,
            task,
        }),
        role => return Err(format!("a role without a message: {role}")),
    })
}

/// Text, or the parts of a list joined by blank lines.
fn joined_text(content: &Value) -> String {
    let part = |part: &Value| match part["text"].as_str() {
        Some(text) => text.to_owned(),
        None => format!("[Unsupported {}]", part["type"].as_str().unwrap_or_default()),
    };
    match content {
        Value::Array(parts) => parts.iter().map(part).collect::<Vec<_>>().join("\n\n"),
        other => other.as_str().unwrap_or_default().to_owned(),
    }
}

fn call(json: &Value) -> Result<Call, String> {
    let function = json.get("function").unwrap_or(json);
    let arguments = match &function["arguments"] {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        object => object.to_string(),
    };
    Ok(Call { id: json["id"].as_str().map(str::to_owned), name: text(function, "name")?.to_owned(), arguments })
}

fn tool(json: Value) -> Result<Tool, String> {
    Tool::from_value(json).map_err(|error| error.to_string())
}

fn prompt_options(input: &Value) -> Result<PromptOptions, String> {
    let effort = match input["reasoning_effort"].as_str() {
        None => None,
        Some("low") => Some(Effort::Low),
        Some("high") => Some(Effort::High),
        Some("max") => Some(Effort::Max),
        Some(level) => return Err(format!("an unknown level: {level}")),
    };
    Ok(PromptOptions {
        encoding: text(input, "encoding_variant")?.parse().map_err(|error| format!("{error}"))?,
        mode: if input["thinking_mode"] == "chat" { Mode::Chat } else { Mode::Thinking { effort } },
        drop_reasoning: input["drop_thinking"] != false,
    })
}

fn text<'a>(object: &'a Value, key: &str) -> Result<&'a str, String> {
    object[key].as_str().ok_or_else(|| format!("`{key}` is {}, expected a text", object[key]))
}

fn array<'a>(object: &'a Value, key: &str) -> Result<&'a Vec<Value>, String> {
    object[key].as_array().ok_or_else(|| format!("`{key}` is {}, expected a list", object[key]))
}
