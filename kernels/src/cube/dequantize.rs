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
