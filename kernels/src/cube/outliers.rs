//! Products of LLM.int8() (Dettmers et al. 2022, section 3), as the host's `schemes::int8_product` computes them: rows of x are
//! quantized to 8 bits and multiplied with the codes in whole numbers, columns of x that hold an outlier in fp32 with decoded weights.

use super::decode::{Decode, Format, Int8, Stored, f16_bits_to_f32};
use super::launch::{Element, cube_count};
use super::linear::CUBE_UNITS;
use super::quantize::{f16_bits, round_half_even};
use super::reduce::cube_max;
use super::{DeviceMatrix, Kind};
use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use half::{bf16, f16};

/// Rows of x that one launch multiplies a code with: with eight, as for plain products, compute capability 9.0 spills registers.
const TILE_ROWS: u32 = 4;

/// Units of the cube that quantizes a row.
const ROW_UNITS: u32 = 256;

/// Rounds to fp16; what is beyond its range becomes its largest value.
#[cube]
fn rounded(value: f32) -> f32 {
    let bits = f16_bits(value);
    f16_bits_to_f32(min(bits & 0x7fffu32, 0x7bffu32) | (bits & 0x8000u32))
}

#[cube]
fn is_outlier(value: f32, threshold: f32) -> bool {
    threshold > 0.0f32 && value.abs() >= threshold
}

/// Marks columns where any row's magnitude reaches the threshold; each column is computed by one unit (thread).
///
/// # Shapes
/// `x` `[m, n_cols]`, `marks` `[n_cols]`.
#[cube(launch_unchecked)]
pub fn mark_outliers_kernel<A: Float>(x: &[A], marks: &mut [u32], m: u32, n_cols: u32, threshold: f32) {
    let col = ABSOLUTE_POS as u32;
    if col < n_cols {
        let mut mark = 0u32;
        for row in 0..m {
            if is_outlier(rounded(f32::cast_from(x[(row * n_cols + col) as usize])), threshold) {
                mark = 1u32;
            }
        }
        marks[col as usize] = mark;
    }
}

/// Quantizes rows of x to 8 bits; each row is computed by one cube (thread block). Codes of marked columns are 0. A row's scale comes
/// from all of its values that are not outliers themselves, also those in marked columns.
///
/// # Shapes
/// `x`, `codes` `[m, n_cols]`, `marks` `[n_cols]`, `scales` `[m]`.
#[cube(launch_unchecked)]
pub fn quantize_rows_kernel<A: Float>(
    x: &[A],
    marks: &[u32],
    codes: &mut [i32],
    scales: &mut [f32],
    n_cols: u32,
    threshold: f32,
) {
    let mut scratch = Shared::<[f32]>::new_slice(ROW_UNITS as usize);
    let row = CUBE_POS as u32;
    let mut most = 0.0f32;
    let mut col = UNIT_POS;
    while col < n_cols {
        let value = rounded(f32::cast_from(x[(row * n_cols + col) as usize]));
        if !is_outlier(value, threshold) {
            most = max(most, value.abs());
        }
        col += CUBE_DIM;
    }
    let absmax = cube_max(most, &mut scratch);
    let scale = select(absmax == 0.0f32, 0.0f32, 127.0f32 * (1.0f32 / absmax));
    let mut col = UNIT_POS;
    while col < n_cols {
        let at = (row * n_cols + col) as usize;
        let code = round_half_even(rounded(f32::cast_from(x[at])) * scale);
        codes[at] = select(marks[col as usize] == 1u32, 0i32, i32::cast_from(code));
        col += CUBE_DIM;
    }
    if UNIT_POS == 0 {
        scales[row as usize] = absmax;
    }
}

