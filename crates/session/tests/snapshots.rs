//! Sessions on disk: found, loaded, evicted, damaged, and saved by a process that is killed.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{LazyLock, mpsc};
use std::time::{Duration, Instant};

use cpu::{CpuBackend, Options};
use gguf::Gguf;
use model::{Arithmetic, Backend, Cancel, Model, Precision};
use proptest::prelude::*;
use session::database::{Database, DatabaseError, FILE_NAME, Limits};
use session::snapshots::{Binding, Kind, MOST_WAITING_SAVES, Saved, SnapshotWorker, Snapshots, SnapshotsError};
use session::{Context, Session};
use store::Source;
use text::prompt::Encoding;
use xxhash_rust::xxh3::xxh3_64;

static BACKEND: LazyLock<CpuBackend> = LazyLock::new(|| {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/test-data/oracle/tiny-q4.gguf");
    assert!(path.exists(), "{} is missing: run scripts/test-data first", path.display());
    let file = Gguf::open(&path).unwrap();
    let source = Source::open(file.files.iter().map(|part| (&part.path, part.bytes))).unwrap();
    CpuBackend::load(&Model::from_gguf(&file).unwrap(), &source, Options::default(), &mut |_| ()).unwrap()
});

const ROOM: u64 = 1 << 30;

fn binding() -> Binding {
    Binding {
        identity: 5,
        arithmetic: Arithmetic::Official,
        precision: Precision::Exact,
        backend: "cpu".into(),
        encoding: Encoding::V4_0731,
    }
}

fn context() -> Context {
    Context::new(BACKEND.config(), Some(1000)).unwrap()
}

fn tokens(count: usize, seed: u32) -> Vec<u32> {
    (0..count as u32).map(|i| 3 + (i * 37 + seed * 101) % 500).collect()
}

fn session(tokens: &[u32]) -> Session<CpuBackend> {
    let mut session = Session::new(&*BACKEND, context()).unwrap();
    session.prefill(&BACKEND, tokens, 64, &Cancel::default(), &mut |_| ()).unwrap();
    session
}

/// The bytes of a session, which are all of it.
fn bytes(session: &Session<CpuBackend>) -> Vec<u8> {
    let mut bytes = Vec::new();
    session.save(&*BACKEND, &mut bytes).unwrap();
    bytes
}

/// A folder as its owner has it open.
struct Open {
    snapshots: Snapshots,
    database: Database,
}

impl Open {
    fn with(dir: &Path, max_bytes: u64, binding: &Binding) -> (Open, usize) {
        let (database, aside) = Database::open(dir).unwrap();
        let (snapshots, asides) = Snapshots::open(dir, max_bytes, binding, &database).unwrap();
        (Open { snapshots, database }, asides.len() + usize::from(aside.is_some()))
    }

    fn new(dir: &Path) -> Open {
        let (open, asides) = Open::with(dir, ROOM, &binding());
        assert_eq!(asides, 0);
        open
    }

    fn save(&self, session: &Session<CpuBackend>, kind: Kind) -> Saved {
        self.snapshots.save(&*BACKEND, session, kind).unwrap()
    }

    /// Tokens of the longest snapshot.
    fn longest(&self, tokens: &[u32]) -> Option<usize> {
        self.snapshots.longest(tokens).map(|found| found.tokens)
    }

    fn load(&self, tokens: &[u32]) -> Result<Session<CpuBackend>, SnapshotsError> {
        let found = self.snapshots.longest(tokens).expect("a snapshot of these tokens");
        self.snapshots.load(&*BACKEND, found.id, context())
    }
}

fn files(dir: &Path, suffix: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|file| file.unwrap().path()).collect();
    files.retain(|path| path.to_str().unwrap().ends_with(suffix));
    files.sort();
    files
}

/// Bytes of all files but the database.
fn folder_bytes(dir: &Path) -> u64 {
    let files = files(dir, "").into_iter().filter(|path| !path.ends_with(FILE_NAME));
    files.map(|path| path.metadata().unwrap().len()).sum()
}

