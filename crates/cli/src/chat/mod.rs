//! `infall chat`: a conversation at the terminal, or line by line from a pipe.

mod calls;
mod commands;
mod conversation;
mod lines;
mod saved;

use std::path::Path;
use std::sync::Arc;

use model::Cancel;
use session::{Context, Sampler, Sampling, StopReason};
use text::Tokenizer;
use text::prompt::{AssistantMessage, Call, ControlTokens, Encoding, Message};

use crate::device::{Device, on_device};
use crate::engine::Engine;
use crate::figures::{Figures, tokens};
use crate::interrupt::Interrupts;
use crate::load::ModelFile;
use crate::output::Output;
use crate::placement::Work;
use crate::screen::{Part, Screen};
use crate::terminal::{self, Stream, dim_note, note};
use crate::{Outcome, flags, setup, stats};
use commands::{Asked, COMMANDS, Command, Named, is_command};
use conversation::{Change, Conversation, Given, Reply};
use lines::{Input, Lines};
use saved::Format;

/// Runs the command. What needs no weights is checked before they are loaded.
pub fn chat(flags: &flags::Chat) -> anyhow::Result<Outcome> {
    let lines = Lines::new();
    let interrupts = Interrupts::new(!lines.is_interactive())?;
    let prepared = Prepared::new(flags)?;
    on_device!(prepared.file.device(&prepared.work)?, |on: D| {
        let conversation = interrupts.during(|cancel| begin::<D>(flags, prepared, &on, cancel))?;
        converse(flags, conversation, lines, interrupts)
    })
}

fn converse<D: Device>(
    flags: &flags::Chat,
    conversation: Conversation<D>,
    lines: Lines,
    interrupts: Interrupts,
) -> anyhow::Result<Outcome> {
    let talk = &flags.talk;
    let encoding = talk.encoding;
    let mut chat = Chat { conversation, lines, interrupts, encoding, seed: talk.seed, folds: false };
    if let Some(path) = &flags.load {
        let reasons = talk.think || talk.effort.is_some();
        let thinks = if talk.nothink { Some(false) } else { reasons.then_some(true) };
        chat.load(path, Given { encoding, thinks, effort: talk.effort })?;
    }
    let outcome = chat.run()?;
    chat.conversation.engine.end_recording()?;
    Ok(outcome)
}

/// What needs no weights.
struct Prepared {
    file: ModelFile,
    tokenizer: Tokenizer,
    context: Context,
    instructions: Vec<Message>,
    sampling: Sampling,
    routes: Option<Output>,
    work: Work,
}

impl Prepared {
    fn new(flags: &flags::Chat) -> anyhow::Result<Prepared> {
        let talk = &flags.talk;
        let file = ModelFile::open(talk.model.as_deref())?;
        let tokenizer = file.tokenizer()?;
        ControlTokens::find(&tokenizer).map_err(|error| anyhow::anyhow!("{}: {error}", file.name))?;
        let context = Context::new(&file.model.config, talk.context_tokens)?;
        let most_bytes = setup::most_text_bytes(&tokenizer, context);
        let system = setup::system(talk, most_bytes)?;
        let tools = flags.tools.as_deref().map(|path| setup::tools(path, most_bytes)).transpose()?.unwrap_or_default();
        let sampling = setup::sampling(talk);
        Sampler::new(sampling, 0)?;
        let has_instructions = system.is_some() || !tools.is_empty();
        let content = system.unwrap_or_default();
        let instructions = has_instructions.then_some(Message::System { content, tools, response_format: None });
        let routes = talk.record.routes.as_deref().map(|path| Output::new(path, file.paths())).transpose()?;
        let work = Work::new(&talk.machine, context.tokens());
        let instructions = instructions.into_iter().collect();
        Ok(Prepared { file, tokenizer, context, instructions, sampling, routes, work })
    }
}

fn begin<D: Device>(
    flags: &flags::Chat,
    prepared: Prepared,
    on: &D::Adapter,
    cancel: &Arc<Cancel>,
) -> anyhow::Result<Conversation<D>> {
    let Prepared { file, tokenizer, context, instructions, sampling, routes, work } = prepared;
    let talk = &flags.talk;
    let encoding = setup::encoding(talk, &file);
    let mut engine = Engine::load(file, tokenizer, context, &work, on, cancel)?;
    routes.map_or(Ok(()), |output| engine.record_routes(output))?;
    let mut conversation = Conversation {
        engine,
        messages: instructions,
        format: Format { encoding, thinks: true, effort: None },
        sampling,
        max_tokens: talk.max_tokens.unwrap_or(usize::MAX),
        total: Figures::default(),
        replies: 0,
    };
    // A conversation to be loaded brings its own, to be checked together with what was given.
    if flags.load.is_none() {
        conversation.set_format(Format { encoding, thinks: !talk.nothink, effort: talk.effort })?;
    }
    Ok(conversation)
}

