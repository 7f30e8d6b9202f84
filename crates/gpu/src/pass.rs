//! What a pass holds on the device: activations, and tables that its kernels look things up in.

use std::sync::{Mutex, PoisonError};

use model::rope::Rope;
use model::{Batch, Config, KvLayout, Precision, Run};
use store::Prefetching;

use crate::GpuError;
use crate::device::{Device, WORKGROUP_BYTES};
use crate::kernel::{Buffer, Commands};
use crate::state::GpuState;
use crate::together;
use crate::weights::LayerWeights;

/// Most rows that share a product's weights without tiles: passes of more compute by tiles in `Fast`.
pub(crate) const FEW_ROWS: usize = 8;

/// Choices for each expert up to which experts are computed choice by choice: a tile of rows that chose the same one is worth it from
/// more on (docs/performance.md, "Experts of few rows").
const CHOICES_OF_EXPERT: usize = 4;

/// Most rows whose routed experts are computed choice by choice.
pub(crate) fn choice_rows(c: &Config) -> usize {
    CHOICES_OF_EXPERT * c.experts / c.experts_used
}

/// Keys in a piece of attention: each is summed by itself.
pub(crate) const PIECE_KEYS: usize = 32;

/// Bytes of partial attention, and of an indexer's scores: rows are taken in parts that fit.
const PART_BYTES: usize = 64 << 20;

/// Bytes of a row of `width` values as digits: three vectors for 16 values, and one for the row.
pub(crate) fn digits_bytes(width: usize) -> u64 {
    16 * (3 * width as u64 / 16 + 1)
}

/// Of `rows` rows with `each` values as many as are taken at once.
fn part_rows(rows: usize, each: usize) -> usize {
    (PART_BYTES / (4 * each.max(1))).clamp(1, rows)
}

/// Values that there has to be room for, if up to `rows` rows with up to `each` values are taken in such parts: parts of rows with
/// fewer values may have more of them together.
fn part_values(rows: usize, each: usize) -> usize {
    (PART_BYTES / 4).min(rows * each).max(each)
}

/// Sizes of a model that buffers follow from.
#[derive(Clone, Debug)]
pub(crate) struct Shapes {
    pub(crate) config: Config,
    /// Values of a row of projections, of queries, and of routing, the most of any layer.
    pub(crate) projected: usize,
    pub(crate) queried: usize,
    pub(crate) routed: usize,
    /// Words of a raw row.
    pub(crate) row_words: usize,
    /// Bytes of the tiles of so many choices.
    pub(crate) tiles_bytes: fn(usize, usize) -> u64,
    /// Whether passes of many rows compute by tiles.
    pub(crate) has_tiles: bool,
}

impl Shapes {
    pub(crate) fn new<B>(
        config: &Config,
        layout: &KvLayout,
        layers: &[LayerWeights<B>],
        tiles_bytes: fn(usize, usize) -> u64,
    ) -> Shapes {
        let most = |values: fn(&LayerWeights<B>) -> usize| layers.iter().map(values).max().unwrap_or(0);
        Shapes {
            config: config.clone(),
            projected: most(|layer| layer.projected),
            queried: most(|layer| layer.queried),
            routed: config.experts + 2 * config.shared_width,
            row_words: layout.layers.iter().map(|layer| layer.raw.row_bytes() / 4).max().unwrap_or(0),
            tiles_bytes,
            has_tiles: layout.precision == Precision::Fast,
        }
    }

    /// Values of the widest row that is multiplied.
    fn widest(&self) -> usize {
        let c = &self.config;
        let widths = [c.d_model, c.q_rank, c.heads * c.head_dim, c.o_groups * c.o_rank, c.shared_width];
        widths.into_iter().max().expect("there are widths")
    }

    /// Parts that the sums of a hyper-connection come in.
    pub(crate) fn slices(&self) -> usize {
        self.config.d_model / 64
    }

    /// Values of partial attention of a row with so many pieces.
    fn piece_values(&self) -> usize {
        self.config.heads * (self.config.head_dim + 2)
    }

    /// Heads whose keys are unpacked together in attention of few rows, where a key takes `row_words`: eight, if that many
    /// divide the heads and fit workgroup memory beside 32 keys.
    pub(crate) fn heads_together(heads: usize, row_words: usize) -> usize {
        let bytes = |heads: usize| 4 * (32 * (row_words | 1) + 32 + 9 * 32 * heads);
        if heads.is_multiple_of(8) && bytes(8) <= WORKGROUP_BYTES as usize { 8 } else { 4 }
    }

