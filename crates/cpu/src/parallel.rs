//! Work split over threads. What is computed never depends on the split, nor on which thread takes which part.

use std::borrow::Cow;
use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use gguf::TensorType;
use model::{Error, Precision};
use quant::integer::{Activations, Blocking};
use quant::simd::Level;
use quant::{exact, integer};

use crate::pool::{self, Pool};
use crate::weights::Matrix;

/// For fewer multiplications another thread costs more than it saves.
const WORTH_A_THREAD: usize = 200_000;

/// Parts of a product for each thread: enough that a thread which something else holds up leaves its parts to others.
const PARTS_A_THREAD: usize = 8;

/// The most f32 of a product's part, so that it stays in a core's own cache until it is laid out.
const PART_VALUES: usize = 64 << 10;

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { weights: Vec::new(), columns: Vec::new() }) };
}

/// What a thread keeps from product to product.
struct Scratch {
    /// Dequantised weight rows.
    weights: Vec<f32>,
    /// A part of a product, `[n, R]`.
    columns: Vec<f32>,
}

/// The threads of a backend, the instruction set they use, and how they multiply.
pub(crate) struct Workers {
    pool: Pool,
    pub(crate) level: Level,
    precision: Precision,
    /// How often work was shared, so that tests can tell that it was.
    shared: AtomicU64,
}

impl Workers {
    pub(crate) fn new(threads: usize, level: Level, precision: Precision) -> Result<Workers, Error> {
        let threads = if threads == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { threads };
        let pool = Pool::new(threads).map_err(|cause| Error::Threads { threads, cause: cause.to_string() })?;
        Ok(Workers { pool, level, precision, shared: AtomicU64::new(0) })
    }

    pub(crate) fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// How often work was shared between threads so far.
    pub(crate) fn shared(&self) -> u64 {
        self.shared.load(Ordering::Relaxed)
    }

    /// Calls `f` for every item; `work` is the cost of all of them, in multiplications. `f` may not share work itself.
    pub(crate) fn each<I>(&self, items: I, work: usize, f: impl Fn(I::Item) + Sync)
    where
        I: ExactSizeIterator,
        I::Item: Send,
    {
        pool::assert_outside_of_jobs();
        let threads = self.threads().min(items.len()).min(work / WORTH_A_THREAD);
        if threads < 2 {
            return items.for_each(f);
        }
        self.shared.fetch_add(1, Ordering::Relaxed);
        // A lock for each item, which nobody else wants: of one for all of them, many threads would wait asleep.
        let items: Vec<Mutex<Option<I::Item>>> = items.map(|item| Mutex::new(Some(item))).collect();
        let next = AtomicUsize::new(0);
        self.pool.run(threads, &|| {
            while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                let item = item.lock().unwrap_or_else(PoisonError::into_inner).take();
                f(item.expect("each is taken once"));
            }
        });
    }

    /// Calls `f(row, chunk)` for every `width`-sized chunk of `out`; `work` is the cost of one, in multiplications.
    pub(crate) fn rows<T: Send>(&self, out: &mut [T], width: usize, work: usize, f: impl Fn(usize, &mut [T]) + Sync) {
        let rows = out.len() / width.max(1);
        self.each(out.chunks_exact_mut(width.max(1)).enumerate(), rows * work, |(row, chunk)| f(row, chunk));
    }

    /// Calls `f((i, chunk))` for every chunk of `out`, the last one possibly shorter; `work` is the cost of one.
    pub(crate) fn chunks(&self, out: &mut [f32], len: usize, work: usize, f: impl Fn((usize, &mut [f32])) + Sync) {
        let chunks = out.len().div_ceil(len);
        self.each(out.chunks_mut(len).enumerate(), chunks * work, f);
    }

    /// How weights of this type are multiplied; `None` if as f32.
    fn blocking(&self, ty: TensorType) -> Option<Blocking> {
        integer::blocking(ty).filter(|_| self.precision == Precision::Fast)
    }

    /// `y[r, n] = w[n] · x[r]`: `y` becomes `[R, N]`.
    pub(crate) fn matmul(&self, w: Matrix<'_>, x: &Input<'_>, y: &mut Vec<f32>) {
        y.resize(x.rows * w.rows, 0.0);
        self.matmul_into(w, x, y.chunks_exact_mut(w.rows));
    }

    /// `out[r][n] = w[n] · x[r]`, wherever the rows of the result lie. The one place where weights meet
    /// activations: only the weights' type and the precision decide how.
    pub(crate) fn matmul_into<'o>(&self, w: Matrix<'_>, x: &Input<'_>, out: impl Iterator<Item = &'o mut [f32]>) {
        let batch = x.rows;
        let quantized = self.blocking(w.ty).map(|blocking| x.quantized(self, blocking));
        let rows_each = rows_each(w.rows, batch, self.threads());
        let dots = |part: usize, out: &mut [f32], scratch: &mut Vec<f32>| {
            let w = w.part(part * rows_each, out.len() / batch);
            match quantized {
                Some(x) => integer::matmul_at(self.level, w.ty, w.bytes, x, out),
                None => exact::matmul_at(self.level, w.ty, w.bytes, w.cols, &x.values, out, scratch),
            }
        };
        let work = w.rows * w.cols * batch;
        if batch == 1 {
            let rows: Vec<&mut [f32]> = out.collect();
            assert!(
                matches!(&rows[..], [row] if row.len() == w.rows),
                "one row of results, as long as there are weights"
            );
            let parts: Vec<&mut [f32]> = rows.into_iter().flat_map(|row| row.chunks_mut(rows_each)).collect();
            return self.each(parts.into_iter().enumerate(), work, |(part, row)| {
                SCRATCH.with_borrow_mut(|scratch| dots(part, row, &mut scratch.weights));
            });
        }
        self.each(columns(out, rows_each).into_iter().enumerate(), work, |(part, mut rows)| {
            assert_eq!(rows.len(), batch, "as many rows of results as of activations");
            SCRATCH.with_borrow_mut(|scratch| {
                let count = rows[0].len() * batch;
                scratch.columns.reserve_exact(count.saturating_sub(scratch.columns.len()));
                scratch.columns.resize(count, 0.0);
                dots(part, &mut scratch.columns, &mut scratch.weights);
                for (r, row) in rows.iter_mut().enumerate() {
                    row.iter_mut().zip(scratch.columns[r..].iter().step_by(batch)).for_each(|(out, dot)| *out = *dot);
                }
            });
        });
    }
}

