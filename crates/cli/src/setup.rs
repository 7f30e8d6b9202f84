//! From flags to what a conversation begins with.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::Path;

use session::Sampling;
use text::prompt::{Effort, Encoding, Mode, Tool};

use crate::load::ModelFile;
use crate::{flags, terminal};

/// The prompt format that the flags name or the file's name suggests, told once; the built-in nano knows no difference.
pub fn encoding(flags: &flags::Talk, file: &ModelFile) -> Encoding {
    let file_name = flags.model.as_deref().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
    let (encoding, origin) = match flags.encoding {
        Some(encoding) => (encoding, ""),
        None => (Encoding::guess(&file_name), " (guessed from the file's name)"),
    };
    if flags.model.is_some() {
        terminal::dim_note(&terminal::escape_controls(&format!("model: {} | encoding {encoding}{origin}", file.name)));
    }
    encoding
}

/// Whether and how long the model is to reason.
pub fn mode(flags: &flags::Talk) -> Mode {
    if flags.nothink { Mode::Chat } else { Mode::Thinking { effort: flags.effort.map(Effort::from) } }
}

/// The system text: as it is given, or the contents of the file behind `@`.
pub fn system(flags: &flags::Talk) -> anyhow::Result<Option<String>> {
    match flags.system.as_deref() {
        Some(text) => match text.strip_prefix('@') {
            Some(path) => Ok(Some(read_text(Path::new(path))?)),
            None => Ok(Some(text.to_owned())),
        },
        None => Ok(None),
    }
}

/// The tools that a JSON file declares.
pub fn tools(path: &Path) -> anyhow::Result<Vec<Tool>> {
    let wrong = |error: &dyn std::fmt::Display| {
        anyhow::anyhow!(
            "{}: {error}. Expected an array of tools as OpenAI's API has them: \
             [{{\"type\": \"function\", \"function\": {{\"name\": …, \"parameters\": …}}}}, …]",
            path.display()
        )
    };
    let values: Vec<serde_json::Value> = serde_json::from_str(&read_text(path)?).map_err(|error| wrong(&error))?;
    values.into_iter().map(|value| Tool::from_value(value).map_err(|error| wrong(&error))).collect()
}

/// A whole text file.
pub fn read_text(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::InvalidData => {
            anyhow::anyhow!(
                "{}: found bytes that are not UTF-8, expected a text. Convert it, for instance with iconv",
                path.display()
            )
        }
        _ => anyhow::anyhow!("cannot read {}: {error}. Check that the path is right and readable", path.display()),
    })
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