    /// Rows whose attention in `pieces` pieces is under way at once.
    pub(crate) fn attended_together(&self, pieces: usize, rows: usize) -> usize {
        part_rows(rows, self.piece_values() * pieces)
    }

    /// Rows whose scores of `keys` keys are held at once.
    pub(crate) fn scored_together(&self, keys: usize, rows: usize) -> usize {
        part_rows(rows, keys)
    }

    /// Most pieces of a row at a position before `end`.
    pub(crate) fn pieces(&self, end: usize) -> usize {
        let c = &self.config;
        let compressed = |&ratio: &usize| match ratio {
            0 => 0,
            4 => (end / 4).min(c.index_top_k),
            ratio => end / ratio,
        };
        let most = c.compress_ratios.iter().map(compressed).max().unwrap_or(0);
        (c.window.min(end) + most).div_ceil(PIECE_KEYS)
    }
}

/// Activations of a pass of up to `rows` rows, `[rows, …]`; in buffers, or in what only counts their bytes.
pub(crate) struct Activations<B = Buffer> {
    pub(crate) rows: usize,
    /// Position up to which attention has room.
    end: usize,
    pub(crate) embedded: B,
    pub(crate) streams: B,
    /// `post` and mix of the hyper-connection in progress, `[S + S²]`.
    pub(crate) hyper: B,
    pub(crate) sums: B,
    pub(crate) input: B,
    /// Outputs of the sub-layer: attention's `[D]`, or `[1 + K, D]`.
    pub(crate) output: B,
    pub(crate) projected: B,
    pub(crate) queries: B,
    pub(crate) heads: B,
    pub(crate) low: B,
    pub(crate) partial: B,
    pub(crate) scores: B,
    pub(crate) chosen: B,
    pub(crate) routed: B,
    pub(crate) experts: B,
    pub(crate) shares: B,
    pub(crate) shared_mid: B,
    pub(crate) mid: B,
    pub(crate) hidden: B,
    /// Rows with a value that is no number.
    pub(crate) flags: B,
    pub(crate) tables: B,
    /// Inputs of products of a few rows, laid out for lanes (`kernels/weights.wgsl`): as digits, and transposed.
    pub(crate) digits: B,
    pub(crate) transposed: B,
    /// Raw rows of a large pass.
    pub(crate) fresh: B,
    /// What tiled products need, in passes of more than [`FEW_ROWS`] rows.
    pub(crate) many: Option<ManyActivations<B>>,
}

/// Activations as halves, and choices grouped by expert.
pub(crate) struct ManyActivations<B = Buffer> {
    /// Of whatever is multiplied next; what undoes each row's factor.
    pub(crate) halves: B,
    pub(crate) inverses: B,
    /// Of a sub-layer's input.
    pub(crate) input_halves: B,
    pub(crate) input_inverses: B,
    pub(crate) order: B,
    pub(crate) tiles: B,
}

/// Makes a buffer for something of so many bytes.
pub(crate) type Make<'m, B> = dyn Fn(&str, u64) -> Result<B, GpuError> + 'm;

