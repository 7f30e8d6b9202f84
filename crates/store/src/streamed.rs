//! The streaming expert store: the cache's decisions carried out on memory, with a reader.
//!
//! A slot's memory *moves*. Idle, it is in the table here; being read, it is in the requests, cut into one piece for each;
//! leased, it is in the lease. What is not here cannot be given to anybody else, whatever the cache decides.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak, mpsc};
use std::time::{Duration, Instant};

use crate::cache::{Cache, Prefetch, SlotRead};
use crate::lease::{Home, SlotMemory};
use crate::reader::{AbortOnPanic, Client, Completion, Read};
use crate::{
    AlignedBytes, Cancel, Checksums, ExpertBytes, ExpertExtents, ExpertId, Lease, Policy, Reader, StoreCounts,
    StoreError,
};

/// How often a wait looks for a cancel.
const PATIENCE: Duration = Duration::from_millis(50);

/// Experts under way at the same time: one keeps the disk busy while the other ends. With more, all experts of a layer
/// come at the end together, and nothing can be computed before (docs/performance.md, "Experts under way at once").
const MOST_EXPERTS: usize = 2;

/// Most reads of one expert, which has three parts.
const EXPERT_READS: usize = 3;

/// Layers whose experts can use the same slots: each layer's class, and the bytes of a slot of each class.
pub fn size_classes(layers: &[ExpertExtents]) -> (Vec<usize>, Vec<usize>) {
    let mut slot_bytes: Vec<usize> = Vec::new();
    let class = |layer: &ExpertExtents| {
        let bytes = layer.slot_bytes();
        slot_bytes.iter().position(|&other| other == bytes).unwrap_or_else(|| {
            slot_bytes.push(bytes);
            slot_bytes.len() - 1
        })
    };
    (layers.iter().map(class).collect(), slot_bytes)
}

/// Bytes of memory for so many slots of each [size class](size_classes).
pub fn slots_bytes(layers: &[ExpertExtents], slots_of_class: &[usize]) -> u64 {
    let (_, slot_bytes) = size_classes(layers);
    slot_bytes.iter().zip(slots_of_class).map(|(&bytes, &slots)| bytes as u64 * slots as u64).sum()
}

/// A store with slots.
pub(crate) struct Streamed {
    layers: Vec<ExpertExtents>,
    reader: Arc<dyn Reader>,
    checker: Option<Checker>,
    memory_bytes: u64,
    state: Mutex<State>,
    changed: Condvar,
    this: Weak<Streamed>,
}

struct State {
    cache: Cache,
    slots: Vec<Slot>,
    /// Why reads failed that somebody waits for.
    errors: HashMap<ExpertId, StoreError>,
    read_bytes: u64,
    stall: Duration,
}

/// Where a slot's memory is.
enum Slot {
    Idle(AlignedBytes),
    /// In `left` reads; the pieces that have come back are here.
    Reading {
        id: ExpertId,
        pieces: Vec<Option<AlignedBytes>>,
        left: usize,
        error: Option<StoreError>,
    },
    Leased,
}

