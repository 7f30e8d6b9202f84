//! Where messages come from: an editor with history on a terminal, else the lines of standard input.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, IsTerminal};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use reedline::{
    Color, ColumnarMenu, Completer, CompletionResult, EditCommand, Emacs, FileBackedHistory, Highlighter, KeyCode,
    KeyModifiers, MenuBuilder, Prompt, PromptEditMode, PromptHistorySearch, Reedline, ReedlineEvent, ReedlineMenu,
    Signal, Span, StyledText, Suggestion, ValidationResult, Validator, default_emacs_keybindings,
};

use super::commands::{COMMANDS, Named, home};
use crate::terminal::{self, Stream};

/// Messages that the history keeps.
const HISTORY_LINES: usize = 10_000;
const MENU: &str = "completions";

/// What was typed.
#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    /// A message or a command; it may have several lines.
    Text(String),
    /// Ctrl-C.
    Interrupt,
    /// Ctrl-D, or the end of standard input.
    End,
}

/// The source of messages and of tool results.
pub enum Lines {
    /// People type. Results are edited apart: they are neither commands nor worth remembering.
    Editor {
        /// Edits messages.
        messages: Box<Editor>,
        /// Edits tool results.
        results: Box<Editor>,
    },
    /// A program writes, or there is no terminal to edit on.
    Plain,
}

impl Lines {
    /// The editor if all three standard streams are a terminal that can do what it takes.
    pub fn new() -> Lines {
        let capable = std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        if capable && std::io::stdin().is_terminal() && Stream::Out.is_terminal() && Stream::Err.is_terminal() {
            Lines::Editor { messages: Box::new(Editor::for_messages()), results: Box::new(Editor::new()) }
        } else {
            Lines::Plain
        }
    }

    /// Whether a person can be asked and told.
    pub fn is_interactive(&self) -> bool {
        matches!(self, Lines::Editor { .. })
    }

    /// The next message or command.
    ///
    /// # Errors
    /// Standard input cannot be read, or is not UTF-8.
    pub fn message(&mut self) -> anyhow::Result<Input> {
        match self {
            Lines::Editor { messages, .. } => messages.read("> "),
            Lines::Plain => plain_line(),
        }
    }

    /// The result of `call`.
    ///
    /// # Errors
    /// As [`Lines::message`].
    pub fn result(&mut self, call: &str) -> anyhow::Result<Input> {
        match self {
            Lines::Editor { results, .. } => results.read(&format!("result of {call}> ")),
            Lines::Plain => plain_line(),
        }
    }
}

/// The next line of standard input, with those that follow it as long as they end in `\`.
fn plain_line() -> anyhow::Result<Input> {
    let mut text = String::new();
    loop {
        let read = std::io::stdin().lock().read_line(&mut text).map_err(|error| match error.kind() {
            std::io::ErrorKind::InvalidData => anyhow::anyhow!(
                "standard input: found bytes that are not UTF-8, expected lines of text. Convert it, for instance with iconv"
            ),
            _ => anyhow::anyhow!("cannot read standard input: {error}. Check where it comes from"),
        })?;
        if read == 0 {
            return Ok(if text.is_empty() { Input::End } else { Input::Text(text) });
        }
        if text.ends_with('\n') {
            text.pop();
            if text.ends_with('\r') {
                text.pop();
            }
        }
        if !text.ends_with('\\') {
            return Ok(Input::Text(text));
        }
        text.pop();
        text.push('\n');
    }
}

/// A line editor whose Enter ends the message unless it stands behind a `\`.
pub struct Editor(Reedline);

impl Editor {
    /// An editor that remembers nothing and completes nothing.
    fn new() -> Editor {
        let mut keys = default_emacs_keybindings();
        let complete = ReedlineEvent::UntilFound(vec![ReedlineEvent::Menu(MENU.to_owned()), ReedlineEvent::MenuNext]);
        keys.add_binding(KeyModifiers::NONE, KeyCode::Tab, complete);
        keys.add_binding(KeyModifiers::NONE, KeyCode::Enter, enter());
        keys.add_binding(KeyModifiers::ALT, KeyCode::Enter, ReedlineEvent::Edit(vec![EditCommand::InsertNewline]));
        let reedline = Reedline::create()
            .with_edit_mode(Box::new(Emacs::new(keys)))
            .with_highlighter(Box::new(Unstyled))
            .with_validator(Box::new(Continues))
            .with_ansi_colors(Stream::Err.is_colored())
            .use_bracketed_paste(true);
        Editor(reedline)
    }

    /// An editor with history, and with completion of commands and their files.
    fn for_messages() -> Editor {
        let Editor(reedline) = Editor::new();
        let menu = ColumnarMenu::default().with_name(MENU).with_marker("");
        let mut reedline = reedline
            .with_completer(Box::new(Commands))
            .with_quick_completions(true)
            .with_partial_completions(true)
            .with_menu(ReedlineMenu::EngineCompleter(Box::new(menu)));
        match history() {
            Ok(history) => reedline = reedline.with_history(Box::new(history)),
            Err(error) => terminal::dim_note(&format!("messages are not remembered: {error}")),
        }
        Editor(reedline)
    }

    fn read(&mut self, prompt: &str) -> anyhow::Result<Input> {
        let signal = self.0.read_line(&Label(prompt)).map_err(|error| {
            anyhow::anyhow!("the terminal cannot be read: {error}. Messages can also come from a pipe")
        })?;
        Ok(match signal {
            Signal::Success(text) => {
                // At once, so that it is remembered however the chat ends.
                if let Err(error) = self.0.sync_history() {
                    terminal::dim_note(&format!("the message is not remembered: {error}"));
                }
                Input::Text(text)
            }
            Signal::CtrlD => Input::End,
            _ => Input::Interrupt,
        })
    }
}

