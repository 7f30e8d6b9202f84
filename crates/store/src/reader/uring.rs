//! io_uring: one thread and one system call for many reads.
//!
//! Only the ring's thread enters the kernel. To begin a read, the kernel pins its memory and hands out pages that were
//! never touched, which may take longer than the disk does: not the time of a thread that computes. Who submits a read
//! puts it on a list and, if the thread sleeps, wakes it through an event that the ring polls.

use std::collections::VecDeque;
use std::io::Error;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use io_uring::{IoUring, opcode, types::Fd};
use rustix::event::{EventfdFlags, eventfd};

use super::{AbortOnPanic, Next, Progress, Read, Reader, complete};
use crate::Source;

/// Reads past the page cache through one ring.
pub struct Uring {
    inbox: Arc<Inbox>,
    depth: usize,
}

/// What the ring's thread shares with those who submit.
struct Inbox {
    state: Mutex<State>,
    wake: OwnedFd,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Read>,
    closed: bool,
    /// The thread will not look here again before it is woken.
    asleep: bool,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what the thread shall see, and wakes it where it must be.
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        let wake = std::mem::take(&mut state.asleep);
        drop(state);
        if wake {
            // It fails only if the event counts 2^64 wakes already.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }
}

/// What belongs to the ring's thread alone.
struct Ring {
    ring: IoUring,
    source: Source,
    inbox: Arc<Inbox>,
    /// A completion names its read by the index here.
    under_way: Vec<Option<UnderWay>>,
}

struct UnderWay {
    read: Read,
    progress: Progress,
}

/// The completion of the poll for the event.
const WAKE: u64 = u64::MAX;

/// Most bytes of one entry, whose length has 32 bits.
const MOST_BYTES: usize = 1 << 30;

impl Uring {
    /// A ring for `depth` reads at the same time from files that were opened past the page cache ([`Source::direct`]).
    ///
    /// # Errors
    /// The kernel does not offer io_uring or forbids it here, or no thread could be started.
    pub fn new(source: Source, depth: usize) -> std::io::Result<Uring> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let inbox = Arc::new(Inbox { state: Mutex::default(), wake });
        let under_way = (0..depth).map(|_| None).collect();
        let ring = Ring { ring: IoUring::new(depth as u32 * 2)?, source, inbox: inbox.clone(), under_way };
        std::thread::Builder::new().name("infall-uring".into()).spawn(move || ring.work())?;
        Ok(Uring { inbox, depth })
    }
}

impl Ring {
    /// Starts reads and takes completions until the ring is closed and nothing is under way.
    fn work(mut self) {
        // Dropped before `self`, whose memory the kernel may still write to.
        let _guard = AbortOnPanic;
        self.poll();
        while self.start() {
            if self.ring.submit_and_wait(1).is_err() {
                // Interrupted, or short of memory for a moment; what was not taken is still queued.
                std::thread::sleep(Duration::from_millis(1));
            }
            let completions: Vec<(u64, i32)> =
                self.ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
            self.inbox.lock().asleep = false;
            for (index, result) in completions {
                match index {
                    WAKE => self.poll(),
                    index => self.ended(index as usize, result),
                }
            }
        }
    }

    /// Starts what waits, as far as there is room; whether anything will come of waiting.
    fn start(&mut self) -> bool {
        let inbox = self.inbox.clone();
        let mut state = inbox.lock();
        while let Some(index) = self.under_way.iter().position(Option::is_none)
            && let Some(read) = state.waiting.pop_front()
        {
            let progress = Progress::new(&read.extent);
            self.under_way[index] = Some(UnderWay { read, progress });
            self.push(index);
        }
        state.asleep = true;
        !state.closed || self.under_way.iter().any(Option::is_some)
    }

    /// Asks for a completion when the event is set, after taking back what it was set by before.
    fn poll(&mut self) {
        let _ = rustix::io::read(&self.inbox.wake, &mut [0; 8]);
        let poll = opcode::PollAdd::new(Fd(self.inbox.wake.as_raw_fd()), rustix::event::PollFlags::IN.bits().into());
        self.queue(poll.build().user_data(WAKE));
    }

    /// Puts what is left of a read into the submission queue.
    fn push(&mut self, index: usize) {
        let UnderWay { read, progress } = self.under_way[index].as_mut().expect("a read that was started");
        let file = self.source.file(read.extent.file).expect("a ring reads files only");
        let (piece, offset) = progress.piece();
        let memory = &mut read.memory.as_mut_slice()[piece];
        let bytes = memory.len().min(MOST_BYTES) as u32;
        let entry = opcode::Read::new(Fd(file.as_raw_fd()), memory.as_mut_ptr(), bytes).offset(offset).build();
        self.queue(entry.user_data(index as u64));
    }

    fn queue(&mut self, entry: io_uring::squeue::Entry) {
        // SAFETY: a read's entry points into memory that `under_way` owns and gives away only after the entry's
        // completion was seen; the memory's address does not change when its owner is moved. Files and event stay open
        // as long as the ring, in `source` and `inbox`; `work` drops them only when nothing but the poll is queued, and if
        // anything there or in a client panics, its guard ends the program before anything is dropped.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("twice as many entries as reads under way");
    }

    /// A completion: the read, if it is done for good or for bad, is handed over; else its rest is queued.
    fn ended(&mut self, index: usize, result: i32) {
        let UnderWay { read, progress } = self.under_way[index].as_mut().expect("a completion of a read under way");
        let result = match usize::try_from(result) {
            Ok(bytes) => match progress.advance(bytes) {
                Next::Done => Ok(()),
                Next::Short => Err(self.source.short(read.extent)),
                Next::More => return self.push(index),
            },
            Err(_) => match Error::from_raw_os_error(-result) {
                cause if is_passing(&cause) => return self.push(index),
                cause => Err(self.source.refused(read.extent, cause)),
            },
        };
        let UnderWay { read, .. } = self.under_way[index].take().expect("looked at above");
        complete(read, result);
    }
}

/// Whether the same read may well succeed now.
fn is_passing(cause: &Error) -> bool {
    matches!(cause.kind(), std::io::ErrorKind::Interrupted | std::io::ErrorKind::WouldBlock)
}

impl Reader for Uring {
    fn submit(&self, read: Read) {
        self.inbox.change(|state| state.waiting.push_back(read));
    }

    fn in_flight(&self) -> usize {
        self.depth
    }

    fn name(&self) -> &'static str {
        "io_uring"
    }
}

/// The thread ends when what is under way has ended; until then it keeps the memory that the kernel writes to.
impl Drop for Uring {
    fn drop(&mut self) {
        self.inbox.change(|state| {
            state.closed = true;
            state.waiting.clear();
        });
    }
}
