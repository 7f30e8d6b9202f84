//! Every stage of the processor's backend against the float64 reference.

mod common;
#[path = "common/stages.rs"]
mod stages;

use common::{fast, load, plain};
use cpu::Options;
use model::{Arithmetic, Stage};
use stages::stages;

/// Largest relative L2 error of a stage of Exact, and of the stages of Fast that multiply no quantised weight.
const BOUND: f64 = 3e-6;
/// The same of the other stages of Fast.
const FAST_BOUND: f64 = 3e-2;

#[test]
fn every_stage_of_the_cpu_meets_the_reference() {
    stages(&load("tiny-iq2", plain())).hold(|_| 0.0..=BOUND);
}

/// The distance of Fast, stage by stage: none where no quantised weight takes part, and where one does it shows.
#[test]
fn every_stage_of_fast_is_near_the_reference() {
    let options = Options { arithmetic: Arithmetic::Plain, ..fast() };
    stages(&load("tiny-iq2", options)).hold(|stage| match stage {
        Stage::Embed | Stage::HcPre(_) | Stage::HcPost(_) | Stage::Route => 0.0..=BOUND,
        _ => 1e-4..=FAST_BOUND,
    });
}
