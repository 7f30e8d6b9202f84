//! Products of few rows against the same in f64, floats and integers, whatever is computed together.

use std::sync::Arc;
use std::time::Instant;

use crate::device::{Checks, Choice, Device, adapters};
use crate::format::{Format, code_book};
use crate::jobs::{Job, Jobs};
use crate::kernel::{Buffer, Commands, Kernels};
use crate::kit::{Matvec, digits_context, has_integers};
use crate::matmul::tests::{Weights, distance, random_slab, wide};
use crate::pass::digits_bytes;
use crate::self_check::Random;

/// What two digits of 7 bits cost: a value is off by 2^-15 of the largest of 16, and much less on the whole.
const DIGITS_ERROR: f64 = 1e-4;

/// What sums of f32 cost.
const FLOATS_ERROR: f64 = 2e-6;

struct Bench {
    device: Arc<Device>,
    kernels: Arc<Kernels>,
    commands: Commands,
}

impl Bench {
    fn new(choice: Choice, checks: Checks) -> Bench {
        let device = Device::open(choice, checks).unwrap();
        let kernels = Arc::new(Kernels::new(device.clone()));
        let commands = Commands::new(device.clone(), kernels.clone());
        Bench { device, kernels, commands }
    }

    fn upload(&self, bytes: &[u8]) -> Buffer {
        let buffer = Buffer::new(&self.device, "test", bytes.len() as u64).unwrap();
        self.device.queue.write_buffer(&buffer.raw, 0, bytes);
        buffer
    }
}

/// A job of each format on the same inputs, and the norm's weights.
struct Case {
    weights: Vec<Weights>,
    x: Vec<f32>,
    cols: usize,
    norm: Option<Vec<f32>>,
}

const EPSILON: f32 = 1e-6;

/// So many rows together, as integers where formats allow, of inputs that were laid out for lanes before.
#[derive(Clone, Copy, Debug)]
struct How {
    together: usize,
    digits: bool,
    made: bool,
}

impl How {
    /// As a model's passes do it, where no kernel that made the inputs laid them out.
    fn usual(together: usize, digits: bool) -> How {
        How { together, digits, made: digits && together > 1 }
    }
}

impl Case {
    fn new(random: &mut Random, formats: &[Format], (rows, outputs, cols): (usize, usize, usize), norm: bool) -> Case {
        let each = |(i, &format): (usize, &Format)| Weights::random(&mut *random, format, outputs + 5 * i, cols);
        let weights = formats.iter().enumerate().map(each).collect();
        let mut x = random.values(rows * cols);
        // Rows of all sizes; a chunk of nothing in each.
        for (row, x) in x.chunks_exact_mut(cols).enumerate() {
            let size = [1.0, 1e-6, 1e6, 300.0][row % 4];
            x.iter_mut().for_each(|v| *v *= size);
            x[..32].fill(0.0);
        }
        let norm = norm.then(|| random.values(cols));
        Case { weights, x, cols, norm }
    }

    fn outputs(&self) -> usize {
        self.weights.iter().map(|weights| weights.rows.len()).sum()
    }

