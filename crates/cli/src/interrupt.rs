//! Ctrl-C.

use std::sync::{Arc, Mutex};

use model::Cancel;

use crate::terminal;

/// What the process exits with after Ctrl-C: 128 + SIGINT, as shells have it.
pub const EXIT_CODE: u8 = 130;

/// From here on Ctrl-C cancels loading or the pass that runs, and a second one ends the process at once.
pub fn cancel_on_interrupt() -> anyhow::Result<Arc<Cancel>> {
    let cancel = Arc::new(Cancel::default());
    let handle = cancel.clone();
    handle_interrupts(move || cancel_or_exit(&handle))?;
    Ok(cancel)
}

/// Ctrl-C in a conversation of many replies: it stops the one under way.
pub struct Interrupts(Arc<Mutex<Option<Arc<Cancel>>>>);

impl Interrupts {
    /// From here on Ctrl-C stops the reply under way, a second one during the same reply ends the process, and one
    /// between replies ends it if `exits_between` says so. (An editor reads Ctrl-C as a key: it does not come here.)
    ///
    /// # Errors
    /// The system does not allow it.
    pub fn new(exits_between: bool) -> anyhow::Result<Interrupts> {
        let current = Arc::new(Mutex::new(None::<Arc<Cancel>>));
        let handle = current.clone();
        handle_interrupts(move || match &*handle.lock().expect("nothing panics in between") {
            Some(cancel) => cancel_or_exit(cancel),
            None if exits_between => std::process::exit(EXIT_CODE.into()),
            None => (),
        })?;
        Ok(Interrupts(current))
    }

    /// Runs a reply, or what can be stopped like one. Keys typed meanwhile are not shown.
    pub fn during<R>(&self, reply: impl FnOnce(&Arc<Cancel>) -> R) -> R {
        let cancel = Arc::new(Cancel::default());
        let set = |to| *self.0.lock().expect("nothing panics in between") = to;
        set(Some(cancel.clone()));
        let muted = terminal::MutedKeys::new();
        let result = reply(&cancel);
        drop(muted);
        set(None);
        result
    }
}

fn handle_interrupts(handler: impl FnMut() + Send + 'static) -> anyhow::Result<()> {
    ctrlc::set_handler(handler)
        .map_err(|error| anyhow::anyhow!("Ctrl-C cannot be handled: {error}. Run outside the sandbox that forbids it"))
}

fn cancel_or_exit(cancel: &Cancel) {
    if cancel.check().is_err() {
        terminal::unmute_keys();
        std::process::exit(EXIT_CODE.into());
    }
    cancel.cancel();
}
