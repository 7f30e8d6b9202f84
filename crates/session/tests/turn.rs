//! Turns whose tokens the test dictates.

mod common;
#[path = "../../text/tests/common/mod.rs"]
mod vocabularies;

use std::ops::ControlFlow;
use std::sync::Arc;

use common::{Scripted, one_hot, tokenizer};
use model::Cancel;
use serde_json::{Value, json};
use session::{
    Constrain, Error, Sampling, Session, StopReason, ToolChoice, TurnEvent, TurnOptions, TurnOutcome, Vocabulary,
    run_turn,
};
use text::Tokenizer;
use text::parse::{Event, Finish, ParseOptions};
use text::prompt::{AssistantMessage, Call, Encoding, Message, Mode, PromptOptions, Tool, render};

const PROMPT: usize = 20;

fn tools() -> Vec<Tool> {
    let parameters = json!({
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    });
    vec![
        Tool::from_value(json!({"name": "get_weather", "parameters": parameters})).unwrap(),
        Tool::from_value(json!({"name": "now"})).unwrap(),
    ]
}

/// Options of a turn that may call, greedy.
fn options(thinking: bool) -> TurnOptions {
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    TurnOptions { parse: ParseOptions { thinking, tools: Some(tools()) }, sampling, ..TurnOptions::default() }
}

fn prompt() -> Vec<u32> {
    (0..PROMPT as u32).map(|i| 3 + i).collect()
}

/// What a turn came to, what was told of it, and the session after it.
struct Ran {
    outcome: TurnOutcome,
    events: Vec<TurnEvent>,
    session: Session<Scripted>,
    passes: Vec<usize>,
}

fn run(backend: Scripted, options: &TurnOptions, context: usize) -> Result<Ran, Error> {
    let tokenizer = Arc::new(tokenizer());
    let vocabulary = Arc::new(Vocabulary::new(tokenizer.clone()).unwrap());
    let (mut session, logits) = backend.read(&prompt(), context);
    let mut events = Vec::new();
    let outcome = run_turn(&backend, &vocabulary, &mut session, logits, options, &Cancel::default(), &mut |event| {
        events.push(event);
        ControlFlow::Continue(())
    })?;
    Ok(Ran { outcome, events, session, passes: std::mem::take(&mut *backend.passes.lock().unwrap()) })
}

/// Runs a turn in which the model says `text`.
fn say(text: &str, options: &TurnOptions) -> Ran {
    let tokenizer = tokenizer();
    run(Scripted::saying(PROMPT, tokenizer.encode_with_control(text), tokenizer.eos()), options, 4000).unwrap()
}

impl Ran {
    fn texts(&self) -> impl Iterator<Item = &Event> {
        self.events.iter().filter_map(|event| match event {
            TurnEvent::Text(event) => Some(event),
            TurnEvent::Token { .. } => None,
        })
    }

    fn content(&self) -> String {
        self.texts()
            .filter_map(|event| if let Event::Content(text) = event { Some(text.as_str()) } else { None })
            .collect()
    }

    fn reasoning(&self) -> String {
        let reasoning = |event: &Event| if let Event::Reasoning(text) = event { Some(text.clone()) } else { None };
        self.texts().filter_map(reasoning).collect()
    }

    fn says(&self, tokenizer: &Tokenizer) -> String {
        String::from_utf8(tokenizer.decode(&self.outcome.tokens)).unwrap()
    }
}

fn call(name: &str, parameters: &[(&str, &str)]) -> String {
    let parameter = |(name, value): &(&str, &str)| {
        format!("<｜DSML｜parameter name=\"{name}\" string=\"true\">{value}</｜DSML｜parameter>\n")
    };
    let parameters: String = parameters.iter().map(parameter).collect();
    let empty = if parameters.is_empty() { "\n" } else { "" };
    format!("<｜DSML｜invoke name=\"{name}\">\n{parameters}{empty}</｜DSML｜invoke>\n")
}

fn block(calls: &str) -> String {
    format!("\n\n<｜DSML｜tool_calls>\n{calls}</｜DSML｜tool_calls>")
}

#[test]
fn reasoning_and_content() {
    let tokenizer = tokenizer();
    let ran = say("Let me see. 中</think>It is 5.", &options(true));
    let turn = &ran.outcome.turn;
    assert_eq!((turn.reasoning.as_str(), turn.content.as_str()), ("Let me see. 中", "It is 5."));
    assert_eq!((ran.reasoning(), ran.content()), (turn.reasoning.clone(), turn.content.clone()));
    assert_eq!(ran.outcome.reason, StopReason::EndOfTurn(tokenizer.eos()));
    let all = tokenizer.encode_with_control("Let me see. 中</think>It is 5.");
    assert_eq!(ran.outcome.tokens, all);
    assert_eq!(ran.outcome.reasoning_tokens, tokenizer.encode("Let me see. 中").len() + 1);
    assert_eq!(ran.session.tokens(), [prompt(), all].concat(), "all of them: the model ended the turn");
}

