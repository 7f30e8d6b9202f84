//! The streaming store with every reader: the right bytes at any number of slots, and what happens when the disk does not
//! do what it should.

use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use store::reader::{Client, Completion, Faults, Read, Reader, SimulatedDisk, Simulation};
use store::{
    AlignedBytes, Cancel, Checksums, ExpertExtents, Extent, HostStore, Prefetch, ReaderKind, Seal, SealError, Source,
    StoreError, open_reader, read_all,
};
use tempfile::TempDir;

const EXPERTS: usize = 16;
/// What ends a process that aborts.
const SIGABRT: i32 = 6;
/// Bytes of the parts of layers 0 and 1, and of layer 2: two size classes, and no part begins on a page border.
const PART_BYTES: [[u64; 3]; 3] = [[10_000, 10_000, 300], [10_000, 10_000, 300], [9_000, 20_000, 4_096]];

/// A file of stacked parts, in which a byte tells where it is.
struct Weights {
    _dir: TempDir,
    path: PathBuf,
    layers: Vec<ExpertExtents>,
}

fn byte_at(offset: u64) -> u8 {
    (offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

impl Weights {
    fn new() -> Weights {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut end) = (dir.path().join("weights"), 77);
        let mut stacked = |bytes: u64| {
            let extent = Extent { file: 0, offset: end, bytes: bytes * EXPERTS as u64 };
            end += extent.bytes + 100;
            extent
        };
        let layers = PART_BYTES.map(|parts| ExpertExtents::stacked(EXPERTS, parts.map(&mut stacked)));
        let bytes: Vec<u8> = (0..end - 100).map(byte_at).collect();
        std::fs::write(&path, bytes).unwrap();
        Weights { _dir: dir, path, layers: layers.to_vec() }
    }

    fn source(&self) -> Source {
        source(&self.path)
    }

    fn streamed(&self, kind: ReaderKind, slots: [usize; 2]) -> HostStore {
        let (reader, note) = open_reader(&self.source(), kind).unwrap();
        if let Some(note) = note {
            println!("another reader than asked for: {note}");
        }
        HostStore::streamed(reader, &self.layers, &slots, 2, None).unwrap()
    }

    /// Leases experts and compares every byte; how many came before an error.
    fn take(&self, store: &HostStore, layer: usize, experts: &[u32], cancel: &Cancel) -> Result<usize, StoreError> {
        let mut leases = store.lease(layer, experts, experts.iter().map(|&expert| (expert, 0)));
        let mut came = Vec::new();
        while let Some(lease) = leases.next_ready(cancel) {
            let lease = lease?;
            for part in 0..3 {
                let extent = self.layers[layer].part(part, lease.expert());
                let right = lease.part(part).iter().zip(extent.offset..).all(|(&byte, offset)| byte == byte_at(offset));
                assert!(
                    right && lease.part(part).len() as u64 == extent.bytes,
                    "expert {} part {part}",
                    lease.expert()
                );
            }
            came.push(lease.expert());
        }
        came.sort_unstable();
        let mut wanted = experts.to_vec();
        wanted.sort_unstable();
        assert_eq!(came, wanted, "each expert once");
        Ok(came.len())
    }

    /// Everything, in an order that reuses slots.
    fn take_all(&self, store: &HostStore) -> Result<(), StoreError> {
        let experts: Vec<u32> = (0..EXPERTS as u32).collect();
        for round in 0..3 {
            for layer in [0, 1, 2, 1] {
                let some: Vec<u32> = experts.iter().copied().filter(|expert| expert % 3 != round).collect();
                self.take(store, layer, &some, &Cancel::default())?;
            }
            store.pass_ended(1);
        }
        Ok(())
    }
}

fn source(path: &Path) -> Source {
    Source::open([(path, path.metadata().unwrap().len())]).unwrap()
}

/// Faults of a test, for the time the program runs.
fn faults() -> &'static Faults {
    Box::leak(Box::new(Faults::none()))
}

