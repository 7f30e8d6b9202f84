//! Which expert is in which slot: decisions only. Events go in, reads to be made come out; no clock, no threads, no I/O, no
//! memory. The same events give the same decisions.
//!
//! Slots come in size classes; a layer belongs to one. An expert is absent, queued, being read, ready or leased. Reads
//! come out of [`Cache::next_read`], what is demanded first, as many at a time as the reader takes; what has not come out
//! can still be forgotten. A slot is given to another expert only if its own is ready and nobody wants it. Among those
//! [`Policy`] chooses.
//!
//! Prefetched experts are *held* until their layer demands its experts or the pass ends. At most half the slots of a class
//! hold such, and at most half the reads under way are for such, so that prefetch can slow demand down but never stop it:
//! with one slot nothing is prefetched. Nor does it take slots from layers that come before the one it is for.

use std::collections::VecDeque;

use crate::{ExpertId, Policy};

/// A read to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotRead {
    /// Into this slot, numbered over all classes.
    pub slot: u32,
    /// What to read.
    pub id: ExpertId,
    /// What was in the slot and is there no more.
    pub evicted: Option<ExpertId>,
}

/// How sure it is that a prefetched expert will be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefetch {
    /// It will: its number follows from a token id.
    Certain,
    /// It may. Read after what is certain.
    Guess,
}

/// How often things happened since the store was made. Every demand is a hit or a miss, and no
/// more than `misses + prefetched` experts were read: a miss that was given up before its read began was not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheCounts {
    /// Demanded experts that were in a slot, or on their way into one.
    pub hits: u64,
    /// Demanded experts that were not, and so had to be read unless they were given up before.
    pub misses: u64,
    /// Experts that left their slot for another.
    pub evictions: u64,
    /// Experts read before they were demanded.
    pub prefetched: u64,
    /// Those of them that were demanded afterwards.
    pub prefetch_hits: u64,
    /// Those of them that left their slot unused.
    pub prefetch_waste: u64,
}

/// What is waited for, in order of precedence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Queue {
    Demand,
    Certain,
    Guess,
}

const QUEUES: [Queue; 3] = [Queue::Demand, Queue::Certain, Queue::Guess];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
enum Place {
    #[default]
    Absent,
    Queued(Queue),
    Reading(u32),
    Ready(u32),
    Leased(u32),
}

#[derive(Clone, Copy, Default)]
struct Entry {
    place: Place,
    /// Requests that have asked for the expert and neither got it nor gave up.
    wants: u32,
    /// Prefetched in this pass and not demanded yet.
    held: bool,
    /// Prefetched and never demanded.
    unused: bool,
    /// Its read was begun for a request that still waits.
    read_for_want: bool,
}

struct Class {
    slots: usize,
    empty: Vec<u32>,
    queues: [VecDeque<ExpertId>; 3],
    held: usize,
}

/// The state of all slots.
pub struct Cache {
    policy: Policy,
    experts: usize,
    class_of_layer: Vec<usize>,
    classes: Vec<Class>,
    entries: Vec<Entry>,
    /// What each slot holds or will hold.
    occupants: Vec<Option<ExpertId>>,
    /// The layer that comes next in the pass.
    next_layer: usize,
    most_reads: usize,
    reading: usize,
    reading_held: usize,
    counts: CacheCounts,
}

impl Cache {
    /// An empty cache for layers of `experts` experts each. `class_of_layer` gives each layer's size class,
    /// `slots_of_class` how many slots each class has (their numbers follow each other, class by class), `most_reads` how
    /// many reads may be under way, `half_life_tokens` how long [`Policy`] remembers choices. Panics if a class has no slot
    /// or nothing may be read.
    pub fn new(
        class_of_layer: Vec<usize>,
        experts: usize,
        slots_of_class: &[usize],
        most_reads: usize,
        half_life_tokens: usize,
    ) -> Cache {
        assert!(slots_of_class.iter().all(|&slots| slots > 0) && most_reads > 0, "room for at least one expert");
        let mut slots = 0u32;
        let class = |&count: &usize| {
            let first = slots;
            slots += count as u32;
            Class { slots: count, empty: (first..slots).rev().collect(), queues: Default::default(), held: 0 }
        };
        Cache {
            classes: slots_of_class.iter().map(class).collect(),
            policy: Policy::new(class_of_layer.clone(), experts, half_life_tokens),
            experts,
            entries: vec![Entry::default(); class_of_layer.len() * experts],
            class_of_layer,
            occupants: vec![None; slots as usize],
            next_layer: 0,
            most_reads,
            reading: 0,
            reading_held: 0,
            counts: CacheCounts::default(),
        }
    }

    /// A row chose the expert; see [`Policy::chosen`].
    pub fn chosen(&mut self, id: ExpertId, ahead_tokens: usize) {
        self.policy.chosen(id, ahead_tokens);
    }

