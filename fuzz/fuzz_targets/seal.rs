//! Any bytes, as they are and with the checksum that they should end with: reading a seal returns, and what it accepts is
//! written the same.
//!
//!     mkdir -p fuzz/corpus/seal
//!     cargo +nightly fuzz run seal fuzz/corpus/seal fuzz/seeds/seal -- -max_total_time=60

#![no_main]

use libfuzzer_sys::fuzz_target;
use store::Seal;
use xxhash_rust::xxh3::xxh3_64;

fuzz_target!(|bytes: &[u8]| {
    let summed = [bytes, &xxh3_64(bytes).to_le_bytes()].concat();
    for bytes in [bytes, &summed] {
        if let Ok(seal) = Seal::from_bytes(bytes) {
            assert_eq!(seal.to_bytes(), bytes);
        }
    }
});
