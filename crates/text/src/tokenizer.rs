//! The tokenizer: ids from text and text from ids.

use aho_corasick::{AhoCorasick, BuildError, MatchKind};
use rustc_hash::FxHashMap;

use crate::bpe::{Bpe, Scratch};
use crate::byte_level;
use crate::pretokenize::pieces;

/// The one pre-tokenizer of DeepSeek V4, by its name in `tokenizer.ggml.pre`.
const PRE_TOKENIZER: &str = "joyai-llm";

/// A vocabulary as a GGUF file carries it; each field names its metadata key.
#[derive(Clone, Debug)]
pub struct TokenizerData {
    /// `tokenizer.ggml.tokens`: the spelling of each token, its index being its id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.token_type`, one for each token: 1 normal, 2 unknown, 3 control, 4 user-defined,
    /// 5 unused.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.merges`: "left right", the index being the rank.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.pre`: the name of the pre-tokenizer.
    pub pre: String,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: u32,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos: u32,
}

/// A part of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    /// A control token.
    Control(u32),
    /// Ordinary text: what looks like a control token in it is still ordinary text.
    Text(String),
}

/// Byte-level BPE with control tokens.
///
/// *Control tokens* are the tokens of type 3 and 4, which Hugging Face calls added tokens. No merge makes
/// one: they come from [`Segment::Control`] or from [`Tokenizer::split_control`] alone.
pub struct Tokenizer {
    bpe: Bpe,
    /// The bytes of all tokens, one after another.
    bytes: Vec<u8>,
    /// Where each token begins in `bytes`, and at last where the last one ends.
    starts: Vec<usize>,
    /// Control tokens by their text.
    control: FxHashMap<String, u32>,
    /// Finds control tokens in text; its patterns are `control_ids`.
    control_matcher: AhoCorasick,
    /// Control tokens in increasing order.
    control_ids: Vec<u32>,
    bos: u32,
    eos: u32,
}

/// A vocabulary that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// Text would be cut in another way than the model was trained on.
    #[error(
        "the vocabulary's pre-tokenizer (tokenizer.ggml.pre) is `{found}`, but only `{PRE_TOKENIZER}`, that of DeepSeek V4, is \
         supported: use a GGUF file of a DeepSeek V4 model"
    )]
    UnsupportedPreTokenizer {
        /// The name in the file.
        found: String,
    },
    /// Two lists that describe the same tokens disagree.
    #[error("the vocabulary has {tokens} tokens but {types} token types, expected one for each token: {REMEDY}")]
    LengthMismatch {
        /// Number of tokens.
        tokens: usize,
        /// Number of token types.
        types: usize,
    },
    /// A type outside 1..=5.
    #[error("token {id} has type {found}, expected 1 (normal) to 5 (unused): {REMEDY}")]
    TokenType {
        /// The token.
        id: usize,
        /// Its type.
        found: i32,
    },
    /// A token without text.
    #[error("token {id} is empty, expected at least one byte: {REMEDY}")]
    EmptyToken {
        /// The token.
        id: usize,
    },
    /// Two tokens with the same spelling.
    #[error("tokens {first} and {second} are both {text:?}, expected each text once: {REMEDY}")]
    DuplicateToken {
        /// Their text.
        text: String,
        /// The lower id.
        first: u32,
        /// The higher id.
        second: u32,
    },
    /// Some text would have no ids.
    #[error(
        "no normal token stands for the byte 0x{byte:02x} (spelt {spelling:?}), expected one for each of the 256: {REMEDY}"
    )]
    MissingByte {
        /// The byte.
        byte: u8,
        /// Its spelling in the byte alphabet.
        spelling: char,
    },
    /// A merge that is not two tokens with one space between.
    #[error("merge {rank} is {merge:?}, expected two tokens with one space between them: {REMEDY}")]
    MalformedMerge {
        /// Its index.
        rank: usize,
        /// Its text.
        merge: String,
    },
    /// A merge of, or to, something that is no normal token.
    #[error("merge {rank} ({merge:?}) needs the normal token {token:?}, which the vocabulary does not have: {REMEDY}")]
    MergeWithoutToken {
        /// Its index.
        rank: usize,
        /// Its text.
        merge: String,
        /// The spelling that was looked up.
        token: String,
    },
    /// The same merge twice.
    #[error("merges {first} and {second} are both {merge:?}, expected each once: {REMEDY}")]
    DuplicateMerge {
        /// The lower index.
        first: usize,
        /// The higher index.
        second: usize,
        /// Their text.
        merge: String,
    },
    /// BOS or EOS is not in the vocabulary.
    #[error("{key} is {id}, expected less than the number of tokens, {vocab_size}: {REMEDY}")]
    IdOutOfRange {
        /// The metadata key.
        key: &'static str,
        /// Its value.
        id: u32,
        /// Number of tokens.
        vocab_size: usize,
    },
    /// The control tokens are too many or too long for a matcher.
    #[error("the control tokens cannot be searched for ({0}), expected some thousand short texts: {REMEDY}")]
    ControlTokens(#[from] BuildError),
}

