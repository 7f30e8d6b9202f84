//! The tokenizers that tests run: a tiny one that is committed, and DeepSeek V4's.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use text::{Segment, Tokenizer, TokenizerData};

/// A file of the repository by its path from the root.
pub fn repository_file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// Reads a JSON file that must be there.
pub fn read_json(path: &Path) -> Value {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Reads a file that `tools/make_tokenizer_data.py` writes.
#[allow(dead_code, reason = "not every test program compares with the reference")]
pub fn reference_data(file: &str) -> Value {
    let path = repository_file("target/test-data/tokenizer").join(file);
    assert!(path.exists(), "{} is missing: run scripts/test-data, which makes it", path.display());
    read_json(&path)
}

/// The vocabulary in a JSON file of the generator's form.
pub fn vocabulary(json: &Value) -> TokenizerData {
    let strings = |key: &str| json[key].as_array().unwrap().iter().map(|s| s.as_str().unwrap().to_owned()).collect();
    TokenizerData {
        tokens: strings("tokens"),
        token_types: json["token_types"].as_array().unwrap().iter().map(|t| t.as_i64().unwrap() as i32).collect(),
        merges: strings("merges"),
        pre: json["pre"].as_str().unwrap().to_owned(),
        bos: json["bos"].as_u64().unwrap() as u32,
        eos: json["eos"].as_u64().unwrap() as u32,
    }
}

/// DeepSeek V4's tokenizer.
#[allow(dead_code, reason = "not every test program compares with the reference")]
pub fn v4() -> Tokenizer {
    Tokenizer::new(vocabulary(&reference_data("vocabulary.json"))).unwrap()
}

/// The vocabulary of 512 tokens that `tools/oracle/make_tiny.py` gives its models.
pub fn tiny_vocabulary() -> TokenizerData {
    vocabulary(&read_json(&repository_file("crates/text/tests/fixtures/tiny_vocabulary.json")))
}

/// The tokenizer of [`tiny_vocabulary`].
#[allow(dead_code, reason = "not every test program uses it")]
pub fn tiny() -> Tokenizer {
    Tokenizer::new(tiny_vocabulary()).unwrap()
}

/// A JSON array of ids.
#[allow(dead_code, reason = "not every test program reads ids")]
pub fn ids(json: &Value) -> Vec<u32> {
    json.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// What a prompt reads like with its control tokens spelt out.
#[allow(dead_code, reason = "not every test program renders")]
pub fn spelt_out(tokenizer: &Tokenizer, segments: &[Segment]) -> String {
    let bytes = segments.iter().flat_map(|segment| match segment {
        Segment::Control(id) => tokenizer.token_bytes(*id).to_vec(),
        Segment::Text(text) => text.clone().into_bytes(),
    });
    String::from_utf8(bytes.collect()).unwrap()
}
