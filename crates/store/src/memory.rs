//! Owned, page-aligned memory for weights.
//!
//! Page alignment lets direct I/O read into it, and it is made of huge pages where the system has them: the kernel then
//! has 512 times fewer pages to hand out, to clear and to pin for a read. A block can be cut in two at a page border and joined again: a slab is
//! cut into slots, a slot into the pieces that are read at the same time. Each piece is owned by whoever may write to it,
//! so "nobody computes with bytes that are being read" is a matter of types.

use std::sync::Arc;

use memmap2::{MmapMut, MmapRaw};

use crate::{StoreError, budget};

/// Alignment of every [`AlignedBytes`], in bytes.
pub const ALIGNMENT_BYTES: usize = 4096;

/// Bytes of a huge page; blocks of at least one begin on a border of such. (Of x86-64; elsewhere they may be larger, and
/// the system then uses fewer of them.)
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// `bytes` rounded up to whole pages.
pub(crate) const fn page_up(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT_BYTES)
}

/// A block of bytes, zero at first, that starts on a page border and belongs to this value alone.
pub struct AlignedBytes {
    /// Shared by the blocks that were cut from one; it is given back when the last of them is gone.
    mapping: Arc<MmapRaw>,
    start: usize,
    len: usize,
}

impl AlignedBytes {
    /// `len` zero bytes. The system hands out the pages only when they are first written.
    ///
    /// # Errors
    /// [`StoreError::Memory`] if the system refuses.
    pub fn zeroed(len: usize) -> Result<AlignedBytes, StoreError> {
        let refused = |_| StoreError::Memory {
            wanted_bytes: len as u64,
            available_bytes: budget::available().map(|available| available.bytes),
        };
        // Room to begin on a border. What lies before it and behind the block is never touched, and so takes no memory.
        let room = if len < HUGE_PAGE_BYTES { 0 } else { HUGE_PAGE_BYTES - ALIGNMENT_BYTES };
        let mapping = MmapMut::map_anon(len.saturating_add(room).max(1)).map_err(refused)?;
        let start = if room == 0 { 0 } else { mapping.as_ptr().align_offset(HUGE_PAGE_BYTES) };
        advise_huge_pages(&mapping, start, len);
        Ok(AlignedBytes { mapping: Arc::new(MmapRaw::from(mapping)), start, len })
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `start..start + len` lies inside the mapping, which lives as long as `self`. No other value covers any
        // byte of it: `zeroed` makes one value for a whole new mapping, and `split_off` and `join` only move a border
        // between two. So no `&mut` to these bytes exists while `self` is borrowed. The system zeroed them.
        unsafe { std::slice::from_raw_parts(self.mapping.as_mut_ptr().add(self.start), self.len) }
    }

    /// The bytes, to be filled.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`; `&mut self` makes this the only borrow.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.as_mut_ptr().add(self.start), self.len) }
    }

    /// Keeps the block from being swapped out, until its memory is given back.
    ///
    /// # Errors
    /// [`StoreError::Lock`] if the system does not allow that.
    pub fn lock(&self) -> Result<(), StoreError> {
        let refused =
            |cause| StoreError::Lock { wanted_bytes: self.len as u64, limit_bytes: lock_limit_bytes(), cause };
        lock(self.as_slice()).map_err(refused)
    }

    /// Keeps the first `at` bytes and returns the rest. Panics unless `at` is a page border within the block.
    pub fn split_off(&mut self, at: usize) -> AlignedBytes {
        assert!(at.is_multiple_of(ALIGNMENT_BYTES) && at <= self.len, "cutting {} bytes at {at}", self.len);
        let rest = AlignedBytes { mapping: self.mapping.clone(), start: self.start + at, len: self.len - at };
        self.len = at;
        rest
    }

    /// The reverse of [`AlignedBytes::split_off`]. Panics if `next` is not what follows this block in memory.
    pub fn join(&mut self, next: AlignedBytes) {
        let follows = Arc::ptr_eq(&self.mapping, &next.mapping) && self.start + self.len == next.start;
        assert!(follows, "only neighbours can be joined");
        self.len += next.len;
    }
}

/// Refuses before anything is read if so many bytes more may not be locked, by trying. On Linux that touches none of them;
/// other systems bring the memory in to lock it, which takes a moment, and it is given back at once.
///
/// # Errors
/// As [`AlignedBytes::lock`].
pub fn check_lockable(wanted_bytes: u64) -> Result<(), StoreError> {
    AlignedBytes::zeroed(wanted_bytes as usize)?.lock()
}

/// What is locked is in memory from its first touch on, and not before: a slot that is never used takes none.
#[cfg(target_os = "linux")]
fn lock(bytes: &[u8]) -> std::io::Result<()> {
    // SAFETY: locking changes no byte, and the range belongs to a live mapping.
    Ok(unsafe {
        rustix::mm::mlock_with(bytes.as_ptr().cast_mut().cast(), bytes.len(), rustix::mm::MlockFlags::ONFAULT)
    }?)
}

#[cfg(all(unix, not(target_os = "linux")))]
fn lock(bytes: &[u8]) -> std::io::Result<()> {
    // SAFETY: locking changes no byte, and the range belongs to a live mapping.
    Ok(unsafe { rustix::mm::mlock(bytes.as_ptr().cast_mut().cast(), bytes.len()) }?)
}

#[cfg(not(unix))]
fn lock(_: &[u8]) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// Most bytes that this process may lock, where there is such a limit.
fn lock_limit_bytes() -> Option<u64> {
    #[cfg(unix)]
    return rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    #[cfg(not(unix))]
    None
}

