//! NF4: a codebook of normal quantiles (Dettmers et al. 2023, "QLoRA"; numbers as in bitsandbytes 0.50).

use super::codebook::Codebook;

pub use super::codebook::{decode_nested, nest};

/// Values of the 16 codes.
pub const TABLE: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// A value's code is the number of these that are strictly smaller than it.
pub const THRESHOLDS: [f32; 15] = [
    -0.848_096_4,
    -0.610_632_9,
    -0.459_995_27,
    -0.339_679_43,
    -0.234_607_41,
    -0.137_911_73,
    -0.045_525_018,
    0.039_790_15,
    0.120_255_25,
    0.203_521_25,
    0.292_013_77,
    0.389_312_54,
    0.501_663_4,
    0.642_786_9,
    0.861_478_4,
];

/// The scheme.
pub static NF4: Codebook = Codebook {
    name: "nf4",
    version: 1,
    summary: "4-bit normal-float codes, an fp32 absmax a block (8 bits and a second level with double_quant)",
    table: TABLE,
    code,
};

fn code(scaled: f32) -> u8 {
    THRESHOLDS.iter().map(|threshold| u8::from(*threshold < scaled)).sum()
}
