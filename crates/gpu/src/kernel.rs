//! Kernels: WGSL templates made into pipelines, and what a kernel is bound to.
//!
//! The sources are in `kernels/`, as templates of minijinja: what is fixed for a model (types of weights, numbers of heads)
//! and loops to be unrolled are filled in before the driver sees them. A kernel has one group of buffers, numbered from 0,
//! and parameters as immediates.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, UndefinedBehavior, Value};
use rayon::prelude::*;
use wgpu::naga;

use crate::GpuError;
use crate::device::{AdapterReport, Checks, Device};

/// Every source, by the name that includes use.
pub(crate) const SOURCES: &[(&str, &str)] = &[
    ("weights.wgsl", include_str!("kernels/weights.wgsl")),
    ("functions.wgsl", include_str!("kernels/functions.wgsl")),
    ("rows.wgsl", include_str!("kernels/rows.wgsl")),
    ("runs.wgsl", include_str!("kernels/runs.wgsl")),
    ("matvec.wgsl", include_str!("kernels/matvec.wgsl")),
    ("hc_mix.wgsl", include_str!("kernels/hc_mix.wgsl")),
    ("hc_finish.wgsl", include_str!("kernels/hc_finish.wgsl")),
    ("settle.wgsl", include_str!("kernels/settle.wgsl")),
    ("pool.wgsl", include_str!("kernels/pool.wgsl")),
    ("attend.wgsl", include_str!("kernels/attend.wgsl")),
    ("combine.wgsl", include_str!("kernels/combine.wgsl")),
    ("attend_many.wgsl", include_str!("kernels/attend_many.wgsl")),
    ("index_score.wgsl", include_str!("kernels/index_score.wgsl")),
    ("index_score_many.wgsl", include_str!("kernels/index_score_many.wgsl")),
    ("index_select.wgsl", include_str!("kernels/index_select.wgsl")),
    ("route.wgsl", include_str!("kernels/route.wgsl")),
    ("experts_up.wgsl", include_str!("kernels/experts_up.wgsl")),
    ("experts_down.wgsl", include_str!("kernels/experts_down.wgsl")),
    ("pieces.wgsl", include_str!("kernels/pieces.wgsl")),
    ("tiles.wgsl", include_str!("kernels/tiles.wgsl")),
    ("halves.wgsl", include_str!("kernels/halves.wgsl")),
    ("matmul.wgsl", include_str!("kernels/matmul.wgsl")),
    ("group.wgsl", include_str!("kernels/group.wgsl")),
    ("experts_up_many.wgsl", include_str!("kernels/experts_up_many.wgsl")),
    ("experts_down_many.wgsl", include_str!("kernels/experts_down_many.wgsl")),
    ("expand.wgsl", include_str!("kernels/expand.wgsl")),
    ("copy.wgsl", include_str!("kernels/copy.wgsl")),
    ("normalise.wgsl", include_str!("kernels/normalise.wgsl")),
    ("digits.wgsl", include_str!("kernels/digits.wgsl")),
    ("finite.wgsl", include_str!("kernels/finite.wgsl")),
    ("sweep.wgsl", include_str!("kernels/sweep.wgsl")),
    ("busy.wgsl", include_str!("kernels/busy.wgsl")),
];

/// A source with everything filled in.
pub(crate) fn render(name: &str, context: &Value) -> String {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    environment.set_syntax(syntax.build().expect("the usual delimiters"));
    for (name, source) in SOURCES {
        environment.add_template(name, source).unwrap_or_else(|error| panic!("{name}: {error:#}"));
    }
    let template = environment.get_template(name).expect("kernels are named by this crate");
    template.render(context).unwrap_or_else(|error| panic!("{name}: {error:#}"))
}

/// A pipeline and how it is bound.
pub(crate) struct Kernel {
    id: usize,
    pub(crate) name: String,
    pub(crate) pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
    bindings: usize,
}

/// Pipelines and bindings that were made, so that each is made once.
pub(crate) struct Kernels {
    device: Arc<Device>,
    /// Fills a source in: [`render`], but in tests of wrong kernels.
    render: fn(&str, &Value) -> String,
    made: Mutex<HashMap<String, Arc<Kernel>>>,
    /// Kernels that were numbered.
    numbers: AtomicUsize,
    bound: Mutex<HashMap<BindingKey, wgpu::BindGroup>>,
}

/// Bindings that are kept: passes of other sessions together bind other buffers, without end.
const MOST_BOUND: usize = 1 << 14;

/// A kernel, and number and first byte of each buffer.
type BindingKey = (usize, Vec<(u64, u64)>);

impl Kernels {
    pub(crate) fn new(device: Arc<Device>) -> Kernels {
        Kernels::rendered_by(device, render)
    }

