//! Conversations that clients send back, and the tokens that were sampled for them.

mod common;

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::{Arc, LazyLock};

use common::{Scripted, tokenizer};
use model::Cancel;
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use session::database::Database;
use session::replay::Replay;
use session::{Sampling, StopReason, TurnOptions, TurnOutcome, Vocabulary, run_turn};
use text::parse::ParseOptions;
use text::prompt::{AssistantMessage, Call, Encoding, Message, Mode, PromptOptions, Tool, render};
use text::{Segment, Tokenizer};

static VOCABULARY: LazyLock<Arc<Vocabulary>> =
    LazyLock::new(|| Arc::new(Vocabulary::new(Arc::new(tokenizer())).unwrap()));

fn vocabulary() -> &'static Tokenizer {
    VOCABULARY.tokenizer()
}

fn tools() -> Vec<Tool> {
    vec![Tool::from_value(json!({"name": "look", "parameters": {"properties": {"a": {}, "b": {}}}})).unwrap()]
}

/// How a client shows a turn.
#[derive(Clone, Copy, Debug)]
struct Shows {
    reasoning: bool,
    mode: Mode,
    drop_reasoning: bool,
    /// Calls by their ids, so that the server finds the block; else in canonical form.
    by_id: bool,
    /// Keys of arguments in another order.
    reordered: bool,
}

/// What the model says in a turn, and why it ends.
#[derive(Clone, Debug)]
struct Says {
    question: &'static str,
    reasoning: String,
    content: String,
    block: Option<&'static str>,
    /// Bytes, modulo the text's, at which the text is cut before it is encoded: tokens are not those of the whole text.
    cuts: Vec<usize>,
    end: End,
}

#[derive(Clone, Copy, Debug)]
enum End {
    Model,
    Tokens(usize),
    Stop,
    Receiver(usize),
}

/// A conversation with a server, as both know it.
struct Conversation {
    replay: Replay,
    messages: Vec<Message>,
    thinks: bool,
    /// After each turn: the tokens until its EOS, and whether all of them are as sampled.
    turns: Vec<(Vec<u32>, bool)>,
}

const SHOWS_ALL: Shows = Shows {
    reasoning: true,
    mode: Mode::Thinking { effort: None },
    drop_reasoning: false,
    by_id: true,
    reordered: false,
};

fn segments(messages: &[Message], shows: Shows) -> Vec<Segment> {
    let Shows { mode, drop_reasoning, .. } = shows;
    render(vocabulary(), messages, &PromptOptions { encoding: Encoding::V4_0731, mode, drop_reasoning }).unwrap()
}

/// The ids of all calls.
fn ids(messages: &[Message]) -> HashSet<&str> {
    let calls = messages.iter().filter_map(|message| match message {
        Message::Assistant(message) => Some(&message.calls),
        _ => None,
    });
    calls.flatten().filter_map(|call| call.id.as_deref()).collect()
}

impl Conversation {
    fn new(with_tools: bool, thinks: bool) -> Conversation {
        let tools = if with_tools { tools() } else { Vec::new() };
        let system = Message::System { content: "Be brief.".into(), tools, response_format: None };
        Conversation {
            replay: Replay::new(&Database::in_memory(), 7),
            messages: vec![system],
            thinks,
            turns: Vec::new(),
        }
    }

    fn mode(&self) -> Shows {
        let mode = if self.thinks { Mode::Thinking { effort: None } } else { Mode::Chat };
        Shows { mode, ..SHOWS_ALL }
    }

