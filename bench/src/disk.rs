//! How fast a reader brings pieces of a file when that is all it does.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use anyhow::Result;
use store::reader::{Client, Completion, Read};
use store::{ALIGNMENT_BYTES, AlignedBytes, Extent, Reader};

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
}

impl Asker {
    fn ask(&self, memory: AlignedBytes) {
        let n = self.asked.fetch_add(1, Ordering::Relaxed);
        // Fibonacci hashing: all over the file, and the same every time.
        let place = (n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) % self.extents.len() as u64;
        let extent = self.extents[place as usize];
        self.reader.submit(Read { id: n as u64, extent, memory, client: self.this.clone() });
    }
}

impl Client for Asker {
    fn done(&self, completion: Completion) {
        completion.result.expect("the file can be read");
        self.read_bytes.fetch_add(completion.extent.bytes, Ordering::Relaxed);
        if Instant::now() < self.ends {
            return self.ask(completion.memory);
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
    time: Duration,
) -> Result<f64> {
    let largest = extents.iter().map(|extent| extent.bytes as usize).max().unwrap_or(0);
    let piece_bytes = largest.next_multiple_of(ALIGNMENT_BYTES) + ALIGNMENT_BYTES;
    let mut memory = AlignedBytes::zeroed(piece_bytes * under_way)?;
    memory.as_mut_slice().fill(1);
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
    });
    for _ in 0..under_way {
        let rest = memory.split_off(piece_bytes);
        asker.ask(std::mem::replace(&mut memory, rest));
    }
    let mut left = asker.under_way.lock().expect("nobody panics");
    while *left > 0 {
        left = asker.ended.wait(left).expect("nobody panics");
    }
    Ok(asker.read_bytes.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64())
}