    /// With sources filled in by `render`.
    pub(crate) fn rendered_by(device: Arc<Device>, render: fn(&str, &Value) -> String) -> Kernels {
        Kernels { device, render, made: Mutex::default(), numbers: AtomicUsize::new(0), bound: Mutex::default() }
    }

    /// What they run on.
    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The kernel `name` with the template's values.
    ///
    /// # Errors
    /// The driver does not take it.
    pub(crate) fn get(&self, name: &str, context: Value) -> Result<Arc<Kernel>, GpuError> {
        let key = format!("{name} {context}");
        if let Some(kernel) = self.made().get(&key) {
            return Ok(kernel.clone());
        }
        // Nobody waits meanwhile: others make other kernels, and if two make the same, one of them is kept.
        let source = (self.render)(&format!("{name}.wgsl"), &context);
        let id = self.numbers.fetch_add(1, Ordering::Relaxed);
        let kernel = Arc::new(self.make(id, name, &source, key.clone())?);
        Ok(self.made().entry(key).or_insert(kernel).clone())
    }

    /// Makes kernels that will be wanted, each once, all at the same time.
    ///
    /// # Errors
    /// The driver does not take one.
    pub(crate) fn make_all(&self, wanted: &[(&str, Value)]) -> Result<(), GpuError> {
        let each: BTreeMap<String, &(&str, Value)> =
            wanted.iter().map(|kernel| (format!("{} {}", kernel.0, kernel.1), kernel)).collect();
        each.into_par_iter().try_for_each(|(_, (name, context))| self.get(name, context.clone()).map(drop))
    }

    /// Kernels that were made.
    pub(crate) fn count(&self) -> usize {
        self.made().len()
    }

    fn made(&self) -> MutexGuard<'_, HashMap<String, Arc<Kernel>>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A kernel from its WGSL.
    pub(crate) fn make(&self, id: usize, name: &str, source: &str, label: String) -> Result<Kernel, GpuError> {
        let module = naga::front::wgsl::parse_str(source)
            .unwrap_or_else(|error| panic!("{label}:\n{}", error.emit_to_string_with_path(source, name)));
        let device = &self.device.device;
        let mut entries: Vec<wgpu::BindGroupLayoutEntry> = storage_bindings(&module).collect();
        entries.sort_by_key(|entry| entry.binding);
        let layout =
            device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(name), entries: &entries });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(name),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: immediate_bytes(&module),
        });
        let source =
            wgpu::ShaderModuleDescriptor { label: Some(name), source: wgpu::ShaderSource::Wgsl(source.into()) };
        let checks = match self.device.checks {
            Checks::On => wgpu::ShaderRuntimeChecks::checked(),
            Checks::Off => wgpu::ShaderRuntimeChecks::unchecked(),
        };
        // SAFETY: unchecked kernels must keep their indices within their buffers, end their loops and not divide by 0. Sizes
        // come from a model that `check_sizes` took, and buffers are made for them; no index is made of an activation's
        // value (choices of experts and rows are ranks, also of what is no number). Tests run with checks, and whole models
        // without them give the same bits (`checks_change_no_bit`); what a check would have changed of a number that
        // nothing uses they cannot see.
        let shader = unsafe { device.create_shader_module_trusted(source, checks) };
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(name),
            layout: Some(&pipeline_layout),
            module: &shader,
            entry_point: Some("main"),
            // Kernels write before they read.
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        });
        self.device.check()?;
        Ok(Kernel { id, name: name.to_owned(), pipeline, layout, bindings: entries.len() })
    }

    /// `buffers` bound to `kernel`, in the order of their numbers there.
    fn bind(&self, kernel: &Kernel, buffers: &[Span<'_>]) -> wgpu::BindGroup {
        assert_eq!(buffers.len(), kernel.bindings, "buffers of {}", kernel.name);
        let make = || {
            let entries: Vec<wgpu::BindGroupEntry<'_>> =
                buffers.iter().enumerate().map(|(binding, span)| span.entry(binding as u32)).collect();
            self.device.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(&kernel.name),
                layout: &kernel.layout,
                entries: &entries,
            })
        };
        let places: Option<Vec<(u64, u64)>> =
            buffers.iter().map(|span| span.buffer.number.map(|number| (number, span.start))).collect();
        let Some(places) = places else { return make() };
        let mut bound = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
        if bound.len() >= MOST_BOUND {
            bound.clear();
        }
        bound.entry((kernel.id, places)).or_insert_with(make).clone()
    }

    /// Forgets what was bound: to be called when buffers are given back, which would live on otherwise.
    pub(crate) fn forget_bindings(&self) {
        self.bound.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

fn storage_bindings(module: &naga::Module) -> impl Iterator<Item = wgpu::BindGroupLayoutEntry> {
    module.global_variables.iter().filter_map(|(_, variable)| {
        let naga::AddressSpace::Storage { access } = variable.space else { return None };
        let binding = variable.binding.as_ref().expect("a buffer has a number");
        Some(wgpu::BindGroupLayoutEntry {
            binding: binding.binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: wgpu::BufferBindingType::Storage { read_only: !access.contains(naga::StorageAccess::STORE) },
                has_dynamic_offset: false,
                min_binding_size: None,
            },
            count: None,
        })
    })
}

