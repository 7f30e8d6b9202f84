//! Routed experts on the device, reached through a table of slots.
//!
//! Kernels ask the table where an expert is; what has no slot they leave out. With everything resident the table is
//! complete and stays so: a token runs without the host. When experts are streamed, the host reads what was chosen, leases
//! slots, fills those that miss from the tier of host memory (which reads the file), and runs the same kernels, as often as
//! it takes for all experts to have had a slot. Every expert's output has a place of its own, so that no bit depends on
//! what was where.
//!
//! Copies into slots and kernels that read them go through one queue, in the order in which they were handed over: a slot is
//! given to another expert only when the kernels that read it have been handed over, and so the copy comes after them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use model::{Cancel, Config, Error, Model};
use store::{Cache, ExpertId, HostLeases, HostStore, Policy, Prefetching, Source, StoreCounts};

use crate::awake::Awake;
use crate::device::Device;
use crate::format::Format;
use crate::kernel::{Buffer, Commands, Kernels};
use crate::upload::{FileRows, Rows, Transfer, Uploader};
use crate::weights::format_of;

/// No slot.
const NONE: u32 = u32::MAX;

/// How the experts of a layer lie in a slot.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ExpertLayout {
    /// Of gate, up and down.
    pub(crate) formats: [Format; 3],
    /// Rows and columns of each.
    shapes: [(usize, usize); 3],
    /// Where each begins in a slot, and all of it, in 16-byte vectors.
    pub(crate) parts: [u32; 3],
    pub(crate) slot: u32,
}

impl ExpertLayout {
    fn new(config: &Config, layer: usize, types: [gguf::TensorType; 3]) -> Result<ExpertLayout, Error> {
        let (d, f) = (config.d_model, config.expert_width);
        let shapes = [(f, d), (f, d), (d, f)];
        let names = ["gate", "up", "down"];
        let (mut formats, mut parts, mut slot) = ([Format::F32; 3], [0; 3], 0);
        for part in 0..3 {
            let (rows, cols) = shapes[part];
            formats[part] = format_of(&format!("blk.{layer}.ffn_{}_exps.weight", names[part]), types[part], cols)?;
            parts[part] = slot;
            slot += (rows * formats[part].row_bytes(cols) / 16) as u32;
        }
        Ok(ExpertLayout { formats, shapes, parts, slot })
    }

    /// Vectors of a row of a part.
    pub(crate) fn stride(&self, part: usize) -> u32 {
        (self.formats[part].row_bytes(self.shapes[part].1) / 16) as u32
    }

    /// Bytes of a slot.
    pub(crate) fn slot_bytes(&self) -> u64 {
        u64::from(self.slot) * 16
    }

    /// An expert's parts as they follow each other in a slot, which begins at byte `at`.
    pub(crate) fn rows<'r>(&self, at: u64, parts: [FileRows<'r>; 3]) -> [(u64, Rows<'r>); 3] {
        [0, 1, 2].map(|part| {
            let (rows, cols) = self.shapes[part];
            (at + u64::from(self.parts[part]) * 16, Rows { format: self.formats[part], rows, cols, bytes: parts[part] })
        })
    }
}

/// Layouts of all layers.
pub(crate) fn layouts(model: &Model) -> Result<Vec<ExpertLayout>, Error> {
    let layer = |(i, layer): (usize, &model::tensors::Experts)| ExpertLayout::new(&model.config, i, layer.types);
    model.experts.iter().enumerate().map(layer).collect()
}

/// Bytes that an expert of each layer takes on the device.
///
/// # Errors
/// An expert is of a type without kernels.
pub fn slot_bytes(model: &Model) -> Result<Vec<u64>, Error> {
    Ok(layouts(model)?.iter().map(ExpertLayout::slot_bytes).collect())
}

/// Where the slots of streamed experts are: slabs, and which of them serves each layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slabs {
    /// The slab of each layer.
    pub of_layer: Vec<usize>,
    /// Slots of each slab.
    pub slots: Vec<usize>,
    /// Bytes of each slab's slots.
    pub slot_bytes: Vec<u64>,
}

