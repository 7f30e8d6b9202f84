//! The kernels of one model, made when it is loaded.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use minijinja::{Value, context};
use model::{Arithmetic, Config, KvLayout};

use crate::GpuError;
use crate::attend_many::{AttendMany, IndexScoreMany};
use crate::device::WORKGROUP_BYTES;
use crate::experts::ExpertLayout;
use crate::format::Format;
use crate::kernel::{Kernel, Kernels};
use crate::pass::Shapes;
use crate::self_check::Cooperative;
use crate::together::{MOST_TOGETHER, bound_sessions};
use crate::weights::{HeadWeights, LayerWeights};

/// Outputs of each 32 lanes of `experts_up`, of gate and of up, and of `experts_down`.
pub(crate) const LANE_OUTPUTS: [usize; 2] = [2, 4];

/// Kernels by what they are for.
pub(crate) struct Kit {
    kernels: Arc<Kernels>,
    /// Lay inputs out for lanes, without and with a norm's weights, where few rows are multiplied as integers.
    pub(crate) digits: Option<[Arc<Kernel>; 2]>,
    pub(crate) expand: Arc<Kernel>,
    /// Without and with a sub-layer's output.
    pub(crate) mix: [Arc<Kernel>; 2],
    pub(crate) mix_head: [Arc<Kernel>; 2],
    pub(crate) finish: Arc<Kernel>,
    pub(crate) finish_head: Arc<Kernel>,
    /// Layer by layer.
    pub(crate) layers: Vec<LayerKit>,
    /// For 1, 2, 4 and 8 sessions; more than one when they are first wanted.
    of_sessions: [OnceLock<SessionKit>; MOST_TOGETHER.ilog2() as usize + 1],
    /// For passes of many rows in `Fast`, where the model's sizes suit it.
    pub(crate) attend_many: Option<(Arc<Kernel>, AttendMany)>,
    pub(crate) score_many: Option<Arc<Kernel>>,
    pub(crate) normalise: Arc<Kernel>,
    pub(crate) finite: Arc<Kernel>,
    matvecs: Mutex<HashMap<Matvec, Arc<Kernel>>>,
}

/// Kernels that know sessions, bound to so many of them.
pub(crate) struct SessionKit {
    /// Layer by layer.
    pub(crate) layers: Vec<LayerSessionKit>,
    pub(crate) attend: Arc<Kernel>,
    pub(crate) combine: Arc<Kernel>,
    pub(crate) score: Arc<Kernel>,
    pub(crate) select: Arc<Kernel>,
}

/// Those of them that differ between layers.
pub(crate) struct LayerSessionKit {
    pub(crate) settle: Arc<Kernel>,
    pub(crate) pool: Option<Arc<Kernel>>,
}

impl SessionKit {
    fn new(
        kernels: &Kernels,
        config: &Config,
        layout: &KvLayout,
        states: usize,
        digits: bool,
    ) -> Result<SessionKit, GpuError> {
        let Config { heads, head_dim, rope_dim: rope, index_head_dim, .. } = *config;
        let plain = layout.arithmetic == Arithmetic::Plain;
        let row_words = layout.layers[0].raw.row_bytes() / 4;
        let index_words = if plain { index_head_dim } else { 17 };
        let together = Shapes::heads_together(heads, row_words);
        let settle = |layer: usize| {
            let (ratio, of_layer) = (config.compress_ratios[layer], &layout.layers[layer]);
            let index_heads = if of_layer.index.is_some() { config.index_heads } else { 0 };
            let width = of_layer.main.as_ref().map_or(0, |main| main.width);
            ("settle", context! { states, head_dim, rope, plain, heads, index_heads, ratio, width, row_words })
        };
        let pool = |layer: usize| {
            let (ratio, of_layer) = (config.compress_ratios[layer], &layout.layers[layer]);
            let index_words = if of_layer.index.is_some() { index_words } else { 0 };
            let (dim, index_dim) = (head_dim, index_head_dim);
            let context = || context! { states, ratio, dim, row_words, rope, plain, index_dim, index_words };
            of_layer.main.is_some().then(|| ("pool", context()))
        };
        let attend = ("attend", context! { states, head_dim, rope, plain, heads, row_words, together });
        let digits = digits && heads_lay_out(config);
        let combine = ("combine", context! { states, head_dim, rope, heads, digits });
        let index_heads = config.index_heads;
        let score = ("index_score", context! { states, index_heads, plain, row_words => index_words });
        let select = ("index_select", context! { states });
        let of_layer = |layer: usize| [Some(settle(layer)), pool(layer)];
        let of_layers = (0..config.layers).flat_map(of_layer).flatten();
        let of_all = [&attend, &combine, &score, &select].map(Clone::clone);
        kernels.make_all(&of_layers.chain(of_all).collect::<Vec<_>>())?;
        let get = |(name, context): (&str, Value)| kernels.get(name, context);
        let layer =
            |layer: usize| Ok(LayerSessionKit { settle: get(settle(layer))?, pool: pool(layer).map(get).transpose()? });
        Ok(SessionKit {
            layers: (0..config.layers).map(layer).collect::<Result<_, GpuError>>()?,
            attend: get(attend)?,
            combine: get(combine)?,
            score: get(score)?,
            select: get(select)?,
        })
    }
}

