//! Inner loops with a path per instruction set, chosen once at run time: AVX-512, AVX2 with FMA and F16C, portable.

use std::sync::OnceLock;

/// An instruction set that the inner loops have a path for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Portable,
    Avx2,
    Avx512,
}

/// Returns the best path that this processor has.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| available().last().copied().unwrap_or(Level::Portable))
}

/// Returns every path that this processor has, the best last.
pub fn available() -> Vec<Level> {
    let mut levels = vec![Level::Portable];
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx2") && has!("fma") && has!("f16c") {
            levels.push(Level::Avx2);
            if has!("avx512f") && has!("avx512bw") && has!("avx512vl") {
                levels.push(Level::Avx512);
            }
        }
    }
    levels
}

/// Writes `table[code]·scale` for packed 4-bit codes: two a byte, the even index in the high nibble.
///
/// # Shapes
/// `codes` has at least `out.len().div_ceil(2)` bytes.
pub fn decode_nibbles(level: Level, codes: &[u8], table: &[f32; 16], scale: f32, out: &mut [f32]) {
    assert!(codes.len() >= out.len().div_ceil(2), "decode_nibbles: too few codes");
    let done = match level {
        // SAFETY: `level` is only ever a path that the processor has, and the lengths were checked.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { x86::decode_nibbles_avx512(codes, table, scale, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { x86::decode_nibbles_avx2(codes, table, scale, out) },
        _ => 0,
    };
    for (pair, byte) in out[done..].chunks_mut(2).zip(&codes[done / 2..]) {
        pair[0] = table[usize::from(byte >> 4)] * scale;
        if let Some(second) = pair.get_mut(1) {
            *second = table[usize::from(byte & 15)] * scale;
        }
    }
}

/// A row of packed 4-bit codes whose blocks begin at its first value.
#[derive(Debug, Clone, Copy)]
pub struct NibbleRow<'a> {
    /// Two codes a byte, the even index in the high nibble.
    pub codes: &'a [u8],
    pub table: &'a [f32; 16],
    /// One a block.
    pub scales: &'a [f32],
    /// What to subtract from the table's values, one a block; empty for nothing.
    pub zeros: &'a [u8],
    /// Values a block.
    pub block: usize,
}

/// Returns Σ (table[code] − zero)·scale·x without storing decoded values, or nothing where this processor or this shape has
/// no such path (decode and [`dot`] then).
pub fn dot_nibbles(level: Level, row: NibbleRow<'_>, x: &[f32]) -> Option<f32> {
    let fits = row.block.is_multiple_of(32) && x.len().is_multiple_of(32);
    let n_blocks = x.len().div_ceil(row.block.max(1));
    assert!(row.codes.len() * 2 >= x.len() && row.scales.len() >= n_blocks, "dot_nibbles: too few codes or scales");
    assert!(row.zeros.is_empty() || row.zeros.len() >= n_blocks, "dot_nibbles: too few zero points");
    match level {
        // SAFETY: `level` is only ever a path that the processor has; lengths and multiples were checked above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 if fits => Some(unsafe { x86::dot_nibbles_avx512(row, x) }),
        _ => None,
    }
}

/// Writes `(code·scale)·factor` for signed 8-bit codes.
pub fn decode_i8(level: Level, codes: &[i8], scale: f32, factor: f32, out: &mut [f32]) {
    #[inline(always)]
    fn body(codes: &[i8], scale: f32, factor: f32, out: &mut [f32]) {
        for (value, code) in out.iter_mut().zip(codes) {
            *value = f32::from(*code) * scale * factor;
        }
    }
    match level {
        // SAFETY: `level` is only ever a path that the processor has.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { x86::with_avx512(|| body(codes, scale, factor, out)) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { x86::with_avx2(|| body(codes, scale, factor, out)) },
        _ => body(codes, scale, factor, out),
    }
}