#[test]
fn the_longest_beginning_is_found_and_goes_on_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let open = Open::new(folder.path());
    let all = tokens(300, 0);
    for length in [200, 40, 131] {
        let saved = open.save(&session(&all[..length]), Kind::Idle);
        assert!(saved.is_new);
        assert_eq!(saved.bytes, fs::metadata(folder.path().join(format!("{}.session", saved.id))).unwrap().len());
    }
    assert!(!open.save(&session(&all[..40]), Kind::Common).is_new);
    let check = |open: &Open| {
        for (length, found) in [(39, None), (40, Some(40)), (130, Some(40)), (199, Some(131)), (300, Some(200))] {
            assert_eq!(open.longest(&all[..length]), found);
        }
        assert_eq!(open.longest(&[&all[..100], &[9], &all[101..]].concat()), Some(40), "another conversation");
        assert_eq!(open.longest(&[]), None);
        let (mut loaded, mut whole) = (open.load(&all).unwrap(), session(&all[..200]));
        assert_eq!(bytes(&loaded), bytes(&whole));
        let next = |session: &mut Session<CpuBackend>| {
            session.prefill(&BACKEND, &all[200..], 64, &Cancel::default(), &mut |_| ()).unwrap()
        };
        assert_eq!(next(&mut loaded), next(&mut whole));
    };
    check(&open);
    drop(open);
    check(&Open::new(folder.path()));
    fs::remove_file(folder.path().join(FILE_NAME)).unwrap();
    check(&Open::new(folder.path()));
    fs::write(folder.path().join(FILE_NAME), [7; 5000]).unwrap();
    let (open, asides) = Open::with(folder.path(), ROOM, &binding());
    assert_eq!(asides, 1, "the database");
    check(&open);
}

#[cfg(unix)]
#[test]
fn nobody_else_can_read_snapshots() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("new");
    Open::new(&dir).save(&session(&tokens(40, 0)), Kind::Idle);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&dir), mode(&files(&dir, ".session")[0])), (0o700, 0o600));
}

#[test]
fn what_is_bound_to_something_else_is_not_found_but_kept() {
    let folder = tempfile::tempdir().unwrap();
    let all = tokens(60, 0);
    Open::new(folder.path()).save(&session(&all), Kind::Idle);
    let others = [
        Binding { identity: 6, ..binding() },
        Binding { arithmetic: Arithmetic::Plain, ..binding() },
        Binding { precision: Precision::Fast, ..binding() },
        Binding { backend: "another".into(), ..binding() },
        Binding { encoding: Encoding::V4_2604, ..binding() },
    ];
    for reindexed in [false, true] {
        for other in &others {
            if reindexed {
                fs::remove_file(folder.path().join(FILE_NAME)).unwrap();
            }
            let (open, asides) = Open::with(folder.path(), ROOM, other);
            assert_eq!((open.longest(&all), asides, open.snapshots.stats().snapshots), (None, 0, 1), "{other:?}");
        }
    }
    let mine = Open::new(folder.path());
    assert_eq!(mine.longest(&all), Some(60));
    let id = mine.snapshots.longest(&all).unwrap().id;
    drop(mine);
    let (other, _) = Open::with(folder.path(), ROOM, &others[2]);
    let error = other.snapshots.load(&*BACKEND, id, context()).err().unwrap();
    assert!(matches!(error, SnapshotsError::Unknown(_)), "{error}");
    other.save(&session(&all), Kind::Idle);
    assert_eq!(other.snapshots.stats().snapshots, 2);
}

