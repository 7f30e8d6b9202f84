//! Where a model's weights will be: decided by the plan, told in one line.

use gguf::Gguf;
use gpu::Slabs;
use model::{Arithmetic, Config, KvLayout, Model, Precision};
use serde::Serialize;
use store::plan::{Purpose, SizeClass};
use store::{ExpertExtents, Plan, Request, Residency};

use crate::device::{Asked, Device};
use crate::{flags, terminal};

/// Code, tables, stacks of threads, buffers of files: what the program takes for any model.
const PROGRAM_BYTES: u64 = 32 << 20;

/// What a model is loaded for.
#[derive(Clone, Copy)]
pub struct Work {
    /// Where to compute.
    pub device: Asked,
    /// How quantised weights are multiplied.
    pub precision: Precision,
    /// With or without the model's own low-precision roundings.
    pub arithmetic: Arithmetic,
    /// Tokens that a session may grow to.
    pub context_tokens: usize,
    /// Rows of the largest pass, if not the device's own.
    pub chunk: Option<usize>,
    /// Whether logits of every row are wanted, and not only of the last.
    pub all_logits: bool,
    /// Threads of the processor.
    pub threads: usize,
    /// What was asked of the plan; of host memory, where the device has its own.
    pub request: Request,
    /// Most memory of a GPU.
    pub gpu_memory: Option<u64>,
    /// Whether weights are kept from being swapped out.
    pub lock: bool,
    /// Sessions that are held at the same time, each of as many tokens; their next tokens may be computed together, beside a pass
    /// that is under way.
    pub sessions: usize,
    /// Clones of a session that are held beside them.
    pub clones: usize,
}

impl Work {
    /// A session of up to `context_tokens`, as the flags say.
    pub fn new(machine: &flags::Machine, context_tokens: usize) -> Work {
        Work {
            device: machine.device,
            precision: machine.precision(),
            arithmetic: Arithmetic::Official,
            context_tokens,
            chunk: None,
            all_logits: false,
            threads: machine.threads.map_or_else(|| cpu::Options::default().threads, usize::from),
            request: Request { memory_bytes: machine.memory, cache: machine.cache, stream: machine.stream },
            gpu_memory: machine.gpu_memory,
            lock: machine.lock,
            sessions: 1,
            clones: 0,
        }
    }

    /// How a session's rows are stored.
    pub fn layout(&self, config: &Config) -> KvLayout {
        KvLayout::new(config, 0, self.arithmetic, self.precision)
    }

    /// Rows of the largest pass on a device whose passes have `pass_rows`, and rows of it whose logits are wanted.
    pub fn rows(&self, pass_rows: usize) -> (usize, usize) {
        let rows = self.chunk.unwrap_or(pass_rows).min(self.context_tokens).max(self.sessions);
        (rows, if self.all_logits { rows } else { self.sessions })
    }
}

/// One memory, shared out.
#[derive(Clone, Debug)]
pub struct Memory {
    /// Whose it is; `None` where there is only the host's.
    pub name: Option<String>,
    /// What lies in it.
    pub plan: Plan,
}

/// What is to be allocated for a model.
#[derive(Clone, Debug)]
pub struct Plans {
    /// The memory that kernels read, then the host's if that is another.
    pub memories: Vec<Memory>,
    /// A GPU's slots, where experts are streamed to it.
    pub slabs: Option<Slabs>,
    /// What those are filled from.
    pub tier: Option<Tier>,
}

impl Plans {
    /// Whether kernels find all experts in their memory.
    pub fn are_resident(&self) -> bool {
        self.memories[0].plan.residency == Residency::Resident
    }

    /// Whether experts are read from the file while computing.
    pub fn read_the_file(&self) -> bool {
        !self.are_resident() && self.tier.as_ref().is_none_or(|tier| tier.residency != Residency::Resident)
    }

