//! The backend's parts, and the stages wired to the `Backend` trait.

use std::io::{Read, Write};
use std::sync::Arc;

use gguf::TensorType;
use model::rope::Rope;
use model::tensors::{Model, Routing, Tensors};
use model::{Activation, Arithmetic, Backend, Batch, Config, Error, KvLayout, Precision, State, SubLayer};
use quant::simd::{self, Level};
use store::{
    Cancel, Checksums, ExpertExtents, HostLeases, HostStore, Prefetch, Reader, ReaderKind, Residency, Source,
    StoreCounts,
};

use crate::experts::{Selection, SimulatedRoutes};
use crate::memory::static_bytes;
use crate::parallel::Workers;
use crate::pass::Pass;
use crate::weights::{self, Weight};

/// How a backend is to run. None of it but `arithmetic` and `precision` changes a bit of the output.
#[derive(Clone, Debug)]
pub struct Options {
    /// Threads to compute with; at 0, one for each that the machine has.
    pub threads: usize,
    /// With or without the model's own low-precision roundings.
    pub arithmetic: Arithmetic,
    /// How quantised weights are multiplied.
    pub precision: Precision,
    /// Instruction set; the fastest of the machine unless a test asks for another.
    pub level: Level,
    /// Where routed experts live. If they are streamed, rows of the token embedding are read as tokens come, too.
    pub residency: Residency,
    /// What weights are read with. Where it cannot be had, a simpler one is used ([`CpuBackend::note`] says so).
    pub reader: ReaderKind,
    /// What every read of a streamed expert is held against.
    pub checksums: Option<Checksums>,
    /// Keep weights and slots from being swapped out.
    pub lock: bool,
    /// Asks loading to stop.
    pub cancel: Arc<Cancel>,
}

impl Default for Options {
    fn default() -> Options {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Options {
            threads,
            arithmetic: Arithmetic::Official,
            precision: Precision::Fast,
            level: simd::level(),
            residency: Residency::Resident,
            reader: ReaderKind::Direct,
            checksums: None,
            lock: false,
            cancel: Arc::default(),
        }
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
    pub(crate) simulated_routes: Option<Box<dyn SimulatedRoutes>>,
    reader: Arc<dyn Reader>,
    note: Option<String>,
    /// Files from which weights are read after loading, too.
    streamed_from: Option<Source>,
}

impl CpuBackend {
    /// Reads all weights of `model` from `source`. `loaded` is told the bytes of each tensor as it arrives.
    ///
    /// # Errors
    /// [`Error::Store`] if there is not enough memory, it cannot be locked as asked, a read fails or a file is written to
    /// meanwhile, [`Error::Value`] if a small tensor holds NaN, infinity or a wrong expert, [`Error::Cancelled`].
    pub fn load(
        model: &Model,
        source: &Source,
        options: Options,
        loaded: &mut dyn FnMut(u64),
    ) -> Result<CpuBackend, Error> {
        let extents: Vec<ExpertExtents> = model.experts.iter().map(|layer| layer.extents).collect();
        let expert_bytes = match &options.residency {
            Residency::Resident => extents.iter().map(ExpertExtents::total_bytes).sum(),
            Residency::Streamed { slots } => store::slots_bytes(&extents, slots),
        };
        let is_streamed = options.residency != Residency::Resident;
        let wanted_bytes = static_bytes(model, is_streamed) + expert_bytes;
        store::check_available(wanted_bytes)?;
        if options.lock {
            store::check_lockable(wanted_bytes)?;
        }
        let (reader, note) = store::open_reader(source, options.reader)?;
        let backend = CpuBackend {
            config: model.config.clone(),
            layout: Arc::new(KvLayout::new(&model.config, source.identity()?, options.arithmetic, options.precision)),
            ropes: [Rope::plain(&model.config), Rope::yarn(&model.config)],
            weights: weights::load(model, source, &*reader, &options, loaded)?,
            expert_types: model.experts.iter().map(|layer| layer.types).collect(),
            experts: match &options.residency {
                Residency::Resident => HostStore::resident(&*reader, &extents, &options.cancel, loaded)?,
                Residency::Streamed { slots } => {
                    HostStore::streamed(reader.clone(), &extents, slots, model.config.experts_used, options.checksums)?
                }
            },
            workers: Workers::new(options.threads, options.level, options.precision)?,
            simulated_routes: None,
            reader,
            note,
            streamed_from: is_streamed.then(|| source.clone()),
        };
        source.check_unchanged()?;
        if options.lock {
            backend.lock()?;
        }
        Ok(backend)
    }

    /// The same with other choices of experts, for programs that measure: the output means nothing then.
    pub fn with_routes(self, routes: Box<dyn SimulatedRoutes>) -> CpuBackend {
        CpuBackend { simulated_routes: Some(routes), ..self }
    }

    /// Keeps weights and slots from being swapped out.
    fn lock(&self) -> Result<(), Error> {
        self.weights.try_map(&mut |weight: &Weight| weight.lock())?;
        Ok(self.experts.lock()?)
    }

