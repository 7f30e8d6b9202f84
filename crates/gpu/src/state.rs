//! A session on the device: for each layer one buffer with rings of what recent tokens left, and the compressed rows.
//!
//! A pass writes ahead of the session's position only: to slots of the rings that hold nothing a session may still need,
//! and behind the compressed rows. A small pass writes into the ring in use, which has room for as many rows more than is
//! kept. A large one writes into the other ring, of which [`GpuState::begin`] has made a copy first; the rings change places
//! when the pass is committed. A pass that fails leaves everything as it was.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use model::kv::{CompressorLayout, KvLayout, LayerLayout};
use model::state::{
    CHECKPOINT_TOKENS, FREE_REWIND_TOKENS, LayerCheckpoint, LayerDelta, MAX_CHECKPOINTS, Part, State, least_useful,
};

use crate::GpuError;
use crate::device::Device;
use crate::kernel::{Buffer, Commands, Kernels};
use crate::upload::Uploader;

/// Rows of a pass that is written into the ring in use.
pub(crate) const SMALL_PASS: usize = 64;

/// Tokens that a new session has room for.
const FIRST_TOKENS: usize = 4096;

/// Where things lie in the buffer of a layer, in words.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerPlaces {
    /// Words of a raw or compressed row, and rows of the ring.
    pub(crate) row: usize,
    pub(crate) raw_rows: usize,
    /// Inputs of the main compressor in a ring, words of a token's, and rows.
    pub(crate) inputs: usize,
    pub(crate) inputs_row: usize,
    pub(crate) inputs_rows: usize,
    /// The same of the indexer's.
    pub(crate) index_inputs: usize,
    pub(crate) index_inputs_row: usize,
    pub(crate) index_inputs_rows: usize,
    /// Words of a ring; there are two.
    pub(crate) ring: usize,
    /// Words of an indexer row.
    pub(crate) index_row: usize,
    /// Tokens of a compressed row; 0 without.
    pub(crate) ratio: usize,
}

fn inputs_rows(layout: &CompressorLayout) -> usize {
    (1 + usize::from(layout.overlaps)) * layout.ratio + FREE_REWIND_TOKENS + SMALL_PASS
}

impl LayerPlaces {
    pub(crate) fn new(layout: &LayerLayout, window: usize) -> LayerPlaces {
        let (main, index) = (layout.main.as_ref(), layout.index.as_ref());
        let row = layout.raw.row_bytes() / 4;
        let raw_rows = window + FREE_REWIND_TOKENS + SMALL_PASS;
        let input_row = |c: Option<&CompressorLayout>| c.map_or(0, |c| 2 * c.width);
        let rows = |c: Option<&CompressorLayout>| c.map_or(0, inputs_rows);
        let inputs = raw_rows * row;
        let index_inputs = inputs + input_row(main) * rows(main);
        LayerPlaces {
            row,
            raw_rows,
            inputs,
            inputs_row: input_row(main),
            inputs_rows: rows(main),
            index_inputs,
            index_inputs_row: input_row(index),
            index_inputs_rows: rows(index),
            ring: index_inputs + input_row(index) * rows(index),
            index_row: index.map_or(0, |c| c.row.row_bytes() / 4),
            ratio: main.map_or(0, |c| c.ratio),
        }
    }

    /// First word of the compressed rows.
    pub(crate) fn main(&self) -> usize {
        2 * self.ring
    }

    fn rows(&self, tokens: usize) -> usize {
        tokens.checked_div(self.ratio).unwrap_or(0)
    }

    /// First word of the indexer's rows, of a buffer with room for `tokens`.
    pub(crate) fn index(&self, tokens: usize) -> usize {
        self.main() + self.rows(tokens) * self.row
    }

    /// Bytes of a buffer with room for `tokens`.
    pub(crate) fn bytes(&self, tokens: usize) -> u64 {
        4 * (self.index(tokens) + self.rows(tokens) * self.index_row) as u64
    }
}

