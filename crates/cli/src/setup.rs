//! From flags to what a conversation begins with.

use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{ErrorKind, Read};
use std::path::Path;

use session::{Context, Sampling};
use text::Tokenizer;
use text::prompt::{Effort, Encoding, Mode, Tool};

use crate::load::ModelFile;
use crate::{flags, terminal};

/// The prompt format that the flags name or the file's name suggests, told once; with the built-in
/// nano only if it was asked for.
pub fn encoding(flags: &flags::Talk, file: &ModelFile) -> Encoding {
    let file_name = flags.model.as_deref().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
    let (encoding, origin) = match flags.encoding {
        Some(encoding) => (encoding, ""),
        None => (Encoding::guess(&file_name), " (guessed from the file's name)"),
    };
    if flags.model.is_some() || flags.encoding.is_some() {
        terminal::dim_note(&terminal::escape_controls(&format!("model: {} | encoding {encoding}{origin}", file.name)));
    }
    encoding
}

/// Whether and how long the model is to reason.
pub fn mode(flags: &flags::Talk) -> Mode {
    if flags.nothink { Mode::Chat } else { Mode::Thinking { effort: flags.effort.map(Effort::from) } }
}

/// The system text: as it is given, or the contents of the file behind `@`, of at most `most_bytes`.
pub fn system(flags: &flags::Talk, most_bytes: u64) -> anyhow::Result<Option<String>> {
    match flags.system.as_deref() {
        Some(text) => match text.strip_prefix('@') {
            Some(path) => Ok(Some(read_text(Path::new(path), most_bytes)?)),
            None => Ok(Some(text.to_owned())),
        },
        None => Ok(None),
    }
}

/// The tools that a JSON file of at most `most_bytes` declares.
pub fn tools(path: &Path, most_bytes: u64) -> anyhow::Result<Vec<Tool>> {
    let wrong = |error: &dyn std::fmt::Display| {
        anyhow::anyhow!(
            "{}: {error}. Expected an array of tools as OpenAI's API has them: \
             [{{\"type\": \"function\", \"function\": {{\"name\": …, \"parameters\": …}}}}, …]",
            path.display()
        )
    };
    let values: Vec<serde_json::Value> =
        serde_json::from_str(&read_text(path, most_bytes)?).map_err(|error| wrong(&error))?;
    values.into_iter().map(|value| Tool::from_value(value).map_err(|error| wrong(&error))).collect()
}

/// A whole text file of at most `most_bytes`.
///
/// # Errors
/// It cannot be read, is no regular file, is longer, or is not UTF-8.
pub fn read_text(path: &Path, most_bytes: u64) -> anyhow::Result<String> {
    let name = path.display();
    let unreadable = |error| anyhow::anyhow!("cannot read {name}: {error}. Check that the path is right and readable");
    let file = open_regular(path).map_err(unreadable)?;
    let bytes = file.metadata().map_err(unreadable)?.len();
    if bytes > most_bytes {
        anyhow::bail!(
            "{name}: found {bytes} bytes, expected at most {most_bytes}: more cannot fit the context, whatever the text. \
             Use a shorter one, or a larger context with --ctx"
        );
    }
    let mut text = String::new();
    file.take(most_bytes).read_to_string(&mut text).map_err(|error| match error.kind() {
        ErrorKind::InvalidData => {
            anyhow::anyhow!(
                "{name}: found bytes that are not UTF-8, expected a text. Convert it, for instance with iconv"
            )
        }
        _ => unreadable(error),
    })?;
    Ok(text)
}

/// Opens a file that is no folder, device or pipe: those have no end, or block.
///
/// # Errors
/// It cannot be opened, or is something else.
pub fn open_regular(path: &Path) -> std::io::Result<File> {
    match std::fs::metadata(path)? {
        found if found.is_dir() => Err(std::io::Error::other("found a folder, expected a file")),
        found if !found.is_file() => Err(std::io::Error::other("found a pipe or a device, expected a regular file")),
        _ => File::open(path),
    }
}

/// Bytes above which no text fits the context, however it is cut into tokens.
pub fn most_text_bytes(tokenizer: &Tokenizer, context: Context) -> u64 {
    let longest = (0..tokenizer.vocab_size() as u32).map(|id| tokenizer.token_bytes(id).len()).max();
    (context.tokens() * longest.unwrap_or(0)) as u64
}

/// How tokens are chosen. The built-in nano is too small for chance.
pub fn sampling(flags: &flags::Talk) -> Sampling {
    let default_temperature = if flags.model.is_none() { 0.0 } else { 1.0 };
    Sampling {
        temperature: flags.temperature.unwrap_or(default_temperature),
        top_p: flags.top_p,
        min_p: flags.min_p,
        ..Sampling::default()
    }
}

/// A seed short enough to be typed again.
pub fn new_seed() -> u64 {
    RandomState::new().build_hasher().finish() >> 32
}
