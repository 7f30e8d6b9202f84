//! A GPU: two memories to share out, or one where the device has none of its own.

use std::collections::BTreeMap;

use anyhow::Context as _;
use gguf::Gguf;
use gpu::{AdapterReport, Checks, Choice, GpuBackend, Placement, Room, Slabs};
use model::{Backend, Error, Model};
use store::budget::{self, Available};
use store::plan::SizeClass;
use store::{ExpertExtents, Needs, Plan, Request, Residency, Source};

use super::{Counts, Device, Loading, Sweep};
use crate::placement::{self, Memory, Plans, Slots, Tier, Work, file_classes, program_bytes};
use crate::terminal;

/// Experts of a token of this many layers have room on their way through host memory to a device that has no memory of its
/// own: what was copied to a slot need not stay.
const LAYERS_ON_THE_WAY: usize = 2;

/// What people call an interface.
pub(crate) fn api_name(api: &str) -> &str {
    match api {
        "vulkan" => "Vulkan",
        "metal" => "Metal",
        "dx12" => "D3D12",
        other => other,
    }
}

/// `gpu 0, NVIDIA H200 (Vulkan)`.
pub(crate) fn title(report: &AdapterReport) -> String {
    format!("gpu {}, {} ({})", report.index, terminal::escape_controls(&report.name), api_name(&report.api))
}

impl Device for GpuBackend {
    type Adapter = AdapterReport;

    fn plan(on: &AdapterReport, header: &Gguf, model: &Model, work: &Work) -> anyhow::Result<Plans> {
        anyhow::ensure!(on.lacks.is_empty(), "{}", lacks(on));
        let extents: Vec<ExpertExtents> = model.experts.iter().map(|layer| layer.extents).collect();
        let (rows, wanted_rows) = work.rows(GpuBackend::PASS_ROWS);
        let room = Room { rows, wanted_rows, end_tokens: work.context_tokens };
        let bytes = gpu::device_bytes(model, &work.layout(&model.config), room, on)?;
        let host_bytes = program_bytes(header) + gpu::UPLOAD_BYTES;
        let way = on_the_way(model, &extents);

        let sizes = sizes(&bytes.slots);
        let needs = Needs {
            program_bytes: gpu::DRIVER_BYTES + if on.is_unified() { host_bytes + way.slots.bytes } else { 0 },
            static_bytes: bytes.fixed,
            context_tokens: work.context_tokens,
            state_bytes: bytes.session * (work.sessions + work.clones) as u64,
            pass_rows: rows,
            pass_bytes: bytes.pass,
            resident_bytes: bytes.experts,
            experts: model.config.experts,
            experts_used: model.config.experts_used,
            classes: sizes.iter().map(|(&slot_bytes, &layers)| SizeClass { slot_bytes, layers }).collect(),
        };
        let stream = work.request.stream || !bytes.can_be_resident;
        let available = available(on, work)?;
        let memory_bytes = match on.is_unified() {
            true => work.gpu_memory.into_iter().chain(work.request.memory_bytes).min(),
            false => work.gpu_memory,
        };
        let plan = Plan::new(&needs, Request { memory_bytes, stream, ..work.request }, available.as_ref())
            .with_context(|| match on.is_unified() {
                true => format!("{}, whose memory is the host's (--memory, --gpu-memory)", title(on)),
                false => format!("memory of {} (--gpu-memory)", title(on)),
            })?;
        let slabs = match &plan.residency {
            Residency::Resident => None,
            Residency::Streamed { slots } => Some(slabs(on, &bytes.slots, &sizes, slots)?),
        };
        let is_streamed = slabs.is_some();
        let mut memories = vec![Memory { name: Some(title(on)), plan }];
        let mut tier = is_streamed.then_some(way);
        if !on.is_unified() {
            let (plan, found) = host(model, &extents, host_bytes, is_streamed, work)?;
            memories.push(Memory { name: Some("host".into()), plan });
            tier = found;
        }
        Ok(Plans { memories, slabs, tier })
    }

