//! What the tests of the GPU backend share: the adapter they run on, and short ways to run the backend on it.
#![allow(dead_code)]

#[path = "../../../cpu/tests/common/mod.rs"]
mod of_all_backends;

use gpu::{Checks, Choice, GpuBackend, Options};
use model::{Arithmetic, Precision};

pub use of_all_backends::*;

pub const PRECISIONS: [Precision; 2] = [Precision::Exact, Precision::Fast];

/// The adapter that tests run on: the software one, whose results are the same everywhere, or else the first that can run the
/// kernels. Without any the tests fail, since they would show nothing.
pub fn software() -> Choice {
    let usable = gpu::adapters().into_iter().filter(|adapter| adapter.lacks.is_empty());
    let adapter = usable.min_by_key(|adapter| adapter.kind != "software");
    let adapter = adapter.expect("no adapter can run the kernels: install Debian's mesa-vulkan-drivers and libvulkan1");
    Choice::Index(adapter.index)
}

/// A model loaded onto the adapter.
pub fn on_gpu(name: &str, options: Options) -> GpuBackend {
    checked_on_gpu(name, Checks::On, options)
}

pub fn checked_on_gpu(name: &str, checks: Checks, options: Options) -> GpuBackend {
    let (model, source) = open(name);
    GpuBackend::load(&model, &source, (software(), checks), options, &mut |_| ()).unwrap()
}

/// Everything resident, with the model's own roundings.
pub fn in_precision(precision: Precision) -> Options {
    Options { precision, ..Options::default() }
}

/// The same without those roundings.
pub fn in_plain(precision: Precision) -> Options {
    Options { arithmetic: Arithmetic::Plain, ..in_precision(precision) }
}

/// The processor's backend in Exact, which is what others are held against.
pub fn on_cpu(name: &str, arithmetic: Arithmetic) -> cpu::CpuBackend {
    load(name, cpu::Options { arithmetic, ..exact() })
}
