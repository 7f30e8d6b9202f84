//! The sampler against a distribution computed in another, plainer way.

use proptest::prelude::*;
use session::{Error, Sampler, Sampling};

const PLAIN: Sampling = Sampling { temperature: 1.0, top_p: 1.0, min_p: 0.0, top_k: 0 };

/// The probability of every token, from the rules' words: softmax at the temperature over the `top_k` likeliest; of
/// these, those at least `min_p` times as likely as the first; of these, the shortest head that has the mass `top_p`.
fn distribution(logits: &[f32], sampling: Sampling) -> Vec<f64> {
    let mut order: Vec<usize> = (0..logits.len()).filter(|&i| logits[i].is_finite()).collect();
    order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap().then(a.cmp(&b)));
    if sampling.temperature <= 0.0 {
        order.truncate(1);
    }
    if sampling.top_k > 0 {
        order.truncate(sampling.top_k);
    }
    let temperature = if sampling.temperature <= 0.0 { 1.0 } else { f64::from(sampling.temperature) };
    let scaled: Vec<f64> = order.iter().map(|&i| f64::from(logits[i]) / temperature).collect();
    let sum: f64 = scaled.iter().map(|x| (x - scaled[0]).exp()).sum();
    let softmax: Vec<f64> = scaled.iter().map(|x| (x - scaled[0]).exp() / sum).collect();
    let (mut probabilities, mut mass) = (vec![0.0; logits.len()], 0.0);
    for (&token, &p) in order.iter().zip(&softmax) {
        let unlikely = p < f64::from(sampling.min_p) * softmax[0];
        let enough = sampling.top_p < 1.0 && mass >= f64::from(sampling.top_p);
        if mass > 0.0 && (unlikely || enough) {
            break;
        }
        probabilities[token] = p;
        mass += p;
    }
    probabilities.iter().map(|p| p / mass).collect()
}

/// Fixed logits without structure, some of them equal.
fn logits(count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919 % 1013) as f32 / 1013.0 * 8.0).round() / 2.0 - (i % 5) as f32 * 0.3).collect()
}

/// Pearson's chi-square of `draws` draws, and its degrees of freedom. Tokens of less than 5 expected draws count as one.
fn chi_square(logits: &[f32], sampling: Sampling, draws: usize) -> (f64, f64) {
    let expected = distribution(logits, sampling);
    let mut counts = vec![0_usize; logits.len()];
    let mut sampler = Sampler::new(sampling, 7).unwrap();
    for _ in 0..draws {
        counts[sampler.sample(logits).unwrap() as usize] += 1;
    }
    let (mut statistic, mut cells, mut rare) = (0.0, 0.0, (0.0, 0.0));
    let mut add = |seen: f64, expected: f64| {
        statistic += (seen - expected).powi(2) / expected;
        cells += 1.0;
    };
    for (&count, p) in counts.iter().zip(expected) {
        let (seen, expected) = (count as f64, p * draws as f64);
        assert!(expected > 0.0 || count == 0, "a token outside the distribution was drawn");
        if expected >= 5.0 { add(seen, expected) } else { rare = (rare.0 + seen, rare.1 + expected) }
    }
    if rare.1 > 0.0 {
        add(rare.0, rare.1);
    }
    (statistic, cells - 1.0)
}

#[test]
fn draws_follow_the_distribution() {
    let logits = logits(200);
    for sampling in [
        PLAIN,
        Sampling { temperature: 0.5, ..PLAIN },
        Sampling { temperature: 2.0, ..PLAIN },
        Sampling { min_p: 0.05, ..PLAIN },
        Sampling { top_p: 0.9, ..PLAIN },
        Sampling { top_k: 10, ..PLAIN },
        Sampling { temperature: 1.3, top_p: 0.8, min_p: 0.1, top_k: 50 },
    ] {
        let (statistic, freedom) = chi_square(&logits, sampling, 30_000);
        // Mean `freedom`, variance twice that: five standard deviations.
        let bound = freedom + 5.0 * (2.0 * freedom).sqrt();
        println!("{sampling:?}: chi-square {statistic:.1} of {freedom} degrees of freedom, bound {bound:.1}");
        assert!(statistic < bound && freedom > 3.0);
    }
}

