//! Bad input, given to the real binary: each gets one paragraph that says what was found, what was expected and what to
//! do, an exit code of 1, and no panic.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::{Change, Ran, rewrite, run, run_with_input, tiny};
use gguf::{Gguf, Strings, TensorType, Value};

/// Checks one refusal: `words` must occur in it.
fn refused(case: &str, ran: &Ran, words: &[&str]) -> Result<(), String> {
    let is_setting = |line: &&str| line.starts_with("model: ") || line.starts_with("precision ");
    let lines: Vec<&str> = ran.err.lines().filter(|line| !is_setting(line)).collect();
    let is_paragraph = lines.len() == 1 && lines[0].starts_with("error: ") && lines[0].len() > 40;
    let missing: Vec<&&str> = words.iter().filter(|word| !ran.err.contains(**word)).collect();
    match ran.code {
        Some(1) if is_paragraph && missing.is_empty() => {
            println!("{case}: {}", lines[0]);
            Ok(())
        }
        code => Err(format!("{case}: exit code {code:?}, without {missing:?}: {:?}", ran.err)),
    }
}

/// All faults at once, so that one run shows them.
fn all(results: impl IntoIterator<Item = Result<(), String>>) {
    let faults: Vec<String> = results.into_iter().filter_map(Result::err).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

fn as_str(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Files that `run`, `inspect` and `logits` all refuse, from their headers alone.
fn bad_files(dir: &Path) -> Vec<(&'static str, PathBuf, Vec<&'static str>)> {
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let changed = |name: &str, keys: &[(&str, Value)], tensor: &str, change: fn() -> Change| {
        let path = dir.join(name);
        rewrite(&tiny("tiny-q4"), &path, keys, |info, _| if info.name == tensor { change() } else { Change::Keep });
        path
    };
    let without = |tensor: &str| changed(&format!("without {tensor}"), &[], tensor, || Change::Drop);
    let key = |key: &str, value: Value| changed(&format!("with {key}"), &[(key, value)], "", || Change::Keep);
    vec![
        ("missing file", dir.join("absent.gguf"), vec!["absent.gguf", "No such file", "spelling"]),
        ("directory", dir.to_owned(), vec!["a directory", "expected a GGUF file", ".gguf file"]),
        ("text file", write("text.gguf", b"Once upon a time"), vec!["text.gguf", "\"Once", "expected", "GGUF"]),
        ("empty file", write("empty.gguf", b""), vec!["empty.gguf", "expected", "download"]),
        (
            "wrong architecture",
            key("general.architecture", "llama".into()),
            vec!["general.architecture is llama, expected deepseek4"],
        ),
        ("wrong type of key", key("deepseek4.block_count", "five".into()), vec!["block_count", "\"five\"", "expected"]),
        ("wrong size", key("deepseek4.embedding_length", 512_u32.into()), vec!["shape", "expected", "download"]),
        (
            "unsupported ratio",
            key("deepseek4.attention.compress_ratios", gguf::Array::I32(vec![0, 4, 7, 4, 128]).into()),
            vec!["compress_ratios", "is 7", "expected 0, 4 or 128"],
        ),
        ("no embedding", without("token_embd.weight"), vec!["token_embd.weight is missing", "download"]),
        ("no attention", without("blk.2.attn_kv.weight"), vec!["blk.2.attn_kv.weight is missing", "download"]),
        ("no experts", without("blk.4.ffn_down_exps.weight"), vec!["blk.4.ffn_down_exps.weight is missing"]),
        ("no bias", without("blk.3.exp_probs_b.bias"), vec!["blk.3.exp_probs_b.bias is missing"]),
        ("V4.1", without("output_hc_base.weight"), vec!["output_hc_base.weight is missing", "V4.1"]),
        (
            "wrong shape",
            changed("shape", &[], "blk.1.attn_q_a.weight", || Change::Shape(vec![128, 256], TensorType::Q8_0)),
            vec!["blk.1.attn_q_a.weight has shape [128, 256], expected [256, 128]", "download"],
        ),
        (
            "wrong type",
            changed("type", &[], "blk.1.attn_q_a.weight", || Change::Shape(vec![256, 128], TensorType::I8)),
            vec!["blk.1.attn_q_a.weight has type I8, expected one of F32", "Convert"],
        ),
        (
            "table of wrong type",
            changed("table", &[], "blk.0.ffn_gate_tid2eid.weight", || Change::Shape(vec![3, 512], TensorType::F32)),
            vec!["blk.0.ffn_gate_tid2eid.weight has type F32, expected I32"],
        ),
    ]
}

#[test]
fn bad_files_are_refused_by_every_command() {
    let dir = tempfile::tempdir().unwrap();
    let (tokens, out) = (dir.path().join("tokens.json"), dir.path().join("out.npy"));
    std::fs::write(&tokens, "[0, 1, 2]").unwrap();
    all(bad_files(dir.path()).into_iter().flat_map(|(case, path, words)| {
        let path = as_str(&path);
        let logits = run(&["logits", "-m", path, "--tokens", as_str(&tokens), "--out", as_str(&out)]);
        assert!(!out.exists(), "{case}: an output without content");
        [
            refused(case, &run(&["run", "-m", path, "hi"]), &words),
            refused(case, &run(&["inspect", path]), &words),
            refused(case, &logits, &words),
        ]
    }));
}

#[test]
fn a_file_cut_short_anywhere_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let whole = std::fs::read(tiny("tiny-q4")).unwrap();
    all((0..16).map(|sixteenths| {
        let path = dir.path().join(format!("{sixteenths}.gguf"));
        std::fs::write(&path, &whole[..whole.len() * sixteenths / 16]).unwrap();
        refused(&format!("{sixteenths}/16"), &run(&["run", "-m", as_str(&path), "hi"]), &["expected", "download"])
    }));
}

#[test]
fn vocabularies_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let header = Gguf::open(&tiny("tiny-q4")).unwrap();
    let tokens = header.metadata.str_array("tokenizer.ggml.tokens").unwrap();
    let renamed: Strings = tokens.iter().map(|token| if token == "<think>" { "<thunk>" } else { token }).collect();
    let fewer: Strings = tokens.iter().take(500).collect();
    let cases: [(&str, &str, Value, &[&str]); 4] = [
        ("foreign pre-tokenizer", "tokenizer.ggml.pre", "llama-bpe".into(), &["`llama-bpe`", "`joyai-llm`"]),
        ("control characters", "tokenizer.ggml.pre", "a\n\x1b[2J".into(), &["`a\\u000a\\u001b[2J`", "`joyai-llm`"]),
        ("no <think>", "tokenizer.ggml.tokens", renamed.into(), &["no control token `<think>`", "GGUF file"]),
        ("fewer tokens than types", "tokenizer.ggml.tokens", fewer.into(), &["500 tokens but 512 token types"]),
    ];
    all(cases.into_iter().flat_map(|(case, key, value, words)| {
        let path = dir.path().join(case);
        rewrite(&tiny("tiny-q4"), &path, &[(key, value)], |_, _| Change::Keep);
        let path = as_str(&path);
        [refused(case, &run(&["run", "-m", path, "hi"]), words), refused(case, &run(&["inspect", path]), words)]
    }));
}

