//! The commands of the real binary on small random models.

mod common;

use std::io::Read;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{Change, finish, infall, rewrite, run, run_with_input, signal, tiny};
use cpu::{CpuBackend, Options};
use gguf::Gguf;
use model::{Arithmetic, Cancel, Model, NoObserver, Precision, Row, forward};
use store::Source;

/// Tokens of the sequences below: enough for the indexer to choose and for a window of 128 to end.
const TOKENS: usize = 150;

fn as_str(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// What stands on standard error below the lines that name the model and, if it is exact, the precision.
fn below_model(err: &str) -> &str {
    let (line, rest) = err.split_once('\n').unwrap();
    assert!(line.starts_with("model: ") && line.contains(" | encoding v4-"), "{err}");
    rest.strip_prefix("precision exact | experts resident\n").unwrap_or(rest)
}

fn tokens() -> Vec<u32> {
    (0..TOKENS as u32).map(|i| 3 + i * 37 % 500).collect()
}

/// What `infall logits` writes with these further arguments.
fn logits(further: &[&str]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let (input, out) = (dir.path().join("tokens.json"), dir.path().join("logits.npy"));
    std::fs::write(&input, format!("{:?}", tokens())).unwrap();
    let model = tiny("tiny-q4");
    let args = ["logits", "-m", as_str(&model), "--tokens", as_str(&input), "--out", as_str(&out)];
    assert!(run(&[&args, further].concat()).success().is_empty());
    std::fs::read(out).unwrap()
}

#[test]
fn logits_are_those_of_the_library() {
    let path = tiny("tiny-q4");
    let model = Model::from_gguf(&Gguf::open(&path).unwrap()).unwrap();
    for (name, arithmetic) in [("official", Arithmetic::Official), ("plain", Arithmetic::Plain)] {
        let options = Options { arithmetic, precision: Precision::Exact, ..Options::default() };
        let source = Source::open([(&path, std::fs::metadata(&path).unwrap().len())]).unwrap();
        let backend = CpuBackend::load(&model, &source, options, &mut |_| ()).unwrap();
        let row = |(position, token)| Row { session: 0, position, token, logits: true };
        let rows = tokens().into_iter().enumerate().map(row).collect();
        let mut state = model::Backend::new_state(&backend).unwrap();
        let expected = forward(&backend, rows, &mut [&mut state], &Cancel::default(), &mut NoObserver).unwrap();

        let file = logits(&["--arithmetic", name, "--exact"]);
        let (header, values) = file.split_at(file.len() - 4 * expected.len());
        let shape = format!("'descr': '<f4', 'fortran_order': False, 'shape': ({TOKENS}, 512), ");
        assert!(String::from_utf8_lossy(header).contains(&shape));
        let got: Vec<f32> = values.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        assert!(got == expected, "{name}: the values differ");
    }
}

#[test]
fn chunks_and_threads_change_no_byte() {
    let reference = logits(&["--chunk", "64", "--threads", "1"]);
    for other in
        [["--chunk", "1", "--threads", "1"], ["--chunk", "64", "--threads", "2"], ["--chunk", "7", "--threads", "2"]]
    {
        assert!(logits(&other) == reference, "{other:?}");
    }
}

#[test]
fn a_seed_gives_the_same_text_and_another_another() {
    let model = tiny("tiny-q4");
    let text = |seed: &str, threads: &str| {
        let args = ["run", "-m", as_str(&model), "--nothink", "-n", "25", "--seed", seed, "--threads", threads, "hi"];
        run(&args).success()
    };
    let first = text("1", "1");
    assert!(first.len() > 25 && first.ends_with(b"\n"));
    assert_eq!(first, text("1", "1"));
    assert_eq!(first, text("1", "2"), "threads change nothing");
    assert_ne!(first, text("2", "1"));
}

#[test]
fn a_new_seed_is_told_and_can_be_given_again() {
    let model = tiny("tiny-q4");
    let args = ["run", "-m", as_str(&model), "--nothink", "-n", "25", "hi"];
    let first = run(&args);
    let seed = first.err.split("seed ").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
    assert_eq!(run(&[&args[..], &["--seed", &seed]].concat()).out, first.out);
}

#[test]
fn a_prompt_on_standard_input_is_the_same_prompt() {
    let model = tiny("tiny-q4");
    let args = ["run", "-m", as_str(&model), "--nothink", "-n", "10", "--temp", "0"];
    let argument = run(&[&args[..], &["two\nlines"]].concat()).success();
    for input in ["two\nlines", "two\nlines\n", "two\nlines\r\n"] {
        assert_eq!(run_with_input(&[&args[..], &["-"]].concat(), input.as_bytes()).success(), argument, "{input:?}");
    }
    let raw = run_with_input(&[&args[..7], &["--raw", "--temp", "0", "-"]].concat(), b"x");
    assert_eq!(raw.code, Some(2), "--raw and --nothink exclude each other: {}", raw.err);
}

/// The template is `BOS <user> prompt <assistant> </think>`: written out and given with --raw it is the same prompt.
#[test]
fn raw_is_the_exact_text() {
    let model = tiny("tiny-q4");
    let common = ["run", "-m", as_str(&model), "-n", "12", "--temp", "0"];
    let answer = run(&[&common[..], &["--nothink", "hi"]].concat());
    let spelt = "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜></think>";
    let raw = run(&[&common[..], &["--raw", spelt]].concat());
    let prompt_tokens = |err: &str| err.lines().last().unwrap().split(" tokens").next().unwrap().to_owned();
    assert_eq!(prompt_tokens(&answer.err), prompt_tokens(&raw.err));
    let raw = String::from_utf8(raw.out).unwrap();
    assert!(raw.contains("</think>"), "what the model wrote, the tag included");
    let answer = String::from_utf8(answer.out).unwrap();
    assert_eq!(answer, raw + "\n", "an answer without reasoning is what the model wrote");
}

#[test]
fn reasoning_stays_out_of_a_pipe() {
    let model = tiny("tiny-q4");
    let common = ["run", "-m", as_str(&model), "-n", "12", "--temp", "0", "hi"];
    let thinking = run(&common);
    assert!(thinking.out.is_empty(), "this random model never ends its reasoning");
    assert!(
        below_model(&thinking.err).starts_with("<think>\n") && thinking.err.contains("\n</think>\n"),
        "{}",
        thinking.err
    );
    let answering = run(&[&common[..], &["--nothink"]].concat());
    assert!(!answering.out.is_empty() && below_model(&answering.err).starts_with("prompt "), "{}", answering.err);
    assert_eq!(answering.err.lines().count(), 2, "the model and one line of figures: {}", answering.err);
    assert!(answering.err.contains("generated 12 tokens") && answering.err.contains("weights +"), "{}", answering.err);
}

/// The answer that follows reasoning goes to standard output, without the tag between them.
#[test]
fn reasoning_and_answer_part_at_the_tag() {
    let model = tiny("tiny-iq2");
    let common = ["run", "--exact", "-m", as_str(&model), "-n", "80", "--temp", "0"];
    let raw = run(&[&common[..], &["--raw", "<｜begin▁of▁sentence｜><｜User｜>Hello<｜Assistant｜><think>"]].concat());
    let raw = String::from_utf8(raw.success()).unwrap();
    let (reasoning, answer) = raw.split_once("</think>").expect("this random model happens to end its reasoning");
    let ran = run(&[&common[..], &["Hello"]].concat());
    let shown = below_model(&ran.err);
    assert!(shown.starts_with(&format!("<think>\n{reasoning}\n</think>\n")), "{}", ran.err);
    assert_eq!(String::from_utf8(ran.success()).unwrap(), format!("{}\n", answer.replace("</think>", "")));
}

/// The two encodings differ in the text that asks for an effort, and in nothing else.
#[test]
fn the_encoding_decides_what_an_effort_adds() {
    let dir = tempfile::tempdir().unwrap();
    let july = dir.path().join("tiny-0731.gguf");
    std::fs::copy(tiny("tiny-q4"), &july).unwrap();
    let prompt_tokens = |model: &Path, further: &[&str]| {
        let ran = run(&[&["run", "-m", as_str(model), "-n", "0", "hi"], further].concat());
        let count = below_model(&ran.err).split_whitespace().nth(1).unwrap().parse::<usize>().unwrap();
        (ran.err.lines().next().unwrap().rsplit_once("encoding ").unwrap().1.to_owned(), count)
    };
    let april = tiny("tiny-q4");
    let (line, plain) = prompt_tokens(&april, &[]);
    assert_eq!(line, "v4-2604 (guessed from the file's name)");
    assert_eq!(prompt_tokens(&july, &[]), ("v4-0731 (guessed from the file's name)".to_owned(), plain));
    assert_eq!(prompt_tokens(&april, &["--effort", "high"]).1, plain);
    let (line, high) = prompt_tokens(&april, &["--effort", "high", "--encoding", "v4-0731"]);
    assert!(line == "v4-0731" && high > plain + 70, "{line}, {high} tokens");
    assert_eq!(prompt_tokens(&july, &["--effort", "high"]).1, high);
    assert_eq!(prompt_tokens(&april, &["--effort", "max"]).1, high, "one text under two names");
    assert!(prompt_tokens(&july, &["--effort", "max"]).1 > high);
    assert_eq!(prompt_tokens(&july, &["--effort", "low"]).1, plain);

    let ran = run(&["run", "-m", as_str(&april), "--effort", "low", "hi"]);
    assert!(
        ran.code == Some(1) && ran.err.contains("effort `low` is not known to weights of the encoding v4-2604"),
        "{}",
        ran.err
    );
    let ran = run(&["run", "--nothink", "--effort", "max", "hi"]);
    assert_eq!(ran.code, Some(2), "{}", ran.err);
}

#[test]
fn a_system_text_comes_from_the_command_line_or_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("system.txt");
    std::fs::write(&file, "Be brief.").unwrap();
    let model = tiny("tiny-q4");
    let answer = |system: &str| {
        run(&["run", "-m", as_str(&model), "--nothink", "-n", "10", "--temp", "0", "--system", system, "hi"])
    };
    let spelt = "<｜begin▁of▁sentence｜>Be brief.<｜User｜>hi<｜Assistant｜></think>";
    let raw = run(&["run", "-m", as_str(&model), "-n", "10", "--temp", "0", "--raw", spelt]).success();
    let expected = String::from_utf8(raw).unwrap() + "\n";
    assert_eq!(String::from_utf8(answer("Be brief.").success()).unwrap(), expected);
    assert_eq!(String::from_utf8(answer(&format!("@{}", as_str(&file))).success()).unwrap(), expected);
    let missing = answer("@/nowhere");
    assert!(missing.code == Some(1) && missing.err.contains("cannot read /nowhere"), "{}", missing.err);
}

