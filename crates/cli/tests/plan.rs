//! `infall plan` and `infall routes` as programs.

mod common;

use std::path::{Path, PathBuf};

use common::{run, tiny};
use serde_json::Value;
use store::{TraceHeader, TracePass, TraceWriter};

/// A header of a file with Flash's real dimensions.
fn flash() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/test-data/full/flash.header");
    assert!(path.exists(), "{} is missing: run scripts/test-data first", path.display());
    path
}

fn plan(model: &Path, further: &[&str]) -> Value {
    let args = ["plan", "-m", model.to_str().unwrap(), "--json", "--threads", "2"];
    serde_json::from_slice(&run(&[&args, further].concat()).success()).unwrap()
}

#[test]
fn a_plan_of_flash_keeps_to_its_memory() {
    let found = plan(&flash(), &["--ctx", "32768", "--memory", "16GiB"]);
    assert_eq!(found["residency"], "streamed");
    let total = found["total_bytes"].as_u64().unwrap();
    let slot_bytes = 7_077_888 + 3 * 4096;
    assert!(total <= 16 << 30 && total > (16 << 30) - slot_bytes, "{found}");
    let sum: u64 = found["items"].as_array().unwrap().iter().map(|item| item["bytes"].as_u64().unwrap()).sum();
    assert_eq!(sum, total);
    let large = plan(&flash(), &["--ctx", "32768", "--memory", "1TiB"]);
    assert_eq!(large["residency"], "resident");
    let few = plan(&flash(), &["--cache", "1", "--memory", "16 GiB"]);
    assert!(few["warnings"][0].as_str().unwrap().starts_with("1 expert slot is fewer than the 258"), "{few}");
    let model = flash();
    let table = run(&["plan", "-m", model.to_str().unwrap(), "--cache", "1", "--memory", "16 GiB"]).success();
    let table = String::from_utf8(table).unwrap();
    assert!(table.contains("1 slot for 11,008 experts"), "{table}");
}

#[test]
fn refusals_name_what_works() {
    let model = flash();
    let refused = |further: &[&str]| {
        let args = ["plan", "-m", model.to_str().unwrap(), "--ctx", "4096"];
        let ran = run(&[&args, further].concat());
        (ran.code, ran.err)
    };
    let (code, error) = refused(&["--memory", "7GiB"]);
    assert_eq!(code, Some(1));
    let smallest = error.split("Allow at least ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
    assert_eq!(refused(&["--memory", &smallest]).0, Some(0));
    assert_eq!(refused(&["--cache", "0", "--memory", "1TiB"]).0, Some(1));
    for (flag, value) in [("--memory", "16G"), ("--memory", "-1"), ("--cache", "lots")] {
        let (code, error) = refused(&[flag, value]);
        assert_eq!(code, Some(2), "{error}");
        assert!(error.contains("expected"), "{error}");
    }
}

#[test]
fn a_small_model_is_resident() {
    let found = plan(&tiny("tiny-q8"), &["--memory", "1GiB"]);
    assert_eq!(found["residency"], "resident");
    assert_eq!(plan(&tiny("tiny-q8"), &["--memory", "1GiB", "--stream"])["residency"], "streamed");
}

#[test]
fn routes_are_replayed() {
    let dir = tempfile::tempdir().unwrap();
    let (file, svg) = (dir.path().join("routes"), dir.path().join("plot.svg"));
    let header = TraceHeader { identity: 1, experts: 40, experts_used: 2, expert_bytes: vec![100; 2] };
    let mut writer = TraceWriter::new(std::fs::File::create(&file).unwrap(), header).unwrap();
    for token in 0..50u16 {
        let experts = vec![token % 3, 10 + token % 5, token % 2, 20 + token % 7];
        writer.pass(&TracePass { runs: vec![1], experts }).unwrap();
    }
    writer.finish().unwrap();
    let [file, svg] = [&file, &svg].map(|path| path.to_str().unwrap());
    let found: Value =
        serde_json::from_slice(&run(&["routes", "replay", file, "--svg", svg, "--json"]).success()).unwrap();
    let shares = found["shares"].as_array().unwrap();
    assert_eq!(shares.len(), 7);
    for share in shares {
        let hits = |rule: &str| share[rule]["decode"]["hits"].as_u64().unwrap();
        assert!(hits("optimum") >= hits("infall") && hits("optimum") >= hits("lru"), "{share}");
    }
    // With all experts in slots, each is read once: 3 + 5 in one layer, 2 + 7 in the other.
    assert_eq!(shares[6]["optimum"]["decode"]["read_bytes"], 17 * 100);
    assert!(std::fs::read_to_string(svg).unwrap().contains("<polyline"));
    let table = String::from_utf8(run(&["routes", "replay", file]).success()).unwrap();
    assert!(table.contains("decode, 50 tokens"), "{table}");
    std::fs::write(file, b"GGUF").unwrap();
    let refused = run(&["routes", "replay", file]);
    assert_eq!(refused.code, Some(1));
    assert!(refused.err.contains("expected recorded routes"), "{}", refused.err);
}
