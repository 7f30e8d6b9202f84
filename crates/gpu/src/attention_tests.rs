//! The kernels of attention and of the indexer against the formulas (docs/spec/model.md §2.3, §2.6) in f64, on random
//! sessions; and how long the large ones take.

use std::sync::Arc;

use cpu::rows::{pack, unpack};
use minijinja::{Value, context};
use model::kv::RowFormat;
use quant::simd::level;

use crate::attend_many::{
    AttendMany, AttendManyParams, IndexScoreMany, IndexScoreManyParams, Tiling, cooperative, index_tile, key_factor,
};
use crate::device::{Checks, Choice, Device, adapters};
use crate::emulation::emulated;
use crate::kernel::{Buffer, Commands, Kernel, Kernels, render};
use crate::pass::{PIECE_KEYS, Shapes};
use crate::timer::Timer;

const ROPE: usize = 64;

/// Random numbers that are the same every time.
pub(crate) struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let x = (self.0 ^ (self.0 >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        x ^ (x >> 33)
    }

    fn below(&mut self, end: usize) -> usize {
        ((self.bits() >> 32) as usize * end) >> 32
    }

    /// About normal, of variance 1.
    fn value(&mut self) -> f32 {
        let sum: f64 = (0..4).map(|_| (self.bits() >> 40) as f64 / (1u64 << 24) as f64).sum();
        ((sum - 2.0) * 3f64.sqrt()) as f32
    }

    fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.value()).collect()
    }
}

/// A vector of root mean square `to`.
fn normalised(mut row: Vec<f32>, to: f32) -> Vec<f32> {
    let square = row.iter().map(|v| v * v).sum::<f32>() / row.len() as f32;
    row.iter_mut().for_each(|v| *v *= to / square.sqrt());
    row
}

/// The adapter to test, the first of hardware or else a software one, with and without checks; without any the tests fail.
fn benches() -> [Bench; 2] {
    let usable = adapters().into_iter().filter(|adapter| adapter.lacks.is_empty());
    let adapter = usable.min_by_key(|adapter| adapter.kind == "software");
    let adapter = adapter.expect("no adapter can run the kernels: install Debian's mesa-vulkan-drivers and libvulkan1");
    [Checks::On, Checks::Off].map(|checks| Bench::new(Device::open(Choice::Index(adapter.index), checks).unwrap()))
}

/// A device with kernels and commands.
struct Bench {
    device: Arc<Device>,
    kernels: Arc<Kernels>,
    commands: Commands,
    /// Emulates cooperative matrices.
    emulates: bool,
    /// Kernels made with them.
    emulated: usize,
}

impl Bench {
    fn new(device: Arc<Device>) -> Bench {
        let kernels = Arc::new(Kernels::new(device.clone()));
        let commands = Commands::new(device.clone(), kernels.clone());
        Bench { commands, kernels, device, emulates: false, emulated: 0 }
    }

    fn kernel(&mut self, name: &str, context: Value) -> Arc<Kernel> {
        if !self.emulates || !context.get_attr("coop").unwrap().is_true() {
            return self.kernels.get(name, context).unwrap();
        }
        self.emulated += 1;
        let source = emulated(&render(&format!("{name}.wgsl"), &context));
        Arc::new(self.kernels.make(1_000_000 + self.emulated, name, &source, "emulated".into()).unwrap())
    }

    fn buffer<T: bytemuck::Pod>(&mut self, values: &[T]) -> Buffer {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let buffer = Buffer::new(&self.device, "test", bytes.len() as u64).unwrap();
        self.commands.write((&buffer, 0), bytes);
        buffer
    }

    /// A buffer of NaN, so that what is not written is noticed.
    fn empty(&mut self, values: usize) -> Buffer {
        self.buffer(&vec![f32::NAN; values])
    }

    fn read<T: bytemuck::Pod>(&mut self, buffer: &Buffer, values: usize) -> Vec<T> {
        let bytes = self.commands.read((buffer, 0), (values * size_of::<T>()) as u64).unwrap();
        bytemuck::pod_collect_to_vec(&bytes)
    }
}

/// ‖a − b‖ / ‖b‖; ‖a‖ if b is 0.
fn distance(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let apart = square(&mut a.iter().zip(b).map(|(&a, b)| f64::from(a) - b));
    let all = square(&mut b.iter().copied());
    (apart / if all > 0.0 { all } else { 1.0 }).sqrt()
}

/// What attention is asked for.
#[derive(Clone, Copy, Debug)]
struct Shape {
    heads: usize,
    head_dim: usize,
    plain: bool,
    ratio: usize,
    top_k: usize,
    window: usize,
    /// Position of the first row.
    start: usize,
    rows: usize,
    /// Whether the pass's own keys are apart from the ring.
    fresh: bool,
    /// Factor of all keys.
    loud: f32,
}

