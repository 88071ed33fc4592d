//! A stored matrix, or some of its rows, as plain numbers; and those against the ones it was made of.

use super::decode::{Decode, Format, Stored};
use super::quantize::{Reading, UNITS, read};
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

/// Values that a unit of [`loss_kernel`] takes.
pub const LOSS_RUN: u32 = 32;

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

/// Adds up the squares of `raw - decoded` and of `raw`, each cube those of its `UNITS · LOSS_RUN` values. Both are divided by a power of
/// two first, so that no square leaves f32's range.
///
/// # Shapes
/// `raw` and `decoded` `[n_values]`; `sums` `[n, 4]` from `first` on: the sum of (difference / 2^e)², e + 127, and the same of `raw`.
#[cube(launch_unchecked, create_dummy_kernel)]
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
    let start = cube * comptime!(UNITS * LOSS_RUN);
    let mut noise = 0.0f32;
    let mut signal = 0.0f32;
    for i in 0..LOSS_RUN {
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
    for i in 0..LOSS_RUN {
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
