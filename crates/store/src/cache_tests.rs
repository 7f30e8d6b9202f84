//! The cache against a simple model of what must never happen: random requests, reads that end in any order and fail,
//! leases, cancels and prefetch, over two size classes and any number of slots.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

fn id(layer: usize, expert: u32) -> ExpertId {
    ExpertId { layer: layer as u32, expert }
}

const LAYERS: usize = 4;
const CLASSES: [usize; LAYERS] = [0, 1, 0, 0];
const EXPERTS: usize = 12;

/// What a store around the cache would know: which slot holds what, who reads or leases it, who waits for what.
struct World {
    cache: Cache,
    slots: [usize; 2],
    holds: BTreeMap<u32, ExpertId>,
    reading: BTreeSet<u32>,
    leased: BTreeMap<ExpertId, u32>,
    /// Requests: what each still waits for.
    requests: Vec<Vec<ExpertId>>,
    most_reads: usize,
    /// The layer after the one demanded last in this pass.
    next_layer: u32,
    random: u64,
    events: usize,
}

impl World {
    fn new(slots: [usize; 2], most_reads: usize, seed: u64) -> World {
        World {
            cache: Cache::new(CLASSES.to_vec(), EXPERTS, &slots, most_reads, 3),
            slots,
            holds: BTreeMap::new(),
            reading: BTreeSet::new(),
            leased: BTreeMap::new(),
            requests: Vec::new(),
            most_reads,
            next_layer: 0,
            random: seed,
            events: 0,
        }
    }

    /// A number below `below`: xorshift64* (Vigna 2016).
    fn draw(&mut self, below: usize) -> usize {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % below
    }

    /// Carries out what the cache decides, and checks that it may.
    fn reads(&mut self) {
        self.events += 1;
        while let Some(SlotRead { slot, id, evicted }) = self.cache.next_read() {
            let class = CLASSES[id.layer as usize];
            let first = [0, self.slots[0]][class] as u32;
            assert!((first..first + self.slots[class] as u32).contains(&slot), "slot {slot} is not of class {class}");
            assert!(!self.leased.values().any(|&leased| leased == slot), "slot {slot} is leased");
            assert!(self.reading.insert(slot), "slot {slot} is being read into");
            assert!(self.reading.len() <= self.most_reads, "too many reads");
            assert_eq!(self.holds.insert(slot, id), evicted, "what slot {slot} held");
            let wanted = |id: &ExpertId| self.requests.iter().flatten().any(|wanted| wanted == id);
            assert!(!evicted.as_ref().is_some_and(wanted), "{evicted:?} was evicted while somebody waits for it");
            let comes_before = |other: &ExpertId| (self.next_layer..=id.layer).contains(&other.layer);
            assert!(
                wanted(&id) || !evicted.as_ref().is_some_and(comes_before),
                "{evicted:?} comes before {id:?}, which nobody waits for yet"
            );
            let places = self.holds.values().filter(|&&held| held == id).count();
            assert_eq!(places, 1, "{id:?} is in two slots");
        }
        assert!(self.holds.len() <= self.slots.iter().sum(), "more experts than slots");
    }

    fn demand(&mut self) {
        let (layer, count) = (self.draw(LAYERS), 1 + self.draw(EXPERTS));
        let mut experts: Vec<u32> = (0..EXPERTS as u32).collect();
        (0..count).for_each(|i| {
            let j = i + self.draw(EXPERTS - i);
            experts.swap(i, j);
        });
        let experts: Vec<ExpertId> = experts[..count].iter().map(|&expert| id(layer, expert)).collect();
        for (ahead, &id) in experts.iter().enumerate() {
            self.cache.chosen(id, ahead % 3);
        }
        experts.iter().for_each(|&id| self.cache.demand(id));
        self.requests.push(experts);
        self.cache.layer_demanded(layer);
        self.next_layer = layer as u32 + 1;
        let held = |expert: usize| self.cache.entries[layer * EXPERTS + expert].held;
        assert!(!(0..EXPERTS).any(held), "what was guessed for layer {layer} is settled");
    }

