//! NumPy's array format, version 1.0, for float32 matrices
//! (<https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>).

use std::io::{self, Write};

/// Data start at a multiple of this.
const ALIGNMENT_BYTES: usize = 64;

/// Writes the header of a matrix of `rows` rows of `cols` values, row after row. Exactly that many values must follow,
/// as [`write_values`] writes them.
pub fn write_header(out: &mut dyn Write, rows: usize, cols: usize) -> io::Result<()> {
    const PREFIX: &[u8] = b"\x93NUMPY\x01\x00";
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {cols}), }}");
    let unpadded = PREFIX.len() + 2 + header.len() + 1;
    header.push_str(&" ".repeat(unpadded.next_multiple_of(ALIGNMENT_BYTES) - unpadded));
    header.push('\n');
    let length = u16::try_from(header.len()).expect("two numbers and fixed words are shorter than 64 KiB");
    out.write_all(PREFIX)?;
    out.write_all(&length.to_le_bytes())?;
    out.write_all(header.as_bytes())
}

/// Writes the next values.
pub fn write_values(out: &mut dyn Write, values: &[f32]) -> io::Result<()> {
    values.iter().try_for_each(|value| out.write_all(&value.to_le_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `numpy.save` of `numpy.array([[1, -2, 0.5]], dtype=numpy.float32)`, NumPy 2.
    #[test]
    fn bytes_are_those_of_numpy() {
        let mut expected =
            b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1, 3), }".to_vec();
        expected.resize(127, b' ');
        expected.push(b'\n');
        expected.extend([0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0, 0, 0, 0, 0x3f]);
        let mut got = Vec::new();
        write_header(&mut got, 1, 3).unwrap();
        write_values(&mut got, &[1.0, -2.0, 0.5]).unwrap();
        assert_eq!(got, expected);
    }

    #[test]
    fn data_are_aligned_whatever_the_shape() {
        for rows in [0, 9, 10, 12_345_678, usize::MAX] {
            let mut header = Vec::new();
            write_header(&mut header, rows, 129_280).unwrap();
            assert_eq!(header.len() % ALIGNMENT_BYTES, 0);
            assert_eq!(usize::from(u16::from_le_bytes([header[8], header[9]])), header.len() - 10);
            assert_eq!(header.last(), Some(&b'\n'));
        }
    }
}
