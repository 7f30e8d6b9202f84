//! Products of matrices of every type, Exact and Fast, in one core's caches and out of memory, as a Markdown table.
//!
//! `cargo run --release -p infall-bench --bin kernels -- [--level avx2] [--threads 2] [--megabytes 256] [--type q4_k]`
//!
//! "In cache" is one thread and 16 weight rows, in G multiply-adds a second, for batches of 1, 4 and 128 rows. "Memory" is weights
//! that no cache holds and several threads: GB of weights a second for batches of 1 and 4, beside a sweep that only reads;
//! G multiply-adds a second for 128. "Decode" is weights to f32, in G a second. Codes are random, under scales near 1/100.

use std::hint::black_box;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use bench::memory::read_bytes_per_second;
use clap::Parser;
use gguf::TensorType;
use quant::integer::Activations;
use quant::simd::{self, Level};
use quant::{exact, integer};

#[path = "../../../crates/quant/tests/common/mod.rs"]
mod blocks;

/// Products of matrices of every type.
#[derive(Parser)]
struct Arguments {
    /// Instruction set (default: the fastest of this machine)
    #[arg(long, value_parser = level)]
    level: Option<Level>,
    /// Threads that share a matrix out of memory
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Weights out of memory
    #[arg(long, default_value_t = 256)]
    megabytes: usize,
    /// This type of weights only
    #[arg(long = "type")]
    only: Option<String>,
}

/// One of this machine's instruction sets, by its name.
fn level(name: &str) -> Result<Level> {
    let is_named = |level: &Level| format!("{level:?}").eq_ignore_ascii_case(name);
    match Level::available().find(is_named) {
        Some(level) => Ok(level),
        None => bail!("this machine has {:?}", Level::available().collect::<Vec<_>>()),
    }
}

const COLS: usize = 4096;
const BATCHES: [usize; 3] = [1, 4, 128];
/// Weight rows that stay in the caches.
const CACHED_ROWS: usize = 16;
/// Weight rows of the largest batch out of memory.
const BATCH_WEIGHT_ROWS: usize = 512;

/// Rows of activations, as the kernel takes them.
enum Operand<'x> {
    Exact(&'x [f32]),
    Fast(Activations),
}

/// What is measured of one type and precision.
struct Kernel<'x> {
    level: Level,
    ty: TensorType,
    batch: usize,
    x: Operand<'x>,
}

impl Kernel<'_> {
    fn product(&self, weights: &[u8], out: &mut [f32], scratch: &mut Vec<f32>) {
        match &self.x {
            Operand::Exact(x) => exact::matmul_at(self.level, self.ty, weights, COLS, x, out, scratch),
            Operand::Fast(x) => integer::matmul_at(self.level, self.ty, weights, x, out),
        }
    }

    /// G multiply-adds a second of one thread that has the weights in its caches.
    fn in_cache(&self, weights: &[u8]) -> f64 {
        let (mut out, mut scratch) = (vec![0.0; CACHED_ROWS * self.batch], Vec::new());
        let seconds = best_slice_seconds(|| self.product(black_box(weights), &mut out, &mut scratch));
        (CACHED_ROWS * COLS * self.batch) as f64 / seconds / 1e9
    }

    /// Seconds of the best of five runs of threads that share `weights`.
    fn shared_seconds(&self, threads: usize, weights: &[u8]) -> f64 {
        let row_bytes = quant::row_bytes(self.ty, COLS);
        let rows = weights.len() / row_bytes;
        let mut out = vec![0.0; rows * self.batch];
        let share = rows.div_ceil(threads).next_multiple_of(exact::TILE_ROWS);
        let mut run = || {
            let start = Instant::now();
            thread::scope(|scope| {
                for (weights, out) in weights.chunks(share * row_bytes).zip(out.chunks_mut(share * self.batch)) {
                    scope.spawn(|| self.product(weights, out, &mut Vec::new()));
                }
            });
            start.elapsed().as_secs_f64()
        };
        (0..5).map(|_| run()).fold(f64::INFINITY, f64::min)
    }

    /// GB of weights a second out of memory; of the largest batch, G multiply-adds.
    fn out_of_memory(&self, threads: usize, weights: &[u8]) -> f64 {
        if self.batch < BATCHES[2] {
            return weights.len() as f64 / self.shared_seconds(threads, weights) / 1e9;
        }
        let row_bytes = quant::row_bytes(self.ty, COLS);
        let rows = BATCH_WEIGHT_ROWS.min(weights.len() / row_bytes);
        (rows * COLS * self.batch) as f64 / self.shared_seconds(threads, &weights[..rows * row_bytes]) / 1e9
    }
}