impl Slabs {
    /// As many slots as `memory_bytes` hold, in slabs of at most `slab_bytes`; layers whose experts have the same size
    /// share slabs evenly. `None` if a slab would have no slot.
    pub fn plan(slot_bytes: &[u64], experts: usize, memory_bytes: u64, slab_bytes: u64) -> Option<Slabs> {
        let all: u64 = slot_bytes.iter().map(|bytes| bytes * experts as u64).sum();
        let slots = |size: u64| {
            let layers = slot_bytes.iter().filter(|&&bytes| bytes == size).count();
            // A share of the memory as large as the share of the weights.
            let wanted = size as u128 * (experts * layers) as u128;
            let share = (u128::from(memory_bytes) * wanted / u128::from(all)) as u64;
            ((share / size) as usize).min(experts * layers)
        };
        Slabs::of_slots(slot_bytes, slots, slab_bytes)
    }

    /// For each size of an expert as many slots as `slots` says, in slabs of at most `slab_bytes`. `None` if a slab would
    /// have no slot.
    pub fn of_slots(slot_bytes: &[u64], slots: impl Fn(u64) -> usize, slab_bytes: u64) -> Option<Slabs> {
        let mut sizes: Vec<u64> = slot_bytes.to_vec();
        sizes.sort_unstable();
        sizes.dedup();
        let mut slabs = Slabs { of_layer: vec![0; slot_bytes.len()], slots: Vec::new(), slot_bytes: Vec::new() };
        for size in sizes {
            let layers: Vec<usize> = (0..slot_bytes.len()).filter(|&layer| slot_bytes[layer] == size).collect();
            let slots = slots(size);
            let most = (slab_bytes / size) as usize;
            let count = slots.checked_div(most)?.max(1).max(slots.div_ceil(most.max(1))).min(layers.len());
            let first = slabs.slots.len();
            for i in 0..count {
                let part = slots * (i + 1) / count - slots * i / count;
                slabs.slots.push(part.min(most));
                slabs.slot_bytes.push(size);
            }
            layers.iter().enumerate().for_each(|(i, &layer)| slabs.of_layer[layer] = first + i * count / layers.len());
        }
        slabs.slots.iter().all(|&slots| slots > 0).then_some(slabs)
    }

    /// Bytes of all slabs.
    pub fn bytes(&self) -> u64 {
        self.slots.iter().zip(&self.slot_bytes).map(|(&slots, bytes)| slots as u64 * bytes).sum()
    }
}

/// The experts of all layers.
pub(crate) struct GpuExperts {
    pub(crate) layouts: Vec<ExpertLayout>,
    /// Each layer's slab.
    slab_of_layer: Vec<usize>,
    slabs: Vec<Buffer>,
    /// `[layers, experts]`: slots, numbered within their slab.
    pub(crate) table: Buffer,
    experts: usize,
    streamed: Option<Tiers>,
}

/// Slots on the device, and the tier they are filled from.
struct Tiers {
    host: HostStore,
    awake: Option<Awake>,
    state: Mutex<TierState>,
    /// First slot of each slab among all.
    first_slot: Vec<u32>,
}

struct TierState {
    cache: Cache,
    uploaded_bytes: u64,
}

/// Experts that the rows of a pass chose, where the host has to know.
pub struct Selection {
    /// `[rows, K]`; `None` where everything is resident.
    chosen: Option<Vec<u32>>,
    /// Each row's place among its session's rows of the pass.
    places: Vec<usize>,
}

/// Chosen experts on their way into slots.
pub struct GpuLeases<'s>(Option<Wanted<'s>>);

struct Wanted<'s> {
    layer: usize,
    tiers: &'s Tiers,
    /// Those that are in no group yet, each once, ascending.
    experts: Vec<u32>,
    group: Group<'s>,
}

/// As many of the wanted experts as there are slots for, at least one. It ends when the kernels that read them were handed
/// over, or never will be.
struct Group<'t> {
    layer: usize,
    tiers: &'t Tiers,
    /// Experts and their slots, on lease.
    leased: Vec<(u32, u32)>,
    /// Experts that the device did not have, and the slots that they are to be copied to.
    missing: HashMap<u32, u32>,
    host: HostLeases<'t>,
}

