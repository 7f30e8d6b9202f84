//! What experts cost: how many were found in memory, what was read, and how long computing waited for it.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use store::{CacheCounts, StoreCounts};

use crate::device::{Counts, Device};
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
    pub counts: Counts,
}

/// Takes the time and the counts of passes that begin now.
pub struct Meter {
    start: Instant,
    before: Counts,
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
        let Counts { slots: StoreCounts { cache, read_bytes, stall_us }, tier } = self.counts;
        let mut object = json!({
            "tokens": self.tokens,
            "time_us": self.time.as_micros() as u64,
            "hits": cache.hits,
            "misses": cache.misses,
            "prefetched": tier.map_or(cache, |tier| tier.cache).prefetched,
            "read_bytes": self.counts.file_bytes(),
            "stall_us": stall_us,
            "stall_us_per_token": self.per_token(stall_us),
        });
        if let Some(tier) = tier {
            object["uploaded_bytes"] = json!(read_bytes);
            object["host_tier"] = json!({"hits": tier.cache.hits, "misses": tier.cache.misses});
        }
        object
    }

    /// `counts` of these tokens, under a name.
    fn row(&self, name: &str, counts: &StoreCounts) -> String {
        let StoreCounts { cache, read_bytes, stall_us } = *counts;
        let CacheCounts { hits, misses, prefetched, .. } = cache;
        let (read, read_each) = (terminal::bytes(read_bytes), terminal::bytes(self.per_token(read_bytes)));
        let (tokens, stall) = (self.tokens, self.per_token(stall_us));
        format!("{name:<8}{tokens:>8}{hits:>10}{misses:>10}{prefetched:>11}{read:>13}{read_each:>13}{stall:>16}")
    }
}

/// A table with a row for prefill and one for decode.
fn table(name: &str, brought: &str, kinds: [(&str, &Traffic); 2], counts: impl Fn(&Traffic) -> StoreCounts) {
    let each = format!("{brought}/token");
    note(&format!(
        "{name:<8}{:>8}{:>10}{:>10}{:>11}{brought:>13}{each:>13}{:>16}",
        "tokens", "hits", "misses", "read ahead", "stall µs/token"
    ));
    kinds.iter().for_each(|(name, traffic)| note(&traffic.row(name, &counts(traffic))));
}

/// Prints prefill and decode apart, where anything is read at all; of a GPU its slots, then the tier behind them.
pub fn print(setting: &Setting, prefill: &Traffic, decode: &Traffic) {
    let kinds = [("prefill", prefill), ("decode", decode)];
    if setting.slots.is_none() {
        return note("experts are resident: nothing was read for them while computing");
    }
    if setting.host_tier.is_none() {
        return table("experts", "read", kinds, |traffic| traffic.counts.slots);
    }
    table("device", "copied", kinds, |traffic| traffic.counts.slots);
    table("host", "read", kinds, |traffic| traffic.counts.tier.unwrap_or_default());
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
