//! A second try after a malformed block of calls: the model is told, as by a tool, that nothing was executed.

use session::{StopReason, TurnOptions, TurnOutcome, Vocabulary};
use text::Segment;
use text::parse::Finish;

/// Before the instructions of the prompt, which are repeated.
const WHAT_WENT_WRONG: &str = "Error: the tool calls of the previous turn were malformed, so nothing was executed. \
    Write a new, complete block of tool calls in the exact format of your instructions, or answer without tools. \
    The instructions were:\n\n";

/// Whether a turn is one to try again: it ended by itself, with calls that nobody can read.
pub fn is_due(outcome: &TurnOutcome) -> bool {
    let ended_itself =
        matches!(outcome.reason, StopReason::EndOfTurn(_) | StopReason::CallsClosed | StopReason::Runaway);
    outcome.turn.malformed && outcome.turn.finish == Finish::Stop && ended_itself
}

/// What follows the turn's own tokens: its end, the error, and the opener of the next turn.
pub fn tokens(vocabulary: &Vocabulary, prompt: &[u32], options: &TurnOptions, outcome: &TurnOutcome) -> Vec<u32> {
    let (control, tokenizer) = (vocabulary.control(), vocabulary.tokenizer());
    let is_open = options.parse.thinking && !outcome.tokens.contains(&control.end_think);
    let instructions = prompt.iter().position(|&token| token == control.user).map_or(&[][..], |end| &prompt[1..end]);

    let mut tokens = Vec::new();
    tokens.extend(is_open.then_some(control.end_think));
    tokens.extend([control.eos, control.user]);
    tokens.extend(tokenizer.encode_segments(&[Segment::Text(format!("<tool_result>{WHAT_WENT_WRONG}"))]));
    tokens.extend_from_slice(instructions);
    tokens.extend(tokenizer.encode_segments(&[Segment::Text("</tool_result>".to_owned())]));
    tokens.push(control.assistant);
    tokens.push(if options.parse.thinking { control.think } else { control.end_think });
    tokens
}
