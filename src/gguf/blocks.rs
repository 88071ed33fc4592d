//! Blocks of 32 values with one scale each: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and IQ4_NL.
//!
//! Scales are f16 and products f32, in the order in which ggml's reference decoders take them, so values are equal bit for bit.
//! In the types of four and five bits, byte `i` holds value `i` in its low half and value `i + 16` in its high half.

use half::f16;

const N: usize = 32;

/// IQ4_NL's sixteen levels (`kvalues_iq4nl` in ggml-common.h).
const IQ4_NL_LEVELS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Reads an f16 as f32.
pub fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Calls `decode` with each block of `BYTES` bytes and its 32 values.
fn each<const BYTES: usize>(bytes: &[u8], values: &mut [f32], decode: impl Fn(&[u8; BYTES], &mut [f32; N])) {
    for (block, values) in bytes.as_chunks::<BYTES>().0.iter().zip(values.as_chunks_mut::<N>().0) {
        decode(block, values);
    }
}

/// Writes the 32 four-bit codes of `packed`, each turned into a value.
fn nibbles(packed: &[u8], values: &mut [f32; N], value: impl Fn(usize, u8) -> f32) {
    for (i, byte) in packed.iter().enumerate().take(16) {
        values[i] = value(i, byte & 0x0f);
        values[i + 16] = value(i + 16, byte >> 4);
    }
}

pub fn q4_0(bytes: &[u8], values: &mut [f32]) {
    each::<18>(bytes, values, |block, values| {
        let scale = half_at(block, 0);
        nibbles(&block[2..], values, |_, code| scale * f32::from(code as i8 - 8));
    });
}

pub fn q4_1(bytes: &[u8], values: &mut [f32]) {
    each::<20>(bytes, values, |block, values| {
        let (scale, least) = (half_at(block, 0), half_at(block, 2));
        nibbles(&block[4..], values, |_, code| scale * f32::from(code) + least);
    });
}

/// Returns bit `i` of the fifth bits, as the 16 that it stands for.
fn fifth_bit(high: u32, i: usize) -> u8 {
    ((high >> i) as u8 & 1) << 4
}

pub fn q5_0(bytes: &[u8], values: &mut [f32]) {
    each::<22>(bytes, values, |block, values| {
        let scale = half_at(block, 0);
        let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
        nibbles(&block[6..], values, |i, code| scale * f32::from((code | fifth_bit(high, i)) as i8 - 16));
    });
}

pub fn q5_1(bytes: &[u8], values: &mut [f32]) {
    each::<24>(bytes, values, |block, values| {
        let (scale, least) = (half_at(block, 0), half_at(block, 2));
        let high = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
        nibbles(&block[8..], values, |i, code| scale * f32::from(code | fifth_bit(high, i)) + least);
    });
}

pub fn q8_0(bytes: &[u8], values: &mut [f32]) {
    each::<34>(bytes, values, |block, values| {
        let scale = half_at(block, 0);
        for (value, code) in values.iter_mut().zip(&block[2..]) {
            *value = scale * f32::from(*code as i8);
        }
    });
}

pub fn iq4_nl(bytes: &[u8], values: &mut [f32]) {
    each::<18>(bytes, values, |block, values| {
        let scale = half_at(block, 0);
        nibbles(&block[2..], values, |_, code| scale * f32::from(IQ4_NL_LEVELS[usize::from(code)]));
    });
}