impl Shape {
    fn format(&self) -> RowFormat {
        match self.plain {
            true => RowFormat::F32 { width: self.head_dim },
            false => RowFormat::Fp8Bf16 { nope: self.head_dim - ROPE, rope: ROPE },
        }
    }

    fn context(&self) -> Value {
        let Shape { heads, head_dim, plain, .. } = *self;
        let together = Shapes::heads_together(heads, self.row_words());
        let row_words = self.row_words();
        context! { states => 1, heads, head_dim, rope => ROPE, plain, row_words, together, digits => false }
    }

    fn row_words(&self) -> usize {
        self.format().row_bytes() / 4
    }

    /// Keys of the row at `position`: of the window, and compressed ones that are visible.
    fn counts(&self, position: usize) -> (usize, usize) {
        let near = (position + 1).min(self.window);
        (near, (position + 1).checked_div(self.ratio).unwrap_or(0))
    }
}

/// Rows as they are stored, and their values.
struct Stored {
    words: Vec<u32>,
    values: Vec<Vec<f32>>,
}

impl Stored {
    fn new(format: RowFormat, rows: &[Vec<f32>]) -> Stored {
        let mut stored = Stored { words: Vec::new(), values: Vec::new() };
        let mut bytes = vec![0; format.row_bytes()];
        for row in rows {
            pack(level(), format, row, &mut bytes);
            stored.words.extend(bytemuck::pod_collect_to_vec::<u8, u32>(&bytes));
            let mut values = vec![0.0; row.len()];
            unpack(level(), format, &bytes, &mut values);
            stored.values.push(values);
        }
        stored
    }
}

/// A random session and queries.
struct Scene {
    shape: Shape,
    q_stride: usize,
    q: Vec<f32>,
    session: Vec<u32>,
    fresh: Vec<u32>,
    /// First words of the ring and of compressed rows, and rows of the ring.
    ring: usize,
    compressed: usize,
    ring_rows: usize,
    chosen: Vec<u32>,
    sinks: Vec<f32>,
    rotations: Vec<[f32; 2]>,
    /// Keys by position, and compressed.
    keys: Vec<Vec<f32>>,
    far: Vec<Vec<f32>>,
}

impl Scene {
    fn new(shape: Shape, seed: u64) -> Scene {
        let mut random = Random(seed);
        let Shape { heads, head_dim, start, rows, .. } = shape;
        let words = shape.row_words();
        let end = start + rows;
        let row = |random: &mut Random, to: f32| normalised(random.values(head_dim), to);
        // As much of it as anybody can see.
        let first = start.saturating_sub(shape.window);
        let mut keys = vec![vec![0.0; head_dim]; first];
        keys.extend((first..end).map(|_| row(&mut random, 1.2 * shape.loud)));
        let near = Stored::new(shape.format(), &keys);
        let visible = end.checked_div(shape.ratio).unwrap_or(0);
        let far: Vec<_> = (0..visible).map(|_| row(&mut random, 0.9 * shape.loud)).collect();
        let far = Stored::new(shape.format(), &far);
        let q_stride = heads * head_dim + 128;
        let mut q = Vec::new();
        for _ in 0..rows {
            for _ in 0..heads {
                let mut query = row(&mut random, 1.0);
                // Some keys shall matter more than others, later ones not least.
                if random.below(2) == 0 {
                    let like = &near.values[first + random.below(end - first)];
                    query = normalised(query.iter().zip(like).map(|(q, k)| q + 0.2 * k / shape.loud).collect(), 1.0);
                }
                q.extend(query);
            }
            q.extend([f32::NAN; 128]);
        }
        let mut chosen = Vec::new();
        for position in start..end {
            let visible = shape.counts(position).1;
            let end = chosen.len() + shape.top_k;
            for at in 0..if visible > shape.top_k { visible } else { 0 } {
                if random.below(visible - at) < end - chosen.len() {
                    chosen.push(at as u32);
                }
            }
            chosen.resize(end, u32::MAX);
        }
        let ring_rows = shape.window + if shape.fresh { 3 } else { rows };
        let (ring, compressed) = (5, 5 + ring_rows * words);
        let mut session = vec![0xffff_ffff; compressed];
        for position in first..if shape.fresh { start } else { end } {
            let to = ring + position % ring_rows * words;
            session[to..to + words].copy_from_slice(&near.words[position * words..][..words]);
        }
        session.extend(&far.words);
        let fresh = if shape.fresh { near.words[start * words..].to_vec() } else { vec![0; 4] };
        let angles = (0..rows * ROPE / 2).map(|_| random.value());
        let rotations = [[0.5, 0.5]; 3].into_iter().chain(angles.map(|angle| [angle.cos(), angle.sin()])).collect();
        let sinks = (0..heads + 4).map(|i| if i % 7 == 6 { 30.0 } else { random.value() }).collect();
        let (keys, far) = (near.values, far.values);
        Scene { shape, q_stride, q, session, fresh, ring, compressed, ring_rows, chosen, sinks, rotations, keys, far }
    }

