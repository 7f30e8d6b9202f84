//! The mixture-of-experts half of a layer (docs/spec/model.md §2.7).

use gguf::TensorType;
use model::tensors::Routing;
use model::{Cancel, Error, SubLayer};
use quant::math;
use store::HostLeases;

use crate::backend::CpuBackend;
use crate::pass::Pass;
use crate::weights::Matrix;

/// Experts that the rows of a pass chose, each with the rows that chose it.
pub struct Selection {
    experts: Vec<u32>,
    uses: Vec<Vec<Use>>,
    /// Each row's place among its session's rows of the pass.
    places: Vec<usize>,
}

/// Stands in for what learned routers choose, to measure with routes that were recorded or made up. The routers are still
/// computed, so that their time counts.
pub trait SimulatedRoutes: Send + Sync {
    /// What the row at `position` chooses in `layer`, into `experts`: distinct numbers, best first.
    fn choose(&self, layer: usize, position: usize, experts: &mut [u32]);

    /// What is guessed of that before the attention of `layer`, into `experts`, the surest first.
    fn guess(&self, layer: usize, position: usize, experts: &mut [u32]);
}

/// One row's use of an expert.
#[derive(Clone, Copy)]
struct Use {
    row: usize,
    rank: usize,
}

impl Selection {
    fn new(experts: &[u32], used: usize, count: usize, places: Vec<usize>) -> Selection {
        let mut uses = vec![Vec::new(); count];
        for (i, &expert) in experts.iter().enumerate() {
            uses[expert as usize].push(Use { row: i / used, rank: i % used });
        }
        let chosen = (0..count as u32).filter(|&expert| !uses[expert as usize].is_empty()).collect();
        Selection { experts: chosen, uses, places }
    }

    /// The experts, each once, ascending.
    pub(crate) fn experts(&self) -> &[u32] {
        &self.experts
    }

    /// Every choice of an expert, with the place of the row that made it.
    pub(crate) fn choices(&self) -> impl Iterator<Item = (u32, usize)> {
        let uses =
            self.experts.iter().flat_map(|&expert| self.uses[expert as usize].iter().map(move |one| (expert, one)));
        uses.map(|(expert, one)| (expert, self.places[one.row]))
    }
}

impl CpuBackend {
    pub(crate) fn stage_route(&self, layer: usize, pass: &mut Pass) -> Result<Selection, Error> {
        let (config, w) = (&self.config, &self.weights.layers[layer].moe);
        let used = config.experts_used;
        let mut scores = self.router_logits(layer, &pass.input);
        if let Some(i) = scores.iter().position(|score| !score.is_finite()) {
            return Err(Error::NotFinite { position: pass.batch.rows()[i / config.experts].position });
        }
        scores.iter_mut().for_each(|score| *score = affinity(*score));
        let rows = scores.chunks_exact(config.experts).zip(pass.batch.rows());
        for ((scores, row), (experts, weights)) in
            rows.zip(pass.experts.chunks_exact_mut(used).zip(pass.expert_weights.chunks_exact_mut(used)))
        {
            match &w.routing {
                Routing::Hash(table) => {
                    let listed = table.int_row(row.token as usize);
                    experts.iter_mut().zip(listed).for_each(|(expert, listed)| *expert = listed as u32);
                }
                Routing::Bias(bias) => {
                    best_experts(scores, bias.values(), experts);
                    if let Some(routes) = &self.simulated_routes {
                        routes.choose(layer, row.position, experts);
                    }
                }
            }
            weigh(scores, experts, config.route_scale, weights);
        }
        Ok(self.selection(pass))
    }

    /// The experts that the pass has chosen.
    fn selection(&self, pass: &Pass) -> Selection {
        let places = pass.batch.runs().iter().flat_map(|run| 0..run.rows.len()).collect();
        Selection::new(&pass.experts, self.config.experts_used, self.config.experts, places)
    }

    /// `[R, E]`.
    fn router_logits(&self, layer: usize, input: &[f32]) -> Vec<f32> {
        let mut logits = Vec::new();
        self.workers.matmul(self.weights.layers[layer].moe.router.matrix(), input, &mut logits);
        logits
    }

    /// Which experts of `layer` the rows will probably choose, the surest first: what they would if no attention came
    /// before it. Nothing where it follows from the tokens.
    pub(crate) fn probable_experts(&self, layer: usize, pass: &Pass) -> Vec<u32> {
        let Routing::Bias(bias) = &self.weights.layers[layer].moe.routing else { return Vec::new() };
        let mut input = vec![0.0; pass.input.len()];
        self.sub_layer_input(layer, SubLayer::Experts, pass, &mut input);
        let mut scores = self.router_logits(layer, &input);
        scores.iter_mut().for_each(|score| *score = affinity(*score));
        let mut experts = vec![0; pass.experts.len()];
        let used = self.config.experts_used;
        let rows = scores.chunks_exact(self.config.experts).zip(pass.batch.rows());
        for ((scores, row), experts) in rows.zip(experts.chunks_exact_mut(used)) {
            best_experts(scores, bias.values(), experts);
            if let Some(routes) = &self.simulated_routes {
                routes.guess(layer, row.position, experts);
            }
        }
        (0..used).flat_map(|rank| experts.iter().skip(rank).step_by(used)).copied().collect()
    }

