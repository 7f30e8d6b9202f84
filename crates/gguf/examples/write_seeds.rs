//! Writes the small files that the tests mutate into a directory: the fuzzer's seed corpus.
//!
//!     cargo run -p infall-gguf --example write_seeds -- fuzz/seeds/gguf

#[path = "../tests/common/mod.rs"]
mod common;

fn main() -> std::io::Result<()> {
    let dir = std::env::args().nth(1).expect("usage: write_seeds DIRECTORY");
    std::fs::create_dir_all(&dir)?;
    common::seeds().iter().try_for_each(|(name, bytes)| std::fs::write(format!("{dir}/{name}.gguf"), bytes))
}
