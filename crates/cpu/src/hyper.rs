//! Embedding, hyper-connections and the output head (docs/spec/model.md §2.0–2.2, §2.9).

use model::tensors::HyperConnection;
use model::{Error, SubLayer};
use quant::math::sigmoid;
use quant::simd::Level;
use quant::{elementwise, exact};

use crate::backend::CpuBackend;
use crate::parallel::Input;
use crate::pass::Pass;
use crate::weights::Weight;

/// `1 / sqrt(mean(x²) + eps)`.
pub(crate) fn inverse_rms(level: Level, x: &[f32], eps: f32) -> f32 {
    1.0 / (exact::dot_at(level, x, x) / x.len() as f32 + eps).sqrt()
}

/// `x · w / rms(x)` in place; without `w` the norm has no weight.
pub(crate) fn rms_norm(level: Level, x: &mut [f32], w: Option<&[f32]>, eps: f32) {
    let inverse = inverse_rms(level, x, eps);
    match w {
        Some(w) => elementwise::scale_by_at(level, x, inverse, w),
        None => elementwise::scale_at(level, x, inverse),
    }
}

/// Makes `mix` doubly stochastic: a softmax of each row, then columns and rows in turn, ending on columns.
fn sinkhorn(mix: &mut [f32], streams: usize, iterations: usize, eps: f32) {
    let softmax = |row: &mut [f32]| {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.iter_mut().for_each(|value| *value = quant::math::exp(*value - max));
        let sum: f32 = row.iter().sum();
        row.iter_mut().for_each(|value| *value = *value / sum + eps);
    };
    let rows = |mix: &mut [f32]| {
        for row in mix.chunks_exact_mut(streams) {
            let sum = row.iter().sum::<f32>() + eps;
            row.iter_mut().for_each(|value| *value /= sum);
        }
    };
    let columns = |mix: &mut [f32]| {
        for k in 0..streams {
            let sum = mix.iter().skip(k).step_by(streams).sum::<f32>() + eps;
            mix.iter_mut().skip(k).step_by(streams).for_each(|value| *value /= sum);
        }
    };
    mix.chunks_exact_mut(streams).for_each(softmax);
    columns(mix);
    for _ in 1..iterations {
        rows(mix);
        columns(mix);
    }
}

/// Weights of one row's hyper-connection, from the projection of its normalised streams.
pub(crate) struct Weights {
    pub(crate) pre: Vec<f32>,
    pub(crate) post: Vec<f32>,
    /// Rows are sources, columns destinations.
    pub(crate) mix: Vec<f32>,
}

impl Weights {
    pub(crate) fn new(projected: &[f32], scale: &[f32], base: &[f32], iterations: usize, eps: f32) -> Weights {
        // S² + 2S outputs are one less than (S + 1)².
        let s = (base.len() + 1).isqrt() - 1;
        debug_assert_eq!((scale.len(), base.len()), (3, 2 * s + s * s));
        let value = |i: usize, scale: f32| projected[i] * scale + base[i];
        let pre = (0..s).map(|i| sigmoid(value(i, scale[0])) + eps).collect();
        let post = (s..2 * s).map(|i| 2.0 * sigmoid(value(i, scale[1]))).collect();
        let mut mix: Vec<f32> = (2 * s..2 * s + s * s).map(|i| value(i, scale[2])).collect();
        sinkhorn(&mut mix, s, iterations, eps);
        Weights { pre, post, mix }
    }
}

/// `Σ_s pre[s] · streams[s]`, in the order of the streams.
fn collapse(level: Level, pre: &[f32], streams: &[f32], out: &mut [f32]) {
    out.fill(0.0);
    exact::add_weighted_at(level, pre, pre.len(), streams, out.len(), out);
}

/// `streams[k] = post[k] · output + Σ_j mix[j][k] · streams[j]`.
pub(crate) fn spread(level: Level, post: &[f32], mix: &[f32], output: &[f32], streams: &mut [f32]) {
    let (old, width, count) = (streams.to_vec(), output.len(), post.len());
    let mut weights = vec![0.0; count];
    for (k, stream) in streams.chunks_exact_mut(width).enumerate() {
        stream.copy_from_slice(output);
        elementwise::scale_at(level, stream, post[k]);
        weights.iter_mut().zip(mix.iter().skip(k).step_by(count)).for_each(|(weight, mix)| *weight = *mix);
        exact::add_weighted_at(level, &weights, count, &old, width, stream);
    }
}

/// Refuses values of row `row` that are no numbers.
fn check_finite(values: &[f32], row: usize, pass: &Pass) -> Result<(), Error> {
    match values.iter().all(|value| value.is_finite()) {
        true => Ok(()),
        false => Err(Error::NotFinite { position: pass.batch.rows()[row].position }),
    }
}