/// Bytes of device memory that a session takes that may grow to `tokens`: with its checkpoints, and with the smaller buffers
/// that it still holds while it moves into the largest.
pub fn state_bytes(layout: &KvLayout, tokens: usize) -> u64 {
    let room = room_tokens(tokens);
    let before = if room > FIRST_TOKENS { room / 2 } else { 0 };
    let both = |layer: &LayerLayout| {
        let places = LayerPlaces::new(layer, layout.window);
        places.bytes(room) + if before > 0 { places.bytes(before) } else { 0 }
    };
    let checkpoint: u64 = checkpoint_places(layout).1;
    layout.layers.iter().map(both).sum::<u64>() + checkpoint * (MAX_CHECKPOINTS as u64 + 1)
}

/// Tokens that are made room for when `tokens` are needed.
pub(crate) fn room_tokens(tokens: usize) -> usize {
    tokens.next_power_of_two().max(FIRST_TOKENS)
}

/// Never written to once it is taken, so that forks share it.
#[derive(Clone)]
struct Checkpoint {
    position: usize,
    buffer: Arc<Buffer>,
}

/// Where each layer's parts lie in a checkpoint, in bytes: raw rows, inputs, the indexer's inputs. And bytes in all.
fn checkpoint_places(layout: &KvLayout) -> (Vec<[u64; 3]>, u64) {
    let mut at = 0;
    let mut next = |bytes: usize| {
        at += bytes as u64;
        at - bytes as u64
    };
    let inputs = |c: &Option<CompressorLayout>| c.map_or(0, |c| open_rows(&c) * 2 * c.width * 4);
    let layer = |layer: &LayerLayout| {
        [next(layout.window * layer.raw.row_bytes()), next(inputs(&layer.main)), next(inputs(&layer.index))]
    };
    let places = layout.layers.iter().map(layer).collect();
    (places, at)
}

/// Tokens before a checkpoint whose inputs are still needed.
fn open_rows(c: &CompressorLayout) -> usize {
    CHECKPOINT_TOKENS - c.needed_from(CHECKPOINT_TOKENS)
}

/// What is on the device, which may be replaced by something larger while the session stays the same.
pub(crate) struct Memory {
    pub(crate) layers: Vec<Buffer>,
    /// Tokens there is room for.
    pub(crate) room_tokens: usize,
}

/// One session's past.
pub struct GpuState {
    pub(crate) layout: Arc<KvLayout>,
    device: Arc<Device>,
    pub(crate) places: Vec<LayerPlaces>,
    memory: Mutex<Memory>,
    pub(crate) position: usize,
    floor: usize,
    /// The ring in use.
    pub(crate) ring: usize,
    checkpoints: Vec<Checkpoint>,
    kernels: Arc<Kernels>,
}

impl Drop for GpuState {
    fn drop(&mut self) {
        self.kernels.forget_bindings();
    }
}

impl GpuState {
    pub(crate) fn new(kernels: &Arc<Kernels>, layout: &Arc<KvLayout>) -> Result<GpuState, GpuError> {
        let device = kernels.device();
        let places: Vec<LayerPlaces> =
            layout.layers.iter().map(|layer| LayerPlaces::new(layer, layout.window)).collect();
        let memory = Mutex::new(Memory::new(device, &places, FIRST_TOKENS)?);
        Ok(GpuState {
            layout: layout.clone(),
            device: device.clone(),
            places,
            memory,
            position: 0,
            floor: 0,
            ring: 0,
            checkpoints: Vec::new(),
            kernels: kernels.clone(),
        })
    }

    /// A second session that goes on from the same place.
    pub(crate) fn fork(&self, commands: &mut Commands) -> Result<GpuState, GpuError> {
        let mut fork = GpuState::new(&self.kernels, &self.layout)?;
        let memory = self.memory();
        let copy = Memory::new(&self.device, &self.places, memory.room_tokens)?;
        for (from, to) in memory.layers.iter().zip(&copy.layers) {
            commands.copy((from, 0), (to, 0), from.bytes);
        }
        *fork.memory() = copy;
        (fork.position, fork.floor, fork.ring) = (self.position, self.floor, self.ring);
        fork.checkpoints = self.checkpoints.clone();
        Ok(fork)
    }