    /// §2.3 in f64.
    fn expected(&self) -> Vec<f64> {
        let Shape { heads, head_dim, start, rows, top_k, .. } = self.shape;
        let mut out = Vec::new();
        for row in 0..rows {
            let position = start + row;
            let (near, visible) = self.shape.counts(position);
            let mut keys: Vec<&[f32]> = (position + 1 - near..=position).map(|at| &self.keys[at][..]).collect();
            if visible > top_k {
                let chosen = &self.chosen[row * top_k..][..top_k];
                keys.extend(chosen.iter().map(|&which| &self.far[which as usize][..]));
            } else {
                keys.extend(self.far[..visible].iter().map(|key| &key[..]));
            }
            for head in 0..heads {
                let query = &self.q[row * self.q_stride + head * head_dim..][..head_dim];
                let dot =
                    |key: &&[f32]| query.iter().zip(*key).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>();
                let scores: Vec<f64> = keys.iter().map(|key| dot(key) / (head_dim as f64).sqrt()).collect();
                let sink = f64::from(self.sinks[4 + head]);
                let most = scores.iter().copied().fold(sink, f64::max);
                let sum = scores.iter().map(|score| (score - most).exp()).sum::<f64>() + (sink - most).exp();
                let mut value = vec![0.0; head_dim];
                for (key, score) in keys.iter().zip(&scores) {
                    let weight = (score - most).exp() / sum;
                    value.iter_mut().zip(*key).for_each(|(v, &k)| *v += weight * f64::from(k));
                }
                let (_, tail) = value.split_at_mut(head_dim - ROPE);
                for (pair, v) in tail.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                    let [cos, sin] = self.rotations[3 + row * ROPE / 2 + pair].map(f64::from);
                    *v = [v[0] * cos + v[1] * sin, v[1] * cos - v[0] * sin];
                }
                out.extend(value);
            }
        }
        out
    }

    /// `attend` and `combine`.
    fn computed_in_pieces(&self, bench: &mut Bench) -> Vec<f32> {
        let Shape { heads, head_dim, start, rows, top_k, window, ratio, fresh, .. } = self.shape;
        let most = (0..rows).map(|row| self.shape.counts(start + row)).map(|(near, far)| near + far.min(top_k)).max();
        let pieces = most.unwrap().div_ceil(PIECE_KEYS);
        let q = bench.buffer(&self.q);
        let session = bench.buffer(&self.session);
        let own = bench.buffer(&self.fresh);
        let chosen = bench.buffer(&self.chosen);
        let partial = bench.empty(rows * pieces * heads * (head_dim + 2));
        let w = bench.buffer(&self.sinks);
        let tables = bench.buffer(&self.rotations);
        let out = bench.empty(rows * heads * head_dim);
        let words = |values: &[usize]| values.iter().map(|&v| v as u32).collect::<Vec<u32>>();
        let first_fresh = if fresh { start } else { u32::MAX as usize };
        let run = [0, start, self.ring, 0, 0];
        let mut params = words(&run);
        params.extend(words(&[self.q_stride / 4, 0, window, self.ring_rows, self.compressed]));
        params.extend(words(&[ratio, top_k, first_fresh, pieces]));
        params.push((1.0 / (head_dim as f32).sqrt()).to_bits());
        let params: [u32; 15] = params.try_into().unwrap();
        let attend = bench.kernels.get("attend", self.shape.context()).unwrap();
        let buffers = [q.all(), tables.all(), own.all(), chosen.all(), partial.all(), session.all()];
        bench.commands.run(
            &attend,
            &buffers,
            &params,
            [(heads / Shapes::heads_together(heads, self.shape.row_words())) as u32, pieces as u32, rows as u32],
        );
        let mut params = words(&run);
        params.extend(words(&[0, window, ratio, top_k, pieces, 1, 3, 0]));
        let params: [u32; 13] = params.try_into().unwrap();
        let combine = bench.kernels.get("combine", self.shape.context()).unwrap();
        let buffers = [w.all(), tables.all(), partial.all(), out.all()];
        bench.commands.run(&combine, &buffers, &params, [heads as u32, rows as u32, 1]);
        bench.read(&out, rows * heads * head_dim)
    }
}

impl Scene {
    /// `attend_many`.
    fn computed_at_once(&self, bench: &mut Bench, coop: bool, tiling: Tiling) -> Vec<f32> {
        let Shape { heads, head_dim, plain, rows, .. } = self.shape;
        let run = ManyRun::new(self, bench);
        let many = AttendMany { heads, head_dim, plain, row_words: self.shape.row_words(), coop, tiling };
        let kernel = bench.kernel("attend_many", many.context());
        run.encode(bench, &kernel, many.groups(rows));
        bench.read(&run.buffers[6], rows * heads * head_dim)
    }
}

/// Buffers and parameters of `attend_many` for a scene.
struct ManyRun {
    buffers: [Buffer; 7],
    params: AttendManyParams,
}

