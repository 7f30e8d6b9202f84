//! The seal of a model: checksums of its routed experts, made once and kept in a small file (docs/formats.md, "Seal"), which
//! every read of a streamed expert is held against.
//!
//! Whatever stands in such a file is checked before it is used: a foreign, truncated or damaged one is refused.

use xxhash_rust::xxh3::xxh3_64;

use crate::{Cancel, ExpertExtents, ExpertId, Extent, Reader, Source, StoreError, read_all};

/// Why bytes are not the seal of a model.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// No seal at all.
    #[error("found a file that begins with {found:?}, expected the seal of a model (\"infallSL\")")]
    Foreign {
        /// Its first bytes.
        found: String,
    },
    /// Written by another version.
    #[error("found version {found} of seals, expected {VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
    /// Too short, too long, or bytes have changed.
    #[error("found {what}; the seal is truncated or damaged")]
    Damaged {
        /// What was found, and what was expected.
        what: String,
    },
    /// It belongs to other weights.
    #[error("found the seal of another model ({found}), expected that of this one ({expected})")]
    OtherModel {
        /// Identity and sizes of the model that was sealed.
        found: String,
        /// Those of the model at hand.
        expected: String,
    },
}

/// First bytes of every seal.
const MAGIC: &[u8; 8] = b"infallSL";
const VERSION: u32 = 1;
/// Magic, version, layers, experts, identity.
const HEADER_BYTES: usize = 8 + 3 * 4 + 16;
/// Bytes of the three checksums of an expert.
const EXPERT_BYTES: usize = 3 * 8;
/// Bytes of experts that are in memory at the same time while they are sealed.
const BATCH_BYTES: u64 = 32 << 20;

/// An XXH3-64 for each part of each expert, and whose they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seal {
    /// Which model's files ([`Source::identity`]).
    identity: u128,
    layers: usize,
    /// Experts of a layer.
    experts: usize,
    /// `[layers, experts]`, of each part.
    sums: Vec<[u64; 3]>,
}

impl Seal {
    /// Reads all experts of a model, some tens of megabytes at a time, and makes their checksums. `sealed` is told of
    /// bytes as they are done. Every layer has the same number of experts.
    ///
    /// # Errors
    /// A read failed, a file was written to meanwhile, or `cancel` came.
    pub fn make(
        source: &Source,
        reader: &dyn Reader,
        layers: &[ExpertExtents],
        cancel: &Cancel,
        sealed: &mut dyn FnMut(u64),
    ) -> Result<Seal, StoreError> {
        let experts = layers.first().map_or(0, |layer| layer.experts);
        assert!(layers.iter().all(|layer| layer.experts == experts), "layers of the same number of experts");
        let mut sums = Vec::with_capacity(layers.len() * experts);
        for layer in layers {
            let expert_bytes = layer.total_bytes() / experts as u64;
            let all: Vec<u32> = (0..experts as u32).collect();
            for batch in all.chunks((BATCH_BYTES / expert_bytes).max(1) as usize) {
                cancel.check()?;
                let parts = |&expert: &u32| [0, 1, 2].map(|part| layer.part(part, expert));
                let extents: Vec<Extent> = batch.iter().flat_map(parts).collect();
                let parts = read_all(reader, &extents, cancel, &mut |_| {})?;
                sums.extend(
                    parts.as_chunks().0.iter().map(|parts: &[_; 3]| parts.each_ref().map(|part| xxh3_64(part))),
                );
                sealed(batch.len() as u64 * expert_bytes);
            }
        }
        source.check_unchanged()?;
        Ok(Seal { identity: source.identity()?, layers: layers.len(), experts, sums })
    }

