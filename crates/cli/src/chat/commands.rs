//! What can be typed besides messages.

use std::path::PathBuf;
use std::str::FromStr;

use clap::ValueEnum;

use crate::flags::Effort;

/// A line that begins with `/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// List the commands.
    Help,
    /// Reason from the next message on, for so long.
    Think(Asked),
    /// Answer at once from the next message on.
    Nothink,
    /// Fold or show reasoning.
    Fold,
    /// Send a file's text as a message.
    Read(PathBuf),
    /// Tell the size of the context, or change it.
    Context(Option<usize>),
    /// Write the conversation to a file.
    Save(PathBuf),
    /// Go on with a saved conversation.
    Load(PathBuf),
    /// Answer the last message anew.
    Retry,
    /// Forget the conversation, but not the system text and the tools.
    New,
    /// Tell what the conversation holds and has cost.
    Stats,
    /// End the program.
    Quit,
}

/// How long the model is asked to reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// As long as before.
    AsBefore,
    /// It is not asked.
    Default,
    /// So long.
    Effort(Effort),
}

/// A command as it is typed.
pub struct Named {
    /// Its name.
    pub name: &'static str,
    /// What follows it.
    pub argument: &'static str,
    /// What it does.
    pub help: &'static str,
    /// The command with this argument, if it takes such a one.
    parse: fn(&str) -> Option<Command>,
}

const fn named(
    name: &'static str,
    argument: &'static str,
    help: &'static str,
    parse: fn(&str) -> Option<Command>,
) -> Named {
    Named { name, argument, help, parse }
}

/// Every command.
#[rustfmt::skip]
pub const COMMANDS: [Named; 13] = [
    named("/help", "", "this list", |text| alone(text, Command::Help)),
    named("/think", "[low|high|max|default]", "reason before answering, with this effort or the one before", think),
    named("/nothink", "", "answer at once", |text| alone(text, Command::Nothink)),
    named("/fold", "", "fold reasoning to one line, or show it; showing prints the last one",
        |text| alone(text, Command::Fold)),
    named("/read", "FILE", "send a file's text as a message", |text| path(text).map(Command::Read)),
    named("/ctx", "[N]", "how full the context is, or change its size to N tokens", context),
    named("/save", "FILE", "write the conversation and what the model keeps of it",
        |text| path(text).map(Command::Save)),
    named("/load", "FILE", "go on with a saved conversation; nothing is read again",
        |text| path(text).map(Command::Load)),
    named("/retry", "", "answer the last message anew", |text| alone(text, Command::Retry)),
    named("/new", "", "begin anew with the same system text and tools", |text| alone(text, Command::New)),
    named("/stats", "", "what the conversation holds and has cost", |text| alone(text, Command::Stats)),
    named("/quit", "", "end (also Ctrl-D)", |text| alone(text, Command::Quit)),
    named("/exit", "", "the same", |text| alone(text, Command::Quit)),
];

/// Whether `text` is meant as a command: one line whose first word is `/` and small letters. A path or a pasted text is
/// a message.
pub fn is_command(text: &str) -> bool {
    let text = text.trim_end();
    let word = text.split_whitespace().next().and_then(|word| word.strip_prefix('/'));
    let is_name = |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_lowercase());
    text.starts_with('/') && !text.contains('\n') && word.is_some_and(is_name)
}

/// `path` with the home folder for `~`.
pub fn home(path: &str) -> PathBuf {
    match (path.strip_prefix('~'), std::env::var_os("HOME")) {
        (Some(rest), Some(home)) if rest.is_empty() || rest.starts_with('/') => {
            PathBuf::from(home).join(rest.trim_start_matches('/'))
        }
        _ => path.into(),
    }
}

fn alone(argument: &str, command: Command) -> Option<Command> {
    argument.is_empty().then_some(command)
}