    /// What there is to warn of, in every memory.
    pub fn warnings(&self) -> impl Iterator<Item = String> {
        self.memories.iter().flat_map(|Memory { name, plan }| {
            let place = name.as_ref().map_or(String::new(), |name| format!("memory of {name}: "));
            plan.warnings.iter().map(move |warning| format!("{place}{warning}"))
        })
    }

    /// Slots that kernels read; `None` where experts are resident.
    pub fn slots(&self) -> Option<Slots> {
        let mut total = Slots { slots: 0, of_experts: 0, bytes: 0 };
        for (purpose, class_bytes) in &self.memories[0].plan.items {
            if let Purpose::Slots { slots, experts, .. } = purpose {
                (total.slots, total.of_experts) = (total.slots + slots, total.of_experts + experts);
                total.bytes += class_bytes;
            }
        }
        // Slabs end where kernels cannot reach on.
        if let Some(slabs) = &self.slabs {
            (total.slots, total.bytes) = (slabs.slots.iter().sum(), slabs.bytes());
        }
        (!self.are_resident()).then_some(total)
    }
}

/// Host memory that a GPU's slots are filled from.
#[derive(Clone, Debug)]
pub struct Tier {
    /// All experts, or slots of each size in the file.
    pub residency: Residency,
    /// Those slots together.
    pub slots: Slots,
}

impl Tier {
    /// So many slots of each class.
    pub fn streamed(classes: &[SizeClass], experts: usize, slots: Vec<usize>) -> Tier {
        let bytes = slots.iter().zip(classes).map(|(&slots, class)| slots as u64 * class.slot_bytes).sum();
        let of_experts = classes.iter().map(|class| class.layers * experts).sum();
        let total = Slots { slots: slots.iter().sum(), of_experts, bytes };
        Tier { residency: Residency::Streamed { slots }, slots: total }
    }
}

/// Bytes of weights in a plan: all but slots of streamed experts.
pub fn weight_bytes(plan: &Plan) -> u64 {
    let is_weight = |purpose: &Purpose| matches!(purpose, Purpose::StaticWeights | Purpose::ResidentExperts);
    plan.items.iter().filter(|(purpose, _)| is_weight(purpose)).map(|(_, bytes)| bytes).sum()
}

/// Bytes of weights that one token uses: all but the embedding and the experts it does not choose.
pub fn token_weight_bytes(model: &Model) -> u64 {
    let expert = model.experts.iter().flat_map(|layer| layer.extents.expert_bytes()).sum::<usize>();
    cpu::static_bytes(model, true) + (expert * model.config.experts_used) as u64
}

/// Layers whose experts need slots of the same size to be held as the file has them.
pub fn file_classes(layers: &[ExpertExtents]) -> Vec<SizeClass> {
    let (class_of_layer, slot_bytes) = store::size_classes(layers);
    let layers_of = |class: usize| class_of_layer.iter().filter(|&&other| other == class).count();
    let class = |(class, &bytes): (usize, &usize)| SizeClass { slot_bytes: bytes as u64, layers: layers_of(class) };
    slot_bytes.iter().enumerate().map(class).collect()
}

/// The program itself with a file's directory of tensors and vocabulary, as they stand in the header and as the tokenizer
/// holds them: each string a few times, and an entry in a table.
pub fn program_bytes(header: &Gguf) -> u64 {
    const STRING_BYTES: u64 = 300;
    let strings = |key: &str| header.metadata.str_array(key).map_or(0, |strings| strings.len() as u64);
    let strings = strings("tokenizer.ggml.tokens") + strings("tokenizer.ggml.merges");
    PROGRAM_BYTES + (strings + header.tensors.len() as u64) * STRING_BYTES
}

/// How a loaded model runs.
#[derive(Clone, Debug, Serialize)]
pub struct Setting {
    /// What computes; `None` for the machine's own processor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// `fast` or `exact`.
    pub precision: &'static str,
    /// `resident` or `streamed`.
    pub experts: &'static str,
    /// Where experts are read into; `None` where they are resident.
    pub slots: Option<Slots>,
    /// Host memory that a GPU's slots are filled from, where experts are streamed to one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_tier: Option<Slots>,
    /// What they are read with.
    pub reader: &'static str,
    /// Whether what is read while computing is held against checksums.
    pub checked: bool,
}