    /// What stands in its file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        let numbers = [VERSION, self.layers as u32, self.experts as u32];
        bytes.extend(numbers.into_iter().flat_map(u32::to_le_bytes));
        bytes.extend(self.identity.to_le_bytes());
        bytes.extend(self.sums.as_flattened().iter().flat_map(|sum| sum.to_le_bytes()));
        bytes.extend(xxh3_64(&bytes).to_le_bytes());
        bytes
    }

    /// The seal in a file of these bytes.
    ///
    /// # Errors
    /// Everything but [`SealError::OtherModel`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Seal, SealError> {
        if !bytes.starts_with(MAGIC) {
            return Err(SealError::Foreign { found: bytes[..bytes.len().min(8)].escape_ascii().to_string() });
        }
        let number =
            |at: usize| bytes.get(at..at + 4).map(|four| u32::from_le_bytes(four.try_into().expect("4 bytes")));
        match number(8) {
            Some(VERSION) => {}
            Some(found) => return Err(SealError::Version { found }),
            None => return Err(SealError::Damaged { what: format!("{} bytes", bytes.len()) }),
        }
        let Some((head, sums)) = bytes.split_at_checked(HEADER_BYTES) else {
            return Err(SealError::Damaged { what: format!("{} bytes", bytes.len()) });
        };
        let [layers, experts] = [12, 16].map(|at| number(at).expect("it is within the header"));
        let expected_bytes = HEADER_BYTES as u128 + u128::from(layers) * u128::from(experts) * EXPERT_BYTES as u128 + 8;
        if bytes.len() as u128 != expected_bytes || layers == 0 || experts == 0 {
            let what = format!("{} bytes for {layers} layers of {experts} experts", bytes.len());
            return Err(SealError::Damaged { what });
        }
        let (sums, own) = sums.split_at(sums.len() - 8);
        let (found, expected) = (xxh3_64(&bytes[..bytes.len() - 8]).to_le_bytes(), own);
        if found != expected {
            return Err(SealError::Damaged { what: "bytes that do not fit its own checksum".into() });
        }
        let sums: Vec<u64> = sums.as_chunks().0.iter().map(|&bytes| u64::from_le_bytes(bytes)).collect();
        Ok(Seal {
            identity: u128::from_le_bytes(head[20..].try_into().expect("16 bytes")),
            layers: layers as usize,
            experts: experts as usize,
            sums: sums.as_chunks().0.to_vec(),
        })
    }

    /// Layers and experts of a layer of the model that was sealed.
    pub fn shape(&self) -> (usize, usize) {
        (self.layers, self.experts)
    }

    /// The checksums of the model with these files and experts.
    ///
    /// # Errors
    /// [`SealError::OtherModel`] if it is not the one that was sealed.
    pub fn of_model(self, source: &Source, identity: u128, layers: &[ExpertExtents]) -> Result<Checksums, SealError> {
        let name =
            |identity: u128, layers: usize, experts: usize| format!("{layers} × {experts} experts, {identity:032x}");
        let found = name(self.identity, self.layers, self.experts);
        let expected = name(identity, layers.len(), layers.first().map_or(0, |layer| layer.experts));
        match found == expected {
            true => Ok(Checksums { source: source.clone(), seal: self }),
            false => Err(SealError::OtherModel { found, expected }),
        }
    }
}

/// A seal, and the files it is of.
#[derive(Clone, Debug)]
pub struct Checksums {
    source: Source,
    seal: Seal,
}

impl Checksums {
    /// Checks what read number `read` of [`ExpertExtents::reads`] brought into `memory`.
    ///
    /// # Errors
    /// [`StoreError::Damaged`].
    pub(crate) fn check(
        &self,
        id: ExpertId,
        layer: &ExpertExtents,
        read: usize,
        memory: &[u8],
    ) -> Result<(), StoreError> {
        let sums = self.seal.sums[id.layer as usize * self.seal.experts + id.expert as usize];
        let extent = layer.part(read, id.expert);
        let (found, expected) = (xxh3_64(&memory[extent.place_in_cover()]), sums[read]);
        if found != expected {
            let Extent { file, offset, bytes } = extent;
            let path = self.source.path(file).to_owned();
            let ExpertId { layer, expert } = id;
            return Err(StoreError::Damaged { path, layer, expert, part: read, offset, bytes, found, expected });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        fn seal()(layers in 1usize..4, experts in 1usize..9)
            (sums in prop::collection::vec(any::<[u64; 3]>(), layers * experts), identity in any::<u128>(),
             layers in Just(layers), experts in Just(experts)) -> Seal {
            Seal { identity, layers, experts, sums }
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(seal in seal()) {
            prop_assert_eq!(Seal::from_bytes(&seal.to_bytes()).unwrap(), seal);
        }

        #[test]
        fn a_changed_or_cut_or_longer_file_is_refused(seal in seal(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut bytes = seal.to_bytes();
            let at = at.index(bytes.len());
            prop_assert!(Seal::from_bytes(&bytes[..at]).is_err());
            prop_assert!(Seal::from_bytes(&[&bytes[..], &[0]].concat()).is_err());
            bytes[at] ^= 1 << bit;
            prop_assert!(Seal::from_bytes(&bytes).is_err());
        }

        #[test]
        fn any_bytes_are_refused_or_read(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Seal::from_bytes(&bytes);
            let _ = Seal::from_bytes(&[&MAGIC[..], &VERSION.to_le_bytes(), &bytes].concat());
        }
    }

    #[test]
    fn errors_say_what_was_found() {
        let bytes = Seal { identity: 7, layers: 1, experts: 2, sums: vec![[1, 2, 3]; 2] }.to_bytes();
        let text = |bytes: &[u8]| Seal::from_bytes(bytes).unwrap_err().to_string();
        assert!(text(b"GGUF....").contains("\"GGUF....\""));
        let newer = [&bytes[..8], &[2], &bytes[9..]].concat();
        assert!(text(&newer).contains("version 2 of seals, expected 1"), "{}", text(&newer));
        assert!(text(&bytes[..50]).contains("50 bytes for 1 layers of 2 experts"), "{}", text(&bytes[..50]));
    }
}
