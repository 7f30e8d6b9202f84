//! Where a model's weights will be: decided by the plan, told in one line.

use cpu::PassShape;
use gguf::Gguf;
use model::state::StateBytes;
use model::{Arithmetic, Config, KvLayout, Model, Precision};
use serde::Serialize;
use store::plan::{Purpose, SizeClass};
use store::{ExpertExtents, Needs, Plan, Request, Residency};

use crate::device::Device;
use crate::{flags, terminal};

/// Code, tables, stacks of threads, buffers of files: what the program takes for any model.
const PROGRAM_BYTES: u64 = 32 << 20;

/// What a model is loaded for.
#[derive(Clone, Copy)]
pub struct Work {
    /// How quantised weights are multiplied.
    pub precision: Precision,
    /// With or without the model's own low-precision roundings.
    pub arithmetic: Arithmetic,
    /// The largest pass.
    pub shape: PassShape,
    /// What was asked of the plan.
    pub request: Request,
    /// Whether weights are kept from being swapped out.
    pub lock: bool,
    /// Clones of the session that are held beside it.
    pub clones: usize,
}

impl Work {
    /// A session of up to `context_tokens` on a device, as the flags say.
    pub fn new<D: Device>(machine: &flags::Machine, context_tokens: usize) -> Work {
        let threads = machine.threads.map_or_else(|| cpu::Options::default().threads, usize::from);
        Work {
            precision: machine.precision(),
            arithmetic: Arithmetic::Official,
            shape: PassShape {
                rows: D::PASS_ROWS.min(context_tokens),
                wanted_rows: 1,
                end_tokens: context_tokens,
                threads,
            },
            request: Request { memory_bytes: machine.memory, cache: machine.cache, stream: machine.stream },
            lock: machine.lock,
            clones: 0,
        }
    }

    /// How a session's rows are stored.
    pub fn layout(&self, config: &Config) -> KvLayout {
        KvLayout::new(config, 0, self.arithmetic, self.precision)
    }
}

/// What a model needs to run on a device.
pub fn needs<D: Device>(header: &Gguf, model: &Model, work: &Work) -> Needs {
    let config = &model.config;
    let layout = work.layout(config);
    let extents: Vec<ExpertExtents> = model.experts.iter().map(|layer| layer.extents).collect();
    let tokens = work.shape.end_tokens;
    let state = StateBytes::at_most(&layout, tokens).total();
    let clones = work.clones * StateBytes::of_clone(&layout, tokens).total();
    let [resident, streamed] = [false, true].map(|streamed| D::static_bytes(model, streamed));
    Needs {
        program_bytes: PROGRAM_BYTES + header_bytes(header),
        static_bytes: streamed,
        context_tokens: tokens,
        state_bytes: (state + clones) as u64,
        pass_rows: work.shape.rows,
        pass_bytes: D::pass_bytes(config, &layout, work.shape),
        resident_bytes: extents.iter().map(ExpertExtents::total_bytes).sum::<u64>() + resident - streamed,
        experts: config.experts,
        experts_used: config.experts_used,
        classes: size_classes(&extents),
    }
}

/// Bytes of weights that one token uses: all but the embedding and the experts it does not choose.
pub fn token_weight_bytes(model: &Model) -> u64 {
    let expert = model.experts.iter().flat_map(|layer| layer.extents.expert_bytes()).sum::<usize>();
    cpu::static_bytes(model, true) + (expert * model.config.experts_used) as u64
}

/// Layers whose experts need slots of the same size.
fn size_classes(layers: &[ExpertExtents]) -> Vec<SizeClass> {
    let (class_of_layer, slot_bytes) = store::size_classes(layers);
    let layers_of = |class: usize| class_of_layer.iter().filter(|&&other| other == class).count();
    let class = |(class, &bytes): (usize, &usize)| SizeClass { slot_bytes: bytes as u64, layers: layers_of(class) };
    slot_bytes.iter().enumerate().map(class).collect()
}

/// The directory of tensors and the vocabulary, as they stand in the header and as the tokenizer holds them: each
/// string a few times, and an entry in a table.
fn header_bytes(header: &Gguf) -> u64 {
    const STRING_BYTES: u64 = 300;
    let strings = |key: &str| header.metadata.str_array(key).map_or(0, |strings| strings.len() as u64);
    let strings = strings("tokenizer.ggml.tokens") + strings("tokenizer.ggml.merges");
    (strings + header.tensors.len() as u64) * STRING_BYTES
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
    /// Of a model that was loaded by `plan`.
    pub fn new<D: Device>(precision: Precision, plan: &Plan, backend: &D) -> Setting {
        let mut total = Slots { slots: 0, of_experts: 0, bytes: 0 };
        for (purpose, class_bytes) in &plan.items {
            if let Purpose::Slots { slots, experts, .. } = purpose {
                (total.slots, total.of_experts) = (total.slots + slots, total.of_experts + experts);
                total.bytes += class_bytes;
            }
        }
        let is_streamed = plan.residency != Residency::Resident;
        Setting {
            device: backend.name().map(str::to_owned),
            precision: name(precision),
            experts: if is_streamed { "streamed" } else { "resident" },
            slots: is_streamed.then_some(total),
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
        let Setting { device, precision, experts, slots, reader, checked } = self;
        let checked = if *checked { ", checked" } else { "" };
        let slots = slots.map_or(String::new(), |Slots { slots, of_experts, bytes }| {
            format!(": slots for {slots} of {of_experts}, {}, read with {reader}{checked}", terminal::bytes(bytes))
        });
        let device = device.as_ref().map_or(String::new(), |device| format!("device {device} | "));
        format!("{device}precision {precision} | experts {experts}{slots}")
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
            reader: "pread",
            checked: false,
        };
        assert!(setting(None).is_default() && !setting(Some("a GPU")).is_default());
        assert_eq!(setting(None).line(), "precision fast | experts resident");
        assert_eq!(setting(Some("a GPU")).line(), "device a GPU | precision fast | experts resident");
        let keys = |device| serde_json::to_value(setting(device)).unwrap().as_object().unwrap().len();
        assert_eq!(keys(Some("a GPU")), keys(None) + 1);
    }
}
