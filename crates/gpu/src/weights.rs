//! Weights that every token uses, on the device: one slab a layer, with the tables of products that its stages make.

use std::ops::Range;

use bytemuck::cast_slice;
use gguf::TensorType;
use model::tensors::{Compressor, HyperConnection, Layer, Routing};
use model::{Config, Error, Model, TensorRef};
use store::{Extent, Source};

use crate::GpuError;
use crate::attend_many::key_factor;
use crate::device::Device;
use crate::format::Format;
use crate::jobs::{Job, Jobs, Matrix};
use crate::kernel::Buffer;
use crate::upload::{FileRows, Rows, Transfer, Uploader};

/// Where a vector of f32 (or a table of i32) begins in its slab, in 16-byte vectors.
pub(crate) type At = u32;

/// A hyper-connection and the norm after it.
pub(crate) struct HyperAt {
    pub(crate) function: At,
    pub(crate) scale: At,
    pub(crate) base: At,
    pub(crate) norm: At,
}

/// A compressor: where its products are among a row's projections, and its vectors.
pub(crate) struct CompressorAt {
    pub(crate) u: usize,
    pub(crate) positions: At,
    pub(crate) norm: At,
}

/// One layer; its slab is a buffer, or only the number of its bytes.
pub(crate) struct LayerWeights<B = Buffer> {
    pub(crate) slab: B,
    pub(crate) attention: HyperAt,
    pub(crate) experts: HyperAt,
    /// From the sub-layer's input: low-rank query, key, compressors' inputs, indexer's head weights.
    pub(crate) project: Jobs,
    /// Values of a row of these.
    pub(crate) projected: usize,
    pub(crate) kv: usize,
    pub(crate) compressor: Option<CompressorAt>,
    pub(crate) index_compressor: Option<CompressorAt>,
    pub(crate) index_weights: usize,
    pub(crate) q_a_norm: At,
    pub(crate) kv_norm: At,
    pub(crate) sinks: At,
    /// What keys are multiplied by before they are rounded to halves.
    pub(crate) key_factor: f32,
    /// From the low-rank query: queries, then the indexer's.
    pub(crate) queries: Jobs,
    /// Values of a row of these.
    pub(crate) queried: usize,
    pub(crate) output_a: Jobs,
    pub(crate) output_b: Jobs,
    /// From the sub-layer's input: router, gate and up of the shared expert.
    pub(crate) route: Jobs,
    /// Bias of the choice, or table of experts by token.
    pub(crate) choice: At,
    pub(crate) hashed: bool,
    pub(crate) shared_down: Jobs,
}

/// The output head.
pub(crate) struct HeadWeights<B = Buffer> {
    pub(crate) slab: B,
    pub(crate) hc: HyperAt,
    pub(crate) output: Jobs,
}

