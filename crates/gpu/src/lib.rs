//! The GPU backend: every stage of the model as WGSL kernels, through wgpu on Vulkan, Metal and D3D12.

mod attend_many;
#[cfg(test)]
mod attention_tests;
mod awake;
mod backend;
#[cfg(test)]
mod cooperative_tests;
mod device;
#[cfg(test)]
mod emulation;
mod error;
mod experts;
mod format;
mod jobs;
mod kernel;
mod kit;
mod loading;
mod matmul;
#[cfg(test)]
mod matvec_tests;
mod measure;
mod memory;
mod pass;
mod self_check;
mod stages;
mod state;
mod timer;
mod together;
#[cfg(test)]
mod translation;
mod upload;
mod weights;

pub use backend::{GpuBackend, Options, Placement, StageTimes};
pub use device::{AdapterReport, Checks, Choice, Device, DeviceMemory, adapters, best, may_have_hardware};
pub use error::GpuError;
pub use experts::{GpuLeases, Selection, Slabs, slot_bytes};
pub use loading::{LoadingBench, Way, pack_bytes_per_second};
pub use measure::{Measured, measure};
pub use memory::{DRIVER_BYTES, DeviceBytes, Room, UPLOAD_BYTES, device_bytes};
pub use pass::GpuPass;
pub use state::{GpuState, state_bytes};
pub use upload::Portions;
