//! The choice of a token from logits (docs/spec/conversation.md §4.6, last paragraph).
//!
//! In this order:
//!
//! 1. Tokens outside the mask of allowed ones drop out, as do logits that are not finite.
//! 2. The client's bias is added to the logits of the tokens it names.
//! 3. From the logit of a token that was chosen `n > 0` times before, `n · frequency_penalty + presence_penalty` is taken
//!    (OpenAI's definition; the prompt does not count).
//! 4. At temperature 0, or where a greedy choice is asked for, the largest logit wins, the first of equals.
//! 5. Otherwise softmax at the temperature over the `top_k` likeliest; of these, those at least `min_p` times as likely as
//!    the likeliest; of these, the shortest head with `top_p` of the mass; and a draw from what is left.
//!
//! Adjusted logits are rounded to f32 once. Everything else is computed in f64, in a fixed order, with `exp` from `libm`,
//! and the randomness is ChaCha8, whose stream is specified (the key is the seed in its first 8 bytes, then zeros;
//! nonce 0): a seed gives the same tokens on every machine and for any number of threads.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::Error;

/// Largest `top_k` that has an effect; what is above counts as this.
pub const TOP_K_CAP: usize = 1024;

/// How to choose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// What logits are divided by; 0 or less takes the largest logit (the first of equals) and ignores `top_p`, `min_p`
    /// and `top_k`.
    pub temperature: f32,
    /// Below 1: only the likeliest tokens that together have this share of the probability. From 0 to 1.
    pub top_p: f32,
    /// Only tokens at least this many times as likely as the likeliest. From 0 to 1.
    pub min_p: f32,
    /// Only this many of the likeliest tokens, at most [`TOP_K_CAP`]; 0 for no limit.
    pub top_k: usize,
    /// Taken from the logit of every token chosen before. From -2 to 2.
    pub presence_penalty: f32,
    /// Taken from the logit of a token once for each time it was chosen before. From -2 to 2.
    pub frequency_penalty: f32,
}

impl Default for Sampling {
    /// DeepSeek's recommendation, with the `min_p` that ds4 adds.
    fn default() -> Sampling {
        let (presence_penalty, frequency_penalty) = (0.0, 0.0);
        Sampling { temperature: 1.0, top_p: 1.0, min_p: 0.05, top_k: 0, presence_penalty, frequency_penalty }
    }
}

/// What holds for one choice only.
#[derive(Clone, Copy, Debug, Default)]
pub struct Choice<'a> {
    /// The tokens that may be chosen: token `t` is bit `t % 32` of word `t / 32`. All if `None`.
    pub allowed: Option<&'a [u32]>,
    /// Take the largest logit, without penalties: for syntax, where a draw or a penalty would only do harm.
    pub greedy: bool,
}

/// Chooses tokens.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    bias: Vec<(u32, f32)>,
    /// How often each token was chosen; in order of token, so that the arithmetic has one order.
    chosen: BTreeMap<u32, u32>,
    random: ChaCha8Rng,
    scratch: Scratch,
}

/// Memory that each choice needs, kept from one to the next.
#[derive(Clone, Debug, Default)]
struct Scratch {
    /// Logits with mask, bias and penalties.
    adjusted: Vec<f32>,
    kept: Vec<Candidate>,
}

