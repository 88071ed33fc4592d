//! Random weights: the right shapes without a download. The same seed and name give the same values everywhere.

use rayon::prelude::*;

/// Standard deviation of random weights, that of Hugging Face's `initializer_range`.
const STDEV: f32 = 0.02;
const CHUNK: usize = 1 << 14;

/// Returns `n` values for the tensor `name`: ones for norms, zero-mean values of standard deviation 0.02 for the rest.
pub fn random_values(seed: u64, name: &str, n: usize) -> Vec<f32> {
    if name.ends_with("norm.weight") {
        return vec![1.0; n];
    }
    let stream = name.bytes().fold(seed ^ 0x9e37_79b9_7f4a_7c15, |hash, byte| mix(hash ^ u64::from(byte)));
    let mut values = vec![0.0f32; n];
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk_idx, chunk)| {
        let first = (chunk_idx * CHUNK) as u64;
        for (i, value) in chunk.iter_mut().enumerate() {
            *value =
                nearly_normal(mix(stream.wrapping_add((first + i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)))) * STDEV;
        }
    });
    values
}

/// SplitMix64's finalizer (Steele, Lea, Flood 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Sum of four uniform 16-bit numbers, centred and scaled to variance 1 (Irwin-Hall, n = 4).
fn nearly_normal(bits: u64) -> f32 {
    let sum = (bits & 0xffff) + ((bits >> 16) & 0xffff) + ((bits >> 32) & 0xffff) + (bits >> 48);
    (sum as f32 / 65_536.0 - 2.0) * 1.732_050_8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_weights_depend_on_seed_and_name_and_have_the_stated_spread() {
        let a = random_values(1, "model.layers.0.mlp.up_proj.weight", 100_000);
        assert_eq!(a, random_values(1, "model.layers.0.mlp.up_proj.weight", 100_000));
        assert_ne!(a, random_values(2, "model.layers.0.mlp.up_proj.weight", 100_000));
        assert_ne!(a, random_values(1, "model.layers.1.mlp.up_proj.weight", 100_000));
        let mean = a.iter().sum::<f32>() / a.len() as f32;
        let variance = a.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / a.len() as f32;
        assert!(mean.abs() < 3e-4 && (variance.sqrt() - STDEV).abs() < 3e-4);
        assert_eq!(random_values(1, "model.norm.weight", 3), vec![1.0; 3]);
    }
}
