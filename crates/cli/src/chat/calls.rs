//! A tool call as people read it: `list_files(path=".", depth=2)`.

use serde_json::{Map, Value};
use text::prompt::Call;

use crate::terminal::harmless;

/// Columns up to which a call stays on one line.
const LINE_COLUMNS: usize = 100;
/// Characters of a call in a prompt.
const PROMPT_CHARACTERS: usize = 60;

/// The call, on one line if it is short, else with one argument a line; a text of several lines stands as a block.
pub fn pretty(call: &Call) -> String {
    let Some(arguments) = arguments(call) else { return shown(&format!("{}({})", call.name, call.arguments)) };
    let line = one_line(call, &arguments);
    let has_block = arguments.values().any(|value| value.as_str().is_some_and(|text| text.contains('\n')));
    if line.chars().count() <= LINE_COLUMNS && !has_block {
        return shown(&line);
    }
    let argument = |(name, value): (&String, &Value)| match value.as_str() {
        Some(text) if text.contains('\n') => {
            let block: String = text.lines().map(|line| format!("\n    │ {line}")).collect();
            format!("  {name}={block}\n")
        }
        _ => format!("  {name}={value}\n"),
    };
    shown(&format!("{}(\n{})", call.name, arguments.iter().map(argument).collect::<String>()))
}

/// The call on one line, cut if it is long, for the question after its result.
pub fn short(call: &Call) -> String {
    let line = match arguments(call) {
        Some(arguments) => one_line(call, &arguments),
        None => format!("{}(…)", call.name),
    };
    let line = shown(&line).replace('\n', "␊").replace('\t', "␉");
    match line.char_indices().nth(PROMPT_CHARACTERS) {
        Some((end, _)) => format!("{}…)", &line[..end]),
        None => line,
    }
}

/// The arguments, which the parser lets pass only as an object, though a saved conversation may hold anything.
fn arguments(call: &Call) -> Option<Map<String, Value>> {
    serde_json::from_str(&call.arguments).ok()
}

fn one_line(call: &Call, arguments: &Map<String, Value>) -> String {
    let argument = |(name, value): (&String, &Value)| format!("{name}={value}");
    format!("{}({})", call.name, arguments.iter().map(argument).collect::<Vec<_>>().join(", "))
}

fn shown(text: &str) -> String {
    text.chars().map(harmless).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(arguments: &str) -> Call {
        Call { id: None, name: "write".into(), arguments: arguments.into() }
    }

    #[test]
    fn short_calls_stay_on_a_line_and_texts_become_blocks() {
        assert_eq!(pretty(&call(r#"{"path": ".", "depth": 2}"#)), r#"write(path=".", depth=2)"#);
        assert_eq!(pretty(&call("{}")), "write()");
        let block = pretty(&call(r#"{"path": "a", "text": "one\ntwo"}"#));
        assert_eq!(block, "write(\n  path=\"a\"\n  text=\n    │ one\n    │ two\n)");
        let long = format!(r#"{{"text": "{}"}}"#, "x".repeat(200));
        assert_eq!(pretty(&call(&long)).lines().count(), 3);
        assert!(short(&call(&long)).ends_with("xxx…)") && short(&call(&long)).chars().count() < 70);
    }

    #[test]
    fn a_call_cannot_drive_the_terminal() {
        let shown = pretty(&Call { id: None, name: "a\x1b[2J".into(), arguments: r#"{"b": "\u001b\nc"}"#.into() });
        assert!(!shown.contains('\x1b') && shown.contains("a␛[2J"), "{shown}");
        assert!(!short(&call(r#"{"a\nb": "\n"}"#)).contains('\n'));
    }
}
