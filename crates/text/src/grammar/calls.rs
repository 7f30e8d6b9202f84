//! The grammar of a block of calls.

use std::fmt::Write;

use llguidance::derivre::Regex;
use llguidance::regex_to_lark;
use serde_json::{Map, Value, json};

use super::GrammarError;
use super::pattern::whole_text;
use super::schema::{self, MAX_DEPTH, are_disjoint, is_of, listed, resolve, types, without_marker};
use crate::dsml;
use crate::prompt::Tool;

/// Most parameters that may come in any order: the library counts them in the bits of an integer.
const FREE_ORDER_PARAMETERS: usize = 64;

/// Keywords beside `properties` that would have to hold for all arguments together.
const ARGUMENT_KEYWORDS: [&str; 14] = [
    "allOf",
    "anyOf",
    "oneOf",
    "not",
    "if",
    "const",
    "enum",
    "patternProperties",
    "propertyNames",
    "minProperties",
    "maxProperties",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
];
/// Keywords that take further schemas to the same value: not supported over texts.
const COMBINING_KEYWORDS: [&str; 5] = ["anyOf", "oneOf", "allOf", "not", "if"];

/// A grammar, and those of the values that it names.
pub struct Grammar {
    pub lark: String,
    pub json: Vec<JsonValue>,
}

/// A parameter's value as JSON.
pub struct JsonValue {
    /// What the grammar calls it.
    pub name: String,
    pub tool: String,
    pub parameter: String,
    pub schema: Value,
}

/// What may follow `<` and the control token `dsml`.
pub fn grammar(tools: &[Tool], dsml: u32) -> Result<Grammar, GrammarError> {
    if tools.is_empty() {
        return Err(GrammarError::NoTools);
    }
    let mut writer = Writer { lark: String::new(), json: Vec::new(), dsml };
    let calls: Vec<String> = (0..tools.len()).map(|tool| format!("call_{tool}")).collect();
    writer.rule("start", &format!("\"tool_calls>\\n\" call+ \"</\" <[{dsml}]> \"tool_calls>\""));
    writer.rule("call", &format!("\"<\" <[{dsml}]> ({})", calls.join(" | ")));
    writer.rule("TEXT", r"/(?s:.*)<\//");
    for (index, tool) in tools.iter().enumerate() {
        let unsupported = |what| GrammarError::Tool { tool: tool.name().to_owned(), what };
        writer.tool(index, tool).map_err(unsupported)?;
    }
    Ok(Grammar { lark: writer.lark, json: writer.json })
}

struct Writer {
    lark: String,
    json: Vec<JsonValue>,
    dsml: u32,
}

/// A declared parameter.
struct Parameter<'a> {
    name: &'a str,
    schema: &'a Value,
    required: bool,
}

impl Writer {
    fn rule(&mut self, name: &str, body: &str) {
        writeln!(self.lark, "{name}: {body}").expect("a String takes everything");
    }

    /// The rules `call_N` of a tool: from `invoke` to its closer.
    fn tool(&mut self, index: usize, tool: &Tool) -> Result<(), String> {
        let empty = json!({});
        let root = tool.parameters().unwrap_or(&empty);
        let parameters = parameters(resolve(root, root)?)?;
        without_marker(tool.name())?;
        let dsml = self.dsml;
        let header = literal(&format!("invoke name=\"{}\">\n", dsml::escaped_name(tool.name())));
        let closer = format!("\"</\" <[{dsml}]> \"invoke>\\n\"");
        // Without parameters the form has an empty line.
        let none = format!("\"\\n</\" <[{dsml}]> \"invoke>\\n\"");
        let needed = parameters.iter().filter(|parameter| parameter.required).count();
        let list = format!("list_{index}");
        let body = match parameters.len() {
            0 => none,
            1..=FREE_ORDER_PARAMETERS => {
                self.any_order(index, parameters.len(), needed, &closer);
                if needed == 0 { format!("({list}::0x0 | {none})") } else { format!("{list}::0x0") }
            }
            _ => {
                let optional = |parameter: &Parameter<'_>| if parameter.required { "" } else { "?" };
                let in_order = parameters.iter().enumerate();
                let in_order = in_order.map(|(i, parameter)| format!("parameter_{index}_{i}{}", optional(parameter)));
                format!("{} {closer}", in_order.collect::<Vec<_>>().join(" "))
            }
        };
        self.rule(&format!("call_{index}"), &format!("{header} {body}"));
        for (i, parameter) in parameters.iter().enumerate() {
            let named = |what| format!("parameter `{}`: {what}", parameter.name);
            self.parameter(&format!("{index}_{i}"), tool.name(), parameter, root).map_err(named)?;
        }
        Ok(())
    }

