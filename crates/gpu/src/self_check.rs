//! Whether an adapter's cooperative matrices and packed integers can be trusted.
//!
//! Drivers have computed them wrongly. So each family of kernels that uses cooperative matrices is run once on small fixed data
//! when a model is loaded, with the model's own shapes, and compared with its plain twin; and a product of packed integers, one
//! row by a Q8_0 matrix, with the same of floats. What gives no numbers, or others, is left out: its twin computes, slower and
//! right, and the user is told.

use std::sync::Arc;

use bytemuck::Pod;
use model::kv::RowFormat;
use model::{Config, KvLayout, Precision};

use crate::GpuError;
use crate::attend_many::{AttendMany, AttendManyParams, IndexScoreMany, IndexScoreManyParams, index_tile};
use crate::format::{Format, code_book};
use crate::jobs::{Job, Jobs, Matrix};
use crate::kernel::{Buffer, Commands, Kernels};
use crate::kit::{Matvec, digits_context};
use crate::matmul::{Experts, Groups, Halves, Many};
use crate::pass::digits_bytes;

/// Which families of kernels use cooperative matrices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cooperative {
    pub(crate) products: bool,
    pub(crate) experts: bool,
    pub(crate) attention: bool,
    pub(crate) scores: bool,
}

impl Cooperative {
    /// All of them.
    pub(crate) const ALL: Cooperative = Cooperative { products: true, experts: true, attention: true, scores: true };
}

/// A family of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Products,
    Experts,
    Attention,
    Scores,
}

/// Largest relative L2 distance of twins, by what lies between them: the order of f32 sums; for experts and attention also
/// which half an activation or a weight becomes by it.
pub(crate) const SUMS_DISTANCE: f64 = 2e-5;
pub(crate) const EXPERTS_DISTANCE: f64 = 5e-4;
pub(crate) const ATTENTION_DISTANCE: f64 = 1e-3;

impl Family {
    fn most(self) -> f64 {
        match self {
            Family::Products | Family::Scores => SUMS_DISTANCE,
            Family::Experts => EXPERTS_DISTANCE,
            Family::Attention => ATTENTION_DISTANCE,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Family::Products => "products",
            Family::Experts => "experts",
            Family::Attention => "attention",
            Family::Scores => "indexer scores",
        }
    }
}

/// What a model's kernels of attention and of indexer scores are made for, where it has such.
struct Shapes {
    attention: Option<(AttendMany, RowFormat)>,
    scores: Option<(IndexScoreMany, RowFormat)>,
}

/// The families that can use cooperative matrices on this adapter for this model, and a line for the user if its driver
/// computes some of them wrongly. None in Exact, and none where the adapter does not offer them as kernels need them.
///
/// # Errors
/// The device failed.
pub(crate) fn cooperative(
    kernels: &Arc<Kernels>,
    config: &Config,
    layout: &KvLayout,
) -> Result<(Cooperative, Option<String>), GpuError> {
    if layout.precision != Precision::Fast || !crate::attend_many::cooperative(kernels.device().report()) {
        return Ok((Cooperative::default(), None));
    }
    let index = layout.layers.iter().find_map(|layer| layer.index.as_ref());
    let shapes = Shapes {
        attention: AttendMany::of(config, layout).map(|many| (many, layout.layers[0].raw)),
        scores: IndexScoreMany::of(config, layout).zip(index.map(|index| index.row)),
    };
    trusted(kernels, &shapes)
}

fn trusted(kernels: &Arc<Kernels>, shapes: &Shapes) -> Result<(Cooperative, Option<String>), GpuError> {
    make_kernels(kernels, shapes)?;
    let mut faults = Vec::new();
    let mut trust = |family: Family| {
        let twin = |coop: bool| Trial::new(kernels, coop).run(family, shapes);
        let [cooperative, plain] = [twin(true)?, twin(false)?];
        let fault = fault(&cooperative, &plain, family.most());
        faults.extend(fault.iter().map(|fault| format!("{} ({fault})", family.name())));
        Ok::<bool, GpuError>(fault.is_none())
    };
    let trusted = Cooperative {
        products: trust(Family::Products)?,
        experts: trust(Family::Experts)?,
        attention: trust(Family::Attention)?,
        scores: trust(Family::Scores)?,
    };
    kernels.forget_bindings();
    let note = format!(
        "{} computes cooperative matrices wrongly for {}; plain kernels are used there, which is slower. A newer driver may help",
        kernels.device().report().name,
        faults.join(", ")
    );
    Ok((trusted, (!faults.is_empty()).then_some(note)))
}

