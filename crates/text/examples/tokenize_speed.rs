//! Prints how long the vocabulary takes to load and how fast text is encoded, on one core:
//! `cargo run --release -p infall-text --example tokenize_speed -- target/test-data/tokenizer`

use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

use serde_json::Value;
use text::{Tokenizer, TokenizerData};

fn main() -> Result<(), Box<dyn Error>> {
    let dir =
        PathBuf::from(std::env::args().nth(1).ok_or("expected the folder that tools/make_tokenizer_data.py wrote")?);
    let read =
        |file: &str| -> Result<Value, Box<dyn Error>> { Ok(serde_json::from_slice(&std::fs::read(dir.join(file))?)?) };
    let data = vocabulary(&read("vocabulary.json")?)?;

    let start = Instant::now();
    let tokenizer = Tokenizer::new(data)?;
    println!("{} tokens loaded in {:.3} s", tokenizer.vocab_size(), start.elapsed().as_secs_f64());

    let cases = read("cases.json")?;
    for group in ["prose", "code", "languages", "hostile", "added", "long", ""] {
        let named = |case: &&Value| case["name"].as_str().is_some_and(|name| name.starts_with(group));
        let texts: Vec<&str> =
            cases.as_array().into_iter().flatten().filter(named).filter_map(|case| case["text"].as_str()).collect();
        let bytes: usize = texts.iter().map(|text| text.len()).sum();
        let seconds = best_of(5, || texts.iter().map(|text| tokenizer.encode(text).len()).sum());
        let name = if group.is_empty() { "all" } else { group };
        println!("{name:10} {bytes:8} bytes {:6.1} MB/s", bytes as f64 / 1e6 / seconds);
    }
    Ok(())
}

/// The shortest time in seconds of several runs.
fn best_of(runs: usize, work: impl Fn() -> usize) -> f64 {
    let time = |_| {
        let start = Instant::now();
        std::hint::black_box(work());
        start.elapsed().as_secs_f64()
    };
    (0..runs).map(time).fold(f64::INFINITY, f64::min)
}

fn vocabulary(json: &Value) -> Result<TokenizerData, Box<dyn Error>> {
    let strings = |key: &str| serde_json::from_value(json[key].clone());
    Ok(TokenizerData {
        tokens: strings("tokens")?,
        merges: strings("merges")?,
        token_types: serde_json::from_value(json["token_types"].clone())?,
        pre: serde_json::from_value(json["pre"].clone())?,
        bos: serde_json::from_value(json["bos"].clone())?,
        eos: serde_json::from_value(json["eos"].clone())?,
    })
}