/// Lays tensors out one after the other, and remembers what has to be written where.
#[derive(Default)]
pub(crate) struct Placer<'t> {
    /// Bytes so far.
    pub(crate) bytes: u64,
    matrices: Vec<(&'t TensorRef, Matrix)>,
    /// Small tensors, as f32 or as they are.
    small: Vec<(&'t TensorRef, At)>,
    tables: Vec<(At, Vec<u32>)>,
}

impl<'t> Placer<'t> {
    fn room(&mut self, bytes: usize) -> At {
        let at = (self.bytes / 16) as At;
        self.bytes += bytes.next_multiple_of(16) as u64;
        at
    }

    fn matrix(&mut self, tensor: &'t TensorRef) -> Result<Matrix, Error> {
        let format = format_of(&tensor.name, tensor.ty, tensor.cols)?;
        let row_bytes = format.row_bytes(tensor.cols);
        let base = self.room(row_bytes * tensor.rows);
        let matrix = Matrix { format, base, stride: (row_bytes / 16) as u32, rows: tensor.rows, cols: tensor.cols };
        self.matrices.push((tensor, matrix));
        Ok(matrix)
    }

    /// A small tensor as f32, whatever its type; a table of whole numbers as it is.
    fn values(&mut self, tensor: &'t TensorRef) -> At {
        let at = self.room(tensor.rows * tensor.cols * 4);
        self.small.push((tensor, at));
        at
    }

    fn hyper(&mut self, hc: &'t HyperConnection<TensorRef>, norm: &'t TensorRef) -> HyperAt {
        HyperAt {
            function: self.values(&hc.function),
            scale: self.values(&hc.scale),
            base: self.values(&hc.base),
            norm: self.values(norm),
        }
    }

    /// Two matrices of a compressor, `u` then `z`, whose results begin at `y_at`.
    fn compressor(
        &mut self,
        tensors: &'t Compressor<TensorRef>,
        y_at: usize,
        jobs: &mut Vec<Job>,
    ) -> Result<CompressorAt, Error> {
        let (kv, gate) = (self.matrix(&tensors.kv)?, self.matrix(&tensors.gate)?);
        jobs.push(Job { matrix: kv, x_at: 0, y_at });
        jobs.push(Job { matrix: gate, x_at: 0, y_at: y_at + kv.rows });
        Ok(CompressorAt { u: y_at, positions: self.values(&tensors.positions), norm: self.values(&tensors.norm) })
    }

    fn jobs(&mut self, jobs: Vec<Job>) -> Jobs {
        let mut table = |words: Vec<u32>| {
            let at = self.room(words.len() * 4);
            self.tables.push((at, words));
            at
        };
        let (table, group_table) = (table(Jobs::words(&jobs)), table(Jobs::group_words(&jobs)));
        Jobs { jobs, table, group_table }
    }

    /// Makes the slab and writes everything but the matrices, which are left to be read.
    fn write(
        self,
        device: &Device,
        uploader: &Uploader,
        source: &Source,
        what: &str,
        loaded: &mut dyn FnMut(u64),
    ) -> Result<(Buffer, Unread), Error> {
        let slab = Buffer::new(device, what, self.bytes)?;
        let mut written: Vec<(At, Vec<u8>)> = Vec::new();
        for (tensor, at) in self.small {
            written.push((at, small_bytes(tensor, source)?));
            loaded(tensor.extent.bytes);
        }
        written.extend(self.tables.into_iter().map(|(at, words)| (at, cast_slice(&words).to_vec())));
        uploader
            .rows(&slab, &written.iter().map(|(at, bytes)| (u64::from(*at) * 16, as_row(bytes))).collect::<Vec<_>>())?;
        let unread = self.matrices.into_iter().map(|(tensor, matrix)| (tensor.extent, matrix));
        Ok((slab, Unread(unread.collect())))
    }
}

/// Bytes as they are, as one row.
fn as_row(bytes: &[u8]) -> Rows<'_> {
    Rows { format: Format::F32, rows: 1, cols: bytes.len() / 4, bytes: FileRows::Here(bytes) }
}

/// Matrices that are still to be read, and their places in a slab.
pub(crate) struct Unread(Vec<(Extent, Matrix)>);

impl Unread {
    /// From `source` to `slab`.
    pub(crate) fn transfers<'r>(
        &'r self,
        source: &'r Source,
        slab: &'r Buffer,
    ) -> impl Iterator<Item = Transfer<'r>> + Send {
        self.0.iter().map(move |&(extent, Matrix { format, base, rows, cols, .. })| {
            let rows = Rows { format, rows, cols, bytes: FileRows::There(source, extent) };
            Transfer { to: slab, at: u64::from(base) * 16, rows }
        })
    }
}

/// The format of a tensor that kernels multiply with.
///
/// # Errors
/// [`GpuError::Type`] if they cannot.
pub(crate) fn format_of(name: &str, ty: TensorType, cols: usize) -> Result<Format, Error> {
    let fits = |format: &Format| cols.is_multiple_of(format.block_elements());
    Ok(Format::of(ty).filter(fits).ok_or_else(|| GpuError::Type {
        tensor: name.to_owned(),
        found: format!("{ty} in rows of {cols}"),
        expected: format!("{}, in rows of a multiple of 32", Format::ALL.map(Format::name).join(", ")),
    })?)
}

