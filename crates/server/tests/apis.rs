//! The four APIs over sockets: whole and streamed, loops of tools, errors.

mod common;

use common::{Answer, REASONING, Running};
use serde_json::{Value, json};
use server::Options;

const CHAT: &str = "/v1/chat/completions";
const MESSAGES: &str = "/v1/messages";
const RESPONSES: &str = "/v1/responses";

fn running() -> Running {
    Running::new(Options::default())
}

fn weather() -> Value {
    json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]})
}

/// What the deltas of a chat's stream add up to under a name.
fn streamed(answer: &Answer, name: &str) -> String {
    answer.frames().iter().filter_map(|frame| frame["choices"][0]["delta"][name].as_str()).collect()
}

#[test]
fn chat_answers_whole_and_streamed() {
    let running = running();
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hello ".repeat(40)}]});
    let answer = running.post(CHAT, &body).json();
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "m");
    let message = json!({"role": "assistant", "content": "Hello there!", "reasoning_content": REASONING});
    assert_eq!(answer["choices"][0]["message"], message);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let usage = &answer["usage"];
    assert!(usage["prompt_tokens"].as_u64() > Some(0) && usage["completion_tokens"].as_u64() > Some(0), "{usage}");
    assert!(usage["completion_tokens_details"]["reasoning_tokens"].as_u64() > Some(0), "{usage}");

    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    let stream = running.post(CHAT, &body);
    assert_eq!(stream.header("content-type"), Some("text/event-stream; charset=utf-8"));
    assert!(stream.body.ends_with("data: [DONE]\n\n"), "{}", stream.body);
    assert_eq!(streamed(&stream, "content"), "Hello there!");
    assert_eq!(streamed(&stream, "reasoning_content"), REASONING);
    let frames = stream.frames();
    assert_eq!(frames[0]["choices"][0]["delta"], json!({"role": "assistant"}));
    let last = frames.last().unwrap();
    assert_eq!(last["choices"], json!([]));
    let again = &last["usage"];
    assert_eq!(again["prompt_tokens"], usage["prompt_tokens"]);
    assert!(again["prompt_tokens_details"]["cached_tokens"].as_u64() > Some(0), "the same prompt is held: {again}");
}

#[test]
fn chat_runs_a_loop_of_tools() {
    let running = running();
    let tool = json!({"type": "function", "function": {"name": "weather", "parameters": weather()}});
    let mut body = json!({"messages": [{"role": "user", "content": "weather?"}], "tools": [tool]});
    let first = running.post(CHAT, &body).json();
    let message = first["choices"][0]["message"].clone();
    assert_eq!(message["content"], "Let me look.");
    let calls = message["tool_calls"].as_array().unwrap().clone();
    assert_eq!(calls.len(), 2);
    assert_eq!(calls[1]["function"], json!({"name": "weather", "arguments": "{\"city\": \"Oslo\"}"}));
    assert!(calls[0]["id"].as_str().unwrap().starts_with("call_"));

    let messages = body["messages"].as_array_mut().unwrap();
    messages.push(message);
    messages[1].as_object_mut().unwrap().remove("reasoning_content");
    for call in &calls {
        messages.push(json!({"role": "tool", "tool_call_id": call["id"], "content": "fine"}));
    }
    let answer = running.post(CHAT, &body).json();
    assert_eq!(answer["choices"][0]["message"]["content"], "The weather is fine.");
    let cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached + 1 >= first["usage"]["total_tokens"].as_u64().unwrap(), "{cached} tokens of {}", first["usage"]);

    body["messages"] = json!([{"role": "user", "content": "weather?"}]);
    body["stream"] = json!(true);
    let stream = running.post(CHAT, &body);
    let deltas: Vec<Value> = stream.frames().iter().map(|frame| frame["choices"][0].clone()).collect();
    let of = |index: u64| {
        let calls = deltas.iter().filter_map(|choice| choice["delta"]["tool_calls"][0].as_object());
        let arguments =
            calls.filter(|call| call["index"] == index).filter_map(|call| call["function"]["arguments"].as_str());
        arguments.collect::<String>()
    };
    assert_eq!((of(0).as_str(), of(1).as_str()), ("{\"city\": \"Rome\"}", "{\"city\": \"Oslo\"}"));
    assert_eq!(deltas.last().unwrap()["finish_reason"], "tool_calls");

    body["parallel_tool_calls"] = json!(false);
    body["stream"] = json!(false);
    let single = running.post(CHAT, &body).json();
    assert_eq!(single["choices"][0]["message"]["tool_calls"].as_array().unwrap().len(), 1);
    assert_eq!(single["choices"][0]["finish_reason"], "tool_calls");
}

