//! Streaming, precision, their figures and recorded routes, through the real binary.

mod common;

use std::io::{Read, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use common::{finish, infall, run, run_with_input, signal, tiny};
use gguf::Gguf;
use model::Model;
use serde_json::Value;

fn as_str(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// What `infall logits` writes for `name`, its figures, and what it says.
fn logits(name: &str, further: &[&str]) -> (Vec<u8>, Value, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let tokens: Vec<u32> = (0..150).map(|i| 3 + i * 37 % 500).collect();
    std::fs::write(path("tokens.json"), format!("{tokens:?}")).unwrap();
    let (tokens, out, stats, model) = (path("tokens.json"), path("out.npy"), path("stats.json"), tiny(name));
    let args = ["logits", "-m", as_str(&model), "--tokens", &tokens, "--out", &out, "--stats-json", &stats];
    let ran = run(&[&args, further].concat());
    let said = ran.err.clone();
    ran.success();
    (std::fs::read(out).unwrap(), read_json(Path::new(&stats)), said)
}

/// Bytes of an expert, of a model whose experts are all alike.
fn expert_bytes(name: &str) -> u64 {
    let model = Model::from_gguf(&Gguf::open(&tiny(name)).unwrap()).unwrap();
    let bytes = |experts: &model::tensors::Experts| experts.extents.expert_bytes().iter().sum::<usize>() as u64;
    let mut layers = model.experts.iter().map(bytes);
    let first = layers.next().unwrap();
    assert!(layers.all(|other| other == first));
    first
}

#[test]
fn streaming_changes_no_byte_and_counts_what_it_reads() {
    let mut files = Vec::new();
    for precision in ["--exact", "--fast"] {
        let (resident, figures, said) = logits("tiny-q4", &[precision]);
        let line = format!("precision {} | experts resident\n", &precision[2..]);
        assert!(said.contains(&line), "{said}");
        assert_eq!((&figures["prefill"]["misses"], &figures["setting"]["slots"]), (&0.into(), &Value::Null));

        let (streamed, figures, said) =
            logits("tiny-q4", &[precision, "--stream", "--cache", "1", "--chunk", "20", "--stats"]);
        assert!(streamed == resident, "{precision}: streaming changed the logits");
        assert!(said.contains("experts streamed: slots for 1 of ") && said.contains("\nprefill "), "{said}");
        let count = |name: &str| figures["prefill"][name].as_u64().unwrap();
        assert!(count("misses") > 0 && count("tokens") == 150 && count("stall_us") > 0, "{figures}");
        let read = count("read_bytes") / expert_bytes("tiny-q4");
        assert_eq!(count("read_bytes") % expert_bytes("tiny-q4"), 0, "{figures}");
        // One that is read ahead may be given up before its read is made.
        assert!((count("misses")..=count("misses") + count("prefetched")).contains(&read), "{read}: {figures}");
        files.push(resident);
    }
    assert!(files[0] != files[1], "fast and exact are two precisions");
    assert!(logits("tiny-q4", &[]).0 == files[1], "fast is the default");
}

/// What is too large for the memory streams without being asked to, and a line says so.
#[test]
fn what_does_not_fit_streams() {
    let model = tiny("tiny-q4");
    let args = ["-m", as_str(&model), "--threads", "1", "--ctx", "200"];
    let plan = run(&[&["plan", "--json", "--memory", "1TiB"], &args[..]].concat()).success();
    let plan: Value = serde_json::from_slice(&plan).unwrap();
    let memory = (plan["total_bytes"].as_u64().unwrap() - 1).to_string();
    let answer = |further: &[&str]| {
        let ran = run(&[&["run", "--temp", "0", "--nothink", "Hello"], &args[..], further].concat());
        (ran.err.clone(), ran.success())
    };
    let (said, resident) = answer(&[]);
    assert!(!said.contains("experts"), "nothing is said of what is usual: {said}");
    let (said, streamed) = answer(&["--memory", &memory]);
    assert!(said.contains("experts streamed: slots for "), "{said}");
    assert!(streamed == resident);
}

#[test]
fn refusals_say_what_works() {
    let model = tiny("tiny-q4");
    let refused = |further: &[&str]| {
        let ran = run(&[&["run", "-m", as_str(&model), "--nothink", "-n", "2", "Hello"], further].concat());
        (ran.code, ran.err)
    };
    let (code, said) = refused(&["--memory", "1MiB"]);
    assert!(code == Some(1) && said.contains("(as asked)"), "{said}");
    let smallest = said.split("Allow at least ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
    let (code, said) = refused(&["--memory", &smallest]);
    assert!(code == Some(0) && said.contains("warning: 1 expert slot is fewer"), "{said}");
    let (code, said) = refused(&["--cache", "0"]);
    assert!(code == Some(1) && said.contains("the least is 1 slot"), "{said}");
    let (code, said) = refused(&["--exact", "--fast"]);
    assert!(code == Some(2) && said.contains("cannot be used with"), "{said}");
    let (code, said) = refused(&["--stats-json", as_str(&model)]);
    assert!(code == Some(1) && said.contains("itself, which is read"), "{said}");
}

#[test]
fn recorded_routes_can_be_replayed() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (routes, stats) = (path("routes"), path("stats.json"));
    let replayed =
        || -> Value { serde_json::from_slice(&run(&["routes", "replay", &routes, "--json"]).success()).unwrap() };
    let tokens = |figures: &Value| {
        let all = &figures["shares"][0]["lru"];
        (all["prefill"]["tokens"].as_u64().unwrap(), all["decode"]["tokens"].as_u64().unwrap())
    };
    run(&["run", "--nothink", "--record-routes", &routes, "--stats-json", &stats, "What is 12 + 30?"]).success();
    let figures = read_json(Path::new(&stats));
    let count = |phase: &str| figures[phase]["tokens"].as_u64().unwrap();
    assert_eq!(tokens(&replayed()), (count("prefill"), count("decode")));
    assert!(count("decode") > 3);

    let chat = ["chat", "--nothink", "--record-routes", &routes];
    let ran = run_with_input(&chat, b"What is 12 + 30?\nWhat is 5 + 8?\n");
    ran.success();
    let (prefill, decode) = tokens(&replayed());
    assert!(prefill > count("prefill") && decode > count("decode"), "two turns are longer than one");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "nothing else is left");
}

fn check(further: &[&str]) -> (Option<i32>, Value) {
    let ran = run(&[&["check", "tool-call-quality", "--json"], further].concat());
    (ran.code, serde_json::from_slice(&ran.out).unwrap_or_else(|_| panic!("{}", ran.err)))
}

/// Sum of a count over all turns and phases of a path.
fn total(path: &Value, name: &str) -> u64 {
    let turns = path["turns"].as_array().unwrap().iter();
    turns.flat_map(|turn| ["prefill", "decode"].map(|phase| turn[phase][name].as_u64().unwrap())).sum()
}

/// What was said in every turn of every path: text, calls and the block as it was generated.
fn transcripts(run: &Value) -> Vec<[Value; 3]> {
    let paths = run["paths"].as_array().unwrap().iter();
    let turns = paths.flat_map(|path| path["turns"].as_array().unwrap());
    turns.map(|turn| ["content", "calls", "raw_block"].map(|key| turn[key].clone())).collect()
}

#[test]
fn tool_call_quality_passes_with_the_same_logits_wherever_experts_are() {
    let ((code, resident), (streamed_code, streamed)) = (check(&[]), check(&["--stream", "--cache", "1"]));
    assert_eq!((code, streamed_code), (Some(0), Some(0)), "{resident:#}\n{streamed:#}");
    let paths = |run: &Value| run["paths"].as_array().unwrap().clone();
    let hashes = |run: &Value| paths(run).iter().map(|path| path["logits_xxh3"].clone()).collect::<Vec<_>>();
    assert_eq!(hashes(&resident), hashes(&streamed));
    assert!(hashes(&resident).iter().all(|hash| hash.as_str().is_some_and(|hash| hash.len() == 16)), "{resident:#}");
    assert_eq!(transcripts(&resident), transcripts(&streamed));
    // The model built into the program is in memory; the same from its file goes through the disk.
    let nano = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/nano.gguf");
    let (code, from_file) = check(&["-m", nano, "--stream", "--cache", "1"]);
    assert_eq!((code, hashes(&from_file)), (Some(0), hashes(&resident)), "{from_file:#}");
    assert_eq!(transcripts(&from_file), transcripts(&resident));
    for (path, precision) in paths(&streamed).iter().zip(["fast", "exact"]) {
        assert_eq!((&path["setting"]["precision"], &path["passed"]), (&precision.into(), &true.into()), "{path:#}");
        assert_eq!(path["setting"]["slots"]["slots"], 1);
        assert_eq!(path["checks"].as_array().unwrap().len(), 10, "{path:#}");
        assert!(total(path, "misses") > 0 && total(path, "read_bytes") > 0, "{path:#}");
        let [first, second] = &path["turns"].as_array().unwrap()[..] else { panic!("two turns: {path:#}") };
        assert_eq!(first["finish"], "tool_calls");
        let held = [&first["read_tokens"], &first["generated_tokens"]].map(|count| count.as_u64().unwrap());
        assert_eq!(second["kept_tokens"], held[0] + held[1], "only what is new is read");
        assert!(second["content"].as_str().unwrap().contains("Makefile"), "{path:#}");
    }
    assert!(paths(&resident).iter().all(|path| total(path, "misses") == 0 && path["setting"]["slots"].is_null()));
    let both = hashes(&resident);
    assert_ne!(both[0], both[1], "the precisions are two");
    let (_, exact) = check(&["--exact"]);
    assert_eq!(hashes(&exact), both[1..]);
}

#[test]
fn tool_call_quality_fails_a_model_that_cannot_call() {
    let model = tiny("tiny-q4");
    let ran = run(&["check", "tool-call-quality", "--fast", "-m", as_str(&model)]);
    assert!(ran.code == Some(1) && ran.err.contains("checks failed, expected none"), "{}", ran.err);
    let table = String::from_utf8(ran.out).unwrap();
    assert!(table.contains("turn 1 finishes with calls           FAIL\n") && table.contains("turn 2 is reached"));
}

/// Ctrl-C while weights are loaded, a prompt is read or an answer is generated, at the fewest slots: the program ends soon, and
/// what it has printed is the beginning of what it would have printed.
#[test]
fn an_interrupt_ends_it_in_any_phase() {
    let model = tiny("tiny-iq2");
    let prompt = "lorem ipsum ".repeat(60);
    let common = ["run", "-m", as_str(&model), "--nothink", "--temp", "0", "--threads", "1", "-n", "600", &prompt];
    let whole = run(&common).success();
    let streamed = [&common[..], &["--stream", "--cache", "1"]].concat();
    let mut ends = Vec::new();
    for phase in [Some(0), Some(10), Some(50), Some(100), Some(200), None] {
        let mut child = infall(&streamed).spawn().unwrap();
        let mut begun = vec![0; if phase.is_none() { 20 } else { 0 }];
        match phase {
            Some(milliseconds) => std::thread::sleep(Duration::from_millis(milliseconds)),
            // The answer has begun.
            None => child.stdout.as_mut().unwrap().read_exact(&mut begun).unwrap(),
        }
        signal(child.id(), "INT");
        let ran = finish(child);
        let printed = [begun, ran.out].concat();
        let printed = printed.strip_suffix(b"\n").unwrap_or(&printed);
        assert!(whole.starts_with(printed), "{phase:?}: {}", String::from_utf8_lossy(printed));
        // Before weights are read, the signal itself ends the process.
        assert!(matches!(ran.code, None | Some(130)), "{phase:?}: {:?} {}", ran.code, ran.err);
        assert!(ran.code.is_some() || printed.is_empty(), "{phase:?}");
        ends.push((ran.code, printed.is_empty()));
    }
    println!("exit codes, and whether nothing had been printed: {ends:?}");
    assert_eq!(ends.last(), Some(&(Some(130), false)), "the last one was interrupted in its answer");
}

/// The file loses its end while a chat goes on: the next request fails and says why, and what was said before is kept.
#[test]
fn a_model_truncated_in_use_ends_a_script_with_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::copy(tiny("tiny-iq2"), &path).unwrap();
    let args = ["chat", "-m", as_str(&path), "--nothink", "--temp", "0", "-n", "4", "--stream", "--cache", "1"];
    let mut child = infall(&args).stdin(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(b"Hello\n").unwrap();
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        let mut byte = [0];
        child.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
        answer.extend(byte);
    }
    std::fs::File::options().write(true).open(&path).unwrap().set_len(1 << 20).unwrap();
    input.write_all(b"Hello again\n").unwrap();
    drop(input);
    let ran = finish(child);
    assert!(ran.code == Some(1) && ran.out.is_empty(), "{:?} {}", ran.code, ran.err);
    assert!(ran.err.contains("model.gguf was written to or truncated while in use"), "{}", ran.err);
}

