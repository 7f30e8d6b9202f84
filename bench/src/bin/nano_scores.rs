//! Scores of a nano model on its held-out sets (models/nano/heldout): answers that are exactly right, and perplexity.
//!
//! `cargo run --release -p infall-bench --bin nano_scores -- [-m FILE] [--take N] [--plain] [--exact] [--grammar] FOLDER`,
//! the folder being models/nano/heldout.
//!
//! An answer counts if greedy decoding gives exactly the expected tokens, end of turn included. Because the backend is
//! batch-invariant that is the same as: in one pass over prompt and answer, every token of the answer is the argmax
//! after the tokens before it.
//!
//! With `--grammar` answers of the sets with tools are generated instead, freely and in grammar mode: which share of the blocks
//! of calls fits their schemas, and which answers are exactly right. It fails if grammar mode lets a call through that does not
//! fit, or costs an answer.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bench::PrecisionFlags;
use bench::calls::{self, Scores};
use bench::heldout::Item;
use clap::Parser;
use cpu::{CpuBackend, Options};
use infall::load::ModelFile;
use model::{Arithmetic, Backend, Cancel, NoObserver, Row, forward};
use session::Vocabulary;
use text::Tokenizer;

/// Scores of a nano model on its held-out sets.
#[derive(Parser)]
struct Arguments {
    /// The held-out folder: `TASK.jsonl` files and `prose.txt`.
    folder: PathBuf,
    /// The model, GGUF; the built-in one by default.
    #[arg(short, long)]
    model: Option<PathBuf>,
    /// Items of each task to run; all by default.
    #[arg(long)]
    take: Option<usize>,
    /// Without the model's own low-precision roundings.
    #[arg(long)]
    plain: bool,
    /// Generate calls, with and without grammar mode.
    #[arg(long, conflicts_with = "gates")]
    grammar: bool,
    #[command(flatten)]
    precision: PrecisionFlags,
    /// Fail if a task scores below its gate.
    #[arg(long)]
    gates: bool,
}

/// Least share of right answers, by task.
const GATES: [(&str, f64); 6] =
    [("tool", 0.9), ("paraphrase", 0.8), ("followup", 0.9), ("recall_2000", 0.9), ("sum", 0.9), ("thinking", 0.9)];

/// Rows of a pass.
const CHUNK_TOKENS: usize = 256;

/// Logits after each of the last `wanted` of `tokens`, `[wanted, vocab]`.
fn last_logits(backend: &CpuBackend, tokens: &[u32], wanted: usize) -> Result<Vec<f32>> {
    let (mut state, mut logits) = (backend.new_state()?, Vec::new());
    let first = tokens.len() - wanted;
    for (i, chunk) in tokens.chunks(CHUNK_TOKENS).enumerate() {
        let start = i * CHUNK_TOKENS;
        let row = |(i, &token)| Row { session: 0, position: start + i, token, logits: start + i >= first };
        let rows = chunk.iter().enumerate().map(row).collect();
        logits.extend(forward(backend, rows, &mut [&mut state], &Cancel::default(), &mut NoObserver)?);
    }
    Ok(logits)
}

/// Index of the largest value; the first of equals.
fn argmax(row: &[f32]) -> usize {
    row.iter().enumerate().fold(0, |best, (i, &value)| if value > row[best] { i } else { best })
}

/// Whether greedy decoding answers exactly so.
fn answers(backend: &CpuBackend, tokenizer: &Tokenizer, item: &Item) -> Result<bool> {
    let (mut tokens, answer) = (item.prompt(tokenizer)?, item.answer(tokenizer));
    tokens.extend(&answer[..answer.len() - 1]);
    let logits = last_logits(backend, &tokens, answer.len())?;
    let rows = logits.chunks_exact(backend.config().vocab_size);
    Ok(rows.zip(&answer).all(|(row, &token)| argmax(row) == token as usize))
}

