//! Time and memory of a token by the length of the context, up to lengths that nobody wants to wait for.
//!
//! `cargo run --release -p infall-bench --bin long_context -- FILE [--contexts 1024,8192,65536,262144,1048576] [--decode 16]
//! [--prefill 8192] [--plot F.svg]`
//!
//! A session of each length is made of random packed rows, valid in their format (docs/formats.md); then tokens are decoded,
//! and the time of each is shared out to choosing rows (index), visiting them (attend) and the rest. Memory is what the
//! allocator says, against the bytes of compressed rows that docs/spec/model.md §7 asks for. `--prefill` also computes a session of
//! that length, whose tokens are timed beside those of a made one.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use bench::bound::median;
use bench::memory::{read_bytes_per_second, resident_bytes};
use bench::synthetic_state::synthetic_state;
use bench::{PrecisionFlags, machine};
use clap::Parser;
use cpu::{CpuBackend, Options};
use infall::load::ModelFile;
use infall::placement::token_weight_bytes;
use infall::plot::{self, Axis, Line, Panel};
use model::state::StateBytes;
use model::{Backend, Cancel, Error, KvLayout, Observer, Row, Stage, State, forward};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Time and memory of a token by the length of the context.
#[derive(Parser)]
struct Arguments {
    /// The model, GGUF.
    file: PathBuf,
    /// Lengths of the contexts in tokens, decoded ones included.
    #[arg(long, value_delimiter = ',', default_values_t = [1024, 8192, 65_536, 262_144, 1_048_576])]
    contexts: Vec<usize>,
    /// Tokens decoded at the end of each length.
    #[arg(long, default_value_t = 16)]
    decode: usize,
    /// Also compute a context of this length.
    #[arg(long)]
    prefill: Option<usize>,
    /// Write a plot, SVG.
    #[arg(long)]
    plot: Option<PathBuf>,
    /// Threads; all of the machine's by default.
    #[arg(long)]
    threads: Option<usize>,
    #[command(flatten)]
    precision: PrecisionFlags,
}

/// Bytes of compressed rows that `tokens` tokens take by docs/spec/model.md §7: a row for each full window.
fn row_bytes(layout: &KvLayout, tokens: usize) -> usize {
    let compressors = layout.layers.iter().flat_map(|layer| [layer.main, layer.index]).flatten();
    compressors.map(|c| tokens / c.ratio * c.row.row_bytes()).sum()
}

/// Seconds of a token.
#[derive(Clone, Copy)]
struct Split {
    last: Instant,
    index: f64,
    attend: f64,
    rest: f64,
}

impl<B: Backend> Observer<B> for Split {
    fn after(&mut self, _: Option<usize>, stage: Stage, _: &B, _: &B::Pass) -> Result<(), Error> {
        let lap = self.last.elapsed();
        self.last += lap;
        let part = match stage {
            Stage::Index => &mut self.index,
            Stage::Attend => &mut self.attend,
            _ => &mut self.rest,
        };
        *part += lap.as_secs_f64();
        Ok(())
    }
}

/// Runs `count` tokens that continue `state` in one pass.
fn pass(backend: &CpuBackend, state: &mut State, count: usize) -> Result<Split> {
    let (start, vocab) = (state.position(), backend.config().vocab_size);
    let token = |position: usize| (position * 7919 % vocab) as u32;
    let row = |position| Row { session: 0, position, token: token(position), logits: position + 1 == start + count };
    let rows = (start..start + count).map(row).collect();
    let mut split = Split { last: Instant::now(), index: 0.0, attend: 0.0, rest: 0.0 };
    let logits = forward(backend, rows, &mut [state], &Cancel::default(), &mut split)?;
    ensure!(logits.iter().all(|logit| logit.is_finite()), "the token at {start} has logits that are no numbers");
    Ok(split)
}

