//! Readers: they bring bytes of files into memory, many requests at a time.
//!
//! A [`Read`] owns the memory it fills, so nobody can look at bytes that are still on their way; the memory comes back with
//! the [`Completion`]. Reads cover whole pages of the file (direct I/O wants that, and nothing is copied afterwards); an
//! extent that begins within a page begins at the same place within the memory's first page.
//!
//! Which read comes first is decided before it is submitted (`cache.rs`), so readers have no priorities and nothing to
//! take back: whoever submits no more than [`Reader::in_flight`] reads knows that all of them have been started.

mod pool;
mod simulated;
#[cfg(target_os = "linux")]
mod uring;

use std::sync::{Arc, Weak, mpsc};
use std::time::Duration;

pub use pool::Pool;
pub use simulated::{Faults, SimulatedDisk, Simulation};
#[cfg(target_os = "linux")]
pub use uring::Uring;

use crate::{ALIGNMENT_BYTES, AlignedBytes, Cancel, Extent, Source, StoreError};

/// A request to fill memory.
pub struct Read {
    /// What its submitter calls it.
    pub id: u64,
    /// What is wanted. It comes to `memory[offset % ALIGNMENT_BYTES..]`; the rest of the pages it lies on comes along.
    pub extent: Extent,
    /// At least the whole pages that the extent lies on.
    pub memory: AlignedBytes,
    /// Who is told. If it is gone by then, the memory is given back to the system.
    pub client: Weak<dyn Client>,
}

/// A read that has ended.
pub struct Completion {
    /// As in the request.
    pub id: u64,
    /// As in the request.
    pub extent: Extent,
    /// The request's memory, all of it. After an error its bytes mean nothing.
    pub memory: AlignedBytes,
    /// Whether the extent is there.
    pub result: Result<(), StoreError>,
}

/// Who submits reads.
pub trait Client: Send + Sync {
    /// A read has ended. Called on any thread; more reads may be submitted from within.
    fn done(&self, completion: Completion);
}

/// Brings extents of a [`Source`] into memory.
pub trait Reader: Send + Sync {
    /// Queues a read. Never waits for a disk.
    fn submit(&self, read: Read);

    /// How many reads are worth having under way at the same time.
    fn in_flight(&self) -> usize;

    /// Called by who has nothing to do but wait for reads. A reader without threads of its own ends one here and says
    /// whether it did.
    fn pump(&self) -> bool {
        false
    }

    /// What it is, for people.
    fn name(&self) -> &'static str;
}

/// Which reader to use. None of them changes a bit of what is read.
#[derive(Clone, Copy, Debug)]
pub enum ReaderKind {
    /// io_uring past the page cache: the fewest threads and copies. Linux only.
    Uring,
    /// Threads with positional reads past the page cache.
    Direct,
    /// Threads with positional reads through the page cache, whose copy is dropped afterwards.
    Buffered,
    /// A disk that is made up, for tests.
    Simulated(Simulation),
}

/// Threads at least that read: room for the six reads of two experts (`streamed.rs`), few enough to be started
/// everywhere. Into memory that was touched before, one to four read fastest (docs/performance.md, "The disk"); eight are for
/// memory that was not: there a read begins with clearing pages, which takes longer than the disk and can be done side by
/// side. How many are best there was not measured.
const POOL_THREADS: usize = 8;
/// And at most, where there are so many cores: a page cache and fast disks give more to more threads (docs/performance.md, "GPU").
const MOST_POOL_THREADS: usize = 16;
/// Reads under way at the same time with io_uring.
#[cfg(target_os = "linux")]
const URING_DEPTH: usize = 16;

