//! Adapters, and the one that computes.

use std::sync::{Arc, Mutex, PoisonError};

use wgpu::{CooperativeScalarType, DeviceType, Features, Limits};

use crate::GpuError;

/// Bytes of a kernel's parameters: what every Vulkan driver offers.
pub(crate) const PARAMS_BYTES: u32 = 128;

/// Workgroup memory that kernels use at most: what Metal and software Vulkan offer.
pub(crate) const WORKGROUP_BYTES: u32 = 32 << 10;

/// What an adapter is and can do.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterReport {
    /// Number to name it by, in the order of the system.
    pub index: usize,
    /// What its driver calls it.
    pub name: String,
    /// `discrete`, `integrated`, `software` or `other`.
    pub kind: &'static str,
    /// `vulkan`, `metal` or `dx12`.
    pub api: String,
    /// The driver and its version.
    pub driver: String,
    /// Bytes of the largest buffer.
    pub buffer_bytes: u64,
    /// Bytes of a buffer that a kernel can reach.
    pub binding_bytes: u64,
    /// Bytes of memory that the threads of a workgroup share.
    pub workgroup_bytes: u32,
    /// Threads that run in step: fewest and most.
    pub subgroup: [u32; 2],
    /// Its memory, if the driver says (Vulkan's do).
    pub memory: Option<DeviceMemory>,
    /// Whether kernels can compute with halves.
    pub f16: bool,
    /// Whether the time of each stage can be taken.
    pub timestamps: bool,
    /// Edge of the cooperative matrices that `Fast` multiplies large passes with, if the adapter has such.
    pub cooperative_tile: Option<u32>,
    /// What the backend needs and the adapter lacks; empty if it can be used.
    pub lacks: Vec<String>,
}

/// Memory of an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// All there is.
    pub total_bytes: u64,
    /// What this process can have now, if the driver says (`VK_EXT_memory_budget`).
    pub free_bytes: Option<u64>,
}

impl AdapterReport {
    /// Whether its memory is the host's, so that what it takes is not there for anything else.
    pub fn is_unified(&self) -> bool {
        matches!(self.kind, "integrated" | "software")
    }
}

/// Which adapter to compute on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// What [`best`] finds.
    #[default]
    Hardware,
    /// The adapter of this number, whatever it is.
    Index(usize),
}

/// Whether kernels check every index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checks {
    /// They do: a wrong index reads or writes something harmless.
    On,
    /// They do not, and are a little faster.
    Off,
}

/// Nothing of it comes from environment variables (wgpu would read some if it were asked to).
fn instance() -> wgpu::Instance {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
    descriptor.flags = wgpu::InstanceFlags::empty();
    wgpu::Instance::new(descriptor)
}

/// Whether the system shows a GPU at all. Asking its drivers costs time and memory, and some of them talk; where this says
/// no, there is nothing but software to be found.
#[cfg(target_os = "linux")]
pub fn may_have_hardware() -> bool {
    let nodes = |folder: &str| std::fs::read_dir(folder).into_iter().flatten().flatten();
    let is_gpu = |name: &str| {
        let numbered = name.strip_prefix("nvidia").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
        numbered || ["dxg", "kgsl-3d0", "mali0", "nvgpu"].contains(&name)
    };
    nodes("/dev/dri").any(|node| node.file_name().to_string_lossy().starts_with("renderD"))
        || nodes("/dev").any(|node| is_gpu(&node.file_name().to_string_lossy()))
}

/// Whether the system shows a GPU at all: it may.
#[cfg(not(target_os = "linux"))]
pub fn may_have_hardware() -> bool {
    true
}

/// Every adapter that the system offers.
pub fn adapters() -> Vec<AdapterReport> {
    let instance = instance();
    let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    adapters.iter().enumerate().map(|(index, adapter)| report(index, adapter)).collect()
}

fn report(index: usize, adapter: &wgpu::Adapter) -> AdapterReport {
    let (info, limits) = (adapter.get_info(), adapter.limits());
    AdapterReport {
        index,
        name: info.name.clone(),
        kind: match info.device_type {
            DeviceType::DiscreteGpu => "discrete",
            DeviceType::IntegratedGpu => "integrated",
            DeviceType::Cpu => "software",
            DeviceType::VirtualGpu | DeviceType::Other => "other",
        },
        api: info.backend.to_string(),
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
        buffer_bytes: limits.max_buffer_size,
        binding_bytes: limits.max_storage_buffer_binding_size,
        workgroup_bytes: limits.max_compute_workgroup_storage_size,
        subgroup: [info.subgroup_min_size, info.subgroup_max_size],
        memory: memory(adapter),
        f16: adapter.features().contains(Features::SHADER_F16),
        timestamps: adapter.features().contains(TIMESTAMPS),
        cooperative_tile: cooperative_tile(adapter),
        lacks: lacks(adapter.features(), &limits),
    }
}

