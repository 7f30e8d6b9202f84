//! A record of which experts a model chose, to be replayed without the model (docs/formats.md, "Recorded routes").
//!
//! Whatever stands in a file is checked before it is used: a foreign, truncated or damaged one is refused.

use std::io::{self, Read, Write};

/// What the routes are of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceHeader {
    /// Which model's files (`Source::identity`).
    pub identity: u128,
    /// Experts of a layer.
    pub experts: usize,
    /// Experts that a row uses in a layer.
    pub experts_used: usize,
    /// Bytes of an expert, layer by layer.
    pub expert_bytes: Vec<u64>,
}

/// One pass: how its rows were made up, and what they chose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TracePass {
    /// Rows of each session, which stand together. One row is a decoded token, more are a part of a prompt.
    pub runs: Vec<u32>,
    /// `[layers, rows, used]`: experts in rank order.
    pub experts: Vec<u16>,
}

impl TracePass {
    /// Rows of all sessions.
    pub fn rows(&self) -> usize {
        self.runs.iter().map(|&rows| rows as usize).sum()
    }

    /// Whether it read a part of a prompt.
    pub fn is_prefill(&self) -> bool {
        self.runs.iter().any(|&rows| rows > 1)
    }
}

/// Why a trace cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// Not such a file.
    #[error(
        "found a file that begins with {found:?}, expected recorded routes ({MAGIC:?}). Give a file that \
             --record-routes wrote"
    )]
    Foreign {
        /// Its first bytes.
        found: String,
    },
    /// Written by another version.
    #[error("found version {found} of recorded routes, expected {VERSION}. Record them again with this program")]
    Version {
        /// Its version.
        found: u32,
    },
    /// Numbers that no model has.
    #[error("found {what}; expected the sizes of a model. The file is damaged: record the routes again")]
    Header {
        /// What was found.
        what: String,
    },
    /// It ends too early.
    #[error(
        "the file ends in the middle of pass {pass}. It is truncated or still being written: copy it again, or \
             wait until the recording ends"
    )]
    Truncated {
        /// The pass, counted from 0.
        pass: usize,
    },
    /// Bytes have changed.
    #[error("pass {pass}: {what}. The file is damaged: copy it again, or record the routes again")]
    Damaged {
        /// The pass, counted from 0.
        pass: usize,
        /// What was found, and what was expected.
        what: String,
    },
    /// The system refused.
    #[error("{0}. Check the disk and the permissions")]
    Io(#[from] io::Error),
}

const MAGIC: &str = "infallRT";
const VERSION: u32 = 1;
/// Far more than any model has; keeps a damaged header from asking for memory.
const MOST_LAYERS: usize = 4096;
/// The same for the rows of a pass.
const MOST_ROWS: usize = 1 << 20;

/// Writes a trace, pass by pass.
pub struct TraceWriter<W> {
    to: W,
    header: TraceHeader,
}

impl<W: Write> TraceWriter<W> {
    /// Begins a trace. Panics if the header's sizes are such as a reader refuses.
    ///
    /// # Errors
    /// `to` cannot be written to.
    pub fn new(mut to: W, header: TraceHeader) -> Result<TraceWriter<W>, TraceError> {
        header.check().expect("the sizes of a model");
        to.write_all(&header.bytes())?;
        Ok(TraceWriter { to, header })
    }

    /// Adds a pass. Panics unless it has the header's shape.
    ///
    /// # Errors
    /// `to` cannot be written to.
    pub fn pass(&mut self, pass: &TracePass) -> Result<(), TraceError> {
        assert_eq!(pass.experts.len(), self.header.choices(pass.rows()), "experts of every layer, row and rank");
        let runs = std::iter::once(pass.runs.len() as u32).chain(pass.runs.iter().copied());
        let mut bytes: Vec<u8> = runs.flat_map(u32::to_le_bytes).collect();
        bytes.extend(pass.experts.iter().flat_map(|expert| expert.to_le_bytes()));
        bytes.extend(checksum(&bytes).to_le_bytes());
        self.to.write_all(&bytes)?;
        Ok(())
    }

    /// Gives back what was written to.
    ///
    /// # Errors
    /// What was held back cannot be written.
    pub fn finish(mut self) -> Result<W, TraceError> {
        self.to.flush()?;
        Ok(self.to)
    }
}

/// Reads a trace, pass by pass.
pub struct TraceReader<R> {
    from: R,
    header: TraceHeader,
    passes: usize,
    has_failed: bool,
}

