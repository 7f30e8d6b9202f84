//! Any bytes: reading recorded routes returns, and what it accepts is written the same.
//!
//!     mkdir -p fuzz/corpus/routes
//!     cargo +nightly fuzz run routes fuzz/corpus/routes fuzz/seeds/routes -- -max_total_time=60

#![no_main]

use libfuzzer_sys::fuzz_target;
use store::{TraceReader, TraceWriter};

fuzz_target!(|bytes: &[u8]| {
    let Ok(reader) = TraceReader::new(bytes) else { return };
    let mut writer = TraceWriter::new(Vec::new(), reader.header().clone()).expect("writing to memory");
    for pass in reader {
        let Ok(pass) = pass else { break };
        writer.pass(&pass).expect("writing to memory");
    }
    assert!(bytes.starts_with(&writer.finish().expect("writing to memory")));
});
