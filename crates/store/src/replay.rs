//! Recorded routes run through a cache that holds nothing: how often an expert would have been there.
//!
//! The order is the store's. The experts that a pass's rows chose in a layer are wanted together: those in a slot are
//! used first, then the others are read one at a time, each into the slot of an expert that nobody waits for.

use std::collections::{BTreeSet, HashMap};

use crate::{ExpertId, Policy, TraceHeader, TracePass};

/// How victims are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eviction {
    /// The expert used longest ago.
    LeastRecent,
    /// What the store does: [`Policy`] with the half-life that goes with the slots.
    Store,
    /// [`Policy`] with another half-life in tokens.
    Decay(usize),
    /// The expert whose next use is farthest away, be it the one just read: nothing that is read on demand reads less
    /// (Belady 1966). It needs to know the future, and to use an expert without a slot of its own.
    Farthest,
}

/// Experts wanted and found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Rows of the passes.
    pub rows: u64,
    /// Experts wanted, each once in a pass and layer.
    pub wanted: u64,
    /// Of those, the ones that were in a slot.
    pub hits: u64,
    /// Bytes of the others, which were read.
    pub read_bytes: u64,
}

impl Counts {
    /// Hits of what was wanted, 0 to 1; 1 if nothing was wanted.
    pub fn hit_rate(&self) -> f64 {
        if self.wanted == 0 { 1.0 } else { self.hits as f64 / self.wanted as f64 }
    }

    /// Bytes read for each row.
    pub fn bytes_per_token(&self) -> f64 {
        self.read_bytes as f64 / self.rows.max(1) as f64
    }
}

/// What a replay found, decoded tokens and parts of prompts apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Passes of single tokens.
    pub decode: Counts,
    /// Passes with a part of a prompt.
    pub prefill: Counts,
}

/// Experts that one pass wants of one layer, and who chose them.
struct Step {
    pass: usize,
    layer: u32,
    /// Ascending, each once.
    experts: Vec<u32>,
    /// In the order of the rows: expert, and the row's place in its run.
    choices: Vec<(u32, usize)>,
}

/// A trace made ready to be replayed many times.
pub struct Replay {
    header: TraceHeader,
    steps: Vec<Step>,
    /// Rows of each pass; rows of its longest run; whether it is prefill.
    passes: Vec<(usize, usize, bool)>,
    /// For each step, and each of its experts, the next step that wants it; `usize::MAX` if none does.
    next_uses: Vec<Vec<usize>>,
}

impl Replay {
    /// Passes in the order in which they ran.
    pub fn new(header: TraceHeader, passes: &[TracePass]) -> Replay {
        let steps: Vec<Step> = passes.iter().enumerate().flat_map(|(i, pass)| steps(&header, i, pass)).collect();
        let mut next_uses = vec![Vec::new(); steps.len()];
        let mut seen: HashMap<(u32, u32), usize> = HashMap::new();
        for (i, step) in steps.iter().enumerate().rev() {
            let next = |&expert: &u32| seen.insert((step.layer, expert), i).unwrap_or(usize::MAX);
            next_uses[i] = step.experts.iter().map(next).collect();
        }
        let longest = |pass: &TracePass| pass.runs.iter().max().map_or(0, |&rows| rows as usize);
        let passes = passes.iter().map(|pass| (pass.rows(), longest(pass), pass.is_prefill())).collect();
        Replay { header, steps, passes, next_uses }
    }

    /// What the routes are of.
    pub fn header(&self) -> &TraceHeader {
        &self.header
    }

    /// Layers of experts of the same size share slots: the class of each layer, and the number of layers of each class.
    pub fn size_classes(&self) -> (Vec<usize>, Vec<usize>) {
        let (mut sizes, mut layers): (Vec<u64>, Vec<usize>) = (Vec::new(), Vec::new());
        let class = |&bytes: &u64| {
            let class = sizes.iter().position(|&size| size == bytes).unwrap_or_else(|| {
                sizes.push(bytes);
                layers.push(0);
                sizes.len() - 1
            });
            layers[class] += 1;
            class
        };
        (self.header.expert_bytes.iter().map(class).collect(), layers)
    }

