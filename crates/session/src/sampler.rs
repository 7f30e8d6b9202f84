//! The choice of a token from logits (docs/spec/conversation.md §4.6, last paragraph).
//!
//! Everything is computed in f64, in a fixed order, with `exp` from `libm`, and the randomness is ChaCha8, whose stream
//! is specified (the key is the seed in its first 8 bytes, then zeros; nonce 0): a seed gives the same tokens on every machine and for any number of threads.

use std::cmp::Ordering;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::Error;

/// Largest `top_k` that has an effect; what is above counts as this.
pub const TOP_K_CAP: usize = 1024;

/// How to choose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// What logits are divided by; 0 or less takes the largest logit (the first of equals) and ignores the rest.
    pub temperature: f32,
    /// Below 1: only the likeliest tokens that together have this share of the probability. From 0 to 1.
    pub top_p: f32,
    /// Only tokens at least this many times as likely as the likeliest. From 0 to 1.
    pub min_p: f32,
    /// Only this many of the likeliest tokens, at most [`TOP_K_CAP`]; 0 for no limit.
    pub top_k: usize,
}

/// Chooses tokens.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
}

/// A token that may be chosen, with its probability relative to the likeliest one's.
#[derive(Clone, Copy)]
struct Candidate {
    token: u32,
    weight: f64,
}

impl Sampler {
    /// A sampler whose choices follow from `sampling` and `seed`.
    ///
    /// # Errors
    /// [`Error::Sampling`] for a setting outside its range.
    pub fn new(sampling: Sampling, seed: u64) -> Result<Sampler, Error> {
        let share = |setting, found: f32| match found {
            0.0..=1.0 => Ok(()),
            _ => Err(Error::Sampling { setting, found, expected: "a number from 0 to 1" }),
        };
        share("top_p", sampling.top_p)?;
        share("min_p", sampling.min_p)?;
        if !sampling.temperature.is_finite() {
            let found = sampling.temperature;
            return Err(Error::Sampling { setting: "temperature", found, expected: "a finite number" });
        }
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        Ok(Sampler { sampling, random: ChaCha8Rng::from_seed(key) })
    }

    /// The next token, from the logits `[vocab]` before it. Logits that are not finite are skipped.
    ///
    /// # Errors
    /// [`Error::NoFiniteLogit`] if that leaves none.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, Error> {
        let best = argmax(logits).ok_or(Error::NoFiniteLogit(logits.len()))?;
        if self.sampling.temperature <= 0.0 {
            return Ok(best);
        }
        let kept = self.candidates(logits, logits[best as usize]);
        let total: f64 = kept.iter().map(|candidate| candidate.weight).sum();
        let mut left = self.uniform() * total;
        for candidate in &kept {
            left -= candidate.weight;
            if left < 0.0 {
                return Ok(candidate.token);
            }
        }
        Ok(kept.last().expect("the likeliest token is always kept").token)
    }

    /// The tokens that the settings leave, in order of token, or of weight where the settings need that order.
    fn candidates(&self, logits: &[f32], max: f32) -> Vec<Candidate> {
        let Sampling { temperature, top_p, min_p, top_k } = self.sampling;
        let weight = |logit: f32| libm::exp((f64::from(logit) - f64::from(max)) / f64::from(temperature));
        let finite = (0..).zip(logits).filter(|(_, logit)| logit.is_finite());
        let mut kept: Vec<Candidate> =
            finite.map(|(token, &logit)| Candidate { token, weight: weight(logit) }).collect();
        if top_k > 0 {
            kept.sort_unstable_by(likeliest_first);
            kept.truncate(top_k.min(TOP_K_CAP));
        }
        let total: f64 = kept.iter().map(|candidate| candidate.weight).sum();
        kept.retain(|candidate| candidate.weight >= f64::from(min_p));
        if top_p < 1.0 {
            kept.sort_unstable_by(likeliest_first);
            let enough = f64::from(top_p) * total;
            let mut mass = 0.0;
            let reaches = |candidate: &Candidate| {
                mass += candidate.weight;
                mass >= enough
            };
            let last = kept.iter().position(reaches);
            kept.truncate(last.map_or(kept.len(), |last| last + 1));
        }
        kept
    }

    /// A number from 0 to below 1, one of 2^53.
    fn uniform(&mut self) -> f64 {
        (self.random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Index of the largest finite logit, the first of equals.
fn argmax(logits: &[f32]) -> Option<u32> {
    let finite = (0..).zip(logits).filter(|(_, logit)| logit.is_finite());
    finite.reduce(|best, next| if next.1 > best.1 { next } else { best }).map(|(token, _)| token)
}

/// By falling weight, equals by token: the same order whatever the sort.
fn likeliest_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.weight.total_cmp(&a.weight).then(a.token.cmp(&b.token))
}
