//! DeepSeek V4: what a model file means, and how its logits are computed.
//!
//! [`Model`] is a file understood: dimensions ([`Config`]) and where each weight lies. [`forward()`] is the pass, in reading
//! order, over the stages of a [`Backend`]. [`State`] is what a session has seen, in the one format that every backend
//! shares.
//!
//! This crate knows no SIMD, no GPU and no files.

pub mod backend;
mod batch;
mod config;
mod error;
pub mod forward;
pub mod kv;
mod record;
pub mod rope;
mod snapshot;
pub mod state;
pub mod tensors;

pub use backend::{Activation, Backend, Stage, SubLayer};
pub use batch::{Batch, Row, Run};
pub use config::{Config, Yarn};
pub use error::Error;
pub use forward::{Forward, NoObserver, Observer, forward};
pub use kv::{Arithmetic, KvLayout, Precision};
pub use record::{Recorder, trace_header};
pub use snapshot::SnapshotError;
pub use state::State;
pub use store::Cancel;
pub use tensors::{Model, TensorRef};
