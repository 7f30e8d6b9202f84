//! Bytes on their way to the device: read or taken from memory by several threads, put into the order of the kernels, and
//! copied while the next are being read.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use model::Error;
use rayon::prelude::*;

use crate::GpuError;
use crate::device::Device;
use crate::format::Format;
use crate::kernel::Buffer;

/// Bytes that are copied at once.
pub(crate) const PIECE_BYTES: usize = 32 << 20;

/// Pieces at most: as many are filled or copied at the same time.
pub(crate) const PIECES: usize = 4;

/// Bytes that a thread puts in order at a time: few enough to stay in its cache on the way.
const SHARE_BYTES: usize = 128 << 10;

/// Memory that both the host and the device reach.
struct Piece {
    buffer: wgpu::Buffer,
    /// The device has taken what was in it.
    ready: Arc<AtomicBool>,
    /// One more of those that there are.
    _one: Arc<()>,
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
    /// A function that gives rows from some row on; several threads ask at once.
    Fetch(&'r FetchRows<'r>),
}

/// Gives whole rows as they lie in the file, from some row on.
pub(crate) type FetchRows<'f> = dyn Fn(usize, &mut [u8]) -> Result<(), Error> + Sync + 'f;

/// Rows that one thread puts in order.
struct Share<'r> {
    from: Rows<'r>,
    first: usize,
    rows: usize,
    /// Where they go, in bytes.
    to: u64,
}

/// Bytes of a piece, and where they go.
struct Copied {
    to: u64,
    bytes: u64,
}

/// Bytes of mapped memory that one thread fills.
struct Target<'a>(wgpu::WriteOnly<'a, [u8]>);

// SAFETY: it is an exclusive reference to bytes, and bytes may be written by any thread. (wgpu says so of sized types only.)
unsafe impl Send for Target<'_> {}

impl<'r> Rows<'r> {
    fn shares(self, to: u64) -> impl Iterator<Item = Share<'r>> {
        let row_bytes = self.format.row_bytes(self.cols);
        let most = (SHARE_BYTES / row_bytes).max(1);
        (0..self.rows).step_by(most).map(move |first| Share {
            from: self,
            first,
            rows: most.min(self.rows - first),
            to: to + (first * row_bytes) as u64,
        })
    }
}

thread_local! {
    /// Rows as in the file, and as on the device: kept, since fresh memory takes longer to get than to fill.
    static SCRATCH: RefCell<[Vec<u8>; 2]> = RefCell::default();
}

impl Share<'_> {
    /// Bytes on the device.
    fn bytes(&self) -> usize {
        self.rows * self.from.format.row_bytes(self.from.cols)
    }

    fn write(&self, mut to: Target<'_>) -> Result<(), Error> {
        let Rows { format, cols, bytes, .. } = self.from;
        let file_row_bytes = format.file_row_bytes(cols);
        let file_bytes = self.rows * file_row_bytes;
        SCRATCH.with_borrow_mut(|[fetched, packed]| {
            let file = match bytes {
                FileRows::Here(all) => &all[self.first * file_row_bytes..][..file_bytes],
                FileRows::Fetch(fetch) => {
                    fetched.resize(file_bytes.max(fetched.len()), 0);
                    fetch(self.first, &mut fetched[..file_bytes])?;
                    &fetched[..file_bytes]
                }
            };
            packed.resize(self.bytes().max(packed.len()), 0);
            let packed = &mut packed[..self.bytes()];
            for (row, packed) in file.chunks_exact(file_row_bytes).zip(packed.chunks_exact_mut(format.row_bytes(cols)))
            {
                format.pack(row, packed);
                packed[file_row_bytes..].fill(0);
            }
            to.0.copy_from_slice(packed);
            Ok(())
        })
    }
}

/// Sends bytes to a device.
pub(crate) struct Uploader {
    device: Arc<Device>,
    /// Those that nobody fills.
    pieces: Mutex<Vec<Piece>>,
    /// Shared by all that there are.
    made: Arc<()>,
}

impl Uploader {
    pub(crate) fn new(device: Arc<Device>) -> Uploader {
        Uploader { device, pieces: Mutex::default(), made: Arc::default() }
    }