    fn sweep(on: &AdapterReport, _: &Work) -> anyhow::Result<Sweep> {
        let bytes_per_second = gpu::measure(Choice::Index(on.index))?.read_bytes_per_second;
        Ok(Sweep { who: format!("{} reads its memory", title(on)), bytes_per_second })
    }

    fn load(
        on: &AdapterReport,
        model: &Model,
        source: &Source,
        loading: Loading<'_>,
        loaded: &mut dyn FnMut(u64),
    ) -> Result<GpuBackend, Error> {
        let Loading { work, plans, checksums, cancel } = loading;
        let placement = match (&plans.slabs, &plans.tier) {
            (Some(slabs), Some(tier)) => Placement::Streamed { slabs: slabs.clone(), host: tier.residency.clone() },
            _ => Placement::Resident,
        };
        if work.lock {
            terminal::dim_note("--lock keeps nothing of a GPU's from being swapped out; --device cpu knows it");
        }
        let options = gpu::Options {
            arithmetic: work.arithmetic,
            precision: work.precision,
            placement,
            checksums,
            cancel,
            sessions_prepared: work.sessions,
            ..gpu::Options::default()
        };
        let backend = GpuBackend::load(model, source, (Choice::Index(on.index), Checks::Off), options, loaded)?;
        backend.adapter_note().into_iter().for_each(terminal::dim_note);
        Ok(backend)
    }

    fn name(&self) -> Option<String> {
        Some(title(self.device().report()))
    }

    fn note(&self) -> Option<&str> {
        self.note()
    }

    fn reader(&self) -> &'static str {
        self.reader()
    }

    fn checks(&self) -> bool {
        self.checks()
    }

    fn counts(&self) -> Counts {
        Counts { slots: self.stats(), tier: self.is_streamed().then(|| self.host_stats()) }
    }

    fn weight_bytes(&self) -> u64 {
        let (fixed, experts) = self.weight_bytes();
        fixed + experts
    }

    fn session_bytes(&self, state: &Self::State) -> u64 {
        state.bytes()
    }
}

fn lacks(on: &AdapterReport) -> String {
    gpu::GpuError::Lacks { name: title(on), lacks: on.lacks.join(", ") }.to_string()
}

/// Layers by the bytes that an expert takes on the device.
fn sizes(slots: &[u64]) -> BTreeMap<u64, usize> {
    let mut sizes = BTreeMap::new();
    slots.iter().for_each(|&bytes| *sizes.entry(bytes).or_default() += 1);
    sizes
}

/// The slots of each size, in pieces that the adapter's kernels can reach.
fn slabs(on: &AdapterReport, bytes: &[u64], sizes: &BTreeMap<u64, usize>, slots: &[usize]) -> anyhow::Result<Slabs> {
    let slots: BTreeMap<u64, usize> = sizes.keys().copied().zip(slots.iter().copied()).collect();
    Slabs::of_slots(bytes, |size| slots[&size], on.binding_bytes).ok_or_else(|| {
        let largest = bytes.iter().max().expect("a model has layers");
        anyhow::anyhow!(
            "{}: found {} bytes of a buffer that a kernel can reach, expected at least the {largest} of an expert. Compute \
             with --device cpu",
            title(on),
            on.binding_bytes
        )
    })
}

/// What the device's memory has to give. Where it is the host's, the host says; what its driver allows counts, too.
fn available(on: &AdapterReport, work: &Work) -> anyhow::Result<Option<Available>> {
    let own = on.memory.map(|memory| Available {
        bytes: memory.free_bytes.unwrap_or(memory.total_bytes),
        held_bytes: 0,
        according_to: "its driver".into(),
    });
    if on.is_unified() {
        return Ok(budget::available().into_iter().chain(own).min_by_key(|available| available.bytes));
    }
    anyhow::ensure!(
        own.is_some() || work.gpu_memory.is_some(),
        "{} does not say how much memory it has: give --gpu-memory",
        title(on)
    );
    Ok(own)
}