impl Streamed {
    pub(crate) fn new(
        reader: Arc<dyn Reader>,
        layers: &[ExpertExtents],
        slots_of_class: &[usize],
        experts_used: usize,
        checksums: Option<Checksums>,
    ) -> Result<Arc<Streamed>, StoreError> {
        let (class_of_layer, slot_bytes) = size_classes(layers);
        assert_eq!(slot_bytes.len(), slots_of_class.len(), "a number of slots for each size class");
        let experts = layers.first().map_or(0, |layer| layer.experts);
        assert!(layers.iter().all(|layer| layer.experts == experts), "layers of the same number of experts");
        let (mut slots, mut memory_bytes) = (Vec::new(), 0);
        for (&bytes, &count) in slot_bytes.iter().zip(slots_of_class) {
            let mut slab = AlignedBytes::zeroed(bytes * count)?;
            memory_bytes += slab.len() as u64;
            for _ in 0..count {
                let rest = slab.split_off(bytes);
                slots.push(Slot::Idle(std::mem::replace(&mut slab, rest)));
            }
        }
        // A reader for fewer reads is given one expert, so that all that it is given begins.
        let most_experts = (reader.in_flight() / EXPERT_READS).clamp(1, MOST_EXPERTS);
        let half_life_tokens = Policy::half_life_tokens(slots.len(), layers.len() * experts_used);
        let cache = Cache::new(class_of_layer, experts, slots_of_class, most_experts, half_life_tokens);
        let state = State { cache, slots, errors: HashMap::new(), read_bytes: 0, stall: Duration::ZERO };
        let (layers, state) = (layers.to_vec(), Mutex::new(state));
        let (checker, unchecked) = match checksums {
            Some(checksums) => {
                let (sender, unchecked) = mpsc::channel();
                (Some(Checker { checksums, sender }), Some(unchecked))
            }
            None => (None, None),
        };
        let store = Arc::new_cyclic(|this| Streamed {
            layers,
            reader,
            checker,
            memory_bytes,
            state,
            changed: Condvar::new(),
            this: this.clone(),
        });
        if let Some(unchecked) = unchecked {
            let this = store.this.clone();
            let thread = std::thread::Builder::new().name("infall-check".into());
            thread.spawn(move || check_reads(&this, &unchecked)).map_err(|cause| StoreError::Thread { cause })?;
        }
        Ok(store)
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    pub(crate) fn checks(&self) -> bool {
        self.checker.is_some()
    }

    /// Keeps the slots that are idle from being swapped out: all of them, before the first pass.
    pub(crate) fn lock_slots(&self) -> Result<(), StoreError> {
        self.lock().slots.iter().try_for_each(|slot| match slot {
            Slot::Idle(memory) => memory.lock(),
            Slot::Reading { .. } | Slot::Leased => Ok(()),
        })
    }

    pub(crate) fn counts(&self) -> StoreCounts {
        let state = self.lock();
        let stall_us = state.stall.as_micros() as u64;
        StoreCounts { cache: state.cache.counts(), read_bytes: state.read_bytes, stall_us }
    }

    pub(crate) fn prefetch(&self, layer: usize, experts: &mut dyn Iterator<Item = u32>, prefetch: Prefetch) {
        self.event(|cache| experts.for_each(|expert| cache.prefetch(id(layer, expert), prefetch)));
    }

    pub(crate) fn demand(
        &self,
        layer: usize,
        experts: Vec<u32>,
        choices: impl Iterator<Item = (u32, usize)>,
    ) -> Pending<'_> {
        self.event(|cache| {
            choices.for_each(|(expert, ahead_tokens)| cache.chosen(id(layer, expert), ahead_tokens));
            experts.iter().for_each(|&expert| cache.demand(id(layer, expert)));
            cache.layer_demanded(layer);
        });
        Pending { store: self, layer, experts }
    }