/// Makes what [`Trial`] runs, all at the same time: a driver takes up to half a second for each.
fn make_kernels(kernels: &Arc<Kernels>, shapes: &Shapes) -> Result<(), GpuError> {
    let mut wanted = Vec::new();
    for coop in [true, false] {
        let attention = shapes.attention.map(|(many, _)| ("attend_many", AttendMany { coop, ..many }.context()));
        let scores = shapes.scores.map(|(many, _)| ("index_score_many", IndexScoreMany { coop, ..many }.context()));
        wanted.extend(attention.into_iter().chain(scores));
    }
    let tiled = |coop: bool| {
        let formats = [Format::Q8_0; 3];
        Trial::new(kernels, coop).many().prepare([formats[..1].to_vec()], [formats], EXPERTS, USED)
    };
    let (made, (cooperative, plain)) =
        rayon::join(|| kernels.make_all(&wanted), || rayon::join(|| tiled(true), || tiled(false)));
    made.and(cooperative).and(plain)
}

/// Distance of products of digits: 2^-15 of the largest of 16 inputs, and much less on the whole.
const DIGITS_DISTANCE: f64 = 1e-4;

/// Outputs of each 32 lanes of the product that is tried.
const TRIED_OUTPUTS: usize = 2;

/// The kernel that is tried.
fn tried(digits: bool, made: bool) -> Matvec {
    Matvec { formats: vec![Format::Q8_0], rows: 1, outputs: TRIED_OUTPUTS, norm: false, digits, made }
}

/// Whether few rows can be multiplied as packed integers on this adapter, and a line for the user if its driver computes them
/// wrongly. Not in Exact.
///
/// # Errors
/// The device failed.
pub(crate) fn integers(kernels: &Arc<Kernels>, precision: Precision) -> Result<(bool, Option<String>), GpuError> {
    if precision != Precision::Fast {
        return Ok((false, None));
    }
    let forms = [(false, false), (true, false), (true, true)];
    kernels.make_all(&forms.map(|(digits, made)| ("matvec", tried(digits, made).context())))?;
    let [plain, staged, laid_out] = forms.map(|(digits, made)| Trial::new(kernels, false).matvec(digits, made));
    let plain = plain?;
    let fault = |tried: &[f32]| fault(tried, &plain, DIGITS_DISTANCE);
    let fault = fault(&staged?).or(fault(&laid_out?));
    kernels.forget_bindings();
    let note = fault.as_ref().map(|fault| {
        let name = &kernels.device().report().name;
        format!("{name} computes packed integers wrongly ({fault}); floats are used, which is slower. A newer driver may help")
    });
    Ok((fault.is_none(), note))
}

/// What is wrong with results that should be those of a plain twin.
fn fault(tried: &[f32], plain: &[f32], most: f64) -> Option<String> {
    if !tried.iter().all(|value| value.is_finite()) {
        return Some("not finite".into());
    }
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let apart = square(&mut tried.iter().zip(plain).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    let distance = (apart / square(&mut plain.iter().map(|&value| f64::from(value)))).sqrt();
    // Also where there is nothing to compare, or the plain twin itself gives no numbers.
    let agrees = distance <= most || plain.is_empty();
    (!agrees).then(|| format!("off by {distance:.0e}, at most {most:.0e} expected"))
}

/// splitmix64: numbers that are the same every time.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Uniform in -1..1.
    pub(crate) fn value(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.value()).collect()
    }

    /// A stored row whose values are of the size of 1.
    fn stored(&mut self, format: RowFormat) -> Vec<u8> {
        // E8M0 for 1.
        const ONE: u8 = 127;
        let mut bytes = |count: usize, mask: u8| -> Vec<u8> { (0..count).map(|_| self.bits() as u8 & mask).collect() };
        let mut row = match format {
            RowFormat::F32 { width } => self.values(width).iter().flat_map(|value| value.to_le_bytes()).collect(),
            RowFormat::Fp8Bf16 { nope, rope } => {
                // Exponents up to that of 1, so that no code is NaN.
                let codes = bytes(nope, 0xbf);
                let scales = vec![ONE; (nope / 64).next_multiple_of(8)];
                let rotated = self.values(rope).iter().flat_map(|value| value.to_le_bytes()[2..].to_vec()).collect();
                [codes, scales, rotated].concat()
            }
            RowFormat::HadamardFp4 { width } => [bytes(width / 2, 0xff), vec![ONE; width / 32]].concat(),
        };
        row.resize(format.row_bytes(), 0);
        row
    }

    /// Numbers that a half holds as they are: a driver may leave out that factors are rounded on their way.
    fn halves(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| (self.value() * 1024.0).round() / 1024.0).collect()
    }

    fn session(&mut self, format: RowFormat, rows: usize) -> Vec<u8> {
        (0..rows).flat_map(|_| self.stored(format)).collect()
    }

    /// A Q8_0 matrix at the end of a slab.
    fn matrix(&mut self, slab: &mut Vec<u8>, rows: usize, cols: usize) -> Matrix {
        let (format, base) = (Format::Q8_0, slab.len() as u32 / 16);
        let row_bytes = format.row_bytes(cols);
        for _ in 0..rows {
            let mut row: Vec<u8> = (0..format.file_row_bytes(cols)).map(|_| self.bits() as u8).collect();
            // The scale of a block, 2^-7.
            row.chunks_exact_mut(34).for_each(|block| block[..2].copy_from_slice(&[0, 0x20]));
            let at = slab.len();
            slab.resize(at + row_bytes, 0);
            format.pack(&row, &mut slab[at..]);
        }
        Matrix { format, base, stride: row_bytes as u32 / 16, rows, cols }
    }
}

