//! A server on a free port, over the real engine and a backend whose model says what a test's keyword asks for.

#![allow(dead_code, reason = "not every test program needs all of it")]

#[path = "../../../session/tests/common/mod.rs"]
mod scripted;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use gguf::Gguf;
use model::Model;
use serde_json::Value;
use server::{Facts, Figures, Options, Shutdown, Wiring};
use session::database::Database;
use session::engine::{Engine, EngineOptions};
use session::replay::Replay;
use session::{Context, Vocabulary};
use text::prompt::Encoding;

use scripted::{Scripted, one_hot, tokenizer};

static NANO: &[u8] = include_bytes!("../../../../models/nano.gguf");

/// A keyword of the last user turn, and what the model then says after the opener of its turn, with `<think>` in front of it where
/// the turn was opened so. The first keyword that occurs counts.
pub const SCRIPTS: [(&str, &str); 6] = [
    ("garbled", "Sure.\n\n<｜DSML｜tool_calls>\nnonsense\n</｜DSML｜tool_calls>"),
    ("<tool_result>", "The weather is fine."),
    (
        "weather",
        "Let me look.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"weather\">\n\
         <｜DSML｜parameter name=\"city\" string=\"true\">Rome</｜DSML｜parameter>\n</｜DSML｜invoke>\n\
         <｜DSML｜invoke name=\"weather\">\n\
         <｜DSML｜parameter name=\"city\" string=\"true\">Oslo</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
    ),
    ("count", "one two three four five six seven eight nine ten"),
    ("json", "{\"answer\": 42}"),
    ("hello", "Hello there!"),
];

/// What the model reasons before it says anything.
pub const REASONING: &str = "Hmm, easy.";

/// How long the model takes for a token where the keyword is `slowly`; it then never ends.
const SLOW: Duration = Duration::from_millis(2);

/// The scripted model.
fn model() -> Scripted {
    let tokenizer = tokenizer();
    let (vocab, eos) = (tokenizer.vocab_size(), tokenizer.eos());
    let control = |text| tokenizer.control(text).unwrap();
    let (user, assistant, think) = (control("<｜User｜>"), control("<｜Assistant｜>"), control("<think>"));
    Scripted::new(move |tokens| {
        let Some(opener) = tokens.iter().rposition(|&token| token == assistant) else { return one_hot(vocab, eos) };
        let Some(&opened) = tokens.get(opener + 1) else { return one_hot(vocab, eos) };
        let from = tokens[..opener].iter().rposition(|&token| token == user).unwrap_or(0);
        let asked = String::from_utf8_lossy(&tokenizer.decode(&tokens[from..opener])).into_owned();
        if asked.contains("slowly") {
            thread::sleep(SLOW);
            return one_hot(vocab, tokenizer.encode(" so")[0]);
        }
        let said = SCRIPTS.iter().find(|(keyword, _)| asked.contains(keyword)).map_or("What?", |(_, said)| said);
        let said = if opened == think { format!("{REASONING}</think>{said}") } else { said.to_owned() };
        let script = tokenizer.encode_with_control(&said);
        one_hot(vocab, script.get(tokens.len() - opener - 2).copied().unwrap_or(eos))
    })
}

/// A server that runs until it is dropped.
pub struct Running {
    pub address: SocketAddr,
    pub engine: Engine,
    shutdown: Shutdown,
    threads: Vec<JoinHandle<()>>,
}

