//! The rules of docs/spec/conversation.md §4.3 to §4.6, each by name; every turn whole and cut at every width.

use serde_json::{Value, json};
use text::parse::{EngineFinish, Event, Finish, ParseOptions, Position, Turn, TurnParser};
use text::prompt::Tool;

const LENGTH: EngineFinish = EngineFinish::Length;
const STOP: EngineFinish = EngineFinish::Stop;

/// `f` takes anything, `get_weather` declares a city, a number of days, and more.
fn tools() -> Vec<Tool> {
    let declared = [
        json!({"name": "f"}),
        json!({"name": "get_weather", "parameters": {"type": "object", "required": ["city"], "properties": {
            "city": {"type": "string"}, "days": {"type": "integer"}, "note": {"type": ["string", "null"]}, "where": {}
        }}}),
    ];
    declared.map(|tool| Tool::from_value(tool).unwrap()).into()
}

fn thinking() -> ParseOptions {
    ParseOptions { thinking: true, tools: Some(tools()) }
}

fn chat() -> ParseOptions {
    ParseOptions { thinking: false, tools: Some(tools()) }
}

fn feed(pieces: &[&[u8]], options: &ParseOptions, finish: EngineFinish) -> (Turn, Vec<Event>) {
    let mut parser = TurnParser::new(options);
    let mut events = Vec::new();
    for piece in pieces {
        parser.push(piece, &mut events);
    }
    let turn = parser.finish(finish, &mut events);
    (turn, events)
}

/// Parses `text` whole and in pieces of 1 to 40 bytes; all must agree.
fn parse(text: &str, options: &ParseOptions, finish: EngineFinish) -> Turn {
    let (turn, events) = feed(&[text.as_bytes()], options, finish);
    let joined = join(&events);
    for size in 1..=40 {
        let pieces: Vec<&[u8]> = text.as_bytes().chunks(size).collect();
        let (other, events) = feed(&pieces, options, finish);
        assert_eq!(other, turn, "in pieces of {size} bytes: {text:?}");
        assert_eq!(join(&events), joined, "in pieces of {size} bytes: {text:?}");
    }
    assert_eq!((&joined.0, &joined.1), (&turn.reasoning, &turn.content), "{text:?}");
    if turn.finish == Finish::ToolCalls {
        let calls: Vec<_> = turn.calls.iter().map(|call| (call.name.clone(), call.arguments.clone())).collect();
        assert_eq!(joined.2, calls, "{text:?}");
        let ends = events.iter().filter(|event| matches!(event, Event::CallEnd { .. })).count();
        assert_eq!(ends, calls.len(), "{text:?}");
    }
    turn
}

/// Reasoning, content and calls as the events have them.
fn join(events: &[Event]) -> (String, String, Vec<(String, String)>) {
    let (mut reasoning, mut content, mut calls) = (String::new(), String::new(), Vec::new());
    for event in events {
        match event {
            Event::Reasoning(text) => reasoning.push_str(text),
            Event::Content(text) => content.push_str(text),
            Event::CallBegin { name, .. } => calls.push((name.clone(), String::new())),
            Event::CallArguments { index, delta } => calls[*index].1.push_str(delta),
            Event::CallEnd { .. } => {}
        }
    }
    (reasoning, content, calls)
}

/// The calls of a turn as JSON.
fn calls(turn: &Turn) -> Vec<(&str, Value)> {
    let arguments = |text: &str| serde_json::from_str(text).unwrap_or_else(|error| panic!("{text}: {error}"));
    turn.calls.iter().map(|call| (call.name.as_str(), arguments(&call.arguments))).collect()
}

/// `[` and `]` stand for `<｜DSML｜` and `>`, `[/` for `</｜DSML｜`: the cases stay readable.
fn dsml(short: &str) -> String {
    short.replace("[/", "</｜DSML｜").replace('[', "<｜DSML｜").replace(']', ">")
}

/// A block with the one call `f`, of the given body.
fn block(body: &str) -> String {
    dsml(&format!("\n\n[tool_calls]\n[invoke name=\"f\"]\n{body}\n[/invoke]\n[/tool_calls]"))
}

fn only_call(text: &str, options: &ParseOptions) -> Value {
    let turn = parse(text, options, STOP);
    assert_eq!((turn.finish, turn.malformed, turn.calls.len()), (Finish::ToolCalls, false, 1), "{text:?}: {turn:?}");
    calls(&turn).remove(0).1
}

