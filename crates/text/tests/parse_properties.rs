//! What holds of every turn, well-formed or not: how it is cut changes nothing, nothing is lost, and calls read back as they were
//! written.

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use text::dsml;
use text::parse::{EngineFinish, Event, Finish, ParseOptions, Position, Turn, TurnParser};
use text::prompt::{Call, Tool};

fn options(thinking: bool, with_tools: bool) -> ParseOptions {
    let schema =
        json!({"name": "f", "parameters": {"properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}});
    let tools =
        with_tools.then(|| vec![Tool::from_value(schema).unwrap(), Tool::from_value(json!({"name": "g"})).unwrap()]);
    ParseOptions { thinking, tools }
}

/// Feeds the pieces: the turn, its events joined, and the position at the end of each piece.
fn feed(pieces: &[&[u8]], options: &ParseOptions, finish: EngineFinish) -> (Turn, Vec<Event>, Vec<Position>) {
    let mut parser = TurnParser::new(options);
    let (mut joined, mut positions) = (Vec::new(), Vec::new());
    for piece in pieces {
        let mut events = Vec::new();
        parser.push(piece, &mut events);
        events.into_iter().for_each(|event| join(&mut joined, event));
        positions.push(parser.position());
    }
    let mut events = Vec::new();
    let turn = parser.finish(finish, &mut events);
    events.into_iter().for_each(|event| join(&mut joined, event));
    (turn, joined, positions)
}

fn join(joined: &mut Vec<Event>, event: Event) {
    match (joined.last_mut(), event) {
        (Some(Event::Reasoning(before)), Event::Reasoning(text)) => before.push_str(&text),
        (Some(Event::Content(before)), Event::Content(text)) => before.push_str(&text),
        (Some(Event::CallArguments { delta: before, .. }), Event::CallArguments { delta, .. }) => {
            before.push_str(&delta)
        }
        (_, event) => joined.push(event),
    }
}

/// Cuts `bytes` into pieces of the given sizes, over and over.
fn cut<'a>(bytes: &'a [u8], sizes: &[usize]) -> Vec<&'a [u8]> {
    let mut rest = bytes;
    let mut pieces = Vec::new();
    for &size in sizes.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (piece, after) = rest.split_at(size.clamp(1, rest.len()));
        pieces.push(piece);
        rest = after;
    }
    pieces
}

/// Texts made of what the parser looks for, and what it must not mistake for it.
fn markup() -> impl Strategy<Value = String> {
    let fragments = prop::sample::select(vec![
        "<think>",
        "</think>",
        "<｜DSML｜tool_calls>",
        "<｜DSML｜toolcalls>",
        "<tool_calls>",
        "<DSML｜tool_calls>",
        "<｜DSML｜invoke name=\"f\">",
        "<｜DSML｜invoke name=\"f\">\n",
        "<｜DSML｜invoke name=\"x\"/>",
        "<invoke name=\"g\">",
        "<｜DSML｜parameter name=\"a\" string=\"true\">",
        "<｜DSML｜parameter name=\"b\" string=\"false\">",
        "<｜DSML｜parameter name=\"c\">",
        "<｜DSML｜parameter name=\"arguments\" string=\"false\">",
        "</｜DSML｜parameter>",
        "</｜DSML｜parameter>\n",
        "</｜DSML｜invoke>",
        "</｜DSML｜tool_calls>",
        "</invoke>",
        "</tool_calls>",
        "&lt;/｜DSML｜parameter>",
        "<｜end▁of▁sentence｜>",
        "\n\n",
        " ",
        "<",
        "</",
        "<｜",
        "&",
        "{\"a\": \"x\"}",
        "{",
        "1",
        "\"",
        "\\",
        "text",
        "🙂",
        "é",
        "\t",
    ]);
    prop::collection::vec(fragments, 0..24).prop_map(|parts| parts.concat())
}

/// Any JSON value.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_filter("JSON has no others", |number| number.is_finite()).prop_map(Value::from),
        text().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((text(), inner), 0..4)
                .prop_map(|entries| Value::Object(entries.into_iter().collect())),
        ]
    })
}

