//! `infall check tool-call-quality`: whether a model calls a tool as it is asked to, and goes on from the result
//! (docs/spec/conversation.md §6).
//!
//! One session for both turns, and an engine of its own for each precision. What the checks look at besides the form of
//! §6: the argument, that there is one block only, and that the model would end its turn right behind it.

use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use model::Cancel;
use serde::Serialize;
use serde_json::{Value, json};
use session::{Context, Sampler, Sampling, Session, StopReason, TurnOptions, TurnOutcome, Vocabulary, run_turn};
use text::dsml;
use text::parse::{Finish, ParseOptions};
use text::prompt::{AssistantMessage, Call, Encoding, Message, Mode, PromptOptions, Tool, render};
use xxhash_rust::xxh3::Xxh3;

use crate::device::{Device, on_device};
use crate::load::ModelFile;
use crate::placement::{Setting, Work};
use crate::stats::Meter;
use crate::terminal::{self, Stream, Unit};
use crate::{Outcome, flags, interrupt};

const REQUEST: &str =
    "Use the list_files tool for the current directory exactly once, then report the result and stop.";
const RESULT: &str = r#"["README.md","Makefile","ds4.c","metal"]"#;
/// As an API would name the call.
const CALL_ID: &str = "call_00_q4ZrT8mWc1XyBn6LdH2VsKpE";
const CONTEXT_TOKENS: usize = 32_768;
const SEED: u64 = 123;
const MAX_TOKENS: usize = 256;

/// What one precision gave.
#[derive(Serialize)]
struct Trial {
    setting: Setting,
    passed: bool,
    /// Of the logits of every pass, as little-endian f32.
    logits_xxh3: String,
    turns: Vec<Exchange>,
    checks: Vec<Check>,
}

/// A prompt and what the model said.
#[derive(Serialize)]
struct Exchange {
    kept_tokens: usize,
    read_tokens: usize,
    generated_tokens: usize,
    finish: &'static str,
    content: String,
    calls: Vec<Value>,
    raw_block: Option<String>,
    prefill: Value,
    decode: Value,
}

/// One thing that must hold.
#[derive(Serialize)]
struct Check {
    what: &'static str,
    passed: bool,
    found: String,
}

/// Runs the command.
pub fn tool_call_quality(flags: &flags::ToolCallQuality) -> anyhow::Result<Outcome> {
    let file = ModelFile::open(flags.model.as_deref())?;
    let vocabulary = Vocabulary::new(Arc::new(file.tokenizer()?));
    let vocabulary = Arc::new(vocabulary.map_err(|error| anyhow::anyhow!("{}: {error}", file.name))?);
    let cancel = interrupt::cancel_on_interrupt()?;
    let context = Context::new(&file.model.config, Some(CONTEXT_TOKENS.min(file.model.config.context_length)))?;
    let work = Work::new(&flags.machine, context.tokens());
    let trials = on_device!(file.device(&work)?, |on: D| {
        let attempt = |precision| {
            let (backend, setting) = file.load::<D>(&Work { precision, ..work }, &on, &cancel)?;
            terminal::dim_note(&setting.line());
            attempt(&backend, &vocabulary, context, setting, &cancel)
        };
        flags.precisions().into_iter().map(attempt).collect::<anyhow::Result<Vec<_>>>()
    });
    if cancel.check().is_err() {
        return Ok(Outcome::Interrupted);
    }
    let trials = trials?;
    Stream::Out.write(&if flags.json { json_text(&file, &trials) } else { table(&trials) })?;
    let failed = trials.iter().flat_map(|trial| &trial.checks).filter(|check| !check.passed).count();
    if failed > 0 {
        anyhow::bail!(
            "{}: {failed} checks failed, expected none. --json shows what the model wrote; weights made for tool calls \
             pass",
            file.name
        );
    }
    Ok(Outcome::Done)
}

