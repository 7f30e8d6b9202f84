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

use std::borrow::Cow;
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
        within("top_p", sampling.top_p, 0.0, 1.0, "a number from 0 to 1")?;
        within("min_p", sampling.min_p, 0.0, 1.0, "a number from 0 to 1")?;
        within("temperature", sampling.temperature, f32::MIN, f32::MAX, "a finite number")?;
        within("presence_penalty", sampling.presence_penalty, -2.0, 2.0, "a number from -2 to 2")?;
        within("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0, "a number from -2 to 2")?;
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        let random = ChaCha8Rng::from_seed(key);
        Ok(Sampler { sampling, bias: Vec::new(), chosen: BTreeMap::new(), random })
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
        let logits = self.adjusted(logits, choice)?;
        let best = argmax(&logits).ok_or(Error::NoFiniteLogit(logits.len()))?;
        let token = if choice.greedy || self.sampling.temperature <= 0.0 {
            best
        } else {
            let kept = candidates(&logits, logits[best as usize], self.sampling);
            self.draw(&kept)
        };
        *self.chosen.entry(token).or_default() += 1;
        Ok(token)
    }

    /// Steps 1 to 3: the logits with mask, bias and penalties; what may not be chosen is -∞.
    fn adjusted<'l>(&self, logits: &'l [f32], choice: Choice<'_>) -> Result<Cow<'l, [f32]>, Error> {
        let mut adjusted = Cow::Borrowed(logits);
        if let Some(&(token, _)) = self.bias.iter().find(|&&(token, _)| token as usize >= logits.len()) {
            return Err(Error::BiasToken { token, vocab_size: logits.len() });
        }
        for &(token, bias) in &self.bias {
            add(&mut adjusted.to_mut()[token as usize], f64::from(bias));
        }
        let Sampling { presence_penalty, frequency_penalty, .. } = self.sampling;
        if !choice.greedy && (presence_penalty != 0.0 || frequency_penalty != 0.0) {
            for (&token, &count) in &self.chosen {
                let penalty = f64::from(count) * f64::from(frequency_penalty) + f64::from(presence_penalty);
                add(&mut adjusted.to_mut()[token as usize], -penalty);
            }
        }
        if let Some(allowed) = choice.allowed {
            for (word, logits) in adjusted.to_mut().chunks_mut(32).enumerate() {
                let bits = allowed.get(word).copied().unwrap_or(0);
                let barred = logits.iter_mut().enumerate().filter(|(bit, _)| bits >> bit & 1 == 0);
                barred.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
            }
        }
        Ok(adjusted)
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

/// Step 5: the tokens that the settings leave, in order of token, or of weight where the settings need that order.
fn candidates(logits: &[f32], max: f32, sampling: Sampling) -> Vec<Candidate> {
    let Sampling { temperature, top_p, min_p, top_k, .. } = sampling;
    let (max, temperature) = (f64::from(max), f64::from(temperature));
    let weighed =
        |(token, logit): (u32, f32)| Candidate { token, weight: libm::exp((f64::from(logit) - max) / temperature) };
    let mut kept: Vec<Candidate> = if top_k > 0 {
        likeliest(logits, top_k.min(TOP_K_CAP)).into_iter().map(weighed).collect()
    } else if top_p < 1.0 {
        finite(logits).map(weighed).collect()
    } else {
        // Most tokens are far too unlikely: a bound on the logit, with room for rounding, saves their `exp`.
        let bound = max + temperature * libm::log(f64::from(min_p)) - 1e-3 * (1.0 + temperature);
        finite(logits).filter(|&(_, logit)| f64::from(logit) >= bound).map(weighed).collect()
    };
    let total = total(&kept);
    kept.retain(|candidate| candidate.weight >= f64::from(min_p));
    if top_p < 1.0 {
        // Tokens below this together weigh at most half of what lies behind the head: none of them is in it.
        let tail = (1.0 - f64::from(top_p)) * total / (2 * logits.len()) as f64;
        kept.retain(|candidate| candidate.weight >= tail);
        keep_head(&mut kept, f64::from(top_p) * total);
    }
    kept
}

/// Keeps the likeliest candidates that together weigh `enough`, by falling weight. Sorts no more than it must.
fn keep_head(candidates: &mut Vec<Candidate>, enough: f64) {
    let mut guess = 64;
    loop {
        let sorted = guess.min(candidates.len());
        if sorted < candidates.len() {
            candidates.select_nth_unstable_by(sorted, heaviest_first);
        }
        candidates[..sorted].sort_unstable_by(heaviest_first);
        let mut mass = 0.0;
        let reaches = |candidate: &Candidate| {
            mass += candidate.weight;
            mass >= enough
        };
        if let Some(last) = candidates[..sorted].iter().position(reaches) {
            return candidates.truncate(last + 1);
        }
        if sorted == candidates.len() {
            return;
        }
        guess *= 8;
    }
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
    finite(logits).reduce(|best, next| if next.1 > best.1 { next } else { best }).map(|(token, _)| token)
}

/// The `count` tokens of the largest finite logits, largest first, equals by token.
fn likeliest(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.partial_cmp(&a.1).expect("finite").then(a.0.cmp(&b.0));
    let mut tokens: Vec<(u32, f32)> = finite(logits).collect();
    if count < tokens.len() {
        tokens.select_nth_unstable_by(count, order);
        tokens.truncate(count);
    }
    tokens.sort_unstable_by(order);
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