/// Asks for huge pages wherever a whole one lies within the block, so that no memory is taken beyond its last page. Advice:
/// if it is not taken, reading is slower and nothing else happens.
#[cfg(target_os = "linux")]
fn advise_huge_pages(mapping: &MmapMut, start: usize, len: usize) {
    let whole = len / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
    if whole > 0 {
        let _ = mapping.advise_range(memmap2::Advice::HugePage, start, whole);
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_huge_pages(_: &MmapMut, _: usize, _: usize) {}

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
    match budget::available() {
        Some(available) if wanted_bytes > available.bytes => {
            Err(StoreError::Memory { wanted_bytes, available_bytes: Some(available.bytes) })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_there_is_is_refused() {
        let error = AlignedBytes::zeroed(1 << 62).err().unwrap().to_string();
        assert!(error.contains("4611686018427387904 bytes"), "{error}");
        if budget::available().is_none() {
            println!("skipped: this system does not say how much memory is available");
            return;
        }
        let refused = check_available(1 << 60).unwrap_err();
        assert!(matches!(refused, StoreError::Memory { available_bytes: Some(_), .. }));
        assert!(refused.to_string().contains("--stream"), "{refused}");
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

    /// Areas of memory for which huge pages were asked for, as the kernel tells.
    #[cfg(target_os = "linux")]
    fn advised_areas() -> Vec<std::ops::Range<usize>> {
        let (mut areas, mut area) = (Vec::new(), 0..0);
        for line in std::fs::read_to_string("/proc/self/smaps").unwrap().lines() {
            let first = line.split(' ').next().unwrap();
            if let Some((start, end)) = first.split_once('-') {
                area = usize::from_str_radix(start, 16).unwrap()..usize::from_str_radix(end, 16).unwrap();
            } else if first == "VmFlags:" && line.split(' ').any(|flag| flag == "hg") {
                areas.push(area.clone());
            }
        }
        areas
    }

    /// A huge page that reached beyond the block would take memory that no plan counts.
    #[test]
    #[cfg(target_os = "linux")]
    fn huge_pages_cover_large_blocks_and_nothing_else() {
        if !std::fs::exists("/sys/kernel/mm/transparent_hugepage").unwrap() {
            println!("skipped: this kernel has no huge pages");
            return;
        }
        for len in [HUGE_PAGE_BYTES - 1, HUGE_PAGE_BYTES, 3 * HUGE_PAGE_BYTES + 5, 7 * HUGE_PAGE_BYTES + 12_288] {
            let bytes = AlignedBytes::zeroed(len).unwrap();
            let (start, huge_bytes) = (bytes.as_ptr() as usize, len / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES);
            let advised = advised_areas().into_iter().find(|area| area.contains(&start));
            assert_eq!(advised, (huge_bytes > 0).then_some(start..start + huge_bytes));
            assert!(huge_bytes == 0 || start.is_multiple_of(HUGE_PAGE_BYTES));
        }
    }

    /// Bytes that this process has locked.
    #[cfg(target_os = "linux")]
    fn locked_bytes() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
    }

    /// As much as the limit allows; and, without the right to pass over it, no more.
    #[test]
    #[cfg(target_os = "linux")]
    fn memory_is_locked_within_the_limit() {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
        const LIMIT_BYTES: u64 = 256 << 10;
        // Of this thread alone.
        let mut sets = capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::IPC_LOCK);
        set_capabilities(None, sets).unwrap();
        let before = getrlimit(Resource::Memlock);
        setrlimit(Resource::Memlock, Rlimit { current: Some(LIMIT_BYTES), ..before }).unwrap();

        let [allowed, refused] = [128 << 10, 512 << 10].map(|len| AlignedBytes::zeroed(len).unwrap());
        allowed.lock().unwrap();
        assert_eq!(locked_bytes(), allowed.len());
        let error = refused.lock().unwrap_err();
        assert!(matches!(error, StoreError::Lock { wanted_bytes: 524_288, limit_bytes: Some(LIMIT_BYTES), .. }));
        assert!(error.to_string().contains("ulimit -l"), "{error}");
        check_lockable(100 << 10).unwrap();
        assert!(check_lockable(1 << 40).is_err(), "tried without touching it");
        drop(allowed);
        assert_eq!(locked_bytes(), 0);
        setrlimit(Resource::Memlock, before).unwrap();
    }

    #[test]
    fn what_was_cut_is_written_apart_and_joined_again() {
        let mut first = AlignedBytes::zeroed(3 * ALIGNMENT_BYTES + 5).unwrap();
        let mut second = first.split_off(ALIGNMENT_BYTES);
        let mut third = second.split_off(2 * ALIGNMENT_BYTES);
        assert_eq!([first.len(), second.len(), third.len()], [4096, 8192, 5]);
        let thread = std::thread::spawn(move || {
            second.as_mut_slice().fill(2);
            second
        });
        first.as_mut_slice().fill(1);
        third.as_mut_slice().fill(3);
        let second = thread.join().unwrap();
        first.join(second);
        first.join(third);
        assert_eq!(first.len(), 3 * ALIGNMENT_BYTES + 5);
        let count = |value| first.iter().filter(|&&byte| byte == value).count();
        assert_eq!([count(1), count(2), count(3)], [4096, 8192, 5]);
    }

    #[test]
    #[should_panic(expected = "only neighbours")]
    fn strangers_are_not_joined() {
        let [mut a, b] = [1, 2].map(|pages| AlignedBytes::zeroed(pages * ALIGNMENT_BYTES).unwrap());
        a.join(b);
    }
}
