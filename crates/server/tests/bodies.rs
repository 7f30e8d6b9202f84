//! Whatever a body holds, reading it ends in a conversation or in an error of the API's shape.

use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use server::json::parse;
use server::request::{self, Api, Defaults};
use session::Sampling;
use text::prompt::{Encoding, Mode};

/// Names that mean something somewhere, and one that does not.
const NAMES: [&str; 48] = [
    "messages",
    "input",
    "prompt",
    "role",
    "content",
    "type",
    "text",
    "tools",
    "tool_choice",
    "function",
    "name",
    "arguments",
    "parameters",
    "input_schema",
    "tool_calls",
    "tool_call_id",
    "call_id",
    "id",
    "output",
    "stream",
    "stream_options",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "stop",
    "stop_sequences",
    "seed",
    "n",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "response_format",
    "json_schema",
    "schema",
    "format",
    "reasoning",
    "effort",
    "summary",
    "thinking",
    "system",
    "instructions",
    "metadata",
    "previous_response_id",
    "tool_use_id",
    "prefix",
    "status",
    "frobnicate",
];

/// Texts that mean something somewhere, and some that do not.
const TEXTS: [&str; 30] = [
    "user",
    "assistant",
    "system",
    "tool",
    "developer",
    "function",
    "text",
    "input_text",
    "output_text",
    "tool_use",
    "tool_result",
    "thinking",
    "function_call",
    "function_call_output",
    "custom",
    "namespace",
    "tool_search",
    "message",
    "reasoning",
    "json_schema",
    "json_object",
    "auto",
    "none",
    "required",
    "high",
    "enabled",
    "completed",
    "c1",
    "",
    "\u{0}😀</think>",
];

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3_i64..20).prop_map(Value::from),
        prop::sample::select(vec!["1e999", "-0.0", "1.5", "18446744073709551616", "1e-400"])
            .prop_map(|text| serde_json::from_str(text).unwrap()),
        prop::sample::select(&TEXTS[..]).prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 60, 6, |inner| {
        let entry = (prop::sample::select(&NAMES[..]), inner.clone());
        let object = vec(entry, 0..6).prop_map(|entries| {
            Value::Object(entries.into_iter().map(|(name, value)| (name.to_owned(), value)).collect::<Map<_, _>>())
        });
        prop_oneof![vec(inner, 0..4).prop_map(Value::Array), object.clone(), object]
    })
}

fn defaults() -> Defaults {
    Defaults {
        encoding: Encoding::V4_0731,
        mode: Mode::default(),
        sampling: Sampling::default(),
        respect_sampling: true,
        max_tokens: 1000,
        always_constrain: false,
        raw_completions: false,
        ignored_fields: vec!["frobnicate".to_owned()],
    }
}

/// Reads a body as every API; how many take it.
fn read(body: &Value) -> usize {
    let taken = |api: Api| match request::read(api, body.clone(), &defaults(), &|_| Ok(Vec::new())) {
        Ok(_) => 1,
        Err(error) => {
            assert_eq!(error.status, 400, "{error:?}");
            let shape = error.body(api.is_anthropic());
            assert!(shape["error"]["message"].is_string(), "{shape}");
            assert_eq!(shape["error"]["type"], "invalid_request_error");
            0
        }
    };
    Api::ALL.into_iter().map(taken).sum()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn any_json_is_read_or_refused(body in value()) {
        read(&body);
    }

    #[test]
    fn any_change_of_a_good_body_is_read_or_refused(name in prop::sample::select(&NAMES[..]), value in value(), at in 0_usize..4) {
        let mut body = [
            json!({"messages": [{"role": "user", "content": "x"}]}),
            json!({"prompt": "x"}),
            json!({"input": "x"}),
            json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
        ][at].clone();
        prop_assert!(read(&body) > 0);
        body[name] = value;
        read(&body);
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in vec(any::<u8>(), 0..200)) {
        if let Ok(body) = parse(&bytes) {
            read(&body);
        }
    }

    #[test]
    fn what_was_written_is_read_back(body in value()) {
        prop_assert_eq!(parse(body.to_string().as_bytes()), Ok(body));
    }
}

#[test]
fn thousands_of_results_are_read_in_no_time() {
    let pairs = (0..4096).flat_map(|index| {
        let id = format!("c{index}");
        [
            json!({"type": "function_call", "call_id": id, "name": "f", "arguments": "{}"}),
            json!({"type": "function_call_output", "call_id": id, "output": "x"}),
        ]
    });
    let body = json!({"input": pairs.collect::<Vec<_>>()});
    request::read(Api::Responses, body, &defaults(), &|_| Ok(Vec::new())).unwrap();
}
