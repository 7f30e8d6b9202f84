//! What cannot be done is an error that says what was found, what was expected and what to do.

mod common;

use common::{on_gpu, open, software};
use gpu::{Checks, Choice, Device, GpuBackend, GpuError, Options, Placement, Slabs};
use model::{Activation, Backend, Batch, Error, Row};
use store::Residency;

/// Bytes of addresses that the process below may use: enough for tiny-iq2, the driver and its compiler.
const ADDRESS_BYTES: u64 = 6 << 30;

#[test]
fn no_adapter_of_that_number() {
    let (model, source) = open("tiny-iq2");
    let loaded = GpuBackend::load(&model, &source, (Choice::Index(99), Checks::On), Options::default(), &mut |_| ());
    let Err(Error::Device(cause)) = loaded else { panic!("it loaded, or failed otherwise") };
    assert!(matches!(cause.downcast_ref(), Some(GpuError::NoAdapter { .. })), "{cause:?}");
    let text = cause.to_string();
    assert!(text.contains("gpu:99") && text.contains("gpu:0") && text.contains("infall devices"), "{text}");
    assert!(matches!(Device::open(Choice::Index(99), Checks::On), Err(GpuError::NoAdapter { .. })));
}

/// A row of no numbers still has experts, each once: what they compute is refused at the end of the pass, and nothing is read
/// from elsewhere before.
#[test]
fn choices_of_what_is_no_number_are_experts() {
    let backend = on_gpu("tiny-iq2", Options::default());
    let (used, layers) = (backend.config().experts_used, backend.config().layers);
    let state = backend.new_state().unwrap();
    let row = Row { session: 0, position: 0, token: 1, logits: true };
    let batch = Batch::new(vec![row], &[0], backend.config()).unwrap();
    let mut pass = backend.begin(batch, &[&state]).unwrap();
    backend.write(&mut pass, Activation::Input, &vec![f32::NAN; backend.config().d_model]);
    backend.route(layers - 1, &mut pass).unwrap();
    // The first ones, as none is better than another: so it was not the biases that chose.
    let chosen = backend.read(&pass, Activation::Experts);
    assert_eq!(chosen, (0..used).map(|expert| expert as f32).collect::<Vec<_>>());
}

/// As many slots as fill many times the addresses that the process may have.
fn too_large() -> Placement {
    let (model, _) = open("tiny-iq2");
    let slot_bytes = gpu::slot_bytes(&model).unwrap()[0];
    let slots = (64 << 20) / slot_bytes;
    let count = 4 * ADDRESS_BYTES.div_ceil(slots * slot_bytes) as usize;
    let slabs = Slabs {
        of_layer: vec![0; model.config.layers],
        slots: vec![slots as usize; count],
        slot_bytes: vec![slot_bytes; count],
    };
    Placement::Streamed { slabs, host: Residency::Resident }
}

/// In a process of its own, whose memory is limited.
#[test]
fn too_little_memory() {
    let limited = format!(
        "ulimit -v {} && exec \"$0\" --ignored --exact loads_more_than_there_is --nocapture",
        ADDRESS_BYTES >> 10
    );
    let this = std::env::current_exe().unwrap();
    let ran = std::process::Command::new("sh").args(["-c", &limited]).arg(this).output().unwrap();
    let said = [ran.stdout, ran.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(ran.status.success() && said.contains("1 passed"), "{said}");
    println!("{said}");
}

#[test]
#[ignore = "too_little_memory runs it where memory is limited"]
fn loads_more_than_there_is() {
    let (model, source) = open("tiny-iq2");
    let options = Options { placement: too_large(), ..Options::default() };
    let loaded = GpuBackend::load(&model, &source, (software(), Checks::On), options, &mut |_| ());
    let Err(Error::DeviceMemory(cause)) = loaded else { panic!("it loaded, or failed otherwise") };
    assert!(matches!(cause.downcast_ref(), Some(GpuError::Memory { .. })), "{cause:?}");
    let text = cause.to_string();
    println!("{text}");
    assert!(text.to_lowercase().contains("memory") && text.contains("--gpu-memory"), "{text}");
    // The adapter can be used as soon as less is asked for.
    drop(cause);
    on_gpu("tiny-iq2", Options::default()).new_state().unwrap();
}