    /// A request wants the expert. It is kept from eviction until the request has leased and released it, or
    /// [gives it up](Cache::give_up).
    pub fn demand(&mut self, id: ExpertId) {
        self.entry(id).wants += 1;
        self.stop_holding(id, true);
        match self.entry(id).place {
            Place::Absent | Place::Queued(Queue::Certain | Queue::Guess) => {
                self.counts.misses += 1;
                self.enqueue(id, Queue::Demand);
            }
            Place::Queued(Queue::Demand) | Place::Reading(_) | Place::Leased(_) => self.counts.hits += 1,
            Place::Ready(_) => {
                self.counts.hits += 1;
                self.policy.must_keep(id);
            }
        }
    }

    /// Reads an expert again that is still wanted after its read had failed; whether it was such a one.
    pub fn retry(&mut self, id: ExpertId) -> bool {
        let failed = self.entry(id).wants > 0 && self.entry(id).place == Place::Absent;
        if failed {
            self.counts.misses += 1;
            self.enqueue(id, Queue::Demand);
        }
        failed
    }

    /// The expert will or may be wanted later in this pass.
    pub fn prefetch(&mut self, id: ExpertId, prefetch: Prefetch) {
        if self.entry(id).place == Place::Absent {
            self.enqueue(id, if prefetch == Prefetch::Certain { Queue::Certain } else { Queue::Guess });
        }
    }

    /// A layer has demanded all that it wants in this pass. What else was prefetched for it was a wrong guess.
    pub fn layer_demanded(&mut self, layer: usize) {
        self.next_layer = layer + 1;
        for expert in 0..self.experts as u32 {
            let id = ExpertId { layer: layer as u32, expert };
            match self.entry(id).place {
                Place::Queued(Queue::Certain | Queue::Guess) => self.entry(id).place = Place::Absent,
                _ => self.stop_holding(id, false),
            }
        }
    }

    /// A request that wanted the expert and has not leased it wants it no more.
    pub fn give_up(&mut self, id: ExpertId) {
        let entry = self.entry(id);
        entry.wants -= 1;
        if entry.wants > 0 {
            return;
        }
        match entry.place {
            Place::Queued(Queue::Demand) => entry.place = Place::Absent,
            Place::Reading(_) => entry.read_for_want = false,
            Place::Ready(_) => self.policy.may_evict(id),
            _ => {}
        }
    }

    /// Whether the expert is in a slot, leased or not.
    pub fn is_ready(&self, id: ExpertId) -> bool {
        let entry = &self.entries[id.layer as usize * self.experts + id.expert as usize];
        matches!(entry.place, Place::Ready(_) | Place::Leased(_))
    }

    /// Leases a wanted expert if it is ready; its slot. Panics if nobody wants it.
    pub fn lease(&mut self, id: ExpertId) -> Option<u32> {
        let entry = self.entry(id);
        assert!(entry.wants > 0, "{id:?} is leased by who did not demand it");
        let Place::Ready(slot) = entry.place else { return None };
        entry.place = Place::Leased(slot);
        Some(slot)
    }

    /// A lease has ended, and with it one request's want. Panics if the expert is not leased.
    pub fn released(&mut self, id: ExpertId) {
        let entry = self.entry(id);
        let Place::Leased(slot) = entry.place else { panic!("{id:?} is released but was not leased") };
        entry.place = Place::Ready(slot);
        self.give_up(id);
    }

    /// The read into `slot` has ended; the expert it was for, and whether somebody waits for its result. After a failure
    /// the slot is empty. A read that failed and was begun before anybody who waits now had asked is made again: an error
    /// belongs to the request in whose time it began.
    pub fn read_ended(&mut self, slot: u32, succeeded: bool) -> (ExpertId, bool) {
        let id = self.occupants[slot as usize].expect("a slot that is read into has an occupant");
        assert_eq!(self.entry(id).place, Place::Reading(slot), "{id:?} was not being read");
        self.reading -= 1;
        self.reading_held -= usize::from(self.entry(id).held);
        let (wanted, held) = (self.entry(id).wants > 0, self.entry(id).held);
        if succeeded {
            self.entry(id).place = Place::Ready(slot);
            if !wanted && !held {
                self.policy.may_evict(id);
            }
        } else {
            self.entry(id).place = Place::Absent;
            self.stop_holding(id, false);
            self.entry(id).unused = false;
            self.occupants[slot as usize] = None;
            self.class(id).empty.push(slot);
            if !self.entry(id).read_for_want {
                self.retry(id);
                return (id, false);
            }
        }
        (id, wanted)
    }

