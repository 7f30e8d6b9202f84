//! JSON schemas: references, and the form in which the library takes them.

use serde_json::{Map, Value, json};

use crate::dsml;

/// Deepest chain of `$ref` and of schemas that only wrap another.
pub const MAX_DEPTH: usize = 32;

/// Keywords that say something about a value. Others (`title`, `default`, `x-…`) are remarks, and so is `format`.
const ASSERTIONS: [&str; 38] = [
    "$ref",
    "additionalItems",
    "additionalProperties",
    "allOf",
    "anyOf",
    "const",
    "contains",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "else",
    "enum",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "if",
    "items",
    "maxContains",
    "maximum",
    "maxItems",
    "maxLength",
    "maxProperties",
    "minContains",
    "minimum",
    "minItems",
    "minLength",
    "minProperties",
    "multipleOf",
    "not",
    "oneOf",
    "pattern",
    "patternProperties",
    "prefixItems",
    "properties",
    "propertyNames",
    "required",
    "then",
    "type",
    "uniqueItems",
];
/// Keywords whose value is a schema, or an array of schemas.
const OF_SCHEMAS: [&str; 14] = [
    "additionalItems",
    "additionalProperties",
    "allOf",
    "anyOf",
    "contains",
    "else",
    "if",
    "items",
    "not",
    "oneOf",
    "prefixItems",
    "propertyNames",
    "then",
    "unevaluatedProperties",
];
/// Keywords whose value is an object of schemas.
const OF_NAMED_SCHEMAS: [&str; 3] = ["dependentSchemas", "patternProperties", "properties"];

/// The first keyword of `fields` that says something about the value, `but` aside.
pub fn other_assertion<'a>(fields: &Map<String, Value>, but: &str) -> Option<&'a str> {
    ASSERTIONS.into_iter().find(|keyword| *keyword != but && fields.contains_key(*keyword))
}

/// What a chain of `$ref` leads to, as far as it goes within `root`. An `allOf` of one schema is that schema.
pub fn resolve<'a>(mut schema: &'a Value, root: &'a Value) -> Result<&'a Value, String> {
    for _ in 0..MAX_DEPTH {
        let Some(fields) = schema.as_object() else { return Ok(schema) };
        schema = match (fields.get("$ref"), fields.get("allOf")) {
            (Some(reference), _) => {
                if let Some(keyword) = other_assertion(fields, "$ref") {
                    return Err(format!("`{keyword}` beside `$ref` is not supported"));
                }
                let target = reference.as_str().and_then(pointer).and_then(|path| root.pointer(&path));
                target.ok_or_else(|| format!("the reference {reference} leads nowhere within the tool's schema"))?
            }
            (None, Some(Value::Array(all))) if all.len() == 1 && other_assertion(fields, "allOf").is_none() => &all[0],
            _ => return Ok(schema),
        };
    }
    Err("its references lead in a circle".to_owned())
}

/// The JSON pointer of a reference within its document: a URI fragment, in which `%20` is a space (RFC 6901 §6).
fn pointer(reference: &str) -> Option<String> {
    let path = reference.strip_prefix('#')?;
    let mut pieces = path.split('%');
    let mut bytes = pieces.next()?.as_bytes().to_vec();
    for piece in pieces {
        bytes.push(u8::from_str_radix(piece.get(..2)?, 16).ok()?);
        bytes.extend_from_slice(&piece.as_bytes()[2..]);
    }
    String::from_utf8(bytes).ok()
}

/// Whether no value can fit two of `options`, as far as their types or their listed values show it.
pub fn are_disjoint(options: &[Value], root: &Value) -> bool {
    let domains: Option<Vec<Domain<'_>>> =
        options.iter().map(|option| Domain::of(resolve(option, root).ok()?)).collect();
    let Some(domains) = domains else { return false };
    (0..domains.len()).all(|i| domains[..i].iter().all(|other| !domains[i].meets(other)))
}

