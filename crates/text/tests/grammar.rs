//! Grammar mode: whatever is drawn among the allowed tokens is a call, or an answer, that fits its schema.

mod common;

use std::collections::HashMap;
use std::time::Instant;

use serde_json::{Map, Value, json};
use text::Tokenizer;
use text::grammar::{Compiler, Constraint};
use text::prompt::Tool;

/// Fixed pseudo-random numbers.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % bound
    }
}

fn tool(value: Value) -> Tool {
    Tool::from_value(value).unwrap()
}

/// Tools that use everything the grammar knows.
fn tools() -> Vec<Tool> {
    let weather = json!({"name": "get_weather", "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "where"},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit", "a</b"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "exact": {"type": "boolean"},
        },
        "required": ["city", "days"],
    }});
    let nested = json!({"name": "store", "parameters": {
        "type": "object",
        "properties": {
            "tags": {"type": "array", "items": {"type": "string", "enum": ["x", "y"]}, "minItems": 1, "maxItems": 3},
            "tree": {"$ref": "#/$defs/node"},
            "either": {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "null"}]},
            "ratio": {"type": ["number", "null"]},
            "level": {"enum": [1, "one", null]},
            "fixed": {"const": {"a": 1, "b": [true, "ü"]}},
            "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]$"},
        },
        "required": ["tree", "tags"],
        "$defs": {"node": {
            "type": "object",
            "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["value", "next"],
            "additionalProperties": false,
        }},
    }});
    let optional = json!({"name": "list \"files\"", "parameters": {
        "type": "object", "properties": {"path": {"type": "string"}, "a<b": {"type": "boolean"}},
    }});
    [weather, nested, optional, json!({"name": "now"})].map(tool).into()
}

/// Draws allowed tokens until the end of the turn. Closers are drawn more often than their share, or texts would never end.
fn draw(tokenizer: &Tokenizer, constraint: &mut Constraint, random: &mut Random) -> Vec<u32> {
    let mut drawn = Vec::new();
    for _ in 0..20_000 {
        let words = constraint.allowed().unwrap();
        let allowed: Vec<u32> =
            (0..tokenizer.vocab_size() as u32).filter(|&t| words[t as usize / 32] >> (t % 32) & 1 == 1).collect();
        assert!(!allowed.is_empty(), "nothing may follow {:?}", spelt(tokenizer, &drawn));
        let of = |chosen: &dyn Fn(&u32) -> bool| allowed.iter().copied().filter(|token| chosen(token)).collect();
        let control: Vec<u32> = of(&|token| tokenizer.is_control(*token));
        let closers: Vec<u32> =
            of(&|token| matches!(tokenizer.token_bytes(*token), b"</" | b"<" | b"/" | b"\"" | b"]" | b"}" | b"null"));
        let among = match random.below(3) {
            0 if !control.is_empty() => &control,
            0 if !closers.is_empty() => &closers,
            _ => &allowed,
        };
        let token = among[random.below(among.len())];
        if token == tokenizer.eos() {
            return drawn;
        }
        constraint.accept(token).unwrap();
        drawn.push(token);
    }
    panic!("no end after {:?}", spelt(tokenizer, &drawn));
}

fn spelt(tokenizer: &Tokenizer, tokens: &[u32]) -> String {
    String::from_utf8(tokenizer.decode(tokens)).expect("whole characters only")
}

/// Cuts `prefix` off, or says what stands there instead.
fn after<'a>(text: &'a str, prefix: &str) -> &'a str {
    text.strip_prefix(prefix).unwrap_or_else(|| panic!("expected {prefix:?} before {text:?}"))
}

