//! `infall serve`: a model for other programs.
//!
//! The calling thread loads and computes; the server has threads of its own and knows only the engine's handle.

mod config;
mod signals;

use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use model::Cancel;
use server::{Facts, Figures, Shutdown, Wiring};
use session::database::Database;
use session::engine::{COMMON_SESSIONS, Engine, EngineOptions, Runner};
use session::replay::Replay;
use session::snapshots::{Binding, Snapshots};
use session::{Context, Vocabulary};
use text::prompt::Encoding;

use self::config::Config;
use crate::device::{Device, on_device};
use crate::load::ModelFile;
use crate::placement::{Setting, Work};
use crate::terminal::{self, Stream};
use crate::{Outcome, flags, memory};

/// Tokens of a session where nothing is said: what coding agents use, at a bounded cost of memory.
const CONTEXT_TOKENS: usize = 131_072;
/// Layers of the two models that were published (docs/spec/model.md).
const FLASH_LAYERS: usize = 43;
const PRO_LAYERS: usize = 61;

/// Runs the command. What needs no weights is checked before they are loaded.
pub fn serve(flags: &flags::Serve) -> anyhow::Result<Outcome> {
    let config = Config::new(flags)?;
    if flags.print_config {
        Stream::Out.write(&config.text()?)?;
        return Ok(Outcome::Done);
    }
    let machine = config.machine(&flags.machine)?;
    let file = ModelFile::open(config.model.as_deref())?;
    let encoding = encoding(&config)?;
    let model_tokens = file.model.config.context_length;
    let context = Context::new(&file.model.config, Some(config.ctx.unwrap_or(model_tokens.min(CONTEXT_TOKENS))))?;
    let vocabulary = Vocabulary::new(Arc::new(file.tokenizer()?));
    let vocabulary = vocabulary.map_err(|error| anyhow::anyhow!("{}: {error}", file.name))?;
    let listener = server::bind(&config.server)?;
    let (snapshot_bytes, database) = (config.snapshot_bytes()?, database(&config)?);
    let (cancel, shutdown) = (Arc::new(Cancel::default()), Shutdown::new());
    signals::stop_on_signals(cancel.clone(), shutdown.clone())?;

    let work =
        Work { sessions: config.sessions.get(), clones: COMMON_SESSIONS, ..Work::new(&machine, context.tokens()) };
    let start = Start {
        config,
        file,
        encoding,
        context,
        vocabulary: Arc::new(vocabulary),
        database,
        snapshot_bytes,
        listener,
        cancel,
        shutdown,
    };
    on_device!(start.file.device(&work)?, |on: D| {
        let (backend, setting) = start.file.load::<D>(&work, &on, &start.cancel)?;
        start.run(Arc::new(backend), &setting, &work)
    })
}

/// The prompt format, told as `infall run` does.
fn encoding(config: &Config) -> anyhow::Result<Encoding> {
    let file_name = config.model.as_deref().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
    Ok(config.encoding()?.unwrap_or_else(|| {
        let guess = Encoding::guess(&file_name);
        if config.model.is_some() {
            terminal::dim_note(&format!("encoding {guess} (guessed from the file's name)"));
        }
        guess
    }))
}

/// What is remembered of answers: in the folder that was named, or in memory as long as the program runs.
fn database(config: &Config) -> anyhow::Result<Database> {
    let Some(dir) = &config.snapshot_dir else { return Ok(Database::in_memory()) };
    let (database, aside) = Database::open(dir)?;
    aside.into_iter().for_each(|aside| terminal::note(&format!("warning: {aside}")));
    Ok(database)
}

/// A server that is about to begin.
struct Start {
    config: Config,
    file: ModelFile,
    encoding: Encoding,
    context: Context,
    vocabulary: Arc<Vocabulary>,
    database: Database,
    snapshot_bytes: u64,
    listener: TcpListener,
    cancel: Arc<Cancel>,
    shutdown: Shutdown,
}

