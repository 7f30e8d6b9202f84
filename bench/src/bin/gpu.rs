//! A model of the real size on a GPU: time of loading, prefill and decode, and of each stage; resident or streamed; and
//! whether where experts live changes a bit.
//!
//! `cargo run --release -p infall-bench --bin gpu -- FILE --gpu N`

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use gguf::Gguf;
use gpu::{Checks, Choice, GpuBackend, Options, Placement, Slabs};
use model::{Arithmetic, Backend, Cancel, Model, NoObserver, Observer, Precision, Row, Stage, forward};
use store::{ExpertExtents, Residency, Source};

/// What to measure.
#[derive(Parser)]
struct What {
    /// Model file.
    file: PathBuf,
    /// Number of the adapter (`infall devices` lists them).
    #[arg(long, default_value_t = 0)]
    gpu: usize,
    /// Tokens of context before decoding is timed; several in turn.
    #[arg(long, value_delimiter = ',', default_value = "2048,8192")]
    context: Vec<usize>,
    /// Tokens to decode at each.
    #[arg(long, default_value_t = 64, value_parser = at_least_one)]
    decode: usize,
    /// Sessions that are decoded together, each with a context of its own.
    #[arg(long, default_value_t = 1, value_parser = at_least_one)]
    sessions: usize,
    /// Of these, so many that one dispatch computes: 1, 2, 4 or 8.
    #[arg(long, default_value_t = 8, value_parser = at_least_one)]
    together: usize,
    /// Rows of a pass of prefill, a power of two.
    #[arg(long, default_value_t = GpuBackend::PASS_ROWS, value_parser = at_least_one)]
    pass_rows: usize,
    /// Exact instead of Fast.
    #[arg(long)]
    exact: bool,
    /// Without the model's own roundings.
    #[arg(long)]
    plain: bool,
    /// Kernels check their indices.
    #[arg(long)]
    checks: bool,
    /// GiB of slots on the device; everything resident without it.
    #[arg(long)]
    slots_gib: Option<f64>,
    /// GiB of slots in host memory.
    #[arg(long, default_value_t = 24.0)]
    host_gib: f64,
    /// Time of each stage of a decoded token and of a pass of prefill.
    #[arg(long)]
    stages: bool,
    /// Also computes the first tokens on the CPU in Exact and prints the distance.
    #[arg(long)]
    against_cpu: Option<usize>,
    /// Writes logits of so many decoded tokens after the first context to a file: to be compared between runs.
    #[arg(long)]
    logits: Option<PathBuf>,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&number| number > 0).ok_or_else(|| "expected a number from 1 on".into())
}

