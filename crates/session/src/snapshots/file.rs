//! A snapshot's file: what it is, then the bytes of [`Session::save`](crate::Session::save).
//!
//! ```text
//! "infallSN" | version u32 (1) | kind u32 | binding [32] | id [32] | tokens u64 | saved, seconds since 1970 u64
//! bytes of the session u64, their XXH3-64 u64 | XXH3-64 of everything before it, u64
//! a saved session
//! ```
//! Integers are little endian. A file grows under another name; its header is written last, and it gets its own name when all of it is on
//! the disk.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use model::Backend;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::{Kind, SnapshotId, SnapshotsError};
use crate::database::private;
use crate::{Context, Error, Session};

const MAGIC: &[u8; 8] = b"infallSN";
const VERSION: u32 = 1;
/// Bytes before the session.
pub const HEADER_BYTES: u64 = 120;
const BUFFER_BYTES: usize = 1 << 20;

/// What stands before a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub kind: Kind,
    pub binding: [u8; 32],
    pub id: SnapshotId,
    pub tokens: u64,
    pub saved_s: u64,
    /// Bytes of the session.
    pub bytes: u64,
    /// Their checksum.
    pub checksum: u64,
}

impl Header {
    fn to_bytes(self) -> Vec<u8> {
        let mut bytes = [&MAGIC[..], &VERSION.to_le_bytes(), &u32::from(self.kind.number()).to_le_bytes()].concat();
        bytes.extend([self.binding, self.id.0].concat());
        for number in [self.tokens, self.saved_s, self.bytes, self.checksum] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(xxh3_64(&bytes).to_le_bytes());
        bytes
    }

    /// The header, or what is wrong with it.
    fn from_bytes(bytes: &[u8]) -> Result<Header, String> {
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let digest_at = |at: usize| bytes[at..at + 32].try_into().expect("32 bytes");
        if &bytes[..8] != MAGIC {
            return Err(format!("it begins with {:02x?}, expected {MAGIC:02x?} (\"infallSN\")", &bytes[..8]));
        }
        if u32_at(8) != VERSION {
            return Err(format!("it has format version {}, this program reads version {VERSION}", u32_at(8)));
        }
        let end = bytes.len() - 8;
        if xxh3_64(&bytes[..end]) != u64_at(end) {
            return Err("its header's checksum is wrong".into());
        }
        let kind = u8::try_from(u32_at(12)).ok().and_then(Kind::from_number).ok_or("its kind is none")?;
        let [tokens, saved_s, bytes, checksum] = [80, 88, 96, 104].map(u64_at);
        Ok(Header { kind, binding: digest_at(16), id: SnapshotId(digest_at(48)), tokens, saved_s, bytes, checksum })
    }
}

/// Bytes that [`Session::save`] would write.
pub fn session_bytes<B: Backend>(backend: &B, session: &Session<B>) -> Result<u64, Error> {
    let mut counted = Hashed::new(io::sink());
    session.save(backend, &mut counted)?;
    Ok(counted.bytes)
}

/// Writes `session` to a new file at `path`, all of it on the disk when this returns. `header` lacks the session's bytes and checksum.
pub fn write<B: Backend>(
    path: &Path,
    header: Header,
    backend: &B,
    session: &Session<B>,
) -> Result<u64, SnapshotsError> {
    let failed = |source| SnapshotsError::Io { path: path.to_owned(), source };
    let create = || private(OpenOptions::new().write(true).create(true).truncate(true)).open(path);
    let mut file = create().map_err(failed)?;
    file.seek(SeekFrom::Start(HEADER_BYTES)).map_err(failed)?;
    let mut to = Hashed::new(BufWriter::with_capacity(BUFFER_BYTES, &mut file));
    let written = session.save(backend, &mut to).map_err(|source| match source {
        Error::Save(source) | Error::Model(model::Error::Export(source)) => failed(source),
        source => SnapshotsError::Session { path: path.to_owned(), source },
    });
    let flushed = to.inner.flush();
    written?;
    flushed.map_err(failed)?;
    let (bytes, checksum) = (to.bytes, to.hash.digest());
    drop(to);
    let mut finish = || {
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&Header { bytes, checksum, ..header }.to_bytes())?;
        file.sync_all()
    };
    finish().map_err(failed)?;
    Ok(HEADER_BYTES + bytes)
}

/// The header of the file at `path` if the file is as long as it says, or what is wrong.
pub fn read_header(path: &Path) -> Result<Header, String> {
    let header = File::open(path).and_then(|mut file| header_of(&mut file));
    header.map_err(|error| format!("it could not be read ({error})"))?
}

fn header_of(file: &mut File) -> io::Result<Result<Header, String>> {
    let found = file.metadata()?.len();
    if found < HEADER_BYTES {
        return Ok(Err(format!("it has {found} bytes, which is less than its header")));
    }
    let mut bytes = [0; HEADER_BYTES as usize];
    file.read_exact(&mut bytes)?;
    let header = Header::from_bytes(&bytes);
    Ok(header.and_then(|header| match HEADER_BYTES.checked_add(header.bytes) {
        Some(expected) if expected == found => Ok(header),
        _ => Err(format!("it has {found} bytes, expected {} and {HEADER_BYTES}", header.bytes)),
    }))
}

/// Why a session could not be read.
pub enum ReadError {
    /// The disk did not give it.
    Io(io::Error),
    /// The file is not as it was written.
    Damaged(String),
    /// The file is good, but cannot be used here.
    Session(Error),
}

/// Reads the session in the file at `path`, which must be the snapshot `id`.
pub fn read<B: Backend>(path: &Path, id: SnapshotId, backend: &B, context: Context) -> Result<Session<B>, ReadError> {
    let mut file = File::open(path).map_err(ReadError::Io)?;
    let header = header_of(&mut file).map_err(ReadError::Io)?.map_err(ReadError::Damaged)?;
    if header.id != id {
        return Err(ReadError::Damaged(format!("it is the snapshot {}", header.id)));
    }
    let mut from = Hashed::new(BufReader::with_capacity(BUFFER_BYTES, file).take(header.bytes));
    let session = Session::load(backend, context, &mut from);
    // The checksum says whether it was the file's fault.
    io::copy(&mut from, &mut io::sink()).map_err(ReadError::Io)?;
    let computed = from.hash.digest();
    if computed != header.checksum {
        let expected = header.checksum;
        return Err(ReadError::Damaged(format!("its checksum is {computed:016x}, expected {expected:016x}")));
    }
    session.map_err(ReadError::Session)
}

/// Removes what may be left of a file that could not be written; nothing depends on it.
pub fn discard(path: &Path) {
    let _ = fs::remove_file(path);
}

/// A reader or writer that counts the bytes that went through it, with their checksum.
struct Hashed<T> {
    inner: T,
    hash: Xxh3,
    bytes: u64,
}

impl<T> Hashed<T> {
    fn new(inner: T) -> Hashed<T> {
        Hashed { inner, hash: Xxh3::new(), bytes: 0 }
    }

    fn take_in(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(bytes)?;
        self.take_in(&bytes[..count]);
        Ok(count)
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.take_in(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
