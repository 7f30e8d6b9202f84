//! Stop strings against a search of the whole text.

use proptest::prelude::*;
use text::StopStrings;

/// Feeds `text` in pieces of `size` characters: what came out, and the stop string that occurred.
fn feed(stops: &[String], text: &str, size: usize) -> (String, Option<String>) {
    let mut watcher = StopStrings::new(stops.to_vec());
    let longest = stops.iter().map(String::len).max().unwrap_or(0).max(1);
    let (mut out, mut taken_bytes) = (String::new(), 0);
    let characters: Vec<char> = text.chars().collect();
    for piece in characters.chunks(size) {
        let piece: String = piece.iter().collect();
        taken_bytes += piece.len();
        let (delta, hit) = watcher.push(&piece);
        out.push_str(&delta);
        assert_eq!(hit, watcher.matched().is_some());
        let held = &text[out.len()..taken_bytes];
        assert!(hit || held.len() < longest, "{held:?} is held back");
        assert!(hit || held.is_empty() || stops.iter().any(|stop| stop.starts_with(held)), "{held:?} is held back");
    }
    out.push_str(&watcher.finish());
    (out, watcher.matched().map(str::to_owned))
}

/// The definition: cut at the stop string that is complete first, the longest of those.
fn expected(stops: &[String], text: &str) -> (String, Option<String>) {
    for end in (1..=text.len()).filter(|&end| text.is_char_boundary(end)) {
        let ending = stops.iter().filter(|stop| !stop.is_empty() && text[..end].ends_with(stop.as_str()));
        if let Some(stop) = ending.max_by_key(|stop| stop.len()) {
            return (text[..end - stop.len()].to_owned(), Some(stop.clone()));
        }
    }
    (text.to_owned(), None)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2_000) })]

    #[test]
    fn any_split_cuts_where_the_first_is_complete(
        stops in prop::collection::vec("[ab🙂]{0,5}", 0..4), text in "[abc🙂]{0,40}", size in 1usize..6
    ) {
        prop_assert_eq!(feed(&stops, &text, size), expected(&stops, &text));
    }
}

#[test]
fn the_longest_of_those_that_end_together() {
    let stops = ["User:", "\n\nUser:"].map(String::from);
    assert_eq!(feed(&stops, "Hi\n\nUser: x", 1), ("Hi".to_owned(), Some("\n\nUser:".to_owned())));
}

#[test]
fn after_a_hit_everything_is_dropped() {
    let mut watcher = StopStrings::new(vec!["ab".to_owned()]);
    assert_eq!(watcher.push("xa"), ("x".to_owned(), false));
    assert_eq!(watcher.push("bc"), (String::new(), true));
    assert_eq!(watcher.push("more"), (String::new(), true));
    assert_eq!((watcher.finish(), watcher.matched()), (String::new(), Some("ab")));
}
