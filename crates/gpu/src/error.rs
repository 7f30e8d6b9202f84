//! What can go wrong on a GPU.

/// Every message says what was found, what was expected and what to do.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    /// There is no such adapter.
    #[error("found no {wanted}; the adapters are: {found}. `infall devices` tells more; --device cpu computes without")]
    NoAdapter {
        /// What was asked for.
        wanted: String,
        /// What there is.
        found: String,
    },
    /// The adapter cannot run the kernels.
    #[error(
        "{name} lacks {lacks}, which the kernels need. Update its driver, choose another with --device gpu:N, or \
             compute with --device cpu"
    )]
    Lacks {
        /// The adapter.
        name: String,
        /// What it lacks.
        lacks: String,
    },
    /// The driver refused the adapter.
    #[error("{name} could not be opened: {cause}. Another program may hold it; --device cpu computes without")]
    Open {
        /// The adapter.
        name: String,
        /// What the driver said.
        cause: String,
    },
    /// The device has no room for something more; what it has stays good.
    #[error(
        "{name} has no memory left: {what} was to have {wanted_bytes} bytes ({cause}). Ask for less with --gpu-memory or a smaller \
             --ctx, or end other programs that use it"
    )]
    Memory {
        /// The adapter.
        name: String,
        /// What it is.
        what: String,
        /// Its size.
        wanted_bytes: u64,
        /// What the driver said.
        cause: String,
    },
    /// The device failed, was lost, or ran out of memory.
    #[error(
        "{name} failed: {what}. Nothing it computed since was used. If memory is short, ask for less with \
             --gpu-memory or a smaller --ctx, or end other programs that use it; then start again"
    )]
    Failed {
        /// The adapter.
        name: String,
        /// What the driver said.
        what: String,
    },
    /// A tensor is of a type without kernels.
    #[error(
        "{tensor} is of type {found}; the GPU kernels read {expected}. Compute with --device cpu, which reads all types"
    )]
    Type {
        /// Its name.
        tensor: String,
        /// Its type.
        found: String,
        /// Types that kernels read.
        expected: String,
    },
    /// Something does not fit into one buffer of the adapter.
    #[error(
        "{what} takes {wanted_bytes} bytes, but {name} lets a kernel reach {limit_bytes} bytes of a buffer. \
             Use another adapter or --device cpu"
    )]
    TooLarge {
        /// The adapter.
        name: String,
        /// What it is.
        what: String,
        /// Its size.
        wanted_bytes: u64,
        /// The adapter's limit.
        limit_bytes: u64,
    },
}

impl From<GpuError> for model::Error {
    fn from(error: GpuError) -> model::Error {
        match error {
            GpuError::Memory { .. } | GpuError::TooLarge { .. } => model::Error::DeviceMemory(Box::new(error)),
            _ => model::Error::Device(Box::new(error)),
        }
    }
}