impl Selection {
    pub(crate) fn resident() -> Selection {
        Selection { chosen: None, places: Vec::new() }
    }

    pub(crate) fn read_back(chosen: Vec<u32>, places: Vec<usize>) -> Selection {
        Selection { chosen: Some(chosen), places }
    }
}

impl GpuExperts {
    /// Room for all experts on the device, and a table that says they are there; they are left to be read.
    ///
    /// # Errors
    /// A layer's experts are more than a kernel can reach, the device has no more memory or failed.
    pub(crate) fn resident(device: &Device, uploader: &Uploader, model: &Model) -> Result<GpuExperts, Error> {
        let layouts = layouts(model)?;
        let count = model.config.experts;
        let slab = |(layer, layout): (usize, &ExpertLayout)| {
            Buffer::new(device, &format!("the experts of layer {layer}"), layout.slot_bytes() * count as u64)
        };
        let slabs = layouts.iter().enumerate().map(slab).collect::<Result<Vec<_>, _>>()?;
        let table: Vec<u32> = (0..layouts.len()).flat_map(|_| 0..count as u32).collect();
        let experts = GpuExperts {
            slab_of_layer: (0..layouts.len()).collect(),
            slabs,
            table: Buffer::new(device, "the slot table", 4 * table.len() as u64)?,
            experts: count,
            streamed: None,
            layouts,
        };
        uploader.bytes((&experts.table, 0), bytemuck::cast_slice(&table))?;
        Ok(experts)
    }

