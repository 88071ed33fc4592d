//! The element types of GGUF tensors: size and decoder of each (ggml's `ggml_type`; block layouts as in `ggml-common.h`).

use super::{blocks, k_blocks};
use crate::units::DType;

/// Decodes whole blocks into as many values as they hold.
type Decode = fn(&[u8], &mut [f32]);

/// One element type.
#[derive(Debug, Clone, Copy)]
pub struct GgmlType {
    /// The number that files name it by.
    pub id: u32,
    /// `Q4_K`.
    pub name: &'static str,
    /// Values in one block, 1 for plain numbers.
    pub block_len: usize,
    /// Bytes that one block takes.
    pub block_bytes: usize,
    /// The plain float that it is, if it is one.
    pub dtype: Option<DType>,
    /// None where labpipe can't read its values.
    pub(super) decode: Option<Decode>,
}

const fn plain(id: u32, name: &'static str, dtype: DType, n_bytes: usize) -> GgmlType {
    GgmlType { id, name, block_len: 1, block_bytes: n_bytes, dtype: Some(dtype), decode: None }
}

const fn block(id: u32, name: &'static str, block_len: usize, block_bytes: usize, decode: Decode) -> GgmlType {
    GgmlType { id, name, block_len, block_bytes, dtype: None, decode: Some(decode) }
}

/// A type whose size is known and whose values are not read here.
const fn unread(id: u32, name: &'static str, block_len: usize, block_bytes: usize) -> GgmlType {
    GgmlType { id, name, block_len, block_bytes, dtype: None, decode: None }
}

/// Every type that a file may hold.
pub static GGML_TYPES: &[GgmlType] = &[
    plain(0, "F32", DType::F32, 4),
    plain(1, "F16", DType::F16, 2),
    block(2, "Q4_0", 32, 18, blocks::q4_0),
    block(3, "Q4_1", 32, 20, blocks::q4_1),
    block(6, "Q5_0", 32, 22, blocks::q5_0),
    block(7, "Q5_1", 32, 24, blocks::q5_1),
    block(8, "Q8_0", 32, 34, blocks::q8_0),
    unread(10, "Q2_K", 256, 84),
    unread(11, "Q3_K", 256, 110),
    block(12, "Q4_K", 256, 144, k_blocks::q4_k),
    block(13, "Q5_K", 256, 176, k_blocks::q5_k),
    block(14, "Q6_K", 256, 210, k_blocks::q6_k),
    unread(16, "IQ2_XXS", 256, 66),
    unread(17, "IQ2_XS", 256, 74),
    unread(18, "IQ3_XXS", 256, 98),
    unread(19, "IQ1_S", 256, 50),
    block(20, "IQ4_NL", 32, 18, blocks::iq4_nl),
    unread(21, "IQ3_S", 256, 110),
    unread(22, "IQ2_S", 256, 82),
    unread(23, "IQ4_XS", 256, 136),
    unread(24, "I8", 1, 1),
    unread(25, "I16", 1, 2),
    unread(26, "I32", 1, 4),
    unread(27, "I64", 1, 8),
    unread(28, "F64", 1, 8),
    unread(29, "IQ1_M", 256, 56),
    plain(30, "BF16", DType::Bf16, 2),
    unread(34, "TQ1_0", 256, 54),
    unread(35, "TQ2_0", 256, 66),
    unread(39, "MXFP4", 32, 17),
    unread(40, "NVFP4", 64, 36),
];

impl GgmlType {
    /// Returns the type of that number.
    pub fn of(id: u32) -> Option<&'static GgmlType> {
        GGML_TYPES.iter().find(|ty| ty.id == id)
    }

    /// Returns true where labpipe can read values of this type.
    pub fn is_readable(&self) -> bool {
        self.dtype.is_some() || self.decode.is_some()
    }

    /// Returns the names of the types that can be read, for error messages.
    pub fn readable_names() -> String {
        GGML_TYPES.iter().filter(|ty| ty.is_readable()).map(|ty| ty.name).collect::<Vec<_>>().join(", ")
    }

    /// Returns the bytes that `n_values` take; nothing where they are no whole number of blocks or too many.
    pub fn n_bytes(&self, n_values: usize) -> Option<usize> {
        if !n_values.is_multiple_of(self.block_len) {
            return None;
        }
        (n_values / self.block_len).checked_mul(self.block_bytes)
    }
}
