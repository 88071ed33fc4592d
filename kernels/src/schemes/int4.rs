//! INT4: 4-bit codes with an fp16 scale a group along the input dimension, and a zero point a group unless symmetric.

use super::{Packed, Scheme, SchemeError, SchemeSpec, check_values};
use crate::dense::dot_rows;
use crate::simd::{self, NibbleRow};
use half::f16;
use rayon::prelude::*;

/// The zero point of the symmetric variant.
const SYMMETRIC_ZERO: u8 = 8;

/// The codes' own values.
const CODES: [f32; 16] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];

/// The scheme.
pub struct Int4;

impl Scheme for Int4 {
    fn name(&self) -> &'static str {
        "int4"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "4-bit codes, an fp16 scale and a 4-bit zero point a group of a row (no zero point with symmetric)"
    }

    fn normalize(&self, spec: &SchemeSpec) -> Result<SchemeSpec, SchemeError> {
        let group = spec.block_size.unwrap_or(128);
        if group < 8 || !group.is_multiple_of(8) {
            return Err(SchemeError::BlockSize { scheme: "int4", found: group, expected: "a multiple of 8" });
        }
        if spec.double_quant {
            return Err(SchemeError::Setting { scheme: "int4", setting: "double_quant" });
        }
        Ok(SchemeSpec { block_size: Some(group), ..spec.clone() })
    }

    fn pack(&self, spec: &SchemeSpec, values: &[f32], n_rows: usize, n_cols: usize) -> Result<Packed, SchemeError> {
        let spec = self.normalize(spec)?;
        check_values(values, n_rows, n_cols)?;
        let layout = Layout::new(&spec, n_cols);
        let mut codes = vec![0u8; n_rows * layout.row_bytes];
        let mut scales = vec![0.0f32; n_rows * layout.row_groups];
        let mut zeros = vec![0u8; n_rows * layout.row_groups];
        codes
            .par_chunks_mut(layout.row_bytes.max(1))
            .zip(scales.par_chunks_mut(layout.row_groups.max(1)))
            .zip(zeros.par_chunks_mut(layout.row_groups.max(1)))
            .zip(values.par_chunks(n_cols.max(1)))
            .for_each(|(((codes, scales), zeros), row)| {
                for (group_idx, group) in row.chunks(layout.group).enumerate() {
                    let (scale, zero) = group_scale(group, spec.symmetric);
                    (scales[group_idx], zeros[group_idx]) = (scale, zero);
                    for (i, value) in group.iter().enumerate() {
                        let at = group_idx * layout.group + i;
                        let code = (value / scale + f32::from(zero)).round_ties_even().clamp(0.0, 15.0) as u8;
                        codes[at / 2] |= if at.is_multiple_of(2) { code << 4 } else { code };
                    }
                }
            });
        Ok(Packed { spec, n_rows, n_cols, codes, scales, zeros, nested: None })
    }

    fn unpack_rows(&self, packed: &Packed, first_row: usize, out: &mut [f32]) {
        let level = simd::level();
        let layout = Layout::new(&packed.spec, packed.n_cols);
        for (row_idx, row) in out.chunks_exact_mut(packed.n_cols).enumerate() {
            decode(level, &layout, packed, (first_row + row_idx) * packed.n_cols, row);
        }
    }

    fn matvec_rows(&self, packed: &Packed, first_row: usize, x: &[f32], y: &mut [f32]) {
        let level = simd::level();
        let layout = Layout::new(&packed.spec, packed.n_cols);
        if !x.len().is_multiple_of(32) || !layout.group.is_multiple_of(32) || level != simd::Level::Avx512 {
            return dot_rows(level, packed.n_cols, first_row, x, y, |at, out| decode(level, &layout, packed, at, out));
        }
        for (row_idx, y) in (first_row..).zip(y) {
            let row = NibbleRow {
                codes: &packed.codes[row_idx * layout.row_bytes..],
                table: &CODES,
                scales: &packed.scales[row_idx * layout.row_groups..],
                zeros: &packed.zeros[row_idx * layout.row_groups..],
                block: layout.group,
            };
            *y = simd::dot_nibbles(level, row, x).unwrap_or(f32::NAN);
        }
    }

    fn stored_bytes(&self, packed: &Packed) -> u64 {
        let zeros = if packed.spec.symmetric { 0 } else { packed.zeros.len().div_ceil(2) };
        (packed.codes.len() + 2 * packed.scales.len() + zeros) as u64
    }
}

struct Layout {
    group: usize,
    row_bytes: usize,
    row_groups: usize,
}

impl Layout {
    fn new(spec: &SchemeSpec, n_cols: usize) -> Layout {
        let group = spec.block_size.unwrap_or(128);
        Layout { group, row_bytes: n_cols.div_ceil(2), row_groups: n_cols.div_ceil(group) }
    }
}

/// Returns a group's scale (a value of fp16) and zero point.
fn group_scale(group: &[f32], symmetric: bool) -> (f32, u8) {
    let round = |scale: f32| f16::from_f32(scale).max(f16::MIN_POSITIVE).to_f32();
    if symmetric {
        let absmax = group.iter().fold(0.0f32, |max, value| max.max(value.abs()));
        return (round(absmax.max(1e-5) / 7.0), SYMMETRIC_ZERO);
    }
    let (min, max) = group.iter().fold((f32::MAX, f32::MIN), |(min, max), value| (min.min(*value), max.max(*value)));
    let scale = round((max - min).max(1e-5) / 15.0);
    (scale, (-min / scale).round_ties_even().clamp(0.0, 15.0) as u8)
}

/// Decodes values from index `at` of the flattened matrix on; they lie in one row, and `at` has an even column.
fn decode(level: simd::Level, layout: &Layout, packed: &Packed, at: usize, out: &mut [f32]) {
    let (row, mut column) = (at / packed.n_cols, at % packed.n_cols);
    let mut rest = out;
    while !rest.is_empty() {
        let group_idx = column / layout.group;
        let n = rest.len().min((group_idx + 1) * layout.group - column);
        let (segment, after) = rest.split_at_mut(n);
        let stat = row * layout.row_groups + group_idx;
        let zero = f32::from(packed.zeros[stat]);
        let table: [f32; 16] = std::array::from_fn(|code| code as f32 - zero);
        let codes = &packed.codes[row * layout.row_bytes + column / 2..];
        simd::decode_nibbles(level, codes, &table, packed.scales[stat], segment);
        column += n;
        rest = after;
    }
}