fn immediate_bytes(module: &naga::Module) -> u32 {
    let immediates = module.global_variables.iter().find(|(_, v)| v.space == naga::AddressSpace::Immediate);
    immediates.map_or(0, |(_, variable)| module.types[variable.ty].inner.size(module.to_ctx()))
}

/// Memory of the device.
pub(crate) struct Buffer {
    pub(crate) raw: wgpu::Buffer,
    pub(crate) bytes: u64,
    /// Tells it from every other of the process; `None` of those whose bindings are not kept.
    number: Option<u64>,
}

impl Buffer {
    /// `bytes` of memory (at least 16, whole words) that kernels read and write and that can be copied to and from.
    ///
    /// # Errors
    /// It is more than a kernel can reach, or the device has no more.
    pub(crate) fn new(device: &Device, what: &str, bytes: u64) -> Result<Buffer, GpuError> {
        let bytes = Buffer::room(&device.report, what, bytes)?;
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let descriptor = wgpu::BufferDescriptor { label: Some(what), size: bytes, usage, mapped_at_creation: false };
        // In a scope of its own, so that a device without room for this stays good for everything else.
        let scope = device.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let raw = device.device.create_buffer(&descriptor);
        if let Some(cause) = pollster::block_on(scope.pop()) {
            let (name, what) = (device.report.name.clone(), what.to_owned());
            return Err(GpuError::Memory { name, what, wanted_bytes: bytes, cause: cause.to_string() });
        }
        device.check_after(|| format!("when {what} was to have {bytes} bytes"))?;
        Ok(Buffer::from_raw(raw, bytes))
    }

    /// Bytes that a buffer for `bytes` has.
    ///
    /// # Errors
    /// It is more than a kernel can reach.
    pub(crate) fn room(on: &AdapterReport, what: &str, bytes: u64) -> Result<u64, GpuError> {
        let (wanted_bytes, limit_bytes) = (bytes.max(16).next_multiple_of(16), on.binding_bytes);
        if wanted_bytes > limit_bytes {
            return Err(GpuError::TooLarge { name: on.name.clone(), what: what.to_owned(), wanted_bytes, limit_bytes });
        }
        Ok(wanted_bytes)
    }

    pub(crate) fn from_raw(raw: wgpu::Buffer, bytes: u64) -> Buffer {
        static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        Buffer { raw, bytes, number: Some(NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) }
    }

    /// One that lives no longer than a pass: what is bound to it is not kept for the next, and so does not keep it.
    pub(crate) fn of_one_pass(self) -> Buffer {
        Buffer { number: None, ..self }
    }

    /// All of it.
    pub(crate) fn all(&self) -> Span<'_> {
        self.from(0)
    }

    /// What begins at byte `start`, a multiple of 256.
    pub(crate) fn from(&self, start: u64) -> Span<'_> {
        Span { buffer: self, start }
    }
}

/// A buffer from some byte on.
#[derive(Clone, Copy)]
pub(crate) struct Span<'b> {
    buffer: &'b Buffer,
    start: u64,
}

impl<'b> Span<'b> {
    fn entry(self, binding: u32) -> wgpu::BindGroupEntry<'b> {
        let resource = wgpu::BufferBinding { buffer: &self.buffer.raw, offset: self.start, size: None };
        wgpu::BindGroupEntry { binding, resource: wgpu::BindingResource::Buffer(resource) }
    }
}

/// Commands on their way to the device.
pub(crate) struct Commands {
    device: Arc<Device>,
    kernels: Arc<Kernels>,
    encoder: Option<wgpu::CommandEncoder>,
    pass: Option<wgpu::ComputePass<'static>>,
    /// In the present encoder.
    encoded: usize,
    /// Since this was made.
    pub(crate) dispatches: u64,
    pub(crate) timer: Option<crate::timer::Timer>,
}

/// Dispatches after which what was encoded is handed over, so that the device computes while the host encodes.
const DISPATCHES_TOGETHER: usize = 32;

impl Commands {
    pub(crate) fn new(device: Arc<Device>, kernels: Arc<Kernels>) -> Commands {
        Commands { device, kernels, encoder: None, pass: None, encoded: 0, dispatches: 0, timer: None }
    }

