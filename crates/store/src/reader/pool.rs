//! Threads with positional reads: works everywhere.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::{AbortOnPanic, Read, Reader, complete, fill};
use crate::{Source, StoreError};

/// A queue of reads and the threads that work on it.
pub struct Pool {
    shared: Arc<Shared>,
    threads: usize,
    name: &'static str,
}

struct Shared {
    source: Source,
    /// Reads go through the page cache, whose copy is to be dropped.
    buffered: bool,
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    reads: VecDeque<Read>,
    closed: bool,
}

impl Pool {
    /// Reads through the page cache and drops its copy of what was read.
    ///
    /// # Errors
    /// [`StoreError::Thread`] if no thread could be started.
    pub fn buffered(source: Source, threads: usize) -> Result<Pool, StoreError> {
        Pool::new(source, threads, true, "pread, buffered")
    }

    /// Copies from an image ([`Source::from_image`]).
    ///
    /// # Errors
    /// [`StoreError::Thread`] if no thread could be started.
    pub fn image(source: Source, threads: usize) -> Result<Pool, StoreError> {
        Pool::new(source, threads, false, "memcpy")
    }

    /// Reads past the page cache; `source` was opened so ([`Source::direct`]).
    ///
    /// # Errors
    /// [`StoreError::Thread`] if no thread could be started.
    pub fn direct(source: Source, threads: usize) -> Result<Pool, StoreError> {
        Pool::new(source, threads, false, "pread, direct")
    }

    fn new(source: Source, threads: usize, buffered: bool, name: &'static str) -> Result<Pool, StoreError> {
        let shared = Arc::new(Shared { source, buffered, queue: Mutex::default(), changed: Condvar::new() });
        let mut pool = Pool { shared, threads: 0, name };
        for i in 0..threads {
            let shared = pool.shared.clone();
            let thread = std::thread::Builder::new().name(format!("infall-read-{i}"));
            match thread.spawn(move || shared.work()) {
                Ok(_) => pool.threads += 1,
                // Fewer than asked for only read slower.
                Err(_) if pool.threads > 0 => break,
                Err(cause) => return Err(StoreError::Thread { cause }),
            }
        }
        Ok(pool)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One thread: read after read until the pool is gone.
    fn work(&self) {
        let _guard = AbortOnPanic;
        while let Some(mut read) = self.next() {
            let (extent, source) = (read.extent, &self.source);
            let read_at = |into: &mut [u8], offset| source.read_at(extent.file, offset, into);
            let result = fill(source, extent, &mut read.memory, read_at);
            if self.buffered {
                source.forget_cached(extent);
            }
            complete(read, result);
        }
    }

    fn next(&self) -> Option<Read> {
        let mut queue = self.lock();
        loop {
            if queue.closed {
                return None;
            }
            if let Some(read) = queue.reads.pop_front() {
                return Some(read);
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Reader for Pool {
    fn submit(&self, read: Read) {
        self.shared.lock().reads.push_back(read);
        self.shared.changed.notify_one();
    }

    fn in_flight(&self) -> usize {
        self.threads
    }

    fn name(&self) -> &'static str {
        self.name
    }
}

/// The threads end by themselves, each after the read it is at. Nobody waits for them: the last to let go of a pool may be
/// one of its own threads.
impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}