    /// Writes matrices to `to`, each from a byte on: after everything that was handed to the device before.
    ///
    /// # Errors
    /// What fetching rows gives; the device failed.
    pub(crate) fn rows(&self, to: &Buffer, matrices: &[(u64, Rows<'_>)]) -> Result<(), Error> {
        let shares: Vec<Share<'_>> = matrices.iter().flat_map(|(at, rows)| rows.shares(*at)).collect();
        let mut rest = &shares[..];
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = |share: &&Share<'_>| {
                bytes += share.bytes();
                bytes <= PIECE_BYTES
            };
            let count = rest.iter().take_while(fits).count().max(1);
            let (together, after) = rest.split_at(count);
            self.send_together(to, together)?;
            rest = after;
        }
        Ok(())
    }

    /// Writes shares to one piece, side by side, and sends it.
    fn send_together(&self, to: &Buffer, shares: &[Share<'_>]) -> Result<(), Error> {
        let bytes = shares.iter().map(Share::bytes).sum::<usize>() as u64;
        let piece = self.piece(bytes)?;
        let mut copies: Vec<Copied> = Vec::new();
        {
            let mut view = self.device.mapped_mut(&piece.buffer, bytes)?;
            let mut rest = view.slice(..);
            let mut writes = Vec::new();
            for share in shares {
                let (mine, others) = rest.split_at(share.bytes());
                writes.push((share, Target(mine)));
                rest = others;
                match copies.last_mut() {
                    Some(last) if last.to + last.bytes == share.to => last.bytes += share.bytes() as u64,
                    _ => copies.push(Copied { to: share.to, bytes: share.bytes() as u64 }),
                }
            }
            writes.into_par_iter().try_for_each(|(share, to)| share.write(to))?;
        }
        Ok(self.send(piece, to, &copies)?)
    }

    /// Writes bytes as they are (a multiple of 4).
    ///
    /// # Errors
    /// The device failed.
    pub(crate) fn bytes(&self, (to, at): (&Buffer, u64), bytes: &[u8]) -> Result<(), GpuError> {
        for (i, bytes) in bytes.chunks(PIECE_BYTES).enumerate() {
            let piece = self.piece(bytes.len() as u64)?;
            self.device.mapped_mut(&piece.buffer, bytes.len() as u64)?.copy_from_slice(bytes);
            let copied = Copied { to: at + (i * PIECE_BYTES) as u64, bytes: bytes.len() as u64 };
            self.send(piece, to, &[copied])?;
        }
        Ok(())
    }

    /// A piece that the host may write to.
    fn piece(&self, bytes: u64) -> Result<Piece, GpuError> {
        loop {
            self.device.check()?;
            let mut pieces = self.pieces.lock().unwrap_or_else(PoisonError::into_inner);
            let fits = |piece: &Piece| piece.buffer.size() >= bytes;
            if let Some(i) = pieces.iter().position(|p| fits(p) && p.ready.load(Ordering::Acquire)) {
                return Ok(pieces.swap_remove(i));
            }
            pieces.retain(|piece| fits(piece) || !piece.ready.load(Ordering::Acquire));
            if Arc::strong_count(&self.made) <= PIECES {
                let size = bytes.max(PIECE_BYTES as u64).next_multiple_of(4);
                let usage = wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC;
                let descriptor =
                    wgpu::BufferDescriptor { label: Some("upload"), size, usage, mapped_at_creation: true };
                let buffer = self.device.device.create_buffer(&descriptor);
                self.device.check_after(|| format!("when {size} bytes were to be uploaded"))?;
                return Ok(Piece { buffer, ready: Arc::default(), _one: self.made.clone() });
            }
            drop(pieces);
            self.device.wait()?;
        }
    }

    /// Has what is in a piece, side by side, copied to where it belongs.
    fn send(&self, piece: Piece, to: &Buffer, copies: &[Copied]) -> Result<(), GpuError> {
        piece.buffer.unmap();
        let mut encoder = self.device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: None });
        let mut from = 0;
        for copied in copies {
            encoder.copy_buffer_to_buffer(&piece.buffer, from, &to.raw, copied.to, copied.bytes);
            from += copied.bytes;
        }
        self.device.queue.submit([encoder.finish()]);
        piece.ready.store(false, Ordering::Release);
        let ready = piece.ready.clone();
        piece.buffer.map_async(wgpu::MapMode::Write, .., move |result| ready.store(result.is_ok(), Ordering::Release));
        // Lets the driver tell what it has taken by now.
        let _ = self.device.device.poll(wgpu::PollType::Poll);
        self.pieces.lock().unwrap_or_else(PoisonError::into_inner).push(piece);
        self.device.check()
    }
}
