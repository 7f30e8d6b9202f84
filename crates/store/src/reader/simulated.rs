//! A disk that is made up: slow, reordering, giving less than asked for, failing, and the same every time.
//!
//! Time is virtual and nothing here runs by itself: when somebody has to wait, the read that is due first ends, on the
//! thread that waits.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Read, Reader, complete, fill};
use crate::Source;
use crate::memory::page_up;

/// How a simulated disk behaves.
#[derive(Clone, Copy, Debug)]
pub struct Simulation {
    /// Of everything random.
    pub seed: u64,
    /// The longest a read waits before its first byte; each draws its own, which is what reorders them.
    pub latency_us: u64,
    /// How fast bytes come, one read after the other.
    pub bytes_per_us: u64,
    /// Reads under way at the same time.
    pub in_flight: usize,
    /// Whether single system calls give less than asked for.
    pub short_reads: bool,
    /// What a test may break while it runs.
    pub faults: &'static Faults,
}

/// Faults that a test switches on and off.
#[derive(Debug)]
pub struct Faults {
    /// So many of the reads that end next fail as a broken disk's do.
    pub failing_reads: AtomicU64,
    /// While set, no read ends: the disk is stuck.
    pub stuck: AtomicBool,
}

impl Faults {
    /// None.
    pub const fn none() -> Faults {
        Faults { failing_reads: AtomicU64::new(0), stuck: AtomicBool::new(false) }
    }
}

impl Simulation {
    /// A disk that reorders and gives less than asked for, but breaks nothing.
    pub fn reordering(seed: u64) -> Simulation {
        static NO_FAULTS: Faults = Faults::none();
        let faults = &NO_FAULTS;
        Simulation { seed, latency_us: 5000, bytes_per_us: 1000, in_flight: 16, short_reads: true, faults }
    }
}

/// A [`Reader`] in virtual time over the bytes of a real source.
pub struct SimulatedDisk {
    source: Source,
    simulation: Simulation,
    state: Mutex<State>,
}

struct State {
    random: u64,
    now_us: u64,
    /// Each with the time at which it ends, in order of submission.
    under_way: Vec<(u64, Read)>,
    /// Until when bytes of earlier reads keep the disk busy.
    busy_until_us: u64,
}

impl State {
    /// splitmix64 (Steele et al. 2014).
    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

impl SimulatedDisk {
    /// A disk with the files of `source` on it.
    pub fn new(source: Source, simulation: Simulation) -> SimulatedDisk {
        let state = State { random: simulation.seed, now_us: 0, under_way: Vec::new(), busy_until_us: 0 };
        SimulatedDisk { source, simulation, state: Mutex::new(state) }
    }

    /// Microseconds that have passed on this disk.
    pub fn now_us(&self) -> u64 {
        self.lock().now_us
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_fault(&self) -> bool {
        let failing = &self.simulation.faults.failing_reads;
        failing.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |reads| reads.checked_sub(1)).is_ok()
    }
}

impl Reader for SimulatedDisk {
    fn submit(&self, read: Read) {
        let mut state = self.lock();
        let latency_us = state.next_random() % (self.simulation.latency_us + 1);
        let transfer_us = read.extent.bytes / self.simulation.bytes_per_us;
        state.busy_until_us = state.busy_until_us.max(state.now_us) + transfer_us;
        let ends_us = state.busy_until_us + latency_us;
        state.under_way.push((ends_us, read));
    }

    fn in_flight(&self) -> usize {
        self.simulation.in_flight
    }

    fn pump(&self) -> bool {
        if self.simulation.faults.stuck.load(Ordering::Relaxed) {
            return false;
        }
        let mut state = self.lock();
        let first = (0..state.under_way.len()).min_by_key(|&i| state.under_way[i].0);
        let Some(first) = first else { return false };
        let (ends_us, mut read) = state.under_way.remove(first);
        state.now_us = state.now_us.max(ends_us);
        let mut random = || if self.simulation.short_reads { state.next_random() } else { u64::MAX };
        let (extent, source) = (read.extent, &self.source);
        let result = match self.take_fault() {
            // EIO.
            true => Err(source.refused(extent, std::io::Error::from_raw_os_error(5))),
            false => fill(source, extent, &mut read.memory, |into, offset| {
                let most = match random() {
                    few if few % 4 == 0 => page_up(1 + (few >> 2) as usize % into.len()),
                    _ => into.len(),
                };
                source.read_at(extent.file, offset, &mut into[..most])
            }),
        };
        drop(state);
        complete(read, result);
        true
    }

    fn name(&self) -> &'static str {
        "simulated"
    }
}
