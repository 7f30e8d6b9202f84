//! Every kind of bad file has its own error, which says where, what was found, what was expected and what to do.

mod common;

use std::collections::HashSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use common::{Raw, sample, to_bytes};
use gguf::{Error, ErrorKind, Gguf, TensorType, Writer};

struct Case {
    name: &'static str,
    bytes: Vec<u8>,
    kind: ErrorKind,
    offset: Option<u64>,
    words: &'static [&'static str],
}

fn case(
    name: &'static str,
    bytes: Raw,
    kind: ErrorKind,
    offset: impl Into<Option<u64>>,
    words: &'static [&'static str],
) -> Case {
    Case { name, bytes: bytes.0, kind, offset: offset.into(), words }
}

/// A header that announces one key, then the key `k` of value type `ty`: the value starts at byte 37.
fn key(ty: u32) -> Raw {
    Raw::header(0, 1).string(b"k").u32(ty)
}

/// One tensor info and room for `data_bytes` of data, which start at byte 64.
fn one_tensor(dims: &[u64], ty: u32, offset: u64, data_bytes: usize) -> Raw {
    let header = Raw::header(1, 0).tensor("t", dims, ty, offset);
    let padding = header.0.len().next_multiple_of(32) - header.0.len();
    header.zeros(padding + data_bytes)
}

/// Two F32 tensors of 8 elements with the given names and offsets; data start at byte 96.
fn two_tensors(names: [&str; 2], types: [u32; 2], offsets: [u64; 2]) -> Raw {
    let header = Raw::header(2, 0).tensor(names[0], &[8], types[0], offsets[0]);
    let header = header.tensor(names[1], &[8], types[1], offsets[1]);
    let padding = 96 - header.0.len();
    header.zeros(padding + 64)
}

fn nested(levels: u32) -> Raw {
    (1..levels).fold(key(9), |raw, _| raw.u32(9).u64(1)).u32(0).u64(1).u8(7).zeros(32)
}

fn alignment(value: u32) -> Raw {
    Raw::header(0, 1).string(b"general.alignment").u32(4).u32(value).zeros(32)
}