    /// The rule `list_N`: parameters not given yet, and the closer once the first `needed` are there. The rule's argument is the
    /// set of those given.
    fn any_order(&mut self, tool: usize, count: usize, needed: usize, closer: &str) {
        let complete = match needed {
            0 => "bit_count_ge(_, 1)".to_owned(),
            _ => format!("is_ones([0:{needed}])"),
        };
        let mut body = format!("{closer} %if {complete}");
        for i in 0..count {
            write!(body, "\n | parameter_{tool}_{i} list_{tool}::set_bit({i}) %if bit_clear({i})")
                .expect("a String takes everything");
        }
        self.rule(&format!("list_{tool}::_"), &body);
    }

    /// The rule `parameter_ID`: from `<` to the closer's line end.
    fn parameter(&mut self, id: &str, tool: &str, parameter: &Parameter<'_>, root: &Value) -> Result<(), String> {
        without_marker(parameter.name)?;
        let dsml = self.dsml;
        let mut forms = Forms::default();
        forms.add(parameter.schema, root, MAX_DEPTH)?;
        let mut values = Vec::new();
        for (i, text) in forms.texts.iter().enumerate() {
            let body = self.text(&format!("TEXT_{id}_{i}"), text);
            values.push(format!("\"\\\"true\\\">\" {body}"));
        }
        for (i, schema) in forms.json.into_iter().enumerate() {
            let name = format!("json_{id}_{i}");
            values.push(format!("\"\\\"false\\\">\" @{name} \"</\""));
            let (tool, parameter) = (tool.to_owned(), parameter.name.to_owned());
            self.json.push(JsonValue { name, tool, parameter, schema: schema::standalone(&schema, root)? });
        }
        if values.is_empty() {
            return Err("no value fits its schema".to_owned());
        }
        let header = literal(&format!("parameter name=\"{}\" string=", dsml::escaped_name(parameter.name)));
        let body = format!("\"<\" <[{dsml}]> {header} ({}) <[{dsml}]> \"parameter>\\n\"", values.join(" | "));
        self.rule(&format!("parameter_{id}"), &body);
        Ok(())
    }

    /// What a text value and the `</` of its closer match; `name` is for a terminal of its own if it needs one.
    ///
    /// Lexemes are greedy: a text runs on past a `</` that no control token follows, so `</` belongs to its lexeme.
    fn text(&mut self, name: &str, text: &Text) -> String {
        match text {
            Text::OneOf(texts) => {
                let texts: Vec<String> = texts.iter().map(|text| literal(&format!("{text}</"))).collect();
                self.rule(name, &texts.join(" | "));
            }
            Text::Free { expressions } if expressions.is_empty() => return "TEXT".to_owned(),
            Text::Free { expressions } => {
                let all: Vec<String> =
                    expressions.iter().map(|regex| format!("/{}/", regex_to_lark(regex, ""))).collect();
                self.rule(&format!("{name}_BODY"), &all.join(" & "));
                self.rule(name, &format!("{name}_BODY \"</\""));
            }
        }
        name.to_owned()
    }
}

/// The declared parameters, required ones first.
fn parameters(schema: &Value) -> Result<Vec<Parameter<'_>>, String> {
    if let Some(keyword) = ARGUMENT_KEYWORDS.iter().find(|keyword| schema.get(**keyword).is_some()) {
        return Err(format!("`{keyword}` over all parameters is not supported"));
    }
    let properties = match schema.get("properties") {
        None => None,
        Some(Value::Object(properties)) => Some(properties),
        Some(found) => return Err(format!("`properties` is {found}, expected an object")),
    };
    let required: Vec<&str> = match schema.get("required") {
        None => Vec::new(),
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        Some(found) => return Err(format!("`required` is {found}, expected an array")),
    };
    if let Some(name) =
        required.iter().find(|name| properties.is_none_or(|properties| !properties.contains_key(**name)))
    {
        return Err(format!("`{name}` is required but not among the properties"));
    }
    let required = |name: &str| required.contains(&name);
    let mut parameters: Vec<Parameter<'_>> = properties
        .into_iter()
        .flatten()
        .map(|(name, schema)| Parameter { name, schema, required: required(name) })
        .collect();
    if parameters.len() <= FREE_ORDER_PARAMETERS {
        parameters.sort_by_key(|parameter| !parameter.required);
    }
    Ok(parameters)
}

