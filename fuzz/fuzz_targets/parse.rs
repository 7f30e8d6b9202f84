//! Any bytes, cut anywhere: a turn parses as it does whole, its events are its result, and its markup says where the next byte falls.
//!
//!     mkdir -p fuzz/corpus/parse
//!     cargo +nightly fuzz run parse fuzz/corpus/parse fuzz/seeds/parse -- -max_total_time=60
//!
//! The first byte of the input chooses the options, the next four the sizes of the pieces.

#![no_main]

use libfuzzer_sys::fuzz_target;
use text::parse::{EngineFinish, Event, Finish, ParseOptions, Position, Turn, TurnParser};
use text::prompt::Tool;

fn options(choice: u8) -> ParseOptions {
    let schema = r#"{"name": "f", "parameters": {"required": ["a"], "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}}"#;
    let tool = Tool::from_value(serde_json::from_str(schema).expect("JSON")).expect("a tool");
    ParseOptions { thinking: choice & 1 != 0, tools: (choice & 2 != 0).then(|| vec![tool]) }
}

/// The turn, what its events add up to, and the position before its end.
fn feed<'a>(
    pieces: impl Iterator<Item = &'a [u8]>,
    options: &ParseOptions,
    finish: EngineFinish,
) -> (Turn, [String; 2], Vec<(String, String)>, Position) {
    let mut parser = TurnParser::new(options);
    let mut events = Vec::new();
    pieces.for_each(|piece| parser.push(piece, &mut events));
    let position = parser.position();
    let turn = parser.finish(finish, &mut events);
    let ([mut reasoning, mut content], mut calls) = ([String::new(), String::new()], Vec::new());
    for event in events {
        match event {
            Event::Reasoning(text) => reasoning.push_str(&text),
            Event::Content(text) => content.push_str(&text),
            Event::CallBegin { name, .. } => calls.push((name, String::new())),
            Event::CallArguments { index, delta } => calls[index].1.push_str(&delta),
            Event::CallEnd { .. } => {}
        }
    }
    (turn, [reasoning, content], calls, position)
}

fuzz_target!(|input: &[u8]| {
    let Some((&[choice, ref sizes @ ..], bytes)) = input.split_first_chunk::<5>() else { return };
    let options = options(choice);
    let finish = if choice & 4 != 0 { EngineFinish::Length } else { EngineFinish::Stop };
    let whole = feed(std::iter::once(bytes), &options, finish);
    let mut rest = bytes;
    let mut turn_of = sizes.iter().cycle();
    let pieces = std::iter::from_fn(|| {
        let size = usize::from(turn_of.next().expect("endless") % 16).clamp(1, rest.len().max(1));
        let (piece, after) = rest.split_at_checked(size)?;
        rest = after;
        Some(piece)
    });
    assert_eq!(feed(pieces, &options, finish), whole);
    let (turn, [reasoning, content], calls, _) = whole;
    assert_eq!((&turn.reasoning, &turn.content), (&reasoning, &content));
    assert_eq!(turn.finish == Finish::ToolCalls, !turn.calls.is_empty());
    if !turn.calls.is_empty() {
        assert_eq!(turn.calls.into_iter().map(|call| (call.name, call.arguments)).collect::<Vec<_>>(), calls);
        for (_, arguments) in calls {
            serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(&arguments).expect("a JSON object");
        }
    }
});
