//! The sampler against a distribution computed in another, plainer way.

use std::collections::HashSet;

use proptest::prelude::*;
use session::{Choice, Error, Logprobs, Sampler, Sampling};

const PLAIN: Sampling =
    Sampling { temperature: 1.0, top_p: 1.0, min_p: 0.0, top_k: 0, presence_penalty: 0.0, frequency_penalty: 0.0 };

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
    let mut sampler = Sampler::new(sampling, 7).unwrap();
    statistic(&distribution(logits, sampling), draws, || sampler.sample(logits).unwrap())
}

/// The same for any source of draws.
fn statistic(expected: &[f64], draws: usize, mut draw: impl FnMut() -> u32) -> (f64, f64) {
    let mut counts = vec![0_usize; expected.len()];
    for _ in 0..draws {
        counts[draw() as usize] += 1;
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
        Sampling { temperature: 1.3, top_p: 0.8, min_p: 0.1, top_k: 50, ..PLAIN },
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
        (Sampling { presence_penalty: 2.1, ..PLAIN }, "presence_penalty"),
        (Sampling { frequency_penalty: f32::NAN, ..PLAIN }, "frequency_penalty"),
    ] {
        let error = Sampler::new(sampling, 1).unwrap_err().to_string();
        assert!(error.starts_with(name) && error.contains("expected"), "{error}");
    }
    let biased = |bias| Sampler::new(PLAIN, 1).unwrap().with_bias(vec![bias]);
    let error = biased((3, 101.0)).unwrap_err().to_string();
    assert!(error.starts_with("logit_bias is 101"), "{error}");
    let error = biased((3, 1.0)).unwrap().sample(&[0.0; 3]).unwrap_err().to_string();
    assert!(error.contains("names token 3, expected less than 3"), "{error}");
}

/// The mask that allows `tokens`.
fn mask(vocab: usize, tokens: &[u32]) -> Vec<u32> {
    let mut mask = vec![0; vocab.div_ceil(32)];
    tokens.iter().for_each(|&token| mask[token as usize / 32] |= 1 << (token % 32));
    mask
}

/// A token outside the mask counts for nothing: not for the largest logit, nor for top-k, nor for the mass of top-p.
#[test]
fn a_mask_comes_before_everything() {
    let logits = logits(200);
    let allowed: Vec<u32> = (0..200).filter(|token| token % 3 == 1).collect();
    let words = mask(200, &allowed);
    let choice = Choice { allowed: Some(&words), greedy: false };
    let barred = |(token, &logit)| if allowed.contains(&token) { logit } else { f32::NAN };
    let only_allowed: Vec<f32> = (0..).zip(&logits).map(barred).collect();
    for sampling in [PLAIN, Sampling { top_p: 0.7, ..PLAIN }, Sampling { top_k: 10, min_p: 0.01, ..PLAIN }] {
        let mut sampler = Sampler::new(sampling, 11).unwrap();
        let expected = distribution(&only_allowed, sampling);
        let (statistic, freedom) = statistic(&expected, 20_000, || sampler.choose(&logits, choice).unwrap());
        println!("{sampling:?}: chi-square {statistic:.1} of {freedom} degrees of freedom");
        assert!(statistic < freedom + 5.0 * (2.0 * freedom).sqrt() && freedom > 3.0);
    }
    let one = mask(200, &[77]);
    let mut sampler = Sampler::new(PLAIN, 1).unwrap();
    assert_eq!(sampler.choose(&logits, Choice { allowed: Some(&one), greedy: false }).unwrap(), 77);
    assert_eq!(sampler.choose(&logits, Choice { allowed: Some(&one), greedy: true }).unwrap(), 77);
    let none = mask(200, &[]);
    let error = sampler.choose(&logits, Choice { allowed: Some(&none), greedy: true }).unwrap_err();
    assert!(matches!(error, Error::NoFiniteLogit(200)), "{error}");
}