/// The values that a schema allows at most.
enum Domain<'a> {
    Types(Vec<&'a str>),
    Values(Vec<&'a Value>),
}

impl<'a> Domain<'a> {
    fn of(schema: &'a Value) -> Option<Self> {
        let fields = schema.as_object()?;
        match listed(fields) {
            Some(values) => Some(Self::Values(values)),
            None if fields.contains_key("type") => types(fields).ok().map(Self::Types),
            None => None,
        }
    }

    fn meets(&self, other: &Self) -> bool {
        let base = |kind: &str| if kind == "integer" { "number".to_owned() } else { kind.to_owned() };
        match (self, other) {
            (Self::Types(a), Self::Types(b)) => a.iter().any(|kind| b.iter().any(|other| base(kind) == base(other))),
            (Self::Values(a), Self::Values(b)) => a.iter().any(|value| b.iter().any(|other| are_equal(value, other))),
            (Self::Types(types), Self::Values(values)) | (Self::Values(values), Self::Types(types)) => {
                values.iter().any(|value| is_of(value, types))
            }
        }
    }
}

/// JSON schema compares numbers by value: 1 is 1.0.
fn are_equal(a: &Value, b: &Value) -> bool {
    a == b || (a.is_number() && b.is_number() && a.as_f64() == b.as_f64())
}

/// The values that `enum` and `const` allow.
pub fn listed(fields: &Map<String, Value>) -> Option<Vec<&Value>> {
    match (fields.get("enum"), fields.get("const")) {
        (Some(Value::Array(values)), Some(only)) => {
            Some(values.iter().filter(|value| are_equal(value, only)).collect())
        }
        (Some(Value::Array(values)), None) => Some(values.iter().collect()),
        (_, Some(only)) => Some(vec![only]),
        _ => None,
    }
}

/// The types that `type` allows: all if it is missing.
pub fn types(fields: &Map<String, Value>) -> Result<Vec<&str>, String> {
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

/// Whether `value` is of one of `types`.
pub fn is_of(value: &Value, types: &[&str]) -> bool {
    types.iter().any(|kind| match *kind {
        "string" => value.is_string(),
        "number" => value.is_number(),
        "integer" => value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|number| number.fract() == 0.0),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "array" => value.is_array(),
        _ => value.is_object(),
    })
}

/// `schema`, part of `root`, as a schema of its own in the form that the library takes.
///
/// What it refers to comes with it; `format` is dropped; `oneOf` of schemas that exclude each other becomes `anyOf`; and JSON is
/// written as Python does.
pub fn standalone(schema: &Value, root: &Value) -> Result<Value, String> {
    let mut schema = match schema {
        Value::Object(_) => schema.clone(),
        Value::Bool(true) => json!({}),
        other => return Err(format!("a schema is {other}, expected an object")),
    };
    let mut rewriter = Rewriter { root, targets: Vec::new() };
    rewriter.rewrite(&mut schema)?;
    let mut definitions = Map::new();
    while let Some(path) = rewriter.targets.get(definitions.len()) {
        let target = root.pointer(path);
        let mut target =
            target.ok_or_else(|| format!("the reference \"#{path}\" leads nowhere within the schema"))?.clone();
        rewriter.rewrite(&mut target)?;
        definitions.insert(definitions.len().to_string(), target);
    }
    schema["$defs"] = Value::Object(definitions);
    schema["x-guidance"] = json!({
        "whitespace_flexible": false,
        "item_separator": ", ",
        "key_separator": ": ",
    });
    Ok(schema)
}

struct Rewriter<'a> {
    root: &'a Value,
    /// Pointers into `root` to what is referred to. The n-th becomes the definition `n`.
    targets: Vec<String>,
}

impl Rewriter<'_> {
    /// Rewrites a schema and those in it.
    fn rewrite(&mut self, schema: &mut Value) -> Result<(), String> {
        let Some(fields) = schema.as_object_mut() else { return Ok(()) };
        refuse_marker(fields)?;
        ["format", "$defs", "definitions"].iter().for_each(|keyword| drop(fields.shift_remove(*keyword)));
        if let Some(Value::String(reference)) = fields.get_mut("$ref")
            && let Some(path) = pointer(reference)
        {
            *reference = format!("#/$defs/{}", self.definition(path));
        }
        if !fields.contains_key("anyOf")
            && matches!(fields.get("oneOf"), Some(Value::Array(options)) if are_disjoint(options, self.root))
        {
            let options = fields.shift_remove("oneOf").expect("just seen");
            fields.insert("anyOf".to_owned(), options);
        }
        for (keyword, field) in fields.iter_mut() {
            let keyword = keyword.as_str();
            match field {
                Value::Object(named) if OF_NAMED_SCHEMAS.contains(&keyword) => {
                    named.values_mut().try_for_each(|schema| self.rewrite(schema))?;
                }
                Value::Array(schemas) if OF_SCHEMAS.contains(&keyword) => {
                    schemas.iter_mut().try_for_each(|schema| self.rewrite(schema))?;
                }
                schema if OF_SCHEMAS.contains(&keyword) => self.rewrite(schema)?,
                _ => (),
            }
        }
        Ok(())
    }

    /// The number of the definition for what `path` points to.
    fn definition(&mut self, path: String) -> usize {
        self.targets.iter().position(|target| *target == path).unwrap_or_else(|| {
            self.targets.push(path);
            self.targets.len() - 1
        })
    }
}

/// Refuses a schema that asks for the word of the markup.
fn refuse_marker(fields: &Map<String, Value>) -> Result<(), String> {
    let names = fields.get("properties").and_then(Value::as_object).into_iter().flat_map(Map::keys);
    let values = ["enum", "const", "pattern"].iter().filter_map(|keyword| fields.get(*keyword)).map(Value::to_string);
    names.cloned().chain(values).try_for_each(|text| without_marker(&text))
}

/// Refuses a text that has to hold the word of the markup, which grammar mode never lets ordinary tokens spell.
pub fn without_marker(text: &str) -> Result<(), String> {
    match text.contains(dsml::TOKEN) {
        true => {
            Err(format!("{text:?} contains `{}`, the markup of calls, which no name or value may spell", dsml::TOKEN))
        }
        false => Ok(()),
    }
}
