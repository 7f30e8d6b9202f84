//! A conversation in a file: its messages, and the session that has read them.
//!
//! ```text
//! "infallCH" | version u32 | length u64 | JSON of so many bytes | CRC-32 of everything before it, u32
//! session, in its own format with checksums of its own (docs/formats.md)
//! ```
//! Integers are little endian.

use std::io::{BufReader, Read};
use std::path::Path;

use model::Backend;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use session::{Context, Session};
use text::prompt::{Encoding, Message};

use crate::flags::Effort;
use crate::output::Output;
use crate::setup;

const MAGIC: &[u8; 8] = b"infallCH";
const VERSION: u32 = 2;

/// What is saved besides the session.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// All messages, the system text and the tools among them.
    pub messages: Vec<Message>,
    /// How they become a prompt.
    #[serde(flatten)]
    pub format: Format,
}

/// How messages become a prompt. A session holds the tokens of one format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Format {
    /// The prompt format of the weights.
    #[serde(serialize_with = "write_encoding", deserialize_with = "read_encoding")]
    pub encoding: Encoding,
    /// Whether the next reply reasons first.
    pub thinks: bool,
    /// How long it is asked to.
    pub effort: Option<Effort>,
}

fn write_encoding<S: Serializer>(encoding: &Encoding, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(encoding)
}

fn read_encoding<'de, D: Deserializer<'de>>(from: D) -> Result<Encoding, D::Error> {
    String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
}

/// Why a file is no saved conversation.
#[derive(Debug, thiserror::Error)]
enum SavedError {
    #[error("it cannot be read: {0}. Check the path and the permissions")]
    Io(#[from] std::io::Error),
    #[error("found {found:02x?} at its beginning, expected {MAGIC:02x?} (\"infallCH\"): `/save` did not write it")]
    NotAConversation { found: Vec<u8> },
    #[error("found format version {found}, this program reads version {VERSION}. Use the infall that wrote it")]
    Version { found: u32 },
    #[error("it ends too early, or its checksum does not fit: it is damaged and was not used. Use another copy")]
    Damaged,
    #[error("its messages cannot be understood: {0}. It is damaged or was written by another version of infall")]
    Messages(#[from] serde_json::Error),
}

impl Saved {
    /// Writes the conversation to `path`, whole or not at all.
    ///
    /// # Errors
    /// The file cannot be written, or what is there is no conversation.
    pub fn write<B: Backend>(&self, session: &Session<B>, backend: &B, path: &Path) -> anyhow::Result<()> {
        if path.exists() && !is_conversation(path) {
            anyhow::bail!(
                "{}: found something that `/save` did not write, and left it as it is. Choose another name",
                path.display()
            );
        }
        let json = serde_json::to_vec(self)?;
        let mut head = [&MAGIC[..], &VERSION.to_le_bytes(), &(json.len() as u64).to_le_bytes(), &json].concat();
        head.extend(crc32fast::hash(&head).to_le_bytes());
        Output::new(path, [])?.write(|out| {
            out.write_all(&head).map_err(crate::terminal::WriteError::to(path))?;
            Ok(session.save(backend, out)?)
        })
    }

    /// Reads the conversation at `path`, saved with the model of `backend`.
    ///
    /// # Errors
    /// The file cannot be read, is no saved conversation, is damaged, or belongs to another model.
    pub fn read<B: Backend>(path: &Path, backend: &B, context: Context) -> anyhow::Result<(Saved, Session<B>)> {
        let named = |error: &dyn std::fmt::Display| anyhow::anyhow!("{}: {error}", path.display());
        let file = setup::open_regular(path).map_err(|error| named(&SavedError::Io(error)))?;
        let mut from = BufReader::new(file);
        let saved = read_head(&mut from).map_err(|error| named(&error))?;
        let session = Session::load(backend, context, &mut from).map_err(|error| named(&error))?;
        Ok((saved, session))
    }
}

/// Whether the file begins as a saved conversation does.
fn is_conversation(path: &Path) -> bool {
    let mut magic = [0; MAGIC.len()];
    setup::open_regular(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == *MAGIC
}

/// Everything before the session.
fn read_head(from: &mut dyn Read) -> Result<Saved, SavedError> {
    let mut head = Vec::new();
    from.take(8 + 4 + 8).read_to_end(&mut head)?;
    if !head.starts_with(MAGIC) {
        head.truncate(MAGIC.len());
        return Err(SavedError::NotAConversation { found: head });
    }
    let (Some(version), Some(length)) = (head.get(8..12), head.get(12..20)) else { return Err(SavedError::Damaged) };
    let found = u32::from_le_bytes(version.try_into().expect("four bytes"));
    if found != VERSION {
        return Err(SavedError::Version { found });
    }
    let length = u64::from_le_bytes(length.try_into().expect("eight bytes"));
    from.take(length).read_to_end(&mut head)?;
    let mut stored = Vec::new();
    from.take(4).read_to_end(&mut stored)?;
    if stored != crc32fast::hash(&head).to_le_bytes() {
        return Err(SavedError::Damaged);
    }
    Ok(serde_json::from_slice(&head[20..])?)
}
