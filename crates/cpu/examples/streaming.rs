//! The whole proof that streaming changes no bit, every cell of `tests/common/cells.rs`:
//! `cargo run --release -p infall-cpu --example streaming -- RECORD [--seconds N]`
//!
//! Eight cells at a time for each of the machine's processors, since a cell mostly waits for the disk. A line for each goes into the file RECORD; cells that are there
//! already are not run again, so that the proof can be made in several sittings of at most N seconds. When none is left, a
//! summary comes to standard output. The exit code is 1 if a cell failed, 0 if all passed, 3 if some are left to be run.

#[path = "../tests/common/cells.rs"]
mod cells;
#[path = "../tests/common/mod.rs"]
mod common;

use std::collections::{HashMap, HashSet};
use std::error::Error;
use std::fs::OpenOptions;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use cells::{AXES, Cell, Subject};
use store::StoreCounts;
use xxhash_rust::xxh3::xxh3_64;

/// Cells under way at the same time, for each processor.
const CELLS_A_PROCESSOR: usize = 8;

const USAGE: &str = "usage: streaming RECORD [--seconds N]";

/// How a cell ended, and its figures: misses, experts read ahead, bytes read, milliseconds.
type Line = (String, [u64; 4]);

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (path, seconds) = match &arguments[..] {
        [path] => (path, u64::MAX),
        [path, flag, seconds] if flag == "--seconds" => (path, seconds.parse()?),
        _ => return Err(USAGE.into()),
    };
    let began = Instant::now();
    let lines = read(path)?;
    let record = OpenOptions::new().create(true).append(true).open(path)?;
    // Those that come along with others are not run for themselves.
    let along: HashSet<String> = Cell::all()
        .flat_map(|cell| cell.sequence().into_iter().filter(move |other| *other != cell))
        .map(|cell| cell.to_string())
        .collect();
    let is_to_run = |cell: &Cell| !lines.contains_key(&cell.to_string()) && !along.contains(&cell.to_string());
    let mut to_run: Vec<Cell> = Cell::all().filter(is_to_run).collect();
    // In no order, and the same each time: a part of the record says something about every axis.
    to_run.sort_by_cached_key(|cell| xxh3_64(cell.to_string().as_bytes()));
    let subjects = [0, 1, 2].map(Subject::new);
    let (to_run, done) = (Mutex::new(to_run.into_iter()), Mutex::new((lines, record)));
    std::thread::scope(|scope| {
        for _ in 0..CELLS_A_PROCESSOR * std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while began.elapsed() < Duration::from_secs(seconds)
                    && let Some(cell) = to_run.lock().expect("nobody panics").next()
                {
                    let results = run(&subjects[cell.0[0]], cell);
                    let (lines, record) = &mut *done.lock().expect("nobody panics");
                    for (cell, (ended, figures)) in results {
                        let figures_text = figures.map(|figure| figure.to_string()).join("\t");
                        writeln!(record, "{cell}\t{ended}\t{figures_text}").expect("the record can be written to");
                        lines.insert(cell.to_string(), (ended, figures));
                    }
                }
            });
        }
    });
    let (lines, _) = done.into_inner().expect("nobody panics");
    if lines.len() < Cell::all().count() {
        eprintln!("{} of {} cells have been run", lines.len(), Cell::all().count());
        return Ok(ExitCode::from(3));
    }
    summarize(&lines);
    let failed = lines.values().any(|(ended, _)| ended == "failed");
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Runs a cell, and what comes along with it. They share the time.
fn run(subject: &Subject, cell: Cell) -> Vec<(Cell, Line)> {
    let began = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| subject.run(cell)));
    let cells = cell.sequence();
    let milliseconds = began.elapsed().as_millis() as u64 / cells.len() as u64;
    let all = |ended: &str| cells.iter().map(|&cell| (cell, (ended.to_owned(), [0, 0, 0, milliseconds]))).collect();
    match result {
        Ok(Ok(done)) => {
            let line = |(cell, StoreCounts { cache, read_bytes, .. })| {
                (cell, ("passed".to_owned(), [cache.misses, cache.prefetched, read_bytes, milliseconds]))
            };
            done.into_iter().map(line).collect()
        }
        Ok(Err(note)) => {
            eprintln!("{cell}: skipped, since {note}");
            all("skipped")
        }
        // The panic has said why.
        Err(_) => all("failed"),
    }
}

fn read(path: &str) -> Result<HashMap<String, Line>, Box<dyn Error>> {
    let text = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        text => text?,
    };
    let line = |line: &str| {
        let [cell, ended, figures @ ..] = &line.split('\t').collect::<Vec<_>>()[..] else { return None };
        let figures: Vec<u64> = figures.iter().map(|figure| figure.parse()).collect::<Result<_, _>>().ok()?;
        Some(((*cell).to_owned(), ((*ended).to_owned(), figures.try_into().ok()?)))
    };
    text.lines().map(|found| line(found).ok_or(format!("{path}: found {found:?}, expected a cell").into())).collect()
}

const TITLE: &str = "\
# The proof that streaming changes no bit

Every combination of the values below is a cell. A cell reads 300 tokens and decodes 16 more, one by one, with experts streamed;
the logits of all 316 must be, byte for byte, those of the same precision with resident experts, one thread and one pass. It
also asserts which path ran: slots, threads and reader as asked, each demand of the store a hit or a miss, everything loaded
that has no other way to be there, nothing loaded twice where everything has a slot, bytes read between those of the misses and
those of misses and reads ahead together (rows of the token embedding, which are not experts, are counted nowhere here). What a cell is and what it asserts: `crates/cpu/tests/common/cells.rs`. To repeat it:
`scripts/test-full streaming`.

*Cold*: the store has just been opened. *Warm*: the cold run was done before. Figures of a warm cell are those of both runs.
*After another session*: another session with other tokens ran before and lives on, and a third one reads a token after every
fourth pass. *pread buffered* reads through the page cache, *pread direct* past it. *Read ahead* counts experts that were read
before they were demanded. *Minutes* are those that cells took, several of them at the same time.
";

fn summarize(lines: &HashMap<String, Line>) {
    println!("{TITLE}");
    println!("| axis | value | cells | passed | failed | skipped | misses | read ahead | GB read | minutes |");
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for (axis, (name, values)) in AXES.iter().enumerate() {
        for (i, value) in values.iter().enumerate() {
            row(name, value, Cell::all().filter(|cell| cell.0[axis] == i), lines);
        }
    }
    row("all", "", Cell::all(), lines);
    println!("\nMachine: {}", machine());
}

/// A line of the table: the sums of some cells.
fn row(axis: &str, value: &str, cells: impl Iterator<Item = Cell>, lines: &HashMap<String, Line>) {
    let of: Vec<&Line> = cells.map(|cell| &lines[&cell.to_string()]).collect();
    let ended = |how: &str| of.iter().filter(|(ended, _)| ended == how).count();
    let sum = |figure: usize| of.iter().map(|(_, figures)| figures[figure]).sum::<u64>();
    let (count, [passed, failed, skipped]) = (of.len(), ["passed", "failed", "skipped"].map(ended));
    let (read, minutes) = (sum(2) as f64 / 1e9, sum(3) as f64 / 60_000.0);
    println!(
        "| {axis} | {value} | {count} | {passed} | {failed} | {skipped} | {} | {} | {read:.1} | {minutes:.1} |",
        sum(0),
        sum(1)
    );
}

/// The processor and the system, as Linux tells them.
fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown processor");
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{} with {cores} cores, {} {}", model.trim_matches([' ', '\t', ':']), std::env::consts::OS, kernel.trim())
}
