//! Which device computes: what `--device` says, or what suits the model. Flags and the machine decide, and no environment
//! variable.

use std::fmt;
use std::str::FromStr;

use gguf::Gguf;
use gpu::{AdapterReport, GpuBackend, GpuError};
use model::Model;

use super::cpu::Processor;
use super::{Device, gpu as own};
use crate::placement::Work;
use crate::terminal;

/// What `--device` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Asked {
    /// A GPU that can hold what it has to, else the processor.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// The best GPU.
    Gpu,
    /// The adapter of this number, even if it is software.
    Number(usize),
}

impl FromStr for Asked {
    type Err = String;

    fn from_str(text: &str) -> Result<Asked, String> {
        match text {
            "auto" => Ok(Asked::Auto),
            "cpu" => Ok(Asked::Cpu),
            "gpu" => Ok(Asked::Gpu),
            _ => text.strip_prefix("gpu:").and_then(|number| number.parse().ok()).map(Asked::Number).ok_or_else(|| {
                "expected auto, cpu, gpu, or gpu:N with the number of an adapter (`infall devices` lists them)".into()
            }),
        }
    }
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Asked::Auto => f.write_str("auto"),
            Asked::Cpu => f.write_str("cpu"),
            Asked::Gpu => f.write_str("gpu"),
            Asked::Number(number) => write!(f, "gpu:{number}"),
        }
    }
}

/// What computes.
#[derive(Clone, Debug)]
pub enum Chosen {
    /// The processor.
    Cpu(Processor),
    /// A GPU.
    Gpu(Box<AdapterReport>),
}

/// Goes on with the kind of device that was chosen: `on_device!(chosen, |on: D| run::<D>(&on))`.
macro_rules! on_device {
    ($chosen:expr, |$on:ident: $device:ident| $then:expr) => {
        match $chosen {
            $crate::device::Chosen::Cpu($on) => {
                type $device = ::cpu::CpuBackend;
                $then
            }
            $crate::device::Chosen::Gpu($on) => {
                type $device = ::gpu::GpuBackend;
                let $on = *$on;
                $then
            }
        }
    };
}
pub(crate) use on_device;

/// The device for `work`, and a line that says why, where there is something to say. `is_built_in` models are small and
/// compute on the processor unless a device is named.
///
/// # Errors
/// There is no such device, or it cannot run the kernels.
pub fn choose(
    header: &Gguf,
    model: &Model,
    is_built_in: bool,
    work: &Work,
) -> anyhow::Result<(Chosen, Option<String>)> {
    let cpu = Chosen::Cpu(Processor);
    let named = |wanted: &str, find: &dyn Fn(&[AdapterReport]) -> Option<usize>| {
        let reports = gpu::adapters();
        let found = find(&reports).and_then(|index| reports.get(index)).ok_or_else(|| no_adapter(wanted, &reports))?;
        Ok((Chosen::Gpu(Box::new(found.clone())), None))
    };
    match work.device {
        Asked::Cpu if work.gpu_memory.is_some() => {
            anyhow::bail!("found --gpu-memory with --device cpu, expected one of them: the cpu has --memory")
        }
        Asked::Cpu => Ok((cpu, None)),
        Asked::Number(number) => named(&format!("gpu:{number}"), &|_| Some(number)),
        Asked::Gpu => named("hardware GPU that can run the kernels", &gpu::best),
        Asked::Auto if is_built_in => Ok((cpu, None)),
        Asked::Auto => {
            let reports = if gpu::may_have_hardware() { gpu::adapters() } else { Vec::new() };
            let fits = |report: &AdapterReport| {
                let plans = GpuBackend::plan(report, header, model, work)?;
                Ok(own::fits(report, &plans))
            };
            Ok(match automatic(&reports, fits) {
                Automatic::Gpu(index, why) => (Chosen::Gpu(Box::new(reports[index].clone())), Some(why)),
                Automatic::Cpu(why) => {
                    let is_limited = work.gpu_memory.is_some();
                    let none = || is_limited.then(|| "device: cpu: no GPU was found for --gpu-memory".to_owned());
                    (cpu, why.or_else(none))
                }
            })
        }
    }
}

fn no_adapter(wanted: &str, reports: &[AdapterReport]) -> anyhow::Error {
    let tell = |report: &AdapterReport| {
        let lacks = if report.lacks.is_empty() { "" } else { ", cannot be used" };
        format!("gpu:{} {} ({}{lacks})", report.index, terminal::escape_controls(&report.name), report.kind)
    };
    let found =
        if reports.is_empty() { "none".into() } else { reports.iter().map(tell).collect::<Vec<_>>().join(", ") };
    let software = match reports.iter().any(|report| report.kind == "software") {
        true => ". A software adapter is slow, and used only by its number: --device gpu:N",
        false => "",
    };
    GpuError::NoAdapter { wanted: wanted.into(), found: found + software }.into()
}

