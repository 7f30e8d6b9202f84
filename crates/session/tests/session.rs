//! Sessions and generation over a small random model.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use cpu::{CpuBackend, Options, Pass};
use gguf::Gguf;
use model::{Backend, Batch, Cancel, Model, NoObserver, Observer, Row, Stage, forward};
use session::{Context, Error, Limits, Sampler, Sampling, Session, StopReason, generate};
use store::Source;

fn backend() -> CpuBackend {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/test-data/oracle/tiny-q4.gguf");
    assert!(path.exists(), "{} is missing: run scripts/test-data first", path.display());
    let file = Gguf::open(&path).unwrap();
    let source = Source::open(file.files.iter().map(|part| (&part.path, part.bytes))).unwrap();
    let model = Model::from_gguf(&file).unwrap();
    CpuBackend::load(&model, &source, Options::default(), &mut |_| ()).unwrap()
}

fn empty_session(backend: &CpuBackend, context_tokens: usize) -> Session<CpuBackend> {
    Session::new(backend, Context::new(backend.config(), Some(context_tokens)).unwrap()).unwrap()
}

fn prompt(count: u32) -> Vec<u32> {
    (0..count).map(|i| 3 + i * 37 % 500).collect()
}

/// Tokens by argmax, straight from the forward pass.
fn greedy_reference(backend: &CpuBackend, prompt: &[u32], count: usize) -> Vec<u32> {
    let (mut state, mut all) = (backend.new_state().unwrap(), prompt.to_vec());
    while all.len() < prompt.len() + count {
        let start = state.position();
        let row = |(i, &token)| Row { session: 0, position: start + i, token, logits: true };
        let rows: Vec<Row> = all[start..].iter().enumerate().map(row).collect();
        let logits = forward(backend, rows, &mut [&mut state], &Cancel::default(), &mut NoObserver).unwrap();
        let last = &logits[logits.len() - backend.config().vocab_size..];
        let best = (0..last.len()).fold(0, |best, i| if last[i] > last[best] { i } else { best });
        all.push(best as u32);
    }
    all.split_off(prompt.len())
}

fn greedy() -> Sampler {
    Sampler::new(Sampling { temperature: 0.0, ..Sampling::default() }, 0).unwrap()
}

