//! Products of 4-bit codes with a vector, 64 values (a strip) at a time: the vector is brought into the order in which shifts
//! uncover a strip's codes, once for many rows, so that no row unpacks its codes first.

use crate::simd::Level;
use std::cell::RefCell;

/// Values a strip: 16 lanes of four codes.
pub const STRIP: usize = 64;

/// Rows that share the loads of the vector.
const ROWS: usize = 4;

thread_local! {
    /// A vector in code order: kept, so that a product does not allocate.
    static STRIPS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// How far ahead of the codes in use the next ones are asked for.
#[cfg(target_arch = "x86_64")]
const PREFETCH_BYTES: usize = 4096;

/// Consecutive rows of packed 4-bit codes with one scale a block of the flattened matrix.
#[derive(Debug, Clone, Copy)]
pub struct StripRows<'a> {
    /// Two codes a byte, the even index in the high nibble; the first row's codes come first.
    pub codes: &'a [u8],
    pub table: &'a [f32; 16],
    /// One a block of the whole matrix.
    pub scales: &'a [f32],
    /// Index of the first row's first value in the flattened matrix; a multiple of [`STRIP`].
    pub start: usize,
    /// Values a block: [`STRIP`] times a power of two.
    pub block: usize,
}

/// Writes `y[i] = Σ_k table[code]·scale·x[k]` for consecutive rows and returns true; false where this processor or this shape has
/// no such path.
///
/// # Shapes
/// `x` `[n_cols]`, `rows` `[y.len(), n_cols]`.
pub fn matvec(level: Level, rows: StripRows<'_>, x: &[f32], y: &mut [f32]) -> bool {
    let fits = x.len().is_multiple_of(STRIP)
        && rows.start.is_multiple_of(STRIP)
        && rows.block.is_multiple_of(STRIP)
        && (rows.block / STRIP).is_power_of_two();
    if level != Level::Avx512 || !fits || x.is_empty() {
        return false;
    }
    let n_values = y.len() * x.len();
    assert!(rows.codes.len() * 2 >= n_values, "strips: too few codes");
    assert!(rows.scales.len() >= (rows.start + n_values).div_ceil(rows.block), "strips: too few scales");
    #[cfg(target_arch = "x86_64")]
    {
        STRIPS.with_borrow_mut(|strips| {
            strips.resize(x.len(), 0.0);
            in_code_order(x, strips);
            // SAFETY: the level was checked, and so were all lengths and multiples.
            unsafe { x86::matvec(rows, strips, y) };
        });
    }
    true
}