#[test]
fn the_budget_is_never_exceeded_and_the_superseded_go_first() {
    let folder = tempfile::tempdir().unwrap();
    let open = Open::new(folder.path());
    let one = open.save(&session(&tokens(190, 0)), Kind::Common).bytes;
    drop(open);
    let budget = 4 * one;
    let (open, _) = Open::with(folder.path(), budget, &binding());
    let saves = |seed, length, kind| {
        let saved = open.save(&session(&tokens(length, seed)), kind);
        assert!(folder_bytes(folder.path()) <= budget);
        assert_eq!(open.snapshots.stats().bytes, folder_bytes(folder.path()));
        saved
    };
    saves(1, 190, Kind::Idle);
    saves(2, 150, Kind::Interval);
    saves(2, 190, Kind::Interval);
    let has = |seed| open.longest(&tokens(200, seed));
    // The beginning of 2's session has been superseded, then intervals are worth least, and what is in use stays.
    saves(3, 190, Kind::Shutdown);
    assert_eq!([0, 1, 2, 3].map(has), [Some(190); 4]);
    assert_eq!(open.longest(&tokens(180, 2)), None);
    let in_use = open.snapshots.longest(&tokens(200, 2)).unwrap();
    saves(4, 190, Kind::Idle);
    assert_eq!([0, 1, 2, 3, 4].map(|seed| has(seed).is_some()).iter().filter(|has| !**has).count(), 1);
    assert_eq!(([0, 2, 4].map(has), in_use.tokens), ([Some(190); 3], 190));
    drop(in_use);
    saves(5, 190, Kind::Idle);
    assert_eq!([0, 2, 4, 5].map(has), [Some(190), None, Some(190), Some(190)]);
    drop(open);

    let before = folder_bytes(folder.path());
    let (open, _) = Open::with(folder.path(), budget, &binding());
    let pins: Vec<_> = [0, 3, 4, 5, 1].iter().filter_map(|&seed| open.snapshots.longest(&tokens(200, seed))).collect();
    let error = open.snapshots.save(&*BACKEND, &session(&tokens(200, 6)), Kind::Common).unwrap_err();
    assert!(matches!(error, SnapshotsError::NoRoom { .. }), "{error}");
    assert_eq!(folder_bytes(folder.path()), before, "{} are in use", pins.len());
    drop((pins, open));

    // A smaller budget: what is too much goes when the folder is opened; what can never fit evicts nothing.
    let (open, _) = Open::with(folder.path(), one + one / 2, &binding());
    assert_eq!((open.snapshots.stats().snapshots, open.longest(&tokens(200, 0))), (1, Some(190)));
    let error = open.snapshots.save(&*BACKEND, &session(&tokens(900, 6)), Kind::Common).unwrap_err();
    assert!(matches!(error, SnapshotsError::TooLarge { .. }), "{error}");
    assert_eq!(open.longest(&tokens(200, 0)), Some(190));
}

#[test]
fn leftovers_are_removed_and_strangers_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let saved = Open::new(folder.path()).save(&session(&tokens(40, 0)), Kind::Idle);
    let name = |suffix: &str| folder.path().join(format!("{}{suffix}", saved.id));
    fs::write(name(".partial"), "half").unwrap();
    fs::write(folder.path().join("letter.txt"), "dear").unwrap();
    fs::write(folder.path().join("notes.session"), "session").unwrap();
    let open = Open::new(folder.path());
    assert!(!name(".partial").exists());
    assert!(folder.path().join("letter.txt").exists() && folder.path().join("notes.session").exists());
    assert_eq!(open.longest(&tokens(40, 0)), Some(40));
    fs::remove_file(name(".session")).unwrap();
    assert!(matches!(open.load(&tokens(40, 0)).err().unwrap(), SnapshotsError::Unknown(_)));
    assert_eq!(open.longest(&tokens(40, 0)), None);
    drop(open);
    assert_eq!(Open::new(folder.path()).snapshots.stats().snapshots, 0);
}

/// A folder may hold other things: whatever their names end with, they stay, and no directory is in the way.
#[test]
fn files_that_are_not_ours_stay_whatever_their_names_end_with() {
    let folder = tempfile::tempdir().unwrap();
    let saved = Open::new(folder.path()).save(&session(&tokens(40, 0)), Kind::Idle);
    let id = saved.id.to_string();
    let strangers = [
        "thesis.partial".to_owned(),
        "photo.damaged".to_owned(),
        "probe.partial".to_owned(),
        "notes.session.damaged".to_owned(),
        format!("{}.partial", id.to_uppercase()),
        format!("{}.session.damaged", &id[1..]),
    ];
    let directories =
        ["x.partial".to_owned(), format!("{}.partial", "0".repeat(64)), format!("{}.session", "1".repeat(64))];
    strangers.iter().for_each(|name| fs::write(folder.path().join(name), name).unwrap());
    directories.iter().for_each(|name| fs::create_dir(folder.path().join(name)).unwrap());
    let ours = folder.path().join(format!("{id}.session.damaged"));
    fs::write(&ours, [1; 9]).unwrap();
    // No budget at all: everything of ours goes.
    let (open, _) = Open::with(folder.path(), 0, &binding());
    assert_eq!(open.snapshots.stats().bytes, 0);
    assert!(!ours.exists() && files(folder.path(), &format!("{id}.session")).is_empty());
    for name in &strangers {
        assert_eq!(fs::read_to_string(folder.path().join(name)).unwrap(), *name);
    }
    assert!(directories.iter().all(|name| folder.path().join(name).is_dir()));
}

