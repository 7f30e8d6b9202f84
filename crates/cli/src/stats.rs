//! What experts cost: how many were found in memory, what was read, and how long computing waited for it.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use store::StoreCounts;

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
    /// Experts that were in a slot when a layer wanted them, or on their way into one.
    pub hits: u64,
    /// Experts that were not.
    pub misses: u64,
    /// Experts read before a layer wanted them.
    pub prefetched: u64,
    /// Bytes of experts that were read.
    pub read_bytes: u64,
    /// Microseconds in which computing stood still because an expert was not there.
    pub stall_us: u64,
}

impl Traffic {
    /// What happened between two looks at the counts.
    pub fn between(before: StoreCounts, after: StoreCounts, tokens: usize, time: Duration) -> Traffic {
        Traffic {
            tokens,
            time,
            hits: after.cache.hits - before.cache.hits,
            misses: after.cache.misses - before.cache.misses,
            prefetched: after.cache.prefetched - before.cache.prefetched,
            read_bytes: after.read_bytes - before.read_bytes,
            stall_us: after.stall_us - before.stall_us,
        }
    }

    /// Adds the counts of other passes.
    pub fn add(&mut self, other: &Traffic) {
        self.tokens += other.tokens;
        self.time += other.time;
        self.hits += other.hits;
        self.misses += other.misses;
        self.prefetched += other.prefetched;
        self.read_bytes += other.read_bytes;
        self.stall_us += other.stall_us;
    }

    fn per_token(&self, count: u64) -> u64 {
        count / self.tokens.max(1) as u64
    }

    /// One object.
    pub fn json(&self) -> Value {
        json!({
            "tokens": self.tokens,
            "time_us": self.time.as_micros() as u64,
            "hits": self.hits,
            "misses": self.misses,
            "prefetched": self.prefetched,
            "read_bytes": self.read_bytes,
            "stall_us": self.stall_us,
            "stall_us_per_token": self.per_token(self.stall_us),
        })
    }

    fn row(&self, name: &str) -> String {
        let Traffic { tokens, hits, misses, prefetched, read_bytes, stall_us, .. } = *self;
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
