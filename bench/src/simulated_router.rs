//! A backend whose learned routers choose what a file of routes says: a model of random weights routes evenly, which no
//! real one does, and so tells little about a cache.
//!
//! Everything else is the CPU's; hash-routed layers keep their table, which is known before a pass and prefetched.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicUsize, Ordering};

use cpu::{CpuBackend, Pass, Selection};
use model::{Activation, Backend, Batch, Cancel, Config, Error, State, SubLayer};
use store::{HostLeases, TracePass};

/// The CPU with other choices of experts.
pub struct SimulatedRouter<'b> {
    backend: &'b CpuBackend,
    /// Layers from this one on are routed by `passes`.
    learned_from: usize,
    /// Each of one row.
    passes: Vec<TracePass>,
    begun: AtomicUsize,
}

impl<'b> SimulatedRouter<'b> {
    /// Routes pass after pass by `passes`, of one row each, and from the start again after the last.
    pub fn new(backend: &'b CpuBackend, learned_from: usize, passes: Vec<TracePass>) -> SimulatedRouter<'b> {
        SimulatedRouter { backend, learned_from, passes, begun: AtomicUsize::new(0) }
    }

    /// What the present pass chooses in a layer.
    fn experts(&self, layer: usize) -> Vec<u32> {
        let pass = &self.passes[(self.begun.load(Ordering::Relaxed) - 1) % self.passes.len()];
        let used = self.config().experts_used;
        pass.experts[layer * used..][..used].iter().map(|&expert| u32::from(expert)).collect()
    }
}

impl Backend for SimulatedRouter<'_> {
    type State = State;
    type Pass = Pass;
    type Logits = Vec<f32>;
    type Selection = Selection;
    type Leases<'s>
        = HostLeases<'s>
    where
        Self: 's;

    fn config(&self) -> &Config {
        self.backend.config()
    }

    fn new_state(&self) -> Result<State, Error> {
        self.backend.new_state()
    }

    fn position(&self, state: &State) -> usize {
        self.backend.position(state)
    }

    fn rewind(&self, state: &mut State, target: usize) -> usize {
        self.backend.rewind(state, target)
    }

    fn export(&self, state: &State, to: &mut dyn Write) -> Result<(), Error> {
        self.backend.export(state, to)
    }

    fn import(&self, from: &mut dyn Read) -> Result<State, Error> {
        self.backend.import(from)
    }

    fn begin(&self, batch: Batch, states: &[&State]) -> Result<Pass, Error> {
        assert_eq!(batch.rows().len(), 1, "a simulated router routes one row at a time");
        self.begun.fetch_add(1, Ordering::Relaxed);
        self.backend.begin(batch, states)
    }

    fn embed(&self, pass: &mut Pass) -> Result<(), Error> {
        self.backend.embed(pass)
    }

    fn hc_pre(&self, layer: usize, sub_layer: SubLayer, pass: &mut Pass) -> Result<(), Error> {
        self.backend.hc_pre(layer, sub_layer, pass)
    }

    fn project(&self, layer: usize, pass: &mut Pass) -> Result<(), Error> {
        self.backend.project(layer, pass)
    }

    fn compress(&self, layer: usize, states: &[&State], pass: &mut Pass) -> Result<(), Error> {
        self.backend.compress(layer, states, pass)
    }

    fn index(&self, layer: usize, states: &[&State], pass: &mut Pass) -> Result<(), Error> {
        self.backend.index(layer, states, pass)
    }

    fn attend(&self, layer: usize, states: &[&State], pass: &mut Pass) -> Result<(), Error> {
        self.backend.attend(layer, states, pass)
    }

    fn attention_out(&self, layer: usize, pass: &mut Pass) -> Result<(), Error> {
        self.backend.attention_out(layer, pass)
    }

    fn hc_post(&self, layer: usize, sub_layer: SubLayer, pass: &mut Pass) -> Result<(), Error> {
        self.backend.hc_post(layer, sub_layer, pass)
    }

    fn route(&self, layer: usize, pass: &mut Pass) -> Result<Selection, Error> {
        let selection = self.backend.route(layer, pass)?;
        Ok(if layer < self.learned_from { selection } else { self.backend.reroute(pass, &self.experts(layer)) })
    }

    fn lease<'s>(&'s self, layer: usize, selection: &Selection) -> Result<HostLeases<'s>, Error> {
        self.backend.lease(layer, selection)
    }

    fn shared_expert(&self, layer: usize, pass: &mut Pass) -> Result<(), Error> {
        self.backend.shared_expert(layer, pass)
    }

    fn routed_experts(
        &self,
        layer: usize,
        selection: Selection,
        leases: HostLeases<'_>,
        cancel: &Cancel,
        pass: &mut Pass,
    ) -> Result<(), Error> {
        self.backend.routed_experts(layer, selection, leases, cancel, pass)
    }

    fn head(&self, pass: &mut Pass) -> Result<Vec<f32>, Error> {
        self.backend.head(pass)
    }

    fn read_logits(&self, logits: Vec<f32>) -> Result<Vec<f32>, Error> {
        self.backend.read_logits(logits)
    }

    fn commit(&self, pass: Pass, states: &mut [&mut State]) {
        self.backend.commit(pass, states);
    }

    fn read(&self, pass: &Pass, activation: Activation) -> Vec<f32> {
        self.backend.read(pass, activation)
    }

    fn write(&self, pass: &mut Pass, activation: Activation, values: &[f32]) {
        self.backend.write(pass, activation, values);
    }
}
