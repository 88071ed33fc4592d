//! Products of LLM.int8() (Dettmers et al. 2022, section 3; bitsandbytes 0.50 `MatMul8bitLt`): rows of x are quantized to 8 bits
//! and multiplied with the codes in whole numbers, columns of x that hold an outlier in fp32 with decoded weights.

use super::Packed;
use crate::simd::{self, Level};
use half::f16;
use rayon::prelude::*;

/// Rows of x that share one pass over the weight: their codes stay in the second-level cache.
const TOKENS: usize = 16;

/// Codes summed in 32 bits: 2¹⁶·2⁷·2⁷ stays below 2³¹.
const EXACT: usize = 1 << 16;

/// Fewer multiply-adds than this are done on the calling thread: handing them out costs more.
const PARALLEL_MIN_MACS: usize = 1 << 16;

/// Writes `x · Wᵀ`.
///
/// # Shapes
/// `x` `[m, n_cols]`, `packed` `[n_rows, n_cols]`, `out` `[m, n_rows]`.
pub fn product(packed: &Packed, threshold: f32, x: &[f32], m: usize, out: &mut [f32]) {
    let (n_rows, n_cols) = (packed.n_rows, packed.n_cols);
    if m == 0 || n_rows == 0 || n_cols == 0 {
        return out.fill(0.0);
    }
    let product = Product { packed, x: Quantized::new(threshold, x, n_cols), level: simd::level() };
    let n_threads = rayon::current_num_threads();
    if m * n_rows * n_cols < PARALLEL_MIN_MACS {
        product.fill(0, 0, n_rows, out);
    } else if m < 2 * n_threads {
        let chunk = n_rows.div_ceil(n_threads * 4).max(16);
        for (token_idx, row) in out.chunks_exact_mut(n_rows).enumerate() {
            row.par_chunks_mut(chunk).enumerate().for_each(|(chunk_idx, part)| {
                product.fill(token_idx, chunk_idx * chunk, part.len(), part);
            });
        }
    } else {
        let tokens = m.div_ceil(n_threads).min(TOKENS);
        out.par_chunks_mut(tokens * n_rows).enumerate().for_each(|(chunk_idx, part)| {
            product.fill(chunk_idx * tokens, 0, n_rows, part);
        });
    }
}

/// Activations of one product.
struct Quantized {
    codes: Vec<i8>,   // [m, n_cols]; 0 in outlier columns
    scales: Vec<f32>, // [m]
    /// Columns where any row's magnitude reaches the threshold, ascending.
    columns: Vec<usize>,
    /// Those columns' values.
    outliers: Vec<f32>, // [m, columns]
}

impl Quantized {
    fn new(threshold: f32, x: &[f32], n_cols: usize) -> Quantized {
        // The reference quantizes activations that it first rounds to fp16, whatever their type. Beyond fp16's range they saturate.
        let round = |value: f32| f16::from_f32(value).clamp(f16::MIN, f16::MAX).to_f32();
        let is_outlier = |value: f32| threshold > 0.0 && round(value).abs() >= threshold;
        let mut marked = vec![false; n_cols];
        for row in x.chunks_exact(n_cols) {
            for (mark, value) in marked.iter_mut().zip(row) {
                *mark |= is_outlier(*value);
            }
        }
        let columns: Vec<usize> = (0..n_cols).filter(|column| marked[*column]).collect();
        let mut codes = vec![0i8; x.len()];
        let mut scales = Vec::with_capacity(x.len() / n_cols);
        let mut outliers = Vec::with_capacity(columns.len() * x.len() / n_cols);
        for (row, codes) in x.chunks_exact(n_cols).zip(codes.chunks_exact_mut(n_cols)) {
            // What is no outlier itself counts, also in an outlier column.
            let plain = row.iter().filter(|value| !is_outlier(**value));
            let absmax = plain.fold(0.0f32, |max, value| max.max(round(*value).abs()));
            // As torch divides a number by a tensor: the reciprocal first.
            let scale = if absmax == 0.0 { 0.0 } else { 127.0 * (1.0 / absmax) };
            for ((code, value), marked) in codes.iter_mut().zip(row).zip(&marked) {
                *code = if *marked { 0 } else { (round(*value) * scale).round_ties_even() as i8 };
            }
            scales.push(absmax);
            outliers.extend(columns.iter().map(|column| row[*column]));
        }
        Quantized { codes, scales, columns, outliers }
    }
}

struct Product<'a> {
    packed: &'a Packed,
    x: Quantized,
    level: Level,
}

impl Product<'_> {
    /// Writes products of `n_rows` weight rows from `first_row` on with as many rows of x, from `first_token` on, as `out` holds
    /// (`[tokens, n_rows]`).
    fn fill(&self, first_token: usize, first_row: usize, n_rows: usize, out: &mut [f32]) {
        let n_cols = self.packed.n_cols;
        let weight: &[i8] = bytemuck::cast_slice(&self.packed.codes);
        let n_outliers = self.x.columns.len();
        let mut decoded = vec![0.0f32; n_outliers];
        for row_idx in 0..n_rows {
            let row = first_row + row_idx;
            let codes = &weight[row * n_cols..(row + 1) * n_cols];
            let absmax = self.packed.scales[row];
            for (value, column) in decoded.iter_mut().zip(&self.x.columns) {
                *value = f32::from(codes[*column]) * absmax * (1.0 / 127.0);
            }
            for (token_idx, out) in out.chunks_exact_mut(n_rows).enumerate() {
                let token = first_token + token_idx;
                let x_codes = &self.x.codes[token * n_cols..(token + 1) * n_cols];
                let sum: i64 = codes
                    .chunks(EXACT)
                    .zip(x_codes.chunks(EXACT))
                    .map(|(a, b)| i64::from(simd::dot_i8_i8(self.level, a, b)))
                    .sum();
                let scale = self.x.scales[token] * absmax * (1.0 / (127.0 * 127.0));
                let x_outliers = &self.x.outliers[token * n_outliers..(token + 1) * n_outliers];
                out[row_idx] = sum as f32 * scale + simd::dot(self.level, x_outliers, &decoded);
            }
        }
    }
}