#[test]
fn the_built_in_model_says_what_it_is() {
    let ran = run(&["run", "-n", "3", "--nothink", "hi"]);
    assert!(ran.err.starts_with("model: the built-in nano, a small test model") && ran.err.contains("-m FILE"));
    assert!(!ran.err.contains("seed"), "temperature 0 needs none: {}", ran.err);
    ran.success();
}

/// A model and a prompt whose likeliest continuation is thousands of tokens long.
fn long_generation() -> Vec<String> {
    let model = tiny("tiny-iq2");
    ["run", "-m", as_str(&model), "--nothink", "--temp", "0", "--threads", "1", "Hello"].map(str::to_owned).to_vec()
}

#[test]
fn an_interrupt_ends_a_generation_and_keeps_what_was_printed() {
    let mut child = infall(&long_generation()).spawn().unwrap();
    let mut begun = [0; 20];
    child.stdout.as_mut().unwrap().read_exact(&mut begun).unwrap();
    let start = Instant::now();
    signal(child.id(), "INT");
    let ran = finish(child);
    assert!(start.elapsed() < Duration::from_secs(2), "it took {:?} to stop", start.elapsed());
    assert_eq!(ran.code, Some(130), "{}", ran.err);
    assert!(ran.err.contains("| interrupted") && ran.err.contains("generated"), "{}", ran.err);
    assert!(ran.out.ends_with(b"\n"));
}

