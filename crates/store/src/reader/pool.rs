//! Threads with positional reads: works everywhere.
//!
//! A large read is made by several threads, a piece each: what copies from memory (a page cache, tmpfs) gives one thread a
//! fraction of what it gives to all, and somebody waits for the whole.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use super::{AbortOnPanic, Client, Read, Reader, complete, cut, fill, join};
use crate::{AlignedBytes, Extent, Source, StoreError};

/// Bytes that one thread reads at a time.
const PIECE_BYTES: usize = 512 << 10;

/// A queue of reads, in pieces, and the threads that work on it.
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
    pieces: VecDeque<Piece>,
    closed: bool,
}

/// A part of a read, made by one thread.
struct Piece {
    of: Arc<Whole>,
    number: usize,
    extent: Extent,
    memory: AlignedBytes,
}

/// A read that is made in pieces.
struct Whole {
    id: u64,
    extent: Extent,
    client: Weak<dyn Client>,
    ended: Mutex<Ended>,
}

/// What has come of a read.
struct Ended {
    pieces: Vec<Option<AlignedBytes>>,
    left: usize,
    result: Result<(), StoreError>,
}

impl Whole {
    /// A piece has ended; the last one completes the read.
    fn piece_ended(&self, number: usize, memory: AlignedBytes, result: Result<(), StoreError>) {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        ended.pieces[number] = Some(memory);
        ended.left -= 1;
        if result.is_err() {
            ended.result = result;
        }
        if ended.left > 0 {
            return;
        }
        let pieces = std::mem::take(&mut ended.pieces).into_iter().flatten();
        let memory = join(pieces).expect("a read has at least one piece");
        let result = std::mem::replace(&mut ended.result, Ok(()));
        drop(ended);
        complete(Read { id: self.id, extent: self.extent, memory, client: self.client.clone() }, result);
    }
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
        while let Some(Piece { of, number, extent, mut memory }) = self.next() {
            let source = &self.source;
            let read_at = |into: &mut [u8], offset| source.read_at(extent.file, offset, into);
            let result = fill(source, extent, &mut memory, read_at);
            if self.buffered {
                source.forget_cached(extent);
            }
            of.piece_ended(number, memory, result);
        }
    }

    fn next(&self) -> Option<Piece> {
        let mut queue = self.lock();
        loop {
            if queue.closed {
                return None;
            }
            if let Some(piece) = queue.pieces.pop_front() {
                return Some(piece);
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Reader for Pool {
    fn submit(&self, Read { id, extent, memory, client }: Read) {
        let pieces = cut(extent, memory, PIECE_BYTES);
        let left = pieces.len();
        let ended = Ended { pieces: (0..left).map(|_| None).collect(), left, result: Ok(()) };
        let of = Arc::new(Whole { id, extent, client, ended: Mutex::new(ended) });
        let piece = |(number, (extent, memory))| Piece { of: of.clone(), number, extent, memory };
        self.shared.lock().pieces.extend(pieces.into_iter().enumerate().map(piece));
        if left == 1 { self.shared.changed.notify_one() } else { self.shared.changed.notify_all() }
    }

    fn in_flight(&self) -> usize {
        self.threads
    }

    fn name(&self) -> &'static str {
        self.name
    }
}

/// The threads end by themselves, each after the piece it is at. Nobody waits for them: the last to let go of a pool may be
/// one of its own threads.
impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}
