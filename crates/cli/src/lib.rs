//! `infall`: flags, terminal, progress; wires the other crates together.
//!
//! A library only so that measuring programs take the same flags, make the same plan and open models exactly as the
//! program does.

mod bench;
mod chat;
mod check;
pub mod device;
mod devices;
mod engine;
mod figures;
mod flags;
mod inspect;
mod interrupt;
pub mod load;
mod logits;
mod markdown;
pub mod memory;
mod npy;
mod output;
pub mod placement;
mod plan;
pub mod plot;
mod record;
mod routes;
mod run;
mod screen;
mod seal;
mod serve;
mod setup;
mod sizes;
mod stats;
mod terminal;

use std::io::ErrorKind;
use std::process::ExitCode;

use clap::Parser;

pub use bench::median;
pub use flags::Machine;
use flags::{Command, Flags};
use terminal::WriteError;

/// How a command ended that did not fail.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Done,
    Interrupted,
}

/// The program.
pub fn main() -> ExitCode {
    match execute(&Flags::parse().command) {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Interrupted) => ExitCode::from(interrupt::EXIT_CODE),
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) if is_cancelled(&error) => {
            terminal::note("interrupted while weights were read");
            ExitCode::from(interrupt::EXIT_CODE)
        }
        Err(error) => {
            terminal::error(&error);
            ExitCode::FAILURE
        }
    }
}

/// Runs the command.
fn execute(command: &Command) -> anyhow::Result<Outcome> {
    match command {
        Command::Run(flags) => run::run(flags),
        Command::Chat(flags) => chat::chat(flags),
        Command::Serve(flags) => serve::serve(flags),
        Command::Inspect(flags) => inspect::inspect(flags),
        Command::Logits(flags) => logits::logits(flags),
        Command::Check(flags::Check::ToolCallQuality(flags)) => check::tool_call_quality(flags),
        Command::Bench(flags) => bench::bench(flags),
        Command::Plan(flags) => plan::plan(flags),
        Command::Devices(flags) => devices::devices(flags),
        Command::Seal(flags) => seal::seal(flags),
        Command::Routes(flags::Routes::Replay(flags)) => routes::replay(flags),
    }
}

/// Whether Ctrl-C ended the reading of weights. (Commands see to what it ends later.)
fn is_cancelled(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(model::Error::Cancelled))
}

/// Whether the reader of standard output went away: then nobody is there to be told, and nothing is wrong.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<WriteError>()
        .is_some_and(|error| error.path.is_none() && error.cause.kind() == ErrorKind::BrokenPipe)
}
