//! The expert store in host memory: all experts resident, or as many as there are slots.

use std::sync::Arc;

use crate::streamed::{Pending, Streamed};
use crate::{
    CacheCounts, Cancel, Checksums, ExpertBytes, ExpertExtents, Extent, Lease, Loaded, Prefetch, Reader, StoreError,
    read_all,
};

/// Routed experts in host memory.
pub struct HostStore {
    experts: Experts,
}

enum Experts {
    Resident(Vec<ResidentLayer>),
    Streamed(Arc<Streamed>),
}

/// The experts of a layer, all in memory.
struct ResidentLayer {
    extents: ExpertExtents,
    /// One part of all experts each.
    tensors: [Loaded; 3],
}

/// How often things happened since the store was made. What a pass did is the difference of two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreCounts {
    /// Demand, eviction and prefetch.
    pub cache: CacheCounts,
    /// Bytes of experts that were read.
    pub read_bytes: u64,
    /// Time in which computing stood still because an expert was not there.
    pub stall_us: u64,
}

impl StoreCounts {
    /// What happened since an earlier look at the same store.
    pub fn since(&self, before: &StoreCounts) -> StoreCounts {
        self.with(before, |now, before| now - before)
    }

    /// Adds what happened at other times.
    pub fn add(&mut self, other: &StoreCounts) {
        *self = self.with(other, |a, b| a + b);
    }

    fn with(&self, other: &StoreCounts, each: fn(u64, u64) -> u64) -> StoreCounts {
        let (a, b) = (&self.cache, &other.cache);
        StoreCounts {
            cache: CacheCounts {
                hits: each(a.hits, b.hits),
                misses: each(a.misses, b.misses),
                evictions: each(a.evictions, b.evictions),
                prefetched: each(a.prefetched, b.prefetched),
                prefetch_hits: each(a.prefetch_hits, b.prefetch_hits),
                prefetch_waste: each(a.prefetch_waste, b.prefetch_waste),
            },
            read_bytes: each(self.read_bytes, other.read_bytes),
            stall_us: each(self.stall_us, other.stall_us),
        }
    }
}

impl HostStore {
    /// Reads every expert of every layer. `loaded` is told of bytes as they arrive.
    ///
    /// # Errors
    /// Whatever reading the files gives, or that `cancel` came; nothing is kept then.
    pub fn resident(
        reader: &dyn Reader,
        layers: &[ExpertExtents],
        cancel: &Cancel,
        loaded: &mut dyn FnMut(u64),
    ) -> Result<HostStore, StoreError> {
        let tensors: Vec<Extent> = layers.iter().flat_map(ExpertExtents::tensors).collect();
        let mut memory = read_all(reader, &tensors, cancel, loaded)?.into_iter();
        let mut tensor = || memory.next().expect("every tensor was read");
        let layer =
            |extents: &ExpertExtents| ResidentLayer { extents: *extents, tensors: [tensor(), tensor(), tensor()] };
        Ok(HostStore { experts: Experts::Resident(layers.iter().map(layer).collect()) })
    }

    /// Keeps `slots_of_class` experts of each [size class](crate::size_classes) and reads the others when they are wanted.
    /// Every layer has the same number of experts, of which a token uses `experts_used`. Where there are `checksums`, an
    /// expert that does not fit its own is not handed out.
    ///
    /// # Errors
    /// [`StoreError::Memory`] if there is none for the slots.
    pub fn streamed(
        reader: Arc<dyn Reader>,
        layers: &[ExpertExtents],
        slots_of_class: &[usize],
        experts_used: usize,
        checksums: Option<Checksums>,
    ) -> Result<HostStore, StoreError> {
        let store = Streamed::new(reader, layers, slots_of_class, experts_used, checksums)?;
        Ok(HostStore { experts: Experts::Streamed(store) })
    }

