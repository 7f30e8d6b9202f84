//! Weights in host memory.

use gguf::TensorType;
use model::tensors::{Routing, Tensors};
use model::{Error, Model, TensorRef};
use quant::simd::Level;
use store::{AlignedBytes, Source};

/// A matrix of `rows` rows of `cols` elements, as a kernel takes it.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub(crate) ty: TensorType,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) bytes: &'a [u8],
}

/// A weight that stays in memory. Vectors are f32 whatever the file has; matrices keep the file's type.
pub(crate) struct Weight {
    ty: TensorType,
    rows: usize,
    cols: usize,
    bytes: AlignedBytes,
}

impl Weight {
    fn load(tensor: &TensorRef, source: &Source, level: Level) -> Result<Weight, Error> {
        let bytes = source.read(tensor.extent)?;
        let &TensorRef { ty, rows, cols, .. } = tensor;
        if rows > 1 {
            return Ok(Weight { ty, rows, cols, bytes });
        }
        let mut values = AlignedBytes::zeroed(cols * 4)?;
        let floats: &mut [f32] = bytemuck::cast_slice_mut(values.as_mut_slice());
        quant::dequantize_at(level, ty, &bytes, floats);
        if let Some(element) = floats.iter().position(|value| !value.is_finite()) {
            let (name, found) = (tensor.name.clone(), floats[element].to_string());
            return Err(Error::Value { name, found, element, expected: "a finite number".into() });
        }
        Ok(Weight { ty: TensorType::F32, rows, cols, bytes: values })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn matrix(&self) -> Matrix<'_> {
        Matrix { ty: self.ty, rows: self.rows, cols: self.cols, bytes: &self.bytes }
    }

    /// `count` consecutive rows from `first` as a matrix of their own.
    pub(crate) fn rows(&self, first: usize, count: usize) -> Matrix<'_> {
        let row_bytes = self.bytes.len() / self.rows;
        Matrix { rows: count, bytes: &self.bytes[first * row_bytes..][..count * row_bytes], ..self.matrix() }
    }

    /// The values of a vector.
    pub(crate) fn values(&self) -> &[f32] {
        debug_assert_eq!((self.rows, self.ty), (1, TensorType::F32));
        bytemuck::cast_slice(&self.bytes)
    }

    /// One row, dequantised.
    pub(crate) fn row(&self, row: usize, level: Level, out: &mut [f32]) {
        quant::dequantize_at(level, self.ty, self.rows(row, 1).bytes, out);
    }

    /// One row of whole numbers.
    pub(crate) fn int_row(&self, row: usize) -> &[i32] {
        bytemuck::cast_slice(self.rows(row, 1).bytes)
    }
}

/// Reads every weight but the routed experts. `loaded` is told the bytes of each tensor as it arrives.
pub(crate) fn load(
    model: &Model,
    source: &Source,
    level: Level,
    loaded: &mut dyn FnMut(u64),
) -> Result<Tensors<Weight>, Error> {
    let weights = model.tensors.try_map(&mut |tensor: &TensorRef| {
        let weight = Weight::load(tensor, source, level)?;
        loaded(tensor.extent.bytes);
        Ok::<_, Error>(weight)
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
    let entries: &[i32] = bytemuck::cast_slice(&table.bytes);
    match entries.iter().position(|&expert| usize::try_from(expert).map_or(true, |expert| expert >= experts)) {
        None => Ok(()),
        Some(element) => Err(Error::Value {
            name: name.into(),
            found: entries[element].to_string(),
            element,
            expected: format!("an expert number from 0 to {}", experts - 1),
        }),
    }
}