/// What was evicted from the disk does not count as saved any more.
#[test]
fn it_is_told_whether_a_session_is_on_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let open = Open::new(folder.path());
    let bytes = open.save(&session(&tokens(90, 0)), Kind::Idle).bytes;
    let has = |open: &Open, length, seed| open.snapshots.has(&tokens(length, seed));
    assert_eq!([(90, 0), (89, 0), (90, 1)].map(|(length, seed)| has(&open, length, seed)), [true, false, false]);
    drop(open);
    let (open, _) = Open::with(folder.path(), bytes + bytes / 2, &binding());
    assert!(has(&open, 90, 0));
    open.save(&session(&tokens(90, 1)), Kind::Idle);
    assert_eq!([0, 1].map(|seed| has(&open, 90, seed)), [false, true]);
}

/// Sessions that wait for a slow disk are few, and who is turned away is told.
#[test]
fn few_saves_wait() {
    let folder = tempfile::tempdir().unwrap();
    let open = Open::new(folder.path());
    let (send, replies) = mpsc::channel();
    std::thread::scope(|scope| {
        let worker = SnapshotWorker::spawn(scope, &*BACKEND, open.snapshots.clone(), context());
        let (go, waits) = mpsc::channel::<()>();
        worker.save(session(&tokens(30, 99)), Kind::Idle, Box::new(move |_| waits.recv().unwrap()));
        let until = Instant::now() + Duration::from_secs(60);
        while !open.snapshots.has(&tokens(30, 99)) {
            assert!(Instant::now() < until, "the first is saved");
        }
        let kinds =
            [Kind::Evicted, Kind::Idle, Kind::Common, Kind::Interval, Kind::Evicted, Kind::Evicted, Kind::Evicted];
        let last = [Kind::Shutdown; MOST_WAITING_SAVES];
        for (number, kind) in kinds.into_iter().chain(last).enumerate() {
            let send = send.clone();
            let reply = move |saved: Result<Saved, SnapshotsError>| {
                let saved = saved.map(|_| ()).map_err(|error| matches!(error, SnapshotsError::Busy));
                send.send((number, saved)).unwrap();
            };
            worker.save(session(&tokens(20, number as u32)), kind, Box::new(reply));
        }
        go.send(()).unwrap();
    });
    drop(send);
    let replies: Vec<_> = replies.iter().collect();
    let busy = [1, 3, 0].map(|number| (number, Err(true)));
    let saved = [2, 4, 5, 6, 7, 8, 9, 10].map(|number| (number, Ok(())));
    assert_eq!(replies, [&busy[..], &saved].concat());
}

/// Requests would otherwise wait for ever.
#[test]
fn a_panic_of_the_worker_leaves_nobody_waiting() {
    let folder = tempfile::tempdir().unwrap();
    let open = Open::new(folder.path());
    open.save(&session(&tokens(40, 0)), Kind::Idle);
    let (send, replies) = mpsc::channel();
    std::thread::scope(|scope| {
        let worker = SnapshotWorker::spawn(scope, &*BACKEND, open.snapshots.clone(), context());
        let load = || {
            let send = send.clone();
            let reply = move |loaded: Result<_, SnapshotsError>| {
                send.send(loaded.err().map(|error| error.to_string())).unwrap()
            };
            worker.load(open.snapshots.longest(&tokens(40, 0)).unwrap(), Box::new(reply));
        };
        let save = || {
            let send = send.clone();
            let reply =
                move |saved: Result<_, SnapshotsError>| send.send(saved.err().map(|error| error.to_string())).unwrap();
            worker.save(session(&tokens(30, 1)), Kind::Idle, Box::new(reply));
        };
        let (go, waits) = mpsc::channel::<()>();
        let breaks = move |_: Result<Saved, SnapshotsError>| {
            waits.recv().unwrap();
            panic!("on purpose");
        };
        worker.save(session(&tokens(30, 2)), Kind::Idle, Box::new(breaks));
        while !open.snapshots.has(&tokens(30, 2)) {}
        load();
        save();
        go.send(()).unwrap();
        let text = || replies.recv_timeout(Duration::from_secs(60)).unwrap().expect("an error");
        assert!([text(), text()].iter().all(|text| text.contains("panicked")));
        load();
        save();
        assert!([text(), text()].iter().all(|text| text.contains("panicked")));
    });
}