fn simulated(faults: &'static Faults) -> ReaderKind {
    ReaderKind::Simulated(Simulation { faults, ..Simulation::reordering(7) })
}

fn readers() -> [ReaderKind; 4] {
    [ReaderKind::Buffered, ReaderKind::Direct, ReaderKind::Uring, simulated(faults())]
}

#[test]
fn every_reader_brings_every_expert_at_any_number_of_slots() {
    let weights = Weights::new();
    for kind in readers() {
        for slots in [[1, 1], [2, 1], [3, 7], [32, 16]] {
            let store = weights.streamed(kind, slots);
            weights.take_all(&store).unwrap();
            let counts = store.counts();
            let demanded = counts.cache.hits + counts.cache.misses;
            assert_eq!(demanded, 3 * 4 * EXPERTS as u64 * 2 / 3, "{kind:?} {slots:?}");
            assert!(
                counts.cache.misses > 0 && (counts.cache.hits > 0 || slots[0] < 3),
                "{kind:?} {slots:?}: {counts:?}"
            );
        }
    }
}

#[test]
fn a_model_that_is_part_of_the_program_streams_too() {
    let weights = Weights::new();
    let image = Vec::leak(std::fs::read(&weights.path).unwrap());
    for kind in readers() {
        let (reader, note) = open_reader(&Source::from_image("built in", image), kind).unwrap();
        assert_eq!(note, None);
        assert!(["memcpy", "simulated"].contains(&reader.name()), "{kind:?} is {}", reader.name());
        weights.take_all(&HostStore::streamed(reader, &weights.layers, &[2, 1], 2, None).unwrap()).unwrap();
    }
}

#[test]
fn bytes_read_are_those_of_the_misses() {
    let weights = Weights::new();
    let store = weights.streamed(ReaderKind::Direct, [1, 1]);
    for layer in [0, 2] {
        weights.take(&store, layer, &[1, 2, 3], &Cancel::default()).unwrap();
    }
    let per_expert = |layer: usize| PART_BYTES[layer].iter().sum::<u64>();
    let counts = store.counts();
    assert_eq!((counts.cache.misses, counts.read_bytes), (6, 3 * (per_expert(0) + per_expert(2))));
}

#[test]
fn resident_and_streamed_show_the_same_bytes() {
    let weights = Weights::new();
    for kind in readers() {
        let (reader, _) = open_reader(&weights.source(), kind).unwrap();
        let mut loaded_bytes = 0;
        let store =
            HostStore::resident(&*reader, &weights.layers, &Cancel::default(), &mut |bytes| loaded_bytes += bytes)
                .unwrap();
        let expected: u64 = weights.layers.iter().map(ExpertExtents::total_bytes).sum();
        assert_eq!((loaded_bytes, store.memory_bytes()), (expected, expected));
        weights.take_all(&store).unwrap();
        assert_eq!(store.counts(), Default::default());
    }
}

#[test]
fn large_tensors_are_read_in_pieces() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("weights");
    std::fs::write(&path, (0..(9 << 20) + 12_345).map(byte_at).collect::<Vec<_>>()).unwrap();
    let extents = [(5, 9 << 20), (0, 0), (4096, 4096), (100, 8 << 20), ((9 << 20) + 12_000, 345)]
        .map(|(offset, bytes)| Extent { file: 0, offset, bytes });
    for kind in readers() {
        let (reader, _) = open_reader(&source(&path), kind).unwrap();
        let mut loaded_bytes = 0;
        let loaded = read_all(&*reader, &extents, &Cancel::default(), &mut |bytes| loaded_bytes += bytes).unwrap();
        for (extent, bytes) in extents.iter().zip(&loaded) {
            assert_eq!(bytes.len() as u64, extent.bytes);
            assert!(bytes.iter().zip(extent.offset..).all(|(&byte, offset)| byte == byte_at(offset)), "{extent:?}");
        }
        assert_eq!(loaded_bytes, extents.iter().map(|extent| extent.bytes).sum::<u64>());
    }
}

