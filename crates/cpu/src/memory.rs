//! How much memory a model will take on the CPU, told from its header alone.
//!
//! Beside the code that allocates: who adds a buffer there adds it here, and `tests/memory.rs` notices if not.

use std::sync::Mutex;

use model::{Config, KvLayout, Model, Precision, TensorRef};
use quant::blocks::ActivationQ8_0;
use quant::exact::TILE_ROWS;

use crate::attention::{HEADS_TOGETHER, ROWS_TOGETHER};
use crate::parallel::rows_each;

/// The largest pass that will run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassShape {
    /// Its rows.
    pub rows: usize,
    /// Rows whose logits are wanted.
    pub wanted_rows: usize,
    /// Position after its last row.
    pub end_tokens: usize,
    /// Threads that compute.
    pub threads: usize,
}

/// Bytes of all weights but the routed experts once they are loaded: vectors as f32, matrices as the file has them. When
/// experts are streamed, the token embedding is not loaded: its rows are read one by one.
pub fn static_bytes(model: &Model, streamed: bool) -> u64 {
    let mut bytes = 0;
    let counted = model.tensors.try_map(&mut |tensor: &TensorRef| {
        bytes += if tensor.rows == 1 { tensor.cols as u64 * 4 } else { tensor.extent.bytes };
        Ok::<_, std::convert::Infallible>(())
    });
    counted.expect("counting cannot fail");
    if streamed { bytes - model.tensors.embedding.extent.bytes } else { bytes }
}

/// The most bytes that a pass of one session holds at any moment: what lives as long as the pass, what each thread
/// keeps, and the largest that a stage needs for itself.
pub fn pass_bytes(config: &Config, layout: &KvLayout, shape: PassShape) -> u64 {
    let how = Products { precision: layout.precision, threads: shape.threads };
    let stages = [
        project(config, how, shape.rows),
        compress(config, layout, how, shape.rows),
        index(config, how, shape),
        attend(config, shape),
        attention_out(config, how, shape.rows),
        hyper_connections(config, how, shape),
        experts(config, how, shape.rows),
        head(config, how, shape),
    ];
    let largest = stages.into_iter().max().expect("there are stages");
    (activations(config, shape.rows) + delta(layout, shape.rows) + shape.threads * scratch(config, shape) + largest)
        as u64
}

/// Bytes of `count` values.
const fn floats(count: usize) -> usize {
    count * size_of::<f32>()
}

/// How products are made.
#[derive(Clone, Copy)]
struct Products {
    precision: Precision,
    threads: usize,
}

impl Products {
    /// A product of `[rows, cols]` with a matrix of `outputs` rows: the result, and the activations as the kernel takes
    /// them.
    fn product(self, rows: usize, cols: usize, outputs: usize) -> usize {
        floats(rows * outputs) + self.pieces(rows, outputs) + self.quantized(rows * cols)
    }

    /// Who writes which piece of a result.
    fn pieces(self, rows: usize, outputs: usize) -> usize {
        // Lists have room for at least four, and for a power of two.
        let lists = outputs.div_ceil(rows_each(outputs, rows, self.threads));
        if rows == 1 {
            return lists * (size_of::<Mutex<Option<(usize, &mut [f32])>>>() + 2 * size_of::<&mut [f32]>());
        }
        // Once as they are made, and once each with a lock.
        lists * size_of::<Mutex<Option<(usize, Vec<&mut [f32]>)>>>()
            + lists * (size_of::<Vec<&mut [f32]>>() + rows.next_power_of_two().max(4) * size_of::<&mut [f32]>())
    }

    /// Activations in 8 bits, if that is how they are multiplied. What Exact multiplies instead is counted by `scratch`.
    fn quantized(self, values: usize) -> usize {
        match self.precision {
            Precision::Exact => 0,
            // Blocks of 32 take more than blocks of 256 do.
            Precision::Fast => values.div_ceil(32) * size_of::<ActivationQ8_0>(),
        }
    }
}

/// What lives as long as the pass.
fn activations(c: &Config, rows: usize) -> usize {
    let widths = [
        c.stream_width(),
        c.streams + c.streams * c.streams,
        2 * c.d_model,
        c.q_rank,
        2 * c.heads * c.head_dim,
        2 * c.experts_used,
        // Two rotations, a pair of values for every two that are rotated.
        2 * c.rope_dim,
    ];
    // Chosen rows, and the batch's own few words.
    let listed = c.index_top_k * size_of::<u32>() + 128;
    floats(rows * widths.iter().sum::<usize>()) + rows * listed
}

/// What the pass will add to its session.
fn delta(layout: &KvLayout, rows: usize) -> usize {
    let layer = |layer: &model::kv::LayerLayout| {
        let compressor =
            |c: &model::kv::CompressorLayout| floats(rows * 2 * c.width) + (rows / c.ratio + 1) * c.row.row_bytes();
        rows * layer.raw.row_bytes() + layer.main.iter().chain(&layer.index).map(compressor).sum::<usize>()
    };
    layout.layers.iter().map(layer).sum()
}

