//! How fast weights come onto a GPU, and what holds them up: the experts of a file read, put in order, and sent, each part by itself
//! and all together, in different portions.
//!
//! `cargo run --release -p infall-bench --bin loading -- FILE --gpu N`
//!
//! Rates are GB/s of the file. "Read" ends in a core's cache, "packed" as well, in the kernels' order; "raw" begins there and ends on
//! the device; "loaded" is all of the way, and the last column that over raw. "Together" is with all threads at one
//! piece of mapped memory, two such pieces at a time. The whole of loading a model, kernels and all, is what program `gpu` tells first.

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use gguf::Gguf;
use gpu::{Choice, LoadingBench, Portions, Way};
use model::Model;
use store::Source;

/// What to measure.
#[derive(Parser)]
struct What {
    /// Model file.
    file: PathBuf,
    /// Number of the adapter (`infall devices` lists them).
    #[arg(long, default_value_t = 0)]
    gpu: usize,
    /// GiB of experts each time.
    #[arg(long, default_value_t = 12.0)]
    gib: f64,
    /// Each so often; the best counts.
    #[arg(long, default_value_t = 2)]
    rounds: usize,
    /// Threads to try.
    #[arg(long, value_delimiter = ',', default_value = "4,8,12,16", value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    threads: Vec<usize>,
    /// MiB that a thread sends at once, to try.
    #[arg(long, value_delimiter = ',', default_value = "1,2,8", value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=8))]
    piece_mib: Vec<usize>,
    /// KiB that a thread reads at once, to try.
    #[arg(long, value_delimiter = ',', default_value = "64,256,512", value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    share_kib: Vec<usize>,
}

fn main() -> Result<()> {
    let what = What::parse();
    let file = Gguf::open(&what.file)?;
    let model = Model::from_gguf(&file)?;
    let source = Source::open(file.files.iter().map(|part| (&part.path, part.bytes)))?;
    let bench = LoadingBench::open(Choice::Index(what.gpu), &model)?;
    let report = bench.device().report();
    println!("{}; {} ({})", bench::machine(), report.name, report.driver);

    println!("\nput in order by one thread in its caches, GB/s");
    for (format, rate) in gpu::pack_bytes_per_second() {
        println!("  {format:<8}{:>6.1}", rate / 1e9);
    }

    let bytes = (what.gib * 1_073_741_824.0) as u64;
    println!(
        "\nmapped memory, written once, copied by the device: {:.1} GB/s",
        bench.copied_bytes_per_second(bytes)? / 1e9
    );
    let rate = |way: Way, portions: Portions| -> Result<f64> {
        let rates = (0..what.rounds).map(|_| bench.bytes_per_second(way, (&model, &source), portions, bytes));
        Ok(rates.collect::<Result<Vec<f64>, _>>()?.into_iter().fold(0.0, f64::max) / 1e9)
    };
    let usual = Portions::default();
    println!("together: {:.1} GB/s\n", rate(Way::Together, usual)?);
    println!(
        "| threads | piece MiB | share KiB | read | packed | raw | loaded | of raw |\n|---|---|---|---|---|---|---|---|"
    );
    let threads = what.threads.iter().map(|&threads| Portions { threads, ..usual });
    let pieces = what.piece_mib.iter().map(|&mib| Portions { piece_bytes: mib << 20, ..usual });
    let shares = what.share_kib.iter().map(|&kib| Portions { share_bytes: kib << 10, ..usual });
    for portions in [usual].into_iter().chain(threads).chain(pieces).chain(shares) {
        let [read, packed, raw, loaded] = [Way::Read, Way::Pack, Way::Upload, Way::Load].map(|way| rate(way, portions));
        let (raw, loaded) = (raw?, loaded?);
        println!(
            "| {} | {} | {} | {:.1} | {:.1} | {raw:.1} | {loaded:.1} | {:.2} |",
            portions.threads,
            portions.piece_bytes >> 20,
            portions.share_bytes >> 10,
            read?,
            packed?,
            loaded / raw
        );
    }
    Ok(())
}
