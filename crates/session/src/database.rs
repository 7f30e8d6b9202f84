//! What outlives the program besides saved sessions: small records in one embedded database a folder.
//!
//! A [`Database`] is one file, [`FILE_NAME`], of the embedded store `redb`. Whoever has it open has the folder: a second process is
//! told so. Its pages' checksums are checked when it is opened; a damaged file is set aside, never read.
//!
//! [`Records`] are named bytes of one kind, bounded in number and size; those used least recently make way for new ones. A record is
//! on the disk when the call that puts it returns.

use std::collections::HashSet;
use std::fmt;
use std::fs::{self, OpenOptions};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use redb::backends::{FileBackend, InMemoryBackend};
use redb::{ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition, TableError, WriteTransaction};

/// The database's file in its folder.
pub const FILE_NAME: &str = "infall.redb";

/// Memory for pages of the database.
const CACHE_BYTES: usize = 16 << 20;
/// Most bytes of one kind of records where these are in memory: there are five kinds, which together stay below 64 MiB.
const IN_MEMORY_BYTES: u64 = 12 << 20;
/// Least time between two attempts to open a database again after an error of the disk: all of it is read and checked then.
const REOPEN_AFTER: Duration = Duration::from_secs(10);

/// Records and bytes of each kind.
const TOTALS: TableDefinition<&str, (u64, u64)> = TableDefinition::new("totals");

/// Why the database could not be used.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// The folder or the file could not be opened or written.
    #[error("{}: {source}. Choose a folder that can be written, on a disk with room", path.display())]
    Io {
        /// What could not.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process has it open.
    #[error("{} is in use by another process: stop that one, or choose another folder", path.display())]
    InUse {
        /// The database.
        path: PathBuf,
    },
    /// An operation failed; nothing of it was kept. Clients may be told: the text has no path.
    #[error("the database: {source}")]
    Redb {
        /// The database.
        path: PathBuf,
        /// Why.
        source: redb::Error,
    },
    /// The disk failed a moment ago. Clients may be told: the text has no path.
    #[error("the database is closed after an error of its disk, and will be opened again: try again in some seconds")]
    Closed {
        /// The database.
        path: PathBuf,
    },
    /// A record that would not leave room for any other.
    #[error("a record of {found} bytes, expected at most {limit}: it was not kept")]
    TooLarge {
        /// Its bytes.
        found: u64,
        /// Most bytes of all records of its kind.
        limit: u64,
    },
}

/// A damaged file that is not used any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetAside {
    /// Where it was.
    pub path: PathBuf,
    /// Where it is now: the same place if it could not be renamed.
    pub now: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for SetAside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, now, reason } = self;
        write!(f, "{}: {reason}. It is not used, and was set aside as {}", path.display(), now.display())
    }
}

/// Renames a damaged file, so that it is not used again.
pub(crate) fn set_aside(path: &Path, reason: String) -> SetAside {
    let mut name = path.as_os_str().to_owned();
    name.push(".damaged");
    let aside = PathBuf::from(name);
    let now = fs::rename(path, &aside).map_or(path.to_owned(), |()| aside);
    SetAside { path: path.to_owned(), now, reason }
}

/// An open database; clones are of the same.
#[derive(Clone)]
pub struct Database {
    shared: Arc<Shared>,
}

struct Shared {
    /// `None`: in memory.
    path: Option<PathBuf>,
    open: RwLock<Open>,
}

#[derive(Default)]
struct Open {
    /// `None` after an input or output error, until it could be opened again.
    database: Option<redb::Database>,
    /// When that was tried last.
    tried: Option<Instant>,
}

impl Shared {
    fn new(path: Option<PathBuf>, database: redb::Database) -> Arc<Shared> {
        Arc::new(Shared { path, open: RwLock::new(Open { database: Some(database), tried: None }) })
    }

    /// Without its path for who reads the text: it may be a client.
    fn failed(&self, source: redb::Error) -> DatabaseError {
        DatabaseError::Redb { path: self.path.clone().unwrap_or_else(|| "in memory".into()), source }
    }
}

impl Database {
    /// The database in the folder `dir`; both are made if they are not there, for nobody but their owner. If the file was damaged,
    /// what is told has happened, and the database is a new one.
    ///
    /// # Errors
    /// [`DatabaseError`]: another process has it open, or the folder cannot be used.
    pub fn open(dir: &Path) -> Result<(Database, Option<SetAside>), DatabaseError> {
        let path = dir.join(FILE_NAME);
        make_folder(dir).map_err(|source| DatabaseError::Io { path: dir.to_owned(), source })?;
        let (open, aside) = match open_file(&path) {
            Err(error) if is_damage(&error) => {
                let aside = set_aside(&path, format!("the database is damaged ({error})"));
                (open_file(&path), Some(aside))
            }
            other => (other, None),
        };
        let open = open.map_err(|error| explained(&path, error))?;
        Ok((Database { shared: Shared::new(Some(path), open) }, aside))
    }