/// A token that may be chosen, with its probability relative to the likeliest one's.
#[derive(Clone, Copy, Debug)]
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
        within("top_p", sampling.top_p, 0.0, 1.0, "a number from 0 to 1")?;
        within("min_p", sampling.min_p, 0.0, 1.0, "a number from 0 to 1")?;
        within("temperature", sampling.temperature, f32::MIN, f32::MAX, "a finite number")?;
        within("presence_penalty", sampling.presence_penalty, -2.0, 2.0, "a number from -2 to 2")?;
        within("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0, "a number from -2 to 2")?;
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        let random = ChaCha8Rng::from_seed(key);
        Ok(Sampler { sampling, bias: Vec::new(), chosen: BTreeMap::new(), random, scratch: Scratch::default() })
    }

    /// The same with `bias` added to the logits of these tokens: OpenAI's `logit_bias`, where -100 bans a token and 100
    /// forces it for all practical purposes.
    ///
    /// # Errors
    /// [`Error::Sampling`] for a bias outside -100..=100.
    pub fn with_bias(mut self, bias: Vec<(u32, f32)>) -> Result<Sampler, Error> {
        bias.iter()
            .try_for_each(|&(_, bias)| within("logit_bias", bias, -100.0, 100.0, "a number from -100 to 100"))?;
        self.bias = bias;
        Ok(self)
    }

    /// The next token, from the logits `[vocab]` before it.
    ///
    /// # Errors
    /// [`Error::NoFiniteLogit`] if none can be chosen, [`Error::BiasToken`] if a bias is for a token beyond `vocab`.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, Error> {
        self.choose(logits, Choice::default())
    }

    /// The next token, chosen as `choice` says.
    ///
    /// # Errors
    /// As [`Sampler::sample`].
    pub fn choose(&mut self, logits: &[f32], choice: Choice<'_>) -> Result<u32, Error> {
        let Scratch { mut adjusted, mut kept } = std::mem::take(&mut self.scratch);
        let token = self.adjust(logits, choice, &mut adjusted).and_then(|is_adjusted| {
            self.choose_among(if is_adjusted { &adjusted } else { logits }, choice.greedy, &mut kept)
        });
        self.scratch = Scratch { adjusted, kept };
        let token = token?;
        *self.chosen.entry(token).or_default() += 1;
        Ok(token)
    }

    /// Steps 4 and 5.
    fn choose_among(&mut self, logits: &[f32], greedy: bool, kept: &mut Vec<Candidate>) -> Result<u32, Error> {
        let best = argmax(logits).ok_or(Error::NoFiniteLogit(logits.len()))?;
        if greedy || self.sampling.temperature <= 0.0 {
            return Ok(best);
        }
        candidates(logits, logits[best as usize], self.sampling, kept);
        Ok(self.draw(kept))
    }

    /// Steps 1 to 3: writes the logits with mask, bias and penalties, where there are any; what may not be chosen is -∞.
    fn adjust(&self, logits: &[f32], choice: Choice<'_>, adjusted: &mut Vec<f32>) -> Result<bool, Error> {
        let Sampling { presence_penalty, frequency_penalty, .. } = self.sampling;
        let has_penalties = !choice.greedy && (presence_penalty != 0.0 || frequency_penalty != 0.0);
        let is_penalized = has_penalties && !self.chosen.is_empty();
        if let Some(&(token, _)) = self.bias.iter().find(|&&(token, _)| token as usize >= logits.len()) {
            return Err(Error::BiasToken { token, vocab_size: logits.len() });
        }
        if choice.allowed.is_none() && self.bias.is_empty() && !is_penalized {
            return Ok(false);
        }
        adjusted.clear();
        match choice.allowed {
            None => adjusted.extend_from_slice(logits),
            Some(allowed) => {
                let words = allowed.iter().copied().chain(std::iter::repeat(0));
                logits.chunks(32).zip(words).for_each(|(logits, word)| extend_allowed(adjusted, logits, word));
            }
        }
        for &(token, bias) in &self.bias {
            add(&mut adjusted[token as usize], f64::from(bias));
        }
        if is_penalized {
            for (&token, &count) in &self.chosen {
                let penalty = f64::from(count) * f64::from(frequency_penalty) + f64::from(presence_penalty);
                add(&mut adjusted[token as usize], -penalty);
            }
        }
        Ok(true)
    }

    /// One of the candidates, by their weights.
    fn draw(&mut self, kept: &[Candidate]) -> u32 {
        let mut left = self.uniform() * total(kept);
        for candidate in kept {
            left -= candidate.weight;
            if left < 0.0 {
                return candidate.token;
            }
        }
        kept.last().expect("the likeliest token is always kept").token
    }

    /// A number from 0 to below 1, one of 2^53.
    fn uniform(&mut self) -> f64 {
        (self.random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Refuses a setting that is not from `low` to `high`, NaN included.
fn within(setting: &'static str, found: f32, low: f32, high: f32, expected: &'static str) -> Result<(), Error> {
    if (low..=high).contains(&found) { Ok(()) } else { Err(Error::Sampling { setting, found, expected }) }
}

/// Adds to a logit, rounding once.
fn add(logit: &mut f32, difference: f64) {
    *logit = (f64::from(*logit) + difference) as f32;
}

/// Appends those of up to 32 `logits` whose bit in `word` is set, -∞ for the others.
fn extend_allowed(adjusted: &mut Vec<f32>, logits: &[f32], word: u32) {
    match word {
        0 => adjusted.resize(adjusted.len() + logits.len(), f32::NEG_INFINITY),
        u32::MAX => adjusted.extend_from_slice(logits),
        _ => adjusted.extend(
            logits.iter().enumerate().map(|(bit, &logit)| if word >> bit & 1 == 1 { logit } else { f32::NEG_INFINITY }),
        ),
    }
}

/// Step 5: the tokens that the settings leave, in order of token, or of weight where the settings need that order.
fn candidates(logits: &[f32], max: f32, sampling: Sampling, kept: &mut Vec<Candidate>) {
    let Sampling { temperature, top_p, min_p, top_k, .. } = sampling;
    let (max, temperature, min_p) = (f64::from(max), f64::from(temperature), f64::from(min_p));
    let weighed =
        |(token, logit): (u32, f32)| Candidate { token, weight: libm::exp((f64::from(logit) - max) / temperature) };
    kept.clear();
    if top_k > 0 {
        kept.extend(likeliest(logits, top_k.min(TOP_K_CAP)).into_iter().map(weighed));
        if top_p < 1.0 {
            keep_head_of_all(kept, f64::from(top_p), min_p);
        } else {
            kept.retain(|candidate| candidate.weight >= min_p);
        }
    } else if top_p < 1.0 {
        let near = |bound: f64| finite(logits).filter(move |&(_, logit)| f64::from(logit) >= bound);
        let total = || near(f64::NEG_INFINITY).map(|logit| weighed(logit).weight).sum();
        let bound = max - NEAR * temperature;
        if near(bound).count() < logits.len() / 4 {
            kept.extend(near(bound).map(weighed));
            if keep_head(kept, logits.len(), f64::from(top_p), min_p, total) {
                return;
            }
            kept.clear();
        }
        kept.extend(near(f64::NEG_INFINITY).map(weighed));
        keep_head_of_all(kept, f64::from(top_p), min_p);
    } else {
        // Most tokens are far too unlikely: a bound on the logit, with room for rounding, saves their `exp`.
        let bound = max + temperature * libm::log(min_p) - 1e-3 * (1.0 + temperature);
        kept.extend(finite(logits).filter(|&(_, logit)| f64::from(logit) >= bound).map(weighed));
        kept.retain(|candidate| candidate.weight >= min_p);
    }
}

/// How many temperatures below the largest logit those are whose weights top-p looks at first. What lies further below weighs,
/// over V4's vocabulary, a ten-thousandth of the likeliest token at most.
const NEAR: f64 = 21.0;

/// As [`keep_head_of_all`], from the tokens near the likeliest one out of `vocab`. What all weigh, `total`, is asked for only
/// where a bound does not settle the choice. False if tokens further below might be kept.
fn keep_head(
    near: &mut Vec<Candidate>,
    vocab: usize,
    top_p: f64,
    min_p: f64,
    total_of_all: impl FnOnce() -> f64,
) -> bool {
    // With room for rounding in whatever order the weights are summed.
    let (least, rounding) = (total(near), 1e-9);
    let most = (least + (vocab - near.len()) as f64 * libm::exp(-NEAR)) * (1.0 + rounding);
    near.retain(|candidate| candidate.weight >= min_p);
    let longest = head(near, top_p * most);
    near.truncate(longest);
    if total(near) < top_p * most && min_p < 2.0 * libm::exp(-NEAR) {
        return false;
    }
    if head_of_sorted(near, top_p * least * (1.0 - rounding)) < longest {
        near.truncate(head_of_sorted(near, top_p * total_of_all()));
    }
    true
}

/// Keeps of all tokens those at least `min_p` times as likely as the likeliest, and of these the shortest head with `top_p` of
/// the mass of all, by falling weight.
fn keep_head_of_all(all: &mut Vec<Candidate>, top_p: f64, min_p: f64) {
    let total = total(all);
    // Tokens below this together weigh at most half of what lies behind the head: none of them is in it.
    let tail = (1.0 - top_p) * total / (2 * all.len()) as f64;
    all.retain(|candidate| candidate.weight >= min_p.max(tail));
    let head = head(all, top_p * total);
    all.truncate(head);
}

/// How many of the likeliest candidates together weigh `enough`, all if they do not. Those come to the front, by falling weight;
/// no more is sorted than must be.
fn head(candidates: &mut [Candidate], enough: f64) -> usize {
    let mut guess = 64;
    loop {
        let sorted = guess.min(candidates.len());
        if sorted < candidates.len() {
            candidates.select_nth_unstable_by(sorted, heaviest_first);
        }
        candidates[..sorted].sort_unstable_by(heaviest_first);
        let head = head_of_sorted(&candidates[..sorted], enough);
        if head < sorted || sorted == candidates.len() {
            return head;
        }
        guess *= 8;
    }
}

/// How many of the first candidates together weigh `enough`, all if they do not.
fn head_of_sorted(candidates: &[Candidate], enough: f64) -> usize {
    let mut mass = 0.0;
    let reaches = |candidate: &Candidate| {
        mass += candidate.weight;
        mass >= enough
    };
    candidates.iter().position(reaches).map_or(candidates.len(), |last| last + 1)
}

/// What the candidates weigh together, summed in their order.
fn total(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|candidate| candidate.weight).sum()
}

/// Tokens whose logits are finite, in order.
fn finite(logits: &[f32]) -> impl Iterator<Item = (u32, f32)> {
    (0..).zip(logits.iter().copied()).filter(|(_, logit)| logit.is_finite())
}

/// The token of the largest finite logit, the first of equals.
fn argmax(logits: &[f32]) -> Option<u32> {
    // So many at a time as registers hold: every token of every session waits for this.
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (whole, rest) = logits.as_chunks::<16>();
    let larger = |most: f32, logit: f32| if logit.is_finite() && logit > most { logit } else { most };
    for chunk in whole {
        lanes.iter_mut().zip(chunk).for_each(|(most, &logit)| *most = larger(*most, logit));
    }
    let most = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |most, &logit| larger(most, logit));
    let first = logits.iter().position(|&logit| logit == most)?;
    most.is_finite().then_some(first as u32)
}

