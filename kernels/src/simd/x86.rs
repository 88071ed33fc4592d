//! The inner loops in the instructions of x86-64.

use std::arch::x86_64::*;

/// Runs `body` compiled for AVX-512.
///
/// # Safety
/// The processor has avx512f, avx512bw and avx512vl.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
pub unsafe fn with_avx512<R>(body: impl FnOnce() -> R) -> R {
    body()
}

/// Runs `body` compiled for AVX2.
///
/// # Safety
/// The processor has avx2 and fma.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn with_avx2<R>(body: impl FnOnce() -> R) -> R {
    body()
}

/// Decodes 32 codes at a time; returns how many values it wrote.
///
/// # Safety
/// The processor has avx512f; `codes` holds a nibble for every value of `out`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub unsafe fn decode_nibbles_avx512(codes: &[u8], table: &[f32; 16], scale: f32, out: &mut [f32]) -> usize {
    let n = out.len() / 32 * 32;
    // SAFETY: loads of 16 bytes and stores of 16 values stay below `n / 2` and `n`; the table has 16 entries.
    unsafe {
        let table = _mm512_mul_ps(_mm512_loadu_ps(table.as_ptr()), _mm512_set1_ps(scale));
        let low_mask = _mm_set1_epi8(15);
        for at in (0..n).step_by(32) {
            let bytes = _mm_loadu_si128(codes.as_ptr().add(at / 2).cast());
            let high = _mm_and_si128(_mm_srli_epi16::<4>(bytes), low_mask);
            let low = _mm_and_si128(bytes, low_mask);
            let first = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(high, low));
            let second = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(high, low));
            _mm512_storeu_ps(out.as_mut_ptr().add(at), _mm512_permutexvar_ps(first, table));
            _mm512_storeu_ps(out.as_mut_ptr().add(at + 16), _mm512_permutexvar_ps(second, table));
        }
    }
    n
}

/// Sums `a·b` over `$len` places, 16 at a time in four sums. `$load` gives both factors from `$at` on, of as many places as `$mask` has
/// bits. What is left of 64 places stays in registers too: a vector that is put on the stack may lie across two cache lines, by where
/// the stack happens to begin, and then a process is slower from its start to its end.
macro_rules! sum_of_products {
    ($len:expr, |$at:ident, $mask:ident| $load:expr) => {{
        let len: usize = $len;
        let whole = len / 64 * 64;
        let mut sums = [_mm512_setzero_ps(); 4];
        for start in (0..whole).step_by(64) {
            for (lane, sum) in sums.iter_mut().enumerate() {
                let ($at, $mask): (usize, __mmask16) = (start + 16 * lane, 0xffff);
                let (a, b) = $load;
                *sum = _mm512_fmadd_ps(a, b, *sum);
            }
        }
        for (lane, sum) in sums.iter_mut().enumerate() {
            let $at = whole + 16 * lane;
            if $at < len {
                let $mask = first_lanes(len - $at);
                let (a, b) = $load;
                *sum = _mm512_fmadd_ps(a, b, *sum);
            }
        }
        let [s0, s1, s2, s3] = sums;
        _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s0, s2), _mm512_add_ps(s1, s3)))
    }};
}

/// Returns the mask of the first `n` lanes, of all from 16 on.
#[inline]
pub fn first_lanes(n: usize) -> __mmask16 {
    if n < 16 { (1 << n) - 1 } else { 0xffff }
}

/// Returns Σ code·x.
///
/// # Safety
/// The processor has avx512f, avx512bw and avx512vl; there is a code for every value of x.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
pub unsafe fn dot_i8_avx512(codes: &[i8], x: &[f32]) -> f32 {
    // SAFETY: masked loads touch places below `x.len()` alone.
    sum_of_products!(x.len(), |at, mask| unsafe {
        let codes = _mm_maskz_loadu_epi8(mask, codes.as_ptr().add(at));
        (_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)), _mm512_maskz_loadu_ps(mask, x.as_ptr().add(at)))
    })
}