#[test]
fn a_malformed_call_is_tried_again_once() {
    let running = running();
    let tool = json!({"type": "function", "function": {"name": "weather", "parameters": weather()}});
    let body = json!({"messages": [{"role": "user", "content": "garbled"}], "tools": [tool], "thinking": false});
    let answer = running.post(CHAT, &body).json();
    // The second prompt ends in a tool's result, and that keyword has an answer.
    assert_eq!(answer["choices"][0]["message"]["content"], "Sure.The weather is fine.");
    let mut streaming = body.clone();
    streaming["stream"] = json!(true);
    let stream = running.post(CHAT, &streaming);
    assert_eq!(streamed(&stream, "content"), "Sure.The weather is fine.");
    assert!(running.get("/metrics").body.contains("infall_recoveries_total 2"));
}

#[test]
fn a_second_try_reasons_in_a_new_paragraph() {
    let running = running();
    let tool = json!({"type": "function", "function": {"name": "weather", "parameters": weather()}});
    let mut body = json!({"messages": [{"role": "user", "content": "garbled"}], "tools": [tool]});
    let reasoning = format!("{REASONING}\n\n{REASONING}");
    assert_eq!(running.post(CHAT, &body).json()["choices"][0]["message"]["reasoning_content"], reasoning);
    body["stream"] = json!(true);
    assert_eq!(streamed(&running.post(CHAT, &body), "reasoning_content"), reasoning);
}

#[test]
fn a_response_that_cannot_be_stored_is_still_an_answer() {
    let running = running();
    let item = json!({"role": "user", "content": "hello", "junk": "x".repeat(17 << 20)});
    let body = json!({"input": [item]});
    let answer = running.post(RESPONSES, &body).json();
    assert_eq!((&answer["status"], &answer["store"]), (&json!("completed"), &json!(false)));
    let mut streaming = body;
    streaming["stream"] = json!(true);
    let stream = running.post(RESPONSES, &streaming);
    assert_eq!(stream.frames().last().unwrap()["response"]["store"], false);
    assert_eq!(running.get(&format!("{RESPONSES}/{}", answer["id"].as_str().unwrap())).status, 404);
    assert!(running.get("/metrics").body.contains("infall_records_failed_total 2"));

    let running = Running::new(Options { stored_responses: 0, ..Options::default() });
    let answer = running.post(RESPONSES, &json!({"input": "hello"})).json();
    assert_eq!((&answer["status"], &answer["store"]), (&json!("completed"), &json!(false)));
    assert!(running.get("/metrics").body.contains("infall_records_failed_total 0"));
}

#[test]
fn the_trace_has_refusals() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace");
    let running = Running::new(Options { trace: Some(trace.clone()), ..Options::default() });
    assert_eq!(running.post(CHAT, &json!({"messages": [], "mark": 1})).status, 400);
    let text = std::fs::read_to_string(trace).unwrap();
    assert!(text.contains("\"mark\":1") && text.contains("refused with 400"), "{text}");
}

