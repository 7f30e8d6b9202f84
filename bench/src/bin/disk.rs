//! How fast weights come from a disk: `disk FILE` reads pieces of a file, in an order that has nothing to do with their
//! place: first by every reader with 1 to 16 reads under way, then into memory of huge and of small pages, touched before
//! or fresh from the system, as parts of an expert or as a whole one.
//!
//! In a virtual machine fresh memory may also be new to the host, which then takes longer the first time; a second run
//! soon after shows that.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use bench::disk::{Memory, bytes_per_second};
use store::reader::Pool;
use store::{Extent, Reader, Source};

/// Bytes of the largest part of an expert of Flash in two bits, and of its three parts.
const PART_BYTES: u64 = 2_752_512;
const EXPERT_BYTES: u64 = 7_077_888;
const TIME: Duration = Duration::from_secs(1);

fn main() -> Result<()> {
    let path: PathBuf = std::env::args().nth(1).context("usage: disk FILE")?.into();
    let file_bytes = path.metadata()?.len();
    let source = Source::open([(&path, file_bytes)])?;
    let direct = source.direct().map_err(anyhow::Error::msg)?;
    let pieces = |bytes: u64| -> Vec<Extent> {
        (0..file_bytes / bytes).map(|i| Extent { file: 0, offset: i * bytes, bytes }).collect()
    };
    let rate = |reader: Arc<dyn Reader>, piece_bytes: u64, under_way: usize, memory: Memory| {
        let rate = bytes_per_second(reader, pieces(piece_bytes), under_way, memory, TIME)?;
        Ok::<_, anyhow::Error>(format!(" {:.2} |", rate / 1e9))
    };

    println!("GB/s into touched memory of huge pages, pieces of {PART_BYTES} bytes\n");
    println!("| reads under way | pread, buffered | pread, direct | io_uring, direct |\n|---|---|---|---|");
    for under_way in [1, 2, 4, 8, 16] {
        let readers: [Arc<dyn Reader>; 3] = [
            Arc::new(Pool::buffered(source.clone(), under_way)?),
            Arc::new(Pool::direct(direct.clone(), under_way)?),
            uring(direct.clone(), under_way)?,
        ];
        let rates = readers.into_iter().map(|reader| rate(reader, PART_BYTES, under_way, Memory::Touched));
        println!("| {under_way} |{}", rates.collect::<Result<String>>()?);
    }

    const UNDER_WAY: usize = 8;
    println!("\nGB/s by memory, {UNDER_WAY} reads under way; a part is {PART_BYTES} bytes, an expert {EXPERT_BYTES}\n");
    println!("| pages | memory | pread, part | pread, expert | io_uring, part | io_uring, expert |");
    println!("|---|---|---|---|---|---|");
    for pages in ["huge", "4 KiB"] {
        use_huge_pages(pages == "huge");
        for memory in [Memory::Touched, Memory::Fresh] {
            let readers: [Arc<dyn Reader>; 2] =
                [Arc::new(Pool::direct(direct.clone(), UNDER_WAY)?), uring(direct.clone(), UNDER_WAY)?];
            let kinds = readers.iter().flat_map(|reader| [PART_BYTES, EXPERT_BYTES].map(|bytes| (reader, bytes)));
            let rates = kinds.map(|(reader, piece_bytes)| rate(reader.clone(), piece_bytes, UNDER_WAY, memory));
            let name = if memory == Memory::Fresh { "fresh" } else { "touched" };
            println!("| {pages} | {name} |{}", rates.collect::<Result<String>>()?);
        }
    }
    Ok(())
}

/// Whether memory that is touched from now on is of huge pages, where it may be.
#[cfg(target_os = "linux")]
fn use_huge_pages(yes: bool) {
    rustix::thread::disable_transparent_huge_pages(!yes).expect("a system with huge pages");
}

/// Elsewhere it is as the system likes.
#[cfg(not(target_os = "linux"))]
fn use_huge_pages(_: bool) {}

#[cfg(target_os = "linux")]
fn uring(source: Source, under_way: usize) -> Result<Arc<dyn Reader>> {
    Ok(Arc::new(store::reader::Uring::new(source, under_way)?))
}

/// Elsewhere the column is that of threads again.
#[cfg(not(target_os = "linux"))]
fn uring(source: Source, under_way: usize) -> Result<Arc<dyn Reader>> {
    Ok(Arc::new(Pool::direct(source, under_way)?))
}