impl ManyRun {
    fn new(scene: &Scene, bench: &mut Bench) -> ManyRun {
        let Shape { heads, head_dim, start, rows, top_k, window, ratio, fresh, loud, .. } = scene.shape;
        let buffers = [
            bench.buffer(&scene.q),
            bench.buffer(&scene.session),
            bench.buffer(&scene.fresh),
            bench.buffer(&scene.chosen),
            bench.buffer(&scene.sinks),
            bench.buffer(&scene.rotations),
            bench.empty(rows * heads * head_dim),
        ];
        let params = AttendManyParams {
            q_stride: scene.q_stride as u32 / 4,
            row0: 0,
            start: start as u32,
            run0: 0,
            window: window as u32,
            ring: scene.ring as u32,
            ring_rows: scene.ring_rows as u32,
            compressed: scene.compressed as u32,
            ratio: ratio as u32,
            top_k: top_k as u32,
            fresh: if fresh { start as u32 } else { u32::MAX },
            scale: 1.0 / (head_dim as f32).sqrt(),
            key_factor: key_factor(1.2 * loud, head_dim),
            sinks: 1,
            rotations: 3,
        };
        ManyRun { buffers, params }
    }

    fn encode(&self, bench: &mut Bench, kernel: &Kernel, groups: [u32; 3]) {
        bench.commands.run(kernel, &self.buffers.each_ref().map(Buffer::all), &self.params, groups);
    }
}

/// Rounding to f16 of every factor, and of each weight: 2⁻¹² of its size and of either sign, on the average.
const F16_DISTANCE: f64 = 1e-3;

const TILINGS: [Tiling; 4] = [
    Tiling { heads: 16, subgroups: 2 },
    Tiling { heads: 32, subgroups: 4 },
    Tiling { heads: 32, subgroups: 8 },
    Tiling { heads: 64, subgroups: 8 },
];

#[test]
fn attention_at_once_equals_the_formula() {
    let mut benches = benches();
    for (i, shape) in shapes().into_iter().enumerate() {
        let scene = Scene::new(shape, 7 + i as u64);
        let expected = scene.expected();
        for (n, tiling) in TILINGS.into_iter().enumerate() {
            if tiling.heads > shape.heads.max(16) || (shape.plain && n > 0) {
                continue;
            }
            // Without checks only one tiling, as in Flash: software takes seconds to compile a kernel.
            let is_flash = shape.heads == 64 && !shape.plain;
            for bench in &mut benches[..if n == 0 && is_flash { 2 } else { 1 }] {
                let apart = distance(&scene.computed_at_once(bench, false, tiling), &expected);
                println!("{apart:.1e} {tiling:?} {shape:?}");
                assert!(apart <= F16_DISTANCE, "{apart} {tiling:?} {shape:?}");
            }
        }
    }
}

/// A device whose cooperative matrices are used.
fn cooperative_bench() -> Option<Bench> {
    let [_, bench] = benches();
    if !cooperative(bench.device.report()) {
        println!("skipped: {} has no cooperative matrices of 16 with subgroups of 32", bench.device.report().name);
        return None;
    }
    Some(bench)
}

#[test]
fn cooperative_attention_equals_its_plain_twin() {
    let Some(mut bench) = cooperative_bench() else { return };
    for (i, shape) in shapes().into_iter().enumerate() {
        let scene = Scene::new(shape, 7 + i as u64);
        let expected = scene.expected();
        for tiling in TILINGS.into_iter().filter(|tiling| tiling.heads <= shape.heads.max(16)) {
            let computed = scene.computed_at_once(&mut bench, true, tiling);
            let twin: Vec<f64> = scene.computed_at_once(&mut bench, false, tiling).into_iter().map(f64::from).collect();
            let apart = [distance(&computed, &twin), distance(&computed, &expected)];
            println!("{:.1e} from the twin, {:.1e} from the formula: {tiling:?} {shape:?}", apart[0], apart[1]);
            assert!(apart.iter().all(|&apart| apart <= F16_DISTANCE), "{apart:?} {tiling:?} {shape:?}");
        }
    }
}

/// A device that emulates cooperative matrices.
fn emulating_bench() -> Option<Bench> {
    let [mut bench, _] = benches();
    if !bench.device.device.features().contains(wgpu::Features::SHADER_F16) {
        println!("skipped: {} has no f16", bench.device.report().name);
        return None;
    }
    bench.emulates = true;
    Some(bench)
}

#[test]
fn emulated_cooperative_attention_equals_the_formula() {
    let Some(mut bench) = emulating_bench() else { return };
    // More heads than a tile, and fewer; small ones, because emulation takes its time to be compiled.
    for (heads, tiling, plain) in
        [(8, TILINGS[0], true), (40, TILINGS[1], false), (24, TILINGS[2], false), (72, TILINGS[3], false)]
    {
        let shape = Shape {
            heads,
            head_dim: 128,
            plain,
            ratio: 4,
            top_k: 20,
            window: 21,
            start: 97,
            rows: 2,
            fresh: true,
            loud: 4.0,
        };
        let scene = Scene::new(shape, heads as u64);
        let apart = distance(&scene.computed_at_once(&mut bench, true, tiling), &scene.expected());
        assert!(apart <= F16_DISTANCE, "{apart} {tiling:?} {shape:?}");
    }
}

