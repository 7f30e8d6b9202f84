//! The attention half of a layer (docs/spec/model.md §2.3–2.6).

use std::cmp::Ordering;
use std::ops::Range;

use model::kv::CompressorLayout;
use model::state::{CompressorView, LayerDelta, LayerView};
use model::tensors::Compressor;
use model::{Arithmetic, Error, Run, State};
use quant::elementwise::{exp_of_at, largest_at, rectified_sums_at, rotate_at, rotate_back_at};
use quant::simd::Level;
use quant::{exact, math};

use crate::backend::CpuBackend;
use crate::hyper::rms_norm;
use crate::parallel::{Input, columns};
use crate::pass::{Chosen, Pass};
use crate::rows;
use crate::weights::Weight;

/// Heads that share one reading of the key rows.
pub(crate) const HEADS_TOGETHER: usize = 8;

/// Key rows that a thread unpacks at a time.
const KEYS_TOGETHER: usize = 32;

/// Queries that share what is unpacked for them.
pub(crate) const ROWS_TOGETHER: usize = 8;

impl CpuBackend {
    /// Which of a pass's two rotations a layer uses.
    fn rope_of(&self, layer: usize) -> usize {
        (self.config.compress_ratios[layer] != 0) as usize
    }

    pub(crate) fn stage_project(&self, layer: usize, pass: &mut Pass) -> Result<(), Error> {
        let (level, config, w) = (self.workers.level, &self.config, &self.weights.layers[layer].attention);
        let (head_dim, tail) = (config.head_dim, config.head_dim - config.rope_dim);
        let rotations = &pass.rotations[self.rope_of(layer)];

        let input = Input::new(&pass.input, config.d_model);
        self.workers.matmul(w.q_a.matrix(), &input, &mut pass.q_low);
        self.workers.rows(&mut pass.q_low, config.q_rank, 4 * config.q_rank, |_, row| {
            rms_norm(level, row, Some(w.q_a_norm.values()), config.rms_eps);
        });

        self.workers.matmul(w.q_b.matrix(), &Input::new(&pass.q_low, config.q_rank), &mut pass.queries);
        self.workers.rows(&mut pass.queries, config.heads * head_dim, 2 * config.heads * head_dim, |r, heads| {
            for head in heads.chunks_exact_mut(head_dim) {
                rms_norm(level, head, None, config.rms_eps);
                rotate_at(level, &mut head[tail..], &rotations[r]);
            }
        });

        let mut kv = Vec::new();
        self.workers.matmul(w.kv.matrix(), &input, &mut kv);
        let format = self.layout.layers[layer].raw;
        let mut packed: Vec<&mut [u8]> = Vec::with_capacity(pass.batch.rows().len());
        for (run, delta) in pass.batch.runs().iter().zip(&mut pass.deltas) {
            let raw = &mut delta.layers[layer].raw;
            raw.resize(run.rows.len() * format.row_bytes(), 0);
            packed.extend(raw.chunks_exact_mut(format.row_bytes()));
        }
        let rows = kv.chunks_exact_mut(head_dim).zip(packed).enumerate();
        // Rounding is some ten operations a value.
        let work = 10 * rows.len() * head_dim;
        self.workers.each(rows, work, |(r, (row, packed))| {
            rms_norm(level, row, Some(w.kv_norm.values()), config.rms_eps);
            rotate_at(level, &mut row[tail..], &rotations[r]);
            rows::pack(level, format, row, packed);
        });
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
        let input = Input::new(&pass.input, self.config.d_model);
        self.workers.matmul(w.kv.matrix(), &input, &mut u);
        self.workers.matmul(w.gate.matrix(), &input, &mut z);
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
            let mut row = pool_window(self.workers.level, &window_slots(layout, first + i, view));
            rms_norm(self.workers.level, &mut row, Some(w.norm.values()), self.config.rms_eps);
            let tail = row.len() - self.config.rope_dim;
            rotate_at(self.workers.level, &mut row[tail..], &self.ropes[1].at((first + i) * layout.ratio));
            rows::pack(self.workers.level, layout.row, &row, packed);
        });
        rows
    }

    pub(crate) fn stage_index(&self, layer: usize, states: &[&State], pass: &mut Pass) -> Result<(), Error> {
        let ratio = self.config.compress_ratios[layer];
        let visible = |position: usize| (position + 1).checked_div(ratio).unwrap_or(0);
        let rows = pass.batch.rows();
        let mut chosen: Vec<Chosen> = rows.iter().map(|row| Chosen::First(visible(row.position))).collect();
        let top_k = self.config.index_top_k;
        let chooses = |&r: &usize| ratio == 4 && visible(rows[r].position) > top_k;
        let choosing: Vec<usize> = (0..rows.len()).filter(chooses).collect();
        if choosing.is_empty() {
            pass.chosen = chosen;
            return Ok(());
        }
        let (queries, weights) = self.index_queries(layer, &choosing, pass);
        let (width, heads) = (self.config.index_heads * self.config.index_head_dim, self.config.index_heads);
        let mut asked = choosing.iter().zip(queries.chunks_exact(width).zip(weights.chunks_exact(heads)));
        for rows_together in together(&choosing, &pass.run_of_row, ROWS_TOGETHER) {
            let asked = asked.by_ref().take(rows_together.len());
            let asked =
                asked.map(|(&r, (query, weights))| Asked { query, weights, visible: visible(rows[r].position) });
            let asked: Vec<Asked<'_>> = asked.collect();
            let keys = view(layer, rows_together[0], states, pass).index().expect("a ratio-4 layer has an indexer");
            let scores = self.index_scores(layer, &asked, keys);
            // `None` where the scores are no numbers and choose nothing.
            let mut picked: Vec<Option<Vec<u32>>> = vec![None; asked.len()];
            self.workers.rows(&mut picked, 1, 20 * asked[0].visible, |i, picked| {
                let are_numbers = scores[i].iter().all(|score| score.is_finite());
                picked[0] = are_numbers.then(|| top_rows(&scores[i], top_k));
            });
            for (&r, picked) in rows_together.iter().zip(picked) {
                let picked = picked.ok_or(Error::NotFinite { position: rows[r].position })?;
                chosen[r] = Chosen::Rows(picked);
            }
        }
        pass.chosen = chosen;
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
        let (low, input) = (gather(&pass.q_low, config.q_rank), gather(&pass.input, config.d_model));
        self.workers.matmul(w.q_b.matrix(), &Input::new(&low, config.q_rank), &mut queries);
        self.workers.matmul(w.weights.matrix(), &Input::new(&input, config.d_model), &mut weights);
        let scale = 1.0 / ((config.index_heads * config.index_head_dim) as f32).sqrt();
        weights.iter_mut().for_each(|weight| *weight *= scale);

        let width = config.index_heads * config.index_head_dim;
        let format = self.layout.layers[layer].index.expect("a ratio-4 layer has an indexer").row;
        self.workers.rows(&mut queries, width, 8 * width, |i, heads| {
            let rotation = &pass.rotations[1][rows[i]];
            let mut packed = vec![0; format.row_bytes()];
            for head in heads.chunks_exact_mut(config.index_head_dim) {
                rotate_at(self.workers.level, &mut head[config.index_head_dim - config.rope_dim..], rotation);
                if self.layout.arithmetic == Arithmetic::Official {
                    rows::pack(self.workers.level, format, head, &mut packed);
                    rows::unpack(self.workers.level, format, &packed, head);
                }
            }
        });
        (queries, weights)
    }

    /// `Σ_h weight[h] · max(0, query_h · key)` of every key that a row sees, for rows that see one after the other no fewer.
    fn index_scores(&self, layer: usize, asked: &[Asked<'_>], keys: CompressorView<'_>) -> Vec<Vec<f32>> {
        /// Keys of a part, and of a tile of it.
        const PART: usize = 512;
        const TILE: usize = 64;
        let (level, dim, heads) = (self.workers.level, self.config.index_head_dim, self.config.index_heads);
        let format = self.layout.layers[layer].index.expect("a ratio-4 layer has an indexer").row;
        let mut scores: Vec<Vec<f32>> = asked.iter().map(|row| vec![0.0; row.visible]).collect();
        let parts = columns(scores.iter_mut().map(Vec::as_mut_slice), PART);
        let work = asked.iter().map(|row| row.visible).sum::<usize>() * heads * dim;
        self.workers.each(parts.into_iter().enumerate(), work, |(part, mut scores)| {
            // Rows that do not see so far have no piece of this part.
            let asked = &asked[asked.len() - scores.len()..];
            let (mut tile, mut dots) = (vec![0.0; TILE * dim], vec![0.0; TILE * heads]);
            let most = scores.last().map_or(0, |scores| scores.len());
            for first in (0..most).step_by(TILE) {
                let count = TILE.min(most - first);
                for (i, key) in tile.chunks_exact_mut(dim).take(count).enumerate() {
                    rows::unpack(level, format, keys.row(part * PART + first + i), key);
                }
                for (row, scores) in asked.iter().zip(&mut scores) {
                    let seen = count.min(scores.len().saturating_sub(first));
                    let Some(scores) = scores.get_mut(first..first + seen) else { continue };
                    let dots = &mut dots[..seen * heads];
                    exact::matmul_f32_at(level, row.query, dim, &tile[..seen * dim], dots);
                    rectified_sums_at(level, row.weights, dots, scores);
                }
            }
        });
        scores
    }

    pub(crate) fn stage_attend(&self, layer: usize, states: &[&State], pass: &mut Pass) -> Result<(), Error> {
        let mut heads = std::mem::take(&mut pass.heads);
        let all: Vec<usize> = (0..pass.rows()).collect();
        if all.len() < self.workers.threads() {
            let width = self.config.heads * self.config.head_dim;
            heads
                .chunks_exact_mut(width)
                .zip(all)
                .for_each(|(heads, r)| self.attend_one(layer, r, states, pass, heads));
        } else {
            self.attend_many(layer, &all, states, pass, &mut heads);
        }
        pass.heads = heads;
        Ok(())
    }

    /// One row, whose heads are shared by the threads.
    fn attend_one(&self, layer: usize, r: usize, states: &[&State], pass: &Pass, heads: &mut [f32]) {
        let (level, dim, format) = (self.workers.level, self.config.head_dim, self.layout.layers[layer].raw);
        let view = view(layer, r, states, pass);
        let window = self.window(pass.batch.rows()[r].position);
        let window_values = window.len() * dim;
        let packed: Vec<&[u8]> = window.map(|p| view.raw(p)).chain(compressed_rows(view, &pass.chosen[r])).collect();
        let mut keys = vec![0.0; packed.len() * dim];
        self.workers.chunks(&mut keys, KEYS_TOGETHER * dim, 4 * KEYS_TOGETHER * dim, |(i, keys)| {
            let packed = packed[i * KEYS_TOGETHER..].iter();
            packed.zip(keys.chunks_exact_mut(dim)).for_each(|(packed, key)| rows::unpack(level, format, packed, key));
        });
        let keys = keys.split_at(window_values);
        let group = HEADS_TOGETHER * dim;
        self.workers.chunks(heads, group, 2 * packed.len() * group, |(i, out)| {
            self.attend_heads(layer, r, i * HEADS_TOGETHER, keys, pass, out);
        });
    }

    /// All rows, which are shared by the threads, a few of one session at a time.
    fn attend_many(&self, layer: usize, all: &[usize], states: &[&State], pass: &Pass, heads: &mut [f32]) {
        let (config, width) = (&self.config, self.config.heads * self.config.head_dim);
        let keys: usize =
            all.iter().map(|&r| self.window(pass.batch.rows()[r].position).len() + pass.chosen[r].len()).sum();
        let mut rest = heads;
        // No larger than leaves every thread one.
        let most = (all.len() / self.workers.threads()).clamp(1, ROWS_TOGETHER);
        let tiles = together(all, &pass.run_of_row, most).map(|rows| {
            let heads;
            (heads, rest) = std::mem::take(&mut rest).split_at_mut(rows.len() * width);
            (rows, heads)
        });
        let tiles: Vec<(&[usize], &mut [f32])> = tiles.collect();
        self.workers.each(tiles.into_iter(), 2 * keys * width, |(rows, heads)| {
            let (view, dim) = (view(layer, rows[0], states, pass), config.head_dim);
            let windows: Vec<Range<usize>> = rows.iter().map(|&r| self.window(pass.batch.rows()[r].position)).collect();
            let start = windows[0].start;
            let window = self.unpack(layer, (start..windows[rows.len() - 1].end).map(|p| view.raw(p)));
            // First rows are shared by all that see them; rows that were chosen are each query's own.
            let first = |&r: &usize| if let Chosen::First(count) = pass.chosen[r] { count } else { 0 };
            let first = Chosen::First(rows.iter().map(first).max().unwrap_or(0));
            let first = self.unpack(layer, compressed_rows(view, &first));
            for ((&r, range), out) in rows.iter().zip(windows).zip(heads.chunks_exact_mut(width)) {
                let window = &window[(range.start - start) * dim..(range.end - start) * dim];
                let own;
                let compressed = match &pass.chosen[r] {
                    Chosen::First(count) => &first[..count * dim],
                    chosen => {
                        own = self.unpack(layer, compressed_rows(view, chosen));
                        &own
                    }
                };
                for (g, out) in out.chunks_mut(HEADS_TOGETHER * dim).enumerate() {
                    self.attend_heads(layer, r, g * HEADS_TOGETHER, (window, compressed), pass, out);
                }
            }
        });
    }

    /// Rows as f32, one after the other.
    fn unpack<'a>(&self, layer: usize, packed: impl ExactSizeIterator<Item = &'a [u8]>) -> Vec<f32> {
        let (level, dim, format) = (self.workers.level, self.config.head_dim, self.layout.layers[layer].raw);
        let mut values = vec![0.0; packed.len() * dim];
        packed.zip(values.chunks_exact_mut(dim)).for_each(|(packed, row)| rows::unpack(level, format, packed, row));
        values
    }

    /// Positions of the rows that a query at `position` attends to whatever it chose.
    fn window(&self, position: usize) -> Range<usize> {
        (position + 1).saturating_sub(self.config.window)..position + 1
    }

    /// Attention of a few heads of a query, from `first` on, over its window and its compressed rows, which are values as
    /// well. The sink takes part in the denominator only.
    fn attend_heads(
        &self,
        layer: usize,
        r: usize,
        first: usize,
        (window, compressed): (&[f32], &[f32]),
        pass: &Pass,
        out: &mut [f32],
    ) {
        let (config, level, dim) = (&self.config, self.workers.level, self.config.head_dim);
        let queries = &pass.queries[(r * config.heads + first) * dim..][..out.len()];
        let sinks = &self.weights.layers[layer].attention.sinks.values()[first..];
        let (heads, in_window, behind) = (out.len() / dim, window.len() / dim, compressed.len() / dim);
        let count = in_window + behind;
        let scale = 1.0 / (dim as f32).sqrt();
        let (mut near, mut far) = (vec![0.0; heads * in_window], vec![0.0; heads * behind]);
        exact::matmul_f32_at(level, queries, dim, window, &mut near);
        exact::matmul_f32_at(level, queries, dim, compressed, &mut far);
        let mut weights = vec![0.0; heads * count];
        let mut denominators = vec![0.0; heads];
        for (h, weights) in weights.chunks_exact_mut(count).enumerate() {
            weights[..in_window].copy_from_slice(&near[h * in_window..][..in_window]);
            weights[in_window..].copy_from_slice(&far[h * behind..][..behind]);
            let max = sinks[h].max(largest_at(level, weights) * scale);
            exp_of_at(level, weights, scale, max);
            denominators[h] = exact::sum_at(level, weights) + math::exp(sinks[h] - max);
        }
        out.fill(0.0);
        exact::add_weighted_at(level, &weights, count, window, dim, out);
        exact::add_weighted_at(level, &weights[in_window..], count, compressed, dim, out);
        let rotation = &pass.rotations[self.rope_of(layer)][r];
        for (out, denominator) in out.chunks_exact_mut(dim).zip(&denominators) {
            out.iter_mut().for_each(|value| *value /= denominator);
            rotate_back_at(level, &mut out[dim - config.rope_dim..], rotation);
        }
    }

    pub(crate) fn stage_attention_out(&self, layer: usize, pass: &mut Pass) -> Result<(), Error> {
        let (config, w) = (&self.config, &self.weights.layers[layer].attention);
        let (rows, group) = (pass.rows(), config.heads * config.head_dim / config.o_groups);
        let (low_width, all) = (config.o_groups * config.o_rank, config.heads * config.head_dim);
        let (mut low, mut input) = (vec![0.0; rows * low_width], vec![0.0; rows * group]);
        for g in 0..config.o_groups {
            self.workers.rows(&mut input, group, group, |r, input| {
                input.copy_from_slice(&pass.heads[r * all + g * group..][..group]);
            });
            let out = low.chunks_exact_mut(low_width).map(|low| &mut low[g * config.o_rank..][..config.o_rank]);
            let w = w.output_a.rows(g * config.o_rank, config.o_rank);
            self.workers.matmul_into(w, &Input::new(&input, group), out);
        }
        self.workers.matmul(w.output_b.matrix(), &Input::new(&low, low_width), &mut pass.output);
        Ok(())
    }
}