    /// The buffers. They stay the same from [`GpuState::begin`] to the end of a pass.
    pub(crate) fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tokens seen; also the position of the next token.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Bytes of device memory that the session holds.
    pub fn bytes(&self) -> u64 {
        let checkpoints = self.checkpoints.iter().map(|checkpoint| checkpoint.buffer.bytes).sum::<u64>();
        self.memory().layers.iter().map(|layer| layer.bytes).sum::<u64>() + checkpoints
    }

    /// First word of the ring that a pass of `rows` reads from, and of the one that it writes into.
    pub(crate) fn rings(&self, layer: usize, rows: usize) -> [usize; 2] {
        let ring = self.places[layer].ring;
        let other = if rows > SMALL_PASS { 1 - self.ring } else { self.ring };
        [self.ring * ring, other * ring]
    }

    /// Makes ready for a pass of `rows`; whether buffers were replaced.
    pub(crate) fn begin(&self, rows: usize, commands: &mut Commands) -> Result<bool, GpuError> {
        let mut memory = self.memory();
        let wanted = self.position + rows;
        let grows = wanted > memory.room_tokens;
        if grows {
            let larger = Memory::new(&self.device, &self.places, room_tokens(wanted))?;
            for ((places, from), to) in self.places.iter().zip(&memory.layers).zip(&larger.layers) {
                let rows = places.rows(self.position);
                commands.copy((from, 0), (to, 0), 4 * (places.main() + rows * places.row) as u64);
                let [old, new] = [memory.room_tokens, larger.room_tokens].map(|tokens| 4 * places.index(tokens) as u64);
                commands.copy((from, old), (to, new), 4 * (rows * places.index_row) as u64);
            }
            *memory = larger;
        }
        if rows > SMALL_PASS {
            for (places, layer) in self.places.iter().zip(&memory.layers) {
                let [from, to] = [self.ring, 1 - self.ring].map(|ring| 4 * (ring * places.ring) as u64);
                commands.copy_within(layer, from, to, 4 * places.ring as u64)?;
            }
        }
        Ok(grows)
    }

    /// A pass of `rows` has succeeded.
    pub(crate) fn commit(&mut self, rows: usize, commands: &mut Commands) -> Result<(), GpuError> {
        if rows > SMALL_PASS {
            self.ring = 1 - self.ring;
        }
        self.position += rows;
        self.floor = self.floor.max(self.position.saturating_sub(FREE_REWIND_TOKENS));
        if self.position.is_multiple_of(CHECKPOINT_TOKENS) {
            self.take_checkpoint(commands)?;
        }
        Ok(())
    }

    fn take_checkpoint(&mut self, commands: &mut Commands) -> Result<(), GpuError> {
        let bytes = checkpoint_places(&self.layout).1;
        let buffer = Buffer::new(&self.device, "a checkpoint", bytes)?;
        self.each_part(self.position, |layer, part, at| commands.copy((layer, part.0), (&buffer, at), part.1));
        self.checkpoints.push(Checkpoint { position: self.position, buffer: Arc::new(buffer) });
        if self.checkpoints.len() > MAX_CHECKPOINTS {
            let positions: Vec<usize> = self.checkpoints.iter().map(|checkpoint| checkpoint.position).collect();
            self.checkpoints.remove(least_useful(&positions));
        }
        Ok(())
    }