/// Sessions that differ in everything that matters.
fn shapes() -> Vec<Shape> {
    let base = Shape {
        heads: 8,
        head_dim: 256,
        plain: false,
        ratio: 0,
        top_k: 8,
        window: 32,
        start: 0,
        rows: 5,
        fresh: true,
        loud: 1.0,
    };
    let mut shapes = Vec::new();
    for plain in [false, true] {
        let base = Shape { plain, ..base };
        // Below the window; past it; with own rows in the ring.
        shapes.push(base);
        shapes.push(Shape { start: 71, ..base });
        shapes.push(Shape { start: 1000, rows: 1, fresh: false, loud: 4.0, ..base });
        // Chosen, and as many as there are.
        shapes.push(Shape { start: 203, ratio: 4, top_k: 24, ..base });
        shapes.push(Shape { start: 90, ratio: 4, top_k: 24, rows: 11, ..base });
        shapes.push(Shape { start: 0, ratio: 4, top_k: 512, rows: 7, ..base });
        shapes.push(Shape { start: 700, ratio: 128, top_k: 4096, ..base });
        // As in Flash.
        let flash = Shape { heads: 64, head_dim: 512, window: 128, rows: 2, ..base };
        shapes.push(Shape { start: 500, ..flash });
        shapes.push(Shape { start: 901, ratio: 4, top_k: 150, loud: 3.0, ..flash });
        shapes.push(Shape { start: 126, ratio: 128, top_k: 4096, ..flash });
    }
    shapes
}

#[test]
fn attention_in_pieces_equals_the_formula() {
    let mut benches = benches();
    for (i, shape) in shapes().into_iter().enumerate() {
        let scene = Scene::new(shape, 7 + i as u64);
        let expected = scene.expected();
        for bench in &mut benches {
            let apart = distance(&scene.computed_in_pieces(bench), &expected);
            assert!(apart <= 2e-6, "{apart} {shape:?}");
        }
    }
}

/// Queries and keys of an indexer.
struct IndexScene {
    plain: bool,
    heads: usize,
    ratio: usize,
    start: usize,
    rows: usize,
    top_k: usize,
    q_stride: usize,
    p_stride: usize,
    q: Vec<f32>,
    projected: Vec<f32>,
    session: Vec<u32>,
    keys: Vec<Vec<f32>>,
}

/// Where an indexer's query is in a row of q, and head weights among the projections.
const INDEX_Q: usize = 64;
const INDEX_WEIGHTS: usize = 9;
const INDEX_SCALE: f32 = 0.011_048_543;

impl IndexScene {
    fn format(plain: bool) -> RowFormat {
        if plain { RowFormat::F32 { width: 128 } } else { RowFormat::HadamardFp4 { width: 128 } }
    }

    fn new(plain: bool, heads: usize, start: usize, rows: usize, top_k: usize, seed: u64) -> IndexScene {
        let mut random = Random(seed);
        let ratio = 4;
        let format = Self::format(plain);
        let keys: Vec<_> = (0..(start + rows) / ratio).map(|_| random.values(128)).collect();
        let keys = Stored::new(format, &keys);
        let (q_stride, p_stride) = (INDEX_Q + heads * 128 + 32, INDEX_WEIGHTS + heads + 6);
        let (mut q, mut projected) = (Vec::new(), Vec::new());
        for _ in 0..rows {
            q.extend([f32::NAN; INDEX_Q]);
            let heads_rows: Vec<_> = (0..heads).map(|_| random.values(128)).collect();
            q.extend(Stored::new(format, &heads_rows).values.concat());
            q.extend([f32::NAN; 32]);
            projected.extend(random.values(p_stride));
        }
        let mut session = vec![0xffff_ffff; 3];
        session.extend(&keys.words);
        IndexScene {
            plain,
            heads,
            ratio,
            start,
            rows,
            top_k,
            q_stride,
            p_stride,
            q,
            projected,
            session,
            keys: keys.values,
        }
    }

    fn visible(&self, row: usize) -> usize {
        (self.start + row + 1) / self.ratio
    }

    fn stride(&self) -> usize {
        self.visible(self.rows - 1) + 3
    }

    fn context(&self, coop: bool) -> Value {
        let row_words = Self::format(self.plain).row_bytes() / 4;
        IndexScoreMany { index_heads: self.heads, plain: self.plain, row_words, coop }.context()
    }

