//! What the commands ask of a backend beside the model's stages: what memory it takes, how it is loaded, what it counts.
//!
//! A backend joins the program by an `impl Device` here and an arm in `choice.rs`, where flags and the machine decide which
//! of them computes.

mod choice;
mod cpu;
mod gpu;

use std::sync::Arc;

use gguf::Gguf;
use model::{Backend, Cancel, Error, Model};
use store::{Checksums, Source, StoreCounts};

use crate::placement::{Plans, Work};

pub(crate) use self::choice::on_device;
pub use self::choice::{Asked, Chosen, choose};
pub use self::cpu::Processor;
pub(crate) use self::gpu::api_name;

/// How a model is loaded.
pub struct Loading<'a> {
    /// What for.
    pub work: &'a Work,
    /// Where the plan puts its weights.
    pub plans: &'a Plans,
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

/// How often experts were found, read and waited for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// In the memory that kernels read. Of a GPU, `read_bytes` were copied to it.
    pub slots: StoreCounts,
    /// In the tier of host memory behind it, where there is one.
    pub tier: Option<StoreCounts>,
}

impl Counts {
    /// What has been counted since `before`.
    pub fn since(&self, before: &Counts) -> Counts {
        let tier = self.tier.map(|tier| tier.since(&before.tier.unwrap_or_default()));
        Counts { slots: self.slots.since(&before.slots), tier }
    }

    /// Adds what was counted in other passes.
    pub fn add(&mut self, other: &Counts) {
        self.slots.add(&other.slots);
        if let Some(tier) = &other.tier {
            self.tier.get_or_insert_default().add(tier);
        }
    }

    /// Bytes that were read from the file.
    pub fn file_bytes(&self) -> u64 {
        self.tier.map_or(self.slots.read_bytes, |tier| tier.read_bytes)
    }
}

/// A backend, and where it computes.
pub trait Device: Backend + Sized {
    /// Which of its kind.
    type Adapter;

    /// What memory a model takes, and how it is shared out.
    ///
    /// # Errors
    /// It cannot run there, or not in the memory there is or was allowed.
    fn plan(on: &Self::Adapter, header: &Gguf, model: &Model, work: &Work) -> anyhow::Result<Plans>;

    /// Reads memory as fast as it can be, before weights take what there is.
    ///
    /// # Errors
    /// There is not enough for a measurement.
    fn sweep(on: &Self::Adapter, work: &Work) -> anyhow::Result<Sweep>;

    /// Reads the weights of `model` from `source`. `loaded` is told the bytes of each tensor as it arrives.
    ///
    /// # Errors
    /// A read failed, there is no memory, a weight holds what no model can have, or loading was cancelled.
    fn load(
        on: &Self::Adapter,
        model: &Model,
        source: &Source,
        loading: Loading<'_>,
        loaded: &mut dyn FnMut(u64),
    ) -> Result<Self, Error>;

    /// What to call it where settings are told; nothing where it is what every machine has.
    fn name(&self) -> Option<String>;

    /// Why another reader than the fastest is used, if so: a line for the user.
    fn note(&self) -> Option<&str>;

    /// The name of what weights are read with.
    fn reader(&self) -> &'static str;

    /// Whether reads of streamed experts are held against checksums.
    fn checks(&self) -> bool;

    /// How often experts were found, read and waited for since loading.
    fn counts(&self) -> Counts;

    /// Bytes of weights in the memory that kernels read, the slots of streamed experts included.
    fn weight_bytes(&self) -> u64;

    /// Bytes that a session holds.
    fn session_bytes(&self, state: &Self::State) -> u64;
}
