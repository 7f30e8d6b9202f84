//! DeepSeek V4's tokenizer against Hugging Face `tokenizers` with V4's tokenizer.json.

mod common;

use text::pretokenize::Class;
use text::prompt::ControlTokens;

#[test]
fn every_code_point_has_the_class_of_the_reference_regexes() {
    let runs = common::reference_data("classes.json");
    let mut checked = 0;
    for run in runs.as_array().unwrap() {
        let [first, last] = [&run[0], &run[1]].map(|code| code.as_u64().unwrap() as u32);
        for character in (first..=last).filter_map(char::from_u32) {
            let found = match Class::of(character) {
                Class::Number => "N",
                Class::Cjk | Class::Letter => "L",
                Class::Mark => "M",
                Class::Symbol => "S",
                Class::Newline | Class::Space => "W",
                Class::Other => "O",
            };
            let is_cjk_range = matches!(character, '\u{4e00}'..='\u{9fa5}' | '\u{3040}'..='\u{30ff}');
            // The explicit ranges of split 2 hold some marks and symbols too; split 2 takes them first.
            assert!(found == run[2] || is_cjk_range, "U+{:04X}: {found}, expected {}", character as u32, run[2]);
            assert_eq!(Class::of(character) == Class::Cjk, is_cjk_range, "U+{:04X}", character as u32);
            checked += 1;
        }
    }
    assert_eq!(checked, 0x110000 - 0x800 - 0x80, "all code points but surrogates and ASCII");
}

#[test]
fn ids_equal_the_reference_on_mixed_text() {
    let tokenizer = common::v4();
    let cases = common::reference_data("cases.json");
    let mut bytes = 0;
    for case in cases.as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids = common::ids(&case["ids"]);
        let plain_ids = case.get("plain_ids").map_or_else(|| ids.clone(), common::ids);
        assert_same(&tokenizer.encode_with_control(text), &ids, &case["name"]);
        assert_same(&tokenizer.encode(text), &plain_ids, &case["name"]);
        assert_eq!(tokenizer.decode(&ids), text.as_bytes(), "{}", case["name"]);
        assert!(!plain_ids.iter().any(|&id| tokenizer.is_control(id)), "{}", case["name"]);
        bytes += text.len();
    }
    assert!(bytes >= 1_000_000, "only {bytes} bytes of text");
}

/// Compares ids, naming the first difference: the lists are too long to print.
fn assert_same(found: &[u32], expected: &[u32], name: &serde_json::Value) {
    let different = (0..found.len().max(expected.len())).find(|&at| found.get(at) != expected.get(at));
    if let Some(at) = different {
        let near = |ids: &[u32]| ids[at.min(ids.len())..(at + 8).min(ids.len())].to_vec();
        panic!("{name}: ids from {at} are {:?}, expected {:?}", near(found), near(expected));
    }
}

#[test]
fn the_vocabulary_is_that_of_v4() {
    let tokenizer = common::v4();
    assert_eq!(tokenizer.vocab_size(), 129_280);
    let tokens = ControlTokens::find(&tokenizer).unwrap();
    let expected = ControlTokens {
        bos: 0,
        eos: 1,
        user: 128_803,
        assistant: 128_804,
        think: 128_821,
        end_think: 128_822,
        dsml: Some(128_825),
    };
    assert_eq!(tokens, expected);
    assert_eq!(tokens.stop_set(), [1, 128_803, 128_804]);
    assert_eq!(tokenizer.control("｜DSML｜"), Some(128_825));
    assert!(tokenizer.is_control(2) && tokenizer.is_control(129_279) && !tokenizer.is_control(3));
}

/// V3's vocabulary is V4's except for control tokens: `<think>` is 128798, there is no `｜DSML｜`.
#[test]
fn a_v3_tokenizer_is_refused() {
    let mut data = common::vocabulary(&common::reference_data("vocabulary.json"));
    for (id, token) in data.tokens.iter_mut().enumerate().skip(128_815) {
        *token = format!("<｜place▁holder▁no▁{id}｜>");
    }
    data.tokens[128_798] = "<think>".to_owned();
    data.tokens[128_799] = "</think>".to_owned();
    let error = ControlTokens::find(&text::Tokenizer::new(data).unwrap()).unwrap_err().to_string();
    assert!(
        error.contains("token 128825 of the vocabulary is \"<｜place▁holder▁no▁128825｜>\", expected `｜DSML｜`"),
        "{error}"
    );
    assert!(error.contains("use a GGUF file of a DeepSeek V4 model"), "{error}");
}

/// Bounds far below what an idle core does (docs/performance.md), so that a busy machine does not fail them.
#[test]
fn loading_and_encoding_are_fast() {
    let data = common::vocabulary(&common::reference_data("vocabulary.json"));
    let start = std::time::Instant::now();
    let tokenizer = text::Tokenizer::new(data).unwrap();
    let load_seconds = start.elapsed().as_secs_f64();
    let cases = common::reference_data("cases.json");
    let texts: Vec<&str> = cases.as_array().unwrap().iter().map(|case| case["text"].as_str().unwrap()).collect();
    let bytes: usize = texts.iter().map(|text| text.len()).sum();
    let rate = |()| {
        let start = std::time::Instant::now();
        let ids: usize = texts.iter().map(|text| tokenizer.encode(text).len()).sum();
        assert!(ids > 100_000);
        bytes as f64 / 1e6 / start.elapsed().as_secs_f64()
    };
    let best = [(); 3].map(rate).into_iter().fold(0.0, f64::max);
    println!("loaded in {load_seconds:.2} s; {best:.1} MB/s over {bytes} bytes");
    assert!(load_seconds < 1.0 && best >= 5.0 && bytes >= 1_000_000);
}