/// What the time of a stage is taken with.
const TIMESTAMPS: Features = Features::TIMESTAMP_QUERY.union(Features::TIMESTAMP_QUERY_INSIDE_ENCODERS);

/// The largest heap of the adapter's own memory, as Vulkan tells it; wgpu itself does not.
#[cfg(not(target_vendor = "apple"))]
fn memory(adapter: &wgpu::Adapter) -> Option<DeviceMemory> {
    use ash::vk;
    // SAFETY: nothing is destroyed through the guard, which ends with this function.
    let hal = unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }?;
    let instance = hal.shared_instance();
    if vk::api_version_major(instance.instance_api_version()) == 1
        && vk::api_version_minor(instance.instance_api_version()) < 1
    {
        return None;
    }
    let tells_budget = hal.physical_device_capabilities().supports_extension(ash::ext::memory_budget::NAME);
    let mut budget = vk::PhysicalDeviceMemoryBudgetPropertiesEXT::default();
    let mut properties = vk::PhysicalDeviceMemoryProperties2::default();
    if tells_budget {
        properties = properties.push_next(&mut budget);
    }
    // SAFETY: the physical device is one of this instance, which is alive; Vulkan 1.1 has the call; the one structure that
    // is chained on is of an extension that the device has.
    unsafe {
        instance.raw_instance().get_physical_device_memory_properties2(hal.raw_physical_device(), &mut properties)
    };
    let heaps = properties.memory_properties;
    let own = (0..heaps.memory_heap_count as usize)
        .filter(|&i| heaps.memory_heaps[i].flags.contains(vk::MemoryHeapFlags::DEVICE_LOCAL));
    let largest = own.max_by_key(|&i| heaps.memory_heaps[i].size)?;
    // The budget is what the process may hold, what it holds already included.
    let free = budget.heap_budget[largest].saturating_sub(budget.heap_usage[largest]);
    Some(DeviceMemory { total_bytes: heaps.memory_heaps[largest].size, free_bytes: tells_budget.then_some(free) })
}

/// Metal was never run: nothing is asked of it that wgpu does not ask. Its memory is the host's.
#[cfg(target_vendor = "apple")]
fn memory(_: &wgpu::Adapter) -> Option<DeviceMemory> {
    None
}

/// Edge of a tile of f16 factors with f32 sums.
fn cooperative_tile(adapter: &wgpu::Adapter) -> Option<u32> {
    if !adapter.features().contains(Features::EXPERIMENTAL_COOPERATIVE_MATRIX | Features::SHADER_F16) {
        return None;
    }
    let fits = |tile: &wgpu::CooperativeMatrixProperties| {
        (tile.m_size, tile.n_size, tile.k_size) == (16, 16, 16)
            && (tile.ab_type, tile.cr_type) == (CooperativeScalarType::F16, CooperativeScalarType::F32)
    };
    adapter.cooperative_matrix_properties().iter().find(|tile| fits(tile)).map(|tile| tile.m_size)
}

fn lacks(features: Features, limits: &Limits) -> Vec<String> {
    let needs = [
        (features.contains(Features::IMMEDIATES), "kernel parameters (immediates)".to_owned()),
        (
            limits.max_immediate_size >= PARAMS_BYTES,
            format!("{PARAMS_BYTES} bytes of kernel parameters (it has {})", limits.max_immediate_size),
        ),
        (
            limits.max_compute_workgroup_storage_size >= WORKGROUP_BYTES,
            format!(
                "{WORKGROUP_BYTES} bytes of workgroup memory (it has {})",
                limits.max_compute_workgroup_storage_size
            ),
        ),
        (limits.max_compute_invocations_per_workgroup >= 256, "workgroups of 256 threads".to_owned()),
        (limits.max_storage_buffers_per_shader_stage >= 8, "8 buffers to a kernel".to_owned()),
    ];
    needs.into_iter().filter(|(met, _)| !met).map(|(_, what)| what).collect()
}

/// An adapter in use.
pub struct Device {
    pub(crate) device: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    pub(crate) report: AdapterReport,
    pub(crate) checks: Checks,
    /// Nanoseconds of a tick of the device's clock, if it can be read.
    pub(crate) timestamp_ns: Option<f32>,
    failure: Arc<Mutex<Option<String>>>,
    /// Memory that results were read back through, to be used again.
    readbacks: Mutex<Vec<wgpu::Buffer>>,
}

