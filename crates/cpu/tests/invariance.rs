//! Exact and Fast are both batch-invariant: how rows are cut into passes, what else is in a pass, threads, instruction
//! sets, saving, stepping back and failing in the middle change no bit of any logit.

mod common;
#[path = "../../quant/tests/common/levels.rs"]
mod levels;

use common::{References, advance, assert_same, distance, exact, export, fast, load, logits, plain, rows};
use cpu::{CpuBackend, Level, Options, Pass};
use levels::levels;
use model::state::{CHECKPOINT_TOKENS, FREE_REWIND_TOKENS, MAX_CHECKPOINTS};
use model::{Arithmetic, Backend, Cancel, Error, Forward, NoObserver, Observer, Stage, forward};

const MODEL: &str = "tiny-iq2";

fn tokens() -> Vec<u32> {
    References::open(&format!("{MODEL}.refs")).tokens()
}

/// Both precisions, each with and without the roundings of stored rows.
fn all_ways() -> [Options; 4] {
    [exact(), plain(), fast(), Options { arithmetic: Arithmetic::Plain, ..fast() }]
}

/// Fast is another computation than Exact, so the tests below have not compared one with itself.
#[test]
fn fast_is_not_exact_but_near_it() {
    for name in [MODEL, "tiny-q4", "tiny-q8", "mixed3-mixed"] {
        let tokens = &References::open(&format!("{name}.refs")).tokens()[..140];
        let [exact, fast] = [exact(), fast()].map(|options| logits(&load(name, options), tokens, &[140]));
        let distance = distance(&fast, &exact);
        println!("{name}: relative L2 distance {distance:.1e}");
        // Weights are random, so a choice of experts that flips moves much.
        assert!(distance > 1e-4 && distance < 0.3, "{name}: {distance:e}");
    }
}

#[test]
fn chunking_changes_no_bit() {
    for options in all_ways() {
        let (backend, tokens) = (load(MODEL, options), &tokens()[..280]);
        let whole = logits(&backend, tokens, &[tokens.len()]);
        for sizes in [&[1][..], &[3], &[64], &[127], &[128], &[129], &[250, 1]] {
            let chunked = logits(&backend, tokens, sizes);
            assert_same(&chunked, &whole, backend.config().vocab_size, &format!("chunks of {sizes:?}"));
        }
    }
}

/// An indexer's keys are looked through in parts of 512, which are 2,048 tokens: what a row chooses behind the first part does
/// not depend on the rows that look with it.
#[test]
fn chunking_changes_no_bit_where_indexers_see_several_parts() {
    for options in [exact(), fast()] {
        let backend = load(MODEL, Options { threads: 2, ..options });
        assert!(backend.config().compress_ratios.contains(&4) && backend.config().index_top_k < 512);
        let tokens: Vec<u32> = (0..2120u32).map(|i| i * 37 % backend.config().vocab_size as u32).collect();
        let whole = logits(&backend, &tokens, &[tokens.len()]);
        let mut sizes = vec![1; 120];
        sizes[0] = 2001;
        assert_same(
            &logits(&backend, &tokens, &sizes),
            &whole,
            backend.config().vocab_size,
            "one by one from 2,001 on",
        );
    }
}

#[test]
fn threads_change_no_bit() {
    // 16 heads and 512-wide experts, so that a single row is shared between threads too.
    let tokens = &References::open("pro-iq2.refs").tokens()[..300];
    for options in [exact(), fast()] {
        let of = |threads| {
            let backend = load("pro-iq2", Options { threads, ..options.clone() });
            (logits(&backend, tokens, &[240, 1]), backend.shared_regions())
        };
        let (expected, shared) = of(1);
        assert_eq!(shared, 0, "one thread shares nothing");
        for threads in [2, 3] {
            let (ours, shared) = of(threads);
            assert!(shared > 61 * 6, "{threads} threads shared work only {shared} times");
            assert_same(&ours, &expected, 512, &format!("{:?}, {threads} threads", options.precision));
        }
    }
}

