//! What a session has seen, as far as the model needs it: raw rows of the sliding window, compressed rows, and the
//! compressors' inputs for windows that are still open (docs/spec/model.md §3).
//!
//! A [`State`] changes only in [`State::commit`] and [`State::rewind`]. Stages of a pass read it and write what they
//! make into a [`Delta`]; a pass that fails drops its delta, and the state never knew of it.
//!
//! Stepping back is free for the last [`FREE_REWIND_TOKENS`] tokens, because rings keep that much more than a step
//! forward needs. Farther back there are checkpoints, at most [`MAX_CHECKPOINTS`], at multiples of
//! [`CHECKPOINT_TOKENS`].

use std::sync::Arc;

use crate::kv::{CompressorLayout, KvLayout, LayerLayout};

/// Tokens that can always be taken back, counted from the farthest token since the last longer step back.
pub const FREE_REWIND_TOKENS: usize = 64;
/// Checkpoints lie at multiples of this many tokens: there no window of either ratio is open.
pub const CHECKPOINT_TOKENS: usize = 128;
/// Checkpoints kept for one session.
pub const MAX_CHECKPOINTS: usize = 8;

/// The last rows of something that has one row a token.
#[derive(Clone)]
pub(crate) struct Ring<T> {
    width: usize,
    rows: usize,
    data: Vec<T>,
}

impl<T: Copy + Default> Ring<T> {
    fn new(width: usize, rows: usize) -> Ring<T> {
        Ring { width, rows, data: vec![T::default(); width * rows] }
    }

    pub(crate) fn row(&self, position: usize) -> &[T] {
        &self.data[position % self.rows * self.width..][..self.width]
    }

    pub(crate) fn put(&mut self, position: usize, row: &[T]) {
        self.data[position % self.rows * self.width..][..self.width].copy_from_slice(row);
    }
}

/// Compressed rows, append only, in pages so that growing never copies and never holds twice what it needs. A clone
/// shares the pages; whoever writes first into a shared one takes a copy of it.
#[derive(Clone)]
pub(crate) struct RowLog {
    row_bytes: usize,
    rows_per_page: usize,
    len: usize,
    pages: Vec<Arc<[u8]>>,
}

impl RowLog {
    fn new(layout: &CompressorLayout) -> RowLog {
        let (row_bytes, rows_per_page) = (layout.row.row_bytes(), RowLog::rows_per_page(layout));
        RowLog { row_bytes, rows_per_page, len: 0, pages: Vec::new() }
    }

