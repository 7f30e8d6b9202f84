//! Many rows against the same products in f64, and their cooperative kernels against the plain ones.

use std::time::Instant;

use super::*;
use crate::device::{Checks, Choice, Device, WORKGROUP_BYTES, adapters};
use crate::format::code_book;
use crate::jobs::Job;
use crate::kernel::Buffer;
use crate::self_check::{EXPERTS_DISTANCE, Random, SUMS_DISTANCE};

impl Random {
    /// A row of `cols` weights as in a file: random codes under scales of a sensible size.
    fn row(&mut self, format: Format, cols: usize) -> Vec<u8> {
        let mut row: Vec<u8> = (0..format.file_row_bytes(cols)).map(|_| self.bits() as u8).collect();
        let block = format.tensor_type().block().unwrap().bytes as usize;
        for block in row.chunks_exact_mut(block) {
            let value = self.value();
            let mut half = |at: usize, size: f32| {
                block[at..at + 2].copy_from_slice(&quant::blocks::Half::from_f32(size * (0.5 + value.abs())).0);
            };
            match format {
                Format::F32 => block.copy_from_slice(&value.to_le_bytes()),
                Format::F16 => block.copy_from_slice(&quant::blocks::Half::from_f32(value).0),
                Format::Bf16 => block.copy_from_slice(&value.to_le_bytes()[2..]),
                Format::Q8_0 | Format::Iq2Xxs => half(0, 0.01),
                Format::Q4K => (half(0, 0.002), half(2, 0.01)).0,
                Format::Q2K => (half(80, 0.02), half(82, 0.02)).0,
                Format::Mxfp4 => block[0] = 120 + block[0] % 8,
            }
        }
        row
    }
}

/// A matrix as in a file.
pub(crate) struct Weights {
    pub(crate) format: Format,
    pub(crate) cols: usize,
    pub(crate) rows: Vec<Vec<u8>>,
}

impl Weights {
    pub(crate) fn random(random: &mut Random, format: Format, rows: usize, cols: usize) -> Weights {
        Weights { format, cols, rows: (0..rows).map(|_| random.row(format, cols)).collect() }
    }

    /// Puts it at the end of a slab that a device is given.
    pub(crate) fn pack(&self, slab: &mut Vec<u8>) -> Matrix {
        let (base, row_bytes) = (slab.len() as u32 / 16, self.format.row_bytes(self.cols));
        for row in &self.rows {
            let at = slab.len();
            slab.resize(at + row_bytes, 0);
            self.format.pack(row, &mut slab[at..]);
        }
        Matrix { format: self.format, base, stride: row_bytes as u32 / 16, rows: self.rows.len(), cols: self.cols }
    }

    /// `[rows of x, rows]`.
    pub(crate) fn product(&self, x: &[&[f64]]) -> Vec<Vec<f64>> {
        let mut products = vec![vec![0.0; self.rows.len()]; x.len()];
        let mut row = vec![0.0; self.cols];
        for (output, bytes) in self.rows.iter().enumerate() {
            quant::dequantize(self.format.tensor_type(), bytes, &mut row);
            for (x, products) in x.iter().zip(&mut products) {
                products[output] = row.iter().zip(*x).map(|(&w, x)| f64::from(w) * x).sum();
            }
        }
        products
    }
}

struct Bench {
    device: Arc<Device>,
    commands: Commands,
    many: Many,
}

impl Bench {
    fn new(choice: Choice, checks: Checks) -> Bench {
        let device = Device::open(choice, checks).unwrap();
        let kernels = Arc::new(Kernels::new(device.clone()));
        let commands = Commands::new(device.clone(), kernels.clone());
        let has = crate::attend_many::cooperative(device.report());
        let many = Many::new(kernels, if has { Cooperative::ALL } else { Cooperative::default() });
        Bench { device, commands, many }
    }

    /// With plain kernels, on software or else on hardware; without any adapter the tests fail.
    fn plain() -> Bench {
        let usable = adapters().into_iter().filter(|adapter| adapter.lacks.is_empty());
        let adapter = usable.min_by_key(|adapter| adapter.kind != "software");
        let adapter =
            adapter.expect("no adapter can run the kernels: install Debian's mesa-vulkan-drivers and libvulkan1");
        println!("on {}", adapter.name);
        let mut bench = Bench::new(Choice::Index(adapter.index), Checks::On);
        bench.many.cooperative = Cooperative::default();
        bench
    }

