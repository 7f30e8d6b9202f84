//! Markdown as a terminal shows it, while it streams.
//!
//! What is printed follows from the characters alone, never from the pieces in which they came: each character is taken
//! by itself, and is held back as long as the characters after it can change its look. Held back are the first
//! characters of a line that may begin a block, a span from its opening mark (`**`, `` ` ``, `[`) to the closing one,
//! and the word under way, which may have to go to the next line. A mark that nothing closes on its line is shown as it
//! was written: no character is lost.
//!
//! Shown: headings, bold, italic, struck text, inline and fenced code, lists, quotes, links, rules. Code and the rows of
//! tables are left as they are, unwrapped.

use unicode_width::UnicodeWidthChar;

use crate::terminal::harmless;

/// Bytes after which an opening mark without a closing one is taken for ordinary text.
const HOLD_BYTES: usize = 400;
/// Characters that may open a span.
const OPENERS: [char; 6] = ['\\', '`', '*', '_', '~', '['];
/// Columns of a rule.
const RULE_COLUMNS: usize = 40;

/// How characters look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Style {
    bold: bool,
    dim: bool,
    italic: bool,
    underlined: bool,
    struck: bool,
    code: bool,
}

impl Style {
    /// Faint.
    pub const DIM: Style = Style { dim: true, ..Style::PLAIN };
    const PLAIN: Style =
        Style { bold: false, dim: false, italic: false, underlined: false, struck: false, code: false };

    /// The escape sequence that switches from any style to this one.
    fn sequence(self) -> String {
        let codes = [
            (self.bold, ";1"),
            (self.dim, ";2"),
            (self.italic, ";3"),
            (self.underlined, ";4"),
            (self.struck, ";9"),
            (self.code, ";36"),
        ];
        let set: String = codes.iter().filter(|(is_set, _)| *is_set).map(|(_, code)| *code).collect();
        format!("\x1b[0{set}m")
    }
}

/// Plain `text` with its words wrapped at `columns`.
pub fn wrap(text: &str, columns: Option<usize>) -> String {
    let mut paper = Paper::new(columns);
    paper.put_text(text, Style::PLAIN);
    paper.end_word();
    paper.out
}

/// Renders one text.
pub struct Markdown {
    base: Style,
    paper: Paper,
    /// The fence that would end the code under way: its character and least length.
    fence: Option<(char, usize)>,
    line: Line,
}

/// Where in a line the next character falls.
enum Line {
    /// The block is not known yet; these are the characters held back.
    Start(String),
    /// In text with spans: the style of the line, the character before the held ones, and those held back.
    Spans { style: Style, before: char, held: String },
    /// Printed as it comes.
    Verbatim(Style),
}

impl Markdown {
    /// A text whose plain parts look like `base`, its words wrapped at `columns` if there is such a limit.
    pub fn new(base: Style, columns: Option<usize>) -> Markdown {
        Markdown { base, paper: Paper::new(columns), fence: None, line: Line::Start(String::new()) }
    }

    /// Words are wrapped at `columns` from here on.
    pub fn set_columns(&mut self, columns: Option<usize>) {
        self.paper.columns = columns;
    }

    /// Takes the next characters and returns what is to be printed.
    pub fn push(&mut self, text: &str) -> String {
        text.chars().for_each(|c| self.character(harmless(c)));
        std::mem::take(&mut self.paper.out)
    }

    /// Ends the text. The last line is ended as well, unless nothing has been printed on it.
    pub fn finish(mut self) -> String {
        self.end_line();
        // What takes no column, a tab for one, may still have begun a style.
        if self.paper.column > 0 || self.paper.style != Style::PLAIN {
            self.paper.line_break();
        }
        self.paper.out
    }

