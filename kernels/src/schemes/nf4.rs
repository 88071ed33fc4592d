//! NF4: 4-bit codes of a table of normal quantiles, one absmax a block (Dettmers et al. 2023, "QLoRA"), packed as
//! bitsandbytes 0.50 packs it; optionally with the block scales quantized again.

use super::dynamic_map::{dynamic_map, nearest};
use super::{Nested, Packed, Scheme, SchemeError, SchemeSpec, check_values};
use crate::dense::dot_rows;
use crate::simd::{self, NibbleRow};
use rayon::prelude::*;

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
const THRESHOLDS: [f32; 15] = [
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

/// Block scales that share one second-level scale.
const NESTED_BLOCK: usize = 256;
const BLOCK_SIZES: [usize; 7] = [64, 128, 256, 512, 1024, 2048, 4096];
/// Code of exactly 0, packed where the number of values is odd.
const PADDING_CODE: u8 = 7;

/// The scheme.
pub struct Nf4;

impl Scheme for Nf4 {
    fn name(&self) -> &'static str {
        "nf4"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "4-bit normal-float codes, an fp32 absmax a block (8 bits and a second level with double_quant)"
    }

    fn normalize(&self, spec: &SchemeSpec) -> Result<SchemeSpec, SchemeError> {
        let block_size = spec.block_size.unwrap_or(64);
        if !BLOCK_SIZES.contains(&block_size) {
            let expected = "64, 128, 256, 512, 1024, 2048 or 4096";
            return Err(SchemeError::BlockSize { scheme: "nf4", found: block_size, expected });
        }
        if spec.symmetric {
            return Err(SchemeError::Setting { scheme: "nf4", setting: "symmetric" });
        }
        Ok(SchemeSpec { block_size: Some(block_size), ..spec.clone() })
    }

    fn pack(&self, spec: &SchemeSpec, values: &[f32], n_rows: usize, n_cols: usize) -> Result<Packed, SchemeError> {
        let spec = self.normalize(spec)?;
        check_values(values, n_rows, n_cols)?;
        let block_size = block_size(&spec);
        let absmax: Vec<f32> = values
            .par_chunks(block_size)
            .map(|block| block.iter().fold(0.0f32, |max, value| max.max(value.abs())))
            .collect();
        let mut codes = vec![0u8; values.len().div_ceil(2)];
        // Block sizes are even, so that a block's codes are whole bytes.
        codes.par_chunks_mut(block_size / 2).zip(values.par_chunks(block_size)).zip(&absmax).for_each(
            |((codes, block), absmax)| {
                let scale = 1.0 / absmax;
                for (byte, pair) in codes.iter_mut().zip(block.chunks(2)) {
                    let low = pair.get(1).map_or(PADDING_CODE, |value| code(value * scale));
                    *byte = code(pair[0] * scale) << 4 | low;
                }
            },
        );
        let (scales, nested) = if spec.double_quant {
            let nested = nest(&absmax);
            (decode_nested(&nested), Some(nested))
        } else {
            (absmax, None)
        };
        Ok(Packed { spec, n_rows, n_cols, codes, scales, zeros: Vec::new(), nested })
    }

    fn unpack_rows(&self, packed: &Packed, first_row: usize, out: &mut [f32]) {
        decode(simd::level(), packed, first_row * packed.n_cols, out);
    }

    fn matvec_rows(&self, packed: &Packed, first_row: usize, x: &[f32], y: &mut [f32]) {
        let level = simd::level();
        let (block, n_cols) = (block_size(&packed.spec), packed.n_cols);
        if n_cols.is_multiple_of(block) && level == simd::Level::Avx512 {
            for (row_idx, y) in (first_row..).zip(y) {
                let codes = &packed.codes[row_idx * n_cols / 2..];
                let scales = &packed.scales[row_idx * n_cols / block..];
                let row = NibbleRow { codes, table: &TABLE, scales, zeros: &[], block };
                *y = simd::dot_nibbles(level, row, x).unwrap_or(f32::NAN);
            }
        } else {
            dot_rows(level, n_cols, first_row, x, y, |at, out| decode(level, packed, at, out));
        }
    }

    fn stored_bytes(&self, packed: &Packed) -> u64 {
        let scales = match &packed.nested {
            None => 4 * packed.scales.len(),
            Some(nested) => nested.codes.len() + 4 * nested.absmax.len() + 4,
        };
        (packed.codes.len() + scales) as u64
    }
}

fn block_size(spec: &SchemeSpec) -> usize {
    spec.block_size.unwrap_or(64)
}

fn code(scaled: f32) -> u8 {
    THRESHOLDS.iter().map(|threshold| u8::from(*threshold < scaled)).sum()
}

/// Decodes values of the flattened matrix from index `at` on.
fn decode(level: simd::Level, packed: &Packed, at: usize, out: &mut [f32]) {
    let block_size = block_size(&packed.spec);
    let (mut at, mut rest) = (at, out);
    while !rest.is_empty() {
        let block_end = (at / block_size + 1) * block_size;
        let n = rest.len().min(block_end - at);
        let (segment, after) = rest.split_at_mut(n);
        let scale = packed.scales[at / block_size];
        let odd = at % 2;
        if odd == 1 {
            segment[0] = TABLE[usize::from(packed.codes[at / 2] & 15)] * scale;
        }
        let codes = &packed.codes[at.div_ceil(2)..];
        simd::decode_nibbles(level, codes, &TABLE, scale, &mut segment[odd..]);
        at += n;
        rest = after;
    }
}

/// Quantizes block scales a second time.
pub fn nest(absmax: &[f32]) -> Nested {
    let mean = absmax.iter().map(|value| f64::from(*value)).sum::<f64>() / absmax.len().max(1) as f64;
    let offset = mean as f32;
    let mut nested = Nested { codes: Vec::with_capacity(absmax.len()), absmax: Vec::new(), offset };
    for block in absmax.chunks(NESTED_BLOCK) {
        let block_absmax = block.iter().fold(0.0f32, |max, value| max.max((value - offset).abs()));
        let scale = 1.0 / block_absmax;
        nested.codes.extend(block.iter().map(|value| nearest((value - offset) * scale)));
        nested.absmax.push(block_absmax);
    }
    nested
}

/// Returns the block scales that double quantization keeps.
pub fn decode_nested(nested: &Nested) -> Vec<f32> {
    let map = dynamic_map();
    let decode = |(i, code): (usize, &u8)| map[usize::from(*code)] * nested.absmax[i / NESTED_BLOCK] + nested.offset;
    nested.codes.iter().enumerate().map(decode).collect()
}
