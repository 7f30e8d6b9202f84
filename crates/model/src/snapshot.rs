//! A session's state as bytes: one format for every backend, versioned and checksummed (docs/formats.md).
//!
//! ```text
//! "infallKV" | version u32 | layout | position u64 | floor u64
//! per layer:   raw rows of [max(0, floor - window), position)
//!              per compressor: compressed rows, then inputs of [first needed at floor, position)
//! checkpoints: count u64, then each: position u64, per layer its raw rows and inputs
//! CRC-32 of everything before it, u32
//! ```
//! Integers and f32 are little endian. All lengths follow from the layout and the positions; none is read from the file.

use std::io::{self, Read, Write};
use std::sync::Arc;

use crate::kv::{Arithmetic, CompressorLayout, KvLayout, Precision, RowFormat};
use crate::state::{
    CHECKPOINT_TOKENS, Checkpoint, CompressorState, FREE_REWIND_TOKENS, LayerCheckpoint, MAX_CHECKPOINTS, State,
};

const MAGIC: &[u8; 8] = b"infallKV";
const VERSION: u32 = 2;

/// Why bytes could not be turned into a state.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The bytes could not be read.
    #[error("the state could not be read: {0}. It may be truncated; it was not used")]
    Io(#[from] io::Error),
    /// These are not the bytes of a state.
    #[error("this is not a saved state: it begins with {found:02x?}, expected {MAGIC:02x?} (\"infallKV\")")]
    NotAState {
        /// The first eight bytes.
        found: [u8; 8],
    },
    /// Another version of the format.
    #[error("the state has format version {found}, this program reads version {VERSION}: compute it anew")]
    Version {
        /// The version found.
        found: u32,
    },
    /// The state belongs to another model file or arithmetic.
    #[error("the state was made with another model file or arithmetic: use those it was made with, or compute it anew")]
    Layout,
    /// The state belongs to this model, but was computed in another precision.
    #[error(
        "the state was computed in {found:?} precision, this session computes in {expected:?}: use the precision it \
         was made with, or compute it anew"
    )]
    Precision {
        /// The state's.
        found: Precision,
        /// The session's.
        expected: Precision,
    },
    /// A position that no state can have.
    #[error("the state claims {what} {found}, which is impossible here: it is damaged and was not used")]
    Damaged {
        /// What was read.
        what: &'static str,
        /// Its value.
        found: u64,
    },
    /// The bytes changed since they were written.
    #[error("the state is damaged: its checksum is {computed:08x}, expected {stored:08x}; it was not used")]
    Checksum {
        /// Of the bytes read.
        computed: u32,
        /// As written at the end.
        stored: u32,
    },
}

struct Output<'w, W: Write> {
    to: &'w mut W,
    crc: crc32fast::Hasher,
}

impl<W: Write> Output<'_, W> {
    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.crc.update(bytes);
        self.to.write_all(bytes)
    }

    fn u64(&mut self, value: usize) -> io::Result<()> {
        self.bytes(&(value as u64).to_le_bytes())
    }

    fn floats(&mut self, values: &[f32]) -> io::Result<()> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.bytes(&bytes)
    }
}

struct Input<'r, R: Read> {
    from: &'r mut R,
    crc: crc32fast::Hasher,
}

impl<R: Read> Input<'_, R> {
    fn bytes(&mut self, into: &mut [u8]) -> io::Result<()> {
        self.from.read_exact(into)?;
        self.crc.update(into);
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut array = [0; N];
        self.bytes(&mut array)?;
        Ok(array)
    }

    fn u64(&mut self) -> io::Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn vec(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.bytes(&mut bytes)?;
        Ok(bytes)
    }

    fn floats(&mut self, len: usize) -> io::Result<Vec<f32>> {
        let bytes = self.vec(len * 4)?;
        Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }
}