/// Returns Σ code·x for signed 8-bit codes, or nothing where this processor has no such path.
pub fn dot_i8(level: Level, codes: &[i8], x: &[f32]) -> Option<f32> {
    assert!(codes.len() >= x.len(), "dot_i8: too few codes");
    match level {
        // SAFETY: `level` is only ever a path that the processor has, and the lengths were checked.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => Some(unsafe { x86::dot_i8_avx512(codes, x) }),
        _ => None,
    }
}

/// Returns Σ a·b for signed 8-bit codes, in whole numbers; exact for up to 2¹⁶ of them.
pub fn dot_i8_i8(level: Level, a: &[i8], b: &[i8]) -> i32 {
    #[inline(always)]
    fn body(a: &[i8], b: &[i8]) -> i32 {
        a.iter().zip(b).map(|(a, b)| i32::from(*a) * i32::from(*b)).sum()
    }
    match level {
        // SAFETY: `level` is only ever a path that the processor has.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { x86::with_avx512(|| body(a, b)) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { x86::with_avx2(|| body(a, b)) },
        _ => body(a, b),
    }
}

/// Returns Σ w·x for half-precision values given as bits, or nothing where this processor has no such path.
pub fn dot_f16(level: Level, bits: &[u16], x: &[f32]) -> Option<f32> {
    assert!(bits.len() >= x.len(), "dot_f16: too few values");
    match level {
        // SAFETY: `level` is only ever a path that the processor has, and the lengths were checked.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => Some(unsafe { x86::dot_f16_avx512(bits, x) }),
        _ => None,
    }
}

/// Writes half-precision values, given as bits, as f32.
pub fn decode_f16(level: Level, bits: &[u16], out: &mut [f32]) {
    let n = bits.len().min(out.len());
    let done = match level {
        // SAFETY: `level` is only ever a path that the processor has; both slices hold `n` values.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx2 => unsafe { x86::decode_f16(&bits[..n], &mut out[..n]) },
        _ => 0,
    };
    for (value, raw) in out[done..n].iter_mut().zip(&bits[done..n]) {
        *value = half::f16::from_bits(*raw).to_f32();
    }
}

/// Writes bfloat16 values, given as bits, as f32.
pub fn decode_bf16(level: Level, bits: &[u16], out: &mut [f32]) {
    #[inline(always)]
    fn body(bits: &[u16], out: &mut [f32]) {
        for (value, raw) in out.iter_mut().zip(bits) {
            *value = f32::from_bits(u32::from(*raw) << 16);
        }
    }
    match level {
        // SAFETY: `level` is only ever a path that the processor has.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { x86::with_avx512(|| body(bits, out)) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { x86::with_avx2(|| body(bits, out)) },
        _ => body(bits, out),
    }
}

