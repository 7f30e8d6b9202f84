//! Choices of experts as a file of routes says, in place of the learned routers': a model of random weights routes evenly,
//! which no real one does, and so tells little about a cache.
//!
//! What lookahead guesses is made up, too: each expert of the right answer is guessed as often as was measured, and any other one
//! of the layer takes the place of one that is not. Hash-routed layers keep their table, which is known before a pass and prefetched.

use std::io::Read;

use anyhow::{Result, ensure};
use cpu::SimulatedRoutes;
use model::Config;
use store::TraceReader;

use crate::random::Random;

/// The share of what is chosen that is guessed (docs/performance.md, "Lookahead").
const RIGHT_GUESSES: f64 = 0.85;

/// Routes of single rows.
pub struct SimulatedRouter {
    layers: usize,
    used: usize,
    /// `[positions, layers, used]`.
    chosen: Vec<u16>,
    guessed: Vec<u16>,
}

impl SimulatedRouter {
    /// Reads recorded routes (docs/formats.md) of passes of one row. Position after position is routed by them, and from
    /// the start again after the last.
    ///
    /// # Errors
    /// They are damaged, of another model, or of passes of several rows.
    pub fn read(routes: impl Read, config: &Config) -> Result<SimulatedRouter> {
        let reader = TraceReader::new(routes)?;
        let header = reader.header();
        let found = (header.layers(), header.experts, header.experts_used);
        let expected = (config.layers, config.experts, config.experts_used);
        ensure!(
            found == expected,
            "the routes are of (layers, experts, experts used) {found:?}, the model has {expected:?}"
        );
        let mut chosen = Vec::new();
        for pass in reader {
            let pass = pass?;
            ensure!(
                pass.rows() == 1,
                "the routes have a pass of {} rows; only single tokens can be simulated",
                pass.rows()
            );
            chosen.extend(pass.experts);
        }
        ensure!(!chosen.is_empty(), "the routes have no pass");
        let mut random = Random(0);
        let rows = chosen.chunks_exact(config.experts_used);
        let guessed = rows.flat_map(|row| guess(row, config.experts, &mut random)).collect();
        Ok(SimulatedRouter { layers: config.layers, used: config.experts_used, chosen, guessed })
    }

    fn row<'a>(&self, routes: &'a [u16], layer: usize, position: usize) -> impl Iterator<Item = u32> + 'a {
        let row = (position * self.layers + layer) * self.used % routes.len();
        routes[row..][..self.used].iter().map(|&expert| u32::from(expert))
    }
}

/// As many guesses as a row has experts, distinct.
fn guess(row: &[u16], experts: usize, random: &mut Random) -> Vec<u16> {
    let mut guesses: Vec<u16> = row.iter().copied().filter(|_| random.unit() < RIGHT_GUESSES).collect();
    while guesses.len() < row.len() {
        let any = random.below(experts) as u16;
        if !guesses.contains(&any) {
            guesses.push(any);
        }
    }
    guesses
}

impl SimulatedRoutes for SimulatedRouter {
    fn choose(&self, layer: usize, position: usize, experts: &mut [u32]) {
        experts.iter_mut().zip(self.row(&self.chosen, layer, position)).for_each(|(to, expert)| *to = expert);
    }

    fn guess(&self, layer: usize, position: usize, experts: &mut [u32]) {
        experts.iter_mut().zip(self.row(&self.guessed, layer, position)).for_each(|(to, expert)| *to = expert);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guesses_are_distinct_and_right_as_often_as_measured() {
        let mut random = Random(1);
        let row: Vec<u16> = (100..106).collect();
        let (mut right, rows) = (0, 10_000);
        for _ in 0..rows {
            let mut guesses = guess(&row, 256, &mut random);
            assert_eq!(guesses.len(), row.len());
            right += guesses.iter().filter(|guess| row.contains(guess)).count();
            guesses.sort_unstable();
            guesses.dedup();
            assert_eq!(guesses.len(), row.len(), "an expert was guessed twice");
        }
        let share = right as f64 / (rows * row.len()) as f64;
        assert!((share - RIGHT_GUESSES).abs() < 0.01, "{share}");
    }
}