/// The layout as bytes, so that two layouts are equal exactly if these are.
fn layout_bytes(layout: &KvLayout) -> Vec<u8> {
    let row = |row: RowFormat| match row {
        RowFormat::F32 { width } => [0, width as u32, 0],
        RowFormat::Fp8Bf16 { nope, rope } => [1, nope as u32, rope as u32],
        RowFormat::HadamardFp4 { width } => [2, width as u32, 0],
    };
    let compressor = |compressor: &Option<CompressorLayout>| match compressor {
        None => vec![0],
        Some(c) => [vec![c.ratio as u32], row(c.row).to_vec()].concat(),
    };
    let arithmetic = match layout.arithmetic {
        Arithmetic::Official => 0,
        Arithmetic::Plain => 1,
    };
    let precision = match layout.precision {
        Precision::Exact => 0,
        Precision::Fast => 1,
    };
    let mut words = vec![arithmetic, precision, layout.window as u32, layout.layers.len() as u32];
    for layer in &layout.layers {
        words.extend(row(layer.raw));
        words.extend(compressor(&layer.main));
        words.extend(compressor(&layer.index));
    }
    let identity = layout.identity.to_le_bytes();
    identity.into_iter().chain(words.iter().flat_map(|word| word.to_le_bytes())).collect()
}

impl State {
    /// Writes the state. Importing it gives a state that behaves the same to the bit, rewinding included.
    ///
    /// # Errors
    /// Those of `to`.
    pub fn export(&self, to: &mut impl Write) -> io::Result<()> {
        let mut out = Output { to, crc: crc32fast::Hasher::new() };
        out.bytes(MAGIC)?;
        out.bytes(&VERSION.to_le_bytes())?;
        out.bytes(&layout_bytes(&self.layout))?;
        out.u64(self.position)?;
        out.u64(self.floor)?;
        for (state, layout) in self.layers.iter().zip(&self.layout.layers) {
            for position in self.floor.saturating_sub(self.layout.window)..self.position {
                out.bytes(state.raw.row(position))?;
            }
            let compressors = [(&state.main, &layout.main), (&state.index, &layout.index)];
            for (state, layout) in compressors.into_iter().filter_map(|(s, l)| s.as_ref().zip(l.as_ref())) {
                self.export_compressor(&mut out, state, layout)?;
            }
        }
        out.u64(self.checkpoints.len())?;
        for checkpoint in &self.checkpoints {
            out.u64(checkpoint.position)?;
            for layer in &checkpoint.layers {
                out.bytes(&layer.raw)?;
                out.floats(&layer.main_inputs)?;
                out.floats(&layer.index_inputs)?;
            }
        }
        let crc = out.crc.finalize();
        to.write_all(&crc.to_le_bytes())
    }

    fn export_compressor<W: Write>(
        &self,
        out: &mut Output<'_, W>,
        state: &CompressorState,
        layout: &CompressorLayout,
    ) -> io::Result<()> {
        (0..state.rows.len()).try_for_each(|row| out.bytes(state.rows.row(row)))?;
        (layout.needed_from(self.floor)..self.position).try_for_each(|p| out.floats(state.inputs.row(p)))
    }

    /// Reads a state written by [`State::export`] for a model of the same layout. Apart from what every
    /// state holds, memory is taken only as bytes arrive.
    ///
    /// # Errors
    /// [`SnapshotError`] if the bytes are not a state, belong to another layout, or are damaged.
    pub fn import(layout: Arc<KvLayout>, from: &mut impl Read) -> Result<State, SnapshotError> {
        let mut input = Input { from, crc: crc32fast::Hasher::new() };
        let mut state = State::new(layout.clone());
        (state.position, state.floor) = read_header(&mut input, &layout)?;
        for (layer, layout) in state.layers.iter_mut().zip(&layout.layers) {
            let mut row = vec![0; layout.raw.row_bytes()];
            for position in state.floor.saturating_sub(state.layout.window)..state.position {
                input.bytes(&mut row)?;
                layer.raw.put(position, &row);
            }
            let compressors = [(&mut layer.main, &layout.main), (&mut layer.index, &layout.index)];
            for (compressor, layout) in compressors.into_iter().filter_map(|(s, l)| s.as_mut().zip(l.as_ref())) {
                import_compressor(&mut input, compressor, layout, state.floor, state.position)?;
            }
        }
        state.checkpoints = read_checkpoints(&mut input, &layout, state.position)?;
        let computed = input.crc.finalize();
        let mut stored = [0; 4];
        from.read_exact(&mut stored)?;
        let stored = u32::from_le_bytes(stored);
        if computed == stored { Ok(state) } else { Err(SnapshotError::Checksum { computed, stored }) }
    }
}

