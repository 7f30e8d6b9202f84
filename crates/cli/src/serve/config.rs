//! What a server is started with: a configuration file, and flags that win over it.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use text::prompt::Encoding;

use crate::flags;
use crate::{setup, sizes};

/// Most bytes of a configuration file.
const MOST_BYTES: u64 = 1 << 20;

/// Everything that can be set. Amounts of memory are written as on the command line.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The model's file; none for the built-in nano.
    pub model: Option<PathBuf>,
    /// The prompt format, if not as the file's name suggests.
    pub encoding: Option<String>,
    /// Tokens of context of each session.
    pub ctx: Option<usize>,
    /// Conversations held in memory.
    pub sessions: NonZeroUsize,
    /// Requests that may wait.
    pub queue: usize,
    /// Where conversations are kept.
    pub snapshot_dir: Option<PathBuf>,
    /// Most bytes there.
    pub snapshot_dir_max: String,
    /// As `--exact`.
    pub exact: bool,
    /// As `--stream`.
    pub stream: bool,
    /// As `--device`.
    pub device: String,
    /// As `--cache`.
    pub cache: Option<String>,
    /// As `--memory`.
    pub memory: Option<String>,
    /// As `--gpu-memory`.
    pub gpu_memory: Option<String>,
    /// As `--lock`.
    pub lock: bool,
    /// As `--threads`.
    pub threads: Option<u16>,
    /// How it serves.
    pub server: server::Options,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            model: None,
            encoding: None,
            ctx: None,
            sessions: NonZeroUsize::new(4).expect("4 is not 0"),
            queue: 64,
            snapshot_dir: None,
            snapshot_dir_max: "8GiB".into(),
            exact: false,
            stream: false,
            device: "auto".into(),
            cache: None,
            memory: None,
            gpu_memory: None,
            lock: false,
            threads: None,
            server: server::Options::default(),
        }
    }
}

impl Config {
    /// What the flags say, and where they say nothing, what the file that they name says.
    ///
    /// # Errors
    /// The file cannot be read, or has what no server takes.
    pub fn new(flags: &flags::Serve) -> anyhow::Result<Config> {
        let mut config = flags.config.as_deref().map_or(Ok(Config::default()), read)?;
        config.follow(flags);
        config.server.validate()?;
        Ok(config)
    }

    fn follow(&mut self, flags: &flags::Serve) {
        let server = &mut self.server;
        over(&mut self.model, &flags.model);
        over(&mut self.encoding, &flags.encoding.map(|encoding| encoding.to_string()));
        over(&mut self.ctx, &flags.context_tokens);
        over(&mut self.snapshot_dir, &flags.snapshot_dir);
        self.sessions = flags.sessions.unwrap_or(self.sessions);
        self.queue = flags.queue.unwrap_or(self.queue);
        if let Some(bytes) = flags.snapshot_dir_max {
            self.snapshot_dir_max = bytes.to_string();
        }
        server.host = flags.host.unwrap_or(server.host);
        server.port = flags.port.unwrap_or(server.port);
        if flags.api_key.is_some() || flags.api_key_file.is_some() {
            (server.api_key, server.api_key_file) = (flags.api_key.clone(), flags.api_key_file.clone());
        }
        server.allowed_origins.extend(flags.cors.iter().cloned());
        over(&mut server.tls_certificate, &flags.tls_certificate);
        over(&mut server.tls_key, &flags.tls_key);
        over(&mut server.trace, &flags.trace);
    }

    /// The file's settings of the machine, where the flags have none.
    ///
    /// # Errors
    /// An amount or a device that cannot be read.
    pub fn machine(&self, flags: &flags::Machine) -> anyhow::Result<flags::Machine> {
        let wrong = |name: &str, error: String| anyhow::anyhow!("{name} in the configuration: {error}");
        let bytes = |name: &str, text: &Option<String>| {
            text.as_deref().map(sizes::bytes).transpose().map_err(|error| wrong(name, error))
        };
        let cache = self.cache.as_deref().map(sizes::cache).transpose().map_err(|error| wrong("cache", error))?;
        let device = self.device.parse().map_err(|error| wrong("device", error))?;
        Ok(flags::Machine {
            exact: flags.exact || self.exact && !flags.fast,
            fast: flags.fast,
            stream: flags.stream || self.stream,
            device: if flags.device == Default::default() { device } else { flags.device },
            cache: flags.cache.or(cache),
            memory: flags.memory.or(bytes("memory", &self.memory)?),
            gpu_memory: flags.gpu_memory.or(bytes("gpu_memory", &self.gpu_memory)?),
            lock: flags.lock || self.lock,
            threads: flags.threads.or(self.threads),
        })
    }

    /// The prompt format that is asked for, if any.
    ///
    /// # Errors
    /// There is no such format.
    pub fn encoding(&self) -> anyhow::Result<Option<Encoding>> {
        Ok(self.encoding.as_deref().map(str::parse).transpose()?)
    }

    /// Most bytes of snapshots.
    ///
    /// # Errors
    /// The amount cannot be read.
    pub fn snapshot_bytes(&self) -> anyhow::Result<u64> {
        sizes::bytes(&self.snapshot_dir_max)
            .map_err(|error| anyhow::anyhow!("snapshot_dir_max in the configuration: {error}"))
    }

    /// The whole as a file, without the key.
    ///
    /// # Errors
    /// A path that is not UTF-8.
    pub fn text(&self) -> anyhow::Result<String> {
        Ok(toml::to_string_pretty(self)?)
    }
}

fn over<T: Clone>(setting: &mut Option<T>, flag: &Option<T>) {
    if flag.is_some() {
        setting.clone_from(flag);
    }
}

fn read(path: &Path) -> anyhow::Result<Config> {
    toml::from_str(&setup::read_text(path, MOST_BYTES)?)
        .map_err(|error| anyhow::anyhow!("{}: {error}`infall serve --print-config` shows every name", path.display()))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn flags(arguments: &[&str]) -> flags::Serve {
        let all = ["infall", "serve"].iter().chain(arguments);
        match flags::Flags::try_parse_from(all).unwrap_or_else(|error| panic!("{error}")).command {
            flags::Command::Serve(serve) => serve,
            _ => unreachable!("it was asked to serve"),
        }
    }

    #[test]
    fn what_is_printed_can_be_read_and_flags_win() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("infall.toml");
        let asked =
            flags(&["--port", "81", "--exact", "--memory", "3GiB", "--sessions", "2", "--cors", "https://a.org"]);
        let printed = Config { memory: Some("1GiB".into()), queue: 3, ..Config::new(&asked).unwrap() };
        std::fs::write(&path, printed.text().unwrap()).unwrap();
        let again = flags(&["--config", path.to_str().unwrap(), "--port", "82", "--fast"]);
        let config = Config::new(&again).unwrap();
        assert_eq!((config.server.port, config.sessions.get(), config.queue), (82, 2, 3));
        assert_eq!(config.server.allowed_origins, ["https://a.org"]);
        let machine = config.machine(&again.machine).unwrap();
        assert_eq!((machine.exact, machine.memory), (false, Some(1 << 30)));
    }

    #[test]
    fn a_name_that_is_none_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("infall.toml");
        std::fs::write(&path, "prot = 80").unwrap();
        let error = Config::new(&flags(&["--config", path.to_str().unwrap()])).unwrap_err().to_string();
        assert!(error.contains("prot") && error.contains("--print-config"), "{error}");
    }
}