/// Defines a function that runs `body::<FUSED>` compiled for the processor's instruction set: `body` is `#[inline(always)]`, and
/// multiplies and adds at once where `FUSED`. (A closure would do where it is inlined; long ones are not.)
macro_rules! compiled_for_levels {
    ($(#[$meta:meta])* $vis:vis fn $name:ident = $body:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)?) => {
        $(#[$meta])*
        $vis fn $name(level: $crate::simd::Level, $($argument: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
            fn avx512($($argument: $type),*) $(-> $result)? {
                $body::<true>($($argument),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($argument: $type),*) $(-> $result)? {
                $body::<true>($($argument),*)
            }
            match level {
                // SAFETY: `level` is only ever a path that the processor has.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Level::Avx512 => unsafe { avx512($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Level::Avx2 => unsafe { avx2($($argument),*) },
                _ => $body::<false>($($argument),*),
            }
        }
    };
}
pub(crate) use compiled_for_levels;

/// Returns Σ a·b, accumulated in fp32 over 64 partial sums.
pub fn dot(level: Level, a: &[f32], b: &[f32]) -> f32 {
    match level {
        // SAFETY: `level` is only ever a path that the processor has.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { x86::dot_avx512(a, b) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { x86::with_avx2(|| dot_body::<true>(a, b)) },
        _ => dot_body::<false>(a, b),
    }
}

/// Returns what [`dot`] does, for loops that are compiled for the processor already.
#[inline(always)]
pub(crate) fn dot_body<const FUSED: bool>(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 64;
    let mut sums = [0.0f32; LANES];
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for lane in 0..LANES {
            sums[lane] = if FUSED { a[lane].mul_add(b[lane], sums[lane]) } else { sums[lane] + a[lane] * b[lane] };
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0] + rest
}

#[cfg(target_arch = "x86_64")]
mod x86 {
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

    /// Returns Σ code·x.
    ///
    /// # Safety
    /// The processor has avx512f, avx512bw and avx512vl; there is a code for every value of x.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
    pub unsafe fn dot_i8_avx512(codes: &[i8], x: &[f32]) -> f32 {
        let n = x.len() / 64 * 64;
        let mut sums = [_mm512_setzero_ps(); 4];
        for at in (0..n).step_by(64) {
            for (lane, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `at + 16·lane + 16` stays at or below `n`.
                unsafe {
                    let codes = _mm_loadu_si128(codes.as_ptr().add(at + 16 * lane).cast());
                    let x = _mm512_loadu_ps(x.as_ptr().add(at + 16 * lane));
                    *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)), x, *sum);
                }
            }
        }
        let rest: f32 = codes[n..].iter().zip(&x[n..]).map(|(code, x)| f32::from(*code) * x).sum();
        sum_of(sums) + rest
    }

    /// Returns Σ a·b with the sums of `dot_body`, which the compiler would take through memory.
    ///
    /// # Safety
    /// The processor has avx512f.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
    pub unsafe fn dot_avx512(a: &[f32], b: &[f32]) -> f32 {
        let len = a.len().min(b.len());
        let n = len / 64 * 64;
        let mut sums = [_mm512_setzero_ps(); 4];
        for at in (0..n).step_by(64) {
            for (lane, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `at + 16·lane + 16` stays at or below `n`.
                unsafe {
                    let a = _mm512_loadu_ps(a.as_ptr().add(at + 16 * lane));
                    *sum = _mm512_fmadd_ps(a, _mm512_loadu_ps(b.as_ptr().add(at + 16 * lane)), *sum);
                }
            }
        }
        let rest: f32 = a[n..len].iter().zip(&b[n..len]).map(|(a, b)| a * b).sum();
        let [s0, s1, s2, s3] = sums;
        _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s0, s2), _mm512_add_ps(s1, s3))) + rest
    }

    /// Returns Σ w·x.
    ///
    /// # Safety
    /// The processor has avx512f; there is a value for every value of x.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
    pub unsafe fn dot_f16_avx512(bits: &[u16], x: &[f32]) -> f32 {
        let n = x.len() / 64 * 64;
        let mut sums = [_mm512_setzero_ps(); 4];
        for at in (0..n).step_by(64) {
            for (lane, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `at + 16·lane + 16` stays at or below `n`.
                unsafe {
                    let half = _mm256_loadu_si256(bits.as_ptr().add(at + 16 * lane).cast());
                    let x = _mm512_loadu_ps(x.as_ptr().add(at + 16 * lane));
                    *sum = _mm512_fmadd_ps(_mm512_cvtph_ps(half), x, *sum);
                }
            }
        }
        let rest: f32 = bits[n..].iter().zip(&x[n..]).map(|(bits, x)| half::f16::from_bits(*bits).to_f32() * x).sum();
        sum_of(sums) + rest
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
    fn sum_of([a, b, c, d]: [__m512; 4]) -> f32 {
        _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)))
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

    /// Decodes 8 values at a time; returns how many it wrote.
    ///
    /// # Safety
    /// The processor has f16c; both slices have the same length.
    #[target_feature(enable = "avx2,f16c")]
    pub unsafe fn decode_f16(bits: &[u16], out: &mut [f32]) -> usize {
        let n = out.len() / 8 * 8;
        // SAFETY: loads and stores of 8 values stay below `n`.
        unsafe {
            for at in (0..n).step_by(8) {
                let half = _mm_loadu_si128(bits.as_ptr().add(at).cast());
                _mm256_storeu_ps(out.as_mut_ptr().add(at), _mm256_cvtph_ps(half));
            }
        }
        n
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_nibbles_equal_products_of_decoded_values() {
        let table: [f32; 16] = std::array::from_fn(|i| i as f32 - 7.5);
        let codes: Vec<u8> = (0..96).map(|i| (i * 91 + 5) as u8).collect();
        let (scales, zeros) = ([0.5f32, 2.0, 0.25], [3u8, 8, 0]);
        let x: Vec<f32> = (0..160).map(|i| (i as f32 * 0.7).sin()).collect();
        let row = NibbleRow { codes: &codes, table: &table, scales: &scales, zeros: &zeros, block: 64 };
        let exact: f64 = (0..160)
            .map(|i| {
                let code = if i % 2 == 0 { codes[i / 2] >> 4 } else { codes[i / 2] & 15 };
                let value = (table[usize::from(code)] - f32::from(zeros[i / 64])) * scales[i / 64];
                f64::from(value) * f64::from(x[i])
            })
            .sum();
        for level in available() {
            if let Some(found) = dot_nibbles(level, row, &x) {
                assert!((f64::from(found) - exact).abs() < 1e-3, "{level:?}: {found} against {exact}");
            }
        }
    }

    #[test]
    fn every_path_of_this_processor_gives_the_portable_path_s_values() {
        let table: [f32; 16] = std::array::from_fn(|i| (i as f32 - 7.3) * 0.11);
        for n in [1usize, 7, 16, 31, 64, 172, 577] {
            let codes: Vec<u8> = (0..n.div_ceil(2)).map(|i| (i * 97 + 13) as u8).collect();
            let signed: Vec<i8> = (0..n).map(|i| (i * 31) as i8).collect();
            let halves: Vec<u16> = (0..n).map(|i| half::f16::from_f32(i as f32 * 0.37 - 9.0).to_bits()).collect();
            let run = |level| {
                let (mut a, mut b, mut c) = (vec![f32::NAN; n], vec![f32::NAN; n], vec![f32::NAN; n]);
                decode_nibbles(level, &codes, &table, 0.7, &mut a);
                decode_i8(level, &signed, 0.3, 1.0 / 127.0, &mut b);
                decode_f16(level, &halves, &mut c);
                (a, b, c)
            };
            let expected = run(Level::Portable);
            for level in available() {
                assert_eq!(run(level), expected, "{level:?} n={n}");
                let close = |found: Option<f32>, a: &[f32], b: &[f32]| {
                    let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
                    let (exact, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                    found.is_none_or(|found| (f64::from(found) - exact).abs() <= size * 1e-6)
                };
                let reversed: Vec<i8> = signed.iter().rev().copied().collect();
                let whole: i32 = signed.iter().zip(&reversed).map(|(a, b)| i32::from(*a) * i32::from(*b)).sum();
                assert_eq!(dot_i8_i8(level, &signed, &reversed), whole, "{level:?} n={n}");
                let codes: Vec<f32> = signed.iter().map(|code| f32::from(*code)).collect();
                assert!(close(dot_i8(level, &signed, &expected.2), &codes, &expected.2), "{level:?} n={n}");
                assert!(close(dot_f16(level, &halves, &expected.0), &expected.2, &expected.0), "{level:?} n={n}");
                let exact: f64 = expected.0.iter().zip(&expected.2).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                let size: f64 = expected.0.iter().zip(&expected.2).map(|(a, b)| f64::from((a * b).abs())).sum();
                let found = f64::from(dot(level, &expected.0, &expected.2));
                assert!((found - exact).abs() <= size * 1e-6, "{level:?} n={n}: {found} against {exact}");
            }
        }
    }
}
