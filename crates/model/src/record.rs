//! Writes down which experts passes choose.

use std::io::Write;

use store::{TraceError, TraceHeader, TracePass, TraceWriter};

use crate::tensors::Experts;
use crate::{Activation, Backend, Batch, Error, Model, Observer, Stage};

/// The header of a trace of `model`, whose files have this identity.
pub fn trace_header(model: &Model, identity: u128) -> TraceHeader {
    let expert_bytes = |layer: &Experts| layer.extents.expert_bytes().iter().sum::<usize>() as u64;
    TraceHeader {
        identity,
        experts: model.config.experts,
        experts_used: model.config.experts_used,
        expert_bytes: model.experts.iter().map(expert_bytes).collect(),
    }
}

/// An observer that writes a trace of every pass that succeeds.
///
/// That it cannot write ends no pass: [`Recorder::finish`] says so.
pub struct Recorder<W> {
    writer: TraceWriter<W>,
    pass: TracePass,
    failed: Option<TraceError>,
}

impl<W: Write> Recorder<W> {
    /// Begins a trace.
    ///
    /// # Errors
    /// `to` cannot be written to.
    pub fn new(to: W, header: TraceHeader) -> Result<Recorder<W>, TraceError> {
        Ok(Recorder { writer: TraceWriter::new(to, header)?, pass: TracePass::default(), failed: None })
    }

    /// Ends the trace and gives back what was written to.
    ///
    /// # Errors
    /// The first pass that could not be written; those after it were left out.
    pub fn finish(self) -> Result<W, TraceError> {
        self.failed.map_or(Ok(()), Err)?;
        self.writer.finish()
    }
}

impl<B: Backend, W: Write> Observer<B> for Recorder<W> {
    fn begin(&mut self, batch: &Batch) {
        self.pass.runs = batch.runs().iter().map(|run| run.rows.len() as u32).collect();
        self.pass.experts.clear();
    }

    fn after(&mut self, _: Option<usize>, stage: Stage, backend: &B, pass: &B::Pass) -> Result<(), Error> {
        match stage {
            Stage::Route => {
                let chosen = backend.read(pass, Activation::Experts);
                self.pass.experts.extend(chosen.iter().map(|&expert| expert as u16));
            }
            Stage::Head if self.failed.is_none() => self.failed = self.writer.pass(&self.pass).err(),
            _ => {}
        }
        Ok(())
    }
}