#[test]
fn a_reader_that_goes_away_ends_it_quietly() {
    let mut child = infall(&long_generation()).spawn().unwrap();
    let mut begun = [0; 20];
    child.stdout.take().unwrap().read_exact(&mut begun).unwrap();
    let ran = finish(child);
    assert_eq!((ran.code, below_model(&ran.err)), (Some(0), ""));

    let model = tiny("tiny-q4");
    let closed = infall(&["inspect", as_str(&model)]).stdout(Stdio::piped()).spawn();
    let mut child = closed.unwrap();
    drop(child.stdout.take());
    let ran = finish(child);
    assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""));
}

/// Reasoning and figures that nobody reads, or that find the disk full, take nothing from the answer.
#[cfg(target_os = "linux")]
#[test]
fn standard_error_that_cannot_be_written_loses_no_answer() {
    let model = tiny("tiny-iq2");
    let args = ["run", "--exact", "-m", as_str(&model), "-n", "80", "--temp", "0", "Hello"];
    let expected = run(&args).success();
    assert!(expected.len() > 1, "this random model happens to end its reasoning");
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    assert!(finish(infall(&args).stderr(full).spawn().unwrap()).success() == expected);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    assert!(finish(infall(&args).stderr(writer).spawn().unwrap()).success() == expected);
}

