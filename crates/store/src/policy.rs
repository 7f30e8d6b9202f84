//! Which cached expert is given up: one of the layer that has most slots, by decayed frequency, then recency.
//!
//! Pure: events in, a victim out; no clock, no memory, no I/O. Every token needs the same number of experts of every layer,
//! and needs them in the layers' order, so layers keep equal parts of the slots: a common order over all layers gives up
//! what the next layers are about to ask for. Within a layer, an expert's score is the number of times it was chosen, each
//! choice counting half as much after a half-life. Instead of halving every score as tokens pass, a new choice counts twice
//! as much (LRFU's combined recency and frequency, Lee et al. 2001, in the form that SAT solvers keep their activities):
//! the order of the rest never changes by itself, so a sorted set holds it and each event costs O(log n).
//!
//! What this was chosen over: docs/performance.md, "Which expert to evict".

use std::collections::BTreeSet;
use std::ops::Range;

/// One routed expert of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExpertId {
    /// Its layer.
    pub layer: u32,
    /// Its number within the layer.
    pub expert: u32,
}

/// How much an expert is worth: by score, and of equal scores the one chosen longest ago is worth least.
///
/// The first field holds the bits of a score, which order as the scores themselves do: none is negative.
type Worth = (u64, u64);

#[derive(Clone, Copy, Default)]
struct Entry {
    score: f64,
    /// Number of the last choice, counted over all experts.
    last_choice: u64,
    /// Whether it is in a slot.
    is_cached: bool,
    is_candidate: bool,
}

impl Entry {
    fn worth(&self) -> Worth {
        (self.score.to_bits(), self.last_choice)
    }
}

/// `2^exponent`, up to 2^1023.
const fn power_of_two(exponent: u64) -> f64 {
    f64::from_bits((1023 + exponent) << 52)
}

/// The order in which cached experts are given up.
///
/// A slot of one size class cannot hold an expert of another, so they compete within a class. Those that may
/// be given up are *candidates*; an expert that is leased, or being read, or in no slot, is none, and so is never chosen.
pub struct Policy {
    class_of_layer: Vec<usize>,
    experts: usize,
    half_life_tokens: usize,
    /// What one choice counts now: a power of two.
    weight: f64,
    /// Tokens since the weight last doubled.
    tokens: usize,
    choices: u64,
    entries: Vec<Entry>,
    /// For each layer its candidates, least worth first; the second number is the expert's.
    candidates: Vec<BTreeSet<(Worth, u32)>>,
    /// For each layer its experts in slots.
    cached: Vec<usize>,
}

impl Policy {
    /// Before the weight passes this, all scores are scaled down: far from what an f64 can hold.
    const WEIGHT_LIMIT: f64 = power_of_two(256);

    /// Tokens after which a choice should count half: as many as those whose experts fit in the slots. With few slots only
    /// what was chosen lately is worth one; with many, what is chosen often.
    pub fn half_life_tokens(slots: usize, experts_of_a_token: usize) -> usize {
        (slots / experts_of_a_token.max(1)).max(1)
    }

    /// For layers of `experts` experts each; `class_of_layer` gives each layer's size class. Panics if the half-life is 0.
    pub fn new(class_of_layer: Vec<usize>, experts: usize, half_life_tokens: usize) -> Policy {
        assert!(half_life_tokens > 0, "a half-life of 0 tokens");
        let layers = class_of_layer.len();
        Policy {
            entries: vec![Entry::default(); layers * experts],
            candidates: vec![BTreeSet::new(); layers],
            cached: vec![0; layers],
            class_of_layer,
            experts,
            half_life_tokens,
            weight: 1.0,
            tokens: 0,
            choices: 0,
        }
    }

    /// A row chose the expert, whether it was cached or not. `ahead_tokens` is the row's place in its session's rows of
    /// the pass, from 0, so that a prompt read in one pass leaves the scores that its tokens would have left one by one.
    pub fn chosen(&mut self, id: ExpertId, ahead_tokens: usize) {
        self.choices += 1;
        let halvings = ((self.tokens + ahead_tokens) / self.half_life_tokens).min(512);
        let (weight, last_choice) = (self.weight * power_of_two(halvings as u64), self.choices);
        self.change(id, |entry| {
            entry.score += weight;
            entry.last_choice = last_choice;
        });
    }