impl<B> Activations<B> {
    /// Room for up to `rows` rows before position `end`.
    pub(crate) fn new(
        make: &Make<'_, B>,
        shapes: &Shapes,
        rows: usize,
        end: usize,
    ) -> Result<Activations<B>, GpuError> {
        let c = &shapes.config;
        let floats = |what: &str, count: usize| make(what, 4 * count as u64);
        let pieces = shapes.pieces(end);
        let keys = end / 4;
        // Every input of a few rows, or those of experts.
        let of_experts = if shapes.has_tiles { rows.min(choice_rows(c)) } else { 0 };
        let laid_out = [(FEW_ROWS, shapes.widest()), (of_experts, c.d_model)];
        let digits = laid_out.map(|(rows, width)| rows as u64 * digits_bytes(width));
        let transposed = laid_out.map(|(rows, width)| rows * width);
        Ok(Activations {
            rows,
            end,
            embedded: floats("embeddings", rows * c.d_model)?,
            streams: floats("streams", rows * c.stream_width())?,
            hyper: floats("hyper-connections", rows * (c.streams + c.streams * c.streams))?,
            sums: floats("sums", rows * shapes.slices() * (c.hc_outputs() + 1))?,
            input: floats("inputs", rows * c.d_model)?,
            output: floats("outputs", rows * (1 + c.experts_used) * c.d_model)?,
            projected: floats("projections", rows * shapes.projected)?,
            queries: floats("queries", rows * shapes.queried)?,
            heads: floats("heads", rows * c.heads * c.head_dim)?,
            low: floats("low-rank outputs", rows * c.o_groups * c.o_rank)?,
            partial: floats("pieces of attention", part_values(rows, pieces * shapes.piece_values()))?,
            scores: floats("scores", part_values(rows, keys))?,
            chosen: floats("chosen rows", rows * c.index_top_k)?,
            routed: floats("router and shared expert", rows * shapes.routed)?,
            experts: floats("chosen experts", rows * c.experts_used)?,
            shares: floats("weights of experts", rows * c.experts_used)?,
            shared_mid: floats("the shared expert", rows * c.shared_width)?,
            mid: floats("experts", rows * c.experts_used * c.expert_width)?,
            hidden: floats("hidden rows", rows * c.d_model)?,
            flags: floats("flags", rows + 1)?,
            // Two rotations of every row, one of a window of each kind that may end at it, a token; and its runs.
            tables: floats("tables", rows * (4 * c.rope_dim + 1) + together::table_words(rows, c.layers))?,
            digits: make("digits of inputs", digits[0].max(digits[1]))?,
            transposed: floats("transposed inputs", transposed[0].max(transposed[1]))?,
            fresh: floats("new rows", rows * shapes.row_words)?,
            many: (shapes.has_tiles && rows > FEW_ROWS)
                .then(|| ManyActivations::new(make, shapes, rows))
                .transpose()?,
        })
    }
}

impl<B> ManyActivations<B> {
    fn new(make: &Make<'_, B>, shapes: &Shapes, rows: usize) -> Result<ManyActivations<B>, GpuError> {
        let c = &shapes.config;
        let halves = |what: &str, width: usize| make(what, 2 * (rows * width) as u64);
        let choices = rows * c.experts_used;
        Ok(ManyActivations {
            halves: halves("halves", shapes.widest())?,
            inverses: make("factors of halves", 4 * rows as u64)?,
            input_halves: halves("halves of inputs", c.d_model)?,
            input_inverses: make("factors of inputs", 4 * rows as u64)?,
            order: make("choices by expert", 4 * choices as u64)?,
            tiles: make("tiles of experts", (shapes.tiles_bytes)(choices, c.experts))?,
        })
    }
}

/// Rows and positions that are made room for when a pass needs so many. There are two kinds of passes: a few tokens, and
/// prompts.
pub(crate) fn room(rows: usize, end: usize) -> (usize, usize) {
    let rows = if rows <= FEW_ROWS { FEW_ROWS } else { rows.next_power_of_two() };
    (rows, end.next_power_of_two().max(4096))
}

/// Activations of passes that have ended, to be used again.
#[derive(Default)]
pub(crate) struct Pool(Mutex<Vec<Activations>>);

impl Pool {
    /// Room for `rows` rows that end at position `end`; and whether anything was given back for it.
    pub(crate) fn take(
        &self,
        device: &Device,
        shapes: &Shapes,
        rows: usize,
        end: usize,
    ) -> Result<(Activations, bool), GpuError> {
        let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (rows, end) = room(rows, end);
        if let Some(i) = pool.iter().position(|held| held.rows == rows && held.end >= end) {
            return Ok((pool.swap_remove(i), false));
        }
        let before = pool.len();
        pool.retain(|held| (held.rows <= FEW_ROWS) != (rows <= FEW_ROWS));
        let make = |what: &str, bytes: u64| Buffer::new(device, what, bytes);
        Ok((Activations::new(&make, shapes, rows, end)?, pool.len() < before))
    }

    fn give_back(&self, activations: Activations) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(activations);
    }
}

/// Which sub-layer's outputs wait to go back into the streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pending {
    /// None.
    Nothing,
    /// So many outputs a row.
    Outputs(usize),
}

