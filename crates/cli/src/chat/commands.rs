//! What can be typed besides messages.

use std::path::PathBuf;
use std::str::FromStr;

use crate::flags::Effort;

/// A line that begins with `/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// List the commands.
    Help,
    /// Reason from the next message on, with this effort or as before.
    Think(Option<Effort>),
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

/// Every command: its name, its argument, and what it does.
pub const COMMANDS: [(&str, &str, &str); 12] = [
    ("/help", "", "this list"),
    ("/think", "[low|high|max]", "reason before answering, with this effort or the one before"),
    ("/nothink", "", "answer at once"),
    ("/fold", "", "fold reasoning to one line, or show it; showing prints the last one"),
    ("/read", "FILE", "send a file's text as a message"),
    ("/ctx", "[N]", "how full the context is, or change its size to N tokens"),
    ("/save", "FILE", "write the conversation and what the model keeps of it"),
    ("/load", "FILE", "go on with a saved conversation; nothing is read again"),
    ("/retry", "", "answer the last message anew"),
    ("/new", "", "begin anew with the same system text and tools"),
    ("/stats", "", "what the conversation holds and has cost"),
    ("/quit", "", "end (also Ctrl-D)"),
];

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
        let Some(&(command, expected, _)) = COMMANDS.iter().find(|(known, ..)| *known == name) else {
            return match name {
                "/exit" => Ok(Command::Quit),
                _ => Err(CommandError::Unknown(name.to_owned())),
            };
        };
        let wrong = || CommandError::Argument { command, expected, found: argument.to_owned() };
        let path = || if argument.is_empty() { Err(wrong()) } else { Ok(PathBuf::from(argument)) };
        let alone = |command| if argument.is_empty() { Ok(command) } else { Err(wrong()) };
        match command {
            "/read" => Ok(Command::Read(path()?)),
            "/save" => Ok(Command::Save(path()?)),
            "/load" => Ok(Command::Load(path()?)),
            "/think" => match argument {
                "" => Ok(Command::Think(None)),
                "low" => Ok(Command::Think(Some(Effort::Low))),
                "high" => Ok(Command::Think(Some(Effort::High))),
                "max" => Ok(Command::Think(Some(Effort::Max))),
                _ => Err(wrong()),
            },
            "/ctx" if argument.is_empty() => Ok(Command::Context(None)),
            "/ctx" => argument.parse().map(|size| Command::Context(Some(size))).map_err(|_| wrong()),
            "/help" => alone(Command::Help),
            "/nothink" => alone(Command::Nothink),
            "/fold" => alone(Command::Fold),
            "/retry" => alone(Command::Retry),
            "/new" => alone(Command::New),
            "/stats" => alone(Command::Stats),
            "/quit" => alone(Command::Quit),
            _ => unreachable!("every command of the table is here"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_of_the_table_is_known() {
        for (name, argument, _) in COMMANDS {
            let line = if argument == "FILE" { format!("{name} a file.txt ") } else { name.to_owned() };
            assert!(line.parse::<Command>().is_ok(), "{line}");
        }
        assert_eq!("/read a file.txt ".parse(), Ok(Command::Read("a file.txt".into())));
        assert_eq!("/think max".parse(), Ok(Command::Think(Some(Effort::Max))));
        assert_eq!("/exit".parse(), Ok(Command::Quit));
    }

    #[test]
    fn wrong_commands_say_what_is_expected() {
        let error = |line: &str| line.parse::<Command>().unwrap_err().to_string();
        assert!(error("/foo bar").contains("no command /foo") && error("/foo").contains("/help"));
        assert_eq!(error("/think hard"), "/think got \"hard\", expected /think [low|high|max]");
        assert_eq!(error("/save"), "/save got \"\", expected /save FILE");
        assert!(error("/ctx -1").contains("expected /ctx [N]") && error("/quit now").contains("got \"now\""));
    }
}