impl<R: Read> TraceReader<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// [`TraceError::Foreign`], [`TraceError::Version`], [`TraceError::Header`], or `from` fails.
    pub fn new(mut from: R) -> Result<TraceReader<R>, TraceError> {
        let header = TraceHeader::read(&mut from)?;
        Ok(TraceReader { from, header, passes: 0, has_failed: false })
    }

    /// What the routes are of.
    pub fn header(&self) -> &TraceHeader {
        &self.header
    }

    /// The next pass, or `None` at the end.
    fn next_pass(&mut self) -> Result<Option<TracePass>, TraceError> {
        let pass = self.passes;
        let truncated = |error: io::Error| match error.kind() {
            io::ErrorKind::UnexpectedEof => TraceError::Truncated { pass },
            _ => TraceError::Io(error),
        };
        let damaged = |what: String| TraceError::Damaged { pass, what };
        let mut block = Block { from: &mut self.from, bytes: Vec::new() };
        let sessions = match block.number() {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof && block.bytes.is_empty() => return Ok(None),
            sessions => sessions.map_err(truncated)? as usize,
        };
        if !(1..=MOST_ROWS).contains(&sessions) {
            return Err(damaged(format!("found {sessions} sessions, expected 1 to {MOST_ROWS}")));
        }
        let runs = block.take(4 * sessions).map_err(truncated)?;
        let runs: Vec<u32> = runs.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect();
        let rows: u64 = runs.iter().map(|&rows| u64::from(rows)).sum();
        if rows > MOST_ROWS as u64 || runs.contains(&0) {
            return Err(damaged(format!("found {rows} rows in {sessions} sessions, expected 1 to {MOST_ROWS}")));
        }
        let experts = block.take(2 * self.header.choices(rows as usize)).map_err(truncated)?;
        let experts: Vec<u16> = experts.as_chunks().0.iter().map(|&bytes| u16::from_le_bytes(bytes)).collect();
        block.check().map_err(truncated)?.map_err(damaged)?;
        if let Some(expert) = experts.iter().find(|&&expert| usize::from(expert) >= self.header.experts) {
            return Err(damaged(format!("found expert {expert}, expected 0 to {}", self.header.experts - 1)));
        }
        self.passes += 1;
        Ok(Some(TracePass { runs, experts }))
    }
}

impl<R: Read> Iterator for TraceReader<R> {
    type Item = Result<TracePass, TraceError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.has_failed {
            return None;
        }
        let pass = self.next_pass().transpose();
        self.has_failed = matches!(pass, Some(Err(_)));
        pass
    }
}

impl TraceHeader {
    /// Layers of the model.
    pub fn layers(&self) -> usize {
        self.expert_bytes.len()
    }

    /// Experts chosen by so many rows in all layers, each choice counted.
    fn choices(&self, rows: usize) -> usize {
        self.layers() * rows * self.experts_used
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.as_bytes().to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.identity.to_le_bytes());
        let sizes = [self.layers(), self.experts, self.experts_used];
        bytes.extend(sizes.into_iter().flat_map(|size| (size as u32).to_le_bytes()));
        bytes.extend(self.expert_bytes.iter().flat_map(|bytes| bytes.to_le_bytes()));
        bytes.extend(checksum(&bytes).to_le_bytes());
        bytes
    }

    fn read(from: &mut impl Read) -> Result<TraceHeader, TraceError> {
        let short = |error: io::Error| match error.kind() {
            io::ErrorKind::UnexpectedEof => TraceError::Header { what: "an end in the middle of the header".into() },
            _ => TraceError::Io(error),
        };
        let mut block = Block { from, bytes: Vec::new() };
        if !block.take(MAGIC.len()).is_ok_and(|bytes| bytes == MAGIC.as_bytes()) {
            return Err(TraceError::Foreign { found: block.bytes.escape_ascii().to_string() });
        }
        let found = block.number().map_err(short)?;
        if found != VERSION {
            return Err(TraceError::Version { found });
        }
        let identity = block.take(16).map_err(short)?.try_into().expect("16 bytes");
        let mut size = || block.number().map(|size| size as usize).map_err(short);
        let (layers, experts, experts_used) = (size()?, size()?, size()?);
        let expert_bytes = vec![0; layers.min(MOST_LAYERS + 1)];
        let mut header = TraceHeader { identity: u128::from_le_bytes(identity), experts, experts_used, expert_bytes };
        header.check()?;
        let sizes = block.take(8 * layers).map_err(short)?.as_chunks().0.iter();
        header.expert_bytes = sizes.map(|&bytes| u64::from_le_bytes(bytes)).collect();
        block.check().map_err(short)?.map_err(|what| TraceError::Header { what })?;
        Ok(header)
    }

    fn check(&self) -> Result<(), TraceError> {
        let (layers, experts, used) = (self.layers(), self.experts, self.experts_used);
        if (1..=MOST_LAYERS).contains(&layers) && (1..=1 << 16).contains(&experts) && (1..=experts).contains(&used) {
            return Ok(());
        }
        Err(TraceError::Header { what: format!("{layers} layers of {experts} experts, {used} of them used") })
    }
}