/// Kernels that differ between layers.
pub(crate) struct LayerKit {
    pub(crate) route: Arc<Kernel>,
    pub(crate) up: Arc<Kernel>,
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

/// Whether attention lays its rows out for lanes: no 16 values of a row may be of two heads.
pub(crate) fn heads_lay_out(config: &Config) -> bool {
    config.head_dim.is_multiple_of(16)
}

/// Whether the end of a hyper-connection lays a row of `d` values out for lanes: it must fit workgroup memory beside what else is there.
pub(crate) fn finish_lays_out(d: usize, streams: usize) -> bool {
    let outputs = 2 * streams + streams * streams;
    let others = 9 * (outputs + 1) + streams + 2 * streams * streams + 256 + 16;
    4 * (d + others) + 64 <= WORKGROUP_BYTES as usize
}

/// Which kernel multiplies few rows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Matvec {
    pub(crate) formats: Vec<Format>,
    /// Rows together.
    pub(crate) rows: usize,
    /// Outputs of each 32 lanes.
    pub(crate) outputs: usize,
    /// Whether inputs are normalised.
    pub(crate) norm: bool,
    /// Whether integers are multiplied where formats allow, and inputs were laid out for that before.
    pub(crate) digits: bool,
    pub(crate) made: bool,
}

impl Matvec {
    /// What the template is filled in with.
    pub(crate) fn context(&self) -> Value {
        let types: Vec<&str> = self.formats.iter().map(|format| format.name()).collect();
        let Matvec { rows, outputs, norm, digits, made, .. } = *self;
        context! { types, rows, outputs, norm, digits, made, type_ids => type_ids() }
    }
}

/// Whether products of few rows take inputs that were laid out for lanes before, where integers are multiplied if `digits`: of one row
/// that no kernel laid out, each workgroup may as well do it for itself.
pub(crate) fn is_made(digits: bool, formats: &[Format], rows: usize, laid_out: bool) -> bool {
    digits && has_integers(formats) && (laid_out || rows > 1)
}

/// Whether products with matrices of these formats multiply integers.
pub(crate) fn has_integers(formats: &[Format]) -> bool {
    formats.iter().any(|format| format.has_integers())
}

/// What the template of `digits` is filled in with.
pub(crate) fn digits_context(norm: bool) -> Value {
    context! { norm }
}

