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
    /// Edge of the cooperative matrices that `Fast` multiplies large passes with, if the adapter has such.
    pub cooperative_tile: Option<u32>,
    /// What the backend needs and the adapter lacks; empty if it can be used.
    pub lacks: Vec<String>,
}

/// Which adapter to compute on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The first that is no software and lacks nothing.
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

fn instance() -> wgpu::Instance {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
    descriptor.flags = wgpu::InstanceFlags::empty();
    wgpu::Instance::new(descriptor)
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
        cooperative_tile: cooperative_tile(adapter),
        lacks: lacks(adapter),
    }
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

fn lacks(adapter: &wgpu::Adapter) -> Vec<String> {
    let (features, limits) = (adapter.features(), adapter.limits());
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
        let wanted = Features::TIMESTAMP_QUERY | Features::TIMESTAMP_QUERY_INSIDE_ENCODERS;
        let mut features = Features::IMMEDIATES | adapter.features() & (wanted | Features::SHADER_F16);
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
            memory_hints: wgpu::MemoryHints::Performance,
            trace: wgpu::Trace::Off,
        };
        let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))
            .map_err(|cause| GpuError::Open { name: report.name.clone(), cause: cause.to_string() })?;
        let failure = Arc::new(Mutex::new(None));
        let tell = |failure: &Arc<Mutex<Option<String>>>, what: String| {
            failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(what);
        };
        let lost = failure.clone();
        device.set_device_lost_callback(move |reason, message| {
            tell(&lost, format!("device lost, {reason:?}: {message}"))
        });
        let uncaptured = failure.clone();
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| tell(&uncaptured, error.to_string())));
        let timestamp_ns = features.contains(wanted).then(|| queue.get_timestamp_period());
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

fn choose(choice: Choice, reports: &[AdapterReport]) -> Result<usize, GpuError> {
    let found = || {
        let names: Vec<String> = reports.iter().map(|r| format!("gpu:{} {} ({})", r.index, r.name, r.kind)).collect();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    };
    let index = match choice {
        Choice::Index(index) => (index < reports.len()).then_some(index),
        Choice::Hardware => reports.iter().position(|r| r.kind != "software" && r.lacks.is_empty()),
    };
    index.ok_or_else(|| GpuError::NoAdapter {
        wanted: match choice {
            Choice::Index(index) => format!("gpu:{index}"),
            Choice::Hardware => "a hardware GPU that can run the kernels".to_owned(),
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
            cooperative_tile: None,
            lacks: lacks.iter().map(|&what| what.to_owned()).collect(),
        }
    }

    #[test]
    fn hardware_is_chosen_and_software_only_by_number() {
        let all = [adapter(0, "software", &[]), adapter(1, "discrete", &["immediates"]), adapter(2, "integrated", &[])];
        assert_eq!(choose(Choice::Hardware, &all).unwrap(), 2);
        assert_eq!(choose(Choice::Index(0), &all).unwrap(), 0);
        let error = choose(Choice::Index(3), &all).unwrap_err().to_string();
        assert!(error.contains("gpu:3") && error.contains("gpu:2 integrated 2"), "{error}");
        let error = choose(Choice::Hardware, &all[..2]).unwrap_err().to_string();
        assert!(error.contains("gpu:0 software 0 (software)"), "{error}");
    }
}
