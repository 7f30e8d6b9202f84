//! The machine's own processor.

use cpu::{CpuBackend, PassShape};
use gguf::Gguf;
use model::state::StateBytes;
use model::{Backend, Error, Model};
use session::engine::MOST_ROWS;
use store::{ExpertExtents, Needs, Plan, Source, budget};

use super::{Counts, Device, Loading, Sweep};
use crate::memory;
use crate::placement::{Memory, Plans, Work, file_classes, program_bytes};

/// Bytes that a sweep of host memory reads to find its speed: more than caches hold.
const SWEEP_BYTES: usize = 512 << 20;

/// The only one there is.
#[derive(Clone, Copy, Debug)]
pub struct Processor;

/// What a model needs to run.
fn needs(header: &Gguf, model: &Model, work: &Work) -> Needs {
    let config = &model.config;
    let layout = work.layout(config);
    let extents: Vec<ExpertExtents> = model.experts.iter().map(|layer| layer.extents).collect();
    let (rows, wanted_rows) = work.rows(CpuBackend::PASS_ROWS);
    let tokens = work.context_tokens;
    // Where there are several sessions, their next tokens are computed while a pass over a prompt waits.
    let beside = if work.sessions > 1 { work.sessions * MOST_ROWS } else { 0 };
    let shape = PassShape { rows: rows + beside, wanted_rows, end_tokens: tokens, threads: work.threads };
    let state = work.sessions * StateBytes::at_most(&layout, tokens).total();
    let clones = work.clones * StateBytes::of_clone(&layout, tokens).total();
    let [resident, streamed] = [false, true].map(|streamed| cpu::static_bytes(model, streamed));
    Needs {
        program_bytes: program_bytes(header),
        static_bytes: streamed,
        context_tokens: tokens,
        state_bytes: (state + clones) as u64,
        pass_rows: rows,
        pass_bytes: cpu::pass_bytes(config, &layout, shape),
        resident_bytes: extents.iter().map(ExpertExtents::total_bytes).sum::<u64>() + resident - streamed,
        experts: config.experts,
        experts_used: config.experts_used,
        classes: file_classes(&extents),
    }
}

impl Device for CpuBackend {
    type Adapter = Processor;

    fn plan(_: &Processor, header: &Gguf, model: &Model, work: &Work) -> anyhow::Result<Plans> {
        let plan = Plan::new(&needs(header, model, work), work.request, budget::available().as_ref())?;
        Ok(Plans { memories: vec![Memory { name: None, plan }], slabs: None, tier: None })
    }

    fn sweep(_: &Processor, work: &Work) -> anyhow::Result<Sweep> {
        let bytes_per_second = memory::read_bytes_per_second(SWEEP_BYTES, work.threads)?;
        Ok(Sweep { who: format!("{} threads read memory", work.threads), bytes_per_second })
    }

    fn load(
        _: &Processor,
        model: &Model,
        source: &Source,
        loading: Loading<'_>,
        loaded: &mut dyn FnMut(u64),
    ) -> Result<CpuBackend, Error> {
        let Loading { work, plans, checksums, cancel } = loading;
        let options = cpu::Options {
            threads: work.threads,
            arithmetic: work.arithmetic,
            precision: work.precision,
            residency: plans.memories[0].plan.residency.clone(),
            checksums,
            lock: work.lock,
            cancel,
            ..cpu::Options::default()
        };
        CpuBackend::load(model, source, options, loaded)
    }

    fn name(&self) -> Option<String> {
        None
    }

    fn note(&self) -> Option<&str> {
        self.note()
    }

    fn reader(&self) -> &'static str {
        self.reader().name()
    }

    fn checks(&self) -> bool {
        self.checks()
    }

    fn counts(&self) -> Counts {
        Counts { slots: self.stats(), tier: None }
    }

    fn weight_bytes(&self) -> u64 {
        let bytes = self.weight_bytes();
        bytes.fixed + bytes.experts
    }

    fn session_bytes(&self, state: &Self::State) -> u64 {
        state.bytes().total() as u64
    }
}
