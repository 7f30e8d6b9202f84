//! How fast the parts of the way are that weights take to an adapter: each by itself, and all of them.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use model::{Error, Model};
use store::Source;
use wgpu::WriteOnly;

use crate::device::{Checks, Choice, Device};
use crate::experts::{ExpertLayout, layouts};
use crate::format::Format;
use crate::kernel::Buffer;
use crate::upload::{FileRows, Portions, Queue, Rows, Share, Target, Transfer, Uploader, on_threads};

/// How much of the way is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the file to a core's cache.
    Read,
    /// From the file to the kernels' order in a core's cache.
    Pack,
    /// From a core's cache to the device: mapped memory is written and copied.
    Upload,
    /// From the file to the device, as when a model is loaded.
    Load,
    /// The same as [`Way::Load`], but with all threads at one piece, two such pieces at a time.
    Together,
}

/// An adapter that experts are loaded onto, to see how long it takes.
pub struct LoadingBench {
    device: Arc<Device>,
    layouts: Vec<ExpertLayout>,
    /// Where experts go, one to the place of another.
    slots: Buffer,
}

/// Memory for slots.
const SLOTS_BYTES: u64 = 1 << 30;

/// Memory that is copied again and again.
const COPIED_BYTES: u64 = 32 << 20;

impl LoadingBench {
    /// Opens an adapter.
    ///
    /// # Errors
    /// It cannot be opened, has no memory, or the model has types without kernels.
    pub fn open(choice: Choice, model: &Model) -> Result<LoadingBench, Error> {
        let device = Device::open(choice, Checks::Off)?;
        let slots = Buffer::new(&device, "slots of experts", SLOTS_BYTES.min(device.report.binding_bytes))?;
        Ok(LoadingBench { layouts: layouts(model)?, slots, device })
    }

    /// What it measures.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Bytes a second of experts that go some way until they are `most_bytes`.
    ///
    /// # Errors
    /// An expert could not be read, the device failed.
    pub fn bytes_per_second(
        &self,
        way: Way,
        (model, source): (&Model, &Source),
        portions: Portions,
        most_bytes: u64,
    ) -> Result<f64, Error> {
        let uploader = Uploader::in_portions(self.device.clone(), portions);
        let began = Instant::now();
        let mut bytes = 0;
        let done = &mut |more| bytes += more;
        match way {
            Way::Read | Way::Pack => {
                let transfers = self.transfers(model, source, most_bytes);
                let queue = Queue::new(transfers.flat_map(|transfer| transfer.shares(portions.share_bytes)));
                on_threads(portions.threads, || in_cache(&queue, way, portions.piece_bytes), done)?;
            }
            Way::Load => {
                let transfers = self.transfers(model, source, most_bytes);
                uploader.load(transfers, &|| Ok(()), done)?;
            }
            Way::Upload => {
                let block = vec![1; 256 << 10];
                let transfers = self.blocks(&block, most_bytes);
                uploader.load(transfers, &|| Ok(()), done)?;
            }
            Way::Together => {
                let transfers = std::sync::Mutex::new(self.transfers(model, source, most_bytes));
                // Four experts, as large as a piece.
                let take = || -> Vec<_> { transfers.lock().expect("nobody panics").by_ref().take(12).collect() };
                let send = || {
                    let together = take();
                    let rows: Vec<(u64, Rows<'_>)> =
                        together.iter().map(|transfer| (transfer.at, transfer.rows)).collect();
                    uploader.rows(&self.slots, &rows)?;
                    let file_bytes = |rows: &Rows<'_>| (rows.rows * rows.format.file_row_bytes(rows.cols)) as u64;
                    let bytes = rows.iter().map(|(_, rows)| file_bytes(rows)).sum();
                    Ok(Some(bytes).filter(|_| !rows.is_empty()))
                };
                on_threads(2, send, done)?;
            }
        }
        self.device.wait()?;
        Ok(bytes as f64 / began.elapsed().as_secs_f64())
    }

    /// Bytes a second that the device copies of mapped memory that was written once.
    ///
    /// # Errors
    /// The device failed.
    pub fn copied_bytes_per_second(&self, most_bytes: u64) -> Result<f64, Error> {
        let size = COPIED_BYTES.min(self.slots.bytes);
        let usage = wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC;
        let descriptor = wgpu::BufferDescriptor { label: Some("copied"), size, usage, mapped_at_creation: true };
        let mapped = self.device.device.create_buffer(&descriptor);
        self.device.check()?;
        self.device.mapped_mut(&mapped, size)?.slice(..).fill(1);
        mapped.unmap();
        let times = most_bytes.div_ceil(size);
        let began = Instant::now();
        let mut encoder = self.device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: None });
        for i in 0..times {
            let at = i % (self.slots.bytes / size) * size;
            encoder.copy_buffer_to_buffer(&mapped, 0, &self.slots.raw, at, size);
        }
        self.device.queue.submit([encoder.finish()]);
        self.device.wait()?;
        Ok((times * size) as f64 / began.elapsed().as_secs_f64())
    }

    /// Experts in the order of the file, each to the next slot.
    fn transfers<'r>(
        &'r self,
        model: &'r Model,
        source: &'r Source,
        most_bytes: u64,
    ) -> impl Iterator<Item = Transfer<'r>> + Send {
        let largest = self.layouts.iter().map(ExpertLayout::slot_bytes).max().expect("a model has layers");
        let places = (0..self.slots.bytes / largest).map(move |slot| slot * largest).cycle();
        let experts = (0..self.layouts.len())
            .flat_map(|layer| (0..model.config.experts as u32).map(move |expert| (layer, expert)));
        let mut left = most_bytes;
        let experts = experts.take_while(move |&(layer, _)| {
            let bytes = self.layouts[layer].slot_bytes();
            let fits = bytes <= left;
            left = left.saturating_sub(bytes);
            fits
        });
        experts.zip(places).flat_map(move |((layer, expert), at)| {
            let extents = &model.experts[layer].extents;
            let parts = [0, 1, 2].map(|part| FileRows::There(source, extents.part(part, expert)));
            let rows = self.layouts[layer].rows(at, parts);
            rows.map(|(at, rows)| Transfer { to: &self.slots, at, rows })
        })
    }

    /// The same bytes again and again, as floats.
    fn blocks<'r>(&'r self, block: &'r [u8], most_bytes: u64) -> impl Iterator<Item = Transfer<'r>> + Send {
        let rows = Rows { format: Format::F32, rows: block.len() / 4096, cols: 1024, bytes: FileRows::Here(block) };
        let places = (0..self.slots.bytes / block.len() as u64).map(|i| i * block.len() as u64).cycle();
        let count = (most_bytes / block.len() as u64) as usize;
        places.take(count).map(move |at| Transfer { to: &self.slots, at, rows })
    }
}