    fn params(&self) -> IndexScoreManyParams {
        IndexScoreManyParams {
            q_stride: self.q_stride as u32,
            q: INDEX_Q as u32,
            p_stride: self.p_stride as u32,
            weights: INDEX_WEIGHTS as u32,
            scale: INDEX_SCALE,
            row0: 0,
            start: self.start as u32,
            run0: 0,
            ratio: self.ratio as u32,
            keys: 3,
            stride: self.stride() as u32,
            rows: self.rows as u32,
        }
    }

    /// Those of `index_score`, the run first.
    fn params_of_few(&self) -> [u32; 13] {
        let IndexScoreManyParams { q_stride, q, p_stride, weights, scale, start, ratio, keys, stride, .. } =
            self.params();
        [0, start, 0, keys, 0, q_stride, q, p_stride, weights, scale.to_bits(), 0, ratio, stride]
    }

    /// §2.6 in f64: the visible scores of each row.
    fn expected(&self) -> Vec<Vec<f64>> {
        let row_scores = |row: usize| {
            let score = |key: &Vec<f32>| {
                let head_score = |head: usize| {
                    let q = &self.q[row * self.q_stride + INDEX_Q + head * 128..][..128];
                    let dot: f64 = q.iter().zip(key).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                    f64::from(self.projected[row * self.p_stride + INDEX_WEIGHTS + head]) * dot.max(0.0)
                };
                (0..self.heads).map(head_score).sum::<f64>() * f64::from(INDEX_SCALE)
            };
            self.keys[..self.visible(row)].iter().map(score).collect()
        };
        (0..self.rows).map(row_scores).collect()
    }
}

fn index_scenes() -> Vec<IndexScene> {
    let mut scenes = Vec::new();
    for plain in [false, true] {
        scenes.push(IndexScene::new(plain, 64, 901, 3, 100, 1));
        scenes.push(IndexScene::new(plain, 8, 0, 9, 1, 2));
        scenes.push(IndexScene::new(plain, 8, 4310, 2, 512, 3));
    }
    scenes
}

impl IndexScene {
    /// `index_score`.
    fn computed(&self, bench: &mut Bench) -> (Buffer, Vec<f32>) {
        self.run(bench, "index_score", false, &self.params_of_few(), [32, 1])
    }

    /// `index_score_many`.
    fn computed_many(&self, bench: &mut Bench, coop: bool) -> (Buffer, Vec<f32>) {
        self.run(bench, "index_score_many", coop, &self.params(), index_tile(self.heads))
    }

    /// A kernel whose workgroups take so many keys and rows.
    fn run<P: bytemuck::Pod>(
        &self,
        bench: &mut Bench,
        kernel: &str,
        coop: bool,
        params: &P,
        [keys, rows]: [usize; 2],
    ) -> (Buffer, Vec<f32>) {
        let run = IndexRun::new(self, bench, kernel, coop, [keys, rows]);
        run.encode(bench, params);
        let computed = bench.read(&run.buffers[3], self.rows * self.stride());
        let scores = run.buffers.into_iter().nth(3).unwrap();
        (scores, computed)
    }

    fn check_scores(&self, computed: &[f32], most: f64) {
        for (row, expected) in self.expected().iter().enumerate() {
            let (computed, rest) = computed[row * self.stride()..][..self.stride()].split_at(expected.len());
            let apart = distance(computed, expected);
            assert!(apart <= most, "{apart} row {row}");
            assert!(rest.iter().all(|v| v.is_nan()), "written beyond the visible ones, row {row}");
        }
    }

    fn check_selection(&self, bench: &mut Bench, scores: &Buffer, computed: &[f32]) {
        let chosen = bench.buffer(&vec![u32::MAX; self.rows * self.top_k]);
        let flags = bench.buffer(&vec![0u32; self.rows]);
        select(bench, [scores, &chosen, &flags], self.rows, [self.start, self.ratio, self.top_k, self.stride()]);
        let chosen: Vec<u32> = bench.read(&chosen, self.rows * self.top_k);
        for (row, chosen) in chosen.chunks(self.top_k).enumerate() {
            assert_eq!(chosen, best(&computed[row * self.stride()..][..self.visible(row)], self.top_k), "row {row}");
        }
        assert_eq!(bench.read::<u32>(&flags, self.rows), vec![0; self.rows]);
    }
}

/// `index_select` for a run from position `start`: of scores into chosen rows, and flags.
fn select(bench: &mut Bench, buffers: [&Buffer; 3], rows: usize, [start, ratio, top_k, stride]: [usize; 4]) {
    let kernel = bench.kernels.get("index_select", context! { states => 1 }).unwrap();
    let params = [0, start, 0, 0, 0, 0, ratio, top_k, stride].map(|v| v as u32);
    let [scores, chosen, flags] = buffers.map(Buffer::all);
    // There are no tables, which one session needs none of.
    let tables = bench.buffer(&[0u32; 2]);
    bench.commands.run(&kernel, &[scores, chosen, flags, tables.all()], &params, [1, rows as u32, 1]);
}