    fn character(&mut self, c: char) {
        if c == '\n' {
            self.end_line();
            self.paper.line_break();
            self.line = Line::Start(String::new());
            return;
        }
        match &mut self.line {
            Line::Start(held) => {
                held.push(c);
                let held = std::mem::take(held);
                self.line = self.begin(held, false);
            }
            Line::Spans { style, before, held } => {
                held.push(c);
                spans(&mut self.paper, held, *style, before, false);
            }
            Line::Verbatim(style) => self.paper.put_now(c, *style),
        }
    }

    /// What was held back is all there is of the line.
    fn end_line(&mut self) {
        if let Line::Start(held) = &mut self.line {
            let held = std::mem::take(held);
            self.line = self.begin(held, true);
        }
        if let Line::Spans { style, before, held } = &mut self.line {
            spans(&mut self.paper, held, *style, before, true);
        }
        self.paper.end_word();
    }

    /// Decides what block the line belongs to, if its first characters tell; `ended` if these are all.
    fn begin(&mut self, held: String, ended: bool) -> Line {
        let block = match self.fence {
            Some(fence) => block_in_code(&held, fence, ended),
            None => block(&held, ended),
        };
        let mut style = self.base;
        let rest = match block {
            Block::Unknown => return Line::Start(held),
            Block::Text => held.as_str(),
            Block::Heading { level, rest } => {
                (style.bold, style.underlined) = (true, level == 1);
                rest
            }
            Block::Item { indent, mark, rest } => {
                self.paper.put_text(&format!("{indent}{mark} "), style);
                self.paper.hang();
                rest
            }
            Block::Quote { rest } => {
                self.paper.put_text("│ ", Style::DIM);
                self.paper.hang();
                let rest = rest.to_owned();
                return self.begin(rest, ended);
            }
            Block::Verbatim { is_code } => {
                style.code = is_code;
                held.chars().for_each(|c| self.paper.put_now(c, style));
                return Line::Verbatim(style);
            }
            Block::Fence { opens } => {
                self.fence = opens;
                held.chars().for_each(|c| self.paper.put_now(c, Style::DIM));
                return Line::Verbatim(Style::DIM);
            }
            Block::Rule => {
                (0..RULE_COLUMNS).for_each(|_| self.paper.put_now('─', Style::DIM));
                return Line::Verbatim(Style::DIM);
            }
        };
        let (mut text, mut before) = (rest.to_owned(), ' ');
        spans(&mut self.paper, &mut text, style, &mut before, ended);
        Line::Spans { style, before, held: text }
    }
}

/// What the first characters of a line say.
enum Block<'a> {
    /// Nothing yet.
    Unknown,
    Text,
    Heading {
        level: usize,
        rest: &'a str,
    },
    Item {
        indent: &'a str,
        mark: &'a str,
        rest: &'a str,
    },
    Quote {
        rest: &'a str,
    },
    /// A line of code or of a table.
    Verbatim {
        is_code: bool,
    },
    /// Begins code, which ends with a fence like this, or ends it.
    Fence {
        opens: Option<(char, usize)>,
    },
    Rule,
}

/// The block of a line outside code that begins with `held`; never [`Block::Unknown`] if the line ends there.
fn block(held: &str, ended: bool) -> Block<'_> {
    let text = held.trim_start_matches(' ');
    let indent = &held[..held.len() - text.len()];
    let Some(first) = text.chars().next() else {
        return if ended { Block::Text } else { Block::Unknown };
    };
    let rest = text.trim_start_matches(first);
    let run = (text.len() - rest.len()) / first.len_utf8();
    let is_open = rest.is_empty() && !ended;
    match first {
        '#' if run <= 6 && rest.starts_with(' ') => Block::Heading { level: run, rest: &rest[1..] },
        '#' if run <= 6 && is_open => Block::Unknown,
        '`' | '~' if run >= 3 && !rest.contains(first) => match ended {
            true => Block::Fence { opens: Some((first, run)) },
            false => Block::Unknown,
        },
        '`' | '~' if is_open => Block::Unknown,
        '-' | '*' | '+' if run == 1 && rest.starts_with(' ') => Block::Item { indent, mark: "•", rest: &rest[1..] },
        '-' | '*' | '_' if run >= 3 && rest.trim_end().is_empty() => match ended {
            true => Block::Rule,
            false => Block::Unknown,
        },
        '-' | '*' | '_' | '+' if is_open => Block::Unknown,
        '>' if text.len() == 1 && !ended => Block::Unknown,
        '>' => Block::Quote { rest: text[1..].strip_prefix(' ').unwrap_or(&text[1..]) },
        '|' => Block::Verbatim { is_code: false },
        '0'..='9' => numbered(text, indent, ended),
        _ => Block::Text,
    }
}

