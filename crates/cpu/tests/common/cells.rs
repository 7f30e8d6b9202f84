//! The cells of the proof that streaming changes no bit: every combination of [`AXES`], how one is run, and what it must
//! show.
//!
//! The suite runs a cover of them; `cargo run -p infall-cpu --example streaming` runs all of them.

use std::collections::BTreeSet;
use std::fmt;

use cpu::{CpuBackend, Options};
use model::{Activation, Backend, Cancel, Error, Model, Observer, Precision, Stage, State, forward};
use store::reader::Simulation;
use store::{CacheCounts, ExpertExtents, ReaderKind, Residency, Source, StoreCounts};

use crate::common::{open, rows, tokens};

/// Tokens of the prompt, and of those decoded one by one after it.
pub const PROMPT: usize = 300;
pub const DECODED: usize = 16;
/// Tokens that another session has read before, where one has.
const OTHERS: usize = 60;

/// What differs from cell to cell.
pub const AXES: [(&str, &[&str]); 7] = [
    ("model", &["tiny-iq2", "mixed3-mixed", "nano"]),
    ("precision", &["Exact", "Fast"]),
    ("reader", &["pread buffered", "pread direct", "io_uring", "simulated"]),
    ("slots", &["fewest", "K", "K + 1", "25 %", "50 %", "100 %"]),
    ("threads", &["1", "2"]),
    ("history", &["cold", "warm", "after another session"]),
    ("chunk", &["1", "17", "128", "all"]),
];
const MODEL: usize = 0;
const PRECISION: usize = 1;
const READER: usize = 2;
pub const SLOTS: usize = 3;
pub const THREADS: usize = 4;
const HISTORY: usize = 5;
pub const CHUNK: usize = 6;
/// The first and the last of `slots`.
const FEWEST: usize = 0;
const ALL: usize = 5;

const PRECISIONS: [Precision; 2] = [Precision::Exact, Precision::Fast];

/// A value on each axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell(pub [usize; AXES.len()]);

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let values: Vec<String> =
            (0..AXES.len()).map(|axis| format!("{} {}", AXES[axis].0, self.value(axis))).collect();
        f.write_str(&values.join(", "))
    }
}

impl Cell {
    /// Every cell, models one after the other.
    pub fn all() -> impl Iterator<Item = Cell> {
        (0..AXES.iter().map(|(_, values)| values.len()).product()).map(|mut number| {
            let mut cell = Cell([0; AXES.len()]);
            for (axis, (_, values)) in AXES.iter().enumerate().rev() {
                cell.0[axis] = number % values.len();
                number /= values.len();
            }
            cell
        })
    }

    pub fn value(&self, axis: usize) -> &'static str {
        AXES[axis].1[self.0[axis]]
    }

    /// What the reader is, and what it calls itself.
    fn reader(&self) -> (ReaderKind, &'static str) {
        match self.value(READER) {
            "pread buffered" => (ReaderKind::Buffered, "pread, buffered"),
            "pread direct" => (ReaderKind::Direct, "pread, direct"),
            "io_uring" => (ReaderKind::Uring, "io_uring"),
            _ => {
                let seed = self.0.iter().sum::<usize>() as u64;
                (ReaderKind::Simulated(Simulation::reordering(seed)), "simulated")
            }
        }
    }

    /// The cells that a backend runs one after the other for this one.
    pub fn sequence(&self) -> Vec<Cell> {
        let mut cold = *self;
        cold.0[HISTORY] = 0;
        if self.value(HISTORY) == "warm" { vec![cold, *self] } else { vec![*self] }
    }

    fn chunk(&self) -> usize {
        self.value(CHUNK).parse().unwrap_or(PROMPT)
    }
}

/// So many slots, of all size classes together, as a plan shares them out: at least one for each.
pub fn streamed(model: &Model, slots: usize) -> Residency {
    let config = &model.config;
    let slots = store::plan::share_slots(&layers_of_class(model), config.experts, slots as u64);
    Residency::Streamed { slots }
}

fn extents(model: &Model) -> Vec<ExpertExtents> {
    model.experts.iter().map(|layer| layer.extents).collect()
}

fn layers_of_class(model: &Model) -> Vec<usize> {
    let (class_of_layer, slot_bytes) = store::size_classes(&extents(model));
    (0..slot_bytes.len()).map(|class| class_of_layer.iter().filter(|&&other| other == class).count()).collect()
}

/// What passes ask of the store, counted from the routers' choices.
#[derive(Default)]
struct Demands {
    /// Distinct experts of each layer of each pass.
    experts: u64,
    bytes: u64,
    used: BTreeSet<(usize, u32)>,
    expert_bytes: Vec<u64>,
}

