//! The canonical dot: its definition written out once more, and every kernel held to it, to the bit.

mod common;
#[path = "common/levels.rs"]
mod levels;

use common::{Random, assert_same_bits};
use levels::levels;
use proptest::prelude::*;
use quant::TYPES;
use quant::exact::*;
use quant::simd::Level;

/// The definition, element by element, fused multiply-add by double-checked arithmetic of `libm`.
fn definition(w: &[f32], x: &[f32]) -> f32 {
    let mut l = [0f32; 16];
    for i in 0..w.len() {
        l[i % 16] = libm::fmaf(w[i], x[i], l[i % 16]);
    }
    let a: Vec<f32> = (0..8).map(|i| l[i] + l[i + 8]).collect();
    let b: Vec<f32> = (0..4).map(|i| a[i] + a[i + 4]).collect();
    let c: Vec<f32> = (0..2).map(|i| b[i] + b[i + 2]).collect();
    c[0] + c[1]
}

#[test]
fn levels_of_this_machine() {
    assert_eq!(Some(&quant::simd::level()), levels().last());
}

#[test]
fn dot_and_sum_follow_the_definition() {
    let mut random = Random(1);
    for len in (0..100).chain([255, 256, 257, 1000, 4096, 4099]) {
        let (w, x) = (random.normals(len), random.normals(len));
        let ones = vec![1.0; len];
        for level in Level::available() {
            assert_same_bits(&[dot_at(level, &w, &x)], &[definition(&w, &x)], &format!("dot of {len} at {level:?}"));
            let sum = sum_at(level, &x);
            assert_same_bits(&[sum], &[definition(&ones, &x)], &format!("sum of {len} at {level:?}"));
        }
    }
}

#[test]
fn dot_row_is_dequantise_then_dot() {
    let mut random = Random(2);
    for ty in TYPES {
        let block = ty.block().unwrap().elements as usize;
        for blocks in [1, 2, 3, 7, 8, 9, 31, 300] {
            let cols = blocks * block;
            let (row, x) = (random.row(ty, cols), random.normals(cols));
            let mut w = vec![0.0; cols];
            quant::dequantize(ty, &row, &mut w);
            assert!(w.iter().all(|w| w.is_finite()));
            for level in Level::available() {
                let found = dot_row_at(level, ty, &row, &x);
                assert_same_bits(&[found], &[definition(&w, &x)], &format!("{ty}, {cols} columns at {level:?}"));
            }
        }
    }
}

#[test]
fn batches_equal_rows_one_by_one() {
    let mut random = Random(3);
    for ty in TYPES {
        let block = ty.block().unwrap().elements as usize;
        for (rows, blocks, batch) in [(1, 1, 1), (1, 3, 2), (2, 1, 3), (3, 2, 4), (5, 1, 7), (17, 2, 5), (33, 1, 6)] {
            let cols = blocks * block;
            let weights: Vec<u8> = (0..rows).flat_map(|_| random.row(ty, cols)).collect();
            let x = random.normals(batch * cols);
            let row_bytes = quant::row_bytes(ty, cols);
            let expected: Vec<f32> = weights
                .chunks_exact(row_bytes)
                .flat_map(|row| x.chunks_exact(cols).map(move |x| dot_row_at(Level::Scalar, ty, row, x)))
                .collect();
            for level in Level::available() {
                let mut found = vec![f32::NAN; rows * batch];
                matmul_at(level, ty, &weights, cols, &x, &mut found, &mut Vec::new());
                assert_same_bits(&found, &expected, &format!("{ty} {rows}×{cols}×{batch} at {level:?}"));
            }
        }
    }
}

proptest! {
    #[test]
    fn f32_batches_of_any_shape_equal_dots(rows in 0usize..11, cols in 1usize..70, batch in 0usize..15, seed: u64) {
        let mut random = Random(seed);
        let (w, x) = (random.normals(rows * cols), random.normals(batch * cols));
        let expected: Vec<f32> = w
            .chunks_exact(cols)
            .flat_map(|w| x.chunks_exact(cols).map(move |x| definition(w, x)))
            .collect();
        for level in Level::available() {
            let mut found = vec![f32::NAN; rows * batch];
            matmul_f32_at(level, &w, cols, &x, &mut found);
            assert_same_bits(&found, &expected, &format!("{level:?}"));
        }
    }

    #[test]
    fn weighted_rows_are_added_in_order(
        heads in 0usize..10,
        count in 0usize..9,
        width in 1usize..200,
        apart in 0usize..3,
        seed: u64,
    ) {
        let (mut random, stride) = (Random(seed), count + apart);
        let (weights, rows) = (random.normals(heads * stride), random.normals(count * width));
        let before = random.normals(heads * width);
        let mut expected = before.clone();
        for (h, sums) in expected.chunks_exact_mut(width).enumerate() {
            for (i, row) in rows.chunks_exact(width).enumerate() {
                sums.iter_mut().zip(row).for_each(|(sum, &row)| *sum = libm::fmaf(weights[h * stride + i], row, *sum));
            }
        }
        for level in Level::available() {
            let mut found = before.clone();
            add_weighted_at(level, &weights, stride, &rows, width, &mut found);
            assert_same_bits(&found, &expected, &format!("{level:?}"));
        }
    }
}