/// Multiplies codes as integers and outlier columns in fp32. One plane (warp) computes a weight row's products with [`TILE_ROWS`] rows of x.
///
/// # Shapes
/// `x`, `codes` `[m, n_cols]`, `marks` `[n_cols]`, `scales` `[m]`, `y` `[m, n_rows]`.
#[cube(launch_unchecked)]
#[expect(clippy::too_many_arguments, reason = "a kernel's buffers and sizes")]
pub fn outlier_product_kernel<A: Float>(
    stored: Stored,
    x: &[A],
    codes: &[i32],
    marks: &[u32],
    scales: &[f32],
    y: &mut [A],
    m: u32,
    n_rows: u32,
    #[comptime] format: Format,
) {
    let planes = CUBE_DIM_X / PLANE_DIM;
    let row = CUBE_POS_X * planes + UNIT_POS_X / PLANE_DIM;
    let first = CUBE_POS_Y * TILE_ROWS;
    if row < n_rows {
        let n_cols = stored.n_cols;
        let mut whole = Array::<i32>::new(TILE_ROWS as usize);
        let mut rest = Array::<f32>::new(TILE_ROWS as usize);
        #[unroll]
        for i in 0..TILE_ROWS {
            whole[i as usize] = 0i32;
            rest[i as usize] = 0.0f32;
        }
        let mut col = UNIT_POS_PLANE;
        while col < n_cols {
            let at = row * n_cols + col;
            let word = stored.codes[(at / 4u32) as usize];
            let byte = (word >> ((at % 4u32) * 8u32)) & 0xffu32;
            let code = i32::cast_from(byte ^ 0x80u32) - 128i32;
            let is_marked = marks[col as usize] == 1u32;
            let weight = Int8::value(&stored, row, col, format);
            #[unroll]
            for i in 0..TILE_ROWS {
                if first + i < m {
                    let x_at = ((first + i) * n_cols + col) as usize;
                    whole[i as usize] += code * codes[x_at];
                    if is_marked {
                        rest[i as usize] += weight * f32::cast_from(x[x_at]);
                    }
                }
            }
            col += PLANE_DIM;
        }
        #[unroll]
        for i in 0..TILE_ROWS {
            let sum = plane_sum(whole[i as usize]);
            let outliers = plane_sum(rest[i as usize]);
            if UNIT_POS_PLANE == 0 && first + i < m {
                let scale = scales[(first + i) as usize] * stored.scales[row as usize] * (1.0f32 / 16129.0f32);
                y[((first + i) * n_rows + row) as usize] = A::cast_from(f32::cast_from(sum) * scale + outliers);
            }
        }
    }
}

/// Writes `y = x · Wᵀ` as LLM.int8() does, for a matrix of signed bytes. Whole numbers are exact up to 2¹⁷ columns.
///
/// # Shapes
/// `x` `[m, n_cols]`, `y` `[m, n_rows]`, both of `element`.
pub fn outlier_linear(
    client: &Client,
    matrix: &DeviceMatrix,
    element: Element,
    threshold: f32,
    x: &Handle,
    y: &Handle,
    m: usize,
) {
    assert!(matrix.kind == Kind::Int8, "LLM.int8() multiplies matrices of signed bytes, not {:?}", matrix.kind);
    let (n_rows, n_cols) = (matrix.n_rows, matrix.n_cols);
    let (marks, scales) = (client.empty(4 * n_cols), client.empty(4 * m));
    let codes = client.empty(4 * m * n_cols);
    let plane = client.properties().hardware.plane_size_max.max(1);
    let units = CUBE_UNITS.max(plane);
    let rows_a_cube = (units / plane) as usize;
    let count = CubeCount::Static(n_rows.div_ceil(rows_a_cube) as u32, m.div_ceil(TILE_ROWS as usize) as u32, 1);
    macro_rules! call {
        ($float:ty) => {
            // SAFETY: the buffers have the lengths given, and the kernels stay inside them.
            unsafe {
                let buffer = |handle: &Handle, n: usize| BufferArg::from_raw_parts(handle.clone(), n);
                mark_outliers_kernel::launch_unchecked::<$float>(
                    client,
                    cube_count(n_cols.div_ceil(ROW_UNITS as usize)),
                    CubeDim::new_1d(ROW_UNITS),
                    buffer(x, m * n_cols),
                    buffer(&marks, n_cols),
                    m as u32,
                    n_cols as u32,
                    threshold,
                );
                quantize_rows_kernel::launch_unchecked::<$float>(
                    client,
                    CubeCount::Static(m as u32, 1, 1),
                    CubeDim::new_1d(ROW_UNITS),
                    buffer(x, m * n_cols),
                    buffer(&marks, n_cols),
                    buffer(&codes, m * n_cols),
                    buffer(&scales, m),
                    n_cols as u32,
                    threshold,
                );
                outlier_product_kernel::launch_unchecked::<$float>(
                    client,
                    count,
                    CubeDim::new_1d(units),
                    matrix.argument(),
                    buffer(x, m * n_cols),
                    buffer(&codes, m * n_cols),
                    buffer(&marks, n_cols),
                    buffer(&scales, m),
                    buffer(y, m * n_rows),
                    m as u32,
                    n_rows as u32,
                    matrix.format,
                )
            }
        };
    }
    match element {
        Element::F32 => call!(f32),
        Element::F16 => call!(f16),
        Element::Bf16 => call!(bf16),
    }
}
