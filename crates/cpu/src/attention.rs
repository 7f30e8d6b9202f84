//! The attention half of a layer (docs/spec/model.md §2.3–2.6).

use std::cmp::Ordering;

use model::kv::{CompressorLayout, RowFormat};
use model::rope::{rotate, rotate_back};
use model::state::{CompressorView, LayerDelta, LayerView};
use model::tensors::Compressor;
use model::{Arithmetic, Error, Run, State};
use quant::simd::Level;
use quant::{exact, math};

use crate::backend::CpuBackend;
use crate::hyper::rms_norm;
use crate::pass::{Chosen, Pass};
use crate::rows;
use crate::weights::Weight;

/// Heads that share one reading of the key rows.
pub(crate) const HEADS_TOGETHER: usize = 8;

impl CpuBackend {
    /// Which of a pass's two rotations a layer uses.
    fn rope_of(&self, layer: usize) -> usize {
        (self.config.compress_ratios[layer] != 0) as usize
    }

    pub(crate) fn stage_project(&self, layer: usize, pass: &mut Pass) -> Result<(), Error> {
        let (level, config, w) = (self.workers.level, &self.config, &self.weights.layers[layer].attention);
        let (head_dim, tail) = (config.head_dim, config.head_dim - config.rope_dim);
        let rotations = &pass.rotations[self.rope_of(layer)];

        self.workers.matmul(w.q_a.matrix(), &pass.input, &mut pass.q_low);
        let norm = w.q_a_norm.values();
        pass.q_low.chunks_exact_mut(config.q_rank).for_each(|row| rms_norm(level, row, Some(norm), config.rms_eps));

        self.workers.matmul(w.q_b.matrix(), &pass.q_low, &mut pass.queries);
        self.workers.rows(&mut pass.queries, config.heads * head_dim, 2 * config.heads * head_dim, |r, heads| {
            for head in heads.chunks_exact_mut(head_dim) {
                rms_norm(level, head, None, config.rms_eps);
                rotate(&mut head[tail..], &rotations[r]);
            }
        });

        let mut kv = Vec::new();
        self.workers.matmul(w.kv.matrix(), &pass.input, &mut kv);
        let format = self.layout.layers[layer].raw;
        for (run, delta) in pass.batch.runs().iter().zip(&mut pass.deltas) {
            let raw = &mut delta.layers[layer].raw;
            raw.resize(run.rows.len() * format.row_bytes(), 0);
            for (r, packed) in run.rows.clone().zip(raw.chunks_exact_mut(format.row_bytes())) {
                let row = &mut kv[r * head_dim..][..head_dim];
                rms_norm(level, row, Some(w.kv_norm.values()), config.rms_eps);
                rotate(&mut row[tail..], &rotations[r]);
                rows::pack(level, format, row, packed);
            }
        }
        Ok(())
    }

    pub(crate) fn stage_compress(&self, layer: usize, states: &[&State], pass: &mut Pass) -> Result<(), Error> {
        let (w, layout) = (&self.weights.layers[layer].attention, &self.layout.layers[layer]);
        if let (Some(w), Some(layout)) = (&w.compressor, &layout.main) {
            self.compressor_inputs(w, layout, layer, pass, |delta| &mut delta.main.inputs);
        }
        if let (Some(w), Some(layout)) = (&w.indexer, &layout.index) {
            self.compressor_inputs(&w.compressor, layout, layer, pass, |delta| &mut delta.index.inputs);
        }
        for (run, delta) in pass.batch.runs().iter().zip(&mut pass.deltas) {
            let delta = &mut delta.layers[layer];
            if let (Some(w), Some(layout)) = (&w.compressor, &layout.main) {
                let view = states[run.session].view(layer, delta);
                delta.main.rows = self.compressed_rows(w, layout, run, view.main().expect("the layer has one"));
            }
            if let (Some(w), Some(layout)) = (&w.indexer, &layout.index) {
                let view = states[run.session].view(layer, delta);
                let view = view.index().expect("the layer has one");
                delta.index.rows = self.compressed_rows(&w.compressor, layout, run, view);
            }
        }
        Ok(())
    }

