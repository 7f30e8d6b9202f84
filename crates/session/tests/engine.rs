//! The engine: what a request says does not depend on what else runs, and sessions are reused where they can be.

mod common;

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use common::{Scripted, one_hot, tokenizer};
use cpu::CpuBackend;
use gguf::Gguf;
use model::{Arithmetic, Backend, Cancel, Model, Precision};
use session::database::Database;
use session::engine::{Ended, Engine, EngineEvent, EngineOptions, EngineStats, Prompt, Request, SubmitError};
use session::snapshots::{Binding, Snapshots};
use session::{Context, PreparedTurn, Sampling, StopReason, TurnEvent, TurnOptions, Vocabulary};
use store::{Residency, Source};
use text::Tokenizer;
use text::prompt::{ControlTokens, Encoding};

static NANO: &[u8] = include_bytes!("../../../models/nano.gguf");

fn nano(precision: Precision, residency: Residency) -> CpuBackend {
    let file = Gguf::parse("nano", NANO).unwrap();
    let options = cpu::Options { precision, residency, ..cpu::Options::default() };
    let source = Source::from_image("nano", NANO);
    CpuBackend::load(&Model::from_gguf(&file).unwrap(), &source, options, &mut |_| ()).unwrap()
}

/// An engine on a thread of its own.
struct Running {
    engine: Engine,
    vocabulary: Arc<Vocabulary>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Running {
    fn new<B: Backend + Sync + 'static>(
        make: impl FnOnce() -> B + Send + 'static,
        sessions: usize,
        queue: usize,
    ) -> Running
    where
        B::State: Send,
    {
        Running::with_snapshots(make, sessions, queue, None)
    }

    fn with_snapshots<B: Backend + Sync + 'static>(
        make: impl FnOnce() -> B + Send + 'static,
        sessions: usize,
        queue: usize,
        snapshots: Option<Snapshots>,
    ) -> Running
    where
        B::State: Send,
    {
        let (engine, runner, thread);
        let config = Model::from_gguf(&Gguf::parse("nano", NANO).unwrap()).unwrap().config;
        let context = Context::new(&config, Some(4096)).unwrap();
        (engine, runner) = Engine::new(EngineOptions { context, sessions, queue });
        thread = Some(thread::spawn(move || runner.run(&make(), snapshots)));
        Running { engine, vocabulary: Arc::new(Vocabulary::new(Arc::new(tokenizer())).unwrap()), thread }
    }

    fn ask(&self, prompt: &[u32], options: &TurnOptions) -> Asked {
        self.try_ask(prompt, 0, options).unwrap()
    }

    fn try_ask(&self, prompt: &[u32], common_tokens: usize, options: &TurnOptions) -> Result<Asked, SubmitError> {
        let (to, events) = channel();
        let to: Mutex<Sender<EngineEvent>> = Mutex::new(to);
        let cancel = Arc::new(Cancel::default());
        self.engine.submit(Request {
            prompt: Prompt { tokens: prompt.to_vec(), common_tokens },
            turn: PreparedTurn::new(self.vocabulary.clone(), options).unwrap(),
            cancel: cancel.clone(),
            receive: Box::new(move |event| drop(to.lock().unwrap_or_else(PoisonError::into_inner).send(event))),
        })?;
        Ok(Asked { events, cancel })
    }

    fn stats(&self) -> EngineStats {
        self.engine.stats()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.engine.stop();
        self.thread.take().unwrap().join().unwrap();
    }
}

/// A request that was submitted.
struct Asked {
    events: Receiver<EngineEvent>,
    cancel: Arc<Cancel>,
}

impl Asked {
    fn next(&self) -> EngineEvent {
        self.events.recv_timeout(Duration::from_secs(60)).expect("an event within a minute")
    }

    /// What it came to: its cached tokens, and the bits of every log probability.
    fn end(self) -> (Ended, Vec<u64>) {
        let mut bits = Vec::new();
        loop {
            match self.next() {
                EngineEvent::Turn(TurnEvent::Token { logprobs: Some(logprobs), .. }) => {
                    bits.push(logprobs.chosen.to_bits());
                    bits.extend(logprobs.top.iter().map(|(_, value)| value.to_bits()));
                }
                EngineEvent::Ended(ended) => return (*ended, bits),
                EngineEvent::Failed(error) => panic!("{error}"),
                _ => (),
            }
        }
    }

    fn failure(self) -> session::Error {
        loop {
            match self.next() {
                EngineEvent::Failed(error) => return error,
                EngineEvent::Ended(_) => panic!("it should fail"),
                _ => (),
            }
        }
    }
}

fn options(seed: u64, temperature: f32, max_tokens: usize) -> TurnOptions {
    let sampling = Sampling { temperature, ..Sampling::default() };
    TurnOptions { sampling, seed, max_tokens, logprobs: Some(3), ..TurnOptions::default() }
}

