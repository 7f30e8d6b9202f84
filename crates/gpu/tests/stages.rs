//! Every stage of the backend: against the float64 reference, and against the processor's Exact on the same inputs.

mod common;
#[path = "../../cpu/tests/common/stages.rs"]
mod stages;

use common::{advance, export, in_plain, on_cpu, on_gpu, rows, tokens};
use cpu::CpuBackend;
use gpu::{GpuBackend, GpuPass, GpuState};
use model::state::LayerDelta;
use model::{Activation, Arithmetic, Backend, Batch, Cancel, Error, Observer, Precision, Stage, SubLayer, forward};
use stages::{Compared, stages};

/// Largest relative L2 error of a stage of Exact against the reference: the processor's own bound.
const BOUND: f64 = 3e-6;
/// Of a stage of Fast: in its products of many rows both factors are halves, which have 11 bits, so that each is off by 2^-12 of
/// its size on the average; stages that make several products of one another add a few of those.
const FAST_BOUND: f64 = 2e-3;
/// Of a stage of Fast over few rows against the processor's Exact: inputs are two digits, off by 2^-15 of the largest of 16.
const FEW_BOUND: f64 = 3e-4;
/// Of a stage of Exact against the processor's Exact.
const CPU_BOUND: f64 = 2e-6;
/// Share of the bytes of stored rows that may differ from the processor's: where its value lies within a few 1e-7 of itself of
/// the border between two codes, which is once in some 100,000 codes.
const ROUNDED_OTHERWISE: f64 = 2e-4;

#[test]
fn every_stage_of_exact_meets_the_reference() {
    stages(&on_gpu("tiny-iq2", in_plain(Precision::Exact))).hold(|_| 0.0..=BOUND);
}

#[test]
fn every_stage_of_fast_is_near_the_reference() {
    stages(&on_gpu("tiny-iq2", in_plain(Precision::Fast))).hold(|_| 0.0..=FAST_BOUND);
}

/// Runs a stage on both backends.
macro_rules! both {
    ($pair:ident, $stage:ident($($argument:expr),*)) => {
        $pair.cpu.$stage($($argument,)* &mut $pair.cpu_pass).unwrap();
        $pair.gpu.$stage($($argument,)* &mut $pair.gpu_pass).unwrap();
    };
}
/// A pass on both backends, of which the GPU's gets the processor's inputs before each stage.
struct Pair<'a> {
    cpu: &'a CpuBackend,
    gpu: &'a GpuBackend,
    cpu_pass: cpu::Pass,
    gpu_pass: GpuPass,
    compared: Compared,
    /// What the processor made that the GPU goes on with.
    given: &'static [Activation],
}

impl Pair<'_> {
    /// Compares what `stages` made, and gives the processor's to the GPU where the next stage reads it.
    fn check(&mut self, stages: &[Stage], what: &str, activation: Activation) {
        let expected = self.cpu.read(&self.cpu_pass, activation);
        let ours = self.gpu.read(&self.gpu_pass, activation);
        stages.iter().for_each(|&stage| self.compared.check(stage, what, &ours, &expected));
        if self.given.contains(&activation) {
            self.gpu.write(&mut self.gpu_pass, activation, &expected);
        }
    }

    /// Compares chosen rows or experts, which must be the same ones in the same order.
    fn same(&mut self, what: &str, activation: Activation) {
        let [ours, expected] = [self.gpu.read(&self.gpu_pass, activation), self.cpu.read(&self.cpu_pass, activation)];
        assert_eq!(ours, expected, "{what}: {activation:?}");
    }

    fn attention(&mut self, layer: usize, past: (&model::State, &GpuState)) {
        let what = format!("layer {layer}");
        let (cpu, gpu) = (self.cpu, self.gpu);
        let (on_cpu, on_gpu) = ([past.0], [past.1]);
        both!(self, hc_pre(layer, SubLayer::Attention));
        self.check(&[Stage::HcPre(SubLayer::Attention)], &what, Activation::Input);
        cpu.project(layer, &on_cpu, &mut self.cpu_pass).unwrap();
        gpu.project(layer, &on_gpu, &mut self.gpu_pass).unwrap();
        self.check(&[Stage::Project], &what, Activation::LowQueries);
        self.check(&[Stage::Project], &what, Activation::Queries);
        cpu.compress(layer, &on_cpu, &mut self.cpu_pass).unwrap();
        gpu.compress(layer, &on_gpu, &mut self.gpu_pass).unwrap();
        cpu.index(layer, &on_cpu, &mut self.cpu_pass).unwrap();
        gpu.index(layer, &on_gpu, &mut self.gpu_pass).unwrap();
        self.same(&what, Activation::IndexRows);
        cpu.attend(layer, &on_cpu, &mut self.cpu_pass).unwrap();
        gpu.attend(layer, &on_gpu, &mut self.gpu_pass).unwrap();
        // Keys and compressed rows have no activation of their own: a wrong one is seen here.
        self.check(&[Stage::Compress, Stage::Index, Stage::Attend], &what, Activation::Heads);
        both!(self, attention_out(layer));
        self.check(&[Stage::AttentionOut], &what, Activation::Output);
        both!(self, hc_post(layer, SubLayer::Attention));
        self.check(&[Stage::HcPost(SubLayer::Attention)], &what, Activation::Streams);
    }

    fn experts(&mut self, layer: usize) {
        let what = format!("layer {layer}");
        let (cpu, gpu, cancel) = (self.cpu, self.gpu, Cancel::default());
        both!(self, hc_pre(layer, SubLayer::Experts));
        self.check(&[Stage::HcPre(SubLayer::Experts)], &what, Activation::Input);
        let on_cpu = cpu.route(layer, &mut self.cpu_pass).unwrap();
        let on_gpu = gpu.route(layer, &mut self.gpu_pass).unwrap();
        self.same(&what, Activation::Experts);
        self.check(&[Stage::Route], &what, Activation::ExpertWeights);
        both!(self, shared_expert(layer));
        let leases = cpu.lease(layer, &on_cpu).unwrap();
        cpu.routed_experts(layer, on_cpu, leases, &cancel, &mut self.cpu_pass).unwrap();
        let leases = gpu.lease(layer, &on_gpu).unwrap();
        gpu.routed_experts(layer, on_gpu, leases, &cancel, &mut self.gpu_pass).unwrap();
        self.check(&[Stage::SharedExpert, Stage::RoutedExperts], &what, Activation::Output);
        both!(self, hc_post(layer, SubLayer::Experts));
        self.check(&[Stage::HcPost(SubLayer::Experts)], &what, Activation::Streams);
    }
}