    /// `u` and `z` of every row, the positional term added to `z`.
    fn compressor_inputs(
        &self,
        w: &Compressor<Weight>,
        layout: &CompressorLayout,
        layer: usize,
        pass: &mut Pass,
        inputs_of: impl Fn(&mut LayerDelta) -> &mut Vec<f32>,
    ) {
        let (mut u, mut z) = (Vec::new(), Vec::new());
        self.workers.matmul(w.kv.matrix(), &pass.input, &mut u);
        self.workers.matmul(w.gate.matrix(), &pass.input, &mut z);
        let width = layout.width;
        let mut positional = vec![0.0; width];
        for (run, delta) in pass.batch.runs().iter().zip(&mut pass.deltas) {
            let inputs = inputs_of(&mut delta.layers[layer]);
            inputs.reserve_exact(run.rows.len() * 2 * width);
            for (i, r) in run.rows.clone().enumerate() {
                w.positions.row((run.start + i) % layout.ratio, self.workers.level, &mut positional);
                inputs.extend_from_slice(&u[r * width..][..width]);
                inputs.extend(z[r * width..][..width].iter().zip(&positional).map(|(z, p)| z + p));
            }
        }
    }

    /// The packed rows of all windows that end in `run`.
    fn compressed_rows(
        &self,
        w: &Compressor<Weight>,
        layout: &CompressorLayout,
        run: &Run,
        view: CompressorView<'_>,
    ) -> Vec<u8> {
        let first = run.start / layout.ratio;
        let end = (run.start + run.rows.len()) / layout.ratio;
        let row_bytes = layout.row.row_bytes();
        let mut rows = vec![0; (end - first) * row_bytes];
        let work = 2 * layout.ratio * layout.width * 8;
        self.workers.rows(&mut rows, row_bytes, work, |i, packed| {
            let mut row = pool(self.workers.level, &window_slots(layout, first + i, view));
            rms_norm(self.workers.level, &mut row, Some(w.norm.values()), self.config.rms_eps);
            let tail = row.len() - self.config.rope_dim;
            rotate(&mut row[tail..], &self.ropes[1].at((first + i) * layout.ratio));
            rows::pack(self.workers.level, layout.row, &row, packed);
        });
        rows
    }

    pub(crate) fn stage_index(&self, layer: usize, states: &[&State], pass: &mut Pass) -> Result<(), Error> {
        let ratio = self.config.compress_ratios[layer];
        let visible = |position: usize| (position + 1).checked_div(ratio).unwrap_or(0);
        let rows = pass.batch.rows();
        pass.chosen = rows.iter().map(|row| Chosen::First(visible(row.position))).collect();
        if ratio != 4 {
            return Ok(());
        }
        let top_k = self.config.index_top_k;
        let choosing: Vec<usize> = (0..rows.len()).filter(|&r| visible(rows[r].position) > top_k).collect();
        if choosing.is_empty() {
            return Ok(());
        }
        let (queries, weights) = self.index_queries(layer, &choosing, pass);
        let (width, heads) = (self.config.index_heads * self.config.index_head_dim, self.config.index_heads);
        // `None` where the scores are no numbers and choose nothing.
        let mut picked: Vec<Option<Chosen>> = vec![None; choosing.len()];
        let work = rows.iter().map(|row| visible(row.position)).max().unwrap_or(0) * width;
        self.workers.rows(&mut picked, 1, work, |i, picked| {
            let r = choosing[i];
            let run = pass.run_of_row[r];
            let view = states[pass.batch.runs()[run].session].view(layer, &pass.deltas[run].layers[layer]);
            let keys = view.index().expect("a ratio-4 layer has an indexer");
            let visible = visible(rows[r].position);
            let scores =
                self.index_scores(layer, &queries[i * width..][..width], &weights[i * heads..][..heads], keys, visible);
            let are_numbers = scores.iter().all(|score| score.is_finite());
            picked[0] = are_numbers.then(|| Chosen::Rows(top_rows(&scores, top_k)));
        });
        for (r, chosen) in choosing.into_iter().zip(picked) {
            pass.chosen[r] = chosen.ok_or(Error::NotFinite { position: pass.batch.rows()[r].position })?;
        }
        Ok(())
    }

