//! Leases: the only way to the bytes of a routed expert.

use std::marker::PhantomData;

use crate::Extent;

/// Where the routed experts of one layer lie in the model's files.
///
/// An expert has three parts (matrices), each stored for all experts one after the other: part `p` of expert `e` is the
/// `parts[p].bytes / experts` bytes that begin at `parts[p].offset + e * (parts[p].bytes / experts)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertExtents {
    /// Experts in the layer.
    pub experts: usize,
    /// The three stacked tensors, whole.
    pub parts: [Extent; 3],
}

impl ExpertExtents {
    /// Bytes of one expert's three parts.
    pub fn expert_bytes(&self) -> [usize; 3] {
        self.parts.map(|part| part.bytes as usize / self.experts)
    }
}

/// The three parts of one expert in host memory. They can be looked at only through the lease that holds them.
#[derive(Debug)]
pub struct ExpertBytes<'s> {
    expert: u32,
    parts: [&'s [u8]; 3],
}

impl<'s> ExpertBytes<'s> {
    pub(crate) fn new(expert: u32, parts: [&'s [u8]; 3]) -> Self {
        ExpertBytes { expert, parts }
    }

    /// The expert's number within its layer.
    pub fn expert(&self) -> u32 {
        self.expert
    }

    /// One part, in the order of [`ExpertExtents::parts`]. The borrow ends with the lease, not with the store.
    pub fn part(&self, part: usize) -> &[u8] {
        self.parts[part]
    }
}

/// An expert that stays where it is for as long as this value lives.
///
/// `E` is what a kernel is given: [`ExpertBytes`] on a CPU, buffers and offsets on a device. Only a store can make a
/// lease, and a store never reuses the memory behind one that is alive; dropping it is what gives the memory back.
#[derive(Debug)]
pub struct Lease<'s, E> {
    expert: E,
    _store: PhantomData<&'s ()>,
}

impl<E> Lease<'_, E> {
    pub(crate) fn new(expert: E) -> Self {
        Lease { expert, _store: PhantomData }
    }
}

impl<E> std::ops::Deref for Lease<'_, E> {
    type Target = E;

    fn deref(&self) -> &E {
        &self.expert
    }
}
