//! From a path to a model that can be run.

use std::path::Path;
use std::sync::Arc;

use cpu::{CpuBackend, Options};
use gguf::{Gguf, Metadata};
use model::{Cancel, Config, Model};
use store::{ExpertExtents, Source, StoreError, TraceHeader};
use text::{Tokenizer, TokenizerData};

use crate::device::{self, Chosen, Device, Loading};
use crate::placement::{Setting, Work};
use crate::seal;
use crate::terminal::{self, Unit};

/// The model that is part of the program (models/nano).
static NANO: &[u8] = include_bytes!("../../../models/nano.gguf");
const NANO_NAME: &str = "the built-in nano";

/// A model file whose header has been read and understood, but no weight.
pub struct ModelFile {
    /// How messages call it: its path.
    pub name: String,
    /// Its header.
    pub header: Gguf,
    /// What the header means.
    pub model: Model,
    source: Source,
    is_built_in: bool,
}

impl ModelFile {
    /// The file at `path`, or the built-in nano, which says so.
    ///
    /// # Errors
    /// The file cannot be read, or is not a model this program runs.
    pub fn open(path: Option<&Path>) -> anyhow::Result<ModelFile> {
        let (name, header, source) = match path {
            Some(path) => {
                let header = Gguf::open(path)?;
                let source = Source::open(header.files.iter().map(|part| (&part.path, part.bytes)))?;
                (path.display().to_string(), header, source)
            }
            None => {
                terminal::dim_note(
                    "model: the built-in nano, a small test model that knows little; -m FILE.gguf runs another",
                );
                (NANO_NAME.to_owned(), Gguf::parse(NANO_NAME, NANO)?, Source::from_image(NANO_NAME, NANO))
            }
        };
        let model = Model::from_gguf(&header).map_err(|error| in_file(&name, error))?;
        Ok(ModelFile { name, header, model, source, is_built_in: path.is_none() })
    }

    /// The vocabulary.
    ///
    /// # Errors
    /// The file has none, or it is not the model's.
    pub fn tokenizer(&self) -> anyhow::Result<Tokenizer> {
        tokenizer(&self.name, &self.header.metadata, &self.model.config)
    }

    /// The device that `work` is done on; a line tells why where that is out of the ordinary.
    ///
    /// # Errors
    /// There is no such device, or it cannot run the model.
    pub fn device(&self, work: &Work) -> anyhow::Result<Chosen> {
        let (chosen, why) = device::choose(&self.header, &self.model, self.is_built_in, work)?;
        why.iter().for_each(|why| terminal::dim_note(why));
        Ok(chosen)
    }

    /// Reads the weights that are to be in memory, as the plan for `work` says, and tells what it warns of and why
    /// another reader than the fastest is used where that matters.
    ///
    /// # Errors
    /// There is no plan, a read failed, a weight holds what no model can have, or `cancel` came.
    pub fn load<D: Device>(&self, work: &Work, on: &D::Adapter, cancel: &Arc<Cancel>) -> anyhow::Result<(D, Setting)> {
        let plans = D::plan(on, &self.header, &self.model, work)
            .map_err(|error| anyhow::anyhow!("{}: {error:#}", self.name))?;
        let checksums = if plans.read_the_file() { seal::of(self)? } else { None };
        plans.warnings().for_each(|warning| terminal::note(&format!("warning: {warning}")));
        let loading = Loading { work, plans: &plans, checksums, cancel: cancel.clone() };
        let backend = self.with_bar(|loaded| D::load(on, &self.model, &self.source, loading, loaded))?;
        if let (true, Some(note)) = (plans.read_the_file(), backend.note()) {
            terminal::dim_note(note);
        }
        let setting = Setting::new(work.precision, &plans, &backend);
        Ok((backend, setting))
    }

    /// Where the experts of each layer are in the model's files.
    pub(crate) fn experts(&self) -> Vec<ExpertExtents> {
        self.model.experts.iter().map(|layer| layer.extents).collect()
    }

    /// The model's files.
    pub(crate) fn source(&self) -> &Source {
        &self.source
    }

    /// Reads the weights with any options of the CPU backend.
    ///
    /// # Errors
    /// A read failed, or a weight holds what no model can have.
    pub fn load_with(&self, options: Options) -> anyhow::Result<CpuBackend> {
        self.with_bar(|loaded| CpuBackend::load(&self.model, &self.source, options, loaded))
    }

    /// What `load` loads, which tells the bytes of each tensor as it arrives. On a terminal a bar shows how far that is.
    fn with_bar<D>(&self, load: impl FnOnce(&mut dyn FnMut(u64)) -> Result<D, model::Error>) -> anyhow::Result<D> {
        let bar = terminal::progress("loading", self.weight_bytes(), Unit::Bytes);
        let backend = load(&mut |bytes| bar.inc(bytes));
        bar.finish_and_clear();
        backend.map_err(|error| in_file(&self.name, error))
    }

    /// The header of a file of routes of this model.
    ///
    /// # Errors
    /// A read failed.
    pub(crate) fn trace_header(&self) -> Result<TraceHeader, StoreError> {
        Ok(model::trace_header(&self.model, self.source.identity()?))
    }

    /// Which files these are, by their sizes and samples of them.
    ///
    /// # Errors
    /// A read failed.
    pub(crate) fn identity(&self) -> Result<u128, StoreError> {
        self.source.identity()
    }

    /// Where it is, for what must not be written over.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.header.files.iter().map(|part| part.path.as_path())
    }

    /// Bytes of the tensors that are loaded.
    fn weight_bytes(&self) -> u64 {
        let used = self.header.tensors.iter().filter(|tensor| !self.model.unused.contains(&tensor.name));
        used.map(|tensor| tensor.size_bytes().unwrap_or(0)).sum()
    }
}

/// Names the file in an error that does not do so itself.
pub(crate) fn in_file(name: &str, error: model::Error) -> anyhow::Error {
    match error {
        model::Error::Metadata(_) | model::Error::Store(_) | model::Error::Cancelled => error.into(),
        model::Error::NotFinite { .. } => {
            anyhow::anyhow!("{name}: {error} (`infall inspect --check {name}` names the tensor)")
        }
        _ => anyhow::anyhow!("{name}: {error}"),
    }
}

/// The vocabulary in a file's metadata, which must be the one its model was made for.
pub(crate) fn tokenizer(name: &str, metadata: &Metadata, config: &Config) -> anyhow::Result<Tokenizer> {
    let strings = |key: &str| Ok::<_, gguf::Error>(metadata.str_array(key)?.iter().map(str::to_owned).collect());
    let data = TokenizerData {
        tokens: strings("tokenizer.ggml.tokens")?,
        token_types: metadata.i64_array("tokenizer.ggml.token_type")?.into_iter().map(|ty| ty as i32).collect(),
        merges: strings("tokenizer.ggml.merges")?,
        pre: metadata.str("tokenizer.ggml.pre")?.to_owned(),
        bos: metadata.u32("tokenizer.ggml.bos_token_id")?,
        eos: metadata.u32("tokenizer.ggml.eos_token_id")?,
    };
    let tokenizer = Tokenizer::new(data).map_err(|error| anyhow::anyhow!("{name}: {error}"))?;
    if tokenizer.vocab_size() != config.vocab_size {
        anyhow::bail!(
            "{name}: the vocabulary has {} tokens, expected the {} for which the model has embeddings. Metadata and \
             tensors do not belong together; convert or download the file again",
            tokenizer.vocab_size(),
            config.vocab_size
        );
    }
    Ok(tokenizer)
}
