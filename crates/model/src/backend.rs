//! What a machine must be able to do to run the model.
//!
//! A [`Backend`] implements *stages*, not tensor operations: each takes the activations of a pass one step further, and
//! inside a stage a backend fuses as it likes. The order of the stages is [`crate::forward()`]'s business.
//!
//! A device may defer a stage or fuse it with the next, as long as [`Backend::read`], [`Backend::lease`] and
//! [`Backend::head`] see its result.
//!
//! Stages read sessions and write the pass; only [`Backend::commit`] changes sessions, after every layer has succeeded.

use std::io::{Read, Write};

use store::Cancel;

use crate::{Batch, Config, Error};

/// The two sub-layers of a layer, each wrapped in hyper-connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SubLayer {
    /// Attention.
    Attention,
    /// Mixture of experts.
    Experts,
}

/// One step of a pass, in the order in which they run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Token to residual streams.
    Embed,
    /// Streams to a sub-layer's normalised input.
    HcPre(SubLayer),
    /// Query and key/value projections, normalised, rotated and rounded.
    Project,
    /// Compressed rows of windows that end in this pass.
    Compress,
    /// Choice of compressed rows for each query.
    Index,
    /// Attention over window and chosen rows.
    Attend,
    /// Grouped output projection.
    AttentionOut,
    /// Sub-layer output back into the streams.
    HcPost(SubLayer),
    /// Choice of experts.
    Route,
    /// The expert every row uses.
    SharedExpert,
    /// The chosen experts, added to the shared one.
    RoutedExperts,
    /// Streams to logits.
    Head,
}

impl Stage {
    /// The stages of one layer, in order.
    pub const LAYER: [Stage; 12] = [
        Stage::HcPre(SubLayer::Attention),
        Stage::Project,
        Stage::Compress,
        Stage::Index,
        Stage::Attend,
        Stage::AttentionOut,
        Stage::HcPost(SubLayer::Attention),
        Stage::HcPre(SubLayer::Experts),
        Stage::Route,
        Stage::SharedExpert,
        Stage::RoutedExperts,
        Stage::HcPost(SubLayer::Experts),
    ];
}

/// An intermediate value of a pass that tests and tools may look at, as rows of f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// Residual streams, `[rows, S, D]`.
    Streams,
    /// The sub-layer's normalised input, `[rows, D]`.
    Input,
    /// Low-rank queries, normalised, `[rows, q_rank]`.
    LowQueries,
    /// Queries, normalised and rotated, `[rows, H, head_dim]`.
    Queries,
    /// Attention of each head, rotated back, `[rows, H, head_dim]`.
    Heads,
    /// The sub-layer's output, `[rows, D]`.
    Output,
    /// Chosen experts in rank order, `[rows, K]`, numbers as f32.
    Experts,
    /// Their weights, `[rows, K]`.
    ExpertWeights,
    /// Compressed rows chosen by the indexer in ascending order, `[rows, top_k]`, -1 where fewer are visible.
    IndexRows,
}

/// A machine that runs the stages.
///
/// Shapes are written with `R` rows, `D` model width, `S` streams, `H` heads, `K` experts a row. A stage's formulae stand
/// in the section of docs/spec/model.md that it names.
pub trait Backend {
    /// Rows of the passes that a prompt is read in, which end at multiples of it in the session. Never chosen from how much
    /// memory there is: results may depend on it.
    const PASS_ROWS: usize;

    /// What the backend keeps for a session.
    type State;
    /// Activations of a pass, and what it will add to its sessions.
    type Pass;
    /// Logits of a pass, wherever the backend made them.
    type Logits;
    /// Experts chosen by the rows of a pass. Opaque: on a device with everything resident it is never read back.
    type Selection;
    /// Chosen experts on their way to the kernels.
    type Leases<'s>
    where
        Self: 's;

    /// The model this backend was loaded with.
    fn config(&self) -> &Config;

    /// Whether no bit depends on how many rows a pass has, so that a prompt may be read in any passes.
    fn passes_are_free(&self) -> bool;

    /// A session that has seen nothing.
    ///
    /// # Errors
    /// There is no memory for it.
    fn new_state(&self) -> Result<Self::State, Error>;

    /// Tokens that a session has seen.
    fn position(&self, state: &Self::State) -> usize;

    /// Where [`Backend::rewind`] to `target` would get.
    fn reach(&self, state: &Self::State, target: usize) -> usize;

    /// Steps a session back to `target` or to the nearest earlier position still known; returns the position reached.
    /// The last 64 tokens are always known, counted from the farthest the session has been since it last went farther
    /// back.
    fn rewind(&self, state: &mut Self::State, target: usize) -> usize;