fn say(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    let mut tokens = vec![tokenizer.bos()];
    tokens.extend(tokenizer.encode(text));
    tokens
}

/// Requests of many lengths, alone one after the other on fresh engines, and all at once on engines with too few sessions
/// for them.
fn others_change_nothing(precision: Precision, residency: fn() -> Residency) {
    let tokenizer = tokenizer();
    let long = "The quick brown fox jumps over the lazy dog and runs into the forest. ";
    let stop = ControlTokens::find(&tokenizer).unwrap().stop_set();
    let requests: Vec<(Vec<u32>, TurnOptions)> = [1, 2, 1, 45, 3, 20]
        .into_iter()
        .enumerate()
        .map(|(i, length)| {
            let text = format!("Number {i}. {}", long.repeat(length));
            let temperature = if i % 3 == 0 { 0.0 } else { 1.0 };
            // Nobody ends before the others begin.
            let logit_bias = stop.iter().map(|&token| (token, -100.0)).collect();
            (say(&tokenizer, &text), TurnOptions { logit_bias, ..options(i as u64, temperature, 20 + 15 * (i % 3)) })
        })
        .collect();
    assert!(requests.iter().any(|(prompt, _)| prompt.len() > 2 * CpuBackend::PASS_ROWS), "a prompt of several passes");
    let alone: Vec<(Vec<u32>, Vec<u64>)> = requests
        .iter()
        .map(|(prompt, options)| {
            let running = Running::new(move || nano(precision, residency()), 1, 0);
            let (ended, bits) = running.ask(prompt, options).end();
            (ended.outcome.tokens, bits)
        })
        .collect();
    for sessions in [3, 6] {
        let running = Running::new(move || nano(precision, residency()), sessions, 9);
        let asked: Vec<Asked> = requests.iter().map(|(prompt, options)| running.ask(prompt, options)).collect();
        for (i, (asked, expected)) in asked.into_iter().zip(&alone).enumerate() {
            let (ended, bits) = asked.end();
            assert_eq!((&ended.outcome.tokens, &bits), (&expected.0, &expected.1), "{sessions} {i}");
        }
        let stats = running.stats();
        assert!(stats.decode_rows > stats.decode_passes, "no two turns ever shared a pass: {stats:?}");
        assert_eq!((stats.ended, stats.active, stats.waiting), (6, 0, 0));
    }
}

#[test]
fn what_else_runs_changes_no_bit_in_fast() {
    others_change_nothing(Precision::Fast, || Residency::Resident);
}

#[test]
fn what_else_runs_changes_no_bit_in_exact() {
    others_change_nothing(Precision::Exact, || Residency::Resident);
}

#[test]
fn what_else_runs_changes_no_bit_while_experts_stream() {
    others_change_nothing(Precision::Fast, || Residency::Streamed { slots: vec![9] });
}

/// A backend that says nothing but token 5, and whose sessions are their tokens.
fn scripted() -> Scripted {
    let vocab = tokenizer().vocab_size();
    Scripted::new(move |_| one_hot(vocab, 5))
}

fn numbers(from: u32, count: u32) -> Vec<u32> {
    (0..count).map(|i| 10 + (from * 31 + i * 7) % 400).collect()
}

#[test]
fn a_conversation_goes_on_where_it_ended() {
    let running = Running::new(scripted, 2, 4);
    let prompt = numbers(0, 300);
    let (first, _) = running.ask(&prompt, &options(0, 0.0, 10)).end();
    assert_eq!((first.usage.cached_tokens, first.usage.prompt_tokens, first.usage.completion_tokens), (0, 300, 10));
    let next = [&prompt[..], &first.outcome.tokens, &numbers(1, 50)].concat();
    // The last token of a turn that was cut has not been read.
    let (second, _) = running.ask(&next, &options(0, 0.0, 10)).end();
    assert_eq!((second.usage.cached_tokens, second.outcome.reason), (309, StopReason::TokenLimit));
    assert_eq!(running.stats().idle_sessions, 1);
    // The same again: of what is known all but the last token is kept.
    let (third, _) = running.ask(&next, &options(0, 0.0, 10)).end();
    assert_eq!(third.usage.cached_tokens, next.len() - 1);
}

#[test]
fn two_conversations_share_a_beginning_and_neither_is_lost() {
    let running = Running::new(scripted, 3, 4);
    let shared = numbers(0, 600);
    let with = |own: u32| [&shared[..], &numbers(own, 40)].concat();
    let cached = |prompt: &[u32]| running.ask(prompt, &options(0, 0.0, 2)).end().0.usage.cached_tokens;
    assert_eq!(cached(&with(1)), 0);
    assert_eq!(cached(&with(2)), 600, "forked");
    assert_eq!(running.stats().idle_sessions, 2);
    assert_eq!(cached(&with(1)), 639, "still there");
    assert_eq!(cached(&with(2)), 639, "still there");
}

