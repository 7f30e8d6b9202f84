//! How fast a reader brings pieces of a file when that is all it does.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use anyhow::Result;
use store::reader::{Client, Completion, Read};
use store::{ALIGNMENT_BYTES, AlignedBytes, Extent, Reader};

/// Where pieces are read into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// The same memory again and again, touched before.
    Touched,
    /// For each piece memory that the process never touched; at most [`FRESH_BYTES`] in all.
    Fresh,
}

/// Most memory that [`Memory::Fresh`] takes.
pub const FRESH_BYTES: usize = 2 << 30;

/// Asks for the next piece whenever one has come.
struct Asker {
    reader: Arc<dyn Reader>,
    this: Weak<Asker>,
    extents: Vec<Extent>,
    asked: AtomicUsize,
    read_bytes: AtomicU64,
    ends: Instant,
    under_way: Mutex<usize>,
    ended: Condvar,
    memory: Memory,
    /// What was read into, and what will be.
    used: Mutex<Vec<AlignedBytes>>,
    fresh: Mutex<Vec<AlignedBytes>>,
}

impl Asker {
    fn ask(&self, memory: AlignedBytes) {
        let n = self.asked.fetch_add(1, Ordering::Relaxed);
        // Fibonacci hashing: all over the file, and the same every time.
        let place = (n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) % self.extents.len() as u64;
        let extent = self.extents[place as usize];
        self.reader.submit(Read { id: n as u64, extent, memory, client: self.this.clone() });
    }

    /// Memory for one read more, after one into `used`; `None` when time or memory is over.
    fn next(&self, used: AlignedBytes) -> Option<AlignedBytes> {
        if Instant::now() >= self.ends {
            return None;
        }
        match self.memory {
            Memory::Touched => Some(used),
            Memory::Fresh => {
                self.used.lock().expect("nobody panics").push(used);
                self.fresh.lock().expect("nobody panics").pop()
            }
        }
    }
}

impl Client for Asker {
    fn done(&self, completion: Completion) {
        completion.result.expect("the file can be read");
        self.read_bytes.fetch_add(completion.extent.bytes, Ordering::Relaxed);
        if let Some(memory) = self.next(completion.memory) {
            return self.ask(memory);
        }
        *self.under_way.lock().expect("nobody panics") -= 1;
        self.ended.notify_all();
    }
}

/// Bytes a second that `reader` brings of `extents`, in no order, `under_way` of them at a time, for about `time`.
///
/// # Errors
/// There is no memory for them.
pub fn bytes_per_second(
    reader: Arc<dyn Reader>,
    extents: Vec<Extent>,
    under_way: usize,
    memory: Memory,
    time: Duration,
) -> Result<f64> {
    let largest = extents.iter().map(|extent| extent.bytes as usize).max().unwrap_or(0);
    let piece_bytes = largest.next_multiple_of(ALIGNMENT_BYTES) + ALIGNMENT_BYTES;
    let pieces = if memory == Memory::Fresh { FRESH_BYTES / piece_bytes } else { under_way };
    let mut fresh = cut(AlignedBytes::zeroed(piece_bytes * pieces)?, piece_bytes);
    if memory == Memory::Touched {
        fresh.iter_mut().for_each(|piece| piece.as_mut_slice().fill(1));
    }
    let first: Vec<AlignedBytes> = fresh.drain(..under_way).collect();
    let began = Instant::now();
    let asker = Arc::new_cyclic(|this| Asker {
        reader,
        this: this.clone(),
        extents,
        asked: AtomicUsize::new(0),
        read_bytes: AtomicU64::new(0),
        ends: began + time,
        under_way: Mutex::new(under_way),
        ended: Condvar::new(),
        memory,
        used: Mutex::default(),
        fresh: Mutex::new(fresh.into_iter().rev().collect()),
    });
    first.into_iter().for_each(|piece| asker.ask(piece));
    let mut left = asker.under_way.lock().expect("nobody panics");
    while *left > 0 {
        left = asker.ended.wait(left).expect("nobody panics");
    }
    Ok(asker.read_bytes.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64())
}

/// Pieces of equal length, in order.
fn cut(mut memory: AlignedBytes, piece_bytes: usize) -> Vec<AlignedBytes> {
    let pieces = memory.len() / piece_bytes;
    let next = |_| {
        let rest = memory.split_off(piece_bytes);
        std::mem::replace(&mut memory, rest)
    };
    (0..pieces).map(next).collect()
}
