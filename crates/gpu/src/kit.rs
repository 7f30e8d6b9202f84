//! The kernels of one model, made when it is loaded.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use minijinja::{Value, context};
use model::{Arithmetic, Config, KvLayout};

use crate::GpuError;
use crate::attend_many::{AttendMany, IndexScoreMany};
use crate::experts::ExpertLayout;
use crate::format::Format;
use crate::kernel::{Kernel, Kernels};
use crate::pass::Shapes;
use crate::self_check::Cooperative;
use crate::weights::{HeadWeights, LayerWeights};

/// Outputs of each 32 lanes of `experts_up`, of gate and of up, and of `experts_down`.
pub(crate) const LANE_OUTPUTS: [usize; 2] = [2, 4];

/// Formats of the matrices, rows together, outputs of each 32 lanes, and whether inputs are normalised.
type MatvecKey = (Vec<Format>, usize, usize, bool);

/// Kernels by what they are for.
pub(crate) struct Kit {
    kernels: Arc<Kernels>,
    /// Inputs as digits, without and with a norm's weights, where few rows are multiplied as integers.
    pub(crate) digits: Option<[Arc<Kernel>; 2]>,
    pub(crate) expand: Arc<Kernel>,
    /// Without and with a sub-layer's output.
    pub(crate) mix: [Arc<Kernel>; 2],
    pub(crate) mix_head: [Arc<Kernel>; 2],
    pub(crate) finish: Arc<Kernel>,
    pub(crate) finish_head: Arc<Kernel>,
    /// Layer by layer.
    pub(crate) layers: Vec<LayerKit>,
    pub(crate) attend: Arc<Kernel>,
    pub(crate) combine: Arc<Kernel>,
    pub(crate) score: Arc<Kernel>,
    pub(crate) select: Arc<Kernel>,
    /// For passes of many rows in `Fast`, where the model's sizes suit it.
    pub(crate) attend_many: Option<(Arc<Kernel>, AttendMany)>,
    pub(crate) score_many: Option<Arc<Kernel>>,
    pub(crate) normalise: Arc<Kernel>,
    pub(crate) finite: Arc<Kernel>,
    matvecs: Mutex<HashMap<MatvecKey, Arc<Kernel>>>,
}

/// Kernels that differ between layers.
pub(crate) struct LayerKit {
    pub(crate) settle: Arc<Kernel>,
    pub(crate) pool: Option<Arc<Kernel>>,
    pub(crate) pool_index: Option<Arc<Kernel>>,
    pub(crate) route: Arc<Kernel>,
    pub(crate) up: Arc<Kernel>,
    /// The same for inputs that were made into digits before, in `Fast`.
    pub(crate) up_of_several: Arc<Kernel>,
    pub(crate) down: Arc<Kernel>,
}

/// What the adapter's driver computes rightly, of what is used where it does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trusted {
    pub(crate) cooperative: Cooperative,
    /// Whether few rows are multiplied as integers.
    pub(crate) integers: bool,
}

/// What kernels call the types of weights.
fn type_ids() -> Value {
    let ids: BTreeMap<&str, u32> = Format::ALL.iter().map(|&format| (format.name(), format as u32)).collect();
    Value::from(ids)
}

/// What the template of `matvec` is filled in with.
pub(crate) fn matvec_context(formats: &[Format], rows: usize, outputs: usize, norm: bool, digits: bool) -> Value {
    let types: Vec<&str> = formats.iter().map(|format| format.name()).collect();
    context! { types, rows, outputs, norm, digits, type_ids => type_ids() }
}

/// What the template of `digits` is filled in with.
pub(crate) fn digits_context(norm: bool) -> Value {
    context! { norm }
}

