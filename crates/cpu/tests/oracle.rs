//! The whole model against the float64 reference in tools/oracle.
//!
//! Bounds are those of docs/verification.md: an f32 engine without roundings must meet `plain` everywhere; with the
//! official roundings a value next to a tie may fall the other way and flip a choice, so medians over positions count.

mod common;

use common::{References, argmax, load, logits, plain, rows};
use cpu::{CpuBackend, Options};
use model::{Activation, Arithmetic, Backend, Cancel, Error, Observer, Stage, forward};

/// Largest difference and share of equal argmax over all positions.
fn compare(ours: &[f32], reference: &[f32], vocab: usize) -> (f32, f64) {
    assert_eq!(ours.len(), reference.len());
    let max = ours.iter().zip(reference).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let positions = ours.chunks_exact(vocab).zip(reference.chunks_exact(vocab));
    let same = positions.clone().filter(|(a, b)| argmax(a) == argmax(b)).count();
    (max, same as f64 / positions.count() as f64)
}

fn meets_plain(file: &str, references: &str, bound: f32) {
    let references = References::open(&format!("{references}.refs"));
    let backend = load(file, plain());
    let ours = logits(&backend, &references.tokens(), &[128]);
    let (max, same) = compare(&ours, &references.floats("plain.logits"), backend.config().vocab_size);
    println!("{file}: max abs {max:.2e}, same argmax {:.2} %", same * 100.0);
    assert!(max <= bound, "{file}: max abs {max:e}, bound {bound:e}");
    assert_eq!(same, 1.0, "{file}: some argmax differs");
}

#[test]
fn tiny_iq2_meets_plain() {
    meets_plain("tiny-iq2", "tiny-iq2", 2e-4);
}

#[test]
fn tiny_q4_meets_plain() {
    meets_plain("tiny-q4", "tiny-q4", 2e-4);
}

#[test]
fn tiny_q8_meets_plain() {
    meets_plain("tiny-q8", "tiny-q8", 2e-4);
}

#[test]
fn tiny_f32_meets_plain() {
    meets_plain("tiny-iq2-f32", "tiny-iq2", 2e-4);
}

#[test]
fn pro_meets_plain_at_900_tokens() {
    meets_plain("pro-iq2", "pro-iq2", 4e-4);
}

#[test]
fn three_sizes_of_experts_meet_plain() {
    meets_plain("mixed3-mixed", "mixed3-mixed", 4e-4);
}

/// Per-position relative RMS against `official`: its median and 90th percentile.
fn distance_to_official(name: &str) -> (f64, f64) {
    let references = References::open(&format!("{name}.refs"));
    let backend = load(name, Options { arithmetic: Arithmetic::Official, ..plain() });
    let vocab = backend.config().vocab_size;
    let ours = logits(&backend, &references.tokens(), &[128]);
    let theirs = references.floats("official.logits");
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let relative = |(a, b): (&[f32], &[f32])| {
        let difference = square(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
        (difference / square(&mut b.iter().map(|&b| f64::from(b)))).sqrt()
    };
    let mut distances: Vec<f64> = ours.chunks_exact(vocab).zip(theirs.chunks_exact(vocab)).map(relative).collect();
    distances.sort_by(f64::total_cmp);
    (distances[distances.len() / 2], distances[distances.len() * 9 / 10])
}

#[test]
fn official_arithmetic_is_close_to_official() {
    for name in ["tiny-iq2", "tiny-q4", "tiny-q8", "mixed3-mixed", "pro-iq2"] {
        let (median, p90) = distance_to_official(name);
        println!("{name}: relative RMS a position, median {median:.2e}, p90 {p90:.2e}");
        assert!(median <= 2e-2 && p90 <= 6e-2, "{name}: median {median:e} (bound 2e-2), p90 {p90:e} (bound 6e-2)");
    }
}

/// Collects what the layers chose.
#[derive(Default)]
struct Choices {
    experts: Vec<Vec<f32>>,
    index_rows: Vec<Vec<f32>>,
}

impl Observer<CpuBackend> for Choices {
    fn after(&mut self, _: Option<usize>, stage: Stage, backend: &CpuBackend, pass: &cpu::Pass) -> Result<(), Error> {
        match stage {
            Stage::Route => self.experts.push(backend.read(pass, Activation::Experts)),
            Stage::Index => self.index_rows.push(backend.read(pass, Activation::IndexRows)),
            _ => {}
        }
        Ok(())
    }
}

/// Compares what was chosen for each position where the reference's own choice was clear.
fn same_choices(ours: &[f32], reference: &[i32], gaps: &[f32], what: &str) -> usize {
    let per_row = reference.len() / gaps.len();
    let mut compared = 0;
    for (position, &gap) in gaps.iter().enumerate().filter(|(_, gap)| **gap > 1e-4) {
        let sorted = |values: &mut dyn Iterator<Item = i32>| {
            let mut values: Vec<i32> = values.filter(|&value| value >= 0).collect();
            values.sort_unstable();
            values
        };
        let width = ours.len() / gaps.len();
        let mine = sorted(&mut ours[position * width..][..width].iter().map(|&value| value as i32));
        let theirs = sorted(&mut reference[position * per_row..][..per_row].iter().copied());
        assert_eq!(mine, theirs, "{what} at position {position}, gap {gap:e}");
        compared += 1;
    }
    compared
}

#[test]
fn experts_and_indexer_rows_are_the_references() {
    for name in ["tiny-iq2", "tiny-q4", "tiny-q8", "mixed3-mixed", "pro-iq2"] {
        let references = References::open(&format!("{name}.refs"));
        let backend = load(name, plain());
        let (mut state, mut choices) = (backend.new_state().unwrap(), Choices::default());
        let tokens = references.tokens();
        forward(&backend, rows(0, 0, &tokens), &mut [&mut state], &Cancel::default(), &mut choices).unwrap();
        let (mut experts, mut index_rows) = (0, 0);
        for layer in 0..backend.config().layers {
            let reference = references.ints(&format!("plain.L{layer}.experts"));
            let gaps = format!("plain.L{layer}.expert_gap");
            let gaps = if references.has(&gaps) { references.floats(&gaps) } else { vec![1.0; tokens.len()] };
            experts += same_choices(&choices.experts[layer], &reference, &gaps, &format!("{name} L{layer} experts"));
            if backend.config().compress_ratios[layer] == 4 {
                let reference = references.ints(&format!("plain.L{layer}.index_sel"));
                let gaps = references.floats(&format!("plain.L{layer}.index_gap"));
                index_rows +=
                    same_choices(&choices.index_rows[layer], &reference, &gaps, &format!("{name} L{layer} rows"));
            }
        }
        println!("{name}: {experts} choices of experts and {index_rows} of indexer rows are equal");
        assert!(experts > tokens.len() && index_rows > tokens.len() / 2, "{name}: too few clear choices to compare");
    }
}
