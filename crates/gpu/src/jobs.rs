//! Products that one dispatch makes: a list of matrices of one slab, each with its place in the inputs and results.

use crate::format::Format;

/// Groups of 32 lanes in a workgroup of the kernel `matvec`.
const MATVEC_LANES: usize = 8;

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
    /// Where its inputs begin in a row of `x`, in values (a multiple of 32: a chunk of the kernels).
    pub(crate) x_at: usize,
    /// Where its results begin in a row of `y`, in values.
    pub(crate) y_at: usize,
}

/// The jobs of one dispatch. A slab has two tables of them, with two vectors each: of the jobs,
/// `[base, stride, chunks of 32, format]`, `[0, outputs, x_at / 4, y_at]`; and of the workgroups of `matvec`, which so find
/// theirs at once, `[base of the first row, stride, chunks of 32, format]`, `[outputs from there on, x_at / 4, y_at, 0]`.
#[derive(Clone, Debug)]
pub(crate) struct Jobs {
    pub(crate) jobs: Vec<Job>,
    /// Where the table of jobs begins in the slab, in vectors.
    pub(crate) table: u32,
    /// Where the table of workgroups begins.
    pub(crate) group_table: u32,
}

impl Jobs {
    /// Words of the table of jobs.
    pub(crate) fn words(jobs: &[Job]) -> Vec<u32> {
        let words = |Job { matrix, x_at, y_at }: &Job| {
            debug_assert!(x_at.is_multiple_of(32), "inputs from {x_at} on begin within a chunk");
            let chunks = (matrix.cols / 32) as u32;
            let place = [0, matrix.rows as u32, (x_at / 4) as u32, *y_at as u32];
            [[matrix.base, matrix.stride, chunks, matrix.format as u32], place].concat()
        };
        jobs.iter().flat_map(words).collect()
    }

    /// Words of the table of workgroups.
    pub(crate) fn group_words(jobs: &[Job]) -> Vec<u32> {
        let each = MATVEC_LANES * Jobs::lane_outputs(jobs);
        let group = |job: &Job, first: usize| {
            let part = job.matrix.part(first, job.matrix.rows - first);
            let place = [part.rows as u32, (job.x_at / 4) as u32, (job.y_at + first) as u32, 0];
            [[part.base, part.stride, (part.cols / 32) as u32, part.format as u32], place].concat()
        };
        jobs.iter().flat_map(|job| (0..job.matrix.rows).step_by(each).flat_map(|first| group(job, first))).collect()
    }

    /// Outputs of each 32 lanes of `matvec`: fewer where there are few, so that there is work for the whole device.
    fn lane_outputs(jobs: &[Job]) -> usize {
        let outputs: usize = jobs.iter().map(|job| job.matrix.rows).sum();
        if outputs <= 6144 { 2 } else { 4 }
    }

    /// Outputs of each 32 lanes of `matvec`, and its workgroups.
    pub(crate) fn matvec(&self) -> (usize, u32) {
        let outputs = Jobs::lane_outputs(&self.jobs);
        (outputs, self.groups(MATVEC_LANES * outputs))
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
