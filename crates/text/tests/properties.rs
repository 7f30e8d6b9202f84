//! What holds for any text. The tiny vocabulary reaches every byte, so no generated data is needed.

mod common;

use std::sync::LazyLock;

use proptest::prelude::*;
use text::pretokenize::pieces;
use text::{Segment, Tokenizer, Utf8Stream};

static TINY: LazyLock<Tokenizer> = LazyLock::new(common::tiny);

/// Arbitrary text, dense in what the pre-tokenizer and the control tokens look at.
fn any_text() -> impl Strategy<Value = String> {
    let special = prop::sample::select(vec![
        " ",
        "\n",
        "\r",
        "\t",
        "\u{a0}",
        "\u{200b}",
        "the",
        " a",
        "Z",
        "1234",
        "é",
        "\u{301}",
        "1",
        "٣",
        "中",
        "カ",
        "!",
        "—",
        "\0",
        "<think>",
        "<｜User｜>",
        "｜DSML｜",
        "<｜",
        "｜",
    ]);
    prop::collection::vec(prop_oneof![special.prop_map(str::to_owned), any::<char>().prop_map(String::from)], 0..40)
        .prop_map(|parts| parts.concat())
}

/// Pre-tokenization as the spec words it: three splits one after another, each alternative tried in turn
/// at each character. Slow and plain, to compare the scanner with.
fn pieces_by_the_book(text: &str) -> Vec<String> {
    use text::pretokenize::Class::{self, Cjk, Letter, Mark, Newline, Number, Space, Symbol};
    let chars: Vec<char> = text.chars().collect();
    let class = |c: char| Class::of(c);
    let run = |span: &[char], wanted: &dyn Fn(char) -> bool| span.iter().take_while(|&&c| wanted(c)).count();

    let first_splits = |span: &[char]| match class(span[0]) {
        Number => run(span, &|c| class(c) == Number).min(3),
        Cjk => run(span, &|c| class(c) == Cjk),
        _ => 0,
    };
    let is_word = |c: char| matches!(class(c), Letter | Mark);
    let is_space = |c: char| matches!(class(c), Space | Newline);
    let is_newline = |c: char| class(c) == Newline;
    let is_symbol = |c: char| class(c) == Symbol;
    let third_split = |span: &[char]| {
        let a = run(&span[1..], &|c| c.is_ascii_alphabetic());
        if span[0].is_ascii_punctuation() && a > 0 {
            return 1 + a;
        }
        let optional = usize::from(!matches!(class(span[0]), Newline | Letter | Symbol));
        for skip in (0..=optional).rev() {
            let b = run(&span[skip..], &is_word);
            if b > 0 {
                return skip + b;
            }
        }
        let skip = usize::from(span[0] == ' ');
        let c = run(&span[skip..], &is_symbol);
        if c > 0 {
            return skip + c + run(&span[skip + c..], &is_newline);
        }
        let spaces = run(span, &is_space);
        if let Some(d) = span[..spaces].iter().rposition(|&c| is_newline(c)) {
            return d + 1;
        }
        if spaces == span.len() || spaces < 2 { spaces } else { spaces - 1 }
    };

    let mut found: Vec<String> = Vec::new();
    let mut start = 0;
    while start < chars.len() {
        let whole = first_splits(&chars[start..]);
        if whole > 0 {
            found.push(chars[start..start + whole].iter().collect());
            start += whole;
            continue;
        }
        let end = start + run(&chars[start..], &|c| !matches!(class(c), Number | Cjk));
        let mut unmatched = String::new();
        while start < end {
            let matched = third_split(&chars[start..end]);
            if matched == 0 {
                unmatched.push(chars[start]);
                start += 1;
                continue;
            }
            found.extend((!unmatched.is_empty()).then(|| std::mem::take(&mut unmatched)));
            found.push(chars[start..start + matched].iter().collect());
            start += matched;
        }
        found.extend((!unmatched.is_empty()).then_some(unmatched));
    }
    found
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2_000) })]

    #[test]
    fn decoding_gives_the_text_back(text in any_text()) {
        prop_assert_eq!(TINY.decode(&TINY.encode(&text)), text.as_bytes());
        prop_assert_eq!(TINY.decode(&TINY.encode_with_control(&text)), text.as_bytes());
    }

    #[test]
    fn text_never_becomes_a_control_token(text in any_text()) {
        prop_assert!(TINY.encode(&text).iter().all(|&id| !TINY.is_control(id)));
    }

    #[test]
    fn control_tokens_part_the_text(before in any_text(), after in any_text(), id in 507..512_u32) {
        let segments = [Segment::Text(before.clone()), Segment::Control(id), Segment::Text(after.clone())];
        let expected = [TINY.encode(&before), vec![id], TINY.encode(&after)].concat();
        prop_assert_eq!(TINY.encode_segments(&segments), expected);
    }

    #[test]
    fn pieces_are_those_of_the_spec(text in any_text()) {
        prop_assert_eq!(pieces(&text).collect::<Vec<_>>(), pieces_by_the_book(&text));
    }

    #[test]
    fn utf8_comes_whole_however_it_is_cut(text in any_text(), sizes in prop::collection::vec(0..9_usize, 0..99)) {
        let mut stream = Utf8Stream::default();
        let mut rest = text.as_bytes();
        let mut found = String::new();
        for size in sizes {
            let (now, later) = rest.split_at(size.min(rest.len()));
            let more = stream.push(now);
            prop_assert!(text[found.len()..].starts_with(&more));
            found += &more;
            rest = later;
        }
        found += &stream.push(rest);
        prop_assert_eq!(found + &stream.finish(), text);
    }

    #[test]
    fn invalid_bytes_become_replacement_characters(bytes in prop::collection::vec(any::<u8>(), 0..60), cut in 0..60_usize) {
        let (first, second) = bytes.split_at(cut.min(bytes.len()));
        let mut stream = Utf8Stream::default();
        let found = [stream.push(first), stream.push(second), stream.finish()].concat();
        prop_assert_eq!(found, String::from_utf8_lossy(&bytes));
    }
}