    /// A page serves 256 tokens of a ratio-4 layer and 2,048 of a ratio-128 layer.
    fn rows_per_page(layout: &CompressorLayout) -> usize {
        if layout.ratio == 4 { 64 } else { 16 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn row(&self, index: usize) -> &[u8] {
        let at = index % self.rows_per_page * self.row_bytes;
        &self.pages[index / self.rows_per_page][at..at + self.row_bytes]
    }

    pub(crate) fn push(&mut self, row: &[u8]) {
        if self.len == self.pages.len() * self.rows_per_page {
            self.pages.push(std::iter::repeat_n(0, self.row_bytes * self.rows_per_page).collect());
        }
        let at = self.len % self.rows_per_page * self.row_bytes;
        let page = Arc::make_mut(&mut self.pages[self.len / self.rows_per_page]);
        page[at..at + self.row_bytes].copy_from_slice(row);
        self.len += 1;
    }

    fn truncate(&mut self, len: usize) {
        self.len = len;
        self.pages.truncate(len.div_ceil(self.rows_per_page));
    }

    fn bytes(&self) -> usize {
        self.pages.len() * self.rows_per_page * self.row_bytes
    }
}

/// A compressor's rows and its inputs for recent tokens: `u` then `z`, the positional term already added to `z`.
#[derive(Clone)]
pub(crate) struct CompressorState {
    pub(crate) rows: RowLog,
    pub(crate) inputs: Ring<f32>,
}

impl CompressorState {
    fn new(layout: &CompressorLayout) -> CompressorState {
        let inputs = Ring::new(2 * layout.width, CompressorState::input_rows(layout));
        CompressorState { rows: RowLog::new(layout), inputs }
    }

    /// Tokens whose inputs are kept: the windows a row is made from, and what can be taken back.
    fn input_rows(layout: &CompressorLayout) -> usize {
        (1 + layout.overlaps as usize) * layout.ratio + FREE_REWIND_TOKENS
    }

    fn commit(&mut self, start: usize, len: usize, layout: &CompressorLayout, delta: &CompressorDelta) {
        delta.rows.chunks_exact(layout.row.row_bytes()).for_each(|row| self.rows.push(row));
        let skip = len.saturating_sub(self.inputs.rows);
        let inputs = delta.inputs.chunks_exact(2 * layout.width).enumerate().skip(skip);
        inputs.for_each(|(i, row)| self.inputs.put(start + i, row));
    }
}

#[derive(Clone)]
pub(crate) struct LayerState {
    pub(crate) raw: Ring<u8>,
    pub(crate) main: Option<CompressorState>,
    pub(crate) index: Option<CompressorState>,
}

/// What a pass adds to one compressor.
#[derive(Clone, Debug, Default)]
pub struct CompressorDelta {
    /// `u` then `z` of each token of the pass, `2 * width` values a token.
    pub inputs: Vec<f32>,
    /// Rows that windows ending in this pass gave, in order, packed.
    pub rows: Vec<u8>,
}

/// What a pass adds to one layer of one session.
#[derive(Clone, Debug, Default)]
pub struct LayerDelta {
    /// Packed raw rows, one a token.
    pub raw: Vec<u8>,
    /// The main compressor's part.
    pub main: CompressorDelta,
    /// The indexer compressor's part.
    pub index: CompressorDelta,
}

/// What a pass adds to one session.
#[derive(Clone, Debug)]
pub struct Delta {
    /// Tokens added.
    pub tokens: usize,
    /// The layers, first to last.
    pub layers: Vec<LayerDelta>,
}

impl Delta {
    /// An empty addition of `tokens` tokens, to be filled by the stages.
    pub fn new(layout: &KvLayout, tokens: usize) -> Delta {
        Delta { tokens, layers: vec![LayerDelta::default(); layout.layers.len()] }
    }
}

/// A compressor as a pass sees it: what is committed, then what the pass has made so far.
#[derive(Clone, Copy)]
pub struct CompressorView<'a> {
    start: usize,
    layout: &'a CompressorLayout,
    state: &'a CompressorState,
    delta: &'a CompressorDelta,
}

impl<'a> CompressorView<'a> {
    /// Compressed row number `index`, packed.
    pub fn row(&self, index: usize) -> &'a [u8] {
        match index.checked_sub(self.state.rows.len) {
            None => self.state.rows.row(index),
            Some(new) => {
                let bytes = self.layout.row.row_bytes();
                &self.delta.rows[new * bytes..][..bytes]
            }
        }
    }

    /// `(u, z)` of the token at `position`, `width` values each.
    pub fn inputs(&self, position: usize) -> (&'a [f32], &'a [f32]) {
        let both = match position.checked_sub(self.start) {
            None => self.state.inputs.row(position),
            Some(new) => &self.delta.inputs[new * 2 * self.layout.width..][..2 * self.layout.width],
        };
        both.split_at(self.layout.width)
    }
}

/// A layer as a pass sees it: what is committed, then what the pass has made so far.
#[derive(Clone, Copy)]
pub struct LayerView<'a> {
    start: usize,
    layout: &'a LayerLayout,
    state: &'a LayerState,
    delta: &'a LayerDelta,
}

impl<'a> LayerView<'a> {
    /// The raw row of the token at `position`, packed. Only the last `window` positions may be asked for.
    pub fn raw(&self, position: usize) -> &'a [u8] {
        match position.checked_sub(self.start) {
            None => self.state.raw.row(position),
            Some(new) => {
                let bytes = self.layout.raw.row_bytes();
                &self.delta.raw[new * bytes..][..bytes]
            }
        }
    }

    /// The main compressor, if the layer has one.
    pub fn main(&self) -> Option<CompressorView<'a>> {
        let (layout, state) = (self.layout.main.as_ref()?, self.state.main.as_ref()?);
        Some(CompressorView { start: self.start, layout, state, delta: &self.delta.main })
    }

    /// The indexer's compressor, if the layer has one.
    pub fn index(&self) -> Option<CompressorView<'a>> {
        let (layout, state) = (self.layout.index.as_ref()?, self.state.index.as_ref()?);
        Some(CompressorView { start: self.start, layout, state, delta: &self.delta.index })
    }
}

