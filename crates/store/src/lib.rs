//! Where weights live: the files of a model, the owned memory they are read into, and the leases
//! through which kernels reach routed experts.
//!
//! Compute code cannot know where an expert is. It asks a store for the experts that a layer's rows chose and is
//! handed [`Lease`]s one at a time; there is no other way to an expert's bytes. A resident model is a store whose
//! leases are always ready ([`HostStore`]).
//!
//! The store knows bytes: files, offsets, lengths. What the bytes mean is the business of the crates above.

pub mod budget;
mod cache;
mod cancel;
mod host;
mod lease;
mod memory;
pub mod plan;
pub mod policy;
pub mod reader;
pub mod replay;
mod seal;
mod source;
mod streamed;
pub mod trace;

pub use cache::{Cache, CacheCounts, Prefetch, SlotRead};
pub use cancel::{Cancel, Cancelled};
pub use host::{HostLeases, HostStore, Prefetching, StoreCounts};
pub use lease::{ExpertBytes, ExpertExtents, Home, Lease};
pub use memory::{ALIGNMENT_BYTES, AlignedBytes, check_available, check_lockable};
pub use plan::{Needs, Plan, Request, Residency};
pub use policy::{ExpertId, Policy};
pub use reader::{Loaded, Reader, ReaderKind, open_reader, read_all};
pub use seal::{Checksums, Seal, SealError};
pub use source::{Extent, Source, StoreError};
pub use streamed::{size_classes, slots_bytes};
pub use trace::{TraceError, TraceHeader, TracePass, TraceReader, TraceWriter};
