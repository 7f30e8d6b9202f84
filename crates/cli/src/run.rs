//! `infall run`: one prompt, one answer.

use std::io::Read;
use std::ops::ControlFlow;

use model::Cancel;
use session::{Context, Limits, Sampler, Sampling, StopReason, TurnOptions, generate};
use text::parse::ParseOptions;
use text::prompt::{ControlTokens, Message, PromptOptions, render};
use text::{Tokenizer, Utf8Stream};

use crate::device::{Device, on_device};
use crate::engine::Engine;
use crate::figures::Figures;
use crate::load::ModelFile;
use crate::output::Output;
use crate::placement::Work;
use crate::screen::Screen;
use crate::stats::{Meter, Report};
use crate::terminal::{Stream, WriteError, harmless};
use crate::{Outcome, flags, interrupt, setup};

/// Runs the command. What needs no weights is checked before they are loaded.
pub fn run(flags: &flags::Run) -> anyhow::Result<Outcome> {
    let talk = &flags.talk;
    let prompt = prompt_text(flags)?;
    let file = ModelFile::open(talk.model.as_deref())?;
    let tokenizer = file.tokenizer()?;
    let control = ControlTokens::find(&tokenizer).map_err(|error| anyhow::anyhow!("{}: {error}", file.name))?;
    let context = Context::new(&file.model.config, talk.context_tokens)?;
    let tokens = encode(flags, &file, &tokenizer, context, &prompt)?;
    context.check(0, tokens.len())?;
    let (sampling, seed) = (setup::sampling(talk), talk.seed.unwrap_or_else(setup::new_seed));
    let sampler = Sampler::new(sampling, seed)?;

    let report = Report::new(&flags.stats, &file)?;
    let routes = talk.record.routes.as_deref().map(|path| Output::new(path, file.paths())).transpose()?;

    let max_tokens = talk.max_tokens.unwrap_or(usize::MAX);
    let end_tokens = tokens.len().saturating_add(max_tokens).min(context.tokens());
    let cancel = interrupt::cancel_on_interrupt()?;
    let work = Work::new(&talk.machine, end_tokens);
    let asked = Asked { flags, tokens, sampling, seed, max_tokens };
    on_device!(file.device(&work)?, |on: D| {
        let mut engine = Engine::<D>::load(file, tokenizer, context, &work, &on, &cancel)?;
        routes.map_or(Ok(()), |output| engine.record_routes(output))?;
        answer(engine, asked, sampler, &control, report, &cancel)
    })
}

/// What the model is asked.
struct Asked<'f> {
    flags: &'f flags::Run,
    tokens: Vec<u32>,
    sampling: Sampling,
    seed: u64,
    max_tokens: usize,
}

fn answer<D: Device>(
    mut engine: Engine<D>,
    asked: Asked<'_>,
    sampler: Sampler,
    control: &ControlTokens,
    report: Report,
    cancel: &Cancel,
) -> anyhow::Result<Outcome> {
    let Asked { flags, tokens, sampling, seed, max_tokens } = asked;
    let figures = if flags.raw {
        let stop = control.stop_set();
        answer_raw(&mut engine, &tokens, sampler, Limits { stop: &stop, max_tokens }, cancel)?
    } else {
        let parse = ParseOptions { thinking: !flags.talk.nothink, tools: None };
        let options = TurnOptions { parse, sampling, seed, max_tokens, ..TurnOptions::default() };
        engine.reply(&tokens, &options, cancel, &mut Screen::new(false))?.figures
    };
    engine.end_recording()?;
    figures.print_for_prompt(&engine, (sampling.temperature > 0.0).then_some(seed));
    report.tell(&engine.setting, &figures.prefill, &figures.decode)?;
    Ok(if figures.ended == Some(StopReason::Cancelled) { Outcome::Interrupted } else { Outcome::Done })
}

/// The prompt as text, from the command line or from standard input.
fn prompt_text(flags: &flags::Run) -> anyhow::Result<String> {
    let prompt = if flags.prompt == "-" { read_standard_input(flags.raw)? } else { flags.prompt.clone() };
    if prompt.is_empty() {
        anyhow::bail!(
            "found an empty prompt, expected some text. Give it as an argument, or with `-` on standard input"
        );
    }
    Ok(prompt)
}

fn read_standard_input(raw: bool) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes).map_err(|error| {
        anyhow::anyhow!("cannot read the prompt from standard input: {error}. Check where it comes from")
    })?;
    let mut prompt = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let byte = error.as_bytes()[at];
        anyhow::anyhow!(
            "standard input: found the byte 0x{byte:02x} at offset {at}, which is not UTF-8; expected a prompt in UTF-8. \
             Convert it, for instance with iconv"
        )
    })?;
    if !raw && prompt.ends_with('\n') {
        prompt.pop();
        if prompt.ends_with('\r') {
            prompt.pop();
        }
    }
    Ok(prompt)
}

/// The prompt as the model reads it.
fn encode(
    flags: &flags::Run,
    file: &ModelFile,
    tokenizer: &Tokenizer,
    context: Context,
    prompt: &str,
) -> anyhow::Result<Vec<u32>> {
    if flags.raw {
        return Ok(tokenizer.encode_with_control(prompt));
    }
    let encoding = setup::encoding(&flags.talk, file);
    let options = PromptOptions { encoding, mode: setup::mode(&flags.talk), drop_reasoning: true };
    let system = setup::system(&flags.talk, setup::most_text_bytes(tokenizer, context))?.map(Message::system);
    let messages: Vec<Message> = system.into_iter().chain([Message::user(prompt)]).collect();
    Ok(tokenizer.encode_segments(&render(tokenizer, &messages, &options)?))
}

/// Prints what the model generates exactly; a last line break is added only on a terminal.
fn answer_raw<D: Device>(
    engine: &mut Engine<D>,
    prompt: &[u32],
    mut sampler: Sampler,
    limits: Limits<'_>,
    cancel: &Cancel,
) -> anyhow::Result<Figures> {
    let mut figures = Figures::default();
    let Some(logits) = engine.read(prompt, cancel, &mut figures)? else { return Ok(figures) };
    let (meter, held) = (Meter::start(&engine.backend), engine.session.tokens().len());
    let mut characters = Utf8Stream::default();
    let mut unwritable = None;
    let Engine { backend, session, tokenizer, .. } = engine;
    let ended = generate(backend, session, logits, &mut sampler, limits, cancel, &mut |token| {
        figures.answer_tokens += 1;
        unwritable = write_raw(&characters.push(tokenizer.token_bytes(token))).err();
        if unwritable.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    if let Some(error) = unwritable {
        return Err(error.into());
    }
    let line_end = if Stream::Out.is_terminal() { "\n" } else { "" };
    write_raw(&(characters.finish() + line_end))?;
    figures.ended = Some(ended.map_err(|error| engine.name(error))?);
    figures.decode = meter.stop(&engine.backend, engine.session.tokens().len() - held);
    Ok(figures)
}

fn write_raw(text: &str) -> Result<(), WriteError> {
    match Stream::Out.is_terminal() {
        true => Stream::Out.write(&text.chars().map(harmless).collect::<String>()),
        false => Stream::Out.write(text),
    }
}