/// What was measured at one length.
struct Measured {
    /// Tokens before those that were decoded.
    tokens: usize,
    /// Tokens with them.
    context_tokens: usize,
    /// Medians, in ms.
    index_ms: f64,
    attend_ms: f64,
    rest_ms: f64,
    all_ms: f64,
    /// Rows that a token reads.
    read_bytes: usize,
    /// Compressed rows by the specification.
    specified_bytes: usize,
    /// What the session counts itself.
    counted: StateBytes,
    /// The session by the allocator.
    held_bytes: usize,
    /// A pass of one token by the allocator, at most.
    pass_bytes: usize,
    process_bytes: Option<u64>,
}

/// Makes a session with `make` and decodes at its end; the first token of those is not timed.
fn measure(backend: &CpuBackend, decode: usize, make: impl FnOnce() -> Result<State>) -> Result<Measured> {
    let before_bytes = ALLOCATOR.current_usage();
    let mut state = make()?;
    let held_bytes = ALLOCATOR.current_usage() - before_bytes;
    let (tokens, counted, layout) = (state.position(), state.bytes(), state.layout().clone());
    pass(backend, &mut state, 1)?;
    let before_bytes = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let splits: Vec<Split> = (0..decode).map(|_| pass(backend, &mut state, 1)).collect::<Result<_>>()?;
    let ms = |of: fn(&Split) -> f64| 1e3 * median(splits.iter().map(of));
    let measured = Measured {
        tokens,
        context_tokens: state.position(),
        index_ms: ms(|split| split.index),
        attend_ms: ms(|split| split.attend),
        rest_ms: ms(|split| split.rest),
        all_ms: ms(|split| split.index + split.attend + split.rest),
        read_bytes: layout.read_bytes(tokens, backend.config().index_top_k),
        specified_bytes: row_bytes(&layout, tokens),
        counted,
        held_bytes,
        pass_bytes: ALLOCATOR.peak_usage() - before_bytes,
        process_bytes: resident_bytes(),
    };
    measured.check(&layout)?;
    Ok(measured)
}

const HEAD: &str = "  context  ms/token   index  attend    rest  rows, MB  at sweep  bytes of §7    in pages      fixed   \
                    allocated  one pass  RSS, GB";

impl Measured {
    /// Fails if the session holds more than packed rows, what is left of their last pages, and what does not grow.
    fn check(&self, layout: &KvLayout) -> Result<()> {
        let last_pages = StateBytes::of_clone(layout, self.tokens).rows;
        let unfilled = self.counted.rows - self.specified_bytes;
        ensure!(unfilled <= last_pages, "{unfilled} bytes of pages are no rows, at most {last_pages} can be");
        let lists = self.held_bytes.saturating_sub(self.counted.total());
        ensure!(lists <= self.counted.rows / 100 + (64 << 10), "{lists} bytes are held that are neither");
        Ok(())
    }

