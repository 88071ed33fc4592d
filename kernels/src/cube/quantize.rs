//! Quantization on the device: tiles of a file's bytes become codes and statistics, the host's bit for bit where division is IEEE's.
//!
//! A tile is read as it lies in its file (fp32, fp16 or bf16 in u32 words). Statistics come first, a kernel of their own each; then a
//! unit writes one word of codes. Nothing here needs types or planes that a runtime may lack.

use super::Element;
use cubecl::prelude::*;

/// Units of every cube here.
pub const UNITS: u32 = 256;

/// How a tile's values are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Reading {
    /// Their type in the file.
    pub source: Element,
    /// What they are rounded to before anything else is done with them.
    pub base: Element,
}

/// Returns the value of fp16 bits; subnormal ones too, where a device flushes fp32's.
#[cube]
fn f16_value(bits: u32) -> f32 {
    let exponent = (bits >> 10u32) & 31u32;
    // Mantissas of subnormal numbers count in steps of 2^-24.
    let small = f32::cast_from(bits & 0x3ffu32) * f32::reinterpret(0x3380_0000u32);
    let normal = f32::reinterpret(((bits & 0x7fffu32) << 13u32) + 0x3800_0000u32);
    let magnitude = select(exponent == 0u32, small, normal);
    f32::reinterpret(u32::reinterpret(magnitude) | ((bits & 0x8000u32) << 16u32))
}

/// Rounds to the nearest integer, halves to the even one.
#[cube]
pub fn round_half_even(x: f32) -> f32 {
    let below = x.floor();
    let rest = x - below;
    let half = below * 0.5f32;
    let is_odd = half != half.floor();
    select(rest > 0.5f32 || (rest == 0.5f32 && is_odd), below + 1.0f32, below)
}

/// Returns the bits of a finite value rounded to fp16; infinity's beyond its range.
#[cube]
pub fn f16_bits(value: f32) -> u32 {
    let bits = u32::reinterpret(value);
    let magnitude = bits & 0x7fff_ffffu32;
    let rounded = magnitude + 0xfffu32 + ((magnitude >> 13u32) & 1u32);
    // Only meant where the exponent is fp16's; wraps around elsewhere and is not taken.
    let normal = min((rounded - 0x3800_0000u32) >> 13u32, 0x7c00u32);
    let steps = f32::reinterpret(min(magnitude, 0x3880_0000u32)) * f32::reinterpret(0x4b80_0000u32);
    let small = u32::cast_from(round_half_even(steps));
    select(magnitude < 0x3880_0000u32, small, normal) | ((bits >> 16u32) & 0x8000u32)
}

/// Returns the bits of a finite value rounded to bf16.
#[cube]
fn bf16_bits(value: f32) -> u32 {
    let bits = u32::reinterpret(value);
    (bits + 0x7fffu32 + ((bits >> 16u32) & 1u32)) >> 16u32
}

/// Returns value `at` of a tile, rounded to the base type.
#[cube]
pub fn read(raw: &[u32], at: u32, #[comptime] reading: Reading) -> f32 {
    let value = if comptime!(reading.source == Element::F32) {
        f32::reinterpret(raw[at as usize])
    } else {
        let bits = (raw[(at / 2u32) as usize] >> ((at % 2u32) * 16u32)) & 0xffffu32;
        if comptime!(reading.source == Element::F16) { f16_value(bits) } else { f32::reinterpret(bits << 16u32) }
    };
    if comptime!(reading.base == Element::F16 && reading.source != Element::F16) {
        f16_value(f16_bits(value))
    } else if comptime!(reading.base == Element::Bf16 && reading.source != Element::Bf16) {
        f32::reinterpret(bf16_bits(value) << 16u32)
    } else {
        value
    }
}

/// Returns the largest magnitude of `values - offset` for each run of `len` values; the last run may be short.
///
/// # Shapes
/// `absmax` `[n_values / len]` from `first` on; `lanes` units share a run, `UNITS / lanes` runs a cube.
#[cube(launch_unchecked)]
pub fn absmax_kernel(
    raw: &[u32],
    absmax: &mut [f32],
    n_values: u32,
    len: u32,
    first: u32,
    offset: f32,
    #[comptime] lanes: u32,
    #[comptime] reading: Reading,
) {
    let mut largest = Shared::<[f32]>::new_slice(comptime!(UNITS as usize));
    let run = CUBE_POS as u32 * comptime!(UNITS / lanes) + UNIT_POS / lanes;
    let lane = UNIT_POS % lanes;
    let start = run * len;
    let end = min(start + len, n_values);
    let mut found = 0.0f32;
    let mut at = start + lane;
    while at < end {
        found = max(found, (read(raw, at, reading) - offset).abs());
        at += lanes;
    }
    largest[UNIT_POS as usize] = found;
    sync_cube();
    #[unroll]
    for halving in 0..comptime!(lanes.ilog2()) {
        let step = comptime!(lanes >> (halving + 1));
        if lane < step {
            let other = largest[(UNIT_POS + step) as usize];
            let mine = largest[UNIT_POS as usize];
            largest[UNIT_POS as usize] = max(mine, other);
        }
        sync_cube();
    }
    if lane == 0u32 && start < n_values {
        absmax[(first + run) as usize] = largest[UNIT_POS as usize];
    }
}