/// A folder with two snapshots.
static TWO: LazyLock<(tempfile::TempDir, [Saved; 2])> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let open = Open::new(folder.path());
    let saved = [(70, 0), (90, 1)].map(|(count, seed)| open.save(&session(&tokens(count, seed)), Kind::Idle));
    (folder, saved)
});
static LONG: LazyLock<Vec<u8>> = LazyLock::new(|| bytes(&session(&tokens(90, 1))));

/// Damage to the first of two files, as one finds it whose index knows the files, and one whose index does not.
fn damage_is_noticed(damage: impl Fn(&[u8]) -> Vec<u8>, indexed: bool) {
    let folder = tempfile::tempdir().unwrap();
    for file in files(TWO.0.path(), "") {
        fs::copy(&file, folder.path().join(file.file_name().unwrap())).unwrap();
    }
    let (short, long) = (tokens(70, 0), tokens(90, 1));
    let path = folder.path().join(format!("{}.session", TWO.1[0].id));
    let good = fs::read(&path).unwrap();
    let bad = damage(&good);
    if bad == good {
        return;
    }
    fs::write(&path, bad).unwrap();
    if !indexed {
        fs::remove_file(folder.path().join(FILE_NAME)).unwrap();
    }
    let (open, asides) = Open::with(folder.path(), ROOM, &binding());
    if asides == 0 {
        let error = open.load(&short).err().expect("damage is noticed");
        assert!(matches!(error, SnapshotsError::Damaged(_)), "{error}");
        assert!(error.to_string().contains("set aside"), "{error}");
    }
    assert_eq!(open.longest(&short), None);
    assert_eq!((files(folder.path(), ".damaged").len(), path.exists()), (1, false));
    assert_eq!(bytes(&open.load(&long).unwrap()), *LONG);
    assert_eq!(open.snapshots.stats().bytes, folder_bytes(folder.path()));
    drop(open);
    let (_, asides) = Open::with(folder.path(), ROOM, &binding());
    assert_eq!(asides, 0, "told once");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn a_flipped_byte_is_never_served(
        at in any::<prop::sample::Index>(), header in 0usize..120, in_header in any::<bool>(), flip in 1u8.., indexed in any::<bool>(),
    ) {
        damage_is_noticed(|good| {
            let mut bad = good.to_vec();
            bad[if in_header { header } else { at.index(good.len()) }] ^= flip;
            bad
        }, indexed);
    }

    #[test]
    fn a_truncated_or_longer_file_is_never_served(cut in any::<prop::sample::Index>(), grow: bool, indexed: bool) {
        damage_is_noticed(|good| match grow {
            true => [good, &good[..1 + cut.index(good.len())]].concat(),
            false => good[..cut.index(good.len())].to_vec(),
        }, indexed);
    }
}

#[test]
fn one_snapshot_under_the_name_of_another_is_not_served() {
    for indexed in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let open = Open::new(folder.path());
        let [a, b] = [0, 1].map(|seed| {
            let saved = open.save(&session(&tokens(70, seed)), Kind::Idle);
            folder.path().join(format!("{}.session", saved.id))
        });
        drop(open);
        fs::copy(&a, &b).unwrap();
        if !indexed {
            fs::remove_file(folder.path().join(FILE_NAME)).unwrap();
        }
        let (open, _) = Open::with(folder.path(), ROOM, &binding());
        assert!(open.longest(&tokens(70, 1)).is_none() || open.load(&tokens(70, 1)).is_err());
        assert_eq!(open.longest(&tokens(70, 1)), None);
        assert_eq!(bytes(&open.load(&tokens(70, 0)).unwrap()), bytes(&session(&tokens(70, 0))));
    }
}