    /// Fails if what this pass or an earlier one read may not be the model's weights.
    fn check_files(&self) -> Result<(), Error> {
        Ok(self.streamed_from.as_ref().map_or(Ok(()), Source::check_unchanged)?)
    }

    /// Why the reader that was asked for is not the one used, if so: a line for the user.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// What weights are read with.
    pub fn reader(&self) -> &Arc<dyn Reader> {
        &self.reader
    }

    /// Whether reads of streamed experts are held against checksums.
    pub fn checks(&self) -> bool {
        self.experts.checks()
    }

    /// How often experts were found, read and waited for since loading.
    pub fn stats(&self) -> StoreCounts {
        self.experts.counts()
    }

    /// Layers whose experts follow from the tokens: their reads can begin before the pass.
    fn prefetch_hashed(&self, batch: &Batch) {
        if !self.experts.is_streamed() {
            return;
        }
        for (layer, weights) in self.weights.layers.iter().enumerate() {
            let Routing::Hash(table) = &weights.moe.routing else { continue };
            let rows = batch.rows().iter();
            let mut experts = rows.flat_map(|row| table.int_row(row.token as usize)).map(|expert| expert as u32);
            self.experts.prefetch(layer, &mut experts, Prefetch::Certain);
        }
    }

    /// Reads of the next layer's experts that need no waiting for its attention: most guesses are right
    /// (docs/performance.md, "Lookahead").
    fn look_ahead(&self, layer: usize, pass: &Pass) {
        if self.experts.is_streamed() && layer < self.config.layers {
            self.experts.prefetch(layer, &mut self.probable_experts(layer, pass).into_iter(), Prefetch::Guess);
        }
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
        WeightBytes { fixed, experts: self.experts.memory_bytes() }
    }
}

/// Bytes of weights held in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightBytes {
    /// Everything but the routed experts.
    pub fixed: u64,
    /// Routed experts: all, or the slots.
    pub experts: u64,
}

impl Backend for CpuBackend {
    /// Enough to use each weight many times, few enough to show how reading goes on. It changes no bit.
    const PASS_ROWS: usize = 256;

    type State = State;
    type Pass = Pass;
    type Logits = Vec<f32>;
    type Selection = Selection;
    type Leases<'s> = HostLeases<'s>;

    fn config(&self) -> &Config {
        &self.config
    }

    fn passes_are_free(&self) -> bool {
        true
    }

    fn new_state(&self) -> Result<State, Error> {
        Ok(State::new(self.layout.clone()))
    }

    fn position(&self, state: &State) -> usize {
        state.position()
    }

    fn reach(&self, state: &State, target: usize) -> usize {
        state.reach(target)
    }

    fn rewind(&self, state: &mut State, target: usize) -> usize {
        state.rewind(target)
    }

    fn fork(&self, state: &State) -> Result<State, Error> {
        Ok(state.clone())
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
        self.check_files()?;
        let prefetching = self.experts.pass_begins();
        self.prefetch_hashed(&batch);
        Ok(Pass::new(batch, prefetching, &self.config, &self.layout, &self.ropes))
    }

    fn embed(&self, pass: &mut Pass) -> Result<(), Error> {
        self.stage_embed(pass)
    }

    fn hc_pre(&self, layer: usize, sub_layer: SubLayer, pass: &mut Pass) -> Result<(), Error> {
        self.stage_hc_pre(layer, sub_layer, pass)
    }

    fn project(&self, layer: usize, _: &[&State], pass: &mut Pass) -> Result<(), Error> {
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

    fn hc_post(&self, layer: usize, sub_layer: SubLayer, pass: &mut Pass) -> Result<(), Error> {
        self.stage_hc_post(pass)?;
        if sub_layer == SubLayer::Experts {
            self.look_ahead(layer + 1, pass);
        }
        Ok(())
    }

    fn route(&self, layer: usize, pass: &mut Pass) -> Result<Selection, Error> {
        self.stage_route(layer, pass)
    }

    fn lease<'s>(&'s self, layer: usize, selection: &Selection) -> Result<HostLeases<'s>, Error> {
        Ok(self.experts.lease(layer, selection.experts(), selection.choices()))
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
        // Nothing is read after this.
        self.check_files()?;
        self.stage_head(pass)
    }

    fn read_logits(&self, logits: Vec<f32>) -> Result<Vec<f32>, Error> {
        Ok(logits)
    }

    fn commit(&self, pass: Pass, states: &mut [&mut State]) {
        for (run, delta) in pass.batch.runs().iter().zip(&pass.deltas) {
            states[run.session].commit(delta);
        }
        self.experts.pass_ended(pass.batch.runs().iter().map(|run| run.rows.len()).max().unwrap_or(0));
    }

    fn read(&self, pass: &Pass, activation: Activation) -> Vec<f32> {
        pass.read(activation)
    }

    fn write(&self, pass: &mut Pass, activation: Activation, values: &[f32]) {
        pass.write(activation, values);
    }
}