/// A layer of the session that a row of a pass belongs to, with what the pass has added.
fn view<'a>(layer: usize, row: usize, states: &[&'a State], pass: &'a Pass) -> LayerView<'a> {
    let run = pass.run_of_row[row];
    states[pass.batch.runs()[run].session].view(layer, &pass.deltas[run].layers[layer])
}

/// `rows` in their order, at most `most` of one session at a time.
fn together<'a>(rows: &'a [usize], run_of_row: &'a [usize], most: usize) -> impl Iterator<Item = &'a [usize]> {
    rows.chunk_by(|&a, &b| run_of_row[a] == run_of_row[b]).flat_map(move |rows| rows.chunks(most))
}

/// Compressed rows that were chosen, packed.
fn compressed_rows<'a>(view: LayerView<'a>, chosen: &Chosen) -> impl ExactSizeIterator<Item = &'a [u8]> {
    let compressed = view.main();
    (0..chosen.len()).map(move |i| compressed.expect("rows are chosen from a compressor").row(chosen.row(i)))
}

/// A row that chooses among an indexer's keys.
struct Asked<'a> {
    /// `[heads, dim]`.
    query: &'a [f32],
    /// Of its heads.
    weights: &'a [f32],
    /// How many keys it sees.
    visible: usize,
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
pub(crate) fn pool_window(level: Level, slots: &[(&[f32], &[f32])]) -> Vec<f32> {
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
    // A list of their own: the choice stays with the pass, and this one is as long as the context.
    let mut best = rows[..k].to_vec();
    best.sort_unstable();
    best
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
