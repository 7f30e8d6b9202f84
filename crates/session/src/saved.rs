//! A session as bytes: its tokens and its state, so that a conversation goes on without being read again.
//!
//! ```text
//! "infallSE" | version u32 | tokens: count u64, each u32
//! state, in the backends' common format (docs/formats.md)
//! XXH3-64 of everything before it, u64
//! ```
//! Integers are little endian. The reader is left right behind the checksum, so more may follow. The state ends with a CRC-32 of
//! its own; a second one over the whole would not tie the two together: behind data and its CRC-32, a CRC-32 no longer
//! depends on the data.

use std::io::{self, Read, Write};

use model::Backend;
use xxhash_rust::xxh3::Xxh3;

use crate::{Context, Error, Session};

const MAGIC: &[u8; 8] = b"infallSE";
const VERSION: u32 = 2;

/// Why bytes could not be turned into a session.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// The bytes could not be read.
    #[error("the saved session could not be read: {0}. It may be truncated; it was not used")]
    Io(#[from] io::Error),
    /// These are not the bytes of a session.
    #[error("this is not a saved session: it begins with {found:02x?}, expected {MAGIC:02x?} (\"infallSE\")")]
    NotASession {
        /// The first eight bytes.
        found: [u8; 8],
    },
    /// Another version of the format.
    #[error(
        "the saved session has format version {found}, this program reads version {VERSION}: read the conversation anew"
    )]
    Version {
        /// The version found.
        found: u32,
    },
    /// More tokens than the context allows.
    #[error("the saved session holds {found} tokens, expected at most {limit}, the context: choose a larger context")]
    TooLong {
        /// Its tokens.
        found: u64,
        /// The context.
        limit: usize,
    },
    /// A token that the model does not have.
    #[error("the saved session holds token {found}, expected less than {vocab_size}: it was made with another model")]
    Token {
        /// The token.
        found: u32,
        /// The model's vocabulary.
        vocab_size: usize,
    },
    /// The bytes changed since they were written.
    #[error("the saved session is damaged: its checksum is {computed:016x}, expected {stored:016x}; it was not used")]
    Checksum {
        /// Of the bytes read.
        computed: u64,
        /// As written.
        stored: u64,
    },
    /// Tokens and state are not of one session.
    #[error("the saved session has {tokens} tokens but a state after {state}: it is damaged and was not used")]
    OutOfStep {
        /// Number of tokens.
        tokens: usize,
        /// Tokens that the state has seen.
        state: usize,
    },
}

impl<B: Backend> Session<B> {
    /// Writes the session. Loading it gives one that goes on with the same bits, rewinding included.
    ///
    /// # Errors
    /// [`Error::Save`] or [`Error::Model`] if `to` fails.
    pub fn save(&self, backend: &B, to: &mut dyn Write) -> Result<(), Error> {
        let mut to = Hashed { inner: to, hash: Xxh3::new() };
        let mut head = [&MAGIC[..], &VERSION.to_le_bytes(), &(self.tokens().len() as u64).to_le_bytes()].concat();
        head.extend(self.tokens().iter().flat_map(|token| token.to_le_bytes()));
        to.write_all(&head).map_err(Error::Save)?;
        backend.export(self.state(), &mut to)?;
        to.inner.write_all(&to.hash.digest().to_le_bytes()).map_err(Error::Save)
    }

    /// Reads a session that [`Session::save`] wrote, for the same model file and arithmetic on any backend. It may have been
    /// saved with another `context` if it fits this one.
    ///
    /// # Errors
    /// [`Error::Saved`] or [`Error::Model`] if the bytes are not a session, are damaged or do not fit.
    pub fn load(backend: &B, context: Context, from: &mut dyn Read) -> Result<Session<B>, Error> {
        let mut from = Hashed { inner: from, hash: Xxh3::new() };
        let tokens = read_tokens(&mut from, context.tokens())?;
        let state = backend.import(&mut from)?;
        let mut stored = [0; 8];
        from.inner.read_exact(&mut stored).map_err(SavedError::Io)?;
        let (stored, computed) = (u64::from_le_bytes(stored), from.hash.digest());
        if stored != computed {
            return Err(SavedError::Checksum { computed, stored }.into());
        }
        let vocab_size = backend.config().vocab_size;
        if let Some(&found) = tokens.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(SavedError::Token { found, vocab_size }.into());
        }
        let reached = backend.position(&state);
        if reached != tokens.len() {
            return Err(SavedError::OutOfStep { tokens: tokens.len(), state: reached }.into());
        }
        Ok(Session::from_parts(tokens, state, context))
    }
}

/// Everything before the state.
fn read_tokens(from: &mut impl Read, limit: usize) -> Result<Vec<u32>, SavedError> {
    let mut head = [0; 20];
    from.read_exact(&mut head[..8])?;
    let found: [u8; 8] = head[..8].try_into().expect("eight bytes");
    if &found != MAGIC {
        return Err(SavedError::NotASession { found });
    }
    from.read_exact(&mut head[8..])?;
    let found = u32::from_le_bytes(head[8..12].try_into().expect("four bytes"));
    if found != VERSION {
        return Err(SavedError::Version { found });
    }
    let found = u64::from_le_bytes(head[12..].try_into().expect("eight bytes"));
    if found > limit as u64 {
        return Err(SavedError::TooLong { found, limit });
    }
    let mut bytes = vec![0; 4 * found as usize];
    from.read_exact(&mut bytes)?;
    Ok(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

/// A reader or writer with the checksum of what went through it.
struct Hashed<T> {
    inner: T,
    hash: Xxh3,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(bytes)?;
        self.hash.update(&bytes[..count]);
        Ok(count)
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hash.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
