//! From blocks to f32, bit for bit as ggml and PyPI `gguf` do it: plain products and differences in a stated
//! order, no fused operations.

use crate::blocks::*;
use crate::simd::{Simd, kernel};
use bytemuck::Pod;
use gguf::TensorType;

/// A weight format: a block of bytes that stands for `ELEMENTS` values.
pub(crate) trait Format: Pod {
    /// Values in a block.
    const ELEMENTS: usize;
    /// Writes the block's values to `out`, which holds `ELEMENTS`.
    fn decode<S: Simd>(&self, simd: S, out: &mut [f32]);

    /// Writes the values of consecutive blocks to `out`.
    #[inline(always)]
    fn decode_all<S: Simd>(simd: S, blocks: &[Self], out: &mut [f32]) {
        for (block, out) in blocks.iter().zip(out.chunks_exact_mut(Self::ELEMENTS)) {
            block.decode(simd, out);
        }
    }
}

/// The types that [`dequantize`] and the dots know: floats, then what is quantised.
pub const TYPES: [TensorType; 11] = {
    use TensorType::*;
    [F32, F16, Bf16, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K, Iq2Xxs, Mxfp4]
};

/// Whether this is one of [`TYPES`].
pub fn is_supported(ty: TensorType) -> bool {
    TYPES.contains(&ty)
}

/// Bytes of a row of `cols` values. Panics if the type is not [supported](is_supported) or `cols` is not a whole
/// number of blocks.
pub fn row_bytes(ty: TensorType, cols: usize) -> usize {
    assert!(is_supported(ty), "{ty} is not a type this crate computes with");
    let block = ty.block().expect("supported types have a block size");
    let elements = block.elements as usize;
    assert!(cols.is_multiple_of(elements), "a {ty} row has blocks of {elements} values, found {cols} values");
    cols / elements * block.bytes as usize
}

kernel! {
    /// The values of whole blocks. Bit-equal to PyPI `gguf`'s `dequantize`.
    ///
    /// Panics if `src` is not exactly the bytes of `dst.len()` values of `ty`, or `ty` is not
    /// [supported](is_supported).
    pub fn dequantize, dequantize_at(ty: TensorType, src: &[u8], dst: &mut [f32]) = dequantize_body
}

/// Calls `$body::<Block>($args)` with the block type of `$ty`, which must be supported.
macro_rules! for_format {
    ($ty:expr, $body:ident($($arg:expr),*)) => {
        match $ty {
            TensorType::F32 => $body::<_, crate::blocks::F32>($($arg),*),
            TensorType::F16 => $body::<_, crate::blocks::F16>($($arg),*),
            TensorType::Bf16 => $body::<_, crate::blocks::Bf16>($($arg),*),
            TensorType::Q8_0 => $body::<_, crate::blocks::Q8_0>($($arg),*),
            TensorType::Q2K => $body::<_, crate::blocks::Q2K>($($arg),*),
            TensorType::Q3K => $body::<_, crate::blocks::Q3K>($($arg),*),
            TensorType::Q4K => $body::<_, crate::blocks::Q4K>($($arg),*),
            TensorType::Q5K => $body::<_, crate::blocks::Q5K>($($arg),*),
            TensorType::Q6K => $body::<_, crate::blocks::Q6K>($($arg),*),
            TensorType::Iq2Xxs => $body::<_, crate::blocks::Iq2Xxs>($($arg),*),
            TensorType::Mxfp4 => $body::<_, crate::blocks::Mxfp4>($($arg),*),
            other => panic!("{other} is not a type this crate computes with"),
        }
    };
}
pub(crate) use for_format;

#[inline(always)]
fn dequantize_body<S: Simd>(simd: S, ty: TensorType, src: &[u8], dst: &mut [f32]) {
    let expected = row_bytes(ty, dst.len());
    assert!(src.len() == expected, "{} values of {ty} take {expected} bytes, found {}", dst.len(), src.len());
    for_format!(ty, decode_row(simd, src, dst))
}

#[inline(always)]
fn decode_row<S: Simd, F: Format>(simd: S, src: &[u8], dst: &mut [f32]) {
    F::decode_all(simd, bytemuck::cast_slice(src), dst);
}

impl Format for F32 {
    const ELEMENTS: usize = Self::ELEMENTS;
    #[inline(always)]
    fn decode<S: Simd>(&self, _simd: S, out: &mut [f32]) {
        out[0] = f32::from_le_bytes(self.value);
    }
}

impl Format for F16 {
    const ELEMENTS: usize = Self::ELEMENTS;
    #[inline(always)]
    fn decode<S: Simd>(&self, _simd: S, out: &mut [f32]) {
        out[0] = self.value.to_f32();
    }

    #[inline(always)]
    fn decode_all<S: Simd>(simd: S, blocks: &[F16], out: &mut [f32]) {
        let (sixteens, rest) = bytemuck::cast_slice::<F16, Half>(blocks).as_chunks();
        let (out, out_rest) = out[..blocks.len()].as_chunks_mut();
        for (halves, out) in sixteens.iter().zip(out) {
            simd.store(simd.load_half(halves), out);
        }
        for (half, out) in rest.iter().zip(out_rest) {
            *out = half.to_f32();
        }
    }
}

