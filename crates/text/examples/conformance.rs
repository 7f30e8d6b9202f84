//! Runs cases of prompts, ids and parsed turns, in the form of docs/spec/conversation_cases.json:
//! `cargo run -p infall-text --example conformance -- FILE.json [--tokenizer tokenizer.json|FILE.gguf]`
//!
//! Without a tokenizer it takes the one that `scripts/test-data` made, and without that it skips what needs one. The last
//! line says how many cases passed and failed; the exit code is 1 if any failed.

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/common/conformance.rs"]
mod conformance;

use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::Value;
use text::{Tokenizer, TokenizerData};

const USAGE: &str = "usage: conformance FILE.json [--tokenizer tokenizer.json|FILE.gguf]";

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let (mut file, mut tokenizer_path) = (None, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--tokenizer" => tokenizer_path = Some(PathBuf::from(arguments.next().ok_or(USAGE)?)),
            _ => file = Some(PathBuf::from(argument)),
        }
    }
    let cases = read_json(&file.ok_or(USAGE)?)?;
    let made = common::repository_file("target/test-data/tokenizer/vocabulary.json");
    let tokenizer = match tokenizer_path {
        Some(path) => Some(Tokenizer::new(read_vocabulary(&path)?)?),
        None if made.exists() => Some(Tokenizer::new(common::vocabulary(&common::read_json(&made)))?),
        None => {
            println!("no tokenizer: prompts and ids are skipped; run scripts/test-data, or give --tokenizer");
            None
        }
    };
    let report = conformance::run(&cases, tokenizer.as_ref());
    for (id, reason) in &report.skipped {
        println!("skipped {id}: {reason}");
    }
    for (id, difference) in &report.failed {
        println!("FAILED {id}: {difference}");
    }
    println!("{} passed, {} failed", report.passed.len(), report.failed.len());
    Ok(if report.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn read_json(path: &Path) -> Result<Value, Box<dyn Error>> {
    let read = || -> Result<Value, Box<dyn Error>> { Ok(serde_json::from_slice(&std::fs::read(path)?)?) };
    read().map_err(|error| format!("{}: {error}", path.display()).into())
}

/// The vocabulary in a GGUF file or a tokenizer.json.
fn read_vocabulary(path: &Path) -> Result<TokenizerData, Box<dyn Error>> {
    let mut magic = [0; 4];
    File::open(path)
        .and_then(|mut file| file.read_exact(&mut magic))
        .map_err(|e| format!("{}: {e}", path.display()))?;
    if &magic == b"GGUF" { from_gguf(path) } else { from_tokenizer_json(&read_json(path)?) }
}

fn from_gguf(path: &Path) -> Result<TokenizerData, Box<dyn Error>> {
    let header = gguf::Gguf::open(path)?;
    let metadata = &header.metadata;
    let strings = |key: &str| Ok::<_, gguf::Error>(metadata.str_array(key)?.iter().map(str::to_owned).collect());
    Ok(TokenizerData {
        tokens: strings("tokenizer.ggml.tokens")?,
        token_types: metadata.i64_array("tokenizer.ggml.token_type")?.into_iter().map(|kind| kind as i32).collect(),
        merges: strings("tokenizer.ggml.merges")?,
        pre: metadata.str("tokenizer.ggml.pre")?.to_owned(),
        bos: metadata.u32("tokenizer.ggml.bos_token_id")?,
        eos: metadata.u32("tokenizer.ggml.eos_token_id")?,
    })
}

/// Hugging Face's form of DeepSeek V4's tokenizer: the vocabulary by token, and added tokens apart from it.
fn from_tokenizer_json(json: &Value) -> Result<TokenizerData, Box<dyn Error>> {
    let vocabulary = json["model"]["vocab"].as_object().ok_or("a tokenizer.json without model.vocab")?;
    let added = json["added_tokens"].as_array().ok_or("a tokenizer.json without added_tokens")?;
    let mut by_id: Vec<(u64, &str, i32)> = Vec::new();
    for (token, id) in vocabulary {
        by_id.push((id.as_u64().ok_or("an id in model.vocab that is no number")?, token, 1));
    }
    for token in added {
        let id = token["id"].as_u64().ok_or("an added token without id")?;
        let content = token["content"].as_str().ok_or("an added token without content")?;
        by_id.push((id, content, if token["special"] == true { 3 } else { 4 }));
    }
    by_id.sort_by_key(|&(id, _, kind)| (id, -kind));
    by_id.dedup_by_key(|&mut (id, ..)| id); // an added token that is in the vocabulary too
    let merge = |merge: &Value| match merge {
        Value::Array(pair) => pair.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" "),
        other => other.as_str().unwrap_or_default().to_owned(),
    };
    let id = |text: &str| by_id.iter().find(|(_, token, _)| *token == text).map(|&(id, ..)| id as u32);
    Ok(TokenizerData {
        tokens: by_id.iter().map(|&(_, token, _)| token.to_owned()).collect(),
        token_types: by_id.iter().map(|&(_, _, kind)| kind).collect(),
        merges: json["model"]["merges"].as_array().into_iter().flatten().map(merge).collect(),
        pre: "joyai-llm".to_owned(), // what GGUF files call V4's; a tokenizer.json spells it out
        bos: id("<｜begin▁of▁sentence｜>").ok_or("no BOS among the tokens: not the tokenizer of DeepSeek V4")?,
        eos: id("<｜end▁of▁sentence｜>").ok_or("no EOS among the tokens: not the tokenizer of DeepSeek V4")?,
    })
}