    fn upload(&self, bytes: &[u8]) -> Buffer {
        let buffer = Buffer::new(&self.device, "test", bytes.len() as u64).unwrap();
        self.device.queue.write_buffer(&buffer.raw, 0, bytes);
        buffer
    }

    fn empty(&self, bytes: usize) -> Buffer {
        Buffer::new(&self.device, "test", bytes as u64).unwrap()
    }

    fn read<T: Pod>(&mut self, buffer: &Buffer, count: usize) -> Vec<T> {
        let bytes = self.commands.read((buffer, 0), (count * size_of::<T>()) as u64).unwrap();
        bytemuck::pod_collect_to_vec(&bytes)
    }

    /// Rows as halves.
    fn halves(&mut self, x: &Buffer, x_stride: usize, rows: usize, width: usize) -> [Buffer; 2] {
        let buffers = [self.empty(rows * width * 2), self.empty(rows * 4)];
        let to = halves(&buffers, rows, width);
        self.many.halve(&mut self.commands, x.all(), x_stride, to).unwrap();
        buffers
    }

    fn wait(&mut self) {
        self.commands.submit();
        self.device.wait().unwrap();
    }
}

fn halves(buffers: &[Buffer; 2], rows: usize, width: usize) -> Halves<'_> {
    Halves { halves: buffers[0].all(), inverses: buffers[1].all(), rows, width }
}

/// |a - b| / |b|.
pub(crate) fn distance(a: impl IntoIterator<Item = f64>, b: impl IntoIterator<Item = f64>) -> f64 {
    let (mut difference, mut size) = (0.0, 0.0);
    for (a, b) in a.into_iter().zip(b) {
        difference += (a - b) * (a - b);
        size += b * b;
    }
    (difference / size).sqrt()
}

pub(crate) fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| f64::from(v)).collect()
}

/// Jobs on rows of `x`, and a place for their results.
struct Case {
    weights: Vec<Weights>,
    places: Vec<(usize, usize)>,
    x: Vec<f32>,
    x_stride: usize,
    y_stride: usize,
}

impl Case {
    /// One job of each format, on its own part of a row.
    fn new(random: &mut Random, formats: &[Format], rows: usize, outputs: usize) -> Case {
        let (mut x_at, mut y_at) = (0, 3);
        let (mut weights, mut places) = (Vec::new(), Vec::new());
        for (i, &format) in formats.iter().enumerate() {
            let cols = format.block_elements() * if format.block_elements() == 32 { 7 } else { 3 };
            let outputs = outputs + 5 * i;
            weights.push(Weights::random(random, format, outputs, cols));
            places.push((x_at, y_at));
            (x_at, y_at) = (x_at + cols, y_at + outputs);
        }
        let x_stride = x_at + 4;
        let mut x = random.values(rows * x_stride);
        // Rows of all sizes, those that halves do not reach among them.
        for (row, x) in x.chunks_exact_mut(x_stride).enumerate() {
            let size = [1.0, 1e-6, 1e6, 300.0][row % 4];
            x.iter_mut().for_each(|v| *v *= size);
        }
        Case { weights, places, x, x_stride, y_stride: y_at + 2 }
    }

    /// `[rows, y_stride]` of rows `first..first + rows`.
    fn run(&self, bench: &mut Bench, first: usize, rows: usize) -> Vec<f32> {
        let mut slab = vec![0; 32];
        let job = |weights: &Weights, &(x_at, y_at): &(usize, usize), slab: &mut Vec<u8>| Job {
            matrix: weights.pack(slab),
            x_at,
            y_at,
        };
        let jobs: Vec<Job> = self.weights.iter().zip(&self.places).map(|(w, place)| job(w, place, &mut slab)).collect();
        let table = slab.len() as u32 / 16;
        slab.extend_from_slice(bytemuck::cast_slice(&Jobs::words(&jobs)));
        let jobs = Jobs { jobs, table, group_table: 0 };
        let slab = bench.upload(&slab);
        let x = bench.upload(bytemuck::cast_slice(&self.x[first * self.x_stride..][..rows * self.x_stride]));
        let y = bench.upload(&vec![0; rows * self.y_stride * 4]);
        let code_book = bench.upload(&code_book());
        let width = self.x_stride - 4;
        let buffers = bench.halves(&x, self.x_stride, rows, width);
        let x = halves(&buffers, rows, width);
        bench.many.matmul(&mut bench.commands, slab.all(), &jobs, x, y.all(), self.y_stride, code_book.all()).unwrap();
        bench.read(&y, rows * self.y_stride)
    }