    /// Runs all passes through an empty cache. `class_of_layer` says which layers share slots, `slots_of_class` how many
    /// they have. Panics if a class has none.
    pub fn run(&self, class_of_layer: &[usize], slots_of_class: &[usize], eviction: Eviction) -> Outcome {
        assert!(slots_of_class.iter().all(|&slots| slots > 0), "room for at least one expert");
        let (slots, of_a_token) = (slots_of_class.iter().sum(), self.header.layers() * self.header.experts_used);
        let eviction = match eviction {
            Eviction::Store => Eviction::Decay(Policy::half_life_tokens(slots, of_a_token)),
            other => other,
        };
        let mut order = Order::new(eviction, class_of_layer, self.header.experts);
        let mut empty = slots_of_class.to_vec();
        let mut cached = vec![false; self.header.layers() * self.header.experts];
        let index = |id: ExpertId| id.layer as usize * self.header.experts + id.expert as usize;
        let mut outcome = Outcome::default();
        for (i, step) in self.steps.iter().enumerate() {
            let (rows, longest, is_prefill) = self.passes[step.pass];
            let counts = if is_prefill { &mut outcome.prefill } else { &mut outcome.decode };
            let class = class_of_layer[step.layer as usize];
            let wanted = step
                .experts
                .iter()
                .zip(&self.next_uses[i])
                .map(|(&expert, &next)| Use { id: ExpertId { layer: step.layer, expert }, next });
            let (present, absent): (Vec<Use>, Vec<Use>) = wanted.partition(|one| cached[index(one.id)]);
            step.choices
                .iter()
                .for_each(|&(expert, ahead)| order.chosen(ExpertId { layer: step.layer, expert }, ahead));
            present.iter().for_each(|one| order.used(one));
            for one in &absent {
                let is_full = empty[class] == 0;
                empty[class] -= usize::from(!is_full);
                if is_full && eviction != Eviction::Farthest {
                    cached[index(order.evict(step.layer as usize))] = false;
                }
                cached[index(one.id)] = true;
                order.used(one);
                if is_full && eviction == Eviction::Farthest {
                    cached[index(order.evict(step.layer as usize))] = false;
                }
            }
            counts.wanted += step.experts.len() as u64;
            counts.hits += present.len() as u64;
            counts.read_bytes += absent.len() as u64 * self.header.expert_bytes[step.layer as usize];
            if self.steps.get(i + 1).is_none_or(|next| next.pass != step.pass) {
                counts.rows += rows as u64;
                order.tokens_ended(longest);
            }
        }
        outcome
    }
}

/// The steps of a pass, one a layer.
fn steps(header: &TraceHeader, index: usize, pass: &TracePass) -> impl Iterator<Item = Step> {
    let places: Vec<usize> = pass.runs.iter().flat_map(|&rows| 0..rows as usize).collect();
    let used = header.experts_used;
    pass.experts.chunks_exact((pass.rows() * used).max(1)).zip(0..).map(move |(experts, layer)| {
        let choices: Vec<(u32, usize)> =
            experts.iter().enumerate().map(|(i, &expert)| (u32::from(expert), places[i / used])).collect();
        let distinct: BTreeSet<u32> = choices.iter().map(|&(expert, _)| expert).collect();
        Step { pass: index, layer, experts: distinct.into_iter().collect(), choices }
    })
}

/// An expert that was just used.
struct Use {
    id: ExpertId,
    /// The step that wants it next.
    next: usize,
}

/// The order in which cached experts are given up.
enum Order {
    Decay(Policy),
    /// For each class its experts by a number, the smallest given up first; and the number of each.
    Sorted(Sorted),
}

/// Cached experts by a number, the smallest given up first.
struct Sorted {
    is_farthest: bool,
    uses: usize,
    class_of_layer: Vec<usize>,
    classes: Vec<BTreeSet<(usize, ExpertId)>>,
    keys: HashMap<ExpertId, usize>,
}

