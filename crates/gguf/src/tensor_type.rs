//! Element types a GGUF tensor may have, and how many bytes a block of each takes.
//!
//! Ids, block lengths and block sizes are facts of the container format (`ggml_type` in ggml.h); what the
//! bytes of a block mean is the business of the `quant` crate.

use std::fmt;

/// Size of one block: `elements` values stored in `bytes` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Values in a block.
    pub elements: u64,
    /// Bytes of a block.
    pub bytes: u64,
}

macro_rules! tensor_types {
    ($($variant:ident = $id:literal, $name:literal, $elements:literal, $bytes:literal;)*) => {
        /// A tensor's element type, named as ggml names it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum TensorType {
            $(#[doc = concat!("ggml id ", $id, ": ", $bytes, " bytes for ", $elements, " values.")] $variant,)*
            /// An id this table does not know. Its size is unknown, so it can be listed but not read.
            Unknown(u32),
        }

        impl TensorType {
            /// Every type this table knows, in the order of their ids.
            pub const KNOWN: &[TensorType] = &[$(TensorType::$variant),*];

            /// The type with this ggml id.
            pub fn from_id(id: u32) -> TensorType {
                match id {
                    $($id => TensorType::$variant,)*
                    other => TensorType::Unknown(other),
                }
            }

            /// The ggml id, as stored in a file.
            pub fn id(self) -> u32 {
                match self {
                    $(TensorType::$variant => $id,)*
                    TensorType::Unknown(id) => id,
                }
            }

            /// Elements and bytes of one block, or `None` for an unknown type.
            pub fn block(self) -> Option<Block> {
                match self {
                    $(TensorType::$variant => Some(Block { elements: $elements, bytes: $bytes }),)*
                    TensorType::Unknown(_) => None,
                }
            }
        }

        impl fmt::Display for TensorType {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $(TensorType::$variant => f.write_str($name),)*
                    TensorType::Unknown(id) => write!(f, "type {id}"),
                }
            }
        }
    };
}

tensor_types! {
    F32 = 0, "F32", 1, 4;
    F16 = 1, "F16", 1, 2;
    Q4_0 = 2, "Q4_0", 32, 18;
    Q4_1 = 3, "Q4_1", 32, 20;
    Q5_0 = 6, "Q5_0", 32, 22;
    Q5_1 = 7, "Q5_1", 32, 24;
    Q8_0 = 8, "Q8_0", 32, 34;
    Q8_1 = 9, "Q8_1", 32, 36;
    Q2K = 10, "Q2_K", 256, 84;
    Q3K = 11, "Q3_K", 256, 110;
    Q4K = 12, "Q4_K", 256, 144;
    Q5K = 13, "Q5_K", 256, 176;
    Q6K = 14, "Q6_K", 256, 210;
    Q8K = 15, "Q8_K", 256, 292;
    Iq2Xxs = 16, "IQ2_XXS", 256, 66;
    Iq2Xs = 17, "IQ2_XS", 256, 74;
    Iq3Xxs = 18, "IQ3_XXS", 256, 98;
    Iq1S = 19, "IQ1_S", 256, 50;
    Iq4Nl = 20, "IQ4_NL", 32, 18;
    Iq3S = 21, "IQ3_S", 256, 110;
    Iq2S = 22, "IQ2_S", 256, 82;
    Iq4Xs = 23, "IQ4_XS", 256, 136;
    I8 = 24, "I8", 1, 1;
    I16 = 25, "I16", 1, 2;
    I32 = 26, "I32", 1, 4;
    I64 = 27, "I64", 1, 8;
    F64 = 28, "F64", 1, 8;
    Iq1M = 29, "IQ1_M", 256, 56;
    Bf16 = 30, "BF16", 1, 2;
    Tq1_0 = 34, "TQ1_0", 256, 54;
    Tq2_0 = 35, "TQ2_0", 256, 66;
    Mxfp4 = 39, "MXFP4", 32, 17;
}
