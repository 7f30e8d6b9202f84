//! The byte alphabet of byte-level BPE (GPT-2): every byte is written as one printable character, so
//! that a vocabulary file holds only text.

/// The characters of the 256 bytes: 33–126, 161–172 and 174–255 stand for themselves, the other 68
/// bytes are in increasing order U+0100, U+0101, …
pub(crate) fn alphabet() -> [char; 256] {
    let mut next_free = 0x100;
    std::array::from_fn(|byte| {
        let code = match byte {
            33..=126 | 161..=172 | 174..=255 => byte as u32,
            _ => {
                next_free += 1;
                next_free - 1
            }
        };
        char::from_u32(code).expect("all codes are below U+0144")
    })
}

/// Turns a token's spelling back into its bytes.
pub(crate) struct Decoder {
    /// The byte of each character up to the last of the alphabet.
    byte_of: [Option<u8>; 0x144],
}

impl Decoder {
    pub(crate) fn new() -> Self {
        let mut byte_of = [None; 0x144];
        for (byte, character) in (0..=255).zip(alphabet()) {
            byte_of[character as usize] = Some(byte);
        }
        Self { byte_of }
    }

    /// Appends the bytes that `spelling` stands for. Returns false, with nothing appended, if it holds
    /// a character outside the alphabet.
    pub(crate) fn decode_into(&self, spelling: &str, bytes: &mut Vec<u8>) -> bool {
        let start = bytes.len();
        for character in spelling.chars() {
            match self.byte_of.get(character as usize).copied().flatten() {
                Some(byte) => bytes.push(byte),
                None => {
                    bytes.truncate(start);
                    return false;
                }
            }
        }
        true
    }
}
