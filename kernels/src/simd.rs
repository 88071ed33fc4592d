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
    let (bits, out) = (&bits[..n], &mut out[..n]);
    match level {
        // SAFETY: `level` is only ever a path that the processor has; both slices hold `n` values.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx2 => unsafe { x86::decode_f16(bits, out) },
        _ => out.iter_mut().zip(bits).for_each(|(value, raw)| *value = half::f16::from_bits(*raw).to_f32()),
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

/// Returns Σ a·b, accumulated in fp32 over partial sums.
pub fn dot(level: Level, a: &[f32], b: &[f32]) -> f32 {
    match level {
        // SAFETY: `level` is only ever a path that the processor has.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { x86::dot_avx512(a, b) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { x86::dot_avx2(a, b) },
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
pub(crate) mod x86;

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
