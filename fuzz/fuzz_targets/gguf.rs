//! Any bytes: the parser returns, and what it accepts is written and read back the same.
//!
//!     mkdir -p fuzz/corpus/gguf
//!     cargo +nightly fuzz run gguf fuzz/corpus/gguf fuzz/seeds/gguf -- -max_total_time=60
//!
//! Found inputs go to `corpus`; the committed seeds are made by
//! `cargo run -p infall-gguf --example write_seeds -- fuzz/seeds/gguf`.

#![no_main]

use gguf::{Gguf, Writer};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| {
    let Ok(model) = Gguf::parse("fuzz.gguf", file) else { return };
    let known = model.tensors.iter().all(|tensor| tensor.size_bytes().is_ok());
    if known {
        let once = written(&model);
        let twice = written(&Gguf::parse("once.gguf", &once).expect("a file the writer wrote"));
        assert_eq!(once, twice);
    }
});

/// The model with zeros as data.
fn written(model: &Gguf) -> Vec<u8> {
    let mut file = vec![];
    let zeros = |tensor: &gguf::TensorInfo, out: &mut dyn std::io::Write| {
        let size_bytes = tensor.size_bytes().map_err(std::io::Error::other)?;
        out.write_all(&vec![0; size_bytes as usize])
    };
    Writer::from(model).write(&mut file, zeros).expect("a model that was parsed");
    file
}
