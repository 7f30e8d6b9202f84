//! Every command and flag. Help, and what docs/cli.md says, come from here.

use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use model::Precision;
use serde::{Deserialize, Serialize};
use store::plan::Cache;
use text::prompt::Encoding;

use crate::device::Asked;
use crate::sizes;

const EXIT_CODES: &str = "\
Exit codes:
  0    done, or the reader of the output went away
  1    an error; standard error says what was found, what was expected and what to do
  2    the command line was not understood
  130  interrupted with Ctrl-C";

/// Run DeepSeek V4 from a GGUF file.
#[derive(Parser)]
#[command(version, after_help = EXIT_CODES)]
pub struct Flags {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Subcommand)]
pub enum Command {
    /// Answer a prompt
    ///
    /// The answer streams to standard output. Reasoning is shown dimmed above it on a terminal; when standard output is
    /// no terminal, reasoning goes to standard error, so that a file or a pipe gets the answer alone. A last line on
    /// standard error gives speed and memory.
    Run(Run),
    /// Talk with a model
    ///
    /// Answers stream to standard output, reasoning dimmed above them. `/help` lists what can be typed besides messages.
    /// Where standard input is no terminal, each line of it is a message or a command.
    Chat(Chat),
    /// Serve a model to programs that speak OpenAI's or Anthropic's API, and a page to talk with it
    ///
    /// Listens at 127.0.0.1 unless told otherwise; off loopback it asks for an API key. Conversations are recognised and go on where they
    /// ended, after a restart too if there is a --snapshot-dir. docs/server.md shows how programs are set up.
    Serve(Serve),
    /// Show what a model file holds and whether it can be run
    ///
    /// Exits with 1 if the file would be refused.
    Inspect(Inspect),
    /// Write the logits of every position of a token sequence to a NumPy file
    Logits(Logits),
    /// Show what memory a model takes here, and how many of its experts are kept in it
    ///
    /// Reads the header only; a file that holds no more than its header will do.
    Plan(Plan),
    /// List GPUs: what they are, what they have, and whether models can run on them
    ///
    /// Their numbers are those that `--device gpu:N` takes.
    Devices(Devices),
    /// Write checksums of a model's experts beside it, which streaming then holds every read against
    ///
    /// Do it while the file is known to be right. The checksums are in a small file called like the model's (first) one
    /// with `.seal` at the end, and are used whenever the model's experts are streamed; remove it to stop that.
    Seal(Seal),
    /// Measure how fast a model reads and writes, by the length of its context
    ///
    /// The context is filled with pseudo-random tokens up to one length after the other. At each, reading is timed, tokens
    /// are generated and timed, and the session goes on as if they had not been.
    Bench(Bench),
    /// Check that a model does what it should
    #[command(subcommand)]
    Check(Check),
    /// Look at recorded routes
    #[command(subcommand)]
    Routes(Routes),
}

/// Flags of `run`.
#[derive(Args)]
pub struct Run {
    /// The prompt; `-` reads it from standard input (without its last line break)
    pub prompt: String,
    #[command(flatten)]
    pub talk: Talk,
    #[command(flatten)]
    pub stats: Stats,
    /// The prompt is the exact text the model reads, control tokens included; nothing is put around it, and what the
    /// model writes is printed exactly, control tokens included
    #[arg(long, conflicts_with_all = ["think", "nothink", "effort", "encoding", "system"])]
    pub raw: bool,
}

/// Flags of `chat`.
#[derive(Args)]
pub struct Chat {
    #[command(flatten)]
    pub talk: Talk,
    /// JSON file: an array of tools the model may call, as OpenAI's API has them; you are asked for their results
    #[arg(long, value_name = "FILE")]
    pub tools: Option<PathBuf>,
    /// Go on with a conversation that `/save` wrote; what it holds is not read again
    #[arg(long, value_name = "FILE", conflicts_with_all = ["system", "tools"])]
    pub load: Option<PathBuf>,
}

