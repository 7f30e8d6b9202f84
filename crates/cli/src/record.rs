//! `--record-routes`: a file of which experts every pass chose.

use std::sync::{Arc, Mutex, PoisonError};

use model::{Backend, Observer, Recorder};
use store::TraceHeader;

use crate::output::{Output, Part};

/// A recording under way.
pub struct Recording(Arc<Mutex<Recorder<Part>>>);

impl Recording {
    /// Begins to write to `output`.
    ///
    /// # Errors
    /// It cannot be written to.
    pub fn begin(output: Output, header: TraceHeader) -> anyhow::Result<Recording> {
        Ok(Recording(Arc::new(Mutex::new(Recorder::new(output.open()?, header)?))))
    }

    /// What sees the passes.
    pub fn observer<B: Backend>(&self) -> Box<dyn Observer<B> + Send> {
        Box::new(self.0.clone())
    }

    /// Lets the file take its place. Every observer must be gone.
    ///
    /// # Errors
    /// It could not be written; nothing is left of it then.
    pub fn end(self) -> anyhow::Result<()> {
        let recorder = Arc::into_inner(self.0).expect("the session observes no more");
        recorder.into_inner().unwrap_or_else(PoisonError::into_inner).finish()?.keep()
    }
}