fn cases() -> Vec<Case> {
    use ErrorKind::*;
    let magic = |version: [u8; 4]| Raw([*b"GGUF", version].concat()).zeros(64);
    vec![
        case("an empty file", Raw(vec![]), Empty, None, &["empty"]),
        case(
            "text",
            Raw(b"version https://git-lfs".to_vec()),
            NotGguf,
            0,
            &["\"vers\"", "like text", "\"GGUF\"", "LFS"],
        ),
        case("short text", Raw(b"hi\n".to_vec()), NotGguf, 0, &["\"hi\\n\"", "like text"]),
        case("another binary", Raw(b"\x7fELF\x01".to_vec()), NotGguf, 0, &["\\x7fELF"]),
        case("half a magic", Raw(b"GG".to_vec()), Truncated, 2, &["2 bytes", "the magic of 4 bytes"]),
        case("no version", Raw(b"GGUF\x03\0".to_vec()), Truncated, 4, &["6 bytes"]),
        case("big endian", magic([0, 0, 0, 3]), BigEndian, 4, &["big-endian", "version 3", "gguf-convert-endian"]),
        case("version 1", magic([1, 0, 0, 0]), Version, 4, &["version 1", "version 2 or 3"]),
        case("version 4", magic([4, 0, 0, 0]), Version, 4, &["version 4"]),
        case("version 0", magic([0; 4]), Version, 4, &["version 0"]),
        case(
            "absurd tensor count",
            Raw::header(u64::MAX, 0).zeros(40),
            Truncated,
            8,
            &["a count of 18446744073709551615 tensors", "at most 1,", "remaining 48 bytes"],
        ),
        case("absurd key count", Raw::header(0, 1 << 40).zeros(40), Truncated, 16, &["1099511627776 metadata keys"]),
        case(
            "key name past the end",
            Raw::header(0, 1).u64(1000).zeros(40),
            Truncated,
            24,
            &["1000 bytes of a string", "the name of metadata key 0"],
        ),
        case("key name too long", Raw::header(0, 1).u64(65_536).zeros(70_000), Malformed, 24, &["65536", "65535"]),
        case("key name not UTF-8", Raw::header(0, 1).string(b"ab\xff").zeros(40), Malformed, 34, &["not UTF-8"]),
        case("unknown value type", key(13).zeros(16), Malformed, 33, &["value type 13", "\"k\"", "from 0 to 12"]),
        case("a bool of 2", key(7).u8(2), Malformed, 37, &["a bool of 2", "0 or 1", "\"k\""]),
        case("half a number", key(10).u32(1), Truncated, 37, &["41 bytes", "a number of 8 bytes", "\"k\""]),
        case("string past the end", key(8).u64(u64::MAX).zeros(9), Truncated, 37, &["at most 9", "\"k\""]),
        case("string not UTF-8", key(8).string(b"ok\xc3\x28"), Malformed, 47, &["not UTF-8", "\"k\""]),
        case("array count past the end", key(9).u32(10).u64(1 << 61).zeros(24), Truncated, 41, &["at most 3"]),
        case("string array past the end", key(9).u32(8).u64(3).zeros(23), Truncated, 41, &["3 strings", "at most 2"]),
        case("bool array with a 3", key(9).u32(7).u64(2).u8(1).u8(3), Malformed, 50, &["a bool of 3"]),
        case("array of unknown type", key(9).u32(77).u64(0), Malformed, 37, &["value type 77"]),
        case("array nested too deep", nested(5), Malformed, 85, &["nested deeper", "at most 4 levels"]),
        case(
            "array count past the end, nested",
            key(9).u32(9).u64(9).zeros(24),
            Truncated,
            41,
            &["9 arrays", "at most 2"],
        ),
        case(
            "duplicate key",
            Raw::header(0, 2).string(b"k").u32(0).u8(1).string(b"k").u32(0).u8(1),
            Duplicate,
            38,
            &["a second metadata key \"k\""],
        ),
        case("alignment 0", alignment(0), Alignment, None, &["general.alignment", "value 0", "power of two"]),
        case("alignment 48", alignment(48), Alignment, None, &["value 48", "power of two"]),
        case(
            "alignment as text",
            Raw::header(0, 1).string(b"general.alignment").u32(8).string(b"32"),
            WrongType,
            None,
            &["general.alignment", "string \"32\"", "an integer"],
        ),
        case("no dimensions", one_tensor(&[], 0, 0, 64), Dimensions, 33, &["0 dimensions", "1 to 4"]),
        case("five dimensions", one_tensor(&[1; 5], 0, 0, 64), Dimensions, 33, &["5 dimensions", "\"t\""]),
        case("a zero dimension", one_tensor(&[8, 0], 0, 0, 64), Dimensions, 24, &["[8, 0]", "at least 1"]),
        case("too many elements", one_tensor(&[1 << 32, 1 << 31], 0, 0, 64), Dimensions, 24, &["63 bits"]),
        case("elements overflow", one_tensor(&[u64::MAX; 4], 0, 0, 64), Dimensions, 24, &["63 bits"]),
        case("row overflows", one_tensor(&[1 << 62], 27, 0, 64), Dimensions, 24, &["I64", "row size within 64 bits"]),
        case(
            "size overflows",
            one_tensor(&[1 << 31, 1 << 31], 0, 0, 64),
            Dimensions,
            24,
            &["F32", "size within 64 bits"],
        ),
        case("half a block", one_tensor(&[48], 8, 0, 64), Dimensions, 24, &["Q8_0", "[48]", "multiple of 32"]),
        case("misaligned offset", one_tensor(&[1], 0, 8, 64), Alignment, 24, &["offset 8", "alignment 32"]),
        case("data past the end", one_tensor(&[9], 0, 0, 35), Truncated, 24, &["36 bytes", "byte 64", "99 bytes"]),
        case("offset past the end", one_tensor(&[1], 0, 64, 64), Truncated, 24, &["offset 64", "128 bytes"]),
        case("offset overflows", one_tensor(&[1], 0, !31, 64), Truncated, 24, &["offset 18446744073709551584"]),
        case("end overflows", one_tensor(&[1 << 60], 0, 3 << 62, 64), Truncated, 24, &["4611686018427387904 bytes"]),
        case("unknown type past the end", one_tensor(&[1], 99, 64, 64), Truncated, 24, &["offset 64"]),
        case(
            "duplicate tensor",
            two_tensors(["t", "t"], [0, 0], [0, 32]),
            Duplicate,
            57,
            &["a second tensor called \"t\""],
        ),
        case("same place", two_tensors(["a", "b"], [0, 0], [32, 32]), Overlap, 57, &["\"b\"", "\"a\""]),
        case("overlap in part", two_tensors(["a", "b"], [28, 0], [0, 32]), Overlap, 57, &["96..160", "128..160"]),
        case("overlap out of order", two_tensors(["b", "a"], [0, 28], [32, 0]), Overlap, 24, &["\"b\"", "\"a\""]),
        case("unknown types at one place", two_tensors(["a", "b"], [99, 99], [0, 0]), Overlap, 57, &[]),
        case("a part of a split", split_part(1, 3), Split, None, &["part 2 of a model split into 3", "a whole model"]),
    ]
}

