//! A stored matrix, or a piece of it, as plain numbers.

use super::decode::{Decode, Format, Stored};
use cubecl::prelude::*;

/// Where a piece lies in its matrix, as kernels see it.
#[derive(CubeType, CubeLaunch)]
pub struct Place {
    /// First row, and how many follow it before the piece goes on at `second_row`.
    pub first_row: u32,
    pub n_first: u32,
    pub second_row: u32,
    pub first_col: u32,
    pub n_cols: u32,
}

#[cube]
impl Place {
    /// Returns the matrix's row that is the piece's `row`.
    fn row(&self, row: u32) -> u32 {
        select(row < self.n_first, self.first_row + row, self.second_row + row - self.n_first)
    }
}

/// Writes a piece, one value a unit.
///
/// # Shapes
/// `out` `[n, place.n_cols]`.
#[cube(launch_unchecked)]
pub fn dequantize_kernel<D: Decode, A: Float>(
    stored: Stored,
    out: &mut [A],
    place: Place,
    n_values: u32,
    #[comptime] format: Format,
) {
    let at = ABSOLUTE_POS as u32;
    if at < n_values {
        let row = place.row(at / place.n_cols);
        let col = place.first_col + at % place.n_cols;
        out[at as usize] = A::cast_from(D::value(&stored, row, col, format));
    }
}

/// Values that a unit of [`dequantize_vectors_kernel`] writes.
pub const VECTOR_VALUES: u32 = 8;

/// As [`dequantize_kernel`], eight neighbours a unit and one store; rows of the matrix and of the piece are multiples of eight.
///
/// # Shapes
/// `out` `[n, place.n_cols / W]` vectors of W values, W 8 or 4.
#[cube(launch_unchecked)]
pub fn dequantize_vectors_kernel<D: Decode, A: Float, W: Size>(
    stored: Stored,
    out: &mut [Vector<A, W>],
    place: Place,
    n_groups: u32,
    #[comptime] format: Format,
) {
    let group = ABSOLUTE_POS as u32;
    let width = W::value().comptime() as u32;
    if group < n_groups {
        let groups_a_row = place.n_cols / VECTOR_VALUES;
        let row = place.row(group / groups_a_row);
        let col = place.first_col + (group % groups_a_row) * VECTOR_VALUES;
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
