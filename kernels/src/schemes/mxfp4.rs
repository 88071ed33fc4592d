//! MXFP4: E2M1 codes, and a power of two for each 32 of them (Open Compute Project, "Microscaling Formats (MX) Specification"
//! v1.0, sections 5.3.3, 5.4.1 and 6.3).

use super::grouped::{self, Layout};
use super::{Packed, Scheme, SchemeError, SchemeSpec, check_values, refuse_all_but};

/// Values that share a scale.
const GROUP: usize = 32;

/// Values of the 16 codes: a sign, two bits of exponent, one of mantissa.
pub const TABLE: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Halfway between neighbouring magnitudes; a value on one goes to the even code.
const MIDPOINTS: [f32; 7] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0];

/// The largest exponent of E2M1: 6 is 1.5·2².
const MAX_EXPONENT: i32 = 2;

/// The scheme.
pub struct Mxfp4;

impl Scheme for Mxfp4 {
    fn name(&self) -> &'static str {
        "mxfp4"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "4-bit E2M1 codes, an 8-bit power of two for each 32 values of a row"
    }

    fn normalize(&self, spec: &SchemeSpec) -> Result<SchemeSpec, SchemeError> {
        refuse_all_but(&[], "mxfp4", spec)?;
        match spec.block_size {
            None | Some(GROUP) => Ok(SchemeSpec { block_size: Some(GROUP), ..spec.clone() }),
            Some(found) => {
                Err(SchemeError::BlockSize { scheme: "mxfp4", found, expected: "32, which the format fixes" })
            }
        }
    }

    fn pack(&self, spec: &SchemeSpec, values: &[f32], n_rows: usize, n_cols: usize) -> Result<Packed, SchemeError> {
        let spec = self.normalize(spec)?;
        check_values(values, n_rows, n_cols)?;
        let packed = grouped::pack(spec, GROUP, values, n_rows, n_cols, |group, codes| {
            let exponent = shared_exponent(group);
            // Exact: exponents are −127 to 125, so that the reciprocal is a normal number.
            let reciprocal = f32::from_bits(((127 - exponent) as u32) << 23);
            for (code, value) in codes.iter_mut().zip(group) {
                *code = e2m1(value * reciprocal);
            }
            (1.0 / reciprocal, 0)
        });
        Ok(Packed { zeros: Vec::new(), ..packed })
    }

    fn unpack_rows(&self, packed: &Packed, first_row: usize, out: &mut [f32]) {
        grouped::unpack_rows(&Layout::new(GROUP, packed.n_cols), packed, &TABLE, first_row, out);
    }

    fn matvec_rows(&self, packed: &Packed, first_row: usize, x: &[f32], y: &mut [f32]) {
        grouped::matvec_rows(&Layout::new(GROUP, packed.n_cols), packed, &TABLE, first_row, x, y);
    }

    fn stored_bytes(&self, packed: &Packed) -> u64 {
        // A scale is one byte: its exponent plus 127 (E8M0).
        (packed.codes.len() + packed.scales.len()) as u64
    }
}

/// Returns ⌊log2 of the largest magnitude⌋ less E2M1's largest exponent, within E8M0's range; its smallest for zeros.
fn shared_exponent(group: &[f32]) -> i32 {
    let absmax = group.iter().fold(0.0f32, |max, value| max.max(value.abs()));
    // The exponent field; subnormals have 0 there, which lies below the range either way.
    let floor_log2 = (absmax.to_bits() >> 23) as i32 - 127;
    (floor_log2 - MAX_EXPONENT).max(-127)
}

/// Rounds to the nearest code, ties to the even one; what is beyond 6 saturates.
fn e2m1(value: f32) -> u8 {
    let passed = |(code, midpoint): (usize, &f32)| {
        let is_up = if code % 2 == 1 { value.abs() >= *midpoint } else { value.abs() > *midpoint };
        u8::from(is_up)
    };
    let magnitude: u8 = MIDPOINTS.iter().enumerate().map(passed).sum();
    magnitude | if value.is_sign_negative() { 8 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pack(values: &[f32]) -> Packed {
        Mxfp4.pack(&SchemeSpec::new("mxfp4"), values, 1, values.len()).expect("a packed matrix")
    }

    #[test]
    fn ties_go_to_the_even_code_and_what_is_beyond_six_saturates() {
        let ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.9, -0.25, -0.0];
        let expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -0.0, -0.0];
        for (value, expected) in ties.iter().zip(expected) {
            let found = TABLE[usize::from(e2m1(*value))];
            assert_eq!(found.to_bits(), f32::to_bits(expected), "{value}: {found}");
        }
    }

    #[test]
    fn scales_are_powers_of_two_over_the_whole_range_of_f32() {
        for (value, exponent) in [(1.0f32, -2), (1.99, -2), (2.0, -1), (f32::MAX, 125), (f32::MIN_POSITIVE, -127)] {
            let packed = pack(&[value, 0.0]);
            assert_eq!(f64::from(packed.scales[0]), 2.0f64.powi(exponent), "{value}");
            let mut out = [f32::NAN; 2];
            Mxfp4.unpack_rows(&packed, 0, &mut out);
            assert!((out[0] / value - 1.0).abs() <= 0.25 && out[1] == 0.0, "{value}: {out:?}");
        }
        assert_eq!(Mxfp4.stored_bytes(&pack(&[0.0; 40])), 20 + 2);
    }
}
