//! `infall devices`: the adapters of this machine, and whether models can run on them.

use std::fmt::Write as _;

use gpu::{AdapterReport, Choice, DeviceMemory, Measured};
use serde_json::{Value, json};

use crate::device;
use crate::terminal::{self, Stream};
use crate::{Outcome, flags};

/// Runs the command.
pub fn devices(flags: &flags::Devices) -> anyhow::Result<Outcome> {
    let reports = gpu::adapters();
    let automatic = gpu::best(&reports);
    let all: Vec<Found> = reports.into_iter().map(|report| Found::new(report, flags.measure)).collect();
    let text = match flags.json {
        true => {
            format!("{:#}\n", json!({"devices": all.iter().map(Found::json).collect::<Vec<_>>(), "best": automatic}))
        }
        false => text(&all, automatic),
    };
    Stream::Out.write(&text)?;
    Ok(Outcome::Done)
}

/// An adapter and, if it was asked for, how fast it is, or why that is not known.
struct Found {
    report: AdapterReport,
    measured: Option<Result<Measured, String>>,
}

impl Found {
    fn new(report: AdapterReport, measures: bool) -> Found {
        let can_be_used = report.lacks.is_empty();
        let measured = (measures && can_be_used)
            .then(|| gpu::measure(Choice::Index(report.index)).map_err(|error| error.to_string()));
        Found { report, measured }
    }

    fn json(&self) -> Value {
        let AdapterReport { index, name, kind, api, driver, memory, .. } = &self.report;
        let r = &self.report;
        let mut object = json!({
            "device": format!("gpu:{index}"),
            "name": name,
            "kind": kind,
            "api": api,
            "driver": driver,
            "total_bytes": memory.map(|memory| memory.total_bytes),
            "free_bytes": memory.and_then(|memory| memory.free_bytes),
            "unified": r.is_unified(),
            "buffer_bytes": r.buffer_bytes,
            "binding_bytes": r.binding_bytes,
            "workgroup_bytes": r.workgroup_bytes,
            "subgroup": r.subgroup,
            "f16": r.f16,
            "cooperative_tile": r.cooperative_tile,
            "timestamps": r.timestamps,
            "lacks": r.lacks,
        });
        match &self.measured {
            Some(Ok(Measured { read_bytes_per_second, upload_bytes_per_second })) => {
                object["read_bytes_per_second"] = json!(read_bytes_per_second.round());
                object["upload_bytes_per_second"] = json!(upload_bytes_per_second.round());
            }
            Some(Err(error)) => object["measuring_failed"] = json!(error),
            None => (),
        }
        object
    }
}

fn text(all: &[Found], automatic: Option<usize>) -> String {
    let mut text: String = all.iter().map(|found| adapter(found) + "\n").collect();
    if all.is_empty() {
        text += "no GPU was found: no driver of Vulkan, Metal or D3D12 shows one\n";
    }
    let choice = automatic.map_or("the cpu".into(), |index| format!("gpu:{index}, for models that it can hold"));
    text + &format!("--device auto takes {choice}\n")
}

/// A few lines about one.
fn adapter(found: &Found) -> String {
    let r = &found.report;
    let mut text = format!("gpu:{}  {}\n", r.index, terminal::escape_controls(&r.name));
    let mut line = |name: &str, what: String| {
        writeln!(text, "  {name:<22}{what}").expect("writing to a string");
    };
    let yes = |is: bool| if is { "yes" } else { "no" }.to_owned();
    line("kind", kind(r));
    line("interface", format!("{}, driver {}", device::api_name(&r.api), terminal::escape_controls(&r.driver)));
    line("memory", memory(r));
    line("largest binding", format!("{} (of a buffer of {})", bytes(r.binding_bytes), bytes(r.buffer_bytes)));
    line("workgroup memory", bytes(r.workgroup_bytes.into()));
    line(
        "threads in step",
        match r.subgroup {
            [fewest, most] if fewest == most => most.to_string(),
            [fewest, most] => format!("{fewest} to {most}"),
        },
    );
    line("halves", yes(r.f16));
    line("cooperative matrices", r.cooperative_tile.map_or("no".into(), |edge| format!("{edge} x {edge} x {edge}")));
    line("timestamps", yes(r.timestamps));
    line(
        "can be used",
        match r.lacks.is_empty() {
            true => "yes".into(),
            false => format!("no: it lacks {}", r.lacks.join(", ")),
        },
    );
    match &found.measured {
        Some(Ok(measured)) => {
            line("reads its memory at", format!("{:.1} GB/s", measured.read_bytes_per_second / 1e9));
            line("is filled at", format!("{:.1} GB/s", measured.upload_bytes_per_second / 1e9));
        }
        Some(Err(error)) => line("measuring failed", terminal::escape_controls(error)),
        None => (),
    }
    text
}

fn bytes(bytes: u64) -> String {
    terminal::bytes(bytes)
}

fn kind(report: &AdapterReport) -> String {
    match report.kind {
        "software" => "software: slow, and used only by its number".into(),
        kind => kind.into(),
    }
}

fn memory(report: &AdapterReport) -> String {
    let host = if report.is_unified() { ", the host's" } else { "" };
    match report.memory {
        None => format!("its driver does not say{host}"),
        Some(DeviceMemory { total_bytes, free_bytes: None }) => format!("{}{host}", bytes(total_bytes)),
        Some(DeviceMemory { total_bytes, free_bytes: Some(free) }) => {
            format!("{}, {} free{host}", bytes(total_bytes), bytes(free))
        }
    }
}
