//! Rows of plain floats: read as f32, or multiplied with a vector in f32.

use crate::simd::{self, Level};

/// Element type of a dense weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DenseType {
    F32,
    F16,
    Bf16,
}

/// Values decoded at a time in a dot product: they stay in the first-level cache.
const CHUNK: usize = 1024;

/// Writes rows from `first_row` on as f32.
///
/// # Shapes
/// `bytes` holds rows of `n_cols` elements, aligned for their type; `out` `[n, n_cols]`.
pub fn unpack_rows(dtype: DenseType, bytes: &[u8], n_cols: usize, first_row: usize, out: &mut [f32]) {
    unpack(simd::level(), dtype, bytes, first_row * n_cols, out);
}

fn unpack(level: Level, dtype: DenseType, bytes: &[u8], at: usize, out: &mut [f32]) {
    let range = at..at + out.len();
    match dtype {
        DenseType::F32 => out.copy_from_slice(&bytemuck::cast_slice::<u8, f32>(bytes)[range]),
        DenseType::F16 => simd::decode_f16(level, &bytemuck::cast_slice::<u8, u16>(bytes)[range], out),
        DenseType::Bf16 => simd::decode_bf16(level, &bytemuck::cast_slice::<u8, u16>(bytes)[range], out),
    }
}

/// Writes `y[i] = Σ_k w[first_row + i, k]·x[k]`, accumulated in fp32.
///
/// # Shapes
/// `bytes` holds rows of `n_cols` elements, aligned for their type; `x` `[n_cols]`.
pub fn matvec_rows(dtype: DenseType, bytes: &[u8], n_cols: usize, first_row: usize, x: &[f32], y: &mut [f32]) {
    let level = simd::level();
    if dtype == DenseType::F32 {
        let values: &[f32] = bytemuck::cast_slice(bytes);
        for (row, y) in values[first_row * n_cols..].chunks_exact(n_cols).zip(y) {
            *y = simd::dot(level, row, x);
        }
        return;
    }
    if dtype == DenseType::F16 && level == Level::Avx512 {
        let values: &[u16] = bytemuck::cast_slice(bytes);
        for (row, y) in values[first_row * n_cols..].chunks_exact(n_cols).zip(y) {
            *y = simd::dot_f16(level, row, x).unwrap_or(f32::NAN);
        }
        return;
    }
    dot_rows(level, n_cols, first_row, x, y, |at, out| unpack(level, dtype, bytes, at, out));
}

/// Multiplies rows that `decode` writes a chunk at a time: `decode(index of the first value in the matrix, out)`.
pub(crate) fn dot_rows(
    level: Level,
    n_cols: usize,
    first_row: usize,
    x: &[f32],
    y: &mut [f32],
    decode: impl Fn(usize, &mut [f32]),
) {
    let mut buffer = [0.0f32; CHUNK];
    for (row_idx, y) in y.iter_mut().enumerate() {
        let row_start = (first_row + row_idx) * n_cols;
        let mut sum = 0.0;
        for (chunk_idx, x) in x.chunks(CHUNK).enumerate() {
            let values = &mut buffer[..x.len()];
            decode(row_start + chunk_idx * CHUNK, values);
            sum += simd::dot(level, values, x);
        }
        *y = sum;
    }
}