/// Writes x in the order in which codes are met. Of two strips as 32-bit words, the lowest bits from each byte on have the codes of
/// values 1, 0, 3, 2, 5, 4, 7, 6; a last single strip goes by 16-bit words.
#[cfg(target_arch = "x86_64")]
fn in_code_order(x: &[f32], out: &mut [f32]) {
    let (pairs, last) = x.as_chunks::<{ 2 * STRIP }>();
    let (out_pairs, out_last) = out.as_chunks_mut::<{ 2 * STRIP }>();
    for (x, out) in pairs.iter().zip(out_pairs) {
        for code in 0..8 {
            for lane in 0..16 {
                out[16 * code + lane] = x[8 * lane + (code ^ 1)];
            }
        }
    }
    for (x, out) in last.as_chunks::<STRIP>().0.iter().zip(out_last.as_chunks_mut::<STRIP>().0) {
        for code in 0..4 {
            for lane in 0..16 {
                out[16 * code + lane] = x[4 * lane + (code ^ 1)];
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{PREFETCH_BYTES, ROWS, STRIP, StripRows};
    use std::arch::x86_64::*;

    /// Multiplies rows with `x`, which lies in code order.
    ///
    /// # Safety
    /// The processor has avx512f; `x.len()` is a multiple of [`STRIP`]; there is a nibble for every value of every row and a scale
    /// for every block.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
    pub unsafe fn matvec(rows: StripRows<'_>, x: &[f32], y: &mut [f32]) {
        let n_cols = x.len();
        for ahead in (0..PREFETCH_BYTES.min(rows.codes.len())).step_by(64) {
            _mm_prefetch::<_MM_HINT_T0>(rows.codes.as_ptr().wrapping_add(ahead).cast());
        }
        let block_shift = (rows.block / STRIP).trailing_zeros();
        let (groups, rest) = y.as_chunks_mut::<ROWS>();
        let n_grouped = groups.len() * ROWS;
        // SAFETY: rows below `y.len()` are passed, for which the caller vouches; the last rows' loads stay inside the codes.
        unsafe {
            for (group_idx, y) in groups.iter_mut().enumerate() {
                let at = group_idx * ROWS * n_cols;
                let end = (at + ROWS * n_cols) / 2;
                *y = if end + 3 <= rows.codes.len() {
                    dot_rows::<ROWS, true>(rows, at, block_shift, x)
                } else {
                    dot_rows::<ROWS, false>(rows, at, block_shift, x)
                };
            }
            for (row_idx, y) in rest.iter_mut().enumerate() {
                [*y] = dot_rows::<1, false>(rows, (n_grouped + row_idx) * n_cols, block_shift, x);
            }
        }
    }

    /// Multiplies `N` rows, the first of which begins at value `at` of the codes. Where `BEYOND`, loads may reach 3 bytes beyond the
    /// last row: a load from the next byte on is a shift less.
    ///
    /// # Safety
    /// As [`matvec`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
    unsafe fn dot_rows<const N: usize, const BEYOND: bool>(
        rows: StripRows<'_>,
        at: usize,
        block_shift: u32,
        x: &[f32],
    ) -> [f32; N] {
        let n_strips = x.len() / STRIP;
        // SAFETY: every load stays inside what the caller vouches for; the table has 16 entries.
        unsafe {
            let table = _mm512_loadu_ps(rows.table.as_ptr());
            // A permutation reads the lowest four bits of each index alone: what lies above needs no mask.
            let values = |index| _mm512_permutexvar_ps(index, table);
            let codes: [*const u8; N] = std::array::from_fn(|row| rows.codes.as_ptr().add((at + row * x.len()) / 2));
            let strips: [usize; N] = std::array::from_fn(|row| (rows.start + at + row * x.len()) / STRIP);
            let scale = |strip: usize| _mm512_set1_ps(*rows.scales.get_unchecked(strip >> block_shift));
            let mut sums = [_mm512_setzero_ps(); N];
            for strip in (0..n_strips / 2 * 2).step_by(2) {
                // Rows lie one behind the other: what the processor's own prefetching takes for several streams is one.
                for line in 0..N {
                    let ahead = (at + strip * N * STRIP) / 2 + PREFETCH_BYTES + 64 * line;
                    _mm_prefetch::<_MM_HINT_T0>(rows.codes.as_ptr().wrapping_add(ahead).cast());
                }
                let x: [__m512; 8] = std::array::from_fn(|i| _mm512_loadu_ps(x.as_ptr().add(strip * STRIP + 16 * i)));
                for row in 0..N {
                    let at = codes[row].add(strip * STRIP / 2);
                    let word = _mm512_loadu_si512(at.cast());
                    let bytes = if BEYOND {
                        [1, 2, 3].map(|byte| _mm512_loadu_si512(at.add(byte).cast()))
                    } else {
                        [_mm512_srli_epi32::<8>(word), _mm512_srli_epi32::<16>(word), _mm512_srli_epi32::<24>(word)]
                    };
                    let mut sum = _mm512_mul_ps(values(word), x[0]);
                    sum = _mm512_fmadd_ps(values(_mm512_srli_epi32::<4>(word)), x[1], sum);
                    for (byte, word) in bytes.into_iter().enumerate() {
                        sum = _mm512_fmadd_ps(values(word), x[2 * byte + 2], sum);
                        sum = _mm512_fmadd_ps(values(_mm512_srli_epi32::<4>(word)), x[2 * byte + 3], sum);
                    }
                    // The first eight lanes have values of the first strip, the others of the second.
                    let first = strips[row] + strip;
                    let scales = _mm512_mask_blend_ps(0xff00, scale(first), scale(first + 1));
                    sums[row] = _mm512_fmadd_ps(sum, scales, sums[row]);
                }
            }
            if n_strips % 2 == 1 {
                let strip = n_strips - 1;
                let x: [__m512; 4] = std::array::from_fn(|i| _mm512_loadu_ps(x.as_ptr().add(strip * STRIP + 16 * i)));
                for row in 0..N {
                    let index = _mm512_cvtepu16_epi32(_mm256_loadu_si256(codes[row].add(strip * STRIP / 2).cast()));
                    let sum = _mm512_mul_ps(values(index), x[0]);
                    let sum = _mm512_fmadd_ps(values(_mm512_srli_epi32::<4>(index)), x[1], sum);
                    let sum = _mm512_fmadd_ps(values(_mm512_srli_epi32::<8>(index)), x[2], sum);
                    let sum = _mm512_fmadd_ps(values(_mm512_srli_epi32::<12>(index)), x[3], sum);
                    sums[row] = _mm512_fmadd_ps(sum, scale(strips[row] + strip), sums[row]);
                }
            }
            sums.map(|sum| _mm512_reduce_add_ps(sum))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::level;

    #[test]
    fn strips_give_the_products_of_decoded_values() {
        let table: [f32; 16] = std::array::from_fn(|i| (i as f32 - 7.3) * 0.13);
        for (n_rows, n_cols, first_row, block) in
            [(1, 64, 0usize, 64usize), (7, 576, 3, 64), (9, 192, 1, 256), (4, 4096, 2, 4096), (5, 128, 5, 1024)]
        {
            let start = first_row * n_cols;
            let n_values = n_rows * n_cols;
            let codes: Vec<u8> = (0..n_values / 2).map(|i| (i * 91 + i / 7) as u8).collect();
            let scales: Vec<f32> = (0..(start + n_values).div_ceil(block)).map(|i| 0.5 + (i % 5) as f32).collect();
            let x: Vec<f32> = (0..n_cols).map(|i| (i as f32 * 0.7).sin()).collect();
            let mut y = vec![f32::NAN; n_rows];
            let rows = StripRows { codes: &codes, table: &table, scales: &scales, start, block };
            if !matvec(level(), rows, &x, &mut y) {
                continue;
            }
            for (row, y) in y.iter().enumerate() {
                let value = |k: usize| {
                    let at = row * n_cols + k;
                    let code = if at.is_multiple_of(2) { codes[at / 2] >> 4 } else { codes[at / 2] & 15 };
                    f64::from(table[usize::from(code)]) * f64::from(scales[(start + at) / block])
                };
                let exact: f64 = (0..n_cols).map(|k| value(k) * f64::from(x[k])).sum();
                let size: f64 = (0..n_cols).map(|k| (value(k) * f64::from(x[k])).abs()).sum();
                assert!((f64::from(*y) - exact).abs() <= size * 1e-6, "{n_rows}x{n_cols} row {row}: {y} {exact}");
            }
        }
    }

    #[test]
    fn shapes_without_strips_are_left_to_others() {
        let table = [0.0f32; 16];
        let rows = StripRows { codes: &[0; 96], table: &table, scales: &[1.0; 4], start: 0, block: 64 };
        assert!(!matvec(level(), rows, &[1.0; 96], &mut [0.0; 2]));
        assert!(!matvec(level(), StripRows { block: 192, ..rows }, &[1.0; 64], &mut [0.0; 2]));
        assert!(!matvec(Level::Portable, rows, &[1.0; 64], &mut [0.0; 2]));
    }
}