/// Seconds of a call in the best of 100 slices of 1 ms, which are short enough to fit between other programs'.
fn best_slice_seconds(mut call: impl FnMut()) -> f64 {
    let mut slice = || {
        let (start, mut calls) = (Instant::now(), 0);
        while start.elapsed() < Duration::from_millis(1) {
            call();
            calls += 1;
        }
        start.elapsed().as_secs_f64() / f64::from(calls)
    };
    (0..100).map(|_| slice()).fold(f64::INFINITY, f64::min)
}

/// Prints the rows of one type: Exact, and Fast where it has integer dots.
fn measure(ty: TensorType, level: Level, threads: usize, megabytes: usize, x: &[f32]) {
    let row_bytes = quant::row_bytes(ty, COLS);
    let mut random = blocks::Random(1);
    let tile: Vec<u8> = (0..CACHED_ROWS).flat_map(|_| random.row(ty, COLS)).collect();
    let weights = tile.repeat(((megabytes << 20) / tile.len()).max(1));
    let mut decoded = vec![0.0; COLS];
    let row = &tile[..row_bytes];
    let decode_seconds = best_slice_seconds(|| quant::dequantize_at(level, ty, black_box(row), &mut decoded));
    let rows = |batch: usize| &x[..batch * COLS];
    let exact = BATCHES.map(|batch| Kernel { level, ty, batch, x: Operand::Exact(rows(batch)) });
    print_row(ty, "exact", &format!("{:.1}", COLS as f64 / decode_seconds / 1e9), &exact, threads, &tile, &weights);
    if integer::blocking(ty).is_some() {
        let quantized = |batch| Operand::Fast(integer::quantize_activations_at(level, ty, rows(batch), COLS));
        let fast = BATCHES.map(|batch| Kernel { level, ty, batch, x: quantized(batch) });
        print_row(ty, "fast", "", &fast, threads, &tile, &weights);
    }
}

fn print_row(
    ty: TensorType,
    precision: &str,
    decode: &str,
    kernels: &[Kernel<'_>],
    threads: usize,
    tile: &[u8],
    weights: &[u8],
) {
    let in_cache = kernels.iter().map(|kernel| kernel.in_cache(tile));
    let out_of_memory = kernels.iter().map(|kernel| kernel.out_of_memory(threads, weights));
    let cells: String = in_cache.chain(out_of_memory).map(|rate| format!(" {rate:.1} |")).collect();
    println!("| {ty} | {precision} | {decode} |{cells}");
}

fn main() -> Result<()> {
    let Arguments { level, threads, megabytes, only } = Arguments::parse();
    let level = level.unwrap_or_else(simd::level);
    let is_wanted = |ty: &TensorType| only.as_ref().is_none_or(|only| ty.to_string().eq_ignore_ascii_case(only));
    let types: Vec<TensorType> = quant::TYPES.into_iter().filter(is_wanted).collect();
    if types.is_empty() {
        bail!("there are kernels for {}", quant::TYPES.map(|ty| ty.to_string()).join(", "));
    }
    println!("{}; level {level:?}, {threads} threads out of memory", bench::machine());
    println!("reading memory: {:.1} GB/s\n", read_bytes_per_second(megabytes << 20, threads)? / 1e9);
    println!(
        "| type | precision | decode | in cache, 1 | 4 | 128 | memory, 1 | 4 | 128 |\n|---|---|---|---|---|---|---|---|---|"
    );
    let x: Vec<f32> = (0..BATCHES[2] * COLS).map(|i| (i as f32 * 0.7).sin()).collect();
    types.into_iter().for_each(|ty| measure(ty, level, threads, megabytes, &x));
    Ok(())
}
