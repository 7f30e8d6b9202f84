//! Sessions on disk: saved when a conversation pauses, found again by the longest beginning of a prompt.
//!
//! ```text
//! save: size -> make room -> write under another name, sync -> rename, sync the folder -> index
//! ```
//! Killed anywhere on this way, a process loses nothing that was there before, and nothing that [`Snapshots::save`] has returned for: files
//! without an entry are found by their headers, half ones are removed when the folder is opened. A damaged file is set aside, never used.
//!
//! A snapshot's id is the SHA-256 of its [`Binding`] and its tokens, so that one pass over a prompt finds all that begin it, and no other
//! model's or precision's. The files and what was set aside never exceed the budget; which of them make way is in `policy.rs`. The database is not counted.

mod file;
mod index;
mod policy;
mod worker;

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use model::{Arithmetic, Backend, Precision};
use sha2::{Digest, Sha256};
use text::prompt::Encoding;

use self::file::{HEADER_BYTES, Header, ReadError};
use self::index::{Index, Victims};
use self::policy::Entry;
pub use self::worker::{MOST_WAITING_SAVES, SnapshotWorker};
use crate::database::{Database, DatabaseError, FILE_NAME, SetAside, make_folder, private, set_aside};
use crate::{Context, Error, Session};

/// Changes when states saved before are not those that would be computed now.
const STATE_VERSION: u32 = 1;

/// What a session's state depends on besides its tokens. A snapshot is only ever loaded for the very same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Of the model's files (`store::Source::identity`).
    pub identity: u128,
    /// With or without the low-precision roundings.
    pub arithmetic: Arithmetic,
    /// How rows were computed.
    pub precision: Precision,
    /// What computed them: those with the same name compute the same bits.
    pub backend: String,
    /// The format of prompts.
    pub encoding: Encoding,
}

impl Binding {
    fn digest(&self) -> [u8; 32] {
        let Binding { identity, arithmetic, precision, backend, encoding } = self;
        let text = format!("{STATE_VERSION} {identity:032x} {arithmetic:?} {precision:?} {encoding} {backend}");
        Sha256::digest(text).into()
    }
}

/// Which snapshot: what it is bound to, and its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SnapshotId([u8; 32]);

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl SnapshotId {
    /// The id whose name this is.
    fn from_name(name: &str) -> Option<SnapshotId> {
        let digits: Vec<u8> = name.chars().map(|c| c.to_digit(16).map(|digit| digit as u8)).collect::<Option<_>>()?;
        let bytes: Vec<u8> =
            digits.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit)).collect();
        let id = SnapshotId(bytes.try_into().ok()?);
        (id.to_string() == name).then_some(id)
    }
}

/// Why a session was saved: what it is worth depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It is a beginning that many conversations share.
    Common,
    /// Its conversation pauses.
    Idle,
    /// It made way for another in memory.
    Evicted,
    /// The program ended.
    Shutdown,
    /// It had become longer by a good deal.
    Interval,
}

impl Kind {
    const ALL: [Kind; 5] = [Kind::Common, Kind::Idle, Kind::Evicted, Kind::Shutdown, Kind::Interval];

    fn number(self) -> u8 {
        self as u8
    }

    fn from_number(number: u8) -> Option<Kind> {
        Kind::ALL.get(usize::from(number)).copied()
    }
}

/// What cannot be done with snapshots. Those that are there stay, unless it says so.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotsError {
    /// The folder or a file in it could not be read or written.
    #[error("{}: {source}. Choose a folder that can be written, on a disk with room", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The backend could not give or take a session.
    #[error("{}: {source}", path.display())]
    Session {
        /// The snapshot's file.
        path: PathBuf,
        /// Why.
        source: Error,
    },
    /// The file was damaged.
    #[error("{0}")]
    Damaged(SetAside),
    /// A session that no snapshot may be as large as. Nothing made way for it.
    #[error("a snapshot of {found} bytes, expected at most {limit}, the budget of all: it was not saved. Allow more")]
    TooLarge {
        /// Its bytes.
        found: u64,
        /// The budget.
        limit: u64,
    },
    /// All others are in use.
    #[error(
        "a snapshot of {found} bytes has no room beside those in use, with a budget of {limit}: it was not saved. Allow more"
    )]
    NoRoom {
        /// Its bytes.
        found: u64,
        /// The budget.
        limit: u64,
    },
    /// It is not there any more.
    #[error("the snapshot {0} is not there any more: read the prompt")]
    Unknown(SnapshotId),
    /// While it waited, a save of a session that goes on from it came: that one is done instead.
    #[error("a save of the same session, grown longer, took its place")]
    Superseded,
    /// Too many saves wait for the disk.
    #[error("the disk is too slow for all that is to be saved: it was not saved")]
    Busy,
    /// The thread that saves and loads has ended by a panic.
    #[error(
        "snapshots are neither saved nor loaded any more: the thread that does it has panicked; its message says more"
    )]
    Ended,
    /// The index could not be read or written.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