/// What the automatic choice came to, and why; a processor that nothing competes with needs no reason.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Automatic {
    Cpu(Option<String>),
    Gpu(usize, String),
}

/// The best discrete or integrated GPU for which `fits` says how the model fits it, else the processor.
fn automatic(reports: &[AdapterReport], fits: impl Fn(&AdapterReport) -> anyhow::Result<String>) -> Automatic {
    let hardware: Vec<&AdapterReport> =
        reports.iter().filter(|report| matches!(report.kind, "discrete" | "integrated")).collect();
    let mut left: Vec<AdapterReport> = hardware.iter().map(|&report| report.clone()).collect();
    let mut refused = None;
    while let Some(best) = gpu::best(&left) {
        let report = left.remove(best);
        match fits(&report) {
            Ok(why) => return Automatic::Gpu(report.index, format!("device: {}: {why}", own::title(&report))),
            Err(error) => {
                refused.get_or_insert_with(|| format!("device: cpu, not {}: {error:#}", own::title(&report)));
            }
        }
    }
    let lacking = || {
        let report = hardware.first()?;
        Some(format!("device: cpu, not {}: it lacks {}", own::title(report), report.lacks.join(", ")))
    };
    Automatic::Cpu(refused.or_else(lacking))
}

#[cfg(test)]
mod tests {
    use ::gpu::DeviceMemory;

    use super::*;

    fn report(index: usize, kind: &'static str, gib: u64) -> AdapterReport {
        AdapterReport {
            index,
            name: format!("Card {index}"),
            kind,
            api: "vulkan".into(),
            driver: "1".into(),
            buffer_bytes: 4 << 30,
            binding_bytes: 2 << 30,
            workgroup_bytes: 48 << 10,
            subgroup: [32, 32],
            memory: Some(DeviceMemory { total_bytes: gib << 30, free_bytes: None }),
            f16: true,
            timestamps: true,
            cooperative_tile: None,
            lacks: Vec::new(),
        }
    }

    /// Fits what has so many GiB.
    fn needs(gib: u64) -> impl Fn(&AdapterReport) -> anyhow::Result<String> {
        move |report| match report.memory {
            Some(memory) if memory.total_bytes >= gib << 30 => Ok("it fits".into()),
            _ => anyhow::bail!("{gib} GiB are needed"),
        }
    }

    #[test]
    fn the_largest_discrete_card_that_fits_is_chosen() {
        let all = [report(0, "integrated", 64), report(1, "discrete", 8), report(2, "discrete", 24)];
        let gpu = |index: usize| Automatic::Gpu(index, format!("device: gpu {index}, Card {index} (Vulkan): it fits"));
        assert_eq!(automatic(&all, needs(4)), gpu(2));
        assert_eq!(automatic(&all, needs(32)), gpu(0), "what discrete cards cannot hold, shared memory may");
        let none = Automatic::Cpu(Some("device: cpu, not gpu 2, Card 2 (Vulkan): 100 GiB are needed".into()));
        assert_eq!(automatic(&all, needs(100)), none);
    }

    #[test]
    fn software_is_never_chosen_and_needs_no_reason() {
        assert_eq!(automatic(&[], needs(0)), Automatic::Cpu(None));
        assert_eq!(automatic(&[report(0, "software", 64), report(1, "other", 64)], needs(0)), Automatic::Cpu(None));
    }

    #[test]
    fn a_card_that_lacks_something_is_named() {
        let all = [AdapterReport { lacks: vec!["immediates".into()], ..report(0, "discrete", 64) }];
        let why = "device: cpu, not gpu 0, Card 0 (Vulkan): it lacks immediates";
        assert_eq!(automatic(&all, needs(0)), Automatic::Cpu(Some(why.into())));
    }

    #[test]
    fn devices_are_named_in_one_way() {
        for (text, asked) in
            [("auto", Asked::Auto), ("cpu", Asked::Cpu), ("gpu", Asked::Gpu), ("gpu:3", Asked::Number(3))]
        {
            assert_eq!(text.parse(), Ok(asked));
            assert_eq!(asked.to_string(), text);
        }
        for text in ["", "gpu:", "gpu:-1", "gpu:x", "GPU", "cuda"] {
            assert!(text.parse::<Asked>().unwrap_err().contains("expected auto, cpu, gpu, or gpu:N"), "{text}");
        }
    }

    #[test]
    fn a_refusal_lists_adapters() {
        let error = no_adapter("hardware GPU", &[report(0, "software", 8)]).to_string();
        assert!(error.contains("gpu:0 Card 0 (software)") && error.contains("only by its number"), "{error}");
        assert!(no_adapter("gpu:1", &[]).to_string().contains("the adapters are: none"));
    }
}
