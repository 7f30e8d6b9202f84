//! How rows are cut into passes, what else is in a pass, stepping back, failing in the middle, saving and moving between
//! backends change no bit of any logit: in Exact never, in Fast as long as passes that are read by tiles (more than 8 rows; routed
//! experts, more than `choice_rows`) stay such.

mod common;

use common::{
    PRECISIONS, advance, assert_same, distance, exact, export, fast, in_plain, in_precision, load, logits, on_cpu,
    on_gpu, plain, rows, tokens,
};
use gpu::{GpuBackend, GpuPass, GpuState, Options};
use model::state::CHECKPOINT_TOKENS;
use model::{
    Arithmetic, Backend, Cancel, Error, Forward, NoObserver, Observer, Precision, Row, Stage, SubLayer, forward,
};

const MODEL: &str = "tiny-iq2";

/// Tokens that no pass of a test should have read.
fn wrong(tokens: &[u32]) -> Vec<u32> {
    tokens.iter().map(|token| (token + 7) % 500).collect()
}

/// Beginnings are read on the processor here and below: on software every row of Exact takes a processor long.
#[test]
fn chunking_changes_no_bit_of_exact() {
    const START: usize = 62;
    let tokens = tokens(MODEL, START + 76);
    // Passes that fit a ring and that do not, of as many rows as share weights and of one more, over a checkpoint.
    // Another session is in the pass of all of them, once with more rows than a ring has room for, too.
    for (options, on_cpu, sizes, others) in [
        (in_precision(Precision::Exact), exact(), &[1, 66, 9][..], 66),
        (in_plain(Precision::Exact), plain(), &[65, 1, 8, 2], 9),
    ] {
        let backend = on_gpu(MODEL, options.clone());
        let mut chunked = on_the_processor(&backend, on_cpu, &backend.new_state().unwrap(), &tokens[..START]);
        let (mut whole, mut other) = (backend.fork(&chunked).unwrap(), backend.new_state().unwrap());
        let batch = [rows(0, START, &tokens[START..]), rows(1, 0, &tokens[7..7 + others])].concat();
        let logits =
            forward(&backend, batch, &mut [&mut whole, &mut other], &Cancel::default(), &mut NoObserver).unwrap();
        let mut at = START;
        for &count in sizes {
            let ours = advance(&backend, &mut chunked, &tokens[at..at + count]);
            let expected = &logits[512 * (at - START)..][..ours.len()];
            assert_same(&ours, expected, 512, &format!("{:?}, {count} rows from {at}", options.arithmetic));
            at += count;
        }
        assert_eq!(at, tokens.len());
        let ours = advance(&backend, &mut backend.new_state().unwrap(), &tokens[7..16]);
        let expected = &logits[512 * (at - START)..][..ours.len()];
        assert_same(&ours, expected, 512, &format!("{:?}, the other session's first rows", options.arithmetic));
    }
}

/// A prompt's passes lie on a grid; behind them, small passes of any size give the same bits.
#[test]
fn small_passes_change_no_bit_of_fast() {
    let (backend, tokens) = (on_gpu(MODEL, in_precision(Precision::Fast)), tokens(MODEL, 82));
    let mut prompt = backend.new_state().unwrap();
    let read = advance(&backend, &mut prompt, &tokens[..70]);
    let saved = export(&backend, &prompt);
    let decoded = |size: usize| -> Vec<f32> {
        let mut state = backend.import(&mut &saved[..]).unwrap();
        tokens[70..].chunks(size).flat_map(|chunk| advance(&backend, &mut state, chunk)).collect()
    };
    let expected = decoded(1);
    for size in [2, 3, 5, 8] {
        assert_same(&decoded(size), &expected, 512, &format!("passes of {size} after the prompt"));
    }
    let exact = logits(&on_cpu(MODEL, Arithmetic::Official), &tokens[..70], &[70]);
    let distance = distance(&read, &exact);
    assert!(distance > 1e-6 && distance < 0.3, "Fast is another computation than Exact but near it: {distance:e}");
}

/// A session that has read `tokens`.
fn past(backend: &GpuBackend, precision: Precision, tokens: &[u32]) -> GpuState {
    on_the_processor(backend, cpu::Options { precision, ..fast() }, &backend.new_state().unwrap(), tokens)
}