    /// Indexer queries `[rows, heads · width]`, rotated and rounded like the keys, and head weights `[rows, heads]`.
    fn index_queries(&self, layer: usize, rows: &[usize], pass: &Pass) -> (Vec<f32>, Vec<f32>) {
        let config = &self.config;
        let w = self.weights.layers[layer].attention.indexer.as_ref().expect("a ratio-4 layer has an indexer");
        let gather = |from: &[f32], width: usize| -> Vec<f32> {
            rows.iter().flat_map(|&r| &from[r * width..][..width]).copied().collect()
        };
        let (mut queries, mut weights) = (Vec::new(), Vec::new());
        self.workers.matmul(w.q_b.matrix(), &gather(&pass.q_low, config.q_rank), &mut queries);
        self.workers.matmul(w.weights.matrix(), &gather(&pass.input, config.d_model), &mut weights);
        let scale = 1.0 / ((config.index_heads * config.index_head_dim) as f32).sqrt();
        weights.iter_mut().for_each(|weight| *weight *= scale);

        let width = config.index_heads * config.index_head_dim;
        let format = self.layout.layers[layer].index.expect("a ratio-4 layer has an indexer").row;
        self.workers.rows(&mut queries, width, 8 * width, |i, heads| {
            let rotation = &pass.rotations[1][rows[i]];
            let mut packed = vec![0; format.row_bytes()];
            for head in heads.chunks_exact_mut(config.index_head_dim) {
                rotate(&mut head[config.index_head_dim - config.rope_dim..], rotation);
                if self.layout.arithmetic == Arithmetic::Official {
                    rows::pack(self.workers.level, format, head, &mut packed);
                    rows::unpack(self.workers.level, format, &packed, head);
                }
            }
        });
        (queries, weights)
    }

    /// `Σ_h weight[h] · max(0, query_h · key)` of the first `visible` keys.
    fn index_scores(
        &self,
        layer: usize,
        queries: &[f32],
        weights: &[f32],
        keys: CompressorView<'_>,
        visible: usize,
    ) -> Vec<f32> {
        const KEYS_TOGETHER: usize = 64;
        let (dim, heads) = (self.config.index_head_dim, self.config.index_heads);
        let format = self.layout.layers[layer].index.expect("a ratio-4 layer has an indexer").row;
        let mut tile = vec![0.0; KEYS_TOGETHER * dim];
        let mut dots = vec![0.0; KEYS_TOGETHER * heads];
        let mut scores = Vec::with_capacity(visible);
        for first in (0..visible).step_by(KEYS_TOGETHER) {
            let count = KEYS_TOGETHER.min(visible - first);
            for (i, key) in tile.chunks_exact_mut(dim).take(count).enumerate() {
                rows::unpack(self.workers.level, format, keys.row(first + i), key);
            }
            let dots = &mut dots[..count * heads];
            exact::matmul_f32_at(self.workers.level, &tile[..count * dim], dim, queries, dots);
            // Not `f32::max`, which would turn the NaN of a damaged weight into 0.
            let relu = |dot: f32| if dot < 0.0 { 0.0 } else { dot };
            let score = |dots: &[f32]| {
                dots.iter().zip(weights).fold(0.0, |sum, (&dot, w): (&f32, &f32)| w.mul_add(relu(dot), sum))
            };
            scores.extend(dots.chunks_exact(heads).map(score));
        }
        scores
    }