    /// Largest distance of a row of a job from the product in f64.
    fn error(&self, y: &[f32]) -> f64 {
        let mut worst = 0.0f64;
        for (weights, &(x_at, y_at)) in self.weights.iter().zip(&self.places) {
            let x: Vec<Vec<f64>> =
                self.x.chunks_exact(self.x_stride).map(|x| wide(&x[x_at..][..weights.cols])).collect();
            let x: Vec<&[f64]> = x.iter().map(|x| &x[..]).collect();
            for (row, expected) in weights.product(&x).into_iter().enumerate() {
                let found = wide(&y[row * self.y_stride + y_at..][..expected.len()]);
                let error = distance(found, expected);
                worst = if error <= worst { worst } else { error };
            }
        }
        worst
    }
}

/// What rounding both factors to halves may cost: 2^-11 each at most, and much less on the whole.
const HALVES_ERROR: f64 = 1e-3;

#[test]
fn matmul_equals_f64_within_the_rounding_of_halves() {
    let mut bench = Bench::plain();
    let mut random = Random(1);
    for format in Format::ALL {
        let case = Case::new(&mut random, &[format], 131, 150);
        let error = case.error(&case.run(&mut bench, 0, 131));
        println!("{}: {error:.1e}", format.name());
        assert!(error < HALVES_ERROR, "{}: {error}", format.name());
    }
    for rows in [1, 40] {
        let case = Case::new(&mut random, &Format::ALL, rows, 61);
        let y = case.run(&mut bench, 0, rows);
        let error = case.error(&y);
        assert!(error < HALVES_ERROR, "all at once: {error}");
        for y in y.chunks_exact(case.y_stride) {
            assert_eq!([y[0], y[1], y[2], y[case.y_stride - 2], y[case.y_stride - 1]], [0.0; 5], "beside the results");
        }
    }
}

#[test]
fn a_product_does_not_depend_on_other_rows() {
    let mut bench = Bench::plain();
    row_alone_is_the_same(&mut bench);
}

fn row_alone_is_the_same(bench: &mut Bench) {
    let case = Case::new(&mut Random(2), &[Format::Q8_0, Format::Iq2Xxs], 150, 70);
    let all = case.run(bench, 0, 150);
    for (first, rows) in [(3, 1), (77, 60)] {
        let some = case.run(bench, first, rows);
        let bits = |y: &[f32]| y.iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
        assert_eq!(
            bits(&some),
            bits(&all[first * case.y_stride..][..rows * case.y_stride]),
            "{rows} rows from {first}"
        );
    }
}

/// Distinct experts for each row; every seventh row takes the first ones, so that some have many.
fn choose(random: &mut Random, rows: usize, used: usize, experts: usize) -> Vec<u32> {
    let mut chosen = Vec::new();
    for row in 0..rows {
        let mut of_row: Vec<u32> = Vec::new();
        while of_row.len() < used {
            let expert = if row % 7 == 0 { of_row.len() as u64 } else { random.bits() % experts as u64 } as u32;
            if !of_row.contains(&expert) {
                of_row.push(expert);
            }
        }
        chosen.extend(of_row);
    }
    chosen
}

#[test]
fn choices_are_grouped_in_their_order() {
    let mut bench = Bench::plain();
    let mut random = Random(3);
    for (rows, used, experts) in [(1, 6, 256), (2048, 6, 256), (700, 6, 384), (500, 2, 8), (3, 1, 4)] {
        let (chosen, choices) = (choose(&mut random, rows, used, experts), rows * used);
        let buffers = [bench.empty(choices * 4), bench.empty(bench.many.tiles_bytes(choices, experts) as usize)];
        let groups = Groups { order: buffers[0].all(), tiles: buffers[1].all(), choices };
        let ids = bench.upload(bytemuck::cast_slice(&chosen));
        bench.many.group(&mut bench.commands, ids.all(), experts, groups).unwrap();

        let tile = bench.many.tiles.experts(choices, experts).rows as usize;
        let (mut order, mut tiles) = (Vec::new(), Vec::new());
        for expert in 0..experts as u32 {
            let mine: Vec<u32> = (0..choices as u32).filter(|&i| chosen[i as usize] == expert).collect();
            for (n, part) in mine.chunks(tile).enumerate() {
                tiles.push([expert, (order.len() + n * tile) as u32, part.len() as u32, 0]);
            }
            order.extend(mine);
        }
        assert_eq!(bench.read::<u32>(&buffers[0], choices), order);
        let found: Vec<[u32; 4]> = bench.read(&buffers[1], tiles.len() + 1);
        assert_eq!(found[0][0] as usize, tiles.len());
        assert_eq!(found[1..], tiles);
        assert!(tiles.len() <= bench.many.most_tiles(choices, experts) as usize);
    }
}

