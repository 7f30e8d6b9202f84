//! What all requests share.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use session::Sampling;
use text::prompt::Mode;
use tokio::sync::Semaphore;

use crate::auth::Key;
use crate::metrics::Metrics;
use crate::options::{Options, OptionsError};
use crate::request::Defaults;
use crate::responses_store::ResponseStore;
use crate::trace::Trace;
use crate::wiring::Wiring;

/// Most bodies of more than a megabyte that are in memory at a time; the others wait.
const LARGE_BODIES: usize = 8;
/// Most requests that are parsed and tokenized at a time; the others wait.
const PREPARING: usize = 4;

/// What all requests share.
pub struct Server {
    /// What the server is connected to.
    pub wiring: Wiring,
    /// What was set.
    pub options: Options,
    /// What holds where a request says nothing.
    pub defaults: Defaults,
    /// What has happened.
    pub metrics: Metrics,
    /// Responses that are stored.
    pub responses: ResponseStore,
    /// Where requests are written in full, if anywhere.
    pub trace: Option<Trace>,
    /// What clients must show, if anything.
    pub key: Option<Key>,
    /// Whether the server listens at a loopback address.
    pub is_loopback: bool,
    /// Held while a request is prepared.
    pub preparing: Semaphore,
    /// Held while a large body is read and prepared.
    pub large_bodies: Semaphore,
    /// When the server started.
    pub started: Instant,
}

impl Server {
    /// # Errors
    /// [`OptionsError`] if the options cannot be followed.
    pub fn new(
        wiring: Wiring,
        options: Options,
        is_loopback: bool,
        trace: Option<Trace>,
    ) -> Result<Server, OptionsError> {
        let defaults = Defaults {
            encoding: wiring.facts.encoding,
            mode: Mode::from_effort_name(&options.effort, wiring.facts.encoding)?,
            sampling: Sampling { temperature: wiring.facts.temperature, ..Sampling::default() },
            respect_sampling: options.respect_sampling,
            max_tokens: options.max_tokens,
            always_constrain: options.always_constrain,
            raw_completions: options.raw_completions,
            ignored_fields: options.ignored_fields.clone(),
        };
        let key = options.key()?.map(|key| Key::new(&key));
        let figures = wiring.figures.clone();
        Ok(Server {
            metrics: Metrics::new(wiring.engine.clone(), figures),
            responses: ResponseStore::new(&wiring.database, options.stored_responses),
            wiring,
            options,
            defaults,
            trace,
            key,
            is_loopback,
            preparing: Semaphore::new(PREPARING),
            large_bodies: Semaphore::new(LARGE_BODIES),
            started: Instant::now(),
        })
    }
}

/// Unix time in seconds.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
