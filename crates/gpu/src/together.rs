//! Several sessions in one dispatch: in passes of few rows the kernels that know sessions compute all runs at once.
//!
//! A kernel is bound to the sessions side by side, and a table that is written once a pass says of each row, for each layer,
//! whose it is and where that session goes on (`kernels/runs.wgsl`). What a row is made of stays its own, in the same order:
//! no bit depends on the others. A run alone is told of by parameters instead, and its kernels know one session only.

use std::ops::Range;
use std::sync::MutexGuard;

use model::Run;

use crate::kernel::{Buffer, Span};
use crate::pass::{FEW_ROWS, GpuPass};
use crate::stages::params;
use crate::state::{GpuState, Memory};

/// Most sessions that a kernel is bound to: as many as a pass of few rows can have.
pub(crate) const MOST_TOGETHER: usize = FEW_ROWS;

/// Most buffers that such a kernel has beside the sessions.
const OTHER_BUFFERS: usize = 5;

/// Sessions that kernels are bound to at most where one may have `buffers` buffers, and up to `wanted` are: 1, 2, 4 or 8.
pub(crate) fn most_together(buffers: u32, wanted: usize) -> usize {
    let room = (buffers as usize).saturating_sub(OTHER_BUFFERS).min(wanted).clamp(1, MOST_TOGETHER);
    1 << room.ilog2()
}

/// Sessions that the kernels of so many runs are made for.
pub(crate) fn bound_sessions(runs: usize) -> usize {
    runs.next_power_of_two()
}

/// A run in a layer: `Run` of `kernels/runs.wgsl`, without which of the sessions it is.
pub(crate) type RunPlace = [u32; 5];

/// Words of a row of a layer in the tables.
pub(crate) const TABLE_WORDS: usize = 6;

/// Words that the tables have for the runs of passes of up to `rows` rows.
pub(crate) fn table_words(rows: usize, layers: usize) -> usize {
    if rows <= FEW_ROWS { rows * layers * TABLE_WORDS } else { 0 }
}

/// What kernels are told of a run; `windows` is where its rotations of windows begin, of every 4 and of every 128 tokens.
fn place(layer: usize, run: &Run, state: &GpuState, windows: [usize; 2]) -> RunPlace {
    let places = &state.places[layer];
    let ring = state.rings(layer, run.rows.len())[0];
    let index = places.index(state.memory().room_tokens);
    params![run.rows.start, run.start, ring, index, windows[usize::from(places.ratio != 4)]]
}

/// The table of a pass: of each layer and row its run and which of the `together` sessions that are bound it belongs to.
pub(crate) fn table(runs: &[Run], states: &[&GpuState], windows: &[[usize; 2]], together: usize) -> Vec<u32> {
    let mut words = Vec::new();
    let layers = states[runs[0].session].places.len();
    for layer in 0..layers {
        for (i, run) in runs.iter().enumerate() {
            let place = place(layer, run, states[run.session], windows[i]);
            run.rows.clone().for_each(|_| {
                words.extend(place);
                words.push((i % together) as u32);
            });
        }
    }
    words
}

/// Runs that a dispatch computes, in a layer, and their sessions.
pub(crate) struct Together<'p> {
    pub(crate) runs: &'p [Run],
    /// All their rows.
    pub(crate) rows: Range<usize>,
    /// The parameters that kernels begin with.
    pub(crate) place: RunPlace,
    layer: usize,
    memories: Vec<MutexGuard<'p, Memory>>,
}

impl<'p> Together<'p> {
    /// The runs of a pass, as many at once as can be.
    pub(crate) fn all(layer: usize, states: &'p [&GpuState], pass: &'p GpuPass) -> impl Iterator<Item = Together<'p>> {
        pass.batch.runs().chunks(pass.together).enumerate().map(move |(i, runs)| {
            let place = match runs {
                [run] => place(layer, run, states[run.session], pass.windows[i * pass.together]),
                // The rows of this layer in the tables, in pairs.
                _ => params![pass.runs + layer * pass.rows() * TABLE_WORDS / 2, 0_u32, 0_u32, 0_u32, 0_u32],
            };
            let memories = runs.iter().map(|run| states[run.session].memory()).collect();
            Together { runs, rows: runs[0].rows.start..runs[runs.len() - 1].rows.end, place, layer, memories }
        })
    }

    /// The most of something that runs need.
    pub(crate) fn most(&self, of_run: impl Fn(&Run) -> usize) -> usize {
        self.runs.iter().map(of_run).max().unwrap_or(0)
    }

    /// The session of a run alone.
    pub(crate) fn session(&self) -> Span<'_> {
        self.memories[0].layers[self.layer].all()
    }

    /// Buffers of a kernel: `others`, and the sessions, filled up with `spares` to what kernels are made for.
    pub(crate) fn buffers<'b>(&'b self, others: &[Span<'b>], spares: &'b [Buffer]) -> Vec<Span<'b>> {
        let sessions = self.memories.iter().map(|memory| memory.layers[self.layer].all());
        let filled = sessions.chain(spares.iter().map(Buffer::all)).take(bound_sessions(self.runs.len()));
        others.iter().copied().chain(filled).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_with_few_buffers_bind_fewer_sessions() {
        let pairs = [(4, 1), (5, 1), (6, 1), (7, 2), (8, 2), (9, 4), (12, 4), (13, 8), (16, 8), (1 << 20, 8)];
        for (buffers, sessions) in pairs {
            assert_eq!(most_together(buffers, 8), sessions, "{buffers} buffers");
        }
        assert_eq!([0, 1, 2, 3, 100].map(|wanted| most_together(64, wanted)), [1, 1, 2, 2, 8]);
        assert_eq!([1, 2, 3, 5, 8].map(bound_sessions), [1, 2, 4, 8, 8]);
    }
}