/// What to do about every fault of a vocabulary except a foreign one.
const REMEDY: &str = "the file is damaged or was converted wrongly, fetch it again or convert it again";

impl Tokenizer {
    /// Builds the tokenizer of a vocabulary.
    ///
    /// A normal token spelt with characters outside the byte alphabet is its own text and never comes out
    /// of ordinary text, as in Hugging Face's decoder; so is an unknown or unused one.
    ///
    /// # Errors
    /// [`TokenizerError`] if the vocabulary is not a whole byte-level BPE for `joyai-llm`.
    pub fn new(data: TokenizerData) -> Result<Self, TokenizerError> {
        let TokenizerData { tokens, token_types, merges, pre, bos, eos } = data;
        if pre != PRE_TOKENIZER {
            return Err(TokenizerError::UnsupportedPreTokenizer { found: pre });
        }
        let kinds = kinds(&tokens, &token_types)?;
        for (key, id) in [("tokenizer.ggml.bos_token_id", bos), ("tokenizer.ggml.eos_token_id", eos)] {
            if id as usize >= tokens.len() {
                return Err(TokenizerError::IdOutOfRange { key, id, vocab_size: tokens.len() });
            }
        }
        let ids = ids_by_spelling(&tokens)?;
        let normal_id = |spelling: &str| ids.get(spelling).copied().filter(|&id| kinds[id as usize] == Kind::Normal);
        let byte_tokens = byte_tokens(normal_id)?;
        let merges = resolve_merges(&merges, normal_id)?;
        let (bytes, starts) = token_bytes(&tokens, &kinds);

        let of_kind = |wanted: Kind| (0..).zip(&kinds).filter(move |&(_, &kind)| kind == wanted).map(|(id, _)| id);
        let normal = of_kind(Kind::Normal).map(|id: u32| (id, &bytes[starts[id as usize]..starts[id as usize + 1]]));
        let control_ids: Vec<u32> = of_kind(Kind::Control).collect();
        let control_texts = control_ids.iter().map(|&id| &tokens[id as usize]);
        Ok(Self {
            bpe: Bpe::new(byte_tokens, &merges, normal),
            control_matcher: AhoCorasick::builder()
                .match_kind(MatchKind::LeftmostLongest)
                .build(control_texts.clone())?,
            control: control_texts.cloned().zip(control_ids.iter().copied()).collect(),
            control_ids,
            bytes,
            starts,
            bos,
            eos,
        })
    }

    /// The ids of ordinary text. Never a control token, whatever the text says.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut scratch = Scratch::default();
        for piece in pieces(text) {
            self.bpe.encode_piece(piece.as_bytes(), &mut scratch, &mut ids);
        }
        ids
    }

    /// The ids of a prompt. Neighbouring texts are one text: BPE sees no seam between them.
    pub fn encode_segments(&self, segments: &[Segment]) -> Vec<u32> {
        let mut ids = Vec::new();
        let mut text = String::new();
        for segment in segments {
            match segment {
                Segment::Text(more) => text.push_str(more),
                Segment::Control(id) => {
                    ids.append(&mut self.encode(&text));
                    text.clear();
                    ids.push(*id);
                }
            }
        }
        ids.append(&mut self.encode(&text));
        ids
    }

    /// The ids of text whose control tokens are meant: templates, raw prompts, the model's own output. The
    /// same as Hugging Face's `encode(text, add_special_tokens=False)`.
    pub fn encode_with_control(&self, text: &str) -> Vec<u32> {
        self.encode_segments(&self.split_control(text))
    }

    /// Finds the control tokens in `text`: the leftmost first, of several at one place the longest.
    ///
    /// Hugging Face searches first for the entries of `tokenizer.json` with `"normalized": false`, then
    /// between them for the others. No two entries of V4 overlap in such a way that this differs.
    pub fn split_control(&self, text: &str) -> Vec<Segment> {
        let mut segments = Vec::new();
        let mut end = 0;
        for found in self.control_matcher.find_iter(text) {
            if end < found.start() {
                segments.push(Segment::Text(text[end..found.start()].to_owned()));
            }
            segments.push(Segment::Control(self.control_ids[found.pattern().as_usize()]));
            end = found.end();
        }
        if end < text.len() {
            segments.push(Segment::Text(text[end..].to_owned()));
        }
        segments
    }

    /// The control token with this text.
    pub fn control(&self, text: &str) -> Option<u32> {
        self.control.get(text).copied()
    }

    /// Whether `id` is a control token.
    pub fn is_control(&self, id: u32) -> bool {
        self.control_ids.binary_search(&id).is_ok()
    }

    /// The bytes of a token, which may begin or end inside a character; a control token's are its text.
    /// Empty for an id outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        match self.starts.get(id as usize..).unwrap_or_default() {
            [start, end, ..] => &self.bytes[*start..*end],
            _ => &[],
        }
    }

    /// The bytes of `ids`, one after another.
    pub fn decode(&self, ids: &[u32]) -> Vec<u8> {
        ids.iter().flat_map(|&id| self.token_bytes(id)).copied().collect()
    }

    /// The token that begins every prompt.
    pub fn bos(&self) -> u32 {
        self.bos
    }

    /// The token that ends every assistant turn.
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// Number of tokens, control tokens included.
    pub fn vocab_size(&self) -> usize {
        self.starts.len() - 1
    }
}