/// The ways in which a value may be written.
#[derive(Default)]
struct Forms {
    /// As text, `string="true"`.
    texts: Vec<Text>,
    /// As JSON that is no string, by one of these schemas.
    json: Vec<Value>,
}

enum Text {
    OneOf(Vec<String>),
    /// Matches every one of these regular expressions.
    Free {
        expressions: Vec<String>,
    },
}

impl Forms {
    /// Adds those of `schema`, part of the schema `root`.
    fn add(&mut self, schema: &Value, root: &Value, depth: usize) -> Result<(), String> {
        let depth = depth.checked_sub(1).ok_or("its schema is nested too deeply")?;
        let schema = resolve(schema, root)?;
        let fields = match schema {
            Value::Bool(true) => &Map::new(),
            Value::Object(fields) => fields,
            other => return Err(format!("its schema is {other}, expected an object")),
        };
        for keyword in ["anyOf", "oneOf"] {
            if let (Some(Value::Array(options)), None) = (fields.get(keyword), schema::other_assertion(fields, keyword))
            {
                // What fits exactly one of several schemas fits any of them if they exclude each other.
                if keyword == "oneOf" && !are_disjoint(options, root) {
                    return Err("`oneOf` is supported only over different types or values; use `anyOf`".to_owned());
                }
                return options.iter().try_for_each(|option| self.add(option, root, depth));
            }
        }
        if let Some(values) = listed(fields) {
            return self.add_values(&values, fields);
        }
        let types = types(fields)?;
        if types.contains(&"string") {
            refuse_combinations(fields)?;
            self.texts.push(Text::Free { expressions: expressions(fields)? });
        }
        let others: Vec<&str> = types.into_iter().filter(|kind| *kind != "string").collect();
        if !others.is_empty() {
            let mut fields = fields.clone();
            fields.insert("type".to_owned(), json!(others));
            self.json.push(Value::Object(fields));
        }
        Ok(())
    }

    /// Adds listed values, as far as they fit what stands beside the list.
    fn add_values(&mut self, values: &[&Value], fields: &Map<String, Value>) -> Result<(), String> {
        let types = types(fields)?;
        let (texts, others): (Vec<&Value>, Vec<&Value>) =
            values.iter().filter(|value| is_of(value, &types)).partition(|value| value.is_string());
        if !texts.is_empty() {
            refuse_combinations(fields)?;
            let mut texts: Vec<String> = texts.iter().filter_map(|text| text.as_str()).map(str::to_owned).collect();
            for expression in expressions(fields)? {
                let mut regex = Regex::new(&expression).map_err(|error| super::first_line(&error.to_string()))?;
                texts.retain(|text| regex.is_match(text));
            }
            texts.iter().try_for_each(|text| without_marker(text))?;
            if !texts.is_empty() {
                self.texts.push(Text::OneOf(texts));
            }
        }
        if !others.is_empty() {
            let mut fields = fields.clone();
            fields.remove("const");
            fields.insert("enum".to_owned(), json!(others));
            self.json.push(Value::Object(fields));
        }
        Ok(())
    }
}

/// Refuses keywords that would have to hold for a text together with the others.
fn refuse_combinations(fields: &Map<String, Value>) -> Result<(), String> {
    match COMBINING_KEYWORDS.iter().find(|keyword| fields.contains_key(**keyword)) {
        Some(keyword) => Err(format!("`{keyword}` beside other keywords over texts is not supported")),
        None => Ok(()),
    }
}

/// The regular expressions that a text has to match as a whole.
fn expressions(fields: &Map<String, Value>) -> Result<Vec<String>, String> {
    let mut expressions = Vec::new();
    let length = |keyword| match fields.get(keyword) {
        None => Ok(None),
        Some(found) => found.as_u64().map(Some).ok_or(format!("`{keyword}` is {found}, expected a whole number")),
    };
    match (length("minLength")?, length("maxLength")?) {
        (None | Some(0), None) => (),
        (Some(min), Some(max)) if min > max => return Err(format!("no text has {min} to {max} characters")),
        (min, max) => {
            let max = max.map_or(String::new(), |max| max.to_string());
            expressions.push(format!("(?s:.{{{},{max}}})", min.unwrap_or(0)));
        }
    }
    match fields.get("pattern") {
        None => (),
        Some(Value::String(pattern)) => {
            without_marker(pattern)?;
            expressions.push(whole_text(pattern)?);
        }
        Some(found) => return Err(format!("`pattern` is {found}, expected a text")),
    }
    Ok(expressions)
}

/// A text as a literal of the library's language, which is that of JSON.
fn literal(text: &str) -> String {
    Value::from(text).to_string()
}