/// A kernel of scores with its buffers.
struct IndexRun {
    kernel: Arc<Kernel>,
    /// The fourth has the scores.
    buffers: Vec<Buffer>,
    groups: [u32; 3],
}

impl IndexRun {
    /// A kernel whose workgroups take so many keys and rows.
    fn new(scene: &IndexScene, bench: &mut Bench, kernel: &str, coop: bool, [keys, rows]: [usize; 2]) -> IndexRun {
        let session = bench.buffer(&scene.session);
        let mut buffers = vec![bench.buffer(&scene.q), bench.buffer(&scene.projected)];
        let scores = bench.empty(scene.rows * scene.stride());
        match kernel {
            // There are no tables, which one session needs none of.
            "index_score" => buffers.extend([bench.buffer(&[0u32; 2]), scores, session]),
            _ => buffers.extend([session, scores]),
        }
        let groups = [scene.visible(scene.rows - 1).div_ceil(keys) as u32, scene.rows.div_ceil(rows) as u32, 1];
        IndexRun { kernel: bench.kernel(kernel, context! { states => 1, ..scene.context(coop) }), buffers, groups }
    }

    fn encode<P: bytemuck::Pod>(&self, bench: &mut Bench, params: &P) {
        bench.commands.run(
            &self.kernel,
            &self.buffers.iter().map(Buffer::all).collect::<Vec<_>>(),
            params,
            self.groups,
        );
    }
}

#[test]
fn index_scores_and_selection_equal_the_formula() {
    for mut bench in benches() {
        for scene in index_scenes() {
            let (scores, computed) = scene.computed(&mut bench);
            scene.check_scores(&computed, 2e-6);
            scene.check_selection(&mut bench, &scores, &computed);
        }
    }
}

#[test]
fn index_scores_of_many_rows_equal_the_formula() {
    for mut bench in benches() {
        for scene in index_scenes() {
            let (_, computed) = scene.computed_many(&mut bench, false);
            // Numbers of 4 bits are exact in f16.
            scene.check_scores(&computed, if scene.plain { F16_DISTANCE } else { 2e-6 });
        }
    }
}

#[test]
fn emulated_cooperative_index_scores_equal_the_formula() {
    let Some(mut bench) = emulating_bench() else { return };
    // Each way to store keys with one number of heads, of which the kernel knows nothing of the other: software takes long to
    // compile an emulation.
    for scene in index_scenes().into_iter().filter(|scene| scene.plain == (scene.heads == 8)) {
        let (_, computed) = scene.computed_many(&mut bench, true);
        scene.check_scores(&computed, if scene.plain { F16_DISTANCE } else { 2e-6 });
    }
}

#[test]
fn cooperative_index_scores_equal_their_plain_twin() {
    let Some(mut bench) = cooperative_bench() else { return };
    for scene in index_scenes() {
        let (_, computed) = scene.computed_many(&mut bench, true);
        scene.check_scores(&computed, if scene.plain { F16_DISTANCE } else { 2e-6 });
        let (_, twin) = scene.computed_many(&mut bench, false);
        for (row, (computed, twin)) in computed.chunks(scene.stride()).zip(twin.chunks(scene.stride())).enumerate() {
            let visible = scene.visible(row);
            let twin: Vec<f64> = twin[..visible].iter().map(|&v| f64::from(v)).collect();
            let apart = distance(&computed[..visible], &twin);
            // Drivers leave out that the twin rounds its queries to halves, which changes those of plain arithmetic.
            println!("{apart:.1e} from the twin: row {row}, plain arithmetic: {}", scene.plain);
            assert!(apart <= if scene.plain { F16_DISTANCE } else { 2e-6 }, "{apart} row {row}");
        }
    }
}

/// The `top_k` highest, ascending, earlier ones of equals; nothing if there are not more.
fn best(scores: &[f32], top_k: usize) -> Vec<u32> {
    if scores.len() <= top_k {
        return vec![u32::MAX; top_k];
    }
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
    order.truncate(top_k);
    order.sort_unstable();
    order
}

#[test]
fn of_equal_scores_the_earlier_rows_are_chosen_and_infinite_ones_are_flagged() {
    let [_, mut bench] = benches();
    let (rows, top_k, start, ratio) = (3, 40, 4000, 4);
    let stride = (start + rows) / ratio;
    let mut random = Random(5);
    // Few different scores, zeros of both signs among them.
    let mut all: Vec<f32> = (0..rows * stride).map(|_| [-2.5, -0.0, 0.0, 1e-30, 3.0][random.below(5)]).collect();
    all[2 * stride + 17] = f32::INFINITY;
    let scores = bench.buffer(&all);
    let (chosen, flags) = (bench.buffer(&vec![u32::MAX; rows * top_k]), bench.buffer(&vec![0u32; rows]));
    select(&mut bench, [&scores, &chosen, &flags], rows, [start, ratio, top_k, stride]);
    let chosen: Vec<u32> = bench.read(&chosen, rows * top_k);
    for row in 0..rows {
        let visible = (start + row + 1) / ratio;
        let expected = best(&all[row * stride..][..visible], top_k);
        assert_eq!(chosen[row * top_k..][..top_k], expected, "row {row}");
    }
    assert_eq!(bench.read::<u32>(&flags, rows), [0, 0, 1]);
}