/// Both turns.
fn attempt<D: Device>(
    backend: &D,
    vocabulary: &Arc<Vocabulary>,
    context: Context,
    setting: Setting,
    cancel: &Cancel,
) -> anyhow::Result<Trial> {
    let hash = Arc::new(Mutex::new(Xxh3::new()));
    let mut session = Session::new(backend, context)?;
    session.on_logits(Box::new(hasher(hash.clone())));
    let mut dialog = Dialog { backend, vocabulary, session, cancel };

    let mut messages = vec![
        Message::System { content: String::new(), tools: vec![tool()], response_format: None },
        Message::user(REQUEST),
    ];
    let (first, outcome) = dialog.exchange(&messages)?;
    let next = dialog.token_after(&outcome)?;
    let mut checks = checks_of_call(&outcome, next, vocabulary);
    let mut turns = vec![first];
    if checks.iter().all(|check| check.passed) {
        let held_tokens = dialog.session.tokens().len();
        messages.push(with_id(&outcome));
        messages.push(Message::tool(CALL_ID, RESULT));
        let (second, outcome) = dialog.exchange(&messages)?;
        checks.extend(checks_of_report(&outcome, &second, held_tokens));
        turns.push(second);
    } else {
        checks.push(Check { what: "turn 2 is reached", passed: false, found: "turn 1 failed".into() });
    }
    let logits_xxh3 = format!("{:016x}", hash.lock().unwrap_or_else(PoisonError::into_inner).digest());
    Ok(Trial { setting, passed: checks.iter().all(|check| check.passed), logits_xxh3, turns, checks })
}

fn tool() -> Tool {
    let declaration = json!({"type": "function", "function": {
        "name": "list_files",
        "description": "List files in a directory.",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
    }});
    Tool::from_value(declaration).expect("the declaration is fixed")
}

/// The turn as a client of an API sends it back.
fn with_id(outcome: &TurnOutcome) -> Message {
    let calls = outcome.turn.calls.iter().map(|call| Call { id: Some(CALL_ID.into()), ..call.clone() });
    Message::Assistant(AssistantMessage {
        content: outcome.turn.content.clone(),
        calls: calls.collect(),
        raw_block: outcome.turn.raw_block.clone(),
        ..AssistantMessage::default()
    })
}

/// A conversation under way.
struct Dialog<'a, D: Device> {
    backend: &'a D,
    vocabulary: &'a Arc<Vocabulary>,
    session: Session<D>,
    cancel: &'a Cancel,
}

impl<D: Device> Dialog<'_, D> {
    /// Lets the model answer the last of `messages`.
    fn exchange(&mut self, messages: &[Message]) -> anyhow::Result<(Exchange, TurnOutcome)> {
        let options = PromptOptions { encoding: Encoding::V4_2604, mode: Mode::Chat, drop_reasoning: true };
        let tokenizer = self.vocabulary.tokenizer();
        let prompt = tokenizer.encode_segments(&render(tokenizer, messages, &options)?);
        let meter = Meter::start(self.backend);
        let kept_tokens = self.session.reuse(self.backend, &prompt);
        let rest = &prompt[kept_tokens..];
        let bar = terminal::progress("reading", rest.len() as u64, Unit::Tokens);
        let read = &mut |tokens| bar.set_position(tokens as u64);
        let logits = self.session.prefill(self.backend, rest, D::PASS_ROWS, self.cancel, read)?;
        bar.finish_and_clear();
        let prefill = meter.stop(self.backend, rest.len());

        let options = TurnOptions {
            parse: ParseOptions { thinking: false, tools: Some(vec![tool()]) },
            sampling: greedy(),
            seed: SEED,
            max_tokens: MAX_TOKENS,
            ..TurnOptions::default()
        };
        let meter = Meter::start(self.backend);
        let go_on = &mut |_| ControlFlow::Continue(());
        let outcome = run_turn(self.backend, self.vocabulary, &mut self.session, logits, &options, self.cancel, go_on)?;
        let passes = self.session.tokens().len() - prompt.len();
        let decode = meter.stop(self.backend, passes);
        let turn = &outcome.turn;
        let call = |call: &Call| json!({"name": call.name, "arguments": call.arguments});
        let exchange = Exchange {
            kept_tokens,
            read_tokens: rest.len(),
            generated_tokens: outcome.tokens.len(),
            finish: finish(turn.finish),
            content: turn.content.clone(),
            calls: turn.calls.iter().map(call).collect(),
            raw_block: turn.raw_block.clone(),
            prefill: prefill.json(),
            decode: decode.json(),
        };
        Ok((exchange, outcome))
    }

    /// The token that the model would choose next, after a turn that its block of calls has ended.
    fn token_after(&mut self, outcome: &TurnOutcome) -> anyhow::Result<Option<u32>> {
        let (StopReason::CallsClosed, Some(&last)) = (outcome.reason, outcome.tokens.last()) else { return Ok(None) };
        let logits = self.session.step(self.backend, last, self.cancel)?;
        Ok(Some(Sampler::new(greedy(), SEED)?.sample(&logits)?))
    }
}

fn greedy() -> Sampling {
    Sampling { temperature: 0.0, ..Sampling::default() }
}