#[test]
fn a_broken_read_is_an_error_and_the_next_request_is_right() {
    let (weights, faults) = (Weights::new(), faults());
    for slots in [[1, 1], [3, 2], [32, 16]] {
        for failing_reads in [1, 2, 9] {
            let store = weights.streamed(simulated(faults), slots);
            faults.failing_reads.store(failing_reads, Ordering::Relaxed);
            let experts: Vec<u32> = (0..EXPERTS as u32).collect();
            let layer = failing_reads as usize % 3;
            let error = weights.take(&store, layer, &experts, &Cancel::default()).unwrap_err();
            assert!(matches!(&error, StoreError::Read { path, .. } if *path == weights.path), "{error}");
            faults.failing_reads.store(0, Ordering::Relaxed);
            weights.take_all(&store).unwrap();
        }
    }
    // While weights that every token uses are loaded.
    faults.failing_reads.store(1, Ordering::Relaxed);
    let (reader, _) = open_reader(&weights.source(), simulated(faults)).unwrap();
    let error = HostStore::resident(&*reader, &weights.layers, &Cancel::default(), &mut |_| {}).err().unwrap();
    assert!(matches!(error, StoreError::Read { .. }), "{error}");
}

#[test]
fn a_file_truncated_in_use_is_an_error_that_says_so() {
    for kind in readers() {
        let weights = Weights::new();
        let store = weights.streamed(kind, [2, 2]);
        weights.take(&store, 0, &[1], &Cancel::default()).unwrap();
        let whole = weights.path.metadata().unwrap().len();
        let cut = weights.layers[2].part(1, 8).offset + 10;
        let file = std::fs::File::options().write(true).open(&weights.path).unwrap();
        file.set_len(cut).unwrap();
        let error = weights.take(&store, 2, &[2, 8], &Cancel::default()).unwrap_err();
        assert!(matches!(&error, StoreError::Short { found_bytes, .. } if *found_bytes == cut), "{kind:?}: {error}");
        // What is still there is right, and so is the rest once it is back.
        weights.take(&store, 1, &[3, 4, 5], &Cancel::default()).unwrap();
        drop(file);
        std::fs::write(&weights.path, (0..whole).map(byte_at).collect::<Vec<_>>()).unwrap();
        weights.take_all(&store).unwrap();
    }
}

#[test]
fn a_file_replaced_in_use_goes_on_being_read() {
    for kind in readers() {
        let weights = Weights::new();
        let store = weights.streamed(kind, [2, 2]);
        let other = weights.path.with_extension("new");
        std::fs::write(&other, vec![0; 1000]).unwrap();
        std::fs::rename(&other, &weights.path).unwrap();
        // The open file is the old one, whatever is at the path now.
        weights.take_all(&store).unwrap();
    }
}

#[test]
fn a_slow_disk_is_waited_for_in_its_own_time() {
    let weights = Weights::new();
    let simulation = Simulation { latency_us: 5_000_000, ..Simulation::reordering(3) };
    let disk = Arc::new(SimulatedDisk::new(weights.source(), simulation));
    let store = HostStore::streamed(disk.clone(), &weights.layers, &[3, 2], 2, None).unwrap();
    let began = Instant::now();
    weights.take_all(&store).unwrap();
    assert!(disk.now_us() > 5_000_000 && began.elapsed() < Duration::from_secs(5), "{} us", disk.now_us());
}

#[test]
fn waiting_for_a_stuck_disk_can_be_cancelled() {
    let (weights, faults) = (Weights::new(), faults());
    let store = weights.streamed(simulated(faults), [3, 2]);
    weights.take(&store, 0, &[1, 2], &Cancel::default()).unwrap();
    faults.stuck.store(true, Ordering::Relaxed);
    let cancel = Cancel::default();
    let waited = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| weights.take(&store, 0, &[1, 2, 3, 4], &cancel).unwrap_err());
        std::thread::sleep(Duration::from_millis(100));
        assert!(!waiting.is_finished(), "a stuck disk brings nothing");
        let cancelled = Instant::now();
        cancel.cancel();
        assert!(matches!(waiting.join().unwrap(), StoreError::Cancelled(_)));
        cancelled.elapsed()
    });
    // It looks every 50 ms; the rest is for a machine that is busy.
    assert!(waited < Duration::from_secs(1), "{waited:?}");
    faults.stuck.store(false, Ordering::Relaxed);
    weights.take_all(&store).unwrap();
}