#[test]
fn logits_can_go_into_a_pipe() {
    let dir = tempfile::tempdir().unwrap();
    let (input, out) = (dir.path().join("tokens.json"), dir.path().join("logits.npy"));
    std::fs::write(&input, "[0, 5, 7]").unwrap();
    let model = tiny("tiny-q4");
    let to = |out: &str| run(&["logits", "-m", as_str(&model), "--tokens", as_str(&input), "--out", out]).success();
    assert!(to(as_str(&out)).is_empty());
    assert!(to("/dev/stdout") == std::fs::read(&out).unwrap());

    let args = ["logits", "-m", as_str(&model), "--tokens", as_str(&input), "--out", "/dev/stdout"];
    let mut child = infall(&args).spawn().unwrap();
    drop(child.stdout.take());
    let ran = finish(child);
    assert!(ran.code == Some(1) && ran.err.contains("cannot write to /dev/stdout"), "{:?} {}", ran.code, ran.err);
}

#[test]
fn prompt_and_answer_together_fit_the_context() {
    let model = tiny("tiny-iq2");
    let common = ["run", "-m", as_str(&model), "--nothink", "--temp", "0", "Hello"];
    let prompt = run(&[&common[..], &["-n", "0"]].concat()).err;
    let prompt: usize = below_model(&prompt).split_whitespace().nth(1).unwrap().parse().unwrap();
    for (answer, said) in [(0, "0 tokens |"), (1, "1 token |"), (2, "2 tokens at ")] {
        let context = (prompt + answer).to_string();
        let err = run(&[&common[..], &["--ctx", &context]].concat()).err;
        assert!(err.contains(&format!("generated {said}")) && err.contains("the context is full"), "{err}");
    }
}

