//! How much memory a model will take on the CPU, told from its header alone.
//!
//! Beside the code that allocates: who adds a buffer there adds it here, and `tests/memory.rs` notices if not.

use model::{Config, KvLayout, Model, Precision, TensorRef};
use quant::blocks::{ActivationQ8K, QK_K};
use quant::exact::TILE_ROWS;

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
    let precision = layout.precision;
    let stages = [
        project(config, precision, shape.rows),
        compress(config, layout, shape.rows),
        index(config, precision, shape),
        attend(config, shape),
        attention_out(config, precision, shape.rows),
        hyper_connections(config, precision, shape),
        experts(config, precision, shape.rows),
        head(config, precision, shape),
    ];
    let largest = stages.into_iter().max().expect("there are stages");
    (activations(config, shape.rows) + delta(layout, shape.rows) + shape.threads * scratch(config) + largest) as u64
}

/// Bytes of `count` values.
const fn floats(count: usize) -> usize {
    count * size_of::<f32>()
}

/// A product of `[rows, cols]` with a matrix of `outputs` rows: the result, the same as the kernel lays it out, and the
/// activations as the kernel takes them.
fn product(precision: Precision, rows: usize, cols: usize, outputs: usize) -> usize {
    floats(rows * outputs) * if rows == 1 { 1 } else { 2 } + quantized(precision, rows * cols)
}

/// Activations in 8 bits, if that is how they are multiplied. What Exact multiplies instead is counted by `scratch`.
fn quantized(precision: Precision, values: usize) -> usize {
    match precision {
        Precision::Exact => 0,
        Precision::Fast => values.div_ceil(QK_K) * size_of::<ActivationQ8K>(),
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

/// Dequantised weight rows, which a thread keeps from product to product.
fn scratch(c: &Config) -> usize {
    let inputs =
        [c.stream_width(), c.d_model, c.heads * c.head_dim / c.o_groups, c.o_groups * c.o_rank, c.shared_width];
    floats(TILE_ROWS * inputs.into_iter().max().expect("there are matrices"))
}

fn project(c: &Config, precision: Precision, rows: usize) -> usize {
    // The queries themselves live in the pass.
    let queries = floats(rows * c.heads * c.head_dim) + quantized(precision, rows * c.q_rank);
    queries.max(product(precision, rows, c.d_model, c.head_dim))
}

fn compress(c: &Config, layout: &KvLayout, rows: usize) -> usize {
    let widths = layout.layers.iter().flat_map(|layer| layer.main.iter().chain(&layer.index)).map(|c| c.width);
    let inputs = |width| floats(rows * width) + product(layout.precision, rows, c.d_model, width);
    widths.max().map_or(0, inputs)
}

fn index(c: &Config, precision: Precision, shape: PassShape) -> usize {
    let width = c.index_heads * c.index_head_dim;
    let gathered = floats(shape.rows * (c.q_rank + c.d_model));
    // A score and a place in the order for every row that a ratio-4 layer can see.
    let order = shape.threads * shape.end_tokens / 4 * (size_of::<f32>() + size_of::<u32>());
    let queries = product(precision, shape.rows, c.q_rank, width);
    gathered + queries + product(precision, shape.rows, c.d_model, c.index_heads) + order
}

fn attend(c: &Config, shape: PassShape) -> usize {
    const HEADS_TOGETHER: usize = crate::attention::HEADS_TOGETHER;
    let most = |&ratio: &usize| match ratio {
        0 => 0,
        4 => (shape.end_tokens / 4).min(c.index_top_k),
        _ => shape.end_tokens / ratio,
    };
    let keys = c.window.min(shape.end_tokens) + c.compress_ratios.iter().map(most).max().unwrap_or(0);
    let at_work = if shape.rows == 1 { 1 } else { shape.threads.min(shape.rows) };
    at_work * floats(keys * c.head_dim) + shape.threads * floats(2 * keys * HEADS_TOGETHER)
}

fn attention_out(c: &Config, precision: Precision, rows: usize) -> usize {
    let (group, low) = (c.heads * c.head_dim / c.o_groups, c.o_groups * c.o_rank);
    // The largest is while a group is multiplied, or at the end while the output is laid out.
    let output = floats(rows * (c.o_rank + c.d_model)) + quantized(precision, rows * low);
    floats(rows * (low + group)) + product(precision, rows, group, c.o_rank).max(output)
}

fn hyper_connections(c: &Config, precision: Precision, shape: PassShape) -> usize {
    let weights = shape.rows * (floats(c.hc_outputs()) + 3 * size_of::<Vec<f32>>());
    let before = floats(shape.rows * c.d_model)
        + product(precision, shape.rows, c.stream_width(), c.hc_outputs())
            .max(floats(shape.rows * c.hc_outputs()) + weights);
    before.max(shape.threads * floats(c.stream_width()))
}

fn experts(c: &Config, precision: Precision, rows: usize) -> usize {
    // A look ahead at the next layer's choice has an input of its own.
    let route = floats(rows * c.d_model)
        + product(precision, rows, c.d_model, c.experts)
        + c.experts * size_of::<Vec<usize>>()
        + rows * c.experts_used * 32;
    let ffn = |width: usize| {
        let gate_and_up = floats(rows * width) + product(precision, rows, c.d_model, width);
        gate_and_up.max(floats(2 * rows * width) + product(precision, rows, width, c.d_model))
    };
    // An expert that every row chose: its input is gathered, and its output kept apart from the others'.
    let routed = floats(rows * (c.experts_used + 1) * c.d_model) + ffn(c.expert_width);
    let choices = c.experts * size_of::<Vec<usize>>() + rows * c.experts_used * 32;
    route.max(ffn(c.shared_width)).max(routed + choices)
}

fn head(c: &Config, precision: Precision, shape: PassShape) -> usize {
    let projected = product(precision, shape.rows, c.stream_width(), c.streams);
    let logits = product(precision, shape.wanted_rows, c.d_model, c.vocab_size);
    projected + floats(shape.wanted_rows * c.d_model) + logits
}
