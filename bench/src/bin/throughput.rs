//! Tokens a second of a model file on the CPU: prefill in one chunk, the same tokens one by one, and decode.
//!
//! `cargo run --release -p infall-bench --bin throughput -- FILE [--prefill 128] [--decode 8] [--threads N] [--exact]`
//!
//! Decode is set against a sweep that only reads memory, in the same run. Token ids are pseudo-random. Fails if any logit is not finite.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail};
use bench::PrecisionFlags;
use bench::memory::read_bytes_per_second;
use clap::Parser;
use cpu::{CpuBackend, Options};
use infall::load::ModelFile;
use model::{Backend, Cancel, Model, NoObserver, Row, State, forward};

/// Tokens a second of a model file on the CPU.
#[derive(Parser)]
struct Arguments {
    /// The model, GGUF.
    file: PathBuf,
    /// Tokens of the prefill chunk.
    #[arg(long, default_value_t = 128)]
    prefill: usize,
    /// Tokens computed one by one.
    #[arg(long, default_value_t = 8)]
    decode: usize,
    /// Fail if a token alone takes longer than this, in seconds.
    #[arg(long)]
    most_seconds: Option<f64>,
    /// Fail if a token of the chunk is not this many times as fast as one alone.
    #[arg(long)]
    least_gain: Option<f64>,
    /// Threads; all of the machine's by default.
    #[arg(long)]
    threads: Option<usize>,
    #[command(flatten)]
    precision: PrecisionFlags,
}

/// Computes `count` tokens in one pass and returns the seconds it took.
fn pass(backend: &CpuBackend, state: &mut State, count: usize, vocab: usize) -> Result<f64> {
    let token = |position: usize| (position * 7919 + 13) % (vocab - 16) + 3;
    let row = |position| Row { session: 0, position, token: token(position) as u32, logits: false };
    let mut rows: Vec<Row> = (state.position()..state.position() + count).map(row).collect();
    rows.last_mut().expect("a pass has rows").logits = true;
    let start = Instant::now();
    forward(backend, rows, &mut [state], &Cancel::default(), &mut NoObserver)?;
    Ok(start.elapsed().as_secs_f64())
}

/// Bytes of weights that one token uses: all but the embedding and the experts it does not choose.
fn token_bytes(model: &Model) -> u64 {
    let expert = model.experts.iter().flat_map(|layer| layer.extents.expert_bytes()).sum::<usize>() as u64;
    let experts = expert * model.config.experts_used as u64;
    cpu::static_bytes(model, true) + experts
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let file = ModelFile::open(Some(&arguments.file))?;
    let start = Instant::now();
    let default = Options::default();
    let (threads, precision) = (arguments.threads.unwrap_or(default.threads), arguments.precision.precision());
    let backend = &file.load_with(Options { threads, precision, ..default })?;
    let load_seconds = start.elapsed().as_secs_f64();
    let vocab = file.model.config.vocab_size;
    let weights = backend.weight_bytes();
    println!("{}; {threads} used", bench::machine());
    println!("{}: {} layers", arguments.file.display(), file.model.config.layers);
    let bytes = weights.fixed + weights.experts;
    println!(
        "loaded {:.2} GB in {:.1} s ({:.2} GB/s)",
        bytes as f64 / 1e9,
        load_seconds,
        bytes as f64 / 1e9 / load_seconds
    );

    println!("{:<28} {:>8} {:>10} {:>10}", format!("{precision:?}"), "tokens", "s/token", "tokens/s");
    let row = |what: &str, tokens: usize, seconds: f64| {
        let each = seconds / tokens as f64;
        println!("{what:<28} {tokens:>8} {each:>10.4} {:>10.2}", 1.0 / each);
        each
    };
    let mut warm = backend.new_state()?;
    pass(backend, &mut warm, 1, vocab)?;
    let mut state = backend.new_state()?;
    let chunk = pass(backend, &mut state, arguments.prefill, vocab)?;
    let chunk = row("prefill, one chunk", arguments.prefill, chunk);
    let mut seconds = 0.0;
    for _ in 0..arguments.decode {
        seconds += pass(backend, &mut state, 1, vocab)?;
    }
    let ones = row("decode, one by one", arguments.decode, seconds);
    let read = token_bytes(&file.model) as f64;
    let sweep = read_bytes_per_second(1 << 29, threads);
    println!(
        "a token alone reads {:.3} GB of weights: {:.1} GB/s, {:.2} of the {:.1} GB/s of a sweep by {threads} threads",
        read / 1e9,
        read / ones / 1e9,
        read / ones / sweep,
        sweep / 1e9
    );
    println!("a token of the chunk is {:.1} times as fast as one alone", ones / chunk);
    if let Some(most) = arguments.most_seconds.filter(|most| ones > *most) {
        bail!("a token takes {ones:.3} s, at most {most} s were wanted");
    }
    if let Some(least) = arguments.least_gain.filter(|least| ones / chunk < *least) {
        bail!("the chunk gains a factor of {:.2}, at least {least} was wanted", ones / chunk);
    }
    Ok(())
}