#[test]
fn instruction_sets_change_no_bit() {
    let levels = levels();
    let check = |name: &str, options: Options, count: usize| {
        let tokens = &References::open(&format!("{name}.refs")).tokens()[..count];
        let of = |level| logits(&load(name, Options { level, ..options.clone() }), tokens, &[70]);
        let scalar = of(Level::Scalar);
        for &level in levels.iter().filter(|&&level| level != Level::Scalar) {
            assert_same(&of(level), &scalar, 512, &format!("{name}, {:?} at {level:?}", options.precision));
        }
    };
    check(MODEL, exact(), 140);
    // Scalar's fused multiply-adds are calls: rows without roundings, which are all that differs, are few.
    check(MODEL, plain(), 72);
    // Experts of every kind of block.
    ["tiny-iq2", "tiny-q4", "tiny-q8", "mixed3-mixed"].into_iter().for_each(|name| check(name, fast(), 140));
}

#[test]
fn other_sessions_in_a_pass_change_no_bit() {
    for options in [exact(), fast()] {
        let (backend, tokens) = (load(MODEL, options), tokens());
        let other: Vec<u32> = tokens.iter().rev().copied().collect();
        let vocab = backend.config().vocab_size;
        let (alone, other_alone) = (logits(&backend, &tokens, &[400]), logits(&backend, &other, &[400]));
        let (mut a, mut b) = (backend.new_state().unwrap(), backend.new_state().unwrap());
        let (mut together, mut other_together) = (Vec::new(), Vec::new());
        // The sessions advance at different speeds and change places in the pass.
        for (turn, (ours, theirs)) in tokens.chunks(40).zip(other.chunks(29)).enumerate() {
            let (first, second) = (rows(0, a.position(), ours), rows(1, b.position(), theirs));
            let swapped = turn % 2 == 1;
            let batch = if swapped { [second, first].concat() } else { [first, second].concat() };
            let mixed = forward(&backend, batch, &mut [&mut a, &mut b], &Cancel::default(), &mut NoObserver).unwrap();
            let (x, y) = mixed.split_at(vocab * if swapped { theirs.len() } else { ours.len() });
            let (ours, theirs) = if swapped { (y, x) } else { (x, y) };
            together.extend_from_slice(ours);
            other_together.extend_from_slice(theirs);
        }
        assert_same(&together, &alone[..together.len()], vocab, "first session");
        assert_same(&other_together, &other_alone[..other_together.len()], vocab, "second session");
        assert!(together.len() == alone.len() && other_together.len() > vocab * 256);
    }
}

/// A prompt is read while another session goes on between the layers, as the engine does.
#[test]
fn passes_between_the_layers_of_a_pass_change_no_bit() {
    for options in [exact(), fast()] {
        let (backend, tokens) = (load(MODEL, options), tokens());
        let vocab = backend.config().vocab_size;
        let (ours, theirs) = tokens.split_at(200);
        let (expected, expected_between) = (logits(&backend, ours, &[200]), logits(&backend, theirs, &[200]));
        let (mut a, mut b) = (backend.new_state().unwrap(), backend.new_state().unwrap());
        let (mut between, mut next) = (Vec::new(), theirs.chunks(3));
        let mut pass = Forward::begin(&backend, rows(0, 0, ours), &[&a], &mut NoObserver).unwrap();
        while !pass.is_through() {
            pass.layer(&[&a], &Cancel::default(), &mut NoObserver).unwrap();
            between.extend(advance(&backend, &mut b, next.next().unwrap()));
        }
        let logits = pass.end(&mut [&mut a], &mut NoObserver).unwrap();
        assert_same(&logits, &expected, vocab, "the prompt");
        assert_same(&between, &expected_between[..between.len()], vocab, "between");
        assert_eq!(a.position(), 200);
    }
}

