//! How fast memory can be read: what weights that are used once can be measured against; and how much of it this process
//! holds.

use std::thread;
use std::time::Instant;

use store::{AlignedBytes, StoreError};

/// Bytes a second of the best of several sweeps over `bytes` bytes of memory as weights have it, shared by `threads` threads.
///
/// # Errors
/// There is not as much memory.
pub fn read_bytes_per_second(bytes: usize, threads: usize) -> Result<f64, StoreError> {
    let mut memory = AlignedBytes::zeroed(bytes)?;
    let words: &mut [u64] = bytemuck::cast_slice_mut(memory.as_mut_slice());
    words.iter_mut().zip(0..).for_each(|(word, value)| *word = value);
    Ok(sweep_bytes_per_second(words, threads))
}

/// The same over memory that the caller has. Each thread reads four streams at once, which brings more than one does.
pub fn sweep_bytes_per_second(words: &[u64], threads: usize) -> f64 {
    let sweep = || {
        let start = Instant::now();
        thread::scope(|scope| {
            for words in words.chunks(words.len().div_ceil(threads)) {
                scope.spawn(|| std::hint::black_box(sum_of_streams(words)));
            }
        });
        start.elapsed().as_secs_f64()
    };
    size_of_val(words) as f64 / (0..8).map(|_| sweep()).fold(f64::INFINITY, f64::min)
}

/// Of all words, a quarter of them apart at a time.
fn sum_of_streams(words: &[u64]) -> u64 {
    let (quarters, rest) = words.split_at(words.len() / 4 * 4);
    let mut quarters = quarters.chunks_exact((quarters.len() / 4).max(1));
    let [a, b, c, d] = std::array::from_fn(|_| quarters.next().unwrap_or(&[]).chunks(8));
    let sum = |words: &[u64]| words.iter().fold(0, |sum: u64, word| sum ^ word);
    let streams = a.zip(b).zip(c.zip(d));
    sum(rest) ^ streams.fold(0, |all, ((a, b), (c, d))| all ^ sum(a) ^ sum(b) ^ sum(c) ^ sum(d))
}

/// Bytes of memory that this process holds now; `None` where the system does not say (it does on Linux).
pub fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next());
    Some(kib?.parse::<u64>().ok()? * 1024)
}
