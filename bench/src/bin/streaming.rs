//! How near streamed decoding comes to what processor and disk allow.
//!
//! 1. `streaming stages FILE --out STAGES.json [--exact]`, where everything fits in memory: what each stage takes.
//! 2. `streaming decode FILE --stages STAGES.json --memory 6GiB [--exact] [--routes ROUTES]`, with as little memory as one
//!    likes: decodes, and prints the bound of bench/src/bound.rs term by term, from those stages, the experts that each
//!    token found missing, and the rate at which the same reader brings experts when nothing else runs.
//!
//! Token ids are log-uniform, which is near Zipf's law. Routes that were generated (`policies --generate --layers L --prompt 0
//! --out ROUTES`) or recorded replace what the learned routers choose. `tools/stream_bench.py` runs all of it under a limit of memory.
//!
//! Where ROUTES replace what routers choose, what lookahead guesses is made up as well, right as often as was measured
//! (bench/src/simulated_router.rs).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bench::bound::{Bound, LayerReads, LayerTimes, StageClock, TokenTimes, median};
use bench::disk::{Memory, bytes_per_second};
use bench::simulated_router::SimulatedRouter;
use clap::{Args, Parser};
use cpu::{CpuBackend, Pass};
use infall::Machine;
use infall::device::Processor;
use infall::load::ModelFile;
use infall::placement::{Setting, Work};
use model::tensors::Routing;
use model::{Backend, Cancel, Error, Model, Observer, Row, Stage, forward};
use serde_json::json;
use store::StoreCounts;

/// How near streamed decoding comes to what processor and disk allow.
#[derive(Parser)]
enum Command {
    /// Measure stages with all experts in memory
    Stages {
        #[command(flatten)]
        what: What,
        /// Where to write them
        #[arg(long)]
        out: PathBuf,
    },
    /// Decode with streamed experts, and compare with the bound
    Decode {
        #[command(flatten)]
        what: What,
        /// What `stages` wrote
        #[arg(long)]
        stages: PathBuf,
        /// Let learned routers choose what stands in these routes, pass by pass
        #[arg(long)]
        routes: Option<PathBuf>,
        /// Write the figures as JSON
        #[arg(long)]
        json: Option<PathBuf>,
    },
}

#[derive(Args)]
struct What {
    /// The model, GGUF
    file: PathBuf,
    /// Tokens that fill the slots before anything is measured
    #[arg(long, default_value_t = 40)]
    warm: usize,
    /// Tokens that are measured
    #[arg(long, default_value_t = 40)]
    tokens: usize,
    #[command(flatten)]
    machine: Machine,
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Stages { what, out } => stages(&what, &out),
        Command::Decode { what, stages, routes, json } => decode(&what, &stages, routes.as_deref(), json.as_deref()),
    }
}

fn stages(what: &What, out: &Path) -> Result<()> {
    let (file, backend, setting) = load(what)?;
    ensure!(setting.slots.is_none(), "the experts do not fit in memory: run this where they do");
    let tokens = run(what, &backend)?;
    let times: Vec<TokenTimes> = tokens.into_iter().map(|token| token.times).collect();
    let times = TokenTimes::medians(&times);
    std::fs::write(out, serde_json::to_string_pretty(&times)?)?;
    let all = Bound::new(&times, &reads(&file.model, &vec![0.0; times.layers.len()]), 1.0).total_us();
    println!("everything in memory: {:.1} ms a token, {:.2} tokens/s", all / 1e3, 1e6 / all);
    Ok(())
}

/// The model as the program would load it for a session of the tokens to be run.
fn load(what: &What) -> Result<(ModelFile, CpuBackend, Setting)> {
    let file = ModelFile::open(Some(&what.file))?;
    let work = Work::new(&what.machine, what.warm + what.tokens);
    let (backend, setting) = file.load(&work, &Processor, &Arc::default())?;
    println!("{}; {}", bench::machine(), setting.line());
    Ok((file, backend, setting))
}

