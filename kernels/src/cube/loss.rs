//! What packing a matrix loses, measured on the device: its values against the decoded ones, tile by tile. Squares are added up by
//! kernels over short runs, in f32, and by the host beyond them, in f64.

use super::launch::cube_count;
use super::launch_dequantize::dequantize;
use super::quantize::{Reading, UNITS, read};
use super::staging::stage;
use super::tile::buffer;
use super::{DeviceMatrix, Element, FileMatrix, Form};
use crate::error::mse_and_sqnr;
use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::{Handle, ServerError};
use std::io;

/// Values that are decoded at a time: 32 MiB of them.
const TILE_VALUES: usize = 8 << 20;

/// Values that a unit takes.
const RUN: u32 = 32;

/// Values whose squares one cube adds up.
const CUBE_VALUES: usize = (UNITS * RUN) as usize;

/// Relative error of sums of squares against exact ones: a difference and its square round three times, a unit adds 32 of them, a cube
/// its 256 units pairwise. That is at most 42 halves of f32's epsilon, since no term is negative.
pub const LOSS_BUDGET: f64 = 48.0 / (1u64 << 24) as f64;

/// Compares matrices with what they were made of, one after the other; holds a tile of each on the device.
pub struct LossMeter<'a> {
    client: &'a Client,
    raw: Option<Handle>,
    decoded: Option<Handle>,
}

/// Sums on the device, of one matrix.
pub struct Loss {
    sums: Handle,
    n_sums: usize,
    n_values: usize,
}

impl<'a> LossMeter<'a> {
    pub fn new(client: &'a Client) -> LossMeter<'a> {
        LossMeter { client, raw: None, decoded: None }
    }

    /// Compares a matrix with the file's values that it was made of, which pass through a tile once more; second-level scales are
    /// settled. `look` is given pieces of them as [`MatrixLoader::load`](super::MatrixLoader::load)'s is.
    ///
    /// # Errors
    /// What `look` returns for the first piece that it refuses.
    pub fn measure<E: Send>(
        &mut self,
        matrix: &DeviceMatrix,
        file: &FileMatrix,
        look: impl Fn(usize, io::Result<&[u8]>) -> Result<(), E> + Sync,
    ) -> Result<Loss, E> {
        let (n_cols, size) = (matrix.n_cols, file.reading.source.size_bytes());
        let tile_rows = tile_rows(matrix.n_rows, n_cols);
        let n_sums = matrix.n_rows.div_ceil(tile_rows) * (tile_rows * n_cols).div_ceil(CUBE_VALUES);
        let sums = self.client.create_from_slice(&vec![0; 16 * n_sums.max(1)]);
        for (tile_idx, first_row) in (0..matrix.n_rows).step_by(tile_rows).enumerate() {
            let n_rows = tile_rows.min(matrix.n_rows - first_row);
            let n = n_rows * n_cols;
            let n_words = (n * size).div_ceil(4);
            let raw = held(self.client, &mut self.raw, n_words);
            let decoded = held(self.client, &mut self.decoded, n);
            let start = first_row * n_cols * size;
            stage(self.client, &file.bytes, start..start + n * size, &raw, 0, &look)?;
            dequantize(self.client, matrix, Element::F32, first_row, n_rows, &decoded);
            // SAFETY: the buffers hold at least as many elements; the kernel writes four numbers a cube from the tile's on.
            unsafe {
                loss_kernel::launch_unchecked(
                    self.client,
                    cube_count(n.div_ceil(CUBE_VALUES)),
                    CubeDim::new_1d(UNITS),
                    buffer((&raw, n_words)),
                    buffer((&decoded, n)),
                    buffer((&sums, 4 * n_sums)),
                    n as u32,
                    (tile_idx * (tile_rows * n_cols).div_ceil(CUBE_VALUES)) as u32,
                    file.reading,
                );
            }
        }
        Ok(Loss { sums, n_sums, n_values: matrix.n_rows * n_cols })
    }
}

impl Loss {
    /// Waits for the device; returns the mean squared difference and the signal-to-noise ratio in dB, as
    /// [`reconstruction_error`](crate::reconstruction_error) does, whose sums these are within [`LOSS_BUDGET`].
    ///
    /// # Errors
    /// The device's failures, those of making the matrix among them.
    pub fn read(self, client: &Client) -> Result<(f64, Option<f64>), ServerError> {
        let bytes = client.read_one(self.sums)?;
        let numbers: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes[..(16 * self.n_sums).min(bytes.len())]);
        let unscaled = |sum: f32, exponent: f32| f64::from(sum) * f64::from(exponent - 127.0).exp2().powi(2);
        let (noise, signal) = numbers.as_chunks::<4>().0.iter().fold((0.0, 0.0), |(noise, signal), cube| {
            (noise + unscaled(cube[0], cube[1]), signal + unscaled(cube[2], cube[3]))
        });
        Ok(mse_and_sqnr(noise, signal, self.n_values))
    }
}

