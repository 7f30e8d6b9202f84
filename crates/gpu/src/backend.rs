//! The backend's parts, and the stages wired to the `Backend` trait.

use std::io::{Read, Write};
use std::sync::Arc;

use model::rope::Rope;
use model::{Activation, Arithmetic, Backend, Batch, Config, Error, KvLayout, Model, Precision, State, SubLayer};
use rayon::prelude::*;
use store::{Cancel, Checksums, ExpertExtents, Extent, HostStore, ReaderKind, Residency, Source, StoreCounts};

use crate::device::{Checks, Choice, Device};
use crate::experts::{ExpertLayout, GpuExperts, GpuLeases, Selection, Slabs};
use crate::format;
use crate::jobs::Jobs;
use crate::kernel::{Buffer, Commands, Kernels};
use crate::kit::{Kit, Trusted};
use crate::matmul::Many;
use crate::pass::{GpuPass, Pending, Pool, Shapes, runs_together};
use crate::stages::lock;
use crate::state::GpuState;
use crate::timer::Stopwatch;
use crate::together::{MOST_TOGETHER, most_together};
use crate::upload::{Check, Uploader, while_uploading};
use crate::weights::{HeadWeights, LayerWeights, load_head, load_layer};

/// Where routed experts live.
#[derive(Clone, Debug, PartialEq)]
pub enum Placement {
    /// All on the device.
    Resident,
    /// In slots on the device, filled from a tier of host memory.
    Streamed {
        /// The slots.
        slabs: Slabs,
        /// The tier: all experts, or slots that are filled from the file.
        host: Residency,
    },
}

/// How a backend is to run. None of it but `arithmetic` and `precision` changes a bit of the output.
#[derive(Clone, Debug)]
pub struct Options {
    /// With or without the model's own low-precision roundings.
    pub arithmetic: Arithmetic,
    /// How rows are multiplied.
    pub precision: Precision,
    /// Where routed experts live.
    pub placement: Placement,
    /// What experts are read with.
    pub reader: ReaderKind,
    /// What every read of a streamed expert is held against.
    pub checksums: Option<Checksums>,
    /// Asks loading to stop.
    pub cancel: Arc<Cancel>,
    /// Sessions whose rows one dispatch computes at most, where an adapter can bind so many. More than 8 are 8.
    pub sessions_together: usize,
    /// Sessions that will be in a pass at the same time: the kernels for them are made when the model is loaded. Those for more are
    /// made when so many first meet.
    pub sessions_prepared: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            arithmetic: Arithmetic::Official,
            precision: Precision::Fast,
            placement: Placement::Resident,
            reader: ReaderKind::Direct,
            checksums: None,
            cancel: Arc::default(),
            sessions_together: MOST_TOGETHER,
            sessions_prepared: 1,
        }
    }
}

