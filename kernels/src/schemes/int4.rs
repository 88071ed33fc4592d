//! INT4: 4-bit codes with an fp16 scale a group along the input dimension, and a zero point a group unless symmetric.

use super::grouped::{self, Layout};
use super::{Packed, Scheme, SchemeError, SchemeSpec, check_values, refuse_all_but};
use half::f16;

/// The zero point of the symmetric variant.
const SYMMETRIC_ZERO: u8 = 8;

/// The codes' own values.
const CODES: [f32; 16] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];

/// The scheme.
pub struct Int4;

impl Scheme for Int4 {
    fn name(&self) -> &'static str {
        "int4"
    }

    fn version(&self) -> u32 {
        2
    }

    fn summary(&self) -> &'static str {
        "4-bit codes, an fp16 scale and a 4-bit zero point a group of a row (no zero point with symmetric)"
    }

    fn normalize(&self, spec: &SchemeSpec) -> Result<SchemeSpec, SchemeError> {
        refuse_all_but(&["symmetric"], "int4", spec)?;
        let group = spec.block_size.unwrap_or(128);
        if group < 8 || !group.is_multiple_of(8) {
            return Err(SchemeError::BlockSize { scheme: "int4", found: group, expected: "a multiple of 8" });
        }
        Ok(SchemeSpec { block_size: Some(group), ..spec.clone() })
    }

    fn pack(&self, spec: &SchemeSpec, values: &[f32], n_rows: usize, n_cols: usize) -> Result<Packed, SchemeError> {
        let spec = self.normalize(spec)?;
        check_values(values, n_rows, n_cols)?;
        let symmetric = spec.symmetric;
        let group_size = group_size(&spec);
        Ok(grouped::pack(spec, group_size, values, n_rows, n_cols, |group, codes| {
            let (scale, zero) = group_scale(group, symmetric);
            for (code, value) in codes.iter_mut().zip(group) {
                *code = (value / scale + f32::from(zero)).round_ties_even().clamp(0.0, 15.0) as u8;
            }
            (scale, zero)
        }))
    }

    fn unpack_rows(&self, packed: &Packed, first_row: usize, out: &mut [f32]) {
        grouped::unpack_rows(&layout(packed), packed, &CODES, first_row, out);
    }

    fn matvec_rows(&self, packed: &Packed, first_row: usize, x: &[f32], y: &mut [f32]) {
        grouped::matvec_rows(&layout(packed), packed, &CODES, first_row, x, y);
    }

    fn stored_bytes(&self, packed: &Packed) -> u64 {
        let zeros = if packed.spec.symmetric { 0 } else { packed.zeros.len().div_ceil(2) };
        (packed.codes.len() + 2 * packed.scales.len() + zeros) as u64
    }
}

fn group_size(spec: &SchemeSpec) -> usize {
    spec.block_size.unwrap_or(128)
}

fn layout(packed: &Packed) -> Layout {
    Layout::new(group_size(&packed.spec), packed.n_cols)
}

/// Returns a group's scale (a finite value of fp16, above 0) and zero point.
fn group_scale(group: &[f32], symmetric: bool) -> (f32, u8) {
    // 1e-5/15 is a subnormal number of fp16; a range beyond fp16's saturates instead of decoding to NaN.
    let round = |scale: f32| f16::from_f32(scale).min(f16::MAX).to_f32();
    if symmetric {
        let absmax = group.iter().fold(0.0f32, |max, value| max.max(value.abs()));
        return (round(absmax.max(1e-5) / 7.0), SYMMETRIC_ZERO);
    }
    let (min, max) = group.iter().fold((f32::MAX, f32::MIN), |(min, max), value| (min.min(*value), max.max(*value)));
    let scale = round((max - min).max(1e-5) / 15.0);
    (scale, (-min / scale).round_ties_even().clamp(0.0, 15.0) as u8)
}
