//! Blockwise 4-bit codebooks as bitsandbytes 0.50 packs them: codes of a table of 16 values, one absmax a block of the
//! flattened matrix, and the block scales quantized a second time with `double_quant`. NF4 and FP4 are two tables.

use super::dynamic_map::{dynamic_map, nearest};
use super::{Nested, Packed, Scheme, SchemeError, SchemeSpec, check_values, refuse_all_but};
use crate::dense::dot_rows;
use crate::simd::{self, Level, NibbleRow};
use crate::strips::{self, StripRows};
use rayon::prelude::*;

/// Block scales that share one second-level scale.
pub const NESTED_BLOCK: usize = 256;
const BLOCK_SIZES: [usize; 7] = [64, 128, 256, 512, 1024, 2048, 4096];

/// A scheme that stores each value as a code of a table, relative to its block's absmax.
pub struct Codebook {
    pub name: &'static str,
    pub version: u32,
    pub summary: &'static str,
    /// Values of the 16 codes, in −1..=1.
    pub table: [f32; 16],
    /// Returns the code of a value divided by its block's absmax. NaN, which a block of zeros gives, is code 0.
    pub code: fn(f32) -> u8,
}

impl Scheme for Codebook {
    fn name(&self) -> &'static str {
        self.name
    }

    fn version(&self) -> u32 {
        self.version
    }

    fn summary(&self) -> &'static str {
        self.summary
    }

    fn normalize(&self, spec: &SchemeSpec) -> Result<SchemeSpec, SchemeError> {
        refuse_all_but(&["double_quant"], self.name, spec)?;
        let block_size = spec.block_size.unwrap_or(64);
        if !BLOCK_SIZES.contains(&block_size) {
            let expected = "64, 128, 256, 512, 1024, 2048 or 4096";
            return Err(SchemeError::BlockSize { scheme: self.name, found: block_size, expected });
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
        let padding = (self.code)(0.0);
        let mut codes = vec![0u8; values.len().div_ceil(2)];
        // Block sizes are even, so that a block's codes are whole bytes.
        codes.par_chunks_mut(block_size / 2).zip(values.par_chunks(block_size)).zip(&absmax).for_each(
            |((codes, block), absmax)| {
                let scale = 1.0 / absmax;
                for (byte, pair) in codes.iter_mut().zip(block.chunks(2)) {
                    let low = pair.get(1).map_or(padding, |value| (self.code)(value * scale));
                    *byte = (self.code)(pair[0] * scale) << 4 | low;
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
        self.decode(simd::level(), packed, first_row * packed.n_cols, out);
    }

    fn matvec_rows(&self, packed: &Packed, first_row: usize, x: &[f32], y: &mut [f32]) {
        let level = simd::level();
        let n_cols = packed.n_cols;
        let start = first_row * n_cols;
        let (codes, scales) = (packed.codes.get(start / 2..).unwrap_or_default(), packed.scales.as_slice());
        let rows = StripRows { codes, table: &self.table, scales, start, block: block_size(&packed.spec) };
        if strips::matvec(level, rows, x, y) {
            return;
        }
        if n_cols.is_multiple_of(32) && level == Level::Avx512 {
            for (row_idx, y) in (first_row..).zip(y) {
                *y = self.dot_row(level, packed, row_idx, x);
            }
        } else {
            dot_rows(level, n_cols, first_row, x, y, |at, out| self.decode(level, packed, at, out));
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

impl Codebook {
    /// Multiplies one row straight from its codes; its length is a multiple of 32, and so are block sizes. A row that begins
    /// within a block is cut where the block ends.
    fn dot_row(&self, level: Level, packed: &Packed, row_idx: usize, x: &[f32]) -> f32 {
        let block = block_size(&packed.spec);
        let start = row_idx * packed.n_cols;
        let dot = |at: usize, x: &[f32]| {
            let (codes, scales) = (&packed.codes[at / 2..], &packed.scales[at / block..]);
            let row = NibbleRow { codes, table: &self.table, scales, zeros: &[], block };
            simd::dot_nibbles(level, row, x).unwrap_or(f32::NAN)
        };
        let head = (start.next_multiple_of(block) - start).min(x.len());
        let (first, rest) = x.split_at(head);
        let first = if first.is_empty() { 0.0 } else { dot(start, first) };
        if rest.is_empty() { first } else { first + dot(start + head, rest) }
    }

    /// Decodes values of the flattened matrix from index `at` on.
    fn decode(&self, level: Level, packed: &Packed, at: usize, out: &mut [f32]) {
        let block_size = block_size(&packed.spec);
        let (mut at, mut rest) = (at, out);
        while !rest.is_empty() {
            let block_end = (at / block_size + 1) * block_size;
            let n = rest.len().min(block_end - at);
            let (segment, after) = rest.split_at_mut(n);
            let scale = packed.scales[at / block_size];
            let odd = at % 2;
            if odd == 1 {
                segment[0] = self.table[usize::from(packed.codes[at / 2] & 15)] * scale;
            }
            let codes = &packed.codes[at.div_ceil(2)..];
            simd::decode_nibbles(level, codes, &self.table, scale, &mut segment[odd..]);
            at += n;
            rest = after;
        }
    }
}

fn block_size(spec: &SchemeSpec) -> usize {
    spec.block_size.unwrap_or(64)
}

/// Returns what second-level scales are relative to: the mean of all block scales.
pub fn nested_offset(absmax: impl ExactSizeIterator<Item = f32>) -> f32 {
    let n = absmax.len().max(1);
    (absmax.map(f64::from).sum::<f64>() / n as f64) as f32
}

/// Quantizes block scales a second time.
pub fn nest(absmax: &[f32]) -> Nested {
    let offset = nested_offset(absmax.iter().copied());
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
