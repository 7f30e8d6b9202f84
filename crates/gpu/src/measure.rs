//! How fast an adapter's memory can be read and filled: what decoding and streaming can be measured against.

use std::sync::Arc;
use std::time::{Duration, Instant};

use model::Error;

use crate::device::{Checks, Choice, Device};
use crate::format::Format;
use crate::kernel::{Buffer, Commands, Kernels};
use crate::upload::{FileRows, Rows, Transfer, Uploader};

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// Bytes a second that a kernel reads of the adapter's memory, the best of several sweeps.
    pub read_bytes_per_second: f64,
    /// Bytes a second that go from host memory to the adapter's, on the way that weights take.
    pub upload_bytes_per_second: f64,
}

/// Bytes that are read: on hardware more than caches hold, on software what takes no time.
const HARDWARE_BYTES: u64 = 1 << 30;
const SOFTWARE_BYTES: u64 = 64 << 20;

/// Workgroups of a sweep.
const GROUPS: u32 = 8192;

/// How long an idle adapter is given to wake up and show its best.
const TRIED_FOR: Duration = Duration::from_millis(1500);

/// Measures an adapter.
///
/// # Errors
/// It cannot be opened, has no memory for it, or failed.
pub fn measure(choice: Choice) -> Result<Measured, Error> {
    let device = Device::open(choice, Checks::Off)?;
    let wanted = if device.report.kind == "software" { SOFTWARE_BYTES } else { HARDWARE_BYTES };
    let bytes = wanted.min(device.report.binding_bytes) / (4 << 20) * (4 << 20);
    let memory = Buffer::new(&device, "memory to be read", bytes)?;
    let upload_bytes_per_second = upload(&device, &memory)?;
    Ok(Measured { read_bytes_per_second: read(device, &memory)?, upload_bytes_per_second })
}

/// The best rate of what moves `bytes` each time.
fn best(bytes: u64, mut run: impl FnMut() -> Result<(), Error>) -> Result<f64, Error> {
    let (began, mut shortest) = (Instant::now(), f64::INFINITY);
    while began.elapsed() < TRIED_FOR {
        let start = Instant::now();
        run()?;
        shortest = shortest.min(start.elapsed().as_secs_f64());
    }
    Ok(bytes as f64 / shortest)
}

fn read(device: Arc<Device>, memory: &Buffer) -> Result<f64, Error> {
    let kernels = Arc::new(Kernels::new(device.clone()));
    let kernel = kernels.get("sweep", minijinja::Value::from(()))?;
    let sums = Buffer::new(&device, "sums of a sweep", u64::from(GROUPS) * 256 * 4)?;
    // Several at a time, so that handing them over does not count.
    let sweeps = if device.report.kind == "software" { 1 } else { 8 };
    best(sweeps * memory.bytes, || {
        let mut commands = Commands::new(device.clone(), kernels.clone());
        for _ in 0..sweeps {
            let vectors = (memory.bytes / 16) as u32;
            commands.run(&kernel, &[memory.all(), sums.all()], &[vectors], [GROUPS, 1, 1]);
        }
        commands.submit();
        Ok(device.wait()?)
    })
}

fn upload(device: &Arc<Device>, memory: &Buffer) -> Result<f64, Error> {
    let uploader = Uploader::new(device.clone());
    // What is read is in a core's cache, so that only the way to the device counts.
    let block = vec![1; 256 << 10];
    let rows = Rows { format: Format::F32, rows: block.len() / 4096, cols: 1024, bytes: FileRows::Here(&block) };
    best(memory.bytes, || {
        let transfers = (0..memory.bytes).step_by(block.len()).map(|at| Transfer { to: memory, at, rows });
        uploader.load(transfers, &|| Ok(()), &mut |_| ())?;
        Ok(device.wait()?)
    })
}
