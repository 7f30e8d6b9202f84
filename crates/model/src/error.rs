//! What can go wrong between a file and its logits.

use crate::SnapshotError;

/// An error of loading or running a model.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device that computes failed or cannot run the model; its own words say what to do.
    #[error(transparent)]
    Device(Box<dyn std::error::Error + Send + Sync>),
    /// The device has no memory for something; what it has stays good.
    #[error(transparent)]
    DeviceMemory(Box<dyn std::error::Error + Send + Sync>),
    /// The file's metadata does not describe a model this program runs.
    #[error("unsupported model: {key} is {found}, expected {expected}")]
    Unsupported {
        /// The metadata key.
        key: String,
        /// Its value in the file.
        found: String,
        /// What would be supported.
        expected: String,
    },
    /// A metadata key is missing or has the wrong type.
    #[error(transparent)]
    Metadata(#[from] gguf::Error),
    /// A tensor the model needs is not in the file.
    #[error(
        "tensor {name} is missing: {why}. The file is incomplete or is not a whole DeepSeek V4 model; \
             convert or download it again"
    )]
    MissingTensor {
        /// The tensor.
        name: String,
        /// Why it is needed.
        why: String,
    },
    /// A tensor that no part of the model is known to use.
    #[error(
        "tensor {name} is not one this program knows how to use, and leaving it out could change the results: the file \
         is of another dialect or another model, which would have to be converted"
    )]
    UnknownTensor {
        /// The tensor.
        name: String,
    },
    /// A tensor's shape does not follow from the metadata.
    #[error(
        "tensor {name} has shape {found:?}, expected {expected:?} ({why}). \
             Metadata and tensors do not belong together; convert or download the file again"
    )]
    Shape {
        /// The tensor.
        name: String,
        /// Dimensions found, fastest first.
        found: Vec<u64>,
        /// Dimensions expected, fastest first.
        expected: Vec<u64>,
        /// Where the expectation comes from.
        why: String,
    },
    /// A tensor's element type cannot be computed with.
    #[error("tensor {name} has type {found}, expected {expected}. Convert the file to a supported type")]
    Type {
        /// The tensor.
        name: String,
        /// The type found.
        found: String,
        /// The types that would do.
        expected: String,
    },
    /// A tensor holds a value that no model can have.
    #[error(
        "tensor {name} holds {found} at element {element}, expected {expected}. \
             The file is damaged; download or convert it again"
    )]
    Value {
        /// The tensor.
        name: String,
        /// The value.
        found: String,
        /// Index of the element.
        element: usize,
        /// What would be valid.
        expected: String,
    },
    /// Weights could not be fetched.
    #[error(transparent)]
    Store(store::StoreError),
    /// The rows of a pass do not make sense.
    #[error("row {row} of the pass cannot be computed: {what}")]
    Batch {
        /// Index of the row.
        row: usize,
        /// What is wrong with it.
        what: String,
    },
    /// The computation gave NaN or infinity, in the logits or where the indexer chooses.
    #[error(
        "the values computed at position {position} are not finite numbers: some weight is NaN or infinite, so the \
         model file is damaged; download or convert it again"
    )]
    NotFinite {
        /// Position of the token concerned.
        position: usize,
    },
    /// The system gave no threads to compute with.
    #[error("cannot start {threads} threads to compute with: {cause}. Ask for fewer threads")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// What the system said.
        cause: String,
    },
    /// The caller asked for the pass to stop.
    #[error("cancelled")]
    Cancelled,
    /// A saved state could not be used.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The session's state cannot be written.
    #[error("writing the state failed: {0}")]
    Export(std::io::Error),
}

impl From<store::StoreError> for Error {
    fn from(error: store::StoreError) -> Error {
        match error {
            store::StoreError::Cancelled(cancelled) => cancelled.into(),
            error => Error::Store(error),
        }
    }
}

impl From<store::Cancelled> for Error {
    fn from(_: store::Cancelled) -> Error {
        Error::Cancelled
    }
}