/// Stages, or parts of loading, in the order in which they ran, with their microseconds.
pub type StageTimes = Vec<(&'static str, f64)>;

/// Rows of the token embedding, read from the file as tokens come.
pub(crate) struct Embedding {
    source: Source,
    extent: Extent,
    ty: gguf::TensorType,
    row_bytes: u64,
}

impl Embedding {
    /// `[tokens, D]`.
    pub(crate) fn rows(&self, tokens: &[u32], d: usize) -> Result<Vec<f32>, Error> {
        let mut values = vec![0.0; tokens.len() * d];
        // A prompt's rows are many, and the device waits for them.
        let read = |bytes: &mut Vec<u8>, (row, &token): (&mut [f32], &u32)| {
            let offset = self.extent.offset + u64::from(token) * self.row_bytes;
            self.source.read_exact_at(self.extent.file, offset, bytes)?;
            quant::dequantize(self.ty, bytes, row);
            Ok::<(), Error>(())
        };
        let bytes = || vec![0; self.row_bytes as usize];
        let rows = values.par_chunks_exact_mut(d).with_min_len(32).zip(tokens.par_iter().with_min_len(32));
        rows.try_for_each_init(bytes, read)?;
        Ok(values)
    }
}

/// A model loaded onto a GPU.
pub struct GpuBackend {
    pub(crate) config: Config,
    pub(crate) layout: Arc<KvLayout>,
    pub(crate) shapes: Shapes,
    /// Without compression, with compression.
    ropes: [Rope; 2],
    pub(crate) device: Arc<Device>,
    pub(crate) kernels: Arc<Kernels>,
    pub(crate) kit: Kit,
    pub(crate) many: Many,
    pub(crate) uploader: Uploader,
    pub(crate) layers: Vec<LayerWeights>,
    pub(crate) head: HeadWeights,
    pub(crate) embedding: Embedding,
    pub(crate) experts: GpuExperts,
    pub(crate) code_book: Buffer,
    /// Sessions that kernels are bound to at most, and what is bound in place of those that are missing to a power of two.
    together: usize,
    pub(crate) spares: Vec<Buffer>,
    pool: Arc<Pool>,
    source: Source,
    note: Option<String>,
    adapter_note: Option<String>,
    reader: &'static str,
    checks: bool,
    load_times: StageTimes,
}

impl GpuBackend {
    /// Reads the weights of `model` from `source` onto an adapter. `loaded` is told the bytes as they arrive.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no such adapter, it cannot run the kernels, a tensor has no kernel or does not fit, or the
    /// device fails; [`Error::Unsupported`] for sizes that no kernel is made for; and what reading gives.
    pub fn load(
        model: &Model,
        source: &Source,
        (choice, checks): (Choice, Checks),
        options: Options,
        loaded: &mut dyn FnMut(u64),
    ) -> Result<GpuBackend, Error> {
        check_sizes(&model.config)?;
        let mut watch = Stopwatch::new();
        let device = Device::open(choice, checks)?;
        watch.done("open the adapter");
        let kernels = Arc::new(Kernels::new(device.clone()));
        let uploader = Uploader::new(device.clone());
        let layout = Arc::new(KvLayout::new(&model.config, source.identity()?, options.arithmetic, options.precision));
        let (mut layers, mut unread) = (Vec::new(), Vec::new());
        for layer in 0..model.config.layers {
            options.cancel.check()?;
            let (weights, matrices) = load_layer(&device, &uploader, source, model, layer, loaded)?;
            layers.push(weights);
            unread.push(matrices);
        }
        let (head, unread_head) = load_head(&device, &uploader, source, model, loaded)?;
        let book = format::code_book();
        let code_book = Buffer::new(&device, "the code book", book.len() as u64)?;
        uploader.bytes((&code_book, 0), &book)?;
        watch.done("place the weights");
        let extents: Vec<ExpertExtents> = model.experts.iter().map(|layer| layer.extents).collect();
        let (reader, note) = store::open_reader(source, options.reader)?;
        let (mut reader_name, mut is_checked) = ("the system's cache", false);
        let experts = match &options.placement {
            Placement::Resident => GpuExperts::resident(&device, &uploader, model)?,
            Placement::Streamed { slabs, host } => {
                reader_name = reader.name();
                let host = match host {
                    Residency::Resident => HostStore::resident(&*reader, &extents, &options.cancel, loaded)?,
                    Residency::Streamed { slots } => {
                        let used = model.config.experts_used;
                        HostStore::streamed(reader.clone(), &extents, slots, used, options.checksums.clone())?
                    }
                };
                is_checked = host.checks();
                GpuExperts::streamed(&kernels, &uploader, model, slabs, host)?
            }
        };
        watch.done("place the experts");
        let buffers = device.device.limits().max_storage_buffers_per_shader_stage;
        let together = most_together(buffers, options.sessions_together);
        let spare = |_| Buffer::new(&device, "no session", 16);
        let spares = (0..together / 2).map(spare).collect::<Result<_, _>>()?;
        // Everything has its memory by now, so kernels can be made while weights are read into it.
        let slabs = layers.iter().map(|layer| &layer.slab).chain([&head.slab]);
        let matrices = unread.iter().chain([&unread_head]).zip(slabs);
        let transfers =
            matrices.flat_map(|(unread, slab)| unread.transfers(source, slab)).chain(experts.transfers(source, model));
        let make = |check: &Check<'_>| {
            make_kernels(&kernels, model, &layout, (&layers, &head), &experts.layouts, together, (&options, check))
        };
        let upload = |check: &Check<'_>| {
            uploader.load(transfers, check, loaded)?;
            device.wait()?;
            watch.done("read the weights");
            Ok(())
        };
        let made = while_uploading(make, upload, &options.cancel)?;
        watch.done("wait for the kernels");
        source.check_unchanged()?;
        let Made { kit, many, notes: adapter_notes, times } = made;
        watch.times.extend(times);
        let shapes = Shapes::new(&model.config, &layout, &layers, Many::most_tiles_bytes);
        let embedding = &model.tensors.embedding;
        Ok(GpuBackend {
            config: model.config.clone(),
            ropes: [Rope::plain(&model.config), Rope::yarn(&model.config)],
            kit,
            embedding: Embedding {
                source: source.clone(),
                extent: embedding.extent,
                ty: embedding.ty,
                row_bytes: embedding.extent.bytes / embedding.rows as u64,
            },
            layout,
            shapes,
            many,
            device,
            kernels,
            uploader,
            layers,
            head,
            experts,
            code_book,
            together,
            spares,
            pool: Arc::default(),
            source: source.clone(),
            note,
            adapter_note: (!adapter_notes.is_empty()).then(|| adapter_notes.join("; ")),
            reader: reader_name,
            checks: is_checked,
            load_times: watch.times,
        })
    }

    /// What loading did, one after the other, with its microseconds; last what went on meanwhile.
    pub fn load_times(&self) -> &StageTimes {
        &self.load_times
    }

    /// What it computes on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Why the reader that was asked for is not the one used, if so: a line for the user.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// What of the adapter's cooperative matrices and packed integers is not used because its driver computes it wrongly, if so: a
    /// line for the user.
    pub fn adapter_note(&self) -> Option<&str> {
        self.adapter_note.as_deref()
    }

    /// What experts are read with.
    pub fn reader(&self) -> &'static str {
        self.reader
    }

    /// Whether reads of streamed experts are held against checksums.
    pub fn checks(&self) -> bool {
        self.checks
    }

    /// Whether experts are streamed to the device.
    pub fn is_streamed(&self) -> bool {
        self.experts.is_streamed()
    }

    /// How often slots of the device had what was wanted; `read_bytes` were copied into them.
    pub fn stats(&self) -> StoreCounts {
        self.experts.counts()
    }

    /// How often the tier of host memory had what the device asked for; `read_bytes` were read from the file.
    pub fn host_stats(&self) -> StoreCounts {
        self.experts.host_counts()
    }

    /// Kernels that were made so far.
    pub fn kernels_made(&self) -> usize {
        self.kernels.count()
    }

    /// Bytes of device memory: weights that every token uses with their tables, and experts or their slots.
    pub fn weight_bytes(&self) -> (u64, u64) {
        let layers = self.layers.iter().map(|layer| layer.slab.bytes).sum::<u64>();
        let tables = self.code_book.bytes + self.experts.table.bytes;
        (layers + self.head.slab.bytes + tables, self.experts.bytes())
    }

    /// Bytes of everything that was allocated, and of the blocks that it lies in, where wgpu counts them (Vulkan, D3D12):
    /// of the device, and of memory that both reach.
    pub fn allocated_bytes(&self) -> Option<[u64; 2]> {
        let report = self.device.device.generate_allocator_report()?;
        Some([report.total_allocated_bytes, report.total_reserved_bytes])
    }

    fn commands(&self) -> Commands {
        Commands::new(self.device.clone(), self.kernels.clone())
    }

    /// Takes the time of each stage from now on.
    pub fn time_stages(&self, pass: &GpuPass) {
        lock(&pass.commands).timer = crate::timer::Timer::new(&self.device);
    }

    /// Microseconds of each stage since [`GpuBackend::time_stages`], and dispatches of the pass so far.
    ///
    /// # Errors
    /// The device failed.
    pub fn stage_times(&self, pass: &GpuPass) -> Result<(StageTimes, u64), Error> {
        let mut commands = lock(&pass.commands);
        commands.submit();
        let dispatches = commands.dispatches;
        let times = commands.timer.as_mut().map_or(Ok(Vec::new()), crate::timer::Timer::take)?;
        Ok((times, dispatches))
    }

    /// Puts outputs that wait into the streams, for who looks at them.
    fn settle_streams(&self, pass: &GpuPass) {
        let mut commands = lock(&pass.commands);
        if *lock(&pass.pending) != Pending::Nothing {
            self.mix(pass, &mut commands, &self.layers[0].slab, self.layers[0].attention.function, false);
        }
    }

    fn read_floats(&self, pass: &GpuPass, buffer: &Buffer, count: usize) -> Vec<f32> {
        let bytes = lock(&pass.commands).read((buffer, 0), 4 * count as u64);
        // Who looks at activations of a device that failed sees nothing of them; the pass itself will say why.
        bytes.map_or_else(|_| vec![f32::NAN; count], |bytes| bytemuck::pod_collect_to_vec(&bytes))
    }
}