/// The block of a line that begins with a digit: `12. item`, or text.
fn numbered<'a>(text: &'a str, indent: &'a str, ended: bool) -> Block<'a> {
    let after = text.trim_start_matches(|c: char| c.is_ascii_digit());
    let rest = after.strip_prefix(['.', ')']);
    match rest.and_then(|rest| rest.strip_prefix(' ')) {
        Some(rest) => Block::Item { indent, mark: &text[..text.len() - rest.len() - 1], rest },
        None if (after.is_empty() || rest == Some("")) && !ended => Block::Unknown,
        None => Block::Text,
    }
}

/// The block of a line inside code that `fence` ends.
fn block_in_code(held: &str, (mark, length): (char, usize), ended: bool) -> Block<'static> {
    let text = held.trim_start_matches(['>', ' ']);
    let rest = text.trim_start_matches(mark);
    let run = text.len() - rest.len();
    match rest.trim_end().is_empty() {
        true if ended && run >= length => Block::Fence { opens: None },
        true if !ended => Block::Unknown,
        _ => Block::Verbatim { is_code: true },
    }
}

/// Prints the spans at the beginning of `held` that are complete, and removes them; all of it if the line `ended`.
fn spans(paper: &mut Paper, held: &mut String, style: Style, before: &mut char, ended: bool) {
    let mut done = 0;
    while let Some((bytes, span)) = next_span(&held[done..], *before, ended) {
        let text = &held[done..done + bytes];
        let nested = |paper: &mut Paper, inner: &str, style: Style| {
            spans(paper, &mut inner.to_owned(), style, &mut ' ', true);
        };
        match span {
            Span::Text(text) => paper.put_text(text, style),
            Span::Code(code) => paper.put_text(code, Style { code: true, ..style }),
            Span::Emphasis { inner, marks } => {
                let (bold, italic) = (style.bold || marks >= 2, style.italic || marks % 2 == 1);
                nested(paper, inner, Style { bold, italic, ..style });
            }
            Span::Struck(inner) => nested(paper, inner, Style { struck: true, ..style }),
            Span::Link { label, target } => {
                nested(paper, label, Style { underlined: true, ..style });
                if label != target {
                    paper.put_text(&format!(" ({target})"), Style { dim: true, ..style });
                }
            }
        }
        *before = text.chars().next_back().expect("no span is empty");
        done += bytes;
    }
    held.drain(..done);
}

