//! Time of each stage by the device's own clock, and of the parts of loading by the host's.

use std::sync::Arc;
use std::time::Instant;

use crate::GpuError;
use crate::backend::StageTimes;
use crate::device::Device;

/// Moments that fit.
const MOST: u32 = 4096;

/// Takes the time between stages.
pub(crate) struct Timer {
    device: Arc<Device>,
    queries: wgpu::QuerySet,
    /// What began at each moment.
    names: Vec<&'static str>,
}

impl Timer {
    /// `None` if the device's clock cannot be read.
    pub(crate) fn new(device: &Arc<Device>) -> Option<Timer> {
        device.timestamp_ns?;
        let queries = device.device.create_query_set(&wgpu::QuerySetDescriptor {
            label: Some("timer"),
            ty: wgpu::QueryType::Timestamp,
            count: MOST,
        });
        Some(Timer { device: device.clone(), queries, names: Vec::new() })
    }

    /// `name` begins when everything before has ended.
    pub(crate) fn stage(&mut self, name: &'static str, encoder: &mut wgpu::CommandEncoder) {
        if self.names.len() < MOST as usize {
            encoder.write_timestamp(&self.queries, self.names.len() as u32);
            self.names.push(name);
        }
    }

    /// Microseconds of each stage that has ended, and begins anew.
    ///
    /// # Errors
    /// The device failed.
    pub(crate) fn take(&mut self) -> Result<Vec<(&'static str, f64)>, GpuError> {
        let count = self.names.len();
        let (device, bytes) = (&self.device.device, count.max(1) as u64 * 8);
        let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
        let resolved = device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: bytes,
            usage,
            mapped_at_creation: false,
        });
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let target = device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: bytes,
            usage,
            mapped_at_creation: false,
        });
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: None });
        encoder.resolve_query_set(&self.queries, 0..count as u32, &resolved, 0);
        encoder.copy_buffer_to_buffer(&resolved, 0, &target, 0, bytes);
        self.device.queue.submit([encoder.finish()]);
        target.map_async(wgpu::MapMode::Read, .., |_| ());
        self.device.wait()?;
        let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&self.device.mapped(&target)?[..]);
        let tick_us = f64::from(self.device.timestamp_ns.unwrap_or(1.0)) / 1e3;
        let names = std::mem::take(&mut self.names);
        let spans = ticks.windows(2).map(|pair| pair[1].saturating_sub(pair[0]) as f64 * tick_us);
        Ok(names.into_iter().zip(spans).collect())
    }
}

/// Takes the time of what the host does, one after the other.
pub(crate) struct Stopwatch {
    since: Instant,
    pub(crate) times: StageTimes,
}

impl Stopwatch {
    pub(crate) fn new() -> Stopwatch {
        Stopwatch { since: Instant::now(), times: Vec::new() }
    }

    /// What was done since the last time.
    pub(crate) fn done(&mut self, what: &'static str) {
        self.times.push((what, self.since.elapsed().as_secs_f64() * 1e6));
        self.since = Instant::now();
    }
}