/// What a token is to the tokenizer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Comes from ordinary text.
    Normal,
    /// A control token.
    Control,
    /// Never comes from any text.
    Unused,
}

/// The kind of each token, from its type in the file.
fn kinds(tokens: &[String], token_types: &[i32]) -> Result<Vec<Kind>, TokenizerError> {
    if tokens.len() != token_types.len() {
        return Err(TokenizerError::LengthMismatch { tokens: tokens.len(), types: token_types.len() });
    }
    let kind = |(id, &found)| match found {
        1 => Ok(Kind::Normal),
        3 | 4 => Ok(Kind::Control),
        2 | 5 => Ok(Kind::Unused),
        _ => Err(TokenizerError::TokenType { id, found }),
    };
    token_types.iter().enumerate().map(kind).collect()
}

/// The tokens by their spelling.
fn ids_by_spelling(tokens: &[String]) -> Result<FxHashMap<&str, u32>, TokenizerError> {
    let mut ids = FxHashMap::with_capacity_and_hasher(tokens.len(), Default::default());
    for (second, text) in (0..).zip(tokens) {
        if text.is_empty() {
            return Err(TokenizerError::EmptyToken { id: second as usize });
        }
        if let Some(first) = ids.insert(text.as_str(), second) {
            return Err(TokenizerError::DuplicateToken { text: text.clone(), first, second });
        }
    }
    Ok(ids)
}

/// The token of each byte.
fn byte_tokens(normal_id: impl Fn(&str) -> Option<u32>) -> Result<[u32; 256], TokenizerError> {
    let mut byte_tokens = [0; 256];
    for (byte, spelling) in (0..=255).zip(byte_level::alphabet()) {
        let id = normal_id(spelling.encode_utf8(&mut [0; 4]));
        byte_tokens[usize::from(byte)] = id.ok_or(TokenizerError::MissingByte { byte, spelling })?;
    }
    Ok(byte_tokens)
}

/// The merges as (left, right, result).
fn resolve_merges(
    merges: &[String],
    normal_id: impl Fn(&str) -> Option<u32>,
) -> Result<Vec<(u32, u32, u32)>, TokenizerError> {
    let mut first_rank = FxHashMap::with_capacity_and_hasher(merges.len(), Default::default());
    let mut resolved = Vec::with_capacity(merges.len());
    for (rank, merge) in merges.iter().enumerate() {
        let parts =
            merge.split_once(' ').filter(|(left, right)| !left.is_empty() && !right.is_empty() && !right.contains(' '));
        let (left, right) = parts.ok_or_else(|| TokenizerError::MalformedMerge { rank, merge: merge.clone() })?;
        let id = |token: &str| {
            let missing = || TokenizerError::MergeWithoutToken { rank, merge: merge.clone(), token: token.to_owned() };
            normal_id(token).ok_or_else(missing)
        };
        let (left, right, result) = (id(left)?, id(right)?, id(&[left, right].concat())?);
        if let Some(first) = first_rank.insert((left, right), rank) {
            return Err(TokenizerError::DuplicateMerge { first, second: rank, merge: merge.clone() });
        }
        resolved.push((left, right, result));
    }
    Ok(resolved)
}

/// The bytes of all tokens one after another, and where each begins (and the last one ends).
fn token_bytes(tokens: &[String], kinds: &[Kind]) -> (Vec<u8>, Vec<usize>) {
    let decoder = byte_level::Decoder::new();
    let mut bytes = Vec::new();
    let mut starts = Vec::with_capacity(tokens.len() + 1);
    for (text, &kind) in tokens.iter().zip(kinds) {
        starts.push(bytes.len());
        if kind != Kind::Normal || !decoder.decode_into(text, &mut bytes) {
            bytes.extend_from_slice(text.as_bytes());
        }
    }
    starts.push(bytes.len());
    (bytes, starts)
}
