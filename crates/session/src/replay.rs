//! What was sampled, for the prompts that go on from it: clients send a conversation back as they were shown it, while the session
//! that generated it holds other tokens — reasoning that was not shown, the calls' block as the model spelt it, another cut into tokens.
//!
//! A finished turn is remembered under a SHA-256 of the tokens before it and of the turn as a client may show it, in each form in which
//! it may: with its reasoning, with an empty one, without; its calls as generated or in canonical form. [`Replay::prompt`] puts the exact
//! tokens where it finds such a turn, and encodes the text of every other. So a prompt's tokens follow from the request and this
//! record, never from which sessions happen to live, and reuse of sessions is a comparison of tokens.
//!
//! No text of one conversation may reach another that merely looks like it. A form that says the very bytes of the sampled tokens is found
//! by whoever shows it: it gives away how the text was cut into tokens, nothing else. One that lacks some of them, such as reasoning, is
//! only found by a request whose history has the id of one of the turn's calls, which nobody else was given: these are random. A turn without
//! calls has no such form.
//!
//! The forms are rendered by [`text::prompt::render`] itself, so that they are what a prompt has.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use text::parse::Turn;
use text::prompt::{AssistantMessage, Call, ControlTokens, Encoding, Message, Mode, PromptOptions, render};
use text::{Segment, Tokenizer};

use crate::database::{Database, DatabaseError, Limits, Records};
use crate::engine::Prompt;
use crate::{StopReason, TurnOutcome};

/// Finished turns that are kept, and their tokens.
const TURNS: Limits = Limits { count: 100_000, bytes: 512 << 20 };
/// Forms that say all of a turn: at most six of each.
const SHOWN: Limits = Limits { count: 6 * TURNS.count, bytes: 64 << 20 };
/// Calls with the forms that only their ids prove.
const PROVEN: Limits = Limits { count: 100_000, bytes: 64 << 20 };
/// Blocks of calls.
const BLOCKS: Limits = Limits { count: 100_000, bytes: 512 << 20 };
/// Longest id of a call that is kept.
const MAX_ID_BYTES: usize = 256;

/// The record of finished turns; clones are of the same.
#[derive(Clone)]
pub struct Replay {
    record: Arc<Record>,
}

struct Record {
    database: Database,
    /// Of every hash: whose tokens these are.
    salt: Sha256,
    /// SHA-256 of a turn's place and tokens, to its tokens.
    turns: Records,
    /// SHA-256 of a turn's place and of a form that says all of it, to the key in `turns`.
    shown: Records,
    /// The id of a call, to the key of its turn in `turns` and the SHA-256 of each form that does not say all of it.
    proven: Records,
    /// The id of a block's first call, to the [`Block`].
    blocks: Records,
}

/// The key of a form or a turn.
type Key = [u8; 32];

/// A block of calls as it was generated.
#[derive(Serialize, Deserialize)]
struct Block {
    calls: Vec<Call>,
    text: String,
}

impl Replay {
    /// The record in `database` of turns that the model whose files have this identity sampled.
    pub fn new(database: &Database, identity: u128) -> Replay {
        let record = Record {
            database: database.clone(),
            salt: Sha256::new().chain_update(identity.to_le_bytes()),
            turns: database.records("turns", TURNS),
            shown: database.records("shown", SHOWN),
            proven: database.records("proven", PROVEN),
            blocks: database.records("blocks", BLOCKS),
        };
        Replay { record: Arc::new(record) }
    }