/// A value whose floats are all spelt as Rust spells them: the writer spells them as Python does.
fn same_spelling(value: Value) -> Value {
    match value {
        Value::Number(number) if !number.is_i64() => json!(number.as_f64().unwrap().to_string()),
        Value::Array(items) => items.into_iter().map(same_spelling).collect(),
        Value::Object(entries) => entries.into_iter().map(|(key, value)| (key, same_spelling(value))).collect(),
        other => other,
    }
}

/// Any text, with every tag among them.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![".{0,20}", markup(), any::<String>()]
}

/// Names of tools, which are not empty.
fn name() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z_]{1,8}", ".{1,8}", markup().prop_filter("no name", |name| !name.is_empty())]
}

/// Names of parameters.
fn parameter_name() -> impl Strategy<Value = String> {
    prop_oneof![1 => Just(String::new()), 9 => name()]
}

/// Asserts that nothing of `said` disappeared but the tags that part a turn, and what follows a block.
fn assert_nothing_lost(turn: Turn, said: &str) -> Result<(), TestCaseError> {
    // Removing a tag may bring another one together.
    let tagless = |text: &str| {
        let once = text.replace("<think>", "").replace("</think>", "");
        once.replace("<think>", "").replace("</think>", "")
    };
    let found = tagless(&(turn.reasoning + &turn.content + turn.raw_block.as_deref().unwrap_or("")));
    let said = tagless(said);
    let rest = said.strip_prefix(&found);
    prop_assert!(rest.is_some(), "{:?} of {:?}", found, said);
    let rest = rest.unwrap_or_default();
    let Some(block) = turn.raw_block else {
        prop_assert_eq!(rest, "");
        return Ok(());
    };
    prop_assert!(block.matches("invoke").count() >= turn.calls.len() && !turn.calls.is_empty(), "{:?}", block);
    // A block is kept up to its closer, up to the last call if it had no opener, or all of it if it lacks closers.
    let closers = ["tool_calls>", "toolcalls>", "tool>", "invoke>", "/>"];
    let is_closed = closers.iter().any(|closer| tagless(&block).ends_with(closer));
    prop_assert!(is_closed || rest.trim_ascii().is_empty(), "{:?} is left of {:?}", rest, said);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(3_000) })]

    #[test]
    fn any_split_gives_the_same(
        text in markup(), thinking: bool, with_tools: bool, length: bool, sizes in prop::collection::vec(1usize..12, 1..5)
    ) {
        let options = options(thinking, with_tools);
        let finish = if length { EngineFinish::Length } else { EngineFinish::Stop };
        let bytes = text.as_bytes();
        let whole = feed(&[bytes], &options, finish);
        let pieces = cut(bytes, &sizes);
        let split = feed(&pieces, &options, finish);
        prop_assert_eq!((&split.0, &split.1), (&whole.0, &whole.1));
        let mut end = 0;
        for (piece, position) in pieces.iter().zip(&split.2) {
            end += piece.len();
            prop_assert_eq!(feed(&[&bytes[..end]], &options, finish).2[0], *position, "after {} bytes", end);
        }
    }

    #[test]
    fn any_bytes_give_the_same_as_their_text(bytes in prop::collection::vec(any::<u8>(), 0..60), size in 1usize..4) {
        let options = options(false, true);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let whole = feed(&[text.as_bytes()], &options, EngineFinish::Stop);
        let split = feed(&cut(&bytes, &[size]), &options, EngineFinish::Stop);
        prop_assert_eq!((split.0, split.1), (whole.0, whole.1));
    }

    #[test]
    fn deltas_are_the_result(text in markup(), thinking: bool, sizes in prop::collection::vec(1usize..12, 1..5)) {
        let options = options(thinking, true);
        let (turn, events, _) = feed(&cut(text.as_bytes(), &sizes), &options, EngineFinish::Stop);
        let (mut reasoning, mut content, mut calls) = (String::new(), String::new(), Vec::<Call>::new());
        let mut ended = 0;
        for event in &events {
            match event {
                Event::Reasoning(text) => reasoning.push_str(text),
                Event::Content(text) => content.push_str(text),
                Event::CallBegin { index, name } => {
                    prop_assert_eq!((*index, ended), (calls.len(), calls.len()));
                    calls.push(Call { name: name.clone(), ..Call::default() });
                }
                Event::CallArguments { index, delta } => calls[*index].arguments.push_str(delta),
                Event::CallEnd { index } => {
                    prop_assert_eq!(*index, ended);
                    ended += 1;
                    let arguments = serde_json::from_str::<Value>(&calls[*index].arguments);
                    prop_assert!(arguments.is_ok_and(|arguments| arguments.is_object()), "{:?}", calls[*index].arguments);
                }
            }
        }
        prop_assert_eq!((&reasoning, &content), (&turn.reasoning, &turn.content));
        prop_assert_eq!(turn.finish == Finish::ToolCalls, !turn.calls.is_empty());
        prop_assert_eq!(turn.raw_block.is_some(), !turn.calls.is_empty());
        if !turn.calls.is_empty() {
            prop_assert_eq!(calls, turn.calls);
        }
    }

    /// Nothing of a turn disappears but the tags that part it, EOS, and what follows a block.
    #[test]
    fn nothing_is_lost(text in markup(), thinking: bool) {
        let (turn, ..) = feed(&[text.as_bytes()], &options(thinking, true), EngineFinish::Stop);
        let said = text.strip_suffix("<｜end▁of▁sentence｜>").unwrap_or(&text);
        assert_nothing_lost(turn, said)?;
    }

    /// §7.2: what the canonical writer writes, the parser reads.
    #[test]
    fn written_calls_read_back(
        calls in prop::collection::vec((name(), prop::collection::vec((parameter_name(), value()), 0..4)), 1..4),
        before in "[a-z ]{0,10}[a-z]", size in 1usize..20
    ) {
        let written: Vec<Call> = calls.into_iter().map(|(name, arguments)| Call {
            id: None,
            name,
            arguments: Value::Object(Map::from_iter(arguments)).to_string(),
        }).collect();
        let block = dsml::to_string(&written);
        let text = format!("{before}{block}<｜end▁of▁sentence｜>");
        let options = ParseOptions { thinking: false, tools: Some(Vec::new()) };
        let (turn, ..) = feed(&cut(text.as_bytes(), &[size]), &options, EngineFinish::Stop);
        prop_assert_eq!((&turn.content, turn.finish, turn.malformed), (&before, Finish::ToolCalls, false));
        let arguments = |text: &str| same_spelling(serde_json::from_str(text).unwrap());
        let read: Vec<_> = turn.calls.iter().map(|call| (&call.name, arguments(&call.arguments))).collect();
        let expected: Vec<_> = written.iter().map(|call| (&call.name, arguments(&call.arguments))).collect();
        prop_assert_eq!(read, expected);
        prop_assert_eq!(turn.raw_block.unwrap(), block);
    }

    /// A block with a byte or two changed, removed or doubled is calls, text, or both, but never a panic or a loss.
    #[test]
    fn mutated_blocks_lose_nothing(
        value in text(), at in prop::collection::vec((any::<prop::sample::Index>(), 0u8..4), 1..4), thinking: bool, size in 1usize..9
    ) {
        let call = Call { id: None, name: "f".to_owned(), arguments: json!({"a": value, "b": [1, value]}).to_string() };
        let mut text: Vec<char> = format!("{}</think>Hi{}", if thinking { "r" } else { "" }, dsml::to_string(&[call])).chars().collect();
        for (at, change) in at {
            if text.is_empty() {
                break;
            }
            let at = at.index(text.len());
            match change {
                0 => drop(text.remove(at)),
                1 => text.insert(at, text[at]),
                2 => text[at] = '<',
                _ => text.truncate(at.max(1)),
            }
        }
        let text: String = text.into_iter().collect();
        let text = text.trim_end_matches("<｜end▁of▁sentence｜>"); // in a value that was cut off there
        let (turn, ..) = feed(&cut(text.as_bytes(), &[size]), &options(thinking, true), EngineFinish::Stop);
        assert_nothing_lost(turn, text)?;
    }
}
