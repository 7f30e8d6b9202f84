//! Owned, page-aligned memory for weights.
//!
//! Page alignment lets direct I/O read into it and vector loads never straddle a page at its start.

use bytemuck::{Pod, Zeroable};

/// Alignment of every [`AlignedBytes`], in bytes.
pub const ALIGNMENT_BYTES: usize = 4096;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(4096))]
struct Page([u8; ALIGNMENT_BYTES]);

/// A block of zero-initialised bytes that starts on a page border.
pub struct AlignedBytes {
    pages: Vec<Page>,
    len: usize,
}

impl AlignedBytes {
    /// `len` zero bytes. The system hands out the pages only when they are first written.
    pub fn zeroed(len: usize) -> AlignedBytes {
        AlignedBytes { pages: bytemuck::zeroed_vec(len.div_ceil(ALIGNMENT_BYTES)), len }
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.pages)[..self.len]
    }

    /// The bytes, to be filled.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.pages)[..self.len]
    }
}

impl std::ops::Deref for AlignedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.as_slice()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_on_a_page_and_has_the_asked_length() {
        for len in [0, 1, 4095, 4096, 4097, 1 << 20] {
            let mut bytes = AlignedBytes::zeroed(len);
            assert_eq!(bytes.len(), len);
            assert_eq!(bytes.as_mut_slice().as_ptr() as usize % ALIGNMENT_BYTES, 0);
            assert!(bytes.iter().all(|&b| b == 0));
        }
    }
}