    /// Runs `kernel` after everything before: `groups` workgroups. Nothing if there are none.
    pub(crate) fn run<P: bytemuck::Pod>(
        &mut self,
        kernel: &Kernel,
        buffers: &[Span<'_>],
        params: &P,
        groups: [u32; 3],
    ) {
        if groups.contains(&0) {
            return;
        }
        let group = self.kernels.bind(kernel, buffers);
        let pass = self.pass();
        pass.set_pipeline(&kernel.pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.set_immediates(0, bytemuck::bytes_of(params));
        pass.dispatch_workgroups(groups[0], groups[1], groups[2]);
        self.encoded += 1;
        self.dispatches += 1;
        if self.encoded >= DISPATCHES_TOGETHER {
            self.submit();
        }
    }

    fn pass(&mut self) -> &mut wgpu::ComputePass<'static> {
        let encoder = self.encoder.get_or_insert_with(|| {
            self.device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: None })
        });
        self.pass.get_or_insert_with(|| encoder.begin_compute_pass(&Default::default()).forget_lifetime())
    }

    /// The encoder, for copies: after everything before.
    pub(crate) fn encoder(&mut self) -> &mut wgpu::CommandEncoder {
        self.pass = None;
        self.encoder.get_or_insert_with(|| {
            self.device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: None })
        })
    }

    /// Copies `bytes` (a multiple of 4).
    pub(crate) fn copy(&mut self, from: (&Buffer, u64), to: (&Buffer, u64), bytes: u64) {
        if bytes > 0 {
            self.encoder().copy_buffer_to_buffer(&from.0.raw, from.1, &to.0.raw, to.1, bytes);
        }
    }

    /// Copies `bytes` (a multiple of 4) from one place of a buffer to another that does not overlap it.
    ///
    /// # Errors
    /// The driver does not take the kernel.
    pub(crate) fn copy_within(&mut self, buffer: &Buffer, from: u64, to: u64, bytes: u64) -> Result<(), GpuError> {
        let kernel = self.kernels.get("copy", Value::from(()))?;
        let words = (bytes / 4) as u32;
        let params = [(from / 4) as u32, (to / 4) as u32, words];
        self.run(&kernel, &[buffer.all()], &params, [words.div_ceil(1024), 1, 1]);
        Ok(())
    }

    /// Writes host bytes (a multiple of 4), after everything before.
    pub(crate) fn write(&mut self, to: (&Buffer, u64), bytes: &[u8]) {
        // What the queue writes comes before everything that was not handed over yet.
        self.submit();
        self.device.queue.write_buffer(&to.0.raw, to.1, bytes);
    }

    /// A new stage begins, for who takes the time.
    pub(crate) fn stage(&mut self, name: &'static str) {
        if let Some(mut timer) = self.timer.take() {
            timer.stage(name, self.encoder());
            self.timer = Some(timer);
        }
    }

    /// Hands over what was encoded.
    pub(crate) fn submit(&mut self) {
        self.pass = None;
        self.encoded = 0;
        if let Some(encoder) = self.encoder.take() {
            self.device.queue.submit([encoder.finish()]);
        }
    }

    /// Makes a buffer all zeros.
    pub(crate) fn clear(&mut self, buffer: &Buffer) {
        self.encoder().clear_buffer(&buffer.raw, 0, None);
    }

    /// The bytes of a buffer as they are after everything before.
    ///
    /// # Errors
    /// The device failed.
    pub(crate) fn read(&mut self, from: (&Buffer, u64), bytes: u64) -> Result<Vec<u8>, GpuError> {
        Ok(self.read_both::<u8, u8>([(from.0, from.1, bytes), (from.0, 0, 0)])?.0)
    }

    /// What is in two buffers, each given with its first byte and bytes, as numbers.
    ///
    /// # Errors
    /// The device failed.
    pub(crate) fn read_both<A: bytemuck::Pod, B: bytemuck::Pod>(
        &mut self,
        from: [(&Buffer, u64, u64); 2],
    ) -> Result<(Vec<A>, Vec<B>), GpuError> {
        let bytes = from.map(|(_, _, bytes)| bytes.next_multiple_of(4));
        let target = self.device.readback(bytes.iter().sum())?;
        for (i, (buffer, at, _)) in from.into_iter().enumerate() {
            if bytes[i] > 0 {
                let to = if i == 0 { 0 } else { bytes[0] };
                self.encoder().copy_buffer_to_buffer(&buffer.raw, at, &target, to, bytes[i]);
            }
        }
        self.submit();
        target.map_async(wgpu::MapMode::Read, .., |_| ());
        self.device.wait()?;
        let both = {
            let mapped = self.device.mapped(&target)?;
            let (first, second) = mapped.split_at(bytes[0] as usize);
            let [first, second] = [&first[..from[0].2 as usize], &second[..from[1].2 as usize]];
            (bytemuck::pod_collect_to_vec(first), bytemuck::pod_collect_to_vec(second))
        };
        target.unmap();
        self.device.keep_readback(target);
        Ok(both)
    }
}