/// Reads a block in its one canonical form, after `<｜DSML｜`: names and arguments.
fn read_block(text: &str) -> Vec<(String, Map<String, Value>)> {
    let unescape = |s: &str| s.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"").replace("&amp;", "&");
    let (mut rest, mut calls) = (after(text, "tool_calls>\n"), Vec::new());
    while let Some(call) = rest.strip_prefix("<｜DSML｜invoke name=\"") {
        let (name, mut call) = call.split_once("\">\n").unwrap();
        let mut arguments = Map::new();
        while let Some(parameter) = call.strip_prefix("<｜DSML｜parameter name=\"") {
            let (parameter, value) = parameter.split_once("\" string=\"").unwrap();
            let (kind, value) = value.split_once("\">").unwrap();
            let (value, after_value) = value.split_once("</｜DSML｜parameter>\n").unwrap();
            let value = match kind {
                "true" => Value::from(value),
                _ => {
                    let value: Value = serde_json::from_str(value).unwrap();
                    assert!(!value.is_string(), "a text is written as text");
                    value
                }
            };
            assert!(arguments.insert(unescape(parameter), value).is_none(), "{parameter} twice");
            call = after_value;
        }
        if arguments.is_empty() {
            call = after(call, "\n");
        }
        rest = after(call, "</｜DSML｜invoke>\n");
        calls.push((unescape(name), arguments));
    }
    assert_eq!(rest, "</｜DSML｜tool_calls>");
    calls
}

/// Whether `value` fits `schema`, for the keywords that the tests use.
fn fits(value: &Value, schema: &Value, root: &Value) -> bool {
    if let Some(reference) = schema.get("$ref") {
        return fits(value, root.pointer(&reference.as_str().unwrap()[1..]).unwrap(), root);
    }
    let is = |kind: &str| match kind {
        "string" => value.is_string(),
        "integer" => value.is_number() && !value.to_string().contains(['.', 'e', 'E']),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("type {other}"),
    };
    let number = |key: &str| schema.get(key).and_then(Value::as_f64);
    let length = value.as_str().map_or(0, |text| text.chars().count());
    let items = value.as_array().map_or(0, Vec::len);
    schema.as_object().unwrap().iter().all(|(keyword, rule)| match keyword.as_str() {
        "type" => match rule {
            Value::String(kind) => is(kind),
            kinds => kinds.as_array().unwrap().iter().any(|kind| is(kind.as_str().unwrap())),
        },
        "enum" => rule.as_array().unwrap().contains(value),
        "const" => rule == value,
        "anyOf" => rule.as_array().unwrap().iter().any(|option| fits(value, option, root)),
        "minimum" => value.as_f64().is_none_or(|x| x >= number(keyword).unwrap()),
        "maximum" => value.as_f64().is_none_or(|x| x <= number(keyword).unwrap()),
        "minItems" => items >= rule.as_u64().unwrap() as usize,
        "maxItems" => items <= rule.as_u64().unwrap() as usize,
        "maxLength" => length <= rule.as_u64().unwrap() as usize,
        // The one pattern of the tests.
        "pattern" => value.as_str().is_none_or(|text| {
            let bytes = text.as_bytes();
            rule == "^[A-Z]{2}[0-9]$"
                && bytes.len() == 3
                && bytes[..2].iter().all(u8::is_ascii_uppercase)
                && bytes[2].is_ascii_digit()
        }),
        "items" => value.as_array().is_none_or(|items| items.iter().all(|item| fits(item, rule, root))),
        "properties" => value.as_object().is_none_or(|fields| {
            fields.iter().all(|(name, value)| rule.get(name).is_none_or(|schema| fits(value, schema, root)))
        }),
        "required" => value.as_object().is_none_or(|fields| {
            rule.as_array().unwrap().iter().all(|name| fields.contains_key(name.as_str().unwrap()))
        }),
        "additionalProperties" => value.as_object().is_none_or(|fields| {
            rule != &Value::Bool(false) || fields.keys().all(|name| schema["properties"].get(name).is_some())
        }),
        "description" | "$defs" => true,
        other => panic!("keyword {other}"),
    })
}

/// Draws blocks and checks each; says how often each tool and parameter came.
fn check_blocks(tokenizer: &Tokenizer, tools: &[Tool], blocks: usize) -> HashMap<String, usize> {
    let compiler = Compiler::new(tokenizer).unwrap();
    let (mut random, mut seen) = (Random(0x9e37_79b9_7f4a_7c15), HashMap::new());
    for _ in 0..blocks {
        let tokens = draw(tokenizer, &mut compiler.calls(tools).unwrap(), &mut random);
        let text = spelt(tokenizer, &tokens);
        for (name, arguments) in read_block(&text) {
            let tool = tools.iter().find(|tool| tool.name() == name).unwrap_or_else(|| panic!("{name} in {text}"));
            let empty = json!({});
            let schema = tool.parameters().unwrap_or(&empty);
            for parameter in arguments.keys() {
                assert!(schema["properties"].get(parameter).is_some(), "{parameter} of {name}");
                *seen.entry(format!("{name}.{parameter}")).or_default() += 1;
            }
            assert!(fits(&Value::Object(arguments), schema, schema), "{text}");
            *seen.entry(name).or_default() += 1;
        }
    }
    seen
}