#[test]
fn saving_and_loading_changes_no_bit() {
    for options in all_ways() {
        let (backend, tokens) = (load(MODEL, options), tokens());
        let whole = logits(&backend, &tokens, &[400]);
        let vocab = backend.config().vocab_size;
        for cut in [1, 3, 127, 128, 201, 399] {
            let mut state = backend.new_state().unwrap();
            advance(&backend, &mut state, &tokens[..cut]);
            let saved = export(&backend, &state);
            let mut loaded = backend.import(&mut saved.as_slice()).unwrap();
            let rest = advance(&backend, &mut loaded, &tokens[cut..]);
            assert_same(&rest, &whole[cut * vocab..], vocab, &format!("saved at {cut}"));
            let again = export(&backend, &backend.import(&mut saved.as_slice()).unwrap());
            assert!(saved == again, "saving what was loaded gives the same bytes");
        }
    }
}

#[test]
fn a_state_of_one_precision_is_refused_by_the_other() {
    let tokens = tokens();
    let backends = [exact(), fast()].map(|options| load(MODEL, options));
    let saved = backends.each_ref().map(|backend| {
        let mut state = backend.new_state().unwrap();
        advance(backend, &mut state, &tokens[..10]);
        export(backend, &state)
    });
    let [exact, fast] = &backends;
    let message = |result: Result<model::State, Error>| result.err().expect("another precision").to_string();
    let of_exact = message(fast.import(&mut saved[0].as_slice()));
    assert!(of_exact.contains("in Exact precision, this session computes in Fast"), "{of_exact}");
    let of_fast = message(exact.import(&mut saved[1].as_slice()));
    assert!(of_fast.contains("in Fast precision, this session computes in Exact"), "{of_fast}");
    assert!(exact.import(&mut saved[0].as_slice()).is_ok() && fast.import(&mut saved[1].as_slice()).is_ok());
}

#[test]
fn stepping_back_changes_no_bit() {
    for options in [exact(), fast()] {
        let (backend, tokens) = (load(MODEL, options), tokens());
        let whole = logits(&backend, &tokens, &[400]);
        let vocab = backend.config().vocab_size;
        let wrong: Vec<u32> = tokens.iter().map(|token| (token + 7) % 500).collect();
        for (from, target) in [(400, 399), (400, 336), (333, 270), (64, 0), (70, 6), (400, 300), (390, 256), (350, 40)]
        {
            let mut state = backend.new_state().unwrap();
            advance(&backend, &mut state, &tokens[..target]);
            advance(&backend, &mut state, &wrong[target..from]);
            let reached = state.rewind(target);
            let near = from - target <= FREE_REWIND_TOKENS;
            let checkpoint = target / CHECKPOINT_TOKENS * CHECKPOINT_TOKENS;
            assert_eq!(reached, if near { target } else { checkpoint }, "from {from} to {target}");
            let rest = advance(&backend, &mut state, &tokens[reached..]);
            assert_same(&rest, &whole[reached * vocab..], vocab, &format!("from {from} back to {target}"));
        }
    }
}

#[test]
fn stepping_back_again_and_again_changes_no_bit() {
    for options in [exact(), fast()] {
        let (backend, tokens) = (load(MODEL, options), tokens());
        let whole = logits(&backend, &tokens, &[400]);
        let vocab = backend.config().vocab_size;
        let wrong: Vec<u32> = tokens.iter().map(|token| (token + 7) % 500).collect();
        let mut state = backend.new_state().unwrap();
        // As speculation does: five tokens, of which the last three are wrong and taken back.
        while state.position() + 5 <= tokens.len() {
            let start = state.position();
            let draft = [&tokens[start..start + 2], &wrong[start + 2..start + 5]].concat();
            let ours = advance(&backend, &mut state, &draft)[..2 * vocab].to_vec();
            assert_same(&ours, &whole[start * vocab..(start + 2) * vocab], vocab, &format!("two of five from {start}"));
            assert_eq!(state.rewind(start + 2), start + 2);
        }
        // Also over a save, which must keep the free range.
        let saved = export(&backend, &state);
        let mut state = backend.import(&mut saved.as_slice()).unwrap();
        let target = state.position() - 60;
        assert_eq!(state.rewind(target), target);
        let rest = advance(&backend, &mut state, &tokens[target..]);
        assert_same(&rest, &whole[target * vocab..], vocab, "after a save");
    }
}

