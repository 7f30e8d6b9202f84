//! `infall bench`: tokens a second at growing lengths of context, what memory that takes, and how near decoding comes to
//! the speed at which memory can be read.
//!
//! A prompt of pseudo-random tokens is read from one length to the next. At each, tokens are generated, always the likeliest, on
//! a clone of the session, which is then dropped: the session goes on as if nothing had been generated.

use std::time::{Duration, Instant};

use model::{Cancel, KvLayout, NoObserver, Row, forward};
use session::{Sampler, Sampling, pass_rows};
use xxhash_rust::xxh3::xxh3_64;

use crate::device::{Device, Sweep, on_device};
use crate::load::{self, ModelFile};
use crate::output::Output;
use crate::placement::{self, Work};
use crate::plot::{self, Axis, Line, Panel};
use crate::stats::Meter;
use crate::terminal::{self, ReadingBar, Stream};
use crate::{Outcome, flags, interrupt, memory};

/// Runs the command. Rows of the table are printed as they are measured; after Ctrl-C the files hold those that were.
pub fn bench(flags: &flags::Bench) -> anyhow::Result<Outcome> {
    let file = ModelFile::open(flags.model.as_deref())?;
    let lengths = lengths(flags, &file)?;
    let output = |path: &Option<_>| path.as_deref().map(|path| Output::new(path, file.paths())).transpose();
    let outputs = [output(&flags.csv)?, output(&flags.plot)?];
    let end_tokens = lengths.last().expect("there is a length") + flags.gen_tokens.get();
    let work = Work { clones: 1, ..Work::new(&flags.machine, end_tokens) };
    on_device!(file.device(&work)?, |on: D| measure::<D>(flags, &file, lengths, &work, &on, outputs))
}

fn measure<D: Device>(
    flags: &flags::Bench,
    file: &ModelFile,
    lengths: Vec<usize>,
    work: &Work,
    on: &D::Adapter,
    [csv, plot]: [Option<Output>; 2],
) -> anyhow::Result<Outcome> {
    let cancel = interrupt::cancel_on_interrupt()?;
    // Before weights take what memory there is.
    let Sweep { who, bytes_per_second: sweep } = D::sweep(on, work)?;
    let (backend, setting) = file.load::<D>(work, on, &cancel)?;
    terminal::dim_note(&setting.line());
    Stream::Out.write(&format!(
        "{}: {} layers; {who} at {:.1} GB/s\n{}\n",
        terminal::escape_controls(&file.name),
        file.model.config.layers,
        sweep / 1e9,
        HEAD
    ))?;
    let weight_bytes = placement::token_weight_bytes(&file.model);
    let layout = work.layout(&file.model.config);
    let mut timeline = Timeline { backend: &backend, layout: &layout, state: backend.new_state()?, cancel: &cancel };
    let mut rows = Vec::new();
    for context_tokens in lengths {
        match timeline.measure(context_tokens, flags.gen_tokens.get()) {
            Ok(measured) => rows.push(Figures { measured, weight_bytes, sweep }),
            Err(_) if cancel.check().is_err() => break,
            Err(error) => return Err(in_file(file, error)),
        }
        Stream::Out.write(&rows.last().expect("one was measured").table_row())?;
    }
    if !rows.is_empty() {
        let write = |output: Option<Output>, text: String| {
            output.map_or(Ok(()), |output| output.write(|out| Ok(out.write_all(text.as_bytes())?)))
        };
        write(csv, csv_text(&rows))?;
        write(plot, plot_text(&rows))?;
    }
    Ok(if cancel.check().is_err() { Outcome::Interrupted } else { Outcome::Done })
}

