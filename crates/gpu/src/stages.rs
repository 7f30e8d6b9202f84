//! The stages as dispatches, in the order of a layer (docs/spec/model.md §2).

use model::{Cancel, Error, SubLayer};

use crate::attend_many::{AttendManyParams, IndexScoreManyParams, index_tile};
use crate::backend::GpuBackend;
use crate::experts::{GpuLeases, Selection};
use crate::format::Format;
use crate::jobs::{Jobs, Matrix};
use crate::kernel::{Buffer, Commands, Span};
use crate::kit::{LANE_OUTPUTS, Matvec, finish_lays_out, has_integers, heads_lay_out, is_made};
use crate::matmul::{Experts, Groups, Halves};
use crate::pass::{Activations, FEW_ROWS, GpuPass, ManyActivations, Pending, Shapes, choice_rows, windows};
use crate::state::{GpuState, SMALL_PASS};
use crate::together::Together;
use crate::weights::{At, HyperAt};

/// Parameters of a kernel, in the order of its `Params`; those of a run come first, where it has such.
macro_rules! params {
    ($run:expr; $($value:expr),* $(,)?) => {{
        let [row0, start, ring, index, windows]: crate::together::RunPlace = $run;
        [row0, start, ring, index, windows, $(crate::stages::Word::word($value)),*]
    }};
    ($($value:expr),* $(,)?) => { [$(crate::stages::Word::word($value)),*] };
}

pub(crate) use params;

/// A parameter as a word.
pub(crate) trait Word {
    fn word(self) -> u32;
}

impl Word for u32 {
    fn word(self) -> u32 {
        self
    }
}

impl Word for usize {
    fn word(self) -> u32 {
        u32::try_from(self).expect("sizes on the device fit 32 bits")
    }
}

impl Word for f32 {
    fn word(self) -> u32 {
        self.to_bits()
    }
}

/// Outputs of a workgroup of `experts_up` and of `experts_down`.
const EXPERT_OUTPUTS: [usize; 2] = [8 * LANE_OUTPUTS[0], 8 * LANE_OUTPUTS[1]];

/// Values of a workgroup of the kernel `finite`.
const FINITE_VALUES: usize = 4096;

/// Rows whose products share what is read of the weights.
fn rows_together(rows: usize) -> usize {
    match rows {
        0..=1 => 1,
        2 => 2,
        3..=4 => 4,
        _ => 8,
    }
}