/// What must hold of the turn that calls; `next` is the token after its block.
fn checks_of_call(outcome: &TurnOutcome, next: Option<u32>, vocabulary: &Vocabulary) -> Vec<Check> {
    let turn = &outcome.turn;
    let names: Vec<&str> = turn.calls.iter().map(|call| call.name.as_str()).collect();
    let block = turn.raw_block.as_deref().unwrap_or_default();
    let blocks = [block, &turn.content].map(|text| text.matches(dsml::BLOCK_OPENER).count());
    let arguments = turn.calls.first().map(|call| call.arguments.as_str()).unwrap_or_default();
    let shown = |token| String::from_utf8_lossy(vocabulary.tokenizer().token_bytes(token)).into_owned();
    vec![
        Check {
            what: "turn 1 finishes with calls",
            passed: turn.finish == Finish::ToolCalls,
            found: finish(turn.finish).into(),
        },
        Check { what: "there is one call", passed: names.len() == 1, found: names.len().to_string() },
        Check { what: "it is of list_files", passed: names.first() == Some(&"list_files"), found: names.join(", ") },
        Check {
            what: "its path is the current directory",
            passed: is_current_directory(arguments),
            found: arguments.into(),
        },
        Check { what: "there is one block", passed: blocks == [1, 0], found: (blocks[0] + blocks[1]).to_string() },
        Check {
            what: "the turn would end behind it",
            passed: next == Some(vocabulary.control().eos),
            found: next.map_or("no closed block".into(), shown),
        },
    ]
}

/// Whether the arguments, a JSON object, name the current directory in one of the usual ways.
fn is_current_directory(arguments: &str) -> bool {
    let arguments: Value = serde_json::from_str(arguments).unwrap_or_default();
    let is_here = |path: &str| std::env::current_dir().is_ok_and(|here| here.to_str() == Some(path));
    arguments["path"].as_str().is_some_and(|path| matches!(path, "" | "." | "./") || is_here(path))
}

/// What must hold of the turn that reports, when the session held `held_tokens` before.
fn checks_of_report(outcome: &TurnOutcome, exchange: &Exchange, held_tokens: usize) -> Vec<Check> {
    let turn = &outcome.turn;
    vec![
        Check {
            what: "turn 2 reads only what is new",
            passed: exchange.kept_tokens == held_tokens,
            found: format!("{} of {held_tokens} tokens kept", exchange.kept_tokens),
        },
        Check { what: "it finishes with stop", passed: turn.finish == Finish::Stop, found: finish(turn.finish).into() },
        Check { what: "it makes no call", passed: turn.calls.is_empty(), found: turn.calls.len().to_string() },
        Check {
            what: "it says something",
            passed: !turn.content.trim().is_empty(),
            found: format!("{:?}", turn.content),
        },
    ]
}

fn finish(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
        Finish::ToolCalls => "tool_calls",
    }
}

/// Adds logits to a hash.
fn hasher(hash: Arc<Mutex<Xxh3>>) -> impl FnMut(&[f32]) {
    move |logits| {
        let mut hash = hash.lock().unwrap_or_else(PoisonError::into_inner);
        logits.iter().for_each(|logit| hash.update(&logit.to_le_bytes()));
    }
}

fn json_text(file: &ModelFile, trials: &[Trial]) -> String {
    let passed = trials.iter().all(|trial| trial.passed);
    format!("{:#}\n", json!({"model": file.name, "passed": passed, "paths": trials}))
}

/// Checks below each other, with a column for each precision.
fn table(trials: &[Trial]) -> String {
    let mut text = format!("{:<36}", "tool-call-quality");
    let mut add = |part: String| text.push_str(&part);
    trials.iter().for_each(|trial| add(format!(" {:<16}", trial.setting.precision)));
    add("\n".into());
    let longest = trials.iter().max_by_key(|trial| trial.checks.len()).expect("a precision was asked for");
    for Check { what, .. } in &longest.checks {
        add(format!("{what:<36}"));
        for trial in trials {
            let verdict = match trial.checks.iter().find(|check| check.what == *what) {
                Some(check) if check.passed => "pass",
                Some(_) => "FAIL",
                None => "-",
            };
            add(format!(" {verdict:<16}"));
        }
        add("\n".into());
    }
    add(format!("{:<36}", "hash of all logits"));
    trials.iter().for_each(|trial| add(format!(" {}", trial.logits_xxh3)));
    add("\n".into());
    for trial in trials {
        for check in trial.checks.iter().filter(|check| !check.passed) {
            let found = terminal::escape_controls(&check.found);
            add(format!("{}: {}: found {found}\n", trial.setting.precision, check.what));
        }
    }
    text.lines().fold(String::new(), |mut all, line| {
        writeln!(all, "{}", line.trim_end()).expect("writing to a string");
        all
    })
}
