//! Records that outlive the program.

use std::collections::HashMap;
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use proptest::prelude::*;
use session::database::{Database, DatabaseError, FILE_NAME, Limits, Records};

const MANY: Limits = Limits { count: 1_000, bytes: 1 << 20 };

fn open(dir: &Path) -> Database {
    let (database, aside) = Database::open(dir).unwrap();
    assert_eq!(aside, None);
    database
}

#[test]
fn records_survive_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("made/for/it");
    let database = open(&dir);
    database.records("a", MANY).put(b"key", b"value").unwrap();
    database.records("b", MANY).put(b"key", b"").unwrap();
    drop(database);
    let database = open(&dir);
    assert_eq!(database.records("a", MANY).get(b"key").unwrap().as_deref(), Some(&b"value"[..]));
    assert_eq!(database.records("b", MANY).get(b"key").unwrap().as_deref(), Some(&b""[..]));
    assert_eq!(database.records("c", MANY).get(b"key").unwrap(), None);
    assert!(database.records("a", MANY).delete(b"key").unwrap());
    assert!(!database.records("a", MANY).delete(b"key").unwrap());
    assert_eq!(database.records("a", MANY).get(b"key").unwrap(), None);
}

#[cfg(unix)]
#[test]
fn nobody_else_can_read_it() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("new");
    let _database = open(&dir);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&dir), mode(&dir.join(FILE_NAME))), (0o700, 0o600));
}

#[test]
fn a_folder_has_one_owner() {
    let folder = tempfile::tempdir().unwrap();
    let _database = open(folder.path());
    let error = Database::open(folder.path()).err().unwrap();
    assert!(matches!(error, DatabaseError::InUse { .. }), "{error}");
    assert!(error.to_string().contains("in use by another process"), "{error}");
}

#[test]
fn a_folder_that_cannot_be_made_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let error = Database::open(&file.join("below")).err().unwrap();
    assert!(matches!(error, DatabaseError::Io { .. }), "{error}");
}

#[test]
fn a_record_that_is_too_large_is_refused() {
    let records = Database::in_memory().records("a", Limits { count: 9, bytes: 10 });
    records.put(b"k", b"123456789").unwrap();
    let error = records.put(b"l", b"1234567890").unwrap_err();
    assert!(matches!(error, DatabaseError::TooLarge { found: 11, limit: 10 }), "{error}");
    assert!(records.get(b"k").unwrap().is_some());
}

/// Every damage is noticed when the database is opened, or every record reads as it was put.
#[test]
fn a_damaged_database_is_set_aside() {
    let folder = tempfile::tempdir().unwrap();
    let records = |database: &Database| database.records("a", MANY);
    let key = |i: u32| i.to_le_bytes();
    let value = |i: u32| vec![i as u8; 40 * i as usize];
    let database = open(folder.path());
    (0..40).for_each(|i| records(&database).put(&key(i), &value(i)).unwrap());
    drop(database);
    let path = folder.path().join(FILE_NAME);
    let whole = fs::read(&path).unwrap();
    let (mut noticed, mut harmless) = (0, 0);
    let flips = (0..64).chain((64..whole.len()).step_by(whole.len() / 150));
    for at in flips {
        fs::write(&path, &whole).unwrap();
        let mut file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.seek(SeekFrom::Start(at as u64)).unwrap();
        file.write_all(&[whole[at] ^ 0x41]).unwrap();
        let (database, aside) = Database::open(folder.path()).unwrap();
        let read = |i| records(&database).get(&key(i)).unwrap();
        match aside {
            Some(aside) => {
                assert!(aside.to_string().contains("set aside"), "{aside}");
                assert!((0..40).all(|i| read(i).is_none()), "byte {at}");
                noticed += 1;
            }
            None => {
                assert!((0..40).all(|i| read(i) == Some(value(i))), "byte {at}");
                harmless += 1;
            }
        }
        records(&database).put(b"new", b"one").unwrap();
    }
    println!("{noticed} of {} flipped bytes noticed, {harmless} harmless", noticed + harmless);
    assert!(noticed > 20);
    for len in [0, 1, 100, 4096, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..len]).unwrap();
        let (database, aside) = Database::open(folder.path()).unwrap();
        assert!(len == 0 || aside.is_some(), "{len} bytes");
        assert!((0..40).all(|i| records(&database).get(&key(i)).unwrap().is_none()));
    }
}

/// What a client does with records.
#[derive(Clone, Debug)]
enum Act {
    Get(u8),
    Put(u8, usize),
    Delete(u8),
}

/// Records as a list, the one used least recently first.
#[derive(Default)]
struct Model {
    records: HashMap<u8, usize>,
    used: Vec<u8>,
    /// Got since the last put: these count as used, in any order, when the next one is put.
    got: Vec<u8>,
}

impl Model {
    fn use_now(&mut self, key: u8) {
        self.used.retain(|&used| used != key);
        self.used.push(key);
    }

    fn remove(&mut self, key: u8) -> bool {
        self.used.retain(|&used| used != key);
        self.got.retain(|&got| got != key);
        self.records.remove(&key).is_some()
    }

    fn put(&mut self, key: u8, bytes: usize, limits: Limits) {
        if let Some(&got) = self.got.first() {
            self.use_now(got);
            self.got.clear();
        }
        self.remove(key);
        let total = |model: &Model| model.records.values().map(|bytes| bytes + 1).sum::<usize>() as u64;
        while self.records.len() as u64 >= limits.count || total(self) + bytes as u64 + 1 > limits.bytes {
            self.remove(self.used[0]);
        }
        self.records.insert(key, bytes);
        self.use_now(key);
    }
}

fn check(records: &Records, model: &mut Model, act: &Act, limits: Limits) {
    match *act {
        // At most one between two puts, whose order among several is not kept.
        Act::Get(_) if !model.got.is_empty() => (),
        Act::Get(key) => {
            let expected = model.records.get(&key).map(|&bytes| vec![key; bytes]);
            assert_eq!(records.get(&[key]).unwrap(), expected);
            model.got.extend(expected.map(|_| key));
        }
        Act::Put(key, bytes) => {
            records.put(&[key], &vec![key; bytes]).unwrap();
            model.put(key, bytes, limits);
        }
        Act::Delete(key) => assert_eq!(records.delete(&[key]).unwrap(), model.remove(key)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) })]

    #[test]
    fn the_least_recently_used_makes_way(acts in prop::collection::vec(prop_oneof![
        1 => (0u8..12).prop_map(Act::Get),
        3 => (0u8..12, 0usize..40).prop_map(|(key, bytes)| Act::Put(key, bytes)),
        1 => (0u8..12).prop_map(Act::Delete),
    ], 1..120)) {
        let limits = Limits { count: 6, bytes: 100 };
        let records = Database::in_memory().records("a", limits);
        let mut model = Model::default();
        acts.iter().for_each(|act| check(&records, &mut model, act, limits));
        for (&key, &bytes) in &model.records {
            prop_assert_eq!(records.get(&[key]).unwrap(), Some(vec![key; bytes]));
        }
    }
}