enum Span<'a> {
    Text(&'a str),
    Code(&'a str),
    /// Between so many `*` or `_` on each side.
    Emphasis {
        inner: &'a str,
        marks: usize,
    },
    Struck(&'a str),
    Link {
        label: &'a str,
        target: &'a str,
    },
}

/// The span that `text` begins with and its bytes; `None` if there is none or if more characters can change it.
fn next_span(text: &str, before: char, ended: bool) -> Option<(usize, Span<'_>)> {
    let first = text.chars().next()?;
    let ended = ended || text.len() > HOLD_BYTES;
    let run = text.len() - text.trim_start_matches(first).len();
    if !OPENERS.contains(&first) {
        let bytes = text.find(OPENERS).unwrap_or(text.len());
        return Some((bytes, Span::Text(&text[..bytes])));
    }
    if run == text.len() && !ended {
        return None;
    }
    let literal = |bytes| (bytes, Span::Text(&text[..bytes]));
    let found = match first {
        // Only marks that mean something here: LaTeX keeps its `\(` and `\\`.
        '\\' => match text[1..].chars().next() {
            Some(c @ ('*' | '_' | '`' | '~' | '#' | '|')) => Found::Span(1 + c.len_utf8(), Span::Text(&text[1..2])),
            _ => return Some(literal(1)),
        },
        '`' => code(text, run, ended),
        '*' | '_' if run <= 3 => delimited(text, first, run, before, ended),
        '~' if run == 2 => delimited(text, first, run, before, ended),
        '[' => link(text),
        _ => Found::Nothing,
    };
    match found {
        Found::Span(bytes, span) => Some((bytes, span)),
        Found::Unfinished if !ended => None,
        Found::Unfinished | Found::Nothing => Some(literal(if first == '[' { 1 } else { run })),
    }
}

/// What an opening mark turned out to be.
enum Found<'a> {
    /// A span of so many bytes.
    Span(usize, Span<'a>),
    /// Perhaps a span, if more follows.
    Unfinished,
    /// None.
    Nothing,
}

/// Code between runs of `marks` backticks.
fn code(text: &str, marks: usize, ended: bool) -> Found<'_> {
    let mut at = marks;
    while let Some(found) = text[at..].find('`') {
        let start = at + found;
        let run = text[start..].len() - text[start..].trim_start_matches('`').len();
        at = start + run;
        if at == text.len() && !ended {
            break;
        }
        if run == marks {
            let code = &text[marks..start];
            let inner = code.strip_prefix(' ').and_then(|code| code.strip_suffix(' '));
            return Found::Span(at, Span::Code(inner.filter(|code| !code.trim().is_empty()).unwrap_or(code)));
        }
    }
    Found::Unfinished
}

/// Text between runs of `marks` marks. Inside words marks mean nothing: `a*b*c` and `snake_case` are what they look like.
fn delimited(text: &str, mark: char, marks: usize, before: char, ended: bool) -> Found<'_> {
    let opens = text[marks..].chars().next().is_some_and(|c| !c.is_whitespace()) && !before.is_alphanumeric();
    if !opens {
        return Found::Nothing;
    }
    let mut at = marks;
    while let Some(found) = text[at..].find(mark) {
        let start = at + found;
        let run = text[start..].len() - text[start..].trim_start_matches(mark).len();
        at = start + run;
        if at == text.len() && !ended {
            break;
        }
        let closes = !text[..start].ends_with(char::is_whitespace) && !text[at..].starts_with(char::is_alphanumeric);
        // `**bold *both***`: the outer marks are the last ones.
        if closes && (run == marks || (marks == 2 && run == 3)) {
            let inner = &text[marks..at - marks];
            return Found::Span(at, if mark == '~' { Span::Struck(inner) } else { Span::Emphasis { inner, marks } });
        }
    }
    Found::Unfinished
}

/// `[label](target)`.
fn link(text: &str) -> Found<'_> {
    let Some(label_end) = text.find(']') else { return Found::Unfinished };
    let Some(opening) = text[label_end + 1..].chars().next() else { return Found::Unfinished };
    let target_start = label_end + 2;
    if opening != '(' || label_end == 1 {
        return Found::Nothing;
    }
    match text[target_start..].find(')') {
        Some(0) => Found::Nothing,
        Some(bytes) => {
            let (label, target) = (&text[1..label_end], &text[target_start..target_start + bytes]);
            Found::Span(target_start + bytes + 1, Span::Link { label, target })
        }
        None => Found::Unfinished,
    }
}

/// The page: styled characters become bytes, words that do not fit go to the next line.
struct Paper {
    columns: Option<usize>,
    out: String,
    style: Style,
    /// Columns printed on this line.
    column: usize,
    /// Columns before the text of an item or a quote, in which further lines of it are indented.
    indent: usize,
    /// Spaces since the last word, printed once another follows on the same line.
    spaces: Vec<Style>,
    word: Vec<(char, Style)>,
}

