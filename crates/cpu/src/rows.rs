//! Rows of a session, rounded and stored as their format says (`model::kv`, docs/formats.md).

use model::kv::RowFormat;
use quant::simd::Level;
use quant::small_float::{self, FP8_BLOCK, HADAMARD};

/// Rounds `row` and stores it in `out` (`format.row_bytes()` long). What [`unpack`] gives back is the value that the
/// computation goes on with, also inside the pass that made the row.
pub fn pack(level: Level, format: RowFormat, row: &[f32], out: &mut [u8]) {
    assert_eq!((row.len(), out.len()), (format.width(), format.row_bytes()));
    match format {
        RowFormat::F32 { .. } => out.copy_from_slice(bytemuck::cast_slice(row)),
        RowFormat::Fp8Bf16 { nope, .. } => {
            let (codes, rest) = out.split_at_mut(nope);
            let (scales, tail) = rest.split_at_mut(scale_bytes(nope));
            scales.fill(0);
            let blocks = row[..nope].as_chunks().0.iter().zip(codes.as_chunks_mut().0);
            for ((block, codes), scale) in blocks.zip(scales) {
                (*scale, *codes) = small_float::fp8_encode_at(level, block);
            }
            for (&value, code) in row[nope..].iter().zip(tail.as_chunks_mut().0) {
                *code = small_float::bf16_encode(value).to_le_bytes();
            }
        }
        RowFormat::HadamardFp4 { width } => {
            let mut rotated: [f32; HADAMARD] = row.try_into().expect("an indexer row has 128 values");
            small_float::hadamard_at(level, &mut rotated);
            let (codes, scales) = out.split_at_mut(width / 2);
            let blocks = rotated.as_chunks().0.iter().zip(codes.as_chunks_mut().0);
            for ((block, codes), scale) in blocks.zip(scales) {
                (*scale, *codes) = small_float::fp4_encode_at(level, block);
            }
        }
    }
}

/// The values of a stored row. An indexer row stays rotated: its queries are rotated too.
pub fn unpack(level: Level, format: RowFormat, bytes: &[u8], out: &mut [f32]) {
    assert_eq!((bytes.len(), out.len()), (format.row_bytes(), format.width()));
    match format {
        RowFormat::F32 { .. } => bytemuck::cast_slice_mut(out).copy_from_slice(bytes),
        RowFormat::Fp8Bf16 { nope, .. } => {
            let (codes, rest) = bytes.split_at(nope);
            let (scales, tail) = rest.split_at(scale_bytes(nope));
            let (values, rotated) = out.split_at_mut(nope);
            let blocks = codes.as_chunks().0.iter().zip(values.as_chunks_mut().0);
            for ((codes, values), &scale) in blocks.zip(scales) {
                small_float::fp8_decode_at(level, scale, codes, values);
            }
            for (&code, value) in tail.as_chunks().0.iter().zip(rotated) {
                *value = small_float::bf16_decode(u16::from_le_bytes(code));
            }
        }
        RowFormat::HadamardFp4 { width } => {
            let (codes, scales) = bytes.split_at(width / 2);
            let blocks = codes.as_chunks().0.iter().zip(out.as_chunks_mut().0);
            for ((codes, values), &scale) in blocks.zip(scales) {
                small_float::fp4_decode_at(level, scale, codes, values);
            }
        }
    }
}

/// Bytes of the scales of `nope` FP8 values: one each 64, padded.
fn scale_bytes(nope: usize) -> usize {
    (nope / FP8_BLOCK).next_multiple_of(8)
}
