//! 4-bit codes in groups along the input dimension: groups never cross rows, rows begin on a byte, the last group of a row may
//! be short. What a group's scale is, and how values become codes, is the scheme's.

use super::{Packed, SchemeSpec};
use crate::dense::dot_rows;
use crate::simd::{self, Level, NibbleRow};
use rayon::prelude::*;

/// Where things lie in a matrix of grouped codes.
pub struct Layout {
    /// Values a group.
    pub group: usize,
    /// Bytes of codes a row.
    pub row_bytes: usize,
    pub row_groups: usize,
}

impl Layout {
    pub fn new(group: usize, n_cols: usize) -> Layout {
        Layout { group, row_bytes: n_cols.div_ceil(2), row_groups: n_cols.div_ceil(group) }
    }
}

/// Packs a matrix. `quantize` writes a group's codes, one a byte and each below 16, and returns its scale and zero point.
pub fn pack(
    spec: SchemeSpec,
    group: usize,
    values: &[f32],
    n_rows: usize,
    n_cols: usize,
    quantize: impl Fn(&[f32], &mut [u8]) -> (f32, u8) + Sync,
) -> Packed {
    let layout = Layout::new(group, n_cols);
    let mut codes = vec![0u8; n_rows * layout.row_bytes];
    let mut scales = vec![0.0f32; n_rows * layout.row_groups];
    let mut zeros = vec![0u8; n_rows * layout.row_groups];
    codes
        .par_chunks_mut(layout.row_bytes.max(1))
        .zip(scales.par_chunks_mut(layout.row_groups.max(1)))
        .zip(zeros.par_chunks_mut(layout.row_groups.max(1)))
        .zip(values.par_chunks(n_cols.max(1)))
        .for_each_init(
            || vec![0u8; n_cols],
            |row_codes, (((codes, scales), zeros), row)| {
                let groups = row.chunks(layout.group).zip(row_codes.chunks_mut(layout.group));
                for (group_idx, (group, group_codes)) in groups.enumerate() {
                    (scales[group_idx], zeros[group_idx]) = quantize(group, group_codes);
                }
                for (byte, pair) in codes.iter_mut().zip(row_codes.chunks(2)) {
                    *byte = pair[0] << 4 | pair.get(1).copied().unwrap_or(0);
                }
            },
        );
    Packed { spec, n_rows, n_cols, codes, scales, zeros, nested: None }
}

/// Writes rows from `first_row` on as `(table[code] − zero)·scale`; without zero points where `packed` has none.
pub fn unpack_rows(layout: &Layout, packed: &Packed, table: &[f32; 16], first_row: usize, out: &mut [f32]) {
    let level = simd::level();
    for (row_idx, row) in out.chunks_exact_mut(packed.n_cols).enumerate() {
        decode(level, layout, packed, table, (first_row + row_idx) * packed.n_cols, row);
    }
}

/// Writes `y[i] = Σ_k w[first_row + i, k]·x[k]`, accumulated in fp32.
pub fn matvec_rows(layout: &Layout, packed: &Packed, table: &[f32; 16], first_row: usize, x: &[f32], y: &mut [f32]) {
    let level = simd::level();
    if !x.len().is_multiple_of(32) || !layout.group.is_multiple_of(32) || level != Level::Avx512 {
        let decode = |at: usize, out: &mut [f32]| decode(level, layout, packed, table, at, out);
        return dot_rows(level, packed.n_cols, first_row, x, y, decode);
    }
    for (row_idx, y) in (first_row..).zip(y) {
        let stats = row_idx * layout.row_groups;
        let row = NibbleRow {
            codes: &packed.codes[row_idx * layout.row_bytes..],
            table,
            scales: &packed.scales[stats..],
            zeros: packed.zeros.get(stats..).unwrap_or_default(),
            block: layout.group,
        };
        *y = simd::dot_nibbles(level, row, x).unwrap_or(f32::NAN);
    }
}

/// Decodes values from index `at` of the flattened matrix on; they lie in one row, and `at` has an even column.
fn decode(level: Level, layout: &Layout, packed: &Packed, table: &[f32; 16], at: usize, out: &mut [f32]) {
    let (row, mut column) = (at / packed.n_cols, at % packed.n_cols);
    let mut rest = out;
    while !rest.is_empty() {
        let group_idx = column / layout.group;
        let n = rest.len().min((group_idx + 1) * layout.group - column);
        let (segment, after) = rest.split_at_mut(n);
        let stat = row * layout.row_groups + group_idx;
        let zero = packed.zeros.get(stat).map_or(0.0, |zero| f32::from(*zero));
        let table = table.map(|value| value - zero);
        let codes = &packed.codes[row * layout.row_bytes + column / 2..];
        simd::decode_nibbles(level, codes, &table, packed.scales[stat], segment);
        column += n;
        rest = after;
    }
}