#[test]
fn a_bias_is_added_to_the_logits() {
    let logits = logits(200);
    let bias = vec![(3, 4.0), (17, -100.0), (50, 2.5), (3, 1.0)];
    let mut biased = logits.clone();
    bias.iter().for_each(|&(token, bias): &(u32, f32)| biased[token as usize] += bias);
    let sampling = Sampling { top_p: 0.95, ..PLAIN };
    let mut sampler = Sampler::new(sampling, 5).unwrap().with_bias(bias).unwrap();
    let draw = || sampler.sample(&logits).unwrap();
    let (statistic, freedom) = statistic(&distribution(&biased, sampling), 20_000, draw);
    assert!(statistic < freedom + 5.0 * (2.0 * freedom).sqrt() && freedom > 3.0, "{statistic} of {freedom}");
    let forced = Sampler::new(PLAIN, 5).unwrap().with_bias(vec![(9, 100.0)]);
    assert_eq!(forced.unwrap().sample(&logits).unwrap(), 9);
}

/// OpenAI: `mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence`, step by step at temperature 0, where
/// the choice follows from the logits alone.
#[test]
fn penalties_are_those_of_openai() {
    let logits: Vec<f32> = (0..40).map(|i| (i * 13 % 40) as f32 / 8.0).collect();
    for (presence_penalty, frequency_penalty) in [(0.0, 0.3), (1.1, 0.0), (0.7, 0.4), (-0.5, 0.2), (2.0, -0.1)] {
        let sampling = Sampling { temperature: 0.0, presence_penalty, frequency_penalty, ..PLAIN };
        let mut sampler = Sampler::new(sampling, 0).unwrap();
        let mut counts = [0_u32; 40];
        for step in 0..120 {
            let penalized = |token: usize| {
                let seen = if counts[token] > 0 { 1.0 } else { 0.0 };
                f64::from(logits[token])
                    - f64::from(counts[token]) * f64::from(frequency_penalty)
                    - seen * f64::from(presence_penalty)
            };
            let expected = (0..40).map(penalized).fold(f64::NEG_INFINITY, f64::max);
            let token = sampler.sample(&logits).unwrap() as usize;
            assert!((penalized(token) - expected).abs() < 1e-5, "step {step}, token {token}");
            counts[token] += 1;
        }
    }
}

#[test]
fn a_greedy_choice_knows_no_penalties_and_uses_no_randomness() {
    let logits = logits(200);
    let penalized = Sampling { presence_penalty: 2.0, frequency_penalty: 2.0, ..PLAIN };
    let mut sampler = Sampler::new(penalized, 3).unwrap();
    let greedy = Choice { allowed: None, greedy: true };
    let first = sampler.choose(&logits, greedy).unwrap();
    assert!((0..5).all(|_| sampler.choose(&logits, greedy).unwrap() == first));
    let draws = |with_greedy: bool| {
        let mut sampler = Sampler::new(PLAIN, 3).unwrap();
        let draw = |_| {
            if with_greedy {
                sampler.choose(&logits, greedy).unwrap();
            }
            sampler.sample(&logits).unwrap()
        };
        (0..10).map(draw).collect::<Vec<_>>()
    };
    assert_eq!(draws(true), draws(false));
}

/// Of a vocabulary of V4's size, where the sampler sorts only what it must.
#[test]
fn a_large_vocabulary_is_cut_in_the_same_places() {
    let logits: Vec<f32> = (0..129_280_u64)
        .map(|i| {
            let noise = (i.wrapping_mul(6_364_136_223_846_793_005) >> 40) as f32 / (1 << 24) as f32;
            noise * 6.0 + if i % 1000 == 0 { 5.0 } else { 0.0 }
        })
        .collect();
    for sampling in [
        Sampling { top_p: 0.02, ..PLAIN },
        Sampling { top_p: 0.3, ..PLAIN },
        Sampling { top_k: 1000, ..PLAIN },
        Sampling { min_p: 0.2, temperature: 0.5, ..PLAIN },
    ] {
        let expected = distribution(&logits, sampling);
        let kept = expected.iter().filter(|&&p| p > 0.0).count();
        let mut sampler = Sampler::new(sampling, 2).unwrap();
        let inside = (0..50).all(|_| expected[sampler.sample(&logits).unwrap() as usize] > 0.0);
        println!("{sampling:?}: {kept} tokens kept");
        assert!(inside, "{sampling:?}");
    }
}