/// The conversation and the people in it.
struct Chat<D: Device> {
    conversation: Conversation<D>,
    lines: Lines,
    interrupts: Interrupts,
    /// The prompt format that a flag names; it stands above what a file says.
    encoding: Option<Encoding>,
    /// Of the next reply; `None` takes a new one each time.
    seed: Option<u64>,
    /// Whether reasoning is folded.
    folds: bool,
}

/// Whether the chat goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    Go,
    End(Outcome),
}

impl<D: Device> Chat<D> {
    fn run(&mut self) -> anyhow::Result<Outcome> {
        if self.lines.is_interactive() {
            dim_note("/help lists commands, Ctrl-C stops a reply, Ctrl-D ends");
        }
        loop {
            let next = match self.lines.message()? {
                Input::End => return Ok(Outcome::Done),
                Input::Interrupt => {
                    dim_note("Ctrl-D or /quit ends the chat");
                    Ok(Next::Go)
                }
                Input::Text(text) if text.trim().is_empty() => Ok(Next::Go),
                Input::Text(text) if is_command(&text) => match text.parse() {
                    Ok(command) => self.obey(command),
                    Err(error) => Err(anyhow::Error::from(error)),
                },
                Input::Text(text) => self.say(vec![Message::user(text)]),
            };
            match next {
                Ok(Next::Go) => (),
                Ok(Next::End(outcome)) => return Ok(outcome),
                // A person reads it and goes on; a script must not go on as if nothing had happened.
                Err(error) if self.lines.is_interactive() => terminal::error(&error),
                Err(error) => return Err(error),
            }
        }
    }

    fn obey(&mut self, command: Command) -> anyhow::Result<Next> {
        match command {
            Command::Help => help(),
            Command::Think(asked) => {
                let format = self.conversation.format;
                let effort = match asked {
                    Asked::AsBefore => format.effort,
                    Asked::Default => None,
                    Asked::Effort(effort) => Some(effort),
                };
                self.conversation.set_format(Format { thinks: true, effort, ..format })?;
                let effort = effort.map_or(String::new(), |effort| format!(", effort {effort}"));
                dim_note(&format!("reasons before answering{effort}"));
            }
            Command::Nothink => {
                self.conversation.set_format(Format { thinks: false, ..self.conversation.format })?;
                dim_note("answers at once");
            }
            Command::Fold => self.fold()?,
            Command::Read(path) => {
                let text = setup::read_text(&path, self.conversation.engine.most_text_bytes())?;
                dim_note(&format!(
                    "sending {} ({} lines)",
                    terminal::escape_controls(&path.display().to_string()),
                    text.lines().count()
                ));
                return self.say(vec![Message::user(text)]);
            }
            Command::Context(size) => self.context(size)?,
            Command::Save(path) => {
                self.conversation.save(&path)?;
                dim_note(&format!("saved {} and {}", self.messages(), tokens(self.held_tokens())));
            }
            Command::Load(path) => self.load(&path, Given { encoding: self.encoding, ..Given::default() })?,
            Command::Retry => return self.retry(),
            Command::New => {
                self.conversation.begin_anew();
                dim_note("began anew");
            }
            Command::Stats => self.stats(),
            Command::Quit => return Ok(Next::End(Outcome::Done)),
        }
        Ok(Next::Go)
    }

    /// Sends `news`, and the results of calls as long as the model makes some.
    fn say(&mut self, news: Vec<Message>) -> anyhow::Result<Next> {
        let (seed, mut screen) = (self.next_seed(), Screen::new(self.folds));
        let reply = self.interrupts.during(|cancel| self.conversation.say(news, seed, cancel, &mut screen))?;
        self.after(reply, seed)
    }

    /// Lets the model answer the last message anew.
    fn retry(&mut self) -> anyhow::Result<Next> {
        let (seed, mut screen) = (self.next_seed(), Screen::new(self.folds));
        let reply = self.interrupts.during(|cancel| self.conversation.retry(seed, cancel, &mut screen))?;
        self.after(reply, seed)
    }

