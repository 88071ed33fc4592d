//! Superblocks of 256 values: Q4_K, Q5_K and Q6_K. Eight (or sixteen) runs of values have a scale of their own, which is itself
//! a small number times the superblock's f16 scale.

use super::blocks::half_at;

const N: usize = 256;
/// Values that share a scale in Q4_K and Q5_K.
const RUN: usize = 32;

/// Returns the six-bit scale and minimum of run `i` out of 0..8. The first four lie in the low six bits of bytes 0..4 and 4..8; of
/// the last four the low halves lie in bytes 8..12 and the upper two bits on top of bytes 0..8.
fn scale_and_min(packed: &[u8], i: usize) -> (u8, u8) {
    if i < 4 {
        (packed[i] & 63, packed[i + 4] & 63)
    } else {
        let low = packed[i + 4];
        ((low & 15) | (packed[i - 4] >> 6 << 4), (low >> 4) | (packed[i] >> 6 << 4))
    }
}

/// Decodes the runs of Q4_K and Q5_K: run `2j` in the low halves of 32 bytes of codes, run `2j + 1` in the high halves of the same.
/// `extra` adds what a code has beyond four bits.
fn runs(block: &[u8], codes: &[u8], values: &mut [f32; N], extra: impl Fn(usize, usize) -> u8) {
    let (scale, min_scale) = (half_at(block, 0), half_at(block, 2));
    for (run_idx, values) in values.as_chunks_mut::<RUN>().0.iter_mut().enumerate() {
        let (run_scale, run_min) = scale_and_min(&block[4..16], run_idx);
        let (step, least) = (scale * f32::from(run_scale), min_scale * f32::from(run_min));
        let shift = 4 * (run_idx % 2);
        let packed = &codes[RUN * (run_idx / 2)..][..RUN];
        for (i, (value, byte)) in values.iter_mut().zip(packed).enumerate() {
            let code = ((byte >> shift) & 15) | extra(run_idx, i);
            *value = step * f32::from(code) - least;
        }
    }
}

pub fn q4_k(bytes: &[u8], values: &mut [f32]) {
    for (block, values) in bytes.as_chunks::<144>().0.iter().zip(values.as_chunks_mut::<N>().0) {
        runs(block, &block[16..], values, |_, _| 0);
    }
}

pub fn q5_k(bytes: &[u8], values: &mut [f32]) {
    for (block, values) in bytes.as_chunks::<176>().0.iter().zip(values.as_chunks_mut::<N>().0) {
        let high = &block[16..48];
        runs(block, &block[48..], values, |run_idx, i| ((high[i] >> run_idx) & 1) << 4);
    }
}

/// Each half of 128 values takes 64 bytes of low four bits, 32 of upper two, and eight scales, one a run of 16 values.
pub fn q6_k(bytes: &[u8], values: &mut [f32]) {
    for (block, values) in bytes.as_chunks::<210>().0.iter().zip(values.as_chunks_mut::<N>().0) {
        let scale = half_at(block, 208);
        for (i, value) in values.iter_mut().enumerate() {
            let (half_idx, within) = (i / 128, i % 128);
            let (quarter, lane) = (within / 32, within % 32);
            let low = block[half_idx * 64 + (quarter % 2) * 32 + lane] >> (4 * (quarter / 2)) & 15;
            let high = block[128 + half_idx * 32 + lane] >> (2 * quarter) & 3;
            let run_scale = block[192 + i / 16] as i8;
            *value = scale * f32::from(run_scale) * f32::from((low | (high << 4)) as i8 - 32);
        }
    }
}