    fn end_read(&mut self) {
        let drawn = self.draw(self.reading.len().max(1));
        let Some(&slot) = self.reading.iter().nth(drawn) else { return };
        self.reading.remove(&slot);
        let succeeded = self.draw(20) > 0;
        let (id, wanted) = self.cache.read_ended(slot, succeeded);
        assert_eq!(id, self.holds[&slot]);
        let waited_for = self.requests.iter().flatten().any(|&wanted| wanted == id);
        assert!(if succeeded { wanted == waited_for } else { !wanted || waited_for }, "{id:?}");
        if !succeeded {
            self.holds.remove(&slot);
        }
    }

    /// The request leases something it waits for, if anything is there.
    fn lease(&mut self, request: usize) -> bool {
        for i in 0..self.requests[request].len() {
            let id = self.requests[request][i];
            self.cache.retry(id);
            if let Some(slot) = self.cache.lease(id) {
                assert!(self.holds[&slot] == id && !self.reading.contains(&slot), "{id:?} is not in slot {slot}");
                assert_eq!(self.leased.insert(id, slot), None, "{id:?} is leased twice");
                self.requests[request].remove(i);
                return true;
            }
        }
        false
    }

    fn release(&mut self) {
        let drawn = self.draw(self.leased.len().max(1));
        let Some((&id, _)) = self.leased.iter().nth(drawn) else { return };
        self.leased.remove(&id);
        self.cache.released(id);
    }

    fn give_up(&mut self) {
        if !self.requests.is_empty() {
            let request = self.draw(self.requests.len());
            let request = self.requests.swap_remove(request);
            request.into_iter().for_each(|id| self.cache.give_up(id));
        }
    }

    fn step(&mut self) {
        match self.draw(40) {
            0..3 if self.requests.len() < 3 => self.demand(),
            3..6 => {
                let (layer, expert) = (self.draw(LAYERS), self.draw(EXPERTS) as u32);
                let prefetch = [Prefetch::Certain, Prefetch::Guess][self.draw(2)];
                self.cache.prefetch(id(layer, expert), prefetch);
            }
            6..18 => self.end_read(),
            18..28 if !self.requests.is_empty() => {
                let request = self.draw(self.requests.len());
                self.lease(request);
            }
            28..37 => self.release(),
            37 if self.draw(4) == 0 => self.give_up(),
            38 => {
                let tokens = self.draw(5);
                self.cache.tokens_ended(tokens);
                self.next_layer = 0;
            }
            _ => {
                self.cache.end_prefetch();
                self.next_layer = 0;
            }
        }
        self.reads();
    }

    /// Whatever happened before, everything still wanted comes in the end, and nothing is lost.
    fn finish(&mut self) {
        for _ in 0..10_000 {
            self.requests.retain(|request| !request.is_empty());
            if self.requests.is_empty() && self.reading.is_empty() && self.leased.is_empty() {
                break;
            }
            self.end_read();
            self.reads();
            (0..self.requests.len()).for_each(|request| {
                self.lease(request);
            });
            self.release();
            self.reads();
        }
        assert!(self.requests.is_empty(), "never came: {:?}", self.requests);
        self.cache.end_prefetch();
        // With nothing wanted, every slot can be had: none has leaked.
        for class in 0..2 {
            let layer = CLASSES.iter().position(|&other| other == class).unwrap();
            let experts: Vec<ExpertId> = (0..self.slots[class].min(EXPERTS) as u32).map(|e| id(layer, e)).collect();
            experts.iter().for_each(|&id| self.cache.demand(id));
            self.requests.push(experts);
            let held = |world: &World| world.cache.entries.iter().any(|entry| entry.held);
            assert!(!held(self), "nothing is held between passes");
            while self.requests.iter().flatten().any(|id| !self.holds.values().any(|held| held == id)) {
                self.reads();
                self.end_read();
                let again: Vec<ExpertId> = self.requests.iter().flatten().copied().collect();
                again.into_iter().for_each(|id| {
                    self.cache.retry(id);
                });
            }
            while !self.reading.is_empty() {
                self.end_read();
            }
            self.requests.pop().unwrap().into_iter().for_each(|id| self.cache.give_up(id));
        }
        let counts = self.cache.counts();
        assert!(counts.prefetch_hits + counts.prefetch_waste <= counts.prefetched);
    }
}