impl CpuBackend {
    /// `function · (streams / rms)` for every row, `[R, outputs]`.
    fn project_streams(&self, hc: &HyperConnection<Weight>, pass: &Pass) -> Vec<f32> {
        let (level, config) = (self.workers.level, &self.config);
        let mut projected = Vec::new();
        let streams = Input::new(&pass.streams, config.stream_width());
        self.workers.matmul(hc.function.matrix(), &streams, &mut projected);
        let outputs = hc.function.matrix().rows;
        self.workers.rows(&mut projected, outputs, config.stream_width(), |r, row| {
            let streams = &pass.streams[r * config.stream_width()..][..config.stream_width()];
            elementwise::scale_at(level, row, inverse_rms(level, streams, config.rms_eps));
        });
        projected
    }

    pub(crate) fn stage_embed(&self, pass: &mut Pass) -> Result<(), Error> {
        let (level, config) = (self.workers.level, &self.config);
        for (row, streams) in pass.batch.rows().iter().zip(pass.streams.chunks_exact_mut(config.stream_width())) {
            let (first, others) = streams.split_at_mut(config.d_model);
            self.weights.embedding.fetch_row(row.token as usize, level, first)?;
            others.chunks_exact_mut(config.d_model).for_each(|stream| stream.copy_from_slice(first));
        }
        Ok(())
    }

    pub(crate) fn stage_hc_pre(&self, layer: usize, sub_layer: SubLayer, pass: &mut Pass) -> Result<(), Error> {
        let mut input = std::mem::take(&mut pass.input);
        let weights = self.sub_layer_input(layer, sub_layer, pass, &mut input);
        pass.input = input;
        for (r, w) in weights.iter().enumerate() {
            let s = self.config.streams;
            pass.post[r * s..][..s].copy_from_slice(&w.post);
            pass.mix[r * s * s..][..s * s].copy_from_slice(&w.mix);
        }
        Ok(())
    }

    /// What a sub-layer makes of the streams as they are: its normalised input, `[R, D]`, and its hyper-connection.
    pub(crate) fn sub_layer_input(
        &self,
        layer: usize,
        sub_layer: SubLayer,
        pass: &Pass,
        input: &mut [f32],
    ) -> Vec<Weights> {
        let (level, config) = (self.workers.level, &self.config);
        let (hc, norm) = self.hyper_connection(layer, sub_layer);
        let projected = self.project_streams(hc, pass);
        let (scale, base) = (hc.scale.values(), hc.base.values());
        let split = |row: &[f32]| Weights::new(row, scale, base, config.sinkhorn_iterations, config.hc_eps);
        let weights: Vec<Weights> = projected.chunks_exact(config.hc_outputs()).map(split).collect();
        let streams = &pass.streams;
        self.workers.rows(input, config.d_model, config.stream_width(), |r, input| {
            collapse(level, &weights[r].pre, &streams[r * config.stream_width()..][..config.stream_width()], input);
            rms_norm(level, input, Some(norm.values()), config.rms_eps);
        });
        weights
    }

    fn hyper_connection(&self, layer: usize, sub_layer: SubLayer) -> (&HyperConnection<Weight>, &Weight) {
        let layer = &self.weights.layers[layer];
        match sub_layer {
            SubLayer::Attention => (&layer.attention.hc, &layer.attention.norm),
            SubLayer::Experts => (&layer.moe.hc, &layer.moe.norm),
        }
    }

    pub(crate) fn stage_hc_post(&self, pass: &mut Pass) -> Result<(), Error> {
        let (level, s, d) = (self.workers.level, self.config.streams, self.config.d_model);
        let (post, mix, output) = (&pass.post, &pass.mix, &pass.output);
        self.workers.rows(&mut pass.streams, s * d, s * s * d, |r, streams| {
            spread(level, &post[r * s..][..s], &mix[r * s * s..][..s * s], &output[r * d..][..d], streams);
        });
        Ok(())
    }

    pub(crate) fn stage_head(&self, pass: &mut Pass) -> Result<Vec<f32>, Error> {
        let (level, config, hc) = (self.workers.level, &self.config, &self.weights.output_hc);
        let wanted: Vec<usize> = pass.batch.wanted().collect();
        for run in pass.batch.runs() {
            let last = run.rows.end - 1;
            check_finite(&pass.streams[last * config.stream_width()..][..config.stream_width()], last, pass)?;
        }
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let projected = self.project_streams(hc, pass);
        let (scale, base) = (hc.scale.values()[0], hc.base.values());
        let mut hidden = vec![0.0; wanted.len() * config.d_model];
        for (row, &r) in hidden.chunks_exact_mut(config.d_model).zip(&wanted) {
            let projected = &projected[r * config.streams..][..config.streams];
            let pre: Vec<f32> =
                projected.iter().zip(base).map(|(x, base)| sigmoid(x * scale + base) + config.hc_eps).collect();
            collapse(level, &pre, &pass.streams[r * config.stream_width()..][..config.stream_width()], row);
            rms_norm(level, row, Some(self.weights.output_norm.values()), config.rms_eps);
        }
        let mut logits = Vec::new();
        self.workers.matmul(self.weights.output.matrix(), &Input::new(&hidden, config.d_model), &mut logits);
        let rows = logits.chunks_exact(config.vocab_size).zip(&wanted);
        rows.into_iter().try_for_each(|(row, &r)| check_finite(row, r, pass))?;
        Ok(logits)
    }
}
