//! The keyword `pattern` over texts.
//!
//! As inside JSON, where the library reads it: the pattern may match anywhere in the text unless `^` and `$` hold it to the ends;
//! `\d` and `\w` are ASCII as in ECMAScript; and anchors elsewhere, word boundaries and look-around are refused.

use llguidance::regex_to_lark;
use regex_syntax::hir::{Dot, Hir, HirKind, Look, Repetition};

/// An expression that matches the whole of the texts in which `pattern` matches somewhere.
pub fn whole_text(pattern: &str) -> Result<String, String> {
    let parsed = regex_syntax::parse(&regex_to_lark(pattern, "dw"));
    let refused = |what: &str| format!("`pattern` {pattern:?} {what}");
    let parsed = parsed.map_err(|error| refused(&format!("is not supported: {}", last_line(&error.to_string()))))?;
    let whole = between(&parsed, true, true);
    let whole =
        whole.ok_or_else(|| refused("has an anchor or a boundary that is not at an end, which is not supported"))?;
    Ok(whole.to_string())
}

/// `part` with any text before and after it where it stands at an end of the pattern and no anchor holds it there.
fn between(part: &Hir, at_start: bool, at_end: bool) -> Option<Hir> {
    let extended = |part: Hir, before: bool, after: bool| {
        Hir::concat([before.then(any), Some(part), after.then(any)].into_iter().flatten().collect())
    };
    match part.kind() {
        HirKind::Look(Look::Start) if at_start => Some(extended(Hir::empty(), false, at_end)),
        HirKind::Look(Look::End) if at_end => Some(extended(Hir::empty(), at_start, false)),
        HirKind::Capture(group) => between(&group.sub, at_start, at_end),
        HirKind::Alternation(options) => {
            let options: Option<Vec<Hir>> = options.iter().map(|option| between(option, at_start, at_end)).collect();
            options.map(Hir::alternation)
        }
        HirKind::Concat(parts) => {
            let last = parts.len() - 1;
            let parts = parts.iter().enumerate();
            let parts = parts.map(|(i, part)| between(part, at_start && i == 0, at_end && i == last));
            parts.collect::<Option<Vec<Hir>>>().map(Hir::concat)
        }
        _ if part.properties().look_set().is_empty() => Some(extended(part.clone(), at_start, at_end)),
        _ => None,
    }
}

/// Any text.
fn any() -> Hir {
    Hir::repetition(Repetition { min: 0, max: None, greedy: true, sub: Box::new(Hir::dot(Dot::AnyChar)) })
}

/// The library shows the expression before it says what is wrong.
fn last_line(message: &str) -> &str {
    message.lines().last().unwrap_or_default().trim_start_matches("error: ")
}
