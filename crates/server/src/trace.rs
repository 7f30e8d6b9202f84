//! Requests, prompts and answers in full, in a file, for whoever asked for it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// The file.
pub struct Trace {
    file: Mutex<File>,
}

/// One request.
#[derive(Clone, Debug, Default)]
pub struct Entry {
    /// Its id.
    pub id: String,
    /// Where it was sent.
    pub path: &'static str,
    /// Its body as it came.
    pub request: String,
    /// The prompt that was made of it.
    pub prompt: String,
    /// How many tokens of the prompt a session held already, and how many there are.
    pub cached_tokens: usize,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// What was generated.
    pub generated: String,
    /// What became of it.
    pub result: String,
}

impl Trace {
    /// Opens the file, to write at its end. On Unix nobody else can read it.
    ///
    /// # Errors
    /// The system's.
    pub fn open(path: &Path) -> io::Result<Trace> {
        let mut options = OpenOptions::new();
        options.create(true).append(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        Ok(Trace { file: Mutex::new(options.open(path)?) })
    }

    /// Writes an entry.
    pub fn write(&self, entry: &Entry) {
        let Entry { id, path, request, prompt, cached_tokens, prompt_tokens, generated, result } = entry;
        let text = format!(
            "=== {id} {path}\n--- request\n{request}\n--- prompt ({cached_tokens} of {prompt_tokens} tokens cached)\n\
             {prompt}\n--- generated\n{generated}\n--- result\n{result}\n\n"
        );
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = file.write_all(text.as_bytes()) {
            tracing::warn!(%error, "writing the trace failed");
        }
    }
}