    /// Every piece of the rings that belongs to a checkpoint at `position`: the layer's buffer, first byte and bytes of the
    /// piece there, and where it goes in the checkpoint.
    fn each_part(&self, position: usize, mut each: impl FnMut(&Buffer, (u64, u64), u64)) {
        let (at, _) = checkpoint_places(&self.layout);
        let memory = self.memory();
        for (i, (places, layout)) in self.places.iter().zip(&self.layout.layers).enumerate() {
            let ring = self.ring * places.ring;
            let mut pieces = |first: usize, end: usize, start: usize, row: usize, rows: usize, to: u64| {
                // A ring's rows are cut where it begins anew.
                let mut row_number = first;
                while row_number < end {
                    let slot = row_number % rows;
                    let count = (rows - slot).min(end - row_number);
                    let piece = (4 * (start + slot * row) as u64, 4 * (count * row) as u64);
                    each(&memory.layers[i], piece, to + 4 * ((row_number - first) * row) as u64);
                    row_number += count;
                }
            };
            let first = position.saturating_sub(self.layout.window);
            pieces(first, position, ring, places.row, places.raw_rows, at[i][0]);
            if let Some(c) = &layout.main {
                let start = ring + places.inputs;
                pieces(c.needed_from(position), position, start, places.inputs_row, places.inputs_rows, at[i][1]);
            }
            if let Some(c) = &layout.index {
                let start = ring + places.index_inputs;
                let (row, rows) = (places.index_inputs_row, places.index_inputs_rows);
                pieces(c.needed_from(position), position, start, row, rows, at[i][2]);
            }
        }
    }

    /// See `model::Backend::reach`.
    pub(crate) fn reach(&self, target: usize) -> usize {
        let known = self.checkpoints.iter().map(|checkpoint| checkpoint.position);
        if target >= self.floor {
            target.min(self.position)
        } else {
            known.filter(|&at| at <= target).max().unwrap_or(0)
        }
    }

    /// Steps back; see `model::Backend::rewind`.
    pub(crate) fn rewind(&mut self, target: usize, commands: &mut Commands) -> usize {
        if target < self.floor {
            let found = self.checkpoints.iter().rposition(|checkpoint| checkpoint.position <= target);
            let position = found.map_or(0, |i| self.checkpoints[i].position);
            if let Some(i) = found {
                let saved = &self.checkpoints[i].buffer;
                self.each_part(position, |layer, part, at| commands.copy((saved, at), (layer, part.0), part.1));
            }
            (self.position, self.floor) = (position, position);
        } else if target < self.position {
            self.position = target;
        }
        self.checkpoints.retain(|checkpoint| checkpoint.position <= self.position);
        self.position
    }

    /// The same session in host memory.
    pub(crate) fn to_host(&self, commands: &mut Commands) -> Result<State, GpuError> {
        let mut host = State::filled_later(self.layout.clone(), self.position, self.floor);
        let memory = self.memory();
        for (i, (places, layout)) in self.places.iter().zip(&self.layout.layers).enumerate() {
            let bytes = commands.read((&memory.layers[i], 0), memory.layers[i].bytes)?;
            let row = |word: usize, words: usize| &bytes[4 * word..][..4 * words];
            let ring = self.ring * places.ring;
            for position in self.floor.saturating_sub(self.layout.window)..self.position {
                let at = ring + position % places.raw_rows * places.row;
                host.put(i, Part::Raw(position, row(at, places.row)));
            }
            for number in 0..places.rows(self.position) {
                host.put(i, Part::Main(row(places.main() + number * places.row, places.row)));
                if places.index_row > 0 {
                    let at = places.index(memory.room_tokens) + number * places.index_row;
                    host.put(i, Part::Index(row(at, places.index_row)));
                }
            }
            let floats = |at, words| -> Vec<f32> { bytemuck::pod_collect_to_vec(row(at, words)) };
            if let Some(c) = &layout.main {
                for position in c.needed_from(self.floor)..self.position {
                    let at = ring + places.inputs + position % places.inputs_rows * places.inputs_row;
                    host.put(i, Part::MainInputs(position, &floats(at, places.inputs_row)));
                }
            }
            if let Some(c) = &layout.index {
                for position in c.needed_from(self.floor)..self.position {
                    let slot = position % places.index_inputs_rows;
                    let at = ring + places.index_inputs + slot * places.index_inputs_row;
                    host.put(i, Part::IndexInputs(position, &floats(at, places.index_inputs_row)));
                }
            }
        }
        for checkpoint in &self.checkpoints {
            let bytes = commands.read((&checkpoint.buffer, 0), checkpoint.buffer.bytes)?;
            host.put_checkpoint(checkpoint.position, self.checkpoint_to_host(checkpoint.position, &bytes));
        }
        Ok(host)
    }