/// Takes some shares and goes part of the way with them.
fn in_cache<'r>(
    queue: &Queue<impl Iterator<Item = Share<'r>>>,
    way: Way,
    piece_bytes: usize,
) -> Result<Option<u64>, Error> {
    thread_local! {
        /// Rows as in the file, and as on the device.
        static SCRATCH: std::cell::RefCell<[Vec<u8>; 2]> = std::cell::RefCell::default();
    }
    let shares = queue.take(piece_bytes);
    SCRATCH.with_borrow_mut(|[fetched, packed]| {
        for share in &shares {
            if way == Way::Read {
                black_box(share.fetch(fetched)?);
            } else {
                packed.resize(share.bytes().max(packed.len()), 0);
                share.write(Target(WriteOnly::from_mut(&mut packed[..share.bytes()])))?;
            }
        }
        let bytes = shares.iter().map(|share| share.file_bytes() as u64).sum();
        Ok(Some(bytes).filter(|_| !shares.is_empty()))
    })
}

/// Bytes a second of rows of each format that one thread puts in order, everything in its caches.
pub fn pack_bytes_per_second() -> Vec<(&'static str, f64)> {
    const COLS: usize = 4096;
    let rate = |format: Format| {
        let (row_bytes, out_bytes) = (format.file_row_bytes(COLS), format.row_bytes(COLS));
        let count = (128 << 10) / out_bytes;
        let (rows, mut out) = (vec![1; count * row_bytes], vec![0; count * out_bytes]);
        let (began, mut shortest) = (Instant::now(), f64::INFINITY);
        while began.elapsed() < Duration::from_millis(50) {
            let start = Instant::now();
            for (row, out) in black_box(&rows[..]).chunks_exact(row_bytes).zip(out.chunks_exact_mut(out_bytes)) {
                format.pack(row, out);
            }
            shortest = shortest.min(start.elapsed().as_secs_f64());
        }
        (format.name(), rows.len() as f64 / shortest)
    };
    Format::ALL.map(rate).to_vec()
}