impl Start {
    /// Serves until a signal comes. Conversations that are worth it are saved then.
    fn run<D: Device + Send + Sync + 'static>(
        self,
        backend: Arc<D>,
        setting: &Setting,
        work: &Work,
    ) -> anyhow::Result<Outcome>
    where
        D::State: Send,
    {
        server::log::start(self.config.server.log);
        let identity = self.file.identity()?;
        let snapshots = self.snapshots(&*backend, identity, work)?;
        let options =
            EngineOptions { context: self.context, sessions: self.config.sessions.get(), queue: self.config.queue };
        let (engine, runner) = Engine::new(options);
        let wiring = Wiring {
            engine: engine.clone(),
            vocabulary: self.vocabulary.clone(),
            replay: Replay::new(&self.database, identity),
            database: self.database.clone(),
            facts: self.facts(setting),
            figures: figures(backend.clone()),
        };
        let (options, listener, shutdown) = (self.config.server.clone(), self.listener, self.shutdown.clone());
        let scheme = if options.tls_key.is_some() { "https" } else { "http" };
        terminal::note(&format!(
            "serving {} at {scheme}://{} | {} | {} sessions of {} tokens",
            wiring.facts.name,
            listener.local_addr()?,
            setting.line(),
            self.config.sessions,
            self.context.tokens()
        ));
        let server = thread::Builder::new().name("infall-server".into()).spawn(move || {
            // Where nothing is served the engine would wait for ever.
            let _last = Last(|| engine.stop());
            server::serve(wiring, options, listener, &shutdown)
        })?;
        compute(runner, &*backend, snapshots, &self.shutdown);
        match server.join() {
            Ok(served) => served?,
            Err(_) => anyhow::bail!("the server's thread has panicked; its message says more"),
        }
        Ok(Outcome::Done)
    }

    /// Where conversations' states are kept, if a folder was named.
    fn snapshots<D: Device>(&self, backend: &D, identity: u128, work: &Work) -> anyhow::Result<Option<Snapshots>> {
        let Some(dir) = &self.config.snapshot_dir else { return Ok(None) };
        let binding = Binding {
            identity,
            arithmetic: work.arithmetic,
            precision: work.precision,
            backend: backend.name().unwrap_or_else(|| "cpu".into()),
            encoding: self.encoding,
        };
        let (snapshots, asides) = Snapshots::open(dir, self.snapshot_bytes, &binding, &self.database)?;
        asides.into_iter().for_each(|aside| terminal::note(&format!("warning: {aside}")));
        Ok(Some(snapshots))
    }

    fn facts(&self, setting: &Setting) -> Facts {
        let is_built_in = self.config.model.is_none();
        let (id, name) = match (is_built_in, self.file.model.config.layers) {
            (true, _) => ("infall-nano", "the built-in nano"),
            (false, FLASH_LAYERS) => ("deepseek-v4-flash", "DeepSeek V4 Flash"),
            (false, PRO_LAYERS) => ("deepseek-v4-pro", "DeepSeek V4 PRO"),
            (false, _) => ("deepseek-v4", "a DeepSeek V4 of another size"),
        };
        Facts {
            id: id.into(),
            name: name.into(),
            encoding: self.encoding,
            precision: setting.precision.into(),
            arithmetic: "official".into(),
            device: setting.device.clone().unwrap_or_else(|| "cpu".into()),
            experts: setting.experts.into(),
            temperature: if is_built_in { 0.0 } else { 1.0 },
            file_bytes: self.file.header.files.iter().map(|part| part.bytes).sum(),
        }
    }
}

/// Computes until the server ends; whatever happens, the server is told to end then.
fn compute<D: Device + Sync + 'static>(runner: Runner, backend: &D, snapshots: Option<Snapshots>, shutdown: &Shutdown)
where
    D::State: Send,
{
    let _last = Last(|| shutdown.trigger());
    runner.run(backend, snapshots);
}

/// What is done at the end of a scope, be it by a panic.
struct Last<F: Fn()>(F);

impl<F: Fn()> Drop for Last<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// What the server tells of the backend.
fn figures<D: Device + Send + Sync + 'static>(backend: Arc<D>) -> Arc<dyn Fn() -> Figures + Send + Sync> {
    Arc::new(move || {
        let counts = backend.counts();
        Figures {
            experts_hits: counts.slots.cache.hits + counts.slots.cache.prefetch_hits,
            experts_misses: counts.slots.cache.misses,
            experts_read_bytes: counts.file_bytes(),
            memory_bytes: memory::resident_bytes().unwrap_or(0),
        }
    })
}
