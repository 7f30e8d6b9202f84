//! Work split over threads. What is computed never depends on the split.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

use model::{Error, Precision};
use quant::simd::Level;
use quant::{exact, integer};
use rayon::prelude::*;

use crate::weights::Matrix;

/// Below this many multiplications a thread costs more than it saves.
const WORTH_SHARING: usize = 200_000;

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// The threads of a backend, the instruction set they use, and how they multiply.
pub(crate) struct Workers {
    pool: rayon::ThreadPool,
    pub(crate) level: Level,
    precision: Precision,
    /// How often work was shared, so that tests can tell that it was.
    shared: AtomicU64,
}

impl Workers {
    pub(crate) fn new(threads: usize, level: Level, precision: Precision) -> Result<Workers, Error> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("infall-cpu-{i}"))
            .build()
            .map_err(|cause| Error::Threads { threads, cause: cause.to_string() })?;
        Ok(Workers { pool, level, precision, shared: AtomicU64::new(0) })
    }

    pub(crate) fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// How often work was shared between threads so far.
    pub(crate) fn shared(&self) -> u64 {
        self.shared.load(Ordering::Relaxed)
    }

    /// Runs `f` where it can share its work.
    fn share(&self, f: impl FnOnce() + Send) {
        self.shared.fetch_add(1, Ordering::Relaxed);
        self.pool.install(f);
    }

    /// Calls `f(row, chunk)` for every `width`-sized chunk of `out`; `work` is the cost of one, in multiplications.
    pub(crate) fn rows<T: Send>(
        &self,
        out: &mut [T],
        width: usize,
        work: usize,
        f: impl Fn(usize, &mut [T]) + Sync + Send,
    ) {
        let rows = out.len() / width.max(1);
        if self.threads() == 1 || rows < 2 || rows * work < WORTH_SHARING {
            out.chunks_exact_mut(width).enumerate().for_each(|(row, chunk)| f(row, chunk));
        } else {
            self.share(|| out.par_chunks_exact_mut(width).enumerate().for_each(|(row, chunk)| f(row, chunk)));
        }
    }

    /// Calls `f((i, chunk))` for every chunk of `out`, the last one possibly shorter; `work` is the cost of one.
    pub(crate) fn chunks(
        &self,
        out: &mut [f32],
        len: usize,
        work: usize,
        f: impl Fn((usize, &mut [f32])) + Sync + Send,
    ) {
        if self.threads() == 1 || out.len() / len * work < WORTH_SHARING {
            out.chunks_mut(len).enumerate().for_each(f);
        } else {
            self.share(|| out.par_chunks_mut(len).enumerate().for_each(f));
        }
    }

    /// `y[r, n] = w[n] · x[r]` for all rows of `x`; `y` becomes `[R, N]`. The one place where weights meet
    /// activations: only the weights' type and the precision decide how.
    pub(crate) fn matmul(&self, w: Matrix<'_>, x: &[f32], y: &mut Vec<f32>) {
        let batch = x.len() / w.cols;
        y.resize(batch * w.rows, 0.0);
        if batch == 1 {
            return self.matmul_columns(w, x, y);
        }
        let mut columns = vec![0.0; batch * w.rows];
        self.matmul_columns(w, x, &mut columns);
        self.rows(y, w.rows, w.rows, |r, row| {
            row.iter_mut().enumerate().for_each(|(n, value)| *value = columns[n * batch + r]);
        });
    }

    /// The same laid out `[N, R]`, as the kernel writes it.
    fn matmul_columns(&self, w: Matrix<'_>, x: &[f32], columns: &mut [f32]) {
        let batch = x.len() / w.cols;
        let row_bytes = w.bytes.len() / w.rows;
        let in_integers = self.precision == Precision::Fast && integer::is_supported(w.ty);
        let quantized = in_integers.then(|| integer::quantize_activations_at(self.level, w.ty, x, w.cols));
        let share = |first: usize, out: &mut [f32]| {
            let bytes = &w.bytes[first * row_bytes..][..out.len() / batch * row_bytes];
            match &quantized {
                Some(x) => integer::matmul_at(self.level, w.ty, bytes, x, out),
                None => SCRATCH
                    .with_borrow_mut(|scratch| exact::matmul_at(self.level, w.ty, bytes, w.cols, x, out, scratch)),
            }
        };
        if self.threads() == 1 || w.rows * w.cols * batch < WORTH_SHARING {
            return share(0, columns);
        }
        let rows_per_share = w.rows.div_ceil(self.threads() * 4).next_multiple_of(exact::TILE_ROWS);
        self.share(|| {
            let shares = columns.par_chunks_mut(rows_per_share * batch).enumerate();
            shares.for_each(|(i, out)| share(i * rows_per_share, out));
        });
    }
}
