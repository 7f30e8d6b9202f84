//! Bytes on their way to the device: read or taken from memory by several threads, put into the order of the kernels, and
//! copied while the next are being read.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use model::Error;
use rayon::prelude::*;

use crate::GpuError;
use crate::device::Device;
use crate::format::Format;
use crate::kernel::Buffer;

/// Bytes that are copied at once.
pub(crate) const PIECE_BYTES: usize = 16 << 20;

/// Pieces at most: as many are filled or copied at the same time.
pub(crate) const PIECES: usize = 6;

/// Bytes that a thread puts in order at a time.
const SHARE_BYTES: usize = 256 << 10;

/// Memory that both the host and the device reach.
struct Piece {
    buffer: wgpu::Buffer,
    /// The device has taken what was in it.
    ready: Arc<AtomicBool>,
}

/// Bytes of mapped memory that one thread fills.
struct Share<'a>(wgpu::WriteOnly<'a, [u8]>);

// SAFETY: it is an exclusive reference to bytes, and bytes may be written by any thread. (wgpu says so of sized types only.)
unsafe impl Send for Share<'_> {}

impl Share<'_> {
    fn fill(mut self, bytes: &[u8]) {
        self.0.copy_from_slice(bytes);
    }
}

/// Gives whole rows as they lie in the file, from some row on.
pub(crate) type FetchRows<'f> = dyn Fn(usize, &mut [u8]) -> Result<(), Error> + Sync + 'f;

/// Sends bytes to a device.
pub(crate) struct Uploader {
    device: Arc<Device>,
    pieces: Mutex<Vec<Piece>>,
}

impl Uploader {
    pub(crate) fn new(device: Arc<Device>) -> Uploader {
        Uploader { device, pieces: Mutex::default() }
    }

    /// Writes rows to `to` from byte `at` on: after everything that was handed to the device before. `fetch` gives whole rows
    /// as they lie in the file, from row `first` on; several threads ask at once.
    ///
    /// # Errors
    /// Those of `fetch`; the device failed.
    pub(crate) fn rows(
        &self,
        (to, at): (&Buffer, u64),
        (format, rows, cols): (Format, usize, usize),
        fetch: &FetchRows<'_>,
    ) -> Result<(), Error> {
        let (row_bytes, file_row_bytes) = (format.row_bytes(cols), format.file_row_bytes(cols));
        let rows_each = (PIECE_BYTES / row_bytes).max(1);
        let share_rows = (SHARE_BYTES / row_bytes).clamp(1, rows_each);
        for first in (0..rows).step_by(rows_each) {
            let count = rows_each.min(rows - first);
            let piece = self.piece((count * row_bytes) as u64)?;
            {
                let mut view = self.device.mapped_mut(&piece.buffer, (count * row_bytes) as u64)?;
                let mut rest = view.slice(..);
                let mut shares = Vec::new();
                for share in (0..count).step_by(share_rows) {
                    let rows = share_rows.min(count - share);
                    let (mine, others) = rest.split_at(rows * row_bytes);
                    shares.push((first + share, rows, Share(mine)));
                    rest = others;
                }
                shares.into_par_iter().try_for_each(|(first, rows, out)| {
                    let mut file = vec![0; rows * file_row_bytes];
                    fetch(first, &mut file)?;
                    let mut packed = vec![0; rows * row_bytes];
                    for (row, packed) in file.chunks_exact(file_row_bytes).zip(packed.chunks_exact_mut(row_bytes)) {
                        format.pack(row, packed);
                    }
                    out.fill(&packed);
                    Ok::<_, Error>(())
                })?;
            }
            self.send(piece, (to, at + (first * row_bytes) as u64), (count * row_bytes) as u64)?;
        }
        Ok(())
    }

    /// Writes bytes as they are (a multiple of 4).
    ///
    /// # Errors
    /// The device failed.
    pub(crate) fn bytes(&self, (to, at): (&Buffer, u64), bytes: &[u8]) -> Result<(), GpuError> {
        for (i, bytes) in bytes.chunks(PIECE_BYTES).enumerate() {
            let piece = self.piece(bytes.len() as u64)?;
            self.device.mapped_mut(&piece.buffer, bytes.len() as u64)?.copy_from_slice(bytes);
            self.send(piece, (to, at + (i * PIECE_BYTES) as u64), bytes.len() as u64)?;
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
            if pieces.iter().filter(|piece| fits(piece)).count() < PIECES {
                let size = bytes.max(PIECE_BYTES as u64).next_multiple_of(4);
                let usage = wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC;
                let descriptor =
                    wgpu::BufferDescriptor { label: Some("upload"), size, usage, mapped_at_creation: true };
                let buffer = self.device.device.create_buffer(&descriptor);
                self.device.check_after(|| format!("when {size} bytes were to be uploaded"))?;
                return Ok(Piece { buffer, ready: Arc::default() });
            }
            drop(pieces);
            self.device.wait()?;
        }
    }

    fn send(&self, piece: Piece, (to, at): (&Buffer, u64), bytes: u64) -> Result<(), GpuError> {
        piece.buffer.unmap();
        let mut encoder = self.device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: None });
        encoder.copy_buffer_to_buffer(&piece.buffer, 0, &to.raw, at, bytes);
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