/// The kernels of a model.
struct Made {
    kit: Kit,
    many: Many,
    /// What of the adapter is not used.
    notes: Vec<String>,
    /// How long checking what the driver computes took, and making the kernels.
    times: StageTimes,
}

/// Checks what the driver computes, and makes the kernels.
fn make_kernels(
    kernels: &Arc<Kernels>,
    model: &Model,
    layout: &KvLayout,
    weights: (&[LayerWeights], &HeadWeights),
    experts: &[ExpertLayout],
    together: usize,
    (options, check): (&Options, &Check<'_>),
) -> Result<Made, Error> {
    let mut watch = Stopwatch::new();
    let config = &model.config;
    let (cooperative, of_matrices) = crate::self_check::cooperative(kernels, config, layout)?;
    check()?;
    let (integers, of_integers) = crate::self_check::integers(kernels, options.precision)?;
    check()?;
    watch.done("meanwhile: check the kernels");
    let many = Many::new(kernels.clone(), cooperative);
    let trusted = Trusted { cooperative, integers };
    let kit = || Kit::new(kernels, config, layout, weights, experts, trusted);
    let (kit, prepared) = rayon::join(kit, || match options.precision {
        Precision::Exact => Ok(()),
        Precision::Fast => prepare(&many, weights.0, experts, config),
    });
    prepared?;
    let kit = kit?;
    check()?;
    kit.prepare_all((options.sessions_prepared, together), config, layout, weights)?;
    watch.done("meanwhile: make the kernels");
    Ok(Made { kit, many, notes: of_matrices.into_iter().chain(of_integers).collect(), times: watch.times })
}

/// Makes the kernels of tiled products, where passes compute by them.
fn prepare(
    many: &Many,
    layers: &[LayerWeights],
    experts: &[ExpertLayout],
    config: &Config,
) -> Result<(), crate::GpuError> {
    let jobs = |layer: &LayerWeights| {
        [&layer.project, &layer.queries, &layer.output_a, &layer.output_b, &layer.route, &layer.shared_down]
            .map(Jobs::formats)
    };
    let experts_formats = experts.iter().map(|layout| layout.formats);
    many.prepare(layers.iter().flat_map(jobs), experts_formats, config.experts, config.experts_used)
}

/// Sizes that kernels are made for.
pub(crate) fn check_sizes(c: &Config) -> Result<(), Error> {
    let sizes = [
        ("deepseek4.embedding_length", c.d_model, c.d_model.is_multiple_of(64), "a multiple of 64"),
        ("deepseek4.attention.head_count", c.heads, c.heads.is_multiple_of(4), "a multiple of 4"),
        ("deepseek4.attention.key_length", c.head_dim, c.head_dim <= 512, "at most 512"),
        ("deepseek4.attention.indexer.head_count", c.index_heads, c.index_heads.is_multiple_of(4), "a multiple of 4"),
        ("deepseek4.rope.dimension_count", c.rope_dim, c.rope_dim.is_multiple_of(4), "a multiple of 4"),
        ("deepseek4.hyper_connection.count", c.streams, c.streams <= 8, "at most 8"),
        ("deepseek4.expert_count", c.experts, c.experts <= 1024, "at most 1024"),
        ("deepseek4.expert_used_count", c.experts_used, c.experts_used <= 64, "at most 64"),
    ];
    match sizes.into_iter().find(|(_, _, fits, _)| !fits) {
        None => Ok(()),
        Some((key, found, _, expected)) => Err(Error::Unsupported {
            key: key.into(),
            found: found.to_string(),
            expected: format!("{expected} on a GPU (--device cpu takes others)"),
        }),
    }
}

impl Backend for GpuBackend {
    type State = GpuState;
    type Pass = GpuPass;
    type Logits = Vec<f32>;
    type Selection = Selection;
    type Leases<'s> = GpuLeases<'s>;

    const PASS_ROWS: usize = 4096;

    fn config(&self) -> &Config {
        &self.config
    }

    fn passes_are_free(&self) -> bool {
        self.layout.precision == Precision::Exact
    }

    fn new_state(&self) -> Result<GpuState, Error> {
        Ok(GpuState::new(&self.kernels, &self.layout)?)
    }

    fn position(&self, state: &GpuState) -> usize {
        state.position()
    }

    fn reach(&self, state: &GpuState, target: usize) -> usize {
        state.reach(target)
    }

    fn rewind(&self, state: &mut GpuState, target: usize) -> usize {
        let mut commands = self.commands();
        let reached = state.rewind(target, &mut commands);
        commands.submit();
        reached
    }

    fn fork(&self, state: &GpuState) -> Result<GpuState, Error> {
        let mut commands = self.commands();
        let fork = state.fork(&mut commands)?;
        commands.submit();
        Ok(fork)
    }

    fn export(&self, state: &GpuState, mut to: &mut dyn Write) -> Result<(), Error> {
        let host = state.to_host(&mut self.commands())?;
        host.export(&mut to).map_err(Error::Export)
    }

    fn import(&self, mut from: &mut dyn Read) -> Result<GpuState, Error> {
        let host = State::import(self.layout.clone(), &mut from)?;
        Ok(GpuState::from_host(&self.kernels, &self.uploader, &host)?)
    }

    fn begin(&self, batch: Batch, states: &[&GpuState]) -> Result<GpuPass, Error> {
        self.device.check()?;
        self.source.check_unchanged()?;
        let mut commands = self.commands();
        let mut replaced = false;
        for run in batch.runs() {
            let state = states[run.session];
            assert!(state.layout == self.layout, "a session goes on with the backend it began with");
            replaced |= state.begin(run.rows.len(), &mut commands)?;
        }
        let end = batch.rows().iter().map(|row| row.position + 1).max().unwrap_or(0);
        let (on, given_back) = self.pool.take(&self.device, &self.shapes, batch.rows().len(), end)?;
        if replaced || given_back {
            self.kernels.forget_bindings();
        }
        for runs in batch.runs().chunks(runs_together(batch.rows().len(), self.together)) {
            self.kit.prepare(runs.len(), &self.config, &self.layout)?;
        }
        let prefetching = self.experts.pass_begins();
        let batch = (batch, states, self.together);
        Ok(GpuPass::new(batch, commands, on, self.pool.clone(), &self.ropes, prefetching))
    }

    fn embed(&self, pass: &mut GpuPass) -> Result<(), Error> {
        self.stage_embed(pass)
    }

    fn hc_pre(&self, layer: usize, sub_layer: SubLayer, pass: &mut GpuPass) -> Result<(), Error> {
        self.stage_hc_pre(layer, sub_layer, pass)
    }

    fn project(&self, layer: usize, states: &[&GpuState], pass: &mut GpuPass) -> Result<(), Error> {
        pass.layer = layer;
        self.stage_project(layer, states, pass)
    }

    fn compress(&self, layer: usize, states: &[&GpuState], pass: &mut GpuPass) -> Result<(), Error> {
        self.stage_compress(layer, states, pass);
        Ok(())
    }

    fn index(&self, layer: usize, states: &[&GpuState], pass: &mut GpuPass) -> Result<(), Error> {
        self.stage_index(layer, states, pass);
        Ok(())
    }

    fn attend(&self, layer: usize, states: &[&GpuState], pass: &mut GpuPass) -> Result<(), Error> {
        self.stage_attend(layer, states, pass);
        Ok(())
    }

    fn attention_out(&self, layer: usize, pass: &mut GpuPass) -> Result<(), Error> {
        self.stage_attention_out(layer, pass)
    }

    fn hc_post(&self, _layer: usize, _sub_layer: SubLayer, pass: &mut GpuPass) -> Result<(), Error> {
        self.stage_hc_post(pass);
        Ok(())
    }

    fn route(&self, layer: usize, pass: &mut GpuPass) -> Result<Selection, Error> {
        self.stage_route(layer, pass)
    }

    fn lease<'s>(&'s self, layer: usize, selection: &Selection) -> Result<GpuLeases<'s>, Error> {
        Ok(self.experts.lease(layer, selection))
    }

    fn shared_expert(&self, _layer: usize, _pass: &mut GpuPass) -> Result<(), Error> {
        // Made with the routed ones.
        Ok(())
    }

    fn routed_experts(
        &self,
        layer: usize,
        _selection: Selection,
        leases: GpuLeases<'_>,
        cancel: &Cancel,
        pass: &mut GpuPass,
    ) -> Result<(), Error> {
        self.stage_routed_experts(layer, leases, cancel, pass)
    }

    fn head(&self, pass: &mut GpuPass) -> Result<Vec<f32>, Error> {
        let logits = self.stage_head(pass)?;
        let rows = pass.rows();
        let (flags, logits): (Vec<u32>, Vec<f32>) = {
            let on = pass.on();
            let flags = (&on.flags, 0, 4 * rows as u64);
            let logits = logits.as_ref().map_or((&on.flags, 0, 0), |logits| {
                (logits, 0, 4 * (pass.batch.wanted().count() * self.config.vocab_size) as u64)
            });
            lock(&pass.commands).read_both([flags, logits])?
        };
        self.source.check_unchanged()?;
        match flags.iter().position(|&flag| flag != 0) {
            Some(row) => Err(Error::NotFinite { position: pass.batch.rows()[row].position }),
            None => Ok(logits),
        }
    }

    fn read_logits(&self, logits: Vec<f32>) -> Result<Vec<f32>, Error> {
        Ok(logits)
    }

    fn commit(&self, pass: GpuPass, states: &mut [&mut GpuState]) {
        let mut commands = self.commands();
        for run in pass.batch.runs() {
            // Without memory for a checkpoint the session has one fewer.
            let _ = states[run.session].commit(run.rows.len(), &mut commands);
        }
        commands.submit();
        self.experts.pass_ended(pass.batch.runs().iter().map(|run| run.rows.len()).max().unwrap_or(0));
    }

    fn read(&self, pass: &GpuPass, activation: Activation) -> Vec<f32> {
        let (c, on, rows) = (&self.config, pass.on(), pass.rows());
        match activation {
            Activation::Streams => {
                self.settle_streams(pass);
                self.read_floats(pass, &on.streams, rows * c.stream_width())
            }
            Activation::Input => self.read_floats(pass, &on.input, rows * c.d_model),
            Activation::LowQueries => self.low_queries(pass),
            Activation::Queries => {
                let stride = self.layers[pass.layer].queried;
                let all = self.read_floats(pass, &on.queries, rows * stride);
                all.chunks_exact(stride).flat_map(|row| &row[..c.heads * c.head_dim]).copied().collect()
            }
            Activation::Heads => self.read_floats(pass, &on.heads, rows * c.heads * c.head_dim),
            Activation::Output => {
                let parts = self.read_floats(pass, &on.output, rows * pass.outputs * c.d_model);
                let sum = |row: &[f32]| -> Vec<f32> {
                    let mut parts = row.chunks_exact(c.d_model);
                    let mut sum = parts.next().expect("a row has an output").to_vec();
                    parts.for_each(|part| sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part));
                    sum
                };
                parts.chunks_exact(pass.outputs * c.d_model).flat_map(sum).collect()
            }
            Activation::Experts => {
                let experts = self.read_floats(pass, &on.experts, rows * c.experts_used);
                experts.iter().map(|expert| expert.to_bits() as f32).collect()
            }
            Activation::ExpertWeights => self.read_floats(pass, &on.shares, rows * c.experts_used),
            Activation::IndexRows => self.index_rows(pass),
        }
    }

    fn write(&self, pass: &mut GpuPass, activation: Activation, values: &[f32]) {
        let (c, rows) = (&self.config, pass.rows());
        let (buffer, count) = match activation {
            Activation::Streams => (&pass.on().streams, rows * c.stream_width()),
            Activation::Input => (&pass.on().input, rows * c.d_model),
            Activation::Heads => (&pass.on().heads, rows * c.heads * c.head_dim),
            Activation::Output => (&pass.on().output, rows * c.d_model),
            Activation::LowQueries
            | Activation::Queries
            | Activation::Experts
            | Activation::ExpertWeights
            | Activation::IndexRows => panic!("{activation:?} is made or chosen within its stage"),
        };
        assert_eq!(values.len(), count, "values of {activation:?}");
        let mut commands = lock(&pass.commands);
        commands.write((buffer, 0), bytemuck::cast_slice(values));
        if matches!(activation, Activation::Input | Activation::Heads) {
            self.lay_out_apart(&mut commands, pass.on(), buffer, count / rows, rows);
        }
        drop(commands);
        match activation {
            Activation::Streams => *lock(&pass.pending) = Pending::Nothing,
            Activation::Output => pass.outputs = 1,
            _ => {}
        }
    }
}