/// The `count` tokens of the largest finite logits, largest first, equals by token.
fn likeliest(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.partial_cmp(&a.1).expect("finite").then(a.0.cmp(&b.0));
    let mut tokens: Vec<(u32, f32)> = Vec::with_capacity(4 * count);
    if count == 0 {
        return tokens;
    }
    // Tokens come in order: one that only equals the last of `count` better ones comes after it.
    let mut bound = f32::NEG_INFINITY;
    for (token, logit) in finite(logits) {
        if logit <= bound {
            continue;
        }
        tokens.push((token, logit));
        if tokens.len() == 4 * count {
            bound = tokens.select_nth_unstable_by(count - 1, order).1.1;
            tokens.truncate(count);
        }
    }
    tokens.sort_unstable_by(order);
    tokens.truncate(count);
    tokens
}

/// By falling weight, equals by token: the same order whatever the sort.
fn heaviest_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.weight.total_cmp(&a.weight).then(a.token.cmp(&b.token))
}

/// Log probabilities at one place of a turn.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Of the token that was chosen.
    pub chosen: f64,
    /// The likeliest tokens and theirs, likeliest first, equals by token.
    pub top: Vec<(u32, f64)>,
}

impl Logprobs {
    /// Most of the likeliest tokens that a client may ask for (OpenAI's limit).
    pub const MAX_TOP: usize = 20;

