//! What the measuring programs share.

pub mod heldout;

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use cpu::{CpuBackend, Options};
use gguf::Gguf;
use model::Model;
use store::Source;

/// A model file opened, understood and loaded.
pub struct Loaded {
    /// The file's header.
    pub file: Gguf,
    /// What it means.
    pub model: Model,
    /// The model in memory.
    pub backend: CpuBackend,
    /// How long reading took.
    pub load_seconds: f64,
}

/// Loads the model at `path`.
///
/// # Errors
/// Whatever opening, understanding or reading the file reports.
pub fn load(path: &Path, options: Options) -> Result<Loaded> {
    let start = Instant::now();
    let file = Gguf::open(path)?;
    let model = Model::from_gguf(&file)?;
    let source = Source::open(file.files.iter().map(|part| (&part.path, part.bytes)))?;
    let backend = CpuBackend::load(&model, &source, options, &mut |_| {})?;
    Ok(Loaded { file, model, backend, load_seconds: start.elapsed().as_secs_f64() })
}

/// Processor and number of threads the system offers, for the head of a table.
pub fn machine() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, name)| name);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{}, {threads} threads", name.unwrap_or(std::env::consts::ARCH))
}
