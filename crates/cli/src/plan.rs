//! `infall plan`: what memory a model takes, told from its header, before anything is loaded.

use std::fmt::Write as _;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use gguf::Gguf;
use indicatif::HumanCount;
use model::Model;
use serde_json::json;
use session::Context;
use store::plan::Purpose;
use store::{Plan, Residency, budget};

use crate::device::Device;
use crate::placement::{self, Work};
use crate::terminal::{self, Stream};
use crate::{Outcome, flags, load};

/// Runs the command.
pub fn plan<D: Device>(flags: &flags::Plan) -> anyhow::Result<Outcome> {
    let name = flags.model.display().to_string();
    let header = read_header(&flags.model)?;
    let model = Model::from_gguf(&header).map_err(|error| load::in_file(&name, error))?;
    let context = Context::new(&model.config, flags.context_tokens)?;
    let work = Work::new::<D>(&flags.machine, context.tokens());
    let plan = Plan::new(&placement::needs::<D>(&header, &model, &work), work.request, budget::available().as_ref())
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
    let count = |count: usize| HumanCount(count as u64);
    let counted = |number: usize, what: &str| format!("{} {what}{}", count(number), if number == 1 { "" } else { "s" });
    match purpose {
        Purpose::Program => "program, header and vocabulary".into(),
        Purpose::StaticWeights => "weights that every token uses".into(),
        Purpose::State { tokens } => format!("session of {}", counted(tokens, "token")),
        Purpose::Pass { rows } => format!("pass of {}", counted(rows, "row")),
        Purpose::ResidentExperts => "routed experts and token embedding".into(),
        Purpose::Slots { slots, experts, slot_bytes } => {
            format!(
                "{} for {}, {} each",
                counted(slots, "slot"),
                counted(experts, "expert"),
                terminal::bytes(slot_bytes)
            )
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
