//! How fast weights come from a disk: `disk FILE [PIECE_BYTES]` reads pieces of a file, in an order that has nothing to do
//! with their place, by every reader and with 1 to 16 of them under way, two seconds each.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use bench::disk::bytes_per_second;
use store::reader::Pool;
use store::{Extent, Reader, Source};

/// Bytes of the largest part of an expert of Flash in two bits.
const PIECE_BYTES: u64 = 2_752_512;
const TIME: Duration = Duration::from_secs(2);

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let path: PathBuf = args.next().context("usage: disk FILE [PIECE_BYTES]")?.into();
    let piece_bytes: u64 = args.next().map_or(Ok(PIECE_BYTES), |bytes| bytes.parse())?;
    let file_bytes = path.metadata()?.len();
    let source = Source::open([(&path, file_bytes)])?;
    let direct = source.direct().map_err(anyhow::Error::msg)?;
    let piece = |i: u64| Extent { file: 0, offset: i * piece_bytes, bytes: piece_bytes };
    let pieces: Vec<Extent> = (0..file_bytes / piece_bytes).map(piece).collect();
    println!("pieces of {piece_bytes} bytes, GB/s by reads under way\n");
    println!("| reads | pread, buffered | pread, direct | io_uring, direct |\n|---|---|---|---|");
    for under_way in [1, 2, 4, 8, 16] {
        let readers: [Arc<dyn Reader>; 3] = [
            Arc::new(Pool::buffered(source.clone(), under_way)?),
            Arc::new(Pool::direct(direct.clone(), under_way)?),
            uring(direct.clone(), under_way)?,
        ];
        let rates = readers.map(|reader| bytes_per_second(reader, pieces.clone(), under_way, TIME));
        let [a, b, c] = rates.map(|rate| rate.map(|rate| rate / 1e9));
        println!("| {under_way} | {:.2} | {:.2} | {:.2} |", a?, b?, c?);
    }
    Ok(())
}

#[cfg(target_os = "linux")]
fn uring(source: Source, under_way: usize) -> Result<Arc<dyn Reader>> {
    Ok(Arc::new(store::reader::Uring::new(source, under_way)?))
}

/// Elsewhere the column is that of threads again.
#[cfg(not(target_os = "linux"))]
fn uring(source: Source, under_way: usize) -> Result<Arc<dyn Reader>> {
    Ok(Arc::new(Pool::direct(source, under_way)?))
}
