//! What the server is connected to.

use std::sync::Arc;

use session::Vocabulary;
use session::database::Database;
use session::engine::Engine;
use session::replay::Replay;
use text::prompt::Encoding;

/// What the server is connected to.
pub struct Wiring {
    /// What computes.
    pub engine: Engine,
    /// The model's tokens.
    pub vocabulary: Arc<Vocabulary>,
    /// The record of finished turns.
    pub replay: Replay,
    /// Where responses are stored.
    pub database: Database,
    /// What there is to tell of the model.
    pub facts: Facts,
    /// Figures of the moment.
    pub figures: Arc<dyn Fn() -> Figures + Send + Sync>,
}

/// What there is to tell of the model.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Its id, like `deepseek-v4-flash`.
    pub id: String,
    /// Its name, like `DeepSeek V4 Flash`.
    pub name: String,
    /// The format of its prompts.
    pub encoding: Encoding,
    /// `exact` or `fast`.
    pub precision: String,
    /// `official` or `plain`.
    pub arithmetic: String,
    /// What computes it.
    pub device: String,
    /// Where its experts are: `resident` or `streamed`.
    pub experts: String,
    /// The temperature where a request does not say.
    pub temperature: f32,
    /// Bytes of its file.
    pub file_bytes: u64,
}

/// Figures of the moment, counted from the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// Experts that were in memory when they were chosen.
    pub experts_hits: u64,
    /// Experts that were not.
    pub experts_misses: u64,
    /// Bytes read from disk for experts.
    pub experts_read_bytes: u64,
    /// Bytes of memory in use.
    pub memory_bytes: u64,
}