    /// `[rows, outputs]` of rows `first..first + rows`.
    fn run(&self, bench: &mut Bench, (first, rows): (usize, usize), how: How) -> Vec<f32> {
        let How { together, digits, made } = how;
        let mut slab = vec![0; 16];
        let mut y_at = 0;
        let job = |weights: &Weights| {
            y_at += weights.rows.len();
            Job { matrix: weights.pack(&mut slab), x_at: 0, y_at: y_at - weights.rows.len() }
        };
        let jobs: Vec<Job> = self.weights.iter().map(job).collect();
        let group_table = slab.len() as u32 / 16;
        slab.extend_from_slice(bytemuck::cast_slice(&Jobs::group_words(&jobs)));
        let norm = slab.len() as u32 / 16;
        slab.extend_from_slice(bytemuck::cast_slice(self.norm.as_deref().unwrap_or_default()));
        let jobs = Jobs { jobs, table: 0, group_table };
        let (outputs, groups) = jobs.matvec();
        let formats = jobs.formats();
        let made = made && digits && has_integers(&formats);
        let norm_is_some = self.norm.is_some();
        let matvec = Matvec { formats, rows: together, outputs, norm: norm_is_some, digits, made };
        let kernel = bench.kernels.get("matvec", matvec.context()).unwrap();
        let slab = bench.upload(&slab);
        let x = bench.upload(bytemuck::cast_slice(&self.x[first * self.cols..][..rows * self.cols]));
        let y = bench.upload(&vec![0xff; 4 * rows * self.outputs()]);
        let book = bench.upload(&code_book());
        let halves = self.cols as u32 / 16;
        let stride = self.cols as u32 / 4;
        let params = [group_table, rows as u32, stride, self.outputs() as u32, norm, EPSILON.to_bits(), halves];
        let laid_out = bench.upload(&vec![0xff; rows * digits_bytes(self.cols) as usize]);
        let transposed = bench.upload(&vec![0xff; 4 * rows * self.cols]);
        let mut buffers = vec![slab.all(), if made { transposed.all() } else { x.all() }, y.all()];
        if jobs.formats().contains(&Format::Iq2Xxs) {
            buffers.push(book.all());
        }
        if made {
            let kernel = bench.kernels.get("digits", digits_context(norm_is_some)).unwrap();
            let from = [x.all(), laid_out.all(), transposed.all(), slab.all()];
            let from = if norm_is_some { &from[..] } else { &from[..3] };
            bench.commands.run(
                &kernel,
                from,
                &[stride, halves, norm, EPSILON.to_bits()],
                [halves.div_ceil(256), rows as u32, 1],
            );
            buffers.push(laid_out.all());
        }
        bench.commands.run(&kernel, &buffers, &params, [groups, rows.div_ceil(together) as u32, 1]);
        let bytes = bench.commands.read((&y, 0), (4 * rows * self.outputs()) as u64).unwrap();
        bytemuck::pod_collect_to_vec(&bytes)
    }

    /// Largest distance of a row of a job from the product in f64.
    fn error(&self, y: &[f32]) -> f64 {
        let input = |x: &[f32]| -> Vec<f64> {
            let Some(norm) = &self.norm else { return wide(x) };
            let square: f64 = wide(x).iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
            let scale = 1.0 / (square + f64::from(EPSILON)).sqrt();
            wide(x).iter().zip(norm).map(|(v, &w)| v * scale * f64::from(w)).collect()
        };
        let inputs: Vec<Vec<f64>> = self.x.chunks_exact(self.cols).map(input).collect();
        let inputs: Vec<&[f64]> = inputs.iter().map(|x| &x[..]).collect();
        let (mut worst, mut y_at) = (0.0f64, 0);
        for weights in &self.weights {
            for (row, expected) in weights.product(&inputs).into_iter().enumerate() {
                let found = wide(&y[row * self.outputs() + y_at..][..expected.len()]);
                let error = distance(found, expected);
                worst = if error <= worst { worst } else { error };
            }
            y_at += weights.rows.len();
        }
        worst
    }
}

/// On software, whose results are the same everywhere, or else on hardware; without any the tests fail.
fn software() -> Bench {
    let usable = adapters().into_iter().filter(|adapter| adapter.lacks.is_empty());
    let adapter = usable.min_by_key(|adapter| adapter.kind != "software");
    let adapter = adapter.expect("no adapter can run the kernels: install Debian's mesa-vulkan-drivers and libvulkan1");
    Bench::new(Choice::Index(adapter.index), Checks::Off)
}

#[test]
fn products_of_few_rows_equal_f64() {
    let mut bench = software();
    let mut random = Random(5);
    let floats = [Format::F32, Format::F16, Format::Bf16];
    for format in Format::ALL {
        for digits in [false, true] {
            if !digits && !floats.contains(&format) && ![Format::Q8_0, Format::Q2K].contains(&format) {
                // The stages of Exact are tested with them.
                continue;
            }
            let most = if digits && !floats.contains(&format) { DIGITS_ERROR } else { FLOATS_ERROR };
            // Inputs of more than a tile, and fewer outputs than a workgroup has.
            for (rows, outputs, cols, together) in [(1, 41, 4608, 1), (3, 9, 1280, 4)] {
                let case = Case::new(&mut random, &[format], (rows, outputs, cols), rows == 3);
                let error = case.error(&case.run(&mut bench, (0, rows), How::usual(together, digits)));
                assert!(error < most, "{}, digits: {digits}, {rows} rows of {cols}: {error:e}", format.name());
            }
        }
    }
    let case = Case::new(&mut random, &[Format::F16, Format::Q8_0, Format::Iq2Xxs], (5, 37, 512), true);
    let error = case.error(&case.run(&mut bench, (0, 5), How::usual(8, true)));
    assert!(error < DIGITS_ERROR, "three formats at once: {error:e}");
}