/// What becomes of a session that reads `tokens` on the processor, which takes less time.
fn on_the_processor(backend: &GpuBackend, options: cpu::Options, state: &GpuState, tokens: &[u32]) -> GpuState {
    let cpu = load(MODEL, options);
    let mut there = cpu.import(&mut &export(backend, state)[..]).unwrap();
    advance(&cpu, &mut there, tokens);
    backend.import(&mut &export(&cpu, &there)[..]).unwrap()
}

/// Dispatches of a pass.
#[derive(Default)]
struct Dispatches(u64);

impl Observer<GpuBackend> for Dispatches {
    fn after(&mut self, _: Option<usize>, stage: Stage, backend: &GpuBackend, pass: &GpuPass) -> Result<(), Error> {
        if stage == Stage::Head {
            self.0 = backend.stage_times(pass)?.1;
        }
        Ok(())
    }
}

/// Logits of a pass, and its dispatches.
fn counted(backend: &GpuBackend, batch: Vec<Row>, states: &mut [&mut GpuState]) -> (Vec<f32>, u64) {
    let mut dispatches = Dispatches::default();
    let logits = forward(backend, batch, states, &Cancel::default(), &mut dispatches).unwrap();
    assert!(dispatches.0 > 0);
    (logits, dispatches.0)
}

/// Sessions that go on in step end their windows of every kind in the same pass: there was no room for so many rotations.
#[test]
fn sessions_in_step_end_their_windows_together() {
    let (backend, tokens) = (on_gpu(MODEL, in_precision(Precision::Exact)), tokens(MODEL, 130));
    let mut alone = past(&backend, Precision::Exact, &tokens[..126]);
    let mut sessions: Vec<_> = (0..8).map(|_| backend.fork(&alone).unwrap()).collect();
    for position in 126..130 {
        let (expected, of_one) = counted(&backend, rows(0, position, &tokens[position..][..1]), &mut [&mut alone]);
        let batch: Vec<_> = (0..8).flat_map(|session| rows(session, position, &tokens[position..][..1])).collect();
        let mut states: Vec<_> = sessions.iter_mut().collect();
        let (all, of_all) = counted(&backend, batch, &mut states);
        assert_eq!(of_all, of_one, "dispatches of eight sessions and of one, at {position}");
        for logits in all.chunks(expected.len()) {
            assert_same(logits, &expected, 512, &format!("at {position}"));
        }
    }
}

/// Sessions that each have more rows than a ring has room for: the first once read the second's keys. In Exact the test of
/// chunking has such a pass.
#[test]
fn two_large_runs_in_a_pass_change_no_bit() {
    let (backend, tokens) = (on_gpu(MODEL, in_precision(Precision::Fast)), tokens(MODEL, 75));
    let each = [&tokens[..65], &tokens[7..75]];
    let mut sessions = [backend.new_state(), backend.new_state()].map(Result::unwrap);
    let batch = (0..2).flat_map(|session| rows(session, 0, each[session])).collect();
    let [first, second] = &mut sessions;
    let both = forward(&backend, batch, &mut [first, second], &Cancel::default(), &mut NoObserver).unwrap();
    let expected = each.map(|tokens| logits(&backend, tokens, &[tokens.len()])).concat();
    assert_same(&both, &expected, 512, "both");
}