/// Enough of one layer to go on from a checkpoint.
#[derive(Clone, Default)]
pub struct LayerCheckpoint {
    /// Packed raw rows of the window before the checkpoint, ascending.
    pub raw: Vec<u8>,
    /// The main compressor's inputs of tokens that windows after the checkpoint need, `u` then `z` of each.
    pub main_inputs: Vec<f32>,
    /// The same of the indexer's compressor.
    pub index_inputs: Vec<f32>,
}

impl LayerCheckpoint {
    fn take(view: &LayerView<'_>, window: usize, position: usize) -> LayerCheckpoint {
        let inputs = |compressor: Option<CompressorView<'_>>| {
            let positions = |c: CompressorView<'_>| c.layout.needed_from(position)..position;
            compressor
                .map_or(Vec::new(), |c| positions(c).flat_map(|p| [c.inputs(p).0, c.inputs(p).1].concat()).collect())
        };
        let raw = (position.saturating_sub(window)..position).flat_map(|p| view.raw(p)).copied().collect();
        LayerCheckpoint { raw, main_inputs: inputs(view.main()), index_inputs: inputs(view.index()) }
    }
}

/// A position to which a session can step back beyond the free range.
#[derive(Clone)]
pub(crate) struct Checkpoint {
    pub(crate) position: usize,
    pub(crate) layers: Vec<LayerCheckpoint>,
}

/// Bytes that one session's state holds, by what they are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateBytes {
    /// Compressed rows: what grows with the tokens.
    pub rows: usize,
    /// Sliding windows of raw rows, fixed.
    pub windows: usize,
    /// Compressor inputs of recent tokens, fixed.
    pub inputs: usize,
    /// Checkpoints, bounded by [`MAX_CHECKPOINTS`].
    pub checkpoints: usize,
}

impl StateBytes {
    /// The most that a session of at most `tokens` tokens ever holds, one checkpoint more included: a new one is taken
    /// before an old one goes.
    pub fn at_most(layout: &KvLayout, tokens: usize) -> StateBytes {
        let compressors = || layout.layers.iter().flat_map(|layer| layer.main.iter().chain(&layer.index));
        let rows = |c: &CompressorLayout| {
            let pages = (tokens / c.ratio).div_ceil(RowLog::rows_per_page(c));
            pages * RowLog::rows_per_page(c) * c.row.row_bytes()
        };
        let inputs = |c: &CompressorLayout| CompressorState::input_rows(c) * 2 * c.width * 4;
        let raw = |rows: usize| layout.layers.iter().map(|layer| rows * layer.raw.row_bytes()).sum::<usize>();
        let open_inputs = |c: &CompressorLayout| {
            let tokens = CHECKPOINT_TOKENS - c.needed_from(CHECKPOINT_TOKENS);
            tokens * 2 * c.width * 4
        };
        let checkpoint = raw(layout.window) + compressors().map(open_inputs).sum::<usize>();
        StateBytes {
            rows: compressors().map(rows).sum(),
            windows: raw(layout.window + FREE_REWIND_TOKENS),
            inputs: compressors().map(inputs).sum(),
            checkpoints: (tokens / CHECKPOINT_TOKENS).min(MAX_CHECKPOINTS + 1) * checkpoint,
        }
    }

    /// The most that a clone of such a session holds for itself, when both together reach `tokens` tokens: of each
    /// compressor's pages the one that it was filling, and everything that is no page.
    pub fn of_clone(layout: &KvLayout, tokens: usize) -> StateBytes {
        let compressors = layout.layers.iter().flat_map(|layer| layer.main.iter().chain(&layer.index));
        let page = |c: &CompressorLayout| RowLog::rows_per_page(c) * c.row.row_bytes();
        StateBytes { rows: compressors.map(page).sum(), ..StateBytes::at_most(layout, tokens) }
    }

    /// All of it.
    pub fn total(&self) -> usize {
        self.rows + self.windows + self.inputs + self.checkpoints
    }
}

/// Which of more than one checkpoint goes, so that they stay dense near the end and sparse far from it: the one (never the
/// newest) whose neighbours then lie closest together, measured against how far back they lie. `positions` ascend.
pub fn least_useful(positions: &[usize]) -> usize {
    let at = |i: usize| positions[i] as u64;
    let newest = at(positions.len() - 1);
    let cost = |&i: &usize| {
        let before = if i == 0 { 0 } else { at(i - 1) };
        (at(i + 1) - before) * 1_000_000 / (newest - before)
    };
    (0..positions.len() - 1).min_by_key(cost).expect("more than one checkpoint")
}