    /// The tokens of a rendered conversation: those sampled where a turn is known, and the text's otherwise. A record that cannot be read
    /// counts as unknown: the prompt says the same, but has to be read anew. `known_ids` are those of all calls in the conversation: they
    /// prove which turns are this client's.
    ///
    /// Panics if the tokenizer is not DeepSeek V4's, which a rendered conversation's is.
    pub fn prompt(&self, tokenizer: &Tokenizer, segments: &[Segment], known_ids: &HashSet<&str>) -> Prompt {
        let control = ControlTokens::find(tokenizer).expect("a conversation was rendered with this tokenizer");
        let is = |token: u32| move |segment: &Segment| *segment == Segment::Control(token);
        let first_turn = segments.iter().position(is(control.assistant)).unwrap_or(segments.len());
        let last_user = segments[..first_turn].iter().rposition(is(control.user)).unwrap_or(0);
        let common_tokens = tokenizer.encode_segments(&segments[..last_user]).len();

        let proven = self.proven(known_ids);
        let (mut tokens, mut rest) = (Place::new(&self.record), segments);
        while let Some(opener) = rest.iter().position(is(control.assistant)) {
            let (before, after) = rest.split_at(opener + 1);
            tokens.extend(tokenizer.encode_segments(before));
            let Some(end) = after.iter().position(is(control.eos)) else {
                rest = after;
                break;
            };
            let (turn, after) = after.split_at(end + 1);
            let known = self.sampled(&tokens.of_form(turn), &proven);
            tokens.extend(known.unwrap_or_else(|| tokenizer.encode_segments(turn)));
            rest = after;
        }
        tokens.extend(tokenizer.encode_segments(rest));
        Prompt { tokens: tokens.tokens, common_tokens }
    }

    /// The forms that calls with these ids prove, with the keys of their turns.
    fn proven(&self, known_ids: &HashSet<&str>) -> HashMap<Key, Key> {
        let mut proven = HashMap::new();
        for id in known_ids.iter().filter(|id| id.len() <= MAX_ID_BYTES) {
            let Ok(Some(keys)) = self.record.proven.get(id.as_bytes()) else { continue };
            if let Some((turn, forms)) = keys.as_chunks().0.split_first() {
                proven.extend(forms.iter().map(|form| (*form, *turn)));
            }
        }
        proven
    }

    /// The tokens remembered under a form, which is one of the proven or says all of them.
    fn sampled(&self, form: &Key, proven: &HashMap<Key, Key>) -> Option<Vec<u32>> {
        let turn = match proven.get(form) {
            Some(turn) => turn.to_vec(),
            None => self.record.shown.get(form).ok()??,
        };
        let bytes = self.record.turns.get(&turn).ok()??;
        Some(bytes.as_chunks().0.iter().map(|&token| u32::from_le_bytes(token)).collect())
    }

    /// Remembers what came of `prompt`, and the block of its calls, which clients know by `call_ids`, one for each. It is on the disk
    /// when this returns. A turn that went on with a message of the client's is encoded when it comes back, as is one after a task's token.
    ///
    /// A turn that the model ended is remembered as sampled. One that ended otherwise is remembered as the client was shown it: the sampled
    /// tokens as far as these say just that, then the rest of what was shown.
    ///
    /// # Errors
    /// [`DatabaseError`]: nothing was remembered; the turn will be encoded when it comes back.
    pub fn remember(
        &self,
        tokenizer: &Tokenizer,
        prompt: &[u32],
        outcome: &TurnOutcome,
        call_ids: &[String],
    ) -> Result<(), DatabaseError> {
        let record = &*self.record;
        let mut puts: Vec<(&Records, Vec<u8>, Vec<u8>)> = Vec::new();
        if let Some((place, opener)) = self.place(tokenizer, prompt) {
            let forms = Forms { tokenizer, turn: &outcome.turn };
            let body = forms.tokens(opener, outcome);
            let value: Vec<u8> = body.iter().flat_map(|token| token.to_le_bytes()).collect();
            let key = place.of_bytes(&value);
            let said: Vec<u8> = body.iter().flat_map(|&token| tokenizer.token_bytes(token)).copied().collect();
            let (shown, hiding): (Vec<_>, Vec<_>) =
                forms.all().into_iter().partition(|form| bytes_of(tokenizer, form) == said);
            let of_form = |form: &Vec<Segment>| place.of_form(form);
            puts.extend(shown.iter().map(|form| (&record.shown, of_form(form).to_vec(), key.to_vec())));
            let keys = std::iter::once(key).chain(hiding.iter().map(of_form)).collect::<Vec<Key>>().concat();
            let ids = call_ids.iter().filter(|id| id.len() <= MAX_ID_BYTES);
            puts.extend(ids.map(|id| (&record.proven, id.clone().into_bytes(), keys.clone())));
            puts.push((&record.turns, key.to_vec(), value));
        }
        if let Some(block) = block(&outcome.turn, call_ids) {
            let value = serde_json::to_vec(&block).expect("calls are plain text");
            puts.push((&record.blocks, call_ids[0].clone().into_bytes(), value));
        }
        let puts: Vec<_> = puts.iter().map(|(records, key, value)| (*records, &key[..], &value[..])).collect();
        record.database.put_all(&puts)
    }