impl Format for Bf16 {
    const ELEMENTS: usize = Self::ELEMENTS;
    #[inline(always)]
    fn decode<S: Simd>(&self, _simd: S, out: &mut [f32]) {
        out[0] = f32::from_bits(u32::from(u16::from_le_bytes(self.value)) << 16);
    }
}

impl Format for Q8_0 {
    const ELEMENTS: usize = Self::ELEMENTS;
    #[inline(always)]
    fn decode<S: Simd>(&self, simd: S, out: &mut [f32]) {
        scaled(simd, &self.q, [self.d.to_f32(); 2], out);
    }
}

impl Format for Q2K {
    const ELEMENTS: usize = Self::ELEMENTS;
    #[inline(always)]
    fn decode<S: Simd>(&self, simd: S, out: &mut [f32]) {
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        let scales = self.scales.map(|s| d * f32::from(s & 15));
        let minimums = self.scales.map(|s| dmin * f32::from(s >> 4));
        scaled_less(simd, &self.codes(), scales, minimums, out);
    }
}

impl Format for Q3K {
    const ELEMENTS: usize = Self::ELEMENTS;
    #[inline(always)]
    fn decode<S: Simd>(&self, simd: S, out: &mut [f32]) {
        let d = self.d.to_f32();
        scaled(simd, &self.codes(), q3_scales(&self.scales).map(|scale| d * f32::from(scale)), out);
    }
}

impl Format for Q4K {
    const ELEMENTS: usize = Self::ELEMENTS;
    #[inline(always)]
    fn decode<S: Simd>(&self, simd: S, out: &mut [f32]) {
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        let (scales, minimums) = scales_and_minimums(&self.scales);
        let scales = scales.map(|scale| d * f32::from(scale));
        let minimums = minimums.map(|minimum| dmin * f32::from(minimum));
        scaled_less(simd, &self.codes(), scales, minimums, out);
    }
}

impl Format for Q5K {
    const ELEMENTS: usize = Self::ELEMENTS;
    #[inline(always)]
    fn decode<S: Simd>(&self, simd: S, out: &mut [f32]) {
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        let (scales, minimums) = scales_and_minimums(&self.scales);
        let scales = scales.map(|scale| d * f32::from(scale));
        let minimums = minimums.map(|minimum| dmin * f32::from(minimum));
        scaled_less(simd, &self.codes(), scales, minimums, out);
    }
}

impl Format for Q6K {
    const ELEMENTS: usize = Self::ELEMENTS;
    #[inline(always)]
    fn decode<S: Simd>(&self, simd: S, out: &mut [f32]) {
        let d = self.d.to_f32();
        scaled(simd, &self.codes(), self.scales.map(|scale| d * f32::from(scale)), out);
    }
}

impl Format for Iq2Xxs {
    const ELEMENTS: usize = Self::ELEMENTS;
    #[inline(always)]
    fn decode<S: Simd>(&self, simd: S, out: &mut [f32]) {
        let d = self.d.to_f32();
        let scales = self.groups.map(|group| d * (0.5 + f32::from(group[7] >> 4)) * 0.25);
        scaled(simd, &simd.iq2_codes(self), scales, out);
    }
}

impl Format for Mxfp4 {
    const ELEMENTS: usize = Self::ELEMENTS;
    #[inline(always)]
    fn decode<S: Simd>(&self, simd: S, out: &mut [f32]) {
        scaled(simd, &self.codes(), [mxfp4_scale(self.e); 2], out);
    }
}

/// 2^(e − 128): the scale of doubled E2M1 values.
#[inline(always)]
pub(crate) fn mxfp4_scale(e: u8) -> f32 {
    // Below e = 2 the result is subnormal: 2^-128 has bit 21 set, 2^-127 bit 22.
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (u32::from(e) - 1) << 23 })
}

/// `out = scale · code`, each scale for an equal share of the codes.
#[inline(always)]
fn scaled<S: Simd, const N: usize, const SCALES: usize>(
    simd: S,
    codes: &[i8; N],
    scales: [f32; SCALES],
    out: &mut [f32],
) {
    let (out, codes) = (out.as_chunks_mut::<16>().0, codes.as_chunks::<16>().0);
    for (i, (out, codes)) in out.iter_mut().zip(codes).enumerate() {
        let scale = simd.splat(scales[i * 16 * SCALES / N]);
        simd.store(simd.mul(scale, simd.load_i8(codes)), out);
    }
}

/// `out = scale · code − minimum`, each scale and minimum for an equal share of the codes.
#[inline(always)]
fn scaled_less<S: Simd, const SCALES: usize>(
    simd: S,
    codes: &[i8; QK_K],
    scales: [f32; SCALES],
    minimums: [f32; SCALES],
    out: &mut [f32],
) {
    let (out, codes) = (out.as_chunks_mut::<16>().0, codes.as_chunks::<16>().0);
    for (i, (out, codes)) in out.iter_mut().zip(codes).enumerate() {
        let (scale, minimum) = (scales[i * 16 * SCALES / QK_K], minimums[i * 16 * SCALES / QK_K]);
        let product = simd.mul(simd.splat(scale), simd.load_i8(codes));
        simd.store(simd.sub(product, simd.splat(minimum)), out);
    }
}
