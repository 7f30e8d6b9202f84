//! The tensor directory: what tensors there are, how large they are and where their bytes lie.

use indexmap::IndexMap;

use crate::MAX_DIMS;
use crate::error::{Error, ErrorKind};
use crate::tensor_type::{Block, TensorType};

/// One tensor of a model: a description, no data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Unique within the model.
    pub name: String,
    /// Elements along each dimension, fastest first (ggml's `ne`): a matrix `W[out, in]` has dims `[in, out]`.
    pub dims: Vec<u64>,
    /// Element type.
    pub ty: TensorType,
    /// Which of [`Gguf::files`](crate::Gguf::files) holds the data.
    pub file: usize,
    /// Where the data start, in bytes from the start of that file.
    pub offset: u64,
}

impl TensorInfo {
    /// Number of elements: the product of the dimensions. (A product over `u64::MAX`, which no parsed tensor
    /// has, saturates.)
    pub fn elements(&self) -> u64 {
        self.dims.iter().fold(1, |product, &dim| product.saturating_mul(dim))
    }

    /// Bytes of one row (`dims[0]` elements). An error if the type is unknown or its blocks do not divide a row.
    pub fn row_bytes(&self) -> Result<u64, Error> {
        let row_elements = self.dims.first().copied().unwrap_or(0);
        let Block { elements, bytes } = self.ty.block().ok_or_else(|| {
            let found = format!("tensor {:?} of {}, whose size is unknown", self.name, self.ty);
            Error::new(ErrorKind::TensorType, found, "a tensor type of this table: F32 to MXFP4")
        })?;
        if !row_elements.is_multiple_of(elements) {
            let expected = format!("rows that are a multiple of {elements} elements, which is a block of {}", self.ty);
            return Err(self.bad_dims(expected));
        }
        (row_elements / elements).checked_mul(bytes).ok_or_else(|| self.bad_dims("a row size within 64 bits"))
    }

    /// Bytes of the whole tensor. An error if the type is unknown or the dimensions do not fit it.
    pub fn size_bytes(&self) -> Result<u64, Error> {
        self.check_dims()?;
        let rows = self.dims[1..].iter().product::<u64>();
        self.row_bytes()?.checked_mul(rows).ok_or_else(|| self.bad_dims("a size within 64 bits"))
    }

    /// Refuses dimensions that no tensor can have, whatever its type. Afterwards no product of them overflows.
    pub(crate) fn check_dims(&self) -> Result<(), Error> {
        if self.dims.is_empty() || self.dims.len() > MAX_DIMS {
            return Err(self.bad_dims(format!("1 to {MAX_DIMS} dimensions")));
        }
        if self.dims.contains(&0) {
            return Err(self.bad_dims("dimensions of at least 1"));
        }
        let product = self.dims.iter().try_fold(1_u64, |product, &dim| product.checked_mul(dim));
        match product {
            Some(elements) if i64::try_from(elements).is_ok() => Ok(()),
            _ => Err(self.bad_dims("a number of elements within 63 bits")),
        }
    }

    fn bad_dims(&self, expected: impl Into<Box<str>>) -> Error {
        let found = format!("tensor {:?} of type {} with dimensions {:?}", self.name, self.ty, self.dims);
        Error::new(ErrorKind::Dimensions, found, expected)
    }
}

/// The tensors of a model, by name and in the order of the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TensorDirectory {
    tensors: IndexMap<String, TensorInfo>,
}

impl TensorDirectory {
    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// The tensors in the order in which the file lists them (of a split model, part after part).
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.tensors.values()
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there are no tensors.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Adds a tensor; its name must be new.
    pub(crate) fn add(&mut self, tensor: TensorInfo) -> Result<(), Error> {
        match self.tensors.entry(tensor.name.clone()) {
            indexmap::map::Entry::Occupied(entry) => {
                let found = format!("a second tensor called {:?}", entry.key());
                Err(Error::new(ErrorKind::Duplicate, found, "each tensor once"))
            }
            indexmap::map::Entry::Vacant(entry) => {
                entry.insert(tensor);
                Ok(())
            }
        }
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut TensorInfo> {
        self.tensors.values_mut()
    }
}