    pub(crate) fn stage_shared_expert(&self, layer: usize, pass: &mut Pass) -> Result<(), Error> {
        let w = &self.weights.layers[layer].moe;
        let (mut gate, mut up) = (Vec::new(), Vec::new());
        self.workers.matmul(w.shared_gate.matrix(), &pass.input, &mut gate);
        self.workers.matmul(w.shared_up.matrix(), &pass.input, &mut up);
        self.swiglu(&mut gate, &up, self.config.shared_swiglu_limits[layer], self.config.shared_width, |_| 1.0);
        self.workers.matmul(w.shared_down.matrix(), &gate, &mut pass.output);
        Ok(())
    }

    /// Every expert's outputs are kept apart, `[R, K, D]`, and added in rank order at the end, so that the order in
    /// which experts arrive changes nothing.
    pub(crate) fn stage_routed_experts(
        &self,
        layer: usize,
        selection: Selection,
        mut leases: HostLeases<'_>,
        cancel: &Cancel,
        pass: &mut Pass,
    ) -> Result<(), Error> {
        let (config, types) = (&self.config, self.expert_types[layer]);
        let (d, used) = (config.d_model, config.experts_used);
        let mut outputs = vec![0.0; pass.rows() * used * d];
        while let Some(lease) = leases.next_ready(cancel) {
            cancel.check()?;
            let lease = lease?;
            let uses = &selection.uses[lease.expert() as usize];
            let output = self.expert(layer, types, [0, 1, 2].map(|part| lease.part(part)), uses, pass);
            for (one, output) in uses.iter().zip(output.chunks_exact(d)) {
                outputs[(one.row * used + one.rank) * d..][..d].copy_from_slice(output);
            }
        }
        self.workers.rows(&mut pass.output, d, used * d, |r, output| {
            for expert in outputs[r * used * d..][..used * d].chunks_exact(d) {
                output.iter_mut().zip(expert).for_each(|(sum, value)| *sum += value);
            }
        });
        Ok(())
    }

    /// One expert on the rows that use it, `[uses, D]`; a row's weight goes onto the activation before `down`.
    fn expert(&self, layer: usize, types: [TensorType; 3], parts: [&[u8]; 3], uses: &[Use], pass: &Pass) -> Vec<f32> {
        let (d, f) = (self.config.d_model, self.config.expert_width);
        let matrix = |part: usize, rows: usize, cols: usize| Matrix { ty: types[part], rows, cols, bytes: parts[part] };
        let input: Vec<f32> = uses.iter().flat_map(|one| &pass.input[one.row * d..][..d]).copied().collect();
        let (mut gate, mut up, mut output) = (Vec::new(), Vec::new(), Vec::new());
        self.workers.matmul(matrix(0, f, d), &input, &mut gate);
        self.workers.matmul(matrix(1, f, d), &input, &mut up);
        let weight = |i: usize| pass.expert_weights[uses[i].row * self.config.experts_used + uses[i].rank];
        self.swiglu(&mut gate, &up, self.config.swiglu_limits[layer], f, weight);
        self.workers.matmul(matrix(2, d, f), &gate, &mut output);
        output
    }

    /// `silu(min(gate, limit)) · clamp(up, ±limit) · weight`, into `gate`; rows are `width` long.
    fn swiglu(&self, gate: &mut [f32], up: &[f32], limit: f32, width: usize, weight: impl Fn(usize) -> f32 + Sync) {
        for (row, (gate, up)) in gate.chunks_exact_mut(width).zip(up.chunks_exact(width)).enumerate() {
            // Not `f32::min`, which would turn the NaN of a damaged weight into a good-looking number.
            gate.iter_mut().for_each(|gate| *gate = if *gate > limit { limit } else { *gate });
            math::silu_slice_at(self.workers.level, gate);
            let weight = weight(row);
            gate.iter_mut().zip(up).for_each(|(gate, up)| *gate = *gate * up.clamp(-limit, limit) * weight);
        }
    }
}

/// An expert's score, from the router's logit.
fn affinity(logit: f32) -> f32 {
    math::softplus(logit).sqrt()
}

/// The experts of the highest biased scores, best first. Of equal scores the lower number wins.
pub(crate) fn best_experts(scores: &[f32], bias: &[f32], experts: &mut [u32]) {
    let biased: Vec<f32> = scores.iter().zip(bias).map(|(score, bias)| score + bias).collect();
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.sort_unstable_by(|&a, &b| biased[b as usize].total_cmp(&biased[a as usize]).then(a.cmp(&b)));
    experts.copy_from_slice(&order[..experts.len()]);
}

/// Weights from the unbiased scores, normalised to `scale`.
pub(crate) fn weigh(scores: &[f32], experts: &[u32], scale: f32, weights: &mut [f32]) {
    /// The smallest normal f16, which keeps the division sane when every score is zero.
    const TINY: f32 = 6.103_515_6e-5;
    let sum: f32 = experts.iter().map(|&expert| scores[expert as usize]).sum();
    for (weight, &expert) in weights.iter_mut().zip(experts) {
        *weight = scores[expert as usize] / sum.max(TINY) * scale;
    }
}
