//! Products of matrices of every type by several threads, Exact and Fast, beside a sweep that only reads memory.
//!
//! `cargo run --release -p infall-bench --bin kernels -- [--threads 2] [--batch 128] [--megabytes 256]`
//!
//! One vector: GB of weights a second, out of memory. A batch: G multiply-adds a second. Best of several runs.

use std::thread;
use std::time::Instant;

use bench::memory::read_bytes_per_second;
use clap::Parser;
use gguf::TensorType;
use quant::blocks::Mxfp4;
use quant::{exact, integer, simd};

/// Products of matrices of every type.
#[derive(Parser)]
struct Arguments {
    /// Threads that share a matrix.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Rows of the batch.
    #[arg(long, default_value_t = 128)]
    batch: usize,
    /// Weights of the product with one vector.
    #[arg(long, default_value_t = 256)]
    megabytes: usize,
}

const COLS: usize = 4096;
/// Weight rows of the product with a batch.
const BATCH_WEIGHT_ROWS: usize = 512;

/// Seconds of the best of five runs of `product`, the weights shared by `threads` threads.
fn best_seconds(
    threads: usize,
    weights: &[u8],
    row_bytes: usize,
    batch: usize,
    product: impl Fn(&[u8], &mut [f32]) + Sync,
) -> f64 {
    let rows = weights.len() / row_bytes;
    let mut out = vec![0.0; rows * batch];
    let share = rows.div_ceil(threads).next_multiple_of(exact::TILE_ROWS);
    let mut run = || {
        let start = Instant::now();
        thread::scope(|scope| {
            for (weights, out) in weights.chunks(share * row_bytes).zip(out.chunks_mut(share * batch)) {
                scope.spawn(|| product(weights, out));
            }
        });
        start.elapsed().as_secs_f64()
    };
    (0..5).map(|_| run()).fold(f64::INFINITY, f64::min)
}

fn main() {
    let Arguments { threads, batch, megabytes } = Arguments::parse();
    println!("{}; {threads} used, level {:?}", bench::machine(), simd::level());
    println!("reading memory: {:.1} GB/s", read_bytes_per_second(megabytes << 20, threads) / 1e9);
    println!("{:<8} {:>28} {:>28}", "", "one vector, GB/s", format!("batch of {batch}, GMAC/s"));
    println!("{:<8} {:>14} {:>13} {:>14} {:>13}", "type", "exact", "fast", "exact", "fast");
    let x: Vec<f32> = (0..batch * COLS).map(|i| (i as f32 * 0.7).sin()).collect();
    for ty in quant::TYPES {
        let row_bytes = quant::row_bytes(ty, COLS);
        let rows = (megabytes << 20) / row_bytes;
        // Bytes below 0x3c keep every half-precision scale small and finite. Exponents of MXFP4 are set apart: these
        // would make scales near 2^-128, and subnormal numbers take a processor a hundred times as long.
        let mut weights: Vec<u8> = (0..rows * row_bytes).map(|i| (i * 37 % 60) as u8).collect();
        if ty == TensorType::Mxfp4 {
            weights.chunks_exact_mut(size_of::<Mxfp4>()).for_each(|block| block[0] = 120);
        }
        let shapes = [(1, &weights[..]), (batch, &weights[..BATCH_WEIGHT_ROWS.min(rows) * row_bytes])];
        let seconds = shapes.map(|(batch, weights)| {
            let x = &x[..batch * COLS];
            let exact = best_seconds(threads, weights, row_bytes, batch, |weights, out| {
                exact::matmul(ty, weights, COLS, x, out, &mut Vec::new());
            });
            let fast = integer::is_supported(ty).then(|| {
                best_seconds(threads, weights, row_bytes, batch, |weights, out| {
                    integer::matmul(ty, weights, &integer::quantize_activations(ty, x, COLS), out);
                })
            });
            (exact, fast)
        });
        let gigabytes = weights.len() as f64 / 1e9;
        let gigamacs = (BATCH_WEIGHT_ROWS.min(rows) * COLS * batch) as f64 / 1e9;
        let shown = |amount: f64, seconds: Option<f64>| seconds.map_or("–".into(), |s| format!("{:.1}", amount / s));
        let [(exact_one, fast_one), (exact_batch, fast_batch)] = seconds;
        println!(
            "{:<8} {:>14} {:>13} {:>14} {:>13}",
            ty.to_string(),
            shown(gigabytes, Some(exact_one)),
            shown(gigabytes, fast_one),
            shown(gigamacs, Some(exact_batch)),
            shown(gigamacs, fast_batch)
        );
    }
}