impl Kit {
    pub(crate) fn new(
        kernels: &Arc<Kernels>,
        config: &Config,
        layout: &KvLayout,
        (layers, head): (&[LayerWeights], &HeadWeights),
        experts: &[ExpertLayout],
        Trusted { cooperative, integers: digits }: Trusted,
    ) -> Result<Kit, GpuError> {
        let Config { streams, heads, head_dim, .. } = *config;
        let (d, rope) = (config.d_model, config.rope_dim);
        let plain = layout.arithmetic == Arithmetic::Plain;
        let row_words = layout.layers[0].raw.row_bytes() / 4;
        let index_words = if plain { config.index_head_dim } else { 17 };
        let outputs = config.hc_outputs();
        let together = Shapes::heads_together(heads, row_words);
        let get = |name: &str, context: Value| kernels.get(name, context);
        let layer = |(i, (weights, experts)): (usize, (&LayerWeights, &ExpertLayout))| {
            let ratio = config.compress_ratios[i];
            let indexer = layout.layers[i].index.is_some();
            let index_heads = if indexer { config.index_heads } else { 0 };
            let width = layout.layers[i].main.as_ref().map_or(0, |main| main.width);
            let pool = |dim: usize, indexer: bool, row_words: usize| {
                get("pool", context! { ratio, dim, rope, plain, indexer, row_words })
            };
            let [gate, up, down] = experts.formats.map(Format::name);
            let shared_down = weights.shared_down.jobs[0].matrix.format.name();
            let (used, outputs) = (config.experts_used, LANE_OUTPUTS[0]);
            let makes = digits && experts.formats[2].has_integers();
            let up_of = |made: bool| get("experts_up", context! { gate, up, used, digits, made, makes, outputs });
            Ok(LayerKit {
                settle: get("settle", context! { head_dim, rope, plain, heads, index_heads, ratio, width, row_words })?,
                pool: (ratio > 0).then(|| pool(head_dim, false, row_words)).transpose()?,
                pool_index: indexer.then(|| pool(config.index_head_dim, true, index_words)).transpose()?,
                route: get("route", context! { experts => config.experts, used, hashed => weights.hashed })?,
                up: up_of(false)?,
                up_of_several: up_of(digits)?,
                down: get(
                    "experts_down",
                    context! { down, shared_down, used, digits, made => makes, outputs => LANE_OUTPUTS[1] },
                )?,
            })
        };
        let many = AttendMany::of(config, layout).map(|many| AttendMany { coop: cooperative.attention, ..many });
        let attend_many =
            many.map(|many| Ok::<_, GpuError>((get("attend_many", many.context())?, many))).transpose()?;
        let many = IndexScoreMany::of(config, layout).map(|many| IndexScoreMany { coop: cooperative.scores, ..many });
        let score_many = many.map(|many| get("index_score_many", many.context())).transpose()?;
        // What the first token would wait for.
        let products = |layer: &LayerWeights| {
            let LayerWeights { project, queries, output_a, output_b, route, .. } = layer;
            let jobs = [(project, false), (queries, true), (output_a, false), (output_b, false), (route, false)];
            jobs.map(|(jobs, norm)| ("matvec", matvec_context(&jobs.formats(), 1, jobs.matvec().0, norm, digits)))
        };
        let of_head = ("matvec", matvec_context(&head.output.formats(), 1, head.output.matvec().0, false, digits));
        kernels.make_all(&layers.iter().flat_map(products).chain([of_head]).collect::<Vec<_>>())?;
        Ok(Kit {
            kernels: kernels.clone(),
            digits: digits
                .then(|| {
                    Ok::<_, GpuError>([get("digits", digits_context(false))?, get("digits", digits_context(true))?])
                })
                .transpose()?,
            expand: get("expand", context! { streams })?,
            mix: [
                get("hc_mix", context! { streams, outputs, post => false })?,
                get("hc_mix", context! { streams, outputs, post => true })?,
            ],
            mix_head: [
                get("hc_mix", context! { streams, outputs => streams, post => false })?,
                get("hc_mix", context! { streams, outputs => streams, post => true })?,
            ],
            finish: get("hc_finish", context! { streams, d, outputs, head => false })?,
            finish_head: get("hc_finish", context! { streams, d, outputs => streams, head => true })?,
            layers: layers.iter().zip(experts).enumerate().map(layer).collect::<Result<_, GpuError>>()?,
            attend: get("attend", context! { head_dim, rope, plain, heads, row_words, together })?,
            combine: get("combine", context! { head_dim, rope, heads })?,
            score: get("index_score", context! { index_heads => config.index_heads, plain, row_words => index_words })?,
            select: get("index_select", Value::from(()))?,
            attend_many,
            score_many,
            normalise: get("normalise", Value::from(()))?,
            finite: get("finite", Value::from(()))?,
            matvecs: Mutex::default(),
        })
    }

    /// The product with matrices of these formats for `rows` rows together and `outputs` outputs of each 32 lanes; `norm` if
    /// the inputs are normalised first.
    pub(crate) fn matvec(
        &self,
        formats: Vec<Format>,
        rows: usize,
        outputs: usize,
        norm: bool,
    ) -> Result<Arc<Kernel>, GpuError> {
        let mut matvecs = self.matvecs.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (formats, rows, outputs, norm);
        if let Some(kernel) = matvecs.get(&key) {
            return Ok(kernel.clone());
        }
        let (formats, rows, outputs, norm) = &key;
        let kernel =
            self.kernels.get("matvec", matvec_context(formats, *rows, *outputs, *norm, self.digits.is_some()))?;
        matvecs.insert(key, kernel.clone());
        Ok(kernel)
    }
}