/// Five sessions as unlike as can be: of other lengths, in both rings, stepped back, with and without chosen rows, ending windows
/// at other times. One dispatch computes all of them, or two of them where an adapter can bind no more.
#[test]
fn sessions_in_one_dispatch_change_no_bit() {
    let counts: [[usize; 5]; 3] = [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [2, 1, 3, 1, 1]];
    for (precision, sessions_together, counts) in
        [(Precision::Exact, 8, &counts[..]), (Precision::Fast, 8, &counts), (Precision::Fast, 2, &counts[2..])]
    {
        let backend = on_gpu(MODEL, Options { sessions_together, ..in_precision(precision) });
        let tokens = tokens(MODEL, 140);
        let mut long = past(&backend, precision, &tokens[..61]);
        advance(&backend, &mut long, &tokens[61..126]);
        let [mut longer, mut stepped_back, mut short] =
            [backend.fork(&long), backend.fork(&long), backend.new_state()].map(Result::unwrap);
        advance(&backend, &mut longer, &tokens[126..127]);
        assert_eq!(backend.rewind(&mut stepped_back, 101), 101);
        advance(&backend, &mut short, &tokens[..3]);
        let mut middle = backend.fork(&short).unwrap();
        advance(&backend, &mut middle, &tokens[3..11]);
        let mut sessions = [long, stepped_back, short, longer, middle];
        let mut alone = sessions.each_ref().map(|state| backend.fork(state).unwrap());
        // As many rows of one session, which chooses rows and ends windows of every kind.
        let mut one = backend.fork(&sessions[0]).unwrap();
        let (_, of_one) = counted(&backend, rows(0, 126, &tokens[126..131]), &mut [&mut one]);
        let mut of_all = Vec::new();
        for counts in counts {
            let next = |session: usize, states: &[GpuState; 5]| {
                let at = backend.position(&states[session]);
                (at, &tokens[(at + 5 * session) % 130..][..counts[session]])
            };
            let mut expected = Vec::new();
            for session in 0..5 {
                let (at, tokens) = next(session, &alone);
                assert_eq!(at, backend.position(&sessions[session]));
                expected.extend(advance(&backend, &mut alone[session], tokens));
            }
            let batch = (0..5).flat_map(|session| {
                let (at, tokens) = next(session, &sessions);
                rows(session, at, tokens)
            });
            let (logits, dispatches) = counted(&backend, batch.collect(), &mut sessions.each_mut());
            assert_same(&logits, &expected, 512, &format!("{precision:?}, {sessions_together} together, {counts:?}"));
            of_all.push(dispatches);
        }
        println!("{precision:?}, {sessions_together} together: {of_all:?} dispatches, {of_one} of one session");
        for (ours, alone) in sessions.iter().zip(&alone) {
            assert!(export(&backend, ours) == export(&backend, alone), "other bytes are left behind");
        }
        assert!(of_all.iter().all(|&of_all| (of_all <= of_one) == (sessions_together == 8)));
    }
}

/// Whoever comes while others are served does not wait for kernels.
#[test]
fn kernels_of_several_sessions_are_made_when_a_model_is_loaded() {
    let tokens = tokens(MODEL, 40);
    let precision = Precision::Fast;
    let backend = on_gpu(MODEL, Options { sessions_prepared: 3, ..in_precision(precision) });
    let mut sessions = [&tokens[..9], &tokens[3..17], &tokens[5..8]].map(|tokens| past(&backend, precision, tokens));
    let before = backend.kernels_made();
    for count in 1..=3 {
        let mut states: Vec<&mut GpuState> = sessions[..count].iter_mut().collect();
        let batch = states
            .iter()
            .enumerate()
            .flat_map(|(session, state)| rows(session, backend.position(state), &tokens[20 + count..21 + count]));
        forward(&backend, batch.collect(), &mut states, &Cancel::default(), &mut NoObserver).unwrap();
        assert_eq!(backend.kernels_made(), before, "{count} sessions wait for kernels");
    }
}

#[test]
fn other_sessions_in_a_pass_change_no_bit() {
    for precision in PRECISIONS {
        let (backend, tokens) = (on_gpu(MODEL, in_precision(precision)), tokens(MODEL, 100));
        let other: Vec<u32> = tokens.iter().rev().copied().collect();
        // In Fast, turns of more than 10 rows, whose experts are grouped too, are such for each session alone.
        let (sizes, other_sizes) = match precision {
            Precision::Fast => ([66, 11, 2, 3], [20, 29, 1, 5]),
            Precision::Exact => ([12, 9, 2, 3], [3, 5, 1, 5]),
        };
        let alone = |tokens: &[u32], sizes: &[usize]| logits(&backend, &tokens[..sizes.iter().sum()], sizes);
        let (expected, other_expected) = (alone(&tokens, &sizes), alone(&other, &other_sizes));
        let (mut a, mut b) = (backend.new_state().unwrap(), backend.new_state().unwrap());
        let (mut at, mut other_at) = (0, 0);
        for (turn, (count, other_count)) in sizes.into_iter().zip(other_sizes).enumerate() {
            let (first, second) =
                (rows(0, at, &tokens[at..][..count]), rows(1, other_at, &other[other_at..][..other_count]));
            // The sessions change places in the pass from turn to turn.
            let is_swapped = turn % 2 == 1;
            let batch = if is_swapped { [second, first] } else { [first, second] }.concat();
            let both = forward(&backend, batch, &mut [&mut a, &mut b], &Cancel::default(), &mut NoObserver).unwrap();
            let (first, second) = both.split_at(512 * if is_swapped { other_count } else { count });
            let (ours, theirs) = if is_swapped { (second, first) } else { (first, second) };
            let what = format!("{precision:?}, turn {turn}");
            assert_same(ours, &expected[512 * at..][..ours.len()], 512, &format!("{what}, first session"));
            assert_same(
                theirs,
                &other_expected[512 * other_at..][..theirs.len()],
                512,
                &format!("{what}, second session"),
            );
            (at, other_at) = (at + count, other_at + other_count);
        }
    }
}