/// What a thread keeps from product to product: dequantised weight rows, and a part of a result.
fn scratch(c: &Config, shape: PassShape) -> usize {
    let inputs =
        [c.stream_width(), c.d_model, c.heads * c.head_dim / c.o_groups, c.o_groups * c.o_rank, c.shared_width];
    let outputs = [c.heads * c.head_dim, c.d_model, c.shared_width, c.index_heads * c.index_head_dim, c.q_rank];
    let part = |rows: usize, outputs: usize| rows * rows_each(outputs, rows, shape.threads).min(outputs);
    let parts =
        outputs.into_iter().map(|outputs| part(shape.rows, outputs)).chain([part(shape.wanted_rows, c.vocab_size)]);
    let part = if shape.rows == 1 { 0 } else { parts.max().expect("there are matrices") };
    floats(TILE_ROWS * inputs.into_iter().max().expect("there are matrices") + part)
}

fn project(c: &Config, how: Products, rows: usize) -> usize {
    // The queries themselves live in the pass.
    let queries = how.quantized(rows * c.q_rank) + how.pieces(rows, c.heads * c.head_dim);
    let packed = rows * size_of::<&mut [u8]>();
    how.quantized(rows * c.d_model) + queries.max(floats(rows * c.head_dim) + how.pieces(rows, c.head_dim) + packed)
}

fn compress(c: &Config, layout: &KvLayout, how: Products, rows: usize) -> usize {
    let widths = layout.layers.iter().flat_map(|layer| layer.main.iter().chain(&layer.index)).map(|c| c.width);
    let inputs = |width| floats(rows * width) + how.product(rows, c.d_model, width);
    widths.max().map_or(0, inputs)
}

fn index(c: &Config, how: Products, shape: PassShape) -> usize {
    let width = c.index_heads * c.index_head_dim;
    let gathered = floats(shape.rows * (c.q_rank + c.d_model));
    // A score and a place in the order for every key that a ratio-4 layer's rows see.
    let together = shape.rows.min(ROWS_TOGETHER);
    let keys = shape.end_tokens / 4;
    let order = together * keys * (size_of::<f32>() + size_of::<u32>());
    let queries = how.product(shape.rows, c.q_rank, width);
    gathered + queries + how.product(shape.rows, c.d_model, c.index_heads) + order
}

fn attend(c: &Config, shape: PassShape) -> usize {
    let most = |&ratio: &usize| match ratio {
        0 => 0,
        // Where a tile's first rows still see too few to choose, what they share, and what another chose.
        4 => (shape.end_tokens / 4).min(c.index_top_k * shape.rows.min(2)),
        _ => shape.end_tokens / ratio,
    };
    let compressed = c.compress_ratios.iter().map(most).max().unwrap_or(0);
    let window = (c.window + shape.rows.min(ROWS_TOGETHER) - 1).min(shape.end_tokens);
    let tiles = shape.rows.div_ceil(ROWS_TOGETHER);
    let at_work = if shape.rows == 1 { 1 } else { shape.threads.min(tiles) };
    let packed = size_of::<&[u8]>();
    let keys = (window + compressed) * (floats(c.head_dim) + packed);
    at_work * keys + shape.threads * floats(2 * (c.window.min(shape.end_tokens) + compressed) * HEADS_TOGETHER)
}

fn attention_out(c: &Config, how: Products, rows: usize) -> usize {
    let (group, low) = (c.heads * c.head_dim / c.o_groups, c.o_groups * c.o_rank);
    // Results go into rows that are there already.
    let of_group = how.quantized(rows * group) + how.pieces(rows, c.o_rank);
    let of_all = how.quantized(rows * low) + how.pieces(rows, c.d_model);
    floats(rows * (low + group)) + of_group.max(of_all)
}

fn hyper_connections(c: &Config, how: Products, shape: PassShape) -> usize {
    let weights = shape.rows * (floats(c.hc_outputs()) + 3 * size_of::<Vec<f32>>());
    let before = floats(shape.rows * c.d_model)
        + how.product(shape.rows, c.stream_width(), c.hc_outputs()).max(floats(shape.rows * c.hc_outputs()) + weights);
    before.max(shape.threads * floats(c.stream_width()))
}

fn experts(c: &Config, how: Products, rows: usize) -> usize {
    // A look ahead at the next layer's choice has an input of its own.
    let route = floats(rows * c.d_model)
        + how.product(rows, c.d_model, c.experts)
        + c.experts * size_of::<Vec<usize>>()
        + rows * c.experts_used * 32;
    // Gate and up; what they become is multiplied into rows that are there already.
    let ffn = |width: usize| {
        let down = how.quantized(rows * width) + how.pieces(rows, c.d_model);
        floats(2 * rows * width) + how.pieces(rows, width).max(down)
    };
    let shared = how.quantized(rows * c.d_model) + ffn(c.shared_width);
    // An expert that every row chose: its input is selected, and all outputs are kept apart.
    let selected = match how.precision {
        Precision::Exact => floats(rows * c.d_model),
        Precision::Fast => 2 * how.quantized(rows * c.d_model),
    };
    let routed = floats(rows * c.experts_used * c.d_model) + selected + ffn(c.expert_width);
    let choices = c.experts * size_of::<Vec<usize>>() + rows * c.experts_used * 32;
    route.max(shared).max(routed + choices)
}

fn head(c: &Config, how: Products, shape: PassShape) -> usize {
    let projected = how.product(shape.rows, c.stream_width(), c.streams);
    let logits = how.product(shape.wanted_rows, c.d_model, c.vocab_size);
    projected + floats(shape.wanted_rows * c.d_model) + logits
}