/// Four million events; fewer slots than a request wants, and more.
#[test]
fn no_slot_is_lost_or_given_twice() {
    let (mut events, mut counts) = (0, Vec::new());
    for (seed, slots) in [[1, 1], [2, 1], [3, 2], [7, 5], [12, 12], [20, 3], [36, 12]].into_iter().enumerate() {
        for most_reads in [1, 2, 5] {
            for round in 0..10 {
                let mut world = World::new(slots, most_reads, 1 + seed as u64 * 100 + round);
                (0..20_000).for_each(|_| world.step());
                world.finish();
                events += world.events;
                counts.push(world.cache.counts());
            }
        }
    }
    assert!(events >= 4_000_000, "{events} events");
    assert!(counts.iter().all(|counts| counts.misses > 0));
    let sum = |of: fn(&CacheCounts) -> u64| counts.iter().map(of).sum::<u64>();
    let sums = [sum(|c| c.hits), sum(|c| c.evictions), sum(|c| c.prefetch_hits), sum(|c| c.prefetch_waste)];
    println!("{events} events; hits, evictions, prefetch hits and waste: {sums:?}");
    assert!(sums.iter().all(|&sum| sum > 1000), "{sums:?}");
}

/// A cache of one size class.
fn cache(slots: usize, most_reads: usize) -> Cache {
    Cache::new(vec![0, 0], 8, &[slots], most_reads, 16)
}

fn drain(cache: &mut Cache) -> Vec<SlotRead> {
    std::iter::from_fn(|| cache.next_read()).collect()
}

/// A slot was reused while a kernel still read it, and logits changed with the size of the cache. Here the slot of a leased
/// expert is no candidate. Put in by hand (`may_evict` called when a lease begins, `Place::Leased` accepted in `take_slot`
/// without its assertion), the bug fails this test, the random one above, and tests of the streaming store: there the
/// memory of that slot is in the lease, so that the store finds nothing to read into and stops.
#[test]
fn r384_no_slot_reused_in_flight() {
    let mut cache = cache(2, 2);
    [id(0, 1), id(0, 2)].into_iter().for_each(|id| cache.demand(id));
    assert_eq!(drain(&mut cache).len(), 2);
    let slots = [0, 1].map(|slot| cache.read_ended(slot, true).0);
    let leased = cache.lease(slots[0]).unwrap();
    // Everything else is wanted by others: the leased one and the wanted one stay.
    [id(1, 3), id(1, 4)].into_iter().for_each(|id| cache.demand(id));
    assert_eq!(drain(&mut cache), []);
    cache.give_up(slots[1]);
    let reads = drain(&mut cache);
    assert_eq!(reads.iter().map(|read| read.evicted).collect::<Vec<_>>(), [Some(slots[1])]);
    assert!(reads.iter().all(|read| read.slot != leased));
    // Nor is one that is being read.
    cache.prefetch(id(1, 5), Prefetch::Certain);
    assert_eq!(drain(&mut cache), []);
    cache.released(slots[0]);
    let reads = drain(&mut cache);
    assert_eq!(reads[0], SlotRead { slot: leased, id: id(1, 4), evicted: Some(slots[0]) });
}