impl Demands {
    fn new(model: &Model) -> Demands {
        let bytes = |layer: &ExpertExtents| layer.expert_bytes().iter().sum::<usize>() as u64;
        Demands { expert_bytes: extents(model).iter().map(bytes).collect(), ..Demands::default() }
    }
}

impl Observer<CpuBackend> for Demands {
    fn after(
        &mut self,
        layer: Option<usize>,
        stage: Stage,
        backend: &CpuBackend,
        pass: &cpu::Pass,
    ) -> Result<(), Error> {
        if let (Some(layer), Stage::Route) = (layer, stage) {
            let chosen = backend.read(pass, Activation::Experts).into_iter().map(|expert| (layer, expert as u32));
            let chosen: BTreeSet<(usize, u32)> = chosen.collect();
            self.experts += chosen.len() as u64;
            self.bytes += chosen.len() as u64 * self.expert_bytes[layer];
            self.used.extend(chosen);
        }
        Ok(())
    }
}

/// A model, and what all of its cells must give.
pub struct Subject {
    model: Model,
    source: Source,
    tokens: Vec<u32>,
    /// Bits of all logits in each precision, from resident experts with one thread and in one pass.
    expected: [Vec<u32>; 2],
}

impl Subject {
    /// Model number `model` of [`AXES`].
    pub fn new(model: usize) -> Subject {
        let name = AXES[MODEL].1[model];
        let (model, source) = open(name);
        let mut subject =
            Subject { model, source, tokens: tokens(name, PROMPT + DECODED), expected: Default::default() };
        subject.expected = PRECISIONS.map(|precision| {
            let options = Options { threads: 1, precision, reader: ReaderKind::Buffered, ..Options::default() };
            let backend = subject.load(options);
            let logits = advance(&backend, &mut backend.new_state().unwrap(), &subject.tokens, &mut model::NoObserver);
            assert_eq!(backend.stats(), Default::default(), "resident experts are not read again");
            logits
        });
        assert_ne!(subject.expected[0], subject.expected[1], "{name}: two precisions");
        subject
    }

    fn load(&self, options: Options) -> CpuBackend {
        CpuBackend::load(&self.model, &self.source, options, &mut |_| {}).unwrap()
    }

    /// Slots of a cell, of all size classes together.
    fn slots(&self, cell: Cell) -> usize {
        let config = &self.model.config;
        let share = |percent: usize| config.layers * config.experts * percent / 100;
        let classes = layers_of_class(&self.model).len();
        match cell.value(SLOTS) {
            "fewest" => classes,
            "K" => config.experts_used.max(classes),
            "K + 1" => config.experts_used.max(classes) + 1,
            percent => share(percent.trim_end_matches(" %").parse().unwrap()),
        }
    }

    /// Runs a cell and panics if anything is not as it must be; what its store did. A warm cell is preceded by its cold one,
    /// which is then checked too. If the system has no such reader, says so instead.
    pub fn run(&self, cell: Cell) -> Result<Vec<(Cell, StoreCounts)>, String> {
        let (reader, reader_name) = cell.reader();
        let residency = streamed(&self.model, self.slots(cell));
        let (precision, threads) = (PRECISIONS[cell.0[PRECISION]], cell.0[THREADS] + 1);
        let backend = self.load(Options { threads, precision, residency, reader, ..Options::default() });
        if let Some(note) = backend.note() {
            return Err(note.to_owned());
        }
        assert_eq!(backend.reader().name(), reader_name, "{cell}");

        let (mut demands, mut done) = (Demands::new(&self.model), Vec::new());
        // One session that has read something else and lives on, and one whose tokens come between ours.
        let mut others = [(); 2].map(|()| backend.new_state().unwrap());
        let is_disturbed = cell.value(HISTORY) == "after another session";
        if is_disturbed {
            let tokens: Vec<u32> = self.tokens.iter().rev().copied().take(OTHERS).collect();
            for chunk in tokens.chunks(cell.chunk()) {
                advance(&backend, &mut others[0], chunk, &mut demands);
            }
        }
        for cell in cell.sequence() {
            let before = backend.stats().cache;
            demands.used.clear();
            self.read(cell, &backend, is_disturbed.then_some(&mut others[1]), &mut demands);
            self.check_path(cell, &backend, before, &demands);
            done.push((cell, backend.stats()));
        }
        Ok(done)
    }