/// A layer of experts, and rows that choose them.
struct Layer {
    experts: Vec<[Weights; 3]>,
    used: usize,
    limit: f32,
    x: Vec<f32>,
    chosen: Vec<u32>,
    shares: Vec<f32>,
}

impl Layer {
    fn new(random: &mut Random, formats: [Format; 3], rows: usize) -> Layer {
        let (d, f, experts, used) = (256, 256, 9, 3);
        // A width that is no multiple of a tile, where blocks allow.
        let f = if formats[2].block_elements() == 32 { f - 32 } else { f };
        let d = if formats[0].block_elements() == 32 && formats[1].block_elements() == 32 { d - 96 } else { d };
        let make = |random: &mut Random| {
            [(formats[0], f, d), (formats[1], f, d), (formats[2], d, f)]
                .map(|(ty, rows, cols)| Weights::random(random, ty, rows, cols))
        };
        Layer {
            experts: (0..experts).map(|_| make(random)).collect(),
            used,
            limit: 10.0,
            x: random.values(rows * d).iter().map(|v| v * 3.0).collect(),
            chosen: choose(random, rows, used, experts),
            shares: random.values(rows * used),
        }
    }

    fn d(&self) -> usize {
        self.experts[0][2].rows.len()
    }

    /// `[rows, 1 + used, D]`, with what is in no slot 7; rows `first..first + rows`; experts `absent` are in no slot.
    fn run(&self, bench: &mut Bench, first: usize, rows: usize, absent: &[usize]) -> Vec<f32> {
        let (d, f) = (self.d(), self.experts[0][2].cols);
        let (mut slab, mut matrices, mut slots) = (Vec::new(), Vec::new(), vec![5]);
        let mut slot_bytes = 0;
        // Slots in another order than experts.
        let mut table = vec![u32::MAX; self.experts.len()];
        for (slot, expert) in (0..self.experts.len()).rev().filter(|expert| !absent.contains(expert)).enumerate() {
            table[expert] = slot as u32;
            let at = slab.len() as u32 / 16;
            matrices = self.experts[expert].iter().map(|w| w.pack(&mut slab)).collect();
            matrices.iter_mut().for_each(|matrix| matrix.base -= at);
            slot_bytes = slab.len() / (slot + 1);
        }
        slots.extend(table);
        let choices = rows * self.used;
        let part = |n: usize| first * n..(first + rows) * n;
        let slab = bench.upload(&slab);
        let table = bench.upload(bytemuck::cast_slice(&slots));
        let x = bench.upload(bytemuck::cast_slice(&self.x[part(d)]));
        let ids = bench.upload(bytemuck::cast_slice(&self.chosen[part(self.used)]));
        let shares = bench.upload(bytemuck::cast_slice(&self.shares[part(self.used)]));
        let code_book = bench.upload(&code_book());
        let order = bench.empty(choices * 4);
        let tiles = bench.empty(bench.many.tiles_bytes(choices, self.experts.len()) as usize);
        let mid = bench.empty(choices * f * 2);
        let outputs = bench.upload(bytemuck::cast_slice(&vec![7.0f32; rows * (1 + self.used) * d]));
        let halved = bench.halves(&x, d, rows, d);
        let (x, groups) = (halves(&halved, rows, d), Groups { order: order.all(), tiles: tiles.all(), choices });
        let experts = Experts {
            slab: slab.all(),
            table: table.all(),
            table_at: 1,
            slot: slot_bytes as u32 / 16,
            gate: matrices[0],
            up: matrices[1],
            down: matrices[2],
            experts: self.experts.len(),
            used: self.used,
            limit: self.limit,
        };
        let Bench { many, commands, .. } = bench;
        many.group(commands, ids.all(), self.experts.len(), groups).unwrap();
        many.experts_up(commands, &experts, groups, x, mid.all(), code_book.all()).unwrap();
        many.experts_down(commands, &experts, groups, mid.all(), shares.all(), outputs.all(), code_book.all()).unwrap();
        bench.read(&outputs, rows * (1 + self.used) * d)
    }

