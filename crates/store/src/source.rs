//! The bytes of a model: one or more files, or an image already in memory.

use std::fs::{File, Metadata};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use xxhash_rust::xxh3::Xxh3;

use crate::memory::page_up;
use crate::{ALIGNMENT_BYTES, AlignedBytes, Cancelled};

/// What can go wrong when weights are fetched. Every message names the file, what was asked and what to do.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file could not be opened.
    #[error("cannot open {}: {cause}. Check that the path is right and readable", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// No thread could be started to read with.
    #[error("cannot start a thread to read weights with: {cause}. End other programs or raise the limit of threads")]
    Thread {
        /// What the system said.
        cause: std::io::Error,
    },
    /// The caller asked for the waiting to stop.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    /// There is not enough memory for weights.
    #[error("the weights need {wanted_bytes} bytes of memory, but {}. Let experts stream from the \
             file with --stream, with less --cache or --memory if they do already, use a smaller model, \
             or end other programs",
            .available_bytes.map_or("the system refused them".to_owned(), |bytes| format!("{bytes} bytes are available")))]
    Memory {
        /// How many bytes were asked for.
        wanted_bytes: u64,
        /// How many the system says it can give.
        available_bytes: Option<u64>,
    },
    /// Memory may not be kept from being swapped out.
    #[error("{wanted_bytes} bytes cannot be locked in memory ({cause}); the limit for this process is {}. Raise it (`ulimit \
             -l KIBIBYTES` in the shell, LimitMEMLOCK= in a service; an administrator may have to), or leave out --lock",
            .limit_bytes.map_or("none".to_owned(), |bytes| format!("{bytes} bytes, RLIMIT_MEMLOCK")))]
    Lock {
        /// How many bytes were asked for.
        wanted_bytes: u64,
        /// Most that may be locked, where there is a limit.
        limit_bytes: Option<u64>,
        /// What the system said.
        cause: std::io::Error,
    },
    /// The file is not the one whose directory was read.
    #[error("{} has {found_bytes} bytes, but had {expected_bytes} when its header was read. \
             It was replaced or is still being written: try again when it is complete", path.display())]
    Replaced {
        /// The file.
        path: PathBuf,
        /// Its length now.
        found_bytes: u64,
        /// Its length then.
        expected_bytes: u64,
    },
    /// The file was written to while weights were read from it.
    #[error("{} was written to or truncated while in use, so that the weights in memory may be a mix of two files; \
             nothing is computed with them any more. Start again when the file is complete (a new file is best put in \
             its place by renaming, which harms nobody who reads the old one)", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The system refused a read.
    #[error("reading {wanted_bytes} bytes at offset {offset} of {} failed: {cause}. \
             Check the disk; nothing was computed from the missing bytes", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Where in the file.
        offset: u64,
        /// How many bytes were asked for.
        wanted_bytes: u64,
        /// What the system said.
        cause: std::io::Error,
    },
    /// An expert's bytes are not those that its checksum was made of.
    #[error("{}: part {part} of expert {expert} in layer {layer} ({bytes} bytes at offset {offset}) has the checksum \
             {found:016x}, expected {expected:016x}. Nothing was computed from it: the file was changed since it was sealed, or \
             the disk gives wrong bytes. Try again; if it stays so, check the disk and copy or download the file again",
             path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The layer.
        layer: u32,
        /// The expert's number within its layer.
        expert: u32,
        /// Which of its parts.
        part: usize,
        /// Where in the file.
        offset: u64,
        /// How many bytes.
        bytes: u64,
        /// The checksum of what was read.
        found: u64,
        /// The one it should have.
        expected: u64,
    },
    /// The file ends before the bytes that its own directory promises.
    #[error("{} ends at {found_bytes} bytes, but {wanted_bytes} bytes at offset {offset} were expected. \
             The file is truncated or was replaced while in use: copy or download it again", path.display())]
    Short {
        /// The file.
        path: PathBuf,
        /// Where in the file.
        offset: u64,
        /// How many bytes were asked for.
        wanted_bytes: u64,
        /// How many bytes the file has.
        found_bytes: u64,
    },
}

/// A range of bytes in one of a model's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Index of the file in its [`Source`].
    pub file: usize,
    /// First byte, counted from the file's start.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl Extent {
    /// Bytes between the page border before the extent and its start.
    pub(crate) fn lead_bytes(&self) -> usize {
        (self.offset % ALIGNMENT_BYTES as u64) as usize
    }

    /// Where the extent lies in the whole pages that hold it.
    pub(crate) fn place_in_cover(&self) -> std::ops::Range<usize> {
        self.lead_bytes()..self.lead_bytes() + self.bytes as usize
    }

    /// Bytes of the whole pages that hold the extent.
    pub(crate) fn cover_bytes(&self) -> usize {
        page_up(self.place_in_cover().end)
    }
}

/// Pieces of 4 KiB that [`Source::identity`] samples from each file.
const SAMPLES: u64 = 64;

#[derive(Clone, Debug)]
enum Part {
    File { path: PathBuf, file: Arc<File>, opened: Metadata },
    Image { name: PathBuf, image: &'static [u8] },
}

impl Part {
    fn bytes(&self) -> u64 {
        match self {
            Part::File { opened, .. } => opened.len(),
            Part::Image { image, .. } => image.len() as u64,
        }
    }
}

fn open_part(path: &Path, expected_bytes: u64) -> Result<Part, StoreError> {
    let cannot = |cause| StoreError::Open { path: path.to_owned(), cause };
    let file = File::open(path).map_err(cannot)?;
    let opened = file.metadata().map_err(cannot)?;
    if opened.len() != expected_bytes {
        return Err(StoreError::Replaced { path: path.to_owned(), found_bytes: opened.len(), expected_bytes });
    }
    Ok(Part::File { path: path.to_owned(), file: file.into(), opened })
}

/// Whether the file opened at `path` was written to since.
fn is_written(path: &Path, opened: &Metadata, file: &File) -> bool {
    file.metadata().map_or(true, |now| {
        now.len() != opened.len() || now.modified().ok() != opened.modified().ok() || is_touched(path, opened, &now)
    })
}

/// Whether a file whose length and time are those it had when it was opened was changed all the same, and its time put
/// back: the inode's own time of change, which nobody can set, is another. New links, rights or owners change that time,
/// too, and so does renaming: those say nothing of the bytes.
#[cfg(unix)]
fn is_touched(path: &Path, opened: &Metadata, now: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    let time = |file: &Metadata| (file.ctime(), file.ctime_nsec());
    let names_and_rights = |file: &Metadata| (file.nlink(), file.mode(), file.uid(), file.gid());
    let is_at_path = || std::fs::metadata(path).is_ok_and(|at| (at.dev(), at.ino()) == (now.dev(), now.ino()));
    time(opened) != time(now) && names_and_rights(opened) == names_and_rights(now) && is_at_path()
}

#[cfg(not(unix))]
fn is_touched(_: &Path, _: &Metadata, _: &Metadata) -> bool {
    false
}

/// The files a model is read from, in the order its directory numbers them.
#[derive(Clone, Debug)]
pub struct Source {
    parts: Vec<Part>,
    /// A file was found changed, by any clone of this.
    changed: Arc<AtomicBool>,
}

impl Source {
    /// Opens files, each given by its path and the length in bytes that it had when its directory was read. From here on
    /// changes are noticed ([`Source::check_unchanged`]); of what was written between the two, only another length is.
    ///
    /// # Errors
    /// [`StoreError::Open`] for the first file that cannot be opened or measured, [`StoreError::Replaced`] for one of
    /// another length.
    pub fn open<P: AsRef<Path>>(files: impl IntoIterator<Item = (P, u64)>) -> Result<Source, StoreError> {
        let parts = files.into_iter().map(|(path, bytes)| open_part(path.as_ref(), bytes));
        Ok(Source { parts: parts.collect::<Result<_, _>>()?, changed: Arc::default() })
    }

    /// Whether all files are as they were when they were opened: to be asked after reading and before what was read is
    /// relied on. Who writes to a file in place may keep its length and put its time back afterwards, so a change that was
    /// seen once is one for ever; on Unix it is seen after that, too. A file that another took the place of by renaming is
    /// still the one that is open.
    ///
    /// # Errors
    /// [`StoreError::Changed`] for the first that was written to, by its length, its time of modification or its inode's.
    pub fn check_unchanged(&self) -> Result<(), StoreError> {
        let seen = self.changed.load(Ordering::Relaxed);
        for part in &self.parts {
            if let Part::File { path, file, opened } = part
                && (seen || is_written(path, opened, file))
            {
                self.changed.store(true, Ordering::Relaxed);
                return Err(StoreError::Changed { path: path.clone() });
            }
        }
        Ok(())
    }

    /// What tells these files from others: their lengths and a hash of their first megabyte (which holds the header's
    /// beginning) and of 64 pieces spread over each.
    ///
    /// # Errors
    /// As [`Source::read_exact_at`].
    pub fn identity(&self) -> Result<u128, StoreError> {
        let mut hash = Xxh3::new();
        let mut piece = vec![0; 1 << 20];
        for (i, part) in self.parts.iter().enumerate() {
            let bytes = part.bytes();
            hash.update(&bytes.to_le_bytes());
            let mut sample = |offset: u64, len: u64| -> Result<(), StoreError> {
                let piece = &mut piece[..len.min(bytes - offset) as usize];
                self.read_exact_at(i, offset, piece)?;
                hash.update(piece);
                Ok(())
            };
            sample(0, 1 << 20)?;
            (1..=SAMPLES).try_for_each(|k| sample((bytes as u128 * k as u128 / (SAMPLES as u128 + 1)) as u64, 4096))?;
        }
        Ok(hash.digest128())
    }

    /// A model that is part of the program itself; `name` is what errors call it.
    pub fn from_image(name: &str, image: &'static [u8]) -> Source {
        Source { parts: vec![Part::Image { name: name.into(), image }], changed: Arc::default() }
    }

    /// The same files opened once more so that reads go past the system's page cache. Such reads begin and end on page
    /// borders, in the file and in memory.
    ///
    /// # Errors
    /// Why that cannot be, in words: the system or the filesystem does not offer it, or the file at the path is no
    /// longer the one that is open.
    pub fn direct(&self) -> Result<Source, String> {
        let open = |part: &Part| match part {
            Part::Image { .. } => Ok(part.clone()),
            Part::File { path, file, opened } => match direct::open(path, file) {
                Ok(file) => Ok(Part::File { path: path.clone(), file: file.into(), opened: opened.clone() }),
                Err(cause) => Err(format!("{} cannot be read directly ({cause})", path.display())),
            },
        };
        Ok(Source { parts: self.parts.iter().map(open).collect::<Result<_, _>>()?, changed: self.changed.clone() })
    }

    /// One positional read of what the system gives at once: as many bytes as it says, 0 at the end of the file.
    pub(crate) fn read_at(&self, file: usize, offset: u64, buf: &mut [u8]) -> std::io::Result<usize> {
        match &self.parts[file] {
            Part::Image { image, .. } => {
                let rest = &image[image.len().min(usize::try_from(offset).unwrap_or(usize::MAX))..];
                let bytes = rest.len().min(buf.len());
                buf[..bytes].copy_from_slice(&rest[..bytes]);
                Ok(bytes)
            }
            Part::File { file, .. } => loop {
                match read_once(file, buf, offset) {
                    Err(cause) if cause.kind() == std::io::ErrorKind::Interrupted => {}
                    result => return result,
                }
            },
        }
    }

    /// The open file behind a part, unless it is an image.
    pub(crate) fn file(&self, file: usize) -> Option<&File> {
        match &self.parts[file] {
            Part::Image { .. } => None,
            Part::File { file, .. } => Some(file),
        }
    }

    /// Lets the system forget its own copy of an extent that was just read into memory of ours.
    pub(crate) fn forget_cached(&self, extent: Extent) {
        #[cfg(any(target_os = "linux", target_os = "android", target_os = "freebsd"))]
        if let (Some(file), Some(bytes)) = (self.file(extent.file), std::num::NonZeroU64::new(extent.bytes)) {
            // Advice: if it is not taken, memory is used twice and nothing else happens.
            let _ = rustix::fs::fadvise(file, extent.offset, Some(bytes), rustix::fs::Advice::DontNeed);
        }
        #[cfg(not(any(target_os = "linux", target_os = "android", target_os = "freebsd")))]
        let _ = extent;
    }

    /// What errors call a file.
    pub(crate) fn path(&self, file: usize) -> &Path {
        let (Part::Image { name: path, .. } | Part::File { path, .. }) = &self.parts[file];
        path
    }

    /// The error for an extent that the file ended in.
    pub(crate) fn short(&self, extent: Extent) -> StoreError {
        let (path, found_bytes) = match &self.parts[extent.file] {
            Part::Image { name, image } => (name, image.len() as u64),
            Part::File { path, file, opened } => (path, file.metadata().map_or(opened.len(), |now| now.len())),
        };
        let Extent { offset, bytes: wanted_bytes, .. } = extent;
        StoreError::Short { path: path.clone(), offset, wanted_bytes, found_bytes }
    }

    /// The error for an extent that the system refused to read.
    pub(crate) fn refused(&self, extent: Extent, cause: std::io::Error) -> StoreError {
        StoreError::Read {
            path: self.path(extent.file).to_owned(),
            offset: extent.offset,
            wanted_bytes: extent.bytes,
            cause,
        }
    }

    /// Fills `buf` from `offset` of file number `file`.
    ///
    /// # Errors
    /// [`StoreError::Short`] if the file ends too early, [`StoreError::Read`] if the system refuses. `buf` is then
    /// undefined and must not be used.
    pub fn read_exact_at(&self, file: usize, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        let extent = Extent { file, offset, bytes: buf.len() as u64 };
        let mut done = 0;
        while done < buf.len() {
            match self.read_at(file, offset + done as u64, &mut buf[done..]) {
                Ok(0) => return Err(self.short(extent)),
                Ok(bytes) => done += bytes,
                Err(cause) => return Err(self.refused(extent, cause)),
            }
        }
        Ok(())
    }

    /// Reads a whole extent into memory of its own.
    ///
    /// # Errors
    /// As [`Source::read_exact_at`].
    pub fn read(&self, extent: Extent) -> Result<AlignedBytes, StoreError> {
        let mut memory = AlignedBytes::zeroed(extent.bytes as usize)?;
        self.read_exact_at(extent.file, extent.offset, memory.as_mut_slice())?;
        Ok(memory)
    }
}

#[cfg(unix)]
fn read_once(file: &File, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, buf, offset)
}

#[cfg(windows)]
fn read_once(file: &File, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, buf, offset)
}

/// Opening files past the page cache.
mod direct {
    use std::fs::File;
    use std::io::{Error, Result};
    use std::path::Path;

    /// `path` once more, if it still is the open `file` and gives a page.
    #[cfg(target_os = "linux")]
    pub(super) fn open(path: &Path, file: &File) -> Result<File> {
        use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
        let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
        let direct = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        let (ours, theirs) = (file.metadata()?, direct.metadata()?);
        if (ours.dev(), ours.ino()) != (theirs.dev(), theirs.ino()) {
            return Err(Error::other("another file is at this path now"));
        }
        let mut page = crate::AlignedBytes::zeroed(crate::ALIGNMENT_BYTES).map_err(Error::other)?;
        direct.read_at(page.as_mut_slice(), 0)?;
        Ok(direct)
    }

    #[cfg(target_os = "macos")]
    pub(super) fn open(path: &Path, file: &File) -> Result<File> {
        use std::os::unix::fs::MetadataExt;
        let direct = File::open(path)?;
        let (ours, theirs) = (file.metadata()?, direct.metadata()?);
        if (ours.dev(), ours.ino()) != (theirs.dev(), theirs.ino()) {
            return Err(Error::other("another file is at this path now"));
        }
        rustix::fs::fcntl_nocache(&direct, true)?;
        Ok(direct)
    }

    #[cfg(not(any(target_os = "linux", target_os = "macos")))]
    pub(super) fn open(_: &Path, _: &File) -> Result<File> {
        Err(Error::other("this system offers no such reads here"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 31 % 251) as u8).collect()
    }

    #[test]
    fn files_and_images_give_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        let bytes = numbers(10_000);
        std::fs::write(&path, &bytes).unwrap();
        let file = Source::open([(&path, 10_000)]).unwrap();
        let image = Source::from_image("built in", Vec::leak(bytes.clone()));
        for source in [&file, &image] {
            let got = source.read(Extent { file: 0, offset: 1234, bytes: 5000 }).unwrap();
            assert_eq!(&got[..], &bytes[1234..6234]);
        }
    }

    #[test]
    fn a_short_file_is_an_error_that_names_what_was_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        std::fs::write(&path, numbers(100)).unwrap();
        let extent = Extent { file: 0, offset: 90, bytes: 20 };
        for source in [Source::open([(&path, 100)]).unwrap(), Source::from_image("built in", Vec::leak(numbers(100)))] {
            match source.read(extent) {
                Err(StoreError::Short { offset: 90, wanted_bytes: 20, found_bytes: 100, .. }) => {}
                other => panic!("expected a short read, got {:?}", other.map(|m| m.len())),
            }
        }
    }

    #[test]
    fn identity_follows_the_bytes_and_not_the_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        let bytes = numbers(3 << 20);
        std::fs::write(&path, &bytes).unwrap();
        let file = Source::open([(&path, 3 << 20)]).unwrap().identity().unwrap();
        let image = |bytes: Vec<u8>| Source::from_image("image", Vec::leak(bytes)).identity().unwrap();
        assert_eq!(file, image(bytes.clone()));
        let sampled = (3 << 20) * 40 / (SAMPLES as usize + 1);
        for at in [0, 1000, sampled, sampled + 4095] {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert_ne!(file, image(changed), "byte {at} changed");
        }
        assert_ne!(file, image(bytes[1..].to_vec()));
        assert!(matches!(Source::open([(&path, 5)]), Err(StoreError::Replaced { expected_bytes: 5, .. })));
    }

    /// Same length, other bytes; truncated; and time put back after either was seen.
    #[test]
    fn a_file_written_to_in_place_is_noticed_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        for change in [|file: &File| std::io::Write::write_all(&mut &*file, &[7]), |file: &File| file.set_len(99)] {
            std::fs::write(&path, numbers(100)).unwrap();
            let opened = std::fs::metadata(&path).unwrap().modified().unwrap();
            let source = Source::open([(&path, 100)]).unwrap();
            source.check_unchanged().unwrap();
            std::thread::sleep(std::time::Duration::from_millis(20));
            let file = File::options().write(true).open(&path).unwrap();
            change(&file).unwrap();
            assert!(matches!(source.check_unchanged(), Err(StoreError::Changed { .. })));
            file.set_len(100).unwrap();
            file.set_modified(opened).unwrap();
            let error = source.clone().check_unchanged().unwrap_err().to_string();
            assert!(error.contains("weights was written to or truncated while in use"), "{error}");
        }
    }

    /// Wholly between two checks, as `rsync --inplace -t` does.
    #[test]
    #[cfg(unix)]
    fn a_change_between_two_checks_is_noticed_although_its_time_is_put_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        std::fs::write(&path, numbers(100)).unwrap();
        let opened = path.metadata().unwrap().modified().unwrap();
        let source = Source::open([(&path, 100)]).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        let file = File::options().write(true).open(&path).unwrap();
        std::io::Write::write_all(&mut &file, &[7]).unwrap();
        file.set_modified(opened).unwrap();
        assert!(matches!(source.check_unchanged(), Err(StoreError::Changed { .. })));
    }

    #[test]
    #[cfg(unix)]
    fn links_rights_and_names_say_nothing_of_the_bytes() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let [path, other] = ["weights", "other"].map(|name| dir.path().join(name));
        let changes: [&dyn Fn(); 3] = [
            &|| std::fs::hard_link(&path, &other).unwrap(),
            &|| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).unwrap(),
            &|| std::fs::rename(&path, &other).unwrap(),
        ];
        for change in changes {
            std::fs::write(&path, numbers(100)).unwrap();
            let source = Source::open([(&path, 100)]).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(20));
            change();
            source.check_unchanged().unwrap();
            for path in [&path, &other].into_iter().filter(|path| path.exists()) {
                std::fs::remove_file(path).unwrap();
            }
        }
    }

    #[test]
    fn a_file_that_another_took_the_place_of_is_still_the_one_that_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let [path, other] = ["weights", "other"].map(|name| dir.path().join(name));
        std::fs::write(&path, numbers(100)).unwrap();
        std::fs::write(&other, [0; 100]).unwrap();
        let source = Source::open([(&path, 100)]).unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert_eq!(source.read(Extent { file: 0, offset: 0, bytes: 100 }).unwrap()[..], numbers(100));
        source.check_unchanged().unwrap();
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Source::open([("/no/such/file", 1)]).err().unwrap().to_string();
        assert!(error.contains("/no/such/file"), "{error}");
    }
}
