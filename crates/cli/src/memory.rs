//! How fast memory can be read: what weights that are used once can be measured against; and how much of it this process
//! holds.

use std::thread;
use std::time::Instant;

/// Bytes a second of the best of several sweeps over `bytes` bytes, shared by `threads` threads.
pub fn read_bytes_per_second(bytes: usize, threads: usize) -> f64 {
    let words: Vec<u64> = (0..bytes as u64 / 8).collect();
    let sweep = || {
        let start = Instant::now();
        thread::scope(|scope| {
            for words in words.chunks(words.len().div_ceil(threads)) {
                scope.spawn(|| std::hint::black_box(words.iter().fold(0, |sum: u64, word| sum ^ word)));
            }
        });
        start.elapsed().as_secs_f64()
    };
    bytes as f64 / (0..8).map(|_| sweep()).fold(f64::INFINITY, f64::min)
}

/// Bytes of memory that this process holds now; `None` where the system does not say (it does on Linux).
pub fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next());
    Some(kib?.parse::<u64>().ok()? * 1024)
}