/// The history in the user's state directory, readable by the user alone.
fn history() -> anyhow::Result<FileBackedHistory> {
    let path = history_path().ok_or_else(|| anyhow::anyhow!("neither XDG_STATE_HOME nor HOME is set"))?;
    let failed = |error: &dyn std::fmt::Display| anyhow::anyhow!("{}: {error}", path.display());
    std::fs::create_dir_all(path.parent().unwrap_or(Path::new("/"))).map_err(|error| failed(&error))?;
    let file = File::options().create(true).append(true).mode(0o600).open(&path).map_err(|error| failed(&error))?;
    file.set_permissions(std::fs::Permissions::from_mode(0o600)).map_err(|error| failed(&error))?;
    FileBackedHistory::with_file(HISTORY_LINES, path.clone()).map_err(|error| failed(&error))
}

/// `infall/history` in the state directory of the XDG Base Directory Specification.
fn history_path() -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")))?;
    Some(state.join("infall/history"))
}

/// Enter sends, unless the message ends in `\`: then the backslash becomes a line break, and the history holds what was
/// sent. What a menu offers, and what a search has found, is taken first.
fn enter() -> ReedlineEvent {
    let edit = |commands: &[EditCommand]| ReedlineEvent::Edit(commands.to_vec());
    let send_or_break = vec![
        edit(&[EditCommand::MoveToEnd { select: false }]),
        ReedlineEvent::Enter,
        // Reached only if `Continues` has put a line break behind the backslash.
        edit(&[
            EditCommand::MoveLeft { select: false },
            EditCommand::Backspace,
            EditCommand::MoveRight { select: false },
        ]),
    ];
    ReedlineEvent::UntilFound(vec![
        ReedlineEvent::MenuAccept,
        ReedlineEvent::Multiple(send_or_break),
        ReedlineEvent::Enter,
    ])
}

/// A message that ends in `\` goes on.
struct Continues;

impl Validator for Continues {
    fn validate(&self, text: &str) -> ValidationResult {
        if text.ends_with('\\') { ValidationResult::Incomplete } else { ValidationResult::Complete }
    }
}

struct Label<'a>(&'a str);

impl Prompt for Label<'_> {
    fn render_prompt_left(&self) -> Cow<'_, str> {
        self.0.into()
    }

    fn render_prompt_right(&self) -> Cow<'_, str> {
        "".into()
    }

    fn render_prompt_indicator(&self, _: PromptEditMode) -> Cow<'_, str> {
        "".into()
    }

    fn render_prompt_multiline_indicator(&self) -> Cow<'_, str> {
        "… ".into()
    }

    fn render_prompt_history_search_indicator(&self, search: PromptHistorySearch) -> Cow<'_, str> {
        format!("(search: {}) ", search.term).into()
    }

    fn get_prompt_color(&self) -> Color {
        Color::Green
    }
}

/// What is typed has the colour of all text, which suits light and dark terminals alike.
struct Unstyled;

impl Highlighter for Unstyled {
    fn highlight(&self, line: &str, _: usize) -> StyledText {
        let mut text = StyledText::new();
        text.push((Color::Default.normal(), line.to_owned()));
        text
    }
}

/// Completes commands, and file names behind those that take one.
struct Commands;

impl Completer for Commands {
    fn complete(&mut self, line: &str, position: usize) -> CompletionResult {
        let typed = &line[..position];
        let suggestions = match typed.split_once(' ') {
            _ if !typed.starts_with('/') => Vec::new(),
            None => command_names(typed),
            Some((command, path)) if takes_file(command) => files(path, command.len() + 1, position),
            Some(_) => Vec::new(),
        };
        CompletionResult::fresh(suggestions)
    }
}

fn takes_file(command: &str) -> bool {
    COMMANDS.iter().any(|known| known.name == command && known.argument == "FILE")
}

fn command_names(typed: &str) -> Vec<Suggestion> {
    let suggestion = |command: &Named| Suggestion {
        value: command.name.to_owned(),
        description: Some(command.help.to_owned()),
        span: Span::new(0, typed.len()),
        append_whitespace: !command.argument.is_empty(),
        ..Suggestion::default()
    };
    COMMANDS.iter().filter(|command| command.name.starts_with(typed)).map(suggestion).collect()
}

/// The files and folders whose path begins with `typed`, which stands from `start` to `end` of the line.
fn files(typed: &str, start: usize, end: usize) -> Vec<Suggestion> {
    let name_start = typed.rfind('/').map_or(0, |slash| slash + 1);
    let (folder, name) = typed.split_at(name_start);
    let Ok(entries) = std::fs::read_dir(if folder.is_empty() { ".".into() } else { home(folder) }) else {
        return Vec::new();
    };
    let matching = entries.filter_map(|entry| {
        let entry = entry.ok()?;
        let found = entry.file_name().into_string().ok()?;
        let is_hidden = found.starts_with('.') && !name.starts_with('.');
        let suits = found.starts_with(name) && !is_hidden && !found.contains(char::is_control);
        let slash = if entry.path().is_dir() { "/" } else { "" };
        suits.then(|| format!("{folder}{found}{slash}"))
    });
    let mut paths: Vec<String> = matching.collect();
    paths.sort();
    let suggestion = |value| Suggestion { value, span: Span::new(start, end), ..Suggestion::default() };
    paths.into_iter().map(suggestion).collect()
}