#[test]
fn whatever_is_drawn_is_a_valid_call() {
    let tools = tools();
    let seen = check_blocks(&common::tiny(), &tools, 150);
    for tool in &tools {
        assert!(seen.contains_key(tool.name()), "{} was never called", tool.name());
        let properties = tool.parameters().map(|p| p["properties"].as_object().unwrap().clone()).unwrap_or_default();
        let never = properties.keys().find(|name| !seen.contains_key(&format!("{}.{name}", tool.name())));
        assert_eq!(never, None, "a parameter of {} was never given", tool.name());
    }
}

#[test]
fn with_v4s_vocabulary_too() {
    assert!(!check_blocks(&common::v4(), &tools(), 8).is_empty());
}

/// Whether a constraint lets this text through, in the tokens in which a prompt would have it.
fn accepts(tokenizer: &Tokenizer, mut constraint: Constraint, text: &str) -> bool {
    tokenizer.encode_with_control(text).into_iter().all(|token| {
        let words = constraint.allowed().unwrap();
        words[token as usize / 32] >> (token % 32) & 1 == 1 && constraint.accept(token).is_ok()
    }) && constraint.allowed().unwrap()[tokenizer.eos() as usize / 32] >> (tokenizer.eos() % 32) & 1 == 1
}

fn call(name: &str, parameters: &[(&str, &str, &str)]) -> String {
    let parameter = |(name, kind, value): &(&str, &str, &str)| {
        format!("<｜DSML｜parameter name=\"{name}\" string=\"{kind}\">{value}</｜DSML｜parameter>\n")
    };
    let parameters: String = parameters.iter().map(parameter).collect();
    let empty = if parameters.is_empty() { "\n" } else { "" };
    format!("<｜DSML｜invoke name=\"{name}\">\n{parameters}{empty}</｜DSML｜invoke>\n")
}