/// Inputs and results of products: where, and values of a row.
struct Operands<'b> {
    x: (&'b Buffer, usize),
    y: (&'b Buffer, usize),
    rows: usize,
    /// Whether the kernel that made the inputs laid them out for lanes, if their rows are few.
    laid_out: bool,
}

impl GpuBackend {
    /// What tiled products need, where a pass computes by them.
    fn tiled<'p>(&self, on: &'p Activations, rows: usize) -> Option<&'p ManyActivations> {
        on.many.as_ref().filter(|_| rows > FEW_ROWS)
    }

    /// Whether products of few rows multiply integers, where formats have any.
    fn has_digits(&self) -> bool {
        self.kit.digits.is_some()
    }

    /// Whether kernels that make the inputs of `rows` rows are to lay them out for lanes, too.
    fn lay_out(&self, rows: usize) -> u32 {
        u32::from(self.has_digits() && rows <= FEW_ROWS)
    }

    /// Whether a hyper-connection and attention lay out what they make, where they are asked to.
    fn finish_lays_out(&self) -> bool {
        self.has_digits() && finish_lays_out(self.config.d_model, self.config.streams)
    }

    fn heads_lay_out(&self) -> bool {
        self.has_digits() && heads_lay_out(&self.config)
    }

    /// Lays rows of `width` values out for lanes in a dispatch of its own, if they are to be: where whoever made them does not.
    pub(crate) fn lay_out_apart(
        &self,
        commands: &mut Commands,
        on: &Activations,
        x: &Buffer,
        width: usize,
        rows: usize,
    ) {
        if self.lay_out(rows) != 0 {
            self.digits(commands, on, ((x, width), width, rows), None);
        }
    }

    /// Lays the first `width` values of each row out for lanes, weighed by a norm of a slab if one is given.
    fn digits(
        &self,
        commands: &mut Commands,
        on: &Activations,
        (x, width, rows): ((&Buffer, usize), usize, usize),
        norm: Option<(&Buffer, At)>,
    ) {
        let Some([plain, weighed]) = &self.kit.digits else { return };
        let params = params![x.1 / 4, width / 16, norm.map_or(0, |(_, at)| at), self.config.rms_eps];
        let buffers = [x.0.all(), on.digits.all(), on.transposed.all()];
        let groups = [(width / 16).div_ceil(256) as u32, rows as u32, 1];
        match norm {
            None => commands.run(plain, &buffers, &params, groups),
            Some((slab, _)) => {
                let [x, digits, transposed] = buffers;
                commands.run(weighed, &[x, digits, transposed, slab.all()], &params, groups);
            }
        }
    }

    /// `jobs` on every row; the inputs are divided by their RMS and weighed first where there is a norm. Of few rows they may
    /// have been laid out for lanes.
    fn products(
        &self,
        commands: &mut Commands,
        on: &Activations,
        slab: &Buffer,
        jobs: &Jobs,
        operands: Operands<'_>,
        norm: Option<At>,
    ) -> Result<(), Error> {
        let Operands { x, y, rows, laid_out } = operands;
        if let Some(many) = self.tiled(on, rows) {
            let mut from = x;
            if let Some(norm) = norm {
                // Nothing else is in there at this time of a layer.
                from = (&on.low, self.config.q_rank);
                let params = params![from.1, x.1, from.1, norm, self.config.rms_eps];
                let buffers = [slab.all(), x.0.all(), from.0.all()];
                commands.run(&self.kit.normalise, &buffers, &params, [rows as u32, 1, 1]);
            }
            let halves = Halves { halves: many.halves.all(), inverses: many.inverses.all(), rows, width: from.1 };
            self.many.halve(commands, from.0.all(), from.1, halves)?;
            self.many.matmul(commands, slab.all(), jobs, halves, y.0.all(), y.1, self.code_book.all())?;
            return Ok(());
        }
        let (outputs, groups) = jobs.matvec();
        let formats = jobs.formats();
        let (digits, has_book) = (self.has_digits(), formats.contains(&Format::Iq2Xxs));
        let made = is_made(digits, &formats, rows, laid_out);
        let width = if norm.is_some() { self.config.q_rank } else { x.1 };
        if made && !laid_out {
            self.digits(commands, on, (x, width, rows), norm.map(|at| (slab, at)));
        }
        let mut buffers = vec![slab.all(), if made { on.transposed.all() } else { x.0.all() }, y.0.all()];
        if has_book {
            buffers.push(self.code_book.all());
        }
        if made {
            buffers.push(on.digits.all());
        }
        let together = rows_together(rows);
        let norm_is_some = norm.is_some();
        let kernel = self.kit.matvec(Matvec { formats, rows: together, outputs, norm: norm_is_some, digits, made })?;
        let halves = width / 16;
        let params = params![jobs.group_table, rows, x.1 / 4, y.1, norm.unwrap_or(0), self.config.rms_eps, halves];
        commands.run(&kernel, &buffers, &params, [groups, rows.div_ceil(together) as u32, 1]);
        Ok(())
    }

    pub(crate) fn stage_embed(&self, pass: &mut GpuPass) -> Result<(), Error> {
        let (rows, d) = (pass.rows(), self.config.d_model);
        let tokens: Vec<u32> = pass.batch.rows().iter().map(|row| row.token).collect();
        let embedded = self.embedding.rows(&tokens, d)?;
        let commands = pass.commands.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        let on = pass.on.as_ref().expect("a pass has its activations");
        commands.write((&on.embedded, 0), bytemuck::cast_slice(&embedded));
        commands.stage("embed");
        let groups = [d.div_ceil(256) as u32, rows as u32, 1];
        commands.run(&self.kit.expand, &[on.embedded.all(), on.streams.all()], &params![d], groups);
        Ok(())
    }

    /// Sums of the next hyper-connection's projection over the streams, into which a waiting output goes first.
    pub(crate) fn mix(&self, pass: &GpuPass, commands: &mut Commands, slab: &Buffer, function: At, is_head: bool) {
        let on = pass.on();
        let pending = std::mem::replace(&mut *lock(&pass.pending), Pending::Nothing);
        let kernels = if is_head { &self.kit.mix_head } else { &self.kit.mix };
        let (kernel, outputs) = match pending {
            Pending::Outputs(outputs) => (&kernels[1], outputs),
            Pending::Nothing => (&kernels[0], 0),
        };
        let buffers = [slab.all(), on.output.all(), on.hyper.all(), on.streams.all(), on.sums.all()];
        let params = params![self.config.d_model, outputs, function];
        commands.run(kernel, &buffers, &params, [self.shapes.slices() as u32, pass.rows() as u32, 1]);
    }

    pub(crate) fn stage_hc_pre(&self, layer: usize, sub_layer: SubLayer, pass: &mut GpuPass) -> Result<(), Error> {
        let weights = &self.layers[layer];
        let (at, name) = match sub_layer {
            SubLayer::Attention => (&weights.attention, "hc attention"),
            SubLayer::Experts => (&weights.experts, "hc experts"),
        };
        let mut commands = lock(&pass.commands);
        commands.stage(name);
        self.mix(pass, &mut commands, &weights.slab, at.function, false);
        let on = pass.on();
        let groups = [2, pass.rows() as u32, 1];
        let params = self.finish_params(at, 0, 0, self.lay_out(pass.rows()));
        commands.run(&self.kit.finish, &self.finish_buffers(&weights.slab, on, &on.input), &params, groups);
        if !self.finish_lays_out() {
            self.lay_out_apart(&mut commands, on, &on.input, self.config.d_model, pass.rows());
        }
        Ok(())
    }

    fn finish_buffers<'b>(&self, slab: &'b Buffer, on: &'b Activations, result: &'b Buffer) -> Vec<Span<'b>> {
        let all = [slab, &on.streams, &on.sums, result, &on.hyper, &on.digits, &on.transposed].map(Buffer::all);
        all[..if self.finish_lays_out() { 7 } else { 5 }].to_vec()
    }

    fn finish_params(&self, at: &HyperAt, row0: usize, out0: usize, lay_out: u32) -> [u32; 10] {
        let c = &self.config;
        params![
            self.shapes.slices(),
            at.scale,
            at.base,
            at.norm,
            c.sinkhorn_iterations,
            c.hc_eps,
            c.rms_eps,
            row0,
            out0,
            lay_out,
        ]
    }

    /// Outputs of the sub-layer that ended wait for the next `hc_pre`.
    pub(crate) fn stage_hc_post(&self, pass: &mut GpuPass) {
        *lock(&pass.pending) = Pending::Outputs(pass.outputs);
    }

    pub(crate) fn stage_project(&self, layer: usize, states: &[&GpuState], pass: &mut GpuPass) -> Result<(), Error> {
        let (c, weights, on) = (&self.config, &self.layers[layer], pass.on());
        let rows = pass.rows();
        let mut commands = lock(&pass.commands);
        commands.stage("project");
        let operands =
            Operands { x: (&on.input, c.d_model), y: (&on.projected, weights.projected), rows, laid_out: true };
        self.products(&mut commands, on, &weights.slab, &weights.project, operands, None)?;
        commands.stage("queries");
        let (x, y) = ((&on.projected, weights.projected), (&on.queries, weights.queried));
        let operands = Operands { x, y, rows, laid_out: false };
        self.products(&mut commands, on, &weights.slab, &weights.queries, operands, Some(weights.q_a_norm))?;
        commands.stage("settle");
        for runs in Together::all(layer, states, pass) {
            self.settle(layer, &runs, states[runs.runs[0].session], pass, on, &mut commands);
        }
        Ok(())
    }

    /// Queries and keys of rows, normalised, rotated and stored. `state` is that of a run.
    fn settle(
        &self,
        layer: usize,
        runs: &Together<'_>,
        state: &GpuState,
        pass: &GpuPass,
        on: &Activations,
        commands: &mut Commands,
    ) {
        let (c, weights, places) = (&self.config, &self.layers[layer], &state.places[layer]);
        let count = runs.rows.len();
        let is_large = count > SMALL_PASS;
        let mut run = runs.place;
        if is_large {
            // Into the ring that is not read.
            run[2] = state.rings(layer, count)[1].word();
        }
        let compressor = weights.compressor.as_ref();
        let indexer = weights.index_compressor.as_ref();
        // No more rows than a session keeps after a pass.
        let kept = |rows: usize| rows - SMALL_PASS.min(rows);
        let params = params![run;
            weights.queried,
            weights.projected,
            weights.kv,
            weights.kv_norm,
            c.rms_eps,
            runs.rows.start,
            count,
            places.raw_rows,
            if is_large { kept(places.raw_rows) } else { count },
            u32::from(is_large),
            places.inputs,
            places.inputs_rows.max(1),
            if is_large { kept(places.inputs_rows) } else { count },
            places.index_inputs,
            places.index_inputs_rows.max(1),
            if is_large { kept(places.index_inputs_rows) } else { count },
            compressor.map_or(0, |at| at.u),
            compressor.map_or(0, |at| at.positions),
            indexer.map_or(0, |at| at.u),
            indexer.map_or(0, |at| at.positions),
            pass.rotations[self.rope_of(layer)],
        ];
        let others = [weights.slab.all(), on.tables.all(), on.projected.all(), on.queries.all(), on.fresh.all()];
        let buffers = runs.buffers(&others, &self.spares);
        let index = if indexer.is_some() { 1 + c.index_heads } else { 0 };
        let groups = c.heads + 1 + usize::from(compressor.is_some()) + index;
        let kernel = &self.kit.of_sessions(runs.runs.len()).layers[layer].settle;
        commands.run(kernel, &buffers, &params, [groups as u32, count as u32, 1]);
    }

    /// Which of the two rotations a layer uses.
    fn rope_of(&self, layer: usize) -> usize {
        usize::from(self.config.compress_ratios[layer] != 0)
    }

    pub(crate) fn stage_compress(&self, layer: usize, states: &[&GpuState], pass: &mut GpuPass) {
        let (c, weights, on) = (&self.config, &self.layers[layer], pass.on());
        let ratio = c.compress_ratios[layer];
        if ratio == 0 {
            return;
        }
        let mut commands = lock(&pass.commands);
        commands.stage("compress");
        for runs in Together::all(layer, states, pass) {
            if runs.most(|run| windows(run, ratio).1) == 0 {
                continue;
            }
            let places = &states[runs.runs[0].session].places[layer];
            let kernels = &self.kit.of_sessions(runs.runs.len()).layers[layer];
            let buffers = runs.buffers(&[weights.slab.all(), on.tables.all(), on.projected.all()], &self.spares);
            let (Some(kernel), Some(main)) = (&kernels.pool, &weights.compressor) else { continue };
            // Nobody looks at the second where there is no indexer.
            let index = weights.index_compressor.as_ref();
            let of_index = index.unwrap_or(main);
            let params = params![runs.place;
                weights.projected,
                c.rms_eps,
                runs.rows.start,
                places.main(),
                main.u,
                main.positions,
                main.norm,
                places.inputs,
                places.inputs_rows,
                of_index.u,
                of_index.positions,
                of_index.norm,
                places.index_inputs,
                places.index_inputs_rows,
            ];
            let kinds = 1 + u32::from(index.is_some());
            commands.run(kernel, &buffers, &params, [runs.rows.len() as u32, kinds, 1]);
        }
    }

    pub(crate) fn stage_index(&self, layer: usize, states: &[&GpuState], pass: &mut GpuPass) {
        let (c, on) = (&self.config, pass.on());
        if c.compress_ratios[layer] != 4 {
            return;
        }
        let weights = &self.layers[layer];
        let mut commands = lock(&pass.commands);
        commands.stage("index");
        for runs in Together::all(layer, states, pass) {
            let keys = runs.most(|run| (run.start + run.rows.len()) / 4);
            if keys <= c.index_top_k {
                continue;
            }
            let kit = self.kit.of_sessions(runs.runs.len());
            let others = [on.queries.all(), on.projected.all(), on.tables.all(), on.scores.all()];
            let of_score = runs.buffers(&others, &self.spares);
            let together = self.shapes.scored_together(keys, runs.rows.len());
            for first in runs.rows.clone().step_by(together) {
                let rows = together.min(runs.rows.end - first);
                let scale = 1.0 / ((c.index_heads * c.index_head_dim) as f32).sqrt();
                let (q, ratio) = (c.heads * c.head_dim, 4_u32);
                match &self.kit.score_many {
                    Some(kernel) if self.tiled(on, pass.rows()).is_some() => {
                        let [row0, start, _, index, _] = runs.place;
                        let params = IndexScoreManyParams {
                            q_stride: weights.queried.word(),
                            q: q.word(),
                            p_stride: weights.projected.word(),
                            weights: weights.index_weights.word(),
                            scale,
                            row0: first.word(),
                            start,
                            run0: row0,
                            ratio,
                            keys: index,
                            stride: keys.word(),
                            rows: rows.word(),
                        };
                        let buffers = [on.queries.all(), on.projected.all(), runs.session(), on.scores.all()];
                        let [of_keys, of_rows] = index_tile(c.index_heads);
                        let groups = [keys.div_ceil(of_keys) as u32, rows.div_ceil(of_rows) as u32, 1];
                        commands.run(kernel, &buffers, &params, groups);
                    }
                    _ => {
                        let params = params![runs.place;
                            weights.queried,
                            q,
                            weights.projected,
                            weights.index_weights,
                            scale,
                            first,
                            ratio,
                            keys,
                        ];
                        let groups = [keys.div_ceil(32) as u32, rows as u32, 1];
                        commands.run(&kit.score, &of_score, &params, groups);
                    }
                }
                let params = params![runs.place; first, ratio, c.index_top_k, keys];
                let buffers = [on.scores.all(), on.chosen.all(), on.flags.all(), on.tables.all()];
                commands.run(&kit.select, &buffers, &params, [1, rows as u32, 1]);
            }
        }
    }

    pub(crate) fn stage_attend(&self, layer: usize, states: &[&GpuState], pass: &mut GpuPass) {
        let (c, weights, on) = (&self.config, &self.layers[layer], pass.on());
        let mut commands = lock(&pass.commands);
        commands.stage("attend");
        let ratio = c.compress_ratios[layer];
        let top_k = if ratio == 4 { c.index_top_k } else { usize::MAX >> 33 };
        let places = &states[0].places[layer];
        let scale = 1.0 / (c.head_dim as f32).sqrt();
        let rotations = pass.rotations[self.rope_of(layer)];
        for runs in Together::all(layer, states, pass) {
            let count = runs.rows.len();
            let [row0, start, ring, ..] = runs.place;
            let fresh = if count > SMALL_PASS { start } else { u32::MAX };
            if let (Some((kernel, many)), Some(_)) = (&self.kit.attend_many, self.tiled(on, pass.rows())) {
                let params = AttendManyParams {
                    q_stride: (weights.queried / 4).word(),
                    row0,
                    start,
                    run0: row0,
                    window: c.window.word(),
                    ring,
                    ring_rows: places.raw_rows.word(),
                    compressed: places.main().word(),
                    ratio: ratio.word(),
                    top_k: top_k.word(),
                    fresh,
                    scale,
                    key_factor: weights.key_factor,
                    sinks: weights.sinks,
                    rotations: rotations.word(),
                };
                let buffers = [
                    on.queries.all(),
                    runs.session(),
                    on.fresh.all(),
                    on.chosen.all(),
                    weights.slab.all(),
                    on.tables.all(),
                    on.heads.all(),
                ];
                commands.run(kernel, &buffers, &params, many.groups(count));
                continue;
            }
            let keys = |end: usize| c.window.min(end) + end.checked_div(ratio).unwrap_or(0).min(top_k);
            let pieces = runs.most(|run| keys(run.start + run.rows.len())).div_ceil(crate::pass::PIECE_KEYS);
            let kit = self.kit.of_sessions(runs.runs.len());
            let others = [on.queries.all(), on.tables.all(), on.fresh.all(), on.chosen.all(), on.partial.all()];
            let of_attend = runs.buffers(&others, &self.spares);
            let of_combine = [&weights.slab, &on.tables, &on.partial, &on.heads, &on.digits, &on.transposed];
            let of_combine = &of_combine.map(Buffer::all)[..if self.heads_lay_out() { 6 } else { 4 }];
            let lay_out = self.lay_out(pass.rows());
            let together = self.shapes.attended_together(pieces, count);
            for first in runs.rows.clone().step_by(together) {
                let rows = together.min(runs.rows.end - first) as u32;
                let params = params![runs.place;
                    weights.queried / 4,
                    first,
                    c.window,
                    places.raw_rows,
                    places.main(),
                    ratio,
                    top_k,
                    fresh,
                    pieces,
                    scale,
                ];
                let groups = c.heads / Shapes::heads_together(c.heads, self.shapes.row_words);
                commands.run(&kit.attend, &of_attend, &params, [groups as u32, pieces as u32, rows]);
                let params =
                    params![runs.place; first, c.window, ratio, top_k, pieces, weights.sinks, rotations, lay_out];
                commands.run(&kit.combine, of_combine, &params, [c.heads as u32, rows, 1]);
            }
        }
        if !self.heads_lay_out() {
            self.lay_out_apart(&mut commands, on, &on.heads, c.heads * c.head_dim, pass.rows());
        }
    }

    pub(crate) fn stage_attention_out(&self, layer: usize, pass: &mut GpuPass) -> Result<(), Error> {
        let (c, weights, rows) = (&self.config, &self.layers[layer], pass.rows());
        pass.outputs = 1;
        let on = pass.on();
        let mut commands = lock(&pass.commands);
        commands.stage("output a");
        let low = c.o_groups * c.o_rank;
        let x = (&on.heads, c.heads * c.head_dim);
        let operands = Operands { x, y: (&on.low, low), rows, laid_out: true };
        self.products(&mut commands, on, &weights.slab, &weights.output_a, operands, None)?;
        commands.stage("output b");
        let operands = Operands { x: (&on.low, low), y: (&on.output, c.d_model), rows, laid_out: false };
        self.products(&mut commands, on, &weights.slab, &weights.output_b, operands, None)
    }

    pub(crate) fn stage_route(&self, layer: usize, pass: &mut GpuPass) -> Result<Selection, Error> {
        let (c, weights, rows) = (&self.config, &self.layers[layer], pass.rows());
        let on = pass.on();
        let mut commands = lock(&pass.commands);
        commands.stage("router");
        let operands =
            Operands { x: (&on.input, c.d_model), y: (&on.routed, self.shapes.routed), rows, laid_out: true };
        self.products(&mut commands, on, &weights.slab, &weights.route, operands, None)?;
        commands.stage("choose");
        let params = params![
            self.shapes.routed,
            c.shared_width,
            c.shared_swiglu_limits[layer],
            weights.choice,
            c.route_scale,
            pass.tokens,
            self.lay_out(rows),
        ];
        let buffers = [
            weights.slab.all(),
            on.tables.all(),
            on.routed.all(),
            on.experts.all(),
            on.shares.all(),
            on.shared_mid.all(),
            on.flags.all(),
        ];
        let groups = [1 + c.shared_width.div_ceil(256) as u32, rows as u32, 1];
        commands.run(&self.kit.layers[layer].route, &buffers, &params, groups);
        if !self.experts.is_streamed() {
            return Ok(Selection::resident());
        }
        let bytes = commands.read((&on.experts, 0), 4 * (rows * c.experts_used) as u64)?;
        let places = pass.batch.runs().iter().flat_map(|run| 0..run.rows.len()).collect();
        Ok(Selection::read_back(bytemuck::pod_collect_to_vec(&bytes), places))
    }

    pub(crate) fn stage_routed_experts(
        &self,
        layer: usize,
        leases: GpuLeases<'_>,
        cancel: &Cancel,
        pass: &mut GpuPass,
    ) -> Result<(), Error> {
        let (c, weights, rows) = (&self.config, &self.layers[layer], pass.rows());
        pass.outputs = 1 + c.experts_used;
        let on = pass.on();
        let layout = self.experts.layouts[layer];
        let slab = self.experts.slab(layer);
        let table = self.experts.table_at(layer);
        let mut commands = lock(&pass.commands);
        let commands = &mut *commands;
        let choices = rows * c.experts_used;
        let tiled = self.tiled(on, rows);
        if tiled.is_some() {
            self.shared_expert_of_many(layer, rows, on, commands)?;
        }
        if let Some(many) = tiled.filter(|_| rows > choice_rows(c)) {
            return self.experts_of_many(layer, leases, cancel, rows, on, many, commands);
        }
        let down = weights.shared_down.jobs[0].matrix;
        let made = self.has_digits() && has_integers(&layout.formats[..2]);
        if tiled.is_some() && made {
            commands.stage("experts' inputs");
            self.digits(commands, on, ((&on.input, c.d_model), c.d_model, rows), None);
        }
        self.experts.run(leases, &self.uploader, commands, cancel, &mut |commands, is_first| {
            commands.stage("experts up");
            let params = params![
                layout.slot,
                layout.parts[0],
                layout.parts[1],
                layout.stride(0),
                layout.stride(1),
                c.d_model / 32,
                c.expert_width,
                c.swiglu_limits[layer],
                table,
            ];
            let mut buffers = vec![
                slab.all(),
                self.experts.table.all(),
                on.experts.all(),
                on.shares.all(),
                if made { on.transposed.all() } else { on.input.all() },
                on.mid.all(),
            ];
            let has_book = |formats: &[Format]| formats.contains(&Format::Iq2Xxs);
            if has_book(&layout.formats[..2]) {
                buffers.push(self.code_book.all());
            }
            if made {
                buffers.push(on.digits.all());
            }
            let groups = [c.expert_width.div_ceil(EXPERT_OUTPUTS[0]) as u32, choices as u32, 1];
            commands.run(&self.kit.layers[layer].up, &buffers, &params, groups);
            commands.stage("experts down");
            let params = params![
                layout.slot,
                layout.parts[2],
                layout.stride(2),
                c.expert_width / 32,
                c.d_model,
                table,
                choices,
                down.base,
                down.stride,
                c.shared_width / 32,
            ];
            let mut buffers = vec![
                slab.all(),
                weights.slab.all(),
                self.experts.table.all(),
                on.experts.all(),
                on.mid.all(),
                on.shared_mid.all(),
                on.output.all(),
            ];
            if has_book(&[layout.formats[2], down.format]) {
                buffers.push(self.code_book.all());
            }
            let shared = if is_first && tiled.is_none() { rows } else { 0 };
            let groups = [c.d_model.div_ceil(EXPERT_OUTPUTS[1]) as u32, (choices + shared) as u32, 1];
            commands.run(&self.kit.layers[layer].down, &buffers, &params, groups);
            Ok(())
        })
    }

    /// The shared expert by tiles.
    fn shared_expert_of_many(
        &self,
        layer: usize,
        rows: usize,
        on: &Activations,
        commands: &mut Commands,
    ) -> Result<(), Error> {
        let (c, weights) = (&self.config, &self.layers[layer]);
        commands.stage("shared expert");
        let outputs = (1 + c.experts_used) * c.d_model;
        let operands =
            Operands { x: (&on.shared_mid, c.shared_width), y: (&on.output, outputs), rows, laid_out: false };
        self.products(commands, on, &weights.slab, &weights.shared_down, operands, None)
    }

    /// Routed experts by tiles of rows that chose the same.
    #[allow(clippy::too_many_arguments)]
    fn experts_of_many(
        &self,
        layer: usize,
        leases: GpuLeases<'_>,
        cancel: &Cancel,
        rows: usize,
        on: &Activations,
        many: &ManyActivations,
        commands: &mut Commands,
    ) -> Result<(), Error> {
        let c = &self.config;
        commands.stage("group");
        let choices = rows * c.experts_used;
        let groups = Groups { order: many.order.all(), tiles: many.tiles.all(), choices };
        self.many.group(commands, on.experts.all(), c.experts, groups)?;
        let input =
            Halves { halves: many.input_halves.all(), inverses: many.input_inverses.all(), rows, width: c.d_model };
        self.many.halve(commands, on.input.all(), c.d_model, input)?;
        let layout = &self.experts.layouts[layer];
        let matrix = |part: usize, rows: usize, cols: usize| Matrix {
            format: layout.formats[part],
            base: layout.parts[part],
            stride: layout.stride(part),
            rows,
            cols,
        };
        let experts = Experts {
            slab: self.experts.slab(layer).all(),
            table: self.experts.table.all(),
            table_at: self.experts.table_at(layer),
            slot: layout.slot,
            gate: matrix(0, c.expert_width, c.d_model),
            up: matrix(1, c.expert_width, c.d_model),
            down: matrix(2, c.d_model, c.expert_width),
            experts: c.experts,
            used: c.experts_used,
            limit: c.swiglu_limits[layer],
        };
        let book = self.code_book.all();
        self.experts.run(leases, &self.uploader, commands, cancel, &mut |commands, _| {
            commands.stage("experts up");
            self.many.experts_up(commands, &experts, groups, input, on.mid.all(), book)?;
            commands.stage("experts down");
            let (mid, shares, outputs) = (on.mid.all(), on.shares.all(), on.output.all());
            Ok(self.many.experts_down(commands, &experts, groups, mid, shares, outputs, book)?)
        })
    }

    /// Logits of the wanted rows, `[wanted, vocab]`, and whether every number that matters is one.
    pub(crate) fn stage_head(&self, pass: &mut GpuPass) -> Result<Option<Buffer>, Error> {
        let c = &self.config;
        let wanted: Vec<usize> = pass.batch.wanted().collect();
        let on = pass.on();
        let mut commands = lock(&pass.commands);
        commands.stage("hc head");
        self.mix(pass, &mut commands, &self.head.slab, self.head.hc.function, true);
        let lasts: Vec<usize> = pass.batch.runs().iter().map(|run| run.rows.end - 1).collect();
        for rows in lasts.chunk_by(|a, b| a + 1 == *b) {
            let width = c.stream_width();
            let params = params![rows[0] * width, width, rows[0]];
            let groups = [width.div_ceil(FINITE_VALUES) as u32, rows.len() as u32, 1];
            commands.run(&self.kit.finite, &[on.streams.all(), on.flags.all()], &params, groups);
        }
        if wanted.is_empty() {
            return Ok(None);
        }
        let mut out0 = 0;
        for rows in wanted.chunk_by(|a, b| a + 1 == *b) {
            let params = self.finish_params(&self.head.hc, rows[0], out0, self.lay_out(wanted.len()));
            let buffers = self.finish_buffers(&self.head.slab, on, &on.hidden);
            commands.run(&self.kit.finish_head, &buffers, &params, [1, rows.len() as u32, 1]);
            out0 += rows.len();
        }
        if !self.finish_lays_out() {
            self.lay_out_apart(&mut commands, on, &on.hidden, c.d_model, wanted.len());
        }
        commands.stage("head");
        let logits = Buffer::new(&self.device, "logits", 4 * (wanted.len() * c.vocab_size) as u64)?.of_one_pass();
        let operands =
            Operands { x: (&on.hidden, c.d_model), y: (&logits, c.vocab_size), rows: wanted.len(), laid_out: true };
        self.products(&mut commands, on, &self.head.slab, &self.head.output, operands, None)?;
        let mut at = 0;
        for rows in wanted.chunk_by(|a, b| a + 1 == *b) {
            let params = params![at * c.vocab_size, c.vocab_size, rows[0]];
            let groups = [c.vocab_size.div_ceil(FINITE_VALUES) as u32, rows.len() as u32, 1];
            commands.run(&self.kit.finite, &[logits.all(), on.flags.all()], &params, groups);
            at += rows.len();
        }
        commands.stage("end");
        Ok(Some(logits))
    }
}

pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