#[test]
fn each_fault_is_named() {
    let mut kinds = HashSet::new();
    for Case { name, bytes, kind, offset, words } in cases() {
        let error = Gguf::parse("bad.gguf", &bytes).expect_err(name);
        let text = error.to_string();
        assert_eq!((error.kind, error.offset), (kind, offset), "{name}: {text}");
        let place = offset.map(|offset| format!("at byte {offset}: ")).unwrap_or_default();
        assert!(text.starts_with(&format!("bad.gguf: {place}found ")), "{name}: {text}");
        for word in ["; expected ", error.remedy()].iter().chain(words) {
            assert!(text.contains(word), "{name}: no {word:?} in {text:?}");
        }
        kinds.insert(kind);
    }
    use ErrorKind::*;
    let parser_kinds = [
        Empty, NotGguf, BigEndian, Version, Truncated, Malformed, Duplicate, Dimensions, Alignment, Overlap, Split,
        WrongType,
    ];
    assert!(parser_kinds.iter().all(|kind| kinds.contains(kind)), "the table misses a kind: {kinds:?}");
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    for (name, file) in common::seeds() {
        let Ok(model) = Gguf::parse(name, &file) else { continue };
        let header_bytes = match model.files[0].data_start {
            _ if model.tensors.is_empty() => file.len(),
            data_start => data_start as usize,
        };
        let end = |tensor: &gguf::TensorInfo| tensor.offset as usize + tensor.size_bytes().unwrap_or(1) as usize;
        let data_end = model.tensors.iter().map(end).max().unwrap_or(header_bytes);
        for cut in (0..16).map(|k| file.len() * k / 16).chain(0..data_end).filter(|&cut| cut < data_end) {
            let error = Gguf::parse(name, &file[..cut]).expect_err("a cut file");
            let expected = if cut == 0 { ErrorKind::Empty } else { ErrorKind::Truncated };
            assert_eq!(error.kind, expected, "{name} cut at {cut} of {}: {error}", file.len());
        }
    }
}

/// A file that turns out shorter than its size said (it shrank, or the disk lies) is an error too.
#[test]
fn a_reader_that_ends_early_is_refused() {
    let file = to_bytes(&sample());
    let header_bytes = common::parse(&file).files[0].data_start as usize - 32;
    for cut in 0..header_bytes {
        let error = Gguf::read("short", &file[..cut], file.len() as u64).expect_err("a short reader");
        assert_eq!(error.kind, ErrorKind::Truncated, "cut at {cut}: {error}");
    }
}

#[test]
fn an_unknown_tensor_type_is_an_error_only_when_its_size_is_asked() {
    let model = common::parse(&one_tensor(&[8], 99, 0, 64).0);
    let tensor = model.tensors.get("t").expect("it is listed");
    assert_eq!((tensor.ty, tensor.elements(), tensor.offset), (TensorType::Unknown(99), 8, 64));
    for error in [tensor.size_bytes().expect_err("no size"), tensor.row_bytes().expect_err("no row size")] {
        assert_eq!(error.kind, ErrorKind::TensorType);
        assert!(error.to_string().contains("tensor \"t\" of type 99"), "{error}");
    }
}

