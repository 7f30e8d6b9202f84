//! Bytes on their way to the device: read or taken from memory by several threads, put into the order of the kernels in memory
//! that both reach, and copied while the next are being read.
//!
//! There are two ways. What a token waits for ([`Uploader::rows`]) is written by all threads into one piece of such memory, which
//! one submission copies. Weights that are loaded ([`Uploader::load`]) are far more than a piece: there each thread fills pieces of
//! its own and hands them over itself, and waits for the device alone.

use std::cell::RefCell;
use std::iter::Peekable;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use model::{Cancel, Error};
use rayon::prelude::*;
use store::{Extent, Source, StoreError};

use crate::GpuError;
use crate::device::Device;
use crate::format::Format;
use crate::kernel::Buffer;

/// Bytes that are copied at once.
const PIECE_BYTES: usize = 32 << 20;

/// Memory that both the host and the device reach, at most: it is filled and copied at the same time.
pub(crate) const MAPPED_BYTES: usize = 4 * PIECE_BYTES;

/// Bytes that a thread puts in order at a time: few enough to stay in its cache on the way.
const SHARE_BYTES: usize = 128 << 10;

/// How weights are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Portions {
    /// Threads that read, put in order and send.
    pub threads: usize,
    /// Bytes that each sends at once.
    pub piece_bytes: usize,
    /// Bytes that each reads at once.
    pub share_bytes: usize,
}

impl Default for Portions {
    fn default() -> Portions {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(16);
        Portions { threads, piece_bytes: 4 << 20, share_bytes: SHARE_BYTES }
    }
}

/// Whole rows of a matrix as they lie in the file.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'r> {
    pub(crate) format: Format,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) bytes: FileRows<'r>,
}

/// Where rows come from.
#[derive(Clone, Copy)]
pub(crate) enum FileRows<'r> {
    /// Memory that holds them all.
    Here(&'r [u8]),
    /// A part of a file.
    There(&'r Source, Extent),
}

/// A matrix and where it goes: a buffer, from some byte on.
#[derive(Clone, Copy)]
pub(crate) struct Transfer<'r> {
    pub(crate) to: &'r Buffer,
    pub(crate) at: u64,
    pub(crate) rows: Rows<'r>,
}

/// Rows that one thread puts in order.
pub(crate) struct Share<'r> {
    from: Rows<'r>,
    first: usize,
    rows: usize,
    to: &'r Buffer,
    /// Where they go, in bytes.
    at: u64,
}

/// Bytes of a piece, and where they go.
struct Copied<'r> {
    to: &'r Buffer,
    at: u64,
    bytes: u64,
}

/// Bytes of mapped memory that one thread fills.
pub(crate) struct Target<'a>(pub(crate) wgpu::WriteOnly<'a, [u8]>);

// SAFETY: it is an exclusive reference to bytes, and bytes may be written by any thread. (wgpu says so of sized types only.)
unsafe impl Send for Target<'_> {}

impl<'r> Transfer<'r> {
    /// Its rows, by so many that they take `share_bytes` at most, one at least.
    pub(crate) fn shares(self, share_bytes: usize) -> impl Iterator<Item = Share<'r>> {
        let Transfer { to, at, rows: from } = self;
        let row_bytes = from.format.row_bytes(from.cols);
        let most = (share_bytes / row_bytes).max(1);
        (0..from.rows).step_by(most).map(move |first| Share {
            from,
            first,
            rows: most.min(from.rows - first),
            to,
            at: at + (first * row_bytes) as u64,
        })
    }
}

thread_local! {
    /// Rows as in the file: kept, since fresh memory takes longer to get than to fill.
    static FETCHED: RefCell<Vec<u8>> = RefCell::default();
}

/// The first `bytes` of memory that grows as needed.
fn first(memory: &mut Vec<u8>, bytes: usize) -> &mut [u8] {
    memory.resize(bytes.max(memory.len()), 0);
    &mut memory[..bytes]
}

