//! RMSNorm, rotary embedding and argmax of whole rows, one launch each. burn's operations take some ten launches for each of the first
//! two, and its argmax reads a row with a single thread.

use super::launch::{Element, buffer, cube_count, with_element};
use super::reduce::{cube_max, cube_sum};
use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use half::{bf16, f16};

/// Units of the cube that norms a row.
const ROW_UNITS: u32 = 256;

/// Units of the cube that looks through a row of logits.
const ARGMAX_UNITS: u32 = 256;

/// RMSNorm; each row is computed by one cube (thread block).
///
/// # Shapes
/// `x`, `out` `[n, n_cols]`, `weight` `[n_cols]`.
#[cube(launch_unchecked)]
pub fn rms_norm_kernel<A: Float>(x: &[A], weight: &[f32], out: &mut [A], n: u32, n_cols: u32, eps: f32) {
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(ROW_UNITS as usize));
    // Cubes are spread over two dimensions, so that some may lie past the end: they norm the last row once more.
    let first = min(CUBE_POS as u32, n - 1u32) * n_cols;
    let mut sum = 0.0f32;
    let mut col = UNIT_POS_X;
    while col < n_cols {
        let value = f32::cast_from(x[(first + col) as usize]);
        sum += value * value;
        col += CUBE_DIM_X;
    }
    let mean = cube_sum(sum, &mut scratch) / f32::cast_from(n_cols);
    let scale = 1.0f32 / (mean + eps).sqrt();
    let mut col = UNIT_POS_X;
    while col < n_cols {
        let at = (first + col) as usize;
        out[at] = A::cast_from(f32::cast_from(x[at]) * scale * weight[col as usize]);
        col += CUBE_DIM_X;
    }
}

/// Rotates heads by their positions (rotate-half); each value is computed by one unit (thread). Values beyond `rotary_dim` stay as they are.
///
/// # Shapes
/// `x`, `out` `[n, n_heads · head_dim]`, `cos`, `sin` `[n, rotary_dim]`, the sines negated in their first half.
#[cube(launch_unchecked)]
pub fn rotate_kernel<A: Float>(
    x: &[A],
    cos: &[f32],
    sin: &[f32],
    out: &mut [A],
    n_values: u32,
    width: u32,
    head_dim: u32,
    rotary_dim: u32,
) {
    let at = ABSOLUTE_POS as u32;
    if at < n_values {
        let dim = at % head_dim;
        let half = rotary_dim / 2u32;
        let table = (at / width) * rotary_dim + min(dim, rotary_dim - 1u32);
        let partner = select(dim < half, at + half, at - min(half, at));
        let value = f32::cast_from(x[at as usize]);
        let rotated = value * cos[table as usize]
            + f32::cast_from(x[min(partner, n_values - 1u32) as usize]) * sin[table as usize];
        out[at as usize] = A::cast_from(select(dim < rotary_dim, rotated, value));
    }
}

/// Argmax of each row, the first of equal values; each row is computed by one cube (thread block).
///
/// # Shapes
/// `x` `[n, n_cols]`, `out` `[n]`.
#[cube(launch_unchecked)]
pub fn argmax_kernel(x: &[f32], out: &mut [u32], n: u32, n_cols: u32) {
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(ARGMAX_UNITS as usize));
    let mut places = Shared::<[u32]>::new_slice(comptime!(ARGMAX_UNITS as usize));
    let row = min(CUBE_POS as u32, n - 1u32);
    let mut largest = f32::reinterpret(0xff7f_ffffu32);
    let mut place = n_cols;
    let mut col = UNIT_POS_X;
    while col < n_cols {
        let value = x[(row * n_cols + col) as usize];
        if value > largest || (value == largest && place == n_cols) {
            largest = value;
            place = col;
        }
        col += CUBE_DIM_X;
    }
    let most = cube_max(largest, &mut scratch);
    let first = plane_min(select(largest == most, place, n_cols));
    if UNIT_POS_PLANE == 0 {
        places[(UNIT_POS_X / PLANE_DIM) as usize] = first;
    }
    sync_cube();
    if UNIT_POS_X == 0 {
        let mut least = places[0];
        for plane in 1..CUBE_DIM_X / PLANE_DIM {
            least = min(least, places[plane as usize]);
        }
        // Where no value is a number, the first stands for them: who reads the values finds out.
        out[row as usize] = select(least == n_cols, 0u32, least);
    }
}

/// Writes each row's argmax, the first of equal values.
///
/// # Shapes
/// `x` `[n, n_cols]` f32, `out` `[n]` u32.
pub fn argmax(client: &Client, [x, out]: [&Handle; 2], [n, n_cols]: [usize; 2]) {
    // SAFETY: the buffers have the lengths given.
    unsafe {
        argmax_kernel::launch_unchecked(
            client,
            cube_count(n),
            CubeDim::new_1d(ARGMAX_UNITS),
            buffer(x, n * n_cols),
            buffer(out, n),
            n as u32,
            n_cols as u32,
        )
    }
}

/// Writes each row divided by its root mean square, times `weight`.
///
/// # Shapes
/// `x`, `out` `[n, n_cols]` of `element`, `weight` `[n_cols]` f32.
pub fn rms_norm(client: &Client, element: Element, [x, weight, out]: [&Handle; 3], [n, n_cols]: [usize; 2], eps: f32) {
    macro_rules! call {
        ($float:ty) => {
            // SAFETY: the buffers have the lengths given.
            unsafe {
                rms_norm_kernel::launch_unchecked::<$float>(
                    client,
                    cube_count(n),
                    CubeDim::new_1d(ROW_UNITS),
                    buffer(x, n * n_cols),
                    buffer(weight, n_cols),
                    buffer(out, n * n_cols),
                    n as u32,
                    n_cols as u32,
                    eps,
                )
            }
        };
    }
    with_element!(element, call);
}

/// Writes `n` rows of heads, each rotated by its position.
///
/// # Shapes
/// `x`, `out` `[n, width]` of `element`, `cos`, `sin` `[n, rotary_dim]` f32.
pub fn rotate(
    client: &Client,
    element: Element,
    [x, cos, sin, out]: [&Handle; 4],
    [n, width]: [usize; 2],
    [head_dim, rotary_dim]: [usize; 2],
) {
    let n_values = n * width;
    macro_rules! call {
        ($float:ty) => {
            // SAFETY: the buffers have the lengths given.
            unsafe {
                rotate_kernel::launch_unchecked::<$float>(
                    client,
                    cube_count(n_values.div_ceil(256)),
                    CubeDim::new_1d(256),
                    buffer(x, n_values),
                    buffer(cos, n * rotary_dim),
                    buffer(sin, n * rotary_dim),
                    buffer(out, n_values),
                    n_values as u32,
                    width as u32,
                    head_dim as u32,
                    rotary_dim as u32,
                )
            }
        };
    }
    with_element!(element, call);
}