#[test]
fn a_busy_session_is_forked() {
    let running = Running::new(scripted, 2, 4);
    let shared = numbers(0, 600);
    let first = running.ask(&shared, &options(0, 0.0, 3000));
    while !matches!(first.next(), EngineEvent::Turn(_)) {}
    let (second, _) = running.ask(&[&shared[..], &numbers(3, 5)].concat(), &options(0, 0.0, 2)).end();
    assert_eq!(second.usage.cached_tokens, 600);
    first.cancel.cancel();
    let (first, _) = first.end();
    assert_eq!(first.outcome.reason, StopReason::Cancelled);
    assert!(first.outcome.tokens.len() < 3000);
}

#[test]
fn a_beginning_is_kept_when_its_conversation_has_left() {
    let running = Running::new(scripted, 1, 4);
    let shared = numbers(0, 600);
    let cached = |own: u32| {
        let prompt = [&shared[..], &numbers(own, 700)].concat();
        running.try_ask(&prompt, 600, &options(0, 0.0, 2)).unwrap().end().0.usage.cached_tokens
    };
    assert_eq!(cached(1), 0);
    running.ask(&numbers(9, 900), &options(0, 0.0, 2)).end();
    assert_eq!(cached(2), 512, "the last end of a pass before it");
}

#[test]
fn a_cancelled_prompt_keeps_what_was_read() {
    let running = Running::new(|| nano(Precision::Fast, Residency::Resident), 1, 4);
    let prompt = numbers(0, 3000);
    let asked = running.ask(&prompt, &options(0, 0.0, 2));
    let read = loop {
        if let EngineEvent::Read { tokens } = asked.next()
            && tokens >= 600
        {
            break tokens;
        }
    };
    asked.cancel.cancel();
    assert!(asked.failure().is_cancelled());
    assert_eq!(running.stats().cancelled, 1);
    let (again, _) = running.ask(&prompt, &options(0, 0.0, 2)).end();
    let kept = again.usage.cached_tokens;
    assert!(kept >= 512 && kept % 256 == 0 && kept < 3000, "{kept} of {read} kept");
}

#[test]
fn the_queue_has_an_end_and_whoever_leaves_it_makes_room() {
    let running = Running::new(scripted, 1, 2);
    let busy = running.ask(&numbers(0, 10), &options(0, 0.0, 4000));
    while !matches!(busy.next(), EngineEvent::Turn(_)) {}
    let second = running.ask(&numbers(1, 10), &options(0, 0.0, 1));
    let third = running.ask(&numbers(2, 10), &options(0, 0.0, 1));
    let full = running.try_ask(&numbers(3, 10), 0, &options(0, 0.0, 1)).err().unwrap();
    assert!(matches!(full, SubmitError::QueueFull { waiting: 2, limit: 2 }), "{full}");
    third.cancel.cancel();
    assert!(third.failure().is_cancelled());
    let fourth = running.ask(&numbers(3, 10), &options(0, 0.0, 1));
    busy.cancel.cancel();
    second.end();
    fourth.end();
}

#[test]
fn a_prompt_that_does_not_fit_is_refused_at_once() {
    let running = Running::new(scripted, 1, 2);
    let refused = running.try_ask(&numbers(0, 5000), 0, &options(0, 0.0, 1)).err().unwrap();
    assert!(refused.to_string().contains("found 5000 tokens, room for 4096"), "{refused}");
    let refused = running.try_ask(&[], 0, &options(0, 0.0, 1)).err().unwrap();
    assert!(refused.to_string().contains("no tokens"), "{refused}");
}

#[test]
fn stopping_ends_everything() {
    let running = Running::new(scripted, 1, 2);
    let busy = running.ask(&numbers(0, 10), &options(0, 0.0, 4000));
    while !matches!(busy.next(), EngineEvent::Turn(_)) {}
    let waits = running.ask(&numbers(1, 10), &options(0, 0.0, 4000));
    running.engine.stop();
    assert_eq!(busy.end().0.outcome.reason, StopReason::Cancelled);
    assert!(waits.failure().is_cancelled());
    let refused = running.try_ask(&numbers(1, 10), 0, &options(0, 0.0, 1)).err().unwrap();
    assert!(matches!(refused, SubmitError::Stopping));
}