#[test]
fn demand_goes_before_prefetch_and_prefetch_leaves_it_room() {
    let mut cache = cache(4, 4);
    (0..8).for_each(|expert| cache.prefetch(id(1, expert), Prefetch::Certain));
    // Half the slots and half the reads.
    assert_eq!(drain(&mut cache).len(), 2);
    cache.demand(id(0, 0));
    assert_eq!(drain(&mut cache).iter().map(|read| read.id).collect::<Vec<_>>(), [id(0, 0)]);
    // A prefetched expert that is demanded is a hit, though it is still on its way, and makes room for the next.
    cache.demand(id(1, 0));
    assert_eq!(drain(&mut cache).iter().map(|read| read.id).collect::<Vec<_>>(), [id(1, 2)]);
    let counts = cache.counts();
    assert_eq!((counts.hits, counts.misses, counts.prefetched, counts.prefetch_hits), (1, 1, 3, 1));
}

#[test]
fn one_slot_prefetches_nothing_and_serves_every_expert() {
    let mut cache = cache(1, 2);
    cache.prefetch(id(1, 0), Prefetch::Certain);
    cache.prefetch(id(1, 0), Prefetch::Guess);
    assert_eq!(drain(&mut cache), []);
    (0..8).for_each(|expert| cache.demand(id(0, expert)));
    for expert in 0..8 {
        assert_eq!(drain(&mut cache).iter().map(|read| read.id).collect::<Vec<_>>(), [id(0, expert)]);
        cache.read_ended(0, true);
        assert_eq!(cache.lease(id(0, expert)), Some(0));
        assert_eq!(drain(&mut cache), []);
        cache.released(id(0, expert));
    }
}

/// Three layers, four slots, which layers 0, 1 and 2 have one, one and two of.
fn full_cache() -> Cache {
    let mut cache = Cache::new(vec![0, 0, 0], 8, &[4], 8, 16);
    let cached = [id(0, 0), id(1, 0), id(2, 0), id(2, 1)];
    cached.iter().for_each(|&id| {
        cache.chosen(id, 0);
        cache.demand(id);
    });
    drain(&mut cache).iter().for_each(|read| {
        cache.read_ended(read.slot, true);
    });
    cached.iter().for_each(|&id| cache.give_up(id));
    cache
}

#[test]
fn prefetch_takes_no_slot_of_layers_that_come_before() {
    for prefetch in [Prefetch::Certain, Prefetch::Guess] {
        let evicted = |cache: &mut Cache, layer: usize| -> Vec<u32> {
            (4..8).for_each(|expert| cache.prefetch(id(layer, expert), prefetch));
            drain(cache).iter().map(|read| read.evicted.expect("the cache is full").layer).collect()
        };
        // The pass is before layer 0: what is read for layer 1 may push out only layer 2; for layer 2, nothing.
        assert_eq!(evicted(&mut full_cache(), 1), [2, 2]);
        assert_eq!(evicted(&mut full_cache(), 2), []);
        // After layer 1 has got what it wants, layers 0 and 1 are the farthest away.
        let mut cache = full_cache();
        cache.layer_demanded(1);
        assert_eq!(evicted(&mut cache, 2), [1, 0]);
    }
}

#[test]
fn wrong_guesses_are_let_go_when_the_layer_is_known() {
    let mut cache = full_cache();
    (0..5).for_each(|expert| cache.prefetch(id(1, expert), Prefetch::Guess));
    // One of the five is there, two are as many as may be held.
    let reads = drain(&mut cache);
    assert_eq!(reads.iter().map(|read| read.id).collect::<Vec<_>>(), [id(1, 1), id(1, 2)]);
    reads.iter().for_each(|read| {
        cache.read_ended(read.slot, true);
    });
    [id(1, 2), id(1, 7)].into_iter().for_each(|id| cache.demand(id));
    cache.layer_demanded(1);
    // The wrong guess gives its slot to what is wanted, being worth least of the fullest layer; what had not begun does not.
    let read = SlotRead { slot: reads[0].slot, id: id(1, 7), evicted: Some(id(1, 1)) };
    assert_eq!(drain(&mut cache), [read]);
    let counts = cache.counts();
    assert_eq!((counts.prefetched, counts.prefetch_hits, counts.prefetch_waste), (2, 1, 1));
}
