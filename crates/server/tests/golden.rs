//! Requests to answers, whole and streamed, without sockets: what each API says of the same turns (`tests/snapshots`).

use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use gguf::Gguf;
use serde_json::{Value, json};
use server::error::ApiError;
use server::frame::Frame;
use server::reply::{About, Delta, Finished, Prompted, Reply, reply};
use server::request::{self, Api, Defaults};
use session::engine::Usage;
use session::{Sampling, Vocabulary};
use text::parse::{EngineFinish, Event, ParseOptions, TurnParser};
use text::prompt::{Call, Encoding, Mode, Tool};
use text::{Tokenizer, TokenizerData};

static NANO: &[u8] = include_bytes!("../../../models/nano.gguf");

const CALLS: &str = "Let me look.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"weather\">\n\
    <｜DSML｜parameter name=\"city\" string=\"true\">Rome</｜DSML｜parameter>\n</｜DSML｜invoke>\n\
    <｜DSML｜invoke name=\"weather\">\n<｜DSML｜parameter name=\"days\" string=\"false\">3</｜DSML｜parameter>\n\
    </｜DSML｜invoke>\n</｜DSML｜tool_calls>";

/// A turn: its name, what the model wrote, how it ended, the stop string that ended it.
const TURNS: [(&str, &str, EngineFinish, Option<&str>); 6] = [
    ("text", "</think>Hello there!", EngineFinish::Stop, None),
    ("thinking", "Hmm.</think>Hello there!", EngineFinish::Stop, None),
    ("calls", CALLS, EngineFinish::Stop, None),
    ("malformed", "Sure.\n\n<｜DSML｜tool_calls>\nnonsense\n</｜DSML｜tool_calls>", EngineFinish::Stop, None),
    ("length", "One, two, thr", EngineFinish::Length, None),
    ("stop", "One, two, ", EngineFinish::Stop, Some("three")),
];

fn vocabulary() -> Arc<Vocabulary> {
    let metadata = Gguf::parse("nano", NANO).unwrap().metadata;
    let strings = |key: &str| metadata.str_array(key).unwrap().iter().map(str::to_owned).collect();
    let types = metadata.i64_array("tokenizer.ggml.token_type").unwrap();
    let tokenizer = Tokenizer::new(TokenizerData {
        tokens: strings("tokenizer.ggml.tokens"),
        token_types: types.into_iter().map(|kind| kind as i32).collect(),
        merges: strings("tokenizer.ggml.merges"),
        pre: metadata.str("tokenizer.ggml.pre").unwrap().to_owned(),
        bos: metadata.u32("tokenizer.ggml.bos_token_id").unwrap(),
        eos: metadata.u32("tokenizer.ggml.eos_token_id").unwrap(),
    });
    Arc::new(Vocabulary::new(Arc::new(tokenizer.unwrap())).unwrap())
}

fn defaults() -> Defaults {
    Defaults {
        encoding: Encoding::V4_2604,
        mode: Mode::default(),
        sampling: Sampling::default(),
        respect_sampling: false,
        max_tokens: 1000,
        always_constrain: false,
        raw_completions: false,
        ignored_fields: Vec::new(),
    }
}

/// A request that asks for everything that an answer can show.
fn body(api: Api) -> Value {
    match api {
        Api::Chat => json!({"model": "m", "messages": [{"content": "x"}], "stream_options": {"include_usage": true}}),
        Api::Completions => json!({"model": "m", "prompt": "x", "stream_options": {"include_usage": true}}),
        Api::Responses => json!({"model": "m", "input": "x", "reasoning": {"summary": "auto"}}),
        Api::Messages => json!({"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 9}),
    }
}

fn new_reply(api: Api, vocabulary: &Arc<Vocabulary>) -> Box<dyn Reply> {
    let conversation = request::read(api, body(api), &defaults(), &|_| Ok(Vec::new())).unwrap();
    let mut number = 0;
    let numbers = Box::new(move || {
        number += 1;
        number
    });
    let about = About { model: "m".into(), created: 1_767_225_600, numbers, vocabulary: vocabulary.clone() };
    reply(&conversation, about)
}

/// What a turn's text comes to, by the parser that the engine has.
fn turn(name: &str, text: &str, finish: EngineFinish, stop_string: Option<&str>) -> (Vec<Delta>, Finished) {
    let tool = json!({"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}});
    let options = ParseOptions { thinking: name == "thinking", tools: Some(vec![Tool::from_value(tool).unwrap()]) };
    let (mut parser, mut events) = (TurnParser::new(&options), Vec::new());
    text.split_inclusive(' ').for_each(|piece| parser.push(piece.as_bytes(), &mut events));
    let turn = parser.finish(finish, &mut events);
    let id = |index: usize| format!("call-{index}");
    let delta = |event| match event {
        Event::Reasoning(text) => Delta::Reasoning(text),
        Event::Content(text) => Delta::Content(text),
        Event::CallBegin { index, name } => Delta::CallBegin { index, id: id(index), name },
        Event::CallArguments { index, delta } => Delta::CallArguments { index, delta },
        Event::CallEnd { index } => Delta::CallEnd { index },
    };
    let calls = turn.calls.iter().enumerate().map(|(index, call)| Call { id: Some(id(index)), ..call.clone() });
    let finished = Finished {
        reasoning: turn.reasoning.clone(),
        content: turn.content.clone(),
        calls: calls.collect(),
        finish: turn.finish,
        stop_string: stop_string.map(str::to_owned),
        usage: Usage {
            prompt_tokens: 100,
            cached_tokens: 60,
            completion_tokens: 20,
            reasoning_tokens: 5,
            queued: Duration::ZERO,
            prefill: Duration::from_millis(400),
            decode: Duration::from_secs(2),
        },
    };
    (events.into_iter().map(delta).collect(), finished)
}

#[test]
fn every_api_tells_every_turn() {
    let vocabulary = vocabulary();
    let prompted = Prompted { prompt_tokens: 100, cached_tokens: 60 };
    for api in Api::ALL {
        for (name, text, finish, stop_string) in TURNS {
            let (deltas, finished) = turn(name, text, finish, stop_string);
            let mut stream = new_reply(api, &vocabulary);
            let mut frames = stream.start(prompted);
            frames.push(stream.ping());
            frames.extend(deltas.iter().flat_map(|delta| stream.delta(delta)));
            frames.extend(stream.end(&finished));

            let mut whole = new_reply(api, &vocabulary);
            deltas.iter().for_each(|delta| drop(whole.delta(delta)));
            let mut transcript: String = frames.iter().map(Frame::text).collect();
            write!(transcript, "--- whole\n{:#}", whole.whole(&finished)).unwrap();
            insta::assert_snapshot!(format!("{}-{name}", api.name()), transcript);
        }
    }
}

#[test]
fn every_api_tells_of_an_end_before_the_end() {
    let vocabulary = vocabulary();
    for api in Api::ALL {
        let mut stream = new_reply(api, &vocabulary);
        let mut frames = stream.start(Prompted { prompt_tokens: 100, cached_tokens: 0 });
        frames.extend(stream.delta(&Delta::Content("One, two".to_owned())));
        frames.extend(stream.fail(&ApiError::new(503, "the server is shutting down")));
        let transcript: String = frames.iter().map(Frame::text).collect();
        insta::assert_snapshot!(format!("{}-cancelled", api.name()), transcript);
    }
}
