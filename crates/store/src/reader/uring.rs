//! io_uring: one thread and one system call for many reads.

use std::collections::VecDeque;
use std::io::Error;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use io_uring::{IoUring, opcode, types::Fd};

use super::{Next, Progress, Read, Reader, complete};
use crate::{Source, StoreError};

/// Reads past the page cache through one ring.
pub struct Uring {
    ring: Arc<Ring>,
}

struct Ring {
    ring: IoUring,
    source: Source,
    table: Mutex<Table>,
}

/// What is under way and what waits. Its lock is also the right to put entries into the submission queue.
struct Table {
    /// A completion names its read by the index here.
    under_way: Vec<Option<UnderWay>>,
    waiting: VecDeque<Read>,
    closed: bool,
}

struct UnderWay {
    read: Read,
    progress: Progress,
}

/// The completion that wakes the thread to end.
const CLOSE: u64 = u64::MAX;

/// Most bytes of one entry, whose length has 32 bits.
const MOST_BYTES: usize = 1 << 30;

impl Uring {
    /// A ring for `depth` reads at the same time from files that were opened past the page cache ([`Source::direct`]).
    ///
    /// # Errors
    /// The kernel does not offer io_uring or forbids it here, or no thread could be started.
    pub fn new(source: Source, depth: usize) -> std::io::Result<Uring> {
        let table = Table { under_way: (0..depth).map(|_| None).collect(), waiting: VecDeque::new(), closed: false };
        let ring = Arc::new(Ring { ring: IoUring::new(depth as u32 * 2)?, source, table: Mutex::new(table) });
        let thread_ring = ring.clone();
        std::thread::Builder::new().name("infall-uring".into()).spawn(move || thread_ring.work())?;
        Ok(Uring { ring })
    }
}

impl Ring {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts what waits, as far as there is room.
    fn start(&self, table: &mut Table) {
        while let Some(index) = table.under_way.iter().position(Option::is_none)
            && let Some(read) = table.waiting.pop_front()
        {
            let progress = Progress::new(&read.extent);
            table.under_way[index] = Some(UnderWay { read, progress });
            self.push(table, index);
        }
    }

    /// Puts what is left of a read into the submission queue.
    fn push(&self, table: &mut Table, index: usize) {
        let UnderWay { read, progress } = table.under_way[index].as_mut().expect("a read that was started");
        let file = self.source.file(read.extent.file).expect("a ring reads files only");
        let (piece, offset) = progress.piece();
        let memory = &mut read.memory.as_mut_slice()[piece];
        let bytes = memory.len().min(MOST_BYTES) as u32;
        let entry = opcode::Read::new(Fd(file.as_raw_fd()), memory.as_mut_ptr(), bytes).offset(offset).build();
        self.queue(table, entry.user_data(index as u64));
    }

    /// `_table` is here for its lock.
    fn queue(&self, _table: &mut Table, entry: io_uring::squeue::Entry) {
        // SAFETY: the submission queue is touched only here, under the table's lock, so this is its only user. A read's
        // entry points into memory that `under_way` owns and gives away only after the entry's completion was seen; the
        // memory's address does not change when its owner is moved. The file stays open as long as the ring, in `source`.
        let pushed = unsafe { self.ring.submission_shared().push(&entry) };
        pushed.expect("twice as many entries as reads under way");
    }

    /// Hands the queue to the kernel.
    fn submit(&self) {
        while let Err(cause) = self.ring.submit() {
            // The kernel is short of something for a moment; what it has not taken is still queued.
            debug_assert!(cause.raw_os_error().is_some());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The ring's thread: takes completions until the ring is closed and nothing is under way.
    fn work(&self) {
        loop {
            if self.ring.submit_and_wait(1).is_err() {
                // Interrupted, or short of memory for a moment.
                std::thread::sleep(Duration::from_millis(1));
            }
            // SAFETY: only this thread looks at the completion queue.
            let completions: Vec<(u64, i32)> =
                unsafe { self.ring.completion_shared() }.map(|entry| (entry.user_data(), entry.result())).collect();
            let mut ended = Vec::new();
            let mut table = self.lock();
            for (index, result) in completions.into_iter().filter(|(index, _)| *index != CLOSE) {
                ended.extend(self.ended(&mut table, index as usize, result));
            }
            if table.closed && table.under_way.iter().all(Option::is_none) {
                return;
            }
            self.start(&mut table);
            drop(table);
            self.submit();
            ended.into_iter().for_each(|(read, result)| complete(read, result));
        }
    }

    /// A completion: the read, if it is done for good or for bad; else its rest is queued.
    fn ended(&self, table: &mut Table, index: usize, result: i32) -> Option<(Read, Result<(), StoreError>)> {
        let UnderWay { read, progress } = table.under_way[index].as_mut().expect("a completion of a read under way");
        let extent = read.extent;
        let result = match usize::try_from(result) {
            Ok(bytes) => match progress.advance(bytes) {
                Next::Done => Ok(()),
                Next::Short => Err(self.source.short(extent)),
                Next::More => return self.again(table, index),
            },
            Err(_) => match Error::from_raw_os_error(-result) {
                cause if is_passing(&cause) => return self.again(table, index),
                cause => Err(self.source.refused(extent, cause)),
            },
        };
        let UnderWay { read, .. } = table.under_way[index].take().expect("looked at above");
        Some((read, result))
    }

    fn again<T>(&self, table: &mut Table, index: usize) -> Option<T> {
        self.push(table, index);
        None
    }
}

/// Whether the same read may well succeed now.
fn is_passing(cause: &Error) -> bool {
    matches!(cause.kind(), std::io::ErrorKind::Interrupted | std::io::ErrorKind::WouldBlock)
}

impl Reader for Uring {
    fn submit(&self, read: Read) {
        let mut table = self.ring.lock();
        table.waiting.push_back(read);
        self.ring.start(&mut table);
        drop(table);
        self.ring.submit();
    }

    fn in_flight(&self) -> usize {
        self.ring.lock().under_way.len()
    }

    fn name(&self) -> &'static str {
        "io_uring"
    }
}

/// The thread ends when what is under way has ended; until then it keeps the memory that the kernel writes to.
impl Drop for Uring {
    fn drop(&mut self) {
        let mut table = self.ring.lock();
        table.closed = true;
        table.waiting.clear();
        self.ring.queue(&mut table, opcode::Nop::new().build().user_data(CLOSE));
        drop(table);
        self.ring.submit();
    }
}