    /// The pass has ended; `tokens` is the largest number of rows that one session had in it (1 in decode).
    pub fn tokens_ended(&mut self, tokens: usize) {
        self.tokens += tokens;
        while self.tokens >= self.half_life_tokens {
            self.tokens -= self.half_life_tokens;
            self.weight *= 2.0;
            if self.weight >= Policy::WEIGHT_LIMIT {
                self.scale_down();
            }
        }
    }

    /// From now on the expert may be given up: its bytes are in a slot and nobody holds them.
    pub fn may_evict(&mut self, id: ExpertId) {
        self.change(id, |entry| (entry.is_cached, entry.is_candidate) = (true, true));
    }

    /// From now on it may not: it is leased.
    pub fn must_keep(&mut self, id: ExpertId) {
        self.change(id, |entry| entry.is_candidate = false);
    }

    /// Gives up an expert so that one of `layer` can have its slot, if there is a candidate: the one worth least of the
    /// layer that, of those in the same size class, would then have most slots. Of equal layers it is the one whose turn
    /// is farthest away, `layer` itself last. Layers in `spared` give up nothing.
    pub fn evict(&mut self, layer: usize, spared: Range<usize>) -> Option<ExpertId> {
        let layers = self.class_of_layer.len();
        let with_candidates = (0..layers).filter(|&other| {
            self.class_of_layer[other] == self.class_of_layer[layer]
                && !self.candidates[other].is_empty()
                && !spared.contains(&other)
        });
        let fullest = with_candidates.max_by_key(|&other| {
            let until_turn = if other == layer { layers } else { (other + layers - layer) % layers };
            (self.cached[other] + usize::from(other == layer), until_turn)
        })?;
        let (_, expert) = *self.candidates[fullest].first()?;
        let victim = ExpertId { layer: fullest as u32, expert };
        self.change(victim, |entry| (entry.is_cached, entry.is_candidate) = (false, false));
        Some(victim)
    }

    /// Changes an entry, its place among the candidates, and the count of its layer.
    fn change(&mut self, id: ExpertId, change: impl FnOnce(&mut Entry)) {
        assert!((id.expert as usize) < self.experts, "expert {} of {}", id.expert, self.experts);
        let layer = id.layer as usize;
        let entry = &mut self.entries[layer * self.experts + id.expert as usize];
        self.cached[layer] -= usize::from(entry.is_cached);
        if entry.is_candidate {
            self.candidates[layer].remove(&(entry.worth(), id.expert));
        }
        change(entry);
        self.cached[layer] += usize::from(entry.is_cached);
        if entry.is_candidate {
            self.candidates[layer].insert((entry.worth(), id.expert));
        }
    }

