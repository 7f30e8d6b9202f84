//! The word `｜DSML｜` spelt with ordinary tokens.
//!
//! Inside a value the grammar would allow it, but whoever reads the bytes could take it for markup. So the token that would
//! complete it is not allowed.

use crate::{Tokenizer, dsml};

/// The tokens that complete the word.
pub struct Spelt {
    /// By the number of bytes that stand before, at least one: ordinary tokens that begin with the rest.
    completing: Vec<Vec<u32>>,
    /// The bytes of each token, control tokens having none.
    ends: Vec<Vec<u8>>,
}

impl Spelt {
    pub fn new(tokenizer: &Tokenizer) -> Self {
        let word = dsml::TOKEN.as_bytes();
        let ordinary = |id: &u32| !tokenizer.is_control(*id);
        let ids = || 0..tokenizer.vocab_size() as u32;
        let mut completing = vec![Vec::new(); word.len()];
        for id in ids().filter(ordinary) {
            let bytes = tokenizer.token_bytes(id);
            let begun = (1..word.len()).filter(|&before| bytes.starts_with(&word[before..]));
            begun.for_each(|before| completing[before].push(id));
        }
        let end = |id| {
            let bytes = if tokenizer.is_control(id) { &[] } else { tokenizer.token_bytes(id) };
            bytes[bytes.len().saturating_sub(word.len())..].to_vec()
        };
        Self { completing, ends: ids().map(end).collect() }
    }

    /// Appends a token to the text of which only the end matters. Whatever stands before a control token is over.
    pub fn extend(&self, text: &mut Vec<u8>, token: u32) {
        match &self.ends[token as usize][..] {
            [] => text.clear(),
            bytes => text.extend_from_slice(bytes),
        }
        let keep = dsml::TOKEN.len() - 1;
        text.drain(..text.len().saturating_sub(keep));
    }

    /// The tokens that would complete the word after `text`.
    pub fn completing<'a>(&'a self, text: &'a [u8]) -> impl Iterator<Item = &'a u32> {
        let word = dsml::TOKEN.as_bytes();
        let begun = (1..word.len()).filter(|&before| text.ends_with(&word[..before]));
        begun.flat_map(|before| &self.completing[before])
    }
}