/// Microseconds of what `encode` encodes, by the device's clock when it is warm.
fn time_us(bench: &mut Bench, mut encode: impl FnMut(&mut Bench)) -> f64 {
    let warm = std::time::Instant::now();
    while warm.elapsed().as_millis() < 300 {
        encode(bench);
        bench.commands.submit();
        bench.device.wait().unwrap();
    }
    const TIMES: u32 = 5;
    bench.commands.timer = Timer::new(&bench.device);
    bench.commands.stage("measured");
    (0..TIMES).for_each(|_| encode(bench));
    bench.commands.stage("end");
    bench.commands.submit();
    bench.device.wait().unwrap();
    let mut timer = bench.commands.timer.take().expect("a device whose clock can be read");
    timer.take().unwrap()[0].1 / f64::from(TIMES)
}

/// Kernels for 2,048 rows, as many as a pass of Flash has, on a hardware adapter:
/// `cargo test --release -p infall-gpu measure_attention -- --ignored --nocapture`
#[test]
#[ignore = "takes the time on a hardware adapter"]
fn measure_attention() {
    let [_, mut bench] = benches();
    if bench.device.report().kind == "software" {
        println!("skipped: no hardware adapter");
        return;
    }
    let coops = if cooperative(bench.device.report()) { vec![false, true] } else { vec![false] };
    println!("{:?}", bench.device.report());
    measure_attend_many(&mut bench, &coops, 2048, 8192);
    measure_index_score_many(&mut bench, &coops, 2048, 8191);
}

fn measure_attend_many(bench: &mut Bench, coops: &[bool], rows: usize, start: usize) {
    let flash = Shape {
        heads: 64,
        head_dim: 512,
        plain: false,
        ratio: 0,
        top_k: 512,
        window: 128,
        start,
        rows,
        fresh: true,
        loud: 1.0,
    };
    for (ratio, top_k) in [(0, 512), (4, 512), (128, 8192)] {
        let shape = Shape { ratio, top_k, ..flash };
        let scene = Scene::new(shape, 1);
        let run = ManyRun::new(&scene, bench);
        let keys = |row| shape.counts(start + row);
        let all_keys: usize = (0..rows).map(|row| keys(row).0 + keys(row).1.min(top_k)).sum();
        let flops = all_keys as f64 * (4 * shape.heads * shape.head_dim) as f64;
        let mut twin: Option<Vec<f64>> = None;
        for (&coop, tiling) in coops.iter().flat_map(|coop| TILINGS.iter().rev().map(move |&tiling| (coop, tiling))) {
            let many =
                AttendMany { heads: 64, head_dim: 512, plain: false, row_words: shape.row_words(), coop, tiling };
            let kernel = bench.kernels.get("attend_many", many.context()).unwrap();
            let us = time_us(bench, |bench| run.encode(bench, &kernel, many.groups(rows)));
            let out: Vec<f32> = bench.read(&run.buffers[6], rows * shape.heads * shape.head_dim);
            let twin = twin.get_or_insert_with(|| out.iter().map(|&v| f64::from(v)).collect());
            let apart = distance(&out, twin);
            let matrices = if coop { "matrices" } else { "plain" };
            println!(
                "attend_many ratio {ratio:3} {matrices:8} {:2} heads {} subgroups: {us:9.1} µs {:6.1} TFLOP/s, {apart:.1e} apart",
                tiling.heads,
                tiling.subgroups,
                flops / us / 1e6,
            );
            assert!(apart <= F16_DISTANCE, "{apart}");
        }
    }
}

fn measure_index_score_many(bench: &mut Bench, coops: &[bool], rows: usize, start: usize) {
    let scene = IndexScene::new(false, 64, start, rows, 512, 1);
    let flops = (0..rows).map(|row| scene.visible(row)).sum::<usize>() as f64 * (2 * 64 * 128) as f64;
    for &coop in coops {
        let run = IndexRun::new(&scene, bench, "index_score_many", coop, index_tile(64));
        let us = time_us(bench, |bench| run.encode(bench, &scene.params()));
        let matrices = if coop { "matrices" } else { "plain" };
        println!("index_score_many {matrices:8}: {us:9.1} µs {:6.1} TFLOP/s", flops / us / 1e6);
    }
    let run = IndexRun::new(&scene, bench, "index_score", false, [32, 1]);
    let us = time_us(bench, |bench| run.encode(bench, &scene.params_of_few()));
    println!("index_score: {us:9.1} µs {:6.1} TFLOP/s", flops / us / 1e6);
}