/// Slots of all size classes together.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Slots {
    /// How many.
    pub slots: usize,
    /// Experts that share them.
    pub of_experts: usize,
    /// Bytes of memory.
    pub bytes: u64,
}

impl Setting {
    /// Of a model that was loaded by `plans`.
    pub fn new<D: Device>(precision: Precision, plans: &Plans, backend: &D) -> Setting {
        Setting {
            device: backend.name(),
            precision: name(precision),
            experts: if plans.are_resident() { "resident" } else { "streamed" },
            slots: plans.slots(),
            host_tier: plans.tier.as_ref().map(|tier| tier.slots),
            reader: backend.reader(),
            checked: backend.checks(),
        }
    }

    /// Whether this is what a model that fits gets when nothing is asked for.
    pub fn is_default(&self) -> bool {
        self.precision == name(Precision::Fast) && self.slots.is_none() && self.device.is_none()
    }

    /// `precision exact | experts streamed: slots for 8 of 224, 1.20 MiB, read with pread, direct`, after the device's name
    /// if it has one.
    pub fn line(&self) -> String {
        let Setting { device, precision, experts, slots, host_tier, reader, checked } = self;
        let slots = slots.map_or(String::new(), |slots| {
            let checked = if *checked { ", checked" } else { "" };
            let reader = match host_tier {
                Some(tier) if tier.slots == tier.of_experts => "filled from host memory, which holds all".into(),
                Some(tier) => format!("filled from a host tier with {}, read with {reader}{checked}", tier.text()),
                None => format!("read with {reader}{checked}"),
            };
            format!(": {}, {reader}", slots.text())
        });
        let device = device.as_ref().map_or(String::new(), |device| format!("device {device} | "));
        format!("{device}precision {precision} | experts {experts}{slots}")
    }
}

impl Slots {
    /// `slots for 8 of 224, 1.20 MiB`.
    fn text(self) -> String {
        let Slots { slots, of_experts, bytes } = self;
        format!("slots for {slots} of {of_experts}, {}", terminal::bytes(bytes))
    }
}

/// What a precision is called on the command line.
pub fn name(precision: Precision) -> &'static str {
    match precision {
        Precision::Exact => "exact",
        Precision::Fast => "fast",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_with_a_name_is_told() {
        let setting = |device: Option<&str>| Setting {
            device: device.map(str::to_owned),
            precision: "fast",
            experts: "resident",
            slots: None,
            host_tier: None,
            reader: "pread",
            checked: false,
        };
        assert!(setting(None).is_default() && !setting(Some("a GPU")).is_default());
        assert_eq!(setting(None).line(), "precision fast | experts resident");
        assert_eq!(setting(Some("a GPU")).line(), "device a GPU | precision fast | experts resident");
        let slots = |slots, bytes| Some(Slots { slots, of_experts: 40, bytes });
        let streamed = |tier| Setting { slots: slots(3, 1024), host_tier: tier, experts: "streamed", ..setting(None) };
        let line = |tier| streamed(tier).line().split(": ").nth(1).unwrap().to_owned();
        assert_eq!(line(None), "slots for 3 of 40, 1.00 KiB, read with pread");
        assert_eq!(line(slots(40, 4096)), "slots for 3 of 40, 1.00 KiB, filled from host memory, which holds all");
        let both =
            "slots for 3 of 40, 1.00 KiB, filled from a host tier with slots for 6 of 40, 2.00 KiB, read with pread";
        assert_eq!(line(slots(6, 2048)), both);
        let keys = |device| serde_json::to_value(setting(device)).unwrap().as_object().unwrap().len();
        assert_eq!(keys(Some("a GPU")), keys(None) + 1);
    }
}
