//! The bytes of a model: one or more files, or an image already in memory.

use std::fs::File;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

use crate::AlignedBytes;

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
    /// There is not enough memory for weights.
    #[error("the weights need {wanted_bytes} bytes of memory, but {}. All weights are held in memory: \
             use a smaller model or quantisation, a machine with more memory, or end other programs",
            .available_bytes.map_or("the system refused them".to_owned(), |bytes| format!("{bytes} bytes are available")))]
    Memory {
        /// How many bytes were asked for.
        wanted_bytes: u64,
        /// How many the system says it can give.
        available_bytes: Option<u64>,
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

/// Pieces of 4 KiB that [`Source::identity`] samples from each file.
const SAMPLES: u64 = 64;

enum Part {
    File { path: PathBuf, file: File, bytes: u64 },
    Image { name: PathBuf, image: &'static [u8] },
}

impl Part {
    fn bytes(&self) -> u64 {
        match self {
            Part::File { bytes, .. } => *bytes,
            Part::Image { image, .. } => image.len() as u64,
        }
    }
}

fn open_part(path: &Path, expected_bytes: u64) -> Result<Part, StoreError> {
    let cannot = |cause| StoreError::Open { path: path.to_owned(), cause };
    let file = File::open(path).map_err(cannot)?;
    let bytes = file.metadata().map_err(cannot)?.len();
    if bytes != expected_bytes {
        return Err(StoreError::Replaced { path: path.to_owned(), found_bytes: bytes, expected_bytes });
    }
    Ok(Part::File { path: path.to_owned(), file, bytes })
}

/// The files a model is read from, in the order its directory numbers them.
pub struct Source {
    parts: Vec<Part>,
}

impl Source {
    /// Opens files, each given by its path and the length in bytes that it had when its directory was read.
    ///
    /// # Errors
    /// [`StoreError::Open`] for the first file that cannot be opened or measured, [`StoreError::Replaced`] for one of
    /// another length.
    pub fn open<P: AsRef<Path>>(files: impl IntoIterator<Item = (P, u64)>) -> Result<Source, StoreError> {
        let parts = files.into_iter().map(|(path, bytes)| open_part(path.as_ref(), bytes));
        Ok(Source { parts: parts.collect::<Result<_, _>>()? })
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
        Source { parts: vec![Part::Image { name: name.into(), image }] }
    }

    /// Fills `buf` from `offset` of file number `file`.
    ///
    /// # Errors
    /// [`StoreError::Short`] if the file ends too early, [`StoreError::Read`] if the system refuses. `buf` is then
    /// undefined and must not be used.
    pub fn read_exact_at(&self, file: usize, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        let wanted_bytes = buf.len() as u64;
        let short =
            |path: &Path, found_bytes| StoreError::Short { path: path.to_owned(), offset, wanted_bytes, found_bytes };
        match &self.parts[file] {
            Part::Image { name, image } => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let found = image.get(start..).and_then(|rest| rest.get(..buf.len()));
                buf.copy_from_slice(found.ok_or_else(|| short(name, image.len() as u64))?);
                Ok(())
            }
            Part::File { path, file, bytes } => positional_read(file, buf, offset).map_err(|cause| {
                if cause.kind() == std::io::ErrorKind::UnexpectedEof {
                    short(path, file.metadata().map_or(*bytes, |m| m.len()))
                } else {
                    StoreError::Read { path: path.clone(), offset, wanted_bytes, cause }
                }
            }),
        }
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
fn positional_read(file: &File, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buf, offset)
}

#[cfg(windows)]
fn positional_read(file: &File, mut buf: &mut [u8], mut offset: u64) -> std::io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !buf.is_empty() {
        match file.seek_read(buf, offset)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => {
                buf = &mut buf[n..];
                offset += n as u64;
            }
        }
    }
    Ok(())
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

    #[test]
    fn a_missing_file_is_named() {
        let error = Source::open([("/no/such/file", 1)]).err().unwrap().to_string();
        assert!(error.contains("/no/such/file"), "{error}");
    }
}
