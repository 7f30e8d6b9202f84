//! Timelines, sampling, generation: what stands between a prompt's tokens and a stream of new ones.
//!
//! A [`Session`] is one timeline: the tokens seen and the backend's state after them, always in step. A [`Sampler`]
//! chooses a token from logits. [`generate()`] puts the two together for raw text; [`run_turn()`] does for a turn of a
//! conversation, with its reasoning, answer and calls.
//!
//! This crate knows no kernels and no HTTP.

pub mod database;
pub mod engine;
mod error;
mod generate;
pub mod replay;
mod sampler;
mod saved;
pub mod snapshots;
mod timeline;
mod turn;
mod vocabulary;

pub use error::Error;
pub use generate::{Limits, StopReason, generate};
pub use sampler::{Choice, Logprobs, Sampler, Sampling, TOP_K_CAP};
pub use saved::SavedError;
pub use timeline::{Context, OnLogits, Session, Slice, pass_rows, read_together};
pub use turn::{Constrain, PreparedTurn, ToolChoice, TurnEvent, TurnOptions, TurnOutcome, run_turn};
pub use vocabulary::Vocabulary;