impl Device {
    /// Opens an adapter.
    ///
    /// # Errors
    /// [`GpuError::NoAdapter`] if there is none of that number, or no hardware; [`GpuError::Lacks`] if it cannot run the
    /// kernels; [`GpuError::Open`] if its driver refuses.
    pub fn open(choice: Choice, checks: Checks) -> Result<Arc<Device>, GpuError> {
        let instance = instance();
        let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
        let reports: Vec<AdapterReport> = adapters.iter().enumerate().map(|(i, adapter)| report(i, adapter)).collect();
        let index = choose(choice, &reports)?;
        let (adapter, report) = (&adapters[index], &reports[index]);
        if !report.lacks.is_empty() {
            return Err(GpuError::Lacks { name: report.name.clone(), lacks: report.lacks.join(", ") });
        }
        let mut features = Features::IMMEDIATES | adapter.features() & (TIMESTAMPS | Features::SHADER_F16);
        if report.cooperative_tile.is_some() {
            features |= Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
        }
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("infall"),
            required_features: features,
            required_limits: Limits { max_immediate_size: PARAMS_BYTES, ..adapter.limits() },
            // SAFETY: the one experimental feature is cooperative matrices. Its known faults are in how kernels that
            // use it are translated; those kernels are compared with their plain twins on each adapter they are used on.
            experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
            // Small blocks: what is larger has memory of its own, so that a layer's slab wastes none.
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            trace: wgpu::Trace::Off,
        };
        let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))
            .map_err(|cause| GpuError::Open { name: report.name.clone(), cause: cause.to_string() })?;
        let failure = Arc::new(Mutex::new(None));
        let tell = |failure: &Arc<Mutex<Option<String>>>, what: String| {
            let what = what.split_whitespace().collect::<Vec<_>>().join(" ");
            failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(what);
        };
        let lost = failure.clone();
        device.set_device_lost_callback(move |reason, message| {
            tell(&lost, format!("device lost, {reason:?}: {message}"))
        });
        let uncaptured = failure.clone();
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| tell(&uncaptured, error.to_string())));
        let timestamp_ns = features.contains(TIMESTAMPS).then(|| queue.get_timestamp_period());
        Ok(Arc::new(Device {
            device,
            queue,
            report: report.clone(),
            checks,
            timestamp_ns,
            failure,
            readbacks: Mutex::default(),
        }))
    }

    /// What the adapter is and can do.
    pub fn report(&self) -> &AdapterReport {
        &self.report
    }

    /// What went wrong since the device was opened, if anything did: nothing it computed after that can be relied on.
    ///
    /// # Errors
    /// [`GpuError::Failed`] with the driver's words.
    pub(crate) fn check(&self) -> Result<(), GpuError> {
        match &*self.failure.lock().unwrap_or_else(PoisonError::into_inner) {
            None => Ok(()),
            Some(what) => Err(GpuError::Failed { name: self.report.name.clone(), what: what.clone() }),
        }
    }

    /// The same after something that may fail at once, which `when` names.
    ///
    /// # Errors
    /// As [`Device::check`].
    pub(crate) fn check_after(&self, when: impl FnOnce() -> String) -> Result<(), GpuError> {
        self.check().map_err(|error| match error {
            GpuError::Failed { name, what } => GpuError::Failed { name, what: format!("{what} ({})", when()) },
            error => error,
        })
    }

    /// Waits until everything submitted has been executed.
    pub(crate) fn wait(&self) -> Result<(), GpuError> {
        let result = self.device.poll(wgpu::PollType::wait_indefinitely());
        self.check()?;
        result.map(|_| ()).map_err(|cause| GpuError::Failed { name: self.report.name.clone(), what: cause.to_string() })
    }
}

impl Device {
    /// Memory of at least so many bytes that the host can read once something was copied there.
    pub(crate) fn readback(&self, bytes: u64) -> Result<wgpu::Buffer, GpuError> {
        let mut held = self.readbacks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(i) = held.iter().position(|buffer| buffer.size() >= bytes) {
            return Ok(held.swap_remove(i));
        }
        drop(held);
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let size = bytes.next_power_of_two().max(4096);
        let descriptor = wgpu::BufferDescriptor { label: Some("read back"), size, usage, mapped_at_creation: false };
        let buffer = self.device.create_buffer(&descriptor);
        self.check()?;
        Ok(buffer)
    }

    /// Keeps such memory for the next time.
    pub(crate) fn keep_readback(&self, buffer: wgpu::Buffer) {
        let mut held = self.readbacks.lock().unwrap_or_else(PoisonError::into_inner);
        if held.len() < 4 && buffer.size() <= 1 << 24 {
            held.push(buffer);
        }
    }