#[test]
fn checkpoints_are_few_and_reach_far_back() {
    let (backend, tokens) = (load(MODEL, Options::default()), tokens());
    let long: Vec<u32> = tokens.iter().cycle().take(2000).copied().collect();
    let mut state = backend.new_state().unwrap();
    long.chunks(300).for_each(|chunk| {
        advance(&backend, &mut state, chunk);
    });
    let checkpoints: Vec<usize> = state.checkpoints().collect();
    assert_eq!(checkpoints.len(), MAX_CHECKPOINTS, "{checkpoints:?}");
    assert!(checkpoints.iter().all(|position| position % CHECKPOINT_TOKENS == 0));
    assert!(checkpoints.contains(&1920) && checkpoints.contains(&1792) && checkpoints[0] <= 512, "{checkpoints:?}");
    let before = checkpoints[3];
    let mut fresh = backend.new_state().unwrap();
    let expected = logits(&backend, &long[..before + 50], &[500]);
    assert_eq!(state.rewind(before + 60), before);
    let ours = advance(&backend, &mut state, &long[before..before + 50]);
    let vocab = backend.config().vocab_size;
    assert_same(&ours, &expected[before * vocab..], vocab, "from a checkpoint");
    assert_eq!((fresh.rewind(10), state.rewind(usize::MAX)), (0, before + 50));
}

/// Fails after one stage of one layer.
struct Fault {
    at: (Option<usize>, Stage),
    struck: bool,
}

impl Observer<CpuBackend> for Fault {
    fn after(&mut self, layer: Option<usize>, stage: Stage, _: &CpuBackend, _: &Pass) -> Result<(), Error> {
        if (layer, stage) == self.at {
            self.struck = true;
            return Err(Error::Cancelled);
        }
        Ok(())
    }
}

#[test]
fn a_pass_that_fails_anywhere_leaves_no_trace() {
    let (backend, tokens) = (load(MODEL, Options::default()), tokens());
    let whole = logits(&backend, &tokens[..200], &[200]);
    let vocab = backend.config().vocab_size;
    let mut places = vec![(None, Stage::Embed), (None, Stage::Head)];
    places.extend((0..backend.config().layers).flat_map(|layer| Stage::LAYER.map(|stage| (Some(layer), stage))));
    let (mut a, mut b) = (backend.new_state().unwrap(), backend.new_state().unwrap());
    advance(&backend, &mut a, &tokens[..125]);
    for &at in &places {
        let before = (export(&backend, &a), export(&backend, &b));
        let mut fault = Fault { at, struck: false };
        let batch = [rows(0, 125, &tokens[125..131]), rows(1, 0, &tokens[..5])].concat();
        let result = forward(&backend, batch, &mut [&mut a, &mut b], &Cancel::default(), &mut fault);
        assert!(fault.struck && result.is_err(), "{at:?} was not reached");
        assert!(before == (export(&backend, &a), export(&backend, &b)), "{at:?} left a trace");
    }
    let rest = advance(&backend, &mut a, &tokens[125..200]);
    assert_same(&rest, &whole[125 * vocab..], vocab, "after all faults");
    assert_eq!(places.len(), 2 + 12 * backend.config().layers);
}

/// Cancels at the router of one layer, so that the next check is that of an expert.
struct CancelAtRouter<'a>(usize, &'a Cancel);

