//! Whole models: as near to the processor's Exact as f32 allows, and the built-in model's answers.

mod common;

use common::{advance, argmax, distance, in_plain, in_precision, logits, on_cpu, on_gpu, tokens};
use gpu::GpuBackend;
use model::{Arithmetic, Backend, Precision};

/// A pass of more rows than a ring holds, single tokens, few rows and many.
const SIZES: [usize; 5] = [70, 1, 1, 3, 10];
/// The same without the ring: every row of Exact takes a processor long.
const EXACT_SIZES: [usize; 4] = [12, 1, 1, 3];

#[test]
fn logits_are_near_those_of_the_cpu() {
    for (name, precision, sizes, bound) in [
        ("tiny-q8", Precision::Exact, &EXACT_SIZES[..], 5e-6),
        ("tiny-iq2", Precision::Exact, &EXACT_SIZES, 5e-6),
        ("tiny-q4", Precision::Exact, &EXACT_SIZES, 5e-6),
        // Tiles of halves: factors have 11 bits.
        ("tiny-iq2", Precision::Fast, &SIZES, 1e-2),
    ] {
        let tokens = tokens(name, sizes.iter().sum());
        let ours = logits(&on_gpu(name, in_plain(precision)), &tokens, sizes);
        let expected = logits(&on_cpu(name, Arithmetic::Plain), &tokens, sizes);
        let distance = distance(&ours, &expected);
        println!("{name} {precision:?}: relative L2 distance {distance:.1e}");
        assert!(distance <= bound, "{name} {precision:?}: {distance:e}, expected at most {bound:e}");
    }
}

/// The tokens that a backend goes on with after `prompt`, each the likeliest.
fn greedy<B: Backend>(backend: &B, prompt: &[u32], count: usize) -> Vec<u32> {
    let (mut state, vocab) = (backend.new_state().unwrap(), backend.config().vocab_size);
    let mut last = advance(backend, &mut state, prompt);
    let mut next = || {
        let token = argmax(&last[last.len() - vocab..]) as u32;
        last = advance(backend, &mut state, &[token]);
        token
    };
    (0..count).map(|_| next()).collect()
}

/// The built-in model, trained, with its own roundings: what it says is what the processor's Exact says.
#[test]
fn nano_goes_on_as_on_the_processor() {
    let prompt = tokens("nano", 40);
    let expected = greedy(&on_cpu("nano", Arithmetic::Official), &prompt, 24);
    for precision in common::PRECISIONS {
        let ours = greedy(&on_gpu("nano", in_precision(precision)), &prompt, 24);
        assert_eq!(ours, expected, "{precision:?}");
    }
}

/// Sessions are saved and loaded by a thread of their own, beside the one that computes.
#[test]
fn sessions_can_be_saved_by_another_thread() {
    fn shared<T: Sync>() {}
    fn sent<T: Send>() {}
    shared::<GpuBackend>();
    sent::<<GpuBackend as Backend>::State>();
}
