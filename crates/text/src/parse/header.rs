//! The headers of calls and parameters: `<｜DSML｜parameter name="path" string="true">`.

/// What a header says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// The attribute `name`.
    pub(super) name: String,
    /// The attribute `string`, if it is there with one of its two values.
    pub(super) string: Option<bool>,
    /// Whether the header ends with `/>`.
    pub(super) self_closing: bool,
}

impl Header {
    /// Reads what stands between the tag's name and `>`: attributes in any order, entities in their values.
    /// `None` if it is anything else.
    pub(super) fn read(text: &str) -> Option<Self> {
        let self_closing = text.ends_with('/');
        let (mut name, mut string) = (None, None);
        let mut rest = text.strip_suffix('/').unwrap_or(text);
        while !rest.trim_ascii().is_empty() {
            let attribute = rest.strip_prefix(|c: char| c.is_ascii_whitespace())?;
            let (key, value) = attribute.split_once('=')?;
            let (value, after) = value.trim_ascii_start().strip_prefix('"')?.split_once('"')?;
            match key.trim_ascii() {
                "name" => name = Some(decode_entities(value)),
                "string" => string = value.parse().ok(),
                _ => {}
            }
            rest = after;
        }
        Some(Self { name: name?, string, self_closing })
    }
}

/// Looks for the `>` that ends a header, a piece at a time.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct HeaderEnd {
    in_quotes: bool,
}

/// What [`HeaderEnd`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scan {
    /// The `>`.
    End,
    /// Nothing yet.
    More,
    /// What no header holds.
    Wrong,
}

impl HeaderEnd {
    /// Goes on with `text`, which follows what was scanned before: what it found, after how many bytes.
    pub(super) fn scan(&mut self, text: &str) -> (Scan, usize) {
        for (at, byte) in text.bytes().enumerate() {
            match byte {
                b'"' => self.in_quotes = !self.in_quotes,
                _ if self.in_quotes => {}
                b'>' => return (Scan::End, at),
                b'=' | b'/' | b'_' | b'-' => {}
                _ if byte.is_ascii_alphanumeric() || byte.is_ascii_whitespace() => {}
                _ => return (Scan::Wrong, at),
            }
        }
        (Scan::More, text.len())
    }
}

/// Replaces the entities that XML defines.
fn decode_entities(text: &str) -> String {
    let entities = [("&lt;", '<'), ("&gt;", '>'), ("&quot;", '"'), ("&apos;", '\''), ("&#39;", '\''), ("&amp;", '&')];
    let mut decoded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        let (before, from) = rest.split_at(at);
        decoded.push_str(before);
        let entity = entities.iter().find(|(entity, _)| from.starts_with(entity));
        let (length, character) = entity.map_or((1, '&'), |&(entity, character)| (entity.len(), character));
        decoded.push(character);
        rest = &from[length..];
    }
    decoded + rest
}