/// Flags of `serve`. A configuration file has the same and more, by the names that --print-config shows; flags win.
#[derive(Args)]
pub struct Serve {
    #[command(flatten)]
    pub machine: Machine,
    /// GGUF file of a DeepSeek V4 model; of a split model, any part (default: the built-in nano, a small test model)
    #[arg(short, long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Prompt format of the weights: v4-2604 (April 2026) or v4-0731 (31 July 2026) (default: v4-0731 if the file's name
    /// contains 0731, else v4-2604)
    #[arg(long, value_name = "ENCODING")]
    pub encoding: Option<Encoding>,
    /// Address to listen at (default: 127.0.0.1)
    #[arg(long, value_name = "ADDRESS")]
    pub host: Option<IpAddr>,
    /// Port to listen at; 0 takes any that is free (default: 8000)
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub port: Option<u16>,
    /// Key that clients must show; other users of the machine can see it here, which --api-key-file avoids
    #[arg(long, value_name = "KEY", conflicts_with = "api_key_file")]
    pub api_key: Option<String>,
    /// File that holds the key
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Tokens of context of each session (default: 131072, or what the model was made for)
    #[arg(long = "ctx", value_name = "N", allow_negative_numbers = true, value_parser = whole::<usize>)]
    pub context_tokens: Option<usize>,
    /// Conversations that are held in memory, and answered at the same time (default: 4)
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = positive)]
    pub sessions: Option<NonZeroUsize>,
    /// Requests that may wait for one of them (default: 64)
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = whole::<usize>)]
    pub queue: Option<usize>,
    /// Folder in which conversations are kept, so that they go on after a restart
    #[arg(long, value_name = "DIR")]
    pub snapshot_dir: Option<PathBuf>,
    /// Most bytes of it (default: 8GiB)
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true, value_parser = sizes::bytes)]
    pub snapshot_dir_max: Option<u64>,
    /// Let pages of this origin use the server from a browser, or of all with `*`; can be given more than once
    #[arg(long, value_name = "ORIGIN")]
    pub cors: Vec<String>,
    /// Certificate to serve HTTPS with, PEM; needs --tls-key
    #[arg(long, value_name = "FILE")]
    pub tls_certificate: Option<PathBuf>,
    /// Its private key, PEM
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Write requests, prompts and answers to this file in full
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Configuration file, TOML
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print the configuration that would be used, as a configuration file, and end
    #[arg(long)]
    pub print_config: bool,
}

/// Flags of the commands that talk with a model.
#[derive(Args)]
pub struct Talk {
    #[command(flatten)]
    pub machine: Machine,
    /// GGUF file of a DeepSeek V4 model; of a split model, any part (default: the built-in nano, a small test model)
    #[arg(short, long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Prompt format of the weights: v4-2604 (April 2026) or v4-0731 (31 July 2026) (default: v4-0731 if the file's name
    /// contains 0731, else v4-2604)
    #[arg(long, value_name = "ENCODING")]
    pub encoding: Option<Encoding>,
    /// Reason before answering (the default)
    #[arg(long, overrides_with = "nothink")]
    pub think: bool,
    /// Answer at once
    #[arg(long, conflicts_with = "effort")]
    pub nothink: bool,
    /// Ask for more or less reasoning: a text before the prompt, which depends on the encoding (v4-2604 does not know
    /// low, and high adds nothing there) (default: no such text)
    #[arg(long, value_enum, value_name = "LEVEL")]
    pub effort: Option<Effort>,
    /// Instructions before the conversation; `@FILE` reads them from a file
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Sampling temperature; 0 always takes the likeliest token (default: 1; the built-in nano, being tiny: 0)
    #[arg(long = "temp", value_name = "T", allow_negative_numbers = true, value_parser = temperature)]
    pub temperature: Option<f32>,
    /// Sample among the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true, value_parser = share)]
    pub top_p: f32,
    /// Sample among tokens at least this many times as likely as the likeliest
    #[arg(long, value_name = "P", default_value_t = 0.05, allow_negative_numbers = true, value_parser = share)]
    pub min_p: f32,
    /// Seed of sampling; the same seed gives the same text, each further reply of a chat takes the next one (default: new
    /// ones, told below each reply)
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = whole::<u64>)]
    pub seed: Option<u64>,
    /// Most tokens to generate in a reply (default: until the model ends or the context is full)
    #[arg(short = 'n', value_name = "N", allow_negative_numbers = true, value_parser = whole::<usize>)]
    pub max_tokens: Option<usize>,
    /// Tokens of context, prompts and answers together (default: what the model was made for)
    #[arg(long = "ctx", value_name = "N", allow_negative_numbers = true, value_parser = whole::<usize>)]
    pub context_tokens: Option<usize>,
    #[command(flatten)]
    pub record: Record,
}

/// Names of [`text::prompt::Effort`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effort {
    /// The least.
    Low,
    /// Long.
    High,
    /// As long as it takes.
    Max,
}

impl fmt::Display for Effort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        text::prompt::Effort::from(*self).fmt(f)
    }
}