    /// Tells the cache something, and starts the reads that it wants made now.
    pub(crate) fn event<T>(&self, event: impl FnOnce(&mut Cache) -> T) -> T {
        let mut state = self.lock();
        let result = event(&mut state.cache);
        self.start_reads(state);
        result
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads are submitted when the lock is released: submitting can take the system a while.
    fn start_reads(&self, mut state: MutexGuard<'_, State>) {
        let mut reads = Vec::new();
        while let Some(read) = state.cache.next_read() {
            self.cut(&mut state, read, &mut reads);
        }
        drop(state);
        reads.into_iter().for_each(|read| self.reader.submit(read));
    }

    /// Moves a slot's memory into the reads that fill it.
    fn cut(&self, state: &mut State, SlotRead { slot, id, .. }: SlotRead, reads: &mut Vec<Read>) {
        let reading = Slot::Reading { id, pieces: Vec::new(), left: 0, error: None };
        let taken = std::mem::replace(&mut state.slots[slot as usize], reading);
        let Slot::Idle(mut memory) = taken else {
            panic!("slot {slot} is to be read into but its memory is elsewhere")
        };
        let Slot::Reading { pieces, left, .. } = &mut state.slots[slot as usize] else { unreachable!("just set") };
        for extent in self.layers[id.layer as usize].reads(id.expert) {
            let rest = memory.split_off(extent.cover_bytes());
            let piece = std::mem::replace(&mut memory, rest);
            let read_id = u64::from(slot) << 8 | pieces.len() as u64;
            reads.push(Read { id: read_id, extent, memory: piece, client: self.this.clone() });
            pieces.push(None);
            *left += 1;
        }
        // What the expert, by its place in the file, does not reach.
        pieces.push(Some(memory));
    }

    /// Whether a read brought the right bytes. Nothing is locked meanwhile: it takes a while.
    fn check(&self, checksums: &Checksums, read_id: u64, memory: &[u8]) -> Result<(), StoreError> {
        let (slot, read) = slot_and_read(read_id);
        let Slot::Reading { id, .. } = self.lock().slots[slot as usize] else {
            panic!("a read came back for slot {slot}, which was not being read")
        };
        checksums.check(id, &self.layers[id.layer as usize], read, memory)
    }

    /// A read has come back, and was checked if that can be. The last one of a slot makes it whole again.
    fn read_came(&self, Completion { id, extent, memory, result }: Completion) {
        let (slot, piece) = slot_and_read(id);
        let mut state = self.lock();
        let Slot::Reading { pieces, left, error, .. } = &mut state.slots[slot as usize] else {
            panic!("a read came back for slot {slot}, which was not being read")
        };
        pieces[piece] = Some(memory);
        *left -= 1;
        let read_bytes = if result.is_ok() { extent.bytes } else { 0 };
        *error = error.take().or(result.err());
        let ended = *left == 0;
        state.read_bytes += read_bytes;
        if ended {
            state.read_ended(slot);
            self.start_reads(state);
            self.changed.notify_all();
        }
    }
}

/// Checksums, and the way to the thread that holds reads against them: neither computing nor a reader waits for that.
struct Checker {
    checksums: Checksums,
    sender: mpsc::Sender<Completion>,
}

/// The checking thread: read after read until the store is gone.
fn check_reads(store: &Weak<Streamed>, unchecked: &mpsc::Receiver<Completion>) {
    let _guard = AbortOnPanic;
    for mut completion in unchecked {
        let Some(store) = store.upgrade() else { return };
        if let Some(Checker { checksums, .. }) = &store.checker {
            completion.result = store.check(checksums, completion.id, &completion.memory);
        }
        store.read_came(completion);
    }
}

/// What a read's number says: its slot, and which of the expert's reads it is.
fn slot_and_read(id: u64) -> (u32, usize) {
    ((id >> 8) as u32, (id & 0xff) as usize)
}

impl Client for Streamed {
    fn done(&self, completion: Completion) {
        match &self.checker {
            Some(checker) if completion.result.is_ok() => {
                checker.sender.send(completion).expect("the checking thread lives as long as the store");
            }
            _ => self.read_came(completion),
        }
    }
}

impl State {
    fn read_ended(&mut self, slot: u32) {
        let Slot::Reading { pieces, error, .. } = std::mem::replace(&mut self.slots[slot as usize], Slot::Leased)
        else {
            unreachable!("the caller saw that it was being read")
        };
        let memory = pieces.into_iter().map(|piece| piece.expect("all pieces are back")).reduce(|mut whole, next| {
            whole.join(next);
            whole
        });
        self.slots[slot as usize] = Slot::Idle(memory.expect("an expert has at least one part"));
        let (id, wanted) = self.cache.read_ended(slot, error.is_none());
        if let (Some(error), true) = (error, wanted) {
            self.errors.insert(id, error);
        }
    }
}

impl<'s> Home<ExpertBytes<'s>> for Streamed {
    fn take_back(&self, expert: ExpertBytes<'s>) {
        let id_expert = expert.expert();
        let Some(SlotMemory { slot, layer, memory, .. }) = expert.into_slot() else { return };
        let mut state = self.lock();
        state.slots[slot as usize] = Slot::Idle(memory);
        state.cache.released(ExpertId { layer, expert: id_expert });
        self.start_reads(state);
        self.changed.notify_all();
    }
}

fn id(layer: usize, expert: u32) -> ExpertId {
    ExpertId { layer: layer as u32, expert }
}

/// Experts demanded and not yet handed out. Dropping it gives up the rest.
pub(crate) struct Pending<'s> {
    store: &'s Streamed,
    layer: usize,
    experts: Vec<u32>,
}