/// A pass fails for one of three turns: the others go on, with the tokens that they would have had.
#[test]
fn a_turn_that_fails_takes_no_other_with_it() {
    const POISON: u32 = 7;
    let vocab = tokenizer().vocab_size();
    let says = move |tokens: &[u32]| one_hot(vocab, if tokens[0] == 33 && tokens.len() > 500 { POISON } else { 5 });
    let running = Running::new(move || Scripted::new(says).failing_on(POISON), 4, 4);
    let turn = |first: u32| running.ask(&[first, 20, 21], &options(0, 0.0, 1000));
    let (poisoned, asked) = (turn(33), [turn(30), turn(31), turn(32)]);
    assert!(poisoned.failure().to_string().contains("poison"));
    assert_eq!(running.stats().failed, 1);
    for asked in asked {
        assert_eq!(asked.end().0.outcome.tokens, vec![5; 1000]);
    }
}

fn snapshots(dir: &std::path::Path) -> Snapshots {
    let binding = Binding {
        identity: 1,
        arithmetic: Arithmetic::Official,
        precision: Precision::Fast,
        backend: "cpu".into(),
        encoding: Encoding::V4_2604,
    };
    let (database, aside) = Database::open(dir).unwrap();
    assert!(aside.is_none());
    let (snapshots, asides) = Snapshots::open(dir, 1 << 30, &binding, &database).unwrap();
    assert!(asides.is_empty());
    snapshots
}

/// What an engine that has ended knew another goes on with: the same tokens come, and all but what is new is cached.
#[test]
fn a_conversation_goes_on_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let fast = || nano(Precision::Fast, Residency::Resident);
    let prompt = say(&tokenizer(), &"It is a long way to the sea. ".repeat(40));
    let begin = || Running::with_snapshots(fast, 2, 4, Some(snapshots(folder.path())));
    let running = begin();
    let (first, _) = running.ask(&prompt, &options(1, 1.0, 20)).end();
    let next = [&prompt[..], &first.outcome.tokens, &say(&tokenizer(), "And then?")].concat();
    drop(running);

    let running = begin();
    let (second, bits) = running.ask(&next, &options(2, 1.0, 20)).end();
    let held = prompt.len() + first.outcome.tokens.len() - first.outcome.unread_tokens;
    assert_eq!((second.usage.cached_tokens, running.stats().loaded_snapshots), (held, 1));
    let (cold, cold_bits) = Running::new(fast, 1, 0).ask(&next, &options(2, 1.0, 20)).end();
    assert_eq!((second.outcome.tokens, bits, cold.usage.cached_tokens), (cold.outcome.tokens, cold_bits, 0));
}

/// A conversation that pauses is on the disk soon, without a proper end.
#[test]
fn a_quiet_conversation_is_saved() {
    let folder = tempfile::tempdir().unwrap();
    let running = Running::with_snapshots(scripted, 2, 4, Some(snapshots(folder.path())));
    running.ask(&numbers(0, 300), &options(0, 0.0, 2)).end();
    let start = std::time::Instant::now();
    while running.stats().saved_snapshots == 0 {
        assert!(start.elapsed() < Duration::from_secs(30), "{:?}", running.stats());
        thread::sleep(Duration::from_millis(50));
    }
    thread::sleep(Duration::from_secs(3));
    assert_eq!(running.stats().saved_snapshots, 1, "what has not changed is not saved again");
}

/// A conversation that makes way is found again on the disk.
#[test]
fn a_conversation_that_made_way_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let running = Running::with_snapshots(scripted, 1, 4, Some(snapshots(folder.path())));
    let ask = |prompt: &[u32]| running.ask(prompt, &options(0, 0.0, 2)).end().0;
    let first = ask(&numbers(1, 400));
    ask(&numbers(2, 400));
    while running.stats().saved_snapshots == 0 {
        thread::sleep(Duration::from_millis(20));
    }
    let next = [&numbers(1, 400)[..], &first.outcome.tokens, &numbers(3, 10)].concat();
    assert_eq!(ask(&next).usage.cached_tokens, 401);
    assert!(running.stats().loaded_snapshots > 0);
}

/// What computes panics: everybody is told, and nobody waits for ever.
#[test]
fn a_panic_is_told_to_all() {
    let vocab = tokenizer().vocab_size();
    let mut running = Running::new(
        move || {
            Scripted::new(move |tokens| {
                assert!(!tokens.contains(&13), "told to panic");
                one_hot(vocab, 5)
            })
        },
        1,
        2,
    );
    let asked = running.ask(&[13, 14, 15], &options(0, 0.0, 1));
    assert!(running.thread.take().unwrap().join().is_err());
    assert!(matches!(asked.events.recv(), Ok(EngineEvent::Begun { .. }) | Err(_)));
    let refused = running.try_ask(&[1], 0, &options(0, 0.0, 1)).err().unwrap();
    assert!(matches!(refused, SubmitError::Dead(_)), "{refused}");
    running.thread = Some(thread::spawn(|| ()));
}