/// A prompt is read while another session goes on between the layers, as the engine does.
#[test]
fn passes_between_the_layers_of_a_pass_change_no_bit() {
    for precision in PRECISIONS {
        let (backend, tokens) = (on_gpu(MODEL, in_precision(precision)), tokens(MODEL, 60));
        let (before, count, other) = match precision {
            Precision::Fast => (10, 30, 12),
            Precision::Exact => (3, 10, 2),
        };
        let (ours, theirs) = tokens[..before + count + other + backend.config().layers].split_at(before + count);
        let expected = [logits(&backend, ours, &[before, count]), logits(&backend, theirs, &[other, 1])];
        let (mut a, mut b) = (backend.new_state().unwrap(), backend.new_state().unwrap());
        advance(&backend, &mut a, &ours[..before]);
        let mut between = advance(&backend, &mut b, &theirs[..other]);
        let (mut next, mut forked) = (other, None);
        let mut pass = Forward::begin(&backend, rows(0, before, &ours[before..]), &[&a], &mut NoObserver).unwrap();
        while !pass.is_through() {
            forked.get_or_insert_with(|| backend.fork(&a).unwrap());
            pass.layer(&[&a], &Cancel::default(), &mut NoObserver).unwrap();
            between.extend(advance(&backend, &mut b, &theirs[next..][..1]));
            next += 1;
        }
        let logits = pass.end(&mut [&mut a], &mut NoObserver).unwrap();
        assert_same(&logits, &expected[0][before * 512..], 512, &format!("{precision:?}, the prompt"));
        let again = advance(&backend, &mut forked.unwrap(), &ours[before..]);
        assert_same(&again, &expected[0][before * 512..], 512, &format!("{precision:?}, forked meanwhile"));
        assert_same(&between, &expected[1], 512, &format!("{precision:?}, between"));
    }
}

#[test]
fn stepping_back_changes_no_bit() {
    const BEGIN: usize = 120;
    const RIGHT: usize = 140;
    let (backend, tokens) = (on_gpu(MODEL, in_precision(Precision::Exact)), tokens(MODEL, RIGHT + 8));
    let from_nothing = advance(&backend, &mut backend.new_state().unwrap(), &tokens[..8]);
    let mut state = past(&backend, Precision::Exact, &tokens[..BEGIN]);
    let mut expected = advance(&backend, &mut state, &tokens[BEGIN..CHECKPOINT_TOKENS]);
    expected.extend(advance(&backend, &mut state, &tokens[CHECKPOINT_TOKENS..RIGHT]));
    let mut straight_on = backend.import(&mut &export(&backend, &state)[..]).unwrap();
    expected.extend(advance(&backend, &mut straight_on, &tokens[RIGHT..]));
    let mut state = on_the_processor(&backend, exact(), &state, &wrong(&tokens[..55]));
    advance(&backend, &mut state, &wrong(&tokens[55..60]));
    let saved = export(&backend, &state);
    // 64 tokens are free from the farthest on; farther back there is the checkpoint, and the beginning.
    for (target, expected_position) in [(140, 140), (136, 136), (135, 128), (128, 128), (127, 0)] {
        let mut state = backend.import(&mut &saved[..]).unwrap();
        let reached = backend.rewind(&mut state, target);
        assert_eq!((reached, backend.position(&state)), (expected_position, expected_position), "back to {target}");
        let again = advance(&backend, &mut state, &tokens[reached..][..8]);
        let expected = if reached == 0 { &from_nothing } else { &expected[512 * (reached - BEGIN)..] };
        assert_same(&again, &expected[..again.len()], 512, &format!("back to {target}"));
    }
}