/// Experts of a trial, and how many of them a row takes.
const EXPERTS: usize = 3;
const USED: usize = 2;

/// One run of a family on fixed data, with cooperative matrices or without.
struct Trial {
    kernels: Arc<Kernels>,
    commands: Commands,
    random: Random,
    coop: bool,
}

impl Trial {
    fn new(kernels: &Arc<Kernels>, coop: bool) -> Trial {
        let commands = Commands::new(kernels.device().clone(), kernels.clone());
        Trial { kernels: kernels.clone(), commands, random: Random(1), coop }
    }

    /// What it makes; nothing if the model has no such kernels.
    fn run(&mut self, family: Family, shapes: &Shapes) -> Result<Vec<f32>, GpuError> {
        match (family, &shapes.attention, &shapes.scores) {
            // By the tiles for few rows, for more, and for many.
            (Family::Products, ..) => Ok([self.products(70)?, self.products(130)?, self.products(1030)?].concat()),
            (Family::Experts, ..) => Ok([self.experts(90)?, self.experts(140)?].concat()),
            (Family::Attention, Some((many, format)), _) => {
                self.attention(AttendMany { coop: self.coop, ..*many }, *format)
            }
            (Family::Scores, _, Some((many, format))) => {
                self.scores(IndexScoreMany { coop: self.coop, ..*many }, *format)
            }
            (Family::Attention | Family::Scores, ..) => Ok(Vec::new()),
        }
    }

    fn buffer<T: Pod>(&mut self, values: &[T]) -> Result<Buffer, GpuError> {
        let bytes = bytemuck::cast_slice(values);
        let buffer = Buffer::new(self.kernels.device(), "data of a check", bytes.len() as u64)?;
        self.commands.write((&buffer, 0), bytes);
        Ok(buffer)
    }

    fn random(&mut self, count: usize) -> Result<Buffer, GpuError> {
        let values = self.random.values(count);
        self.buffer(&values)
    }

    /// A place for results, of NaN, so that what is not written is noticed.
    fn results(&mut self, count: usize) -> Result<Buffer, GpuError> {
        self.buffer(&vec![f32::NAN; count])
    }

    fn read(&mut self, buffer: &Buffer, count: usize) -> Result<Vec<f32>, GpuError> {
        Ok(bytemuck::pod_collect_to_vec(&self.commands.read((buffer, 0), 4 * count as u64)?))
    }

    fn many(&self) -> Many {
        Many::new(self.kernels.clone(), if self.coop { Cooperative::ALL } else { Cooperative::default() })
    }