/// Ten thousand files: headers are read once, when the index does not know them.
#[test]
fn ten_thousand_files_open_fast() {
    let folder = tempfile::tempdir().unwrap();
    let payload = [9; 100];
    for number in 0..10_000u64 {
        let mut id = [3; 32];
        id[..8].copy_from_slice(&number.to_le_bytes());
        let mut file = [&b"infallSN"[..], &1u32.to_le_bytes(), &1u32.to_le_bytes(), &[8; 32], &id].concat();
        for value in [1 + number, 1_700_000_000, payload.len() as u64, xxh3_64(&payload)] {
            file.extend(value.to_le_bytes());
        }
        file.extend(xxh3_64(&file).to_le_bytes());
        file.extend(payload);
        let name: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
        fs::write(folder.path().join(format!("{name}.session")), file).unwrap();
    }
    for known in [false, true] {
        let begun = Instant::now();
        let open = Open::new(folder.path());
        println!("{:?} with the index {}", begun.elapsed(), if known { "complete" } else { "empty" });
        assert_eq!(open.snapshots.stats().snapshots, 10_000);
    }
}

#[test]
fn a_worker_saves_and_loads_beside_others() {
    let folder = tempfile::tempdir().unwrap();
    let open = Open::new(folder.path());
    let (send, replies) = mpsc::channel();
    std::thread::scope(|scope| {
        let worker = SnapshotWorker::spawn(scope, &*BACKEND, open.snapshots.clone(), context());
        // Nothing is saved before the first job is done, which waits for the others to be there.
        let (go, waits) = mpsc::channel::<()>();
        worker.save(session(&tokens(30, 7)), Kind::Idle, Box::new(move |_| waits.recv().unwrap()));
        let until = Instant::now() + Duration::from_secs(60);
        while open.longest(&tokens(30, 7)).is_none() {
            assert!(Instant::now() < until, "the first is saved");
        }
        for (length, kind) in [(40, Kind::Common), (50, Kind::Idle), (60, Kind::Interval), (70, Kind::Idle)] {
            let send = send.clone();
            let reply = move |saved: Result<Saved, SnapshotsError>| {
                let saved = saved.map(|saved| saved.is_new);
                send.send((length, saved.map_err(|error| matches!(error, SnapshotsError::Superseded)))).unwrap();
            };
            worker.save(session(&tokens(length, 0)), kind, Box::new(reply));
        }
        go.send(()).unwrap();
    });
    drop(send);
    assert_eq!(
        replies.iter().collect::<Vec<_>>(),
        [(50, Err(true)), (60, Err(true)), (40, Ok(true)), (70, Ok(true))],
        "two were replaced while they waited"
    );
    let (send, loaded) = mpsc::channel();
    std::thread::scope(|scope| {
        let worker = SnapshotWorker::spawn(scope, &*BACKEND, open.snapshots.clone(), context());
        let found = open.snapshots.longest(&tokens(100, 0)).unwrap();
        worker.load(found, Box::new(move |session| send.send(session.unwrap()).unwrap()));
        let session_ = loaded.recv().unwrap();
        assert_eq!(bytes(&session_), bytes(&session(&tokens(70, 0))));
    });
}

/// What makes this program a child that saves into a folder, for as long as it lives.
const CHILD: &str = "INFALL_TEST_SAVES_INTO";

/// Saves conversations that grow, and tells each that is saved.
fn save_forever(dir: &Path) -> ! {
    let open = Open::new(dir);
    let first = open.snapshots.stats().snapshots as u32;
    println!("ready");
    for seed in first.. {
        let mut session = session(&tokens(20, seed));
        for length in 21..60 {
            let more = &tokens(length, seed)[session.tokens().len()..];
            session.prefill(&BACKEND, more, 64, &Cancel::default(), &mut |_| ()).unwrap();
            match open.snapshots.save(&*BACKEND, &session, Kind::Idle) {
                Ok(_) => println!("saved {seed} {length}"),
                Err(error) => println!("failed {error}"),
            }
        }
    }
    unreachable!("it is killed")
}