    /// What is still to be read: every expert where all are resident, and else none.
    pub(crate) fn transfers<'r>(
        &'r self,
        source: &'r Source,
        model: &'r Model,
    ) -> impl Iterator<Item = Transfer<'r>> + Send {
        let layers = if self.is_streamed() { 0 } else { self.layouts.len() };
        let experts = (0..layers).flat_map(|layer| (0..self.experts as u32).map(move |expert| (layer, expert)));
        experts.flat_map(move |(layer, expert)| {
            let (layout, extents) = (&self.layouts[layer], &model.experts[layer].extents);
            let parts = [0, 1, 2].map(|part| FileRows::There(source, extents.part(part, expert)));
            let rows = layout.rows(u64::from(expert) * layout.slot_bytes(), parts);
            rows.map(|(at, rows)| Transfer { to: &self.slabs[layer], at, rows })
        })
    }

    /// Slots on the device, filled from `host`.
    ///
    /// # Errors
    /// There is no memory for the slots.
    pub(crate) fn streamed(
        kernels: &Arc<Kernels>,
        uploader: &Uploader,
        model: &Model,
        slabs: &Slabs,
        host: HostStore,
    ) -> Result<GpuExperts, Error> {
        let (device, layouts) = (kernels.device(), layouts(model)?);
        let buffer = |(&slots, &bytes): (&usize, &u64)| Buffer::new(device, "slots of experts", slots as u64 * bytes);
        let buffers = slabs.slots.iter().zip(&slabs.slot_bytes).map(buffer).collect::<Result<Vec<_>, _>>()?;
        let mut slots = 0;
        let first_slot = slabs.slots.iter().map(|&count| {
            slots += count as u32;
            slots - count as u32
        });
        let first_slot: Vec<u32> = first_slot.collect();
        let (count, used) = (model.config.experts, model.config.experts_used);
        let half_life_tokens = Policy::half_life_tokens(slots as usize, layouts.len() * used);
        let cache = Cache::new(slabs.of_layer.clone(), count, &slabs.slots, usize::MAX, half_life_tokens);
        let awake = Awake::of(kernels)?;
        let tiers = Tiers { host, awake, state: Mutex::new(TierState { cache, uploaded_bytes: 0 }), first_slot };
        let table = vec![NONE; layouts.len() * count];
        let experts = GpuExperts {
            slab_of_layer: slabs.of_layer.clone(),
            slabs: buffers,
            table: Buffer::new(device, "the slot table", 4 * table.len() as u64)?,
            experts: count,
            streamed: Some(tiers),
            layouts,
        };
        uploader.bytes((&experts.table, 0), bytemuck::cast_slice(&table))?;
        Ok(experts)
    }

    pub(crate) fn is_streamed(&self) -> bool {
        self.streamed.is_some()
    }

    /// Where the experts of a layer are.
    pub(crate) fn slab(&self, layer: usize) -> &Buffer {
        &self.slabs[self.slab_of_layer[layer]]
    }

    /// First entry of a layer in the table.
    pub(crate) fn table_at(&self, layer: usize) -> u32 {
        (layer * self.experts) as u32
    }

    /// Bytes of device memory.
    pub(crate) fn bytes(&self) -> u64 {
        self.slabs.iter().map(|slab| slab.bytes).sum()
    }

    /// How often slots of the device had what was wanted, and bytes that were copied into them; all 0 where everything is
    /// resident.
    pub(crate) fn counts(&self) -> StoreCounts {
        self.streamed.as_ref().map_or(StoreCounts::default(), |tiers| {
            let state = tiers.lock();
            let stall_us = tiers.host.counts().stall_us;
            StoreCounts { cache: state.cache.counts(), read_bytes: state.uploaded_bytes, stall_us }
        })
    }

    /// How often the tier of host memory had what the device asked for, and what was read.
    pub(crate) fn host_counts(&self) -> StoreCounts {
        self.streamed.as_ref().map_or(StoreCounts::default(), |tiers| tiers.host.counts())
    }

    /// A pass begins; see [`HostStore::pass_begins`].
    pub(crate) fn pass_begins(&self) -> Option<Prefetching> {
        self.streamed.as_ref().map(|tiers| tiers.host.pass_begins())
    }

    /// A pass has ended; `tokens` is the largest number of rows that one session had in it.
    pub(crate) fn pass_ended(&self, tokens: usize) {
        if let Some(tiers) = &self.streamed {
            tiers.lock().cache.tokens_ended(tokens);
            tiers.host.pass_ended(tokens);
        }
    }

    /// Asks for what was chosen.
    pub(crate) fn lease<'s>(&'s self, layer: usize, selection: &Selection) -> GpuLeases<'s> {
        let (Some(tiers), Some(chosen)) = (&self.streamed, &selection.chosen) else { return GpuLeases(None) };
        let mut experts = chosen.clone();
        experts.sort_unstable();
        experts.dedup();
        let mut state = tiers.lock();
        for (i, &expert) in chosen.iter().enumerate() {
            let used = chosen.len() / selection.places.len();
            state.cache.chosen(id(layer, expert), selection.places[i / used]);
        }
        experts.iter().for_each(|&expert| state.cache.demand(id(layer, expert)));
        state.cache.layer_demanded(layer);
        drop(state);
        let group = tiers.begin_group(layer, &mut experts);
        GpuLeases(Some(Wanted { layer, tiers, experts, group }))
    }

    /// Runs `kernels` until every expert of `leases` was in a slot once. They are told whether it is the first time, and how
    /// many experts have slots.
    ///
    /// # Errors
    /// An expert could not be read, the device failed, or `cancel` came.
    pub(crate) fn run(
        &self,
        leases: GpuLeases<'_>,
        uploader: &Uploader,
        commands: &mut Commands,
        cancel: &Cancel,
        kernels: &mut dyn FnMut(&mut Commands, bool) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Some(mut wanted) = leases.0 else { return kernels(commands, true) };
        let mut is_first = true;
        loop {
            // On a thread of those that copy: it takes part, and need not be told by others that they are done.
            rayon::scope(|_| self.fill(&mut wanted.group, uploader, commands, cancel))?;
            let mut table = vec![NONE; self.experts];
            let first = wanted.tiers.first_slot[self.slab_of_layer[wanted.layer]];
            for &(expert, slot) in &wanted.group.leased {
                table[expert as usize] = slot - first;
            }
            let at = u64::from(self.table_at(wanted.layer)) * 4;
            commands.write((&self.table, at), bytemuck::cast_slice(&table));
            kernels(commands, is_first)?;
            // What reads the slots is handed over before any slot may be given to another.
            commands.submit();
            is_first = false;
            if !wanted.next_group() {
                return Ok(());
            }
        }
    }

    /// Copies the experts of a group that miss to their slots, as they come.
    fn fill(
        &self,
        group: &mut Group<'_>,
        uploader: &Uploader,
        commands: &mut Commands,
        cancel: &Cancel,
    ) -> Result<(), Error> {
        let (layer, tiers) = (group.layer, group.tiers);
        let (layout, slab) = (&self.layouts[layer], self.slab_of_layer[layer]);
        let mut stay_awake = |experts: usize| {
            if let Some(awake) = &tiers.awake {
                awake.stay(commands, experts as u64 * layout.slot_bytes());
            }
        };
        // While they are read, and while they are copied.
        if !group.missing.is_empty() {
            stay_awake(group.missing.len());
        }
        while !group.missing.is_empty() {
            let leases = group.host.all_ready(cancel)?;
            stay_awake(leases.len());
            let rows = leases.iter().flat_map(|lease| {
                let slot = group.missing[&lease.expert()] - tiers.first_slot[slab];
                let parts = [0, 1, 2].map(|part| FileRows::Here(lease.part(part)));
                layout.rows(u64::from(slot) * layout.slot_bytes(), parts)
            });
            uploader.rows(&self.slabs[slab], &rows.collect::<Vec<_>>())?;
            let mut state = tiers.lock();
            for lease in leases {
                let expert = lease.expert();
                let slot = group.missing.remove(&expert).expect("it was asked for");
                state.cache.read_ended(slot, true);
                state.uploaded_bytes += layout.slot_bytes();
                state.cache.lease(id(layer, expert)).expect("it is in its slot and nobody else wants it");
                group.leased.push((expert, slot));
            }
        }
        Ok(())
    }
}