/// Tokens of the past: windows of 4 and of 128 have closed in it, and do so again a few rows on.
const PAST: usize = 250;

/// Compares every stage over all of `tokens` but the past, which is the processor's on both.
fn compare(cpu: &CpuBackend, gpu: &GpuBackend, tokens: &[u32], past: usize, given: &'static [Activation]) -> Compared {
    let start = past;
    let (mut past, mut gpu_past) = (cpu.new_state().unwrap(), gpu.new_state().unwrap());
    if start > 0 {
        advance(cpu, &mut past, &tokens[..start]);
        gpu_past = gpu.import(&mut &export(cpu, &past)[..]).unwrap();
    }
    let batch = || Batch::new(rows(0, start, &tokens[start..]), &[start], cpu.config()).unwrap();
    let (cpu_pass, gpu_pass) = (cpu.begin(batch(), &[&past]).unwrap(), gpu.begin(batch(), &[&gpu_past]).unwrap());
    let mut pair = Pair { cpu, gpu, cpu_pass, gpu_pass, compared: Compared::default(), given };
    both!(pair, embed());
    pair.check(&[Stage::Embed], "embed", Activation::Streams);
    for layer in 0..cpu.config().layers {
        pair.attention(layer, (&past, &gpu_past));
        pair.experts(layer);
    }
    let (expected, ours) = (cpu.head(&mut pair.cpu_pass).unwrap(), gpu.head(&mut pair.gpu_pass).unwrap());
    pair.compared.check(Stage::Head, "head", &ours, &expected);
    pair.compared
}

/// Passes of so many rows, each behind the same past.
fn meets_the_cpu(name: &str, counts: &[usize]) {
    let (cpu, gpu) = (on_cpu(name, Arithmetic::Plain), on_gpu(name, in_plain(Precision::Exact)));
    for &count in counts {
        println!("{name}, {count} rows");
        let given = &[Activation::Streams, Activation::Input, Activation::Output, Activation::Heads];
        compare(&cpu, &gpu, &tokens(name, PAST + count), PAST, given).hold(|_| 0.0..=CPU_BOUND);
    }
}

/// Of few rows in Fast the kernels that make inputs also lay them out for the lanes of products: so these go on with their own.
#[test]
fn every_stage_of_fast_with_few_rows_is_near_the_cpu() {
    for name in ["tiny-iq2", "tiny-q8", "mixed3-mixed"] {
        let (cpu, gpu) = (on_cpu(name, Arithmetic::Plain), on_gpu(name, in_plain(Precision::Fast)));
        for count in [1, 7] {
            println!("{name}, {count} rows");
            let given = &[Activation::Streams, Activation::Output];
            // Without a past: that of the processor's Exact is not one of Fast.
            compare(&cpu, &gpu, &tokens(name, count), 0, given).hold(|_| 0.0..=FEW_BOUND);
        }
    }
}

