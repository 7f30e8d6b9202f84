//! What the measuring programs share.

pub mod bound;
pub mod calls;
pub mod disk;
pub mod heldout;
pub mod profile;
pub mod random;
pub mod simulated_router;
pub mod synthetic_state;

use clap::Args;
pub use infall::memory;
use model::Precision;

/// Which precision to measure.
#[derive(Args, Clone, Copy)]
pub struct PrecisionFlags {
    /// f32 activations times dequantised weights.
    #[arg(long, conflicts_with = "fast")]
    exact: bool,
    /// Integer dots where weights are quantised; the default.
    #[arg(long)]
    fast: bool,
}

impl PrecisionFlags {
    /// The precision asked for.
    pub fn precision(self) -> Precision {
        if self.exact { Precision::Exact } else { Precision::Fast }
    }
}

/// Processor and number of threads the system offers, for the head of a table.
pub fn machine() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, name)| name);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{}, {threads} threads", name.unwrap_or(std::env::consts::ARCH))
}