/// Returns Σ a·b of as many values as both have.
///
/// # Safety
/// The processor has avx512f, avx512bw and avx512vl.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
pub unsafe fn dot_avx512(a: &[f32], b: &[f32]) -> f32 {
    // SAFETY: masked loads touch places below the shorter length alone.
    sum_of_products!(a.len().min(b.len()), |at, mask| unsafe {
        (_mm512_maskz_loadu_ps(mask, a.as_ptr().add(at)), _mm512_maskz_loadu_ps(mask, b.as_ptr().add(at)))
    })
}

/// Returns Σ w·x.
///
/// # Safety
/// The processor has avx512f, avx512bw and avx512vl; there is a value for every value of x.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
pub unsafe fn dot_f16_avx512(bits: &[u16], x: &[f32]) -> f32 {
    // SAFETY: masked loads touch places below `x.len()` alone.
    sum_of_products!(x.len(), |at, mask| unsafe {
        let half = _mm256_maskz_loadu_epi16(mask, bits.as_ptr().add(at).cast());
        (_mm512_cvtph_ps(half), _mm512_maskz_loadu_ps(mask, x.as_ptr().add(at)))
    })
}

/// Returns Σ a·b of as many values as both have.
///
/// # Safety
/// The processor has avx2 and fma.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn dot_avx2(a: &[f32], b: &[f32]) -> f32 {
    let len = a.len().min(b.len());
    let whole = len / 32 * 32;
    let mut sums = [_mm256_setzero_ps(); 4];
    // SAFETY: loads of 8 values stay below `whole`, masked ones touch places below `len` alone.
    unsafe {
        for start in (0..whole).step_by(32) {
            for (lane, sum) in sums.iter_mut().enumerate() {
                let at = start + 8 * lane;
                let (a, b) = (_mm256_loadu_ps(a.as_ptr().add(at)), _mm256_loadu_ps(b.as_ptr().add(at)));
                *sum = _mm256_fmadd_ps(a, b, *sum);
            }
        }
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        for (lane, sum) in sums.iter_mut().enumerate() {
            let at = whole + 8 * lane;
            if at < len {
                let mask = _mm256_cmpgt_epi32(_mm256_set1_epi32((len - at).min(8) as i32), lanes);
                let (a, b) =
                    (_mm256_maskload_ps(a.as_ptr().add(at), mask), _mm256_maskload_ps(b.as_ptr().add(at), mask));
                *sum = _mm256_fmadd_ps(a, b, *sum);
            }
        }
    }
    let [s0, s1, s2, s3] = sums;
    let sum = _mm256_add_ps(_mm256_add_ps(s0, s2), _mm256_add_ps(s1, s3));
    let half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
    let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps::<1>(pair, pair)))
}

