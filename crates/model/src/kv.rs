//! How a session's key/value rows are stored: one format for every backend and for snapshots.
//!
//! Under [`Arithmetic::Official`] a row is stored as the rounded value it stands for, so packing loses nothing that the
//! arithmetic had kept (docs/spec/model.md §2.8 and §7). Under [`Arithmetic::Plain`] a row is its f32 values.

use crate::Config;

/// Whether the model's own low-precision roundings of stored rows are part of the computation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// With the FP8, BF16 and FP4 roundings that the weights were trained with. The default everywhere.
    Official,
    /// Without any of them: the pure graph, for comparison with engines that leave them out.
    Plain,
}

/// How weights and activations are multiplied. Independent of [`Arithmetic`] and of where weights lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// f32 activations times dequantised weights, in one canonical order: what every other way is compared with.
    Exact,
    /// Activations rounded to 8 bits where the weights are quantised (docs/spec/model.md §5.8).
    Fast,
}

/// How one row of f32 values is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowFormat {
    /// The values themselves, little endian.
    F32 {
        /// Values in a row.
        width: usize,
    },
    /// A key/value row: FP8 codes of the first `nope` values, an E8M0 scale for each 64 of them (padded to a
    /// multiple of 8 bytes), then the last `rope` values as BF16. 448 + 8 + 128 = 584 bytes in Flash.
    Fp8Bf16 {
        /// Values before the rotated ones, a multiple of 64.
        nope: usize,
        /// Rotated values.
        rope: usize,
    },
    /// An indexer row: Hadamard-rotated, FP4 codes two a byte, then an E8M0 scale for each 32. 64 + 4 = 68 bytes.
    HadamardFp4 {
        /// Values in a row; the rotation needs 128.
        width: usize,
    },
}

impl RowFormat {
    /// Values in a row.
    pub fn width(self) -> usize {
        match self {
            RowFormat::F32 { width } | RowFormat::HadamardFp4 { width } => width,
            RowFormat::Fp8Bf16 { nope, rope } => nope + rope,
        }
    }

    /// Bytes of a stored row.
    pub fn row_bytes(self) -> usize {
        match self {
            RowFormat::F32 { width } => width * 4,
            RowFormat::Fp8Bf16 { nope, rope } => nope + (nope / 64).next_multiple_of(8) + rope * 2,
            RowFormat::HadamardFp4 { width } => width / 2 + width / 32,
        }
    }
}

/// What one compressor (main or indexer) keeps for a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressorLayout {
    /// Tokens in a window, and so tokens per compressed row: 4 or 128.
    pub ratio: usize,
    /// Whether a row also pools the window before its own (ratio 4).
    pub overlaps: bool,
    /// Format of the compressed rows.
    pub row: RowFormat,
    /// Values of `u` (and of `z`) for one token: twice the row's width where windows overlap.
    pub width: usize,
}

impl CompressorLayout {
    fn new(ratio: usize, row: RowFormat) -> CompressorLayout {
        let overlaps = ratio == 4;
        CompressorLayout { ratio, overlaps, row, width: row.width() * if overlaps { 2 } else { 1 } }
    }

    /// The first position whose `u` and `z` the row of the window open at `position` still needs.
    pub fn needed_from(&self, position: usize) -> usize {
        let window = position / self.ratio;
        window.saturating_sub(self.overlaps as usize) * self.ratio
    }
}

/// What one layer keeps for a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerLayout {
    /// Format of the raw rows in the sliding window.
    pub raw: RowFormat,
    /// The main compressor, in layers of ratio 4 and 128.
    pub main: Option<CompressorLayout>,
    /// The indexer's compressor, in layers of ratio 4.
    pub index: Option<CompressorLayout>,
}

/// What a model keeps for a session, layer by layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Which weights the rows come from (`store::Source::identity`).
    pub identity: u128,
    /// With or without the low-precision roundings.
    pub arithmetic: Arithmetic,
    /// How the rows were computed.
    pub precision: Precision,
    /// Tokens in the sliding window, the query's own included.
    pub window: usize,
    /// The layers, first to last.
    pub layers: Vec<LayerLayout>,
}

impl KvLayout {
    /// The layout for a model, whose files have this identity, under one arithmetic and precision.
    pub fn new(config: &Config, identity: u128, arithmetic: Arithmetic, precision: Precision) -> KvLayout {
        let (main, index) = match arithmetic {
            Arithmetic::Plain => {
                (RowFormat::F32 { width: config.head_dim }, RowFormat::F32 { width: config.index_head_dim })
            }
            Arithmetic::Official => (
                RowFormat::Fp8Bf16 { nope: config.head_dim - config.rope_dim, rope: config.rope_dim },
                RowFormat::HadamardFp4 { width: config.index_head_dim },
            ),
        };
        let layer = |&ratio: &usize| LayerLayout {
            raw: main,
            main: (ratio != 0).then(|| CompressorLayout::new(ratio, main)),
            index: (ratio == 4).then(|| CompressorLayout::new(ratio, index)),
        };
        let layers = config.compress_ratios.iter().map(layer).collect();
        KvLayout { identity, arithmetic, precision, window: config.window, layers }
    }

    /// Bytes of rows that the token at `position` reads, each row once: the window, the compressed rows that attention
    /// visits, and the indexer rows that are scored where more than `top_k` are visible (docs/spec/model.md §7).
    pub fn read_bytes(&self, position: usize, top_k: usize) -> usize {
        let visible = |c: &CompressorLayout| (position + 1) / c.ratio;
        let layer = |layer: &LayerLayout| {
            let window = self.window.min(position + 1) * layer.raw.row_bytes();
            let index = layer.index.as_ref();
            let most = if index.is_some() { top_k } else { usize::MAX };
            let main = layer.main.as_ref().map_or(0, |c| visible(c).min(most) * c.row.row_bytes());
            let scored = index.filter(|c| visible(c) > top_k).map_or(0, |c| visible(c) * c.row.row_bytes());
            window + main + scored
        };
        self.layers.iter().map(layer).sum()
    }
}
