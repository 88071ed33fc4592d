//! `y = x · Wᵀ + b`, or `y += x · Wᵀ`, for any scheme, shape and runtime, a plane of lanes a weight row: what the fast kernels fall back to.

use super::decode::{Decode, Format, Stored};
use cubecl::prelude::*;

/// Rows of x that one launch multiplies a decoded weight with.
pub const TILE_ROWS: u32 = 8;

/// Lanes of a cube; a cube's planes each take a weight row.
pub const CUBE_UNITS: u32 = 128;

/// # Shapes
/// `x` `[x_row + m, n_cols]`, of which the last m rows are taken, `bias` `[n_rows]` or empty, `y` `[m, y_stride]` of which columns from `y_first` on are written; the cube's y position is a tile of `TILE_ROWS` rows of x.
#[cube(launch_unchecked)]
pub fn linear_kernel<D: Decode, A: Float, O: Float>(
    stored: Stored,
    x: &[A],
    bias: &[f32],
    y: &mut [O],
    m: u32,
    n_rows: u32,
    x_row: u32,
    y_first: u32,
    y_stride: u32,
    #[comptime] format: Format,
    #[comptime] has_bias: bool,
    #[comptime] adds: bool,
) {
    let planes = CUBE_DIM_X / PLANE_DIM;
    let row = CUBE_POS_X * planes + UNIT_POS_X / PLANE_DIM;
    let first = CUBE_POS_Y * TILE_ROWS;
    if row < n_rows {
        let n_cols = stored.n_cols;
        let mut sums = Array::<f32>::new(TILE_ROWS as usize);
        #[unroll]
        for i in 0..TILE_ROWS {
            sums[i as usize] = 0.0;
        }
        let mut col = UNIT_POS_PLANE;
        while col < n_cols {
            let weight = D::value(&stored, row, col, format);
            #[unroll]
            for i in 0..TILE_ROWS {
                if first + i < m {
                    sums[i as usize] += weight * f32::cast_from(x[((x_row + first + i) * n_cols + col) as usize]);
                }
            }
            col += PLANE_DIM;
        }
        #[unroll]
        for i in 0..TILE_ROWS {
            let mut sum = plane_sum(sums[i as usize]);
            if UNIT_POS_PLANE == 0 && first + i < m {
                if comptime!(has_bias) {
                    sum += bias[row as usize];
                }
                let at = ((first + i) * y_stride + y_first + row) as usize;
                if comptime!(adds) {
                    sum += f32::cast_from(y[at]);
                }
                y[at] = O::cast_from(sum);
            }
        }
    }
}