/// Slots of host memory that experts only pass through.
fn on_the_way(model: &Model, extents: &[ExpertExtents]) -> Tier {
    let classes = file_classes(extents);
    let slots =
        |class: &SizeClass| (LAYERS_ON_THE_WAY * model.config.experts_used).min(class.layers * model.config.experts);
    let slots: Vec<usize> = classes.iter().map(slots).collect();
    Tier::streamed(&classes, model.config.experts, slots)
}

/// The plan of host memory beside a device that has its own, and the tier of experts in it where they are streamed.
fn host(
    model: &Model,
    extents: &[ExpertExtents],
    program_bytes: u64,
    is_streamed: bool,
    work: &Work,
) -> anyhow::Result<(Plan, Option<Tier>)> {
    let classes = if is_streamed { file_classes(extents) } else { Vec::new() };
    let all_bytes = extents.iter().map(ExpertExtents::total_bytes).sum::<u64>();
    let needs = Needs {
        program_bytes,
        static_bytes: 0,
        context_tokens: 0,
        state_bytes: 0,
        pass_rows: 0,
        pass_bytes: 0,
        resident_bytes: if is_streamed { all_bytes } else { 0 },
        experts: model.config.experts,
        experts_used: model.config.experts_used,
        classes: classes.clone(),
    };
    let request = Request { cache: None, stream: is_streamed && work.request.stream, ..work.request };
    let plan = Plan::new(&needs, request, budget::available().as_ref()).context("host memory (--memory)")?;
    let experts = model.config.experts;
    let tier = is_streamed.then(|| match &plan.residency {
        Residency::Streamed { slots } => Tier::streamed(&classes, experts, slots.clone()),
        Residency::Resident => {
            let count = model.config.layers * experts;
            Tier { residency: Residency::Resident, slots: Slots { slots: count, of_experts: count, bytes: all_bytes } }
        }
    });
    Ok((plan, tier))
}