    pub(crate) fn stage_attend(&self, layer: usize, states: &[&State], pass: &mut Pass) -> Result<(), Error> {
        let config = &self.config;
        let width = config.heads * config.head_dim;
        let rows = pass.batch.rows();
        let keys_of = |r: usize| rows[r].position.min(config.window - 1) + 1 + pass.chosen[r].len();
        let work = (0..rows.len()).map(keys_of).max().unwrap_or(0) * width;
        let (queries, rotations) = (&pass.queries, &pass.rotations[self.rope_of(layer)]);
        self.workers.rows(&mut pass.heads, width, work, |r, heads| {
            let run = pass.run_of_row[r];
            let view = states[pass.batch.runs()[run].session].view(layer, &pass.deltas[run].layers[layer]);
            let keys = self.gather_keys(layer, rows[r].position, &pass.chosen[r], view);
            let query = &queries[r * width..][..width];
            let sinks = self.weights.layers[layer].attention.sinks.values();
            let group = HEADS_TOGETHER * config.head_dim;
            let attend = |(i, out): (usize, &mut [f32])| {
                let first = i * HEADS_TOGETHER;
                let query = &query[first * config.head_dim..][..out.len()];
                self.attend_heads(&keys, query, &sinks[first..], out);
                for head in out.chunks_exact_mut(config.head_dim) {
                    rotate_back(&mut head[config.head_dim - config.rope_dim..], &rotations[r]);
                }
            };
            if rows.len() == 1 {
                self.workers.chunks(heads, group, work / width * group, attend);
            } else {
                heads.chunks_mut(group).enumerate().for_each(attend);
            }
        });
        Ok(())
    }

    /// The rows that a query attends to, unpacked: the window ascending, then the chosen compressed rows ascending.
    fn gather_keys(&self, layer: usize, position: usize, chosen: &Chosen, view: LayerView<'_>) -> Vec<f32> {
        let (dim, format): (usize, RowFormat) = (self.config.head_dim, self.layout.layers[layer].raw);
        let first = (position + 1).saturating_sub(self.config.window);
        let window = (first..=position).map(|p| view.raw(p));
        let compressed = view.main();
        let chosen =
            (0..chosen.len()).map(|i| compressed.expect("rows are chosen from a compressor").row(chosen.row(i)));
        let mut keys = vec![0.0; (position + 1 - first + chosen.len()) * dim];
        window
            .chain(chosen)
            .zip(keys.chunks_exact_mut(dim))
            .for_each(|(packed, key)| rows::unpack(self.workers.level, format, packed, key));
        keys
    }

    /// Attention of a few heads over `keys`, which are values as well. The sink takes part in the denominator only.
    fn attend_heads(&self, keys: &[f32], queries: &[f32], sinks: &[f32], out: &mut [f32]) {
        let (level, dim) = (self.workers.level, self.config.head_dim);
        let (heads, count) = (queries.len() / dim, keys.len() / dim);
        let scale = 1.0 / (dim as f32).sqrt();
        let mut dots = vec![0.0; count * heads];
        exact::matmul_f32_at(level, keys, dim, queries, &mut dots);
        let mut weights = vec![0.0; count * heads];
        let mut denominators = vec![0.0; heads];
        for (h, weights) in weights.chunks_exact_mut(count).enumerate() {
            weights.iter_mut().zip(dots.iter().skip(h).step_by(heads)).for_each(|(weight, dot)| *weight = dot * scale);
            let max = weights.iter().copied().fold(sinks[h], f32::max);
            weights.iter_mut().for_each(|weight| *weight -= max);
            math::exp_slice_at(level, weights);
            denominators[h] = exact::sum_at(level, weights) + math::exp(sinks[h] - max);
        }
        out.fill(0.0);
        for (i, key) in keys.chunks_exact(dim).enumerate() {
            for (h, out) in out.chunks_exact_mut(dim).enumerate() {
                exact::axpy_at(level, weights[h * count + i], key, out);
            }
        }
        for (out, denominator) in out.chunks_exact_mut(dim).zip(&denominators) {
            out.iter_mut().for_each(|value| *value /= denominator);
        }
    }