/// A small tensor's bytes as kernels read them.
fn small_bytes(tensor: &TensorRef, source: &Source) -> Result<Vec<u8>, Error> {
    let mut file = vec![0; tensor.extent.bytes as usize];
    source.read_exact_at(tensor.extent.file, tensor.extent.offset, &mut file)?;
    if tensor.ty == TensorType::I32 {
        return Ok(file);
    }
    let mut values = vec![0.0_f32; tensor.rows * tensor.cols];
    let row_bytes = file.len() / tensor.rows;
    for (row, values) in file.chunks_exact(row_bytes).zip(values.chunks_exact_mut(tensor.cols)) {
        quant::dequantize(tensor.ty, row, values);
    }
    if let (1, Some(element)) = (tensor.rows, values.iter().position(|value| !value.is_finite())) {
        let (name, found) = (tensor.name.clone(), values[element].to_string());
        return Err(Error::Value { name, found, element, expected: "a finite number".into() });
    }
    Ok(cast_slice(&values).to_vec())
}

/// Largest magnitude of a small tensor's values.
fn largest_magnitude(tensor: &TensorRef, source: &Source) -> Result<f32, Error> {
    let values: Vec<f32> = bytemuck::pod_collect_to_vec(&small_bytes(tensor, source)?);
    Ok(values.iter().fold(0.0, |largest, value| largest.max(value.abs())))
}

/// Where consecutive results lie.
struct Places(usize);

impl Places {
    fn next(&mut self, values: usize) -> usize {
        let at = self.0;
        self.0 += values;
        at
    }
}

/// Makes a layer's slab, and reads what is small; its matrices are left to be read.
///
/// # Errors
/// A tensor is of a type without kernels, holds what no model can have, or could not be read; the device failed.
pub(crate) fn load_layer(
    device: &Device,
    uploader: &Uploader,
    source: &Source,
    model: &Model,
    layer: usize,
    loaded: &mut dyn FnMut(u64),
) -> Result<(LayerWeights, Unread), Error> {
    let (config, Layer { attention, moe }) = (&model.config, &model.tensors.layers[layer]);
    if let Routing::Hash(table) = &moe.routing {
        check_table(table, source, config)?;
    }
    let mut largest = largest_magnitude(&attention.kv_norm, source)?;
    if let Some(compressor) = &attention.compressor {
        largest = largest.max(largest_magnitude(&compressor.norm, source)?);
    }
    let what = format!("the weights of layer {layer}");
    let mut unread = Unread(Vec::new());
    let write = |placer: Placer<'_>| {
        let (slab, matrices) = placer.write(device, uploader, source, &what, loaded)?;
        unread = matrices;
        Ok(slab)
    };
    let weights = place_layer(model, layer, key_factor(largest, config.head_dim), write)?;
    Ok((weights, unread))
}