/// This very test as another process, perhaps begun by a shell.
fn child(dir: &Path, test: &str, shell: Option<&str>) -> Child {
    let this = std::env::current_exe().unwrap();
    let mut command = match shell {
        None => Command::new(&this),
        Some(before) => {
            let mut command = Command::new("bash");
            command.args(["-c", &format!("{before}; exec \"$0\" \"$@\"")]).arg(&this);
            command
        }
    };
    command.args(["--exact", test, "--nocapture"]).env(CHILD, dir).stdout(Stdio::piped());
    command.spawn().unwrap()
}

/// The words of a line, from `saved`, `failed` or `ready` on: the test harness may have begun the line.
fn words(line: &str) -> Vec<String> {
    let begin = ["saved ", "failed ", "ready"].iter().filter_map(|word| line.find(word)).min();
    begin.map_or(Vec::new(), |at| line[at..].split(' ').map(str::to_owned).collect())
}

#[test]
fn a_killed_process_loses_nothing_that_it_told() {
    if let Some(dir) = std::env::var_os(CHILD) {
        save_forever(Path::new(&dir));
    }
    let folder = tempfile::tempdir().unwrap();
    let kills: u32 = if std::env::var_os("INFALL_TEST_FULL").is_some() { 50 } else { 12 };
    let mut told: HashMap<(u32, usize), ()> = HashMap::new();
    let mut leftovers = 0;
    for round in 0..kills {
        let mut child = child(folder.path(), "a_killed_process_loses_nothing_that_it_told", None);
        let (send, lines) = mpsc::channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        let reader = std::thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|line| send.send(line)));
        while words(&lines.recv_timeout(Duration::from_secs(60)).unwrap()).first().is_none_or(|word| word != "ready") {}
        if round == 0 {
            let error = Database::open(folder.path()).err().expect("another process has it");
            assert!(matches!(error, DatabaseError::InUse { .. }), "{error}");
        }
        std::thread::sleep(Duration::from_micros(u64::from(round * 7919 % 200) * 1000 + u64::from(round * 131 % 1000)));
        child.kill().unwrap();
        child.wait().unwrap();
        reader.join().unwrap().unwrap();
        for line in lines.iter() {
            let words = words(&line);
            assert_eq!(words.len(), 3, "{line}");
            told.insert((words[1].parse().unwrap(), words[2].parse().unwrap()), ());
        }
        leftovers += files(folder.path(), ".partial").len();
        let open = Open::new(folder.path());
        assert_eq!(files(folder.path(), ".partial").len(), 0);
        assert_eq!(open.snapshots.stats().snapshots, files(folder.path(), ".session").len());
        for &(seed, length) in told.keys() {
            assert_eq!(open.longest(&tokens(length, seed)), Some(length), "{seed} {length}");
        }
    }
    let open = Open::new(folder.path());
    for &(seed, length) in told.keys() {
        let loaded = open.load(&tokens(length, seed)).unwrap();
        assert_eq!(bytes(&loaded), bytes(&session(&tokens(length, seed))));
    }
    println!("{} snapshots told, all there; {kills} kills, {leftovers} of them while a file was written", told.len());
    assert!(!told.is_empty());
}

#[cfg(target_os = "linux")]
#[test]
fn a_file_that_may_not_grow_is_told_and_harms_nothing() {
    if let Some(dir) = std::env::var_os(CHILD) {
        let open = Open::new(Path::new(&dir));
        let small = open.save(&session(&tokens(10, 0)), Kind::Idle);
        let error = open.snapshots.save(&*BACKEND, &session(&tokens(900, 1)), Kind::Idle).unwrap_err();
        assert!(
            matches!(error, SnapshotsError::Io { .. }) && error.to_string().contains("on a disk with room"),
            "{error}"
        );
        assert_eq!((open.longest(&tokens(10, 0)), open.longest(&tokens(900, 1))), (Some(10), None));
        assert_eq!(open.snapshots.stats().bytes, small.bytes);
        assert!(open.save(&session(&tokens(11, 2)), Kind::Idle).is_new, "it goes on");
        println!("saved all right");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let open = Open::new(folder.path());
    let large = open.save(&session(&tokens(900, 5)), Kind::Idle).bytes;
    let small = open.save(&session(&tokens(10, 5)), Kind::Idle).bytes;
    // The database has to have room; its file is this large already.
    let database = fs::metadata(folder.path().join(FILE_NAME)).unwrap().len();
    drop(open);
    println!("{large} bytes may not be written, {small} may; the database has {database}");
    let fresh = tempfile::tempdir().unwrap();
    let blocks = (large - 1) / 1024;
    let limited = child(
        fresh.path(),
        "a_file_that_may_not_grow_is_told_and_harms_nothing",
        Some(&format!("trap '' XFSZ; ulimit -f {blocks}")),
    );
    let out = limited.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && text.contains("saved all right"), "{text}");
    assert_eq!(files(fresh.path(), ".partial").len(), 0);
}