#[test]
fn temperature_0_takes_the_first_of_the_largest() {
    let mut sampler = Sampler::new(Sampling { temperature: 0.0, ..PLAIN }, 1).unwrap();
    assert_eq!(sampler.sample(&[1.0, 3.0, 3.0, 2.0]).unwrap(), 1);
    assert_eq!(sampler.sample(&[f32::NAN, -1.0, f32::NEG_INFINITY, f32::INFINITY, -0.5]).unwrap(), 4);
    let mut negative = Sampler::new(Sampling { temperature: -1.0, ..PLAIN }, 1).unwrap();
    assert_eq!(negative.sample(&[1.0, 3.0, 3.0, 2.0]).unwrap(), 1);
}

#[test]
fn logits_that_are_not_finite_are_never_chosen() {
    let logits = [f32::NAN, 0.0, f32::INFINITY, 0.5, f32::NEG_INFINITY];
    for sampling in [PLAIN, Sampling { top_p: 0.99, ..PLAIN }, Sampling { top_k: 4, ..PLAIN }] {
        let mut sampler = Sampler::new(sampling, 3).unwrap();
        let drawn: Vec<u32> = (0..100).map(|_| sampler.sample(&logits).unwrap()).collect();
        assert!(drawn.contains(&1) && drawn.contains(&3) && drawn.iter().all(|token| [1, 3].contains(token)));
    }
    for nothing in [&[][..], &[f32::NAN, f32::INFINITY]] {
        let error = Sampler::new(PLAIN, 3).unwrap().sample(nothing).unwrap_err();
        assert!(matches!(error, Error::NoFiniteLogit(count) if count == nothing.len()), "{error}");
    }
}

#[test]
fn settings_outside_their_range_are_refused() {
    for (sampling, name) in [
        (Sampling { top_p: 1.1, ..PLAIN }, "top_p"),
        (Sampling { top_p: f32::NAN, ..PLAIN }, "top_p"),
        (Sampling { min_p: -0.1, ..PLAIN }, "min_p"),
        (Sampling { temperature: f32::INFINITY, ..PLAIN }, "temperature"),
    ] {
        let error = Sampler::new(sampling, 1).unwrap_err().to_string();
        assert!(error.starts_with(name) && error.contains("expected"), "{error}");
    }
}

/// The stream of ChaCha8 is specified and `exp` is our own: these tokens are the same everywhere, for ever.
#[test]
fn a_seed_gives_these_tokens() {
    let draw = |seed| {
        let mut sampler = Sampler::new(PLAIN, seed).unwrap();
        (0..12).map(|_| sampler.sample(&logits(200)).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(draw(0), GOLDEN);
    assert_ne!(draw(1), GOLDEN);
}

/// Computed by a Python program with its own ChaCha8.
const GOLDEN: [u32; 12] = [166, 126, 50, 22, 51, 18, 1, 55, 61, 132, 130, 83];

proptest! {
    #[test]
    fn only_tokens_of_the_distribution_are_drawn(
        logits in proptest::collection::vec(prop_oneof![9 => -20.0_f32..20.0, 1 => Just(f32::NAN)], 1..300),
        temperature in 0.0_f32..3.0,
        top_p in 0.0_f32..=1.0,
        min_p in 0.0_f32..=1.0,
        top_k in 0_usize..40,
        seed: u64,
    ) {
        prop_assume!(logits.iter().any(|logit| logit.is_finite()));
        let sampling = Sampling { temperature, top_p, min_p, top_k };
        let expected = distribution(&logits, sampling);
        let mut sampler = Sampler::new(sampling, seed).unwrap();
        for _ in 0..20 {
            let token = sampler.sample(&logits).unwrap() as usize;
            prop_assert!(expected[token] > 0.0, "token {} of {:?}", token, sampling);
        }
    }
}
