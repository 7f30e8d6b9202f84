//! What it would bring to ask for the next layer's experts before they are known: guesses by the next layer's own router on
//! this layer's state, as a Markdown table.
//!
//! `cargo run --release -p infall-bench --bin lookahead -- FILE [--tokens 64]` decodes pseudo-random tokens;
//! `… --bin lookahead -- --nano models/nano/heldout/SET.jsonl` decodes the answers of the first 30 items of a held-out set
//! with the built-in model.
//!
//! A layer whose experts follow from its tokens needs no guess and gets none. Every guess goes through the next layer's
//! hyper-connection, norm and router, as the right state will; what differs is the streams that go in. Of the best `n`
//! guesses, those not in a slot would be read: a *hit* is one that the layer then misses, *waste* is one that it does not
//! use. Which experts are in slots is replayed with the store's rule of eviction, without the guesses.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use bench::heldout::Item;
use clap::Parser;
use cpu::{CpuBackend, Options, Pass};
use infall::load::ModelFile;
use model::tensors::Routing;
use model::{Activation, Backend, Batch, Cancel, Config, Error, Observer, Row, Stage, State, SubLayer, forward};
use store::plan::share_slots;
use store::{ExpertId, Policy, Residency};

/// Measures lookahead.
#[derive(Parser)]
struct Arguments {
    /// The model, GGUF.
    file: Option<PathBuf>,
    /// Use the built-in model on a held-out set.
    #[arg(long)]
    nano: Option<PathBuf>,
    /// Tokens of a file's model that are decoded, after 16 that are not counted.
    #[arg(long, default_value_t = 64)]
    tokens: usize,
}

/// The most guesses that are looked at.
const MOST_GUESSES: usize = 8;
/// Slots, of 1000 experts.
const SHARES: [usize; 4] = [100, 250, 450, 700];
/// The states that guesses are made from, earliest first.
const STATES: [&str; 3] =
    ["this layer's router input", "streams before this layer's experts", "streams after this layer's experts"];

/// What one layer chose for one token, and what was guessed, best first; no guesses where none are needed.
#[derive(Default)]
struct Choice {
    experts: Vec<u32>,
    guesses: [Vec<u32>; STATES.len()],
}

/// Looks at every pass of one row and guesses.
struct Guesser<'a> {
    /// Chooses [`MOST_GUESSES`] experts where the model chooses fewer.
    router: &'a CpuBackend,
    learned: Vec<bool>,
    tokens: Vec<Vec<Choice>>,
}

impl Guesser<'_> {
    /// The best experts of `layer` for this state, which is its streams or, already mixed, its input.
    fn guess(&self, layer: usize, activation: Activation, values: &[f32]) -> Result<Vec<u32>, Error> {
        let (router, state) = (self.router, self.router.new_state()?);
        let row = Row { session: 0, position: 0, token: 0, logits: false };
        let mut pass = router.begin(Batch::new(vec![row], &[0], router.config())?, &[&state])?;
        router.write(&mut pass, activation, values);
        if activation == Activation::Streams {
            router.hc_pre(layer, SubLayer::Experts, &mut pass)?;
        }
        router.route(layer, &mut pass)?;
        Ok(router.read(&pass, Activation::Experts).into_iter().map(|expert| expert as u32).collect())
    }
}

impl Observer<CpuBackend> for Guesser<'_> {
    fn after(&mut self, layer: Option<usize>, stage: Stage, backend: &CpuBackend, pass: &Pass) -> Result<(), Error> {
        if pass.rows() > 1 {
            return Ok(());
        }
        let Some(layer) = layer else {
            if stage == Stage::Embed {
                self.tokens.push(self.learned.iter().map(|_| Choice::default()).collect());
            }
            return Ok(());
        };
        let guessed_from = match stage {
            Stage::Route => {
                let experts = backend.read(pass, Activation::Experts).into_iter().map(|expert| expert as u32);
                self.tokens.last_mut().expect("after the embedding")[layer].experts = experts.collect();
                &[(0, Activation::Input), (1, Activation::Streams)][..]
            }
            Stage::HcPost(SubLayer::Experts) => &[(2, Activation::Streams)],
            _ => return Ok(()),
        };
        if self.learned.get(layer + 1) == Some(&true) {
            for &(from, activation) in guessed_from {
                let guess = self.guess(layer + 1, activation, &backend.read(pass, activation))?;
                self.tokens.last_mut().expect("after the embedding")[layer + 1].guesses[from] = guess;
            }
        }
        Ok(())
    }
}

/// Misses, and of the best so many guesses those that would have been read for them and in vain.
#[derive(Clone, Copy, Default)]
struct Counts {
    misses: usize,
    hits: [usize; MOST_GUESSES],
    waste: [usize; MOST_GUESSES],
}