impl Paper {
    fn new(columns: Option<usize>) -> Paper {
        let style = Style::PLAIN;
        Paper { columns, out: String::new(), style, column: 0, indent: 0, spaces: Vec::new(), word: Vec::new() }
    }

    fn put_text(&mut self, text: &str, style: Style) {
        for c in text.chars() {
            if c == ' ' {
                self.end_word();
                self.spaces.push(style);
                continue;
            }
            // Scripts without spaces may be broken after any character.
            let is_wide = c.width() == Some(2);
            if is_wide {
                self.end_word();
            }
            self.word.push((c, style));
            if is_wide {
                self.end_word();
            }
        }
    }

    /// Prints `c` wherever it falls.
    fn put_now(&mut self, c: char, style: Style) {
        if self.style != style {
            self.style = style;
            self.out.push_str(&style.sequence());
        }
        self.out.push(c);
        self.column += c.width().unwrap_or(0);
    }

    fn end_word(&mut self) {
        if self.word.is_empty() {
            return;
        }
        let (spaces, word) = (std::mem::take(&mut self.spaces), std::mem::take(&mut self.word));
        let width: usize = word.iter().map(|(c, _)| c.width().unwrap_or(0)).sum();
        let fits = self.columns.is_none_or(|columns| self.column + spaces.len() + width <= columns);
        if fits || self.column <= self.indent {
            spaces.into_iter().for_each(|style| self.put_now(' ', style));
        } else {
            let indent = self.indent;
            self.line_break();
            self.indent = indent;
            (0..indent).for_each(|_| self.put_now(' ', Style::PLAIN));
        }
        word.into_iter().for_each(|(c, style)| self.put_now(c, style));
    }

    /// From here on further lines are indented to this column.
    fn hang(&mut self) {
        self.end_word();
        let spaces = std::mem::take(&mut self.spaces);
        spaces.into_iter().for_each(|style| self.put_now(' ', style));
        self.indent = self.column;
    }