    /// Where a turn after `prompt` stands, and its opener; `None` unless the prompt ends with just that.
    fn place(&self, tokenizer: &Tokenizer, prompt: &[u32]) -> Option<(Place, u32)> {
        let control = ControlTokens::find(tokenizer).ok()?;
        let (&opener, before) = prompt.split_last()?;
        let is_opener = opener == control.think || opener == control.end_think;
        if !is_opener || before.last() != Some(&control.assistant) {
            return None;
        }
        let mut place = Place::new(&self.record);
        place.extend(before.to_vec());
        Some((place, opener))
    }

    /// The block that `calls` came in exactly as it was generated, if they are all of its calls, with the ids that were given to them and
    /// the same names and arguments (whatever the order of keys).
    pub fn block(&self, calls: &[Call]) -> Option<String> {
        let id = calls.first()?.id.as_ref()?;
        let block: Block = serde_json::from_slice(&self.record.blocks.get(id.as_bytes()).ok()??).ok()?;
        let same = |(shown, kept): (&Call, &Call)| {
            shown.id == kept.id && shown.name == kept.name && is_same_json(&shown.arguments, &kept.arguments)
        };
        let all = calls.len() == block.calls.len() && calls.iter().zip(&block.calls).all(same);
        all.then_some(block.text)
    }
}

/// The block of a turn, its calls with their ids.
fn block(turn: &Turn, call_ids: &[String]) -> Option<Block> {
    let are_good = call_ids.len() == turn.calls.len() && call_ids.iter().all(|id| id.len() <= MAX_ID_BYTES);
    let text = turn.raw_block.clone().filter(|_| are_good && !call_ids.is_empty())?;
    let calls = turn.calls.iter().zip(call_ids).map(|(call, id)| Call { id: Some(id.clone()), ..call.clone() });
    Some(Block { calls: calls.collect(), text })
}

/// Whether two texts are the same, or JSON of the same value.
fn is_same_json(left: &str, right: &str) -> bool {
    let value = |text| serde_json::from_str::<Value>(text);
    left == right || matches!((value(left), value(right)), (Ok(left), Ok(right)) if left == right)
}

/// The tokens so far, and their hash.
struct Place {
    tokens: Vec<u32>,
    hash: Sha256,
}

impl Place {
    fn new(record: &Record) -> Place {
        Place { tokens: Vec::new(), hash: record.salt.clone() }
    }

    fn extend(&mut self, tokens: Vec<u32>) {
        tokens.iter().for_each(|token| self.hash.update(token.to_le_bytes()));
        self.tokens.extend(tokens);
    }

    /// The key of a turn shown like this here: a segment is its kind, its length or token, its text.
    fn of_form(&self, segments: &[Segment]) -> Key {
        let mut hash = self.hash.clone().chain_update(b"form");
        for segment in segments {
            match segment {
                Segment::Control(token) => hash.update([&[0], &token.to_le_bytes()[..]].concat()),
                Segment::Text(text) => {
                    hash.update([&[1], &(text.len() as u64).to_le_bytes()[..]].concat());
                    hash.update(text);
                }
            }
        }
        hash.finalize().into()
    }

    /// The key of a turn with these tokens here.
    fn of_bytes(&self, tokens: &[u8]) -> Key {
        self.hash.clone().chain_update(b"turn").chain_update(tokens).finalize().into()
    }
}

/// The forms in which clients may show a turn.
struct Forms<'a> {
    tokenizer: &'a Tokenizer,
    turn: &'a Turn,
}