    pub(crate) fn stage_attention_out(&self, layer: usize, pass: &mut Pass) -> Result<(), Error> {
        let (config, w) = (&self.config, &self.weights.layers[layer].attention);
        let (rows, group) = (pass.rows(), config.heads * config.head_dim / config.o_groups);
        let low_width = config.o_groups * config.o_rank;
        let mut low = vec![0.0; rows * low_width];
        let (mut input, mut output) = (vec![0.0; rows * group], Vec::new());
        for g in 0..config.o_groups {
            for (input, heads) in input.chunks_exact_mut(group).zip(pass.heads.chunks_exact(group * config.o_groups)) {
                input.copy_from_slice(&heads[g * group..][..group]);
            }
            self.workers.matmul(w.output_a.rows(g * config.o_rank, config.o_rank), &input, &mut output);
            for (low, output) in low.chunks_exact_mut(low_width).zip(output.chunks_exact(config.o_rank)) {
                low[g * config.o_rank..][..config.o_rank].copy_from_slice(output);
            }
        }
        self.workers.matmul(w.output_b.matrix(), &low, &mut pass.output);
        Ok(())
    }
}

/// `(u, z)` of the tokens that a window's row is made from: its own, and where windows overlap also those of the window
/// before, whose first halves are meant for this row.
fn window_slots<'a>(layout: &CompressorLayout, window: usize, view: CompressorView<'a>) -> Vec<(&'a [f32], &'a [f32])> {
    let width = layout.row.width();
    let positions = |window: usize| window * layout.ratio..(window + 1) * layout.ratio;
    let mut slots = Vec::new();
    if layout.overlaps && window > 0 {
        slots.extend(positions(window - 1).map(|p| view.inputs(p)).map(|(u, z)| (&u[..width], &z[..width])));
    }
    let own = layout.width - width;
    slots.extend(positions(window).map(|p| view.inputs(p)).map(|(u, z)| (&u[own..], &z[own..])));
    slots
}

/// `Σ u · softmax(z)` over the slots, one softmax a channel.
pub(crate) fn pool(level: Level, slots: &[(&[f32], &[f32])]) -> Vec<f32> {
    let width = slots[0].0.len();
    let mut max = vec![f32::NEG_INFINITY; width];
    for (_, z) in slots {
        max.iter_mut().zip(*z).for_each(|(max, z)| *max = max.max(*z));
    }
    let (mut sum, mut row, mut weight) = (vec![0.0; width], vec![0.0; width], vec![0.0; width]);
    for (u, z) in slots {
        weight.iter_mut().zip(*z).zip(&max).for_each(|((weight, z), max)| *weight = z - max);
        math::exp_slice_at(level, &mut weight);
        for (((row, sum), weight), u) in row.iter_mut().zip(&mut sum).zip(&weight).zip(*u) {
            *row += weight * u;
            *sum += weight;
        }
    }
    row.iter_mut().zip(&sum).for_each(|(row, sum)| *row /= sum);
    row
}

/// The `k` rows of the highest scores, ascending. Of equal scores the earlier row wins.
fn top_rows(scores: &[f32], k: usize) -> Vec<u32> {
    let better = |&a: &u32, &b: &u32| -> Ordering { scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)) };
    let mut rows: Vec<u32> = (0..scores.len() as u32).collect();
    rows.select_nth_unstable_by(k - 1, better);
    rows.truncate(k);
    rows.sort_unstable();
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_earlier_row() {
        assert_eq!(top_rows(&[1.0, 3.0, 2.0, 3.0, 3.0, 0.0], 3), [1, 3, 4]);
        assert_eq!(top_rows(&[0.0, 0.0, 0.0, 0.0], 2), [0, 1]);
        assert_eq!(top_rows(&[-1.0, 0.5, -2.0], 1), [1]);
    }
}