    /// A database that ends with the program. Of each kind of records it keeps a few MiB at most.
    pub fn in_memory() -> Database {
        let mut builder = redb::Builder::new();
        builder.set_cache_size(CACHE_BYTES);
        let open = builder.create_with_backend(InMemoryBackend::new()).expect("memory has no disk's errors");
        Database { shared: Shared::new(None, open) }
    }

    /// Records of one kind in this database, at most so many of at most so many bytes together, keys included.
    pub fn records(&self, kind: &str, limits: Limits) -> Records {
        let most_bytes = if self.shared.path.is_some() { u64::MAX } else { IN_MEMORY_BYTES };
        Records {
            database: self.clone(),
            kind: kind.to_owned(),
            uses: format!("{kind}.uses"),
            limits: Limits { bytes: limits.bytes.min(most_bytes), ..limits },
            used: Mutex::default(),
        }
    }

    /// Puts records of any kinds, all of them or none; they are on the disk when this returns.
    ///
    /// # Errors
    /// [`DatabaseError`]: nothing was put.
    pub fn put_all(&self, puts: &[(&Records, &[u8], &[u8])]) -> Result<(), DatabaseError> {
        for (records, key, value) in puts {
            let (found, limit) = (bytes_of(key, value), records.limits.bytes);
            if found > limit && records.limits.count > 0 {
                return Err(DatabaseError::TooLarge { found, limit });
            }
        }
        self.write(|transaction| {
            puts.iter().try_for_each(|(records, key, value)| records.insert(transaction, key, value))
        })
    }