/// A small disk of its own, where one may mount it.
struct Disk(tempfile::TempDir);

impl Disk {
    fn mount(bytes: u64) -> Option<Disk> {
        let folder = tempfile::tempdir().unwrap();
        let size = format!("size={bytes}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(folder.path()).output();
        match mounted {
            Ok(out) if out.status.success() => Some(Disk(folder)),
            other => {
                println!("not run: no disk could be mounted here ({other:?})");
                None
            }
        }
    }

    fn remount(&self, how: &str) {
        let done = Command::new("mount").args(["-o", &format!("remount,{how}")]).arg(self.0.path()).status().unwrap();
        assert!(done.success());
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        Command::new("umount").arg(self.0.path()).status().unwrap();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_told_and_harms_nothing() {
    let Some(disk) = Disk::mount(8 << 20) else { return };
    let dir = disk.0.path();
    let open = Open::new(dir);
    let before = session(&tokens(100, 0));
    open.save(&before, Kind::Common);
    let filler = dir.join("filler");
    for round in 0..3 {
        // Everything is full, then all but a little.
        let _ = fs::write(&filler, vec![1; 8 << 20]);
        if round > 0 {
            let full = fs::metadata(&filler).unwrap().len();
            fs::OpenOptions::new().write(true).open(&filler).unwrap().set_len(full - round * 20_000).unwrap();
        }
        let error = open.snapshots.save(&*BACKEND, &session(&tokens(150, 1)), Kind::Idle).unwrap_err();
        println!("{error}");
        assert!(["No space left", "error of its disk"].iter().any(|why| error.to_string().contains(why)), "{error}");
        assert_eq!(files(dir, ".partial").len(), 0);
        assert_eq!(bytes(&open.load(&tokens(100, 0)).unwrap()), bytes(&before));
        // The database, too, tells it, and goes on when there is room.
        let records = open.database.records("a", Limits { count: 9, bytes: 1 << 20 });
        let error = records.put(b"large", &vec![1; (1 << 20) - 10]).unwrap_err();
        println!("{error}");
        fs::remove_file(&filler).unwrap();
        let until = Instant::now() + Duration::from_secs(30);
        while let Err(error) = records.put(&[round as u8], b"small") {
            assert!(Instant::now() < until, "{error}");
            std::thread::sleep(Duration::from_millis(100));
        }
        assert!((0..=round as u8).all(|round| records.get(&[round]).unwrap().is_some()));
    }
    assert!(open.save(&session(&tokens(150, 1)), Kind::Idle).is_new, "it goes on when there is room");
    drop(open);
    let open = Open::new(dir);
    assert_eq!((open.longest(&tokens(100, 0)), open.longest(&tokens(150, 1))), (Some(100), Some(150)));
}

#[cfg(target_os = "linux")]
#[test]
fn a_read_only_folder_is_told() {
    let Some(disk) = Disk::mount(8 << 20) else { return };
    let dir = disk.0.path().to_owned();
    let open = Open::new(&dir);
    open.save(&session(&tokens(100, 0)), Kind::Idle);
    drop(open);
    disk.remount("ro");
    let error = Database::open(&dir).err().unwrap();
    assert!(matches!(error, DatabaseError::Io { .. }) && error.to_string().contains("can be written"), "{error}");
    let error = Snapshots::open(&dir, ROOM, &binding(), &Database::in_memory()).err().unwrap();
    assert!(matches!(error, SnapshotsError::Io { .. }) && error.to_string().contains("can be written"), "{error}");
    disk.remount("rw");
    let (database, _) = Database::open(&dir).unwrap();
    let (snapshots, _) = Snapshots::open(&dir, ROOM, &binding(), &database).unwrap();
    assert_eq!(snapshots.longest(&tokens(100, 0)).unwrap().tokens, 100);
}