/// One row of a layer of a session.
pub enum Part<'a> {
    /// Packed raw row of a position.
    Raw(usize, &'a [u8]),
    /// The next compressed row.
    Main(&'a [u8]),
    /// The indexer's next row.
    Index(&'a [u8]),
    /// `u` then `z` of a position, for the main compressor.
    MainInputs(usize, &'a [f32]),
    /// The same for the indexer's.
    IndexInputs(usize, &'a [f32]),
}

/// One session's past. A clone shares the compressed rows of the original until one of them writes to a page that both have,
/// so that it costs little however long the session is.
#[derive(Clone)]
pub struct State {
    pub(crate) layout: Arc<KvLayout>,
    pub(crate) position: usize,
    /// Every position from here to `position` can be stepped back to without a checkpoint.
    pub(crate) floor: usize,
    pub(crate) layers: Vec<LayerState>,
    pub(crate) checkpoints: Vec<Checkpoint>,
}

impl State {
    /// A session that has seen nothing.
    pub fn new(layout: Arc<KvLayout>) -> State {
        let layer = |layer: &LayerLayout| LayerState {
            raw: Ring::new(layer.raw.row_bytes(), layout.window + FREE_REWIND_TOKENS),
            main: layer.main.as_ref().map(CompressorState::new),
            index: layer.index.as_ref().map(CompressorState::new),
        };
        let layers = layout.layers.iter().map(layer).collect();
        State { layout, position: 0, floor: 0, layers, checkpoints: Vec::new() }
    }

    /// Tokens seen; also the position of the next token.
    pub fn position(&self) -> usize {
        self.position
    }

    /// The layout this state was made for.
    pub fn layout(&self) -> &Arc<KvLayout> {
        &self.layout
    }

    /// One layer, with what a pass has added to it so far.
    pub fn view<'a>(&'a self, layer: usize, delta: &'a LayerDelta) -> LayerView<'a> {
        let (layout, state) = (&self.layout.layers[layer], &self.layers[layer]);
        LayerView { start: self.position, layout, state, delta }
    }

    /// A session at `position` with nothing in it yet: for who holds sessions elsewhere and fills this one with
    /// [`State::put`]. Every position from `floor` on can be stepped back to.
    pub fn filled_later(layout: Arc<KvLayout>, position: usize, floor: usize) -> State {
        State { position, floor, ..State::new(layout) }
    }

    /// First position that can be stepped back to without a checkpoint.
    pub fn floor(&self) -> usize {
        self.floor
    }

    /// Puts one row of a layer into place. Compressed rows come in their order.
    pub fn put(&mut self, layer: usize, row: Part<'_>) {
        let layer = &mut self.layers[layer];
        match row {
            Part::Raw(position, row) => layer.raw.put(position, row),
            Part::Main(row) => layer.main.as_mut().expect("the layer has a compressor").rows.push(row),
            Part::Index(row) => layer.index.as_mut().expect("the layer has an indexer").rows.push(row),
            Part::MainInputs(position, row) => {
                layer.main.as_mut().expect("the layer has a compressor").inputs.put(position, row);
            }
            Part::IndexInputs(position, row) => {
                layer.index.as_mut().expect("the layer has an indexer").inputs.put(position, row);
            }
        }
    }

    /// Adds a checkpoint behind those there are.
    pub fn put_checkpoint(&mut self, position: usize, layers: Vec<LayerCheckpoint>) {
        self.checkpoints.push(Checkpoint { position, layers });
    }

    /// What a checkpoint holds, layer by layer, `i`th in the order of [`State::checkpoints`].
    pub fn checkpoint(&self, i: usize) -> &[LayerCheckpoint] {
        &self.checkpoints[i].layers
    }

    /// Takes over everything a finished pass has made.
    pub fn commit(&mut self, delta: &Delta) {
        self.take_checkpoints(delta);
        let layout = self.layout.clone();
        let (start, tokens) = (self.position, delta.tokens);
        for ((state, layout), delta) in self.layers.iter_mut().zip(&layout.layers).zip(&delta.layers) {
            let raw = delta.raw.chunks_exact(layout.raw.row_bytes()).enumerate();
            assert_eq!(raw.len(), tokens, "a pass commits only when every layer has made its rows");
            raw.skip(tokens.saturating_sub(state.raw.rows)).for_each(|(i, row)| state.raw.put(start + i, row));
            if let (Some(state), Some(layout)) = (&mut state.main, &layout.main) {
                state.commit(start, tokens, layout, &delta.main);
            }
            if let (Some(state), Some(layout)) = (&mut state.index, &layout.index) {
                state.commit(start, tokens, layout, &delta.index);
            }
        }
        self.position += tokens;
        self.floor = self.floor.max(self.position.saturating_sub(FREE_REWIND_TOKENS));
    }

    fn take_checkpoints(&mut self, delta: &Delta) {
        let end = self.position + delta.tokens;
        let first = (self.position / CHECKPOINT_TOKENS + 1) * CHECKPOINT_TOKENS;
        for position in (first..=end).step_by(CHECKPOINT_TOKENS) {
            let layer = |(i, delta)| LayerCheckpoint::take(&self.view(i, delta), self.layout.window, position);
            let layers = delta.layers.iter().enumerate().map(layer).collect();
            self.checkpoints.push(Checkpoint { position, layers });
            if self.checkpoints.len() > MAX_CHECKPOINTS {
                self.drop_least_useful_checkpoint();
            }
        }
    }

    fn drop_least_useful_checkpoint(&mut self) {
        let positions: Vec<usize> = self.checkpoints().collect();
        self.checkpoints.remove(least_useful(&positions));
    }

    /// Where [`State::rewind`] to `target` would get.
    pub fn reach(&self, target: usize) -> usize {
        let known = self.checkpoints.iter().map(|checkpoint| checkpoint.position);
        if target >= self.floor {
            target.min(self.position)
        } else {
            known.filter(|&at| at <= target).max().unwrap_or(0)
        }
    }

    /// Steps back to `target`, or to the nearest earlier position that is still known, and returns the position
    /// reached. Positions at or after the present one change nothing.
    pub fn rewind(&mut self, target: usize) -> usize {
        if target < self.floor {
            self.restore_checkpoint(target);
        } else if target < self.position {
            self.position = target;
        }
        self.checkpoints.retain(|checkpoint| checkpoint.position <= self.position);
        for (state, layout) in self.layers.iter_mut().zip(&self.layout.layers) {
            let compressors = [(&mut state.main, &layout.main), (&mut state.index, &layout.index)];
            for (state, layout) in compressors {
                if let (Some(state), Some(layout)) = (state, layout) {
                    state.rows.truncate(self.position / layout.ratio);
                }
            }
        }
        self.position
    }

    fn restore_checkpoint(&mut self, target: usize) {
        let found = self.checkpoints.iter().rposition(|checkpoint| checkpoint.position <= target);
        let position = found.map_or(0, |i| self.checkpoints[i].position);
        if let Some(i) = found {
            for ((state, layout), saved) in
                self.layers.iter_mut().zip(&self.layout.layers).zip(&self.checkpoints[i].layers)
            {
                let first = position.saturating_sub(self.layout.window);
                let rows = saved.raw.chunks_exact(layout.raw.row_bytes()).enumerate();
                rows.for_each(|(i, row)| state.raw.put(first + i, row));
                let compressors = [
                    (&mut state.main, &layout.main, &saved.main_inputs),
                    (&mut state.index, &layout.index, &saved.index_inputs),
                ];
                for (state, layout, inputs) in compressors {
                    if let (Some(state), Some(layout)) = (state, layout) {
                        let first = layout.needed_from(position);
                        let rows = inputs.chunks_exact(2 * layout.width).enumerate();
                        rows.for_each(|(i, row)| state.inputs.put(first + i, row));
                    }
                }
            }
        }
        (self.position, self.floor) = (position, position);
    }

    /// Positions of the checkpoints, ascending.
    pub fn checkpoints(&self) -> impl Iterator<Item = usize> + '_ {
        self.checkpoints.iter().map(|checkpoint| checkpoint.position)
    }

    /// Bytes held, by purpose.
    pub fn bytes(&self) -> StateBytes {
        let compressors = || self.layers.iter().flat_map(|layer| layer.main.iter().chain(&layer.index));
        let checkpoint =
            |layer: &LayerCheckpoint| layer.raw.len() + 4 * (layer.main_inputs.len() + layer.index_inputs.len());
        StateBytes {
            rows: compressors().map(|c| c.rows.bytes()).sum(),
            windows: self.layers.iter().map(|layer| layer.raw.data.len()).sum(),
            inputs: compressors().map(|c| 4 * c.inputs.data.len()).sum(),
            checkpoints: self.checkpoints.iter().flat_map(|c| &c.layers).map(checkpoint).sum(),
        }
    }
}