impl Share<'_> {
    /// Bytes on the device.
    pub(crate) fn bytes(&self) -> usize {
        self.rows * self.from.format.row_bytes(self.from.cols)
    }

    /// Bytes in the file.
    pub(crate) fn file_bytes(&self) -> usize {
        self.rows * self.from.format.file_row_bytes(self.from.cols)
    }

    /// The rows as they lie in the file.
    pub(crate) fn fetch<'f>(&'f self, fetched: &'f mut Vec<u8>) -> Result<&'f [u8], Error> {
        match self.from.bytes {
            FileRows::Here(all) => {
                let begin = self.first * self.from.format.file_row_bytes(self.from.cols);
                Ok(&all[begin..][..self.file_bytes()])
            }
            FileRows::There(source, extent) => {
                let begin = self.first * self.from.format.file_row_bytes(self.from.cols);
                let rows = first(fetched, self.file_bytes());
                source.read_exact_at(extent.file, extent.offset + begin as u64, rows)?;
                Ok(rows)
            }
        }
    }

    /// Writes the rows as they lie on the device, from the first byte to the last: nothing lies between a core's cache and mapped memory.
    pub(crate) fn write(&self, mut to: Target<'_>) -> Result<(), Error> {
        let Rows { format, cols, .. } = self.from;
        FETCHED.with_borrow_mut(|fetched| {
            let file = self.fetch(fetched)?;
            let row_bytes = format.row_bytes(cols);
            for (i, row) in file.chunks_exact(format.file_row_bytes(cols)).enumerate() {
                format.write(row, to.0.slice(i * row_bytes..(i + 1) * row_bytes));
            }
            Ok(())
        })
    }
}

/// Shares that are still to be sent: whoever is free takes some.
pub(crate) struct Queue<I: Iterator>(Mutex<Peekable<I>>);

impl<'r, I: Iterator<Item = Share<'r>>> Queue<I> {
    pub(crate) fn new(shares: I) -> Queue<I> {
        Queue(Mutex::new(shares.peekable()))
    }

    /// The next that have `bytes` together at most, or the next one; none when all are taken.
    pub(crate) fn take(&self, bytes: usize) -> Vec<Share<'r>> {
        let mut shares = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken: Vec<Share<'r>> = shares.next().into_iter().collect();
        let mut sum: usize = taken.iter().map(Share::bytes).sum();
        while let Some(share) = shares.next_if(|share| !taken.is_empty() && sum + share.bytes() <= bytes) {
            sum += share.bytes();
            taken.push(share);
        }
        taken
    }
}

/// Memory that both the host and the device reach.
struct Piece {
    buffer: wgpu::Buffer,
    /// The device has taken what was in it.
    ready: Arc<AtomicBool>,
    /// One more of those that there are.
    _one: Arc<()>,
}

/// Pieces of memory, each of which is being filled, being copied, or waits for its next use.
struct Pieces {
    device: Arc<Device>,
    each_bytes: usize,
    most: usize,
    /// Those that nobody fills.
    held: Mutex<Vec<Piece>>,
    /// Shared by all that there are.
    made: Arc<()>,
}

impl Pieces {
    fn new(device: Arc<Device>, each_bytes: usize) -> Pieces {
        let most = (MAPPED_BYTES / each_bytes).max(1);
        Pieces { device, each_bytes, most, held: Mutex::default(), made: Arc::default() }
    }

    fn held(&self) -> MutexGuard<'_, Vec<Piece>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A piece that the host may write to. No more threads than there are pieces may ask at the same time, each with none of its own.
    fn take(&self, bytes: u64) -> Result<Piece, GpuError> {
        loop {
            self.device.check()?;
            let mut held = self.held();
            let fits = |piece: &Piece| piece.buffer.size() >= bytes;
            if let Some(i) = held.iter().position(|p| fits(p) && p.ready.load(Ordering::Acquire)) {
                return Ok(held.swap_remove(i));
            }
            held.retain(|piece| fits(piece) || !piece.ready.load(Ordering::Acquire));
            // Under the lock, so that no two make the last one.
            if Arc::strong_count(&self.made) <= self.most {
                let _one = self.made.clone();
                drop(held);
                return self.make(bytes, _one);
            }
            drop(held);
            self.device.wait()?;
        }
    }