/// Returns the bytes that a device holds at most while a matrix is made of `file` and measured.
pub fn measuring_bytes(form: Form, n_cols: usize, file: &FileMatrix) -> u64 {
    let n_values = file.n_rows * n_cols;
    let size = file.reading.source.size_bytes();
    let made_at_a_time = form.tile_values(file.reading, n_cols).min(n_values);
    let measured_at_a_time = tile_rows(file.n_rows, n_cols) * n_cols;
    let tiles = made_at_a_time * size + measured_at_a_time * (size + 4);
    form.made_bytes(file.n_rows, n_cols) + tiles as u64
}

/// Rows of a tile; one where they are longer than that.
fn tile_rows(n_rows: usize, n_cols: usize) -> usize {
    (TILE_VALUES / n_cols.max(1)).clamp(1, n_rows.max(1))
}

/// Returns a buffer of at least so many words, the one that is held where it suffices. The device works in order: what reads it is done
/// before it is written again.
fn held(client: &Client, slot: &mut Option<Handle>, n_words: usize) -> Handle {
    if slot.as_ref().is_none_or(|held| held.size() as usize / 4 < n_words) {
        // The old one goes first.
        *slot = None;
    }
    slot.get_or_insert_with(|| client.empty(4 * n_words)).clone()
}

/// Returns the biased exponent of a magnitude, within what has an inverse power of two.
#[cube]
fn exponent(magnitude: f32) -> u32 {
    min(max(u32::reinterpret(magnitude) >> 23u32, 1u32), 253u32)
}

/// Returns what takes magnitudes of an exponent to 1 or just above.
#[cube]
fn to_one(exponent: u32) -> f32 {
    f32::reinterpret((254u32 - exponent) << 23u32)
}

/// Adds up the squares of `raw - decoded` and of `raw`, each cube those of its `UNITS · RUN` values. Both are divided by a power of
/// two first, so that no square leaves f32's range.
///
/// # Shapes
/// `raw` and `decoded` `[n_values]`; `sums` `[n, 4]` from `first` on: the sum of (difference / 2^e)², e + 127, and the same of `raw`.
#[cube(launch_unchecked)]
pub fn loss_kernel(
    raw: &[u32],
    decoded: &[f32],
    sums: &mut [f32],
    n_values: u32,
    first: u32,
    #[comptime] reading: Reading,
) {
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(UNITS as usize));
    let cube = CUBE_POS as u32;
    let start = cube * comptime!(UNITS * RUN);
    let mut noise = 0.0f32;
    let mut signal = 0.0f32;
    for i in 0..RUN {
        let at = start + i * UNITS + UNIT_POS;
        if at < n_values {
            let value = read(raw, at, reading);
            noise = max(noise, (value - decoded[at as usize]).abs());
            signal = max(signal, value.abs());
        }
    }
    let noise_exponent = exponent(join(noise, &mut scratch, false));
    let signal_exponent = exponent(join(signal, &mut scratch, false));
    noise = 0.0f32;
    signal = 0.0f32;
    for i in 0..RUN {
        let at = start + i * UNITS + UNIT_POS;
        if at < n_values {
            let value = read(raw, at, reading);
            let difference = (value - decoded[at as usize]) * to_one(noise_exponent);
            let scaled = value * to_one(signal_exponent);
            noise += difference * difference;
            signal += scaled * scaled;
        }
    }
    let noise_sum = join(noise, &mut scratch, true);
    let signal_sum = join(signal, &mut scratch, true);
    if UNIT_POS == 0u32 && start < n_values {
        let at = (first + cube) * 4u32;
        sums[at as usize] = noise_sum;
        sums[(at + 1u32) as usize] = f32::cast_from(noise_exponent);
        sums[(at + 2u32) as usize] = signal_sum;
        sums[(at + 3u32) as usize] = f32::cast_from(signal_exponent);
    }
}

/// Returns the sum or the largest of all units' values, the same to each, pair by pair.
#[cube]
fn join(value: f32, scratch: &mut Shared<[f32]>, #[comptime] adds: bool) -> f32 {
    // Others may still read what was joined before.
    sync_cube();
    scratch[UNIT_POS as usize] = value;
    sync_cube();
    #[unroll]
    for halving in 0..comptime!(UNITS.ilog2()) {
        let step = comptime!(UNITS >> (halving + 1));
        if UNIT_POS < step {
            let mine = scratch[UNIT_POS as usize];
            let other = scratch[(UNIT_POS + step) as usize];
            scratch[UNIT_POS as usize] = if comptime!(adds) { mine + other } else { max(mine, other) };
        }
        sync_cube();
    }
    scratch[0]
}
