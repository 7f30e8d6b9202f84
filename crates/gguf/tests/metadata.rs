//! Typed getters: what they accept, and what they say when they do not.

mod common;

use gguf::{Array, Error, ErrorKind, Gguf, Metadata, Value, Writer};

fn sample() -> Gguf {
    common::parse(&common::to_bytes(&common::sample()))
}

#[test]
fn integers_of_any_width_are_accepted() {
    let model = sample();
    let metadata = &model.metadata;
    for (key, expected) in [("a.u8", 200), ("a.u16", 60_000), ("a.u32", 4_000_000_000), ("a.u64", u64::MAX)] {
        assert_eq!(metadata.u64(key).expect(key), expected);
    }
    assert_eq!(metadata.u32("a.u32").expect("fits"), 4_000_000_000);
    assert_eq!(metadata.u64_array("b.u8").expect("integers"), [1, 2, 3]);
    assert_eq!(metadata.u64_array("b.i32").expect("integers"), [0, 4, 128]);
    assert_eq!(metadata.u64_array("b.i16").expect("no integers"), []);
    assert_eq!(metadata.i64_array("b.i64").expect("integers"), [-1, 1]);
}

#[test]
fn floats_of_both_widths_are_accepted() {
    let model = sample();
    let metadata = &model.metadata;
    assert_eq!((metadata.f32("a.f32").expect("f32"), metadata.f32("a.f64").expect("f64")), (1.5, -2.5));
    assert_eq!(metadata.f32_array("b.f64").expect("floats"), [0.25; 2]);
    assert_eq!(metadata.f32_array_or_scalar("b.f32", 9).expect("an array as it is"), [0.5; 3]);
    assert_eq!(metadata.f32_array_or_scalar("a.f64", 2).expect("a scalar repeated"), [-2.5; 2]);
}

#[test]
fn bools_and_strings() {
    let model = sample();
    let metadata = &model.metadata;
    assert_eq!((metadata.bool("a.yes").expect("bool"), metadata.bool("a.no").expect("bool")), (true, false));
    assert_eq!(metadata.str("general.architecture").expect("string"), "deepseek4");
    let strings: Vec<&str> = metadata.str_array("b.strings").expect("strings").iter().collect();
    assert_eq!(strings, ["", "<think>", "｜User｜"]);
}

#[test]
fn an_absent_key_is_optional_and_a_wrong_one_is_not() {
    let model = sample();
    assert_eq!(model.metadata.optional("a.u8", Metadata::u32).expect("there"), Some(200));
    assert_eq!(model.metadata.optional("none", Metadata::u32).expect("absent"), None);
    assert_eq!(model.metadata.optional("a.yes", Metadata::str).expect_err("a bool").kind, ErrorKind::WrongType);
}

/// Each refusal names the file, the key, what is there and what should be.
#[test]
fn refusals_name_key_found_and_expected() {
    type Ask = fn(&Metadata) -> Result<(), Error>;
    let table: &[(Ask, ErrorKind, &[&str])] = &[
        (|m| m.u64("no.such").map(drop), ErrorKind::MissingKey, &["no key \"no.such\"", "an integer of at least 0"]),
        (|m| m.u64("a.i8").map(drop), ErrorKind::WrongType, &["\"a.i8\"", "i8 -100", "an integer of at least 0"]),
        (|m| m.u64("a.f32").map(drop), ErrorKind::WrongType, &["\"a.f32\"", "f32 1.5", "an integer"]),
        (|m| m.u32("a.u64").map(drop), ErrorKind::WrongType, &["u64 18446744073709551615", "0 to 4294967295"]),
        (|m| m.f32("a.u8").map(drop), ErrorKind::WrongType, &["u8 200", "a float"]),
        (|m| m.f32("c.huge").map(drop), ErrorKind::WrongType, &["f64 1", "within the range of f32"]),
        (|m| m.bool("a.u8").map(drop), ErrorKind::WrongType, &["u8 200", "a bool"]),
        (|m| m.str("b.strings").map(drop), ErrorKind::WrongType, &["array of 3 string", "a string"]),
        (|m| m.str_array("a.yes").map(drop), ErrorKind::WrongType, &["bool true", "an array of strings"]),
        (|m| m.u64_array("b.i64").map(drop), ErrorKind::WrongType, &["element 0 is -1", "at least 0"]),
        (|m| m.i64_array("c.large").map(drop), ErrorKind::WrongType, &["element 1 is 18446744073709551615", "63 bits"]),
        (|m| m.u64_array("a.u8").map(drop), ErrorKind::WrongType, &["u8 200", "an array of integers"]),
        (|m| m.u64_array("b.f32").map(drop), ErrorKind::WrongType, &["array of 3 f32", "an array of integers"]),
        (|m| m.f32_array("b.u8").map(drop), ErrorKind::WrongType, &["array of 3 u8", "an array of floats"]),
        (|m| m.f32_array("c.huges").map(drop), ErrorKind::WrongType, &["array of 1 f64", "within the range of f32"]),
        (|m| m.f32_array_or_scalar("a.yes", 2).map(drop), ErrorKind::WrongType, &["bool true", "a float"]),
        (|m| m.u64("c.long").map(drop), ErrorKind::WrongType, &["string \"xxx", "… of 1000 bytes"]),
    ];
    let mut writer = common::sample();
    let added = |writer: &mut Writer| -> Result<(), Error> {
        writer.set("c.huge", 1e300)?.set("c.huges", vec![1e300])?;
        writer.set("c.large", vec![0, u64::MAX])?.set("c.long", "x".repeat(1000))?;
        Ok(())
    };
    added(&mut writer).expect("valid keys");
    let model = common::parse(&common::to_bytes(&writer));
    for (index, (ask, kind, words)) in table.iter().enumerate() {
        let error = ask(&model.metadata).expect_err("a refusal");
        assert_eq!(error.kind, *kind, "row {index}: {error}");
        let text = error.to_string();
        for word in ["test.gguf: ", error.remedy()].iter().chain(*words) {
            assert!(text.contains(word), "row {index}: no {word:?} in {text:?}");
        }
    }
}

#[test]
fn unknown_keys_are_kept_in_order() {
    let keys: Vec<String> = sample().metadata.iter().map(|(key, _)| key.to_owned()).collect();
    assert_eq!(keys[0], "general.architecture");
    assert_eq!(keys.last().expect("keys"), "b.nested");
    let nested = vec![Array::I32(vec![1]), Array::String(Default::default()), Array::Array(vec![])];
    assert_eq!(sample().metadata.get("b.nested"), Some(&Value::Array(Array::Array(nested))));
}