/// One decoded token.
struct Token {
    times: TokenTimes,
    total_us: f64,
    counts: StoreCounts,
    /// Experts of each layer that had to be read for this token, whether they were asked for ahead of time or not.
    missed: Vec<f64>,
}

/// The clock of the stages, and a look at the store's counts after each layer.
struct Watch {
    clock: StageClock,
    before: StoreCounts,
    missed: Vec<f64>,
}

impl Observer<CpuBackend> for Watch {
    fn after(&mut self, layer: Option<usize>, stage: Stage, backend: &CpuBackend, pass: &Pass) -> Result<(), Error> {
        self.clock.after(layer, stage, backend, pass)?;
        if stage == Stage::RoutedExperts {
            let now = backend.stats();
            let counts = now.since(&self.before).cache;
            self.missed.push((counts.misses + counts.prefetch_hits) as f64);
            self.before = now;
        }
        Ok(())
    }
}

/// Runs all tokens, one by one, and returns the measured ones.
fn run(what: &What, backend: &CpuBackend) -> Result<Vec<Token>> {
    let config = backend.config();
    let mut state = backend.new_state()?;
    let mut tokens = Vec::new();
    for position in 0..what.warm + what.tokens {
        let row = Row { session: 0, position, token: token(position, config.vocab_size), logits: true };
        let before = backend.stats();
        let mut watch = Watch { clock: StageClock::begin(config.layers), before, missed: Vec::new() };
        let start = Instant::now();
        forward(backend, vec![row], &mut [&mut state], &Cancel::default(), &mut watch)?;
        let total_us = start.elapsed().as_secs_f64() * 1e6;
        let counts = backend.stats().since(&before);
        tokens.push(Token { times: watch.clock.end(), total_us, counts, missed: watch.missed });
    }
    Ok(tokens.split_off(what.warm))
}

