//! Products that one dispatch makes: a list of matrices of one slab, each with its place in the inputs and results.

use crate::format::Format;

/// Outputs of a workgroup of the kernel `matvec`.
pub(crate) const MATVEC_OUTPUTS: usize = 16;

/// A matrix on the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    pub(crate) format: Format,
    /// Where it begins in its slab, in 16-byte vectors.
    pub(crate) base: u32,
    /// Vectors of a row.
    pub(crate) stride: u32,
    /// Outputs.
    pub(crate) rows: usize,
    /// Inputs, a multiple of 32.
    pub(crate) cols: usize,
}

impl Matrix {
    /// `count` rows from `first` on.
    pub(crate) fn part(self, first: usize, count: usize) -> Matrix {
        Matrix { base: self.base + first as u32 * self.stride, rows: count, ..self }
    }
}

/// One product: `y[r][y_at..] = matrix · x[r][x_at..]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    pub(crate) matrix: Matrix,
    /// Where its inputs begin in a row of `x`, in values (a multiple of 4).
    pub(crate) x_at: usize,
    /// Where its results begin in a row of `y`, in values.
    pub(crate) y_at: usize,
}

/// The jobs of one dispatch. A slab has their table, two vectors for each:
/// `[base, stride, chunks of 32, format]`, `[first workgroup of matvec, outputs, x_at / 4, y_at]`.
#[derive(Clone, Debug)]
pub(crate) struct Jobs {
    pub(crate) jobs: Vec<Job>,
    /// Where the table begins in the slab, in vectors.
    pub(crate) table: u32,
}

impl Jobs {
    /// The table's words.
    pub(crate) fn words(jobs: &[Job]) -> Vec<u32> {
        let mut groups = 0;
        let mut words = Vec::new();
        for Job { matrix, x_at, y_at } in jobs {
            let chunks = (matrix.cols / 32) as u32;
            words.extend([matrix.base, matrix.stride, chunks, matrix.format as u32]);
            words.extend([groups, matrix.rows as u32, (x_at / 4) as u32, *y_at as u32]);
            groups += matrix.rows.div_ceil(MATVEC_OUTPUTS) as u32;
        }
        words
    }

    /// Workgroups of `outputs_each` outputs.
    pub(crate) fn groups(&self, outputs_each: usize) -> u32 {
        self.jobs.iter().map(|job| job.matrix.rows.div_ceil(outputs_each) as u32).sum()
    }

    /// Types of the matrices, each once, in the order of [`Format::ALL`].
    pub(crate) fn formats(&self) -> Vec<Format> {
        let is_used = |format: &Format| self.jobs.iter().any(|job| job.matrix.format == *format);
        Format::ALL.into_iter().filter(is_used).collect()
    }
}
