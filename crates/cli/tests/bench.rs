//! `infall bench` as a program, on the built-in nano and a small random model.

mod common;

use std::io::Read;
use std::path::Path;
use std::process::Stdio;

use common::{finish, infall, run, signal, tiny};

/// Lengths at which the runs below measure.
const LENGTHS: [&str; 7] = ["--ctx-start", "40", "--ctx-max", "300", "--step-mul", "2.5", "--gen-tokens"];

/// Values by column, one line for each length.
struct Csv(Vec<Vec<(String, String)>>);

impl Csv {
    fn read(path: &Path) -> Csv {
        let text = std::fs::read_to_string(path).unwrap();
        let mut lines = text.lines().map(|line| line.split(',').map(str::to_owned).collect::<Vec<_>>());
        let head = lines.next().unwrap();
        let line = |fields: Vec<String>| {
            assert_eq!(fields.len(), head.len(), "{fields:?}");
            head.iter().cloned().zip(fields).collect()
        };
        Csv(lines.map(line).collect())
    }

    fn column(&self, name: &str) -> Vec<&str> {
        let value = |line: &Vec<(String, String)>| line.iter().position(|(column, _)| column == name);
        self.0.iter().map(|line| line[value(line).unwrap_or_else(|| panic!("no {name}"))].1.as_str()).collect()
    }

    fn numbers(&self, name: &str) -> Vec<f64> {
        self.column(name).into_iter().map(|value| value.parse().unwrap()).collect()
    }
}

/// The table and the values of a run that generates so many tokens at each length.
fn bench(generated: &str, further: &[&str]) -> (String, Csv) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("figures.csv");
    let args = [&["bench"], &LENGTHS[..], &[generated, "--csv", path.to_str().unwrap()], further].concat();
    let table = String::from_utf8(run(&args).success()).unwrap();
    (table, Csv::read(&path))
}

#[test]
fn every_length_has_its_line_and_its_figures() {
    let dir = tempfile::tempdir().unwrap();
    let svg = dir.path().join("speed.svg");
    let (table, csv) = bench("5", &["--plot", svg.to_str().unwrap(), "--threads", "1"]);
    assert_eq!(csv.column("context_tokens"), ["40", "100", "250", "300"]);
    assert_eq!(csv.column("prefill_tokens"), ["40", "60", "150", "50"]);
    assert_eq!(csv.column("decode_tokens"), ["5"; 4]);

    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].starts_with("the built-in nano: ") && lines[0].contains("1 threads read memory at "), "{table}");
    for (line, (context, speed)) in
        lines[2..].iter().zip(csv.column("context_tokens").iter().zip(csv.numbers("decode_tokens_per_s")))
    {
        let fields: Vec<&str> = line.split_whitespace().collect();
        assert_eq!((fields[0], fields[2]), (*context, format!("{speed:.2}").as_str()), "{table}");
    }
    assert_eq!(lines.len(), 2 + 4);

    // What is told twice agrees.
    let numbers = |name| csv.numbers(name);
    for i in 0..4 {
        let read = numbers("weight_bytes_per_token")[i] + numbers("row_bytes_per_token")[i];
        let speed = read * numbers("decode_tokens_per_s")[i];
        assert!((speed / numbers("read_bytes_per_s")[i] - 1.0).abs() < 1e-9);
        assert!((speed / numbers("sweep_bytes_per_s")[i] / numbers("share_of_sweep")[i] - 1.0).abs() < 1e-9);
        assert!(numbers("prefill_tokens_per_s")[i] > 0.0 && numbers("decode_mean_tokens_per_s")[i] > 0.0);
        assert_eq!(numbers("disk_bytes_per_token")[i], 0.0, "experts are resident");
    }
    for name in ["session_bytes", "row_bytes_per_token"] {
        assert!(numbers(name).is_sorted() && numbers(name)[0] < numbers(name)[3], "{name} grows: {:?}", numbers(name));
    }

    let svg = std::fs::read_to_string(svg).unwrap();
    assert_is_xml(&svg);
    assert_eq!((svg.matches("<polyline").count(), svg.matches("<circle").count()), (2, 2 * 4), "{svg}");
    let (x, y): (Vec<f64>, Vec<f64>) =
        svg.split("<circle ").skip(1).map(|circle| (cx(circle, "cx"), cx(circle, "cy"))).unzip();
    assert!(x[..4].is_sorted() && y.iter().all(|y| (60.0..=360.0).contains(y)), "{svg}");
}

/// The number of an attribute.
fn cx(element: &str, name: &str) -> f64 {
    element.split(&format!("{name}=\"")).nth(1).unwrap().split('"').next().unwrap().parse().unwrap()
}