#[test]
fn leases_dropped_anywhere_lose_nothing() {
    let weights = Weights::new();
    for kind in readers() {
        let store = weights.streamed(kind, [3, 1]);
        for taken in 0..6 {
            let _pass = store.pass_begins();
            let mut leases = store.lease(taken % 3, &[1, 3, 5, 7, 9, 11], [].into_iter());
            for _ in 0..taken {
                leases.next_ready(&Cancel::default()).unwrap().unwrap();
            }
            store.prefetch((taken + 1) % 3, &mut (0..9), Prefetch::Certain);
            drop(leases);
        }
        weights.take_all(&store).unwrap();
    }
}

#[test]
fn requests_at_the_same_time_share_the_slots() {
    let weights = Weights::new();
    for kind in [ReaderKind::Buffered, ReaderKind::Direct, ReaderKind::Uring] {
        for slots in [[1, 1], [3, 2]] {
            let store = weights.streamed(kind, slots);
            let start = Barrier::new(3);
            std::thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| {
                        start.wait();
                        weights.take_all(&store).unwrap();
                    });
                }
            });
        }
    }
}

#[test]
fn a_store_can_be_dropped_while_it_reads() {
    let weights = Weights::new();
    for kind in readers() {
        let store = weights.streamed(kind, [8, 8]);
        store.prefetch(0, &mut (0..8), Prefetch::Certain);
        drop(store.lease(2, &[1, 2, 3, 4], [].into_iter()));
    }
}

/// The simulated disk ends reads only when somebody waits: one prefetched expert has begun by then, and no other will.
#[test]
fn what_was_prefetched_for_a_pass_ends_with_it() {
    let weights = Weights::new();
    let store = weights.streamed(simulated(faults()), [32, 16]);
    let pass = store.pass_begins();
    store.prefetch(0, &mut (0..8), Prefetch::Certain);
    drop(pass);
    weights.take(&store, 2, &[1, 2, 3], &Cancel::default()).unwrap();
    assert_eq!((store.counts().cache.misses, store.counts().cache.prefetched), (3, 1));
}

/// Keeps all reads that it is given.
struct Keeping {
    in_flight: usize,
    reads: Mutex<Vec<Read>>,
}

impl Reader for Keeping {
    fn submit(&self, read: Read) {
        self.reads.lock().unwrap().push(read);
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn name(&self) -> &'static str {
        "keeping"
    }
}

#[test]
fn two_experts_are_under_way_or_one_with_a_reader_for_fewer_than_six_reads() {
    let weights = Weights::new();
    for (in_flight, reads) in [(16, 6), (8, 6), (6, 6), (5, 3), (3, 3), (1, 3)] {
        let reader = Arc::new(Keeping { in_flight, reads: Mutex::default() });
        let store = HostStore::streamed(reader.clone(), &weights.layers, &[32, 16], 2, None).unwrap();
        let _leases = store.lease(0, &[0, 1, 2, 3, 4, 5], [].into_iter());
        assert_eq!(reader.reads.lock().unwrap().len(), reads, "a reader for {in_flight}");
    }
}