    fn checkpoint_to_host(&self, position: usize, bytes: &[u8]) -> Vec<LayerCheckpoint> {
        let (places, _) = checkpoint_places(&self.layout);
        let layer = |(layout, at): (&LayerLayout, &[u64; 3])| {
            let part = |i: usize, len: usize| &bytes[at[i] as usize..][..len];
            let inputs = |i: usize, c: &Option<CompressorLayout>| -> Vec<f32> {
                let len = c.map_or(0, |c| (position - c.needed_from(position)) * 2 * c.width * 4);
                bytemuck::pod_collect_to_vec(part(i, len))
            };
            LayerCheckpoint {
                raw: part(0, position.min(self.layout.window) * layout.raw.row_bytes()).to_vec(),
                main_inputs: inputs(1, &layout.main),
                index_inputs: inputs(2, &layout.index),
            }
        };
        self.layout.layers.iter().zip(&places).map(layer).collect()
    }

    /// A session of the host's on the device.
    pub(crate) fn from_host(kernels: &Arc<Kernels>, uploader: &Uploader, host: &State) -> Result<GpuState, GpuError> {
        let device = kernels.device();
        let mut state = GpuState::new(kernels, host.layout())?;
        (state.position, state.floor) = (host.position(), host.floor());
        let room = room_tokens(state.position);
        *state.memory() = Memory::new(device, &state.places, room)?;
        for (i, places) in state.places.iter().enumerate() {
            let delta = LayerDelta::default();
            let view = host.view(i, &delta);
            let mut words = vec![0_u8; places.bytes(room) as usize];
            let mut put = |word: usize, row: &[u8]| words[4 * word..][..row.len()].copy_from_slice(row);
            for position in state.floor.saturating_sub(state.layout.window)..state.position {
                put(position % places.raw_rows * places.row, view.raw(position));
            }
            let floats = |(u, z): (&[f32], &[f32])| [bytemuck::cast_slice(u), bytemuck::cast_slice(z)].concat();
            if let (Some(c), Some(main)) = (&state.layout.layers[i].main, view.main()) {
                (0..places.rows(state.position)).for_each(|n| put(places.main() + n * places.row, main.row(n)));
                for position in c.needed_from(state.floor)..state.position {
                    let at = places.inputs + position % places.inputs_rows * places.inputs_row;
                    put(at, &floats(main.inputs(position)));
                }
            }
            if let (Some(c), Some(index)) = (&state.layout.layers[i].index, view.index()) {
                let first = places.index(room);
                (0..places.rows(state.position)).for_each(|n| put(first + n * places.index_row, index.row(n)));
                for position in c.needed_from(state.floor)..state.position {
                    let slot = position % places.index_inputs_rows;
                    let at = places.index_inputs + slot * places.index_inputs_row;
                    put(at, &floats(index.inputs(position)));
                }
            }
            uploader.bytes((&state.memory().layers[i], 0), &words)?;
        }
        for (i, position) in host.checkpoints().enumerate() {
            let (places, bytes) = checkpoint_places(&state.layout);
            let mut words = vec![0; bytes as usize];
            for (at, layer) in places.iter().zip(host.checkpoint(i)) {
                let parts: [&[u8]; 3] =
                    [&layer.raw, bytemuck::cast_slice(&layer.main_inputs), bytemuck::cast_slice(&layer.index_inputs)];
                at.iter().zip(parts).for_each(|(&at, part)| words[at as usize..][..part.len()].copy_from_slice(part));
            }
            let buffer = Buffer::new(device, "a checkpoint", bytes)?;
            uploader.bytes((&buffer, 0), &words)?;
            state.checkpoints.push(Checkpoint { position, buffer: Arc::new(buffer) });
        }
        Ok(state)
    }
}

impl Memory {
    fn new(device: &Device, places: &[LayerPlaces], room_tokens: usize) -> Result<Memory, GpuError> {
        let buffer = |places: &LayerPlaces| Buffer::new(device, "a session", places.bytes(room_tokens));
        Ok(Memory { layers: places.iter().map(buffer).collect::<Result<_, _>>()?, room_tokens })
    }
}