    /// A second session that goes on from the same place.
    ///
    /// # Errors
    /// There is no memory for it.
    fn fork(&self, state: &Self::State) -> Result<Self::State, Error>;

    /// Writes a session in the common format (docs/formats.md).
    ///
    /// # Errors
    /// [`Error::Export`] if `to` fails.
    fn export(&self, state: &Self::State, to: &mut dyn Write) -> Result<(), Error>;

    /// Reads a session in the common format, from whichever backend it came.
    ///
    /// # Errors
    /// [`Error::Snapshot`] if the bytes do not fit this model or are damaged.
    fn import(&self, from: &mut dyn Read) -> Result<Self::State, Error>;

    /// Room for a pass over `batch`.
    ///
    /// # Errors
    /// There is no memory for it.
    fn begin(&self, batch: Batch, states: &[&Self::State]) -> Result<Self::Pass, Error>;

    /// Embedding rows copied into all `S` streams. §2.0
    ///
    /// # Errors
    /// All stages return an error if weights could not be fetched or the device failed; the pass is then lost, its
    /// sessions are not.
    fn embed(&self, pass: &mut Self::Pass) -> Result<(), Error>;

    /// Hyper-connection weights, the mix of the streams, and its norm: the sub-layer's input `[R, D]`. §2.1
    fn hc_pre(&self, layer: usize, sub_layer: SubLayer, pass: &mut Self::Pass) -> Result<(), Error>;

    /// Queries `[R, H, head_dim]` and this pass's raw rows. §2.3
    fn project(&self, layer: usize, states: &[&Self::State], pass: &mut Self::Pass) -> Result<(), Error>;

    /// Compressor inputs of every row, and compressed rows of windows that end here (main and indexer). §2.5
    fn compress(&self, layer: usize, states: &[&Self::State], pass: &mut Self::Pass) -> Result<(), Error>;

    /// Which compressed rows each query attends to. §2.6
    fn index(&self, layer: usize, states: &[&Self::State], pass: &mut Self::Pass) -> Result<(), Error>;

    /// Attention over the window and the chosen compressed rows, rotated back. §2.3
    fn attend(&self, layer: usize, states: &[&Self::State], pass: &mut Self::Pass) -> Result<(), Error>;

    /// Grouped output projection: the sub-layer's output `[R, D]`. §2.3
    fn attention_out(&self, layer: usize, pass: &mut Self::Pass) -> Result<(), Error>;

    /// Streams after the sub-layer. §2.2
    fn hc_post(&self, layer: usize, sub_layer: SubLayer, pass: &mut Self::Pass) -> Result<(), Error>;

    /// Experts and their weights for every row. §2.7
    fn route(&self, layer: usize, pass: &mut Self::Pass) -> Result<Self::Selection, Error>;

    /// Asks the expert store for what was chosen; loading, where needed, begins now.
    fn lease<'s>(&'s self, layer: usize, selection: &Self::Selection) -> Result<Self::Leases<'s>, Error>;

    /// The shared expert's output `[R, D]`. §2.7
    fn shared_expert(&self, layer: usize, pass: &mut Self::Pass) -> Result<(), Error>;

    /// Adds the chosen experts, in rank order whatever the order of arrival: the sub-layer's output `[R, D]`. §2.7
    fn routed_experts(
        &self,
        layer: usize,
        selection: Self::Selection,
        leases: Self::Leases<'_>,
        cancel: &Cancel,
        pass: &mut Self::Pass,
    ) -> Result<(), Error>;

    /// Logits of the rows that want them. §2.9
    ///
    /// # Errors
    /// [`Error::NotFinite`] if a logit, or a stream of the last row of any session, is not a finite number: a pass that
    /// went wrong must not become part of a session. So too if weights that the pass read may not be the model's, because
    /// their file was written to.
    fn head(&self, pass: &mut Self::Pass) -> Result<Self::Logits, Error>;

    /// The logits in host memory, `[wanted, vocab]`.
    ///
    /// # Errors
    /// The device failed.
    fn read_logits(&self, logits: Self::Logits) -> Result<Vec<f32>, Error>;

    /// Makes the pass part of its sessions. Called once, after everything has succeeded.
    fn commit(&self, pass: Self::Pass, states: &mut [&mut Self::State]);

    /// An intermediate value as it is after the last stage that ran.
    fn read(&self, pass: &Self::Pass, activation: Activation) -> Vec<f32>;

    /// Replaces an intermediate value, so that one stage can be run on a reference's input.
    ///
    /// Panics if `values` does not have the activation's shape, or if a stage chooses that value ([`Activation::Experts`],
    /// [`Activation::ExpertWeights`], [`Activation::IndexRows`]).
    fn write(&self, pass: &mut Self::Pass, activation: Activation, values: &[f32]);
}