/// A client that panics, with each reader in a process of its own.
#[test]
fn a_panic_in_a_readers_thread_ends_the_program() {
    struct Panicking;
    impl Client for Panicking {
        fn done(&self, _: Completion) {
            panic!("a client that panics");
        }
    }
    let (name, variable) = ("a_panic_in_a_readers_thread_ends_the_program", "PANIC_OF_READER");
    let kinds = [ReaderKind::Buffered, ReaderKind::Direct, ReaderKind::Uring];
    if let Ok(kind) = std::env::var(variable) {
        let weights = Weights::new();
        let (reader, _) = open_reader(&weights.source(), kinds[kind.parse::<usize>().unwrap()]).unwrap();
        let client: Arc<dyn Client> = Arc::new(Panicking);
        let (extent, memory) = (Extent { file: 0, offset: 0, bytes: 4096 }, AlignedBytes::zeroed(4096).unwrap());
        reader.submit(Read { id: 0, extent, memory, client: Arc::downgrade(&client) });
        std::thread::sleep(Duration::from_secs(10));
        return;
    }
    for (kind, reader) in kinds.iter().enumerate() {
        let mut again = Command::new(std::env::current_exe().unwrap());
        let status = again.args(["--exact", name]).env(variable, kind.to_string()).output().unwrap().status;
        assert_eq!(status.signal(), Some(SIGABRT), "{reader:?}: {status}");
    }
}

/// The weights' seal, through its file's bytes.
fn checksums(weights: &Weights) -> Checksums {
    let (reader, _) = open_reader(&weights.source(), ReaderKind::Buffered).unwrap();
    let mut sealed_bytes = 0;
    let seal = Seal::make(&weights.source(), &*reader, &weights.layers, &Cancel::default(), &mut |n| sealed_bytes += n);
    assert_eq!(sealed_bytes, weights.layers.iter().map(ExpertExtents::total_bytes).sum::<u64>());
    let seal = Seal::from_bytes(&seal.unwrap().to_bytes()).unwrap();
    seal.of_model(&weights.source(), weights.source().identity().unwrap(), &weights.layers).unwrap()
}

#[test]
fn a_changed_byte_of_a_sealed_model_is_an_error_that_names_its_expert() {
    for kind in readers() {
        let weights = Weights::new();
        let (reader, _) = open_reader(&weights.source(), kind).unwrap();
        let store = HostStore::streamed(reader, &weights.layers, &[3, 2], 2, Some(checksums(&weights))).unwrap();
        assert!(store.checks());
        let all: Vec<u32> = (0..EXPERTS as u32).collect();
        let layer = weights.layers.len() - 1;
        weights.take(&store, layer, &all, &Cancel::default()).unwrap();

        let damaged = weights.layers[layer].part(1, 9);
        let file = std::fs::File::options().write(true).open(&weights.path).unwrap();
        let at = damaged.offset + damaged.bytes - 1;
        file.write_all_at(&[byte_at(at) ^ 1], at).unwrap();
        let error = weights.take(&store, layer, &all, &Cancel::default()).unwrap_err();
        let StoreError::Damaged { path, layer: in_layer, expert: 9, part: 1, .. } = &error else { panic!("{error}") };
        assert_eq!((path, *in_layer as usize), (&weights.path, layer), "{error}");
        // It was not kept, and the others are right.
        assert!(weights.take(&store, layer, &[9], &Cancel::default()).is_err());
        weights.take(&store, layer, &[3, 8, 10], &Cancel::default()).unwrap();
        file.write_all_at(&[byte_at(at)], at).unwrap();
        weights.take(&store, layer, &all, &Cancel::default()).unwrap();
    }
}

#[test]
fn the_seal_of_another_model_is_refused() {
    let weights = Weights::new();
    let (reader, _) = open_reader(&weights.source(), ReaderKind::Buffered).unwrap();
    let seal = Seal::make(&weights.source(), &*reader, &weights.layers, &Cancel::default(), &mut |_| {}).unwrap();
    let refused = |identity: u128, layers: &[ExpertExtents]| {
        matches!(seal.clone().of_model(&weights.source(), identity, layers), Err(SealError::OtherModel { .. }))
    };
    let identity = weights.source().identity().unwrap();
    assert!(refused(identity + 1, &weights.layers) && refused(identity, &weights.layers[1..]));
    assert!(!refused(identity, &weights.layers));
    let stopped = Cancel::default();
    stopped.cancel();
    let made = Seal::make(&weights.source(), &*reader, &weights.layers, &stopped, &mut |_| {});
    assert!(matches!(made, Err(StoreError::Cancelled(_))));
}