/// Whether every element is closed, in order, and no `<` or `&` is anything else.
fn assert_is_xml(text: &str) {
    let mut open = Vec::new();
    for part in text.split('<').skip(1) {
        let (tag, content) = part.split_once('>').expect("a tag ends");
        assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
        assert!(!content.contains('>'), "{content}");
        let entities = content.matches('&').count();
        assert_eq!(
            entities,
            ["&amp;", "&lt;", "&gt;"].map(|entity| content.matches(entity).count()).iter().sum::<usize>()
        );
        let name = tag.trim_end_matches('/').split_whitespace().next().unwrap();
        match (tag.strip_prefix('/'), tag.ends_with('/')) {
            (Some(closed), _) => assert_eq!(open.pop(), Some(closed.to_owned()), "{text}"),
            (None, true) => (),
            (None, false) => open.push(name.to_owned()),
        }
    }
    assert!(open.is_empty(), "{open:?}");
}

/// What is generated at one length changes nothing at the next, nor does where experts are or how many threads compute.
#[test]
fn logits_are_those_of_a_run_that_generates_nothing_else() {
    let model = tiny("tiny-q4");
    let model = ["-m", model.to_str().unwrap()];
    let hashes = |generated: &str, further: &[&str]| -> Vec<String> {
        let (_, csv) = bench(generated, &[&model, further].concat());
        csv.column("logits_xxh3").into_iter().map(str::to_owned).collect()
    };
    let few = hashes("1", &[]);
    assert_eq!(few.len(), 4);
    assert!(few.iter().all(|hash| hash.len() == 16) && few[0] != few[1]);
    assert_eq!(hashes("150", &[]), few);
    assert_eq!(hashes("20", &["--stream", "--cache", "2", "--threads", "1"]), few);
    let exact = hashes("1", &["--exact"]);
    assert_ne!(exact, few);
    assert_eq!(hashes("70", &["--exact", "--stream", "--cache", "1"]), exact);
}

#[test]
fn streaming_tells_what_the_disk_gave() {
    let model = tiny("tiny-q4");
    let args = ["-m", model.to_str().unwrap(), "--stream", "--cache", "1"];
    let (_, csv) = bench("4", &args);
    assert!(csv.numbers("disk_bytes_per_token").into_iter().all(|bytes| bytes > 0.0));
}

#[test]
fn bad_arguments_are_told_before_anything_is_measured() {
    let refused = |args: &[&str]| {
        let ran = run(&[&["bench"], args].concat());
        assert!(ran.out.is_empty());
        (ran.code.unwrap(), ran.err)
    };
    for (args, said) in [
        (["--ctx-start", "0"], "expected a whole number from 1"),
        (["--gen-tokens", "0"], "expected a whole number from 1"),
        (["--step-mul", "1"], "expected a finite number above 1"),
        (["--step-mul", "nan"], "expected a finite number above 1"),
        (["--ctx-max", "-3"], "expected a whole number from 1"),
    ] {
        let (code, err) = refused(&args);
        assert!(code == 2 && err.contains(said), "{err}");
    }
    for (args, said) in [
        (&["--ctx-start", "20", "--ctx-max", "10"][..], "expected at least the 20 of --ctx-start"),
        (&["--ctx-max", "99999999"], "for which the model was made"),
        (&["--memory", "1MiB"], "Allow at least "),
        (&["-m", "/no/such/file"], "/no/such/file"),
        (&["--csv", "/no/such/folder/figures.csv"], "cannot write to /no/such/folder/figures.csv"),
    ] {
        let (code, err) = refused(args);
        assert!(code == 1 && err.contains(said), "{err}");
    }
    let model = tiny("tiny-q4");
    let model = model.to_str().unwrap();
    let (code, err) = refused(&["-m", model, "--plot", model]);
    assert!(code == 1 && err.contains("itself, which is read"), "{err}");
}

/// Ctrl-C after the first lines: they are kept, in the table and in the file.
#[test]
fn an_interrupt_keeps_what_was_measured() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("figures.csv");
    let args = ["bench", "--ctx-start", "10", "--gen-tokens", "5", "--step-mul", "1.01", "--ctx-max", "1000", "--csv"];
    let args = [&args[..], &[path.to_str().unwrap(), "--exact", "--threads", "1"]].concat();
    let mut child = infall(&args).stdin(Stdio::null()).spawn().unwrap();
    let mut begun = Vec::new();
    while begun.iter().filter(|&&byte| byte == b'\n').count() < 4 {
        let mut byte = [0];
        child.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
        begun.extend(byte);
    }
    signal(child.id(), "INT");
    let ran = finish(child);
    assert_eq!(ran.code, Some(130), "{}", ran.err);
    let table = [begun, ran.out].concat();
    let measured = table.iter().filter(|&&byte| byte == b'\n').count() - 2;
    let csv = Csv::read(&path);
    assert!(measured < 500, "all of it was measured before the interrupt came");
    assert_eq!(csv.0.len(), measured);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
}
