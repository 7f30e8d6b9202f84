//! Any bytes: reading a seal returns, and what it accepts is written the same.
//!
//!     mkdir -p fuzz/corpus/seal
//!     cargo +nightly fuzz run seal fuzz/corpus/seal -- -max_total_time=60

#![no_main]

use libfuzzer_sys::fuzz_target;
use store::Seal;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(seal) = Seal::from_bytes(bytes) {
        assert_eq!(seal.to_bytes(), bytes);
    }
});