/// A sealed model computes the same; a byte changed since is an error that names the expert; a seal that does not fit is
/// told and not used.
#[test]
fn a_sealed_model_is_checked_while_it_streams() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    let seal = dir.path().join("model.gguf.seal");
    std::fs::copy(tiny("tiny-iq2"), &model).unwrap();
    let answer = |further: &[&str]| {
        run(&[&["run", "-m", as_str(&model), "--nothink", "--temp", "0", "-n", "8", "Hello"], further].concat())
    };
    let streamed = || answer(&["--stream", "--cache", "2"]);
    let resident = answer(&[]).success();
    let plain = streamed();
    assert!(plain.err.contains("experts streamed") && !plain.err.contains("checked"), "{}", plain.err);

    let said = run(&["seal", "-m", as_str(&model)]);
    assert!(said.err.contains("model.gguf.seal: sealed "), "{}", said.err);
    said.success();
    let checked = streamed();
    assert!(checked.err.contains(", checked\n"), "{}", checked.err);
    assert!(checked.success() == resident);
    run(&["seal", "-m", as_str(&model)]).success();

    let sealed = std::fs::read(&seal).unwrap();
    std::fs::write(&seal, &sealed[..sealed.len() - 1]).unwrap();
    let unused = streamed();
    assert!(unused.err.contains("truncated or damaged. Experts are not checked"), "{}", unused.err);
    assert!(unused.success() == resident);
    assert!(!answer(&[]).err.contains("seal"), "a resident model does not need it");
    std::fs::write(&seal, b"notes of mine").unwrap();
    let refused = run(&["seal", "-m", as_str(&model)]);
    assert!(refused.code == Some(1) && refused.err.contains("did not write, expected none"), "{}", refused.err);
    std::fs::write(&seal, &sealed).unwrap();

    // A byte of every expert of the last layer, so that whichever is chosen is wrong; none of them is sampled for the
    // model's identity, or the seal would be refused as another model's.
    let extents = Model::from_gguf(&Gguf::open(&model).unwrap()).unwrap().experts.last().unwrap().extents;
    let mut bytes = std::fs::read(&model).unwrap();
    for expert in 0..extents.experts as u32 {
        bytes[extents.part(2, expert).offset as usize + 7] ^= 1;
    }
    std::fs::write(&model, &bytes).unwrap();
    let damaged = streamed();
    assert!(damaged.code == Some(1) && damaged.err.contains("part 2 of expert "), "{}", damaged.err);
}