/// Every kind of tensor in turn, filled with ones: in any float type that is NaN, in an integer type it is -1. The
/// prompt is long enough for every layer to use all it has.
#[test]
fn nan_in_any_kind_of_tensor_is_an_error_and_never_text() {
    let dir = tempfile::tempdir().unwrap();
    let header = Gguf::open(&tiny("tiny-q4")).unwrap();
    let kind = |name: &str| name.trim_start_matches("blk.").trim_start_matches(|c: char| c.is_ascii_digit()).to_owned();
    let kinds: BTreeMap<String, String> = header.tensors.iter().map(|t| (kind(&t.name), t.name.clone())).collect();
    assert!(kinds.len() > 40, "{kinds:?}");
    let prompt = "A prompt of many tokens. ".repeat(10);
    let path = dir.path().join("nan.gguf");
    all(kinds.values().map(|name| {
        rewrite(&tiny("tiny-q4"), &path, &[], |tensor, bytes| match tensor.name == *name {
            true => Change::Data(vec![0xff; bytes.len()]),
            false => Change::Keep,
        });
        let ran = run(&["run", "-m", as_str(&path), "-n", "4", "--nothink", &prompt]);
        let found = if ran.err.contains(name.as_str()) { "download" } else { "not finite" };
        refused(name, &ran, &[found, "damaged"])
    }));
}