    /// More rows and outputs than a tile has.
    fn products(&mut self, rows: usize) -> Result<Vec<f32>, GpuError> {
        const WIDTH: usize = 96;
        const OUTPUTS: usize = 260;
        let mut slab = Vec::new();
        let jobs = vec![Job { matrix: self.random.matrix(&mut slab, OUTPUTS, WIDTH), x_at: 0, y_at: 0 }];
        let table = slab.len() as u32 / 16;
        slab.extend_from_slice(bytemuck::cast_slice(&Jobs::words(&jobs)));
        let (jobs, slab, many) = (Jobs { jobs, table, group_table: 0 }, self.buffer(&slab)?, self.many());
        let (x, y, book) = (self.random(rows * WIDTH)?, self.results(rows * OUTPUTS)?, self.buffer(&code_book())?);
        let (halves, inverses) = (self.buffer(&vec![0_u16; rows * WIDTH])?, self.results(rows)?);
        let halves = Halves { halves: halves.all(), inverses: inverses.all(), rows, width: WIDTH };
        many.halve(&mut self.commands, x.all(), WIDTH, halves)?;
        many.matmul(&mut self.commands, slab.all(), &jobs, halves, y.all(), OUTPUTS, book.all())?;
        self.read(&y, rows * OUTPUTS)
    }

    /// One row by a matrix with more outputs than a workgroup has, as integers, of inputs that were laid out before or not, or as
    /// floats.
    fn matvec(&mut self, digits: bool, made: bool) -> Result<Vec<f32>, GpuError> {
        const WIDTH: usize = 2080;
        const OUTPUTS: usize = 41;
        let mut slab = Vec::new();
        let jobs = vec![Job { matrix: self.random.matrix(&mut slab, OUTPUTS, WIDTH), x_at: 0, y_at: 0 }];
        let group_table = slab.len() as u32 / 16;
        slab.extend_from_slice(bytemuck::cast_slice(&Jobs::group_words(&jobs)));
        let (outputs, groups) = Jobs { jobs, table: 0, group_table }.matvec();
        assert_eq!(outputs, TRIED_OUTPUTS, "the kernel that was made for this");
        let kernel = self.kernels.get("matvec", tried(digits, made).context())?;
        let (slab, x, y) = (self.buffer(&slab)?, self.random(WIDTH)?, self.results(OUTPUTS)?);
        let params = [group_table, 1, WIDTH as u32 / 4, OUTPUTS as u32, 0, 0, WIDTH as u32 / 16];
        if made {
            let (digits, transposed) = (self.results(digits_bytes(WIDTH) as usize / 4)?, self.results(WIDTH)?);
            let lay_out = self.kernels.get("digits", digits_context(false))?;
            let halves = WIDTH as u32 / 16;
            let buffers = [x.all(), digits.all(), transposed.all()];
            self.commands.run(&lay_out, &buffers, &[WIDTH as u32 / 4, halves, 0, 0], [halves.div_ceil(256), 1, 1]);
            let buffers = [slab.all(), transposed.all(), y.all(), digits.all()];
            self.commands.run(&kernel, &buffers, &params, [groups, 1, 1]);
        } else {
            self.commands.run(&kernel, &[slab.all(), x.all(), y.all()], &params, [groups, 1, 1]);
        }
        self.read(&y, OUTPUTS)
    }

    /// Each row takes two of three experts, one of them always, so that this one has more rows than a tile.
    fn experts(&mut self, rows: usize) -> Result<Vec<f32>, GpuError> {
        const D: usize = 96;
        const F: usize = 160;
        let many = self.many();
        let mut slab = Vec::new();
        let mut expert = || [(F, D), (F, D), (D, F)].map(|(rows, cols)| self.random.matrix(&mut slab, rows, cols));
        // Of the first; those of the others lie alike.
        let [[gate, up, down], ..]: [[Matrix; 3]; EXPERTS] = std::array::from_fn(|_| expert());
        let slot = (slab.len() / EXPERTS / 16) as u32;
        let chosen: Vec<u32> = (0..rows as u32).flat_map(|row| [0, 1 + row % 2]).collect();
        let (slab, table, chosen) = (self.buffer(&slab)?, self.buffer(&[0_u32, 1, 2])?, self.buffer(&chosen)?);
        let (x, shares) = (self.random(rows * D)?, self.random(rows * USED)?);
        let (halves, inverses) = (self.buffer(&vec![0_u16; rows * D])?, self.results(rows)?);
        let (order, mid) = (self.results(rows * USED)?, self.results(rows * USED * F / 2)?);
        let tiles = self.results(Many::most_tiles_bytes(rows * USED, EXPERTS) as usize / 4)?;
        let (y, book) = (self.buffer(&vec![0_f32; rows * (1 + USED) * D])?, self.buffer(&code_book())?);
        let x_halves = Halves { halves: halves.all(), inverses: inverses.all(), rows, width: D };
        let groups = Groups { order: order.all(), tiles: tiles.all(), choices: rows * USED };
        let experts = Experts {
            slab: slab.all(),
            table: table.all(),
            table_at: 0,
            slot,
            gate,
            up,
            down,
            experts: EXPERTS,
            used: USED,
            limit: 10.0,
        };
        let commands = &mut self.commands;
        many.halve(commands, x.all(), D, x_halves)?;
        many.group(commands, chosen.all(), EXPERTS, groups)?;
        many.experts_up(commands, &experts, groups, x_halves, mid.all(), book.all())?;
        many.experts_down(commands, &experts, groups, mid.all(), shares.all(), y.all(), book.all())?;
        self.read(&y, rows * (1 + USED) * D)
    }

