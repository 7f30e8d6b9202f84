//! The activations of one pass.

use model::rope::{Rope, Rotation};
use model::state::Delta;
use model::{Activation, Batch, Config, KvLayout};
use store::Prefetching;

/// Which compressed rows a query attends to.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Chosen {
    /// The first so many.
    First(usize),
    /// These, ascending.
    Rows(Vec<u32>),
}

impl Chosen {
    pub(crate) fn len(&self) -> usize {
        match self {
            Chosen::First(count) => *count,
            Chosen::Rows(rows) => rows.len(),
        }
    }

    pub(crate) fn row(&self, i: usize) -> usize {
        match self {
            Chosen::First(_) => i,
            Chosen::Rows(rows) => rows[i] as usize,
        }
    }
}

/// Activations of a pass, and what it will add to its sessions. Buffers are `[rows, …]`, row major.
pub struct Pass {
    pub(crate) batch: Batch,
    /// One for each run of the batch.
    pub(crate) deltas: Vec<Delta>,
    /// The run that each row belongs to.
    pub(crate) run_of_row: Vec<usize>,
    /// Rotation of each row in layers without compression, and in layers with it.
    pub(crate) rotations: [Vec<Rotation>; 2],
    /// `[R, S, D]`.
    pub(crate) streams: Vec<f32>,
    /// Hyper-connection weights of the sub-layer in progress: `[R, S]` and `[R, S, S]` (source, destination).
    pub(crate) post: Vec<f32>,
    pub(crate) mix: Vec<f32>,
    /// `[R, D]`: normalised input and output of the sub-layer in progress.
    pub(crate) input: Vec<f32>,
    pub(crate) output: Vec<f32>,
    /// `[R, q_rank]`, normalised: what both the queries and the indexer's are made from.
    pub(crate) q_low: Vec<f32>,
    /// `[R, H, head_dim]`.
    pub(crate) queries: Vec<f32>,
    pub(crate) heads: Vec<f32>,
    /// Compressed rows chosen for each row.
    pub(crate) chosen: Vec<Chosen>,
    /// `[R, K]` in rank order.
    pub(crate) experts: Vec<u32>,
    pub(crate) expert_weights: Vec<f32>,
    index_top_k: usize,
    /// Ends what is read ahead for the pass when it is dropped, finished or not.
    _prefetching: Prefetching,
}

impl Pass {
    pub(crate) fn new(
        batch: Batch,
        prefetching: Prefetching,
        config: &Config,
        layout: &KvLayout,
        ropes: &[Rope; 2],
    ) -> Pass {
        let rows = batch.rows().len();
        let rotations = ropes.each_ref().map(|rope| batch.rows().iter().map(|row| rope.at(row.position)).collect());
        let run_of_row =
            batch.runs().iter().enumerate().flat_map(|(i, run)| run.rows.clone().map(move |_| i)).collect();
        Pass {
            deltas: batch.runs().iter().map(|run| Delta::new(layout, run.rows.len())).collect(),
            run_of_row,
            rotations,
            streams: vec![0.0; rows * config.stream_width()],
            post: vec![0.0; rows * config.streams],
            mix: vec![0.0; rows * config.streams * config.streams],
            input: vec![0.0; rows * config.d_model],
            output: vec![0.0; rows * config.d_model],
            q_low: Vec::new(),
            queries: Vec::new(),
            heads: vec![0.0; rows * config.heads * config.head_dim],
            chosen: vec![Chosen::First(0); rows],
            experts: vec![0; rows * config.experts_used],
            expert_weights: vec![0.0; rows * config.experts_used],
            index_top_k: config.index_top_k,
            _prefetching: prefetching,
            batch,
        }
    }

    /// Rows in the pass.
    pub fn rows(&self) -> usize {
        self.batch.rows().len()
    }

    pub(crate) fn read(&self, activation: Activation) -> Vec<f32> {
        match activation {
            Activation::Streams => self.streams.clone(),
            Activation::Input => self.input.clone(),
            Activation::LowQueries => self.q_low.clone(),
            Activation::Queries => self.queries.clone(),
            Activation::Heads => self.heads.clone(),
            Activation::Output => self.output.clone(),
            Activation::Experts => self.experts.iter().map(|&expert| expert as f32).collect(),
            Activation::ExpertWeights => self.expert_weights.clone(),
            Activation::IndexRows => self.index_rows(),
        }
    }

    pub(crate) fn write(&mut self, activation: Activation, values: &[f32]) {
        let into = match activation {
            Activation::Streams => &mut self.streams,
            Activation::Input => &mut self.input,
            Activation::LowQueries => &mut self.q_low,
            Activation::Queries => &mut self.queries,
            Activation::Heads => &mut self.heads,
            Activation::Output => &mut self.output,
            Activation::Experts | Activation::ExpertWeights | Activation::IndexRows => {
                panic!("{activation:?} is chosen by its stage")
            }
        };
        into.copy_from_slice(values);
    }

    fn index_rows(&self) -> Vec<f32> {
        let row = |chosen: &Chosen| {
            let mut rows: Vec<f32> = (0..chosen.len()).map(|i| chosen.row(i) as f32).collect();
            rows.resize(self.index_top_k.max(rows.len()), -1.0);
            rows
        };
        self.chosen.iter().flat_map(row).collect()
    }
}
