//! The forward pass, top to bottom (docs/spec/model.md §2).

use std::ops::Range;
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
    let positions: Vec<usize> = states.iter().map(|state| backend.position(state)).collect();
    let batch = Batch::new(rows, &positions, backend.config())?;

    let past: Vec<&B::State> = states.iter().map(|state| &**state).collect();
    observer.begin(&batch);
    let mut pass = backend.begin(batch, &past)?;
    let mut walk = Walk { backend, past: &past, cancel, observer };
    walk.embed(&mut pass)?;
    walk.layers(0..backend.config().layers, &mut pass)?;
    let logits = walk.head(&mut pass)?;

    backend.commit(pass, states);
    Ok(logits)
}

/// The stages in order, each followed by a look of the observer.
struct Walk<'a, B: Backend> {
    backend: &'a B,
    past: &'a [&'a B::State],
    cancel: &'a Cancel,
    observer: &'a mut dyn Observer<B>,
}

impl<B: Backend> Walk<'_, B> {
    fn embed(&mut self, pass: &mut B::Pass) -> Result<(), Error> {
        self.backend.embed(pass)?;
        self.observer.after(None, Stage::Embed, self.backend, pass)
    }

    /// Layers one after the other. A range, because a model spread over several machines will run a part on each.
    fn layers(&mut self, layers: Range<usize>, pass: &mut B::Pass) -> Result<(), Error> {
        for layer in layers {
            self.cancel.check()?;
            self.attention(layer, pass)?;
            self.experts(layer, pass)?;
        }
        Ok(())
    }

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

    fn head(&mut self, pass: &mut B::Pass) -> Result<B::Logits, Error> {
        let logits = self.backend.head(pass)?;
        self.observer.after(None, Stage::Head, self.backend, pass)?;
        Ok(logits)
    }

    fn done(&mut self, layer: usize, stage: Stage, pass: &B::Pass) -> Result<(), Error> {
        self.observer.after(Some(layer), stage, self.backend, pass)
    }
}