/// A snapshot that was saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Which.
    pub id: SnapshotId,
    /// Bytes of its file.
    pub bytes: u64,
    /// False if there was one of the same tokens already.
    pub is_new: bool,
}

/// A snapshot that begins a prompt. It is not deleted while this lives.
pub struct Found {
    /// Which.
    pub id: SnapshotId,
    /// How many of the prompt's tokens it holds.
    pub tokens: usize,
    shared: Arc<Shared>,
}

impl Drop for Found {
    fn drop(&mut self) {
        self.shared.index().unpin(self.id);
    }
}

/// What the folder holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SnapshotStats {
    /// Snapshots, those of other models included.
    pub snapshots: usize,
    /// Bytes of all files but the database.
    pub bytes: u64,
}

/// The snapshots in a folder; clones are of the same.
#[derive(Clone)]
pub struct Snapshots {
    shared: Arc<Shared>,
}

struct Shared {
    dir: PathBuf,
    max_bytes: u64,
    binding: [u8; 32],
    database: Database,
    /// Held for moments only, never while the disk works.
    index: Mutex<Index>,
    /// Held by who writes.
    writing: Mutex<()>,
}

impl Shared {
    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Snapshots {
    /// The snapshots in `dir`, which is made if it is not there, at most `max_bytes` of them, indexed in `database`: the one opened in the
    /// same folder, so that no other process writes there. Also tells which files were damaged. Only files that the index does not know are read, their
    /// headers.
    ///
    /// # Errors
    /// The folder cannot be used.
    pub fn open(
        dir: &Path,
        max_bytes: u64,
        binding: &Binding,
        database: &Database,
    ) -> Result<(Snapshots, Vec<SetAside>), SnapshotsError> {
        let failed = |source| SnapshotsError::Io { path: dir.to_owned(), source };
        make_folder(dir).map_err(failed)?;
        try_to_write(dir).map_err(failed)?;
        let mut index = Index::read(database, binding.digest())?;
        let asides = reconcile(dir, &mut index).map_err(failed)?;
        let shared = Shared {
            dir: dir.to_owned(),
            max_bytes,
            binding: binding.digest(),
            database: database.clone(),
            index: Mutex::new(index),
            writing: Mutex::default(),
        };
        let snapshots = Snapshots { shared: Arc::new(shared) };
        snapshots.make_room(0)?;
        snapshots.write_index()?;
        Ok((snapshots, asides))
    }

    /// What the folder holds.
    pub fn stats(&self) -> SnapshotStats {
        let index = self.shared.index();
        SnapshotStats { snapshots: index.ids().len(), bytes: index.bytes() }
    }

    /// Whether there is a snapshot of exactly these tokens. It touches no file.
    pub fn has(&self, tokens: &[u32]) -> bool {
        self.shared.index().get(self.id(tokens)).is_some()
    }

    /// The longest snapshot that `tokens` begin with, or are. It touches no file.
    pub fn longest(&self, tokens: &[u32]) -> Option<Found> {
        let prefixes = self.prefixes(tokens);
        let mut index = self.shared.index();
        let (length, id) = prefixes.into_iter().rev().find(|(_, id)| index.get(*id).is_some())?;
        index.pin(id);
        Some(Found { id, tokens: length, shared: self.shared.clone() })
    }

    /// Saves a session. When this returns, it is on the disk. Of two with the same tokens the first is kept.
    ///
    /// # Errors
    /// [`SnapshotsError`]: it was not saved.
    pub fn save<B: Backend>(&self, backend: &B, session: &Session<B>, kind: Kind) -> Result<Saved, SnapshotsError> {
        let _writing = self.shared.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let tokens = session.tokens();
        let mut prefixes = self.prefixes(tokens);
        prefixes.retain(|(length, _)| *length < tokens.len());
        let id = self.id(tokens);
        if let Some(bytes) = self.is_there(id, kind) {
            self.write_index()?;
            return Ok(Saved { id, bytes, is_new: false });
        }
        let bytes = file::session_bytes(backend, session)
            .map_err(|source| SnapshotsError::Session { path: self.path(id), source })?
            + HEADER_BYTES;
        self.make_room(bytes)?;
        let written = self.write_file(backend, session, id, kind);
        let mut index = self.shared.index();
        index.unreserve(bytes);
        let entry = written?;
        index.insert(id, entry);
        for (_, shorter) in prefixes {
            if let Some(entry) = index.change(shorter).filter(|entry| entry.kind != Kind::Common) {
                entry.superseded_by = Some(id);
            }
        }
        drop(index);
        self.write_index()?;
        Ok(Saved { id, bytes: entry.bytes, is_new: true })
    }

    /// Loads a session that was found. A file that turns out to be damaged is set aside.
    ///
    /// # Errors
    /// [`SnapshotsError`]: the prompt has to be read.
    pub fn load<B: Backend>(
        &self,
        backend: &B,
        id: SnapshotId,
        context: Context,
    ) -> Result<Session<B>, SnapshotsError> {
        let path = self.path(id);
        if self.shared.index().get(id).is_none_or(|entry| entry.binding != self.shared.binding) {
            return Err(SnapshotsError::Unknown(id));
        }
        let session = match file::read(&path, id, backend, context) {
            Ok(session) if self.id(session.tokens()) == id => session,
            Ok(_) => return Err(self.damaged(id, "its tokens are others than its name says".into())),
            Err(ReadError::Damaged(reason)) => {
                return Err(self.damaged(id, format!("the snapshot is damaged: {reason}")));
            }
            Err(ReadError::Io(source)) if source.kind() == io::ErrorKind::NotFound => {
                self.shared.index().remove(id);
                return Err(SnapshotsError::Unknown(id));
            }
            Err(ReadError::Io(source)) => return Err(SnapshotsError::Io { path, source }),
            Err(ReadError::Session(source)) => return Err(SnapshotsError::Session { path, source }),
        };
        // Written with the next change: losing a hit does no harm.
        if let Some(entry) = self.shared.index().change(id) {
            entry.hit(now_s());
        }
        Ok(session)
    }

    fn path(&self, id: SnapshotId) -> PathBuf {
        self.shared.dir.join(format!("{id}{SUFFIX}"))
    }

    fn id(&self, tokens: &[u32]) -> SnapshotId {
        let hash = Sha256::new().chain_update(self.shared.binding);
        SnapshotId(hash.chain_update(to_bytes(tokens)).finalize().into())
    }

    /// The ids of the beginnings of `tokens` for which there may be snapshots, ascending.
    fn prefixes(&self, tokens: &[u32]) -> Vec<(usize, SnapshotId)> {
        let lengths = self.shared.index().lengths(tokens.len() as u64);
        let (mut hash, mut done) = (Sha256::new().chain_update(self.shared.binding), 0);
        let prefix = |length: u64| {
            hash.update(to_bytes(&tokens[done..length as usize]));
            done = length as usize;
            (done, SnapshotId(hash.clone().finalize().into()))
        };
        lengths.into_iter().map(prefix).collect()
    }

    /// The bytes of a snapshot that is there; saving it again makes it as good as new.
    fn is_there(&self, id: SnapshotId, kind: Kind) -> Option<u64> {
        let mut index = self.shared.index();
        let entry = index.change(id)?;
        entry.saved_s = now_s();
        entry.superseded_by = None;
        if kind == Kind::Common || entry.kind == Kind::Interval {
            entry.kind = kind;
        }
        Some(entry.bytes)
    }

    /// Reserves `bytes`, deleting what must go for them.
    fn make_room(&self, bytes: u64) -> Result<(), SnapshotsError> {
        let limit = self.shared.max_bytes;
        if bytes > limit {
            return Err(SnapshotsError::TooLarge { found: bytes, limit });
        }
        let mut index = self.shared.index();
        let victims = index.make_room(bytes, limit, now_s());
        let Victims { snapshots, aside } = victims.ok_or(SnapshotsError::NoRoom { found: bytes, limit })?;
        index.reserve(bytes);
        drop(index);
        // What cannot be deleted is found again when the folder is opened.
        snapshots.into_iter().map(|id| self.path(id)).chain(aside).for_each(|path| file::discard(&path));
        Ok(())
    }

    /// Writes a file and gives it its name.
    fn write_file<B: Backend>(
        &self,
        backend: &B,
        session: &Session<B>,
        id: SnapshotId,
        kind: Kind,
    ) -> Result<Entry, SnapshotsError> {
        let (binding, saved_s, tokens) = (self.shared.binding, now_s(), session.tokens().len() as u64);
        let header = Header { kind, binding, id, tokens, saved_s, bytes: 0, checksum: 0 };
        let partial = self.shared.dir.join(format!("{id}{PARTIAL}"));
        let path = self.path(id);
        let name = || fs::rename(&partial, &path).and_then(|()| sync_folder(&self.shared.dir));
        let named = |bytes| match name() {
            Ok(()) => Ok(bytes),
            Err(source) => Err(SnapshotsError::Io { path: path.clone(), source }),
        };
        let written = file::write(&partial, header, backend, session).and_then(named);
        let bytes = written.inspect_err(|_| file::discard(&partial))?;
        Ok(Entry { binding, kind, tokens, bytes, saved_s, used_s: saved_s, hits: 0.0, superseded_by: None })
    }

    /// Puts what changed in the index on the disk. The engine may look for snapshots meanwhile.
    fn write_index(&self) -> Result<(), SnapshotsError> {
        let changes = self.shared.index().take_changes();
        let written = Index::write(&changes, &self.shared.database);
        if written.is_err() {
            self.shared.index().give_back(changes);
        }
        Ok(written?)
    }

    /// Sets the file of a snapshot aside, and forgets it.
    fn damaged(&self, id: SnapshotId, reason: String) -> SnapshotsError {
        let aside = set_aside(&self.path(id), reason);
        let mut index = self.shared.index();
        index.remove(id);
        let bytes = fs::metadata(&aside.now).map_or(0, |file| file.len());
        index.add_aside(aside.now.clone(), bytes);
        SnapshotsError::Damaged(aside)
    }
}

/// How the name of a snapshot's file ends, and of one that is being written, and of a damaged one.
const SUFFIX: &str = ".session";
const PARTIAL: &str = ".partial";
const DAMAGED: &str = ".damaged";
/// A file that is made to see whether one can be.
const PROBE: &str = "infall.probe";

/// Fails where no file can be made.
fn try_to_write(dir: &Path) -> io::Result<()> {
    let path = dir.join(PROBE);
    private(OpenOptions::new().write(true).create(true)).open(&path)?;
    fs::remove_file(&path)
}

/// What a file in the folder is to us, by its name.
enum Role {
    Snapshot(SnapshotId),
    /// One that was being written.
    Partial,
    /// A snapshot or a database that was set aside.
    Aside,
}

impl Role {
    /// `None`: somebody else's, which is left alone.
    fn of(name: &str) -> Option<Role> {
        if let Some(name) = name.strip_suffix(PARTIAL) {
            return SnapshotId::from_name(name).map(|_| Role::Partial);
        }
        if let Some(name) = name.strip_suffix(DAMAGED) {
            let is_snapshot = name.strip_suffix(SUFFIX).and_then(SnapshotId::from_name).is_some();
            return (is_snapshot || name == FILE_NAME).then_some(Role::Aside);
        }
        name.strip_suffix(SUFFIX).and_then(SnapshotId::from_name).map(Role::Snapshot)
    }
}

/// Makes the index and the files in `dir` one; which files were damaged.
fn reconcile(dir: &Path, index: &mut Index) -> io::Result<Vec<SetAside>> {
    let mut unseen: std::collections::HashSet<_> = index.ids().into_iter().collect();
    let mut asides = Vec::new();
    for file in fs::read_dir(dir)? {
        let file = file?;
        if !file.file_type()?.is_file() {
            continue;
        }
        let path = file.path();
        let id = match file.file_name().to_str().and_then(Role::of) {
            Some(Role::Snapshot(id)) => id,
            Some(Role::Partial) => {
                fs::remove_file(&path)?;
                continue;
            }
            Some(Role::Aside) => {
                index.add_aside(path, file.metadata()?.len());
                continue;
            }
            None => continue,
        };
        unseen.remove(&id);
        let bytes = file.metadata()?.len();
        if index.get(id).is_some_and(|entry| entry.bytes == bytes) {
            continue;
        }
        index.remove(id);
        match file::read_header(&path).and_then(|header| check_name(header, id)) {
            Ok(header) => index.insert(id, entry(header, bytes)),
            Err(reason) => {
                let aside = set_aside(&path, format!("the snapshot is damaged: {reason}"));
                index.add_aside(aside.now.clone(), bytes);
                asides.push(aside);
            }
        }
    }
    unseen.into_iter().for_each(|id| index.remove(id));
    Ok(asides)
}

fn check_name(header: Header, id: SnapshotId) -> Result<Header, String> {
    if header.id == id { Ok(header) } else { Err(format!("it is the snapshot {}", header.id)) }
}

/// What the header says of a file of so many bytes.
fn entry(header: Header, bytes: u64) -> Entry {
    let Header { kind, binding, tokens, saved_s, .. } = header;
    Entry { binding, kind, tokens, bytes, saved_s, used_s: saved_s, hits: 0.0, superseded_by: None }
}

/// Puts the names in a folder on the disk.
fn sync_folder(dir: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(dir)?.sync_all() } else { Ok(()) }
}

fn to_bytes(tokens: &[u32]) -> Vec<u8> {
    tokens.iter().flat_map(|token| token.to_le_bytes()).collect()
}

/// Seconds since 1970.
fn now_s() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