/// Why an adapter was chosen.
pub(crate) fn fits(on: &AdapterReport, plans: &Plans) -> String {
    let memory = match on.memory {
        Some(memory) if !on.is_unified() => format!("its {}", terminal::bytes(memory.total_bytes)),
        _ => "memory".into(),
    };
    let weights = terminal::bytes(placement::weight_bytes(&plans.memories[0].plan));
    match plans.slots() {
        None => format!("{weights} of weights fit {memory}"),
        Some(Slots { slots, of_experts, .. }) => {
            format!(
                "{weights} of weights fit {memory}, with slots for {slots} of {of_experts} experts, which are streamed"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use ::gpu::DeviceMemory;
    use model::{Arithmetic, Precision};
    use store::plan::Cache;

    use super::*;
    use crate::device::Asked;

    /// A made-up card with memory of its own.
    fn card(gib: u64) -> AdapterReport {
        AdapterReport {
            index: 0,
            name: "Card".into(),
            kind: "discrete",
            api: "vulkan".into(),
            driver: "1".into(),
            buffer_bytes: 4 << 30,
            binding_bytes: 2 << 30,
            workgroup_bytes: 48 << 10,
            subgroup: [32, 32],
            memory: Some(DeviceMemory { total_bytes: gib << 30, free_bytes: Some(gib << 30) }),
            f16: true,
            timestamps: true,
            cooperative_tile: Some(16),
            lacks: Vec::new(),
        }
    }

    fn work() -> Work {
        Work {
            device: Asked::Auto,
            precision: Precision::Fast,
            arithmetic: Arithmetic::Official,
            context_tokens: 8192,
            chunk: None,
            all_logits: false,
            threads: 1,
            request: Request { memory_bytes: Some(16 << 30), cache: None, stream: false },
            gpu_memory: None,
            lock: false,
            sessions: 1,
            clones: 0,
        }
    }

    /// The plan for Flash, of whose file only the header is read.
    fn plan(on: &AdapterReport, work: &Work) -> anyhow::Result<Plans> {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/test-data/full/flash.header");
        assert!(path.exists(), "{} is missing: run scripts/test-data first", path.display());
        let header = crate::plan::read_header(&path).unwrap();
        let model = Model::from_gguf(&header).unwrap();
        GpuBackend::plan(on, &header, &model, work)
    }

    #[test]
    fn a_large_card_holds_everything_and_the_host_next_to_nothing() {
        let on = card(140);
        let plans = plan(&on, &work()).unwrap();
        assert!(plans.are_resident() && plans.tier.is_none() && !plans.read_the_file());
        let [device, host] = &plans.memories[..] else { panic!("{plans:?}") };
        assert!(device.plan.total_bytes() < 100 << 30 && host.plan.total_bytes() < 1 << 30, "{plans:?}");
        assert!(fits(&on, &plans).ends_with("GiB of weights fit its 140.00 GiB"), "{}", fits(&on, &plans));
    }

    #[test]
    fn a_smaller_card_has_slots_that_a_tier_of_host_memory_fills() {
        let on = card(24);
        let plans = plan(&on, &work()).unwrap();
        let [device, host] = &plans.memories[..] else { panic!("{plans:?}") };
        let (device_bytes, host_bytes) = (device.plan.total_bytes(), host.plan.total_bytes());
        assert!(device_bytes <= 21 << 30 && device_bytes > 20 << 30, "{device_bytes}");
        assert!(host_bytes <= 16 << 30 && host_bytes > 15 << 30, "{host_bytes}");
        let (slabs, tier) = (plans.slabs.clone().unwrap(), plans.tier.clone().unwrap());
        assert!(slabs.slots.iter().zip(&slabs.slot_bytes).all(|(&slots, bytes)| slots as u64 * bytes <= 2 << 30));
        assert!(plans.slots().unwrap().slots > 1500 && tier.slots.slots > 1500 && plans.read_the_file(), "{plans:?}");

        let few = Work { request: Request { cache: Some(Cache::Slots(300)), ..work().request }, ..work() };
        assert_eq!(plan(&on, &few).unwrap().slots().unwrap().slots, 300);
        let ample = Work { request: Request { memory_bytes: Some(1 << 40), ..work().request }, ..work() };
        let ample = plan(&on, &ample).unwrap();
        assert!(ample.tier.clone().unwrap().residency == Residency::Resident && !ample.read_the_file(), "{ample:?}");
    }

    #[test]
    fn too_little_memory_is_refused_with_what_works() {
        let error = plan(&card(4), &work()).map(|_| ()).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains("memory of gpu 0, Card (Vulkan) (--gpu-memory): "), "{error}");
        let smallest: u64 = error.split("Allow at least ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
        let with = |bytes| plan(&card(4), &Work { gpu_memory: Some(bytes), ..work() });
        assert!(with(smallest).is_ok() && with(smallest - 1).is_err());
        let little = Work { request: Request { memory_bytes: Some(64 << 20), ..work().request }, ..work() };
        let error = format!("{:#}", plan(&card(24), &little).map(|_| ()).unwrap_err());
        assert!(error.contains("host memory (--memory): "), "{error}");
        let silent = AdapterReport { memory: None, ..card(24) };
        let error = plan(&silent, &work()).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("does not say how much memory it has: give --gpu-memory"), "{error}");
        assert!(plan(&silent, &Work { gpu_memory: Some(20 << 30), ..work() }).is_ok());
    }

    #[test]
    fn shared_memory_has_one_plan() {
        let on = AdapterReport { kind: "integrated", ..card(96) };
        let plans = plan(&on, &Work { gpu_memory: Some(40 << 30), ..work() }).unwrap();
        assert_eq!(plans.memories.len(), 1);
        assert!(plans.memories[0].plan.total_bytes() <= 16 << 30, "the lesser of both limits holds: {plans:?}");
        let tier = plans.tier.unwrap();
        assert_eq!(tier.slots.slots, 12, "what experts pass through");
    }
}