/// Decodes `tokens` with an empty cache of `slots`.
fn replay(tokens: &[Vec<Choice>], config: &Config, slots: usize, warm_up: usize) -> [Counts; STATES.len()] {
    let half_life = Policy::half_life_tokens(slots, config.layers * config.experts_used);
    let mut policy = Policy::new(vec![0; config.layers], config.experts, half_life);
    let mut cached = vec![vec![false; config.experts]; config.layers];
    let (mut empty, mut counts) = (slots, [Counts::default(); STATES.len()]);
    for (i, layers) in tokens.iter().enumerate() {
        for (layer, choice) in layers.iter().enumerate() {
            let id = |expert: u32| ExpertId { layer: layer as u32, expert };
            for (counts, guesses) in counts.iter_mut().zip(&choice.guesses) {
                if i >= warm_up && !guesses.is_empty() {
                    count(counts, &choice.experts, guesses, &cached[layer]);
                }
            }
            choice.experts.iter().for_each(|&expert| policy.chosen(id(expert), 0));
            for &expert in choice.experts.iter().filter(|&&expert| cached[layer][expert as usize]) {
                policy.must_keep(id(expert));
            }
            for &expert in &choice.experts {
                if !cached[layer][expert as usize] {
                    match empty {
                        0 => policy.evict(layer, 0..0).into_iter().for_each(|out| {
                            cached[out.layer as usize][out.expert as usize] = false;
                        }),
                        _ => empty -= 1,
                    }
                }
                cached[layer][expert as usize] = true;
            }
            choice.experts.iter().for_each(|&expert| policy.may_evict(id(expert)));
        }
        policy.tokens_ended(1);
    }
    counts
}

fn count(counts: &mut Counts, experts: &[u32], guesses: &[u32], cached: &[bool]) {
    counts.misses += experts.iter().filter(|&&expert| !cached[expert as usize]).count();
    for n in 0..MOST_GUESSES {
        let read = guesses.iter().take(n + 1).filter(|&&expert| !cached[expert as usize]);
        let (hits, waste): (Vec<u32>, Vec<u32>) = read.partition(|expert| experts.contains(expert));
        counts.hits[n] += hits.len();
        counts.waste[n] += waste.len();
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let file = match (&arguments.file, &arguments.nano) {
        (Some(path), None) => ModelFile::open(Some(path))?,
        (None, Some(_)) => ModelFile::open(None)?,
        _ => bail!("give a file, or --nano SET"),
    };
    // The second router reads no expert, so both stream; the file's model is given what memory a small machine has.
    let config = file.model.config.clone();
    let slots = if arguments.nano.is_some() { config.layers * config.experts } else { 512 };
    let backend = load(&file, slots)?;
    let mut eager = ModelFile::open(arguments.file.as_deref())?;
    eager.model.config.experts_used = MOST_GUESSES.min(config.experts);
    let router = load(&eager, 1)?;
    let routings = file.model.tensors.layers.iter().map(|layer| matches!(layer.moe.routing, Routing::Bias(_)));
    let mut guesser = Guesser { router: &router, learned: routings.collect(), tokens: Vec::new() };
    let warm_up = 16;
    match &arguments.nano {
        Some(set) => nano(&file, &backend, set, &mut guesser)?,
        None => {
            let mut state = backend.new_state()?;
            for i in 0..warm_up + arguments.tokens {
                let token = (i * 7919 + 13) % (config.vocab_size - 16) + 3;
                pass(&backend, &mut state, &[token as u32], &mut guesser)?;
            }
        }
    }
    println!("{} tokens, layers of learned routes {:?}", guesser.tokens.len(), guesser.learned);
    for share in SHARES {
        let slots = (config.layers * config.experts * share).div_ceil(1000);
        let slots = share_slots(&[config.layers], config.experts, slots as u64)[0];
        print(slots, share, &replay(&guesser.tokens, &config, slots, warm_up), MOST_GUESSES.min(config.experts));
    }
    Ok(())
}

fn load(file: &ModelFile, slots: usize) -> Result<CpuBackend> {
    let extents: Vec<store::ExpertExtents> = file.model.experts.iter().map(|layer| layer.extents).collect();
    let (_, sizes) = store::size_classes(&extents);
    let slots = vec![slots.div_ceil(sizes.len()); sizes.len()];
    file.load_with(Options { residency: Residency::Streamed { slots }, ..Options::default() })
}

fn pass(backend: &CpuBackend, state: &mut State, tokens: &[u32], guesser: &mut Guesser<'_>) -> Result<()> {
    let row = |(i, &token)| Row { session: 0, position: state.position() + i, token, logits: false };
    let rows = tokens.iter().enumerate().map(row).collect();
    forward(backend, rows, &mut [state], &Cancel::default(), guesser)?;
    Ok(())
}

fn nano(file: &ModelFile, backend: &CpuBackend, set: &Path, guesser: &mut Guesser<'_>) -> Result<()> {
    let tokenizer = file.tokenizer()?;
    for line in std::fs::read_to_string(set)?.lines().take(30) {
        let item = Item::parse(line)?;
        let mut state = backend.new_state()?;
        pass(backend, &mut state, &item.prompt(&tokenizer)?, guesser)?;
        item.answer(&tokenizer).chunks(1).try_for_each(|token| pass(backend, &mut state, token, guesser))?;
    }
    Ok(())
}

fn print(slots: usize, share: usize, counts: &[Counts], guesses: usize) {
    println!("\n{slots} slots ({} %): hits of misses, % (reads in vain for each hit)\n", share as f64 / 10.0);
    let cells = |cell: &dyn Fn(usize) -> String| (0..guesses).map(|n| format!(" {} |", cell(n))).collect::<String>();
    println!("| guessed from | misses |{}", cells(&|n| format!("{} best", n + 1)));
    println!("|---|---|{}", "---|".repeat(guesses));
    for (state, counts) in STATES.iter().zip(counts) {
        let cell = |n: usize| {
            let hits = 100.0 * counts.hits[n] as f64 / counts.misses.max(1) as f64;
            format!("{hits:.0} ({:.1})", counts.waste[n] as f64 / counts.hits[n].max(1) as f64)
        };
        println!("| {state} | {} |{}", counts.misses, cells(&cell));
    }
}
