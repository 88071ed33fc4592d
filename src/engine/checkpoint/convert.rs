//! Conversions between stored element types; all go through f32, rounded to nearest even.

use crate::units::DType;
use half::{bf16, f16};
use labpipe_kernels::dense::DenseType;
use labpipe_kernels::weight::SharedBytes;
use rayon::prelude::*;
use std::io;

/// Values a thread takes at a time.
const CHUNK: usize = 1 << 16;

/// Returns the kernels' name for an element type.
pub fn dense_type(dtype: DType) -> DenseType {
    match dtype {
        DType::F32 => DenseType::F32,
        DType::F16 => DenseType::F16,
        DType::Bf16 => DenseType::Bf16,
    }
}

/// Reads little-endian values of any alignment as f32.
pub fn to_f32(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0f32; bytes.len() / dtype.size_bytes()];
    values
        .par_chunks_mut(CHUNK)
        .zip(bytes.par_chunks(CHUNK * dtype.size_bytes()))
        .for_each(|(values, bytes)| fill_f32(dtype, bytes, values));
    values
}

fn fill_f32(dtype: DType, bytes: &[u8], values: &mut [f32]) {
    match dtype {
        DType::F32 => {
            for (value, raw) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*raw);
            }
        }
        DType::F16 => {
            for (value, raw) in values.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = f16::from_le_bytes(*raw).to_f32();
            }
        }
        DType::Bf16 => {
            for (value, raw) in values.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = bf16::from_le_bytes(*raw).to_f32();
            }
        }
    }
}

/// Stores f32 values in another element type.
pub fn to_dtype(values: &[f32], dtype: DType) -> SharedBytes {
    match dtype {
        DType::F32 => SharedBytes::from_values(values.to_vec()),
        DType::F16 => {
            SharedBytes::from_values(values.par_iter().map(|&v| f16::from_f32(v).to_bits()).collect::<Vec<u16>>())
        }
        DType::Bf16 => {
            SharedBytes::from_values(values.par_iter().map(|&v| bf16::from_f32(v).to_bits()).collect::<Vec<u16>>())
        }
    }
}

/// Returns the first value that is NaN or infinite, with its index.
pub fn first_not_finite(dtype: DType, bytes: &[u8]) -> Option<(usize, f32)> {
    let chunks = bytes.par_chunks(CHUNK * dtype.size_bytes()).enumerate();
    chunks
        .map(|(chunk_idx, chunk)| found_at(chunk_idx, first_beyond(dtype, dtype, chunk)))
        .find_first(Option::is_some)?
}

/// As [`first_not_finite`], of values that are read a chunk a thread: a file's pages are not mapped for it.
///
/// # Errors
/// Why the bytes before the first such value could not be read.
pub fn read_first_not_finite(dtype: DType, bytes: &SharedBytes) -> io::Result<Option<(usize, f32)>> {
    Ok(read_narrowed(dtype, dtype, bytes)?.beyond)
}

/// What becomes of values in a narrower type.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Narrowed {
    /// The first value that is not finite in it, with its index.
    pub beyond: Option<(usize, f32)>,
    /// Values other than 0 that become 0; not all are counted where one is not finite.
    pub n_zeroed: u64,
}

/// Reads values chunk by chunk, as [`read_first_not_finite`] does, and looks at what each becomes in `base`.
///
/// # Errors
/// Why the bytes before the first value that is not finite could not be read.
pub fn read_narrowed(stored: DType, base: DType, bytes: &SharedBytes) -> io::Result<Narrowed> {
    let chunk_bytes = CHUNK * stored.size_bytes();
    let look = |buffer: &mut Vec<u8>, chunk_idx: usize| {
        let first = chunk_idx * chunk_bytes;
        buffer.resize(chunk_bytes.min(bytes.len() - first), 0);
        bytes.read_into(first, buffer)?;
        let beyond = found_at(chunk_idx, first_beyond(stored, base, buffer));
        Ok(Narrowed { beyond, n_zeroed: n_zeroed(stored, base, buffer) })
    };
    if bytes.is_empty() {
        return Ok(Narrowed::default());
    }
    let n_chunks = bytes.len().div_ceil(chunk_bytes);
    if n_chunks == 1 {
        return look(&mut Vec::new(), 0);
    }
    let looked = (0..n_chunks).into_par_iter().map_init(Vec::new, look);
    let add = |a: io::Result<Narrowed>, b: io::Result<Narrowed>| match (a, b) {
        (Ok(a), Ok(b)) => Ok(Narrowed { beyond: a.beyond.or(b.beyond), n_zeroed: a.n_zeroed + b.n_zeroed }),
        // What was found before the failure, or the failure.
        (Ok(a), Err(_)) if a.beyond.is_some() => Ok(a),
        (Ok(_), Err(error)) | (Err(error), _) => Err(error),
    };
    looked.reduce(|| Ok(Narrowed::default()), add)
}

/// Counts values other than 0 that become 0 in `base`. One thread reads all bytes.
fn n_zeroed(stored: DType, base: DType, bytes: &[u8]) -> u64 {
    // The largest magnitude, as bits, that rounds to 0: half of the smallest subnormal, a tie that goes to the even 0.
    let limit = match (stored, base) {
        (DType::F32, DType::F16) => 0x3300_0000,
        (DType::Bf16, DType::F16) => 0x3300,
        (DType::F32, DType::Bf16) => 0x8000,
        _ => return 0,
    };
    let is_zeroed = |magnitude: u32| u32::from(magnitude > 0 && magnitude <= limit);
    let n: u32 = match stored {
        DType::F32 => {
            let words = bytes.as_chunks::<4>().0.iter();
            words.map(|raw| is_zeroed(u32::from_le_bytes(*raw) & 0x7fff_ffff)).sum()
        }
        DType::F16 | DType::Bf16 => {
            let halves = bytes.as_chunks::<2>().0.iter();
            halves.map(|raw| is_zeroed(u32::from(u16::from_le_bytes(*raw) & 0x7fff))).sum()
        }
    };
    u64::from(n)
}

