//! `infall routes replay`: how often experts would have been in memory.

use std::fmt::Write as _;
use std::fs::File;
use std::io::BufReader;

use serde_json::{Value, json};
use store::plan::share_slots;
use store::replay::{Counts, Eviction, Outcome, Replay};
use store::{TracePass, TraceReader};

use crate::output::Output;
use crate::plot::{self, Axis, Panel};
use crate::terminal::{self, Stream};
use crate::{Outcome as Ended, flags};

/// Shares of all experts that have a slot, in percent.
const SHARES: [f64; 7] = [2.5, 5.0, 10.0, 25.0, 50.0, 75.0, 100.0];

/// Rules of eviction, and what they are called.
const RULES: [(&str, Eviction); 3] =
    [("LRU", Eviction::LeastRecent), ("infall", Eviction::Store), ("optimum", Eviction::Farthest)];

/// One share and what each rule gave.
struct Line {
    percent: f64,
    slots: usize,
    outcomes: [Outcome; RULES.len()],
}

/// Runs the command.
pub fn replay(flags: &flags::Replay) -> anyhow::Result<Ended> {
    let name = flags.file.display();
    let replay = read(flags).map_err(|error| anyhow::anyhow!("{name}: {error}"))?;
    let lines: Vec<Line> = SHARES.iter().map(|&percent| line(&replay, percent)).collect();
    if let Some(path) = &flags.svg {
        let plot = plot(&lines);
        Output::new(path, [flags.file.as_path()])?.write(|out| Ok(out.write_all(plot.as_bytes())?))?;
    }
    Stream::Out.write(&if flags.json { json_text(&replay, &lines) } else { tables(&replay, &lines) })?;
    Ok(Ended::Done)
}

fn read(flags: &flags::Replay) -> Result<Replay, store::TraceError> {
    let reader = TraceReader::new(BufReader::new(File::open(&flags.file)?))?;
    let header = reader.header().clone();
    let passes: Vec<TracePass> = reader.collect::<Result<_, _>>()?;
    Ok(Replay::new(header, &passes))
}

fn line(replay: &Replay, percent: f64) -> Line {
    let (class_of_layer, layers) = replay.size_classes();
    let experts = replay.header().experts;
    let wanted = (percent / 100.0 * (replay.header().layers() * experts) as f64).round() as u64;
    let slots = share_slots(&layers, experts, wanted);
    let run = |(_, eviction): (&str, Eviction)| replay.run(&class_of_layer, &slots, eviction);
    Line { percent, slots: slots.iter().sum(), outcomes: RULES.map(run) }
}

/// One kind of pass: what it is called, and its part of an outcome.
type Kind = (&'static str, fn(&Outcome) -> Counts);

/// Decoded tokens, and parts of prompts.
const KINDS: [Kind; 2] = [("decode", |outcome| outcome.decode), ("prefill", |outcome| outcome.prefill)];

/// A table for each kind of pass that the trace has.
fn tables(replay: &Replay, lines: &[Line]) -> String {
    let header = replay.header();
    let mut text = format!("{} layers of {} experts, {} used\n", header.layers(), header.experts, header.experts_used);
    for (kind, counts) in KINDS {
        let rows = counts(&lines[0].outcomes[0]).rows;
        if rows == 0 {
            continue;
        }
        write!(
            text,
            "\n{kind}, {rows} tokens: experts found in a slot, and bytes read for a token\n{:>7} {:>7}",
            "share", "slots"
        )
        .expect("writing to a string");
        RULES.iter().for_each(|(rule, _)| write!(text, " {rule:>21}").expect("writing to a string"));
        text.push('\n');
        for line in lines {
            write!(text, "{:>6}% {:>7}", line.percent, line.slots).expect("writing to a string");
            for outcome in &line.outcomes {
                let counts = counts(outcome);
                let bytes = terminal::bytes(counts.bytes_per_token() as u64);
                write!(text, " {:>7.2}% {bytes:>12}", 100.0 * counts.hit_rate()).expect("writing to a string");
            }
            text.push('\n');
        }
    }
    text
}

fn json_text(replay: &Replay, lines: &[Line]) -> String {
    let counts = |counts: Counts| json!({"tokens": counts.rows, "wanted": counts.wanted, "hits": counts.hits, "read_bytes": counts.read_bytes});
    let rule = |((name, _), outcome): (&(&str, Eviction), &Outcome)| {
        (name.to_lowercase(), json!({"decode": counts(outcome.decode), "prefill": counts(outcome.prefill)}))
    };
    let line = |line: &Line| {
        let mut object: serde_json::Map<String, Value> = RULES.iter().zip(&line.outcomes).map(rule).collect();
        object.insert("percent".into(), json!(line.percent));
        object.insert("slots".into(), json!(line.slots));
        Value::Object(object)
    };
    let header = replay.header();
    let object = json!({
        "layers": header.layers(),
        "experts": header.experts,
        "experts_used": header.experts_used,
        "shares": lines.iter().map(line).collect::<Vec<_>>(),
    });
    format!("{object:#}\n")
}

/// Hit rates over the share of slots, a line for each rule: of decoded tokens, or of prompts where there are none.
fn plot(lines: &[Line]) -> String {
    let (kind, counts) = KINDS[usize::from(lines[0].outcomes[0].decode.rows == 0)];
    let label = |(i, share): (usize, &f64)| (i as f64, format!("{share}%"));
    let hits = |(rule, &(name, _)): (usize, &(&str, Eviction))| {
        let rate = |(i, line): (usize, &Line)| (i as f64, 100.0 * counts(&line.outcomes[rule]).hit_rate());
        plot::Line { name: name.into(), points: lines.iter().enumerate().map(rate).collect() }
    };
    plot::svg(&[Panel {
        title: format!("{kind}: experts found in a slot, %"),
        x_title: "share of experts that have a slot".into(),
        x: Axis::with_labels(SHARES.iter().enumerate().map(label).collect()),
        y: Axis::from_zero(100.0),
        lines: RULES.iter().enumerate().map(hits).collect(),
    }])
}
