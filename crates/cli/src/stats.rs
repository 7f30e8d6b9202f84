//! What experts cost: how many were found in memory, what was read, and how long computing waited for it.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use store::{CacheCounts, StoreCounts};

use crate::device::Device;
use crate::output::Output;
use crate::placement::Setting;
use crate::terminal::{self, WriteError, note};
use crate::{flags, load::ModelFile};

/// Counts of some passes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traffic {
    /// Tokens that went through the model.
    pub tokens: usize,
    /// How long that took.
    pub time: Duration,
    /// What happened in the expert store.
    pub counts: StoreCounts,
}

/// Takes the time and the counts of passes that begin now.
pub struct Meter {
    start: Instant,
    before: StoreCounts,
}

impl Meter {
    /// Begins.
    pub fn start<D: Device>(backend: &D) -> Meter {
        Meter { start: Instant::now(), before: backend.counts() }
    }

    /// What happened since, over so many tokens.
    pub fn stop<D: Device>(&self, backend: &D, tokens: usize) -> Traffic {
        Traffic { tokens, time: self.start.elapsed(), counts: backend.counts().since(&self.before) }
    }
}

impl Traffic {
    /// Adds the counts of other passes.
    pub fn add(&mut self, other: &Traffic) {
        self.tokens += other.tokens;
        self.time += other.time;
        self.counts.add(&other.counts);
    }

    fn per_token(&self, count: u64) -> u64 {
        count / self.tokens.max(1) as u64
    }

    /// One object.
    pub fn json(&self) -> Value {
        let StoreCounts { cache, read_bytes, stall_us } = self.counts;
        json!({
            "tokens": self.tokens,
            "time_us": self.time.as_micros() as u64,
            "hits": cache.hits,
            "misses": cache.misses,
            "prefetched": cache.prefetched,
            "read_bytes": read_bytes,
            "stall_us": stall_us,
            "stall_us_per_token": self.per_token(stall_us),
        })
    }

    fn row(&self, name: &str) -> String {
        let Traffic { tokens, counts: StoreCounts { cache, read_bytes, stall_us }, .. } = *self;
        let CacheCounts { hits, misses, prefetched, .. } = cache;
        let (read, read_each) = (terminal::bytes(read_bytes), terminal::bytes(self.per_token(read_bytes)));
        let stall = self.per_token(stall_us);
        format!("{name:<8}{tokens:>8}{hits:>10}{misses:>10}{prefetched:>11}{read:>13}{read_each:>13}{stall:>16}")
    }
}

/// Prints prefill and decode apart, where anything is read at all.
pub fn print(setting: &Setting, prefill: &Traffic, decode: &Traffic) {
    if setting.slots.is_none() {
        note("experts are resident: nothing was read for them while computing");
        return;
    }
    note(&format!(
        "{:<8}{:>8}{:>10}{:>10}{:>11}{:>13}{:>13}{:>16}",
        "experts", "tokens", "hits", "misses", "read ahead", "read", "read/token", "stall µs/token"
    ));
    note(&prefill.row("prefill"));
    note(&decode.row("decode"));
}

/// Where to tell counts at the end of a command.
pub struct Report {
    prints: bool,
    json: Option<Output>,
}

impl Report {
    /// As the flags ask, checked before anything is computed.
    ///
    /// # Errors
    /// The file cannot be written, or is one of the model's.
    pub fn new(flags: &flags::Stats, file: &ModelFile) -> anyhow::Result<Report> {
        let json = flags.stats_json.as_deref().map(|path| Output::new(path, file.paths())).transpose()?;
        Ok(Report { prints: flags.stats, json })
    }

    /// Tells them.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn tell(self, setting: &Setting, prefill: &Traffic, decode: &Traffic) -> anyhow::Result<()> {
        if self.prints {
            print(setting, prefill, decode);
        }
        let Some(output) = self.json else { return Ok(()) };
        let object = json!({"setting": setting, "prefill": prefill.json(), "decode": decode.json()});
        let path = output.name().to_owned();
        output.write(|out| Ok(writeln!(out, "{object:#}").map_err(WriteError::to(Path::new(&path)))?))
    }
}