#[test]
fn check_names_the_damaged_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nan.gguf");
    let name = "blk.2.ffn_up_exps.weight";
    rewrite(&tiny("tiny-q4"), &path, &[], |tensor, bytes| {
        if tensor.name != name {
            return Change::Keep;
        }
        let mut bytes = bytes.to_vec();
        // The scale of the third block of Q4_K: 256 values.
        bytes[2 * 144..2 * 144 + 2].fill(0xff);
        Change::Data(bytes)
    });
    let ran = run(&["inspect", "--check", as_str(&path)]);
    all([refused("check", &ran, &[name, "256 NaN or infinite values", "element 512", "download"])]);
    assert!(String::from_utf8(ran.out).unwrap().contains("146 finite, 1 damaged"));
    run(&["inspect", as_str(&path)]).success();
}

#[test]
fn bad_prompts_are_refused() {
    let tiny = tiny("tiny-q4");
    let model = as_str(&tiny);
    let long = "word ".repeat(100_000);
    all([
        refused("empty", &run(&["run", "-m", model, ""]), &["empty prompt", "Give it"]),
        refused("empty input", &run_with_input(&["run", "-m", model, "-"], b""), &["empty prompt", "Give it"]),
        refused("empty line", &run_with_input(&["run", "-m", model, "-"], b"\n"), &["empty prompt"]),
        refused("empty, raw", &run(&["run", "-m", model, "--raw", ""]), &["empty prompt"]),
        refused("not UTF-8", &run_with_input(&["run", "-m", model, "-"], b"caf\xe9"), &["0xe9", "offset 3", "iconv"]),
        refused(
            "longer than --ctx",
            &run(&["run", "-m", model, "--ctx", "8", "one two three four"]),
            &["too long", "room for 8 of 8", "larger context", "4096"],
        ),
        refused(
            "longer than the model",
            &run_with_input(&["run", "-m", model, "-"], long.as_bytes()),
            &["too long", "of 4096", "Shorten"],
        ),
        refused(
            "context too large",
            &run(&["run", "-m", model, "--ctx", "9999", "hi"]),
            &["9999", "expected 1 to 4096"],
        ),
    ]);
}

#[test]
fn bad_tokens_and_outputs_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = tiny("tiny-q4");
    let logits = |tokens: &Path, out: &Path| {
        run(&["logits", "-m", as_str(&tiny), "--tokens", as_str(tokens), "--out", as_str(out)])
    };
    let out = dir.path().join("out.npy");
    let tokens = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        logits(&path, &out)
    };
    let too_many = format!("{:?}", vec![5; 4097]);
    all([
        refused("no tokens file", &logits(&dir.path().join("absent"), &out), &["absent", "No such file", "JSON"]),
        refused("not JSON", &tokens("a", "1 2 3"), &["expected a JSON array of token ids"]),
        refused("an object", &tokens("b", "{\"tokens\": [1]}"), &["expected a JSON array"]),
        refused("negative", &tokens("c", "[1, -2]"), &["-2", "expected a JSON array"]),
        refused("a fraction", &tokens("d", "[1.5]"), &["1.5", "expected a JSON array"]),
        refused("none", &tokens("e", "[]"), &["empty array", "at least one"]),
        refused("outside", &tokens("f", "[1, 2, 512]"), &["token 512 at index 2", "expected 0 to 511", "tokenizer"]),
        refused("too many", &tokens("g", &too_many), &["4097 tokens", "at most 4096"]),
    ]);
    assert!(!out.exists(), "no output for tokens that were refused");
    let good = dir.path().join("good");
    std::fs::write(&good, "[0, 5, 7]").unwrap();
    all([
        refused(
            "no folder",
            &logits(&good, Path::new("/no/such/folder/out.npy")),
            &["/no/such/folder", "Check the path"],
        ),
        refused("a folder", &logits(&good, dir.path()), &["cannot write", "Check the path"]),
    ]);
}