impl Sorted {
    fn used(&mut self, one: &Use) {
        self.uses += 1;
        let class = &mut self.classes[self.class_of_layer[one.id.layer as usize]];
        let key = if self.is_farthest { usize::MAX - one.next } else { self.uses };
        if let Some(old) = self.keys.insert(one.id, key) {
            class.remove(&(old, one.id));
        }
        class.insert((key, one.id));
    }

    fn evict(&mut self, class: usize) -> Option<ExpertId> {
        let (_, id) = self.classes[class].pop_first()?;
        self.keys.remove(&id);
        Some(id)
    }
}

impl Order {
    fn new(eviction: Eviction, class_of_layer: &[usize], experts: usize) -> Order {
        match eviction {
            Eviction::Decay(half_life) => Order::Decay(Policy::new(class_of_layer.to_vec(), experts, half_life)),
            _ => Order::Sorted(Sorted {
                is_farthest: eviction == Eviction::Farthest,
                uses: 0,
                class_of_layer: class_of_layer.to_vec(),
                classes: vec![BTreeSet::new(); class_of_layer.iter().max().map_or(0, |class| class + 1)],
                keys: HashMap::new(),
            }),
        }
    }

    fn chosen(&mut self, id: ExpertId, ahead: usize) {
        if let Order::Decay(policy) = self {
            policy.chosen(id, ahead);
        }
    }

    fn tokens_ended(&mut self, tokens: usize) {
        if let Order::Decay(policy) = self {
            policy.tokens_ended(tokens);
        }
    }

    /// An expert was used in its slot, and nobody holds it now.
    fn used(&mut self, one: &Use) {
        match self {
            Order::Decay(policy) => policy.may_evict(one.id),
            Order::Sorted(sorted) => sorted.used(one),
        }
    }

