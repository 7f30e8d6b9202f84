//! What is told of memory before anything is loaded, against what a loaded backend holds.

use gguf::Gguf;
use gpu::{
    AdapterReport, Checks, Choice, DRIVER_BYTES, DeviceBytes, GpuBackend, Options, Placement, Room, Slabs, UPLOAD_BYTES,
};
use model::{Arithmetic, Backend, Cancel, KvLayout, Model, NoObserver, Precision, Row, forward};
use store::{Residency, Source};

fn open(name: &str) -> (Model, Source) {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/test-data/oracle");
    let path = folder.join(format!("{name}.gguf"));
    assert!(path.exists(), "{} is missing: run scripts/test-data first", path.display());
    let file = Gguf::open(&path).unwrap();
    let source = Source::open(file.files.iter().map(|part| (&part.path, part.bytes))).unwrap();
    (Model::from_gguf(&file).unwrap(), source)
}

fn software() -> AdapterReport {
    let found = gpu::adapters().into_iter().find(|adapter| adapter.kind == "software");
    found.expect("Mesa's software Vulkan is installed (mesa-vulkan-drivers, libvulkan1)")
}

fn told(model: &Model, precision: Precision, room: Room, on: &AdapterReport) -> DeviceBytes {
    let layout = KvLayout::new(&model.config, 0, Arithmetic::Official, precision);
    gpu::device_bytes(model, &layout, room, on).unwrap()
}

/// Reads so many tokens in passes of up to `rows`, then one more.
fn read(backend: &GpuBackend, tokens: usize, rows: usize) -> gpu::GpuState {
    let mut state = backend.new_state().unwrap();
    let vocab = backend.config().vocab_size;
    let mut at = 0;
    for end in (rows..=tokens).step_by(rows).chain([tokens + 1]) {
        let row = |position: usize| Row {
            session: 0,
            position,
            token: ((position * 37 + 11) % vocab) as u32,
            logits: position + 1 == end,
        };
        forward(backend, (at..end).map(row).collect(), &mut [&mut state], &Cancel::default(), &mut NoObserver).unwrap();
        at = end;
    }
    state
}

#[test]
fn what_is_told_is_what_is_held() {
    let (model, source) = open("tiny-iq2");
    let report = software();
    for precision in [Precision::Fast, Precision::Exact] {
        // Up to a checkpoint; in Exact, whose every row takes a processor long, fewer.
        let (rows, tokens) = if precision == Precision::Fast { (64, 128) } else { (16, 32) };
        let told = told(&model, precision, Room { rows, wanted_rows: 1, end_tokens: tokens + 1 }, &report);
        let slabs = Slabs::plan(&told.slots, model.config.experts, told.experts / 4, report.binding_bytes).unwrap();
        let slot_bytes = slabs.bytes();
        let streamed = Placement::Streamed { slabs, host: Residency::Resident };
        for (placement, experts) in [(Placement::Resident, told.experts), (streamed, slot_bytes)] {
            let options = Options { precision, placement, ..Options::default() };
            let adapter = (Choice::Index(report.index), Checks::On);
            let backend = GpuBackend::load(&model, &source, adapter, options, &mut |_| ()).unwrap();
            assert_eq!(backend.weight_bytes(), (told.fixed, experts), "{precision:?}");
            let state = read(&backend, tokens, rows);
            assert!(state.bytes() <= told.session, "{} of {}", state.bytes(), told.session);
            let [allocated, reserved] = backend.allocated_bytes().expect("Vulkan counts");
            let planned = told.fixed + experts + told.session + told.pass;
            println!("{precision:?}: told {planned}, allocated {allocated}, in blocks of {reserved}");
            assert!(reserved <= planned + DRIVER_BYTES + UPLOAD_BYTES, "{reserved} of {planned}");
            let least = told.fixed + experts + state.bytes() + told.pass * 9 / 10;
            assert!(allocated >= least, "{allocated} were allocated, {least} at least are told");
        }
    }
}

/// The logits of every token stayed on the device: bindings that are kept for the next token kept them.
#[test]
fn decoding_takes_no_more_memory_the_longer_it_goes_on() {
    let (model, source) = open("tiny-iq2");
    let adapter = (Choice::Index(software().index), Checks::On);
    let backend = GpuBackend::load(&model, &source, adapter, Options::default(), &mut |_| ()).unwrap();
    let mut state = backend.new_state().unwrap();
    let mut decode = |positions: std::ops::Range<usize>| {
        for position in positions {
            let row = Row { session: 0, position, token: position as u32, logits: true };
            forward(&backend, vec![row], &mut [&mut state], &Cancel::default(), &mut NoObserver).unwrap();
        }
        backend.allocated_bytes().expect("Vulkan counts")[0]
    };
    let early = decode(0..10);
    let late = decode(10..40);
    assert!(late < early + 8 * 4 * model.config.vocab_size as u64, "{early} bytes after 10 tokens, {late} after 40");
}

#[test]
fn what_no_buffer_can_hold_is_refused_before_loading() {
    let (model, _) = open("tiny-iq2");
    let layout = KvLayout::new(&model.config, 0, Arithmetic::Official, Precision::Fast);
    let room = |end_tokens| Room { rows: 64, wanted_rows: 1, end_tokens };
    let small = |binding_bytes| AdapterReport { binding_bytes, ..software() };
    let error =
        |on: &AdapterReport, tokens| gpu::device_bytes(&model, &layout, room(tokens), on).unwrap_err().to_string();
    assert!(error(&small(1 << 12), 10).contains("the weights of layer 0 takes"), "{}", error(&small(1 << 12), 10));
    let long = error(&small(1 << 24), 1 << 30);
    assert!(long.contains("a session of 1073741824 tokens takes"), "{long}");
    let told = told(&model, Precision::Fast, room(10), &software());
    let layer = told.slots[0] * model.config.experts as u64;
    assert!(told.can_be_resident);
    let narrow = gpu::device_bytes(&model, &layout, room(10), &small(layer - 16));
    assert!(narrow.is_err() || !narrow.unwrap().can_be_resident);
}