    /// Nothing that was prefetched is held any longer, and nothing that has not begun will be: a pass begins or has ended.
    pub fn end_prefetch(&mut self) {
        self.next_layer = 0;
        for class in 0..self.classes.len() {
            for queue in [Queue::Certain, Queue::Guess] {
                for id in std::mem::take(&mut self.classes[class].queues[queue as usize]) {
                    if self.entry(id).place == Place::Queued(queue) {
                        self.entry(id).place = Place::Absent;
                    }
                }
            }
        }
        if self.classes.iter().any(|class| class.held > 0) {
            let held = self.occupants.clone().into_iter().flatten();
            held.for_each(|id| self.stop_holding(id, false));
        }
    }

    /// A pass has ended; see [`Policy::tokens_ended`].
    pub fn tokens_ended(&mut self, tokens: usize) {
        self.policy.tokens_ended(tokens);
        self.end_prefetch();
    }

    /// The next read to be made, if one may be made now. To be called after every event until it gives nothing.
    pub fn next_read(&mut self) -> Option<SlotRead> {
        QUEUES.into_iter().find_map(|queue| (0..self.classes.len()).find_map(|class| self.next_of(class, queue)))
    }

    /// How often things happened.
    pub fn counts(&self) -> CacheCounts {
        self.counts
    }

    fn next_of(&mut self, class: usize, queue: Queue) -> Option<SlotRead> {
        let id = self.first_waiting(class, queue)?;
        let prefetch = queue != Queue::Demand;
        let full = self.reading >= self.most_reads || prefetch && self.reading_held >= self.most_reads / 2;
        if full || prefetch && self.classes[class].held >= self.classes[class].slots / 2 {
            return None;
        }
        let (slot, evicted) = self.take_slot(id, class, queue)?;
        self.classes[class].queues[queue as usize].pop_front();
        self.occupants[slot as usize] = Some(id);
        self.reading += 1;
        let entry = self.entry(id);
        entry.place = Place::Reading(slot);
        entry.read_for_want = !prefetch;
        if prefetch {
            (entry.held, entry.unused) = (true, true);
            self.reading_held += 1;
            self.classes[class].held += 1;
            self.counts.prefetched += 1;
        }
        Some(SlotRead { slot, id, evicted })
    }

    /// The first of a queue that still waits there; those before it, which were given up or moved, are dropped.
    fn first_waiting(&mut self, class: usize, queue: Queue) -> Option<ExpertId> {
        loop {
            let id = *self.classes[class].queues[queue as usize].front()?;
            if self.entry(id).place == Place::Queued(queue) {
                return Some(id);
            }
            self.classes[class].queues[queue as usize].pop_front();
        }
    }

    /// A slot to read `id` into, and what had to leave it.
    fn take_slot(&mut self, id: ExpertId, class: usize, queue: Queue) -> Option<(u32, Option<ExpertId>)> {
        if let Some(slot) = self.classes[class].empty.pop() {
            return Some((slot, None));
        }
        let layer = id.layer as usize;
        let spared = if queue == Queue::Demand { 0..0 } else { self.next_layer..layer + 1 };
        let victim = self.policy.evict(layer, spared)?;
        let entry = self.entry(victim);
        let Place::Ready(slot) = entry.place else { panic!("{victim:?} is to be evicted but is not ready") };
        assert!(entry.wants == 0 && !entry.held, "{victim:?} is to be evicted but is wanted");
        entry.place = Place::Absent;
        let unused = std::mem::take(&mut entry.unused);
        self.counts.evictions += 1;
        self.counts.prefetch_waste += u64::from(unused);
        Some((slot, Some(victim)))
    }

    fn enqueue(&mut self, id: ExpertId, queue: Queue) {
        self.entry(id).place = Place::Queued(queue);
        self.class(id).queues[queue as usize].push_back(id);
    }

    /// A prefetched expert is held no longer, because it is demanded or because its time is over.
    fn stop_holding(&mut self, id: ExpertId, demanded: bool) {
        let entry = self.entry(id);
        if demanded && std::mem::take(&mut entry.unused) {
            self.counts.prefetch_hits += 1;
        }
        let entry = self.entry(id);
        if !std::mem::take(&mut entry.held) {
            return;
        }
        match entry.place {
            Place::Reading(_) => self.reading_held -= 1,
            Place::Ready(_) if entry.wants == 0 => self.policy.may_evict(id),
            _ => {}
        }
        self.class(id).held -= 1;
    }

    fn entry(&mut self, id: ExpertId) -> &mut Entry {
        assert!((id.expert as usize) < self.experts, "expert {} of {}", id.expert, self.experts);
        &mut self.entries[id.layer as usize * self.experts + id.expert as usize]
    }

    fn class(&mut self, id: ExpertId) -> &mut Class {
        &mut self.classes[self.class_of_layer[id.layer as usize]]
    }
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
