//! Weights in host memory.

use gguf::TensorType;
use model::tensors::{Routing, Tensors};
use model::{Error, Model, TensorRef};
use quant::simd::Level;
use store::{AlignedBytes, Extent, Loaded, Reader, Residency, Source};

use crate::Options;

/// A matrix of `rows` rows of `cols` elements, as a kernel takes it.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub(crate) ty: TensorType,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) bytes: &'a [u8],
}

impl<'a> Matrix<'a> {
    /// `count` consecutive rows from `first` on.
    pub(crate) fn part(self, first: usize, count: usize) -> Matrix<'a> {
        let row_bytes = self.bytes.len() / self.rows;
        Matrix { rows: count, bytes: &self.bytes[first * row_bytes..][..count * row_bytes], ..self }
    }
}

/// A weight that stays in memory. Vectors are f32 whatever the file has; matrices keep the file's type.
pub(crate) struct Weight {
    ty: TensorType,
    rows: usize,
    cols: usize,
    bytes: Bytes,
}

enum Bytes {
    /// As they are in the file.
    Loaded(Loaded),
    /// Made from them.
    Converted(AlignedBytes),
    /// Not in memory: rows are read when they are asked for.
    InFile(Extent, Source),
}

impl Weight {
    fn new(tensor: &TensorRef, bytes: Loaded, level: Level) -> Result<Weight, Error> {
        let &TensorRef { ty, rows, cols, .. } = tensor;
        if rows > 1 {
            return Ok(Weight { ty, rows, cols, bytes: Bytes::Loaded(bytes) });
        }
        let mut values = AlignedBytes::zeroed(cols * 4)?;
        let floats: &mut [f32] = bytemuck::cast_slice_mut(values.as_mut_slice());
        quant::dequantize_at(level, ty, &bytes, floats);
        if let Some(element) = floats.iter().position(|value| !value.is_finite()) {
            let (name, found) = (tensor.name.clone(), floats[element].to_string());
            return Err(Error::Value { name, found, element, expected: "a finite number".into() });
        }
        Ok(Weight { ty: TensorType::F32, rows, cols, bytes: Bytes::Converted(values) })
    }

    fn in_file(tensor: &TensorRef, source: &Source) -> Weight {
        let &TensorRef { ty, rows, cols, extent, .. } = tensor;
        Weight { ty, rows, cols, bytes: Bytes::InFile(extent, source.clone()) }
    }

    /// Bytes of memory.
    pub(crate) fn bytes(&self) -> usize {
        match self.bytes {
            Bytes::InFile(..) => 0,
            _ => self.memory().len(),
        }
    }

    /// Keeps it from being swapped out.
    pub(crate) fn lock(&self) -> Result<(), Error> {
        match &self.bytes {
            Bytes::Loaded(bytes) => bytes.lock()?,
            Bytes::Converted(bytes) => bytes.lock()?,
            Bytes::InFile(..) => {}
        }
        Ok(())
    }

    fn memory(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Loaded(bytes) => bytes,
            Bytes::Converted(bytes) => bytes,
            Bytes::InFile(..) => panic!("only single rows of this weight are ever in memory"),
        }
    }

    pub(crate) fn matrix(&self) -> Matrix<'_> {
        Matrix { ty: self.ty, rows: self.rows, cols: self.cols, bytes: self.memory() }
    }

    /// `count` consecutive rows from `first` as a matrix of their own.
    pub(crate) fn rows(&self, first: usize, count: usize) -> Matrix<'_> {
        self.matrix().part(first, count)
    }

    /// The values of a vector.
    pub(crate) fn values(&self) -> &[f32] {
        debug_assert_eq!((self.rows, self.ty), (1, TensorType::F32));
        bytemuck::cast_slice(self.memory())
    }

    /// One row, dequantised.
    pub(crate) fn row(&self, row: usize, level: Level, out: &mut [f32]) {
        quant::dequantize_at(level, self.ty, self.rows(row, 1).bytes, out);
    }

    /// The same of a weight that may be in the file.
    ///
    /// # Errors
    /// It is there and could not be read.
    pub(crate) fn fetch_row(&self, row: usize, level: Level, out: &mut [f32]) -> Result<(), Error> {
        let Bytes::InFile(extent, source) = &self.bytes else {
            self.row(row, level, out);
            return Ok(());
        };
        let mut bytes = vec![0; extent.bytes as usize / self.rows];
        source.read_exact_at(extent.file, extent.offset + (row * bytes.len()) as u64, &mut bytes)?;
        quant::dequantize_at(level, self.ty, &bytes, out);
        Ok(())
    }

    /// One row of whole numbers.
    pub(crate) fn int_row(&self, row: usize) -> impl Iterator<Item = i32> {
        ints(self.rows(row, 1).bytes)
    }
}

/// Whole numbers, which may lie anywhere in memory.
fn ints(bytes: &[u8]) -> impl Iterator<Item = i32> {
    bytes.as_chunks().0.iter().map(|&bytes| i32::from_le_bytes(bytes))
}

/// Reads every weight but the routed experts. `loaded` is told of bytes as they arrive. If experts are
/// streamed, rows of the token embedding stay in the file until a token asks for one.
pub(crate) fn load(
    model: &Model,
    source: &Source,
    reader: &dyn Reader,
    options: &Options,
    loaded: &mut dyn FnMut(u64),
) -> Result<Tensors<Weight>, Error> {
    let in_file = |tensor: &TensorRef| {
        options.residency != Residency::Resident && tensor.extent == model.tensors.embedding.extent
    };
    let mut extents = Vec::new();
    model.tensors.try_map(&mut |tensor: &TensorRef| {
        extents.extend((!in_file(tensor)).then_some(tensor.extent));
        Ok::<_, Error>(())
    })?;
    let mut read = store::read_all(reader, &extents, &options.cancel, loaded)?.into_iter();
    let weights = model.tensors.try_map(&mut |tensor: &TensorRef| match in_file(tensor) {
        true => Ok(Weight::in_file(tensor, source)),
        false => Weight::new(tensor, read.next().expect("as many as were asked for"), options.level),
    })?;
    for (layer, tensors) in weights.layers.iter().zip(&model.tensors.layers) {
        if let (Routing::Hash(table), Routing::Hash(tensor)) = (&layer.moe.routing, &tensors.moe.routing) {
            check_table(table, &tensor.name, model.config.experts)?;
        }
    }
    Ok(weights)
}

/// Every entry of a token-to-expert table must name an expert.
fn check_table(table: &Weight, name: &str, experts: usize) -> Result<(), Error> {
    let wrong = |&expert: &i32| usize::try_from(expert).map_or(true, |expert| expert >= experts);
    match ints(table.memory()).enumerate().find(|(_, expert)| wrong(expert)) {
        None => Ok(()),
        Some((element, found)) => Err(Error::Value {
            name: name.into(),
            found: found.to_string(),
            element,
            expected: format!("an expert number from 0 to {}", experts - 1),
        }),
    }
}
