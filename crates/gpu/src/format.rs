//! How rows of weights lie on the device: the file's blocks with their fields apart, so that threads read whole vectors.
//!
//! A row takes whole 16-byte vectors: first the codes of all its blocks, then their scales. No bit of a code or scale
//! changes, and the bytes are as many as in the file (but for filling up the last vector).

use gguf::TensorType;
use quant::blocks::{Iq2Xxs, Mxfp4, Q2K, Q8_0, view};

/// A type that kernels read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Format {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q2K,
    Q4K,
    Iq2Xxs,
    Mxfp4,
}

impl Format {
    pub(crate) const ALL: [Format; 8] =
        [Format::F32, Format::F16, Format::Bf16, Format::Q8_0, Format::Q2K, Format::Q4K, Format::Iq2Xxs, Format::Mxfp4];

    /// `None` for a type without kernels.
    pub(crate) fn of(ty: TensorType) -> Option<Format> {
        Format::ALL.into_iter().find(|format| format.tensor_type() == ty)
    }

    pub(crate) fn tensor_type(self) -> TensorType {
        match self {
            Format::F32 => TensorType::F32,
            Format::F16 => TensorType::F16,
            Format::Bf16 => TensorType::Bf16,
            Format::Q8_0 => TensorType::Q8_0,
            Format::Q2K => TensorType::Q2K,
            Format::Q4K => TensorType::Q4K,
            Format::Iq2Xxs => TensorType::Iq2Xxs,
            Format::Mxfp4 => TensorType::Mxfp4,
        }
    }

    /// What kernels call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Format::F32 => "f32",
            Format::F16 => "f16",
            Format::Bf16 => "bf16",
            Format::Q8_0 => "q8_0",
            Format::Q2K => "q2_k",
            Format::Q4K => "q4_k",
            Format::Iq2Xxs => "iq2_xxs",
            Format::Mxfp4 => "mxfp4",
        }
    }

    /// Whether products in `Fast` multiply its codes as integers, where rows are few.
    pub(crate) fn has_integers(self) -> bool {
        !matches!(self, Format::F32 | Format::F16 | Format::Bf16)
    }

    /// Elements that a row is a multiple of.
    pub(crate) fn block_elements(self) -> usize {
        self.tensor_type().block().expect("a known type").elements.max(32) as usize
    }

    /// Bytes of a row of `cols` elements in the file.
    pub(crate) fn file_row_bytes(self, cols: usize) -> usize {
        let block = self.tensor_type().block().expect("a known type");
        cols / block.elements as usize * block.bytes as usize
    }

    /// Bytes of such a row on the device.
    pub(crate) fn row_bytes(self, cols: usize) -> usize {
        self.file_row_bytes(cols).next_multiple_of(16)
    }

    /// One row as it lies in the file to one as it lies on the device.
    pub(crate) fn pack(self, row: &[u8], out: &mut [u8]) {
        match self {
            Format::F32 | Format::F16 | Format::Bf16 | Format::Q4K => out[..row.len()].copy_from_slice(row),
            Format::Q8_0 => {
                let blocks = view::<Q8_0>(row);
                let (codes, scales) = out.split_at_mut(blocks.len() * 32);
                for ((block, codes), scale) in
                    blocks.iter().zip(codes.as_chunks_mut::<32>().0).zip(scales.as_chunks_mut::<2>().0)
                {
                    *codes = bytemuck::cast(block.q);
                    *scale = block.d.0;
                }
            }
            Format::Iq2Xxs => {
                let blocks = view::<Iq2Xxs>(row);
                let (codes, scales) = out.split_at_mut(blocks.len() * 64);
                for ((block, codes), scale) in
                    blocks.iter().zip(codes.as_chunks_mut::<64>().0).zip(scales.as_chunks_mut::<2>().0)
                {
                    *codes = bytemuck::cast(block.groups);
                    *scale = block.d.0;
                }
            }
            Format::Q2K => {
                let blocks = view::<Q2K>(row);
                let (codes, rest) = out.split_at_mut(blocks.len() * 64);
                let (scales, both) = rest.split_at_mut(blocks.len() * 16);
                for (i, block) in blocks.iter().enumerate() {
                    codes[i * 64..][..64].copy_from_slice(&block.q);
                    scales[i * 16..][..16].copy_from_slice(&block.scales);
                    both[i * 4..][..2].copy_from_slice(&block.d.0);
                    both[i * 4 + 2..][..2].copy_from_slice(&block.dmin.0);
                }
            }
            Format::Mxfp4 => {
                let blocks = view::<Mxfp4>(row);
                let (codes, scales) = out.split_at_mut(blocks.len() * 16);
                for (i, block) in blocks.iter().enumerate() {
                    codes[i * 16..][..16].copy_from_slice(&block.q);
                    scales[i] = block.e;
                }
            }
        }
    }
}

/// The code book of IQ2_XXS as kernels read it: 256 points of eight magnitudes, a byte each.
pub(crate) fn code_book() -> Vec<u8> {
    (0..=255).flat_map(quant::blocks::iq2_point).collect()
}
