//! The pre-tokenizer `joyai-llm`: cuts text into the pieces that BPE merges within.
//!
//! `tokenizer.json` of DeepSeek V4 describes it as three splits, each applied to what the one before
//! it left over:
//!
//! 1. `\p{N}{1,3}`
//! 2. `[一-龥぀-ゟ゠-ヿ]+`
//! 3. the first of these that matches (the letters are used below):
//!    - a. one ASCII punctuation character, then `[A-Za-z]+`
//!    - b. `[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+`
//!    - c. ` ?[\p{P}\p{S}]+[\r\n]*`
//!    - d. `\s*[\r\n]+`
//!    - e. `\s+(?!\S)`
//!    - f. `\s+`
//!
//! Text that nothing matches is a piece too. The characters of splits 1 and 2 end a span of split 3 as
//! the end of the text does (the lookahead of e sees them so), hence one scanner over character classes
//! does all three.

use unicode_general_category::{GeneralCategory as G, get_general_category};

/// What the pre-tokenizer sees in a character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// `\p{N}`, of any script.
    Number,
    /// U+4E00–9FA5, U+3040–309F and U+30A0–30FF, which split 2 takes.
    Cjk,
    /// `\p{L}` otherwise.
    Letter,
    /// `\p{M}` otherwise.
    Mark,
    /// `\p{P}` and `\p{S}` otherwise; in ASCII exactly the 32 punctuation characters.
    Symbol,
    /// CR and LF.
    Newline,
    /// `\s` otherwise, of any script.
    Space,
    /// Everything else: controls, formats, unassigned.
    Other,
}

impl Class {
    /// The class of a character. Categories are those of Unicode 16, as in the reference tokenizer: a
    /// newer table would change the ids of characters assigned since.
    pub fn of(character: char) -> Class {
        match character {
            '\0'..='\x7f' => ASCII[character as usize],
            '\u{4e00}'..='\u{9fa5}' | '\u{3040}'..='\u{30ff}' => Class::Cjk,
            _ => Class::of_non_ascii(character),
        }
    }

    fn of_non_ascii(character: char) -> Class {
        match get_general_category(character) {
            G::UppercaseLetter | G::LowercaseLetter | G::TitlecaseLetter | G::ModifierLetter | G::OtherLetter => {
                Class::Letter
            }
            G::NonspacingMark | G::SpacingMark | G::EnclosingMark => Class::Mark,
            G::DecimalNumber | G::LetterNumber | G::OtherNumber => Class::Number,
            G::ConnectorPunctuation
            | G::DashPunctuation
            | G::OpenPunctuation
            | G::ClosePunctuation
            | G::InitialPunctuation
            | G::FinalPunctuation
            | G::OtherPunctuation
            | G::MathSymbol
            | G::CurrencySymbol
            | G::ModifierSymbol
            | G::OtherSymbol => Class::Symbol,
            _ if character.is_whitespace() => Class::Space,
            _ => Class::Other,
        }
    }

    /// Whether the character continues a word: `[\p{L}\p{M}]`.
    fn is_word(self) -> bool {
        matches!(self, Class::Letter | Class::Mark)
    }

    /// Whether the character is `\s`.
    fn is_space(self) -> bool {
        matches!(self, Class::Newline | Class::Space)
    }
}

/// The classes of ASCII.
const ASCII: [Class; 128] = {
    let mut classes = [Class::Other; 128];
    let mut byte = 0;
    while byte < 128 {
        classes[byte] = match byte as u8 {
            b'0'..=b'9' => Class::Number,
            b'a'..=b'z' | b'A'..=b'Z' => Class::Letter,
            b'\r' | b'\n' => Class::Newline,
            b' ' | b'\t' | 0x0b | 0x0c => Class::Space,
            b if b.is_ascii_punctuation() => Class::Symbol,
            _ => Class::Other,
        };
        byte += 1;
    }
    classes
};

/// Cuts `text` into its pieces, in order; joined they are `text` again. Linear in its length.
pub fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (piece, after) = rest.split_at(first_piece_bytes(rest)?);
        rest = after;
        Some(piece)
    })
}