    /// Of one choice, in f64.
    fn expected(&self, choice: usize) -> Vec<f64> {
        let [gate, up, down] = &self.experts[self.chosen[choice] as usize];
        let (x, limit) = (wide(&self.x[choice / self.used * self.d()..][..self.d()]), f64::from(self.limit));
        let (gates, ups) = (gate.product(&[&x]).remove(0), up.product(&[&x]).remove(0));
        let activation = |(gate, up): (f64, f64)| {
            let gate = gate.min(limit);
            gate / (1.0 + (-gate).exp()) * up.clamp(-limit, limit) * f64::from(self.shares[choice])
        };
        let mid: Vec<f64> = gates.into_iter().zip(ups).map(activation).collect();
        down.product(&[&mid]).remove(0)
    }
}

#[test]
fn experts_of_many_rows_equal_f64_within_the_rounding_of_halves() {
    let mut bench = Bench::plain();
    let mut random = Random(4);
    let mut formats: Vec<[Format; 3]> = Format::ALL.into_iter().map(|format| [format; 3]).collect();
    formats.push([Format::Iq2Xxs, Format::Iq2Xxs, Format::Q2K]);
    formats.push([Format::Q8_0, Format::Mxfp4, Format::F16]);
    for formats in formats {
        let (rows, absent) = (230, [4, 7]);
        let layer = Layer::new(&mut random, formats, rows);
        let (d, places) = (layer.d(), 1 + layer.used);
        let outputs = layer.run(&mut bench, 0, rows, &absent);
        let (mut found, mut expected) = (Vec::new(), Vec::new());
        for (at, outputs) in outputs.chunks_exact(d).enumerate() {
            let (row, place) = (at / places, at % places);
            let choice = row * layer.used + place.saturating_sub(1);
            if place == 0 || absent.contains(&(layer.chosen[choice] as usize)) {
                assert!(outputs.iter().all(|&v| v == 7.0), "row {row}, place {place} is somebody else's");
            } else if choice.is_multiple_of(11) {
                found.extend(wide(outputs));
                expected.extend(layer.expected(choice));
            }
        }
        let error = distance(found, expected);
        println!("{formats:?}: {error:.1e}");
        assert!(error < 2.0 * HALVES_ERROR, "{formats:?}: {error}");
    }
}

#[test]
fn a_choice_does_not_depend_on_other_rows_or_experts() {
    let mut bench = Bench::plain();
    choice_alone_is_the_same(&mut bench);
}

fn choice_alone_is_the_same(bench: &mut Bench) {
    let layer = Layer::new(&mut Random(5), [Format::Iq2Xxs, Format::Iq2Xxs, Format::Q2K], 210);
    let (d, places) = (layer.d(), 1 + layer.used);
    let all = layer.run(bench, 0, 210, &[]);
    for (first, rows, absent) in [(0, 210, vec![0, 3]), (17, 1, vec![]), (60, 77, vec![1])] {
        let some = layer.run(bench, first, rows, &absent);
        for (at, some) in some.chunks_exact(d).enumerate() {
            let (row, place) = (first + at / places, at % places);
            if place > 0 && !absent.contains(&(layer.chosen[row * layer.used + place - 1] as usize)) {
                let all = &all[(row * places + place) * d..][..d];
                assert!(some.iter().zip(all).all(|(a, b)| a.to_bits() == b.to_bits()), "row {row}, place {place}");
            }
        }
    }
}

