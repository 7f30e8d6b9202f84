//! From f32 to blocks: own algorithms that minimise the weighted squared error, Σ importance · (x − x̂)².
//!
//! The importance of a column is the mean square of the activations it meets, which makes that sum the expected
//! squared error of the matrix product. Formats without a better idea round to nearest; the K formats
//! alternate least squares with a search over the integers (`affine.rs`); IQ2_XXS searches its code book whole
//! (`iq2_xxs.rs`).

mod affine;
mod iq2_xxs;

use crate::blocks::*;
use crate::simd::{Simd, kernel};
use crate::small_float::{e2m1_encode, scale_decode};
use bytemuck::Pod;
use gguf::TensorType;

/// Why [`quantize`] refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum QuantizeError {
    /// No quantiser for this type.
    #[error("no quantiser for {0}; choose F32, F16, BF16, Q8_0, Q2_K, Q4_K, IQ2_XXS or MXFP4")]
    Type(TensorType),
    /// The values are not whole blocks, or the destination or the importance has another size.
    #[error("{found} {what} where {expected} are expected")]
    Length {
        /// What was counted.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// How many there should be, in words.
        expected: String,
    },
    /// IQ2_XXS is too coarse to be made without importance.
    #[error("{0} needs the importance of every column; gather it by running the model on sample text")]
    NoImportance(TensorType),
    /// A value is NaN or more than the type can hold, or an importance is negative or not finite.
    #[error("{what} {index} is {value}, not within {low:e} to {high:e}")]
    Range {
        /// "value" or "importance".
        what: &'static str,
        /// Its index.
        index: usize,
        /// The value found.
        value: f32,
        /// The smallest allowed.
        low: f32,
        /// The largest allowed.
        high: f32,
    },
}

/// Refuses the first value outside `low..=high`.
fn check_range(what: &'static str, values: &[f32], low: f32, high: f32) -> Result<(), QuantizeError> {
    match values.iter().position(|value| !(low..=high).contains(value)) {
        Some(index) => Err(QuantizeError::Range { what, index, value: values[index], low, high }),
        None => Ok(()),
    }
}

/// The largest half: no value, and so no scale, may be larger where scales are halves.
const LARGEST_HALF: f32 = 65504.0;

/// Quantises `x` to whole blocks of `ty` in `out`.
///
/// `importance` has one weight per column: `x` is rows of `importance.len()` values. Without it all columns count
/// alike; IQ2_XXS requires it. A column of no importance counts 1e-5 of its block's mean. The
/// result depends on the arguments only, not on the machine.
pub fn quantize(ty: TensorType, x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) -> Result<(), QuantizeError> {
    use TensorType::*;
    if !matches!(ty, F32 | F16 | Bf16 | Q8_0 | Q2K | Q4K | Iq2Xxs | Mxfp4) {
        return Err(QuantizeError::Type(ty));
    }
    let block = ty.block().expect("these types have a block size");
    let elements = block.elements as usize;
    let whole_blocks = |what, found| match usize::is_multiple_of(found, elements) {
        true => Ok(()),
        false => Err(QuantizeError::Length { what, found, expected: format!("blocks of {elements}") }),
    };
    whole_blocks("values", x.len())?;
    let bytes = x.len() / elements * block.bytes as usize;
    if out.len() != bytes {
        return Err(QuantizeError::Length { what: "bytes", found: out.len(), expected: bytes.to_string() });
    }
    let limit = if matches!(ty, F32 | Bf16 | Mxfp4) { 3e38 } else { LARGEST_HALF };
    check_range("value", x, -limit, limit)?;
    if let Some(weights) = importance {
        whole_blocks("importance weights", weights.len())?;
        if weights.is_empty() || !x.len().is_multiple_of(weights.len()) {
            let expected = format!("as many as columns of {} values", x.len());
            return Err(QuantizeError::Length { what: "importance weights", found: weights.len(), expected });
        }
        check_range("importance", weights, 0.0, f32::MAX)?;
    } else if ty == Iq2Xxs {
        return Err(QuantizeError::NoImportance(ty));
    }
    quantize_blocks(ty, x, importance, out);
    Ok(())
}

kernel! {
    fn quantize_blocks, quantize_blocks_at(ty: TensorType, x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) = quantize_body
}

#[inline(always)]
fn quantize_body<S: Simd>(_simd: S, ty: TensorType, x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    match ty {
        TensorType::F32 => each_block(x, importance, out, |x: &[f32; 1], _| F32 { value: x[0].to_le_bytes() }),
        TensorType::F16 => each_block(x, importance, out, |x: &[f32; 1], _| F16 { value: Half::from_f32(x[0]) }),
        TensorType::Bf16 => each_block(x, importance, out, |x: &[f32; 1], _| Bf16 {
            value: crate::small_float::bf16_encode(x[0]).to_le_bytes(),
        }),
        TensorType::Q8_0 => each_block(x, importance, out, |x, _| q8_0(x)),
        TensorType::Mxfp4 => each_block(x, importance, out, mxfp4),
        TensorType::Q2K => each_block(x, importance, out, affine::q2_k),
        TensorType::Q4K => each_block(x, importance, out, affine::q4_k),
        TensorType::Iq2Xxs => each_block(x, importance, out, iq2_xxs::quantize),
        other => unreachable!("{other} was refused before"),
    }
}