/// The length of the first piece of `text` in bytes, or `None` at the end.
fn first_piece_bytes(text: &str) -> Option<usize> {
    let scan = Scan { text };
    let (class, bytes) = scan.at(0)?;
    Some(match class {
        Class::Number => scan.three_numbers(),
        Class::Cjk => scan.run(0, |class| class == Class::Cjk),
        Class::Symbol => scan.symbols(bytes),
        Class::Letter | Class::Mark => scan.run(0, Class::is_word),
        Class::Newline => scan.spaces(),
        Class::Space if scan.is(bytes, Class::is_word) => scan.run(bytes, Class::is_word),
        Class::Space if text.starts_with(' ') && scan.is(bytes, |class| class == Class::Symbol) => {
            scan.symbols_and_newlines(bytes)
        }
        Class::Space => scan.spaces(),
        Class::Other if scan.is(bytes, Class::is_word) => scan.run(bytes, Class::is_word),
        Class::Other => scan.unmatched(),
    })
}

/// The text from the start of a piece. Positions are byte offsets at character boundaries.
struct Scan<'a> {
    text: &'a str,
}

impl Scan<'_> {
    /// The class and the length in bytes of the character at `position`, or `None` at the end.
    #[inline]
    fn at(&self, position: usize) -> Option<(Class, usize)> {
        let byte = *self.text.as_bytes().get(position)?;
        if byte.is_ascii() {
            return Some((ASCII[usize::from(byte)], 1));
        }
        let character = self.text[position..].chars().next()?;
        Some((Class::of(character), character.len_utf8()))
    }

    /// Whether there is a character at `position` whose class satisfies `wanted`.
    fn is(&self, position: usize, wanted: impl Fn(Class) -> bool) -> bool {
        self.at(position).is_some_and(|(class, _)| wanted(class))
    }

    /// The end of the run from `position` of characters whose class satisfies `wanted`.
    #[inline]
    fn run(&self, mut position: usize, wanted: impl Fn(Class) -> bool) -> usize {
        while let Some((class, bytes)) = self.at(position)
            && wanted(class)
        {
            position += bytes;
        }
        position
    }

    /// Split 1.
    fn three_numbers(&self) -> usize {
        let mut end = 0;
        for _ in 0..3 {
            match self.at(end) {
                Some((Class::Number, bytes)) => end += bytes,
                _ => break,
            }
        }
        end
    }

    /// Alternatives a and c for text that begins with a symbol of `bytes` bytes.
    fn symbols(&self, bytes: usize) -> usize {
        let is_ascii_letter = |byte: &u8| byte.is_ascii_alphabetic();
        let after = &self.text.as_bytes()[bytes..];
        if bytes == 1 && after.first().is_some_and(is_ascii_letter) {
            return bytes + after.iter().take_while(|byte| is_ascii_letter(byte)).count();
        }
        self.symbols_and_newlines(0)
    }

    /// Alternative c from its first symbol at `position`.
    fn symbols_and_newlines(&self, position: usize) -> usize {
        let symbols_end = self.run(position, |class| class == Class::Symbol);
        self.run(symbols_end, |class| class == Class::Newline)
    }

    /// Alternatives d, e and f for text that begins with whitespace.
    fn spaces(&self) -> usize {
        let end = self.run(0, Class::is_space);
        let run = &self.text[..end];
        if let Some(newline) = run.rfind(['\r', '\n']) {
            return newline + 1;
        }
        let last_bytes = run.chars().next_back().map_or(0, char::len_utf8);
        let at_span_end = matches!(self.at(end), None | Some((Class::Number | Class::Cjk, _)));
        if at_span_end || last_bytes == end { end } else { end - last_bytes }
    }

    /// The characters up to the first one where some alternative matches.
    fn unmatched(&self) -> usize {
        let mut end = 0;
        while let Some((Class::Other, bytes)) = self.at(end)
            && !self.is(end + bytes, Class::is_word)
        {
            end += bytes;
        }
        end
    }
}