    fn make(&self, bytes: u64, _one: Arc<()>) -> Result<Piece, GpuError> {
        let size = bytes.max(self.each_bytes as u64).next_multiple_of(4);
        let usage = wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC;
        let descriptor = wgpu::BufferDescriptor { label: Some("upload"), size, usage, mapped_at_creation: true };
        let buffer = self.device.device.create_buffer(&descriptor);
        self.device.check_after(|| format!("when {size} bytes were to be uploaded"))?;
        Ok(Piece { buffer, ready: Arc::default(), _one })
    }

    /// Has what is in a piece, side by side, copied to where it belongs.
    fn send(&self, piece: Piece, copies: &[Copied<'_>]) -> Result<(), GpuError> {
        piece.buffer.unmap();
        let mut encoder = self.device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: None });
        let mut from = 0;
        for copied in copies {
            encoder.copy_buffer_to_buffer(&piece.buffer, from, &copied.to.raw, copied.at, copied.bytes);
            from += copied.bytes;
        }
        self.device.queue.submit([encoder.finish()]);
        piece.ready.store(false, Ordering::Release);
        let ready = piece.ready.clone();
        piece.buffer.map_async(wgpu::MapMode::Write, .., move |result| ready.store(result.is_ok(), Ordering::Release));
        // Lets the driver tell what it has taken by now.
        let _ = self.device.device.poll(wgpu::PollType::Poll);
        self.held().push(piece);
        self.device.check()
    }

    /// Fills a piece with shares, side by side, and sends it.
    fn send_shares(&self, shares: &[Share<'_>], fill: &FillShares<'_>) -> Result<(), Error> {
        let bytes = shares.iter().map(Share::bytes).sum::<usize>() as u64;
        let piece = self.take(bytes)?;
        let mut copies: Vec<Copied<'_>> = Vec::new();
        {
            let mut view = self.device.mapped_mut(&piece.buffer, bytes)?;
            let mut rest = view.slice(..);
            let mut writes = Vec::new();
            for share in shares {
                let (mine, others) = rest.split_at(share.bytes());
                writes.push((share, Target(mine)));
                rest = others;
                let bytes = share.bytes() as u64;
                match copies.last_mut() {
                    Some(last) if std::ptr::eq(last.to, share.to) && last.at + last.bytes == share.at => {
                        last.bytes += bytes;
                    }
                    _ => copies.push(Copied { to: share.to, at: share.at, bytes }),
                }
            }
            fill(writes)?;
        }
        Ok(self.send(piece, &copies)?)
    }
}

/// Writes each share to its memory.
type FillShares<'f> = dyn Fn(Vec<(&Share<'_>, Target<'_>)>) -> Result<(), Error> + 'f;

/// Says whether to go on.
pub(crate) type Check<'c> = dyn Fn() -> Result<(), Error> + Sync + 'c;

/// Sends bytes to a device.
pub(crate) struct Uploader {
    pieces: Pieces,
    portions: Portions,
}

impl Uploader {
    /// One that loads in the usual portions.
    pub(crate) fn new(device: Arc<Device>) -> Uploader {
        Uploader::in_portions(device, Portions::default())
    }

    /// One that loads in such portions.
    pub(crate) fn in_portions(device: Arc<Device>, portions: Portions) -> Uploader {
        Uploader { pieces: Pieces::new(device, PIECE_BYTES), portions }
    }