/// Calls `quantizer` with the values and the weights of each block.
#[inline(always)]
fn each_block<const N: usize, B: Pod>(
    x: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
    quantizer: impl Fn(&[f32; N], &[f32; N]) -> B,
) {
    let out = bytemuck::cast_slice_mut::<u8, B>(out);
    for (i, (out, x)) in out.iter_mut().zip(x.as_chunks::<N>().0).enumerate() {
        let weights = importance.map_or([1.0; N], |weights| block_weights(weights, i));
        *out = quantizer(x, &weights);
    }
}

/// The weights of block `i`, with mean 1 and a floor far below it: a column that no activation has met still gets
/// the best code, not any.
#[inline(always)]
fn block_weights<const N: usize>(importance: &[f32], i: usize) -> [f32; N] {
    const FLOOR: f32 = 1e-5;
    let (blocks, _) = importance.as_chunks::<N>();
    let weights = &blocks[i % blocks.len()];
    let mean = weights.iter().map(|&w| f64::from(w)).sum::<f64>() / N as f64;
    if mean == 0.0 { [1.0; N] } else { weights.map(|w| (f64::from(w) / mean) as f32 + FLOOR) }
}

/// `value`, 0..=65504, as a half that is not 0 unless `value` is: a coarse scale beats none.
#[inline(always)]
fn scale_to_half(value: f32) -> Half {
    const SMALLEST: f32 = 1.0 / (1 << 24) as f32;
    if value == 0.0 { Half([0; 2]) } else { Half::from_f32(value.clamp(SMALLEST, LARGEST_HALF)) }
}

/// The largest magnitude.
#[inline(always)]
fn amax(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |a, x| x.abs().max(a))
}

/// `value` to the nearest integer, ties to even; |value| < 2²².
#[inline(always)]
fn round(value: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (value + SHIFT) - SHIFT
}

/// Σ over an array, as eight interleaved sums: an order of additions that vectorises.
#[inline(always)]
fn total<const N: usize>(terms: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0; 8];
    for i in 0..N / 8 {
        for (j, lane) in lanes.iter_mut().enumerate() {
            *lane += terms(8 * i + j);
        }
    }
    lanes.iter().sum()
}

/// Round to nearest under the scale that the largest magnitude asks for.
#[inline(always)]
fn q8_0(x: &[f32; 32]) -> Q8_0 {
    let d = scale_to_half(amax(x) / 127.0);
    let scale = d.to_f32();
    let q = x.map(|x| if scale == 0.0 { 0 } else { round((x / scale).clamp(-127.0, 127.0)) as i8 });
    Q8_0 { d, q }
}

/// Round to nearest under the best of three powers of two: the one that just holds the largest magnitude, one
/// below (which clips it) and one above.
#[inline(always)]
fn mxfp4(x: &[f32; 32], weights: &[f32; 32]) -> Mxfp4 {
    // E2M1 reaches 6 = 1.5 · 2²; the exponent bits of a normal float are its E8M0 code.
    let e = ((amax(x).to_bits() >> 23) as i32 - 2).clamp(1, 253) as u8;
    let encode = |e: u8| {
        let inverse = scale_decode(254 - e);
        let codes = x.map(|x| e2m1_encode(x * inverse));
        let scale = crate::decode::mxfp4_scale(e);
        let error = total::<32>(|i| {
            let difference = x[i] - scale * f32::from(doubled_e2m1(codes[i]));
            weights[i] * difference * difference
        });
        (error, e, codes)
    };
    let (_, e, codes) = [encode(e), encode(e - 1), encode(e + 1)]
        .into_iter()
        .reduce(|best, next| if next.0 < best.0 { next } else { best })
        .expect("three candidates");
    Mxfp4 { e, q: std::array::from_fn(|j| codes[j] | codes[j + 16] << 4) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Level;

    #[test]
    fn levels_agree() {
        let x: Vec<f32> = (0..4096).map(|i| (i as f32 * 0.37).sin() * (i as f32 * 0.011).cos()).collect();
        let importance: Vec<f32> = (0..512).map(|i| (i as f32 * 0.7).sin().exp()).collect();
        for ty in [TensorType::Q8_0, TensorType::Q2K, TensorType::Q4K, TensorType::Mxfp4, TensorType::Iq2Xxs] {
            let blocks = |level| {
                let mut out = vec![0; crate::row_bytes(ty, x.len())];
                quantize_blocks_at(level, ty, &x, Some(&importance), &mut out);
                out
            };
            for level in Level::available() {
                assert!(blocks(level) == blocks(Level::Scalar), "{ty} at {level:?}");
            }
        }
    }
}
