//! Owned, page-aligned memory for weights.
//!
//! Page alignment lets direct I/O read into it and vector loads never straddle a page at its start.

use bytemuck::{Pod, Zeroable};

use crate::StoreError;

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
    ///
    /// # Errors
    /// [`StoreError::Memory`] if the system refuses.
    pub fn zeroed(len: usize) -> Result<AlignedBytes, StoreError> {
        let pages = bytemuck::allocation::try_zeroed_vec(len.div_ceil(ALIGNMENT_BYTES));
        let refused = |()| StoreError::Memory { wanted_bytes: len as u64, available_bytes: available_bytes() };
        Ok(AlignedBytes { pages: pages.map_err(refused)?, len })
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

/// Refuses before anything is read if `wanted_bytes` are more than the system can give: a system that hands out memory
/// it does not have would end the program in the middle.
///
/// # Errors
/// [`StoreError::Memory`] with both numbers. Where the system does not say what it has, nothing is refused.
pub fn check_available(wanted_bytes: u64) -> Result<(), StoreError> {
    match available_bytes() {
        Some(available) if wanted_bytes > available => {
            Err(StoreError::Memory { wanted_bytes, available_bytes: Some(available) })
        }
        _ => Ok(()),
    }
}

/// Memory that can be taken without swapping, as Linux estimates it; `None` elsewhere.
fn available_bytes() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_there_is_is_refused() {
        let error = AlignedBytes::zeroed(1 << 62).err().unwrap().to_string();
        assert!(error.contains("4611686018427387904 bytes"), "{error}");
        if available_bytes().is_none() {
            println!("skipped: this system does not say how much memory is available");
            return;
        }
        assert!(matches!(check_available(1 << 60), Err(StoreError::Memory { available_bytes: Some(_), .. })));
        check_available(1 << 20).unwrap();
    }

    #[test]
    fn starts_on_a_page_and_has_the_asked_length() {
        for len in [0, 1, 4095, 4096, 4097, 1 << 20] {
            let mut bytes = AlignedBytes::zeroed(len).unwrap();
            assert_eq!(bytes.len(), len);
            assert_eq!(bytes.as_mut_slice().as_ptr() as usize % ALIGNMENT_BYTES, 0);
            assert!(bytes.iter().all(|&b| b == 0));
        }
    }
}
