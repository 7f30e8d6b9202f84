//! Attention and indexer scores of passes with many rows: kernels that multiply tiles of heads with tiles of keys, with
//! cooperative matrices where the adapter has them. Factors are f16 and sums f32, so they serve `Fast` only.

use minijinja::{Value, context};
use model::{Arithmetic, Config, KvLayout, Precision};

use crate::device::AdapterReport;

/// How `attend_many` cuts the heads of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiling {
    /// Heads of a workgroup: 16, 32 or 64.
    pub(crate) heads: usize,
    /// Subgroups of 32 threads in a workgroup: a multiple of heads / 16.
    pub(crate) subgroups: usize,
}

impl Tiling {
    /// For a model's number of heads.
    pub(crate) fn of(heads: usize) -> Tiling {
        match heads {
            ..=16 => Tiling { heads: 16, subgroups: 2 },
            17..=32 => Tiling { heads: 32, subgroups: 4 },
            _ => Tiling { heads: 64, subgroups: 8 },
        }
    }
}

/// What `attend_many` is made for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttendMany {
    pub(crate) heads: usize,
    /// A multiple of 128.
    pub(crate) head_dim: usize,
    /// Whether rows are f32 instead of FP8 and BF16.
    pub(crate) plain: bool,
    /// Words of a stored row.
    pub(crate) row_words: usize,
    /// Whether cooperative matrices multiply (`cooperative`).
    pub(crate) coop: bool,
    pub(crate) tiling: Tiling,
}

impl AttendMany {
    /// For a model, without cooperative matrices; `None` where it needs no such kernel, or sizes do not suit it.
    pub(crate) fn of(config: &Config, layout: &KvLayout) -> Option<AttendMany> {
        let Config { heads, head_dim, rope_dim, .. } = *config;
        let suits = layout.precision == Precision::Fast && rope_dim == 64 && head_dim.is_multiple_of(128);
        suits.then(|| AttendMany {
            heads,
            head_dim,
            plain: layout.arithmetic == Arithmetic::Plain,
            row_words: layout.layers[0].raw.row_bytes() / 4,
            coop: false,
            tiling: Tiling::of(heads),
        })
    }

    /// The template's values.
    pub(crate) fn context(&self) -> Value {
        let AttendMany { heads, head_dim, plain, row_words, coop, tiling } = *self;
        let (heads_tile, subgroups) = (tiling.heads, tiling.subgroups);
        context! { heads, head_dim, rope => 64, plain, row_words, coop, heads_tile, subgroups }
    }

    /// Workgroups for `rows` rows.
    pub(crate) fn groups(&self, rows: usize) -> [u32; 3] {
        [self.heads.div_ceil(self.tiling.heads) as u32, rows as u32, 1]
    }
}

/// Parameters of `attend_many`, those of `attend` and `combine`.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct AttendManyParams {
    /// 16-byte vectors of a row of `q`.
    pub(crate) q_stride: u32,
    pub(crate) row0: u32,
    pub(crate) start: u32,
    pub(crate) run0: u32,
    pub(crate) window: u32,
    pub(crate) ring: u32,
    pub(crate) ring_rows: u32,
    pub(crate) compressed: u32,
    pub(crate) ratio: u32,
    pub(crate) top_k: u32,
    pub(crate) fresh: u32,
    pub(crate) scale: f32,
    /// [`key_factor`].
    pub(crate) key_factor: f32,
    pub(crate) sinks: u32,
    pub(crate) rotations: u32,
}

/// The power of two that keys are multiplied with before they are rounded to f16, so that none is beyond its range and small
/// ones keep their bits: a normalised row has no number beyond √head_dim times the largest weight of its norm, and what
/// rounding adds to that is less than an eighth.
pub(crate) fn key_factor(largest_norm_weight: f32, head_dim: usize) -> f32 {
    let most = largest_norm_weight.abs() * (head_dim as f32).sqrt();
    if !most.is_normal() {
        return 1.0;
    }
    // The product of `most` and the factor is at least 2¹⁴ and below 2¹⁵.
    (14.0 - most.log2().floor()).clamp(-60.0, 60.0).exp2()
}

/// Whether kernels with cooperative matrices run as they are written: 16 · 16 · 16, subgroups of 32.
pub(crate) fn cooperative(report: &AdapterReport) -> bool {
    report.cooperative_tile == Some(16) && report.subgroup == [32, 32]
}

/// What `index_score_many` is made for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct IndexScoreMany {
    /// At most 64.
    pub(crate) index_heads: usize,
    /// Whether rows are f32 instead of FP4.
    pub(crate) plain: bool,
    /// Words of a stored row.
    pub(crate) row_words: usize,
    /// Whether cooperative matrices multiply.
    pub(crate) coop: bool,
}

impl IndexScoreMany {
    /// For a model, without cooperative matrices; `None` where it needs no such kernel, or sizes do not suit it.
    pub(crate) fn of(config: &Config, layout: &KvLayout) -> Option<IndexScoreMany> {
        let index_heads = config.index_heads;
        let index = layout.layers.iter().find_map(|layer| layer.index.as_ref())?;
        (layout.precision == Precision::Fast && index_heads <= 64).then(|| IndexScoreMany {
            index_heads,
            plain: layout.arithmetic == Arithmetic::Plain,
            row_words: index.row.row_bytes() / 4,
            coop: false,
        })
    }

    /// The template's values.
    pub(crate) fn context(&self) -> Value {
        let IndexScoreMany { index_heads, plain, row_words, coop } = *self;
        context! { index_heads, plain, row_words, coop }
    }
}

/// Keys and rows of a workgroup of `index_score_many` for an indexer of `index_heads` heads, at most 64.
pub(crate) fn index_tile(index_heads: usize) -> [usize; 2] {
    [1024, 128 / index_heads.next_power_of_two().clamp(16, 64)]
}

/// Parameters of `index_score_many`.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct IndexScoreManyParams {
    /// Values of a row of `q`, and where the indexer's query begins: multiples of 4.
    pub(crate) q_stride: u32,
    pub(crate) q: u32,
    pub(crate) p_stride: u32,
    pub(crate) weights: u32,
    pub(crate) scale: f32,
    pub(crate) row0: u32,
    pub(crate) start: u32,
    pub(crate) run0: u32,
    pub(crate) ratio: u32,
    pub(crate) keys: u32,
    pub(crate) stride: u32,
    pub(crate) rows: u32,
}
