//! How rows of weights lie on the device: the file's blocks with their fields apart, so that threads read whole vectors.
//!
//! A row takes whole 16-byte vectors: first the codes of all its blocks, then their scales. No bit of a code or scale
//! changes, and the bytes are as many as in the file (but for filling up the last vector).

use gguf::TensorType;
use quant::blocks::{Iq2Xxs, Mxfp4, Q2K, Q8_0, view};
use wgpu::WriteOnly;

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
        self.write(row, WriteOnly::from_mut(&mut out[..row.len().next_multiple_of(16)]));
    }

    /// The same into memory that is only written to, from its first byte to its last in this order; a row's last vector is filled
    /// up.
    pub(crate) fn write(self, row: &[u8], out: WriteOnly<'_, [u8]>) {
        let mut rest = match self {
            Format::F32 | Format::F16 | Format::Bf16 | Format::Q4K => {
                let (mut same, rest) = out.split_at(row.len());
                same.copy_from_slice(row);
                rest
            }
            Format::Q8_0 => {
                let blocks = view::<Q8_0>(row);
                small(vectors(out, blocks, |block| bytemuck::cast::<_, [u8; 32]>(block.q)), blocks, |block| block.d.0)
            }
            Format::Iq2Xxs => {
                let blocks = view::<Iq2Xxs>(row);
                let rest = vectors(out, blocks, |block| bytemuck::cast::<_, [u8; 64]>(block.groups));
                small(rest, blocks, |block| block.d.0)
            }
            Format::Q2K => {
                let blocks = view::<Q2K>(row);
                let rest = vectors(vectors(out, blocks, |block| block.q), blocks, |block| block.scales);
                small(rest, blocks, |block| [block.d.0[0], block.d.0[1], block.dmin.0[0], block.dmin.0[1]])
            }
            Format::Mxfp4 => {
                let blocks = view::<Mxfp4>(row);
                small(vectors(out, blocks, |block| block.q), blocks, |block| [block.e])
            }
        };
        rest.fill(0);
    }
}

/// Writes a field of whole vectors of each block, side by side; gives what comes after them.
fn vectors<'o, B, const N: usize>(
    out: WriteOnly<'o, [u8]>,
    blocks: &[B],
    field: impl Fn(&B) -> [u8; N],
) -> WriteOnly<'o, [u8]> {
    let (to, rest) = out.split_at(blocks.len() * N);
    to.into_chunks::<N>().0.into_iter().zip(blocks).for_each(|(to, block)| to.write(field(block)));
    rest
}

/// The same of a small field: memory that is only written to takes whole vectors well and single bytes badly, so 64 bytes are
/// gathered first.
fn small<'o, B, const N: usize>(
    out: WriteOnly<'o, [u8]>,
    blocks: &[B],
    field: impl Fn(&B) -> [u8; N],
) -> WriteOnly<'o, [u8]> {
    let (mut to, rest) = out.split_at(blocks.len() * N);
    for (i, blocks) in blocks.chunks(64 / N).enumerate() {
        let mut line = [0; 64];
        line.as_chunks_mut::<N>().0.iter_mut().zip(blocks).for_each(|(to, block)| *to = field(block));
        to.slice(i * 64..i * 64 + blocks.len() * N).copy_from_slice(&line[..blocks.len() * N]);
    }
    rest
}

/// The code book of IQ2_XXS as kernels read it: 256 points of eight magnitudes, a byte each.
pub(crate) fn code_book() -> Vec<u8> {
    (0..=255).flat_map(quant::blocks::iq2_point).collect()
}