impl From<Effort> for text::prompt::Effort {
    fn from(effort: Effort) -> text::prompt::Effort {
        match effort {
            Effort::Low => text::prompt::Effort::Low,
            Effort::High => text::prompt::Effort::High,
            Effort::Max => text::prompt::Effort::Max,
        }
    }
}

/// Flags of `inspect`.
#[derive(Args)]
pub struct Inspect {
    /// GGUF file; of a split model, any part
    pub file: PathBuf,
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,
    /// Read every tensor and name those that hold NaN or infinity
    #[arg(long)]
    pub check: bool,
}

/// Flags of `logits`.
#[derive(Args)]
pub struct Logits {
    /// GGUF file of a DeepSeek V4 model; of a split model, any part
    #[arg(short, long, value_name = "FILE")]
    pub model: PathBuf,
    /// JSON file: an array of token ids
    #[arg(long, value_name = "FILE")]
    pub tokens: PathBuf,
    /// The file to write: NumPy format, float32, shape [tokens, vocabulary]
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Tokens of one pass; changes speed and memory, never a bit of the output on the cpu (default: what suits the device,
    /// 256 on the cpu, 4096 on a GPU)
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = positive)]
    pub chunk: Option<NonZeroUsize>,
    /// With the low-precision roundings the weights were trained with (official), or without (plain), as some other
    /// engines compute
    #[arg(long, value_enum, default_value_t = Arithmetic::Official)]
    pub arithmetic: Arithmetic,
    #[command(flatten)]
    pub machine: Machine,
    #[command(flatten)]
    pub stats: Stats,
    #[command(flatten)]
    pub record: Record,
}

/// Flags of `plan`.
#[derive(Args)]
pub struct Plan {
    /// GGUF file of a DeepSeek V4 model; of a split model, any part
    #[arg(short, long, value_name = "FILE")]
    pub model: PathBuf,
    /// Tokens of context (default: what the model was made for)
    #[arg(long = "ctx", value_name = "N", allow_negative_numbers = true, value_parser = whole::<usize>)]
    pub context_tokens: Option<usize>,
    #[command(flatten)]
    pub machine: Machine,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Flags of `devices`.
#[derive(Args)]
pub struct Devices {
    /// Measure how fast each can read its memory, and how fast that is filled from the host's
    #[arg(long)]
    pub measure: bool,
    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// Flags of `seal`.
#[derive(Args)]
pub struct Seal {
    /// GGUF file of a DeepSeek V4 model; of a split model, any part
    #[arg(short, long, value_name = "FILE")]
    pub model: PathBuf,
}

/// Flags of `bench`.
#[derive(Args)]
pub struct Bench {
    /// GGUF file of a DeepSeek V4 model; of a split model, any part (default: the built-in nano)
    #[arg(short, long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Tokens of context at which is measured first
    #[arg(long, value_name = "N", default_value = "1024", allow_negative_numbers = true, value_parser = positive)]
    pub ctx_start: NonZeroUsize,
    /// Tokens of context at which is measured last (default: 8 times the first, or what the model was made for)
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = positive)]
    pub ctx_max: Option<NonZeroUsize>,
    /// Between them, each length is so many times the one before
    #[arg(long, value_name = "X", default_value = "2", allow_negative_numbers = true, value_parser = growth)]
    pub step_mul: f64,
    /// Tokens generated at each length; that many must fit the model's context behind the last
    #[arg(long, value_name = "N", default_value = "32", allow_negative_numbers = true, value_parser = positive)]
    pub gen_tokens: NonZeroUsize,
    /// Write the figures as comma-separated values, with more columns than the table
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Write a plot of both speeds, SVG
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,
    #[command(flatten)]
    pub machine: Machine,
}

/// Commands of `check`.
#[derive(Subcommand)]
pub enum Check {
    /// Ask for a tool call, give its result, and check what the model makes of both
    ///
    /// Runs with fast and then with exact arithmetic, unless a flag names one of them. Exits with 1 if a check fails.
    ToolCallQuality(ToolCallQuality),
}

/// Flags of `check tool-call-quality`.
#[derive(Args)]
pub struct ToolCallQuality {
    /// GGUF file of a DeepSeek V4 model; of a split model, any part (default: the built-in nano)
    #[arg(short, long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    #[command(flatten)]
    pub machine: Machine,
    /// Print one JSON object instead of a table, with what the model wrote and what experts cost
    #[arg(long)]
    pub json: bool,
}

impl ToolCallQuality {
    /// What was asked for, or both.
    pub fn precisions(&self) -> Vec<Precision> {
        match self.machine.exact || self.machine.fast {
            true => vec![self.machine.precision()],
            false => vec![Precision::Fast, Precision::Exact],
        }
    }
}

