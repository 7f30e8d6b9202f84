//! The mixture-of-experts half of a layer (docs/spec/model.md §2.7).

use model::tensors::Routing;
use model::{Cancel, Error, SubLayer};
use quant::{elementwise, math};
use store::HostLeases;

use crate::backend::CpuBackend;
use crate::parallel::Input;
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
        self.affinities(&mut scores);
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
        let router = self.weights.layers[layer].moe.router.matrix();
        self.workers.matmul(router, &Input::new(input, self.config.d_model), &mut logits);
        logits
    }

    /// Logits `[R, E]` to scores.
    fn affinities(&self, logits: &mut [f32]) {
        let experts = self.config.experts;
        // An exponential and a logarithm.
        self.workers.rows(logits, experts, 50 * experts, |_, row| {
            row.iter_mut().for_each(|score| *score = math::softplus(*score).sqrt());
        });
    }

    /// Which experts of `layer` the rows will probably choose, the surest first: what they would if no attention came
    /// before it. Nothing where it follows from the tokens.
    pub(crate) fn probable_experts(&self, layer: usize, pass: &Pass) -> Vec<u32> {
        let Routing::Bias(bias) = &self.weights.layers[layer].moe.routing else { return Vec::new() };
        let mut input = vec![0.0; pass.input.len()];
        self.sub_layer_input(layer, SubLayer::Experts, pass, &mut input);
        let mut scores = self.router_logits(layer, &input);
        self.affinities(&mut scores);
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
        let width = self.config.shared_width;
        let (mut gate, mut up) = (Vec::new(), Vec::new());
        let input = Input::new(&pass.input, self.config.d_model);
        self.workers.matmul(w.shared_gate.matrix(), &input, &mut gate);
        self.workers.matmul(w.shared_up.matrix(), &input, &mut up);
        self.swiglu(&mut gate, &up, self.config.shared_swiglu_limits[layer], width, |_| 1.0);
        self.workers.matmul(w.shared_down.matrix(), &Input::new(&gate, width), &mut pass.output);
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
        let (config, level) = (&self.config, self.workers.level);
        let (d, used) = (config.d_model, config.experts_used);
        let mut outputs = vec![0.0; pass.rows() * used * d];
        let input = Input::new(&pass.input, d);
        while let Some(lease) = leases.next_ready(cancel) {
            cancel.check()?;
            let lease = lease?;
            let uses = &selection.uses[lease.expert() as usize];
            self.expert(
                layer,
                [0, 1, 2].map(|part| lease.part(part)),
                &input,
                uses,
                &pass.expert_weights,
                &mut outputs,
            );
        }
        self.workers.rows(&mut pass.output, d, used * d, |r, output| {
            outputs[r * used * d..][..used * d]
                .chunks_exact(d)
                .for_each(|expert| elementwise::add_at(level, output, expert));
        });
        Ok(())
    }

    /// One expert on the rows that use it, into its places in `outputs`, `[R, K, D]`; a row's weight goes onto the
    /// activation before `down`.
    fn expert(
        &self,
        layer: usize,
        parts: [&[u8]; 3],
        input: &Input<'_>,
        uses: &[Use],
        weights: &[f32],
        outputs: &mut [f32],
    ) {
        let (d, f, used) = (self.config.d_model, self.config.expert_width, self.config.experts_used);
        let types = self.expert_types[layer];
        let matrix = |part: usize, rows: usize, cols: usize| Matrix { ty: types[part], rows, cols, bytes: parts[part] };
        let rows: Vec<usize> = uses.iter().map(|one| one.row).collect();
        let input = input.select(&self.workers, &rows, &types[..2]);
        let (mut gate, mut up) = (Vec::new(), Vec::new());
        self.workers.matmul(matrix(0, f, d), &input, &mut gate);
        self.workers.matmul(matrix(1, f, d), &input, &mut up);
        let weight = |i: usize| weights[uses[i].row * used + uses[i].rank];
        self.swiglu(&mut gate, &up, self.config.swiglu_limits[layer], f, weight);

        // Uses are in the order of their places.
        let (mut places, mut next) = (outputs.chunks_exact_mut(d), 0);
        let out = uses.iter().map(|one| {
            let place = one.row * used + one.rank;
            let skipped = place - std::mem::replace(&mut next, place + 1);
            places.nth(skipped).expect("every use has a place")
        });
        self.workers.matmul_into(matrix(2, d, f), &Input::new(&gate, f), out);
    }

    /// `silu(min(gate, limit)) · clamp(up, ±limit) · weight`, into `gate`; rows are `width` long.
    fn swiglu(&self, gate: &mut [f32], up: &[f32], limit: f32, width: usize, weight: impl Fn(usize) -> f32 + Sync) {
        // An exponential is some twenty operations.
        self.workers.rows(gate, width, 30 * width, |row, gate| {
            elementwise::swiglu_at(self.workers.level, gate, &up[row * width..][..width], limit, weight(row));
        });
    }
}

/// The experts of the highest biased scores, best first. Of equal scores the lower number wins.
pub(crate) fn best_experts(scores: &[f32], bias: &[f32], experts: &mut [u32]) {
    let biased: Vec<f32> = scores.iter().zip(bias).map(|(score, bias)| score + bias).collect();
    let better = |&a: &u32, &b: &u32| biased[b as usize].total_cmp(&biased[a as usize]).then(a.cmp(&b));
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.select_nth_unstable_by(experts.len() - 1, better);
    experts.copy_from_slice(&order[..experts.len()]);
    experts.sort_unstable_by(better);
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