    /// Shows what is left to show of a reply, and sees to its calls.
    fn after(&mut self, reply: Reply, seed: u64) -> anyhow::Result<Next> {
        let Reply { change, figures } = reply;
        let calls = if let Change::Said(said) = &change { &said.calls[..] } else { &[] };
        for call in calls {
            Stream::Out.write(&format!("→ {}\n", calls::pretty(call)))?;
        }
        let is_random = self.conversation.sampling.temperature > 0.0;
        figures.print_for_turn(&self.conversation.engine, is_random.then_some(seed));
        match &change {
            Change::Said(said) if said.malformed => {
                note("the model wrote a call that is cut off or not in its format: it was not made");
            }
            Change::Said(_) => (),
            Change::TakenBack => dim_note("nothing was said yet: your message was taken back"),
            Change::Unanswered => dim_note("nothing was said yet: the results stay, /retry sends them again"),
            Change::Nothing => dim_note("nothing was said yet: the conversation is as it was"),
        }
        match figures.ended {
            Some(StopReason::Cancelled) if !self.lines.is_interactive() => return Ok(Next::End(Outcome::Interrupted)),
            Some(StopReason::ContextFull) => note(
                "the context is full: /ctx N makes it larger (up to what the model was made for), /save FILE keeps the \
                 conversation, /new begins anew",
            ),
            _ => (),
        }
        if !calls.is_empty() {
            return self.results(calls);
        }
        if self.lines.is_interactive() {
            note("");
        }
        Ok(Next::Go)
    }

    /// Asks for the results of `calls` and sends them.
    fn results(&mut self, calls: &[Call]) -> anyhow::Result<Next> {
        let mut results = Vec::new();
        for call in calls {
            match self.lines.result(&calls::short(call))? {
                Input::Text(content) => results.push(Message::Tool { call_id: call.id.clone(), content }),
                Input::Interrupt => {
                    dim_note("the calls stay without results");
                    return Ok(Next::Go);
                }
                Input::End => return Ok(Next::End(Outcome::Done)),
            }
        }
        self.say(results)
    }

    /// Folds or shows reasoning; what was folded last is shown.
    fn fold(&mut self) -> anyhow::Result<()> {
        self.folds = !self.folds;
        if self.folds {
            dim_note("reasoning is folded; /fold shows it");
            return Ok(());
        }
        dim_note("reasoning is shown");
        let last = self.conversation.messages.iter().rev().find_map(|message| match message {
            Message::Assistant(AssistantMessage { reasoning, .. }) => Some(reasoning),
            _ => None,
        });
        let mut screen = Screen::new(false);
        screen.text(Part::Reasoning, last.map_or("", String::as_str))?;
        Ok(screen.end()?)
    }

    fn context(&mut self, size: Option<usize>) -> anyhow::Result<()> {
        if let Some(size) = size {
            self.conversation.engine.set_context(size)?;
        }
        dim_note(&format!("context: {} of {}", self.held_tokens(), tokens(self.conversation.engine.context.tokens())));
        Ok(())
    }

    /// Goes on with a saved conversation. A format guessed from the model's name yields to the file's.
    fn load(&mut self, path: &Path, given: Given) -> anyhow::Result<()> {
        let before = self.conversation.format.encoding;
        self.conversation.load(path, given)?;
        let encoding = self.conversation.format.encoding;
        if encoding != before {
            dim_note(&format!("encoding {encoding}, as the conversation was saved"));
        }
        dim_note(&format!("restored {} and {}, 0 read", self.messages(), tokens(self.held_tokens())));
        Ok(())
    }

    fn stats(&self) {
        let Conversation { engine, total, replies, format: Format { thinks, effort, .. }, .. } = &self.conversation;
        let effort = effort.map_or(String::new(), |effort| format!(", effort {effort}"));
        note(&format!("messages    {}", self.messages()));
        note(&format!("context     {} of {}", self.held_tokens(), tokens(engine.context.tokens())));
        note(&format!("reasoning   {}{effort}", if *thinks { "on" } else { "off" }));
        note(&format!("replies     {replies}"));
        note(&format!("read        {}", total.read()));
        note(&format!("generated   {}", total.generated()));
        note(&format!("weights     {}", terminal::bytes(engine.backend.weight_bytes())));
        note(&format!("session     {}", terminal::bytes(engine.session_bytes())));
        note(&format!("computing   {}", engine.setting.line()));
        stats::print(&engine.setting, &total.prefill, &total.decode);
    }

    fn held_tokens(&self) -> usize {
        self.conversation.engine.session.tokens().len()
    }

    /// `3 messages`.
    fn messages(&self) -> String {
        match self.conversation.messages.len() {
            1 => "1 message".into(),
            count => format!("{count} messages"),
        }
    }

    fn next_seed(&mut self) -> u64 {
        match &mut self.seed {
            Some(next) => {
                let seed = *next;
                *next = seed.wrapping_add(1);
                seed
            }
            None => setup::new_seed(),
        }
    }
}

fn help() {
    for Named { name, argument, help, .. } in COMMANDS {
        note(&format!("{:<30}{help}", format!("{name} {argument}")));
    }
    dim_note(
        "A line that ends in \\, or Alt-Enter, goes on in the next one. Pasted lines stay together. Ctrl-R searches the \
         history, Tab completes commands and files. Ctrl-C stops a reply, a second one ends the program.",
    );
}