impl GpuBackend {
    /// The low-rank queries, which kernels normalise as they read them.
    fn low_queries(&self, pass: &GpuPass) -> Vec<f32> {
        let (c, on, weights) = (&self.config, pass.on(), &self.layers[pass.layer]);
        let params = crate::stages::params![c.q_rank, weights.projected, c.q_rank, weights.q_a_norm, c.rms_eps];
        let result = Buffer::new(&self.device, "low-rank queries", 4 * (pass.rows() * c.q_rank) as u64);
        let Ok(result) = result else { return vec![f32::NAN; pass.rows() * c.q_rank] };
        let buffers = [weights.slab.all(), on.projected.all(), result.all()];
        lock(&pass.commands).run(&self.kit.normalise, &buffers, &params, [pass.rows() as u32, 1, 1]);
        let values = self.read_floats(pass, &result, pass.rows() * c.q_rank);
        self.kernels.forget_bindings();
        values
    }

    fn index_rows(&self, pass: &GpuPass) -> Vec<f32> {
        let (c, on) = (&self.config, pass.on());
        let ratio = c.compress_ratios[pass.layer];
        let listed = self.read_floats(pass, &on.chosen, pass.rows() * c.index_top_k);
        let row = |(i, row): (usize, &model::Row)| {
            let visible = (row.position + 1).checked_div(ratio).unwrap_or(0);
            let mut rows: Vec<f32> = if ratio == 4 && visible > c.index_top_k {
                listed[i * c.index_top_k..][..c.index_top_k].iter().map(|row| row.to_bits() as f32).collect()
            } else {
                (0..visible).map(|row| row as f32).collect()
            };
            rows.resize(c.index_top_k.max(rows.len()), -1.0);
            rows
        };
        pass.batch.rows().iter().enumerate().flat_map(row).collect()
    }
}
