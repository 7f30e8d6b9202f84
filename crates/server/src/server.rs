//! What all requests share.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use session::Sampling;
use text::prompt::Mode;
use tokio::sync::Semaphore;

use crate::auth::Key;
use crate::http::body::Room;
use crate::json;
use crate::metrics::Metrics;
use crate::options::{Options, OptionsError};
use crate::request::Defaults;
use crate::responses_store::ResponseStore;
use crate::trace::Trace;
use crate::wiring::Wiring;

/// Most bytes of bodies of more than a megabyte that are in memory at a time; the others wait.
const LARGE_BODIES_BYTES: usize = 512 << 20;
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
    pub preparing: Arc<Semaphore>,
    /// Held for each value of a request that is prepared: all of them together have as many as one may have.
    pub values: Semaphore,
    /// Held while a large body is received and prepared.
    pub large_bodies: Room,
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
            preparing: Arc::new(Semaphore::new(PREPARING)),
            values: Semaphore::new(json::MAX_VALUES),
            large_bodies: Room::new(LARGE_BODIES_BYTES),
            started: Instant::now(),
        })
    }
}

/// Unix time in seconds.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