/// As speculation does: tokens, of which the last three are wrong and taken back; once in a large pass.
#[test]
fn stepping_back_again_and_again_changes_no_bit() {
    const BEGIN: usize = 50;
    let (backend, tokens) = (on_gpu(MODEL, in_precision(Precision::Exact)), tokens(MODEL, 130));
    let mut state = past(&backend, Precision::Exact, &tokens[..BEGIN]);
    let whole = advance(&backend, &mut backend.fork(&state).unwrap(), &tokens[BEGIN..]);
    for right in [2, 2, 66, 2] {
        let start = backend.position(&state);
        let draft = [&tokens[start..start + right], &wrong(&tokens[start + right..])[..3]].concat();
        let ours = advance(&backend, &mut state, &draft);
        let expected = &whole[512 * (start - BEGIN)..][..512 * right];
        assert_same(&ours[..512 * right], expected, 512, &format!("{right} rows from {start}"));
        assert_eq!(backend.rewind(&mut state, start + right), start + right);
    }
    // Also over a save, which must keep the free range.
    let mut state = backend.import(&mut &export(&backend, &state)[..]).unwrap();
    let target = backend.position(&state) - 60;
    assert_eq!(backend.rewind(&mut state, target), target);
    let rest = advance(&backend, &mut state, &tokens[target..][..9]);
    assert_same(&rest, &whole[512 * (target - BEGIN)..][..rest.len()], 512, "after a save");
}

/// Fails after one stage of one layer.
struct Fault {
    at: (Option<usize>, Stage),
    has_struck: bool,
}

impl Observer<GpuBackend> for Fault {
    fn after(&mut self, layer: Option<usize>, stage: Stage, _: &GpuBackend, _: &GpuPass) -> Result<(), Error> {
        if (layer, stage) == self.at {
            self.has_struck = true;
            return Err(Error::Cancelled);
        }
        Ok(())
    }
}

#[test]
fn a_pass_that_fails_anywhere_leaves_no_trace() {
    for precision in PRECISIONS {
        let (backend, tokens) = (on_gpu(MODEL, in_precision(precision)), tokens(MODEL, 136));
        let last = backend.config().layers - 1;
        let (mut a, mut b) = (past(&backend, precision, &tokens[..70]), backend.new_state().unwrap());
        let before = (export(&backend, &a), export(&backend, &b));
        // Few rows after every stage, and more than the ring in use has room for where sessions were just written to.
        let (count, stages) = match precision {
            Precision::Exact => (3, &Stage::LAYER[..]),
            Precision::Fast => (66, &[Stage::Project, Stage::Compress, Stage::HcPost(SubLayer::Experts)][..]),
        };
        let next = &tokens[70..][..count];
        let expected = advance(&backend, &mut backend.fork(&a).unwrap(), next);
        let stages = stages.iter().map(|&stage| (Some(last), stage));
        for at in stages.chain([(Some(0), Stage::Project), (None, Stage::Embed), (None, Stage::Head)]) {
            let mut fault = Fault { at, has_struck: false };
            let batch = [rows(0, 70, next), rows(1, 0, &tokens[..2])].concat();
            let result = forward(&backend, batch, &mut [&mut a, &mut b], &Cancel::default(), &mut fault);
            assert!(fault.has_struck && result.is_err(), "{at:?} was not reached");
            assert!(before == (export(&backend, &a), export(&backend, &b)), "{precision:?}: {at:?} left a trace");
        }
        assert_same(&advance(&backend, &mut a, next), &expected, 512, "after all faults");
    }
}

/// Cancels at the router of one layer, so that the next check is that of its experts.
struct CancelAtRouter<'a>(&'a Cancel);

impl Observer<GpuBackend> for CancelAtRouter<'_> {
    fn after(&mut self, layer: Option<usize>, stage: Stage, _: &GpuBackend, _: &GpuPass) -> Result<(), Error> {
        if (layer, stage) == (Some(1), Stage::Route) {
            self.0.cancel();
        }
        assert!(layer <= Some(1), "it ran on");
        Ok(())
    }
}