/// What tells NF4 and FP4 apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Book {
    Nf4,
    Fp4,
}

/// Returns how many of the first `n` thresholds lie below a value; NaN is above none.
#[cube]
fn count_below(thresholds: &[f32], value: f32, #[comptime] n: u32) -> u32 {
    let mut count = 0u32;
    #[unroll]
    for i in 0..n {
        count += u32::cast_from(thresholds[i as usize] < value);
    }
    count
}

/// Codes of the flattened matrix from block `first_block` and word `first_word` on, a unit a word of eight.
///
/// # Shapes
/// `raw` a tile of `n_values`, which starts a block; `absmax` a value a block of the whole matrix.
#[cube(launch_unchecked)]
pub fn codebook_codes_kernel(
    raw: &[u32],
    absmax: &[f32],
    thresholds: &[f32],
    codes: &mut [u32],
    n_values: u32,
    block_size: u32,
    first_block: u32,
    first_word: u32,
    #[comptime] book: Book,
    #[comptime] reading: Reading,
) {
    let word_at = ABSOLUTE_POS as u32;
    let at = word_at * 8u32;
    if at < n_values {
        let largest = absmax[(first_block + at / block_size) as usize];
        let scale = 1.0f32 / largest;
        let mut word = 0u32;
        // Unrolled, the kernel would run no faster for the time that compiling it takes: it waits for memory.
        for i in 0..8u32 {
            let mut code = 0u32;
            if at + i < n_values {
                let value = read(raw, at + i, reading) * scale;
                if comptime!(book == Book::Nf4) {
                    code = count_below(thresholds, value, 15u32);
                } else {
                    // Codes in the order of their magnitudes, lowest nibble first.
                    code = (0x3254_7610u32 >> (count_below(thresholds, value.abs(), 7u32) * 4u32)) & 15u32;
                    code |= select(value < 0.0f32, 8u32, 0u32);
                }
                // A block of zeros divides zero by zero, which is above no threshold.
                code = select(largest == 0.0f32, 0u32, code);
            } else if comptime!(book == Book::Nf4) {
                // The odd nibble behind an odd number of values holds the code of 0.
                code = select(at + i == n_values && i % 2u32 == 1u32, 7u32, 0u32);
            }
            word |= code << ((i ^ 1u32) * 4u32);
        }
        codes[(first_word + word_at) as usize] = word;
    }
}

/// Second-level codes, a unit a word of four.
///
/// # Shapes
/// `absmax` `[n]`; `nested` an absmax a 256 of them from `first_nested` on, `middles` the 255 points halfway between neighbours of the
/// dynamic map, `aux` from `first_word` on.
#[cube(launch_unchecked)]
pub fn nested_codes_kernel(
    absmax: &[f32],
    nested: &[f32],
    middles: &[f32],
    aux: &mut [u32],
    n: u32,
    first_nested: u32,
    first_word: u32,
    offset: f32,
) {
    let word_at = ABSOLUTE_POS as u32;
    let at = word_at * 4u32;
    if at < n {
        let largest = nested[(first_nested + at / 256u32) as usize];
        let scale = 1.0f32 / largest;
        let mut word = 0u32;
        #[unroll]
        for i in 0..4u32 {
            if at + i < n {
                let value = (absmax[(at + i) as usize] - offset) * scale;
                // The number of points below the value.
                let mut code = 0u32;
                #[unroll]
                for bit in 0..8u32 {
                    let probe = code + comptime!(128u32 >> bit);
                    code = select(middles[(probe - 1u32) as usize] < value, probe, code);
                }
                word |= select(largest == 0.0f32, 0u32, code) << comptime!(i * 8);
            }
        }
        aux[(first_word + word_at) as usize] = word;
    }
}

/// Signed bytes, a unit a word of four.
///
/// # Shapes
/// `raw` a tile of whole rows, the first of them `first_row`; `absmax` a value a row.
#[cube(launch_unchecked)]
pub fn int8_codes_kernel(
    raw: &[u32],
    absmax: &[f32],
    codes: &mut [u32],
    n_values: u32,
    n_cols: u32,
    first_row: u32,
    first_word: u32,
    #[comptime] reading: Reading,
) {
    let word_at = ABSOLUTE_POS as u32;
    let at = word_at * 4u32;
    if at < n_values {
        let mut word = 0u32;
        #[unroll]
        for i in 0..4u32 {
            if at + i < n_values {
                let largest = absmax[(first_row + (at + i) / n_cols) as usize];
                let exact = 127.0f32 * read(raw, at + i, reading) / largest;
                // Saturates as the host's conversion does where the product overflows.
                let rounded = min(max(round_half_even(exact), -128.0f32), 127.0f32);
                let code = i32::cast_from(select(largest == 0.0f32, 0.0f32, rounded));
                word |= (u32::reinterpret(code) & 0xffu32) << comptime!(i * 8);
            }
        }
        codes[(first_word + word_at) as usize] = word;
    }
}