#[test]
fn the_block_closer_ends_the_turn() {
    let calls = call("get_weather", &[("city", "Paris")]) + &call("now", &[]);
    let ran = say(&format!("Sure.{} and more", block(&calls)), &options(false));
    let TurnOutcome { turn, reason, tokens, .. } = &ran.outcome;
    assert_eq!((reason, turn.finish), (&StopReason::CallsClosed, Finish::ToolCalls));
    assert_eq!(turn.content, "Sure.");
    assert_eq!(turn.raw_block.as_deref(), Some(block(&calls).as_str()));
    let names: Vec<&str> = turn.calls.iter().map(|call| call.name.as_str()).collect();
    assert_eq!((names, turn.calls[0].arguments.as_str()), (vec!["get_weather", "now"], r#"{"city": "Paris"}"#));
    assert_eq!(ran.session.tokens(), [&prompt(), &tokens[..tokens.len() - 1]].concat(), "all but the last");
}

/// A block in reasoning that is never closed counts only if the turn ends with it.
#[test]
fn a_block_in_reasoning_waits_for_what_comes_next() {
    let calls = block(&call("now", &[]));
    let ended = say(&format!("I call it.{calls}"), &options(true));
    assert_eq!((ended.outcome.turn.finish, ended.outcome.turn.calls.len()), (Finish::ToolCalls, 1));
    assert_eq!(ended.outcome.turn.reasoning, "I call it.");
    let quoted = say(&format!("I could say{calls} or not.</think>No."), &options(true));
    let turn = &quoted.outcome.turn;
    assert_eq!(turn.reasoning, format!("I could say{calls} or not."));
    assert_eq!((turn.content.as_str(), turn.calls.len(), turn.finish), ("No.", 0, Finish::Stop));
    assert!(quoted.texts().all(|event| matches!(event, Event::Reasoning(_) | Event::Content(_))));
}

#[test]
fn stop_strings_end_the_content_alone() {
    let stop = |stop: &str| TurnOptions { stop_strings: vec![stop.to_owned()], ..options(true) };
    let text = "First. END not here</think>One. Two. Three. END Four.";
    let ran = say(text, &stop(" END"));
    assert_eq!(ran.outcome.turn.reasoning, "First. END not here");
    assert_eq!((ran.outcome.turn.content.as_str(), ran.content().as_str()), ("One. Two. Three.", "One. Two. Three."));
    assert_eq!((ran.outcome.reason, ran.outcome.stop_string.as_deref()), (StopReason::StopString, Some(" END")));
    assert_eq!(ran.outcome.turn.finish, Finish::Stop);
    let calls = block(&call("get_weather", &[("city", "The END")]));
    let ran = say(&format!("a</think>b{calls}"), &stop("END"));
    assert_eq!((ran.outcome.turn.calls.len(), ran.outcome.stop_string), (1, None));
    let ran = say("a</think>b EN", &stop("END"));
    assert_eq!(
        (ran.outcome.turn.content.as_str(), ran.content().as_str()),
        ("b EN", "b EN"),
        "held back, then released"
    );
}

#[test]
fn limits_end_a_turn_and_withhold_open_calls() {
    let tokenizer = tokenizer();
    let text = format!("Sure.{}", block(&call("get_weather", &[("city", "Paris")])));
    let script = tokenizer.encode_with_control(&text);
    let saying = || Scripted::saying(PROMPT, script.clone(), tokenizer.eos());
    let cut = script.len() - 6;
    let ran = run(saying(), &TurnOptions { max_tokens: cut, ..options(false) }, 4000).unwrap();
    assert_eq!((ran.outcome.reason, ran.outcome.tokens.len()), (StopReason::TokenLimit, cut));
    assert_eq!((ran.outcome.turn.calls.len(), ran.outcome.turn.finish), (0, Finish::Length));
    assert!(ran.outcome.turn.malformed && ran.outcome.turn.content == "Sure.");
    assert_eq!(ran.session.tokens().len(), PROMPT + cut - 1);

    let ran = run(saying(), &options(false), PROMPT + cut).unwrap();
    assert_eq!((ran.outcome.reason, ran.outcome.tokens.len()), (StopReason::ContextFull, cut));
    assert_eq!((ran.session.room_tokens(), ran.outcome.turn.finish), (0, Finish::Length));
    let none = run(saying(), &TurnOptions { max_tokens: 0, ..options(false) }, 4000).unwrap();
    assert_eq!((none.outcome.reason, none.outcome.tokens.len()), (StopReason::TokenLimit, 0));
}

#[test]
fn caller_and_receiver_end_a_turn() {
    let tokenizer = Arc::new(tokenizer());
    let vocabulary = Arc::new(Vocabulary::new(tokenizer.clone()).unwrap());
    let script = tokenizer.encode("One two three four five six seven.");
    let backend = Scripted::saying(PROMPT, script.clone(), tokenizer.eos());
    let stopped_by = |cancels: bool| {
        let (mut session, logits) = backend.read(&prompt(), 4000);
        let (cancel, mut seen) = (Cancel::default(), 0);
        let receive = &mut |event| {
            seen += usize::from(matches!(event, TurnEvent::Token { .. }));
            match seen {
                3 if cancels => cancel.cancel(),
                3 => return ControlFlow::Break(()),
                _ => (),
            }
            ControlFlow::Continue(())
        };
        let outcome = run_turn(&backend, &vocabulary, &mut session, logits, &options(false), &cancel, receive).unwrap();
        assert_eq!((outcome.tokens.as_slice(), session.tokens().len()), (&script[..3], PROMPT + 2));
        outcome.reason
    };
    assert_eq!(stopped_by(true), StopReason::Cancelled);
    assert_eq!(stopped_by(false), StopReason::Receiver);
}

#[test]
fn role_tokens_end_a_turn_and_are_no_text() {
    for role in ["<｜User｜>", "<｜Assistant｜>"] {
        let ran = say(&format!("Yes.{role}no"), &options(false));
        assert_eq!(ran.outcome.reason, StopReason::EndOfTurn(tokenizer().control(role).unwrap()));
        assert_eq!((ran.content().as_str(), ran.outcome.turn.finish), ("Yes.", Finish::Stop));
    }
}

#[test]
fn a_block_that_leads_nowhere_is_stopped() {
    let text = format!("Sure.\n\n<｜DSML｜tool_calls>{}", "\n \n".repeat(2000));
    let ran = say(&text, &options(false));
    assert_eq!((ran.outcome.reason, ran.outcome.turn.calls.len()), (StopReason::Runaway, 0));
    assert!(ran.outcome.turn.malformed && ran.outcome.tokens.len() < 400, "{}", ran.outcome.tokens.len());
    let long = say(&block(&call("get_weather", &[("city", &"Paris ".repeat(400))])), &options(false));
    assert_eq!(long.outcome.turn.calls.len(), 1, "a long value is no markup");
}

/// A block that only lacks closers was repaired, and its calls were made, though the model wrote space without end.
#[test]
fn a_runaway_block_is_malformed_and_not_repaired() {
    let finished = call("get_weather", &[("city", "Paris")]);
    let json = "<｜DSML｜invoke name=\"get_weather\">\n<｜DSML｜parameter name=\"days\" string=\"false\">";
    for begin in ["<｜DSML｜invoke name=\"get_weather\">", &finished, json, &format!("{json}[1, ")] {
        let text = format!("Sure.\n\n<｜DSML｜tool_calls>\n{begin}{}", "\n \n".repeat(2000));
        let ran = say(&text, &options(false));
        let TurnOutcome { turn, reason, tokens, .. } = &ran.outcome;
        assert_eq!((reason, turn.finish, turn.malformed), (&StopReason::Runaway, Finish::Stop, true), "{begin}");
        assert_eq!((turn.calls.len(), &turn.raw_block), (0, &None), "{begin}");
        assert_eq!(turn.content, ran.says(&tokenizer()), "{begin}");
        assert!(tokens.len() < 450, "{begin}: {} tokens", tokens.len());
    }
}

/// Events of a block in reasoning are kept back, so that its calls looked like markup without end.
#[test]
fn calls_quoted_in_reasoning_are_no_runaway() {
    let quoted = block(&call("get_weather", &[("city", "Paris")]).repeat(40));
    let ran = say(&format!("Say{quoted} or not.</think>No."), &options(true));
    assert_eq!(ran.outcome.reason, StopReason::EndOfTurn(tokenizer().eos()));
    assert_eq!((ran.outcome.turn.calls.len(), ran.outcome.turn.content.as_str()), (0, "No."));
}

/// A stop string in the text of a malformed block made the turn look like one that a stop string had ended.
#[test]
fn a_stop_string_in_a_malformed_block_hides_nothing() {
    let tokenizer = tokenizer();
    let stop = |stop: &str| TurnOptions { stop_strings: vec![stop.to_owned()], ..options(false) };
    let text = "Sure. EN\n\n<｜DSML｜tool_calls>D or oops END";
    for stops in ["END", "EN\n\n<", "oops"] {
        let ran = say(text, &stop(stops));
        let TurnOutcome { turn, reason, stop_string, .. } = &ran.outcome;
        assert_eq!((reason, stop_string), (&StopReason::EndOfTurn(tokenizer.eos()), &None));
        assert_eq!((turn.malformed, turn.content.as_str(), ran.content().as_str()), (true, text, text));
        assert_eq!(turn.malformed_bytes, text.len() - "Sure. EN".len());
    }
    let before = say(text, &stop("re."));
    assert_eq!((before.outcome.turn.content.as_str(), before.outcome.turn.malformed), ("Su", false));
}

/// The parser keeps space at the end back; a stop string in it cut the content but was not told of.
#[test]
fn a_stop_string_in_space_at_the_end_is_told() {
    let ran = say("a\n\n", &TurnOptions { stop_strings: vec!["\n\n".to_owned()], ..options(false) });
    assert_eq!((ran.outcome.reason, ran.outcome.stop_string.as_deref()), (StopReason::StopString, Some("\n\n")));
    assert_eq!(ran.outcome.turn.content, "a");
}

/// Ctrl-C after a block that closed in unclosed reasoning made its calls.
#[test]
fn an_interrupted_turn_makes_no_calls() {
    let tokenizer = Arc::new(tokenizer());
    let vocabulary = Arc::new(Vocabulary::new(tokenizer.clone()).unwrap());
    let in_reasoning = format!("Hm.{}", block(&call("now", &[])));
    let mut script = tokenizer.encode_with_control(&in_reasoning);
    let closed = script.len();
    script.extend(tokenizer.encode("\n\n\n"));
    let saying = || Scripted::saying(PROMPT, script.clone(), tokenizer.eos());
    let limited = run(saying(), &TurnOptions { max_tokens: closed, ..options(true) }, 4000).unwrap().outcome;
    let full = run(saying(), &options(true), PROMPT + closed).unwrap().outcome;
    assert_eq!((limited.reason, full.reason), (StopReason::TokenLimit, StopReason::ContextFull));
    assert_eq!((limited.turn.calls.len(), full.turn.calls.len()), (1, 1), "no room: the turn ends there");

    let interrupted = |cancels: bool, options: &TurnOptions, script: &[u32], at: usize| {
        let backend = Scripted::saying(PROMPT, script.to_vec(), tokenizer.eos());
        let (mut session, logits) = backend.read(&prompt(), 4000);
        let (cancel, mut seen) = (Cancel::default(), 0);
        let receive = &mut |event| {
            seen += usize::from(matches!(event, TurnEvent::Token { .. }));
            let is_call_end = matches!(event, TurnEvent::Text(Event::CallEnd { .. }));
            match seen >= at || is_call_end {
                true if cancels => cancel.cancel(),
                true => return ControlFlow::Break(()),
                false => (),
            }
            ControlFlow::Continue(())
        };
        run_turn(&backend, &vocabulary, &mut session, logits, options, &cancel, receive).unwrap()
    };
    for (cancels, reason) in [(true, StopReason::Cancelled), (false, StopReason::Receiver)] {
        let outcome = interrupted(cancels, &options(true), &script, closed);
        assert_eq!((outcome.reason, outcome.turn.calls.len(), outcome.turn.finish), (reason, 0, Finish::Length));
        assert_eq!(outcome.turn.reasoning, in_reasoning);
    }
    let answer = tokenizer.encode_with_control(&block(&call("now", &[])));
    let outcome = interrupted(false, &options(false), &answer, usize::MAX);
    assert_eq!((outcome.reason, outcome.turn.calls.len()), (StopReason::Receiver, 0));
    assert!(outcome.turn.malformed && outcome.turn.raw_block.is_none());
}

/// Every token has a rival that is as likely. Markup must not be a matter of luck; the city may be.
#[test]
fn markup_is_greedy_and_payload_is_sampled() {
    let tokenizer = tokenizer();
    let text = block(&call("get_weather", &[("city", "x x x x x x x x x x")]));
    let script = tokenizer.encode_with_control(&text[2..]);
    let [x, y] = [" x", " y"].map(|text| tokenizer.encode(text)[0]);
    let cities = |seed| {
        let (script, eos, vocab) = (script.clone(), tokenizer.eos(), tokenizer.vocab_size());
        let backend = Scripted::new(move |tokens| {
            let at = tokens.len() - PROMPT;
            let next = script.get(at).copied().unwrap_or(eos);
            let mut logits = one_hot(vocab, next);
            let has_rival = at >= 2 && script[at - 1] != x || next == x;
            logits[y as usize] = if has_rival { 39.99 } else { 0.0 };
            logits
        });
        let sampling = Sampling { temperature: 1.0, ..Sampling::default() };
        let ran = run(backend, &TurnOptions { sampling, seed, ..options(false) }, 4000).unwrap();
        assert_eq!(ran.outcome.turn.calls.len(), 1, "{}", ran.says(&tokenizer));
        ran.outcome.turn.calls[0].arguments.clone()
    };
    let drawn: Vec<String> = (0..6).map(cities).collect();
    assert!(drawn.iter().any(|city| city.contains('y')), "{drawn:?}");
    assert!(drawn.iter().any(|city| city != &drawn[0]), "{drawn:?}");
    assert_eq!(cities(3), drawn[3], "the same for a seed");
}

#[test]
fn a_forced_call_begins_with_the_tokens_of_a_rendered_one() {
    let tokenizer = tokenizer();
    let rest = "\n<｜DSML｜parameter name=\"city\" string=\"true\">Rome</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>";
    for (thinking, reasoning, named) in
        [(false, "", false), (false, "", true), (true, "Hm.", false), (true, "Hm.", true)]
    {
        let before = if thinking { format!("{reasoning}</think>") } else { String::new() };
        let opener = if named { "get_weather\">\n" } else { "" };
        let opener =
            tokenizer.encode_with_control(&format!("\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"{opener}"));
        let after = if named { rest[1..].to_owned() } else { format!("get_weather\">{rest}") };
        let before = tokenizer.encode_with_control(&before);
        let whole = [before.clone(), opener.clone(), tokenizer.encode_with_control(&after)].concat();
        let choice = if named { ToolChoice::Named("get_weather".to_owned()) } else { ToolChoice::Required };
        let backend = Scripted::saying(PROMPT, whole.clone(), tokenizer.eos());
        let options = TurnOptions { choice, logprobs: Some(3), ..options(thinking) };
        let ran = run(backend, &options, 4000).unwrap();
        assert_eq!((&ran.outcome.tokens, ran.outcome.turn.reasoning.as_str()), (&whole, reasoning));
        assert_eq!(ran.outcome.turn.calls[0].arguments, r#"{"city": "Rome"}"#);
        let together = opener.len() + usize::from(thinking);
        assert_eq!(ran.passes[before.len().saturating_sub(1)], together, "read in one pass");
        let logprobs: Vec<bool> = ran
            .events
            .iter()
            .filter_map(|e| if let TurnEvent::Token { logprobs, .. } = e { Some(logprobs.is_some()) } else { None })
            .collect();
        let forced = |i: usize| (before.len()..before.len() + opener.len()).contains(&i);
        assert!(logprobs.iter().enumerate().all(|(i, &has)| has != forced(i)), "none for forced tokens");
    }
}

/// Where a turn ended inside an opener, several of its tokens were unread and nobody could tell.
#[test]
fn an_outcome_tells_what_the_session_holds() {
    let tokenizer = tokenizer();
    let script = tokenizer.encode_with_control("Hm.</think>");
    let choice = ToolChoice::Named("get_weather".to_owned());
    let mut unread = Vec::new();
    for limit in 1..30 {
        for (max_tokens, context) in [(limit, 4000), (usize::MAX, PROMPT + limit)] {
            let backend = Scripted::saying(PROMPT, script.clone(), tokenizer.encode(" x")[0]);
            let options = TurnOptions { choice: choice.clone(), max_tokens, ..options(true) };
            let ran = run(backend, &options, context).unwrap();
            let TurnOutcome { tokens, unread_tokens, .. } = &ran.outcome;
            let read = &tokens[..tokens.len() - unread_tokens];
            assert_eq!((tokens.len(), ran.session.tokens()), (limit, [&prompt(), read].concat().as_slice()));
            unread.push(*unread_tokens);
        }
    }
    assert!(unread.iter().any(|&tokens| tokens > 3) && unread.contains(&0), "{unread:?}");
}

/// V4 has a token for `">` and two line ends, which a header's end alone would part.
#[test]
fn a_forced_call_without_parameters_has_the_tokens_of_a_rendered_one() {
    let tokenizer = Arc::new(vocabularies::v4());
    let vocabulary = Arc::new(Vocabulary::new(tokenizer.clone()).unwrap());
    let prompt_options = PromptOptions { encoding: Encoding::V4_2604, mode: Mode::Chat, drop_reasoning: true };
    let system = Message::System { content: String::new(), tools: tools(), response_format: None };
    let mut messages = vec![system, Message::user("What time is it?")];
    let render =
        |messages: &[Message]| tokenizer.encode_segments(&render(&tokenizer, messages, &prompt_options).unwrap());
    let asked = render(&messages);
    let calls = vec![Call { id: None, name: "now".to_owned(), arguments: "{}".to_owned() }];
    messages.push(Message::Assistant(AssistantMessage { calls, ..AssistantMessage::default() }));
    let whole = render(&messages);
    let turn = whole[asked.len()..].strip_suffix(&[tokenizer.eos()]).unwrap().to_vec();
    let (eos, vocab, script, before) = (tokenizer.eos(), tokenizer.vocab_size(), turn.clone(), asked.len());
    let backend =
        Scripted::new(move |tokens| one_hot(vocab, script.get(tokens.len() - before).copied().unwrap_or(eos)))
            .with_vocabulary(vocab);
    for constrain in [Constrain::Off, Constrain::Calls] {
        let (mut session, logits) = backend.read(&asked, 4000);
        let options = TurnOptions { choice: ToolChoice::Named("now".to_owned()), constrain, ..options(false) };
        let receive = &mut |_| ControlFlow::Continue(());
        let outcome =
            run_turn(&backend, &vocabulary, &mut session, logits, &options, &Cancel::default(), receive).unwrap();
        assert_eq!(outcome.tokens, turn, "{:?}", options.constrain);
    }
}

/// A model that must call but ends its turn while it reasons.
#[test]
fn the_end_of_a_turn_that_must_call_ends_its_reasoning() {
    let tokenizer = tokenizer();
    let opener = "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"now\">\n\n";
    let before = tokenizer.encode_with_control("Hm.");
    let rest = tokenizer.encode_with_control("</｜DSML｜invoke>\n</｜DSML｜tool_calls>");
    let forced = tokenizer.encode_with_control(&format!("</think>{opener}")).len();
    let script = [before, vec![tokenizer.eos(); forced], rest].concat();
    let backend = Scripted::saying(PROMPT, script, tokenizer.eos());
    let options = TurnOptions { choice: ToolChoice::Named("now".to_owned()), ..options(true) };
    let ran = run(backend, &options, 4000).unwrap();
    assert_eq!((ran.outcome.turn.reasoning.as_str(), ran.outcome.turn.calls.len()), ("Hm.", 1));
}

#[test]
fn a_choice_that_cannot_be_made_is_refused() {
    let tokenizer = tokenizer();
    let backend = || Scripted::saying(PROMPT, tokenizer.encode("Hi."), tokenizer.eos());
    let refused = |options: TurnOptions| run(backend(), &options, 4000).err().expect("refused").to_string();
    let named = refused(TurnOptions { choice: ToolChoice::Named("never".to_owned()), ..options(false) });
    assert!(named.contains("`never`") && named.contains("[get_weather, now]"), "{named}");
    let parse = ParseOptions { thinking: false, tools: None };
    let none = refused(TurnOptions { choice: ToolChoice::Required, parse, ..options(false) });
    assert!(none.contains("any tool"), "{none}");
    let text = block(&call("now", &[]));
    let ran = say(&text, &TurnOptions { choice: ToolChoice::None, ..options(false) });
    assert_eq!((ran.content(), ran.outcome.turn.calls.len()), (text, 0));
}

/// A model that knows nothing: its logits are noise.
fn noise(seed: u64) -> Scripted {
    let vocab = tokenizer().vocab_size();
    Scripted::new(move |tokens| {
        let mut x = (tokens.len() as u64 + 1).wrapping_mul(seed | 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 40) as f32 / (1 << 24) as f32
        };
        (0..vocab).map(|_| next() * 12.0).collect()
    })
}

#[test]
fn under_grammar_even_noise_calls_well() {
    let sampling = Sampling { min_p: 0.0, ..Sampling::default() };
    // Noise closes no text in time, so closers are made likely.
    let tokenizer = tokenizer();
    let closers = ["</", "｜DSML｜", "\"", "1"].map(|text| (tokenizer.encode_with_control(text)[0], 9.0)).to_vec();
    for seed in 0..25 {
        let options = TurnOptions {
            choice: ToolChoice::Required,
            constrain: Constrain::Calls,
            sampling,
            seed,
            logit_bias: closers.clone(),
            max_tokens: 3000,
            ..options(false)
        };
        let ran = run(noise(seed + 5), &options, 4000).unwrap();
        assert_eq!(ran.outcome.reason, StopReason::CallsClosed, "{}", ran.says(&tokenizer));
        for call in &ran.outcome.turn.calls {
            let arguments: Value = serde_json::from_str(&call.arguments).unwrap();
            match call.name.as_str() {
                "get_weather" => {
                    assert!(arguments["city"].is_string() && arguments.get("days").is_none_or(Value::is_i64))
                }
                name => assert_eq!((name, &arguments), ("now", &json!({}))),
            }
        }
    }
}

#[test]
fn grammar_holds_from_the_models_own_opener_on() {
    let tokenizer = tokenizer();
    let before = tokenizer.encode_with_control("Free text, <b>even</b> a <.\n\n<｜DSML｜");
    let (mut script, vocab) = (before.clone(), tokenizer.vocab_size());
    script.extend(tokenizer.encode_with_control("tools_calls nonsense >"));
    let eos = tokenizer.eos();
    let backend =
        Scripted::new(move |tokens| one_hot(vocab, script.get(tokens.len() - PROMPT).copied().unwrap_or(eos)));
    let biased_from_opener = TurnOptions { constrain: Constrain::Calls, ..options(false) };
    let ran =
        run(backend, &TurnOptions { logit_bias: Vec::new(), max_tokens: 2000, ..biased_from_opener }, 4000).unwrap();
    assert_eq!(ran.outcome.tokens[..before.len()], before, "free before the block");
    let text = ran.says(&tokenizer);
    assert!(text.contains("<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\""), "{text}");
}

#[test]
fn a_response_format_binds_the_answer_and_not_the_reasoning() {
    let schema = json!({"type": "object", "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 22]}},
        "required": ["ok", "n"], "additionalProperties": false});
    let tokenizer = tokenizer();
    let script = tokenizer.encode_with_control("Any {thing.</think>");
    let eos = tokenizer.eos();
    for seed in 0..10 {
        let (script, noise, vocab) = (script.clone(), noise(seed), tokenizer.vocab_size());
        let backend = Scripted::new(move |tokens| match script.get(tokens.len() - PROMPT) {
            Some(&token) => one_hot(vocab, token),
            None => noise.rule(tokens),
        });
        let parse = ParseOptions { thinking: true, tools: None };
        let sampling = Sampling::default();
        let options = TurnOptions { parse, sampling, constrain: Constrain::Schema(schema.clone()), ..options(true) };
        let ran = run(backend, &options, 4000).unwrap();
        assert_eq!(
            (ran.outcome.reason, ran.outcome.turn.reasoning.as_str()),
            (StopReason::EndOfTurn(eos), "Any {thing.")
        );
        let answer: Value = serde_json::from_str(&ran.outcome.turn.content).unwrap();
        assert!(answer["ok"].is_boolean() && [json!(1), json!(22)].contains(&answer["n"]), "{answer}");
    }
    let bad = TurnOptions { constrain: Constrain::Schema(json!({"not": {}})), ..options(false) };
    let backend = Scripted::saying(PROMPT, Vec::new(), eos);
    assert!(matches!(run(backend, &bad, 4000), Err(Error::Grammar(_))));
}

/// Calls in other markup than the canonical, spelt without the control token, or in unclosed reasoning passed the mask by.
#[test]
fn grammar_mode_takes_no_call_past_its_mask() {
    let tokenizer = tokenizer();
    let canonical = format!("Sure.{}", block(&call("now", &[])));
    let with_control = |text: &str| tokenizer.encode_with_control(text);
    let plain = canonical.replace("｜DSML｜", "");
    let lost_bar = canonical.replace("<｜", "<").replace("</｜", "</").replace("now", "undeclared");
    let cases = [
        (false, with_control(&plain)),
        (false, with_control(&lost_bar)),
        (false, tokenizer.encode(&canonical)),
        (true, with_control(&canonical)),
    ];
    for (thinking, script) in cases {
        let turn = |constrain| {
            let backend = Scripted::saying(PROMPT, script.clone(), tokenizer.eos());
            run(backend, &TurnOptions { constrain, ..options(thinking) }, 4000).unwrap().outcome.turn
        };
        let text = String::from_utf8(tokenizer.decode(&script)).unwrap();
        assert_eq!(turn(Constrain::Off).calls.len(), 1, "{text}");
        let held = turn(Constrain::Calls);
        assert_eq!((held.calls.len(), held.malformed, held.finish), (0, false, Finish::Stop), "{text}");
        assert_eq!(if thinking { held.reasoning } else { held.content }, text);
    }
    let held = say(&canonical, &TurnOptions { constrain: Constrain::Calls, ..options(false) }).outcome.turn;
    assert_eq!((held.calls.len(), held.content.as_str()), (1, "Sure."));
    assert_eq!(held.raw_block.as_deref(), Some(&canonical["Sure.".len()..]));
}

/// An answer in JSON with markup of calls in it was malformed.
#[test]
fn a_response_format_leaves_no_calls() {
    let tokenizer = tokenizer();
    let schema = json!({"type": "object", "properties": {"s": {"type": "string"}}, "required": ["s"], "additionalProperties": false});
    let constrain = Constrain::Schema(schema);
    for choice in [ToolChoice::Required, ToolChoice::Named("now".to_owned())] {
        let options = TurnOptions { choice, constrain: constrain.clone(), ..options(false) };
        let refused = run(Scripted::saying(PROMPT, Vec::new(), tokenizer.eos()), &options, 4000);
        assert!(matches!(refused, Err(Error::SchemaAndCall)));
    }
    for answer in [r#"{"s": "<tool_calls>"}"#, r#"{"s": "<DSML｜tool_calls>"}"#] {
        let ran = say(answer, &TurnOptions { constrain: constrain.clone(), ..options(false) });
        let turn = &ran.outcome.turn;
        assert_eq!((turn.content.as_str(), turn.malformed, turn.finish), (answer, false, Finish::Stop));
    }
}

/// A model that owes JSON but ends its turn while it reasons: the answer was empty.
#[test]
fn the_end_of_a_turn_that_owes_json_ends_its_reasoning() {
    let tokenizer = tokenizer();
    let script = [tokenizer.encode("Hm."), vec![tokenizer.eos()], tokenizer.encode("[1, 2]")].concat();
    let constrain = Constrain::Schema(json!({"type": "array", "items": {"type": "integer"}}));
    let backend = Scripted::saying(PROMPT, script, tokenizer.eos());
    let outcome = run(backend, &TurnOptions { constrain, ..options(true) }, 4000).unwrap().outcome;
    assert_eq!((outcome.turn.reasoning.as_str(), outcome.turn.content.as_str()), ("Hm.", "[1, 2]"));
    assert_eq!(outcome.reason, StopReason::EndOfTurn(tokenizer.eos()));
}

/// The next prompt begins with the whole turn, so nothing of it is read again.
#[test]
fn the_next_prompt_finds_the_turn_in_the_session() {
    let tokenizer = Arc::new(tokenizer());
    let vocabulary = Arc::new(Vocabulary::new(tokenizer.clone()).unwrap());
    let prompt_options = PromptOptions { encoding: Encoding::V4_2604, mode: Mode::Chat, drop_reasoning: true };
    let system = Message::System { content: "Help.".to_owned(), tools: tools(), response_format: None };
    let mut messages = vec![system, Message::user("How is Paris?")];
    let render =
        |messages: &[Message]| tokenizer.encode_segments(&render(&tokenizer, messages, &prompt_options).unwrap());
    let first = render(&messages);
    // Not the canonical separator, and a call that is written otherwise than a client would write it.
    let said = format!("Sure.{}", &block(&call("get_weather", &[("city", "Paris")]))[1..]);
    let script = tokenizer.encode_with_control(&said);
    let backend = Scripted::saying(first.len(), script, tokenizer.eos());
    let (mut session, logits) = backend.read(&first, 4000);
    let receive = &mut |_| ControlFlow::Continue(());
    let outcome =
        run_turn(&backend, &vocabulary, &mut session, logits, &options(false), &Cancel::default(), receive).unwrap();
    let turn = outcome.turn;
    messages.push(Message::Assistant(AssistantMessage {
        content: turn.content,
        calls: turn.calls,
        raw_block: turn.raw_block,
        ..AssistantMessage::default()
    }));
    messages.push(Message::Tool { call_id: None, content: "Sunny.".to_owned() });
    let second = render(&messages);
    let held = session.tokens().len();
    assert_eq!(held, first.len() + outcome.tokens.len() - 1);
    assert_eq!(session.reuse(&backend, &second), held, "every token of the turn");
}