impl Observer<CpuBackend> for CancelAtRouter<'_> {
    fn after(&mut self, layer: Option<usize>, stage: Stage, _: &CpuBackend, _: &Pass) -> Result<(), Error> {
        assert!(layer <= Some(self.0) && stage != Stage::RoutedExperts || layer < Some(self.0), "ran on: {stage:?}");
        if (layer, stage) == (Some(self.0), Stage::Route) {
            self.1.cancel();
        }
        Ok(())
    }
}

#[test]
fn cancelling_stops_before_the_next_expert_and_leaves_no_trace() {
    let (backend, tokens) = (load(MODEL, Options::default()), tokens());
    let mut state = backend.new_state().unwrap();
    let cancel = Cancel::default();
    let batch = rows(0, 0, &tokens[..40]);
    let result = forward(&backend, batch, &mut [&mut state], &cancel, &mut CancelAtRouter(2, &cancel));
    assert!(matches!(result, Err(Error::Cancelled)));
    let ours = advance(&backend, &mut state, &tokens[..40]);
    assert_same(&ours, &logits(&backend, &tokens[..40], &[40]), backend.config().vocab_size, "after a cancel");
}

#[test]
fn rows_that_do_not_fit_are_refused() {
    let backend = load(MODEL, Options::default());
    let row = |session, position, token| model::Row { session, position, token, logits: true };
    for (batch, word) in [
        (vec![], "at least one row"),
        (vec![row(0, 0, 512)], "vocabulary of 512"),
        (vec![row(0, 1, 5)], "has seen 0 tokens"),
        (vec![row(0, 0, 5), row(0, 2, 5)], "expected 1"),
        (vec![row(2, 0, 5)], "session 2 of 2"),
        (vec![row(0, 0, 5), row(1, 0, 5), row(0, 1, 5)], "stand together"),
    ] {
        let (mut a, mut b) = (backend.new_state().unwrap(), backend.new_state().unwrap());
        let result = forward(&backend, batch, &mut [&mut a, &mut b], &Cancel::default(), &mut NoObserver);
        let message = result.unwrap_err().to_string();
        assert!(message.contains(word), "{message:?} should say {word:?}");
    }
}

#[test]
fn damaged_states_are_refused() {
    let (backend, tokens) = (load(MODEL, Options::default()), tokens());
    let mut state = backend.new_state().unwrap();
    advance(&backend, &mut state, &tokens[..150]);
    let saved = export(&backend, &state);
    let refuse = |bytes: &[u8]| backend.import(&mut &bytes[..]).err().expect("a damaged state").to_string();
    for cut in (0..saved.len()).step_by(saved.len() / 16) {
        refuse(&saved[..cut]);
    }
    for at in (0..saved.len()).step_by(saved.len() / 200) {
        let mut damaged = saved.clone();
        damaged[at] ^= 0x41;
        refuse(&damaged);
    }
    // With a checksum that fits, damage may go unnoticed, but never crash or make an impossible state.
    for at in (0..saved.len() - 4).step_by(saved.len() / 500) {
        let mut damaged = saved[..saved.len() - 4].to_vec();
        damaged[at] ^= 0xff;
        damaged.extend(crc32fast::hash(&damaged).to_le_bytes());
        if let Ok(mut state) = backend.import(&mut damaged.as_slice()) {
            assert!(state.position() == 150 && state.rewind(100) <= 100);
        }
    }
    let twin = load("tiny-q4", Options::default());
    assert!(twin.import(&mut saved.as_slice()).err().unwrap().to_string().contains("another model file"));
    let other = load(MODEL, Options { arithmetic: Arithmetic::Plain, ..Options::default() });
    assert!(other.import(&mut saved.as_slice()).err().unwrap().to_string().contains("arithmetic"));
    assert!(refuse(b"GGUF, not a state").contains("not a saved state"));
}
