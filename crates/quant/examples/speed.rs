//! Speeds of the kernels on one core: `cargo run --release -p infall-quant --example speed`.

use gguf::TensorType;
use quant::{exact, integer};
use std::hint::black_box;
use std::time::Instant;

/// Runs `f` in 400 slices of 1 ms, short enough to fit between other programs', and prints the best slice's rate of
/// `items` per call.
fn rate(name: &str, items: usize, mut f: impl FnMut()) {
    let mut best = 0f64;
    for _ in 0..400 {
        let start = Instant::now();
        let mut calls = 0;
        while start.elapsed().as_millis() < 1 {
            f();
            calls += 1;
        }
        best = best.max((calls * items) as f64 / start.elapsed().as_secs_f64());
    }
    println!("{name:40} {:8.3} G/s", best / 1e9);
}

fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * 0.7).sin()).collect()
}

fn main() {
    const COLS: usize = 4096;
    println!("level {:?}; rates in elements (dots: multiply-adds)", quant::simd::level());
    let (w, x) = (values(COLS), values(COLS));
    rate("dot f32 4096", COLS, || {
        black_box(exact::dot(black_box(&w), black_box(&x)));
    });
    let importance: Vec<f32> = w.iter().map(|w| w * w).collect();
    for ty in [TensorType::Q8_0, TensorType::Q2K, TensorType::Q4K, TensorType::Iq2Xxs, TensorType::Mxfp4] {
        let mut blocks = vec![0; quant::row_bytes(ty, COLS)];
        rate(&format!("{ty} quantize"), COLS, || {
            quant::quantize(ty, black_box(&w), Some(&importance), &mut blocks).expect("valid input")
        });
    }
    for ty in quant::TYPES {
        const ROWS: usize = 64;
        const BATCH: usize = 64;
        // Bytes below 0x3c keep every half-precision scale small and finite.
        let mut weights: Vec<u8> = (0..ROWS * quant::row_bytes(ty, COLS)).map(|i| (i * 37 % 60) as u8).collect();
        if ty == TensorType::Mxfp4 {
            weights.chunks_exact_mut(17).for_each(|block| block[0] = 120);
        }
        let mut out = vec![0.0; ROWS * BATCH];
        let mut decoded = vec![0.0; COLS];
        let row = &weights[..quant::row_bytes(ty, COLS)];
        rate(&format!("{ty} dequantize"), COLS, || quant::dequantize(ty, black_box(row), &mut decoded));
        rate(&format!("{ty} dot_row"), COLS, || {
            black_box(exact::dot_row(ty, black_box(row), &x));
        });
        rate(&format!("{ty} matvec 64 rows"), ROWS * COLS, || {
            exact::matvec(ty, black_box(&weights), &x, &mut out[..ROWS]);
        });
        let batch = values(BATCH * COLS);
        let mut scratch = Vec::new();
        rate(&format!("{ty} matmul 64 rows × 64"), ROWS * COLS * BATCH, || {
            exact::matmul(ty, black_box(&weights), COLS, &batch, &mut out, &mut scratch);
        });
        if !integer::is_supported(ty) {
            continue;
        }
        for rows in [1, 4, BATCH] {
            let x = integer::quantize_activations(ty, &batch[..rows * COLS], COLS);
            rate(&format!("{ty} integer matmul 64 rows × {rows}"), ROWS * COLS * rows, || {
                integer::matmul(ty, black_box(&weights), &x, &mut out[..ROWS * rows]);
            });
        }
        rate(&format!("{ty} quantize activations × 64"), COLS * BATCH, || {
            black_box(integer::quantize_activations(ty, black_box(&batch), COLS));
        });
    }
}
