//! What decoding several sessions in one pass gains: tokens a second of all together, and what is read for them.
//!
//! `cargo run --release -p infall-bench --bin streams -- FILE [--streams 1,2,4,8] [--tokens 24] [--apart] [--routes ROUTES] [--memory 6GiB …]`
//!
//! Each session has read a prompt of its own and goes on with its likeliest tokens. The experts that one pass's rows chose are leased
//! once for all of them: the table shows how many that were (0 where everything is resident), and how many had to be read.
//! Routes that were generated (`policies --generate --layers L --prompt 0 --out ROUTES`) replace what the learned routers of random weights choose, which is too even;
//! every session is then at another position of theirs (`--device cpu` only). On a GPU what is read is what is copied to it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use bench::simulated_router::SimulatedRouter;
use clap::Parser;
use cpu::CpuBackend;
use gpu::GpuBackend;
use infall::Machine;
use infall::device::{Chosen, Device};
use infall::load::ModelFile;
use infall::placement::Work;
use model::Cancel;
use rayon::prelude::*;
use session::{Context, Sampler, Sampling, Session, read_together};

/// What decoding several sessions in one pass gains.
#[derive(Parser)]
struct Arguments {
    /// The model, GGUF
    file: PathBuf,
    /// Numbers of sessions
    #[arg(long, default_value = "1,2,4,8", value_delimiter = ',')]
    streams: Vec<usize>,
    /// Passes that are measured at each number
    #[arg(long, default_value_t = 24)]
    tokens: usize,
    /// Tokens of each session's prompt, and one more each for the next: no two are at the same position
    #[arg(long, default_value_t = 16)]
    prompt: usize,
    /// Let learned routers choose what stands in these routes, position by position
    #[arg(long)]
    routes: Option<PathBuf>,
    /// Read each session's token in a pass of its own, in turn: to see what reading them together saves
    #[arg(long)]
    apart: bool,
    #[command(flatten)]
    machine: Machine,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let file = ModelFile::open(Some(&arguments.file))?;
    let most = arguments.streams.iter().copied().max().unwrap_or(1);
    let context_tokens = arguments.prompt + most + arguments.tokens + 1;
    let work = Work { sessions: most, ..Work::new(&arguments.machine, context_tokens) };
    match file.device(&work)? {
        Chosen::Cpu(on) => {
            let (mut backend, setting) = file.load::<CpuBackend>(&work, &on, &Arc::default())?;
            if let Some(path) = &arguments.routes {
                let routes = SimulatedRouter::read(std::fs::File::open(path)?, &file.model.config)?;
                backend = backend.with_routes(Box::new(routes));
            }
            table(&backend, &setting.line(), &arguments, context_tokens)
        }
        Chosen::Gpu(_) if arguments.routes.is_some() => {
            anyhow::bail!("found --routes with a GPU, expected --device cpu")
        }
        Chosen::Gpu(on) => {
            let (backend, setting) = file.load::<GpuBackend>(&work, &on, &Arc::default())?;
            table(&backend, &setting.line(), &arguments, context_tokens)
        }
    }
}

fn table<D: Device>(backend: &D, setting: &str, arguments: &Arguments, context_tokens: usize) -> Result<()> {
    println!("{}; {setting}", bench::machine());
    println!(
        "| sessions | ms a pass | tokens/s of all | against one | leased a token | read a token | GB read a token |"
    );
    println!("|---|---|---|---|---|---|---|");
    let one = measure(backend, 1, arguments, context_tokens)?.tokens_per_second;
    for &streams in &arguments.streams {
        let row = measure(backend, streams, arguments, context_tokens)?;
        let against = row.tokens_per_second / one;
        let Row { pass_ms, tokens_per_second, chosen, read, gigabytes } = row;
        println!(
            "| {streams} | {pass_ms:.1} | {tokens_per_second:.2} | {against:.2} | {chosen:.0} | {read:.1} | {gigabytes:.3} |"
        );
    }
    Ok(())
}

/// A line of the table.
struct Row {
    pass_ms: f64,
    tokens_per_second: f64,
    chosen: f64,
    read: f64,
    gigabytes: f64,
}

/// Decodes `streams` sessions together.
fn measure<D: Device>(backend: &D, streams: usize, arguments: &Arguments, context_tokens: usize) -> Result<Row> {
    let config = backend.config();
    let context = Context::new(config, Some(context_tokens))?;
    let (mut sessions, mut next) = (Vec::new(), Vec::new());
    for number in 0..streams {
        let mut session = Session::new(backend, context)?;
        let token = |at: usize| ((at * 7919 + number * 104_729 + 13) % (config.vocab_size - 16) + 3) as u32;
        let prompt: Vec<u32> = (0..arguments.prompt + number).map(token).collect();
        let logits = session.prefill(backend, &prompt, D::PASS_ROWS, &Cancel::default(), &mut |_| ())?;
        next.push([likeliest(&logits)]);
        sessions.push(session);
    }
    // The first passes fill the slots.
    let mut pass = |sessions: &mut [Session<D>]| -> Result<()> {
        let mut parts: Vec<_> = sessions.iter_mut().zip(&next).map(|(session, next)| (session, &next[..])).collect();
        let read = |parts: &mut [_]| read_together(backend, parts, &Cancel::default());
        let logits = match arguments.apart {
            false => read(&mut parts)?,
            true => parts.chunks_mut(1).map(read).collect::<Result<Vec<_>, _>>()?.concat(),
        };
        // As the engine does it: a turn alone chooses where it is.
        next = match streams {
            1 => vec![[likeliest(&logits)]],
            _ => logits.par_chunks_exact(config.vocab_size).map(|logits| [likeliest(logits)]).collect(),
        };
        Ok(())
    };
    let warm = arguments.tokens / 3;
    (0..warm).try_for_each(|_| pass(&mut sessions))?;
    let (before, start) = (backend.counts().slots, Instant::now());
    let passes = arguments.tokens - warm;
    (0..passes).try_for_each(|_| pass(&mut sessions))?;
    let seconds = start.elapsed().as_secs_f64();
    let counts = backend.counts().slots.since(&before);
    let tokens = (passes * streams) as f64;
    Ok(Row {
        pass_ms: seconds * 1e3 / passes as f64,
        tokens_per_second: tokens / seconds,
        chosen: (counts.cache.hits + counts.cache.misses) as f64 / tokens,
        read: (counts.cache.misses + counts.cache.prefetch_hits) as f64 / tokens,
        gigabytes: counts.read_bytes as f64 / tokens / 1e9,
    })
}

fn likeliest(logits: &[f32]) -> u32 {
    let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
    Sampler::new(greedy, 0).and_then(|mut sampler| sampler.sample(logits)).expect("there are finite logits")
}
