//! The backend's parts, and the stages wired to the `Backend` trait.

use std::io::{Read, Write};
use std::sync::Arc;

use gguf::TensorType;
use model::rope::Rope;
use model::tensors::{Model, Tensors};
use model::{Activation, Arithmetic, Backend, Batch, Cancel, Config, Error, KvLayout, Precision, State, SubLayer};
use quant::simd::{self, Level};
use store::{ExpertExtents, HostLeases, HostStore, Source};

use crate::experts::Selection;
use crate::parallel::Workers;
use crate::pass::Pass;
use crate::weights::{self, Weight};

/// How a backend is to run. None of it but `arithmetic` and `precision` changes a bit of the output.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Threads to compute with; at 0, one for each that the machine has.
    pub threads: usize,
    /// With or without the model's own low-precision roundings.
    pub arithmetic: Arithmetic,
    /// How quantised weights are multiplied.
    pub precision: Precision,
    /// Instruction set; the fastest of the machine unless a test asks for another.
    pub level: Level,
}

impl Default for Options {
    fn default() -> Options {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Options { threads, arithmetic: Arithmetic::Official, precision: Precision::Fast, level: simd::level() }
    }
}

/// A model loaded into host memory, and the threads that compute with it.
pub struct CpuBackend {
    pub(crate) config: Config,
    pub(crate) layout: Arc<KvLayout>,
    /// Without compression, with compression.
    pub(crate) ropes: [Rope; 2],
    pub(crate) weights: Tensors<Weight>,
    /// Element types of each layer's gate, up and down.
    pub(crate) expert_types: Vec<[TensorType; 3]>,
    pub(crate) experts: HostStore,
    pub(crate) workers: Workers,
}

impl CpuBackend {
    /// Reads all weights of `model` from `source`. `loaded` is told the bytes of each tensor as it arrives.
    ///
    /// # Errors
    /// [`Error::Store`] if there is not enough memory or a read fails, [`Error::Value`] if a small tensor holds NaN, infinity or a wrong expert.
    pub fn load(
        model: &Model,
        source: &Source,
        options: Options,
        loaded: &mut dyn FnMut(u64),
    ) -> Result<CpuBackend, Error> {
        store::check_available(model.weight_bytes())?;
        let weights = weights::load(model, source, options.level, loaded)?;
        let extents: Vec<ExpertExtents> = model.experts.iter().map(|layer| layer.extents).collect();
        Ok(CpuBackend {
            config: model.config.clone(),
            layout: Arc::new(KvLayout::new(&model.config, source.identity()?, options.arithmetic, options.precision)),
            ropes: [Rope::plain(&model.config), Rope::yarn(&model.config)],
            weights,
            expert_types: model.experts.iter().map(|layer| layer.types).collect(),
            experts: HostStore::resident(source, &extents, loaded)?,
            workers: Workers::new(options.threads, options.level, options.precision)?,
        })
    }

    /// How often work was shared between threads since loading.
    pub fn shared_regions(&self) -> u64 {
        self.workers.shared()
    }

    /// Bytes of weights in memory: those every token uses, and the routed experts.
    pub fn weight_bytes(&self) -> WeightBytes {
        let mut fixed = 0;
        let counted = self.weights.try_map(&mut |weight: &Weight| {
            fixed += weight.bytes() as u64;
            Ok::<_, std::convert::Infallible>(())
        });
        counted.expect("counting cannot fail");
        WeightBytes { fixed, experts: self.experts.resident_bytes() }
    }
}

/// Bytes of weights held in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightBytes {
    /// Everything but the routed experts.
    pub fixed: u64,
    /// Routed experts.
    pub experts: u64,
}

impl Backend for CpuBackend {
    type State = State;
    type Pass = Pass;
    type Logits = Vec<f32>;
    type Selection = Selection;
    type Leases<'s> = HostLeases<'s>;

    fn config(&self) -> &Config {
        &self.config
    }

    fn new_state(&self) -> Result<State, Error> {
        Ok(State::new(self.layout.clone()))
    }

    fn position(&self, state: &State) -> usize {
        state.position()
    }

    fn rewind(&self, state: &mut State, target: usize) -> usize {
        state.rewind(target)
    }

    fn export(&self, state: &State, mut to: &mut dyn Write) -> Result<(), Error> {
        state.export(&mut to).map_err(Error::Export)
    }

    fn import(&self, mut from: &mut dyn Read) -> Result<State, Error> {
        Ok(State::import(self.layout.clone(), &mut from)?)
    }

    fn begin(&self, batch: Batch, states: &[&State]) -> Result<Pass, Error> {
        for state in states {
            assert!(state.layout() == &self.layout, "a session goes on with the backend it began with");
        }
        Ok(Pass::new(batch, &self.config, &self.layout, &self.ropes))
    }

    fn embed(&self, pass: &mut Pass) -> Result<(), Error> {
        self.stage_embed(pass)
    }

    fn hc_pre(&self, layer: usize, sub_layer: SubLayer, pass: &mut Pass) -> Result<(), Error> {
        self.stage_hc_pre(layer, sub_layer, pass)
    }

    fn project(&self, layer: usize, pass: &mut Pass) -> Result<(), Error> {
        self.stage_project(layer, pass)
    }

    fn compress(&self, layer: usize, states: &[&State], pass: &mut Pass) -> Result<(), Error> {
        self.stage_compress(layer, states, pass)
    }

    fn index(&self, layer: usize, states: &[&State], pass: &mut Pass) -> Result<(), Error> {
        self.stage_index(layer, states, pass)
    }

    fn attend(&self, layer: usize, states: &[&State], pass: &mut Pass) -> Result<(), Error> {
        self.stage_attend(layer, states, pass)
    }

    fn attention_out(&self, layer: usize, pass: &mut Pass) -> Result<(), Error> {
        self.stage_attention_out(layer, pass)
    }

    fn hc_post(&self, _layer: usize, _sub_layer: SubLayer, pass: &mut Pass) -> Result<(), Error> {
        self.stage_hc_post(pass)
    }

    fn route(&self, layer: usize, pass: &mut Pass) -> Result<Selection, Error> {
        self.stage_route(layer, pass)
    }

    fn lease<'s>(&'s self, layer: usize, selection: &Selection) -> Result<HostLeases<'s>, Error> {
        Ok(self.experts.lease(layer, selection.experts()))
    }

    fn shared_expert(&self, layer: usize, pass: &mut Pass) -> Result<(), Error> {
        self.stage_shared_expert(layer, pass)
    }

    fn routed_experts(
        &self,
        layer: usize,
        selection: Selection,
        leases: HostLeases<'_>,
        cancel: &Cancel,
        pass: &mut Pass,
    ) -> Result<(), Error> {
        self.stage_routed_experts(layer, selection, leases, cancel, pass)
    }

    fn head(&self, pass: &mut Pass) -> Result<Vec<f32>, Error> {
        self.stage_head(pass)
    }

    fn read_logits(&self, logits: Vec<f32>) -> Result<Vec<f32>, Error> {
        Ok(logits)
    }

    fn commit(&self, pass: Pass, states: &mut [&mut State]) {
        for (run, delta) in pass.batch.runs().iter().zip(&pass.deltas) {
            states[run.session].commit(delta);
        }
    }

    fn read(&self, pass: &Pass, activation: Activation) -> Vec<f32> {
        pass.read(activation)
    }

    fn write(&self, pass: &mut Pass, activation: Activation, values: &[f32]) {
        pass.write(activation, values);
    }
}