    /// Three rows that see a window which is cut by the end of the ring, and all compressed rows.
    fn attention(&mut self, many: AttendMany, format: RowFormat) -> Result<Vec<f32>, GpuError> {
        const ROWS: usize = 3;
        const START: usize = 94;
        const RING_ROWS: usize = 96;
        const RATIO: usize = 4;
        let (width, words) = (many.heads * many.head_dim, format.row_bytes() / 4);
        let session = self.random.session(format, RING_ROWS + (START + ROWS) / RATIO);
        let rotations: Vec<[f32; 2]> =
            self.random.values(ROWS * 32).iter().map(|angle| [angle.cos(), angle.sin()]).collect();
        let kernel = self.kernels.get("attend_many", many.context())?;
        let buffers = [
            self.random(ROWS * width)?,
            self.buffer(&session)?,
            self.buffer(&[0_u32; 4])?,
            self.buffer(&[0_u32; 4])?,
            self.random(many.heads)?,
            self.buffer(&rotations)?,
            self.results(ROWS * width)?,
        ];
        let params = AttendManyParams {
            q_stride: width as u32 / 4,
            row0: 0,
            start: START as u32,
            run0: 0,
            window: 61,
            ring: 0,
            ring_rows: RING_ROWS as u32,
            compressed: (RING_ROWS * words) as u32,
            ratio: RATIO as u32,
            top_k: u32::MAX >> 1,
            fresh: u32::MAX,
            scale: 1.0 / (many.head_dim as f32).sqrt(),
            key_factor: 1.0,
            sinks: 0,
            rotations: 0,
        };
        self.commands.run(&kernel, &buffers.each_ref().map(Buffer::all), &params, many.groups(ROWS));
        self.read(&buffers[6], ROWS * width)
    }

    /// Three rows that see as many keys.
    fn scores(&mut self, many: IndexScoreMany, format: RowFormat) -> Result<Vec<f32>, GpuError> {
        const ROWS: usize = 3;
        const KEYS: usize = 40;
        const RATIO: usize = 4;
        let heads = many.index_heads;
        let keys = self.random.session(format, KEYS);
        let kernel = self.kernels.get("index_score_many", many.context())?;
        let queries = self.random.halves(ROWS * heads * 128);
        let buffers =
            [self.buffer(&queries)?, self.random(ROWS * heads)?, self.buffer(&keys)?, self.results(ROWS * KEYS)?];
        let params = IndexScoreManyParams {
            q_stride: (heads * 128) as u32,
            q: 0,
            p_stride: heads as u32,
            weights: 0,
            scale: 1.0 / ((heads * 128) as f32).sqrt(),
            row0: 0,
            start: (KEYS * RATIO) as u32,
            run0: 0,
            ratio: RATIO as u32,
            keys: 0,
            stride: KEYS as u32,
            rows: ROWS as u32,
        };
        let [of_keys, of_rows] = index_tile(heads);
        let groups = [KEYS.div_ceil(of_keys) as u32, ROWS.div_ceil(of_rows) as u32, 1];
        self.commands.run(&kernel, &buffers.each_ref().map(Buffer::all), &params, groups);
        self.read(&buffers[3], ROWS * KEYS)
    }
}

#[cfg(test)]
mod tests {
    use minijinja::{Value, context};

    use super::*;
    use crate::attend_many::Tiling;
    use crate::device::{Checks, Choice, Device, adapters};
    use crate::kernel::render;

    /// A plain kernel in the place of a cooperative one.
    fn twin(name: &str, values: &Value) -> String {
        render(name, &context! { coop => false, ..values.clone() })
    }