#[test]
fn cancelling_leaves_no_trace() {
    let (backend, tokens) = (on_gpu(MODEL, in_precision(Precision::Exact)), tokens(MODEL, 32));
    let mut state = past(&backend, Precision::Exact, &tokens[..20]);
    let (before, cancel) = (export(&backend, &state), Cancel::default());
    let batch = rows(0, 20, &tokens[20..]);
    let result = forward(&backend, batch, &mut [&mut state], &cancel, &mut CancelAtRouter(&cancel));
    assert!(matches!(result, Err(Error::Cancelled)) && export(&backend, &state) == before);
}

#[test]
fn saving_and_loading_changes_no_bit() {
    for (precision, start, counts) in [
        (Precision::Fast, 0, &[3, 61, 64, 12, 20, 40][..]),
        (Precision::Exact, 0, &[3, 9]),
        // Over a checkpoint, and far behind it.
        (Precision::Exact, 121, &[7, 9]),
        (Precision::Exact, 190, &[9]),
    ] {
        let (backend, tokens) = (on_gpu(MODEL, in_precision(precision)), tokens(MODEL, 200));
        let (mut state, mut farthest_back) = (past(&backend, precision, &tokens[..start]), 0);
        for &count in counts {
            let (saved, cut) = (export(&backend, &state), backend.position(&state));
            let mut loaded = backend.import(&mut &saved[..]).unwrap();
            assert!(export(&backend, &loaded) == saved, "saved at {cut}: what was loaded has other bytes");
            let next = &tokens[cut..][..count];
            let (ours, expected) = (advance(&backend, &mut loaded, next), advance(&backend, &mut state, next));
            assert_same(&ours, &expected, 512, &format!("{precision:?}, saved at {cut}"));
            // Checkpoints were saved too: this is farther back than what is free.
            let target = (cut + count).saturating_sub(70);
            farthest_back = backend.rewind(&mut loaded, target);
            let mut other = backend.import(&mut &export(&backend, &state)[..]).unwrap();
            assert_eq!(farthest_back, backend.rewind(&mut other, target));
            assert!(export(&backend, &loaded) == export(&backend, &other), "back to {farthest_back} from {cut}");
        }
        let end = backend.position(&state);
        assert_eq!(farthest_back, if end >= CHECKPOINT_TOKENS + 70 { CHECKPOINT_TOKENS } else { 0 }, "from {end}");
    }
}

#[test]
fn a_fork_shares_nothing() {
    let (backend, tokens) = (on_gpu(MODEL, in_precision(Precision::Exact)), tokens(MODEL, 80));
    let mut state = past(&backend, Precision::Exact, &tokens[..70]);
    let saved = export(&backend, &state);
    let mut fork = backend.fork(&state).unwrap();
    assert!(export(&backend, &fork) == saved, "a fork has the same bytes");
    advance(&backend, &mut fork, &wrong(&tokens[70..79]));
    assert!(export(&backend, &state) == saved, "what a fork reads is left in what it was made of");
    let mut other = backend.fork(&state).unwrap();
    let (ours, expected) = (advance(&backend, &mut other, &tokens[70..]), advance(&backend, &mut state, &tokens[70..]));
    assert_same(&ours, &expected, 512, "both go on alike");
}

