//! Ctrl-C and SIGTERM end a server in order; a second one ends it at once.

use std::io;
use std::sync::Arc;
use std::thread;

use model::Cancel;
use server::Shutdown;

use crate::interrupt::EXIT_CODE;

/// From here on a signal cancels loading, or shuts the server down.
///
/// # Errors
/// The system does not allow it.
pub fn stop_on_signals(cancel: Arc<Cancel>, shutdown: Shutdown) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let mut signals = runtime.block_on(async { Signals::new() })?;
    thread::Builder::new().name("infall-signals".into()).spawn(move || {
        runtime.block_on(async move {
            signals.next().await;
            cancel.cancel();
            shutdown.trigger();
            signals.next().await;
            std::process::exit(EXIT_CODE.into());
        });
    })?;
    Ok(())
}

/// What ends a program.
#[cfg(unix)]
struct Signals([tokio::signal::unix::Signal; 2]);

#[cfg(unix)]
impl Signals {
    fn new() -> io::Result<Signals> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Signals([signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?]))
    }

    async fn next(&mut self) {
        let [interrupt, terminate] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => (),
            _ = terminate.recv() => (),
        }
    }
}

/// What ends a program.
#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn new() -> io::Result<Signals> {
        Ok(Signals)
    }

    async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
