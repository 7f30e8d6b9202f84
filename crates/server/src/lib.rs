//! HTTP: the chat completions, completions, responses and messages APIs over one [`session::engine::Engine`].
//!
//! ```text
//! bytes -> json -> request (one Conversation, whichever API) -> prepare -> engine
//!                                          frames <- reply <- generation <-+
//! ```
//! - [`request`] and [`reply`] translate, one file for each API, and know neither sockets nor the engine.
//! - `generation` is a request at work; `http` is everything with sockets; `auth` says who may come in.
//! - [`Wiring`] is what the server is connected to, [`Options`] is everything that can be set.
//!
//! The server knows no tensors, and computes nothing itself. See docs/server.md.

mod auth;
pub mod error;
mod fields;
pub mod frame;
mod generation;
mod http;
pub mod ids;
pub mod json;
pub mod log;
mod metrics;
mod options;
mod prepare;
mod recovery;
pub mod reply;
pub mod request;
mod responses_store;
mod server;
mod tls;
mod trace;
mod wiring;

pub use http::{Error, Shutdown, bind, serve};
pub use options::{Limits, LogFormat, Options, OptionsError};
pub use tls::TlsError;
pub use wiring::{Facts, Figures, Wiring};
