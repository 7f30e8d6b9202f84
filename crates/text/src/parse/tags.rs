//! The tags that the parser knows, and how the text at a `<` compares with them.

use crate::dsml;

/// Begins reasoning.
pub(super) const THINK: &str = "<think>";
/// Ends reasoning.
pub(super) const END_THINK: &str = "</think>";
/// Ends a turn.
pub(super) const END_OF_TURN: &str = "<｜end▁of▁sentence｜>";
/// What only markup of calls begins with.
pub(super) const MARKED: &str = "<｜DSML｜";

/// How the tags inside a block are spelt.
#[derive(Debug)]
pub(super) struct Tags {
    /// Begins a call's header.
    pub(super) invoke_opener: &'static str,
    /// Ends a call.
    pub(super) invoke_closer: &'static str,
    /// Begins a parameter's header.
    pub(super) parameter_opener: &'static str,
    /// Ends a parameter.
    pub(super) parameter_closer: &'static str,
    /// Each of these ends the block.
    pub(super) block_closers: &'static [&'static str],
}

static DSML: Tags = Tags {
    invoke_opener: dsml::INVOKE_OPENER,
    invoke_closer: dsml::INVOKE_CLOSER,
    parameter_opener: dsml::PARAMETER_OPENER,
    parameter_closer: dsml::PARAMETER_CLOSER,
    block_closers: &[dsml::BLOCK_CLOSER, "</｜DSML｜toolcalls>", "</｜DSML｜tool>"],
};

static LOST_BAR: Tags = Tags {
    invoke_opener: "<DSML｜invoke",
    invoke_closer: "</DSML｜invoke>",
    parameter_opener: "<DSML｜parameter",
    parameter_closer: "</DSML｜parameter>",
    block_closers: &["</DSML｜tool_calls>"],
};

static PLAIN: Tags = Tags {
    invoke_opener: "<invoke",
    invoke_closer: "</invoke>",
    parameter_opener: "<parameter",
    parameter_closer: "</parameter>",
    block_closers: &["</tool_calls>"],
};

/// What begins a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// An opener that nothing but a block begins with.
    Marked,
    /// `<tool_calls>`, which prose may mention: a block if a call of a declared tool follows at once and is closed.
    Plain,
    /// A call without an opener before it: a block if it is a call of a declared tool and its closer comes.
    Bare,
}

/// A way in which a block begins.
#[derive(Debug)]
pub(super) struct Opener {
    /// The text.
    pub(super) text: &'static str,
    /// What it stands for.
    pub(super) form: Form,
    /// The tags of the block.
    pub(super) tags: &'static Tags,
}

/// Every way in which a block begins (docs/spec/conversation.md §4.3, rule 4), the canonical one first.
pub(super) static OPENERS: [Opener; 6] = [
    Opener { text: dsml::BLOCK_OPENER, form: Form::Marked, tags: &DSML },
    Opener { text: "<｜DSML｜toolcalls>", form: Form::Marked, tags: &DSML },
    Opener { text: "<｜DSML｜tool>", form: Form::Marked, tags: &DSML },
    Opener { text: dsml::INVOKE_OPENER, form: Form::Bare, tags: &DSML },
    Opener { text: "<DSML｜tool_calls>", form: Form::Marked, tags: &LOST_BAR },
    Opener { text: "<tool_calls>", form: Form::Plain, tags: &PLAIN },
];

/// How a text compares with what it may begin with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Match<T> {
    /// It begins with this one.
    Whole(T),
    /// It is the beginning of one.
    Partial,
    /// Neither.
    No,
}

/// Compares `text` with one tag after the other. No tag is the beginning of another one.
pub(super) fn compare<T>(text: &str, tags: impl IntoIterator<Item = (&'static str, T)>) -> Match<T> {
    let mut found = Match::No;
    for (tag, meaning) in tags {
        if text.starts_with(tag) {
            return Match::Whole(meaning);
        }
        if tag.starts_with(text) {
            found = Match::Partial;
        }
    }
    found
}

/// How many bytes at the end of `text` are the beginning of [`END_OF_TURN`], or all of it.
pub(super) fn end_of_turn_bytes(text: &str) -> usize {
    let window = text.len().saturating_sub(END_OF_TURN.len());
    let Some(at) = memchr::memrchr(b'<', &text.as_bytes()[window..]) else { return 0 };
    let tail = &text.as_bytes()[window + at..];
    if END_OF_TURN.as_bytes().starts_with(tail) { tail.len() } else { 0 }
}