    /// Takes an expert out of its slot, so that one of `layer` can have it. Panics if there is none in a slot.
    fn evict(&mut self, layer: usize) -> ExpertId {
        let victim = match self {
            Order::Decay(policy) => policy.evict(layer, 0..0),
            Order::Sorted(sorted) => sorted.evict(sorted.class_of_layer[layer]),
        };
        victim.expect("every slot holds an expert")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn trace(experts: usize, used: usize, expert_bytes: &[u64], passes: Passes) -> Replay {
        let header = TraceHeader { identity: 0, experts, experts_used: used, expert_bytes: expert_bytes.to_vec() };
        let passes: Vec<TracePass> = passes.into_iter().map(|(runs, experts)| TracePass { runs, experts }).collect();
        Replay::new(header, &passes)
    }

    /// Rows of each run, and what they chose.
    type Passes = Vec<(Vec<u32>, Vec<u16>)>;

    /// Tiny traces of one or two layers; rows of a pass may choose the same expert.
    fn tiny() -> impl Strategy<Value = (usize, usize, Passes)> {
        (1usize..3, 2usize..5).prop_flat_map(|(layers, experts)| {
            let pass = (1u32..3).prop_flat_map(move |rows| {
                prop::collection::vec(0..experts as u16, layers * rows as usize)
                    .prop_map(move |choices| (vec![rows], choices))
            });
            (Just(layers), Just(experts), prop::collection::vec(pass, 1..9))
        })
    }

    /// Sets wanted one after the other, as bits; experts are numbered over all layers.
    fn sets(layers: usize, experts: usize, passes: &[(Vec<u32>, Vec<u16>)]) -> Vec<u32> {
        let of_layer = |rows: usize, choices: &[u16], layer: usize| {
            let choices = &choices[layer * rows..][..rows];
            choices.iter().fold(0, |set, &expert| set | 1 << (layer * experts + usize::from(expert)))
        };
        let pass = |(runs, choices): &(Vec<u32>, Vec<u16>)| {
            let rows = runs[0] as usize;
            (0..layers).map(|layer| of_layer(rows, choices, layer)).collect::<Vec<u32>>()
        };
        passes.iter().flat_map(pass).collect()
    }

    /// The fewest reads there can be: every content that the slots could have after a set is followed.
    fn fewest_reads(sets: &[u32], slots: u32) -> u64 {
        let mut states = HashMap::from([(0u32, 0u64)]);
        for &set in sets {
            let mut after: HashMap<u32, u64> = HashMap::new();
            for (&content, &reads) in &states {
                let (pool, missing) = (content | set, set & !content);
                // All subsets of what was there or wanted.
                let mut subset = pool;
                loop {
                    if subset.count_ones() <= slots {
                        let reads = reads + u64::from(missing.count_ones());
                        after.entry(subset).and_modify(|least| *least = reads.min(*least)).or_insert(reads);
                    }
                    if subset == 0 {
                        break;
                    }
                    subset = (subset - 1) & pool;
                }
            }
            states = after;
        }
        *states.values().min().unwrap()
    }

    /// LRU by a list, the latest last.
    fn least_recent_reads(sets: &[u32], slots: usize) -> u64 {
        let (mut list, mut reads): (Vec<u32>, u64) = (Vec::new(), 0);
        for &set in sets {
            let wanted: Vec<u32> = (0..32).filter(|i| set & 1 << i != 0).collect();
            let (present, absent): (Vec<u32>, Vec<u32>) = wanted.iter().partition(|id| list.contains(id));
            for id in present {
                list.retain(|&other| other != id);
                list.push(id);
            }
            for id in absent {
                if list.len() == slots {
                    list.remove(0);
                }
                list.push(id);
                reads += 1;
            }
        }
        reads
    }

    proptest! {
        #[test]
        fn farthest_reads_as_little_as_can_be((layers, experts, passes) in tiny(), slots in 1usize..6) {
            let sets = sets(layers, experts, &passes);
            let replay = trace(experts, 1, &vec![1; layers], passes);
            let outcome = replay.run(&vec![0; layers], &[slots], Eviction::Farthest);
            let reads = outcome.decode.read_bytes + outcome.prefill.read_bytes;
            prop_assert_eq!(reads, fewest_reads(&sets, slots as u32));
            for other in [Eviction::LeastRecent, Eviction::Store, Eviction::Decay(16)] {
                let outcome = replay.run(&vec![0; layers], &[slots], other);
                prop_assert!(outcome.decode.read_bytes + outcome.prefill.read_bytes >= reads);
            }
        }

        #[test]
        fn least_recent_is_the_list((layers, experts, passes) in tiny(), slots in 2usize..6) {
            let sets = sets(layers, experts, &passes);
            let replay = trace(experts, 1, &vec![1; layers], passes);
            let outcome = replay.run(&vec![0; layers], &[slots], Eviction::LeastRecent);
            let reads = outcome.decode.read_bytes + outcome.prefill.read_bytes;
            prop_assert_eq!(reads, least_recent_reads(&sets, slots));
        }
    }

    #[test]
    fn counts_are_kept_by_kind_and_class() {
        let passes = vec![(vec![2], vec![0, 1, 2, 2]), (vec![1], vec![1, 2]), (vec![1], vec![0, 2])];
        let replay = trace(3, 1, &[10, 100], passes);
        let (class_of_layer, layers) = replay.size_classes();
        assert_eq!((&class_of_layer[..], &layers[..]), (&[0, 1][..], &[1, 1][..]));
        let outcome = replay.run(&class_of_layer, &[3, 3], Eviction::Store);
        assert_eq!(outcome.prefill, Counts { rows: 2, wanted: 3, hits: 0, read_bytes: 120 });
        assert_eq!(outcome.decode, Counts { rows: 2, wanted: 4, hits: 4, read_bytes: 0 });
        let outcome = replay.run(&class_of_layer, &[1, 1], Eviction::LeastRecent);
        assert_eq!(outcome.decode, Counts { rows: 2, wanted: 4, hits: 3, read_bytes: 10 });
        assert_eq!((outcome.decode.hit_rate(), outcome.decode.bytes_per_token()), (0.75, 5.0));
    }
}