/// Says where everything of a layer lies; `write` makes the slab.
///
/// # Errors
/// A tensor is of a type without kernels; those of `write`.
pub(crate) fn place_layer<'t, B>(
    model: &'t Model,
    layer: usize,
    key_factor: f32,
    write: impl FnOnce(Placer<'t>) -> Result<B, Error>,
) -> Result<LayerWeights<B>, Error> {
    let (config, Layer { attention, moe }) = (&model.config, &model.tensors.layers[layer]);
    let mut placer = Placer::default();
    let attention_hc = placer.hyper(&attention.hc, &attention.norm);
    let experts_hc = placer.hyper(&moe.hc, &moe.norm);

    let (mut project, mut places) = (Vec::new(), Places(0));
    let q_a = placer.matrix(&attention.q_a)?;
    project.push(Job { matrix: q_a, x_at: 0, y_at: places.next(config.q_rank) });
    let kv = places.next(config.head_dim);
    project.push(Job { matrix: placer.matrix(&attention.kv)?, x_at: 0, y_at: kv });
    let compressor = match &attention.compressor {
        Some(tensors) => Some(placer.compressor(tensors, places.next(2 * tensors.kv.rows), &mut project)?),
        None => None,
    };
    let (mut index_compressor, mut index_weights) = (None, 0);
    if let Some(indexer) = &attention.indexer {
        let tensors = &indexer.compressor;
        index_compressor = Some(placer.compressor(tensors, places.next(2 * tensors.kv.rows), &mut project)?);
        index_weights = places.next(config.index_heads);
        project.push(Job { matrix: placer.matrix(&indexer.weights)?, x_at: 0, y_at: index_weights });
    }
    let project = placer.jobs(project);

    let q_width = config.heads * config.head_dim;
    let mut queries = vec![Job { matrix: placer.matrix(&attention.q_b)?, x_at: 0, y_at: 0 }];
    if let Some(indexer) = &attention.indexer {
        queries.push(Job { matrix: placer.matrix(&indexer.q_b)?, x_at: 0, y_at: q_width });
    }
    let queried = queries.iter().map(|job| job.matrix.rows).sum();
    let queries = placer.jobs(queries);

    let output_a = placer.matrix(&attention.output_a)?;
    let group = |g: usize| Job {
        matrix: output_a.part(g * config.o_rank, config.o_rank),
        x_at: g * (q_width / config.o_groups),
        y_at: g * config.o_rank,
    };
    let output_a = placer.jobs((0..config.o_groups).map(group).collect());
    let output_b = Job { matrix: placer.matrix(&attention.output_b)?, x_at: 0, y_at: 0 };
    let output_b = placer.jobs(vec![output_b]);

    let (router, gate) = (placer.matrix(&moe.router)?, placer.matrix(&moe.shared_gate)?);
    let up = placer.matrix(&moe.shared_up)?;
    let mut places = Places(0);
    let route = [router, gate, up].map(|matrix| Job { matrix, x_at: 0, y_at: places.next(matrix.rows) });
    let route = placer.jobs(route.to_vec());
    let (choice, hashed) = match &moe.routing {
        Routing::Hash(table) => (placer.values(table), true),
        Routing::Bias(bias) => (placer.values(bias), false),
    };
    let shared_down = Job { matrix: placer.matrix(&moe.shared_down)?, x_at: 0, y_at: 0 };
    let shared_down = placer.jobs(vec![shared_down]);
    let (q_a_norm, kv_norm) = (placer.values(&attention.q_a_norm), placer.values(&attention.kv_norm));
    let sinks = placer.values(&attention.sinks);
    let slab = write(placer)?;
    let projected = project.jobs.iter().map(|job| job.matrix.rows).sum();
    Ok(LayerWeights {
        slab,
        attention: attention_hc,
        experts: experts_hc,
        project,
        projected,
        kv,
        compressor,
        index_compressor,
        index_weights,
        q_a_norm,
        kv_norm,
        sinks,
        key_factor,
        queries,
        queried,
        output_a,
        output_b,
        route,
        choice,
        hashed,
        shared_down,
    })
}

/// Makes the output head's slab as [`load_layer`] does a layer's.
pub(crate) fn load_head(
    device: &Device,
    uploader: &Uploader,
    source: &Source,
    model: &Model,
    loaded: &mut dyn FnMut(u64),
) -> Result<(HeadWeights, Unread), Error> {
    let mut unread = Unread(Vec::new());
    let weights = place_head(model, |placer| {
        let (slab, matrices) = placer.write(device, uploader, source, "the output head", loaded)?;
        unread = matrices;
        Ok(slab)
    })?;
    Ok((weights, unread))
}

/// Says where everything of the output head lies; as [`place_layer`].
pub(crate) fn place_head<'t, B>(
    model: &'t Model,
    write: impl FnOnce(Placer<'t>) -> Result<B, Error>,
) -> Result<HeadWeights<B>, Error> {
    let mut placer = Placer::default();
    let hc = placer.hyper(&model.tensors.output_hc, &model.tensors.output_norm);
    let output = Job { matrix: placer.matrix(&model.tensors.output)?, x_at: 0, y_at: 0 };
    let output = placer.jobs(vec![output]);
    Ok(HeadWeights { slab: write(placer)?, hc, output })
}

/// Every entry of a token-to-expert table must name an expert.
fn check_table(table: &TensorRef, source: &Source, config: &Config) -> Result<(), Error> {
    let mut bytes = vec![0; table.extent.bytes as usize];
    source.read_exact_at(table.extent.file, table.extent.offset, &mut bytes)?;
    let numbers = bytes.as_chunks().0.iter().map(|&bytes| i32::from_le_bytes(bytes));
    let experts: Range<i32> = 0..config.experts as i32;
    match numbers.enumerate().find(|(_, expert)| !experts.contains(expert)) {
        None => Ok(()),
        Some((element, found)) => Err(Error::Value {
            name: table.name.clone(),
            found: found.to_string(),
            element,
            expected: format!("an expert number from 0 to {}", config.experts - 1),
        }),
    }
}
