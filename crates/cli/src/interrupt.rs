//! Ctrl-C.

use std::sync::Arc;

use model::Cancel;

/// What the process exits with after Ctrl-C: 128 + SIGINT, as shells have it.
pub const EXIT_CODE: u8 = 130;

/// From here on Ctrl-C cancels the pass that runs, and a second one ends the process at once. Before, while nothing
/// but loading goes on, it ends the process as it does any other.
pub fn cancel_on_interrupt() -> anyhow::Result<Arc<Cancel>> {
    let cancel = Arc::new(Cancel::default());
    let handle = cancel.clone();
    ctrlc::set_handler(move || {
        if handle.check().is_err() {
            std::process::exit(EXIT_CODE.into());
        }
        handle.cancel();
    })
    .map_err(|error| anyhow::anyhow!("Ctrl-C cannot be handled: {error}. Run outside the sandbox that forbids it"))?;
    Ok(cancel)
}