    /// Reads the prompt in the cell's chunks and the rest token by token, and compares all logits; `between` reads a token
    /// of its own after every fourth pass.
    fn read(&self, cell: Cell, backend: &CpuBackend, mut between: Option<&mut State>, demands: &mut Demands) {
        let (prompt, decoded) = self.tokens.split_at(PROMPT);
        let mut state = backend.new_state().unwrap();
        let mut between_tokens = self.tokens.iter().rev();
        let mut ours = Vec::new();
        for (pass, chunk) in prompt.chunks(cell.chunk()).chain(decoded.chunks(1)).enumerate() {
            ours.extend(advance(backend, &mut state, chunk, demands));
            if let (Some(other), true) = (between.as_deref_mut(), pass.is_multiple_of(4)) {
                let token = between_tokens.next().expect("as many tokens as passes");
                advance(backend, other, &[*token], demands);
            }
        }
        let expected = &self.expected[cell.0[PRECISION]];
        let differ = ours.iter().zip(expected).position(|(ours, expected)| ours != expected);
        assert_eq!(differ.map(|at| at / self.model.config.vocab_size), None, "{cell}: the first row with other bits");
        assert_eq!(ours.len(), expected.len(), "{cell}");
    }

    /// That what was asked for is what ran: slots, threads, and reads where there must be some and nowhere else. `before`
    /// is what had happened before the last run, `demands` what was asked since loading and which experts the last run used.
    fn check_path(&self, cell: Cell, backend: &CpuBackend, before: CacheCounts, demands: &Demands) {
        let stats = backend.stats();
        let (total, slots) = (stats.cache, self.slots(cell));
        let what = format!("{cell}: {slots} slots, {stats:?}, {} experts used last", demands.used.len());
        let Residency::Streamed { slots: of_class } = streamed(&self.model, slots) else { unreachable!("just asked") };
        assert_eq!(of_class.iter().sum::<usize>(), slots, "{what}");
        assert_eq!(backend.weight_bytes().experts, store::slots_bytes(&extents(&self.model), &of_class), "{what}");
        assert_eq!(backend.shared_regions() > 0, cell.0[THREADS] > 0, "{what}: work is shared between threads");

        assert_eq!(total.hits + total.misses, demands.experts, "{what}: every demand is a hit or a miss");
        let misses = total.misses - before.misses;
        let loads = misses + total.prefetch_hits - before.prefetch_hits;
        if cell.0[SLOTS] == ALL {
            assert_eq!(total.evictions, 0, "{what}: everything has a slot");
            let wanted = match cell.value(HISTORY) {
                "cold" => demands.used.len()..demands.used.len() + 1,
                "warm" => 0..1,
                _ => 0..demands.used.len() + 1,
            };
            assert!(wanted.contains(&(loads as usize)), "{what}: {loads} loads, expected {wanted:?}");
        }
        let missing = self.without_slot(&of_class, &demands.used);
        assert!(missing == 0 || misses > 0 && loads as usize >= missing && total.evictions > 0, "{what}: {missing}");

        // A read of an expert that was read ahead may still be under way.
        let least = demands.expert_bytes.iter().min().expect("there are layers") * total.misses;
        let most = demands.expert_bytes.iter().max().expect("there are layers") * (total.misses + total.prefetched);
        assert!((least..=most).contains(&stats.read_bytes), "{what}: bytes of the misses, {least} to {most}");
        if cell.0[SLOTS] == FEWEST && layers_of_class(&self.model).iter().all(|&layers| layers > 1) {
            assert_eq!((total.hits, total.prefetched), (0, 0), "{what}: with one slot every expert is read");
            assert_eq!(stats.read_bytes, demands.bytes, "{what}");
        }
    }

    /// How many experts in use have no slot, however slots are given to them.
    fn without_slot(&self, slots_of_class: &[usize], used: &BTreeSet<(usize, u32)>) -> usize {
        let (class_of_layer, _) = store::size_classes(&extents(&self.model));
        let in_use = |class: usize| used.iter().filter(|(layer, _)| class_of_layer[*layer] == class).count();
        slots_of_class.iter().enumerate().map(|(class, &slots)| in_use(class).saturating_sub(slots)).sum()
    }
}

/// Bits of the logits of `tokens`, read in one pass.
fn advance(
    backend: &CpuBackend,
    state: &mut State,
    tokens: &[u32],
    observer: &mut dyn Observer<CpuBackend>,
) -> Vec<u32> {
    let rows = rows(0, state.position(), tokens);
    let logits = forward(backend, rows, &mut [state], &Cancel::default(), observer).unwrap();
    logits.into_iter().map(f32::to_bits).collect()
}
