//! How a stored weight becomes a number, one implementation a scheme.

use cubecl::prelude::*;

/// The buffers of a stored matrix, as kernels see them.
#[derive(CubeType, CubeLaunch)]
pub struct Stored {
    /// Packed codes, or the elements of a plain matrix, little-endian in u32 words.
    pub codes: Box<[u32]>,
    /// fp32 statistics: absmax a block (NF4, FP4), a nested absmax (double quantization), absmax a row (INT8).
    pub scales: Box<[f32]>,
    /// Second words: nested 8-bit codes four a word, or an fp16 scale and its zero point a group (INT4).
    pub aux: Box<[u32]>,
    /// Tables: 16 code values, then the 256 values of the dynamic map and an offset a segment.
    pub tables: Box<[f32]>,
    /// Number of input features.
    pub n_cols: u32,
    /// First row of the second and third of up to three matrices that are stored as one.
    pub segment_1: u32,
    pub segment_2: u32,
}

/// What a scheme's launch decides when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Format {
    /// Values that share a scale; the row's length where there is one scale a row.
    pub block_size: u32,
    /// Block scales are quantized a second time.
    pub nested: bool,
}

/// Decodes single values of a stored matrix.
#[cube]
pub trait Decode: Send + Sync + 'static {
    /// Returns the weight at (row, col).
    fn value(stored: &Stored, row: u32, col: u32, #[comptime] format: Format) -> f32;
}

/// Position of the values of `tables` that belong to the dynamic map, and of the offsets behind it.
pub const MAP: u32 = 16;
pub const OFFSETS: u32 = MAP + 256;

/// f16 as its bits, in the low half of a word. Exact for all finite values: the exponent is moved by a multiplication.
#[cube]
pub fn f16_bits_to_f32(bits: u32) -> f32 {
    let magnitude = f32::reinterpret((bits & 0x7fffu32) << 13u32) * f32::reinterpret(0x7780_0000u32);
    f32::reinterpret(u32::reinterpret(magnitude) | ((bits & 0x8000u32) << 16u32))
}

#[cube]
fn segment(stored: &Stored, row: u32) -> u32 {
    u32::cast_from(row >= stored.segment_1) + u32::cast_from(row >= stored.segment_2)
}

/// Returns the scale of the block that holds the flattened value `at`.
#[cube]
pub fn block_scale(stored: &Stored, row: u32, at: u32, #[comptime] format: Format) -> f32 {
    let block = at / format.block_size;
    if comptime!(format.nested) {
        let word = stored.aux[(block / 4u32) as usize];
        let code = (word >> ((block % 4u32) * 8u32)) & 0xffu32;
        // Rounded before the offset is added, as the host does; CUDA may fuse the two (2 ulp).
        let scaled = stored.tables[(MAP + code) as usize] * stored.scales[(block / 256u32) as usize];
        scaled + stored.tables[(OFFSETS + segment(stored, row)) as usize]
    } else {
        stored.scales[block as usize]
    }
}

/// 4-bit codes into a table, an absmax a block of the flattened matrix, the even index in the high nibble: NF4, FP4.
pub struct Codebook4;

#[cube]
impl Decode for Codebook4 {
    fn value(stored: &Stored, row: u32, col: u32, #[comptime] format: Format) -> f32 {
        let at = row * stored.n_cols + col;
        let word = stored.codes[(at / 8u32) as usize];
        // Byte i of the word holds values 2i (high nibble) and 2i + 1.
        let within = at % 8u32;
        let code = (word >> ((within ^ 1u32) * 4u32)) & 15u32;
        stored.tables[code as usize] * block_scale(stored, row, at, format)
    }
}

/// 4-bit codes with an fp16 scale and a zero point a group of a row.
pub struct Affine4;

#[cube]
impl Decode for Affine4 {
    fn value(stored: &Stored, row: u32, col: u32, #[comptime] format: Format) -> f32 {
        let row_bytes = stored.n_cols.div_ceil(2u32);
        let byte_at = row * row_bytes + col / 2u32;
        let word = stored.codes[(byte_at / 4u32) as usize];
        let shift = (byte_at % 4u32) * 8u32 + (1u32 - col % 2u32) * 4u32;
        let code = (word >> shift) & 15u32;
        let groups = stored.n_cols.div_ceil(format.block_size);
        let stat = stored.aux[(row * groups + col / format.block_size) as usize];
        (f32::cast_from(code) - f32::cast_from(stat >> 16u32)) * f16_bits_to_f32(stat)
    }
}

/// Signed bytes, an absmax a row.
pub struct Int8;

#[cube]
impl Decode for Int8 {
    fn value(stored: &Stored, row: u32, col: u32, #[comptime] _format: Format) -> f32 {
        let at = row * stored.n_cols + col;
        let word = stored.codes[(at / 4u32) as usize];
        let byte = (word >> ((at % 4u32) * 8u32)) & 0xffu32;
        let code = f32::cast_from(byte) - select(byte >= 128u32, 256.0f32, 0.0f32);
        code * stored.scales[row as usize] * (1.0f32 / 127.0f32)
    }
}

/// Plain fp32.
pub struct DenseF32;

#[cube]
impl Decode for DenseF32 {
    fn value(stored: &Stored, row: u32, col: u32, #[comptime] _format: Format) -> f32 {
        f32::reinterpret(stored.codes[(row * stored.n_cols + col) as usize])
    }
}

/// Plain fp16, two a word.
pub struct DenseF16;

#[cube]
impl Decode for DenseF16 {
    fn value(stored: &Stored, row: u32, col: u32, #[comptime] _format: Format) -> f32 {
        let at = row * stored.n_cols + col;
        f16_bits_to_f32((stored.codes[(at / 2u32) as usize] >> ((at % 2u32) * 16u32)) & 0xffffu32)
    }
}

/// Plain bf16, two a word.
pub struct DenseBf16;

#[cube]
impl Decode for DenseBf16 {
    fn value(stored: &Stored, row: u32, col: u32, #[comptime] _format: Format) -> f32 {
        let at = row * stored.n_cols + col;
        f32::reinterpret(((stored.codes[(at / 2u32) as usize] >> ((at % 2u32) * 16u32)) & 0xffffu32) << 16u32)
    }
}