#[test]
fn messages_answer_whole_and_streamed() {
    let running = running();
    let tool = json!({"name": "weather", "input_schema": weather()});
    let mut body = json!({
        "model": "claude", "max_tokens": 500, "tools": [tool],
        "system": [{"type": "text", "text": "x-anthropic-billing: 1"}, {"type": "text", "text": "Be brief."}],
        "messages": [{"role": "user", "content": "weather?"}],
    });
    let answer = running.post(MESSAGES, &body).json();
    assert_eq!(answer["stop_reason"], "tool_use");
    let content = answer["content"].as_array().unwrap().clone();
    let kinds: Vec<_> = content.iter().map(|block| block["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["thinking", "text", "tool_use", "tool_use"]);
    assert_eq!(content[3]["input"], json!({"city": "Oslo"}));

    body["stream"] = json!(true);
    let stream = running.post(MESSAGES, &body);
    let frames = stream.frames();
    let types: Vec<_> = frames.iter().map(|frame| frame["type"].as_str().unwrap()).collect();
    assert_eq!((types[0], *types.last().unwrap()), ("message_start", "message_stop"));
    assert_eq!(types.iter().filter(|kind| **kind == "content_block_stop").count(), 4);
    body["stream"] = json!(false);

    let results = [2, 3].map(|at: usize| {
        json!({"type": "tool_result", "tool_use_id": content[at]["id"], "content": [{"type": "text", "text": "fine"}]})
    });
    let messages = body["messages"].as_array_mut().unwrap();
    messages.push(json!({"content": content, "role": "assistant"}));
    messages.push(json!({"content": results, "role": "user"}));
    let answer = running.post(MESSAGES, &body).json();
    assert_eq!(answer["stop_reason"], "end_turn");
    assert_eq!(answer["content"][1]["text"], "The weather is fine.");

    let counted = running.post("/v1/messages/count_tokens", &body).json();
    let usage = &answer["usage"];
    let sum = ["input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"]
        .map(|name| usage[name].as_u64().unwrap());
    assert_eq!(counted["input_tokens"].as_u64(), Some(sum.iter().sum()));
}

#[test]
fn messages_stop_at_sequences_and_limits() {
    let running = running();
    let body = json!({
        "max_tokens": 500, "stop_sequences": ["three"], "thinking": {"type": "disabled"},
        "messages": [{"role": "user", "content": "count"}],
    });
    let stopped = running.post(MESSAGES, &body).json();
    assert_eq!(stopped["stop_reason"], "stop_sequence");
    assert_eq!(stopped["stop_sequence"], "three");
    assert_eq!(stopped["content"], json!([{"type": "text", "text": "one two "}]));
    let mut short = body.clone();
    short["max_tokens"] = json!(2);
    assert_eq!(running.post(MESSAGES, &short).json()["stop_reason"], "max_tokens");
}

#[test]
fn responses_go_on_from_stored_ones() {
    let running = running();
    let tool = json!({"type": "function", "name": "weather", "parameters": weather(), "strict": false});
    let first = json!({"model": "m", "input": "weather?", "tools": [tool], "reasoning": {"summary": "auto"}});
    let answer = running.post(RESPONSES, &first).json();
    assert_eq!(answer["status"], "completed");
    let output = answer["output"].as_array().unwrap();
    let kinds: Vec<_> = output.iter().map(|item| item["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["reasoning", "message", "function_call", "function_call"]);

    let id = answer["id"].as_str().unwrap();
    let outputs = [2, 3]
        .map(|at: usize| json!({"type": "function_call_output", "call_id": output[at]["call_id"], "output": "fine"}));
    let second =
        json!({"model": "m", "input": outputs, "tools": first["tools"], "previous_response_id": id, "stream": true});
    let stream = running.post(RESPONSES, &second);
    let frames = stream.frames();
    let numbers: Vec<_> = frames.iter().map(|frame| frame["sequence_number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..frames.len() as u64).collect::<Vec<_>>());
    let last = frames.last().unwrap();
    assert_eq!(last["type"], "response.completed");
    assert_eq!(last["response"]["output"][0]["content"][0]["text"], "The weather is fine.");

    let path = format!("{RESPONSES}/{id}");
    assert_eq!(running.get(&path).json(), answer);
    assert_eq!(running.ask("DELETE", &path, &[], b"").json()["deleted"], true);
    assert_eq!(running.get(&path).status, 404);
    assert_eq!(running.post(RESPONSES, &second).status, 404);
    let unstored = running.post(RESPONSES, &json!({"input": "hello", "store": false})).json();
    assert_eq!(running.get(&format!("{RESPONSES}/{}", unstored["id"].as_str().unwrap())).status, 404);
    let counted = running.post("/v1/responses/input_tokens", &json!({"input": "hello"})).json();
    assert_eq!(counted["input_tokens"], unstored["usage"]["input_tokens"]);
}

/// What a response repeats of its request has the form of responses, however the client wrote it.
#[test]
fn responses_repeat_limits_and_tools_in_their_own_form() {
    let running = running();
    let body = |more: Value| {
        let mut body = json!({"input": "hello", "store": false});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        running.post(RESPONSES, &body)
    };
    assert_eq!(body(json!({"max_output_tokens": 1e308})).json()["max_output_tokens"], json!(2_147_483_647));
    let function = json!({"name": "weather", "parameters": weather()});
    let whole = json!({"name": "weather", "parameters": weather(), "type": "function"});
    for tool in [
        function.clone(),
        json!({"function": function}),
        json!({"type": "function", "function": function}),
        whole.clone(),
    ] {
        assert_eq!(body(json!({"tools": [tool]})).json()["tools"], json!([whole]), "{tool}");
    }
    let described = |description: Value| json!({"tools": [{"name": "weather", "description": description}]});
    for wrong in [json!(1), json!({"a": 1})] {
        let refused = body(described(wrong));
        assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("tools[0].description")));
    }
}

#[test]
fn completions_answer_and_continue() {
    let running = running();
    let wrapped = running.post("/v1/completions", &json!({"prompt": ["hello"]})).json();
    assert_eq!(wrapped["object"], "text_completion");
    assert_eq!(wrapped["choices"][0]["text"], "Hello there!");
    let raw = json!({"prompt": "<｜User｜>hello<｜Assistant｜><think>", "raw": true, "stream": true});
    let stream = running.post("/v1/completions", &raw);
    let text: String = stream.frames().iter().filter_map(|frame| frame["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, format!("{REASONING}</think>Hello there!"));
}

#[test]
fn json_answers_and_logprobs() {
    let running = running();
    let body = json!({
        "messages": [{"role": "user", "content": "json"}], "thinking": false, "logprobs": true, "top_logprobs": 2,
        "response_format": {"type": "json_object"},
    });
    let choice = running.post(CHAT, &body).json()["choices"][0].clone();
    assert_eq!(choice["message"]["content"], "{\"answer\": 42}");
    let tokens = choice["logprobs"]["content"].as_array().unwrap();
    let said: String = tokens.iter().map(|token| token["token"].as_str().unwrap()).collect();
    assert_eq!(said, "{\"answer\": 42}");
    assert!(tokens.iter().all(|token| token["top_logprobs"].as_array().unwrap().len() == 2));
}

/// What nobody knows is refused by its name, whatever the API.
#[test]
fn unknown_fields_are_named_by_every_api() {
    let running = running();
    let messages = json!([{"role": "user", "content": "hello"}]);
    for (path, mut body) in [
        (CHAT, json!({"messages": messages})),
        ("/v1/completions", json!({"prompt": "hello"})),
        (RESPONSES, json!({"input": "hello"})),
        ("/v1/responses/input_tokens", json!({"input": "hello"})),
        (MESSAGES, json!({"messages": messages, "max_tokens": 9})),
        ("/v1/messages/count_tokens", json!({"messages": messages})),
    ] {
        assert_eq!(running.post(path, &body).status, 200, "{path}");
        body["frobnicate"] = json!(1);
        let refused = running.post(path, &body);
        assert_eq!(refused.status, 400, "{path}");
        let message = refused.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(message.contains("frobnicate"), "{path}: {message}");
    }
}

#[test]
fn what_is_not_supported_is_named() {
    let running = running();
    let cases = [
        (CHAT, json!({}), "messages"),
        (CHAT, json!({"messages": []}), "messages"),
        (CHAT, json!({"messages": [{"role": "user", "content": "x"}], "n": 2}), "n"),
        (CHAT, json!({"messages": [{"role": "user", "content": "x"}], "frobnicate": 1}), "frobnicate"),
        (CHAT, json!({"messages": [{"content": [{"type": "image_url"}]}]}), "messages[0].content[0].type"),
        (CHAT, json!({"messages": [{"role": "user", "content": "x"}], "temperature": 9}), "temperature"),
        (CHAT, json!({"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"}), "tool_choice"),
        (CHAT, json!({"messages": [{"role": "user", "content": "x"}], "logit_bias": {"99999999": 1}}), "logit_bias"),
        (CHAT, json!({"messages": [{"role": "user", "content": "x"}], "reasoning_effort": "huge"}), "reasoning_effort"),
        (CHAT, json!({"messages": [{"role": "user", "content": "long ".repeat(9000)}]}), "messages"),
        ("/v1/completions", json!({"prompt": "x", "echo": true}), "echo"),
        (RESPONSES, json!({"input": "x", "background": true}), "background"),
        (
            RESPONSES,
            json!({"input": [{"type": "function_call_output", "call_id": "c", "output": ""}]}),
            "input[0].call_id",
        ),
    ];
    for (path, body, param) in cases {
        let answer = running.post(path, &body);
        assert_eq!(answer.status, 400, "{param}: {answer:?}");
        let error = &answer.json()["error"];
        assert_eq!(error["type"], "invalid_request_error", "{param}");
        assert_eq!(error["param"], param);
    }
    for (name, status) in [("a".repeat(128), 200), ("a".repeat(129), 400), ("a b".to_owned(), 400)] {
        let tool = json!({"type": "function", "function": {"name": name, "parameters": {}}});
        assert_eq!(running.post(CHAT, &json!({"messages": [{"content": "hello"}], "tools": [tool]})).status, status);
    }
    let many: Value = (0..17).map(|index| (index.to_string(), json!(""))).collect();
    for (metadata, status) in [
        (json!({"k".repeat(64): "v".repeat(512)}), 200),
        (json!({"k".repeat(65): ""}), 400),
        (json!({"k": "v".repeat(513)}), 400),
        (json!({"k": 1}), 400),
        (many, 400),
    ] {
        let answer = running.post(RESPONSES, &json!({"input": "hello", "metadata": metadata}));
        assert_eq!(answer.status, status, "{metadata}");
    }
    for path in ["/v1/responses/%ff", "/v1/models/%ff"] {
        let answer = running.get(path);
        assert_eq!((answer.status, &answer.json()["error"]["type"]), (400, &json!("invalid_request_error")), "{path}");
    }
    let anthropic = running.post(MESSAGES, &json!({"max_tokens": 1, "messages": [{"role": "user", "content": 1}]}));
    assert_eq!(anthropic.status, 400);
    assert_eq!(anthropic.json()["type"], "error");
    assert!(anthropic.json()["error"]["message"].as_str().unwrap().contains("messages[0].content"));
    let long = json!({"max_tokens": 1, "messages": [{"role": "user", "content": "long ".repeat(9000)}]});
    let error = running.post(MESSAGES, &long).json()["error"].clone();
    assert_eq!(error["n_ctx"], 4096);
    assert!(error["n_prompt_tokens"].as_u64() > Some(4096));
}

#[test]
fn it_tells_of_itself() {
    let running = running();
    assert_eq!(running.get("/health").json(), json!({"status": "ok"}));
    let models = running.get("/v1/models").json();
    assert_eq!(models["data"][0]["id"], "deepseek-v4-nano");
    assert_eq!(running.get("/v1/models/deepseek-v4-nano").json(), models["data"][0]);
    assert_eq!(running.get("/v1/models/other").status, 404);
    assert_eq!(running.get("/props").json()["context_tokens"], 4096);
    for path in ["/", "/app.js", "/style.css"] {
        let file = running.get(path);
        assert_eq!(file.status, 200, "{path}");
        assert!(file.header("content-security-policy").unwrap().starts_with("default-src 'none'"), "{path}");
    }
    running.post(CHAT, &json!({"messages": [{"content": "hello"}]}));
    let metrics = running.get("/metrics").body;
    for line in ["infall_answers_total{api=\"chat\",status=\"200\"} 1", "infall_requests_ended_total 1", "# EOF"] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
}

#[test]
fn the_document_names_every_path() {
    let running = running();
    let document = running.get("/openapi.json").json();
    assert_eq!(document["openapi"], "3.1.0");
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys().filter(|key| *key != "parameters") {
            let path = path.replace("{id}", "x");
            let answer = running.ask(&method.to_uppercase(), &path, &[], b"{}");
            let message = &answer.body;
            assert!(
                answer.status != 405 && !message.contains("there is nothing at this path"),
                "{method} {path}: {message}"
            );
        }
    }
    assert_eq!(running.get("/v1/nothing").status, 404);
    assert_eq!(running.get(CHAT).status, 405);
}