#[test]
fn a_product_of_few_rows_does_not_depend_on_other_rows() {
    let mut bench = software();
    let integers = vec![Format::Q8_0, Format::Q2K, Format::Iq2Xxs];
    // So many outputs that 32 lanes take four in place of two.
    let many = (vec![Format::Q8_0], 6200, 288);
    for (digits, (formats, outputs, cols)) in [
        (false, (vec![Format::Q2K], 40, 4608)),
        (true, (vec![Format::F16, Format::Q2K], 40, 4608)),
        (true, (integers, 40, 1280)),
        (true, many),
    ] {
        let case = Case::new(&mut Random(6), &formats, (7, outputs, cols), true);
        let all = case.run(&mut bench, (0, 7), How::usual(8, digits));
        let error = case.error(&all);
        assert!(error < if digits { DIGITS_ERROR } else { FLOATS_ERROR }, "{formats:?}: {error:e}");
        let made = How { together: 1, digits, made: digits };
        let ways = [(0, 1, How::usual(1, digits)), (3, 2, How::usual(2, digits)), (3, 4, How::usual(4, digits))];
        for (first, rows, how) in ways.into_iter().chain([(6, 1, How::usual(1, digits)), (0, 1, made), (5, 1, made)]) {
            let some = case.run(&mut bench, (first, rows), how);
            let expected = &all[first * case.outputs()..][..rows * case.outputs()];
            let differ = (0..some.len()).filter(|&i| some[i].to_bits() != expected[i].to_bits()).count();
            assert_eq!(differ, 0, "{how:?}, {rows} rows from {first}, of {}", some.len());
        }
    }
}

/// `cargo test --release -p infall-gpu measure_matvec -- --ignored --nocapture`
#[test]
#[ignore = "measures; for hardware"]
fn measure_matvec() {
    if let Err(error) = Device::open(Choice::Hardware, Checks::Off) {
        println!("skipped: {error}");
        return;
    }
    let mut bench = Bench::new(Choice::Hardware, Checks::Off);
    let mut random = Random(7);
    // The head fills no cache; the others do, but for the first time.
    let shapes = [(129_280, 4096), (40_960, 1024), (8192, 4096), (4096, 8192), (64, 1024)];
    for ((rows, cols), together) in shapes.into_iter().flat_map(|shape| [1, 2, 4, 8].map(|together| (shape, together)))
    {
        let (mut slab, matrices) = random_slab(&mut random, &[(Format::Q8_0, rows, cols)]);
        let bytes = slab.len();
        let jobs = vec![Job { matrix: matrices[0], x_at: 0, y_at: 0 }];
        let group_table = slab.len() as u32 / 16;
        slab.extend_from_slice(bytemuck::cast_slice(&Jobs::group_words(&jobs)));
        let jobs = Jobs { jobs, table: 0, group_table };
        let (outputs, groups) = jobs.matvec();
        let matvec = Matvec { formats: jobs.formats(), rows: together, outputs, norm: false, digits: true, made: true };
        let kernel = bench.kernels.get("matvec", matvec.context()).unwrap();
        let digits = bench.kernels.get("digits", digits_context(false)).unwrap();
        let slab = bench.upload(&slab);
        let x = bench.upload(bytemuck::cast_slice(&random.values(together * cols)));
        let y = bench.upload(&vec![0; 4 * together * rows]);
        let made = bench.upload(&vec![0; together * digits_bytes(cols) as usize]);
        let transposed = bench.upload(&vec![0; 4 * together * cols]);
        let halves = cols as u32 / 16;
        let params = [group_table, together as u32, cols as u32 / 4, rows as u32, 0, 0, halves];
        let mut least_s = f64::MAX;
        for _ in 0..3 {
            bench.device.wait().unwrap();
            let began = Instant::now();
            for _ in 0..90 {
                // Of one row whoever makes the inputs does it.
                if together > 1 {
                    let params = [cols as u32 / 4, halves, 0, 0];
                    let groups = [halves.div_ceil(256), together as u32, 1];
                    bench.commands.run(&digits, &[x.all(), made.all(), transposed.all()], &params, groups);
                }
                let buffers = [slab.all(), transposed.all(), y.all(), made.all()];
                bench.commands.run(&kernel, &buffers, &params, [groups, 1, 1]);
            }
            bench.commands.submit();
            bench.device.wait().unwrap();
            least_s = least_s.min(began.elapsed().as_secs_f64() / 90.0);
        }
        let (us, rate) = (least_s * 1e6, bytes as f64 / least_s / 1e9);
        println!("Q8_0 {rows} x {cols}, {together} rows: {us:.1} us, {rate:.0} GB/s");
    }
}