/// Log-uniform, from a multiplicative hash of the position.
fn token(position: usize, vocab_size: usize) -> u32 {
    let hash = (position as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11;
    (vocab_size as f64).powf(hash as f64 / (1u64 << 53) as f64) as u32
}

/// What each layer reads, by the number of its experts that are missing.
fn reads(model: &Model, missing: &[f64]) -> Vec<LayerReads> {
    let layers = model.experts.iter().zip(&model.tensors.layers).zip(missing);
    let reads =
        |((experts, layer), &missing): ((&model::tensors::Experts, &model::tensors::Layer<_>), &f64)| LayerReads {
            used: model.config.experts_used,
            missing,
            expert_bytes: experts.extents.expert_bytes().iter().sum::<usize>() as f64,
            is_hashed: matches!(layer.moe.routing, Routing::Hash(_)),
        };
    layers.map(reads).collect()
}

fn decode(what: &What, stages: &Path, routes: Option<&Path>, json: Option<&Path>) -> Result<()> {
    let times: TokenTimes = serde_json::from_slice(&std::fs::read(stages)?)?;
    let (file, backend, setting) = load(what)?;
    let (model, config) = (&file.model, &file.model.config);
    ensure!(times.layers.len() == config.layers, "{} is of another model", stages.display());
    ensure!(
        setting.slots.is_some(),
        "everything fits in memory: nothing would be read. Ask for --stream or less memory"
    );
    let disk_bytes_per_us = expert_bytes_per_second(&file, &backend)? / 1e6;
    let backend = match routes {
        None => backend,
        Some(path) => backend.with_routes(Box::new(SimulatedRouter::read(std::fs::File::open(path)?, config)?)),
    };
    let tokens = run(what, &backend)?;
    let in_the_run = TokenTimes::medians(&tokens.iter().map(|token| token.times.clone()).collect::<Vec<_>>());
    let bound = |token: &Token| Bound::new(&times, &reads(model, &token.missed), disk_bytes_per_us);
    let bounds: Vec<Bound> = tokens.iter().map(bound).collect();
    print_terms(&times, &in_the_run, &Bound::mean(&bounds));
    report(&tokens, &Bound::mean(&bounds), disk_bytes_per_us, &setting, json)
}

/// The rate at which experts come when nothing else runs, with as many reads under way as suit the disk best.
fn expert_bytes_per_second(file: &ModelFile, backend: &CpuBackend) -> Result<f64> {
    let experts = file
        .model
        .experts
        .iter()
        .flat_map(|layer| (0..layer.extents.experts as u32).map(move |expert| (layer, expert)));
    let extents: Vec<_> = experts.flat_map(|(layer, expert)| layer.extents.reads(expert)).collect();
    let rate = |under_way| {
        bytes_per_second(backend.reader().clone(), extents.clone(), under_way, Memory::Touched, Duration::from_secs(1))
    };
    [1, 3, 6].into_iter().map(rate).try_fold(0.0, |best: f64, rate| Ok(best.max(rate?)))
}

/// Where a token's time goes: by the bound, and what the same stages took in memory and in this run.
fn print_terms(resident: &TokenTimes, streamed: &TokenTimes, bound: &Bound) {
    let sum = |times: &TokenTimes, part: fn(&LayerTimes) -> f64| times.layers.iter().map(part).sum::<f64>() / 1e3;
    let row = |name: &str, bound_us: f64, part: &dyn Fn(&TokenTimes) -> f64| {
        println!("| {name} | {:.1} | {:.1} | {:.1} |", bound_us / 1e3, part(resident), part(streamed));
    };
    println!("\n| ms a token | bound | in memory | in this run |\n|---|---|---|---|");
    row("embedding and attention", bound.attention_us, &|t| t.embed_us / 1e3 + sum(t, |l| l.attention_us));
    row("router", bound.router_us, &|t| sum(t, |l| l.router_us));
    row("shared and present experts", bound.present_us, &|t| sum(t, |l| l.shared_us));
    row("waiting for the disk", bound.disk_us, &|_| 0.0);
    row("experts that were read (all routed ones at the right)", bound.missing_us, &|t| sum(t, |l| l.experts_us));
    row("head", bound.head_us, &|t| t.head_us / 1e3);
}

fn report(
    tokens: &[Token],
    bound: &Bound,
    disk_bytes_per_us: f64,
    setting: &Setting,
    json: Option<&Path>,
) -> Result<()> {
    let count = tokens.len() as f64;
    let mut counts = StoreCounts::default();
    tokens.iter().for_each(|token| counts.add(&token.counts));
    let measured_us = tokens.iter().map(|token| token.total_us).sum::<f64>() / count;
    let (median_us, cache) = (median(tokens.iter().map(|token| token.total_us)), counts.cache);
    println!("\n| a token | |\n|---|---|");
    println!("| bound | {:.1} ms, {:.2} tokens/s |", bound.total_us() / 1e3, 1e6 / bound.total_us());
    println!("| measured, mean | {:.1} ms, {:.2} tokens/s |", measured_us / 1e3, 1e6 / measured_us);
    println!("| measured, median | {:.1} ms |", median_us / 1e3);
    println!("| **share of the bound** | **{:.3}** |", bound.total_us() / measured_us);
    println!(
        "| hits / misses / read ahead | {:.1} / {:.1} / {:.1} |",
        cache.hits as f64 / count,
        cache.misses as f64 / count,
        cache.prefetched as f64 / count
    );
    println!("| read | {:.1} MB |", counts.read_bytes as f64 / count / 1e6);
    println!("| stall | {:.1} ms |", counts.stall_us as f64 / count / 1e3);
    println!("\nthe disk brings experts at {:.2} GB/s when nothing else runs", disk_bytes_per_us / 1e3);
    let Some(json) = json else { return Ok(()) };
    let figures = json!({
        "setting": setting, "tokens": tokens.len(), "bound": bound, "bound_us": bound.total_us(),
        "measured_us": measured_us, "median_us": median_us, "disk_bytes_per_us": disk_bytes_per_us,
        "hits": cache.hits, "misses": cache.misses, "prefetched": cache.prefetched,
        "read_bytes": counts.read_bytes, "stall_us": counts.stall_us,
    });
    std::fs::write(json, format!("{figures:#}\n")).with_context(|| json.display().to_string())
}