    /// Writes matrices to `to`, each from a byte on, by the threads of the pool: after everything that was handed to the device
    /// before.
    ///
    /// # Errors
    /// What reading gives; the device failed.
    pub(crate) fn rows(&self, to: &Buffer, matrices: &[(u64, Rows<'_>)]) -> Result<(), Error> {
        let transfers = matrices.iter().map(|&(at, rows)| Transfer { to, at, rows });
        let queue = Queue::new(transfers.flat_map(|transfer| transfer.shares(SHARE_BYTES)));
        let together =
            |writes: Vec<(&Share<'_>, Target<'_>)>| writes.into_par_iter().try_for_each(|(share, to)| share.write(to));
        loop {
            match &queue.take(PIECE_BYTES)[..] {
                [] => return Ok(()),
                shares => self.pieces.send_shares(shares, &together)?,
            }
        }
    }

    /// Writes matrices, many of them, by threads that each do all of it. `check` is asked before each piece; `done` is told the
    /// bytes of the file as they are sent.
    ///
    /// # Errors
    /// What reading gives; the device failed; what `check` says.
    pub(crate) fn load<'r>(
        &self,
        transfers: impl Iterator<Item = Transfer<'r>> + Send,
        check: &Check<'_>,
        done: &mut dyn FnMut(u64),
    ) -> Result<(), Error> {
        self.give_back()?;
        let portions = self.portions;
        let pieces = Pieces::new(self.pieces.device.clone(), portions.piece_bytes);
        let queue = Queue::new(transfers.flat_map(|transfer| transfer.shares(portions.share_bytes)));
        let alone =
            |writes: Vec<(&Share<'_>, Target<'_>)>| writes.into_iter().try_for_each(|(share, to)| share.write(to));
        let work = || {
            let shares = queue.take(portions.piece_bytes);
            if shares.is_empty() {
                return Ok(None);
            }
            check()?;
            pieces.send_shares(&shares, &alone)?;
            Ok(Some(shares.iter().map(Share::file_bytes).sum::<usize>() as u64))
        };
        on_threads(portions.threads.clamp(1, pieces.most), work, done)
    }

    /// Gives mapped memory back.
    fn give_back(&self) -> Result<(), GpuError> {
        self.pieces.device.wait()?;
        self.pieces.held().clear();
        Ok(())
    }

    /// Writes bytes as they are (a multiple of 4).
    ///
    /// # Errors
    /// The device failed.
    pub(crate) fn bytes(&self, (to, at): (&Buffer, u64), bytes: &[u8]) -> Result<(), GpuError> {
        for (i, bytes) in bytes.chunks(PIECE_BYTES).enumerate() {
            let piece = self.pieces.take(bytes.len() as u64)?;
            self.pieces.device.mapped_mut(&piece.buffer, bytes.len() as u64)?.copy_from_slice(bytes);
            let copied = Copied { to, at: at + (i * PIECE_BYTES) as u64, bytes: bytes.len() as u64 };
            self.pieces.send(piece, &[copied])?;
        }
        Ok(())
    }
}

/// Raises a flag when it is dropped and nobody said that all went well: also where a thread panics.
struct Raises<'f>(Option<&'f AtomicBool>);

impl Raises<'_> {
    fn all_is_well(mut self) {
        self.0 = None;
    }
}

impl Drop for Raises<'_> {
    fn drop(&mut self) {
        if let Some(flag) = self.0 {
            flag.store(true, Ordering::Relaxed);
        }
    }
}