    /// Asks for `experts` (distinct numbers) of `layer`. Loading, where it is needed, begins now; the leases come one
    /// by one from the returned value, each expert exactly once, in no order that a caller may rely on. `choices` says
    /// which row chose what, for the policy: an expert, and the row's place among its session's rows of the pass.
    pub fn lease<'s>(
        &'s self,
        layer: usize,
        experts: &[u32],
        choices: impl Iterator<Item = (u32, usize)>,
    ) -> HostLeases<'s> {
        let experts = experts.to_vec();
        HostLeases(match &self.experts {
            Experts::Resident(layers) => Leases::Resident(&layers[layer], experts.into_iter()),
            Experts::Streamed(store) => Leases::Streamed(store.demand(layer, experts, choices)),
        })
    }

    /// Experts of `layer` that will or may be leased later in this pass. Changes speed only.
    pub fn prefetch(&self, layer: usize, experts: &mut dyn Iterator<Item = u32>, prefetch: Prefetch) {
        if let Experts::Streamed(store) = &self.experts {
            store.prefetch(layer, experts, prefetch);
        }
    }

    /// A pass begins. It keeps what is returned, so that nothing is prefetched for it when it is no more.
    pub fn pass_begins(&self) -> Prefetching {
        Prefetching(match &self.experts {
            Experts::Resident(_) => None,
            Experts::Streamed(store) => Some(store.clone()),
        })
    }

    /// A pass has ended; `tokens` is the largest number of rows that one session had in it.
    pub fn pass_ended(&self, tokens: usize) {
        if let Experts::Streamed(store) = &self.experts {
            store.event(|cache| cache.tokens_ended(tokens));
        }
    }

    /// Keeps the memory of all experts or slots from being swapped out.
    ///
    /// # Errors
    /// [`StoreError::Lock`] if the system does not allow that.
    pub fn lock(&self) -> Result<(), StoreError> {
        match &self.experts {
            Experts::Resident(layers) => layers.iter().flat_map(|layer| &layer.tensors).try_for_each(Loaded::lock),
            Experts::Streamed(store) => store.lock_slots(),
        }
    }

    /// Whether experts are read while computing.
    pub fn is_streamed(&self) -> bool {
        matches!(self.experts, Experts::Streamed(_))
    }

    /// Whether what is read while computing is held against checksums.
    pub fn checks(&self) -> bool {
        matches!(&self.experts, Experts::Streamed(store) if store.checks())
    }

    /// Bytes of memory for expert weights: all of them, or the slots.
    pub fn memory_bytes(&self) -> u64 {
        match &self.experts {
            Experts::Resident(layers) => layers.iter().map(|layer| layer.extents.total_bytes()).sum(),
            Experts::Streamed(store) => store.memory_bytes(),
        }
    }

    /// How often things happened; all 0 where everything is resident.
    pub fn counts(&self) -> StoreCounts {
        match &self.experts {
            Experts::Resident(_) => StoreCounts::default(),
            Experts::Streamed(store) => store.counts(),
        }
    }
}

/// What is prefetched for a pass. Dropped, it is held no longer, and what has not begun will not be read: the pass has ended,
/// failed or was cancelled.
pub struct Prefetching(Option<Arc<Streamed>>);

impl Drop for Prefetching {
    fn drop(&mut self) {
        if let Some(store) = &self.0 {
            store.event(|cache| cache.end_prefetch());
        }
    }
}

impl ResidentLayer {
    fn expert(&self, expert: u32) -> ExpertBytes<'_> {
        let part = |part: usize| {
            let part_bytes = self.extents.parts[part].bytes as usize;
            &self.tensors[part][expert as usize * part_bytes..][..part_bytes]
        };
        ExpertBytes::fixed(expert, [part(0), part(1), part(2)])
    }
}

/// Experts asked for and not yet handed out.
pub struct HostLeases<'s>(Leases<'s>);

enum Leases<'s> {
    Resident(&'s ResidentLayer, std::vec::IntoIter<u32>),
    Streamed(Pending<'s>),
}

impl HostLeases<'_> {
    /// The next expert that is ready, or `None` when all were handed out; waits if none is. It must be given back before
    /// the next is asked for (the borrow says so), and so one slot is always enough.
    ///
    /// # Errors
    /// The read of an expert failed, or `cancel` came while waiting; its weights were not handed out.
    pub fn next_ready(&mut self, cancel: &Cancel) -> Option<Result<Lease<'_, ExpertBytes<'_>>, StoreError>> {
        match &mut self.0 {
            Leases::Resident(layer, experts) => {
                let expert = experts.next()?;
                Some(Ok(Lease::fixed(layer.expert(expert))))
            }
            Leases::Streamed(pending) => pending.next_ready(cancel),
        }
    }

    /// All experts that are ready by now, one at least; none when all were handed out. All of them must be given back before
    /// more are asked for (the borrow says so), as with [`HostLeases::next_ready`].
    ///
    /// # Errors
    /// As [`HostLeases::next_ready`]; no weights were handed out.
    pub fn all_ready(&mut self, cancel: &Cancel) -> Result<Vec<Lease<'_, ExpertBytes<'_>>>, StoreError> {
        match &mut self.0 {
            Leases::Resident(layer, experts) => Ok(experts.map(|expert| Lease::fixed(layer.expert(expert))).collect()),
            Leases::Streamed(pending) => pending.all_ready(cancel),
        }
    }
}