/// Returns Σ (table[code] − zero)·scale·x.
///
/// # Safety
/// The processor has avx512f, avx512bw and avx512vl; `x.len()` and `row.block` are multiples of 32; there is a nibble for
/// every value of x and a scale (and a zero point, if any) for every block.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
pub unsafe fn dot_nibbles_avx512(row: super::NibbleRow<'_>, x: &[f32]) -> f32 {
    // SAFETY: every load stays below `x.len()` values and `x.len() / 2` bytes; the table has 16 entries.
    unsafe {
        let plain_table = _mm512_loadu_ps(row.table.as_ptr());
        let low_mask = _mm_set1_epi8(15);
        let (mut sum_a, mut sum_b) = (_mm512_setzero_ps(), _mm512_setzero_ps());
        for (block_idx, x) in x.chunks(row.block).enumerate() {
            let table = match row.zeros.get(block_idx) {
                None => plain_table,
                Some(zero) => _mm512_sub_ps(plain_table, _mm512_set1_ps(f32::from(*zero))),
            };
            let codes = row.codes.as_ptr().add(block_idx * row.block / 2);
            let (mut block_a, mut block_b) = (_mm512_setzero_ps(), _mm512_setzero_ps());
            for at in (0..x.len()).step_by(32) {
                let bytes = _mm_loadu_si128(codes.add(at / 2).cast());
                let high = _mm_and_si128(_mm_srli_epi16::<4>(bytes), low_mask);
                let low = _mm_and_si128(bytes, low_mask);
                let first = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(high, low));
                let second = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(high, low));
                let (x_a, x_b) = (_mm512_loadu_ps(x.as_ptr().add(at)), _mm512_loadu_ps(x.as_ptr().add(at + 16)));
                block_a = _mm512_fmadd_ps(_mm512_permutexvar_ps(first, table), x_a, block_a);
                block_b = _mm512_fmadd_ps(_mm512_permutexvar_ps(second, table), x_b, block_b);
            }
            let scale = _mm512_set1_ps(*row.scales.get_unchecked(block_idx));
            sum_a = _mm512_fmadd_ps(block_a, scale, sum_a);
            sum_b = _mm512_fmadd_ps(block_b, scale, sum_b);
        }
        _mm512_reduce_add_ps(_mm512_add_ps(sum_a, sum_b))
    }
}

/// Decodes 16 codes at a time; returns how many values it wrote.
///
/// # Safety
/// The processor has avx2; `codes` holds a nibble for every value of `out`.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn decode_nibbles_avx2(codes: &[u8], table: &[f32; 16], scale: f32, out: &mut [f32]) -> usize {
    let n = out.len() / 16 * 16;
    // SAFETY: loads of 8 bytes and stores of 8 values stay below `n / 2` and `n`; the table has 16 entries.
    unsafe {
        let scale = _mm256_set1_ps(scale);
        let table_low = _mm256_mul_ps(_mm256_loadu_ps(table.as_ptr()), scale);
        let table_high = _mm256_mul_ps(_mm256_loadu_ps(table.as_ptr().add(8)), scale);
        let low_mask = _mm_set1_epi8(15);
        for at in (0..n).step_by(16) {
            let bytes = _mm_loadl_epi64(codes.as_ptr().add(at / 2).cast());
            let high = _mm_and_si128(_mm_srli_epi16::<4>(bytes), low_mask);
            let low = _mm_and_si128(bytes, low_mask);
            let pairs = _mm_unpacklo_epi8(high, low);
            for (offset, eight) in [(0, pairs), (8, _mm_srli_si128::<8>(pairs))] {
                let index = _mm256_cvtepu8_epi32(eight);
                let from_low = _mm256_permutevar8x32_ps(table_low, index);
                let from_high = _mm256_permutevar8x32_ps(table_high, index);
                let pick_high = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
                let values = _mm256_blendv_ps(from_low, from_high, pick_high);
                _mm256_storeu_ps(out.as_mut_ptr().add(at + offset), values);
            }
        }
    }
    n
}

/// Decodes half-precision values.
///
/// # Safety
/// The processor has f16c; both slices have the same length.
#[target_feature(enable = "avx2,f16c")]
pub unsafe fn decode_f16(bits: &[u16], out: &mut [f32]) {
    let (bits, bits_rest) = bits.as_chunks::<8>();
    let (out, out_rest) = out.as_chunks_mut::<8>();
    // SAFETY: each chunk has eight values.
    let decode = |bits: &[u16; 8], out: &mut [f32; 8]| unsafe {
        _mm256_storeu_ps(out.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(bits.as_ptr().cast())));
    };
    bits.iter().zip(out).for_each(|(bits, out)| decode(bits, out));
    if !bits_rest.is_empty() {
        let (mut padded, mut values) = ([0; 8], [0.0; 8]);
        padded[..bits_rest.len()].copy_from_slice(bits_rest);
        decode(&padded, &mut values);
        out_rest.copy_from_slice(&values[..out_rest.len()]);
    }
}
