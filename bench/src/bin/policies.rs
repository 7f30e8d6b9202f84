//! Which expert to evict: hit rates of rules of eviction on recorded or generated routes, as a Markdown table.
//!
//! `cargo run --release -p infall-bench --bin policies -- FILE` takes a file that a recorder wrote;
//! `… --bin policies -- --nano models/nano/heldout/SET.jsonl` records the built-in model on the first 100 items of a
//! held-out set, each prompt in one pass and the tokens of its answer one by one;
//! `… --bin policies -- --generate [--experts 256] [--layers 43] [--zipf 1.3] [--repeat 0.7] [--prompt 512] [--tokens 512]`
//! makes routes instead, `--out FILE` keeps them.
//!
//! A generated row takes each of its experts with probability `repeat` from the row before it, else by popularity: the
//! i-th most popular expert of a layer has weight `i^-zipf`, and which one that is differs from layer to layer. Printed
//! beside docs/spec/streaming.md §3.8: the share of a layer's experts that 512 rows of the prompt use (measured elsewhere:
//! 48.8 % of 384), and that 1024 use (60 %).

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use bench::heldout::Item;
use bench::random::Random;
use clap::Parser;
use cpu::Options;
use infall::load::ModelFile;
use model::{Backend, Cancel, Recorder, Row, forward, trace_header};
use store::plan::share_slots;
use store::replay::{Counts, Eviction, Replay};
use store::{TraceHeader, TracePass, TraceReader, TraceWriter};

/// Compares rules of eviction.
#[derive(Parser)]
struct Arguments {
    /// Recorded routes.
    file: Option<PathBuf>,
    /// Record the built-in model on a held-out set.
    #[arg(long)]
    nano: Option<PathBuf>,
    /// Make routes instead.
    #[arg(long)]
    generate: bool,
    /// Write the routes that were made.
    #[arg(long)]
    out: Option<PathBuf>,
    #[arg(long, default_value_t = 43)]
    layers: usize,
    #[arg(long, default_value_t = 256)]
    experts: usize,
    #[arg(long, default_value_t = 6)]
    used: usize,
    /// Exponent of popularity.
    #[arg(long, default_value_t = 1.3)]
    zipf: f64,
    /// Probability that an expert of the row before is used again.
    #[arg(long, default_value_t = 0.7)]
    repeat: f64,
    /// Rows of the prompt.
    #[arg(long, default_value_t = 512)]
    prompt: usize,
    /// Tokens decoded after it.
    #[arg(long, default_value_t = 512)]
    tokens: usize,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// The experts of one layer, most popular first, and what their weights sum to up to each.
struct Layer {
    order: Vec<u16>,
    sums: Vec<f64>,
    /// What the last row chose.
    last: Vec<u16>,
}

impl Layer {
    fn new(arguments: &Arguments, random: &mut Random) -> Layer {
        let mut order: Vec<u16> = (0..arguments.experts as u16).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, random.below(i + 1));
        }
        let weight = |sum: &mut f64, i: usize| {
            *sum += (i as f64).powf(-arguments.zipf);
            Some(*sum)
        };
        Layer { order, sums: (1..=arguments.experts).scan(0.0, weight).collect(), last: Vec::new() }
    }

    fn row(&mut self, arguments: &Arguments, random: &mut Random) -> Vec<u16> {
        let mut row: Vec<u16> = self.last.iter().copied().filter(|_| random.unit() < arguments.repeat).collect();
        while row.len() < arguments.used {
            let at = random.unit() * self.sums.last().expect("there are experts");
            let expert = self.order[self.sums.partition_point(|&sum| sum < at).min(self.order.len() - 1)];
            if !row.contains(&expert) {
                row.push(expert);
            }
        }
        self.last = row.clone();
        row
    }
}

fn generate(arguments: &Arguments) -> (TraceHeader, Vec<TracePass>) {
    let mut random = Random(arguments.seed);
    let mut layers: Vec<Layer> = (0..arguments.layers).map(|_| Layer::new(arguments, &mut random)).collect();
    let mut pass = |rows: usize| {
        let of_layer =
            |layer: &mut Layer| -> Vec<u16> { (0..rows).flat_map(|_| layer.row(arguments, &mut random)).collect() };
        TracePass { runs: vec![rows as u32], experts: layers.iter_mut().flat_map(of_layer).collect() }
    };
    let prompt = (arguments.prompt > 0).then(|| pass(arguments.prompt));
    let passes = prompt.into_iter().chain((0..arguments.tokens).map(|_| pass(1))).collect();
    // An expert of Flash in the published 2-bit layout.
    let expert_bytes = vec![7_077_888; arguments.layers];
    let header = TraceHeader { identity: 0, experts: arguments.experts, experts_used: arguments.used, expert_bytes };
    (header, passes)
}