/// The reader of the kind asked for, or the next simpler one that works here; in that case, a line that says why.
///
/// # Errors
/// [`StoreError::Thread`] if no thread could be started.
pub fn open_reader(source: &Source, kind: ReaderKind) -> Result<(Arc<dyn Reader>, Option<String>), StoreError> {
    let threads = std::thread::available_parallelism().map_or(POOL_THREADS, usize::from);
    let threads = threads.clamp(POOL_THREADS, MOST_POOL_THREADS);
    match kind {
        ReaderKind::Simulated(simulation) => Ok((Arc::new(SimulatedDisk::new(source.clone(), simulation)), None)),
        // What is in memory already has no file to give to the kernel.
        _ if source.file(0).is_none() => Ok((Arc::new(Pool::image(source.clone(), threads)?), None)),
        ReaderKind::Buffered => Ok((Arc::new(Pool::buffered(source.clone(), threads)?), None)),
        ReaderKind::Direct => match source.direct() {
            Ok(source) => Ok((Arc::new(Pool::direct(source, threads)?), None)),
            Err(why) => {
                let note = format!("{why}: weights are read through the page cache");
                Ok((Arc::new(Pool::buffered(source.clone(), threads)?), Some(note)))
            }
        },
        #[cfg(target_os = "linux")]
        ReaderKind::Uring => match source.direct().map(|source| Uring::new(source, URING_DEPTH)) {
            Ok(Ok(reader)) => Ok((Arc::new(reader), None)),
            Ok(Err(cause)) => {
                let (reader, note) = open_reader(source, ReaderKind::Direct)?;
                let why = format!("io_uring is not to be had here ({cause}): weights are read by threads");
                Ok((reader, Some(note.unwrap_or(why))))
            }
            Err(_) => open_reader(source, ReaderKind::Direct),
        },
        #[cfg(not(target_os = "linux"))]
        ReaderKind::Uring => {
            let (reader, note) = open_reader(source, ReaderKind::Direct)?;
            let why = "io_uring is of Linux: weights are read by threads".to_owned();
            Ok((reader, Some(note.unwrap_or(why))))
        }
    }
}

/// How far a read has come. Systems may give less than was asked for; the rest is asked for again, from a page border.
struct Progress {
    /// Bytes that are there, counted from the first page's start.
    done: usize,
    needed: usize,
    cover: usize,
    file_start: u64,
}

/// What is next for a read.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Done,
    /// The file ends within the extent.
    Short,
    More,
}

impl Progress {
    fn new(extent: &Extent) -> Progress {
        let lead = extent.lead_bytes();
        let needed = lead + extent.bytes as usize;
        Progress { done: 0, needed, cover: extent.cover_bytes(), file_start: extent.offset - lead as u64 }
    }

    /// Where the next piece goes in the memory, and where it is in the file.
    fn piece(&self) -> (std::ops::Range<usize>, u64) {
        let start = self.done / ALIGNMENT_BYTES * ALIGNMENT_BYTES;
        (start..self.cover, self.file_start + start as u64)
    }

    /// The piece brought `bytes`.
    fn advance(&mut self, bytes: usize) -> Next {
        let done = self.piece().0.start + bytes;
        if done >= self.needed {
            Next::Done
        } else if done <= self.done {
            Next::Short
        } else {
            self.done = done;
            Next::More
        }
    }
}

/// Fills the request's memory by `read_at`, which is given memory and an offset in the file.
fn fill(
    source: &Source,
    extent: Extent,
    memory: &mut AlignedBytes,
    mut read_at: impl FnMut(&mut [u8], u64) -> std::io::Result<usize>,
) -> Result<(), StoreError> {
    let mut progress = Progress::new(&extent);
    loop {
        let (piece, offset) = progress.piece();
        let bytes =
            read_at(&mut memory.as_mut_slice()[piece], offset).map_err(|cause| source.refused(extent, cause))?;
        match progress.advance(bytes) {
            Next::Done => return Ok(()),
            Next::Short => return Err(source.short(extent)),
            Next::More => {}
        }
    }
}

/// Held by a thread that readers depend on. A panic there would leave reads that never end, waits for them without end, and
/// memory that the kernel still writes to given back: as a panic of the computing thread, it ends the program.
pub(crate) struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

/// Hands a read that has ended to whoever wanted it.
fn complete(read: Read, result: Result<(), StoreError>) {
    let Read { id, extent, memory, client } = read;
    if let Some(client) = client.upgrade() {
        client.done(Completion { id, extent, memory, result });
    }
}

/// An extent in memory of its own.
pub struct Loaded {
    memory: AlignedBytes,
    place: std::ops::Range<usize>,
}

impl Loaded {
    /// As [`AlignedBytes::lock`].
    pub fn lock(&self) -> Result<(), StoreError> {
        self.memory.lock()
    }
}

impl std::ops::Deref for Loaded {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.place.clone()]
    }
}

/// Largest piece of [`read_all`]: with several of them under way a disk is busy, and progress is seen.
const PIECE_BYTES: usize = 4 << 20;