/// The arguments of the call in [`block`].
fn arguments(body: &str) -> Value {
    only_call(&block(body), &chat())
}

/// Not a block: the text is the content.
fn assert_content(text: &str, malformed: bool) {
    let turn = parse(text, &chat(), STOP);
    let found = (turn.content.as_str(), turn.calls.len(), turn.finish, turn.malformed, &turn.raw_block);
    assert_eq!(found, (text, 0, Finish::Stop, malformed, &None));
}

// The matrix of §4.4, row by row.

#[test]
fn canonical_several_calls_types() {
    let text = dsml(
        "Two.\n\n[tool_calls]\n[invoke name=\"f\"]\n[parameter name=\"s\" string=\"true\"]1[/parameter]\n\
         [parameter name=\"n\" string=\"false\"]1[/parameter]\n[/invoke]\n[invoke name=\"g\"]\n\n[/invoke]\n[/tool_calls]",
    );
    let turn = parse(&text, &chat(), STOP);
    assert_eq!(calls(&turn), [("f", json!({"s": "1", "n": 1})), ("g", json!({}))]);
    assert_eq!((turn.content.as_str(), turn.finish), ("Two.", Finish::ToolCalls));
    assert_eq!(turn.calls[0].arguments, r#"{"s": "1", "n": 1}"#);
    assert_eq!(turn.raw_block.unwrap(), text["Two.".len()..]);
}

#[test]
fn whitespace_in_string_values() {
    let value = " \t\n x \r\n\u{3000}\n ";
    let found = arguments(&format!("[parameter name=\"a\" string=\"true\"]{value}[/parameter]"));
    assert_eq!(found, json!({"a": value}));
}

#[test]
fn entities_in_values_stay() {
    let found = arguments("[parameter name=\"a\" string=\"true\"]&lt; &amp; &lt;/b&gt; &[/parameter]");
    assert_eq!(found, json!({"a": "&lt; &amp; &lt;/b&gt; &"}));
}

#[test]
fn escaped_closer() {
    let found = arguments("[parameter name=\"a\" string=\"true\"]x&lt;/｜DSML｜parameter]y&lt;/｜DSML｜[/parameter]");
    assert_eq!(found, json!({"a": "x</｜DSML｜parameter>y&lt;/｜DSML｜"}));
}

#[test]
fn invalid_json_is_a_string() {
    for invalid in ["[broken", "NaN", "", "{'a': 1}", "\"\\ud800\"", "01"] {
        let text = block("[parameter name=\"a\" string=\"false\"]VALUE[/parameter]").replace("VALUE", invalid);
        assert_eq!(only_call(&text, &chat()), json!({"a": invalid}));
    }
}

#[test]
fn string_attribute_missing() {
    let found = arguments("[parameter name=\"a\"]hello[/parameter][parameter name=\"b\"]{\"x\": 1}[/parameter]");
    assert_eq!(found, json!({"a": "hello", "b": {"x": 1}}));
    let text = dsml(
        "[tool_calls][invoke name=\"get_weather\"][parameter name=\"city\"]5[/parameter][parameter name=\"days\"] 3 [/parameter]\
         [parameter name=\"note\"]7[/parameter][parameter name=\"where\"]null[/parameter][/invoke][/tool_calls]",
    );
    assert_eq!(only_call(&text, &chat()), json!({"city": "5", "days": 3, "note": "7", "where": null}));
}

#[test]
fn block_closer_missing_at_the_end() {
    for missing in [1, 5, "/tool_calls]".len(), "[/tool_calls]".len()] {
        let short =
            "[tool_calls][invoke name=\"f\"][parameter name=\"a\" string=\"true\"]x[/parameter][/invoke][/tool_calls]";
        let cut = short.len() - missing;
        let text = dsml(&short[..cut]);
        let is_opener = short[..cut].ends_with('[');
        let text = text.strip_suffix(if is_opener { "｜DSML｜" } else { "" }).unwrap_or(&text);
        let turn = parse(text, &chat(), STOP);
        // A lone `<` could as well have begun another call.
        assert_eq!((turn.calls.len(), turn.malformed), if is_opener { (0, true) } else { (1, false) }, "{text}");
        let turn = parse(text, &chat(), LENGTH);
        assert_eq!((turn.calls.len(), turn.malformed, turn.finish), (0, true, Finish::Length), "{text}");
        assert_eq!((turn.content.as_str(), turn.raw_block), ("", None));
    }
}

#[test]
fn invoke_closer_missing() {
    let parameter = "[parameter name=\"a\" string=\"true\"]x[/parameter]";
    assert_eq!(
        only_call(&dsml(&format!("[tool_calls][invoke name=\"f\"]{parameter}[/tool_calls]")), &chat()),
        json!({"a": "x"})
    );
    let text = dsml(&format!("[tool_calls][invoke name=\"f\"]{parameter}[invoke name=\"g\"/]\n[/tool_calls]"));
    assert_eq!(calls(&parse(&text, &chat(), STOP)), [("f", json!({"a": "x"})), ("g", json!({}))]);
    let at_end = dsml(&format!("[tool_calls][invoke name=\"f\"]{parameter}\n</｜DSML｜inv"));
    assert_eq!(only_call(&at_end, &chat()), json!({"a": "x"}));
}

#[test]
fn toolcalls_and_tool_openers() {
    for opener in ["tool_calls", "toolcalls", "tool"] {
        for closer in ["tool_calls", "toolcalls", "tool"] {
            let text = dsml(&format!("Hi\n[{opener}][invoke name=\"f\"/][/{closer}]"));
            let turn = parse(&text, &chat(), STOP);
            assert_eq!((calls(&turn), turn.content.as_str()), (vec![("f", json!({}))], "Hi"));
            assert_eq!(turn.raw_block.unwrap(), text[2..]);
        }
    }
}

#[test]
fn lost_first_bar_and_plain_xml() {
    let body =
        "\n[invoke name=\"f\"]\n[parameter name=\"a\" string=\"true\"]</｜DSML｜parameter>[/parameter]\n[/invoke]\n";
    for marker in ["DSML｜", ""] {
        let text = format!("[tool_calls]{body}[/tool_calls]");
        let text = text.replace("[/", &format!("</{marker}")).replace('[', &format!("<{marker}")).replace(']', ">");
        assert_eq!(only_call(&text, &chat()), json!({"a": "</｜DSML｜parameter>"}));
    }
}

#[test]
fn plain_xml_that_is_only_mentioned_is_content() {
    assert_content("Write `<tool_calls>` and then <invoke name=\"f\"> inside.", false);
    assert_content("It ends with <tool_calls>\n", false);
    assert_content("<tool_calls><tool_calls> <invoke", false);
    assert_content("<tool_calls><invoke name=\"f\"><parameter name=\"a\" string=\"true\">x", true);
}

/// `<invoke` after `<tool_calls>` was enough to begin a call that could not be taken back.
#[test]
fn a_plain_call_in_prose_begins_nothing() {
    for name in ["x", "f"] {
        let text = format!("Use <tool_calls><invoke name=\"{name}\"> in XML.");
        assert_content(&text, false);
        let (_, events) = feed(&[text.as_bytes()], &chat(), STOP);
        assert_eq!(events, [Event::Content(text)]);
    }
    assert_content("<tool_calls><invoke name=\"x\"></invoke></tool_calls>", false);
}

#[test]
fn bare_invoke() {
    let call = "[invoke name=\"f\"][parameter name=\"a\" string=\"true\"]x[/parameter][/invoke]";
    for end in ["", "[/tool_calls]", "\n[/tool_calls]", " and more", "[/tool_c", "\n"] {
        let text = dsml(&format!("Hi {call}{end}"));
        let turn = parse(&text, &chat(), STOP);
        assert_eq!((calls(&turn), turn.content.as_str()), (vec![("f", json!({"a": "x"}))], "Hi"), "{end:?}");
    }
    assert_eq!(parse(&dsml(&format!("{call}\n{call}")), &chat(), STOP).calls.len(), 2);
    assert_content(&dsml("Hi [invoke name=\"unknown\"][/invoke]"), false);
    assert_content(&dsml("Hi [invoke name=\"f\"] is how it begins."), false);
    assert_content(&dsml("Hi [invoke name=\"f\"][parameter name=\"a\" string=\"true\"]x"), true);
}

#[test]
fn direct_json_body_and_self_closing() {
    let object = r#"{"a": [1, 2.50], "b": "<x>"}"#;
    let turn = parse(&block(" VALUE\n").replace("VALUE", object), &chat(), STOP);
    assert_eq!(turn.calls[0].arguments, object);
    assert_eq!(only_call(&dsml("[tool_calls][invoke name=\"f\" /][/tool_calls]"), &chat()), json!({}));
    let text = block("{\"a\": 1");
    assert_content(&text, true);
    let cut = dsml("[tool_calls][invoke name=\"f\"] {\"a\": 1}\n</");
    assert_eq!(only_call(&cut, &chat()), json!({"a": 1}));
    assert_content(&dsml("[tool_calls][invoke name=\"f\"] {\"a\": 1"), true);
}

/// A closer inside a string of the JSON ended the call.
#[test]
fn a_closer_in_a_direct_json_body() {
    for closer in ["</｜DSML｜invoke>", "</｜DSML｜tool_calls>", "\\\"</｜DSML｜invoke>\\\\"] {
        let object = format!("{{\"a\": \"x{closer}y<\", \"b\": 1}}");
        let turn = parse(&block("VALUE").replace("VALUE", &object), &chat(), STOP);
        assert_eq!((turn.calls.len(), turn.malformed), (1, false), "{object}");
        assert_eq!(turn.calls[0].arguments, object);
    }
}

#[test]
fn nested_parameters() {
    let found = arguments(
        "[parameter name=\"o\"]\n[parameter name=\"x\" string=\"true\"]1[/parameter]\n[parameter name=\"p\"]\
         [parameter name=\"y\" string=\"false\"]2[/parameter][/parameter]\n[/parameter]\n\
         [parameter name=\"z\" string=\"false\"]3[/parameter]",
    );
    assert_eq!(found, json!({"o": {"x": "1", "p": {"y": 2}}, "z": 3}));
}

#[test]
fn a_value_with_a_parameter_opener_in_it() {
    let value = dsml("[parameter name=\"x\" string=\"true\"][invoke name=\"f\"][tool_calls][/tool_calls][/invoke]");
    let text = block("[parameter name=\"a\" string=\"true\"]VALUE[/parameter]").replace("VALUE", &value);
    assert_eq!(only_call(&text, &chat()), json!({"a": value}));
}

#[test]
fn duplicate_names_last_wins() {
    let body =
        "[parameter name=\"a\" string=\"true\"]1[/parameter][parameter name=\"a\" string=\"false\"]2[/parameter]";
    assert_eq!(arguments(body), json!({"a": 2}));
}

#[test]
fn dsml_quoted_in_reasoning_is_not_executed() {
    let reasoning = format!("Maybe{}", block("[parameter name=\"a\" string=\"true\"]1[/parameter]"));
    for after in ["</think>Answer", " then</think>Answer", "\n\n</think>Answer"] {
        let text = format!("{reasoning}{after}");
        let turn = parse(&text, &thinking(), STOP);
        let expected = text.split("</think>").next().unwrap();
        assert_eq!((turn.reasoning.as_str(), turn.content.as_str(), turn.calls.len()), (expected, "Answer", 0));
        assert!(!turn.malformed);
    }
}

#[test]
fn terminal_block_in_unclosed_reasoning() {
    let block = block("[parameter name=\"a\" string=\"true\"]1[/parameter]");
    for (end, finish) in [("", STOP), ("\n ", STOP), ("<｜end▁of▁sentence｜>", STOP), ("", LENGTH)] {
        let turn = parse(&format!("Look {block}{end}"), &thinking(), finish);
        assert_eq!(calls(&turn), [("f", json!({"a": "1"}))], "{end:?}");
        assert_eq!((turn.reasoning.as_str(), turn.content.as_str(), turn.finish), ("Look", "", Finish::ToolCalls));
        assert_eq!(turn.raw_block.unwrap(), format!(" {block}"));
    }
    let cut = &block[..block.len() - 1];
    let undeclared = block.replace("\"f\"", "\"unknown\"");
    let followed = format!("{block} done");
    for text in [cut, &undeclared, &followed] {
        let turn = parse(&format!("Look {text}"), &thinking(), STOP);
        assert_eq!((turn.reasoning, turn.content.as_str(), turn.calls.len()), (format!("Look {text}"), "", 0));
    }
}

#[test]
fn a_mention_before_the_terminal_block_does_not_hide_it() {
    let text = format!("A `<｜DSML｜tool_calls>` now: {}", block(""));
    assert_eq!(only_call(&text, &thinking()), json!({}));
}

#[test]
fn end_think_inside_a_value() {
    let value = "a<think>b</think>c";
    let text = block("[parameter name=\"a\" string=\"true\"]VALUE[/parameter]").replace("VALUE", value);
    assert_eq!(only_call(&text, &chat()), json!({"a": value}));
    assert_eq!(only_call(&format!("r</think>{text}"), &thinking()), json!({"a": value}));
}

#[test]
fn a_second_end_think_in_the_answer() {
    let turn = parse("r</think>one </think>two</think>", &thinking(), STOP);
    assert_eq!((turn.reasoning.as_str(), turn.content.as_str()), ("r", "one two"));
    let turn = parse(&format!("r</think>one\n</think>{}", block("")), &thinking(), STOP);
    assert_eq!((turn.content.as_str(), turn.calls.len()), ("one", 1));
    let without_tools = ParseOptions { thinking: true, tools: None };
    assert_eq!(parse("r</think>one </think>two", &without_tools, STOP).content, "one two");
}

#[test]
fn think_tags_in_the_middle_of_a_chat_answer() {
    assert_content("The tags are <think> and </think>.", false);
    let turn = parse("<think>r</think>a</think>b", &chat(), STOP);
    assert_eq!((turn.reasoning.as_str(), turn.content.as_str()), ("r", "a</think>b"));
    let turn = parse("</think><think>a", &chat(), STOP);
    assert_eq!((turn.reasoning.as_str(), turn.content.as_str()), ("", "<think>a"));
}

#[test]
fn no_end_think_and_no_block() {
    for finish in [STOP, LENGTH] {
        let turn = parse("<think>on and on \n", &thinking(), finish);
        assert_eq!((turn.reasoning.as_str(), turn.content.as_str()), ("on and on \n", ""));
    }
}

// The rest of the rules.

#[test]
fn without_tools_dsml_is_content() {
    let text = format!("x{}", block(""));
    let turn = parse(&text, &ParseOptions { thinking: false, tools: None }, STOP);
    assert_eq!((turn.content, turn.malformed), (text, false));
}

#[test]
fn headers() {
    let found = arguments("[parameter  string=\"true\"\n name = \"a&lt;b&amp;lt;&quot;\" other=\"x>y\" ]v[/parameter]");
    assert_eq!(found, json!({"a<b&lt;\"": "v"}));
    assert_eq!(arguments("[parameter name=\"\" string=\"false\"]1[/parameter]"), json!({"": 1}), "a name may be empty");
    assert_content(&block("").replace("\"f\"", "\"\""), true);
    let wrong = ["name=a", "name='a'", "nam=\"a\"", "", "name=\"a\"string=\"true\"", "name=\"a\" /", "name=\"a\" <"];
    for header in wrong {
        assert_content(&block(&format!("[parameter {header}]v[/parameter]")), true);
    }
}

#[test]
fn wrapper_is_unwrapped_when_the_schema_says_so() {
    let call = |parameters: &str| {
        let text = dsml(&format!("[tool_calls][invoke name=\"get_weather\"]{parameters}[/invoke][/tool_calls]"));
        only_call(&text, &chat())
    };
    let object = json!({"city": "Rome", "days": 2});
    for (name, string) in [("arguments", "false"), ("input", "false"), ("arguments", "true")] {
        let wrapper = format!("[parameter name=\"{name}\" string=\"{string}\"] {object} [/parameter]");
        assert_eq!(call(&wrapper), object);
    }
    let city = "[parameter name=\"city\" string=\"true\"]Rome[/parameter]";
    let not_alone = call(&format!("[parameter name=\"input\" string=\"false\"]{object}[/parameter]{city}"));
    assert_eq!(not_alone, json!({"input": object, "city": "Rome"}));
    let misfit = "[parameter name=\"input\" string=\"false\"]{\"days\": 2}[/parameter]";
    assert_eq!(call(misfit), json!({"input": {"days": 2}}), "`city` is required");
    let unknown = arguments(&format!("[parameter name=\"input\" string=\"false\"]{object}[/parameter]"));
    assert_eq!(unknown, json!({"input": object}), "a tool without a schema");
}

#[test]
fn numbers_keep_their_digits() {
    let number = "[123456789012345678901234567890, 1.10, 1e999, -0]";
    let text = block("[parameter name=\"a\" string=\"false\"]VALUE[/parameter]").replace("VALUE", number);
    let turn = parse(&text, &chat(), STOP);
    assert_eq!(turn.calls[0].arguments, format!("{{\"a\": {number}}}"));
}

#[test]
fn an_unterminated_value_is_never_executed() {
    for value in ["rm -rf /tmp/x", "rm -rf /", "x</｜DSML｜paramete", "x<"] {
        let text = dsml("ok\n\n[tool_calls]\n[invoke name=\"f\"]\n[parameter name=\"a\" string=\"true\"]") + value;
        assert_content(&text, true);
        let turn = parse(&format!("{text}<｜end▁of▁sentence｜>"), &chat(), STOP);
        assert_eq!((turn.content, turn.malformed), (text.clone(), true), "EOS is no text");
        let turn = parse(&text, &chat(), LENGTH);
        assert_eq!((turn.content.as_str(), turn.malformed, turn.finish), ("ok", true, Finish::Length));
    }
}

#[test]
fn malformed_blocks_are_content() {
    for body in ["[tool_calls][/tool_calls]", "[tool_calls]", "[tool_calls]x[/tool_calls]", "[tool_calls][/invoke]"] {
        assert_content(&dsml(&format!("Hi\n\n{body} and more\n")), true);
    }
    let turn = parse(&dsml("Hi [tool_calls] are written like this"), &chat(), LENGTH);
    assert_eq!((turn.finish, turn.malformed), (Finish::Length, true));
    assert_eq!(turn.content, dsml("Hi [tool_calls] are written like this"), "text is not lost to the limit");
}

#[test]
fn text_after_the_block_is_dropped_and_an_orphan_closer_is_content() {
    let turn = parse(&format!("{}\nmore{}", block(""), block("")), &chat(), STOP);
    assert_eq!((turn.content.as_str(), turn.calls.len()), ("", 1));
    assert_content(&dsml("Hi [/tool_calls] there [/invoke] [/parameter]"), false);
}

#[test]
fn undeclared_tools_are_surfaced() {
    let text = block("").replace("\"f\"", "\"unknown\"");
    assert_eq!(calls(&parse(&text, &chat(), STOP)), [("unknown", json!({}))]);
}

#[test]
fn whitespace_that_no_block_follows_is_content() {
    assert_content("a \n\n b\n \n", false);
    let turn = parse("r \n</think>\n\na\n", &thinking(), STOP);
    assert_eq!((turn.reasoning.as_str(), turn.content.as_str()), ("r \n", "\n\na\n"));
}

#[test]
fn half_tags_at_the_end_are_text() {
    for text in ["a <", "a </thi", "a <｜DSML｜tool_cal", "<thin", "<｜end▁of", "a <｜end▁of▁sentence｜>b"] {
        assert_content(text, false);
    }
    assert_eq!(parse("a<｜end▁of▁sentence｜>", &chat(), STOP).content, "a");
    assert_eq!(parse("<thi", &thinking(), LENGTH).reasoning, "<thi");
}

#[test]
fn invalid_utf8_is_replaced() {
    let bytes =
        [b"a\xff\xf0\x9f\x99".as_slice(), block("[parameter name=\"a\" string=\"true\"]\u{1}[/parameter]").as_bytes()]
            .concat();
    let bytes: Vec<u8> = bytes.iter().map(|&byte| if byte == 1 { 0xc3 } else { byte }).collect();
    for size in 1..9 {
        let pieces: Vec<&[u8]> = bytes.chunks(size).collect();
        let (turn, _) = feed(&pieces, &chat(), STOP);
        assert_eq!(turn.content, "a\u{fffd}\u{fffd}");
        assert_eq!(calls(&turn), [("f", json!({"a": "\u{fffd}"}))]);
    }
}

/// A reader of the stream sees a long value grow, escaped, and never half an escape.
#[test]
fn long_strings_stream_before_their_closer() {
    let mut parser = TurnParser::new(&chat());
    let mut events = Vec::new();
    parser.push(dsml("[tool_calls][invoke name=\"f\"][parameter name=\"a\" string=\"true\"]").as_bytes(), &mut events);
    parser.push("line 1\n\"two\"\t🙂".as_bytes(), &mut events);
    assert_eq!(join(&events).2, [("f".to_owned(), "{\"a\": \"line 1\\n\\\"two\\\"\\t🙂".to_owned())]);
    for byte in "🙂".bytes() {
        events.clear();
        parser.push(&[byte], &mut events);
    }
    assert_eq!(events, [Event::CallArguments { index: 0, delta: "🙂".to_owned() }]);
}

// Named for what went wrong elsewhere.

/// ds4, PR 997: a `<` at the end of a token must not be lost, and bytes that are not markup must not stall the tracker.
#[test]
fn position_survives_a_split_tag_and_unknown_bytes() {
    let mut parser = TurnParser::new(&chat());
    let mut feed = |text: &str| {
        parser.push(text.as_bytes(), &mut Vec::new());
        parser.position()
    };
    assert_eq!(feed("Hi\n\n<"), Position::Free);
    assert_eq!(feed("｜DSML｜"), Position::Structure);
    assert_eq!(feed("tool_calls>\n<"), Position::Structure);
    assert_eq!(feed("｜DSML｜invoke name=\"f\">\n<｜DSML｜parameter name=\"a\" string=\"true\""), Position::Structure);
    assert_eq!(feed(">"), Position::StringValue);
    assert_eq!(feed("a < b <"), Position::StringValue);
    assert_eq!(feed("/"), Position::Structure);
    assert_eq!(feed("div>"), Position::StringValue);
    assert_eq!(feed("</｜DSML｜parameter>\n<｜DSML｜parameter name=\"b\" string=\"false\">"), Position::JsonStructure);
    assert_eq!(feed("{\"k"), Position::JsonString);
    assert_eq!(feed("\\\"\\"), Position::JsonString);
    assert_eq!(feed("\" "), Position::JsonString);
    assert_eq!(feed("\": 1}<"), Position::JsonStructure);
    assert_eq!(feed("/｜DSML｜"), Position::Structure);
    assert_eq!(feed("parameter></｜DSML｜invoke>\n</｜DSML｜"), Position::Structure);
    assert_eq!(feed("tool_calls>"), Position::Done);
    let mut parser = TurnParser::new(&chat());
    parser.push(dsml("[tool_calls]oops").as_bytes(), &mut Vec::new());
    assert_eq!(parser.position(), Position::Free);
}

#[test]
fn position_in_a_direct_json_body() {
    let mut parser = TurnParser::new(&chat());
    parser.push(dsml("[tool_calls][invoke name=\"f\"]{\"a\"").as_bytes(), &mut Vec::new());
    assert_eq!(parser.position(), Position::JsonStructure);
    parser.push(b": \"x", &mut Vec::new());
    assert_eq!(parser.position(), Position::JsonString);
}

/// ds4, issue 318: a block in unclosed reasoning ended the turn without a call.
#[test]
fn position_after_a_block_in_reasoning() {
    let mut parser = TurnParser::new(&thinking());
    let mut events = Vec::new();
    parser.push(format!("Look{}", block("")).as_bytes(), &mut events);
    assert_eq!((parser.position(), parser.in_reasoning()), (Position::ClosedInReasoning, true));
    parser.push(b"\n", &mut events);
    assert_eq!(parser.position(), Position::ClosedInReasoning);
    assert_eq!(events, [Event::Reasoning("Look".to_owned())], "the block is kept back");
    parser.push(b"so", &mut events);
    assert_eq!(parser.position(), Position::Free);
    assert_eq!(join(&events).0, format!("Look{}\nso", block("")));
    parser.push(b"</think>", &mut events);
    assert!(!parser.in_reasoning());
}

/// ds4, issue 48: a model that writes markup without end ran until the context was full.
#[test]
fn markup_without_end_stops_the_turn() {
    for endless in [" ".repeat(5000), format!("[invoke name=\"{}", "x".repeat(5000))] {
        let text = dsml(&format!("[tool_calls]{endless}"));
        assert_content(&text, true);
        let mut parser = TurnParser::new(&chat());
        parser.push(text.as_bytes(), &mut Vec::new());
        assert_eq!(parser.position(), Position::Runaway);
    }
}

#[test]
fn a_runaway_block_is_not_repaired() {
    let call = "[tool_calls][invoke name=\"f\"][parameter name=\"a\" string=\"true\"]x[/parameter]";
    for text in [dsml(&format!("Hi {call}\n")), dsml(&format!("Hi {call}[/invoke] "))] {
        assert_eq!(parse(&text, &chat(), STOP).calls.len(), 1);
        let turn = parse(&text, &chat(), EngineFinish::Runaway);
        assert_eq!((turn.content.as_str(), turn.calls.len(), turn.finish), (text.as_str(), 0, Finish::Stop));
        assert_eq!((turn.malformed, turn.malformed_bytes), (true, text.len() - 2));
        let turn = parse(&text, &thinking(), EngineFinish::Runaway);
        assert_eq!((turn.reasoning, turn.content.as_str(), turn.malformed), (text, "", true));
    }
}

#[test]
fn an_interrupted_turn_has_no_calls() {
    let bare = dsml("Hi [invoke name=\"f\"/]");
    for text in [format!("Hi{}", block("")), bare] {
        let turn = parse(&text, &chat(), EngineFinish::Interrupted);
        assert_eq!((turn.content.as_str(), turn.calls.len(), turn.malformed), ("Hi", 0, true));
        assert_eq!((turn.finish, turn.raw_block), (Finish::Length, None));
        let turn = parse(&text, &thinking(), EngineFinish::Interrupted);
        assert_eq!((turn.reasoning, turn.calls.len(), turn.malformed), (text, 0, false));
    }
}

/// Whether each piece of a turn leads nowhere.
#[test]
fn idle_is_what_leads_nowhere() {
    for options in [chat(), thinking()] {
        let mut parser = TurnParser::new(&options);
        let mut feed = |text: &str| {
            parser.push(dsml(text).as_bytes(), &mut Vec::new());
            parser.is_idle()
        };
        let moves = ["Hi", " ", "\n", "[tool_calls]", "[invoke name=\"f\"]", "[parameter name=\"a\" string=\"true\"]"];
        assert!(moves.iter().all(|piece| !feed(piece)));
        assert!([" ", "x", "\n\n", "<", "x[/parameter]"].iter().all(|piece| !feed(piece) || *piece == "<"));
        assert!(feed(" ") && feed("[para") && !feed("meter") && feed(" name=") && !feed("\"b\" string=\"false\"]"));
        assert!(feed(" ") && !feed("[1,") && feed(" \n") && !feed("\" ") && !feed(" ") && !feed("\"") && feed(" "));
        assert!(!feed("][/parameter]") && feed("\n") && !feed("[/invoke]") && feed("\n"));
    }
}

#[test]
fn a_strict_parser_takes_only_the_block_that_was_announced() {
    let strict = |pieces: &[&str], announced: Option<usize>, options: &ParseOptions| {
        let mut parser = TurnParser::strict(options);
        for (index, piece) in pieces.iter().enumerate() {
            if Some(index) == announced {
                parser.announce_block();
            }
            parser.push(piece.as_bytes(), &mut Vec::new());
        }
        parser.finish(STOP, &mut Vec::new())
    };
    let text = format!("Hi{}", block(""));
    let marker = text.find("｜").unwrap();
    let pieces = [&text[..marker], &text[marker..]];
    let turn = strict(&pieces, Some(1), &chat());
    assert_eq!((turn.content.as_str(), calls(&turn)), ("Hi", vec![("f", json!({}))]));
    assert_eq!(turn.raw_block.as_deref(), Some(&text[2..]));
    let plain = text.replace("｜DSML｜", "");
    let lost_bar = text.replace("｜DSML｜", "DSML｜");
    let bare = dsml("Hi [invoke name=\"f\"/]");
    for text in [&text, &plain, &lost_bar, &bare] {
        let turn = strict(&[text], None, &chat());
        assert_eq!((&turn.content, turn.calls.len(), turn.malformed), (text, 0, false));
        let turn = strict(&[text], None, &thinking());
        assert_eq!((&turn.reasoning, turn.calls.len(), turn.malformed), (text, 0, false));
    }
}

/// 128 KiB in pieces of 32 bytes, and hostile repetitions: the work grows with the length.
#[test]
fn work_is_linear() {
    let hostile = [
        block("[parameter name=\"a\" string=\"true\"]X[/parameter]").replace('X', &"x<&".repeat(1 << 16)),
        block("[parameter name=\"a\" string=\"false\"]\"X\"[/parameter]").replace('X', &"x<\\\"".repeat(1 << 16)),
        dsml("[tool_calls][invoke name=\"f\"][parameter name=\"a\" string=\"true\"]").repeat(3000),
        dsml("[invoke name=\"f\"]").repeat(6000),
        "<tool_calls>".repeat(20_000),
        " ".repeat(1 << 17),
        "</think>".repeat(20_000),
        block("[parameter name=\"a\"]X[/parameter]").replace('X', &" ".repeat(1 << 17)),
        block("").repeat(2000),
    ];
    let start = std::time::Instant::now();
    for text in &hostile {
        for options in [chat(), thinking()] {
            for size in [1, 32, usize::MAX] {
                let pieces: Vec<&[u8]> = text.as_bytes().chunks(size.min(text.len())).collect();
                feed(&pieces, &options, STOP);
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    assert!(seconds < 20.0, "{seconds:.1} s");
}