#[test]
fn cooperative_kernels_equal_their_plain_twins() {
    let Some(adapter) = adapters().into_iter().find(|a| a.lacks.is_empty() && a.cooperative_tile == Some(16)) else {
        println!("skipped: no adapter has cooperative matrices of 16 by 16 halves");
        return;
    };
    let every_format: Vec<Vec<Format>> =
        Format::ALL.map(|format| vec![format]).into_iter().chain([Format::ALL.to_vec()]).collect();
    let layers =
        [[Format::Iq2Xxs, Format::Iq2Xxs, Format::Q2K], [Format::Mxfp4; 3], [Format::Q8_0, Format::Q4K, Format::F16]];
    for checks in [Checks::Off, Checks::On] {
        let mut bench = Bench::new(Choice::Index(adapter.index), checks);
        if !bench.many.cooperative.products {
            println!("skipped: subgroups of {} have {:?} threads, not always 32", adapter.name, adapter.subgroup);
            return;
        }
        println!("on {}, checks {checks:?}", adapter.name);
        let mut first: BTreeMap<String, Vec<u32>> = BTreeMap::new();
        let mut is_first = |formats: String, made: &[f32]| {
            let bits: Vec<u32> = made.iter().map(|v| v.to_bits()).collect();
            first.entry(formats).or_insert_with(|| bits.clone()) == &bits
        };
        // Every format by the tiles that are used, and one by those that are only measured.
        for (n, (products, experts)) in tiles().into_iter().enumerate() {
            let (formats, layers) = match (n, checks) {
                (0 | 1, _) => (&every_format[..], &layers[..]),
                (2, _) => (&every_format[..], &layers[..0]),
                (_, Checks::Off) => (&every_format[3..4], &layers[..1]),
                (_, Checks::On) => break,
            };
            if products.bytes(true).max(experts.bytes(true) + CODE_BOOK_BYTES) > bench.device.report.workgroup_bytes {
                println!("skipped: {products:?} or {experts:?} takes too much workgroup memory");
                continue;
            }
            for formats in formats {
                let case = Case::new(&mut Random(6), formats, 131, 150);
                let [coop, plain] = twins(&mut bench, products, experts, |bench| case.run(bench, 0, 131));
                let error = case.error(&coop);
                println!("{products:?} {formats:?}: {:.1e}, from f64 {error:.1e}", distance(wide(&coop), wide(&plain)));
                for (row, (coop, plain)) in coop.chunks(case.y_stride).zip(plain.chunks(case.y_stride)).enumerate() {
                    let error = distance(wide(coop), wide(plain));
                    assert!(error < SUMS_DISTANCE, "{products:?} {formats:?} row {row}: {error}");
                }
                assert!(error < HALVES_ERROR, "{products:?} {formats:?}: {error}");
                assert!(is_first(format!("{formats:?}"), &coop), "{products:?} {formats:?}: other bits");
            }
            for &formats in layers {
                let layer = Layer::new(&mut Random(7), formats, 230);
                let [coop, plain] = twins(&mut bench, products, experts, |bench| layer.run(bench, 0, 230, &[4, 7]));
                let error = distance(wide(&coop), wide(&plain));
                println!("{experts:?} {formats:?}: {error:.1e}");
                assert!(error < EXPERTS_DISTANCE, "{experts:?} {formats:?}: {error}");
                assert!(is_first(format!("experts {formats:?}"), &coop), "{experts:?} {formats:?}: other bits");
            }
        }
        row_alone_is_the_same(&mut bench);
        choice_alone_is_the_same(&mut bench);
    }
}

/// What cooperative kernels of some tiles make, and the plain ones that are used.
fn twins(
    bench: &mut Bench,
    products: Tile,
    experts: Tile,
    mut run: impl FnMut(&mut Bench) -> Vec<f32>,
) -> [Vec<f32>; 2] {
    bench.many.tiles = Tiles::always(products, experts);
    let coop = run(bench);
    bench.many.tiles = Tiles::always(Tile::PRODUCTS, Tile::EXPERTS);
    bench.many.cooperative = Cooperative::default();
    let plain = run(bench);
    bench.many.cooperative = Cooperative::ALL;
    [coop, plain]
}

impl Tiles {
    /// The same for any number of rows.
    fn always(products: Tile, experts: Tile) -> Tiles {
        Tiles { few_products: products, products, wide_products: products, experts, crowded_experts: experts }
    }
}

/// Tiles of products and of experts to compare: first those that are used.
fn tiles() -> Vec<(Tile, Tile)> {
    let tile = |[rows, outputs, depth, buffers, warp_rows, warp_outputs]: [u32; 6]| Tile {
        rows,
        outputs,
        depth,
        buffers,
        warp_rows,
        warp_outputs,
    };
    let pairs = [
        ([128, 128, 32, 1, 64, 64], [128, 128, 32, 1, 64, 64]),
        ([128, 128, 32, 1, 32, 64], [32, 128, 32, 1, 32, 32]),
        ([64, 128, 32, 1, 64, 32], [64, 128, 32, 1, 32, 32]),
        ([128, 64, 32, 1, 64, 32], [64, 64, 64, 1, 32, 32]),
        ([64, 64, 32, 2, 32, 32], [32, 128, 32, 2, 32, 32]),
        // More than 32 KiB of workgroup memory.
        ([128, 256, 32, 1, 64, 64], [128, 256, 32, 1, 64, 32]),
        ([256, 128, 32, 1, 64, 64], [64, 256, 32, 1, 64, 32]),
        ([128, 128, 64, 1, 64, 32], [64, 128, 64, 1, 32, 32]),
    ];
    let pairs = pairs.into_iter().map(|(products, experts)| (tile(products), tile(experts)));
    let used = [
        (Tile::PRODUCTS, Tile::EXPERTS),
        (Tile::WIDE_PRODUCTS, Tile::CROWDED_EXPERTS),
        (Tile::FEW_PRODUCTS, Tile::EXPERTS),
    ];
    used.into_iter().chain(pairs).collect()
}