/// A pass under way.
pub struct GpuPass {
    pub(crate) batch: Batch,
    /// The device is told of what is encoded in here; `read` needs it, and has the pass shared.
    pub(crate) commands: Mutex<Commands>,
    pub(crate) on: Option<Activations>,
    pool: std::sync::Arc<Pool>,
    /// Where rotations begin in the tables, in pairs: of layers without compression, with it; of windows, by run.
    pub(crate) rotations: [usize; 2],
    pub(crate) windows: Vec<[usize; 2]>,
    /// Runs that a dispatch computes at most, and where those of the rows begin in the tables, in pairs.
    pub(crate) together: usize,
    pub(crate) runs: usize,
    /// Where tokens begin in the tables, in words.
    pub(crate) tokens: usize,
    /// Outputs of the sub-layer that ran last, a row.
    pub(crate) outputs: usize,
    pub(crate) pending: Mutex<Pending>,
    /// The layer whose attention ran last.
    pub(crate) layer: usize,
    pub(crate) _prefetching: Option<Prefetching>,
}

/// Windows of `ratio` tokens that end in `run`: the first, and how many.
pub(crate) fn windows(run: &Run, ratio: usize) -> (usize, usize) {
    let first = run.start / ratio;
    (first, (run.start + run.rows.len()) / ratio - first)
}

/// Runs that a dispatch computes in a pass of `rows` rows, where `together` sessions can be bound.
pub(crate) fn runs_together(rows: usize, together: usize) -> usize {
    if rows <= FEW_ROWS { together } else { 1 }
}

impl GpuPass {
    /// A pass over `states`; where its rows are few, a dispatch computes runs of up to `together` sessions.
    pub(crate) fn new(
        (batch, states, together): (Batch, &[&GpuState], usize),
        mut commands: Commands,
        on: Activations,
        pool: std::sync::Arc<Pool>,
        ropes: &[Rope; 2],
        prefetching: Option<Prefetching>,
    ) -> GpuPass {
        let mut pairs: Vec<(f32, f32)> = Vec::new();
        let rotations = [0, 1].map(|kind| {
            let at = pairs.len();
            batch.rows().iter().for_each(|row| pairs.extend(ropes[kind].at(row.position)));
            at
        });
        let mut windows_of = |run: &Run, ratio: usize| {
            let at = pairs.len();
            let (first, count) = windows(run, ratio);
            (first..first + count).for_each(|window| pairs.extend(ropes[1].at(window * ratio)));
            at
        };
        let windows: Vec<_> = batch.runs().iter().map(|run| [windows_of(run, 4), windows_of(run, 128)]).collect();
        let mut tables: Vec<u8> =
            pairs.iter().flat_map(|(cos, sin)| [cos.to_le_bytes(), sin.to_le_bytes()].concat()).collect();
        let runs = pairs.len();
        let together = runs_together(batch.rows().len(), together);
        if together > 1 && batch.runs().len() > 1 {
            let table = together::table(batch.runs(), states, &windows, together);
            tables.extend(bytemuck::cast_slice::<u32, u8>(&table));
        }
        let tokens = tables.len() / 4;
        tables.extend(batch.rows().iter().flat_map(|row| row.token.to_le_bytes()));
        commands.write((&on.tables, 0), &tables);
        commands.clear(&on.flags);
        GpuPass {
            batch,
            commands: Mutex::new(commands),
            on: Some(on),
            pool,
            rotations,
            windows,
            together,
            runs,
            tokens,
            outputs: 1,
            pending: Mutex::new(Pending::Nothing),
            layer: 0,
            _prefetching: prefetching,
        }
    }

    /// Rows in the pass.
    pub fn rows(&self) -> usize {
        self.batch.rows().len()
    }

    /// The activations.
    pub(crate) fn on(&self) -> &Activations {
        self.on.as_ref().expect("a pass has its activations until it ends")
    }
}

impl Drop for GpuPass {
    fn drop(&mut self) {
        if let Some(activations) = self.on.take() {
            self.pool.give_back(activations);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Rows are taken in parts by what a dispatch needs, and room is made for the largest: parts of any smaller need must fit.
        #[test]
        fn parts_of_every_pass_fit_their_room(
            (rows, end) in (1_usize..4097, 1_usize..200_000),
            (of_rows, of_pieces) in (0.0..1.0, 0.0..1.0),
            each in prop::sample::select(vec![64 * 514, 128 * 514, 8 * 82, 4]),
            most_pieces in 1_usize..2000,
        ) {
            let (room_rows, _) = room(rows, end);
            let held = part_values(room_rows, most_pieces * each);
            let pieces = 1 + (of_pieces * (most_pieces - 1) as f64) as usize;
            let count = 1 + (of_rows * (rows - 1) as f64) as usize;
            let together = part_rows(count, pieces * each);
            prop_assert!(together * pieces * each <= held, "{together} rows of {pieces} pieces in {held}");
        }
    }
}