/// The lengths of context at which is measured, ascending.
fn lengths(flags: &flags::Bench, file: &ModelFile) -> anyhow::Result<Vec<usize>> {
    let (start, generated, most) = (flags.ctx_start.get(), flags.gen_tokens.get(), file.model.config.context_length);
    let fitting = most.saturating_sub(generated);
    let max = flags.ctx_max.map_or_else(|| start.saturating_mul(8).min(fitting).max(start), usize::from);
    if max < start {
        anyhow::bail!("found --ctx-max {max}, expected at least the {start} of --ctx-start. Change one of them");
    }
    if max > fitting {
        anyhow::bail!(
            "{}: found {generated} tokens to generate behind {max} of context, expected at most {most} together, for \
             which the model was made. Make --ctx-start, --ctx-max or --gen-tokens smaller",
            file.name
        );
    }
    let next = |&length: &usize| Some(((length as f64 * flags.step_mul) as usize).max(length + 1));
    let mut lengths: Vec<usize> = std::iter::successors(Some(start), next).take_while(|&n| n < max).collect();
    lengths.push(max);
    Ok(lengths)
}

/// The model's file in an error that does not name it.
fn in_file(file: &ModelFile, error: anyhow::Error) -> anyhow::Error {
    error.downcast().map_or_else(|error| error, |error| load::in_file(&file.name, error))
}

/// A session that grows, and what it grows with.
struct Timeline<'a, D: Device> {
    backend: &'a D,
    layout: &'a KvLayout,
    state: D::State,
    cancel: &'a Cancel,
}

/// What was measured at one length of context.
struct Measured {
    context_tokens: usize,
    prefill_tokens: usize,
    prefill: Duration,
    /// Of each token that was generated.
    decode: Vec<Duration>,
    /// What the session holds.
    session_bytes: u64,
    /// What the process holds, the clone included; `None` where the system does not say.
    process_bytes: Option<u64>,
    /// Stored rows that one more token reads.
    row_bytes: usize,
    /// Read from the disk for a generated token.
    disk_bytes: u64,
    /// XXH3-64 of the logits after the context, as little-endian f32: nothing but the precision changes it.
    logits_xxh3: u64,
}

impl<D: Device> Timeline<'_, D> {
    /// Reads on to `context_tokens` tokens and generates `generated` there.
    fn measure(&mut self, context_tokens: usize, generated: usize) -> anyhow::Result<Measured> {
        let prefill_tokens = context_tokens - self.backend.position(&self.state);
        let start = Instant::now();
        let logits = self.read_to(context_tokens)?;
        let prefill = start.elapsed();
        let bytes: Vec<u8> = logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();

        let mut clone = self.backend.fork(&self.state)?;
        let meter = Meter::start(self.backend);
        let decode = generate(self.backend, &mut clone, logits, generated, self.cancel)?;
        let traffic = meter.stop(self.backend, generated);
        let top_k = self.backend.config().index_top_k;
        Ok(Measured {
            context_tokens,
            prefill_tokens,
            prefill,
            decode,
            session_bytes: self.backend.session_bytes(&self.state),
            process_bytes: memory::resident_bytes(),
            row_bytes: self.layout.read_bytes(context_tokens, top_k),
            disk_bytes: traffic.counts.file_bytes() / generated as u64,
            logits_xxh3: xxh3_64(&bytes),
        })
    }

    /// The logits after `end` tokens.
    fn read_to(&mut self, end: usize) -> anyhow::Result<Vec<f32>> {
        let start = self.backend.position(&self.state);
        let bar = ReadingBar::new(end - start);
        let (mut logits, mut position) = (Vec::new(), start);
        while position < end {
            let chunk = position..position + pass_rows(position, end - position, D::PASS_ROWS);
            position = chunk.end;
            let token = |position| prompt_token(position, self.backend.config().vocab_size);
            let row = |position| Row { session: 0, position, token: token(position), logits: position + 1 == end };
            let rows = chunk.map(row).collect();
            let pass = forward(self.backend, rows, &mut [&mut self.state], self.cancel, &mut NoObserver)?;
            logits = self.backend.read_logits(pass)?;
            bar.set(position - start);
        }
        Ok(logits)
    }
}

/// A token for each position, spread over the vocabulary.
fn prompt_token(position: usize, vocab_size: usize) -> u32 {
    (position.wrapping_mul(7919) % vocab_size) as u32
}