fn read_header<R: Read>(input: &mut Input<'_, R>, layout: &KvLayout) -> Result<(usize, usize), SnapshotError> {
    let found: [u8; 8] = input.array()?;
    if &found != MAGIC {
        return Err(SnapshotError::NotAState { found });
    }
    let found = u32::from_le_bytes(input.array()?);
    if found != VERSION {
        return Err(SnapshotError::Version { found });
    }
    let expected = layout_bytes(layout);
    let found = input.vec(expected.len())?;
    if found != expected {
        return Err(other_layout(&found, layout));
    }
    let (position, floor) = (input.u64()?, input.u64()?);
    if position > u32::MAX as u64 {
        return Err(SnapshotError::Damaged { what: "the position", found: position });
    }
    if floor > position || position - floor > FREE_REWIND_TOKENS as u64 {
        return Err(SnapshotError::Damaged { what: "the first free position", found: floor });
    }
    Ok((position as usize, floor as usize))
}

/// Why a state whose layout is `found` cannot be used under `layout`.
fn other_layout(found: &[u8], layout: &KvLayout) -> SnapshotError {
    let differs_by =
        |precision: &Precision| layout_bytes(&KvLayout { precision: *precision, ..layout.clone() }) == found;
    match [Precision::Exact, Precision::Fast].into_iter().find(differs_by) {
        Some(found) => SnapshotError::Precision { found, expected: layout.precision },
        None => SnapshotError::Layout,
    }
}

fn import_compressor<R: Read>(
    input: &mut Input<'_, R>,
    compressor: &mut CompressorState,
    layout: &CompressorLayout,
    floor: usize,
    position: usize,
) -> io::Result<()> {
    let mut row = vec![0; layout.row.row_bytes()];
    for _ in 0..position / layout.ratio {
        input.bytes(&mut row)?;
        compressor.rows.push(&row);
    }
    for position in layout.needed_from(floor)..position {
        compressor.inputs.put(position, &input.floats(2 * layout.width)?);
    }
    Ok(())
}

fn read_checkpoints<R: Read>(
    input: &mut Input<'_, R>,
    layout: &KvLayout,
    end: usize,
) -> Result<Vec<Checkpoint>, SnapshotError> {
    let count = input.u64()?;
    if count > MAX_CHECKPOINTS as u64 {
        return Err(SnapshotError::Damaged { what: "a number of checkpoints", found: count });
    }
    let (mut checkpoints, mut before) = (Vec::new(), 0);
    for _ in 0..count {
        let found = input.u64()?;
        if found <= before || found > end as u64 || found % CHECKPOINT_TOKENS as u64 != 0 {
            return Err(SnapshotError::Damaged { what: "a checkpoint's position", found });
        }
        before = found;
        let position = found as usize;
        let values = |layout: &Option<CompressorLayout>| {
            layout.map_or(0, |c| (position - c.needed_from(position)) * 2 * c.width)
        };
        let layers = layout.layers.iter().map(|layer| {
            Ok(LayerCheckpoint {
                raw: input.vec(position.min(layout.window) * layer.raw.row_bytes())?,
                main_inputs: input.floats(values(&layer.main))?,
                index_inputs: input.floats(values(&layer.index))?,
            })
        });
        let layers = layers.collect::<io::Result<_>>()?;
        checkpoints.push(Checkpoint { position, layers });
    }
    Ok(checkpoints)
}