    /// A line below [`HEAD`]. `at sweep` is what reading the rows takes at the speed of memory, in ms; `fixed` is windows,
    /// inputs and checkpoints; what is allocated besides are lists of pages.
    fn print(&self, sweep: f64) {
        println!(
            "{:>9} {:>9.2} {:>7.2} {:>7.2} {:>7.2} {:>9.3} {:>9.3} {:>12} {:>11} {:>10} {:>11} {:>9} {:>8}",
            self.context_tokens,
            self.all_ms,
            self.index_ms,
            self.attend_ms,
            self.rest_ms,
            self.read_bytes as f64 / 1e6,
            self.read_bytes as f64 / sweep * 1e3,
            self.specified_bytes,
            self.counted.rows,
            self.counted.total() - self.counted.rows,
            self.held_bytes,
            self.pass_bytes,
            self.process_bytes.map_or("-".into(), |bytes| format!("{:.2}", bytes as f64 / 1e9)),
        );
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let decode = arguments.decode;
    ensure!(decode > 0, "found 0 tokens to decode, expected at least 1");
    let file = ModelFile::open(Some(&arguments.file))?;
    let (config, default) = (&file.model.config, Options::default());
    for context in arguments.contexts.iter().chain(&arguments.prefill) {
        let fits = (decode + 2..=config.context_length).contains(context);
        ensure!(fits, "found a context of {context}, expected {} to {}", decode + 2, config.context_length);
    }
    let (threads, precision) = (arguments.threads.unwrap_or(default.threads), arguments.precision.precision());
    let sweep = read_bytes_per_second(1 << 29, threads)?;
    let backend = &file.load_with(Options { threads, precision, ..default })?;
    let weight_bytes = token_weight_bytes(&file.model) as f64;
    println!("{}; {threads} used, {precision:?}", machine());
    println!("{}: ratios {:?}", arguments.file.display(), config.compress_ratios);
    println!(
        "a token reads {:.3} GB of weights, {:.1} ms at the {:.1} GB/s of a sweep\n{HEAD}",
        weight_bytes / 1e9,
        weight_bytes / sweep * 1e3,
        sweep / 1e9
    );
    // What threads keep from their first pass on is no part of a session.
    pass(backend, &mut backend.new_state()?, CpuBackend::PASS_ROWS)?;
    let mut made = Vec::new();
    for &context in &arguments.contexts {
        let found = measure(backend, decode, || Ok(synthetic_state(backend, context - decode - 1)?))?;
        found.print(sweep);
        made.push(found);
    }
    let computed = arguments.prefill.map(|context| {
        let found = measure(backend, decode, || computed_state(backend, context - decode - 1))?;
        found.print(sweep);
        if let Some(made) = made.iter().find(|made| made.tokens == found.tokens) {
            ensure!(found.counted == made.counted, "found {:?}, expected {:?}", found.counted, made.counted);
            println!("a token after computed rows takes {:.3} of one after made rows", found.all_ms / made.all_ms);
        }
        anyhow::Ok(found)
    });
    let computed = computed.transpose()?;
    if let Some(path) = &arguments.plot {
        std::fs::write(path, plot_text(&made, computed.as_ref()))?;
    }
    Ok(())
}

/// A session that has really seen `tokens` tokens. Prints how fast.
fn computed_state(backend: &CpuBackend, tokens: usize) -> Result<State> {
    let (start, mut state) = (Instant::now(), backend.new_state()?);
    while state.position() < tokens {
        let count = CpuBackend::PASS_ROWS.min(tokens - state.position());
        pass(backend, &mut state, count)?;
    }
    println!("prefill of {tokens} tokens: {:.1} tokens/s; after it", tokens as f64 / start.elapsed().as_secs_f64());
    Ok(state)
}

/// Time and memory over the length of the context.
fn plot_text(made: &[Measured], computed: Option<&Measured>) -> String {
    let point = |found: &Measured, of: fn(&Measured) -> f64| (found.context_tokens as f64, of(found));
    let line = |name: &str, of: fn(&Measured) -> f64| Line {
        name: name.into(),
        points: made.iter().map(|found| point(found, of)).collect(),
    };
    let panel = |title: &str, axis: fn(&[f64]) -> Axis, lines: Vec<Line>| {
        let [x, y] = [|point: &(f64, f64)| point.0, |point: &(f64, f64)| point.1]
            .map(|of| lines.iter().flat_map(|line| line.points.iter().map(of)).collect::<Vec<f64>>());
        Panel { title: title.into(), x_title: "tokens of context".into(), x: Axis::log2(x), y: axis(&y), lines }
    };
    let mut times = vec![
        line("a token", |found| found.all_ms),
        line("choosing rows", |found| found.index_ms),
        line("visiting rows", |found| found.attend_ms),
    ];
    times.extend(computed.map(|found| Line {
        name: "a token after computed rows".into(),
        points: vec![point(found, |found| found.all_ms)],
    }));
    let bytes = vec![
        line("session, as allocated", |found| found.held_bytes as f64 / f64::from(1 << 20)),
        line("packed rows by specification", |found| found.specified_bytes as f64 / f64::from(1 << 20)),
    ];
    plot::svg(&[
        panel("time, ms", |values| Axis::from_zero(values.iter().copied().fold(0.0, f64::max)), times),
        panel("memory, MiB", |values| Axis::log2(values.iter().copied()), bytes),
    ])
}
