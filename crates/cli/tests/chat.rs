//! `infall chat`: in a real terminal (tmux: keys in, screen out), and from a pipe.

mod common;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{finish, infall, run, run_with_input, signal, tiny};

/// How long a test waits for what it expects on the screen.
const PATIENCE: Duration = Duration::from_secs(30);

const LIST_FILES: &str = r#"[{"type": "function", "function": {"name": "list_files",
    "description": "Lists the files in a folder.", "parameters": {"type": "object",
    "properties": {"path": {"type": "string", "description": "The folder."}}, "required": ["path"]}}}]"#;

/// A terminal of 100 columns and 40 lines with `infall chat` in it, and a folder of its own for its files.
struct Terminal {
    folder: tempfile::TempDir,
}

impl Terminal {
    fn new(args: &[&str]) -> Terminal {
        let terminal = Terminal { folder: tempfile::tempdir().unwrap() };
        let settings = "set-option -g remain-on-exit on\nset-option -g exit-empty off\n";
        std::fs::write(terminal.path("tmux.conf"), settings).unwrap();
        terminal.start(args);
        terminal
    }

    /// Begins a chat. The tests' environment does not reach it: tmux gives it the one set here.
    fn start(&self, args: &[&str]) {
        let state = format!("XDG_STATE_HOME={}", self.folder.path().display());
        // A shell, which Ctrl-C does not end, says how the chat ended: tmux itself at times loses the exit code.
        let report = "trap : INT; \"$@\"; echo \"ended with $?\"";
        let program = ["sh", "-c", report, "sh", "env", "-u", "NO_COLOR", &state, env!("CARGO_BIN_EXE_infall"), "chat"];
        let session =
            ["new-session", "-d", "-x", "100", "-y", "40", "-c", self.path(".").to_str().unwrap()].map(str::to_owned);
        let command = program.iter().chain(args).map(|arg| (*arg).to_owned());
        self.tmux(&session.into_iter().chain(["--".to_owned()]).chain(command).collect::<Vec<_>>());
        self.wait(|screen| screen.ends_with("\n>"), "the prompt");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn tmux<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> String {
        let (socket, settings) = (self.path("tmux"), self.path("tmux.conf"));
        let output =
            Command::new("tmux").arg("-S").arg(socket).arg("-f").arg(settings).args(args).env_remove("TMUX").output();
        let output = output.unwrap_or_else(|error| {
            panic!("tmux cannot be run ({error}): install it (Debian: apt-get install tmux), or run scripts/test, which does")
        });
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// What is on the screen: whole lines, without the spaces at their ends and the empty lines below.
    fn screen(&self) -> String {
        let screen = self.tmux(&["capture-pane", "-p", "-J"]);
        screen.lines().map(str::trim_end).collect::<Vec<_>>().join("\n").trim_end().to_owned()
    }

    /// Waits until the screen is as expected, and returns it.
    fn wait(&self, is_expected: impl Fn(&str) -> bool, what: &str) -> String {
        let start = Instant::now();
        loop {
            let screen = self.screen();
            if is_expected(&screen) {
                return screen;
            }
            assert!(start.elapsed() < PATIENCE, "waited in vain for {what}; the screen:\n{screen}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn wait_for(&self, text: &str) -> String {
        self.wait(|screen| screen.contains(text), text)
    }

    /// Types `text` and Enter, and waits for `answer` and the next prompt below it.
    fn ask(&self, text: &str, answer: &str) -> String {
        self.type_text(text);
        self.keys(&["Enter"]);
        let is_answered = |screen: &str| {
            let asked = screen.rsplit_once(&format!("> {text}\n"));
            asked.is_some_and(|(_, after)| format!("\n{after}").contains(answer) && after.ends_with('>'))
        };
        self.wait(is_answered, &format!("{answer:?} after {text:?}"))
    }

    /// Types `text` and waits until it stands there.
    fn type_text(&self, text: &str) {
        self.tmux(&["send-keys", "-l", text]);
        self.wait_for(text);
    }

    fn keys(&self, keys: &[&str]) {
        self.tmux(&[&["send-keys"], keys].concat());
    }

    /// Pastes as a terminal does it, between the marks of a bracketed paste.
    fn paste(&self, text: &str) {
        self.tmux(&["set-buffer", text]);
        self.tmux(&["paste-buffer", "-p"]);
    }

    /// Ends the chat and waits for its end.
    fn quit(&self) {
        self.keys(&["C-d"]);
        self.wait_for("ended with 0");
        self.tmux(&["kill-session"]);
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = Command::new("tmux").arg("-S").arg(self.path("tmux")).arg("kill-server").output();
    }
}

#[test]
fn it_answers_and_remembers_what_was_typed() {
    let terminal = Terminal::new(&["--nothink"]);
    let screen = terminal.ask("What is 12 + 30?", "12 + 30 = 42\n");
    assert!(screen.contains("| context 24/8192"), "{screen}");
    terminal.ask("What is 5 + 8?", "5 + 8 = 13\n");
    terminal.keys(&["Up", "Up"]);
    terminal.wait(|screen| screen.ends_with("> What is 12 + 30?"), "the message before the last");
    terminal.keys(&["C-c"]);
    terminal.wait_for("Ctrl-D or /quit ends the chat");
    terminal.quit();

    let history = terminal.path("infall/history");
    assert_eq!(std::fs::read_to_string(&history).unwrap(), "What is 12 + 30?\nWhat is 5 + 8?\n");
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(history.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    terminal.start(&["--nothink"]);
    terminal.keys(&["Up"]);
    terminal.wait(|screen| screen.ends_with("> What is 5 + 8?"), "the message of the chat before");
}

#[test]
fn reasoning_is_dimmed_and_folds() {
    let terminal = Terminal::new(&[]);
    let reasoning = "Ones: 2 + 0 = 2. Tens: 1 + 3 + 0 = 4. So 42.";
    terminal.ask("What is 12 + 30?", &format!("{reasoning}\n\n12 + 30 = 42\n"));
    let styled = terminal.tmux(&["capture-pane", "-p", "-e"]);
    let dims = |line: &str| {
        let before = styled.split(line).next().unwrap();
        before.rsplit_once("\x1b[2m").is_some_and(|(_, since)| !since.contains("\x1b[0m"))
    };
    assert!(dims(reasoning) && !dims("12 + 30 = 42") && dims("14 read at"), "{styled:?}");

    terminal.ask("/fold", "reasoning is folded");
    let screen = terminal.ask("What is 3 + 7?", "3 + 7 = 10\n");
    let folded = screen.rsplit_once("What is 3 + 7?").unwrap().1;
    assert!(folded.starts_with("\n▸ reasoned for ") && folded.contains(" s, 33 tokens\n3 + 7"), "{screen}");
    assert!(!folded.contains("Ones"), "{screen}");
    terminal.ask("/fold", "Ones: 3 + 7 = 10. Tens: 0 + 0 + 1 = 1. So 10.\n");
}

#[test]
fn thinking_is_switched_without_a_restart() {
    let terminal = Terminal::new(&["--nothink"]);
    terminal.ask("What is 2 + 7?", "\n2 + 7 = 9\n");
    terminal.ask("/think", "reasons before answering");
    terminal.ask("What is 3 + 7?", "Ones: 3 + 7 = 10.");
    terminal.ask("/nothink", "answers at once");
    terminal.ask("What is 1 + 7?", "\n1 + 7 = 8\n");
    let refused = terminal.ask("/think low", "error: effort");
    assert!(refused.contains("v4-2604"), "{refused}");
    terminal.ask("/think max", "reasons before answering, effort max");
}

#[test]
fn commands_are_listed_completed_and_refused() {
    let terminal = Terminal::new(&["--nothink"]);
    let screen = terminal.ask("/help", "Pasted lines stay together");
    for command in [
        "/think [low|high|max|default]",
        "/nothink",
        "/fold",
        "/read FILE",
        "/ctx [N]",
        "/save FILE",
        "/load FILE",
        "/quit",
    ] {
        assert!(screen.contains(command), "{command} in {screen}");
    }
    terminal.ask("/hepl", "error: there is no command /hepl; /help lists them");
    terminal.ask("/ctx", "context: 0 of 8192 tokens");
    terminal.ask("/ctx 4096", "context: 0 of 4096 tokens");
    terminal.ask("/ctx 9000", "error: found a context of 9000 tokens");
    std::fs::write(terminal.path("question.txt"), "What is 12 + 30?\n").unwrap();
    terminal.type_text("/rea");
    terminal.keys(&["Tab"]);
    terminal.wait_for("> /read");
    terminal.type_text("ques");
    terminal.keys(&["Tab"]);
    terminal.wait_for("> /read question.txt");
    terminal.keys(&["Enter"]);
    terminal.wait_for("12 + 30 = 42\n");
    terminal.ask("/stats", "messages    2 messages");
    terminal.ask("/new", "began anew");
    let stats = terminal.ask("/stats", "messages    0 messages");
    assert!(stats.rsplit_once("/stats").unwrap().1.contains("replies     0\n"), "{stats}");
    terminal.ask("/ctx 10", "context: 0 of 10 tokens");
    terminal.ask("/ctx 4096", "context: 0 of 4096 tokens");
    terminal.ask("/retry", "error: there is no message");
    terminal.type_text("/quit");
    terminal.keys(&["Enter"]);
    terminal.wait_for("ended with 0");
}

#[test]
fn several_lines_are_one_message() {
    let terminal = Terminal::new(&["--nothink"]);
    terminal.paste("What is\n12 + 30?");
    terminal.wait(|screen| screen.ends_with("> What is\n… 12 + 30?"), "the pasted lines");
    terminal.keys(&["Enter"]);
    terminal.wait(|screen| screen.contains(" generated") && screen.ends_with("\n>"), "an answer");
    terminal.ask("/stats", "messages    2 messages");

    terminal.ask("/new", "began anew");
    terminal.type_text("one \\");
    terminal.keys(&["Enter"]);
    terminal.wait(|screen| screen.ends_with("> one\n…"), "the second line, without the backslash");
    terminal.type_text("two");
    terminal.keys(&["M-Enter"]);
    terminal.wait(|screen| screen.ends_with("two\n…"), "the third line");
    terminal.type_text("three");
    terminal.keys(&["Enter"]);
    terminal.wait(|screen| screen.ends_with("\n>"), "an answer");
    let saved = terminal.path("saved");
    terminal.ask("/save saved", "saved 2 messages");
    assert!(contains(&std::fs::read(saved).unwrap(), br#"{"role":"user","content":"one \ntwo\nthree"}"#));
}

#[test]
fn an_interrupted_reply_stays_and_the_chat_goes_on() {
    // Its answer is thousands of tokens long.
    let model = tiny("tiny-iq2");
    let terminal = Terminal::new(&["-m", model.to_str().unwrap(), "--nothink", "--temp", "0", "--threads", "1"]);
    terminal.type_text("Hello");
    terminal.keys(&["Enter"]);
    terminal.wait(|screen| screen.split_once("> Hello\n").is_some_and(|(_, answer)| answer.len() > 100), "an answer");
    // What is typed meanwhile is not shown in the middle of it.
    terminal.tmux(&["send-keys", "-l", "/sta"]);
    terminal.keys(&["C-c"]);
    terminal.wait(|screen| screen.contains("| interrupted") && screen.contains("\n>"), "the end of the reply");
    terminal.keys(&["C-u"]);
    terminal.ask("/stats", "messages    2 messages");
    terminal.ask("/save saved", "saved 2 messages");
    let saved = std::fs::read(terminal.path("saved")).unwrap();
    assert!(contains(&saved, br#"{"role":"user","content":"Hello"},{"role":"assistant","content":""#));
    terminal.type_text("Hello again");
    terminal.keys(&["Enter"]);
    terminal
        .wait(|screen| screen.split_once("> Hello again\n").is_some_and(|(_, answer)| answer.len() > 100), "an answer");
    terminal.keys(&["C-c"]);
    terminal.wait(|screen| screen.matches("| interrupted").count() == 2 && screen.ends_with("\n>"), "the end");
    terminal.quit();
}

#[test]
fn a_saved_conversation_goes_on_without_being_read_again() {
    let terminal = Terminal::new(&["--nothink", "--system", "Be brief."]);
    terminal.ask("What is 12 + 30?", "12 + 30 = 42\n");
    terminal.ask("/save talk", "saved 3 messages and");
    let expected = terminal.ask("What is 5 + 8?", "5 + 8 = 13\n");
    terminal.quit();

    terminal.start(&["--load", "talk"]);
    terminal.wait_for("restored 3 messages and 27 tokens, 0 read");
    let screen = terminal.ask("What is 5 + 8?", "5 + 8 = 13\n");
    assert!(figures(&screen).ends_with("27 kept | 8 generated"), "{screen}");
    assert_eq!(figures(&screen), figures(&expected), "as if it had never ended");
    assert!(!screen.contains("again)"), "{screen}");
    terminal.ask("/load talk", "restored 3 messages and 27 tokens, 0 read");
    terminal.ask("/load nowhere", "error: nowhere: it cannot be read");
    terminal.ask("/stats", "messages    3 messages");
}

/// Asks, saves, and loads in a second chat, which must hold what the first held and go on the same way.
fn goes_on_as_if_it_had_never_ended(args: &[&str], question: &str, next: &str) {
    let terminal = Terminal::new(args);
    let ask = |text: &str, count: usize| {
        terminal.type_text(text);
        terminal.keys(&["Enter"]);
        let ended = |screen: &str| screen.matches(" generated").count() == count && screen.ends_with('>');
        terminal.wait(ended, "an answer")
    };
    let asked = ask(question, 1);
    if asked.ends_with(")>") {
        terminal.type_text("main.rs");
        terminal.keys(&["Enter"]);
        terminal.wait(|screen| screen.matches(" generated").count() == 2, "an answer");
    }
    terminal.ask("/save talk", "saved ");
    let held = terminal.ask("/ctx", "context: ");
    let held = held.rsplit_once("context: ").unwrap().1.split(' ').next().unwrap().to_owned();
    assert_ne!(held, "0");
    terminal.keys(&["C-l"]);
    let expected = ask(next, 1);
    assert!(expected.contains(" kept"), "{expected}");
    terminal.quit();

    terminal.start(&["--load", "talk"]);
    let restored = terminal.wait_for("restored ");
    assert!(restored.contains(&format!(" {held} tokens, 0 read")), "{held} tokens, {restored}");
    assert_eq!(figures(&ask(next, 1)), figures(&expected));
}

#[test]
fn a_saved_conversation_holds_its_encoding_and_effort() {
    goes_on_as_if_it_had_never_ended(
        &["--encoding", "v4-0731", "--effort", "high"],
        "What is 12 + 30?",
        "What is 5 + 8?",
    );
}

#[test]
fn a_saved_conversation_with_tools_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let tools = folder.path().join("tools.json");
    std::fs::write(&tools, LIST_FILES).unwrap();
    let args = ["--nothink", "--tools", tools.to_str().unwrap()];
    goes_on_as_if_it_had_never_ended(&args, "List the files in the current folder.", "What is 5 + 8?");
}

#[test]
fn messages_of_a_killed_chat_are_remembered() {
    let terminal = Terminal::new(&["--nothink"]);
    terminal.ask("What is 12 + 30?", "12 + 30 = 42\n");
    terminal.type_text("one \\");
    terminal.keys(&["Enter"]);
    terminal.wait(|screen| screen.ends_with("> one\n…"), "the second line");
    terminal.type_text("two");
    terminal.keys(&["Enter"]);
    terminal.wait(|screen| screen.matches(" generated").count() == 2 && screen.ends_with("\n>"), "an answer");
    terminal.tmux(&["kill-session"]);
    terminal.start(&["--nothink"]);
    terminal.keys(&["Up"]);
    terminal.wait(|screen| screen.ends_with("> one\n… two"), "the message as it was sent");
    terminal.keys(&["Up", "Up"]);
    terminal.wait(|screen| screen.ends_with("> What is 12 + 30?"), "the message before");
}

#[test]
fn reading_shows_its_progress() {
    let model = tiny("tiny-iq2");
    let terminal = Terminal::new(&["-m", model.to_str().unwrap(), "--nothink", "--threads", "1", "-n", "1"]);
    std::fs::write(terminal.path("long.txt"), "lorem ipsum ".repeat(400)).unwrap();
    terminal.type_text("/read long.txt");
    terminal.keys(&["Enter"]);
    let screen = terminal.wait(|screen| screen.contains(" t/s, ") && screen.contains(" s left"), "the bar");
    let line = screen.lines().find(|line| line.starts_with("reading ")).expect("a bar");
    assert!(line.contains(" tokens, "), "{line}");
    terminal.keys(&["C-c"]);
    let screen = terminal.wait_for("your message was taken back");
    assert!(screen.contains("| interrupted") && !screen.contains("again)"), "{screen}");
    terminal.wait(|screen| screen.ends_with('>') && !screen.contains("reading "), "the prompt, without the bar");
    terminal.ask("/stats", "messages    0 messages");
}

/// The last line of figures up to the speed of the answer, without speeds.
fn figures(screen: &str) -> String {
    let line = screen.lines().rfind(|line| line.contains(" generated")).expect("a line of figures");
    let words: Vec<&str> = line.split(' ').collect();
    let is_speed = |i: usize| words[i] == "at" || words[i].starts_with("t/s") || (i > 0 && words[i - 1] == "at");
    let kept: Vec<&str> = (0..words.len()).filter(|&i| !is_speed(i)).map(|i| words[i]).collect();
    kept.join(" ").split(" | context").next().unwrap().to_owned()
}

#[test]
fn results_of_calls_are_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let tools = folder.path().join("tools.json");
    std::fs::write(&tools, LIST_FILES).unwrap();
    let terminal = Terminal::new(&["--nothink", "--tools", tools.to_str().unwrap()]);
    terminal.type_text("List the files in the current folder.");
    terminal.keys(&["Enter"]);
    let screen = terminal.wait(|screen| screen.trim_end().ends_with(r#"result of list_files(path=".")>"#), "the call");
    assert!(screen.contains("→ list_files(path=\".\")\n"), "{screen}");
    terminal.paste("main.rs\nlib.rs");
    terminal.keys(&["Enter"]);
    terminal.wait(|screen| screen.ends_with("\n>") && screen.matches(" generated").count() == 2, "an answer");
    terminal.ask("/save talk", "saved 5 messages");
    let saved = std::fs::read(terminal.path("talk")).unwrap();
    assert!(contains(&saved, br#"{"role":"tool","call_id":"call_2_0","content":"main.rs\nlib.rs"}"#));
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

// From a pipe.

/// A chat of the built-in nano that gets `input`.
fn piped(args: &[&str], input: &str) -> common::Ran {
    run_with_input(&[&["chat"], args].concat(), input.as_bytes())
}

#[test]
fn lines_of_a_pipe_are_messages() {
    let ran = piped(&[], "What is 12 + 30?\n\n/nothink\nWhat is \\\n5 + 8?\n/quit\nnever read\n");
    assert!(ran.err.contains("<think>\nOnes: 2 + 0 = 2.") && ran.err.matches("<think>").count() == 1, "{}", ran.err);
    assert_eq!(ran.err.matches(" generated").count(), 2, "{}", ran.err);
    assert!(!ran.err.contains('\x1b') && !ran.err.contains("/help"), "{}", ran.err);
    let out = String::from_utf8(ran.success()).unwrap();
    assert!(out.starts_with("12 + 30 = 42\n") && out.lines().count() == 2, "{out}");
}

#[test]
fn an_error_ends_a_script() {
    let ran = piped(&["--nothink"], "/foo\nWhat is 12 + 30?\n");
    assert!(ran.code == Some(1) && ran.out.is_empty() && ran.err.contains("no command /foo"), "{}", ran.err);
    let ran = run_with_input(&["chat"], b"\xff\n");
    assert!(ran.code == Some(1) && ran.err.contains("not UTF-8"), "{}", ran.err);
}

#[test]
fn a_full_context_keeps_the_conversation() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("talk");
    let path = path.to_str().unwrap();
    let ran = piped(&["--nothink", "--ctx", "30"], &format!("What is 12 + 30?\n/save {path}\nWhat is 5 + 8?\n"));
    assert!(ran.code == Some(1) && ran.err.contains("too long for the context"), "{}", ran.err);
    let ran = piped(&["--load", path, "--ctx", "40"], "/ctx 8192\nWhat is 5 + 8?\n");
    assert!(ran.err.contains("restored 2 messages"), "{}", ran.err);
    assert_eq!(ran.success(), b"5 + 8 = 13\n");
}

#[test]
fn tools_and_their_results_can_be_piped() {
    let dir = tempfile::tempdir().unwrap();
    let tools = dir.path().join("tools.json");
    std::fs::write(&tools, LIST_FILES).unwrap();
    let args = ["--nothink", "--tools", tools.to_str().unwrap()];
    let out = piped(&args, "List the files in the current folder.\n\nWhat is 12 + 30?\n").success();
    let out = String::from_utf8(out).unwrap();
    assert!(out.contains("→ list_files(path=\".\")\n"), "{out}");

    for (text, expected) in [("{}", "array"), ("[1]", "a tool is 1"), ("[{\"name\": \"\"}]", "not empty"), ("[", "EOF")]
    {
        std::fs::write(&tools, text).unwrap();
        let ran = piped(&args, "");
        assert!(ran.code == Some(1) && ran.err.contains(expected) && ran.err.contains("tools.json"), "{}", ran.err);
    }
}

/// A saved conversation at `path`.
fn save(path: &Path) {
    let input = format!("What is 12 + 30?\n/save {}\n", path.display());
    piped(&["--nothink"], &input).success();
}

#[test]
fn damaged_and_foreign_conversations_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("talk");
    save(&path);
    let whole = std::fs::read(&path).unwrap();
    let load = |args: &[&str]| {
        let ran = piped(&[&["--load", path.to_str().unwrap()], args].concat(), "");
        assert!(ran.code == Some(1) && ran.out.is_empty() && ran.err.contains("talk: "), "{:?} {}", ran.code, ran.err);
        ran.err
    };
    for (args, expected) in
        [(&["--ctx", "10"][..], "larger context"), (&["-m", tiny("tiny-q4").to_str().unwrap()], "another model")]
    {
        let err = load(args);
        assert!(err.contains(expected), "{err}");
    }
    for end in [0, 5, 15, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..end]).unwrap();
        load(&[]);
    }
    for at in [3, 9, 14, 25, 300, whole.len() / 2, whole.len() - 2] {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        std::fs::write(&path, damaged).unwrap();
        load(&[]);
    }
}

#[test]
fn a_conversation_takes_its_place_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("talk");
    save(&path);
    save(&path);
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1, "no temporary file stays");
    assert!(std::fs::read(&path).unwrap().starts_with(b"infallCH"));
    let ran = piped(&["--nothink"], "/save /nowhere/talk\n");
    assert!(ran.code == Some(1) && ran.err.contains("cannot write to /nowhere/talk"), "{}", ran.err);
}

#[test]
fn an_interrupt_ends_a_script() {
    let model = tiny("tiny-iq2");
    let args = ["chat", "-m", model.to_str().unwrap(), "--nothink", "--temp", "0", "--threads", "1"];
    let mut child = infall(&args).stdin(Stdio::piped()).spawn().unwrap();
    use std::io::Write;
    child.stdin.as_mut().unwrap().write_all(b"Hello\n").unwrap();
    let mut begun = [0; 20];
    child.stdout.as_mut().unwrap().read_exact(&mut begun).unwrap();
    signal(child.id(), "INT");
    let ran = finish(child);
    assert!(ran.code == Some(130) && ran.err.contains("| interrupted"), "{:?} {}", ran.code, ran.err);
}

#[test]
fn flags_that_exclude_each_other_are_refused() {
    for args in
        [&["--load", "x", "--system", "y"][..], &["--load", "x", "--tools", "y"], &["--nothink", "--effort", "max"]]
    {
        assert_eq!(run(&[&["chat"], args].concat()).code, Some(2), "{args:?}");
    }
}

#[test]
fn flags_stand_above_a_saved_conversation() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("talk");
    let path = path.to_str().unwrap();
    let save = format!("/think low\nWhat is 12 + 30?\n/save {path}\n");
    piped(&["--encoding", "v4-0731"], &save).success();
    let load = |args: &[&str]| piped(&[&["--load", path], args].concat(), "/stats\n");
    let ran = load(&[]);
    assert!(ran.err.contains("encoding v4-0731, as the conversation was saved"), "{}", ran.err);
    assert!(ran.err.contains("reasoning   on, effort low"), "{}", ran.err);
    let ran = load(&["--encoding", "v4-2604"]);
    assert!(ran.code == Some(1) && ran.err.contains("v4-2604"), "{}", ran.err);
    for (args, expected) in
        [(&["--encoding", "v4-2604", "--effort", "max"][..], "on, effort max"), (&["--nothink"], "off")]
    {
        let ran = load(args);
        assert!(ran.code == Some(0) && ran.err.contains(&format!("reasoning   {expected}")), "{}", ran.err);
    }
}

#[test]
fn a_file_that_is_no_conversation_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notes");
    std::fs::write(&path, "dear to me").unwrap();
    for target in [path.as_path(), dir.path()] {
        let ran = piped(&["--nothink"], &format!("/save {}\n", target.display()));
        assert!(ran.code == Some(1) && ran.err.contains("left it as it is"), "{}", ran.err);
    }
    assert_eq!(std::fs::read(&path).unwrap(), b"dear to me");
}

#[test]
fn what_has_no_end_or_cannot_fit_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    assert!(Command::new("mkfifo").arg(path("pipe")).status().unwrap().success());
    std::fs::File::create(path("huge")).unwrap().set_len(1 << 40).unwrap();
    for (name, expected) in [
        ("pipe", "found a pipe or a device"),
        ("", "found a folder"),
        ("/dev/zero", "found a pipe or a device"),
        ("huge", "found 1099511627776 bytes, expected at most"),
    ] {
        let file = path(name);
        for ran in [
            piped(&[], &format!("/read {file}\n")),
            piped(&["--system", &format!("@{file}")], ""),
            run(&["run", "--system", &format!("@{file}"), "Hello"]),
        ] {
            assert!(ran.code == Some(1) && ran.err.contains(expected), "{}", ran.err);
        }
        let ran = piped(&[], &format!("/load {file}\n"));
        assert!(ran.code == Some(1) && ran.err.contains("error: "), "{}", ran.err);
    }
}

#[test]
fn a_path_at_the_beginning_is_a_message() {
    let ran = piped(&["--nothink"], "/usr/bin/env is what?\n");
    assert!(!ran.err.contains("no command") && ran.err.contains(" generated"), "{}", ran.err);
}