impl Forms<'_> {
    /// Every form, from after `<｜Assistant｜>` to EOS.
    fn all(&self) -> Vec<Vec<Segment>> {
        let blocks = match &self.turn.raw_block {
            Some(_) => &[true, false][..],
            None => &[false],
        };
        let forms = blocks.iter().flat_map(|&raw| {
            [self.form(true, &self.turn.reasoning, raw), self.form(true, "", raw), self.form(false, "", raw)]
        });
        forms.flatten().collect()
    }

    /// The form with this reasoning, or none; with the calls as generated, or canonical. `None` if the vocabulary has no word for it.
    fn form(&self, thinks: bool, reasoning: &str, raw: bool) -> Option<Vec<Segment>> {
        let message = AssistantMessage {
            reasoning: reasoning.to_owned(),
            content: self.turn.content.clone(),
            calls: self.turn.calls.clone(),
            raw_block: self.turn.raw_block.clone().filter(|_| raw),
            ..AssistantMessage::default()
        };
        let mode = if thinks { Mode::Thinking { effort: None } } else { Mode::Chat };
        // Encodings differ in what stands before all turns.
        let options = PromptOptions { encoding: Encoding::V4_0731, mode, drop_reasoning: false };
        let messages = [Message::user(""), Message::Assistant(message)];
        let mut segments = render(self.tokenizer, &messages, &options).ok()?;
        let assistant = ControlTokens::find(self.tokenizer).ok()?.assistant;
        let opener = segments.iter().position(|segment| *segment == Segment::Control(assistant))?;
        Some(segments.split_off(opener + 1))
    }

    /// The turn's tokens from its opener to EOS.
    fn tokens(&self, opener: u32, outcome: &TurnOutcome) -> Vec<u32> {
        let eos = self.tokenizer.eos();
        if matches!(outcome.reason, StopReason::EndOfTurn(_) | StopReason::CallsClosed) {
            return [&[opener], &outcome.tokens[..], &[eos]].concat();
        }
        let thinks = self.tokenizer.control("<think>") == Some(opener);
        let shown = self.form(thinks, &self.turn.reasoning, true).unwrap_or_default();
        let body = shown.get(1..).unwrap_or_default();
        let (sampled, rest) = common(self.tokenizer, &outcome.tokens, body);
        [&[opener], sampled, &self.tokenizer.encode_segments(&rest)].concat()
    }
}

/// The first ones of `tokens` that say what `shown` begins with, as many as there are, and what follows of it.
fn common<'t>(tokenizer: &Tokenizer, tokens: &'t [u32], shown: &[Segment]) -> (&'t [u32], Vec<Segment>) {
    let said = bytes_of(tokenizer, shown);
    let mut ends = vec![0];
    for &token in tokens {
        let (end, token) = (ends[ends.len() - 1], tokenizer.token_bytes(token));
        if !said[end..].starts_with(token) {
            break;
        }
        ends.push(end + token.len());
    }
    let cut = ends.iter().enumerate().rev().find_map(|(count, &end)| Some((count, after(tokenizer, shown, end)?)));
    cut.map_or((&[], shown.to_vec()), |(count, rest)| (&tokens[..count], rest))
}

/// What segments say.
fn bytes_of(tokenizer: &Tokenizer, segments: &[Segment]) -> Vec<u8> {
    let bytes = |segment: &Segment| match segment {
        Segment::Control(token) => tokenizer.token_bytes(*token).to_vec(),
        Segment::Text(text) => text.clone().into_bytes(),
    };
    segments.iter().flat_map(bytes).collect()
}

/// What follows the first `skip` bytes of segments; `None` if these end inside a control token or a character.
fn after(tokenizer: &Tokenizer, segments: &[Segment], mut skip: usize) -> Option<Vec<Segment>> {
    for (index, segment) in segments.iter().enumerate() {
        let len = bytes_of(tokenizer, std::slice::from_ref(segment)).len();
        if skip < len {
            let head = match segment {
                Segment::Text(text) => Some(Segment::Text(text.get(skip..)?.to_owned())),
                Segment::Control(_) if skip == 0 => Some(segment.clone()),
                Segment::Control(_) => return None,
            };
            return Some(head.into_iter().chain(segments[index + 1..].iter().cloned()).collect());
        }
        skip -= len;
    }
    Some(Vec::new())
}