/// Prompt, then generation; what was received, why it ended, what the session holds.
fn run(
    backend: &CpuBackend,
    context_tokens: usize,
    limits: Limits<'_>,
    receive: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> (StopReason, Vec<u32>) {
    let mut session = empty_session(backend, context_tokens);
    let cancel = Cancel::default();
    let logits = session.prefill(backend, &prompt(40), 16, &cancel, &mut |_| ()).unwrap();
    let reason = generate(backend, &mut session, logits, &mut greedy(), limits, &cancel, receive).unwrap();
    (reason, session.tokens().to_vec())
}

#[test]
fn greedy_generation_is_the_argmax_of_the_forward_pass() {
    let backend = backend();
    let expected = greedy_reference(&backend, &prompt(40), 12);
    let mut got = Vec::new();
    let limits = Limits { stop: &[], max_tokens: 12 };
    let (reason, tokens) = run(&backend, 1000, limits, &mut |token| {
        got.push(token);
        ControlFlow::Continue(())
    });
    assert_eq!((reason, &got), (StopReason::TokenLimit, &expected));
    assert_eq!(tokens, [&prompt(40), &expected[..11]].concat(), "all but the last token received");
}

#[test]
fn each_way_to_stop_is_told() {
    let backend = backend();
    let expected = greedy_reference(&backend, &prompt(40), 12);
    let stop_at = expected.iter().position(|token| !expected[..3].contains(token)).unwrap_or(0);
    let count_until = |limits: Limits<'_>, context_tokens: usize, breaks_after: usize| {
        let mut received = 0;
        let (reason, tokens) = run(&backend, context_tokens, limits, &mut |_| {
            received += 1;
            if received == breaks_after { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        (reason, received, tokens.len())
    };
    let stop = [expected[stop_at]];
    let ended = count_until(Limits { stop: &stop, max_tokens: 100 }, 1000, usize::MAX);
    assert_eq!(ended, (StopReason::EndOfTurn(stop[0]), stop_at, 40 + stop_at));
    let none = Limits { stop: &[], max_tokens: 100 };
    assert_eq!(count_until(none, 45, usize::MAX), (StopReason::ContextFull, 5, 45));
    assert_eq!(count_until(none, 1000, 4), (StopReason::Receiver, 4, 43));
    assert_eq!(count_until(Limits { stop: &[], max_tokens: 0 }, 1000, 4), (StopReason::TokenLimit, 0, 40));
}

#[test]
fn a_cancelled_prompt_leaves_tokens_and_state_in_step() {
    let backend = backend();
    let cancel = Cancel::default();
    let mut session = empty_session(&backend, 1000);
    let error = session
        .prefill(&backend, &prompt(40), 16, &cancel, &mut |done| {
            if done == 16 {
                cancel.cancel()
            }
        })
        .unwrap_err();
    assert!(error.is_cancelled(), "{error}");
    assert_eq!((session.tokens(), session.state().position()), (&prompt(16)[..], 16));

    let fresh = Cancel::default();
    let rest = session.prefill(&backend, &prompt(40)[16..], 7, &fresh, &mut |_| ()).unwrap();
    let whole = empty_session(&backend, 1000).prefill(&backend, &prompt(40), 40, &fresh, &mut |_| ()).unwrap();
    assert_eq!(rest, whole, "as if nothing had happened, to the bit");
}

/// Writes down where passes begin and how many rows they have.
#[derive(Default)]
struct Passes(Vec<(usize, usize)>);

impl Observer<CpuBackend> for Passes {
    fn begin(&mut self, batch: &Batch) {
        self.0.push((batch.rows()[0].position, batch.rows().len()));
    }

    fn after(&mut self, _: Option<usize>, _: Stage, _: &CpuBackend, _: &Pass) -> Result<(), model::Error> {
        Ok(())
    }
}

#[test]
fn no_pass_crosses_a_multiple_of_the_chunk_wherever_reading_begins() {
    let backend = backend();
    let cancel = Cancel::default();
    let mut session = empty_session(&backend, 1000);
    let passes = Arc::new(Mutex::new(Passes::default()));
    session.observe(Box::new(passes.clone()));
    let read = |session: &mut Session<CpuBackend>, end: usize| {
        let tokens = &prompt(end as u32)[session.tokens().len()..];
        let mut told = Vec::new();
        session.prefill(&backend, tokens, 16, &cancel, &mut |done| told.push(done)).unwrap();
        assert_eq!(told.last(), Some(&tokens.len()));
        std::mem::take(&mut passes.lock().unwrap().0)
    };
    assert_eq!(read(&mut session, 10), [(0, 10)]);
    assert_eq!(read(&mut session, 50), [(10, 6), (16, 16), (32, 16), (48, 2)]);
    session.rewind(&backend, 32);
    assert_eq!(read(&mut session, 64), [(32, 16), (48, 16)]);
}

#[test]
fn logits_are_handed_out_pass_by_pass() {
    let backend = backend();
    let cancel = Cancel::default();
    let mut session = empty_session(&backend, 1000);
    let received = Arc::new(Mutex::new(Vec::new()));
    let keep = received.clone();
    session.on_logits(Box::new(move |logits| keep.lock().unwrap().push(logits.to_vec())));
    let last = session.prefill(&backend, &prompt(40), 16, &cancel, &mut |_| ()).unwrap();
    let next = session.step(&backend, 7, &cancel).unwrap();
    assert_eq!(*received.lock().unwrap(), [vec![], vec![], last, next]);
}

#[test]
fn a_cancelled_generation_says_so() {
    let backend = backend();
    let cancel = Cancel::default();
    let mut session = empty_session(&backend, 1000);
    let logits = session.prefill(&backend, &prompt(40), 64, &cancel, &mut |_| ()).unwrap();
    let limits = Limits { stop: &[], max_tokens: 100 };
    let mut received = 0;
    let reason = generate(&backend, &mut session, logits, &mut greedy(), limits, &cancel, &mut |_| {
        received += 1;
        if received == 3 {
            cancel.cancel();
        }
        ControlFlow::Continue(())
    });
    assert_eq!((reason.unwrap(), received), (StopReason::Cancelled, 3));
    assert_eq!((session.tokens().len(), session.state().position()), (42, 42));
}

#[test]
fn rewind_keeps_tokens_and_state_in_step() {
    let backend = backend();
    let cancel = Cancel::default();
    let mut session = empty_session(&backend, 1000);
    let first = session.prefill(&backend, &prompt(200), 64, &cancel, &mut |_| ()).unwrap();
    assert_eq!(session.rewind(&backend, 190), 190);
    assert_eq!(session.prefill(&backend, &prompt(200)[190..], 64, &cancel, &mut |_| ()).unwrap(), first);
    let reached = session.rewind(&backend, 100);
    assert!(reached <= 100);
    assert_eq!((session.tokens(), session.state().position()), (&prompt(200)[..reached], reached));
    assert_eq!(session.prefill(&backend, &prompt(200)[reached..], 64, &cancel, &mut |_| ()).unwrap(), first);
}

#[test]
fn reuse_keeps_the_longest_known_prefix_and_leaves_something_to_read() {
    let backend = backend();
    let cancel = Cancel::default();
    let mut session = empty_session(&backend, 1000);
    let whole = session.prefill(&backend, &prompt(200), 64, &cancel, &mut |_| ()).unwrap();
    assert_eq!(session.reuse(&backend, &prompt(200)), 199, "the last token is read again, for its logits");
    assert_eq!(session.step(&backend, prompt(200)[199], &cancel).unwrap(), whole);
    assert_eq!(session.reuse(&backend, &prompt(230)), 200);

    let other = [&prompt(170)[..], &[1, 2, 3]].concat();
    assert_eq!(session.reuse(&backend, &other), 170);
    assert_eq!(session.tokens(), &prompt(170));
    let reused = session.prefill(&backend, &other[170..], 64, &cancel, &mut |_| ()).unwrap();
    let fresh = empty_session(&backend, 1000).prefill(&backend, &other, 256, &cancel, &mut |_| ()).unwrap();
    assert_eq!(reused, fresh, "to the bit");

    assert!(session.reuse(&backend, &prompt(20)) < 20, "farther back than the state remembers");
    assert_eq!(session.tokens(), &prompt(200)[..session.state().position()]);
    assert_eq!(session.reuse(&backend, &[]), 0);
    assert_eq!((session.tokens().len(), session.state().position()), (0, 0));
}

fn saved(backend: &CpuBackend, session: &Session<CpuBackend>) -> Vec<u8> {
    let mut bytes = Vec::new();
    session.save(backend, &mut bytes).unwrap();
    bytes
}

fn load(backend: &CpuBackend, mut bytes: &[u8]) -> Result<Session<CpuBackend>, Error> {
    Session::load(backend, Context::new(backend.config(), Some(300)).unwrap(), &mut bytes)
}

#[test]
fn a_loaded_session_goes_on_with_the_same_bits() {
    let backend = backend();
    let cancel = Cancel::default();
    for held in [0, 1, 128, 140] {
        let mut session = empty_session(&backend, 1000);
        if held > 0 {
            session.prefill(&backend, &prompt(held), 64, &cancel, &mut |_| ()).unwrap();
        }
        let mut bytes = saved(&backend, &session);
        bytes.extend(b"more");
        let mut rest = &bytes[..];
        let mut loaded =
            Session::load(&backend, Context::new(backend.config(), Some(300)).unwrap(), &mut rest).unwrap();
        assert_eq!(
            (rest, loaded.tokens(), loaded.room_tokens()),
            (&b"more"[..], session.tokens(), 300 - held as usize)
        );
        for back in [0, 10, 150] {
            let target = (held as usize).saturating_sub(back);
            assert_eq!(loaded.rewind(&backend, target), session.rewind(&backend, target));
            let next = &prompt(150)[loaded.tokens().len()..];
            let [expected, found] =
                [&mut session, &mut loaded].map(|s| s.prefill(&backend, next, 50, &cancel, &mut |_| ()).unwrap());
            assert_eq!(found, expected, "{held} tokens held, {back} back");
        }
    }
}

#[test]
fn damaged_and_foreign_sessions_are_refused() {
    let backend = backend();
    let mut session = empty_session(&backend, 1000);
    session.prefill(&backend, &prompt(40), 64, &Cancel::default(), &mut |_| ()).unwrap();
    let good = saved(&backend, &session);
    let refused = |bytes: &[u8]| load(&backend, bytes).err().expect("refused").to_string();
    let changed = |at: usize, with: &[u8]| {
        let mut bytes = good.clone();
        bytes[at..at + with.len()].copy_from_slice(with);
        bytes
    };
    assert!(refused(b"GGUF....").contains("not a saved session"));
    assert!(refused(b"").contains("could not be read"));
    assert!(refused(&changed(8, &[9])).contains("format version 9"));
    assert!(refused(&changed(12, &[0xff; 8])).contains("expected at most 300"));
    assert!(refused(&changed(12, &[39])).contains("not a saved state"));
    assert!(refused(&changed(20, &[7])).contains("checksum"));

    let with_checksum = |parts: &[&[u8]]| {
        let whole = parts.concat();
        let hash = xxhash_rust::xxh3::xxh3_64(&whole);
        [whole, hash.to_le_bytes().to_vec()].concat()
    };
    let state = 20 + 4 * 40;
    let foreign = changed(20, &u32::MAX.to_le_bytes());
    assert!(refused(&with_checksum(&[&foreign[..good.len() - 8]])).contains("made with another model"));

    session.rewind(&backend, 30);
    let shorter = saved(&backend, &session);
    let shorter_state = &shorter[20 + 4 * 30..shorter.len() - 8];
    assert!(refused(&with_checksum(&[&good[..state], shorter_state])).contains("40 tokens but a state after 30"));
}

/// The tokens of one file and the state of another, each undamaged, once loaded: nothing tied them together.
#[test]
fn tokens_and_state_of_two_saved_sessions_are_refused() {
    let backend = backend();
    let [one, other] = [0, 1].map(|from| {
        let mut session = empty_session(&backend, 1000);
        session.prefill(&backend, &prompt(41)[from..from + 40], 64, &Cancel::default(), &mut |_| ()).unwrap();
        saved(&backend, &session)
    });
    let (head, end) = (20 + 4 * 40, one.len() - 8);
    assert_eq!(one.len(), other.len());
    for checksum_of in [&one, &other] {
        let mixed = [&one[..head], &other[head..end], &checksum_of[end..]].concat();
        let error = load(&backend, &mixed).err().expect("refused").to_string();
        assert!(error.contains("checksum"), "{error}");
    }
}

/// Every cut and a change of every byte of head and tail, and of some between: an error each time, never a panic.
#[test]
fn no_change_of_a_saved_session_goes_unnoticed() {
    let backend = backend();
    let mut session = empty_session(&backend, 1000);
    session.prefill(&backend, &prompt(40), 64, &Cancel::default(), &mut |_| ()).unwrap();
    let good = saved(&backend, &session);
    let places = (0..good.len()).filter(|at| *at < 300 || at + 20 > good.len() || at % 997 == 0);
    for at in places {
        assert!(load(&backend, &good[..at]).is_err(), "cut at {at}");
        let mut bytes = good.clone();
        bytes[at] ^= 0x41;
        assert!(load(&backend, &bytes).is_err(), "byte {at} changed");
    }
}

#[test]
fn what_does_not_fit_is_refused_before_it_is_computed() {
    let backend = backend();
    let cancel = Cancel::default();
    let limit = backend.config().context_length;
    for asked in [0, limit + 1] {
        assert!(matches!(Context::new(backend.config(), Some(asked)), Err(Error::ContextSize { .. })));
    }
    let mut session = empty_session(&backend, 30);
    assert!(matches!(session.prefill(&backend, &[], 8, &cancel, &mut |_| ()), Err(Error::EmptyPrompt)));
    let error = session.prefill(&backend, &prompt(31), 8, &cancel, &mut |_| ()).unwrap_err().to_string();
    assert!(error.contains("found 31 tokens, room for 30 of 30"), "{error}");
    assert_eq!(session.state().position(), 0);
    session.prefill(&backend, &prompt(30), 8, &cancel, &mut |_| ()).unwrap();
    assert!(matches!(session.step(&backend, 5, &cancel), Err(Error::PromptTooLong { found: 1, room: 0, .. })));
}