    /// Asks and is answered; the server remembers.
    fn turn(&mut self, says: &Says) {
        let has_calls = matches!(self.messages.last(), Some(Message::Assistant(last)) if !last.calls.is_empty());
        let question = if has_calls { Message::tool("id", says.question) } else { Message::user(says.question) };
        self.messages.push(question);
        let prompt = self.prompt(&self.messages, self.mode());
        let outcome = generate(&prompt, says, self.thinks);
        let ids: Vec<String> = (0..outcome.turn.calls.len()).map(|i| format!("{}-{i}", self.turns.len())).collect();
        self.replay.remember(vocabulary(), &prompt, &outcome, &ids).unwrap();
        let calls = outcome.turn.calls.iter().zip(&ids).map(|(c, id)| Call { id: Some(id.clone()), ..c.clone() });
        let turn = &outcome.turn;
        self.messages.push(Message::Assistant(AssistantMessage {
            reasoning: turn.reasoning.clone(),
            content: turn.content.clone(),
            calls: calls.collect(),
            ..AssistantMessage::default()
        }));
        let exact = matches!(outcome.reason, StopReason::EndOfTurn(_) | StopReason::CallsClosed);
        self.turns.push(([&prompt[..], &outcome.tokens, &[vocabulary().eos()]].concat(), exact));
    }

    /// The conversation as a client sends it back, before a further question.
    fn shown(&self, shows: Shows) -> Vec<Message> {
        let mut messages = self.messages.clone();
        for message in &mut messages {
            let Message::Assistant(message) = message else { continue };
            if !shows.reasoning {
                message.reasoning.clear();
            }
            if shows.reordered {
                message.calls.iter_mut().for_each(reorder);
            }
            if shows.by_id {
                message.raw_block = self.replay.block(&message.calls);
            }
        }
        messages.push(Message::user("And now?"));
        messages
    }

    fn prompt(&self, messages: &[Message], shows: Shows) -> Vec<u32> {
        self.replay.prompt(vocabulary(), &segments(messages, shows), &ids(messages)).tokens
    }
}

/// The same arguments, keys in reverse.
fn reorder(call: &mut Call) {
    let arguments: Map<String, Value> = serde_json::from_str(&call.arguments).unwrap();
    let reversed: Map<String, Value> = arguments.into_iter().rev().collect();
    call.arguments = Value::from(reversed).to_string();
}