/// Bytes that end with their checksum.
struct Block<'r> {
    from: &'r mut dyn Read,
    /// What was read so far.
    bytes: Vec<u8>,
}

impl Block<'_> {
    /// The next `count` bytes. Memory grows with what is there, not with what a damaged length promises.
    fn take(&mut self, count: usize) -> io::Result<&[u8]> {
        let start = self.bytes.len();
        self.from.take(count as u64).read_to_end(&mut self.bytes)?;
        let found = &self.bytes[start..];
        if found.len() == count { Ok(found) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    fn number(&mut self) -> io::Result<u32> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().expect("4 bytes")))
    }

    /// Reads the checksum; the inner error is what was found if it is another.
    fn check(&mut self) -> io::Result<Result<(), String>> {
        let expected = checksum(&self.bytes);
        let found = self.number()?;
        let what = || format!("found the checksum {found:08x}, expected {expected:08x}");
        Ok(if found == expected { Ok(()) } else { Err(what()) })
    }
}

/// The low half of XXH3's 64 bits.
fn checksum(bytes: &[u8]) -> u32 {
    xxhash_rust::xxh3::xxh3_64(bytes) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        fn trace()(layers in 1usize..4, experts in 2usize..9)
            (used in 1..=experts, runs in prop::collection::vec(prop::collection::vec(1u32..5, 1..3), 0..6),
             seed in any::<u64>(), experts in Just(experts), layers in Just(layers))
            -> (TraceHeader, Vec<TracePass>) {
            let header = TraceHeader {
                identity: u128::from(seed) << 40, experts, experts_used: used, expert_bytes: vec![seed; layers],
            };
            let pass = |runs: Vec<u32>| {
                let mut pass = TracePass { runs, experts: Vec::new() };
                let choice = |i: usize| (seed.rotate_left(i as u32 % 64) % experts as u64) as u16;
                pass.experts = (0..header.choices(pass.rows())).map(choice).collect();
                pass
            };
            let passes = runs.into_iter().map(pass).collect();
            (header, passes)
        }
    }

    fn written(header: &TraceHeader, passes: &[TracePass]) -> Vec<u8> {
        let mut writer = TraceWriter::new(Vec::new(), header.clone()).unwrap();
        passes.iter().for_each(|pass| writer.pass(pass).unwrap());
        writer.finish().unwrap()
    }

    fn read(bytes: &[u8]) -> Result<(TraceHeader, Vec<TracePass>), TraceError> {
        let reader = TraceReader::new(bytes)?;
        let header = reader.header().clone();
        Ok((header, reader.collect::<Result<_, _>>()?))
    }

    proptest! {
        #[test]
        fn what_is_written_is_read((header, passes) in trace()) {
            let bytes = written(&header, &passes);
            let (found_header, found_passes) = read(&bytes).unwrap();
            prop_assert_eq!(found_header, header);
            prop_assert_eq!(found_passes, passes);
        }

        #[test]
        fn a_changed_or_shortened_file_is_refused((header, passes) in trace(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut bytes = written(&header, &passes);
            let at = at.index(bytes.len());
            let shorter = read(&bytes[..at]);
            // At the end of a pass nothing tells that more would follow.
            prop_assert!(shorter.is_err() || shorter.is_ok_and(|(_, found)| passes.starts_with(&found) && found != passes));
            bytes[at] ^= 1 << bit;
            prop_assert!(read(&bytes).is_err());
        }

        #[test]
        fn any_bytes_are_refused_or_read(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&bytes);
            let _ = read(&[MAGIC.as_bytes(), &VERSION.to_le_bytes(), &bytes].concat());
        }
    }

    #[test]
    fn errors_say_what_was_found() {
        let header = TraceHeader { identity: 7, experts: 4, experts_used: 2, expert_bytes: vec![10, 20] };
        let pass = TracePass { runs: vec![1], experts: vec![0, 1, 2, 3] };
        let bytes = written(&header, std::slice::from_ref(&pass));
        let text = |bytes: &[u8]| read(bytes).unwrap_err().to_string();
        assert!(text(b"GGUF....").contains("\"GGUF....\""));
        let mut newer = bytes.clone();
        newer[8] = 2;
        assert!(text(&newer).contains("version 2"), "{}", text(&newer));
        assert!(text(&bytes[..bytes.len() - 1]).contains("in the middle of pass 0"));
        let outside = written(&header, &[TracePass { experts: vec![0, 1, 2, 4], ..pass }]);
        assert!(text(&outside).contains("found expert 4, expected 0 to 3"), "{}", text(&outside));
    }
}
