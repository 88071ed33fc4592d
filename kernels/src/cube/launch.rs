//! Launches of the kernels that every runtime has.

use super::decode::{Affine4, Codebook4, DenseBf16, DenseF16, DenseF32, Int8};
use super::dequantize::dequantize_kernel;
use super::linear::{CUBE_UNITS, TILE_ROWS, linear_kernel};
use super::{DeviceMatrix, Kind};
use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use half::{bf16, f16};

/// Element type of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Element {
    F32,
    F16,
    Bf16,
}

impl Element {
    pub fn size_bytes(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::F16 | Element::Bf16 => 2,
        }
    }
}

/// Calls `$call!(Decoder)` with the decoder of a kind.
macro_rules! with_decoder {
    ($kind:expr, $call:ident) => {
        match $kind {
            Kind::F32 => $call!(DenseF32),
            Kind::F16 => $call!(DenseF16),
            Kind::Bf16 => $call!(DenseBf16),
            Kind::Codebook4 => $call!(Codebook4),
            Kind::Affine4 => $call!(Affine4),
            Kind::Int8 => $call!(Int8),
        }
    };
}

/// Writes `y = x · Wᵀ + bias`.
///
/// # Shapes
/// `x` `[m, n_cols]`, `bias` `[n_rows]` in f32, `y` `[m, n_rows]`.
pub fn linear(
    client: &Client,
    matrix: &DeviceMatrix,
    element: Element,
    x: &Handle,
    bias: Option<&Handle>,
    y: &Handle,
    m: usize,
) {
    let plane = client.properties().hardware.plane_size_max.max(1);
    let units = CUBE_UNITS.max(plane);
    let rows_a_cube = (units / plane) as usize;
    let count = CubeCount::Static(matrix.n_rows.div_ceil(rows_a_cube) as u32, m.div_ceil(TILE_ROWS as usize) as u32, 1);
    let (n_rows, n_cols) = (matrix.n_rows, matrix.n_cols);
    macro_rules! call {
        ($decoder:ty, $float:ty) => {
            // SAFETY: the buffers have the lengths given, and the kernel stays inside them.
            unsafe {
                linear_kernel::launch_unchecked::<$decoder, $float>(
                    client,
                    count,
                    CubeDim::new_1d(units),
                    matrix.argument(),
                    BufferArg::from_raw_parts(x.clone(), m * n_cols),
                    BufferArg::from_raw_parts(bias.unwrap_or(x).clone(), if bias.is_some() { n_rows } else { 1 }),
                    BufferArg::from_raw_parts(y.clone(), m * n_rows),
                    m as u32,
                    n_rows as u32,
                    matrix.format,
                    bias.is_some(),
                )
            }
        };
    }
    macro_rules! by_element {
        ($decoder:ty) => {
            match element {
                Element::F32 => call!($decoder, f32),
                Element::F16 => call!($decoder, f16),
                Element::Bf16 => call!($decoder, bf16),
            }
        };
    }
    with_decoder!(matrix.kind, by_element);
}

/// Writes rows `first_row..first_row + n` as plain numbers.
///
/// # Shapes
/// `out` `[n, n_cols]`.
pub fn dequantize(client: &Client, matrix: &DeviceMatrix, element: Element, first_row: usize, n: usize, out: &Handle) {
    let n_values = n * matrix.n_cols;
    let units = 256;
    let count = cube_count(n_values.div_ceil(units));
    macro_rules! call {
        ($decoder:ty, $float:ty) => {
            // SAFETY: as above.
            unsafe {
                dequantize_kernel::launch_unchecked::<$decoder, $float>(
                    client,
                    count,
                    CubeDim::new_1d(units as u32),
                    matrix.argument(),
                    BufferArg::from_raw_parts(out.clone(), n_values),
                    first_row as u32,
                    n_values as u32,
                    matrix.format,
                )
            }
        };
    }
    macro_rules! by_element {
        ($decoder:ty) => {
            match element {
                Element::F32 => call!($decoder, f32),
                Element::F16 => call!($decoder, f16),
                Element::Bf16 => call!($decoder, bf16),
            }
        };
    }
    with_decoder!(matrix.kind, by_element);
}

/// Spreads cubes over two dimensions: some runtimes take no more than 65,535 in one.
pub fn cube_count(n: usize) -> CubeCount {
    let width = n.clamp(1, 32_768);
    CubeCount::Static(width as u32, n.div_ceil(width) as u32, 1)
}