fn token(session: usize, position: usize, vocab: usize) -> u32 {
    let x = (((session as u64) << 32) + position as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((x >> 33) % vocab as u64) as u32
}

/// Takes the time of each stage of a pass.
#[derive(Default)]
struct Stages {
    times: Vec<(&'static str, f64)>,
    dispatches: u64,
}

impl Observer<GpuBackend> for Stages {
    fn after(
        &mut self,
        layer: Option<usize>,
        stage: Stage,
        backend: &GpuBackend,
        pass: &gpu::GpuPass,
    ) -> Result<(), model::Error> {
        match (layer, stage) {
            (None, Stage::Embed) => backend.time_stages(pass),
            (None, Stage::Head) => (self.times, self.dispatches) = backend.stage_times(pass)?,
            _ => {}
        }
        Ok(())
    }
}

fn print_stages(stages: &Stages, layers: usize) {
    let mut names: Vec<(&str, f64, usize)> = Vec::new();
    for &(name, us) in &stages.times {
        match names.iter_mut().find(|(other, ..)| *other == name) {
            Some((_, sum, count)) => (*sum, *count) = (*sum + us, *count + 1),
            None => names.push((name, us, 1)),
        }
    }
    let total: f64 = names.iter().map(|(_, us, _)| us).sum();
    println!("  {} dispatches in {layers} layers; {total:.0} us by the device's clock", stages.dispatches);
    for (name, us, count) in names {
        println!("  {name:<14}{us:>10.0} us {:>5.1} %  {count:>4} x {:>7.1}", 100.0 * us / total, us / count as f64);
    }
}

fn main() -> Result<()> {
    let what = What::parse();
    let file = Gguf::open(&what.file)?;
    let model = Model::from_gguf(&file)?;
    let source = Source::open(file.files.iter().map(|part| (&part.path, part.bytes)))?;
    let config = &model.config;
    let placement = match what.slots_gib {
        None => Placement::Resident,
        Some(gib) => {
            let adapters = gpu::adapters();
            let report = adapters.get(what.gpu).ok_or_else(|| {
                anyhow::anyhow!("found --gpu {}, expected one of {} adapters", what.gpu, adapters.len())
            })?;
            let extents: Vec<ExpertExtents> = model.experts.iter().map(|layer| layer.extents).collect();
            let slot_bytes = gpu::slot_bytes(&model)?;
            let slabs = Slabs::plan(&slot_bytes, config.experts, (gib * 1_073_741_824.0) as u64, report.binding_bytes)
                .ok_or_else(|| anyhow::anyhow!("found {gib} GiB for slots, expected one for each slab"))?;
            let (_, host_bytes) = store::size_classes(&extents);
            let each = host_bytes.iter().sum::<usize>() as f64;
            let slots = ((what.host_gib * 1_073_741_824.0 / each) as usize).max(1);
            println!("slots: {:?} on the device, {slots} of each size in host memory", slabs.slots);
            Placement::Streamed { slabs, host: Residency::Streamed { slots: vec![slots; host_bytes.len()] } }
        }
    };
    let options = Options {
        arithmetic: if what.plain { Arithmetic::Plain } else { Arithmetic::Official },
        precision: if what.exact { Precision::Exact } else { Precision::Fast },
        placement,
        sessions_together: what.together,
        ..Options::default()
    };
    let began = Instant::now();
    let mut bytes = 0;
    let checks = if what.checks { Checks::On } else { Checks::Off };
    let adapter = (Choice::Index(what.gpu), checks);
    let backend = GpuBackend::load(&model, &source, adapter, options.clone(), &mut |more| bytes += more)?;
    let took = began.elapsed().as_secs_f64();
    println!("{:?}", backend.device().report());
    if let Some(note) = backend.adapter_note() {
        println!("note: {note}");
    }
    println!("loaded {:.2} GB in {took:.1} s, {:.2} GB/s", bytes as f64 / 1e9, bytes as f64 / took / 1e9);
    let times: Vec<String> =
        backend.load_times().iter().map(|(what, us)| format!("{what} {:.0} ms", us / 1e3)).collect();
    println!("  {}", times.join(", "));

    let mut states = (0..what.sessions).map(|_| backend.new_state()).collect::<Result<Vec<_>, _>>()?;
    let vocab = config.vocab_size;
    let cancel = Cancel::default();
    let mut written = Vec::new();
    for (turn, &context) in what.context.iter().enumerate() {
        let start = backend.position(&states[0]);
        let began = Instant::now();
        let mut stages = Stages::default();
        for (session, state) in states.iter_mut().enumerate() {
            let mut at = start;
            while at < context {
                let end = ((at / what.pass_rows + 1) * what.pass_rows).min(context);
                let row = |position| Row {
                    session: 0,
                    position,
                    token: token(session, position, vocab),
                    logits: position + 1 == context,
                };
                let rows = (at..end).map(row).collect();
                if what.stages {
                    forward(&backend, rows, &mut [&mut *state], &cancel, &mut stages)?;
                } else {
                    forward(&backend, rows, &mut [&mut *state], &cancel, &mut NoObserver)?;
                }
                at = end;
            }
        }
        let (took, each) = (began.elapsed().as_secs_f64(), what.sessions as f64);
        println!("prefill {start}..{context}: {took:.2} s, {:.0} tokens/s", each * (context - start) as f64 / took);
        if what.stages {
            print_stages(&stages, config.layers);
        }
        let mut times = Vec::new();
        let before = (backend.stats(), backend.host_stats());
        for i in 0..what.decode {
            let position = backend.position(&states[0]);
            let row = |session| Row { session, position, token: token(session, position, vocab), logits: true };
            let (rows, mut states) = ((0..what.sessions).map(row).collect(), states.iter_mut().collect::<Vec<_>>());
            let began = Instant::now();
            let logits = if what.stages && i + 1 == what.decode {
                forward(&backend, rows, &mut states, &cancel, &mut stages)?
            } else {
                forward(&backend, rows, &mut states, &cancel, &mut NoObserver)?
            };
            times.push(began.elapsed().as_secs_f64());
            if turn == 0 && what.logits.is_some() {
                written.extend_from_slice(bytemuck::cast_slice::<f32, u8>(&logits));
            }
        }
        let sum: f64 = times.iter().sum();
        times.sort_by(f64::total_cmp);
        println!(
            "decode at {context}: mean {:.1} tokens/s, median {:.1} ({:.2} ms), best {:.2} ms",
            each * times.len() as f64 / sum,
            each / times[times.len() / 2],
            times[times.len() / 2] * 1e3,
            times[0] * 1e3
        );
        if what.slots_gib.is_some() {
            let (now, host) = (backend.stats().since(&before.0), backend.host_stats().since(&before.1));
            let each = (what.decode * what.sessions) as f64;
            println!(
                "  a token: {:.0} hits, {:.0} misses, {:.3} GB uploaded; host tier {:.0} hits, {:.0} misses, {:.3} GB read, \
                 {:.1} ms waited for it",
                now.cache.hits as f64 / each,
                now.cache.misses as f64 / each,
                now.read_bytes as f64 / each / 1e9,
                host.cache.hits as f64 / each,
                host.cache.misses as f64 / each,
                host.read_bytes as f64 / each / 1e9,
                host.stall_us as f64 / each / 1e3
            );
        }
        if what.stages {
            print_stages(&stages, config.layers);
        }
    }
    if let Some(path) = &what.logits {
        std::fs::write(path, &written)?;
    }
    if let Some(tokens) = what.against_cpu {
        against_cpu(&model, &source, &options, &backend, tokens)?;
    }
    Ok(())
}

/// Relative RMS distance of each token's logits from the CPU's in Exact.
fn against_cpu(model: &Model, source: &Source, options: &Options, backend: &GpuBackend, tokens: usize) -> Result<()> {
    let cpu = cpu::CpuBackend::load(
        model,
        source,
        cpu::Options {
            arithmetic: options.arithmetic,
            precision: Precision::Exact,
            residency: Residency::Streamed {
                slots: vec![
                    2000;
                    store::size_classes(&model.experts.iter().map(|layer| layer.extents).collect::<Vec<_>>())
                        .1
                        .len()
                ],
            },
            ..cpu::Options::default()
        },
        &mut |_| (),
    )?;
    let (mut here, mut there) = (backend.new_state()?, cpu.new_state()?);
    let (cancel, vocab) = (Cancel::default(), model.config.vocab_size);
    let mut distances = Vec::new();
    for position in 0..tokens {
        let row = || vec![Row { session: 0, position, token: token(0, position, vocab), logits: true }];
        let a = forward(backend, row(), &mut [&mut here], &cancel, &mut NoObserver)?;
        let b = forward(&cpu, row(), &mut [&mut there], &cancel, &mut NoObserver)?;
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
        let off = square(&mut a.iter().zip(&b).map(|(a, b)| f64::from(a - b)));
        distances.push((off / square(&mut b.iter().map(|&b| f64::from(b)))).sqrt());
    }
    println!("distance from the CPU's Exact, token by token: {distances:?}");
    distances.sort_by(f64::total_cmp);
    println!("median {:.2e}", distances[distances.len() / 2]);
    Ok(())
}
