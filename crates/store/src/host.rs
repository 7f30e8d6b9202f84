//! The expert store in host memory.

use std::collections::VecDeque;

use crate::{AlignedBytes, ExpertBytes, ExpertExtents, Extent, Lease, Source, StoreError};

struct Layer {
    expert_bytes: [usize; 3],
    parts: [AlignedBytes; 3],
}

/// Routed experts in host memory, all of them resident.
pub struct HostStore {
    layers: Vec<Layer>,
}

impl HostStore {
    /// Reads every expert of every layer. `loaded` is told the bytes of each tensor as it arrives.
    ///
    /// # Errors
    /// Whatever reading the files gives; nothing is kept then.
    pub fn resident(
        source: &Source,
        layers: &[ExpertExtents],
        loaded: &mut dyn FnMut(u64),
    ) -> Result<HostStore, StoreError> {
        let mut read = |extent: Extent| -> Result<AlignedBytes, StoreError> {
            let memory = source.read(extent)?;
            loaded(extent.bytes);
            Ok(memory)
        };
        let layers = layers.iter().map(|layer| {
            let [a, b, c] = layer.parts;
            Ok(Layer { expert_bytes: layer.expert_bytes(), parts: [read(a)?, read(b)?, read(c)?] })
        });
        Ok(HostStore { layers: layers.collect::<Result<_, StoreError>>()? })
    }

    /// Asks for `experts` (distinct numbers) of `layer`. Loading, where it is needed, begins now; the leases come one
    /// by one from the returned value, each expert exactly once, in no order that a caller may rely on.
    pub fn lease<'s>(&'s self, layer: usize, experts: &[u32]) -> HostLeases<'s> {
        let experts = VecDeque::from(experts.to_vec());
        HostLeases { layer: &self.layers[layer], experts }
    }

    /// Bytes of expert weights in memory.
    pub fn resident_bytes(&self) -> u64 {
        self.layers.iter().flat_map(|layer| &layer.parts).map(|part| part.len() as u64).sum()
    }
}

/// Experts asked for and not yet handed out.
pub struct HostLeases<'s> {
    layer: &'s Layer,
    experts: VecDeque<u32>,
}

impl HostLeases<'_> {
    /// The next expert that is ready, or `None` when all were handed out. It must be given back before the next is
    /// asked for (the borrow says so), and so one slot is always enough.
    ///
    /// # Errors
    /// The read of an expert failed; its weights were not handed out.
    pub fn next_ready(&mut self) -> Option<Result<Lease<'_, ExpertBytes<'_>>, StoreError>> {
        let expert = self.experts.pop_front()?;
        let slice = |part: usize| {
            let bytes = self.layer.expert_bytes[part];
            &self.layer.parts[part][expert as usize * bytes..][..bytes]
        };
        Some(Ok(Lease::new(ExpertBytes::new(expert, [slice(0), slice(1), slice(2)]))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_lease_shows_its_own_expert() {
        let image: Vec<u8> = (0..=255).collect();
        let source = Source::from_image("image", Vec::leak(image));
        let extent = |offset, bytes| Extent { file: 0, offset, bytes };
        let layer = ExpertExtents { experts: 4, parts: [extent(0, 40), extent(40, 40), extent(80, 20)] };
        let mut loaded_bytes = 0;
        let store = HostStore::resident(&source, &[layer], &mut |bytes| loaded_bytes += bytes).unwrap();
        assert_eq!((loaded_bytes, store.resident_bytes()), (100, 100));
        let mut leases = store.lease(0, &[1, 3]);
        let mut seen = Vec::new();
        while let Some(lease) = leases.next_ready() {
            let lease = lease.unwrap();
            let first = [0, 1, 2].map(|part| lease.part(part)[0]);
            let bytes = [0, 1, 2].map(|part| lease.part(part).len());
            seen.push((lease.expert(), first, bytes));
        }
        assert_eq!(seen, [(1, [10, 50, 85], [10, 10, 5]), (3, [30, 70, 95], [10, 10, 5])]);
    }
}
