//! The grammar of a block of calls.

use std::fmt::Write;

use llguidance::api::TopLevelGrammar;
use llguidance::regex_to_lark;
use serde_json::{Map, Value, json};

use super::{GrammarError, python_json, with_json};
use crate::dsml;
use crate::prompt::Tool;

/// Most parameters that may come in any order: the library counts them in the bits of an integer.
const FREE_ORDER_PARAMETERS: usize = 64;
/// Deepest nesting of `$ref` and `anyOf` that is looked into for texts.
const MAX_DEPTH: usize = 32;

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
/// Keywords that say what a value is, beside which alternatives are not taken apart.
const VALUE_KEYWORDS: [&str; 9] = ["type", "enum", "const", "anyOf", "oneOf", "allOf", "not", "if", "properties"];

/// What may follow `<` and the control token `dsml`.
pub fn grammar(tools: &[Tool], dsml: u32) -> Result<TopLevelGrammar, GrammarError> {
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
    Ok(with_json(writer.lark, writer.json))
}

struct Writer {
    lark: String,
    json: Vec<(String, Value)>,
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
            self.parameter(&format!("{index}_{i}"), parameter, root).map_err(named)?;
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
    fn parameter(&mut self, id: &str, parameter: &Parameter<'_>, root: &Value) -> Result<(), String> {
        let dsml = self.dsml;
        let mut forms = Forms::default();
        forms.add(parameter.schema, root, MAX_DEPTH)?;
        let mut values = Vec::new();
        for (i, text) in forms.texts.iter().enumerate() {
            let body = self.text(&format!("TEXT_{id}_{i}"), text)?;
            values.push(format!("\"\\\"true\\\">\" {body}"));
        }
        for (i, schema) in forms.json.into_iter().enumerate() {
            let name = format!("json_{id}_{i}");
            values.push(format!("\"\\\"false\\\">\" @{name} \"</\""));
            self.json.push((name, python_json(&with_definitions(schema, root))?));
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
    fn text(&mut self, name: &str, text: &Text) -> Result<String, String> {
        match text {
            Text::OneOf(texts) => {
                let texts: Vec<String> = texts.iter().map(|text| literal(&format!("{text}</"))).collect();
                Ok(format!("({})", texts.join(" | ")))
            }
            Text::Free { expressions } if expressions.is_empty() => Ok("TEXT".to_owned()),
            Text::Free { expressions } => {
                let all: Vec<String> =
                    expressions.iter().map(|regex| format!("/{}/", regex_to_lark(regex, ""))).collect();
                self.rule(&format!("{name}_BODY"), &all.join(" & "));
                self.rule(name, &format!("{name}_BODY \"</\""));
                Ok(name.to_owned())
            }
        }
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
        let beside =
            |keyword: &str| VALUE_KEYWORDS.iter().any(|other| *other != keyword && fields.contains_key(*other));
        for keyword in ["anyOf", "oneOf"] {
            if let (Some(Value::Array(options)), false) = (fields.get(keyword), beside(keyword)) {
                // One of several schemas at once cannot be told from any, unless their types differ.
                if keyword == "oneOf" && !of_different_types(options, root) {
                    return Err("`oneOf` is supported only over different types; use `anyOf`".to_owned());
                }
                return options.iter().try_for_each(|option| self.add(option, root, depth));
            }
        }
        if let Some(Value::Array(values)) = fields.get("enum") {
            return self.add_values(values, fields);
        }
        if let Some(value) = fields.get("const") {
            return self.add_values(std::slice::from_ref(value), fields);
        }
        let types = types(fields)?;
        if types.contains(&"string") {
            if ["anyOf", "oneOf", "allOf", "not", "if"].iter().any(|keyword| fields.contains_key(*keyword)) {
                return Err("alternatives beside a type that includes strings are not supported".to_owned());
            }
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

    /// Adds listed values, as far as they are of the declared type.
    fn add_values(&mut self, values: &[Value], fields: &Map<String, Value>) -> Result<(), String> {
        let types = types(fields)?;
        let (texts, others): (Vec<&Value>, Vec<&Value>) = values.iter().partition(|value| value.is_string());
        let texts: Vec<String> = texts.iter().filter_map(|text| text.as_str()).map(str::to_owned).collect();
        if !texts.is_empty() && types.contains(&"string") {
            self.texts.push(Text::OneOf(texts));
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

/// The types that `type` allows: all if it is missing.
fn types(fields: &Map<String, Value>) -> Result<Vec<&str>, String> {
    let known = ["string", "number", "integer", "boolean", "null", "array", "object"];
    let types: Vec<&str> = match fields.get("type") {
        None => known.into_iter().filter(|kind| *kind != "integer").collect(),
        Some(Value::String(kind)) => vec![kind],
        Some(Value::Array(kinds)) => kinds.iter().filter_map(Value::as_str).collect(),
        Some(found) => return Err(format!("its type is {found}, expected a text or an array of texts")),
    };
    match types.iter().find(|kind| !known.contains(kind)) {
        Some(found) => Err(format!("its type is `{found}`, expected one of {}", known.join(", "))),
        None => Ok(types),
    }
}

/// Whether each of `options` has types of its own.
fn of_different_types(options: &[Value], root: &Value) -> bool {
    let types = |option| match resolve(option, root) {
        Ok(Value::Object(fields)) if fields.contains_key("type") => types(fields).ok(),
        _ => None,
    };
    let types: Option<Vec<Vec<&str>>> = options.iter().map(types).collect();
    let mut all: Vec<&str> = types.unwrap_or_default().concat();
    // An integer is a number too.
    all.iter_mut().filter(|kind| **kind == "integer").for_each(|kind| *kind = "number");
    let count = all.len();
    all.sort_unstable();
    all.dedup();
    count > 0 && count == all.len()
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
        (min, max) => {
            let max = max.map_or(String::new(), |max| max.to_string());
            expressions.push(format!("(?s:.{{{},{max}}})", min.unwrap_or(0)));
        }
    }
    match fields.get("pattern") {
        None => (),
        Some(Value::String(pattern)) => expressions.push(whole_text(pattern)?),
        Some(found) => return Err(format!("`pattern` is {found}, expected a text")),
    }
    Ok(expressions)
}

/// A `pattern`, which may match anywhere in the text, as an expression for all of it.
fn whole_text(pattern: &str) -> Result<String, String> {
    let (start, rest) = pattern.strip_prefix('^').map_or(("(?s:.*)", pattern), |rest| ("", rest));
    let at_end = rest.ends_with('$') && !rest.ends_with("\\$");
    let (rest, end) = if at_end { (&rest[..rest.len() - 1], "") } else { (rest, "(?s:.*)") };
    if (start.is_empty() || end.is_empty()) && has_open_alternative(rest) {
        return Err(format!("`pattern` {pattern:?} mixes `|` with `^` or `$`: put the alternatives in parentheses"));
    }
    Ok(format!("{start}(?:{rest}){end}"))
}

/// Whether a `|` of the expression stands outside parentheses and brackets.
fn has_open_alternative(expression: &str) -> bool {
    let (mut depth, mut in_brackets, mut escaped) = (0, false, false);
    for character in expression.chars() {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ']' => in_brackets = false,
            _ if in_brackets => (),
            '[' => in_brackets = true,
            '(' => depth += 1,
            ')' => depth -= 1,
            '|' if depth == 0 => return true,
            _ => (),
        }
    }
    false
}

/// What a chain of `$ref` leads to, as far as it goes within `root`.
fn resolve<'a>(mut schema: &'a Value, root: &'a Value) -> Result<&'a Value, String> {
    for _ in 0..MAX_DEPTH {
        let Some(reference) = schema.get("$ref") else { return Ok(schema) };
        let target = reference.as_str().and_then(|text| text.strip_prefix('#')).and_then(|path| root.pointer(path));
        schema = target.ok_or_else(|| format!("the reference {reference} leads nowhere within the tool's schema"))?;
    }
    Err("its references lead in a circle".to_owned())
}

/// `schema`, part of `root`, as a schema of its own: what it refers to comes with it.
fn with_definitions(mut schema: Value, root: &Value) -> Value {
    const ROOT: &str = "tool";
    fn redirect(value: &mut Value) -> bool {
        let mut found = false;
        match value {
            Value::Array(items) => items.iter_mut().for_each(|item| found |= redirect(item)),
            Value::Object(fields) => {
                fields.values_mut().for_each(|field| found |= redirect(field));
                if let Some(Value::String(reference)) = fields.get_mut("$ref")
                    && let Some(path) = reference.strip_prefix('#')
                {
                    *reference = format!("#/$defs/{ROOT}{path}");
                    found = true;
                }
            }
            _ => (),
        }
        found
    }
    if redirect(&mut schema) {
        let mut root = root.clone();
        redirect(&mut root);
        schema["$defs"] = json!({ ROOT: root });
    }
    schema
}

/// A text as a literal of the library's language, which is that of JSON.
fn literal(text: &str) -> String {
    Value::from(text).to_string()
}
