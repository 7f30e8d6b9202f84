//! Tokens a second of a model file on the CPU: prefill in one chunk, the same tokens one by one, and decode.
//!
//! `cargo run --release -p infall-bench --bin throughput -- FILE [--prefill 128] [--decode 8] [--threads N]`
//!
//! Token ids are pseudo-random. Fails if any logit is not finite.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use cpu::{CpuBackend, Options};
use model::{Backend, Cancel, NoObserver, Row, State, forward};

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
    /// Threads; all of the machine's by default.
    #[arg(long)]
    threads: Option<usize>,
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

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let defaults = Options::default();
    let options = Options { threads: arguments.threads.unwrap_or(defaults.threads), ..defaults };
    let loaded = bench::load(&arguments.file, options)?;
    let (backend, vocab) = (&loaded.backend, loaded.model.config.vocab_size);
    let weights = backend.weight_bytes();
    println!("{}; {} used, {:?}", bench::machine(), options.threads, options.level);
    println!("{}: {} layers", arguments.file.display(), loaded.model.config.layers);
    let bytes = weights.fixed + weights.experts;
    println!(
        "loaded {:.2} GB in {:.1} s ({:.2} GB/s)",
        bytes as f64 / 1e9,
        loaded.load_seconds,
        bytes as f64 / 1e9 / loaded.load_seconds
    );

    println!("{:<28} {:>8} {:>10} {:>10}", "exact", "tokens", "s/token", "tokens/s");
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
    println!("a token of the chunk takes {:.2} of the time of one alone", chunk / ones);
    Ok(())
}
