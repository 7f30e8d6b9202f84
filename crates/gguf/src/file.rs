//! A model on disk: one GGUF file, or a split one with all its parts.
//!
//! A split model is files `name-00001-of-00003.gguf` and so on. Each part is a whole GGUF file with the keys
//! `split.no` (from 0), `split.count` and `split.tensors.count` (of all parts together); the model's metadata are
//! those of the first part (written so by `gguf-split` of llama.cpp).

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind};
use crate::header::Header;
use crate::metadata::Metadata;
use crate::tensor::TensorDirectory;

/// The parsed header of a model. Tensor data have not been touched.
#[derive(Clone, Debug)]
pub struct Gguf {
    /// The format's version: 2 or 3.
    pub version: u32,
    /// Keys and values (of a split model, those of its first part).
    pub metadata: Metadata,
    /// The tensors of all files.
    pub tensors: TensorDirectory,
    /// The files that hold the tensors; [`TensorInfo::file`](crate::TensorInfo::file) counts from 0.
    pub files: Vec<FilePart>,
}

/// One file of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilePart {
    /// Where it is (for parsed bytes: the name that was given).
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Where tensor data start, from the start of the file.
    pub data_start: u64,
    /// What tensors' offsets from there are a multiple of.
    pub alignment: u64,
}

/// What a part of a split model says about the whole.
struct Split {
    number: u64,
    count: u64,
}

impl Gguf {
    /// Opens the model at `path`: a file, or any part of a split model, whose other parts lie beside it.
    pub fn open(path: &Path) -> Result<Gguf, Error> {
        let (header, part) = read_part(path)?;
        match Split::of(&header.metadata)? {
            Some(split) => open_split(path, &split),
            None => Gguf::join(vec![(header, part)]),
        }
    }

    /// Parses a single file's bytes, of which the tensor data may not be missing. `name` is for errors.
    pub fn parse(name: &str, bytes: &[u8]) -> Result<Gguf, Error> {
        Gguf::read(name, bytes, bytes.len() as u64)
    }

    /// Parses the header of a single file of `length_bytes` bytes; only the header is read from `reader`.
    /// A part of a split model is refused: its other parts can only be found by [`Gguf::open`].
    pub fn read<R: Read>(name: &str, reader: R, length_bytes: u64) -> Result<Gguf, Error> {
        let header = Header::read(name, reader, length_bytes)?;
        if let Some(split) = Split::of(&header.metadata)? {
            let found = format!("part {} of a model split into {}", split.number + 1, split.count);
            return Err(Error::new(ErrorKind::Split, found, "a whole model").in_file(name));
        }
        let part = FilePart::new(Path::new(name), length_bytes, &header);
        Gguf::join(vec![(header, part)])
    }

    fn join(parts: Vec<(Header, FilePart)>) -> Result<Gguf, Error> {
        let (first, _) = parts.first().expect("a model has at least one part");
        let mut model = Gguf {
            version: first.version,
            metadata: first.metadata.clone(),
            tensors: TensorDirectory::default(),
            files: vec![],
        };
        for (header, part) in parts {
            for tensor in header.tensors.iter() {
                let tensor = crate::TensorInfo { file: model.files.len(), ..tensor.clone() };
                model.tensors.add(tensor).map_err(|error| error.in_file(&part.path.to_string_lossy()))?;
            }
            model.files.push(part);
        }
        Ok(model)
    }
}

impl FilePart {
    fn new(path: &Path, bytes: u64, header: &Header) -> FilePart {
        FilePart { path: path.into(), bytes, data_start: header.data_start, alignment: header.alignment }
    }
}

impl Split {
    /// `None` for a model in one file.
    fn of(metadata: &Metadata) -> Result<Option<Split>, Error> {
        match metadata.optional("split.count", Metadata::u64)? {
            None | Some(0 | 1) => Ok(None),
            Some(count) => Ok(Some(Split { number: metadata.u64("split.no")?, count })),
        }
    }

    /// `-00001-of-00003.gguf` for part `number`, which is counted from 0.
    fn suffix(number: u64, count: u64) -> String {
        format!("-{:05}-of-{count:05}.gguf", number.saturating_add(1))
    }
}

fn read_part(path: &Path) -> Result<(Header, FilePart), Error> {
    let name = path.to_string_lossy();
    let attempt = || {
        let attributes = path.metadata().map_err(|error| Error::io(error, "a GGUF file"))?;
        if !attributes.is_file() {
            let found = if attributes.is_dir() { "a directory" } else { "a device or a pipe" };
            return Err(Error::new(ErrorKind::NotAFile, found, "a GGUF file"));
        }
        let file = File::open(path).map_err(|error| Error::io(error, "a readable GGUF file"))?;
        Ok((file, attributes.len()))
    };
    let (file, bytes) = attempt().map_err(|error| error.in_file(&name))?;
    let header = Header::read(&name, BufReader::with_capacity(256 << 10, file), bytes)?;
    let part = FilePart::new(path, bytes, &header);
    Ok((header, part))
}

fn open_split(path: &Path, opened: &Split) -> Result<Gguf, Error> {
    let suffix = Split::suffix(opened.number, opened.count);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let Some(prefix) = name.strip_suffix(&suffix) else {
        let found = format!("a part of a split model under the name {name:?}");
        let error = Error::new(ErrorKind::Split, found, format!("a name that ends in {suffix:?}"));
        return Err(error.in_file(&path.to_string_lossy()));
    };
    let mut parts = vec![];
    for number in 0..opened.count {
        let sibling = path.with_file_name(format!("{prefix}{}", Split::suffix(number, opened.count)));
        parts.push(read_sibling(&sibling, number, opened.count)?);
    }
    let promised = parts[0].0.metadata.u64("split.tensors.count")?;
    let model = Gguf::join(parts)?;
    if model.tensors.len() as u64 != promised {
        let found = format!("{} tensors in all {} parts", model.tensors.len(), opened.count);
        let expected = format!("the {promised} tensors that key \"split.tensors.count\" promises");
        return Err(Error::new(ErrorKind::Split, found, expected).in_file(&model.files[0].path.to_string_lossy()));
    }
    Ok(model)
}

fn read_sibling(path: &Path, number: u64, count: u64) -> Result<(Header, FilePart), Error> {
    let expected = format!("part {} of a model split into {count}", number + 1);
    if !path.exists() {
        let error = Error::new(ErrorKind::Split, "no such file", expected);
        return Err(error.in_file(&path.to_string_lossy()));
    }
    let (header, part) = read_part(path)?;
    match Split::of(&header.metadata)? {
        Some(split) if (split.number, split.count) == (number, count) => Ok((header, part)),
        other => {
            let found = match other {
                Some(split) => format!("part {} of a model split into {}", split.number.saturating_add(1), split.count),
                None => "a model in one file".to_owned(),
            };
            Err(Error::new(ErrorKind::Split, found, expected).in_file(&path.to_string_lossy()))
        }
    }
}