/// Makes something on a thread of its own while the caller's uploads; when one fails, `check` tells the other to stop.
///
/// # Errors
/// Those of the two; what stopped because of the other does not count.
pub(crate) fn while_uploading<T: Send>(
    make: impl FnOnce(&Check<'_>) -> Result<T, Error> + Send,
    upload: impl FnOnce(&Check<'_>) -> Result<(), Error>,
    cancel: &Cancel,
) -> Result<T, Error> {
    let failed = AtomicBool::new(false);
    let check = || match failed.load(Ordering::Relaxed) {
        true => Err(Error::Cancelled),
        false => Ok(cancel.check()?),
    };
    std::thread::scope(|scope| {
        let made = scope.spawn(|| {
            let raises = Raises(Some(&failed));
            make(&check).inspect(|_| raises.all_is_well())
        });
        let raises = Raises(Some(&failed));
        let uploaded = upload(&check).inspect(|()| raises.all_is_well());
        let made = made.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        match (made, uploaded) {
            (Err(Error::Cancelled), Err(error)) | (Err(error), _) | (Ok(_), Err(error)) => Err(error),
            (Ok(made), Ok(())) => Ok(made),
        }
    })
}

/// Has several threads work, each again and again until it finds nothing to do; `done` is told what was done. After an error each ends
/// what it has begun, and no more.
///
/// # Errors
/// The first of `work`; no thread could be started.
pub(crate) fn on_threads(
    threads: usize,
    work: impl Fn() -> Result<Option<u64>, Error> + Sync,
    done: &mut dyn FnMut(u64),
) -> Result<(), Error> {
    let stop = AtomicBool::new(false);
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        for i in 0..threads {
            let (sender, stop, work) = (sender.clone(), &stop, &work);
            let run = move || {
                let raises = Raises(Some(stop));
                while !stop.load(Ordering::Relaxed)
                    && let Some(result) = work().transpose()
                {
                    stop.fetch_or(result.is_err(), Ordering::Relaxed);
                    // Nobody listens after an error.
                    let _ = sender.send(result);
                }
                raises.all_is_well();
            };
            match std::thread::Builder::new().spawn_scoped(scope, run) {
                Err(cause) if i == 0 => return Err(StoreError::Thread { cause }.into()),
                // Those that there are do.
                Err(_) => break,
                Ok(_) => {}
            }
        }
        drop(sender);
        let raises = Raises(Some(&stop));
        let ended = receiver.into_iter().try_for_each(|result| {
            done(result?);
            Ok(())
        });
        ended.inspect(|()| raises.all_is_well())
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::device::{Checks, Choice, adapters};
    use crate::kernel::{Commands, Kernels};

    #[test]
    fn everything_is_done_once() {
        let next = AtomicU64::new(0);
        let work = || Ok(Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&n| n < 100));
        let mut done = Vec::new();
        on_threads(3, work, &mut |n| done.push(n)).unwrap();
        done.sort_unstable();
        assert_eq!(done, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn an_error_ends_the_work_of_all() {
        let next = AtomicU64::new(0);
        let work = || match next.fetch_add(1, Ordering::Relaxed) {
            10 => Err(Error::Cancelled),
            n => Ok(Some(n)),
        };
        // Without an end but by the error.
        let result = on_threads(3, work, &mut |_| ());
        assert!(matches!(result, Err(Error::Cancelled)), "found {result:?}");
    }

    #[test]
    fn what_fails_ends_the_other() {
        let cancel = Cancel::default();
        // Without an end but by the other's error.
        let upload = |check: &Check<'_>| loop {
            check()?;
        };
        let make = |check: &Check<'_>| -> Result<i32, Error> {
            loop {
                check()?;
            }
        };
        let fails = |_: &Check<'_>| Err::<(), _>(Error::NotFinite { position: 7 });
        let made = while_uploading(fails, upload, &cancel);
        assert!(matches!(made, Err(Error::NotFinite { position: 7 })), "{made:?}");
        let made = while_uploading(make, |_| Err(Error::NotFinite { position: 8 }), &cancel);
        assert!(matches!(made, Err(Error::NotFinite { position: 8 })), "{made:?}");
        assert!(matches!(while_uploading(|_| Ok(1), |check| check(), &cancel), Ok(1)));
        let panics = |_: &Check<'_>| -> Result<i32, Error> { panic!("on purpose") };
        assert!(std::panic::catch_unwind(|| while_uploading(panics, upload, &cancel)).is_err());
        cancel.cancel();
        assert!(matches!(while_uploading(|_| Ok(1), upload, &cancel), Err(Error::Cancelled)));
        assert!(matches!(while_uploading(make, upload, &cancel), Err(Error::Cancelled)));
    }

    /// Matrices in a file, one after the other, and where each goes: places in two buffers, with gaps between.
    struct Model {
        uploader: Uploader,
        source: Source,
        file: Vec<u8>,
        slabs: [Buffer; 2],
        /// Slab, place, format, rows, columns, bytes in the file.
        matrices: Vec<(usize, u64, Format, usize, usize, Extent)>,
    }

    fn model(portions: Portions) -> Model {
        let adapter = adapters().into_iter().find(|adapter| adapter.lacks.is_empty()).expect("an adapter");
        let device = Device::open(Choice::Index(adapter.index), Checks::On).unwrap();
        let (mut matrices, mut offset, mut ends) = (Vec::new(), 0, [0; 2]);
        for (i, rows) in [1, 3, 17, 64, 127].into_iter().enumerate() {
            for (k, format) in Format::ALL.into_iter().enumerate() {
                let (cols, slab) = (format.block_elements() * (1 + i), (i + k) % 2);
                let bytes = (rows * format.file_row_bytes(cols)) as u64;
                matrices.push((slab, ends[slab], format, rows, cols, Extent { file: 0, offset, bytes }));
                offset += bytes;
                ends[slab] += (rows * format.row_bytes(cols)) as u64 + 16 * (k as u64 % 3);
            }
        }
        let file: Vec<u8> = (0..offset).map(|i| ((i * 2_654_435_761) >> 13) as u8).collect();
        let source = Source::from_image("matrices", Vec::leak(file.clone()));
        let slabs = ends.map(|bytes| Buffer::new(&device, "a slab", bytes).unwrap());
        Model { uploader: Uploader::in_portions(device, portions), source, file, slabs, matrices }
    }

    impl Model {
        fn transfers(&self) -> impl Iterator<Item = Transfer<'_>> + Send {
            self.matrices.iter().map(|&(slab, at, format, rows, cols, extent)| {
                let bytes = FileRows::There(&self.source, extent);
                Transfer { to: &self.slabs[slab], at, rows: Rows { format, rows, cols, bytes } }
            })
        }

        fn load(&self) -> Result<u64, Error> {
            let mut sum = 0;
            self.uploader.load(self.transfers(), &|| Ok(()), &mut |bytes| sum += bytes)?;
            Ok(sum)
        }

        /// Whether every matrix lies where it belongs.
        fn check(&self) {
            let device = &self.uploader.pieces.device;
            let mut commands = Commands::new(device.clone(), Arc::new(Kernels::new(device.clone())));
            let slabs = self.slabs.each_ref().map(|slab| commands.read((slab, 0), slab.bytes).unwrap());
            for &(slab, at, format, rows, cols, extent) in &self.matrices {
                let file = &self.file[extent.offset as usize..][..extent.bytes as usize];
                let row_bytes = format.row_bytes(cols);
                let mut expected = vec![0; rows * row_bytes];
                for (row, to) in
                    file.chunks_exact(format.file_row_bytes(cols)).zip(expected.chunks_exact_mut(row_bytes))
                {
                    format.pack(row, to);
                }
                assert_eq!(slabs[slab][at as usize..][..expected.len()], expected, "{format:?}, {rows} rows");
            }
        }
    }

    const SMALL: Portions = Portions { threads: 3, piece_bytes: 8 << 10, share_bytes: 1 << 10 };

    #[test]
    fn matrices_arrive_whole_whatever_the_portions() {
        let usual = Portions::default();
        let one_row_at_a_time = Portions { share_bytes: 1, piece_bytes: 64, ..SMALL };
        let all = [usual, SMALL, Portions { threads: 1, ..SMALL }, Portions { threads: 7, ..one_row_at_a_time }];
        for portions in all {
            let model = model(portions);
            assert_eq!(model.load().unwrap(), model.file.len() as u64, "{portions:?}");
            model.check();
        }
    }

    #[test]
    fn an_error_in_the_middle_leaves_nothing_hanging() {
        let mut model = model(SMALL);
        let middle = model.matrices.len() / 2;
        let right = model.matrices[middle].5;
        model.matrices[middle].5.offset = model.file.len() as u64;
        match model.load() {
            Err(Error::Store(StoreError::Short { .. })) => {}
            other => panic!("expected a short read, found {other:?}"),
        }
        model.matrices[middle].5 = right;
        // What is asked for meanwhile counts, too.
        let asked = AtomicU64::new(0);
        let check = || if asked.fetch_add(1, Ordering::Relaxed) < 5 { Ok(()) } else { Err(Error::Cancelled) };
        let stopped = model.uploader.load(model.transfers(), &check, &mut |_| ());
        assert!(matches!(stopped, Err(Error::Cancelled)), "{stopped:?}");
        model.load().unwrap();
        model.check();
    }

    #[test]
    fn shares_are_taken_in_order_and_each_once() {
        let model = model(SMALL);
        let queue = Queue::new(model.transfers().flat_map(|transfer| transfer.shares(1 << 10)));
        let mut rows = 0;
        loop {
            let taken = queue.take(8 << 10);
            if taken.is_empty() {
                break;
            }
            let bytes: usize = taken.iter().map(Share::bytes).sum();
            assert!(bytes <= 8 << 10 || taken.len() == 1, "{bytes} bytes");
            rows += taken.iter().map(|share| share.rows).sum::<usize>();
        }
        assert_eq!(rows, model.matrices.iter().map(|matrix| matrix.3).sum::<usize>());
    }
}