    /// The same, wrong on purpose in the cooperative's place: `edit` of its kernel `which`.
    fn wrong(name: &str, values: &Value, which: &str, from: &str, to: &str) -> String {
        let source = twin(name, values);
        let is_cooperative = values.get_attr("coop").is_ok_and(|coop| coop.is_true());
        if name != which || !is_cooperative {
            return source;
        }
        assert!(source.contains(from), "{which} has no {from}");
        source.replace(from, to)
    }

    /// As on an adapter whose sums begin with anything.
    fn no_numbers_in_products(name: &str, values: &Value) -> String {
        let nan = "bitcast<f32>(0x7fc00000u | p.rows) + sum * inverses";
        wrong(name, values, "matmul.wgsl", "sum * inverses", nan)
    }

    fn wrong_experts(name: &str, values: &Value) -> String {
        wrong(name, values, "experts_down_many.wgsl", "= sum * p.inverse", "= 1.01 * sum * p.inverse")
    }

    fn wrong_attention(name: &str, values: &Value) -> String {
        wrong(name, values, "attend_many.wgsl", "scores *= p.scale", "scores *= 1.1 * p.scale")
    }

    fn wrong_scores(name: &str, values: &Value) -> String {
        wrong(name, values, "index_score_many.wgsl", "* p.scale;", "* p.scale * f32(1u + (row & 1u));")
    }

    #[test]
    fn families_that_are_computed_wrongly_are_left_out_and_named() {
        let adapter = adapters().into_iter().find(|adapter| adapter.lacks.is_empty());
        let adapter = adapter.expect("an adapter: install Debian's mesa-vulkan-drivers and libvulkan1");
        let device = Device::open(Choice::Index(adapter.index), Checks::On).unwrap();
        let (nope, rope) = (192, 64);
        let kept = RowFormat::Fp8Bf16 { nope, rope };
        let attention = AttendMany {
            heads: 16,
            head_dim: nope + rope,
            plain: false,
            row_words: kept.row_bytes() / 4,
            coop: true,
            tiling: Tiling::of(16),
        };
        let row = RowFormat::HadamardFp4 { width: 128 };
        let scores = IndexScoreMany { index_heads: 8, plain: false, row_words: row.row_bytes() / 4, coop: true };
        let shapes = Shapes { attention: Some((attention, kept)), scores: Some((scores, row)) };
        type Render = fn(&str, &Value) -> String;
        let cases: [(Render, Cooperative, &str); 5] = [
            (twin, Cooperative::ALL, ""),
            (no_numbers_in_products, Cooperative { products: false, ..Cooperative::ALL }, "for products (not finite)"),
            (
                wrong_experts,
                Cooperative { experts: false, ..Cooperative::ALL },
                "for experts (off by 1e-2, at most 5e-4",
            ),
            (wrong_attention, Cooperative { attention: false, ..Cooperative::ALL }, "for attention (off by"),
            (wrong_scores, Cooperative { scores: false, ..Cooperative::ALL }, "for indexer scores (off by"),
        ];
        for (render, expected, said) in cases {
            let kernels = Arc::new(Kernels::rendered_by(device.clone(), render));
            let (found, note) = trusted(&kernels, &shapes).unwrap();
            println!("{found:?} {note:?}");
            assert_eq!(found, expected);
            assert_eq!(note.is_some(), expected != Cooperative::ALL);
            assert!(note.unwrap_or_default().contains(said), "expected {said}");
        }
    }

    /// As on an adapter that takes bytes for numbers without signs.
    fn unsigned(name: &str, values: &Value) -> String {
        render(name, values).replace("dot4I8Packed(codes.x, digits.x)", "i32(dot4U8Packed(codes.x, digits.x))")
    }

    #[test]
    fn packed_integers_that_are_computed_wrongly_are_left_out_and_named() {
        let adapter = adapters().into_iter().find(|adapter| adapter.lacks.is_empty());
        let adapter = adapter.expect("an adapter: install Debian's mesa-vulkan-drivers and libvulkan1");
        let device = Device::open(Choice::Index(adapter.index), Checks::On).unwrap();
        let right = Arc::new(Kernels::rendered_by(device.clone(), render));
        assert_eq!(integers(&right, Precision::Fast).unwrap(), (true, None));
        assert_eq!(integers(&right, Precision::Exact).unwrap(), (false, None));
        let (trusted, note) = integers(&Arc::new(Kernels::rendered_by(device, unsigned)), Precision::Fast).unwrap();
        println!("{note:?}");
        assert!(!trusted);
        assert!(note.unwrap().contains("computes packed integers wrongly (off by"));
    }
}