/// Kernels of a token's products, of so many rows together.
fn products<'w>(
    (layers, head): (&'w [LayerWeights], &'w HeadWeights),
    rows: usize,
    digits: bool,
) -> impl Iterator<Item = (&'static str, Value)> + 'w {
    let of_layer = |layer: &'w LayerWeights| {
        let LayerWeights { project, queries, output_a, output_b, route, .. } = layer;
        [
            (project, false, true),
            (queries, true, false),
            (output_a, false, true),
            (output_b, false, false),
            (route, false, true),
        ]
    };
    layers.iter().flat_map(of_layer).chain([(&head.output, false, true)]).map(move |(jobs, norm, laid_out)| {
        let formats = jobs.formats();
        let made = is_made(digits, &formats, rows, laid_out);
        let matvec = Matvec { formats, rows, outputs: jobs.matvec().0, norm, digits, made };
        ("matvec", matvec.context())
    })
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
        let streams = config.streams;
        let d = config.d_model;
        let outputs = config.hc_outputs();
        let get = |name: &str, context: Value| kernels.get(name, context);
        let of_layer = |(weights, experts): (&LayerWeights, &ExpertLayout)| {
            let [gate, up, down] = experts.formats.map(Format::name);
            let shared_down = weights.shared_down.jobs[0].matrix.format;
            let shared_made = digits && shared_down.has_integers();
            let shared_down = shared_down.name();
            let (used, outputs) = (config.experts_used, LANE_OUTPUTS[0]);
            let makes = digits && experts.formats[2].has_integers();
            let of_up = ("experts_up", context! { gate, up, used, digits, makes, outputs });
            let outputs = LANE_OUTPUTS[1];
            [
                (
                    "route",
                    context! { experts => config.experts, used, hashed => weights.hashed, lays_out => shared_made },
                ),
                of_up,
                ("experts_down", context! { down, shared_down, used, digits, made => makes, shared_made, outputs }),
            ]
        };
        let layer = |of: (&LayerWeights, &ExpertLayout)| {
            let [route, up, down] = of_layer(of).map(|(name, context)| get(name, context));
            Ok(LayerKit { route: route?, up: up?, down: down? })
        };
        let many = AttendMany::of(config, layout).map(|many| AttendMany { coop: cooperative.attention, ..many });
        let attend_many =
            many.map(|many| Ok::<_, GpuError>((get("attend_many", many.context())?, many))).transpose()?;
        let many = IndexScoreMany::of(config, layout).map(|many| IndexScoreMany { coop: cooperative.scores, ..many });
        let score_many = many.map(|many| get("index_score_many", many.context())).transpose()?;
        // What the first token would wait for.
        let products = products((layers, head), 1, digits);
        let of_layers = layers.iter().zip(experts).flat_map(of_layer);
        kernels.make_all(&products.chain(of_layers).collect::<Vec<_>>())?;
        let lays_out = digits && finish_lays_out(d, streams);
        let of_sessions = <[OnceLock<_>; _]>::default();
        let of_one = SessionKit::new(kernels, config, layout, 1, digits)?;
        of_sessions[0].get_or_init(|| of_one);
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
            finish: get("hc_finish", context! { streams, d, outputs, head => false, digits => lays_out })?,
            finish_head: get(
                "hc_finish",
                context! { streams, d, outputs => streams, head => true, digits => lays_out },
            )?,
            layers: layers.iter().zip(experts).map(layer).collect::<Result<_, GpuError>>()?,
            of_sessions,
            attend_many,
            score_many,
            normalise: get("normalise", Value::from(()))?,
            finite: get("finite", Value::from(()))?,
            matvecs: Mutex::default(),
        })
    }

    /// Makes what passes over up to so many sessions need, a row each: whoever comes second would wait for it otherwise.
    ///
    /// # Errors
    /// The driver does not take a kernel.
    pub(crate) fn prepare_all(
        &self,
        (sessions, together): (usize, usize),
        config: &Config,
        layout: &KvLayout,
        weights: (&[LayerWeights], &HeadWeights),
    ) -> Result<(), GpuError> {
        let counts = || (1..=MOST_TOGETHER.ilog2()).map(|n| 1 << n).filter(move |&n| n < 2 * sessions);
        let of_products = counts().flat_map(|rows| products(weights, rows, self.digits.is_some()));
        self.kernels.make_all(&of_products.collect::<Vec<_>>())?;
        counts().filter(|&runs| runs <= together).try_for_each(|runs| self.prepare(runs, config, layout))
    }

    /// Makes what passes of so many runs together need.
    ///
    /// # Errors
    /// The driver does not take a kernel.
    pub(crate) fn prepare(&self, runs: usize, config: &Config, layout: &KvLayout) -> Result<(), GpuError> {
        let states = bound_sessions(runs);
        let held = &self.of_sessions[states.ilog2() as usize];
        if held.get().is_none() {
            let made = SessionKit::new(&self.kernels, config, layout, states, self.digits.is_some())?;
            // If another pass was first, its are kept.
            held.get_or_init(|| made);
        }
        Ok(())
    }

    /// Kernels for so many runs together, which were prepared.
    pub(crate) fn of_sessions(&self, runs: usize) -> &SessionKit {
        self.of_sessions[bound_sessions(runs).ilog2() as usize].get().expect("prepared when the pass began")
    }

    /// The kernel that multiplies few rows, made when it is first wanted.
    ///
    /// # Errors
    /// The driver does not take it.
    pub(crate) fn matvec(&self, wanted: Matvec) -> Result<Arc<Kernel>, GpuError> {
        let mut matvecs = self.matvecs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = matvecs.get(&wanted) {
            return Ok(kernel.clone());
        }
        let kernel = self.kernels.get("matvec", wanted.context())?;
        matvecs.insert(wanted, kernel.clone());
        Ok(kernel)
    }
}
