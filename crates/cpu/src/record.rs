//! Writes down which experts passes choose.

use std::io::Write;

use model::{Error, Model, Observer, Stage};
use store::{Source, StoreError, TraceError, TraceHeader, TracePass, TraceWriter};

use crate::backend::CpuBackend;
use crate::pass::Pass;

/// The header of a trace of `model`, whose files `source` reads.
///
/// # Errors
/// A file cannot be read.
pub fn trace_header(model: &Model, source: &Source) -> Result<TraceHeader, StoreError> {
    let expert_bytes = |layer: &model::tensors::Experts| layer.extents.expert_bytes().iter().sum::<usize>() as u64;
    Ok(TraceHeader {
        identity: source.identity()?,
        experts: model.config.experts,
        experts_used: model.config.experts_used,
        expert_bytes: model.experts.iter().map(expert_bytes).collect(),
    })
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

impl<W: Write> Observer<CpuBackend> for Recorder<W> {
    fn after(&mut self, _: Option<usize>, stage: Stage, _: &CpuBackend, pass: &Pass) -> Result<(), Error> {
        match stage {
            Stage::Embed => {
                self.pass.runs = pass.batch.runs().iter().map(|run| run.rows.len() as u32).collect();
                self.pass.experts.clear();
            }
            Stage::Route => self.pass.experts.extend(pass.experts.iter().map(|&expert| expert as u16)),
            Stage::Head if self.failed.is_none() => self.failed = self.writer.pass(&self.pass).err(),
            _ => {}
        }
        Ok(())
    }
}