/// How long each of `count` tokens took that follow from `logits`, the likeliest each time, whether it ends a turn or not.
fn generate<D: Device>(
    backend: &D,
    state: &mut D::State,
    mut logits: Vec<f32>,
    count: usize,
    cancel: &Cancel,
) -> anyhow::Result<Vec<Duration>> {
    let mut sampler = Sampler::new(Sampling { temperature: 0.0, ..Sampling::default() }, 0)?;
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let row = Row { session: 0, position: backend.position(state), token: sampler.sample(&logits)?, logits: true };
        let start = Instant::now();
        let pass = forward(backend, vec![row], &mut [state], cancel, &mut NoObserver)?;
        logits = backend.read_logits(pass)?;
        times.push(start.elapsed());
    }
    Ok(times)
}

/// What was measured, and what it is set against.
struct Figures {
    measured: Measured,
    /// Weights that a token reads.
    weight_bytes: u64,
    /// Bytes of memory that the same threads read in a second when they do nothing else.
    sweep: f64,
}

const HEAD: &str = " context  prefill t/s  decode t/s      session      process  read a token    GB/s  of memory's";

/// A column's name, and its field in a line.
type Column = (&'static str, fn(&Figures) -> String);

/// Columns of the comma-separated values. A field is empty where nothing is known.
const COLUMNS: [Column; 15] = [
    ("context_tokens", |f| f.measured.context_tokens.to_string()),
    ("prefill_tokens", |f| f.measured.prefill_tokens.to_string()),
    ("prefill_tokens_per_s", |f| f.prefill_speed().to_string()),
    ("decode_tokens", |f| f.measured.decode.len().to_string()),
    ("decode_tokens_per_s", |f| f.decode_speed().to_string()),
    ("decode_mean_tokens_per_s", |f| f.mean_decode_speed().to_string()),
    ("session_bytes", |f| f.measured.session_bytes.to_string()),
    ("process_bytes", |f| f.measured.process_bytes.map_or(String::new(), |bytes| bytes.to_string())),
    ("weight_bytes_per_token", |f| f.weight_bytes.to_string()),
    ("row_bytes_per_token", |f| f.measured.row_bytes.to_string()),
    ("disk_bytes_per_token", |f| f.measured.disk_bytes.to_string()),
    ("read_bytes_per_s", |f| f.read_speed().to_string()),
    ("sweep_bytes_per_s", |f| f.sweep.to_string()),
    ("share_of_sweep", |f| (f.read_speed() / f.sweep).to_string()),
    ("logits_xxh3", |f| format!("{:016x}", f.measured.logits_xxh3)),
];

impl Figures {
    fn prefill_speed(&self) -> f64 {
        self.measured.prefill_tokens as f64 / self.measured.prefill.as_secs_f64()
    }

    /// By the median token, so that one slow token says nothing.
    fn decode_speed(&self) -> f64 {
        1.0 / median(self.measured.decode.iter().map(Duration::as_secs_f64))
    }

    fn mean_decode_speed(&self) -> f64 {
        self.measured.decode.len() as f64 / self.measured.decode.iter().sum::<Duration>().as_secs_f64()
    }

    /// Weights and rows that one token reads from memory.
    fn token_bytes(&self) -> u64 {
        self.weight_bytes + self.measured.row_bytes as u64
    }

    /// Bytes a second, of the median token.
    fn read_speed(&self) -> f64 {
        self.token_bytes() as f64 * self.decode_speed()
    }

    /// A line below [`HEAD`].
    fn table_row(&self) -> String {
        format!(
            "{:>8} {:>12.1} {:>11.2} {:>12} {:>12} {:>13} {:>7.2} {:>12.2}\n",
            self.measured.context_tokens,
            self.prefill_speed(),
            self.decode_speed(),
            terminal::bytes(self.measured.session_bytes),
            self.measured.process_bytes.map_or("-".into(), terminal::bytes),
            terminal::bytes(self.token_bytes()),
            self.read_speed() / 1e9,
            self.read_speed() / self.sweep,
        )
    }
}

/// The middle one of some values; of an even number, the mean of the two in the middle.
pub fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        count => (values[(count - 1) / 2] + values[count / 2]) / 2.0,
    }
}