#[test]
fn paths_that_are_no_model_file() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).expect("a file");
        path
    };
    let whole = to_bytes(&sample());
    let table: Vec<(PathBuf, ErrorKind, &str)> = vec![
        (dir.path().join("none.gguf"), ErrorKind::NotFound, "Check the spelling"),
        (dir.path().to_owned(), ErrorKind::NotAFile, "a directory"),
        (PathBuf::from("/dev/null"), ErrorKind::NotAFile, "a device or a pipe"),
        (file("empty.gguf", b""), ErrorKind::Empty, "an empty file"),
        (file("text.gguf", b"<!DOCTYPE html>"), ErrorKind::NotGguf, "looks like text"),
        (file("cut.gguf", &whole[..whole.len() / 2]), ErrorKind::Truncated, "cut short"),
    ];
    for (path, kind, word) in table {
        let error = Gguf::open(&path).expect_err("no model file");
        let text = error.to_string();
        assert_eq!(error.kind, kind, "{text}");
        assert!(text.starts_with(&format!("{}: ", path.display())) && text.contains(word), "{text}");
    }
    Gguf::open(&file("whole.gguf", &whole)).expect("a model file");
}

fn split_part(number: u16, count: u16) -> Raw {
    Raw(to_bytes(&part_writer(number, count, 5, &["x"])))
}

/// A part with the given F32 tensors of 8 elements.
fn part_writer(number: u16, count: u16, total: i32, tensors: &[&str]) -> Writer {
    let mut writer = Writer::new();
    let described = |writer: &mut Writer| -> Result<(), Error> {
        if number == 0 {
            writer.set("general.name", "split model")?;
        }
        writer.set("split.no", number)?.set("split.count", count)?.set("split.tensors.count", total)?;
        tensors.iter().try_for_each(|name| writer.tensor(name, &[8], TensorType::F32).map(drop))
    };
    described(&mut writer).expect("a valid part");
    writer
}

const PARTS: [&[&str]; 3] = [&["a"], &["b", "c"], &["d", "e"]];

fn part_path(dir: &Path, number: usize) -> PathBuf {
    dir.join(format!("model-{:05}-of-00003.gguf", number + 1))
}

/// A directory with a split model of three parts and five tensors.
fn split_model() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    for (number, tensors) in PARTS.iter().enumerate() {
        let part = to_bytes(&part_writer(number as u16, 3, 5, tensors));
        fs::write(part_path(dir.path(), number), part).expect("a file");
    }
    dir
}

#[test]
fn any_part_opens_a_split_model() {
    let dir = split_model();
    for opened in 0..3 {
        let model = Gguf::open(&part_path(dir.path(), opened)).expect("a split model");
        assert_eq!(model.metadata.str("general.name").expect("of the first part"), "split model");
        assert_eq!(model.files.len(), 3);
        let placed: Vec<(usize, &str)> =
            model.tensors.iter().map(|tensor| (tensor.file, tensor.name.as_str())).collect();
        assert_eq!(placed, [(0, "a"), (1, "b"), (1, "c"), (2, "d"), (2, "e")]);
        for tensor in model.tensors.iter() {
            let part = &model.files[tensor.file];
            assert_eq!(part.path, part_path(dir.path(), tensor.file));
            let bytes = fs::read(&part.path).expect("the part");
            assert_eq!(part.bytes, bytes.len() as u64);
            assert_eq!(common::data(&bytes, tensor), common::pattern(tensor));
        }
    }
}