/// Perplexity a token over the lines of `text`, each from an empty session.
fn perplexity(backend: &CpuBackend, tokenizer: &Tokenizer, text: &str, take: usize) -> Result<(usize, f64)> {
    let vocab = backend.config().vocab_size;
    let (mut count, mut nats) = (0, 0.0);
    for line in text.lines().filter(|line| !line.is_empty()).take(take) {
        let mut tokens = vec![tokenizer.bos()];
        tokens.extend(tokenizer.encode(line));
        let logits = last_logits(backend, &tokens, tokens.len())?;
        for (row, &next) in logits.chunks_exact(vocab).zip(&tokens[1..]) {
            let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let sum: f64 = row.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
            nats += max + sum.ln() - f64::from(row[next as usize]);
            count += 1;
        }
    }
    Ok((count, (nats / count as f64).exp()))
}

fn sets(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut sets = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "jsonl") {
            let task = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            sets.push((task, path));
        }
    }
    sets.sort();
    Ok(sets)
}

/// Calls of the sets with tools, with and without grammar mode.
fn call_scores(folder: &Path, take: usize, backend: &CpuBackend, tokenizer: &Arc<Tokenizer>) -> Result<()> {
    let vocabulary = Arc::new(Vocabulary::new(tokenizer.clone())?);
    println!("{:<16} {:>37} {:>37}", "", "free: fits schema, right", "grammar: fits schema, right");
    for (task, path) in sets(folder)? {
        let (mut free, mut held) = (Scores::default(), Scores::default());
        for line in std::fs::read_to_string(&path)?.lines().take(take) {
            let item = Item::parse(line).with_context(|| format!("bad item in {}", path.display()))?;
            calls::score(backend, &vocabulary, &item, [&mut free, &mut held])?;
        }
        if free.items > 0 {
            println!("{}", calls::line(&task, &free, &held));
            calls::check(&task, &free, &held)?;
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let file = ModelFile::open(arguments.model.as_deref())?;
    let tokenizer = Arc::new(file.tokenizer()?);
    let arithmetic = if arguments.plain { Arithmetic::Plain } else { Arithmetic::Official };
    let precision = arguments.precision.precision();
    let backend = file.load_with(Options { arithmetic, precision, ..Options::default() })?;
    let take = arguments.take.unwrap_or(usize::MAX);
    println!("{} ({arithmetic:?}, {precision:?}), {}", file.name, bench::machine());
    if arguments.grammar {
        return call_scores(&arguments.folder, take, &backend, &tokenizer);
    }
    println!("{:<16} {:>6} {:>9} {:>8} {:>9}", "task", "items", "right", "gate", "s");
    let mut met = Vec::new();
    for (task, path) in sets(&arguments.folder)? {
        let (start, mut count, mut right) = (Instant::now(), 0, 0);
        for line in std::fs::read_to_string(&path)?.lines().take(take) {
            let item = Item::parse(line).with_context(|| format!("bad item in {}", path.display()))?;
            right += usize::from(answers(&backend, &tokenizer, &item)?);
            count += 1;
        }
        let share = right as f64 / count as f64;
        let gate = GATES.iter().find(|(gated, _)| *gated == task).map(|&(_, gate)| gate);
        let shown = gate.map_or(String::new(), |gate| format!("{:.0} %", gate * 100.0));
        println!("{task:<16} {count:>6} {:>7.1} % {shown:>8} {:>9.1}", share * 100.0, start.elapsed().as_secs_f64());
        if gate.is_some_and(|gate| share >= gate) {
            met.push(task);
        }
    }
    let prose = std::fs::read_to_string(arguments.folder.join("prose.txt"))?;
    let (count, perplexity) = perplexity(&backend, &tokenizer, &prose, take)?;
    println!("prose: perplexity {perplexity:.4} over {count} tokens");
    // A set that is missing or empty has met nothing.
    let missed: Vec<&str> =
        GATES.iter().map(|(task, _)| *task).filter(|task| !met.iter().any(|met| met == task)).collect();
    if arguments.gates && !missed.is_empty() {
        bail!("gates not met: {}", missed.join(", "));
    }
    Ok(())
}
