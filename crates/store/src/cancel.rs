//! Asking work that waits or computes to stop.

use std::sync::atomic::{AtomicBool, Ordering};

/// A request to stop, checked before each layer and each expert, and while waiting for a disk.
#[derive(Debug, Default)]
pub struct Cancel(AtomicBool);

/// The caller asked for the work to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cancelled")]
pub struct Cancelled;

impl Cancel {
    /// Asks the pass to stop. Sessions are left as they were before it.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// # Errors
    /// [`Cancelled`] once [`Cancel::cancel`] was called.
    pub fn check(&self) -> Result<(), Cancelled> {
        if self.0.load(Ordering::Relaxed) { Err(Cancelled) } else { Ok(()) }
    }
}