/// Routes of the built-in model: each item is a session of its own.
fn record(set: &Path) -> Result<Vec<u8>> {
    let file = ModelFile::open(None)?;
    let (tokenizer, backend) = (file.tokenizer()?, file.load_with(Options::default())?);
    let mut recorder = Recorder::new(Vec::new(), trace_header(&file.model, 0))?;
    for line in std::fs::read_to_string(set)?.lines().take(100) {
        let item = Item::parse(line)?;
        let mut state = backend.new_state()?;
        let mut pass = |tokens: &[u32]| {
            let row = |(i, &token)| Row { session: 0, position: state.position() + i, token, logits: false };
            let rows = tokens.iter().enumerate().map(row).collect();
            forward(&backend, rows, &mut [&mut state], &Cancel::default(), &mut recorder).map(drop)
        };
        pass(&item.prompt(&tokenizer)?)?;
        item.answer(&tokenizer).chunks(1).try_for_each(pass)?;
    }
    Ok(recorder.finish()?)
}

fn read(trace: impl Read) -> Result<(TraceHeader, Vec<TracePass>)> {
    let reader = TraceReader::new(trace)?;
    Ok((reader.header().clone(), reader.collect::<Result<_, _>>()?))
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let (header, passes) = match (&arguments.file, &arguments.nano) {
        (Some(path), None) => read(BufReader::new(File::open(path)?))?,
        (None, Some(set)) => read(record(set)?.as_slice())?,
        (None, None) if arguments.generate => generate(&arguments),
        _ => bail!("give a file of recorded routes, or --nano SET, or --generate"),
    };
    if let Some(path) = &arguments.out {
        let mut writer = TraceWriter::new(BufWriter::new(File::create(path)?), header.clone())?;
        passes.iter().try_for_each(|pass| writer.pass(pass))?;
        writer.finish()?;
    }
    concentrations(&header, &passes);
    let replay = Replay::new(header, &passes);
    table(&replay, "decode", |replay, rule, slots, classes| replay.run(classes, slots, rule).decode);
    table(&replay, "prefill", |replay, rule, slots, classes| replay.run(classes, slots, rule).prefill);
    Ok(())
}

/// Which share of a layer's experts the first rows use, averaged over layers.
fn concentrations(header: &TraceHeader, passes: &[TracePass]) {
    for rows in [50, 512, 1024] {
        let mut used = vec![BTreeSet::new(); header.layers()];
        let mut left = rows;
        for pass in passes {
            let (all, taken) = (pass.rows(), pass.rows().min(left));
            left -= taken;
            for (used, experts) in used.iter_mut().zip(pass.experts.chunks_exact(all * header.experts_used)) {
                used.extend(experts[..taken * header.experts_used].iter().copied());
            }
        }
        let share = used.iter().map(BTreeSet::len).sum::<usize>() as f64 / (header.layers() * header.experts) as f64;
        if left == 0 {
            println!("the first {rows} rows use {:.1} % of a layer's experts", 100.0 * share);
        }
    }
}

/// Percent of hits by rule and share of slots.
fn table(replay: &Replay, kind: &str, count: impl Fn(&Replay, Eviction, &[usize], &[usize]) -> Counts) {
    let (class_of_layer, layers) = replay.size_classes();
    let (experts, all) = (replay.header().experts, replay.header().layers() * replay.header().experts);
    let shares = [2.5, 5.0, 10.0, 25.0, 50.0, 75.0];
    println!("\n| {kind}: hits, % | {} |", shares.map(|share| format!("{share} %")).join(" | "));
    println!("|---{}|", "|---".repeat(shares.len()));
    let decays = [1, 2, 4, 8, 16, 32, 64, 128, usize::MAX / 2].map(|tokens| {
        let name = if tokens > 1000 { "frequency, no decay".into() } else { format!("decay, half-life {tokens}") };
        (name, Eviction::Decay(tokens))
    });
    let mut rules = vec![("LRU".to_owned(), Eviction::LeastRecent)];
    rules.extend(decays);
    rules.push(("infall: half-life by slots".into(), Eviction::Store));
    rules.push(("optimum".into(), Eviction::Farthest));
    for (name, rule) in rules {
        let cell = |share: f64| {
            let slots = (share / 100.0 * all as f64).round() as u64;
            let found = count(replay, rule, &share_slots(&layers, experts, slots), &class_of_layer);
            format!("{:.1}", 100.0 * found.hit_rate())
        };
        println!("| {name} | {} |", shares.map(cell).join(" | "));
    }
}
