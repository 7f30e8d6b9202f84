//! `infall serve` as its users start it, over real sockets.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStderr};
use std::time::{Duration, Instant};

use common::{infall, run, signal};

/// A server that runs until the test is over.
struct Serving {
    child: Child,
    address: String,
    log: BufReader<ChildStderr>,
}

impl Serving {
    fn new(args: &[&str]) -> Serving {
        let mut child = infall(&[&["serve", "--port", "0"], args].concat()).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        let address = loop {
            line.clear();
            assert!(log.read_line(&mut line).unwrap() > 0, "it ended before it served");
            if let Some((_, rest)) = line.split_once("http://") {
                break rest.split(' ').next().unwrap().to_owned();
            }
        };
        Serving { child, address, log }
    }

    /// The status and body of an answer.
    fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            self.address,
            body.len()
        );
        stream.write_all(&[head.as_bytes(), body.as_bytes()].concat()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    /// A turn of a conversation, as JSON messages: what the model says, and its usage.
    fn chat(&self, messages: &str) -> (String, serde_json::Value) {
        let body = format!(r#"{{"messages": [{messages}], "thinking": false, "temperature": 0, "max_tokens": 30}}"#);
        let (status, body) = self.ask("POST", "/v1/chat/completions", &body);
        assert_eq!(status, 200, "{body}");
        let answer: serde_json::Value = serde_json::from_str(&body).unwrap();
        (answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned(), answer["usage"].clone())
    }

    /// A figure of `/metrics`.
    fn figure(&self, name: &str) -> u64 {
        let (_, text) = self.ask("GET", "/metrics", "");
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ').map(str::to_owned));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
    }

    /// Ends it as `kill` does; what it logged.
    fn end(mut self) -> String {
        signal(self.child.id(), "TERM");
        let mut rest = String::new();
        self.log.read_to_string(&mut rest).unwrap();
        assert_eq!(self.child.wait().unwrap().code(), Some(0), "{rest}");
        rest
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const FIRST: &str = r#"{"role": "user", "content": "What is the capital of France? Please answer in one short sentence, as you always do, and then say where the sea is."}"#;

fn second(answer: &str) -> String {
    let answer = serde_json::to_string(answer).unwrap();
    format!(r#"{FIRST}, {{"role": "assistant", "content": {answer}}}, {{"role": "user", "content": "And of Italy?"}}"#)
}

/// The prompt and answer of the first turn are cached in the second: all but its last token, if it was cut.
fn assert_cached(first: &serde_json::Value, second: &serde_json::Value) {
    let total = first["total_tokens"].as_u64().unwrap();
    let cached = second["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached + 1 >= total, "{cached} of {total}");
}

#[test]
fn it_serves_and_ends_in_order() {
    let serving = Serving::new(&[]);
    assert_eq!(serving.ask("GET", "/health", "").0, 200);
    assert_eq!(serving.ask("GET", "/nothing", "").0, 404);
    let (answer, first) = serving.chat(FIRST);
    assert!(!answer.is_empty());
    let (_, again) = serving.chat(&second(&answer));
    assert_cached(&first, &again);
    assert_eq!(serving.figure("infall_requests_ended_total"), 2);
    let log = serving.end();
    assert!(log.lines().filter(|line| line.contains("chat")).count() == 2, "one line for each request: {log}");
    assert!(!log.contains("Italy"), "no prompt is logged: {log}");
}

#[test]
fn a_conversation_goes_on_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("sessions");
    let args = ["--snapshot-dir", dir.to_str().unwrap()];
    let serving = Serving::new(&args);
    let (answer, first) = serving.chat(FIRST);
    serving.end();
    let serving = Serving::new(&args);
    let (told, again) = serving.chat(&second(&answer));
    assert_cached(&first, &again);
    assert_eq!(serving.figure("infall_snapshots_loaded_total"), 1);
    assert_eq!(told, Serving::new(&[]).chat(&second(&answer)).0, "the same as if all had been read anew");
}

/// What was reported as saved is there after the power went.
#[test]
fn a_conversation_goes_on_after_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let args = ["--snapshot-dir", folder.path().to_str().unwrap()];
    let mut serving = Serving::new(&args);
    let (answer, first) = serving.chat(FIRST);
    let start = Instant::now();
    while serving.figure("infall_snapshots_saved_total") == 0 {
        assert!(start.elapsed() < Duration::from_secs(30), "a conversation that pauses is saved");
        std::thread::sleep(Duration::from_millis(100));
    }
    serving.child.kill().unwrap();
    serving.child.wait().unwrap();
    let (_, again) = Serving::new(&args).chat(&second(&answer));
    assert_cached(&first, &again);
}

#[test]
fn what_cannot_be_served_is_told_at_once() {
    let serving = Serving::new(&[]);
    let port = serving.address.rsplit(':').next().unwrap().to_owned();
    let refused = |args: &[&str], expected: &[&str]| {
        let ran = run(&[&["serve"], args].concat());
        assert_eq!(ran.code, Some(1), "{args:?}: {}", ran.err);
        for text in expected {
            assert!(ran.err.contains(text), "{args:?}: {}", ran.err);
        }
    };
    refused(&["--port", &port], &["listening at", &port]);
    refused(&["--host", "0.0.0.0", "--port", "0"], &["0.0.0.0", "API key"]);
    refused(&["--config", "/nowhere/infall.toml"], &["/nowhere/infall.toml"]);
    refused(&["--ctx", "100000000", "--port", "0"], &["100000000", "expected 1 to"]);
    refused(&["--tls-key", "key.pem", "--port", "0"], &["tls_certificate"]);
    refused(&["--snapshot-dir", "/proc/nothing", "--port", "0"], &["/proc/nothing"]);
    refused(&["--cors", "example.org", "--port", "0"], &["example.org", "origin"]);
}

#[test]
fn a_second_server_does_not_take_the_same_folder() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().to_str().unwrap();
    let _serving = Serving::new(&["--snapshot-dir", dir]);
    let ran = run(&["serve", "--port", "0", "--snapshot-dir", dir]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.err.contains("another"), "{}", ran.err);
}

#[test]
fn the_configuration_is_printed_without_the_key() {
    let ran = run(&["serve", "--print-config", "--api-key", "secret", "--sessions", "3"]);
    let text = String::from_utf8(ran.success()).unwrap();
    assert!(text.contains("sessions = 3") && text.contains("[server.limits]") && !text.contains("secret"), "{text}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("infall.toml");
    std::fs::write(&path, &text).unwrap();
    let again = run(&["serve", "--print-config", "--config", as_text(&path)]);
    assert_eq!(String::from_utf8(again.success()).unwrap(), text);
}

fn as_text(path: &Path) -> &str {
    path.to_str().unwrap()
}
