//! `infall plan`: what memory a model takes, told from its header, before anything is loaded.

use std::fmt::Write as _;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use cpu::PassShape;
use gguf::Gguf;
use indicatif::HumanCount;
use model::state::StateBytes;
use model::{Arithmetic, KvLayout, Model, Precision};
use serde_json::json;
use session::Context;
use store::plan::{Purpose, SizeClass};
use store::{ExpertExtents, Needs, Plan, Residency, budget};

use crate::terminal::{self, Stream};
use crate::{Outcome, flags, load};

/// Rows of the passes that a prompt is read in. The same for every plan: memory never changes how a model computes.
const PASS_ROWS: usize = 256;

/// Code, tables, stacks of threads, buffers of files: what the program takes for any model.
const PROGRAM_BYTES: u64 = 32 << 20;

/// Runs the command.
pub fn plan(flags: &flags::Plan) -> anyhow::Result<Outcome> {
    let name = flags.model.display().to_string();
    let header = read_header(&flags.model)?;
    let model = Model::from_gguf(&header).map_err(|error| load::in_file(&name, error))?;
    let context = Context::new(&model.config, flags.context_tokens)?;
    let needs = needs(&header, &model, context.tokens(), flags.machine.threads);
    let available = budget::available();
    let plan = Plan::new(&needs, flags.placement.request(), available.as_ref())
        .map_err(|error| anyhow::anyhow!("{name}: {error}"))?;
    let text = if flags.json { json_text(&plan) } else { table(&plan) };
    Stream::Out.write(&text)?;
    plan.warnings.iter().for_each(|warning| terminal::note(&format!("warning: {warning}")));
    Ok(Outcome::Done)
}

/// The header at `path`, of a whole model or of one whose tensors are not there: only sizes are asked for.
fn read_header(path: &Path) -> Result<Gguf, gguf::Error> {
    let any_length = 1 << 62;
    Gguf::open(path).or_else(|error| {
        let Ok(file) = File::open(path) else { return Err(error) };
        Gguf::read(&path.display().to_string(), BufReader::new(file), any_length).map_err(|_| error)
    })
}

/// What a model needs to run here for a session of `context_tokens`.
fn needs(header: &Gguf, model: &Model, context_tokens: usize, threads: Option<u16>) -> Needs {
    let config = &model.config;
    // The precision that takes more.
    let layout = KvLayout::new(config, 0, Arithmetic::Official, Precision::Fast);
    let threads = threads.map_or_else(|| cpu::Options::default().threads, usize::from);
    let pass_rows = PASS_ROWS.min(context_tokens);
    let shape = PassShape { rows: pass_rows, wanted_rows: 1, end_tokens: context_tokens, threads };
    let extents: Vec<ExpertExtents> = model.experts.iter().map(|layer| layer.extents).collect();
    let [resident, streamed] = [false, true].map(|streamed| cpu::static_bytes(model, streamed));
    Needs {
        program_bytes: PROGRAM_BYTES + header_bytes(header),
        static_bytes: streamed,
        context_tokens,
        state_bytes: StateBytes::at_most(&layout, context_tokens).total() as u64,
        pass_rows,
        pass_bytes: cpu::pass_bytes(config, &layout, shape),
        resident_bytes: extents.iter().map(ExpertExtents::total_bytes).sum::<u64>() + resident - streamed,
        read_bytes: 0,
        experts: config.experts,
        experts_used: config.experts_used,
        classes: size_classes(&extents),
    }
}

/// Layers whose experts need slots of the same size.
fn size_classes(layers: &[ExpertExtents]) -> Vec<SizeClass> {
    let (class_of_layer, slot_bytes) = store::size_classes(layers);
    let layers_of = |class: usize| class_of_layer.iter().filter(|&&other| other == class).count();
    let class = |(class, &bytes): (usize, &usize)| SizeClass { slot_bytes: bytes as u64, layers: layers_of(class) };
    slot_bytes.iter().enumerate().map(class).collect()
}

/// The directory of tensors and the vocabulary, as they stand in the header and as the tokenizer holds them: each string
/// a few times, and an entry in a table.
fn header_bytes(header: &Gguf) -> u64 {
    const STRING_BYTES: u64 = 300;
    let strings = |key: &str| header.metadata.str_array(key).map_or(0, |strings| strings.len() as u64);
    let strings = strings("tokenizer.ggml.tokens") + strings("tokenizer.ggml.merges");
    (strings + header.tensors.len() as u64) * STRING_BYTES
}

fn table(plan: &Plan) -> String {
    let mut text = String::new();
    let mut line = |name: &str, bytes: u64| {
        writeln!(text, "{name:<58} {:>12} {:>18}", terminal::bytes(bytes), HumanCount(bytes).to_string())
            .expect("writing to a string");
    };
    for &(purpose, bytes) in &plan.items {
        line(&describe(purpose), bytes);
    }
    line("total", plan.total_bytes());
    let experts = match plan.residency {
        Residency::Resident => "all in memory",
        Residency::Streamed { .. } => "streamed from the file",
    };
    writeln!(text, "\nrouted experts: {experts}").expect("writing to a string");
    if let Some((bytes, source)) = &plan.limit {
        writeln!(text, "limit: {} ({source})", terminal::bytes(*bytes)).expect("writing to a string");
    }
    text
}

/// What memory is for, for people.
fn describe(purpose: Purpose) -> String {
    let count = |count: usize| HumanCount(count as u64).to_string();
    match purpose {
        Purpose::Program => "program, header and vocabulary".into(),
        Purpose::StaticWeights => "weights that every token uses".into(),
        Purpose::State { tokens } => format!("session of {} tokens", count(tokens)),
        Purpose::Pass { rows } => format!("pass of {} rows", count(rows)),
        Purpose::ResidentExperts => "routed experts and token embedding".into(),
        Purpose::Reads => "reads in flight, besides slots".into(),
        Purpose::Slots { slots, experts, slot_bytes } => {
            format!("{} slots for {} experts, {} each", count(slots), count(experts), terminal::bytes(slot_bytes))
        }
    }
}

fn json_text(plan: &Plan) -> String {
    let item = |&(purpose, bytes): &(Purpose, u64)| match purpose {
        Purpose::Program => json!({"for": "program", "bytes": bytes}),
        Purpose::StaticWeights => json!({"for": "static_weights", "bytes": bytes}),
        Purpose::State { tokens } => json!({"for": "session", "tokens": tokens, "bytes": bytes}),
        Purpose::Pass { rows } => json!({"for": "pass", "rows": rows, "bytes": bytes}),
        Purpose::ResidentExperts => json!({"for": "resident_experts", "bytes": bytes}),
        Purpose::Reads => json!({"for": "reads", "bytes": bytes}),
        Purpose::Slots { slots, experts, slot_bytes } => {
            json!({"for": "slots", "slots": slots, "experts": experts, "slot_bytes": slot_bytes, "bytes": bytes})
        }
    };
    let limit = plan.limit.as_ref().map(|(bytes, source)| json!({"bytes": bytes, "source": source}));
    let object = json!({
        "residency": if plan.residency == Residency::Resident { "resident" } else { "streamed" },
        "items": plan.items.iter().map(item).collect::<Vec<_>>(),
        "total_bytes": plan.total_bytes(),
        "limit": limit,
        "warnings": plan.warnings.iter().map(ToString::to_string).collect::<Vec<_>>(),
    });
    format!("{object:#}\n")
}
