//! Leases: the only way to the bytes of a routed expert.

use std::ops::Range;

use crate::{ALIGNMENT_BYTES, AlignedBytes, Extent};

/// Where the routed experts of one layer lie in the model's files.
///
/// An expert has three parts (matrices), and a GGUF file stacks each part of all experts: part `p` of expert `e` is the
/// `parts[p].bytes` bytes that begin `e * parts[p].bytes` after `parts[p].offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertExtents {
    /// Experts in the layer.
    pub experts: usize,
    /// The parts of expert 0.
    pub parts: [Extent; 3],
}

impl ExpertExtents {
    /// Three tensors, each of which holds one part of all experts, one after the other.
    pub fn stacked(experts: usize, tensors: [Extent; 3]) -> ExpertExtents {
        ExpertExtents {
            experts,
            parts: tensors.map(|tensor| Extent { bytes: tensor.bytes / experts as u64, ..tensor }),
        }
    }

    /// Each part of all experts.
    pub(crate) fn tensors(&self) -> [Extent; 3] {
        self.parts.map(|first| Extent { bytes: first.bytes * self.experts as u64, ..first })
    }

    /// Bytes of one expert's three parts.
    pub fn expert_bytes(&self) -> [usize; 3] {
        self.parts.map(|part| part.bytes as usize)
    }

    /// Bytes of all experts.
    pub fn total_bytes(&self) -> u64 {
        self.tensors().iter().map(|tensor| tensor.bytes).sum()
    }

    /// One part of one expert.
    pub fn part(&self, part: usize, expert: u32) -> Extent {
        let first = self.parts[part];
        Extent { offset: first.offset + u64::from(expert) * first.bytes, ..first }
    }

    /// What is read to have an expert: its parts.
    pub fn reads(&self, expert: u32) -> [Extent; 3] {
        [0, 1, 2].map(|part| self.part(part, expert))
    }

    /// Bytes of memory that hold any expert of the layer as it is read: whole pages, wherever on a page a part begins.
    pub fn slot_bytes(&self) -> usize {
        self.expert_bytes().iter().map(|bytes| bytes.next_multiple_of(ALIGNMENT_BYTES) + ALIGNMENT_BYTES).sum()
    }

    /// Where in a slot that was filled by [`ExpertExtents::reads`] the parts of an expert lie.
    pub(crate) fn places(&self, expert: u32) -> [Range<usize>; 3] {
        let mut read_start = 0;
        self.reads(expert).map(|read| {
            let place = read.place_in_cover();
            let place = read_start + place.start..read_start + place.end;
            read_start += read.cover_bytes();
            place
        })
    }
}

/// The three parts of one expert in host memory. They can be looked at only through the lease that holds them.
pub struct ExpertBytes<'s> {
    expert: u32,
    place: Place<'s>,
}

enum Place<'s> {
    /// Resident: in memory for as long as the store is.
    Fixed([&'s [u8]; 3]),
    /// In a slot, whose memory is in here until it is given back.
    Slot(SlotMemory),
}

/// A slot's memory on lease, and where it belongs.
pub(crate) struct SlotMemory {
    pub(crate) slot: u32,
    pub(crate) layer: u32,
    pub(crate) memory: AlignedBytes,
    pub(crate) parts: [Range<usize>; 3],
}

impl<'s> ExpertBytes<'s> {
    pub(crate) fn fixed(expert: u32, parts: [&'s [u8]; 3]) -> Self {
        ExpertBytes { expert, place: Place::Fixed(parts) }
    }

    pub(crate) fn in_slot(expert: u32, slot: SlotMemory) -> Self {
        ExpertBytes { expert, place: Place::Slot(slot) }
    }

    /// The slot's memory, if it is in one.
    pub(crate) fn into_slot(self) -> Option<SlotMemory> {
        match self.place {
            Place::Fixed(_) => None,
            Place::Slot(slot) => Some(slot),
        }
    }

    /// The expert's number within its layer.
    pub fn expert(&self) -> u32 {
        self.expert
    }

    /// One part, in the order of [`ExpertExtents::parts`]. The borrow ends with the lease, not with the store.
    pub fn part(&self, part: usize) -> &[u8] {
        match &self.place {
            Place::Fixed(parts) => parts[part],
            Place::Slot(slot) => &slot.memory[slot.parts[part].clone()],
        }
    }
}

/// Where an expert goes when its lease ends. A store of host memory takes it back at once; a store of device memory
/// keeps it until the commands that read it have been executed (its fence has passed).
pub trait Home<E> {
    /// The lease on `expert` has ended.
    fn take_back(&self, expert: E);
}

/// An expert that stays where it is for as long as this value lives.
///
/// `E` is what a kernel is given: [`ExpertBytes`] on a CPU, buffers and offsets on a device. Only a store can make a
/// lease. The lease owns the expert's memory: while it lives there is nothing in the store that could be overwritten.
pub struct Lease<'s, E> {
    /// `None` only while the lease is dropped.
    expert: Option<E>,
    home: Option<&'s dyn Home<E>>,
}

impl<'s, E> Lease<'s, E> {
    /// An expert that goes back to `home`.
    pub(crate) fn new(expert: E, home: &'s dyn Home<E>) -> Self {
        Lease { expert: Some(expert), home: Some(home) }
    }

    /// An expert that never leaves its place.
    pub(crate) fn fixed(expert: E) -> Self {
        Lease { expert: Some(expert), home: None }
    }
}

impl<E> std::ops::Deref for Lease<'_, E> {
    type Target = E;

    fn deref(&self) -> &E {
        self.expert.as_ref().expect("a lease that is alive has its expert")
    }
}

impl<E> Drop for Lease<'_, E> {
    fn drop(&mut self) {
        if let (Some(expert), Some(home)) = (self.expert.take(), self.home) {
            home.take_back(expert);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(file: usize, offset: u64, bytes: u64) -> Extent {
        Extent { file, offset, bytes }
    }

    #[test]
    fn stacked_parts_are_three_reads() {
        let layer =
            ExpertExtents::stacked(4, [extent(0, 100, 40_000), extent(0, 40_100, 40_000), extent(1, 8192, 400)]);
        assert_eq!((layer.expert_bytes(), layer.total_bytes()), ([10_000, 10_000, 100], 80_400));
        assert_eq!(layer.reads(2), [extent(0, 20_100, 10_000), extent(0, 60_100, 10_000), extent(1, 8392, 100)]);
        // They begin 3,716, 2,756 and 200 bytes into a page, and the first two end in the fourth page from there.
        assert_eq!(layer.places(2), [3716..13_716, 16_384 + 2756..16_384 + 12_756, 32_768 + 200..32_768 + 300]);
        assert_eq!(layer.slot_bytes(), 16_384 * 2 + 8192);
    }
}