/// Reads whole extents, many pieces at the same time. `loaded` is told of bytes as they arrive.
///
/// # Errors
/// The first that occurs, or [`StoreError::Cancelled`]; reads under way end by themselves.
pub fn read_all(
    reader: &dyn Reader,
    extents: &[Extent],
    cancel: &Cancel,
    loaded: &mut dyn FnMut(u64),
) -> Result<Vec<Loaded>, StoreError> {
    let (sender, receiver) = mpsc::channel();
    let client: Arc<dyn Client> = Arc::new(Channel(sender));
    let mut tensors = extents.iter().map(Assembly::new).collect::<Result<Vec<_>, _>>()?;
    let mut waiting = (0..tensors.len()).flat_map(|tensor| (0..tensors[tensor].pieces.len()).map(move |i| (tensor, i)));
    let mut waiting: std::collections::VecDeque<(usize, usize)> = waiting.by_ref().collect();
    let mut under_way = Vec::new();
    loop {
        cancel.check()?;
        while under_way.len() < reader.in_flight()
            && let Some((tensor, i)) = waiting.pop_front()
        {
            let (extent, memory) = tensors[tensor].pieces[i].take().expect("submitted once");
            under_way.push((tensor, i));
            let id = ((tensor as u64) << 32) | i as u64;
            reader.submit(Read { id, extent, memory, client: Arc::downgrade(&client) });
        }
        if under_way.is_empty() {
            return Ok(tensors.into_iter().map(Assembly::joined).collect());
        }
        if let Some(Completion { id, extent, memory, result }) = next_completion(reader, &receiver) {
            result?;
            let (tensor, i) = ((id >> 32) as usize, id as u32 as usize);
            under_way.retain(|&piece| piece != (tensor, i));
            tensors[tensor].pieces[i] = Some((extent, memory));
            loaded(extent.bytes);
        }
    }
}

struct Channel(mpsc::Sender<Completion>);

impl Client for Channel {
    fn done(&self, completion: Completion) {
        // Nobody listens any more after an error.
        let _ = self.0.send(completion);
    }
}

fn next_completion(reader: &dyn Reader, receiver: &mpsc::Receiver<Completion>) -> Option<Completion> {
    receiver.try_recv().ok().or_else(|| match reader.pump() {
        true => None,
        false => receiver.recv_timeout(Duration::from_millis(50)).ok(),
    })
}

/// An extent and its memory, in pieces that can be read at the same time: each covers so many bytes of whole pages, but for
/// the last.
fn cut(extent: Extent, mut memory: AlignedBytes, piece_bytes: usize) -> Vec<(Extent, AlignedBytes)> {
    let (mut rest, mut pieces) = (extent, Vec::new());
    while rest.cover_bytes() > piece_bytes {
        let bytes = (piece_bytes - rest.lead_bytes()) as u64;
        let after = memory.split_off(piece_bytes);
        pieces.push((Extent { bytes, ..rest }, std::mem::replace(&mut memory, after)));
        rest = Extent { offset: rest.offset + bytes, bytes: rest.bytes - bytes, ..rest };
    }
    pieces.push((rest, memory));
    pieces
}

/// The reverse, for memory: `None` of no pieces.
fn join(pieces: impl Iterator<Item = AlignedBytes>) -> Option<AlignedBytes> {
    pieces.reduce(|mut whole, next| {
        whole.join(next);
        whole
    })
}

/// An extent cut into pieces, each with its own memory, which are neighbours.
struct Assembly {
    bytes: usize,
    lead: usize,
    pieces: Vec<Option<(Extent, AlignedBytes)>>,
}

impl Assembly {
    fn new(extent: &Extent) -> Result<Assembly, StoreError> {
        let memory = AlignedBytes::zeroed(extent.cover_bytes())?;
        let pieces = if extent.bytes > 0 { cut(*extent, memory, PIECE_BYTES) } else { Vec::new() };
        let pieces = pieces.into_iter().map(Some).collect();
        Ok(Assembly { bytes: extent.bytes as usize, lead: extent.lead_bytes(), pieces })
    }

    fn joined(self) -> Loaded {
        let mut pieces = self.pieces.into_iter().map(|piece| piece.expect("all pieces have come").1);
        let memory =
            join(pieces.by_ref()).unwrap_or_else(|| AlignedBytes::zeroed(0).expect("no bytes are always to be had"));
        Loaded { memory, place: self.lead..self.lead + self.bytes }
    }
}