#[test]
fn plain_products_do_not_depend_on_the_tile() {
    let mut bench = Bench::plain();
    let case = Case::new(&mut Random(8), &[Format::Q8_0], 140, 150);
    let layer = Layer::new(&mut Random(9), [Format::Iq2Xxs, Format::Mxfp4, Format::Q8_0], 100);
    let mut first = None;
    let fits = |tile: Tile| tile.bytes(false) + CODE_BOOK_BYTES <= WORKGROUP_BYTES;
    // What is used, and what differs most from it, in depth and in buffers not least: software takes seconds to compile a kernel.
    let fit: Vec<(Tile, Tile)> = [0, 2, 4, 6, 7].into_iter().map(|n| tiles()[n]).collect();
    assert!(fit.iter().all(|&(a, b)| fits(a) && fits(b)), "{fit:?}");
    for (products, experts) in fit {
        bench.many.tiles = Tiles::always(products, experts);
        let made = [case.run(&mut bench, 0, 140), layer.run(&mut bench, 0, 100, &[2])];
        let bits = made.map(|made| made.iter().map(|v| v.to_bits()).collect::<Vec<u32>>());
        assert!(*first.get_or_insert_with(|| bits.clone()) == bits, "{products:?} {experts:?}");
    }
}

/// Seconds of one of `runs` runs, one after the other.
fn seconds(bench: &mut Bench, runs: usize, mut run: impl FnMut(&Many, &mut Commands)) -> f64 {
    // The first makes the pipeline.
    run(&bench.many, &mut bench.commands);
    bench.wait();
    let mut all = |runs: usize| {
        for _ in 0..runs {
            run(&bench.many, &mut bench.commands);
        }
        bench.commands.submit();
        bench.device.wait().unwrap();
    };
    // The clock of an idle device is low.
    all(runs);
    let start = Instant::now();
    all(runs);
    start.elapsed().as_secs_f64() / runs as f64
}

/// A slab of random weights of `shapes`, outputs by inputs.
pub(crate) fn random_slab(random: &mut Random, shapes: &[(Format, usize, usize)]) -> (Vec<u8>, Vec<Matrix>) {
    let mut slab = Vec::new();
    // A few rows over and over: their codes matter to nobody.
    let matrices = shapes.iter().map(|&(format, rows, cols)| {
        let few = Weights::random(random, format, 16, cols);
        let mut matrix = few.pack(&mut slab);
        for _ in 1..rows / 16 {
            few.pack(&mut slab);
        }
        matrix.rows = rows;
        matrix
    });
    let matrices = matrices.collect();
    (slab, matrices)
}

/// `cargo test --release -p infall-gpu measure_matmul -- --ignored --nocapture`
#[test]
#[ignore = "measures; for hardware"]
fn measure_matmul() {
    if let Err(error) = Device::open(Choice::Hardware, Checks::Off) {
        println!("skipped: {error}");
        return;
    }
    let mut bench = Bench::new(Choice::Hardware, Checks::Off);
    println!(
        "{} {}, cooperative: {}",
        bench.device.report.name, bench.device.report.driver, bench.many.cooperative.products
    );
    let (rows, runs) = (2048, 30);
    let mut random = Random(7);
    let shapes = [
        ("q_b", vec![(Format::Q8_0, 32768, 1024)]),
        ("output_a", vec![(Format::Q8_0, 1024, 4096); 8]),
        ("output_b", vec![(Format::Q8_0, 4096, 8192)]),
        ("project", vec![(Format::Q8_0, 1024, 4096), (Format::Q8_0, 512, 4096), (Format::F16, 2624, 4096)]),
    ];
    let code_book = bench.upload(&code_book());
    for (name, shapes) in shapes {
        let (mut slab, matrices) = random_slab(&mut random, &shapes);
        let parts = if name == "output_a" { 8 } else { 1 };
        let width = matrices[0].cols * parts;
        let mut y_at = 0;
        let jobs = matrices.iter().enumerate().map(|(i, &matrix)| {
            let job = Job { matrix, x_at: (i % parts) * matrix.cols, y_at };
            y_at += matrix.rows;
            job
        });
        let jobs: Vec<Job> = jobs.collect();
        let table = slab.len() as u32 / 16;
        slab.extend_from_slice(bytemuck::cast_slice(&Jobs::words(&jobs)));
        let flops: usize = jobs.iter().map(|job| 2 * rows * job.matrix.rows * job.matrix.cols).sum();
        let jobs = Jobs { jobs, table, group_table: 0 };
        let slab = bench.upload(&slab);
        let x = bench.upload(bytemuck::cast_slice(&random.values(rows * width)));
        let y = bench.empty(rows * y_at * 4);
        let halved = bench.halves(&x, width, rows, width);
        let halve_s = seconds(&mut bench, runs, |many, commands| {
            many.halve(commands, x.all(), width, halves(&halved, rows, width)).unwrap();
        });
        println!("{name}: {rows} x {width} -> {y_at}; halves take {:.0} us", halve_s * 1e6);
        for (tile, _) in tiles() {
            if tile.bytes(true) > bench.device.report.workgroup_bytes {
                println!("  {tile:?}: too much workgroup memory");
                continue;
            }
            bench.many.tiles = Tiles::always(tile, Tile::EXPERTS);
            let x = halves(&halved, rows, width);
            let s = seconds(&mut bench, runs, |many, commands| {
                many.matmul(commands, slab.all(), &jobs, x, y.all(), y_at, code_book.all()).unwrap();
            });
            println!("  {tile:?}: {:.0} us, {:.1} TFLOP/s", s * 1e6, flops as f64 / s / 1e12);
        }
    }
    for rows in [rows, 2 * rows] {
        measure_experts(&mut bench, &mut random, rows, runs, &code_book);
    }
}