#[test]
fn a_split_model_becomes_one_file() {
    let dir = split_model();
    let model = Gguf::open(&part_path(dir.path(), 0)).expect("a split model");
    let joined = common::parse(&to_bytes(&Writer::from(&model)));
    assert_eq!(joined.tensors.len(), 5);
    let keys: Vec<&str> = joined.metadata.iter().map(|(key, _)| key).collect();
    assert_eq!(keys, ["general.name"]);
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    type Damage = fn(&Path);
    let table: &[(&str, Damage, ErrorKind, &[&str])] = &[
        (
            "a part is missing",
            |dir| fs::remove_file(part_path(dir, 2)).expect("a file"),
            ErrorKind::Split,
            &["model-00003-of-00003.gguf", "no such file", "part 3 of a model split into 3"],
        ),
        (
            "a part is another part",
            |dir| fs::write(part_path(dir, 2), fs::read(part_path(dir, 1)).expect("a file")).expect("a file"),
            ErrorKind::Split,
            &["model-00003-of-00003.gguf", "found part 2 of a model split into 3", "expected part 3"],
        ),
        (
            "a part is a whole model",
            |dir| fs::write(part_path(dir, 1), to_bytes(&sample())).expect("a file"),
            ErrorKind::Split,
            &["model-00002-of-00003.gguf", "a model in one file"],
        ),
        (
            "a part of a model with other parts",
            |dir| fs::write(part_path(dir, 1), split_part(1, 4).0).expect("a file"),
            ErrorKind::Split,
            &["part 2 of a model split into 4"],
        ),
        (
            "a tensor in two parts",
            |dir| fs::write(part_path(dir, 1), to_bytes(&part_writer(1, 3, 5, &["b", "a"]))).expect("a file"),
            ErrorKind::Duplicate,
            &["model-00002-of-00003.gguf", "a second tensor called \"a\""],
        ),
        (
            "too few tensors",
            |dir| fs::write(part_path(dir, 1), to_bytes(&part_writer(1, 3, 5, &["b"]))).expect("a file"),
            ErrorKind::Split,
            &["4 tensors in all 3 parts", "the 5 tensors"],
        ),
        (
            "a part is cut short",
            |dir| fs::write(part_path(dir, 1), &split_part(1, 3).0[..100]).expect("a file"),
            ErrorKind::Truncated,
            &["model-00002-of-00003.gguf"],
        ),
    ];
    for (name, damage, kind, words) in table {
        let dir = split_model();
        damage(dir.path());
        let error = Gguf::open(&part_path(dir.path(), 0)).expect_err(name);
        let text = error.to_string();
        assert_eq!(error.kind, *kind, "{name}: {text}");
        for word in *words {
            assert!(text.contains(word), "{name}: no {word:?} in {text:?}");
        }
    }
}

#[test]
fn a_renamed_part_is_refused() {
    let dir = split_model();
    let renamed = dir.path().join("model.gguf");
    fs::rename(part_path(dir.path(), 0), &renamed).expect("a file");
    let error = Gguf::open(&renamed).expect_err("a renamed part");
    assert_eq!(error.kind, ErrorKind::Split);
    assert!(error.to_string().contains("a name that ends in \"-00001-of-00003.gguf\""), "{error}");
}

/// A split count from a hostile file costs one look at the disk, not billions.
#[test]
fn an_absurd_split_count_is_refused_at_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut writer = Writer::new();
    writer.set("split.no", u64::MAX).and_then(|writer| writer.set("split.count", u64::MAX)).expect("valid keys");
    let path = dir.path().join(format!("model-{0}-of-{0}.gguf", u64::MAX));
    fs::write(&path, to_bytes(&writer)).expect("a file");
    let error = Gguf::open(&path).expect_err("an absurd count");
    assert_eq!(error.kind, ErrorKind::Split, "{error}");
}

/// In a file of many GiB a wrong length would fit; the header's own limit catches it before memory is asked for.
#[test]
fn a_wrong_length_in_a_huge_file_is_refused() {
    let mut start = b"GGUF".to_vec();
    start.extend(3u32.to_le_bytes());
    start.extend([0u64, 1, 1].iter().flat_map(|number| number.to_le_bytes()));
    start.extend(b"a");
    // An array of 6,000,000,000 bytes.
    start.extend([9u32, 0].iter().flat_map(|number| number.to_le_bytes()));
    start.extend(6_000_000_000u64.to_le_bytes());
    let file = start.as_slice().chain(std::io::repeat(0));
    let error = Gguf::read("huge.gguf", file, 1 << 40).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Truncated);
    assert!(error.to_string().contains("6000000000"), "{error}");
}
