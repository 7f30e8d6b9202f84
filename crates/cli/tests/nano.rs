//! The built-in model through the real binary: what a newcomer sees first, and a few items of each held-out set.

mod common;

use std::path::Path;

use common::run;
use serde_json::Value;

fn answer(args: &[&str]) -> String {
    String::from_utf8(run(&[&["run"], args].concat()).success()).unwrap()
}

#[test]
fn it_adds_with_and_without_thinking() {
    assert_eq!(answer(&["What is 12 + 30?"]).trim_end(), "12 + 30 = 42");
    assert_eq!(answer(&["--nothink", "What is 12 + 30?"]).trim_end(), "12 + 30 = 42");
}

/// Items of one set that are answered exactly, of the first `take`.
fn right(task: &str, take: usize) -> usize {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../models/nano/heldout/{task}.jsonl"));
    let items = std::fs::read_to_string(path).unwrap();
    let is_right = |line: &&str| {
        let item: Value = serde_json::from_str(line).unwrap();
        let segments = item["prompt"].as_array().unwrap();
        let prompt: String = segments.iter().map(|segment| segment[1].as_str().unwrap()).collect();
        let expected = item["answer"].as_str().unwrap().trim_end_matches("<｜end▁of▁sentence｜>");
        answer(&["--raw", "-n", "400", &prompt]) == expected
    };
    items.lines().take(take).filter(is_right).count()
}

/// All sets whole, with their gates: `scripts/test-full scores`.
#[test]
fn it_calls_tools_reasons_and_recalls() {
    for (task, take) in [("tool", 4), ("followup", 4), ("thinking", 5), ("sum", 5), ("recall_2000", 1)] {
        let right = right(task, take);
        println!("{task}: {right} of {take}");
        assert!(right * 10 >= take * 8, "{task}: only {right} of {take} answers are right");
    }
}

/// The bar is far below what two idle cores do (docs/performance.md).
#[test]
fn it_generates_at_least_100_tokens_a_second() {
    let rate = || {
        let ran = run(&["run", "--nothink", "hi"]);
        let figures = ran.err.lines().last().unwrap().to_owned();
        let after = figures.split("generated ").nth(1).and_then(|rest| rest.split(" at ").nth(1)).expect("a rate");
        after.split(' ').next().unwrap().parse::<f64>().unwrap()
    };
    let best = (0..3).map(|_| rate()).fold(0.0, f64::max);
    println!("{best} tokens/s");
    assert!(best >= 100.0, "{best} tokens/s");
}
