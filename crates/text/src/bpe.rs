//! Byte-pair encoding of one piece: merge the adjacent pair of lowest rank, the leftmost on ties, until
//! no pair has a merge.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rustc_hash::FxHashMap;

/// The rank of a pair that has no merge.
const NO_MERGE: u32 = u32::MAX;

/// The merge table of a vocabulary.
pub(crate) struct Bpe {
    /// The token of each single byte.
    byte_tokens: [u32; 256],
    /// (left, right) to the merge's rank.
    ranks: FxHashMap<(u32, u32), u32>,
    /// The token that the merge of each rank makes.
    merged: Vec<u32>,
    /// Pieces that end as a single token, by their bytes: most pieces of ordinary text.
    whole: FxHashMap<Box<[u8]>, u32>,
}

/// Buffers that [`Bpe::encode_piece`] uses again from piece to piece.
#[derive(Default)]
pub(crate) struct Scratch {
    parts: Vec<Part>,
    candidates: BinaryHeap<Reverse<(u32, usize)>>,
}

/// A token in the making; it stands at the index of its first byte in the piece.
#[derive(Clone, Copy)]
struct Part {
    token: u32,
    /// The rank of the merge with the part that follows, [`NO_MERGE`] also for a part that is no more.
    rank: u32,
    previous: usize,
    /// The index of the part that follows; the piece's length for the last.
    next: usize,
}

impl Bpe {
    /// `merges` are (left, right, result) by rank, without duplicates. `tokens` are the tokens (id and
    /// bytes) that ordinary text may become.
    pub(crate) fn new<'a>(
        byte_tokens: [u32; 256],
        merges: &[(u32, u32, u32)],
        tokens: impl Iterator<Item = (u32, &'a [u8])>,
    ) -> Self {
        let ranks = (0..).zip(merges).map(|(rank, &(left, right, _))| ((left, right), rank));
        let mut bpe = Self {
            byte_tokens,
            ranks: ranks.collect(),
            merged: merges.iter().map(|&(_, _, result)| result).collect(),
            whole: FxHashMap::default(),
        };
        let (mut scratch, mut ids) = (Scratch::default(), Vec::new());
        let whole = tokens.filter(|&(token, bytes)| {
            ids.clear();
            bpe.merge_piece(bytes, &mut scratch, &mut ids);
            ids == [token]
        });
        bpe.whole = whole.map(|(token, bytes)| (bytes.into(), token)).collect();
        bpe
    }

    /// Appends the tokens of one piece to `ids`.
    pub(crate) fn encode_piece(&self, piece: &[u8], scratch: &mut Scratch, ids: &mut Vec<u32>) {
        match self.whole.get(piece) {
            Some(&token) => ids.push(token),
            None => self.merge_piece(piece, scratch, ids),
        }
    }

    /// Merges `piece` from single bytes. Parts are a linked list and candidates a heap, so a piece of n
    /// bytes takes O(n log n): a line of a million equal letters is one piece.
    fn merge_piece(&self, piece: &[u8], scratch: &mut Scratch, ids: &mut Vec<u32>) {
        let Scratch { parts, candidates } = scratch;
        self.split_to_bytes(piece, parts);
        candidates.clear();
        let ranked = parts.iter().enumerate().filter(|(_, part)| part.rank != NO_MERGE);
        candidates.extend(ranked.map(|(index, part)| Reverse((part.rank, index))));

        while let Some(Reverse((rank, left))) = candidates.pop() {
            if parts[left].rank != rank {
                continue; // One of the two has been merged with another since.
            }
            let right = parts[left].next;
            let next = parts[right].next;
            parts[right].rank = NO_MERGE;
            parts[left].token = self.merged[rank as usize];
            parts[left].next = next;
            if let Some(next) = parts.get_mut(next) {
                next.previous = left;
            }
            let changed = if left == 0 { [None, Some(left)] } else { [Some(parts[left].previous), Some(left)] };
            for index in changed.into_iter().flatten() {
                let part = parts[index];
                let rank = parts.get(part.next).map_or(NO_MERGE, |next| self.rank(part.token, next.token));
                parts[index].rank = rank;
                if rank != NO_MERGE {
                    candidates.push(Reverse((rank, index)));
                }
            }
        }

        let mut index = 0;
        while let Some(part) = parts.get(index) {
            ids.push(part.token);
            index = part.next;
        }
    }

    /// Fills `parts` with the bytes of `piece`, one part each.
    fn split_to_bytes(&self, piece: &[u8], parts: &mut Vec<Part>) {
        parts.clear();
        parts.extend(piece.iter().enumerate().map(|(index, &byte)| {
            let token = self.byte_tokens[usize::from(byte)];
            let next = piece.get(index + 1).map(|&next| self.byte_tokens[usize::from(next)]);
            Part {
                token,
                rank: next.map_or(NO_MERGE, |next| self.rank(token, next)),
                previous: index.wrapping_sub(1),
                next: index + 1,
            }
        }));
    }

    fn rank(&self, left: u32, right: u32) -> u32 {
        self.ranks.get(&(left, right)).copied().unwrap_or(NO_MERGE)
    }
}