/// fp16 scales and zero points, a unit a group.
///
/// # Shapes
/// `raw` a tile of `n_rows` whole rows; `aux` a word a group from `first` on.
#[cube(launch_unchecked)]
pub fn int4_stats_kernel(
    raw: &[u32],
    aux: &mut [u32],
    n_rows: u32,
    n_cols: u32,
    group: u32,
    first: u32,
    #[comptime] symmetric: bool,
    #[comptime] reading: Reading,
) {
    let groups = n_cols.div_ceil(group);
    let group_at = ABSOLUTE_POS as u32;
    if group_at < n_rows * groups {
        let row = group_at / groups;
        let start = (group_at % groups) * group;
        let end = min(start + group, n_cols);
        let mut lowest = read(raw, row * n_cols + start, reading);
        let mut highest = lowest;
        let mut largest = lowest.abs();
        for col in start + 1u32..end {
            let value = read(raw, row * n_cols + col, reading);
            lowest = min(lowest, value);
            highest = max(highest, value);
            largest = max(largest, value.abs());
        }
        // 1e-5, and beyond fp16's range its largest number.
        let least = f32::reinterpret(0x3727_c5acu32);
        let exact_scale =
            if comptime!(symmetric) { max(largest, least) / 7.0f32 } else { max(highest - lowest, least) / 15.0f32 };
        let scale = min(f16_bits(exact_scale), 0x7bffu32);
        let mut zero = 8u32;
        if comptime!(!symmetric) {
            let exact = round_half_even(-lowest / f16_value(scale));
            zero = u32::cast_from(min(max(exact, 0.0f32), 15.0f32));
        }
        aux[(first + group_at) as usize] = scale | (zero << 16u32);
    }
}

/// 4-bit codes of grouped rows, a unit a word of eight; rows begin on a byte.
///
/// # Shapes
/// `raw` a tile of `n_rows` whole rows, whose groups' statistics start at `first_stat`; `codes` from `first_word` on.
#[cube(launch_unchecked)]
pub fn int4_codes_kernel(
    raw: &[u32],
    aux: &[u32],
    codes: &mut [u32],
    n_rows: u32,
    n_cols: u32,
    group: u32,
    first_stat: u32,
    first_word: u32,
    #[comptime] reading: Reading,
) {
    let groups = n_cols.div_ceil(group);
    let row_bytes = n_cols.div_ceil(2u32);
    let n_bytes = n_rows * row_bytes;
    let word_at = ABSOLUTE_POS as u32;
    if word_at * 4u32 < n_bytes {
        let mut word = 0u32;
        #[unroll]
        for i in 0..4u32 {
            let byte_at = word_at * 4u32 + i;
            if byte_at < n_bytes {
                let row = byte_at / row_bytes;
                let col = (byte_at % row_bytes) * 2u32;
                let stat = aux[(first_stat + row * groups + col / group) as usize];
                let scale = f16_value(stat & 0xffffu32);
                let zero = f32::cast_from(stat >> 16u32);
                #[unroll]
                for half in 0..2u32 {
                    if col + half < n_cols {
                        let exact = read(raw, row * n_cols + col + half, reading) / scale + zero;
                        let code = u32::cast_from(min(max(round_half_even(exact), 0.0f32), 15.0f32));
                        word |= code << comptime!(i * 8 + (1 - half) * 4);
                    }
                }
            }
        }
        codes[(first_word + word_at) as usize] = word;
    }
}

/// Values in their base type, a unit a word.
///
/// # Shapes
/// `raw` a tile of `n_values`; `out` from `first_word` on.
#[cube(launch_unchecked)]
pub fn convert_kernel(raw: &[u32], out: &mut [u32], n_values: u32, first_word: u32, #[comptime] reading: Reading) {
    let word_at = ABSOLUTE_POS as u32;
    if comptime!(reading.base == Element::F32) {
        if word_at < n_values {
            out[(first_word + word_at) as usize] = u32::reinterpret(read(raw, word_at, reading));
        }
    } else if word_at * 2u32 < n_values {
        // Values are already rounded: their bits are exact.
        let mut word = 0u32;
        #[unroll]
        for i in 0..2u32 {
            let at = word_at * 2u32 + i;
            if at < n_values {
                let value = read(raw, at, reading);
                if comptime!(reading.base == Element::F16) {
                    word |= f16_bits(value) << comptime!(i * 16);
                } else {
                    word |= bf16_bits(value) << comptime!(i * 16);
                }
            }
        }
        out[(first_word + word_at) as usize] = word;
    }
}