/// The shortest head by falling weight with `top_p` of the mass of all: every weight computed, all of them sorted.
fn head_of_all(logits: &[f32], sampling: Sampling) -> Vec<u32> {
    let max = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
    let weigh = |logit: f32| libm::exp((f64::from(logit) - max) / f64::from(sampling.temperature));
    let mut weights: Vec<(u32, f64)> = (0..).zip(logits).map(|(token, &logit)| (token, weigh(logit))).collect();
    let enough = f64::from(sampling.top_p) * weights.iter().map(|(_, weight)| weight).sum::<f64>();
    weights.retain(|&(_, weight)| weight >= f64::from(sampling.min_p));
    weights.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let mut mass = 0.0;
    let last = weights.iter().position(|(_, weight)| {
        mass += weight;
        mass >= enough
    });
    weights[..last.map_or(weights.len(), |last| last + 1)].iter().map(|&(token, _)| token).collect()
}

/// Top-p looks first at tokens near the likeliest one. It must come to the head that all tokens give.
#[test]
fn top_p_bounds_by_logit_without_changing_the_head() {
    let noise = |i: u64| (i.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1) >> 40) as f32 / (1 << 24) as f32;
    for spread in [3.0, 20.0, 60.0] {
        let logits: Vec<f32> = (0..20_000).map(|i| spread * (noise(i) + noise(i + 77_777) * noise(i + 5))).collect();
        for (top_p, min_p, temperature) in [
            (0.95, 0.0, 1.0),
            (0.5, 0.05, 1.0),
            (0.999, 0.0, 0.3),
            (1.0 - 6e-8, 0.0, 1.0),
            (0.9, 1e-9, 2.0),
            (0.99, 1e-10, 6.0),
            (0.0, 0.0, 1.0),
        ] {
            let sampling = Sampling { top_p, min_p, temperature, ..PLAIN };
            let head: HashSet<u32> = head_of_all(&logits, sampling).into_iter().collect();
            let mut sampler = Sampler::new(sampling, 3).unwrap();
            let drawn: HashSet<u32> = (0..400).map(|_| sampler.sample(&logits).unwrap()).collect();
            assert!(drawn.is_subset(&head), "{sampling:?}, spread {spread}");
            assert!(head.len() > 8 || drawn.len() * 4 >= head.len(), "{sampling:?}, spread {spread}: {drawn:?}");
        }
    }
}

/// Equal logits at the end of the likeliest: the first tokens of them count, wherever a search through the vocabulary stands.
#[test]
fn top_k_takes_the_first_of_equals() {
    let logits: Vec<f32> = (0..5000).map(|i| if i % 7 == 3 { 2.0 } else { (i % 5) as f32 / 3.0 }).collect();
    let found = Logprobs::new(&logits, 0, 20).top;
    let expected: Vec<u32> = (0..20).map(|i| 3 + 7 * i).collect();
    assert_eq!(found.iter().map(|&(token, _)| token).collect::<Vec<_>>(), expected);
}

#[test]
fn logprobs_are_the_log_softmax_of_the_raw_logits() {
    let mut logits = logits(200);
    logits[8] = f32::NAN;
    let probabilities = distribution(&logits, PLAIN);
    let found = Logprobs::new(&logits, 42, Logprobs::MAX_TOP);
    assert!((found.chosen - probabilities[42].ln()).abs() < 1e-12);
    assert_eq!(found.top.len(), 20);
    for &(token, logprob) in &found.top {
        assert!((logprob - probabilities[token as usize].ln()).abs() < 1e-12);
    }
    let mut order: Vec<u32> = (0..200).filter(|&token| token != 8).collect();
    order.sort_by(|&a, &b| logits[b as usize].partial_cmp(&logits[a as usize]).unwrap());
    assert_eq!(found.top.iter().map(|&(token, _)| token).collect::<Vec<_>>(), order[..20]);
    assert_eq!(Logprobs::new(&logits, 42, 0).top, []);
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
        let sampling = Sampling { temperature, top_p, min_p, top_k, ..PLAIN };
        let expected = distribution(&logits, sampling);
        let mut sampler = Sampler::new(sampling, seed).unwrap();
        for _ in 0..20 {
            let token = sampler.sample(&logits).unwrap() as usize;
            prop_assert!(expected[token] > 0.0, "token {} of {:?}", token, sampling);
        }
    }
}
