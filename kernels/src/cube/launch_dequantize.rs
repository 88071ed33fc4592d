//! Launches that write stored matrices, or pieces of them, as plain numbers.

use super::decode::{Affine4, Codebook4, DenseBf16, DenseF16, DenseF32, Int8};
use super::dequantize::{PlaceLaunch, VECTOR_VALUES, dequantize_kernel, dequantize_vectors_kernel};
use super::launch::{Element, cube_count, with_decoder};
use super::{DeviceMatrix, Kind};
use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use half::{bf16, f16};
use std::ops::Range;

/// Rows and columns of a matrix that are decoded together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The second rows follow the first ones; they may be none.
    pub rows: [Range<usize>; 2],
    pub cols: Range<usize>,
}

impl Piece {
    /// Whole rows.
    pub fn rows(matrix: &DeviceMatrix, rows: Range<usize>) -> Piece {
        Piece { rows: [rows, 0..0], cols: 0..matrix.n_cols }
    }

    pub fn n_rows(&self) -> usize {
        self.rows[0].len() + self.rows[1].len()
    }

    fn place(&self) -> PlaceLaunch {
        PlaceLaunch::new(
            self.rows[0].start as u32,
            self.rows[0].len() as u32,
            self.rows[1].start as u32,
            self.cols.start as u32,
            self.cols.len() as u32,
        )
    }
}

/// Writes rows `first_row..first_row + n` as plain numbers.
///
/// # Shapes
/// `out` `[n, n_cols]`.
pub fn dequantize(client: &Client, matrix: &DeviceMatrix, element: Element, first_row: usize, n: usize, out: &Handle) {
    dequantize_piece(client, matrix, element, &Piece::rows(matrix, first_row..first_row + n), out);
}

/// Writes a piece of a matrix as plain numbers.
///
/// # Shapes
/// `out` `[piece.n_rows(), piece.cols.len()]`.
pub fn dequantize_piece(client: &Client, matrix: &DeviceMatrix, element: Element, piece: &Piece, out: &Handle) {
    let n_values = piece.n_rows() * piece.cols.len();
    let units = 256;
    let is_whole = |n: usize| n.is_multiple_of(VECTOR_VALUES as usize);
    if is_whole(matrix.n_cols) && is_whole(piece.cols.start) && is_whole(piece.cols.len()) {
        return dequantize_vectors(client, matrix, element, piece, out);
    }
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
                    piece.place(),
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

fn dequantize_vectors(client: &Client, matrix: &DeviceMatrix, element: Element, piece: &Piece, out: &Handle) {
    let n_values = piece.n_rows() * piece.cols.len();
    let n_groups = n_values / VECTOR_VALUES as usize;
    macro_rules! call {
        ($decoder:ty, $float:ty, $width:literal) => {
            // SAFETY: rows are whole groups of eight values, and the output holds all of them.
            unsafe {
                dequantize_vectors_kernel::launch_unchecked::<$decoder, $float>(
                    client,
                    cube_count(n_groups.div_ceil(256)),
                    CubeDim::new_1d(256),
                    $width,
                    matrix.argument(),
                    BufferArg::from_raw_parts(out.clone(), n_values / $width),
                    piece.place(),
                    n_groups as u32,
                    matrix.format,
                )
            }
        };
    }
    macro_rules! by_element {
        ($decoder:ty) => {
            match element {
                Element::F32 => call!($decoder, f32, 4),
                Element::F16 => call!($decoder, f16, 8),
                Element::Bf16 => call!($decoder, bf16, 8),
            }
        };
    }
    with_decoder!(matrix.kind, by_element);
}
