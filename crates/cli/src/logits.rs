//! `infall logits`: all logits of a token sequence, to compare with other engines.

use std::io::Write;
use std::path::Path;

use model::{Cancel, NoObserver, Observer, Row, forward};

use crate::device::{Device, on_device};
use crate::load::{self, ModelFile};
use crate::output::Output;
use crate::placement::Work;
use crate::record::Recording;
use crate::stats::{Meter, Report, Traffic};
use crate::terminal::{self, Unit, WriteError};
use crate::{Outcome, flags, interrupt, npy};

/// Runs the command. That the output can be written is checked before weights are loaded, but nothing is created
/// before Ctrl-C is handled.
pub fn logits(flags: &flags::Logits) -> anyhow::Result<Outcome> {
    let file = ModelFile::open(Some(&flags.model))?;
    let tokens = read_tokens(&flags.tokens, &file)?;
    let output = |path: &Path| Output::new(path, file.paths().chain([flags.tokens.as_path()]));
    let (out, routes) = (output(&flags.out)?, flags.record.routes.as_deref().map(output).transpose()?);
    let report = Report::new(&flags.stats, &file)?;
    let outputs = Outputs { out, routes, report };

    let work = Work {
        arithmetic: flags.arithmetic.into(),
        chunk: flags.chunk.map(usize::from),
        all_logits: true,
        ..Work::new(&flags.machine, tokens.len())
    };
    on_device!(file.device(&work)?, |on: D| compute::<D>(flags, &file, &tokens, &work, &on, outputs))
}

/// Where to write.
struct Outputs {
    out: Output,
    routes: Option<Output>,
    report: Report,
}

fn compute<D: Device>(
    flags: &flags::Logits,
    file: &ModelFile,
    tokens: &[u32],
    work: &Work,
    on: &D::Adapter,
    Outputs { out, routes, report }: Outputs,
) -> anyhow::Result<Outcome> {
    let cancel = interrupt::cancel_on_interrupt()?;
    let (backend, setting) = file.load::<D>(work, on, &cancel)?;
    terminal::dim_note(&setting.line());
    let recording = match routes {
        Some(output) => Some(Recording::begin(output, file.trace_header()?)?),
        None => None,
    };
    let mut observer = recording.as_ref().map_or_else(|| Box::new(NoObserver) as _, Recording::observer);
    let meter = Meter::start(&backend);
    match out.write(|out| write_all(flags, &backend, tokens, &cancel, &mut *observer, out)) {
        Ok(()) => {
            drop(observer);
            recording.map_or(Ok(()), Recording::end)?;
            let all = meter.stop(&backend, tokens.len());
            report.tell(&setting, &all, &Traffic::default())?;
            Ok(Outcome::Done)
        }
        Err(_) if cancel.check().is_err() => Ok(Outcome::Interrupted),
        Err(error) => Err(match error.downcast() {
            Ok(error) => load::in_file(&file.name, error),
            Err(error) => error,
        }),
    }
}

fn write_all<D: Device>(
    flags: &flags::Logits,
    backend: &D,
    tokens: &[u32],
    cancel: &Cancel,
    observer: &mut dyn Observer<D>,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let unwritable = || WriteError::to(&flags.out);
    npy::write_header(out, tokens.len(), backend.config().vocab_size).map_err(unwritable())?;
    let bar = terminal::progress("computing", tokens.len() as u64, Unit::Tokens);
    let mut state = backend.new_state()?;
    for chunk in tokens.chunks(flags.chunk.map_or(D::PASS_ROWS, usize::from)) {
        let rows = (backend.position(&state)..).zip(chunk);
        let rows = rows.map(|(position, &token)| Row { session: 0, position, token, logits: true }).collect();
        let logits = forward(backend, rows, &mut [&mut state], cancel, observer)?;
        npy::write_values(out, &backend.read_logits(logits)?).map_err(unwritable())?;
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    Ok(())
}

/// The ids in a JSON file, checked against the model.
fn read_tokens(path: &Path, file: &ModelFile) -> anyhow::Result<Vec<u32>> {
    let name = path.display();
    let text = std::fs::read(path)
        .map_err(|error| anyhow::anyhow!("cannot read {name}: {error}. Give a JSON file with an array of token ids"))?;
    let tokens: Vec<u32> = serde_json::from_slice(&text).map_err(|error| {
        anyhow::anyhow!("{name}: found {error}; expected a JSON array of token ids, for instance [0, 17, 4]")
    })?;
    let config = &file.model.config;
    if tokens.is_empty() {
        anyhow::bail!("{name}: found an empty array, expected at least one token id");
    }
    if tokens.len() > config.context_length {
        let (found, limit) = (tokens.len(), config.context_length);
        anyhow::bail!("{name}: found {found} tokens, expected at most {limit}, the model's context. Give fewer tokens");
    }
    let outside = tokens.iter().enumerate().find(|(_, token)| **token as usize >= config.vocab_size);
    if let Some((index, token)) = outside {
        anyhow::bail!(
            "{name}: found token {token} at index {index}, expected 0 to {}, the vocabulary of {}. Use ids of this \
             model's own tokenizer",
            config.vocab_size - 1,
            file.name
        );
    }
    Ok(tokens)
}
