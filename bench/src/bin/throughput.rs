//! Tokens a second of a model file on the CPU: prefill, more tokens one by one, and decode.
//!
//! `cargo run --release -p infall-bench --bin throughput -- FILE [--prefill 128,512] [--decode 8] [--threads N] [--exact] [--profile]`
//!
//! Decode is set against sweeps that only read memory, in the same run. Token ids are pseudo-random. Fails if any logit is not finite.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail};
use bench::PrecisionFlags;
use bench::memory::{read_bytes_per_second, sweep_bytes_per_second};
use bench::profile::Profile;
use clap::Parser;
use cpu::{CpuBackend, Options};
use infall::load::ModelFile;
use infall::placement::token_weight_bytes;
use model::{Backend, Cancel, Row, State, forward};

/// Tokens a second of a model file on the CPU.
#[derive(Parser)]
struct Arguments {
    /// The model, GGUF.
    file: PathBuf,
    /// Tokens of each prefill; in passes of as many rows as the program makes.
    #[arg(long, default_value = "128", value_delimiter = ',')]
    prefill: Vec<usize>,
    /// Tokens computed one by one.
    #[arg(long, default_value_t = 8)]
    decode: usize,
    /// Fail if a token alone takes longer than this, in seconds.
    #[arg(long)]
    most_seconds: Option<f64>,
    /// Fail if a token of the chunk is not this many times as fast as one alone.
    #[arg(long)]
    least_gain: Option<f64>,
    /// Print how each figure's time is shared by the stages.
    #[arg(long)]
    profile: bool,
    /// Threads; all of the machine's by default.
    #[arg(long)]
    threads: Option<usize>,
    #[command(flatten)]
    precision: PrecisionFlags,
}

/// Bytes of a sweep of memory.
const SWEEP_BYTES: usize = 512 << 20;

/// Computes `count` tokens in one pass and returns the seconds it took.
fn pass(backend: &CpuBackend, state: &mut State, count: usize, vocab: usize, profile: &mut Profile) -> Result<f64> {
    let token = |position: usize| (position * 7919 + 13) % (vocab - 16) + 3;
    let row = |position| Row { session: 0, position, token: token(position) as u32, logits: false };
    let mut rows: Vec<Row> = (state.position()..state.position() + count).map(row).collect();
    rows.last_mut().expect("a pass has rows").logits = true;
    let start = Instant::now();
    profile.begin_pass();
    forward(backend, rows, &mut [state], &Cancel::default(), profile)?;
    Ok(start.elapsed().as_secs_f64())
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
    let print_stages = |profile: &Profile| {
        if arguments.profile {
            print!("{profile}")
        }
    };
    pass(backend, &mut backend.new_state()?, 8, vocab, &mut Profile::default())?;
    let mut chunk = f64::INFINITY;
    let mut state = backend.new_state()?;
    for &tokens in &arguments.prefill {
        let mut profile = Profile::default();
        state = backend.new_state()?;
        let mut seconds = 0.0;
        while state.position() < tokens {
            let rows = CpuBackend::PASS_ROWS.min(tokens - state.position());
            seconds += pass(backend, &mut state, rows, vocab, &mut profile)?;
        }
        chunk = row("prefill", tokens, seconds);
        print_stages(&profile);
    }
    let (mut seconds, mut profile) = (0.0, Profile::default());
    for _ in 0..arguments.decode {
        seconds += pass(backend, &mut state, 1, vocab, &mut profile)?;
    }
    let ones = row("decode, one by one", arguments.decode, seconds);
    print_stages(&profile);
    let read = token_weight_bytes(&file.model) as f64;
    println!("a token alone reads {:.3} GB of weights: {:.1} GB/s", read / 1e9, read / ones / 1e9);
    let ordinary: Vec<u64> = (0..SWEEP_BYTES as u64 / 8).collect();
    let sweeps = [
        ("memory as weights have it", read_bytes_per_second(SWEEP_BYTES, threads)?),
        ("memory of ordinary pages", sweep_bytes_per_second(&ordinary, threads)),
    ];
    for (memory, sweep) in sweeps {
        let share = read / ones / sweep;
        println!("  {share:.2} of the {:.1} GB/s at which {threads} threads sweep {memory}", sweep / 1e9);
    }
    println!("a token of the last chunk is {:.1} times as fast as one alone", ones / chunk);
    if let Some(most) = arguments.most_seconds.filter(|most| ones > *most) {
        bail!("a token takes {ones:.3} s, at most {most} s were wanted");
    }
    if let Some(least) = arguments.least_gain.filter(|least| ones / chunk < *least) {
        bail!("the chunk gains a factor of {:.2}, at least {least} was wanted", ones / chunk);
    }
    Ok(())
}
