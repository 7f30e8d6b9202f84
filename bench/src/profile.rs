//! How the time of a pass is shared by its stages.

use std::fmt;
use std::time::Instant;

use model::{Backend, Error, Observer, Stage};

/// Seconds of every stage, summed over layers and passes.
pub struct Profile {
    last: Instant,
    /// In the order in which the stages were first seen.
    stages: Vec<(Stage, f64)>,
}

impl Default for Profile {
    fn default() -> Profile {
        Profile { last: Instant::now(), stages: Vec::new() }
    }
}

impl Profile {
    /// A pass begins now.
    pub fn begin_pass(&mut self) {
        self.last = Instant::now();
    }
}

impl<B: Backend> Observer<B> for Profile {
    fn after(&mut self, _: Option<usize>, stage: Stage, _: &B, _: &B::Pass) -> Result<(), Error> {
        let lap = self.last.elapsed();
        self.last += lap;
        match self.stages.iter_mut().find(|(seen, _)| *seen == stage) {
            Some((_, seconds)) => *seconds += lap.as_secs_f64(),
            None => self.stages.push((stage, lap.as_secs_f64())),
        }
        Ok(())
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: f64 = self.stages.iter().map(|(_, seconds)| seconds).sum();
        for (stage, seconds) in &self.stages {
            let name = format!("{stage:?}");
            writeln!(f, "  {name:<26} {:>10.1} ms {:>6.1} %", seconds * 1e3, seconds / all * 100.0)?;
        }
        Ok(())
    }
}
