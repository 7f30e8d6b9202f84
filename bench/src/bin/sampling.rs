//! Time of one choice of a token over V4's vocabulary, single-threaded.
//!
//! `cargo run --release -p infall-bench --bin sampling`

use std::hint::black_box;
use std::time::Instant;

use session::{Choice, Logprobs, Sampler, Sampling};

const VOCAB: usize = 129_280;
const REPEATS: u32 = 200;

/// Logits as a language model has them: a few likely tokens, the others spread far below.
fn logits() -> Vec<f32> {
    let noise = |i: u64| (i.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1) >> 40) as f32 / (1 << 24) as f32;
    (0..VOCAB as u64)
        .map(|i| noise(i) * 16.0 - 8.0 + if i % 4096 == 0 { noise(i / 4096) * 14.0 } else { 0.0 })
        .collect()
}

/// Logits of a model that is surer: a normal distribution, and few tokens well above it.
fn sure_logits() -> Vec<f32> {
    let noise = |i: u64| (i.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1) >> 40) as f32 / (1 << 24) as f32;
    let normal = |i: u64| (0..12).map(|part| noise(i * 12 + part)).sum::<f32>() - 6.0;
    (0..VOCAB as u64)
        .map(|i| normal(i) * 2.5 + if i % 8192 == 0 { 16.0 + noise(i / 8192) * 8.0 } else { 0.0 })
        .collect()
}

/// Mean time of a call, in microseconds.
fn time_us(mut call: impl FnMut()) -> f64 {
    call();
    let start = Instant::now();
    (0..REPEATS).for_each(|_| call());
    start.elapsed().as_secs_f64() * 1e6 / f64::from(REPEATS)
}

fn main() -> anyhow::Result<()> {
    let logits = logits();
    let default = Sampling::default();
    let plain = Sampling { min_p: 0.0, ..default };
    let mask = vec![0xffff_fff0_u32; VOCAB / 32];
    let (free, masked) = (Choice::default(), Choice { allowed: Some(&mask), greedy: false });
    println!("{VOCAB} logits, {}", bench::machine());
    for (name, sampling, choice) in [
        ("greedy", Sampling { temperature: 0.0, ..default }, free),
        ("default (min_p 0.05)", default, free),
        ("default, masked", default, masked),
        ("default, penalties", Sampling { presence_penalty: 0.5, ..default }, free),
        ("top_k 40", Sampling { top_k: 40, ..plain }, free),
        ("top_p 0.95", Sampling { top_p: 0.95, ..plain }, free),
        ("top_p 0.999, temperature 2", Sampling { top_p: 0.999, temperature: 2.0, ..plain }, free),
        ("no cut at all", plain, free),
    ] {
        let mut sampler = Sampler::new(sampling, 1)?;
        println!("{name:<28} {:>8.0} us", time_us(|| drop(black_box(sampler.choose(&logits, choice)))));
    }
    let sure = sure_logits();
    let mut sampler = Sampler::new(Sampling { top_p: 0.95, ..plain }, 1)?;
    println!("{:<28} {:>8.0} us", "top_p 0.95, surer model", time_us(|| drop(black_box(sampler.choose(&sure, free)))));
    println!("{:<28} {:>8.0} us", "logprobs, none listed", time_us(|| drop(black_box(Logprobs::new(&logits, 0, 0)))));
    println!("{:<28} {:>8.0} us", "logprobs, top 20", time_us(|| drop(black_box(Logprobs::new(&logits, 0, 20)))));
    Ok(())
}