/// Lets the model say it.
fn generate(prompt: &[u32], says: &Says, thinks: bool) -> TurnOutcome {
    let reasoning = if thinks { format!("{}</think>", says.reasoning) } else { String::new() };
    let text = [reasoning.as_str(), &says.content, says.block.unwrap_or("")].concat();
    let script = encode_in_pieces(&text, &says.cuts);
    let backend = Scripted::saying(prompt.len(), script, vocabulary().eos());
    let (mut session, logits) = backend.read(prompt, 8000);
    let options = TurnOptions {
        parse: ParseOptions { thinking: thinks, tools: Some(tools()) },
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        max_tokens: if let End::Tokens(most) = says.end { most } else { usize::MAX },
        stop_strings: if let End::Stop = says.end { vec!["b".into()] } else { Vec::new() },
        ..TurnOptions::default()
    };
    let mut left = if let End::Receiver(events) = says.end { events } else { usize::MAX };
    run_turn(&backend, &VOCABULARY, &mut session, logits, &options, &Cancel::default(), &mut |_| {
        left -= 1;
        if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
    .unwrap()
}

fn encode_in_pieces(text: &str, cuts: &[usize]) -> Vec<u32> {
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (text.len() + 1)).collect();
    cuts.retain(|&cut| text.is_char_boundary(cut));
    cuts.extend([0, text.len()]);
    cuts.sort_unstable();
    cuts.windows(2).flat_map(|cut| vocabulary().encode_with_control(&text[cut[0]..cut[1]])).collect()
}

/// Spelt as the format has it, and as models spell it as well.
const BLOCKS: [&str; 3] = [
    "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"look\">\n<｜DSML｜parameter name=\"a\" string=\"true\">x <think> \
     y</｜DSML｜parameter>\n<｜DSML｜parameter name=\"b\" string=\"false\">[1, 2.50]</｜DSML｜parameter>\n</｜DSML｜invoke>\n\
     </｜DSML｜tool_calls>",
    "\n<｜DSML｜toolcalls><｜DSML｜invoke name=\"look\"><｜DSML｜parameter name=\"b\" string=\"false\">{\"k\":1,  \"l\":2}\
     </｜DSML｜parameter><｜DSML｜parameter name=\"a\" string=\"true\">ü</｜DSML｜parameter></｜DSML｜invoke>\
     </｜DSML｜toolcalls>",
    "<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"look\">\n\n</｜DSML｜invoke>\n<｜DSML｜invoke name=\"look\">\n\
     <｜DSML｜parameter name=\"a\" string=\"true\"></｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
];

fn says(with_tools: bool) -> impl Strategy<Value = Says> {
    let pieces = ["a", "b", "the cat sat", " ", "\n", "é", "中文", "<think>", "<", "</tool_result>", "｜", "1234"];
    let text = || prop::collection::vec(prop::sample::select(pieces.to_vec()), 0..8).prop_map(|parts| parts.concat());
    let content = (text(), prop::bool::weighted(0.1))
        .prop_map(|(text, thinks)| if thinks { format!("{text}</think>{text}") } else { text });
    let block = prop::option::weighted(if with_tools { 0.5 } else { 1e-9 }, prop::sample::select(BLOCKS.to_vec()));
    let end = prop_oneof![
        5 => Just(End::Model),
        1 => (1usize..60).prop_map(End::Tokens),
        1 => Just(End::Stop),
        1 => (1usize..60).prop_map(End::Receiver),
    ];
    let question = prop::sample::select(vec!["q", "why", "<｜User｜>", "是"]);
    let cuts = prop::collection::vec(any::<usize>(), 0..6);
    (question, text(), content, block, cuts, end).prop_map(|(question, reasoning, content, block, cuts, end)| Says {
        question,
        reasoning,
        content,
        block,
        cuts,
        end,
    })
}

fn conversation() -> impl Strategy<Value = (bool, bool, Vec<Says>)> {
    let turns = any::<bool>().prop_flat_map(|tools| (Just(tools), prop::collection::vec(says(tools), 1..5)));
    (any::<bool>(), turns).prop_map(|(thinks, (tools, turns))| (tools, thinks, turns))
}

fn shows() -> impl Strategy<Value = Shows> {
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    flags.prop_map(|(reasoning, thinks, drop_reasoning, by_id)| {
        let mode = if thinks { Mode::Thinking { effort: None } } else { Mode::Chat };
        Shows { reasoning, mode, drop_reasoning, by_id, reordered: false }
    })
}

/// The segments after so many turns.
fn after_turns(segments: &[Segment], turns: usize) -> &[Segment] {
    let eos = Segment::Control(vocabulary().eos());
    let ends = segments.iter().enumerate().filter(|(_, segment)| **segment == eos).map(|(at, _)| at + 1);
    &segments[std::iter::once(0).chain(ends).nth(turns).unwrap()..]
}

/// Whether the conversation so far reads as it did when it was generated.
fn is_as_shown(conversation: &Conversation, shows: Shows) -> bool {
    let all = Shows { drop_reasoning: false, ..conversation.mode() };
    let [then, now] = [segments(&conversation.messages, all), segments(&conversation.shown(shows), shows)];
    now.starts_with(&then)
}

/// Whether a turn has calls, or says in these segments what was sampled.
fn is_proven_or_shown(conversation: &Conversation, segments: &[Segment], turn: usize) -> bool {
    let mut answers = conversation.messages.iter().filter_map(|message| match message {
        Message::Assistant(message) => Some(message),
        _ => None,
    });
    let has_calls = !answers.nth(turn).unwrap().calls.is_empty();
    let begin = match turn.checked_sub(1) {
        Some(before) => conversation.turns[before].0.len(),
        None => 0,
    };
    let sampled = vocabulary().decode(&conversation.turns[turn].0[begin..]);
    let behind = after_turns(segments, turn + 1).len();
    let shown = &after_turns(segments, turn)[..after_turns(segments, turn).len() - behind];
    has_calls || vocabulary().decode(&vocabulary().encode_segments(shown)) == sampled
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    /// However a conversation is shown, what was sampled stands in the prompt: of each turn that has calls, or is shown as it was, up to
    /// the first that is neither.
    #[test]
    fn what_was_sampled_stands_in_the_prompt((tools, thinks, turns) in conversation(), shows in shows()) {
        let mut conversation = Conversation::new(tools, thinks);
        for says in &turns {
            conversation.turn(says);
        }
        let messages = conversation.shown(shows);
        let prompt = conversation.prompt(&messages, shows);
        let segments = segments(&messages, shows);
        for (number, (expected, exact)) in conversation.turns.iter().enumerate() {
            if !is_proven_or_shown(&conversation, &segments, number) {
                break;
            }
            prop_assert!(!exact || prompt.starts_with(expected), "turn {}", number);
        }
        let end = after_turns(&segments, conversation.turns.len());
        prop_assert!(prompt.ends_with(&vocabulary().encode_segments(end)));
    }

    /// However a turn that was cut off is shown, its prompt says what the client was shown, in sampled tokens where it can be.
    #[test]
    fn a_turn_cut_off_is_what_was_shown(thinks in any::<bool>(), says in says(false), most in 1usize..60, shows in shows()) {
        let mut conversation = Conversation::new(false, thinks);
        let end = if let End::Model = says.end { End::Tokens(most) } else { says.end };
        conversation.turn(&Says { end, ..says });
        prop_assume!(!conversation.turns[0].1);
        let prompt = conversation.prompt(&conversation.shown(shows), shows);
        if !is_as_shown(&conversation, shows) {
            // Without calls, what hides some of it is its text.
            let text = vocabulary().encode_segments(&segments(&conversation.shown(shows), shows));
            prop_assert_eq!(prompt, text);
            return Ok(());
        }
        let all = Shows { drop_reasoning: false, ..conversation.mode() };
        let shown = segments(&conversation.messages, all);
        let text = vocabulary().decode(&vocabulary().encode_segments(&shown));
        let (said, next) = prompt.split_at(1 + prompt.iter().position(|&token| token == vocabulary().eos()).unwrap());
        prop_assert_eq!(vocabulary().decode(said), text);
        prop_assert_eq!(next, vocabulary().encode_segments(after_turns(&segments(&conversation.shown(shows), shows), 1)));
        let sampled = &conversation.turns[0].0;
        let sampled = &sampled[..sampled.len() - 1];
        let same = said.iter().zip(sampled).take_while(|(said, sampled)| said == sampled).count();
        let is_whole = vocabulary().decode(said).starts_with(&vocabulary().decode(sampled));
        prop_assert!(!is_whole || same == sampled.len(), "{} of {}", same, sampled.len());
    }

    /// From a changed character on nothing that was sampled is used; before it, all is.
    #[test]
    fn a_changed_character_is_encoded(
        (tools, thinks, turns) in conversation(), shows in shows(), at in any::<prop::sample::Index>(),
    ) {
        let mut conversation = Conversation::new(tools, thinks);
        for says in &turns {
            conversation.turn(&Says { end: End::Model, ..says.clone() });
        }
        let mut messages = conversation.shown(shows);
        let unchanged = segments(&messages, shows);
        let at = at.index(messages.len() - 1);
        let earlier = messages[..at].iter().filter(|message| matches!(message, Message::Assistant(_))).count();
        match &mut messages[at] {
            Message::System { content, .. } | Message::User { content, .. } | Message::Tool { content, .. } => content.push('x'),
            Message::Assistant(message) if message.calls.is_empty() => message.content.insert(0, 'x'),
            Message::Assistant(message) => {
                message.calls[0].arguments = "{\"a\": \"x\"}".into();
                message.raw_block = conversation.replay.block(&message.calls);
                prop_assert_eq!(&message.raw_block, &None);
            }
            other => panic!("{other:?}"),
        }
        let changed = segments(&messages, shows);
        prop_assert_ne!(&changed, &unchanged);
        prop_assume!((0..earlier).all(|turn| is_proven_or_shown(&conversation, &unchanged, turn)));
        let kept = if earlier == 0 { Vec::new() } else { conversation.turns[earlier - 1].0.clone() };
        let expected = [kept, vocabulary().encode_segments(after_turns(&changed, earlier))].concat();
        prop_assert_eq!(conversation.prompt(&messages, shows), expected);
    }

    /// Without a record a prompt is its text.
    #[test]
    fn what_is_not_known_is_encoded((tools, thinks, turns) in conversation(), shows in shows()) {
        let mut conversation = Conversation::new(tools, thinks);
        for says in &turns {
            conversation.turn(says);
        }
        let segments = segments(&conversation.shown(shows), shows);
        for other in [Replay::new(&Database::in_memory(), 7), Replay::new(&Database::in_memory(), 8)] {
            let prompt = other.prompt(vocabulary(), &segments, &ids(&conversation.messages));
            prop_assert_eq!(&prompt.tokens, &vocabulary().encode_segments(&segments));
            let common = vocabulary().decode(&prompt.tokens[..prompt.common_tokens]);
            prop_assert!(common.starts_with("<｜begin▁of▁sentence｜>Be brief.".as_bytes()), "{}", String::from_utf8_lossy(&common));
            prop_assert_eq!(prompt.tokens[prompt.common_tokens], vocabulary().control("<｜User｜>").unwrap());
        }
    }
}

fn called(block: &'static str) -> Conversation {
    let mut conversation = Conversation::new(true, true);
    let (reasoning, content) = ("the cat sat".to_owned(), "So:".to_owned());
    let says = Says { question: "q", reasoning, content, block: Some(block), cuts: vec![2, 5], end: End::Model };
    conversation.turn(&says);
    conversation
}

#[test]
fn calls_are_exact_by_id_whatever_the_order_of_their_keys() {
    for block in BLOCKS {
        let conversation = called(block);
        let sampled = &conversation.turns[0].0;
        let by_id = Shows { reordered: true, ..SHOWS_ALL };
        assert!(conversation.prompt(&conversation.shown(by_id), by_id).starts_with(sampled));
        let canonical = Shows { by_id: false, ..SHOWS_ALL };
        assert!(conversation.prompt(&conversation.shown(canonical), canonical).starts_with(sampled));
        let reordered = Shows { by_id: false, reordered: true, ..SHOWS_ALL };
        let messages = conversation.shown(reordered);
        let is_same = segments(&messages, canonical) == segments(&conversation.shown(canonical), canonical);
        assert_eq!(conversation.prompt(&messages, reordered).starts_with(sampled), is_same);
    }
}

/// What one client was not shown must not reach another's prompt, though their conversations look the same.
#[test]
fn hidden_text_stays_with_who_knows_the_calls() {
    let hides = [
        Shows { reasoning: false, ..SHOWS_ALL },
        Shows { reasoning: false, mode: Mode::Chat, ..SHOWS_ALL },
        Shows { reasoning: false, by_id: false, ..SHOWS_ALL },
    ];
    let conversation = called(BLOCKS[1]);
    for shows in hides {
        let mut messages = conversation.shown(shows);
        assert!(conversation.prompt(&messages, shows).starts_with(&conversation.turns[0].0), "its own, {shows:?}");
        let plain = vocabulary().encode_segments(&segments(&messages, shows));
        for id in [None, Some("another"), Some("0-1"), Some("")] {
            for message in &mut messages {
                let Message::Assistant(message) = message else { continue };
                message.calls[0].id = id.map(str::to_owned);
            }
            assert_eq!(conversation.prompt(&messages, shows), plain, "{id:?} {shows:?}");
        }
    }
    // The model's own spelling of a block is text, too.
    let canonical = Shows { by_id: false, ..SHOWS_ALL };
    let rendered = segments(&conversation.shown(canonical), canonical);
    let stranger = conversation.replay.prompt(vocabulary(), &rendered, &HashSet::new()).tokens;
    assert_eq!(stranger, vocabulary().encode_segments(&rendered));
    // Who shows all of it learns nothing but where tokens end.
    let rendered = segments(&conversation.shown(SHOWS_ALL), SHOWS_ALL);
    let stranger = conversation.replay.prompt(vocabulary(), &rendered, &HashSet::new()).tokens;
    assert!(stranger.starts_with(&conversation.turns[0].0));
    let text = |tokens: &[u32]| vocabulary().decode(tokens);
    assert_eq!(text(&stranger), text(&vocabulary().encode_segments(&rendered)));
}

/// A turn without calls proves nothing: without its reasoning it is its text, for everybody.
#[test]
fn a_turn_without_calls_has_no_hidden_forms() {
    let mut conversation = Conversation::new(false, true);
    let (reasoning, content) = ("the cat sat".to_owned(), "So:".to_owned());
    conversation.turn(&Says { question: "q", reasoning, content, block: None, cuts: vec![2, 5], end: End::Model });
    let hides = Shows { reasoning: false, ..SHOWS_ALL };
    let messages = conversation.shown(hides);
    assert_eq!(conversation.prompt(&messages, hides), vocabulary().encode_segments(&segments(&messages, hides)));
    assert!(conversation.prompt(&conversation.shown(SHOWS_ALL), SHOWS_ALL).starts_with(&conversation.turns[0].0));
}

#[test]
fn a_block_is_its_own_calls_only() {
    let conversation = called(BLOCKS[2]);
    let Message::Assistant(AssistantMessage { calls, .. }) = conversation.messages.last().unwrap() else { panic!() };
    let block = |calls: &[Call]| conversation.replay.block(calls);
    assert_eq!(block(calls).as_deref(), Some(BLOCKS[2]));
    assert_eq!(block(&calls[..1]), None, "the client dropped a call");
    assert_eq!(block(&[calls[1].clone(), calls[0].clone()]), None, "the client swapped them");
    assert_eq!(block(&[Call { arguments: "{\"a\":1}".into(), ..calls[0].clone() }, calls[1].clone()]), None);
    assert_eq!(block(&[Call { id: None, ..calls[0].clone() }, calls[1].clone()]), None);
    assert_eq!(block(&[]), None);
}

#[test]
fn ids_that_are_too_long_are_not_kept() {
    let conversation = called(BLOCKS[2]);
    let prompt = vec![vocabulary().bos()];
    let says = Says {
        question: "",
        reasoning: "".into(),
        content: "".into(),
        block: Some(BLOCKS[2]),
        cuts: vec![],
        end: End::Model,
    };
    let outcome = generate(&prompt, &says, false);
    for (bytes, kept) in [(256, true), (257, false)] {
        let ids = ["i".repeat(bytes), "j".to_owned()];
        conversation.replay.remember(vocabulary(), &prompt, &outcome, &ids).unwrap();
        let calls = outcome.turn.calls.iter().zip(&ids).map(|(call, id)| Call { id: Some(id.clone()), ..call.clone() });
        assert_eq!(conversation.replay.block(&calls.collect::<Vec<_>>()).is_some(), kept);
    }
}

#[test]
fn it_survives_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let mut conversation = called(BLOCKS[1]);
    let messages = conversation.shown(SHOWS_ALL);
    let exact = conversation.prompt(&messages, SHOWS_ALL);
    let (database, aside) = Database::open(folder.path()).unwrap();
    assert_eq!(aside, None);
    conversation.replay = Replay::new(&database, 7);
    conversation.messages.truncate(1);
    conversation.turns.clear();
    let (reasoning, content) = ("the cat sat".to_owned(), "So:".to_owned());
    conversation.turn(&Says {
        question: "q",
        reasoning,
        content,
        block: Some(BLOCKS[1]),
        cuts: vec![2, 5],
        end: End::Model,
    });
    conversation.replay = Replay::new(&Database::in_memory(), 7);
    drop(database);
    let (database, aside) = Database::open(folder.path()).unwrap();
    assert_eq!(aside, None);
    conversation.replay = Replay::new(&database, 7);
    assert_eq!(conversation.prompt(&messages, SHOWS_ALL), exact);
    assert_eq!(conversation.shown(SHOWS_ALL), messages, "the block, too");
    conversation.replay = Replay::new(&database, 8);
    assert_ne!(conversation.prompt(&messages, SHOWS_ALL), exact, "another model's tokens");
}
