//! A stored matrix, or some of its rows, as plain numbers.

use super::decode::{Decode, Format, Stored};
use cubecl::prelude::*;

/// Writes rows from `first_row` on, one value a unit.
///
/// # Shapes
/// `out` `[n, n_cols]`.
#[cube(launch_unchecked)]
pub fn dequantize_kernel<D: Decode, A: Float>(
    stored: Stored,
    out: &mut [A],
    first_row: u32,
    n_values: u32,
    #[comptime] format: Format,
) {
    let at = ABSOLUTE_POS as u32;
    if at < n_values {
        let row = first_row + at / stored.n_cols;
        out[at as usize] = A::cast_from(D::value(&stored, row, at % stored.n_cols, format));
    }
}

/// Values that a unit of [`dequantize_vectors_kernel`] writes.
pub const VECTOR_VALUES: u32 = 8;

/// As [`dequantize_kernel`], eight neighbours a unit and one store; rows are multiples of eight.
///
/// # Shapes
/// `out` `[n, n_cols / W]` vectors of W values, W 8 or 4.
#[cube(launch_unchecked)]
pub fn dequantize_vectors_kernel<D: Decode, A: Float, W: Size>(
    stored: Stored,
    out: &mut [Vector<A, W>],
    first_row: u32,
    n_groups: u32,
    #[comptime] format: Format,
) {
    let group = ABSOLUTE_POS as u32;
    let width = W::value().comptime() as u32;
    if group < n_groups {
        let groups_a_row = stored.n_cols / VECTOR_VALUES;
        let row = first_row + group / groups_a_row;
        let col = (group % groups_a_row) * VECTOR_VALUES;
        #[unroll]
        for v in 0..comptime!(VECTOR_VALUES / width) {
            let mut vector = Vector::<A, W>::empty();
            #[unroll]
            for i in 0..width {
                let value = D::value(&stored, row, col + comptime!(v * width + i), format);
                vector.insert(comptime!(i as usize), A::cast_from(value));
            }
            out[(group * comptime!(VECTOR_VALUES / width) + v) as usize] = vector;
        }
    }
}
