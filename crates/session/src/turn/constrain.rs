//! What forces a turn: an opener put into the model's mouth, and grammars.

use serde_json::Value;
use text::grammar::Constraint;
use text::prompt::Tool;
use text::{Segment, dsml};

use super::ToolChoice;
use crate::{Error, Vocabulary};

/// What holds a turn to a grammar ([`text::grammar`]).
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Constrain {
    /// Nothing.
    #[default]
    Off,
    /// From the moment a block of calls opens in the answer it must be well-formed and fit the declared tools. The text before it
    /// is free. Only `<｜DSML｜` written with the control token opens one: any other markup of calls is text, and a block in
    /// reasoning stays reasoning.
    Calls,
    /// The answer must be JSON by this schema. There can then be no calls: markup of calls is text, and a tool choice that
    /// requires one is refused. What would end the turn while it reasons ends the reasoning.
    Schema(Value),
}

/// The tokens that force a call, none if the choice is free; exactly those of a prompt that holds this text.
pub fn opener(vocabulary: &Vocabulary, choice: &ToolChoice, tools: Option<&[Tool]>) -> Result<Vec<u32>, Error> {
    let name = match choice {
        ToolChoice::Auto | ToolChoice::None => return Ok(Vec::new()),
        ToolChoice::Required => None,
        ToolChoice::Named(name) => Some(name.as_str()),
    };
    let tools = tools.unwrap_or_default();
    let is_declared = |name| tools.iter().any(|tool| tool.name() == name);
    if tools.is_empty() || !name.is_none_or(is_declared) {
        let declared = tools.iter().map(|tool| tool.name().to_owned()).collect();
        return Err(Error::ToolChoice { found: name.map(str::to_owned), declared });
    }
    let markup = format!("{}{}\n{} name=\"", dsml::SEPARATOR, dsml::BLOCK_OPENER, dsml::INVOKE_OPENER);
    let mut segments = vocabulary.tokenizer().split_control(&markup);
    if let Some(name) = name {
        segments.push(Segment::Text(dsml::escaped_name(name)));
        // The form of a call without parameters goes on with an empty line, and tokens may span both line ends.
        let tool = tools.iter().find(|tool| tool.name() == name);
        let header_end = if tool.is_some_and(has_no_parameters) { "\">\n\n" } else { "\">\n" };
        segments.push(Segment::Text(header_end.to_owned()));
    }
    Ok(vocabulary.tokenizer().encode_segments(&segments))
}

/// Whether a tool declares that it has no parameters; a schema that says it in another way than by `properties` may have some.
fn has_no_parameters(tool: &Tool) -> bool {
    const ELSEWHERE: [&str; 6] = ["$ref", "allOf", "anyOf", "oneOf", "additionalProperties", "patternProperties"];
    tool.parameters().is_none_or(|schema| {
        let is_empty = schema.get("properties").and_then(Value::as_object).is_none_or(serde_json::Map::is_empty);
        is_empty && ELSEWHERE.iter().all(|keyword| matches!(schema.get(*keyword), None | Some(Value::Bool(false))))
    })
}

/// The grammar of a turn and whether it holds yet.
pub enum Constraints {
    Off,
    /// Holds from the control token of an opener on; `after_bracket` says whether `<` came last.
    Calls {
        constraint: Box<Constraint>,
        open: bool,
        after_bracket: bool,
    },
    /// Holds in the whole answer.
    Answer(Box<Constraint>),
}

impl Constraints {
    pub fn new(vocabulary: &Vocabulary, constrain: &Constrain, tools: Option<&[Tool]>) -> Result<Constraints, Error> {
        match (constrain, tools) {
            (Constrain::Off, _) | (Constrain::Calls, None | Some([])) => Ok(Constraints::Off),
            (Constrain::Calls, Some(tools)) => {
                let constraint = Box::new(vocabulary.compiler()?.calls(tools)?);
                Ok(Constraints::Calls { constraint, open: false, after_bracket: false })
            }
            (Constrain::Schema(schema), _) => Ok(Constraints::Answer(Box::new(vocabulary.compiler()?.json(schema)?))),
        }
    }

    /// Whether a block of calls has been opened and is held to the grammar.
    pub fn has_opened(&self) -> bool {
        matches!(self, Constraints::Calls { open: true, .. })
    }

    /// The tokens that may come next, all if `None`.
    pub fn allowed(&mut self, in_reasoning: bool) -> Result<Option<Vec<u32>>, Error> {
        match self {
            Constraints::Calls { constraint, open: true, .. } => Ok(Some(constraint.allowed()?)),
            Constraints::Answer(constraint) if !in_reasoning => Ok(Some(constraint.allowed()?)),
            _ => Ok(None),
        }
    }

    /// Goes on past `token`; `in_reasoning` says what came before it.
    pub fn accept(&mut self, vocabulary: &Vocabulary, token: u32, in_reasoning: bool) -> Result<(), Error> {
        match self {
            Constraints::Calls { constraint, open: true, .. } => constraint.accept(token)?,
            Constraints::Calls { open, after_bracket, .. } => {
                *open = !in_reasoning && *after_bracket && Some(token) == vocabulary.control().dsml;
                *after_bracket = vocabulary.tokenizer().token_bytes(token).ends_with(b"<");
            }
            Constraints::Answer(constraint) if !in_reasoning => constraint.accept(token)?,
            Constraints::Off | Constraints::Answer(_) => (),
        }
        Ok(())
    }
}