    /// What a buffer whose mapping was waited for holds.
    pub(crate) fn mapped(&self, buffer: &wgpu::Buffer) -> Result<wgpu::BufferView, GpuError> {
        let failed = |cause: wgpu::MapRangeError| GpuError::Failed {
            name: self.report.name.clone(),
            what: format!("memory could not be read back: {cause}"),
        };
        buffer.get_mapped_range(..).map_err(failed)
    }

    /// The first bytes of a buffer that is mapped to be written.
    pub(crate) fn mapped_mut(&self, buffer: &wgpu::Buffer, bytes: u64) -> Result<wgpu::BufferViewMut, GpuError> {
        let failed = |cause: wgpu::MapRangeError| GpuError::Failed {
            name: self.report.name.clone(),
            what: format!("memory could not be written to: {cause}"),
        };
        buffer.get_mapped_range_mut(..bytes).map_err(failed)
    }
}

/// The adapter to compute on where none is named: no software, lacking nothing, discrete before integrated, then the one with
/// the most memory, then the first.
pub fn best(reports: &[AdapterReport]) -> Option<usize> {
    let usable = reports.iter().enumerate().filter(|(_, report)| report.kind != "software" && report.lacks.is_empty());
    let worth =
        |report: &AdapterReport| (report.kind == "discrete", report.memory.map_or(0, |memory| memory.total_bytes));
    usable.rev().max_by_key(|(_, report)| worth(report)).map(|(i, _)| i)
}

fn choose(choice: Choice, reports: &[AdapterReport]) -> Result<usize, GpuError> {
    let found = || {
        let names: Vec<String> = reports.iter().map(|r| format!("gpu:{} {} ({})", r.index, r.name, r.kind)).collect();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    };
    let index = match choice {
        Choice::Index(index) => (index < reports.len()).then_some(index),
        Choice::Hardware => best(reports),
    };
    index.ok_or_else(|| GpuError::NoAdapter {
        wanted: match choice {
            Choice::Index(index) => format!("gpu:{index}"),
            Choice::Hardware => {
                "hardware GPU that can run the kernels (software ones are used only by number, gpu:N)".into()
            }
        },
        found: found(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(index: usize, kind: &'static str, lacks: &[&str]) -> AdapterReport {
        AdapterReport {
            index,
            name: format!("{kind} {index}"),
            kind,
            api: "vulkan".into(),
            driver: String::new(),
            buffer_bytes: 1 << 30,
            binding_bytes: 1 << 27,
            workgroup_bytes: 32 << 10,
            subgroup: [8, 8],
            memory: None,
            f16: false,
            timestamps: false,
            cooperative_tile: None,
            lacks: lacks.iter().map(|&what| what.to_owned()).collect(),
        }
    }

    #[test]
    fn what_an_adapter_lacks_is_named() {
        let enough = Limits { max_immediate_size: PARAMS_BYTES, ..Limits::default() };
        let enough = Limits { max_compute_workgroup_storage_size: WORKGROUP_BYTES, ..enough };
        assert_eq!(lacks(Features::IMMEDIATES, &enough), Vec::<String>::new());
        let small = Limits { max_compute_workgroup_storage_size: 16 << 10, max_immediate_size: 64, ..enough };
        let lacks = lacks(Features::empty(), &small).join(", ");
        for what in [
            "immediates",
            "128 bytes of kernel parameters (it has 64)",
            "32768 bytes of workgroup memory (it has 16384)",
        ] {
            assert!(lacks.contains(what), "{lacks}");
        }
        let text = GpuError::Lacks { name: "a card".into(), lacks }.to_string();
        assert!(text.contains("a card lacks") && text.contains("--device cpu"), "{text}");
    }

    #[test]
    fn hardware_is_chosen_and_software_only_by_number() {
        let all = [adapter(0, "software", &[]), adapter(1, "discrete", &["immediates"]), adapter(2, "integrated", &[])];
        assert_eq!(choose(Choice::Hardware, &all).unwrap(), 2);
        assert_eq!(choose(Choice::Index(0), &all).unwrap(), 0);
        let error = choose(Choice::Index(3), &all).unwrap_err().to_string();
        assert!(error.contains("gpu:3") && error.contains("gpu:2 integrated 2"), "{error}");
        let mut two = vec![adapter(0, "integrated", &[]), adapter(1, "discrete", &[]), adapter(2, "discrete", &[])];
        assert_eq!(best(&two), Some(1));
        two[2].memory = Some(DeviceMemory { total_bytes: 1 << 30, free_bytes: None });
        assert_eq!(best(&two), Some(2));
        let error = choose(Choice::Hardware, &all[..2]).unwrap_err().to_string();
        assert!(error.contains("gpu:0 software 0 (software)"), "{error}");
    }
}