/// Commands of `routes`.
#[derive(Subcommand)]
pub enum Routes {
    /// Show how often experts would have been in memory, by the share of them that fits and by the rule of eviction
    Replay(Replay),
}

/// Flags of `routes replay`.
#[derive(Args)]
pub struct Replay {
    /// File that --record-routes wrote
    pub file: PathBuf,
    /// Write a plot of the hit rates
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Flags of every command that computes. Only the precision changes a bit of the output.
#[derive(Args)]
pub struct Machine {
    /// Compute with float32 activations and dequantised weights in one fixed order: slower, and the same bits on every
    /// machine
    #[arg(long, conflicts_with = "fast")]
    pub exact: bool,
    /// Compute with 8-bit activations and integer dots where weights are quantised (the default)
    #[arg(long)]
    pub fast: bool,
    /// Read experts from the file when they are needed, even if all fit in memory (default: if they do not fit)
    #[arg(long)]
    pub stream: bool,
    /// What computes: auto, cpu, gpu (the best one), or gpu:N with a number that `infall devices` tells; auto takes a GPU if
    /// it can hold the weights that every token uses, the context and some experts (the built-in nano stays on the cpu)
    #[arg(long, value_name = "DEVICE", default_value_t)]
    pub device: Asked,
    /// Room for experts when they are streamed, of a GPU in its own memory: an amount such as 8GiB, or a number of experts
    /// (default: what memory allows)
    #[arg(long, value_name = "BYTES|N", allow_negative_numbers = true, value_parser = sizes::cache)]
    pub cache: Option<Cache>,
    /// Most host memory for everything, such as 16GiB (default: 7/8 of what is free)
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true, value_parser = sizes::bytes)]
    pub memory: Option<u64>,
    /// Most memory of the GPU for everything (default: 7/8 of what its driver says is free)
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true, value_parser = sizes::bytes)]
    pub gpu_memory: Option<u64>,
    /// Keep weights, and the room for experts, from being swapped out
    #[arg(long)]
    pub lock: bool,
    /// Threads to compute with; changes speed, never a bit of the output (default: one a core)
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

impl Machine {
    /// What was asked for, or the default.
    pub fn precision(&self) -> Precision {
        if self.exact { Precision::Exact } else { Precision::Fast }
    }
}

/// Flags of the commands that count what experts cost.
#[derive(Args)]
pub struct Stats {
    /// Print at the end how many experts were found in memory, what was read and how long computing waited for it
    #[arg(long)]
    pub stats: bool,
    /// Write the same as JSON
    #[arg(long, value_name = "FILE")]
    pub stats_json: Option<PathBuf>,
}

/// Flag of the commands that record routes.
#[derive(Args)]
pub struct Record {
    /// Write which experts each token chose, for `infall routes replay`
    #[arg(long = "record-routes", value_name = "FILE")]
    pub routes: Option<PathBuf>,
}

/// Names of [`model::Arithmetic`].
#[derive(Clone, Copy, ValueEnum)]
pub enum Arithmetic {
    /// Without roundings.
    Plain,
    /// With roundings.
    Official,
}

impl From<Arithmetic> for model::Arithmetic {
    fn from(arithmetic: Arithmetic) -> model::Arithmetic {
        match arithmetic {
            Arithmetic::Plain => model::Arithmetic::Plain,
            Arithmetic::Official => model::Arithmetic::Official,
        }
    }
}

fn temperature(text: &str) -> Result<f32, String> {
    let number: f32 = text.parse().map_err(|_| "expected a number".to_owned())?;
    if number.is_finite() && number >= 0.0 { Ok(number) } else { Err("expected a finite number of at least 0".into()) }
}

fn whole<N: FromStr>(text: &str) -> Result<N, String> {
    text.parse().map_err(|_| "expected a whole number from 0 to 2^64 - 1".into())
}

fn positive(text: &str) -> Result<NonZeroUsize, String> {
    text.parse().map_err(|_| "expected a whole number from 1 to 2^64 - 1".into())
}

fn growth(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "expected a number")?;
    if number.is_finite() && number > 1.0 { Ok(number) } else { Err("expected a finite number above 1".into()) }
}

fn share(text: &str) -> Result<f32, String> {
    let number: f32 = text.parse().map_err(|_| "expected a number".to_owned())?;
    if (0.0..=1.0).contains(&number) { Ok(number) } else { Err("expected a number from 0 to 1".into()) }
}