fn csv_text(rows: &[Figures]) -> String {
    let head = COLUMNS.map(|(name, _)| name.to_owned());
    let lines = rows.iter().map(|row| COLUMNS.map(|(_, value)| value(row)));
    std::iter::once(head).chain(lines).map(|fields| fields.join(",") + "\n").collect()
}

/// Both speeds over the length of the context.
fn plot_text(rows: &[Figures]) -> String {
    let panel = |title: &str, speed: fn(&Figures) -> f64| {
        let point = |row: &Figures| (row.measured.context_tokens as f64, speed(row));
        let points: Vec<(f64, f64)> = rows.iter().map(point).collect();
        Panel {
            title: title.into(),
            x_title: "tokens of context".into(),
            x: Axis::log2(points.iter().map(|point| point.0)),
            y: Axis::from_zero(points.iter().map(|point| point.1).fold(0.0, f64::max)),
            lines: vec![Line { name: String::new(), points }],
        }
    };
    plot::svg(&[panel("prefill, tokens/s", Figures::prefill_speed), panel("decode, tokens/s", Figures::decode_speed)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use model::{Arithmetic, Backend, Precision};

    /// Generating leaves no trace: the session's bytes are those of one at which nothing was generated, however far the
    /// clone went.
    #[test]
    fn generating_leaves_no_trace() {
        let file = ModelFile::open(None).unwrap();
        let backend = file.load_with(cpu::Options::default()).unwrap();
        let layout = &KvLayout::new(&file.model.config, 0, Arithmetic::Official, Precision::Fast);
        let cancel = &Cancel::default();
        let new = || Timeline { backend: &backend, layout, state: backend.new_state().unwrap(), cancel };
        let (mut measured, mut read) = (new(), new());
        for (context_tokens, generated) in [(100, 3), (127, 1), (128, 200), (300, 70), (555, 1)] {
            let found = measured.measure(context_tokens, generated).unwrap();
            assert_eq!(found.decode.len(), generated);
            let logits = read.read_to(context_tokens).unwrap();
            let bytes: Vec<u8> = logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
            assert_eq!(found.logits_xxh3, xxh3_64(&bytes), "logits after {context_tokens} tokens");
            let [measured, read] = [&measured, &read].map(|timeline| {
                let mut bytes = Vec::new();
                timeline.state.export(&mut bytes).unwrap();
                bytes
            });
            assert!(measured == read, "the session of {context_tokens} tokens");
        }
    }

    #[test]
    fn lengths_grow_to_the_last() {
        let file = ModelFile::open(None).unwrap();
        let most = file.model.config.context_length;
        let lengths = |args: &[&str]| {
            let flags = flags::Flags::try_parse_from([&["infall", "bench"], args].concat()).unwrap();
            let flags::Command::Bench(flags) = flags.command else { panic!("another command") };
            super::lengths(&flags, &file).map_err(|error| error.to_string())
        };
        assert_eq!(lengths(&["--ctx-start", "16"]), Ok(vec![16, 32, 64, 128]));
        assert_eq!(lengths(&["--ctx-start", "16", "--ctx-max", "100"]), Ok(vec![16, 32, 64, 100]));
        assert_eq!(lengths(&["--ctx-start", "2", "--ctx-max", "6", "--step-mul", "1.2"]), Ok(vec![2, 3, 4, 5, 6]));
        assert_eq!(lengths(&["--ctx-start", "7", "--ctx-max", "7"]), Ok(vec![7]));
        let last = lengths(&["--ctx-start", &(most / 2).to_string(), "--gen-tokens", "5"]).unwrap().pop();
        assert_eq!(last, Some(most - 5), "by default no more than fits");
        let most = most.to_string();
        assert!(lengths(&["--ctx-start", &most]).unwrap_err().contains("for which the model was made"));
        assert!(
            lengths(&["--ctx-start", "9", "--ctx-max", "8"]).unwrap_err().contains("at least the 9 of --ctx-start")
        );
        assert!(lengths(&["--gen-tokens", &most, "--ctx-start", "1"]).unwrap_err().contains("--gen-tokens smaller"));
    }
}