impl Wanted<'_> {
    /// Ends the group and begins the next; whether there is one.
    fn next_group(&mut self) -> bool {
        self.group.end();
        if self.experts.is_empty() {
            return false;
        }
        self.group = self.tiers.begin_group(self.layer, &mut self.experts);
        true
    }
}

impl Drop for Wanted<'_> {
    fn drop(&mut self) {
        let mut state = self.tiers.lock();
        self.experts.iter().for_each(|&expert| state.cache.give_up(id(self.layer, expert)));
    }
}

impl Group<'_> {
    fn end(&mut self) {
        let mut state = self.tiers.lock();
        for (expert, _) in self.leased.drain(..) {
            state.cache.released(id(self.layer, expert));
        }
        for (expert, slot) in self.missing.drain() {
            state.cache.read_ended(slot, false);
            state.cache.give_up(id(self.layer, expert));
        }
    }
}

impl Drop for Group<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

impl Tiers {
    /// Takes experts out of `experts` that have a slot or are given one now, and asks the tier of host memory for those that
    /// miss. What a slot held is read by kernels only that were handed over before its lease ended.
    fn begin_group(&self, layer: usize, experts: &mut Vec<u32>) -> Group<'_> {
        let mut state = self.lock();
        let (mut leased, mut missing) = (Vec::new(), HashMap::new());
        for &expert in &*experts {
            leased.extend(state.cache.lease(id(layer, expert)).map(|slot| (expert, slot)));
        }
        while let Some(read) = state.cache.next_read() {
            missing.insert(read.id.expert, read.slot);
        }
        drop(state);
        assert!(leased.len() + missing.len() > 0, "a slab has a slot for one expert at least");
        let asked: Vec<u32> = experts.iter().copied().filter(|expert| missing.contains_key(expert)).collect();
        experts.retain(|expert| !missing.contains_key(expert) && leased.iter().all(|(other, _)| other != expert));
        let host = self.host.lease(layer, &asked, asked.iter().map(|&expert| (expert, 0)));
        Group { layer, tiers: self, leased, missing, host }
    }

    fn lock(&self) -> MutexGuard<'_, TierState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn id(layer: usize, expert: u32) -> ExpertId {
    ExpertId { layer: layer as u32, expert }
}