    /// Scales all scores down. They are multiplied by a power of two: those large enough to matter stay exact, the rest
    /// come near 0, and the sets are made anew for those.
    fn scale_down(&mut self) {
        self.weight /= Policy::WEIGHT_LIMIT;
        self.candidates.iter_mut().for_each(BTreeSet::clear);
        for (index, entry) in self.entries.iter_mut().enumerate() {
            entry.score /= Policy::WEIGHT_LIMIT;
            if entry.is_candidate {
                self.candidates[index / self.experts].insert((entry.worth(), (index % self.experts) as u32));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Event {
        Chosen(u32, u32, usize),
        Ended(usize),
        MayEvict(u32, u32),
        MustKeep(u32, u32),
        Evict(usize, Range<usize>),
    }

    const LAYERS: usize = 3;
    const EXPERTS: usize = 5;
    const CLASSES: [usize; LAYERS] = [0, 1, 0];

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let id = || (0..LAYERS as u32, 0..EXPERTS as u32);
        let event = prop_oneof![
            4 => (id(), 0..40usize).prop_map(|((l, e), ahead)| Event::Chosen(l, e, ahead)),
            // Choices less than 53 half-lives apart, so that an f64 holds their sum exactly.
            2 => (0..20usize).prop_map(Event::Ended),
            4 => id().prop_map(|(l, e)| Event::MayEvict(l, e)),
            1 => id().prop_map(|(l, e)| Event::MustKeep(l, e)),
            2 => (0..LAYERS, 0..=LAYERS, 0..=LAYERS).prop_map(|(l, start, end)| Event::Evict(l, start..end)),
        ];
        prop::collection::vec(event, 0..200)
    }

    /// The definition itself: every choice is remembered with its token, scores are summed when asked for.
    #[derive(Default)]
    struct Remembering {
        now: usize,
        choices: Vec<(ExpertId, usize)>,
        cached: Vec<ExpertId>,
        kept: Vec<ExpertId>,
    }

    impl Remembering {
        /// Choices in each half-life, the latest first: compared as digits, carried into base two.
        fn score(&self, id: ExpertId) -> Vec<u64> {
            let last = self.choices.iter().map(|&(_, token)| token / 16).max().unwrap_or(0);
            let mut digits = vec![0u64; last + 64];
            for &(_, token) in self.choices.iter().filter(|(chosen, _)| *chosen == id) {
                digits[token / 16] += 1;
            }
            for i in 0..digits.len() - 1 {
                digits[i + 1] += digits[i] / 2;
                digits[i] %= 2;
            }
            digits.reverse();
            digits
        }

        /// The fullest layer with a candidate, counting the one that asks as one fuller, and of equal ones the last before
        /// it in the circle of layers, itself first; there the least score, and of equal ones the oldest choice.
        fn evict(&mut self, layer: usize, spared: &Range<usize>) -> Option<ExpertId> {
            let may_go = |id: &ExpertId| !self.kept.contains(id) && !spared.contains(&(id.layer as usize));
            let candidates: Vec<ExpertId> = self.cached.iter().copied().filter(may_go).collect();
            let slots =
                |of: u32| self.cached.iter().filter(|id| id.layer == of).count() + usize::from(of as usize == layer);
            let circle = (0..LAYERS).map(|back| ((layer + LAYERS - back) % LAYERS) as u32);
            let with_candidates = circle
                .filter(|&of| CLASSES[of as usize] == CLASSES[layer] && candidates.iter().any(|id| id.layer == of));
            let fullest = with_candidates.reduce(|best, of| if slots(of) > slots(best) { of } else { best })?;
            let last = |id: ExpertId| self.choices.iter().rposition(|(chosen, _)| *chosen == id);
            let of_layer = candidates.into_iter().filter(|id| id.layer == fullest);
            let victim = of_layer.min_by_key(|&id| (self.score(id), last(id), id))?;
            self.cached.retain(|&id| id != victim);
            Some(victim)
        }
    }

    proptest! {
        #[test]
        fn victims_are_those_of_the_definition(events in events()) {
            let mut policy = Policy::new(CLASSES.to_vec(), EXPERTS, 16);
            let mut model = Remembering::default();
            for event in events {
                match event {
                    Event::Chosen(layer, expert, ahead) => {
                        let id = ExpertId { layer, expert };
                        policy.chosen(id, ahead);
                        model.choices.push((id, model.now + ahead));
                    }
                    Event::Ended(tokens) => {
                        policy.tokens_ended(tokens);
                        model.now += tokens;
                    }
                    Event::MayEvict(layer, expert) => {
                        let id = ExpertId { layer, expert };
                        policy.may_evict(id);
                        model.kept.retain(|&other| other != id);
                        if !model.cached.contains(&id) {
                            model.cached.push(id);
                        }
                    }
                    Event::MustKeep(layer, expert) => {
                        let id = ExpertId { layer, expert };
                        policy.must_keep(id);
                        model.kept.push(id);
                    }
                    Event::Evict(layer, spared) => {
                        let victim = model.evict(layer, &spared);
                        prop_assert_eq!(policy.evict(layer, spared), victim);
                    }
                }
            }
        }
    }

    #[test]
    fn scores_survive_any_number_of_tokens() {
        let id = |expert| ExpertId { layer: 0, expert };
        let mut policy = Policy::new(vec![0], 3, 16);
        let evict = |policy: &mut Policy| policy.evict(0, 0..0).map(|id| id.expert);
        for _ in 0..100 {
            (0..3).for_each(|expert| policy.may_evict(id(expert)));
            [0, 0, 1, 1, 1, 2].into_iter().for_each(|expert| policy.chosen(id(expert), 0));
            policy.tokens_ended(1000);
            assert_eq!(evict(&mut policy), Some(2));
        }
        policy.chosen(id(2), 1_000_000);
        policy.tokens_ended(1_000_000);
        policy.may_evict(id(2));
        assert_eq!([0; 4].map(|_| evict(&mut policy)), [Some(0), Some(1), Some(2), None]);
    }
}