#[test]
fn interrupted_logits_leave_the_folder_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (input, out) = (dir.path().join("tokens.json"), dir.path().join("logits.npy"));
    std::fs::write(&input, format!("{:?}", vec![5; 4096])).unwrap();
    std::fs::write(&out, "older").unwrap();
    let model = tiny("tiny-q4");
    let args = ["logits", "-m", as_str(&model), "--tokens", as_str(&input), "--out", as_str(&out), "--chunk", "1"];
    let child = infall(&args).spawn().unwrap();
    let entries = || std::fs::read_dir(&dir).unwrap().count();
    let has_begun = || entries() == 3;
    let start = Instant::now();
    while !has_begun() {
        assert!(start.elapsed() < Duration::from_secs(30), "nothing is written");
        std::thread::sleep(Duration::from_millis(5));
    }
    signal(child.id(), "INT");
    let ran = finish(child);
    assert_eq!((ran.code, ran.err.as_str()), (Some(130), "precision fast | experts resident\n"));
    assert_eq!((entries(), std::fs::read(&out).unwrap().as_slice()), (2, b"older".as_slice()));
}

#[test]
fn inspect_counts_every_byte() {
    for name in ["tiny-iq2", "tiny-q4", "tiny-q8", "mixed3-mixed", "pro-iq2"] {
        let path = tiny(name);
        let report: serde_json::Value =
            serde_json::from_slice(&run(&["inspect", "--json", "--check", as_str(&path)]).success()).unwrap();
        let expected: u64 = Gguf::open(&path).unwrap().tensors.iter().map(|t| t.size_bytes().unwrap()).sum();
        let classes = report["classes"].as_array().unwrap();
        assert_eq!(classes.iter().map(|class| class["bytes"].as_u64().unwrap()).sum::<u64>(), expected);
        assert_eq!(report["total"]["bytes"], expected);
        assert!(classes.iter().all(|class| class["class"] != "other"), "{name}: {classes:?}");
        assert_eq!(report["check"]["damaged"].as_array().unwrap().len(), 0);
        assert_eq!(report["metadata"]["general.architecture"], "deepseek4");
    }
}

/// Multi-token-prediction weights, in the two forms that files have them, change nothing.
#[test]
fn drafting_weights_are_named_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("with-mtp.gguf");
    let extra = [("mtp.0.e_proj.weight", vec![256, 256]), ("dspark.1.norm.weight", vec![256])];
    common::rewrite_with(&tiny("tiny-q4"), &path, &[], |_, _| Change::Keep, &extra);
    let table = String::from_utf8(run(&["inspect", as_str(&path)]).success()).unwrap();
    for word in ["MTP and DSpark", "left alone", "mtp.0.e_proj.weight", "dspark.1.norm.weight", "can run"] {
        assert!(table.contains(word), "{word:?} in {table}");
    }
    let text = |path: &Path| run(&["run", "-m", as_str(path), "--nothink", "-n", "10", "--seed", "1", "hi"]).success();
    assert_eq!(text(&path), text(&tiny("tiny-q4")));
    rewrite(&tiny("tiny-q4"), &path, &[], |_, _| Change::Keep);
    assert!(!String::from_utf8(run(&["inspect", as_str(&path)]).success()).unwrap().contains("left alone"));
}

/// Names in a file are text of a stranger: they can neither forge a line nor reach the terminal as control characters.
#[test]
fn names_from_a_file_are_escaped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("forged.gguf");
    let name = "mtp.a\nthis program\x1b[2J\u{9b}31m";
    let key = [(name, gguf::Value::from("a\n\x1b\u{9b}"))];
    common::rewrite_with(&tiny("tiny-q4"), &path, &key, |_, _| Change::Keep, &[(name, vec![256])]);
    let text = |flags: &[&str]| {
        let text = String::from_utf8(run(&[&["inspect", as_str(&path)], flags].concat()).success()).unwrap();
        assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");
        text
    };
    let table = text(&["--check"]);
    assert_eq!(table.matches(r"mtp.a\nthis program\u{1b}[2J\u{9b}31m").count(), 2, "{table}");
    assert!(!table.lines().any(|line| line.starts_with("this program\x1b")), "{table}");
    let report: serde_json::Value = serde_json::from_str(&text(&["--json"])).unwrap();
    assert_eq!((&report["left_alone"][0], &report["metadata"][name]), (&name.into(), &"a\n\x1b\u{9b}".into()));
}
