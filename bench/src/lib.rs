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
use gpu::Portions;
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

/// In what portions weights are loaded onto a GPU; what is not given is as ever.
#[derive(Args, Clone, Copy)]
pub struct PortionFlags {
    /// Threads that load.
    #[arg(long, value_name = "N")]
    load_threads: Option<usize>,
    /// MiB that each sends at once.
    #[arg(long, value_name = "MIB")]
    load_piece_mib: Option<usize>,
    /// KiB that each reads at once.
    #[arg(long, value_name = "KIB")]
    load_share_kib: Option<usize>,
    /// Rows are put in order right into mapped memory.
    #[arg(long)]
    load_direct: bool,
}

impl PortionFlags {
    /// The portions asked for.
    pub fn portions(self) -> Portions {
        let Portions { threads, piece_bytes, share_bytes, direct } = Portions::default();
        Portions {
            threads: self.load_threads.unwrap_or(threads),
            piece_bytes: self.load_piece_mib.map_or(piece_bytes, |mib| mib << 20),
            share_bytes: self.load_share_kib.map_or(share_bytes, |kib| kib << 10),
            direct: self.load_direct || direct,
        }
    }
}

/// Processor and number of threads the system offers, for the head of a table.
pub fn machine() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, name)| name);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{}, {threads} threads", name.unwrap_or(std::env::consts::ARCH))
}