    /// The log-softmax of the model's own logits `[vocab]`, before mask, bias, penalties and temperature (as vLLM's
    /// `raw_logprobs`): it says what the model thinks, whatever the settings made of it.
    pub fn new(logits: &[f32], chosen: u32, top: usize) -> Logprobs {
        let max = argmax(logits).map_or(0.0, |token| f64::from(logits[token as usize]));
        let sum: f64 = finite(logits).map(|(_, logit)| libm::exp(f64::from(logit) - max)).sum();
        let normalizer = max + libm::log(sum);
        let logprob = |logit: f32| f64::from(logit) - normalizer;
        let top = likeliest(logits, top).into_iter().map(|(token, logit)| (token, logprob(logit))).collect();
        Logprobs { chosen: logprob(logits[chosen as usize]), top }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_largest_finite_logit_is_found_as_one_by_one(
            logits in prop::collection::vec(
                prop_oneof![
                    3 => -3.0_f32..3.0,
                    2 => prop::sample::select(vec![0.0, -0.0, 2.5, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MIN]),
                ],
                0..100,
            )
        ) {
            let first = finite(&logits).reduce(|best, next| if next.1 > best.1 { next } else { best });
            prop_assert_eq!(argmax(&logits), first.map(|(token, _)| token));
        }
    }
}