/// A path, as it is or in quotes.
fn path(argument: &str) -> Option<PathBuf> {
    let quoted = |mark| argument.strip_prefix(mark).and_then(|rest| rest.strip_suffix(mark));
    let path = quoted('"').or_else(|| quoted('\'')).map_or_else(|| home(argument), PathBuf::from);
    (!path.as_os_str().is_empty()).then_some(path)
}

fn think(argument: &str) -> Option<Command> {
    let asked = match argument {
        "" => Asked::AsBefore,
        "default" => Asked::Default,
        level => Asked::Effort(Effort::from_str(level, false).ok()?),
    };
    Some(Command::Think(asked))
}

fn context(argument: &str) -> Option<Command> {
    let size = if argument.is_empty() { None } else { Some(argument.parse().ok()?) };
    Some(Command::Context(size))
}

/// A line that is no command although it begins like one.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// No command of that name.
    #[error("there is no command {0}; /help lists them. To send a message that begins with /, put a space before it")]
    Unknown(String),
    /// The argument is missing, one too many, or not what was expected.
    #[error("{command} got {found:?}, expected {command} {expected}")]
    Argument {
        /// The command.
        command: &'static str,
        /// What it takes.
        expected: &'static str,
        /// What followed it.
        found: String,
    },
}

impl FromStr for Command {
    type Err = CommandError;

    fn from_str(line: &str) -> Result<Command, CommandError> {
        let line = line.trim();
        let (name, argument) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let argument = argument.trim();
        let command = COMMANDS.iter().find(|known| known.name == name);
        let Named { name: command, argument: expected, parse, .. } =
            *command.ok_or_else(|| CommandError::Unknown(name.to_owned()))?;
        parse(argument).ok_or_else(|| CommandError::Argument { command, expected, found: argument.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_of_the_table_is_known() {
        for Named { name, argument, .. } in COMMANDS {
            let line = if argument == "FILE" { format!("{name} a file.txt ") } else { name.to_owned() };
            assert!(line.parse::<Command>().is_ok(), "{line}");
        }
        assert_eq!("/read a file.txt ".parse(), Ok(Command::Read("a file.txt".into())));
        assert_eq!("/think max".parse(), Ok(Command::Think(Asked::Effort(Effort::Max))));
        assert_eq!("/think default".parse(), Ok(Command::Think(Asked::Default)));
        assert_eq!("/exit".parse(), Ok(Command::Quit));
    }

    #[test]
    fn wrong_commands_say_what_is_expected() {
        let error = |line: &str| line.parse::<Command>().unwrap_err().to_string();
        assert!(error("/foo bar").contains("no command /foo") && error("/foo").contains("/help"));
        assert_eq!(error("/think hard"), "/think got \"hard\", expected /think [low|high|max|default]");
        assert_eq!(error("/save"), "/save got \"\", expected /save FILE");
        assert!(error("/ctx -1").contains("expected /ctx [N]") && error("/quit now").contains("got \"now\""));
    }

    #[test]
    fn paths_and_pasted_texts_are_no_commands() {
        for line in ["/usr/bin/env is missing", "/", "/ help", "/Users", "/help\nme", "/* a */", " /help", "/2 of it"] {
            assert!(!is_command(line), "{line}");
        }
        assert!(is_command("/help") && is_command("/foo bar") && is_command("/read /a/b.txt "));
    }

    #[test]
    fn paths_may_be_quoted_or_begin_at_home() {
        let home = PathBuf::from(std::env::var_os("HOME").unwrap());
        let read = |line: &str| match line.parse() {
            Ok(Command::Read(path)) => path,
            other => panic!("{line}: {other:?}"),
        };
        assert_eq!([read("/read ~/a b"), read("/read ~")], [home.join("a b"), home.join("")]);
        assert_eq!([read("/read \"a b\""), read("/read '~/a'")], [PathBuf::from("a b"), PathBuf::from("~/a")]);
        assert_eq!([read("/read ~a"), read("/read it's")], [PathBuf::from("~a"), PathBuf::from("it's")]);
        assert!("/read \"\"".parse::<Command>().is_err());
    }
}