#[test]
fn canonical_blocks_pass_and_others_do_not() {
    let tokenizer = common::tiny();
    let compiler = Compiler::new(&tokenizer).unwrap();
    let passes = |calls: &[String]| {
        let block = format!("tool_calls>\n{}</｜DSML｜tool_calls>", calls.concat());
        accepts(&tokenizer, compiler.calls(&tools()).unwrap(), &block)
    };
    let (city, days) = (("city", "true", "Paris"), ("days", "false", "3"));
    let weather = |parameters: &[(&str, &str, &str)]| passes(&[call("get_weather", parameters)]);
    assert!(weather(&[city, days]) && weather(&[days, city]), "in any order");
    assert!(weather(&[city, ("exact", "false", "true"), days, ("unit", "true", "celsius")]));
    assert!(passes(&[call("now", &[]), call("get_weather", &[city, days]), call("list &quot;files&quot;", &[])]));
    assert!(!weather(&[city]) && !weather(&[]), "a required parameter is missing");
    assert!(!weather(&[city, days, city]), "twice");
    assert!(!weather(&[city, days, ("town", "true", "x")]), "not declared");
    assert!(!weather(&[city, ("days", "true", "3")]) && !weather(&[city, ("days", "false", "\"3\"")]), "wrong type");
    assert!(!weather(&[city, ("days", "false", "15")]) && !weather(&[city, ("days", "false", "0")]), "out of range");
    assert!(!weather(&[city, days, ("unit", "true", "kelvin")]), "not in the enum");
    assert!(!passes(&[call("get_whether", &[city, days])]) && !passes(&[]), "no such tool, no call");
    let tree = ("tree", "false", r#"{"value": 1, "next": {"value": -2, "next": null}}"#);
    let store = |parameters: &[(&str, &str, &str)]| passes(&[call("store", &[&[tree], parameters].concat())]);
    assert!(store(&[("tags", "false", r#"["x", "y"]"#)]) && !store(&[("tags", "false", r#"["x","y"]"#)]));
    assert!(store(&[("tags", "false", r#"["x"]"#), ("either", "true", "four"), ("level", "true", "one")]));
    assert!(store(&[("tags", "false", r#"["x"]"#), ("either", "false", "null"), ("level", "false", "1")]));
    assert!(!store(&[("tags", "false", r#"["x"]"#), ("either", "true", "fives")]));
    assert!(!store(&[("tags", "false", r#"["x"]"#), ("level", "false", "\"one\"")]), "a text is written as text");
    assert!(store(&[("tags", "false", r#"["x"]"#), ("fixed", "false", r#"{"a": 1, "b": [true, "ü"]}"#)]));
    assert!(store(&[("tags", "false", r#"["x"]"#), ("code", "true", "AB1")]));
    assert!(!store(&[("tags", "false", r#"["x"]"#), ("code", "true", "AB12")]));
}

/// Lexemes are greedy: without care the first `</` in a text would end it, or the text would never end.
#[test]
fn a_text_may_contain_markup_that_is_no_control_token() {
    let tokenizer = common::tiny();
    let compiler = Compiler::new(&tokenizer).unwrap();
    for value in ["</", "</p></div>", "a </parameter> b", "<tool_calls>", "<|DSML|", "x</</", "", "\n\n ", "{\"a\": 1}"]
    {
        let call = call("get_weather", &[("city", "true", value), ("days", "false", "3")]);
        let block = format!("tool_calls>\n{call}</｜DSML｜tool_calls>");
        assert!(accepts(&tokenizer, compiler.calls(&tools()).unwrap(), &block), "{value:?}");
    }
}

/// Bytes that would read as a closer must not come from ordinary tokens.
#[test]
fn the_marker_cannot_be_spelt_with_ordinary_tokens() {
    let tokenizer = common::tiny();
    let constraint = |compiler: &Compiler| {
        let mut constraint = compiler.calls(&tools()).unwrap();
        let start =
            "tool_calls>\n<｜DSML｜invoke name=\"get_weather\">\n<｜DSML｜parameter name=\"city\" string=\"true\">";
        tokenizer.encode_with_control(start).into_iter().for_each(|token| constraint.accept(token).unwrap());
        constraint
    };
    let compiler = Compiler::new(&tokenizer).unwrap();
    let mut constraint = constraint(&compiler);
    let spelt = tokenizer.encode("</｜DSML｜");
    let refused = spelt.iter().position(|&token| {
        let words = constraint.allowed().unwrap();
        words[token as usize / 32] >> (token % 32) & 1 == 0 || constraint.accept(token).is_err()
    });
    assert_eq!(refused, Some(spelt.len() - 1), "only the token that completes it");
}

#[test]
fn answers_fit_their_schema() {
    let schema = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "kind": {"enum": ["a", "b", 3]},
            "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 4},
            "more": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/point"}]},
        },
        "required": ["name", "kind", "more"],
        "additionalProperties": false,
        "$defs": {"point": {
            "type": "object",
            "properties": {"x": {"type": "integer"}, "y": {"type": "boolean"}},
            "required": ["x", "y"],
            "additionalProperties": false,
        }},
    });
    let tokenizer = common::tiny();
    let compiler = Compiler::new(&tokenizer).unwrap();
    let mut random = Random(77);
    for _ in 0..100 {
        let text = spelt(&tokenizer, &draw(&tokenizer, &mut compiler.json(&schema).unwrap(), &mut random));
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert!(fits(&value, &schema, &schema), "{text}");
        assert_eq!(text::json::to_string(&value).len(), text.len(), "Python's separators: {text}");
    }
    assert!(accepts(&tokenizer, compiler.json(&json!({"type": "integer"})).unwrap(), "12"));
    assert!(!accepts(&tokenizer, compiler.json(&json!({"type": "integer"})).unwrap(), "12.5"));
}

#[test]
fn what_cannot_be_enforced_is_an_error_that_names_it() {
    let compiler = Compiler::new(&common::tiny()).unwrap();
    let parameter = |schema: Value| {
        let parameters = json!({"type": "object", "properties": {"p": schema}});
        let broken = tool(json!({"name": "broken", "parameters": parameters}));
        let error = compiler.calls(&[tool(json!({"name": "fine"})), broken]).err().expect("refused").to_string();
        assert!(error.contains("the tool `broken`") && error.contains("turn it off"), "{error}");
        error
    };
    assert!(parameter(json!({"type": "array", "uniqueItems": true})).contains("uniqueItems"));
    assert!(parameter(json!({"type": "text"})).contains("its type is `text`"));
    assert!(parameter(json!({"$ref": "#/nowhere"})).contains("leads nowhere"));
    assert!(parameter(json!({"$ref": "#/properties/p"})).contains("circle"));
    assert!(parameter(json!({"type": "string", "pattern": "a(?=b)"})).contains("parameter"));
    assert!(parameter(json!({"type": "string", "pattern": r"\bword\b"})).contains("boundary"));
    assert!(parameter(json!({"type": "string", "pattern": "a^b"})).contains("anchor"));
    assert!(parameter(json!({"oneOf": [{"type": "string"}, {"type": "string"}]})).contains("oneOf"));
    assert!(parameter(json!(false)).contains("its schema is false"));
    let tool_error = |parameters: Value| {
        let error = compiler.calls(&[tool(json!({"name": "broken", "parameters": parameters}))]).err().unwrap();
        error.to_string()
    };
    assert!(tool_error(json!({"type": "object", "required": ["x"]})).contains("`x` is required"));
    assert!(tool_error(json!({"anyOf": [{}]})).contains("`anyOf` over all parameters"));
    let error = compiler.json(&json!({"type": "object", "not": {}})).err().unwrap().to_string();
    assert!(error.contains("response format") && error.contains("not"), "{error}");
    assert!(compiler.calls(&[]).err().unwrap().to_string().contains("at least one"));
}

/// Whether a parameter `p` of this schema may have this value.
fn lets(compiler: &Compiler, tokenizer: &Tokenizer, schema: &Value, kind: &str, value: &str) -> bool {
    let parameters = json!({"type": "object", "properties": {"p": schema}, "$defs": {
        "a b/c~d": {"type": "string", "enum": ["spaced"]},
        "pair": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": false},
    }});
    let block = format!("tool_calls>\n{}</｜DSML｜tool_calls>", call("t", &[("p", kind, value)]));
    let tools = [tool(json!({"name": "t", "parameters": parameters}))];
    let constraint = compiler.calls(&tools).unwrap_or_else(|error| panic!("{error}: {schema}"));
    accepts(tokenizer, constraint, &block)
}

#[test]
fn listed_texts_fit_what_stands_beside_the_list() {
    let tokenizer = common::tiny();
    let compiler = Compiler::new(&tokenizer).unwrap();
    for schema in [
        json!({"enum": ["a", "bb"], "minLength": 2}),
        json!({"enum": ["bb", "a", "aaa"], "minLength": 2, "maxLength": 2}),
        json!({"type": "string", "enum": ["a", "bb"], "pattern": "^b"}),
        json!({"type": "string", "enum": ["a", "bb"], "const": "bb"}),
        json!({"const": "bb", "type": ["string", "null"]}),
    ] {
        assert!(!lets(&compiler, &tokenizer, &schema, "true", "a"), "{schema}");
        assert!(lets(&compiler, &tokenizer, &schema, "true", "bb"), "{schema}");
    }
    let refused = |schema: Value| {
        let parameters = json!({"type": "object", "properties": {"p": schema}});
        let error = compiler.calls(&[tool(json!({"name": "t", "parameters": parameters}))]).err().expect("refused");
        error.to_string()
    };
    for keyword in ["not", "if"] {
        assert!(refused(json!({"enum": ["a", "b"], keyword: {"const": "a"}})).contains(keyword));
    }
    for keyword in ["anyOf", "oneOf", "allOf"] {
        assert!(refused(json!({"enum": ["a", "b"], keyword: [{"const": "a"}]})).contains(keyword));
    }
    assert!(refused(json!({"enum": ["a"], "minLength": 2})).contains("no value fits"));
    assert!(refused(json!({"type": "string", "minLength": 3, "maxLength": 2})).contains("no text has 3 to 2"));
    assert!(refused(json!({"$ref": "#/properties/q", "minLength": 2})).contains("`minLength` beside `$ref`"));
}

#[test]
fn names_and_values_with_the_marker_are_refused() {
    let compiler = Compiler::new(&common::tiny()).unwrap();
    let marker = "x</｜DSML｜parameter>";
    let properties = |schema: Value| json!({"name": "t", "parameters": {"type": "object", "properties": schema}});
    for declared in [
        json!({"name": marker}),
        properties(json!({marker: {"type": "string"}})),
        properties(json!({"p": {"enum": ["a", marker]}})),
        properties(json!({"p": {"const": marker}})),
        properties(json!({"p": {"type": "string", "pattern": marker}})),
        properties(json!({"p": {"const": {"a": [marker]}}})),
        properties(json!({"p": {"type": "array", "items": {"enum": [marker]}}})),
        properties(json!({"p": {"type": "object", "properties": {marker: {}}}})),
    ] {
        let error = compiler.calls(&[tool(declared.clone())]).err().unwrap_or_else(|| panic!("{declared}")).to_string();
        assert!(error.contains("｜DSML｜`, the markup of calls"), "{error}");
    }
    assert!(compiler.json(&json!({"enum": [marker]})).is_err());
}

#[test]
fn common_forms_of_schemas_are_taken() {
    let tokenizer = common::tiny();
    let compiler = Compiler::new(&tokenizer).unwrap();
    let lets = |schema: &Value, kind: &str, value: &str| lets(&compiler, &tokenizer, schema, kind, value);
    let documented =
        json!({"oneOf": [{"const": "a", "title": "A"}, {"const": "b"}, {"enum": ["c", 4]}, {"type": "null"}]});
    assert!(lets(&documented, "true", "a") && lets(&documented, "true", "c") && lets(&documented, "false", "4"));
    assert!(lets(&documented, "false", "null") && !lets(&documented, "true", "d"));
    let nested = json!({"type": "array", "items": documented, "minItems": 1});
    assert!(lets(&nested, "false", r#"["b", 4]"#) && !lets(&nested, "false", r#"["d"]"#));
    let pydantic = json!({"allOf": [{"$ref": "#/$defs/pair"}], "description": "a pair", "default": {"a": 1}});
    assert!(lets(&pydantic, "false", r#"{"a": 3}"#) && !lets(&pydantic, "true", "a"));
    for format in ["date", "a-format-of-my-own"] {
        let text = json!({"type": "string", "format": format});
        assert!(lets(&text, "true", "x"), "a remark everywhere");
        assert!(lets(&json!({"type": "array", "items": text}), "false", r#"["x"]"#), "a remark everywhere");
    }
    for reference in ["#/$defs/a%20b~1c~0d", "#/$defs/a b~1c~0d"] {
        assert!(lets(&json!({"$ref": reference}), "true", "spaced"));
        let nested = json!({"type": "array", "items": {"$ref": reference}});
        assert!(lets(&nested, "false", r#"["spaced"]"#) && !lets(&nested, "false", r#"["x"]"#));
    }
}

#[test]
fn references_are_redirected_only_where_a_schema_stands() {
    let tokenizer = common::tiny();
    let compiler = Compiler::new(&tokenizer).unwrap();
    let schema = json!({"anyOf": [{"const": {"$ref": "#/x"}}, {"type": "array", "items": {"$ref": "#/$defs/pair"},
        "default": [{"$ref": "#/x"}], "examples": [{"$ref": "#/y"}]}]});
    assert!(lets(&compiler, &tokenizer, &schema, "false", r##"{"$ref": "#/x"}"##));
    assert!(lets(&compiler, &tokenizer, &schema, "false", r#"[{"a": 1}]"#));
}

/// In a value that is text and in a text inside JSON.
#[test]
fn patterns_hold_where_their_anchors_say() {
    let tokenizer = common::tiny();
    let compiler = Compiler::new(&tokenizer).unwrap();
    for (pattern, fits, does_not) in [
        ("^a$", &["a"][..], &["b", "ab", "ba"][..]),
        ("b", &["b", "abc"], &["a", ""]),
        ("^x$|^y$", &["x", "y"], &["xy", "z", "xa"]),
        ("^a|b$", &["ac", "cb"], &["ca", "bc"]),
        ("(?i)^abc$", &["abc", "ABC"], &["xabc", "abcx"]),
        ("^(a|b)c$", &["ac", "bc"], &["c", "acx"]),
        ("(^a|b)c", &["acx", "xbcx"], &["xac"]),
        (r"a\$", &["a$", "xa$x"], &["a"]),
        (r"^a\\$", &[r"a\"], &[r"a\c", "a$"]),
        (r"^\d\w$", &["1_"], &["a1", "11x"]),
    ] {
        let text = json!({"type": "string", "pattern": pattern});
        let nested = json!({"type": "array", "items": text, "minItems": 1});
        for (value, expected) in fits.iter().map(|v| (v, true)).chain(does_not.iter().map(|v| (v, false))) {
            assert_eq!(lets(&compiler, &tokenizer, &text, "true", value), expected, "{pattern}: {value}");
            let list = text::json::to_string(&json!([value]));
            assert_eq!(lets(&compiler, &tokenizer, &nested, "false", &list), expected, "{pattern}: {list}");
        }
    }
}

/// Draws 60 tokens, or fewer if the constraint then says why there are no more.
fn follow(tokenizer: &Tokenizer, constraint: &mut Constraint) -> String {
    let header = "tool_calls>\n<｜DSML｜invoke name=\"t\">\n<｜DSML｜parameter name=\"p\" string=\"";
    let mut random = Random(5);
    let mut header = tokenizer.encode_with_control(header).into_iter();
    for _ in 0..60 {
        let words = match constraint.allowed() {
            Ok(words) => words,
            Err(error) => return error.to_string(),
        };
        let allowed: Vec<u32> =
            (0..tokenizer.vocab_size() as u32).filter(|&t| words[t as usize / 32] >> (t % 32) & 1 == 1).collect();
        let token = header.next().unwrap_or_else(|| allowed[random.below(allowed.len())]);
        if token == tokenizer.eos() {
            break;
        }
        if let Err(error) = constraint.accept(token) {
            return error.to_string();
        }
    }
    "followed".to_owned()
}

/// Each ends in a constraint that can be followed, or in an error, soon.
#[test]
fn hostile_schemas_end_in_a_constraint_or_an_error() {
    let tokenizer = common::v4();
    let compiler = Compiler::new(&tokenizer).unwrap();
    let mut deep = json!({"type": "string"});
    (0..100).for_each(|_| deep = json!({"type": "array", "items": deep.take()}));
    let texts: Vec<String> = (0..5000).map(|i| format!("value {i} {}", i * 7919)).collect();
    let names: Map<String, Value> = texts.iter().map(|text| (text.clone(), json!({"type": "string"}))).collect();
    let list = |items: Value| json!({"type": "array", "items": items});
    let exponential = json!({"type": "string", "pattern": "(a|b)*a(a|b){40}$"});
    for (what, schema) in [
        ("maxItems", json!({"type": "array", "items": {"type": "integer"}, "maxItems": 1_000_000_000})),
        ("minItems", json!({"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000})),
        ("minLength", json!({"type": "string", "minLength": 1_000_000})),
        ("maxLength", json!({"type": "string", "maxLength": 4_000_000_000_u64})),
        ("nested lengths", list(json!({"type": "string", "minLength": 100_000, "maxLength": 200_000}))),
        ("pattern", json!({"type": "string", "pattern": "^(a|aa)+(b{1,500}c{1,500}){1,500}$"})),
        ("exponential pattern", exponential.clone()),
        ("nested exponential pattern", list(exponential)),
        ("depth", deep),
        ("texts", json!({"enum": texts})),
        ("texts in JSON", list(json!({"enum": texts}))),
        ("properties", json!({"type": "object", "properties": names})),
        ("numbers", json!({"enum": (0..20_000).collect::<Vec<i32>>()})),
        ("multipleOf", json!({"type": "number", "multipleOf": 1e-9, "minimum": 0.123_456_789, "maximum": 1e300})),
    ] {
        let start = Instant::now();
        let parameters = json!({"type": "object", "properties": {"p": schema}, "required": ["p"]});
        let end = match compiler.calls(&[tool(json!({"name": "t", "parameters": parameters}))]) {
            Err(error) => error.to_string(),
            Ok(mut constraint) => follow(&tokenizer, &mut constraint),
        };
        let seconds = start.elapsed().as_secs_f64();
        println!("{what}: {seconds:.1} s, {}", end.chars().take(200).collect::<String>());
        assert!(seconds < 30.0, "{what}");
    }
}

/// A conversation asks for the same tools in each turn.
#[test]
fn a_kept_constraint_is_as_good_as_new() {
    let tokenizer = common::tiny();
    let compiler = Compiler::new(&tokenizer).unwrap();
    let block = |name: &str| format!("tool_calls>\n{}</｜DSML｜tool_calls>", call(name, &[]));
    for i in 0..30 {
        let name = format!("tool {}", i % 6);
        let one = [tool(json!({"name": name}))];
        assert!(accepts(&tokenizer, compiler.calls(&tools()).unwrap(), &block("now")));
        assert!(accepts(&tokenizer, compiler.calls(&one).unwrap(), &block(&name)));
        assert!(!accepts(&tokenizer, compiler.calls(&one).unwrap(), &block("now")));
    }
}

/// Times of 60 tools with 10 parameters each, printed: the first turn's constraint, and a further turn's.
#[test]
fn many_tools_are_compiled_once() {
    let tokenizer = common::v4();
    let compiler = Compiler::new(&tokenizer).unwrap();
    let parameter = |i: usize| match i % 5 {
        0 => json!({"type": "string"}),
        1 => json!({"type": "integer", "minimum": 0, "maximum": 100}),
        2 => json!({"type": "array", "items": {"type": "string"}}),
        3 => json!({"enum": ["one", "two", "three"]}),
        _ => json!({"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}),
    };
    let parameters: Map<String, Value> = (0..10).map(|i| (format!("parameter_{i}"), parameter(i))).collect();
    let parameters = json!({"type": "object", "properties": parameters, "required": ["parameter_1"]});
    let declare = |i| tool(json!({"name": format!("tool_{i}"), "parameters": parameters.clone()}));
    let tools: Vec<Tool> = (0..60).map(declare).collect();
    let time_ms = || {
        let start = Instant::now();
        let mut constraint = compiler.calls(&tools).unwrap();
        let time_ms = start.elapsed().as_secs_f64() * 1e3;
        constraint.allowed().unwrap();
        time_ms
    };
    let (first, again) = (time_ms(), time_ms());
    println!("constraint of 60 tools: first {first:.1} ms, again {again:.1} ms");
    assert!(again < first);
}

/// Times, printed; bounds far above what an idle core needs.
#[test]
fn masks_over_v4s_vocabulary_are_quick() {
    let tokenizer = common::v4();
    let start = Instant::now();
    let compiler = Compiler::new(&tokenizer).unwrap();
    println!("compiler: {:.0} ms", start.elapsed().as_secs_f64() * 1e3);
    let start = Instant::now();
    let mut constraint = compiler.calls(&tools()).unwrap();
    println!("constraint of {} tools: {:.1} ms", tools().len(), start.elapsed().as_secs_f64() * 1e3);
    let long = "All happy families are alike; every unhappy family is unhappy in its own way. ".repeat(8);
    let calls = [
        call("get_weather", &[("city", "true", &long), ("days", "false", "3")]),
        call(
            "store",
            &[
                ("tree", "false", r#"{"value": 1, "next": {"value": 22, "next": null}}"#),
                ("tags", "false", r#"["x", "y"]"#),
            ],
        ),
    ];
    let block = format!("tool_calls>\n{}</｜DSML｜tool_calls>", calls.concat());
    let mut times_us = Vec::new();
    for token in tokenizer.encode_with_control(&block) {
        let start = Instant::now();
        constraint.allowed().unwrap();
        constraint.accept(token).unwrap();
        times_us.push(start.elapsed().as_secs_f64() * 1e6);
    }
    let mean = times_us.iter().sum::<f64>() / times_us.len() as f64;
    times_us.sort_by(f64::total_cmp);
    let (median, longest) = (times_us[times_us.len() / 2], times_us[times_us.len() - 1]);
    println!("{} tokens: mean {mean:.0} us, median {median:.0} us, longest {longest:.0} us", times_us.len());
    assert!(mean < 20_000.0);
}
