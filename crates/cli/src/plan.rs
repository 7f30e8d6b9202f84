//! `infall plan`: what memory a model takes, told from its header, before anything is loaded.

use std::fmt::Write as _;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use gguf::Gguf;
use indicatif::HumanCount;
use model::Model;
use serde_json::{Value, json};
use session::Context;
use store::plan::Purpose;
use store::{Plan, Residency};

use crate::device::{self, Device, on_device};
use crate::placement::{Memory, Plans, Slots, Work};
use crate::terminal::{self, Stream};
use crate::{Outcome, flags, load};

/// Runs the command.
pub fn plan(flags: &flags::Plan) -> anyhow::Result<Outcome> {
    let name = flags.model.display().to_string();
    let header = read_header(&flags.model)?;
    let model = Model::from_gguf(&header).map_err(|error| load::in_file(&name, error))?;
    let context = Context::new(&model.config, flags.context_tokens)?;
    let work = Work::new(&flags.machine, context.tokens());
    let (chosen, why) = device::choose(&header, &model, false, &work)?;
    let plans = on_device!(chosen, |on: D| D::plan(&on, &header, &model, &work))
        .map_err(|error| anyhow::anyhow!("{name}: {error:#}"))?;
    if !flags.json {
        why.iter().for_each(|why| terminal::dim_note(why));
    }
    let text = if flags.json { format!("{:#}\n", json_object(&plans)) } else { text(&plans) };
    Stream::Out.write(&text)?;
    plans.warnings().for_each(|warning| terminal::note(&format!("warning: {warning}")));
    Ok(Outcome::Done)
}

/// The header at `path`, of a whole model or of one whose tensors are not there: only sizes are asked for.
pub(crate) fn read_header(path: &Path) -> Result<Gguf, gguf::Error> {
    let any_length = 1 << 62;
    Gguf::open(path).or_else(|error| {
        let Ok(file) = File::open(path) else { return Err(error) };
        Gguf::read(&path.display().to_string(), BufReader::new(file), any_length).map_err(|_| error)
    })
}

/// A table for each memory, and where experts are.
fn text(plans: &Plans) -> String {
    let mut text = String::new();
    for Memory { name, plan } in &plans.memories {
        let title = name.as_ref().map_or(String::new(), |name| format!("memory of {name}\n"));
        text += &format!("{title}{}\n", table(plan, name.is_some()));
    }
    let experts = match (&plans.tier, plans.are_resident()) {
        (_, true) => "all in memory".into(),
        (None, false) => "streamed from the file".into(),
        (Some(tier), false) => {
            let Slots { slots, of_experts, bytes } = tier.slots;
            let of = if slots == of_experts { "all".into() } else { format!("{slots} of {of_experts}") };
            let file = if plans.read_the_file() { ", which is filled from the file" } else { "" };
            format!("streamed from host memory with {of} of them ({}){file}", terminal::bytes(bytes))
        }
    };
    let limits =
        plans.memories.iter().filter_map(|memory| memory.plan.limit.as_ref().map(|limit| (&memory.name, limit)));
    let limit = |(name, (bytes, source)): (&Option<String>, &(u64, String))| {
        let of = name.as_ref().map_or(String::new(), |name| format!(" of {name}"));
        format!("limit{of}: {} ({source})\n", terminal::bytes(*bytes))
    };
    text + &format!("routed experts: {experts}\n") + &limits.map(limit).collect::<String>()
}

/// What lies in a memory, with the total. What takes nothing is left out.
fn table(plan: &Plan, is_of_many: bool) -> String {
    let mut text = String::new();
    let mut line = |name: &str, bytes: u64| {
        writeln!(text, "{name:<58} {:>12} {:>18}", terminal::bytes(bytes), HumanCount(bytes).to_string())
            .expect("writing to a string");
    };
    for &(purpose, bytes) in plan.items.iter().filter(|(_, bytes)| *bytes > 0) {
        line(&describe(purpose, is_of_many), bytes);
    }
    line("total", plan.total_bytes());
    text
}

/// What memory is for, for people.
fn describe(purpose: Purpose, is_of_many: bool) -> String {
    let count = |count: usize| HumanCount(count as u64);
    let counted = |number: usize, what: &str| format!("{} {what}{}", count(number), if number == 1 { "" } else { "s" });
    match purpose {
        Purpose::Program if is_of_many => "program, driver, and what is on its way to the device".into(),
        Purpose::Program => "program, header and vocabulary".into(),
        Purpose::StaticWeights => "weights that every token uses".into(),
        Purpose::State { tokens } => format!("session of {}", counted(tokens, "token")),
        Purpose::Pass { rows } => format!("pass of {}", counted(rows, "row")),
        Purpose::ResidentExperts if is_of_many => "routed experts".into(),
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

/// The plan of the memory that kernels read; a GPU's with its name, the tier that its slots are filled from, and the plan of
/// host memory where that is another.
fn json_object(plans: &Plans) -> Value {
    let mut object = memory_object(&plans.memories[0].plan);
    object["warnings"] = plans.warnings().collect();
    if let Some(name) = &plans.memories[0].name {
        object["device"] = json!(name);
        object["host_tier"] = json!(plans.tier.as_ref().map(|tier| tier.slots));
        object["host"] = plans.memories.get(1).map_or(Value::Null, |memory| memory_object(&memory.plan));
    }
    object
}

fn memory_object(plan: &Plan) -> Value {
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
    json!({
        "residency": if plan.residency == Residency::Resident { "resident" } else { "streamed" },
        "items": plan.items.iter().map(item).collect::<Vec<_>>(),
        "total_bytes": plan.total_bytes(),
        "limit": limit,
    })
}