/// A session goes to the processor and comes back with the same bytes, and both go on with it nearly alike.
#[test]
fn a_session_moves_between_backends() {
    use Arithmetic::{Official, Plain};
    // In Exact the processor has read the first 100 tokens.
    for (name, arithmetic, precision, passes) in [
        (MODEL, Plain, Precision::Exact, &[100, 128, 140][..]),
        ("mixed3-mixed", Official, Precision::Fast, &[0, 66, 128, 140]),
    ] {
        let options = Options { arithmetic, ..in_precision(precision) };
        let (gpu, tokens) = (on_gpu(name, options), tokens(name, 300));
        let cpu = load(name, cpu::Options { arithmetic, precision, ..fast() });
        let mut there = cpu.new_state().unwrap();
        advance(&cpu, &mut there, &tokens[..passes[0]]);
        let mut here = gpu.import(&mut &export(&cpu, &there)[..]).unwrap();
        for pass in passes.windows(2) {
            advance(&gpu, &mut here, &tokens[pass[0]..pass[1]]);
        }
        let saved = export(&gpu, &here);
        let mut there = cpu.import(&mut &saved[..]).unwrap();
        assert!(export(&cpu, &there) == saved, "{name}, {arithmetic:?}: the processor's bytes");
        // Roundings may fall the other way, and a choice of experts with them.
        let bound = if arithmetic == Plain { 2e-5 } else { 0.3 };
        let near = |ours: &[f32], expected: &[f32], way: &str| {
            let distance = distance(ours, expected);
            println!("{name}, {arithmetic:?}, {way}: relative L2 distance {distance:.1e}");
            assert!(distance < bound, "{name}, {arithmetic:?}, {way}: {distance:e}");
        };
        let next = &tokens[140..150];
        near(&advance(&gpu, &mut here, next), &advance(&cpu, &mut there, next), "to the processor");
        // And back: the processor's own session, and one of its checkpoints.
        advance(&cpu, &mut there, &tokens[150..280]);
        let saved = export(&cpu, &there);
        let mut back = gpu.import(&mut &saved[..]).unwrap();
        assert!(export(&gpu, &back) == saved, "{name}, {arithmetic:?}: back again");
        let next = &tokens[280..290];
        near(&advance(&gpu, &mut back, next), &advance(&cpu, &mut there, next), "and back");
        assert_eq!((gpu.rewind(&mut back, 200), there.rewind(200)), (128, 128));
        assert!(export(&gpu, &back) == export(&cpu, &there), "{name}, {arithmetic:?}: at a checkpoint");
    }
}

/// There is room for 4,096 tokens at first. What is copied into more room stays as it was.
#[test]
fn a_session_that_grows_changes_no_bit() {
    const HELD: usize = 4080;
    let (cpu, gpu) = (load("nano", fast()), on_gpu("nano", in_precision(Precision::Fast)));
    let (long, vocab) = (tokens("nano", HELD + 120), gpu.config().vocab_size);
    let mut past = cpu.new_state().unwrap();
    long[..HELD].chunks(1020).for_each(|chunk| {
        advance(&cpu, &mut past, chunk);
    });
    let saved = export(&cpu, &past);
    for counts in [&[8, 8, 8][..], &[100]] {
        let mut grown = gpu.import(&mut &saved[..]).unwrap();
        let bytes = grown.bytes();
        let mut at = HELD;
        for &count in counts {
            advance(&gpu, &mut grown, &long[at..at + count]);
            at += count;
        }
        assert!(grown.bytes() > bytes, "{} bytes, {bytes} before", grown.bytes());
        // One that had the room from the beginning.
        let mut roomy = gpu.import(&mut &export(&gpu, &grown)[..]).unwrap();
        assert!(export(&gpu, &roomy) == export(&gpu, &grown));
        let next = &long[at..at + 12];
        // In one pass with a session that has less room, whose rows lie elsewhere.
        let first = &long[..3];
        let (mut small, mut fork) = (gpu.new_state().unwrap(), gpu.fork(&grown).unwrap());
        let batch = [rows(0, 0, first), rows(1, at, &next[..3])].concat();
        let (both, _) = counted(&gpu, batch, &mut [&mut small, &mut fork]);
        let expected = [advance(&gpu, &mut gpu.new_state().unwrap(), first), advance(&gpu, &mut roomy, &next[..3])];
        assert_same(&both, &expected.concat(), vocab, &format!("grown by {counts:?}, beside another"));
        assert_eq!(gpu.rewind(&mut roomy, at), at);
        let (ours, expected) = (advance(&gpu, &mut grown, next), advance(&gpu, &mut roomy, next));
        assert_same(&ours, &expected, vocab, &format!("grown by {counts:?}"));
        // And one that never had to be copied: nothing before the growth was lost.
        let mut there = cpu.import(&mut &saved[..]).unwrap();
        advance(&cpu, &mut there, &long[HELD..at]);
        let near = distance(&ours, &advance(&cpu, &mut there, next));
        assert!(near < 0.3, "far from the processor's: {near:e}");
    }
}
