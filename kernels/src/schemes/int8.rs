//! INT8: symmetric, one absmax a row, as bitsandbytes 0.50 quantizes weights vectorwise (Dettmers et al. 2022,
//! "LLM.int8()"). With `outlier_threshold` its products are that paper's too: activations in 8 bits, outlier columns not.

use super::{Packed, Scheme, SchemeError, SchemeSpec, check_values, int8_product, refuse_all_but};
use crate::dense::dot_rows;
use crate::simd;
use rayon::prelude::*;

/// The scheme.
pub struct Int8;

impl Scheme for Int8 {
    fn name(&self) -> &'static str {
        "int8"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "8-bit signed codes, an fp32 absmax an output row"
    }

    fn normalize(&self, spec: &SchemeSpec) -> Result<SchemeSpec, SchemeError> {
        if let Some(found) = spec.block_size {
            return Err(SchemeError::BlockSize { scheme: "int8", found, expected: "none, it has one scale a row" });
        }
        refuse_all_but(&["outlier_threshold"], "int8", spec)?;
        match spec.outlier_threshold {
            Some(found) if !found.is_finite() || found < 0.0 => Err(SchemeError::Threshold { found }),
            _ => Ok(spec.clone()),
        }
    }

    fn pack(&self, spec: &SchemeSpec, values: &[f32], n_rows: usize, n_cols: usize) -> Result<Packed, SchemeError> {
        let spec = self.normalize(spec)?;
        check_values(values, n_rows, n_cols)?;
        let mut codes = vec![0u8; values.len()];
        let width = n_cols.max(1);
        let scales = codes
            .par_chunks_mut(width)
            .zip(values.par_chunks(width))
            .map(|(codes, row)| {
                let absmax = row.iter().fold(0.0f32, |max, value| max.max(value.abs()));
                for (code, value) in codes.iter_mut().zip(row) {
                    let quantized = if absmax == 0.0 { 0.0 } else { (127.0 * value / absmax).round_ties_even() };
                    *code = (quantized as i8) as u8;
                }
                absmax
            })
            .collect();
        Ok(Packed { spec, n_rows, n_cols, codes, scales, zeros: Vec::new(), nested: None })
    }

    fn unpack_rows(&self, packed: &Packed, first_row: usize, out: &mut [f32]) {
        let level = simd::level();
        for (row_idx, row) in out.chunks_exact_mut(packed.n_cols).enumerate() {
            decode(level, packed, (first_row + row_idx) * packed.n_cols, row);
        }
    }

    fn matvec_rows(&self, packed: &Packed, first_row: usize, x: &[f32], y: &mut [f32]) {
        let level = simd::level();
        let n_cols = packed.n_cols;
        if level != simd::Level::Avx512 {
            return dot_rows(level, n_cols, first_row, x, y, |at, out| decode(level, packed, at, out));
        }
        let codes: &[i8] = bytemuck::cast_slice(&packed.codes);
        for (row_idx, y) in (first_row..).zip(y) {
            let sum = simd::dot_i8(level, &codes[row_idx * n_cols..(row_idx + 1) * n_cols], x).unwrap_or(f32::NAN);
            *y = sum * packed.scales[row_idx] * (1.0 / 127.0);
        }
    }

    fn has_own_product(&self, packed: &Packed) -> bool {
        packed.spec.outlier_threshold.is_some()
    }

    fn product(&self, packed: &Packed, x: &[f32], m: usize, out: &mut [f32]) -> bool {
        let Some(threshold) = packed.spec.outlier_threshold else { return false };
        int8_product::product(packed, threshold, x, m, out);
        true
    }

    fn stored_bytes(&self, packed: &Packed) -> u64 {
        (packed.codes.len() + 4 * packed.scales.len()) as u64
    }
}

/// Decodes values from index `at` of the flattened matrix on; they lie in one row.
fn decode(level: simd::Level, packed: &Packed, at: usize, out: &mut [f32]) {
    let codes: &[i8] = bytemuck::cast_slice(&packed.codes[at..at + out.len()]);
    simd::decode_i8(level, codes, packed.scales[at / packed.n_cols], 1.0 / 127.0, out);
}