impl Running {
    /// One with these options, but for the port.
    pub fn new(options: Options) -> Running {
        let config = Model::from_gguf(&Gguf::parse("nano", NANO).unwrap()).unwrap().config;
        let context = Context::new(&config, Some(4096)).unwrap();
        let (engine, runner) = Engine::new(EngineOptions { context, sessions: 2, queue: 2 });
        let options = Options { port: 0, ..options };
        let listener = server::bind(&options).unwrap();
        let address = listener.local_addr().unwrap();
        let database = Database::in_memory();
        let wiring = Wiring {
            engine: engine.clone(),
            vocabulary: Arc::new(Vocabulary::new(Arc::new(tokenizer())).unwrap()),
            replay: Replay::new(&database, 1),
            database,
            facts: Facts {
                id: "deepseek-v4-nano".to_owned(),
                name: "DeepSeek V4 nano".to_owned(),
                encoding: Encoding::V4_2604,
                precision: "exact".to_owned(),
                arithmetic: "official".to_owned(),
                device: "script".to_owned(),
                experts: "resident".to_owned(),
                temperature: 0.0,
                file_bytes: NANO.len() as u64,
            },
            figures: Arc::new(Figures::default),
        };
        let shutdown = Shutdown::new();
        let asked = shutdown.clone();
        let threads = vec![
            thread::spawn(move || runner.run(&model(), None)),
            thread::spawn(move || server::serve(wiring, options, listener, &asked).unwrap()),
        ];
        Running { address, engine, shutdown, threads }
    }

    /// A connection.
    pub fn connect(&self) -> TcpStream {
        let socket = TcpStream::connect(self.address).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        socket
    }

    /// Sends a request's head, with the length of the body, and the body.
    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> TcpStream {
        let mut socket = self.connect();
        let mut head = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
        if !headers.iter().any(|(name, _)| *name == "host") {
            head.push_str("host: localhost\r\n");
        }
        headers.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
        head.push_str("\r\n");
        socket.write_all(head.as_bytes()).unwrap();
        // A server that refuses a large body closes before it has read all.
        let _ = socket.write_all(body);
        socket
    }

    /// The answer to a request.
    pub fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        Answer::read(self.send(method, path, headers, body))
    }

    /// The answer to a `POST` of JSON.
    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.ask("POST", path, &[("content-type", "application/json")], body.to_string().as_bytes())
    }

    /// The answer to a `GET`.
    pub fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, &[], b"")
    }

    /// Waits until the engine has nothing to do.
    pub fn wait_until_idle(&self) {
        for _ in 0..3000 {
            let stats = self.engine.stats();
            if stats.active == 0 && stats.waiting == 0 {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("the engine is still busy: {:?}", self.engine.stats());
    }

    /// Asks the server to stop.
    pub fn stop(&self) {
        self.shutdown.trigger();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shutdown.trigger();
        let results: Vec<_> = self.threads.drain(..).map(JoinHandle::join).collect();
        if !thread::panicking() {
            results.into_iter().for_each(|result| result.unwrap());
        }
    }
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    /// Reads it to its end.
    pub fn read(mut socket: TcpStream) -> Answer {
        let mut bytes = Vec::new();
        // What came before a reset counts.
        let _ = socket.read_to_end(&mut bytes);
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").expect("a head");
        let head = String::from_utf8(bytes[..end].to_vec()).unwrap().to_lowercase();
        let body = &bytes[end + 4..];
        let is_chunked = head.contains("transfer-encoding: chunked");
        let body = if is_chunked { unchunked(body) } else { body.to_vec() };
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Answer { status, head, body: String::from_utf8(body).unwrap() }
    }

    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    /// The data of a stream's frames that are JSON.
    pub fn frames(&self) -> Vec<Value> {
        let data = self.body.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
        data.map(|data| serde_json::from_str(data).unwrap()).collect()
    }
}

/// A body without the marks of its chunks.
fn unchunked(mut bytes: &[u8]) -> Vec<u8> {
    let mut whole = Vec::new();
    while let Some(end) = bytes.windows(2).position(|two| two == b"\r\n") {
        let length = usize::from_str_radix(std::str::from_utf8(&bytes[..end]).unwrap(), 16).unwrap();
        if length == 0 || bytes.len() < end + 4 + length {
            break;
        }
        whole.extend_from_slice(&bytes[end + 2..end + 2 + length]);
        bytes = &bytes[end + 4 + length..];
    }
    whole
}