    fn line_break(&mut self) {
        if self.style != Style::PLAIN {
            self.style = Style::PLAIN;
            self.out.push_str(&Style::PLAIN.sequence());
        }
        self.out.push('\n');
        self.spaces.clear();
        (self.column, self.indent) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shown(text: &str, columns: Option<usize>) -> String {
        let mut markdown = Markdown::new(Style::PLAIN, columns);
        markdown.push(text) + &markdown.finish()
    }

    /// What is left on the screen, without styles.
    fn plain(text: &str, columns: Option<usize>) -> String {
        let mut plain = String::new();
        let mut rest = shown(text, columns);
        while let Some(at) = rest.find('\x1b') {
            plain.push_str(&rest[..at]);
            rest = rest[at..].split_once('m').unwrap().1.to_owned();
        }
        plain + &rest
    }

    #[test]
    fn spans() {
        for (text, expected) in [
            ("a **b** c", "a \x1b[0;1mb\x1b[0m c\n"),
            ("*a* _b_ ***c***", "\x1b[0;3ma\x1b[0m \x1b[0;3mb\x1b[0m \x1b[0;1;3mc\x1b[0m\n"),
            ("**a *b***", "\x1b[0;1ma \x1b[0;1;3mb\x1b[0m\n"),
            ("`a*b*` ``c`d``", "\x1b[0;36ma*b*\x1b[0m \x1b[0;36mc`d\x1b[0m\n"),
            ("~~a~~", "\x1b[0;9ma\x1b[0m\n"),
            ("[a](b)", "\x1b[0;4ma\x1b[0;2m (b)\x1b[0m\n"),
            (r"\*a\* \(x\) \\", "*a* \\(x\\) \\\\\n"),
        ] {
            assert_eq!(shown(text, None), expected, "{text}");
        }
    }

    #[test]
    fn what_only_looks_like_a_mark_stays() {
        for text in [
            "2 * 3 * 4",
            "2*3*4",
            "snake_case_name",
            "a ** b",
            "**open",
            "`open",
            "[a] [b](",
            "[]()",
            "f(*args, **kwargs)",
            "~5~",
            "#hash",
            "####### seven",
            "-1",
            "--flag",
            "1.5",
            "12",
            "a > b",
            "``",
            "-",
            "!",
            "\\",
        ] {
            assert_eq!(plain(text, None), format!("{text}\n"));
        }
    }

    #[test]
    fn blocks() {
        let text = "# One\n## Two\n- a\n  * b\n1. c\n> d\n> - e\n---\n| a | **b** |\n```rust\n**x** # y\n\n```\nend";
        let rule = "─".repeat(RULE_COLUMNS);
        let expected =
            format!("One\nTwo\n• a\n  • b\n1. c\n│ d\n│ • e\n{rule}\n| a | **b** |\n```rust\n**x** # y\n\n```\nend\n");
        assert_eq!(plain(text, None), expected);
        assert!(shown(text, None).contains("\x1b[0;36m**x** # y\x1b[0m\n"), "code is coloured, line by line");
        assert!(shown("# One", None).starts_with("\x1b[0;1;4mOne"));
    }

    #[test]
    fn words_wrap_and_items_hang() {
        assert_eq!(plain("one two three", Some(8)), "one two\nthree\n");
        assert_eq!(plain("- one two three", Some(8)), "• one\n  two\n  three\n");
        assert_eq!(plain("a verylongword b", Some(8)), "a\nverylongword\nb\n");
        assert_eq!(plain("```\nlong line of code\n```", Some(8)), "```\nlong line of code\n```\n");
        assert_eq!(plain("漢字漢字漢字", Some(5)), "漢字\n漢字\n漢字\n");
    }

    #[test]
    fn control_characters_become_pictures() {
        assert_eq!(shown("a\x1b[2Jb\u{9b}c\r\n", None), "a␛[2Jb\u{fffd}c␍\n");
    }

    /// Texts made of what Markdown is made of.
    fn markup() -> impl Strategy<Value = String> {
        let pieces = [
            "*",
            "**",
            "_",
            "`",
            "```",
            "~~",
            "[",
            "](",
            ")",
            "\\",
            "\n",
            "\n",
            "- ",
            "1. ",
            "> ",
            "# ",
            "|",
            "---",
            " ",
            "a",
            "word",
            "é",
            "漢",
            "\x1b",
            "```rust\n",
            "\t",
            "12",
        ];
        prop::collection::vec(prop::sample::select(pieces.to_vec()), 0..40).prop_map(|pieces| pieces.concat())
    }

    #[test]
    fn a_line_of_code_that_is_a_tab_ends_its_style() {
        assert!(shown("```\n\t", None).ends_with("\t\x1b[0m\n"), "{:?}", shown("```\n\t", None));
    }

    proptest! {
        #[test]
        fn pieces_change_nothing(text in markup(), cuts in prop::collection::vec(0_usize..80, 0..8), columns in 4_usize..30) {
            let whole = shown(&text, Some(columns));
            let mut markdown = Markdown::new(Style::PLAIN, Some(columns));
            let (mut out, mut piece) = (String::new(), String::new());
            for (i, c) in text.chars().enumerate() {
                piece.push(c);
                if cuts.contains(&i) {
                    out += &markdown.push(&std::mem::take(&mut piece));
                }
            }
            out += &markdown.push(&piece);
            prop_assert_eq!(out + &markdown.finish(), whole);
        }

        /// Every letter is shown, in order, and no style outlives its line.
        #[test]
        fn no_character_is_lost(text in markup()) {
            let letters = |text: &str| text.chars().filter(|c| c.is_alphanumeric()).collect::<String>();
            prop_assert_eq!(letters(&plain(&text, Some(10))), letters(&text));
            for line in shown(&text, None).lines() {
                let last = line.rsplit_once("\x1b[").map(|(_, last)| last);
                prop_assert!(last.is_none_or(|last| last.starts_with("0m")), "{:?}", line);
            }
        }
    }
}
