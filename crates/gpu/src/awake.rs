//! Keeps a device's clock up while it waits for experts.
//!
//! A driver lowers the clock of a device that is idle most of the time, and a device that waits for weights in every layer is:
//! an H200 went down to 555 of its 1,980 MHz, and everything it then computed took two to three times as long (docs/performance.md).
//! So what it is given to do while the host copies what misses is a kernel that computes nothing of use, on one of its many
//! processors, for a third of the time or so that reading and copying take at its full clock. It takes longer, and copies wait for it, until the
//! clock is up. No result comes near it.

use std::sync::Arc;

use minijinja::Value;

use crate::GpuError;
use crate::device::Device;
use crate::kernel::{Buffer, Commands, Kernel, Kernels};

/// Rounds of the kernel for each MiB that misses: at 2 GHz, and some 13 cycles each, 10 us, where reading takes 25 and copying 40.
const ROUNDS_PER_MIB: u64 = 1500;

/// Rounds at most: 2 ms or so at 2 GHz.
const MOST_ROUNDS: u64 = 300_000;

/// What a waiting device does.
pub(crate) struct Awake {
    kernel: Arc<Kernel>,
    left: Buffer,
}

impl Awake {
    /// `None` for devices that are left alone: those that share their power with the processor, and software.
    ///
    /// # Errors
    /// The driver does not take the kernel.
    pub(crate) fn of(kernels: &Arc<Kernels>) -> Result<Option<Awake>, GpuError> {
        let device = kernels.device();
        (device.report.kind == "discrete").then(|| Awake::on(kernels, device)).transpose()
    }

    fn on(kernels: &Kernels, device: &Device) -> Result<Awake, GpuError> {
        let left = Buffer::new(device, "what keeps the device awake", 4 * 32)?;
        Ok(Awake { kernel: kernels.get("busy", Value::from(()))?, left })
    }

    /// Keeps the device at work while `miss_bytes` are brought to it.
    pub(crate) fn stay(&self, commands: &mut Commands, miss_bytes: u64) {
        let rounds = (miss_bytes * ROUNDS_PER_MIB / (1 << 20)).min(MOST_ROUNDS) as u32;
        commands.run(&self.kernel, &[self.left.all()], &[rounds], [1, 1, 1]);
        commands.submit();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Checks, Choice, adapters};

    #[test]
    fn what_keeps_a_device_awake_ends() {
        let adapter = adapters().into_iter().find(|adapter| adapter.lacks.is_empty()).expect("an adapter");
        let device = Device::open(Choice::Index(adapter.index), Checks::On).unwrap();
        let kernels = Arc::new(Kernels::new(device.clone()));
        let awake = Awake::on(&kernels, &device).unwrap();
        let mut commands = Commands::new(device, kernels);
        awake.stay(&mut commands, 1 << 20);
        assert_eq!(commands.dispatches, 1);
        // The value of thread 0 after so many rounds.
        let round = |value: u32| {
            let value = value.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            value ^ (value >> 7)
        };
        let expected = (0..ROUNDS_PER_MIB).fold(0, |value, _| round(value));
        let found = commands.read((&awake.left, 0), 4).unwrap();
        assert_eq!(found, expected.to_le_bytes());
    }
}
