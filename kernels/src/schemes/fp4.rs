//! FP4: bitsandbytes' 4-bit float, a sign and eight magnitudes in twelfths (numbers as in bitsandbytes 0.50). It is not the
//! E2M1 of MXFP4: its smallest magnitude is 1/192 of the largest, and codes are not in the order of their values.

use super::codebook::Codebook;

/// Magnitudes of codes 0..8; code 8 and above are the same, negative.
const MAGNITUDES: [f32; 8] = [0.0, 0.0625 / 12.0, 8.0 / 12.0, 1.0, 4.0 / 12.0, 6.0 / 12.0, 2.0 / 12.0, 3.0 / 12.0];

/// Values of the 16 codes.
pub const TABLE: [f32; 16] = {
    let mut table = [0.0; 16];
    let mut code = 0;
    while code < 8 {
        table[code] = MAGNITUDES[code];
        table[code + 8] = -MAGNITUDES[code];
        code += 1;
    }
    table
};

/// Magnitudes above the n-th of these, but not above the next, have the n-th of [`ORDER`] as their code.
pub const THRESHOLDS: [f32; 7] =
    [0.002_604_17, 0.085_937_5, 0.208_333_33, 0.291_666_67, 0.416_666_7, 0.583_333, 0.833_333_3];

/// Codes in the order of their magnitudes.
const ORDER: [u8; 8] = [0, 1, 6, 7, 4, 5, 2, 3];

/// The scheme.
pub static FP4: Codebook = Codebook {
    name: "fp4",
    version: 1,
    summary: "bitsandbytes' 4-bit float codes, an fp32 absmax a block (8 bits and a second level with double_quant)",
    table: TABLE,
    code,
};

fn code(scaled: f32) -> u8 {
    let n_below: usize = THRESHOLDS.iter().map(|threshold| usize::from(*threshold < scaled.abs())).sum();
    // The comparison, not the sign bit: −0 has code 0, but a small negative number has code 8, the other zero.
    ORDER[n_below] | if scaled < 0.0 { 8 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_of_the_table_has_its_own_code_and_zeros_keep_a_sign() {
        for (expected, value) in TABLE.iter().enumerate() {
            let expected = if expected == 8 { 0 } else { expected };
            assert_eq!(usize::from(code(*value)), expected, "{value}");
        }
        assert_eq!([code(-0.001), code(0.001), code(f32::NAN)], [8, 0, 0]);
    }
}
