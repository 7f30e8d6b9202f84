//! The forward pass, top to bottom (docs/spec/model.md §2).

use std::sync::{Arc, Mutex, PoisonError};

use store::Cancel;

use crate::backend::{Backend, Stage, SubLayer};
use crate::{Batch, Error, Row};

/// Looks on at a pass: at activations, to trace, to inject faults. An error ends the pass.
pub trait Observer<B: Backend + ?Sized> {
    /// Called before anything is computed.
    fn begin(&mut self, _batch: &Batch) {}

    /// Called after each stage.
    ///
    /// `layer` is `None` for the embedding and the head.
    ///
    /// # Errors
    /// Whatever should end the pass.
    fn after(&mut self, layer: Option<usize>, stage: Stage, backend: &B, pass: &B::Pass) -> Result<(), Error>;
}

/// Looks at nothing.
pub struct NoObserver;

impl<B: Backend + ?Sized> Observer<B> for NoObserver {
    fn after(&mut self, _: Option<usize>, _: Stage, _: &B, _: &B::Pass) -> Result<(), Error> {
        Ok(())
    }
}

/// An observer that its owner looks into later.
impl<B: Backend + ?Sized, O: Observer<B>> Observer<B> for Arc<Mutex<O>> {
    fn begin(&mut self, batch: &Batch) {
        self.lock().unwrap_or_else(PoisonError::into_inner).begin(batch);
    }

    fn after(&mut self, layer: Option<usize>, stage: Stage, backend: &B, pass: &B::Pass) -> Result<(), Error> {
        self.lock().unwrap_or_else(PoisonError::into_inner).after(layer, stage, backend, pass)
    }
}

/// Computes `rows`, which continue the sessions `states`, and returns the logits of the rows that want them, in the
/// order of the rows.
///
/// Either every session has advanced over its rows, or an error is returned and none has changed.
///
/// # Errors
/// [`Error::Batch`] for rows that do not fit, [`Error::Cancelled`], and whatever the backend,
/// its expert store or the observer report.
pub fn forward<B: Backend>(
    backend: &B,
    rows: Vec<Row>,
    states: &mut [&mut B::State],
    cancel: &Cancel,
    observer: &mut dyn Observer<B>,
) -> Result<B::Logits, Error> {
    let past: Vec<&B::State> = states.iter().map(|state| &**state).collect();
    let mut forward = Forward::begin(backend, rows, &past, observer)?;
    while !forward.is_through() {
        forward.layer(&past, cancel, observer)?;
    }
    forward.end(states, observer)
}

/// A pass that goes on a layer at a time, so that others can be computed between two of its layers. Until it ends no session
/// knows of it; dropping it is all that giving up takes.
///
/// Every call takes the same sessions in the same order, and none of them may go on in another pass meanwhile.
pub struct Forward<'b, B: Backend> {
    backend: &'b B,
    pass: B::Pass,
    /// Layers done.
    layers: usize,
}

impl<'b, B: Backend> Forward<'b, B> {
    /// Begins a pass over `rows`, which continue the sessions `past`.
    ///
    /// # Errors
    /// As [`forward()`].
    pub fn begin(
        backend: &'b B,
        rows: Vec<Row>,
        past: &[&B::State],
        observer: &mut dyn Observer<B>,
    ) -> Result<Self, Error> {
        let positions: Vec<usize> = past.iter().map(|state| backend.position(state)).collect();
        let batch = Batch::new(rows, &positions, backend.config())?;
        observer.begin(&batch);
        let mut pass = backend.begin(batch, past)?;
        backend.embed(&mut pass)?;
        observer.after(None, Stage::Embed, backend, &pass)?;
        Ok(Forward { backend, pass, layers: 0 })
    }

    /// Layers done.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Whether all layers are done.
    pub fn is_through(&self) -> bool {
        self.layers == self.backend.config().layers
    }

    /// Computes the next layer.
    ///
    /// # Errors
    /// As [`forward()`].
    pub fn layer(&mut self, past: &[&B::State], cancel: &Cancel, observer: &mut dyn Observer<B>) -> Result<(), Error> {
        cancel.check()?;
        let mut walk = Walk { backend: self.backend, past, cancel, observer };
        walk.attention(self.layers, &mut self.pass)?;
        walk.experts(self.layers, &mut self.pass)?;
        self.layers += 1;
        Ok(())
    }

    /// Computes the logits and makes the pass part of its sessions.
    ///
    /// Panics if layers are left.
    ///
    /// # Errors
    /// As [`forward()`].
    pub fn end(mut self, states: &mut [&mut B::State], observer: &mut dyn Observer<B>) -> Result<B::Logits, Error> {
        assert!(self.is_through(), "a pass ends after its last layer");
        let logits = self.backend.head(&mut self.pass)?;
        observer.after(None, Stage::Head, self.backend, &self.pass)?;
        self.backend.commit(self.pass, states);
        Ok(logits)
    }
}

/// The stages of a layer in order, each followed by a look of the observer.
struct Walk<'a, B: Backend> {
    backend: &'a B,
    past: &'a [&'a B::State],
    cancel: &'a Cancel,
    observer: &'a mut dyn Observer<B>,
}

impl<B: Backend> Walk<'_, B> {
    fn attention(&mut self, layer: usize, pass: &mut B::Pass) -> Result<(), Error> {
        let (backend, past) = (self.backend, self.past);
        backend.hc_pre(layer, SubLayer::Attention, pass)?;
        self.done(layer, Stage::HcPre(SubLayer::Attention), pass)?;
        backend.project(layer, past, pass)?;
        self.done(layer, Stage::Project, pass)?;
        backend.compress(layer, past, pass)?;
        self.done(layer, Stage::Compress, pass)?;
        backend.index(layer, past, pass)?;
        self.done(layer, Stage::Index, pass)?;
        backend.attend(layer, past, pass)?;
        self.done(layer, Stage::Attend, pass)?;
        backend.attention_out(layer, pass)?;
        self.done(layer, Stage::AttentionOut, pass)?;
        backend.hc_post(layer, SubLayer::Attention, pass)?;
        self.done(layer, Stage::HcPost(SubLayer::Attention), pass)
    }

    fn experts(&mut self, layer: usize, pass: &mut B::Pass) -> Result<(), Error> {
        let backend = self.backend;
        backend.hc_pre(layer, SubLayer::Experts, pass)?;
        self.done(layer, Stage::HcPre(SubLayer::Experts), pass)?;
        let selection = backend.route(layer, pass)?;
        self.done(layer, Stage::Route, pass)?;
        let leases = backend.lease(layer, &selection)?;
        backend.shared_expert(layer, pass)?;
        self.done(layer, Stage::SharedExpert, pass)?;
        backend.routed_experts(layer, selection, leases, self.cancel, pass)?;
        self.done(layer, Stage::RoutedExperts, pass)?;
        backend.hc_post(layer, SubLayer::Experts, pass)?;
        self.done(layer, Stage::HcPost(SubLayer::Experts), pass)
    }

    fn done(&mut self, layer: usize, stage: Stage, pass: &B::Pass) -> Result<(), Error> {
        self.observer.after(Some(layer), stage, self.backend, pass)
    }
}