/// Names in `dir`, in order.
fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn logits_never_replace_what_they_read_nor_an_older_file_by_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::copy(tiny("tiny-q4"), path("model.gguf")).unwrap();
    std::fs::write(path("tokens.json"), "[0, 5, 7]").unwrap();
    std::fs::write(path("old.npy"), "old").unwrap();
    std::os::unix::fs::symlink(path("model.gguf"), path("link.gguf")).unwrap();
    // Fails after the header has been written: the logits are not finite.
    rewrite(&tiny("tiny-q4"), &path("nan.gguf"), &[], |tensor, bytes| match tensor.name.as_str() {
        "output.weight" => Change::Data(vec![0xff; bytes.len()]),
        _ => Change::Keep,
    });
    let before = names(dir.path());
    let logits = |model: &str, out: &str| {
        let [model, tokens, out] = [path(model), path("tokens.json"), path(out)];
        run(&["logits", "-m", as_str(&model), "--tokens", as_str(&tokens), "--out", as_str(&out)])
    };
    let refused = [
        ("the model", "model.gguf", "model.gguf", "itself, which is read"),
        ("the model behind a link", "link.gguf", "model.gguf", "itself, which is read"),
        ("a link to the model", "model.gguf", "link.gguf", "itself, which is read"),
        ("the tokens", "model.gguf", "tokens.json", "itself, which is read"),
        ("an older file", "nan.gguf", "old.npy", "damaged"),
        ("a new file", "nan.gguf", "new.npy", "damaged"),
    ]
    .map(|(case, model, out, word)| refused(case, &logits(model, out), &[word]));
    all(refused);
    assert_eq!(names(dir.path()), before, "nothing is left behind");
    assert!(std::fs::read(path("model.gguf")).unwrap() == std::fs::read(tiny("tiny-q4")).unwrap());
    assert_eq!(std::fs::read(path("tokens.json")).unwrap(), b"[0, 5, 7]");
    assert_eq!(std::fs::read(path("old.npy")).unwrap(), b"old");

    logits("model.gguf", "old.npy").success();
    assert!(std::fs::read(path("old.npy")).unwrap().starts_with(b"\x93NUMPY"), "a success replaces the older file");
    assert_eq!(names(dir.path()), before);
}

/// Whole numbers and shares below zero are told what is expected, like any other value out of range.
#[test]
fn values_out_of_range_are_told_what_is_expected() {
    let cases = [
        ("run", "--temp", "-1", "expected a finite number of at least 0"),
        ("run", "--temp", "NaN", "expected a finite number of at least 0"),
        ("run", "--temp", "1e39", "expected a finite number of at least 0"),
        ("run", "--top-p", "-0.5", "expected a number from 0 to 1"),
        ("run", "--min-p", "-1", "expected a number from 0 to 1"),
        ("run", "-n", "-1", "expected a whole number from 0"),
        ("run", "--seed", "-1", "expected a whole number from 0"),
        ("run", "--seed", "18446744073709551616", "expected a whole number from 0"),
        ("run", "--ctx", "-1", "expected a whole number from 0"),
        ("run", "--threads", "-1", "-1 is not in 1..=1024"),
        ("logits", "--chunk", "-1", "expected a whole number from 1"),
        ("logits", "--chunk", "0", "expected a whole number from 1"),
    ];
    all(cases.map(|(command, flag, value, expected)| {
        let ran = run(&[command, flag, value]);
        let is_told = ran.code == Some(2) && ran.err.contains(expected) && !ran.err.contains("'-- ");
        if is_told { Ok(()) } else { Err(format!("{flag} {value}: {:?} {}", ran.code, ran.err)) }
    }));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = tiny("tiny-q4");
    let tokens = dir.path().join("tokens");
    std::fs::write(&tokens, "[0, 5, 7]").unwrap();
    let ran = run(&["logits", "-m", as_str(&tiny), "--tokens", as_str(&tokens), "--out", "/dev/full"]);
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let child = common::infall(&["run", "-m", as_str(&tiny), "--nothink", "hi"]).stdout(full).spawn().unwrap();
    all([
        refused("output file", &ran, &["/dev/full", "No space left", "free space"]),
        refused("standard output", &common::finish(child), &["standard output", "No space left", "free space"]),
    ]);
    assert!(Path::new("/dev/full").exists(), "only files are removed");
    assert_eq!(names(dir.path()), ["tokens"]);
}