impl Pending<'_> {
    pub(crate) fn next_ready(&mut self, cancel: &Cancel) -> Option<Result<Lease<'_, ExpertBytes<'_>>, StoreError>> {
        let store: &Streamed = self.store;
        Some(self.wait_for_next(cancel)?.map(|expert| Lease::new(expert, store)))
    }

    pub(crate) fn all_ready(&mut self, cancel: &Cancel) -> Result<Vec<Lease<'_, ExpertBytes<'_>>>, StoreError> {
        let store: &Streamed = self.store;
        let mut leases = Vec::new();
        let mut next = self.wait_for_next(cancel);
        while let Some(expert) = next {
            leases.push(Lease::new(expert?, store));
            next = self.take();
        }
        Ok(leases)
    }

    /// The next expert that is ready, or why it will not come; `None` when all were handed out. Waits if none is.
    fn wait_for_next<'t>(&mut self, cancel: &Cancel) -> Option<Result<ExpertBytes<'t>, StoreError>> {
        if self.experts.is_empty() {
            return None;
        }
        let mut taken = self.take();
        if taken.is_none() {
            let began = Instant::now();
            while taken.is_none() {
                if let Err(cancelled) = cancel.check() {
                    return Some(Err(cancelled.into()));
                }
                taken = self.wait();
            }
            self.store.lock().stall += began.elapsed();
        }
        taken
    }

    /// What is there by now: one of the pending experts, or why one will not come.
    fn take<'t>(&mut self) -> Option<Result<ExpertBytes<'t>, StoreError>> {
        self.take_from(&mut self.store.lock())
    }

    fn take_from<'t>(&mut self, state: &mut State) -> Option<Result<ExpertBytes<'t>, StoreError>> {
        for (i, &expert) in self.experts.iter().enumerate() {
            let id = id(self.layer, expert);
            if let Some(error) = state.errors.remove(&id) {
                return Some(Err(error));
            }
            let Some(slot) = state.cache.lease(id) else { continue };
            let Slot::Idle(memory) = std::mem::replace(&mut state.slots[slot as usize], Slot::Leased) else {
                panic!("slot {slot} is ready but its memory is elsewhere")
            };
            self.experts.remove(i);
            let parts = self.store.layers[self.layer].places(expert);
            return Some(Ok(ExpertBytes::in_slot(expert, SlotMemory { slot, layer: id.layer, memory, parts })));
        }
        None
    }

    /// Waits until something changed, or for a while.
    fn wait<'t>(&mut self) -> Option<Result<ExpertBytes<'t>, StoreError>> {
        if self.store.reader.pump() {
            return self.take();
        }
        let mut state = self.store.lock();
        if let Some(taken) = self.take_from(&mut state) {
            return Some(taken);
        }
        // The error of an expert that two requests wait for goes to one of them; the other reads it again.
        let retried = self.experts.iter().filter(|&&expert| state.cache.retry(id(self.layer, expert))).count();
        match retried {
            0 => drop(self.store.changed.wait_timeout(state, PATIENCE)),
            _ => self.store.start_reads(state),
        }
        None
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        let (layer, experts) = (self.layer, std::mem::take(&mut self.experts));
        let mut state = self.store.lock();
        for expert in experts {
            state.cache.give_up(id(layer, expert));
            state.errors.remove(&id(layer, expert));
        }
        self.store.start_reads(state);
    }
}
