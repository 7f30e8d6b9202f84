//! Runs the real binary, and makes model files with something changed in them.
#![allow(dead_code, reason = "each test binary uses its own part of this")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use gguf::{Gguf, TensorInfo, TensorType, Value, Writer};

/// No command of these tests may take longer.
const TIME_LIMIT: Duration = Duration::from_secs(120);

/// A small random model that `scripts/test-data` makes.
pub fn tiny(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../target/test-data/oracle/{name}.gguf"));
    assert!(path.exists(), "{} is missing: run scripts/test-data first", path.display());
    path
}

/// What a command left behind.
pub struct Ran {
    pub code: Option<i32>,
    pub out: Vec<u8>,
    pub err: String,
}

impl Ran {
    /// Standard output, of a command that succeeded.
    pub fn success(self) -> Vec<u8> {
        assert_eq!(self.code, Some(0), "{}", self.err);
        self.out
    }
}

/// The binary with these arguments.
pub fn infall<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_infall"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs it to its end.
pub fn run(args: &[&str]) -> Ran {
    finish(infall(args).spawn().unwrap())
}

/// Runs it with `input` on standard input.
pub fn run_with_input(args: &[&str], input: &[u8]) -> Ran {
    let mut child = infall(args).stdin(Stdio::piped()).spawn().unwrap();
    // A command that refuses its arguments does not read.
    let _ = child.stdin.take().unwrap().write_all(input);
    finish(child)
}

/// Waits for the end of a command, within the time limit.
pub fn finish(child: std::process::Child) -> Ran {
    let id = child.id();
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    let Ok(output) = receiver.recv_timeout(TIME_LIMIT) else {
        signal(id, "KILL");
        panic!("the command took longer than {TIME_LIMIT:?}");
    };
    let output = output.unwrap();
    let err = String::from_utf8(output.stderr).expect("what infall says is UTF-8");
    assert!(!err.contains("panicked"), "{err}");
    Ran { code: output.status.code(), out: output.stdout, err }
}

/// Sends a signal by its name.
pub fn signal(process: u32, name: &str) {
    assert!(Command::new("kill").args(["-s", name, &process.to_string()]).status().unwrap().success());
}

/// What becomes of a tensor.
pub enum Change {
    Keep,
    Drop,
    /// Other bytes, of the same number.
    Data(Vec<u8>),
    /// Another shape and type, with zeros for data.
    Shape(Vec<u64>, TensorType),
}

/// Writes the model `from` to `to` with keys set, and tensors changed by `change`, which is given a tensor and its
/// bytes.
pub fn rewrite(from: &Path, to: &Path, keys: &[(&str, Value)], change: impl Fn(&TensorInfo, &[u8]) -> Change) {
    rewrite_with(from, to, keys, change, &[]);
}

/// The same with further tensors of zeros, by name and dimensions.
pub fn rewrite_with(
    from: &Path,
    to: &Path,
    keys: &[(&str, Value)],
    change: impl Fn(&TensorInfo, &[u8]) -> Change,
    extra: &[(&str, Vec<u64>)],
) {
    let image = std::fs::read(from).unwrap();
    let model = Gguf::parse("the model to change", &image).unwrap();
    let mut writer = Writer::new();
    for (key, value) in model.metadata.iter() {
        writer.set(key, value.clone()).unwrap();
    }
    for (key, value) in keys {
        writer.set(key, value.clone()).unwrap();
    }
    let mut data = Vec::new();
    for tensor in model.tensors.iter() {
        let bytes = &image[tensor.offset as usize..][..tensor.size_bytes().unwrap() as usize];
        let (dims, ty, bytes) = match change(tensor, bytes) {
            Change::Drop => continue,
            Change::Keep => (tensor.dims.clone(), tensor.ty, bytes.to_vec()),
            Change::Data(bytes) => (tensor.dims.clone(), tensor.ty, bytes),
            Change::Shape(dims, ty) => (dims, ty, Vec::new()),
        };
        writer.tensor(&tensor.name, &dims, ty).unwrap();
        data.push(bytes);
    }
    for (name, dims) in extra {
        writer.tensor(name, dims, TensorType::F32).unwrap();
        data.push(Vec::new());
    }
    let mut out = std::fs::File::create(to).unwrap();
    let mut data = data.into_iter();
    writer
        .write(&mut std::io::BufWriter::new(&mut out), |tensor, out| {
            let mut bytes = data.next().unwrap();
            bytes.resize(tensor.size_bytes().unwrap() as usize, 0);
            out.write_all(&bytes)
        })
        .unwrap();
}
