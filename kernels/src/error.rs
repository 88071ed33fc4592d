//! What packing loses.

use crate::{Packed, schemes};
use rayon::prelude::*;

/// Returns the mean squared difference between a matrix and its packed form, and the signal-to-noise ratio in dB
/// (10·log10(Σw²/Σ(w − ŵ)²), nothing where the difference is 0). Sums in f64, a row at a time.
pub fn reconstruction_error(original: &[f32], packed: &Packed) -> (f64, Option<f64>) {
    let Ok(scheme) = schemes::scheme(&packed.spec.scheme) else {
        unreachable!("a packed matrix was made by a registered scheme")
    };
    let (noise, signal) = original
        .par_chunks_exact(packed.n_cols.max(1))
        .enumerate()
        .map_init(
            || vec![0.0f32; packed.n_cols],
            |row, (row_idx, values)| {
                scheme.unpack_rows(packed, row_idx, row);
                values.iter().zip(row.iter()).fold((0.0f64, 0.0f64), |(noise, signal), (w, decoded)| {
                    let delta = f64::from(*w) - f64::from(*decoded);
                    (noise + delta * delta, signal + f64::from(*w) * f64::from(*w))
                })
            },
        )
        .collect::<Vec<_>>()
        .into_iter()
        .fold((0.0, 0.0), |(n, s), (noise, signal)| (n + noise, s + signal));
    mse_and_sqnr(noise, signal, original.len())
}

/// Returns the mean of `n` squares that add up to `noise`, and its ratio to `signal` in dB.
pub(crate) fn mse_and_sqnr(noise: f64, signal: f64, n: usize) -> (f64, Option<f64>) {
    let mse = noise / n.max(1) as f64;
    (mse, (noise > 0.0).then(|| 10.0 * (signal / noise).log10()))
}