/// Of a few rows more everything but routed experts is computed by tiles (promise.rs asserts which).
#[test]
fn every_stage_of_fast_with_experts_choice_by_choice_is_near_the_cpu() {
    for name in ["tiny-iq2", "mixed3-mixed"] {
        let (cpu, gpu) = (on_cpu(name, Arithmetic::Plain), on_gpu(name, in_plain(Precision::Fast)));
        let given = &[Activation::Streams, Activation::Input, Activation::Output];
        compare(&cpu, &gpu, &tokens(name, 10), 0, given).hold(|_| 0.0..=FAST_BOUND);
    }
}

#[test]
fn every_stage_of_tiny_iq2_meets_the_cpu() {
    // A decoded token, a few rows, and more than a ring has room for.
    meets_the_cpu("tiny-iq2", &[1, 7, 66]);
}

#[test]
fn every_stage_of_tiny_q8_meets_the_cpu() {
    meets_the_cpu("tiny-q8", &[1, 12]);
}

#[test]
fn every_stage_of_tiny_q4_meets_the_cpu() {
    meets_the_cpu("tiny-q4", &[1, 12]);
}

#[test]
fn every_stage_of_three_sizes_of_experts_meets_the_cpu() {
    meets_the_cpu("mixed3-mixed", &[1, 12]);
}

#[test]
fn every_stage_of_pro_meets_the_cpu() {
    meets_the_cpu("pro-iq2", &[1, 12]);
}

/// Makes the stored rows of a pass on the GPU from the processor's inputs.
struct Follow<'a> {
    gpu: &'a GpuBackend,
    past: &'a GpuState,
    pass: GpuPass,
}

impl Observer<CpuBackend> for Follow<'_> {
    fn after(&mut self, layer: Option<usize>, stage: Stage, cpu: &CpuBackend, pass: &cpu::Pass) -> Result<(), Error> {
        if let (Some(layer), Stage::HcPre(SubLayer::Attention)) = (layer, stage) {
            self.gpu.write(&mut self.pass, Activation::Input, &cpu.read(pass, Activation::Input));
            self.gpu.project(layer, &[self.past], &mut self.pass)?;
            self.gpu.compress(layer, &[self.past], &mut self.pass)?;
            // What was encoded runs before anything of it is read, as it would before the head.
            self.gpu.read(&self.pass, Activation::LowQueries);
        }
        Ok(())
    }
}

/// Rows of keys and of the indexer, rounded to FP8, BF16 and FP4 by both backends: the same codes but at borders.
fn rounds_as_the_cpu(name: &str) {
    let (cpu, gpu) = (on_cpu(name, Arithmetic::Official), on_gpu(name, common::in_precision(Precision::Exact)));
    let tokens = tokens(name, 160);
    let (mut ours, mut expected) = (gpu.new_state().unwrap(), cpu.new_state().unwrap());
    let pass = gpu.begin(stages::batch(tokens.iter().copied(), gpu.config()), &[&ours]).unwrap();
    let mut follow = Follow { gpu: &gpu, past: &ours, pass };
    forward(&cpu, rows(0, 0, &tokens), &mut [&mut expected], &Cancel::default(), &mut follow).unwrap();
    let pass = follow.pass;
    gpu.commit(pass, &mut [&mut ours]);
    let ours = cpu.import(&mut &export(&gpu, &ours)[..]).unwrap();
    let (mut bytes, mut differ) = (0, 0);
    let mut compare = |ours: &[u8], expected: &[u8]| {
        assert_eq!(ours.len(), expected.len());
        bytes += ours.len();
        differ += ours.iter().zip(expected).filter(|(ours, expected)| ours != expected).count();
    };
    for layer in 0..cpu.config().layers {
        let none = LayerDelta::default();
        let (ours, expected) = (ours.view(layer, &none), expected.view(layer, &none));
        let window = cpu.config().window;
        (tokens.len() - window..tokens.len()).for_each(|position| compare(ours.raw(position), expected.raw(position)));
        for (ours, expected) in [(ours.main(), expected.main()), (ours.index(), expected.index())] {
            let Some((ours, expected)) = ours.zip(expected) else { continue };
            let ratio = cpu.config().compress_ratios[layer];
            (0..tokens.len() / ratio).for_each(|row| compare(ours.row(row), expected.row(row)));
        }
    }
    println!("{name}: {differ} of {bytes} bytes of stored rows differ");
    assert!(bytes > 100_000 && differ as f64 <= ROUNDED_OTHERWISE * bytes as f64, "{name}: {differ} of {bytes} bytes");
}

#[test]
fn rows_round_as_on_the_cpu() {
    for name in ["tiny-iq2", "mixed3-mixed"] {
        rounds_as_the_cpu(name);
    }
}
