//! How fast weights come from a disk: `disk FILE [PIECE_BYTES]` reads pieces of a file, in an order that has nothing to do
//! with their place, by every reader and with 1 to 16 of them under way, two seconds each.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use store::reader::{Client, Completion, Pool, Read};
use store::{AlignedBytes, Extent, Reader, Source};

/// Bytes of the largest part of an expert of Flash in two bits.
const PIECE_BYTES: u64 = 2_752_512;
const TIME: Duration = Duration::from_secs(2);

/// Asks for a random piece whenever one has come.
struct Asker {
    reader: Box<dyn Reader>,
    this: Weak<Asker>,
    pieces: u64,
    piece_bytes: u64,
    drawn: AtomicU64,
    read_bytes: AtomicU64,
    ends: Instant,
    under_way: Mutex<usize>,
    ended: Condvar,
}

impl Asker {
    fn ask(&self, memory: AlignedBytes) {
        let n = self.drawn.fetch_add(1, Ordering::Relaxed);
        // Fibonacci hashing: spread over the file and the same every time.
        let piece = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % self.pieces;
        let extent = Extent { file: 0, offset: piece * self.piece_bytes, bytes: self.piece_bytes };
        self.reader.submit(Read { id: n, extent, memory, client: self.this.clone() });
    }
}

impl Client for Asker {
    fn done(&self, completion: Completion) {
        completion.result.expect("the file can be read");
        self.read_bytes.fetch_add(completion.extent.bytes, Ordering::Relaxed);
        if Instant::now() < self.ends {
            return self.ask(completion.memory);
        }
        *self.under_way.lock().expect("nobody panics") -= 1;
        self.ended.notify_all();
    }
}

/// Gigabytes (10⁹) a second with so many reads under way.
fn rate(reader: Box<dyn Reader>, file_bytes: u64, piece_bytes: u64, under_way: usize) -> Result<f64> {
    let began = Instant::now();
    let asker = Arc::new_cyclic(|this| Asker {
        reader,
        this: this.clone(),
        pieces: file_bytes / piece_bytes,
        piece_bytes,
        drawn: AtomicU64::new(file_bytes ^ under_way as u64),
        read_bytes: AtomicU64::new(0),
        ends: began + TIME,
        under_way: Mutex::new(under_way),
        ended: Condvar::new(),
    });
    for _ in 0..under_way {
        asker.ask(AlignedBytes::zeroed(piece_bytes as usize + store::ALIGNMENT_BYTES * 2)?);
    }
    let mut left = asker.under_way.lock().expect("nobody panics");
    while *left > 0 {
        left = asker.ended.wait(left).expect("nobody panics");
    }
    Ok(asker.read_bytes.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64() / 1e9)
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let path: PathBuf = args.next().context("usage: disk FILE [PIECE_BYTES]")?.into();
    let piece_bytes: u64 = args.next().map_or(Ok(PIECE_BYTES), |bytes| bytes.parse())?;
    let file_bytes = path.metadata()?.len();
    let source = Source::open([(&path, file_bytes)])?;
    let direct = source.direct().map_err(anyhow::Error::msg)?;
    println!("pieces of {piece_bytes} bytes, GB/s by reads under way\n");
    println!("| reads | pread, buffered | pread, direct | io_uring, direct |\n|---|---|---|---|");
    for under_way in [1, 2, 4, 8, 16] {
        let readers: [Box<dyn Reader>; 3] = [
            Box::new(Pool::buffered(source.clone(), under_way)?),
            Box::new(Pool::direct(direct.clone(), under_way)?),
            uring(direct.clone(), under_way)?,
        ];
        let rates = readers.into_iter().map(|reader| rate(reader, file_bytes, piece_bytes, under_way));
        let [a, b, c] = rates.collect::<Result<Vec<_>>>()?.try_into().expect("three readers");
        println!("| {under_way} | {a:.2} | {b:.2} | {c:.2} |");
    }
    Ok(())
}

#[cfg(target_os = "linux")]
fn uring(source: Source, under_way: usize) -> Result<Box<dyn Reader>> {
    Ok(Box::new(store::reader::Uring::new(source, under_way)?))
}

/// Elsewhere the column is that of threads again.
#[cfg(not(target_os = "linux"))]
fn uring(source: Source, under_way: usize) -> Result<Box<dyn Reader>> {
    Ok(Box::new(Pool::direct(source, under_way)?))
}
