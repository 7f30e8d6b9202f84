//! Tool calls of a nano model, with and without grammar mode: how many fit their schemas, and how many are exactly right.

use std::ops::ControlFlow;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use cpu::CpuBackend;
use model::{Backend, Cancel};
use serde_json::{Map, Value};
use session::{Constrain, Sampling, Session, TurnOptions, TurnOutcome, Vocabulary, run_turn};
use text::parse::ParseOptions;
use text::prompt::{Call, Tool};

use crate::heldout::Item;

/// Most tokens of an answer; the longest expected one has fewer.
const MAX_TOKENS: usize = 500;

/// Counts over the items of a set that offer tools.
#[derive(Default)]
pub struct Scores {
    /// Items.
    pub items: usize,
    /// Answers with a block of calls, well-formed or not.
    pub called: usize,
    /// Of these, blocks that are well-formed and whose calls all fit their tools' schemas.
    pub valid: usize,
    /// Answers that are exactly right.
    pub right: usize,
}

/// Answers one item greedily, first freely and then in grammar mode, and counts. An item without tools is left out.
///
/// # Errors
/// The item is none, or the model fails.
pub fn score(
    backend: &CpuBackend,
    vocabulary: &Arc<Vocabulary>,
    item: &Item,
    [free, held]: [&mut Scores; 2],
) -> Result<()> {
    let Some(tools) = item.tools()? else { return Ok(()) };
    let prompt = item.prompt(vocabulary.tokenizer())?;
    let mut session = Session::new(backend, session::Context::new(backend.config(), None)?)?;
    for (constrain, scores) in [(Constrain::Off, free), (Constrain::Calls, held)] {
        let kept = session.reuse(backend, &prompt);
        let logits = session.prefill(backend, &prompt[kept..], 256, &Cancel::default(), &mut |_| ())?;
        let options = TurnOptions {
            parse: ParseOptions { thinking: item.thinking(), tools: Some(tools.clone()) },
            sampling: Sampling { temperature: 0.0, ..Sampling::default() },
            max_tokens: MAX_TOKENS,
            constrain,
            ..TurnOptions::default()
        };
        let receive = &mut |_| ControlFlow::Continue(());
        let outcome = run_turn(backend, vocabulary, &mut session, logits, &options, &Cancel::default(), receive)?;
        scores.add(&outcome, item, vocabulary, &tools);
    }
    Ok(())
}

impl Scores {
    fn add(&mut self, outcome: &TurnOutcome, item: &Item, vocabulary: &Vocabulary, tools: &[Tool]) {
        let called = !outcome.turn.calls.is_empty() || outcome.turn.malformed;
        let valid = !outcome.turn.calls.is_empty() && outcome.turn.calls.iter().all(|call| fits_its_tool(call, tools));
        // The end of the turn is no part of what the driver reports, and after a block it is not waited for.
        let mut expected = item.answer(vocabulary.tokenizer());
        expected.pop_if(|token| *token == vocabulary.control().eos);
        self.items += 1;
        self.called += usize::from(called);
        self.valid += usize::from(called && valid);
        self.right += usize::from(outcome.tokens == expected);
    }
}

fn fits_its_tool(call: &Call, tools: &[Tool]) -> bool {
    let Some(tool) = tools.iter().find(|tool| tool.name() == call.name) else { return false };
    let Ok(arguments) = serde_json::from_str::<Map<String, Value>>(&call.arguments) else { return false };
    let schema = tool.parameters().cloned().unwrap_or_default();
    let declared = |name: &String| schema["properties"].get(name).is_some();
    arguments.keys().all(declared) && fits(&Value::Object(arguments), &schema)
}

/// Whether `value` fits `schema`, for the keywords that the held-out tools use.
///
/// Panics if there is another.
fn fits(value: &Value, schema: &Value) -> bool {
    let is = |kind: &str| match kind {
        "string" => value.is_string(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("a schema of type {other}, which this check does not know"),
    };
    schema.as_object().into_iter().flatten().all(|(keyword, rule)| match keyword.as_str() {
        "type" => rule.as_str().is_some_and(is),
        "enum" => rule.as_array().is_some_and(|values| values.contains(value)),
        "items" => value.as_array().is_some_and(|items| items.iter().all(|item| fits(item, rule))),
        "required" => rule
            .as_array()
            .is_some_and(|names| names.iter().all(|name| value.get(name.as_str().unwrap_or_default()).is_some())),
        "properties" => {
            let fits = |(name, schema): (&String, &Value)| value.get(name).is_none_or(|value| fits(value, schema));
            rule.as_object().is_some_and(|properties| properties.iter().all(fits))
        }
        "description" => true,
        other => panic!("the keyword {other} in a schema, which this check does not know"),
    })
}

/// The line of a set, free and in grammar mode.
pub fn line(task: &str, free: &Scores, held: &Scores) -> String {
    let share = |part: usize, whole: usize| match whole {
        0 => "none".to_owned(),
        _ => format!("{part}/{whole} {:.1} %", part as f64 * 100.0 / whole as f64),
    };
    let columns = |scores: &Scores| {
        format!("{:>18} {:>18}", share(scores.valid, scores.called), share(scores.right, scores.items))
    };
    format!("{task:<16} {} {}", columns(free), columns(held))
}

/// Fails unless every block in grammar mode fits and no answer was lost to it.
///
/// # Errors
/// What went wrong.
pub fn check(task: &str, free: &Scores, held: &Scores) -> Result<()> {
    if held.valid < held.called {
        bail!(
            "{task}: {} of {} blocks in grammar mode do not fit their schemas",
            held.called - held.valid,
            held.called
        );
    }
    if held.right < free.right {
        bail!("{task}: {} answers are right in grammar mode, {} without", held.right, free.right);
    }
    Ok(())
}

impl Item {
    /// The tools that the prompt offers, if any.
    ///
    /// # Errors
    /// Its tools section is damaged.
    pub fn tools(&self) -> Result<Option<Vec<Tool>>> {
        let text = self.text();
        let Some((_, rest)) = text.split_once("### Available Tool Schemas\n\n") else { return Ok(None) };
        let (schemas, _) = rest.split_once("\n\nYou MUST strictly follow").context("a tools section without end")?;
        let tool = |line: &str| Ok(Tool::from_value(serde_json::from_str(line)?)?);
        schemas.lines().map(tool).collect::<Result<Vec<Tool>>>().map(Some)
    }
}
