//! What the commands ask of a backend beside the model's stages: what it will take, how it is loaded, what it counts.
//!
//! A backend joins the program by an `impl Device` here and a line in [`crate::main`], which chooses.

use std::sync::Arc;

use cpu::{CpuBackend, PassShape};
use model::{Backend, Cancel, Config, Error, KvLayout, Model};
use store::{Checksums, Residency, Source, StoreCounts};

use crate::memory;
use crate::placement::Work;

/// Bytes that a sweep of host memory reads to find its speed: more than caches hold.
const SWEEP_BYTES: usize = 512 << 20;

/// How a model is loaded.
pub struct Loading<'a> {
    /// What for.
    pub work: &'a Work,
    /// Where the plan puts its experts.
    pub residency: Residency,
    /// What every read of a streamed expert is held against.
    pub checksums: Option<Checksums>,
    /// Asks loading to stop.
    pub cancel: Arc<Cancel>,
}

/// How fast memory can be read where nothing else is done.
pub struct Sweep {
    /// Who did: `2 threads read memory`.
    pub who: String,
    /// Bytes a second.
    pub bytes_per_second: f64,
}

/// A backend, and where it computes.
pub trait Device: Backend + Sized {
    /// Bytes of all weights but the routed experts once they are loaded; with `streamed` experts, without what is then read
    /// as tokens come.
    fn static_bytes(model: &Model, streamed: bool) -> u64;

    /// The most bytes that a pass holds at any moment.
    fn pass_bytes(config: &Config, layout: &KvLayout, shape: PassShape) -> u64;

    /// Reads memory as fast as it can be, before weights take what there is.
    ///
    /// # Errors
    /// There is not enough for a measurement.
    fn sweep(work: &Work) -> anyhow::Result<Sweep>;

    /// Reads the weights of `model` from `source`. `loaded` is told the bytes of each tensor as it arrives.
    ///
    /// # Errors
    /// A read failed, there is no memory, a weight holds what no model can have, or loading was cancelled.
    fn load(model: &Model, source: &Source, loading: Loading<'_>, loaded: &mut dyn FnMut(u64)) -> Result<Self, Error>;

    /// What to call it where settings are told; nothing where it is what every machine has.
    fn name(&self) -> Option<&str>;

    /// Why another reader than the fastest is used, if so: a line for the user.
    fn note(&self) -> Option<&str>;

    /// The name of what weights are read with.
    fn reader(&self) -> &'static str;

    /// Whether reads of streamed experts are held against checksums.
    fn checks(&self) -> bool;

    /// How often experts were found, read and waited for since loading.
    fn counts(&self) -> StoreCounts;

    /// Bytes of weights in memory, the slots of streamed experts included.
    fn weight_bytes(&self) -> u64;

    /// Bytes that a session holds.
    fn session_bytes(&self, state: &Self::State) -> u64;
}

impl Device for CpuBackend {
    fn static_bytes(model: &Model, streamed: bool) -> u64 {
        cpu::static_bytes(model, streamed)
    }

    fn pass_bytes(config: &Config, layout: &KvLayout, shape: PassShape) -> u64 {
        cpu::pass_bytes(config, layout, shape)
    }

    fn sweep(work: &Work) -> anyhow::Result<Sweep> {
        let threads = work.shape.threads;
        let bytes_per_second = memory::read_bytes_per_second(SWEEP_BYTES, threads)?;
        Ok(Sweep { who: format!("{threads} threads read memory"), bytes_per_second })
    }

    fn load(
        model: &Model,
        source: &Source,
        loading: Loading<'_>,
        loaded: &mut dyn FnMut(u64),
    ) -> Result<CpuBackend, Error> {
        let Loading { work, residency, checksums, cancel } = loading;
        let options = cpu::Options {
            threads: work.shape.threads,
            arithmetic: work.arithmetic,
            precision: work.precision,
            residency,
            checksums,
            lock: work.lock,
            cancel,
            ..cpu::Options::default()
        };
        CpuBackend::load(model, source, options, loaded)
    }

    fn name(&self) -> Option<&str> {
        None
    }

    fn note(&self) -> Option<&str> {
        self.note()
    }

    fn reader(&self) -> &'static str {
        self.reader().name()
    }

    fn checks(&self) -> bool {
        self.checks()
    }

    fn counts(&self) -> StoreCounts {
        self.stats()
    }

    fn weight_bytes(&self) -> u64 {
        let bytes = self.weight_bytes();
        bytes.fixed + bytes.experts
    }

    fn session_bytes(&self, state: &Self::State) -> u64 {
        state.bytes().total() as u64
    }
}