    /// Does `work` in one transaction, which is on the disk when this returns.
    pub(crate) fn write<T>(
        &self,
        work: impl Fn(&WriteTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, DatabaseError> {
        self.with(|open| {
            let transaction = open.begin_write()?;
            let result = work(&transaction)?;
            transaction.commit()?;
            Ok(result)
        })
    }

    /// Does `work` on one state of the database.
    pub(crate) fn read<T>(
        &self,
        work: impl Fn(&ReadTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, DatabaseError> {
        self.with(|open| work(&open.begin_read()?))
    }

    /// Does `work`. After an error of the disk `redb` refuses everything until it is opened anew, which is done at once, and `work` once
    /// more, unless that was tried a moment ago.
    fn with<T>(&self, work: impl Fn(&redb::Database) -> Result<T, redb::Error>) -> Result<T, DatabaseError> {
        let shared = &*self.shared;
        if let Some(database) = &shared.open.read().unwrap_or_else(PoisonError::into_inner).database {
            match work(database) {
                Err(error) if shared.path.is_some() && is_of_disk(&error) => (),
                done => return done.map_err(|error| shared.failed(error)),
            }
        }
        let path = shared.path.as_deref().expect("memory is never closed");
        let mut open = shared.open.write().unwrap_or_else(PoisonError::into_inner);
        if open.tried.is_some_and(|tried| tried.elapsed() < REOPEN_AFTER) {
            return Err(DatabaseError::Closed { path: path.to_owned() });
        }
        open.tried = Some(Instant::now());
        // A file is open once only.
        drop(open.database.take());
        let database = open_file(path).map_err(|error| shared.failed(error))?;
        work(open.database.insert(database)).map_err(|error| shared.failed(error))
    }
}

/// Whether the disk failed, now or before.
fn is_of_disk(error: &redb::Error) -> bool {
    matches!(error, redb::Error::Io(_) | redb::Error::PreviousIo)
}

fn open_file(path: &Path) -> Result<redb::Database, redb::Error> {
    let file = private(OpenOptions::new().read(true).write(true).create(true)).open(path)?;
    let mut builder = redb::Builder::new();
    builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
    let open = || builder.create_with_backend(FileBackend::new(file)?).map_err(redb::Error::from);
    // Where a damaged page passes for another, the check itself may panic.
    catch_unwind(AssertUnwindSafe(open))
        .unwrap_or_else(|_| Err(redb::Error::Corrupted("its pages make no sense".into())))
}

/// Whether the file can never be opened again.
fn is_damage(error: &redb::Error) -> bool {
    use io::ErrorKind::{InvalidData, UnexpectedEof};
    match error {
        redb::Error::Corrupted(_) | redb::Error::UpgradeRequired(_) => true,
        redb::Error::Io(error) => matches!(error.kind(), InvalidData | UnexpectedEof),
        _ => false,
    }
}

fn explained(path: &Path, error: redb::Error) -> DatabaseError {
    let path = path.to_owned();
    match error {
        redb::Error::DatabaseAlreadyOpen => DatabaseError::InUse { path },
        redb::Error::Io(source) => DatabaseError::Io { path, source },
        source => DatabaseError::Redb { path, source },
    }
}

/// Makes a folder that only its owner can look into. One that is there keeps its permissions.
pub(crate) fn make_folder(dir: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(dir)
}

/// Makes files that are created with `options` their owner's only.
pub(crate) fn private(options: &mut OpenOptions) -> &mut OpenOptions {
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(options, 0o600);
    options
}

/// Most records of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Records; with none, nothing is kept.
    pub count: u64,
    /// Bytes of their keys and values.
    pub bytes: u64,
}

/// Named bytes of one kind.
pub struct Records {
    database: Database,
    /// Also the name of the table: key to number of its last use, then the value.
    kind: String,
    /// The name of the table from number of last use to key.
    uses: String,
    limits: Limits,
    /// Keys read since the last transaction; their last use is written with the next one.
    used: Mutex<HashSet<Vec<u8>>>,
}

impl Records {
    /// The record `key`.
    ///
    /// # Errors
    /// [`DatabaseError`]: it could not be read.
    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, DatabaseError> {
        let found = self.database.read(|transaction| match transaction.open_table(self.table()) {
            Ok(table) => Ok(table.get(key)?.map(|value| value.value()[8..].to_vec())),
            Err(TableError::TableDoesNotExist(_)) => Ok(None),
            Err(error) => Err(error.into()),
        })?;
        if found.is_some() {
            self.used().insert(key.to_owned());
        }
        Ok(found)
    }

    /// Puts a record, in the place of one with the same key. It is on the disk when this returns.
    ///
    /// # Errors
    /// [`DatabaseError`]: nothing was put.
    pub fn put(&self, key: &[u8], value: &[u8]) -> Result<(), DatabaseError> {
        self.database.put_all(&[(self, key, value)])
    }

    /// Deletes a record; whether it was there.
    ///
    /// # Errors
    /// [`DatabaseError`]: nothing was deleted.
    pub fn delete(&self, key: &[u8]) -> Result<bool, DatabaseError> {
        self.database.write(|transaction| self.remove(transaction, key))
    }

    fn table(&self) -> TableDefinition<'_, &'static [u8], &'static [u8]> {
        TableDefinition::new(&self.kind)
    }

    fn uses(&self) -> TableDefinition<'_, u64, &'static [u8]> {
        TableDefinition::new(&self.uses)
    }

    fn used(&self) -> std::sync::MutexGuard<'_, HashSet<Vec<u8>>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn insert(&self, transaction: &WriteTransaction, key: &[u8], value: &[u8]) -> Result<(), redb::Error> {
        for key in std::mem::take(&mut *self.used()) {
            self.touch(transaction, &key)?;
        }
        self.remove(transaction, key)?;
        self.make_room(transaction, bytes_of(key, value))?;
        if self.limits.count == 0 {
            return Ok(());
        }
        let mut uses = transaction.open_table(self.uses())?;
        let number = next_use(&uses)?;
        uses.insert(number, key)?;
        let stored = [&number.to_le_bytes()[..], value].concat();
        transaction.open_table(self.table())?.insert(key, &stored[..])?;
        let mut totals = transaction.open_table(TOTALS)?;
        let (count, bytes) = total(&totals, &self.kind)?;
        totals.insert(&*self.kind, (count + 1, bytes + bytes_of(key, value)))?;
        Ok(())
    }

    /// Makes a record the one used last.
    fn touch(&self, transaction: &WriteTransaction, key: &[u8]) -> Result<(), redb::Error> {
        let mut table = transaction.open_table(self.table())?;
        let Some(mut stored) = table.get(key)?.map(|stored| stored.value().to_vec()) else { return Ok(()) };
        let mut uses = transaction.open_table(self.uses())?;
        uses.remove(number_in(&stored))?;
        let number = next_use(&uses)?;
        uses.insert(number, key)?;
        stored[..8].copy_from_slice(&number.to_le_bytes());
        table.insert(key, &stored[..])?;
        Ok(())
    }

    fn remove(&self, transaction: &WriteTransaction, key: &[u8]) -> Result<bool, redb::Error> {
        let mut table = transaction.open_table(self.table())?;
        let Some(removed) = table.remove(key)?.map(|stored| stored.value().to_vec()) else { return Ok(false) };
        transaction.open_table(self.uses())?.remove(number_in(&removed))?;
        let mut totals = transaction.open_table(TOTALS)?;
        let (count, bytes) = total(&totals, &self.kind)?;
        totals.insert(&*self.kind, (count - 1, bytes - bytes_of(key, &removed[8..])))?;
        Ok(true)
    }

    /// Removes the records used least recently until one of `incoming` bytes has room.
    fn make_room(&self, transaction: &WriteTransaction, incoming: u64) -> Result<(), redb::Error> {
        loop {
            let (count, bytes) = total(&transaction.open_table(TOTALS)?, &self.kind)?;
            if count < self.limits.count && bytes + incoming <= self.limits.bytes {
                return Ok(());
            }
            let oldest = transaction.open_table(self.uses())?.first()?.map(|(_, key)| key.value().to_vec());
            match oldest {
                Some(key) => self.remove(transaction, &key)?,
                None => return Ok(()),
            };
        }
    }
}

/// What a record counts for.
fn bytes_of(key: &[u8], value: &[u8]) -> u64 {
    (key.len() + value.len()) as u64
}

/// The number of the last use of a stored record.
fn number_in(stored: &[u8]) -> u64 {
    u64::from_le_bytes(stored[..8].try_into().expect("a number stands before every value"))
}

fn next_use(uses: &impl ReadableTable<u64, &'static [u8]>) -> Result<u64, redb::Error> {
    Ok(uses.last()?.map_or(0, |(number, _)| number.value() + 1))
}

fn total(totals: &impl ReadableTable<&'static str, (u64, u64)>, kind: &str) -> Result<(u64, u64), redb::Error> {
    Ok(totals.get(kind)?.map_or((0, 0), |total| total.value()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { count: 9, bytes: 1 << 20 };

    fn fail(database: &Database, error: fn() -> redb::Error) -> DatabaseError {
        database.read(|_| Err::<(), _>(error())).unwrap_err()
    }

    /// Every request would otherwise wait until all of the file is checked.
    #[test]
    fn it_is_opened_again_after_errors_of_the_disk_only_and_not_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let (database, _) = Database::open(folder.path()).unwrap();
        let records = database.records("a", LIMITS);
        records.put(b"key", b"value").unwrap();
        let tried = || database.shared.open.read().unwrap().tried;
        let errors = [
            fail(&database, || redb::Error::LockPoisoned(std::panic::Location::caller())),
            fail(&database, || redb::Error::Io(io::Error::other("unplugged"))),
            fail(&database, || redb::Error::PreviousIo),
        ];
        assert!(matches!(errors[0], DatabaseError::Redb { source: redb::Error::LockPoisoned(_), .. }));
        assert!(matches!(errors[1], DatabaseError::Redb { source: redb::Error::Io(_), .. }), "tried twice");
        assert!(matches!(errors[2], DatabaseError::Closed { .. }));
        let texts = errors.each_ref().map(ToString::to_string);
        let path = folder.path().to_str().unwrap();
        assert!(texts.iter().all(|text| !text.contains(path)), "{texts:?}");
        assert!(format!("{:?}", errors[2]).contains(path), "for the log");
        let last = tried().expect("the second error");
        assert_eq!(records.get(b"key").unwrap().as_deref(), Some(&b"value"[..]), "it is open");
        database.shared.open.write().unwrap().tried = last.checked_sub(REOPEN_AFTER);
        fail(&database, || redb::Error::PreviousIo);
        assert!(tried() > Some(last), "tried once more after a while");
    }

    #[test]
    fn memory_holds_a_few_mebibytes_whatever_the_limits() {
        let records = Database::in_memory().records("a", Limits { count: 100, bytes: 1 << 30 });
        (0..20u8).for_each(|key| records.put(&[key], &vec![key; 1 << 20]).unwrap());
        let kept = (0..20u8).filter(|&key| records.get(&[key]).unwrap().is_some()).count();
        assert_eq!(kept, 11, "of a little more than 1 MiB in 12 MiB");
    }

    #[test]
    fn a_count_of_none_keeps_nothing() {
        let database = Database::in_memory();
        database.records("a", LIMITS).put(b"old", b"value").unwrap();
        let records = database.records("a", Limits { count: 0, ..LIMITS });
        records.put(b"new", b"value").unwrap();
        records.put(b"large", &vec![0; 2 << 20]).unwrap();
        assert!([&b"old"[..], b"new", b"large"].iter().all(|key| records.get(key).unwrap().is_none()));
    }
}
