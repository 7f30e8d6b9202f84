//! Bodies of requests to the four APIs: any bytes end in a conversation or in an error of status 400.
//!
//!     mkdir -p fuzz/corpus/requests
//!     cargo +nightly fuzz run requests fuzz/corpus/requests fuzz/seeds/requests -- -max_total_time=60

#![no_main]

use libfuzzer_sys::fuzz_target;
use server::json::parse;
use server::request::{Api, Defaults, read};
use session::Sampling;
use text::prompt::{Encoding, Mode};

fuzz_target!(|bytes: &[u8]| {
    let Ok(body) = parse(bytes) else { return };
    let defaults = Defaults {
        encoding: Encoding::V4_0731,
        mode: Mode::default(),
        sampling: Sampling::default(),
        respect_sampling: false,
        max_tokens: 1000,
        always_constrain: false,
        raw_completions: false,
        ignored_fields: Vec::new(),
    };
    for api in Api::ALL {
        if let Err(error) = read(api, body.clone(), &defaults, &|_| Ok(Vec::new())) {
            assert_eq!(error.status, 400);
        }
    }
});
