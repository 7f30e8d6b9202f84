//! One error type: which file, where in it, what was found, what was expected, what to do.

use std::io;

/// Why a GGUF file, or a question to its metadata, was refused.
#[derive(Debug, thiserror::Error)]
#[error("{place}found {found}; expected {expected}. {remedy}", place = self.place(), remedy = self.remedy())]
pub struct Error {
    /// What kind of fault this is.
    pub kind: ErrorKind,
    /// The file's name as it was given; empty for data that belongs to no file.
    pub file: Box<str>,
    /// Where in the file, in bytes from its start, when that is known.
    pub offset: Option<u64>,
    /// What is there.
    pub found: Box<str>,
    /// What should be there.
    pub expected: Box<str>,
    /// The operating system's error, for [`ErrorKind::Io`] and [`ErrorKind::NotFound`].
    pub source: Option<io::Error>,
}

/// The kinds of fault; each has one remedy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The operating system could not read or write.
    Io,
    /// There is no such file.
    NotFound,
    /// The path is a directory, a device or a pipe.
    NotAFile,
    /// The file has no bytes.
    Empty,
    /// The file does not start with the GGUF magic.
    NotGguf,
    /// A GGUF file in big-endian byte order.
    BigEndian,
    /// A GGUF version other than 2 and 3.
    Version,
    /// A count, length or offset reaches past the end of the file.
    Truncated,
    /// A value the format does not allow: a type id, a bool, a string, an array nested too deep.
    Malformed,
    /// A key or a tensor name occurs twice.
    Duplicate,
    /// A tensor's dimensions are impossible.
    Dimensions,
    /// `general.alignment` or a tensor's offset is not aligned.
    Alignment,
    /// Two tensors share bytes.
    Overlap,
    /// The size of a tensor of an unknown type was needed.
    TensorType,
    /// The parts of a split model do not fit together.
    Split,
    /// A metadata key is absent.
    MissingKey,
    /// A metadata key has a value of another type, or out of range.
    WrongType,
    /// The data given for a tensor to write has another size than the tensor.
    DataSize,
}

impl ErrorKind {
    /// What a user can do about it: one sentence.
    pub fn remedy(self) -> &'static str {
        match self {
            ErrorKind::Io => "Check the disk, the free space and the permissions of the file.",
            ErrorKind::NotFound => "Check the spelling of the path.",
            ErrorKind::NotAFile => "Give the path of a .gguf file; of a split model, that of any part.",
            ErrorKind::Empty => "The download did not start or was cut off: download the file again.",
            ErrorKind::NotGguf => {
                "Give a model in GGUF format; if a web page or a Git LFS pointer was saved in its place, download the \
                 model itself."
            }
            ErrorKind::BigEndian => {
                "Use the little-endian file of this model, or convert it with `gguf-convert-endian` of the Python \
                 package gguf."
            }
            ErrorKind::Version => "Convert the model again with a current converter, or update infall if it is newer.",
            ErrorKind::Truncated => {
                "The file is cut short or damaged: compare its size and checksum with the publisher's and download it \
                 again."
            }
            ErrorKind::Malformed | ErrorKind::Duplicate | ErrorKind::Overlap => {
                "The file is damaged or was written by a faulty converter: compare its checksum with the publisher's \
                 and download or convert it again."
            }
            ErrorKind::Dimensions | ErrorKind::Alignment => {
                "The file is damaged or was written by a faulty converter: convert the model again."
            }
            ErrorKind::TensorType => "Use a file of this model in one of the known tensor types.",
            ErrorKind::Split => {
                "Keep all parts of the model in one directory, under the names they were published with, and open any \
                 one of them."
            }
            ErrorKind::MissingKey => "Use a file of a supported model, made by a current converter.",
            ErrorKind::WrongType => "The metadata do not describe a supported model: convert the model again.",
            ErrorKind::DataSize => "Write exactly the bytes that the tensor's type and dimensions ask for.",
        }
    }
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, found: impl Into<Box<str>>, expected: impl Into<Box<str>>) -> Error {
        Error { kind, file: "".into(), offset: None, found: found.into(), expected: expected.into(), source: None }
    }

    pub(crate) fn io(source: io::Error, expected: impl Into<Box<str>>) -> Error {
        let kind = if source.kind() == io::ErrorKind::NotFound { ErrorKind::NotFound } else { ErrorKind::Io };
        let found = format!("the error \"{source}\"");
        Error { source: Some(source), ..Error::new(kind, found, expected) }
    }

    pub(crate) fn in_file(mut self, file: &str) -> Error {
        self.file = file.into();
        self
    }

    pub(crate) fn at(mut self, offset: u64) -> Error {
        self.offset = Some(offset);
        self
    }

    /// The remedy of this error's kind.
    pub fn remedy(&self) -> &'static str {
        self.kind.remedy()
    }

    fn place(&self) -> String {
        let file = if self.file.is_empty() { String::new() } else { format!("{}: ", self.file) };
        let offset = self.offset.map_or(String::new(), |offset| format!("at byte {offset}: "));
        file + &offset
    }
}