/// Weight rows in a part of a product: whole tiles, and no more than [`PART_VALUES`] results unless a tile has more.
pub(crate) fn rows_each(rows: usize, batch: usize, threads: usize) -> usize {
    // One row of activations meets four of weights at a time.
    let tile = if batch == 1 { 4 } else { exact::TILE_ROWS };
    let fair = rows.div_ceil(threads * PARTS_A_THREAD).next_multiple_of(tile);
    let fitting = PART_VALUES / batch.max(1) / tile * tile;
    fair.min(fitting.max(tile))
}

/// Each `width` columns of `rows`, apart from each other: a list of pieces of rows for each. A row that ends earlier
/// has no piece in the columns behind it.
pub(crate) fn columns<'o>(rows: impl Iterator<Item = &'o mut [f32]>, width: usize) -> Vec<Vec<&'o mut [f32]>> {
    let mut columns: Vec<Vec<&mut [f32]>> = Vec::new();
    for row in rows {
        columns.resize_with(columns.len().max(row.len().div_ceil(width)), Vec::new);
        columns.iter_mut().zip(row.chunks_mut(width)).for_each(|(column, piece)| column.push(piece));
    }
    columns
}

/// Rows of activations that weights are multiplied with, as f32 and in whole numbers as these are asked for.
pub(crate) struct Input<'a> {
    rows: usize,
    cols: usize,
    values: Cow<'a, [f32]>,
    short: OnceLock<Activations>,
    long: OnceLock<Activations>,
}

impl<'a> Input<'a> {
    /// Rows of `cols` values.
    pub(crate) fn new(values: &'a [f32], cols: usize) -> Input<'a> {
        let rows = values.len() / cols;
        Input { rows, cols, values: Cow::Borrowed(values), short: OnceLock::new(), long: OnceLock::new() }
    }

    fn cell(&self, blocking: Blocking) -> &OnceLock<Activations> {
        match blocking {
            Blocking::Short => &self.short,
            Blocking::Long => &self.long,
        }
    }

    fn quantized(&self, workers: &Workers, blocking: Blocking) -> &Activations {
        self.cell(blocking).get_or_init(|| {
            let mut activations = Activations::zeroed(blocking, self.rows, self.cols);
            let pieces = activations.pieces(workers.threads() * PARTS_A_THREAD).into_iter();
            // Some ten operations a value.
            let work = 10 * self.values.len();
            workers.each(pieces, work, |mut piece| piece.quantize_at(workers.level, &self.values));
            activations
        })
    }

    /// Some of the rows, as weights of these types take them.
    pub(crate) fn select(&self, workers: &Workers, rows: &[usize], types: &[TensorType]) -> Input<'static> {
        let mut selected = Input {
            rows: rows.len(),
            cols: self.cols,
            values: Cow::default(),
            short: OnceLock::new(),
            long: OnceLock::new(),
        };
        for &ty in types {
            match workers.blocking(ty) {
                None if selected.values.is_empty() => {
                    let mut values = Vec::with_capacity(rows.len() * self.cols);
                    rows.iter().for_each(|row| values.extend_from_slice(&self.values[row * self.cols..][..self.cols]));
                    selected.values = values.into();
                }
                None => {}
                Some(blocking) => {
                    selected.cell(blocking).get_or_init(|| self.quantized(workers, blocking).select(rows));
                }
            }
        }
        selected
    }
}