fn measure_experts(bench: &mut Bench, random: &mut Random, rows: usize, runs: usize, code_book: &Buffer) {
    let (d, f, experts, used) = (4096, 2048, 256, 6);
    let shapes = [(Format::Iq2Xxs, f, d), (Format::Iq2Xxs, f, d), (Format::Q2K, d, f)];
    let (expert, matrices) = random_slab(random, &shapes);
    let slab = bench.empty(expert.len() * experts);
    for slot in 0..experts {
        bench.device.queue.write_buffer(&slab.raw, (slot * expert.len()) as u64, &expert);
        bench.wait();
    }
    let choices = rows * used;
    let table = bench.upload(bytemuck::cast_slice(&(0..experts as u32).collect::<Vec<u32>>()));
    let x = bench.upload(bytemuck::cast_slice(&random.values(rows * d)));
    let mut chosen: Vec<u32> = Vec::new();
    for _ in 0..rows {
        let start = chosen.len();
        while chosen.len() < start + used {
            let expert = (random.bits() % experts as u64) as u32;
            if !chosen[start..].contains(&expert) {
                chosen.push(expert);
            }
        }
    }
    let ids = bench.upload(bytemuck::cast_slice(&chosen));
    let shares = bench.upload(bytemuck::cast_slice(&vec![0.25f32; choices]));
    let order = bench.empty(choices * 4);
    // Enough for tiles of any size.
    let tiles_of_all = bench.empty(16 * (1 + experts + choices));
    let mid = bench.empty(choices * f * 2);
    let outputs = bench.empty(rows * (1 + used) * d * 4);
    let halved = bench.halves(&x, d, rows, d);
    let groups = Groups { order: order.all(), tiles: tiles_of_all.all(), choices };
    let of = Experts {
        slab: slab.all(),
        table: table.all(),
        table_at: 0,
        slot: expert.len() as u32 / 16,
        gate: matrices[0],
        up: matrices[1],
        down: matrices[2],
        experts,
        used,
        limit: 10.0,
    };
    let flops = |matrices: usize| (2 * choices * matrices * d * f) as f64;
    for (_, tile) in tiles() {
        if tile.bytes(true) + CODE_BOOK_BYTES > bench.device.report.workgroup_bytes {
            println!("experts {tile:?}: too much workgroup memory");
            continue;
        }
        bench.many.tiles = Tiles::always(Tile::PRODUCTS, tile);
        let group_s = seconds(bench, runs, |many, commands| many.group(commands, ids.all(), experts, groups).unwrap());
        let up_s = seconds(bench, runs, |many, commands| {
            many.experts_up(commands, &of, groups, halves(&halved, rows, d), mid.all(), code_book.all()).unwrap();
        });
        let down_s = seconds(bench, runs, |many, commands| {
            many.experts_down(commands, &of, groups, mid.all(), shares.all(), outputs.all(), code_book.all()).unwrap();
        });
        println!(
            "experts of {rows} rows, {tile:?}: group {:.0} us; up {:.0} us, {:.1} TFLOP/s; down {:.0} us, {:.1} TFLOP/s",
            group_s * 1e6,
            up_s * 1e6,
            flops(2) / up_s / 1e12,
            down_s * 1e6,
            flops(1) / down_s / 1e12
        );
    }
}