fn found_at(chunk_idx: usize, found: Option<(usize, f32)>) -> Option<(usize, f32)> {
    found.map(|(index, value)| (chunk_idx * CHUNK + index, value))
}

/// Returns the first value that is not finite in `base`: NaN, infinite, or beyond that type's range. One thread reads all bytes.
pub fn first_beyond(stored: DType, base: DType, bytes: &[u8]) -> Option<(usize, f32)> {
    // The smallest magnitude, as bits, that rounds to infinity.
    let limit = match (stored, base) {
        (DType::F32, DType::F32) => 0x7f80_0000,
        (DType::F32, DType::Bf16) => 0x7f7f_8000,
        (DType::F32, DType::F16) => 0x477f_f000,
        (DType::F16, _) => 0x7c00,
        (DType::Bf16, DType::F16) => 0x4780,
        (DType::Bf16, _) => 0x7f80,
    };
    let word = |raw: &[u8; 4]| i32::from_le_bytes(*raw) & 0x7fff_ffff;
    let half = |raw: &[u8; 2]| i16::from_le_bytes(*raw) & 0x7fff;
    // Signed maxima without an early exit vectorize on any x86-64.
    let largest = match stored {
        DType::F32 => bytes.as_chunks::<4>().0.iter().fold(0, |max, raw| max.max(word(raw))),
        DType::F16 | DType::Bf16 => {
            i32::from(bytes.as_chunks::<2>().0.iter().fold(0, |max: i16, raw| max.max(half(raw))))
        }
    };
    if largest < limit {
        return None;
    }
    let index = match stored {
        DType::F32 => bytes.as_chunks::<4>().0.iter().position(|raw| word(raw) >= limit)?,
        DType::F16 | DType::Bf16 => bytes.as_chunks::<2>().0.iter().position(|raw| i32::from(half(raw)) >= limit)?,
    };
    let size = stored.size_bytes();
    let mut value = [0.0f32];
    fill_f32(stored, &bytes[index * size..(index + 1) * size], &mut value);
    Some((index, value[0]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_beyond_a_type_where_its_conversion_is_infinite() {
        for stored in DType::ALL {
            for base in DType::ALL {
                for edge in [65_504.0f32, 65_519.996, 65_520.0, 65_536.0, 3.389e38, 3.3961e38, f32::MAX, f32::NAN] {
                    for value in [edge, -edge] {
                        let bytes = to_dtype(&[1.0, value], stored);
                        let exact = to_f32(stored, bytes.as_slice());
                        let rounded = to_f32(base, to_dtype(&exact, base).as_slice());
                        let want = rounded.iter().position(|value| !value.is_finite());
                        let found = first_beyond(stored, base, bytes.as_slice());
                        assert_eq!(found.map(|(index, _)| index), want, "{value} in {stored} as {base}");
                        assert!(found.is_none_or(|(_, value)| value.to_bits() == exact[1].to_bits()));
                    }
                }
            }
        }
    }

    #[test]
    fn values_that_become_zero_are_those_whose_conversion_is_zero() {
        for stored in DType::ALL {
            for base in DType::ALL {
                let exponents = [-149, -134, -133, -126, -26, -25, -24, -14, 0];
                let near = exponents.map(|exponent| 2.0f64.powi(exponent) as f32);
                let near = near.into_iter().flat_map(|edge| [edge.next_down(), edge, edge.next_up(), -edge]);
                let bytes = to_dtype(&near.chain([0.0, -0.0]).collect::<Vec<f32>>(), stored);
                let exact = to_f32(stored, bytes.as_slice());
                let rounded = to_f32(base, to_dtype(&exact, base).as_slice());
                let want = exact.iter().zip(&rounded).filter(|(a, b)| **a != 0.0 && **b == 0.0).count() as u64;
                let found = read_narrowed(stored, base, &bytes).expect("bytes in memory");
                assert_eq!(found, Narrowed { beyond: None, n_zeroed: want }, "{stored} as {base}");
            }
        }
        let many = to_dtype(&vec![1e-9f32; 3 * CHUNK + 5], DType::F32);
        let found = read_narrowed(DType::F32, DType::F16, &many).expect("bytes in memory");
        assert_eq!(found.n_zeroed, 3 * CHUNK as u64 + 5);
    }

    #[test]
    fn the_first_value_that_is_not_finite_is_found_in_every_type() {
        for dtype in DType::ALL {
            let mut values = vec![1.0f32; 200_000];
            assert_eq!(first_not_finite(dtype, to_dtype(&values, dtype).as_slice()), None);
            values[170_001] = f32::INFINITY;
            values[170_005] = f32::NAN;
            let bytes = to_dtype(&values, dtype);
            let found = Some((170_001, f32::INFINITY));
            assert_eq!(first_not_finite(dtype, bytes.as_slice()), found, "{dtype}");
            assert_eq!(read_first_not_finite(dtype, &bytes).expect("bytes in memory"), found, "{dtype}");
        }
    }

    #[test]
    fn values_round_trip_through_half_precision() {
        let values = vec![0.0, -1.5, 65504.0, 6e-8];
        let bytes = to_dtype(&values, DType::F16);
        let back = to_f32(DType::F16, bytes.as_slice());
        assert_eq!(&back[..3], &values[..3]);
        assert!((back[3] - 5.96e-8).abs() < 1e-10);
    }
}
