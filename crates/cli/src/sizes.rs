//! Amounts of memory on the command line: one way to write them for all flags.

use store::plan::Cache;

/// Names of units and their bytes.
const UNITS: [(&str, u64); 9] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1_000),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

/// `16GiB`, `1.5 GB`, `800MiB`, or a number of bytes.
pub fn bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = (&text[..digits], text[digits..].trim_start());
    let unit_bytes = match unit {
        "" => 1,
        "B" => 1,
        unit => match UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)) {
            Some((_, bytes)) => *bytes,
            None => {
                return Err(format!(
                    "unit {unit:?}, expected KiB, MiB, GiB, TiB (1024 to a step), kB, MB, GB or TB (1000)"
                ));
            }
        },
    };
    let expected = || "expected a number with a unit, for instance 16GiB or 1.5GB, or a number of bytes".to_owned();
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if number.starts_with('.') || number.ends_with('.') || fraction.len() > 18 {
        return Err(expected());
    }
    let whole: u128 = whole.parse().map_err(|_| expected())?;
    let parts: u128 = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| expected())? };
    let fraction_bytes = parts * u128::from(unit_bytes) / 10u128.pow(fraction.len() as u32);
    let bytes = whole.checked_mul(unit_bytes.into()).and_then(|bytes| u64::try_from(bytes + fraction_bytes).ok());
    bytes.ok_or_else(|| "expected less than 2^64 bytes".into())
}

/// The same, and a number without a unit is a number of slots.
pub fn cache(text: &str) -> Result<Cache, String> {
    match text.trim().parse() {
        Ok(slots) => Ok(Cache::Slots(slots)),
        Err(_) => bytes(text).map(Cache::Bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, expected) in [
            ("16GiB", 16 << 30),
            ("16 gib", 16 << 30),
            ("1.5GiB", 3 << 29),
            ("2.25 MB", 2_250_000),
            ("1024", 1024),
            ("0", 0),
            ("7B", 7),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
        assert_eq!(cache("300"), Ok(Cache::Slots(300)));
        assert_eq!(cache("300MiB"), Ok(Cache::Bytes(300 << 20)));
        assert_eq!(cache("0.5GB"), Ok(Cache::Bytes(500_000_000)));
    }

    #[test]
    fn what_is_no_size_is_refused_with_an_example() {
        for (text, part) in [
            ("", "for instance 16GiB"),
            ("GiB", "for instance 16GiB"),
            ("-5GiB", "unit \"-5GiB\""),
            ("16G", "unit \"G\", expected KiB"),
            ("1.2.3GB", "for instance"),
            ("1.GB", "for instance"),
            (".5GB", "for instance"),
            ("20000000TiB", "2^64"),
            ("99999999999999999999999999999999999999999GiB", "for instance"),
        ] {
            let error = bytes(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
