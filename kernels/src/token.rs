//! What decoding one token needs beside products with weights, on plain slices: RMSNorm, gates, and attention of one position over
//! cached keys and values. It knows neither models nor threads.

use crate::simd::{self, Level};

/// Returns eˣ to about 1 unit in the last place; 0 and infinity are approached (10⁻³⁸, 10³⁸), NaN stays.
///
/// Without branches or calls, so that loops over it are vectorized. Range reduction and the polynomial follow Cephes' `expf`
/// (Moshier 1992): eˣ = 2ⁿ·eʳ with |r| ≤ ln 2 / 2.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Adding 1.5·2²³ rounds to a whole number and leaves it in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4 * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 5e-1;
    let power = rounded.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    (p * r * r + r + 1.0) * f32::from_bits(power)
}

/// Replaces x by `x / √(mean(x²) + eps) · weight` (RMSNorm, Zhang and Sennrich 2019).
///
/// # Shapes
/// Both `[n]`.
pub fn rms_norm(level: Level, weight: &[f32], eps: f32, x: &mut [f32]) {
    let scale = 1.0 / (simd::dot(level, x, x) / x.len() as f32 + eps).sqrt();
    x.iter_mut().zip(weight).for_each(|(x, weight)| *x *= scale * weight);
}

/// An activation between the gate and the product with the up projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// x · sigmoid(x).
    Silu,
    /// GELU by its tanh approximation: x · sigmoid(2·√(2/π)·(x + 0.044715·x³)).
    GeluTanh,
}

simd::compiled_for_levels! {
    /// Replaces a gate by `activation(gate) · up`.
    ///
    /// # Shapes
    /// Both `[n]`.
    pub fn gate_times_up = gate_body(kind: Gate, gate: &mut [f32], up: &[f32])
}

#[inline(always)]
fn gate_body<const FUSED: bool>(kind: Gate, gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        let x = *gate;
        let exponent = match kind {
            Gate::Silu => -x,
            Gate::GeluTanh => -1.595_769 * (x + 0.044_715 * x * x * x),
        };
        *gate = x / (1.0 + exp(exponent)) * up;
    }
}

/// Cached keys and values of one head, from the first that is attended to on.
#[derive(Debug, Clone, Copy)]
pub struct HeadCache<'a> {
    /// Key t at `t·stride`, `head_dim` values.
    pub keys: &'a [f32],
    /// Likewise.
    pub values: &'a [f32],
    /// Values from one token's to the next one's.
    pub stride: usize,
    pub n_keys: usize,
}

/// Returns the length of what [`attend`] writes for at most `n_keys` keys.
pub fn part_len(group: usize, head_dim: usize, n_keys: usize) -> usize {
    group * (2 + head_dim + n_keys)
}

/// Attends to the keys of one head with all the queries that share it. Scores s become cap · tanh(s / cap) where there is a cap.
///
/// Parts of the keys may be attended to apart: [`merge`] puts them together.
///
/// # Shapes
/// `q` `[group, head_dim]`, scaled. `part` (see [`part_len`]) gets each query's largest score, `[group]`; Σ exp(score − largest),
/// `[group]`; Σ exp(score − largest)·value, `[group, head_dim]`; what is behind them is room for scores.
pub fn attend(level: Level, group: usize, q: &[f32], cache: HeadCache<'_>, softcap: Option<f32>, part: &mut [f32]) {
    let head_dim = q.len() / group;
    let n_keys = cache.n_keys;
    assert!(
        n_keys > 0 && part.len() >= part_len(group, head_dim, n_keys),
        "attend: no keys, or no room for their scores"
    );
    let needed = (n_keys - 1) * cache.stride + head_dim;
    assert!(cache.keys.len() >= needed && cache.values.len() >= needed, "attend: too few keys or values");
    let (maxima, part) = part.split_at_mut(group);
    let (sums, part) = part.split_at_mut(group);
    let (weighted, scores) = part.split_at_mut(group * head_dim);
    #[cfg(target_arch = "x86_64")]
    if level == Level::Avx512 {
        // SAFETY: the processor has this path; keys, values and room were checked above.
        return unsafe { x86::attend(q, cache, softcap, maxima, sums, weighted, scores) };
    }
    attend_parts(level, q, cache, softcap, maxima, sums, weighted, scores);
}

simd::compiled_for_levels! {
    #[expect(clippy::too_many_arguments, reason = "the parts of one buffer, borrowed apart")]
    fn attend_parts = attend_body(
        q: &[f32],
        cache: HeadCache<'_>,
        softcap: Option<f32>,
        maxima: &mut [f32],
        sums: &mut [f32],
        weighted: &mut [f32],
        scores: &mut [f32],
    )
}

#[inline(always)]
fn attend_body<const FUSED: bool>(
    q: &[f32],
    cache: HeadCache<'_>,
    softcap: Option<f32>,
    maxima: &mut [f32],
    sums: &mut [f32],
    weighted: &mut [f32],
    scores: &mut [f32],
) {
    let (n_keys, head_dim) = (cache.n_keys, q.len() / maxima.len());
    for (t, key) in cache.keys.chunks(cache.stride).take(n_keys).enumerate() {
        for (query_idx, q) in q.chunks_exact(head_dim).enumerate() {
            scores[query_idx * n_keys + t] = simd::dot_body::<FUSED>(&key[..head_dim], q);
        }
    }
    weigh(n_keys, softcap, maxima, sums, scores);
    weighted.fill(0.0);
    for (t, value) in cache.values.chunks(cache.stride).take(n_keys).enumerate() {
        for (query_idx, weighted) in weighted.chunks_exact_mut(head_dim).enumerate() {
            let weight = scores[query_idx * n_keys + t];
            weighted.iter_mut().zip(&value[..head_dim]).for_each(|(sum, value)| *sum += weight * value);
        }
    }
}

/// Replaces each query's scores, capped, by exp(score − maximum).
#[inline(always)]
fn weigh(n_keys: usize, softcap: Option<f32>, maxima: &mut [f32], sums: &mut [f32], scores: &mut [f32]) {
    for ((scores, maximum), sum) in scores.chunks_exact_mut(n_keys).zip(maxima).zip(sums) {
        if let Some(cap) = softcap {
            scores.iter_mut().for_each(|score| *score = cap * (*score / cap).tanh());
        }
        (*maximum, *sum) = exponentials(scores);
    }
}

/// Replaces scores by exp(score − maximum); returns the maximum and the sum. NaN in any score is in the sum.
#[inline(always)]
fn exponentials(scores: &mut [f32]) -> (f32, f32) {
    const LANES: usize = 16;
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut maxima = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = scores.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            maxima[lane] = larger(maxima[lane], chunk[lane]);
        }
    }
    let maximum = rest.iter().chain(&maxima).copied().fold(f32::NEG_INFINITY, larger);
    let mut sums = [0.0f32; LANES];
    let (chunks, rest) = scores.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            chunk[lane] = exp(chunk[lane] - maximum);
            sums[lane] += chunk[lane];
        }
    }
    let mut sum: f32 = sums.iter().sum();
    for score in rest {
        *score = exp(*score - maximum);
        sum += *score;
    }
    (maximum, sum)
}

/// Merges what [`attend`] left of consecutive parts of the keys, and writes the attended values.
///
/// # Shapes
/// `parts` `[n_parts, part_len]`, `out` `[group, head_dim]`.
pub fn merge(group: usize, parts: &[f32], part_len: usize, out: &mut [f32]) {
    let head_dim = out.len() / group;
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    for (query_idx, out) in out.chunks_exact_mut(head_dim).enumerate() {
        let maximum = parts.chunks_exact(part_len).map(|part| part[query_idx]).fold(f32::NEG_INFINITY, larger);
        let mut sum = 0.0;
        out.fill(0.0);
        for part in parts.chunks_exact(part_len) {
            let scale = exp(part[query_idx] - maximum);
            sum += scale * part[group + query_idx];
            let weighted = &part[2 * group + query_idx * head_dim..];
            out.iter_mut().zip(weighted).for_each(|(out, weighted)| *out += scale * weighted);
        }
        let scale = 1.0 / sum;
        out.iter_mut().for_each(|value| *value *= scale);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{HeadCache, weigh};
    use crate::simd::x86::{dot_avx512, first_lanes};
    use std::arch::x86_64::*;

    /// How many keys ahead of the one in use are asked for; values while their keys are in use.
    const KEYS_AHEAD: usize = 32;

    /// What `attend_body` does, with sums in registers.
    ///
    /// # Safety
    /// The processor has avx512f, avx512bw and avx512vl; `cache` holds `n_keys` keys and values of head_dim = q.len() / maxima.len();
    /// `scores` has room for `[group, n_keys]` and `weighted` for `[group, head_dim]`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
    pub unsafe fn attend(
        q: &[f32],
        cache: HeadCache<'_>,
        softcap: Option<f32>,
        maxima: &mut [f32],
        sums: &mut [f32],
        weighted: &mut [f32],
        scores: &mut [f32],
    ) {
        let (n_keys, head_dim) = (cache.n_keys, q.len() / maxima.len());
        for t in 0..n_keys {
            // A head's keys and values lie apart by the other heads': the processor's own prefetching does not follow them.
            let ahead = (t + KEYS_AHEAD) * cache.stride;
            for at in (ahead..ahead + head_dim).step_by(16) {
                _mm_prefetch::<_MM_HINT_T0>(cache.keys.as_ptr().wrapping_add(at).cast());
                _mm_prefetch::<_MM_HINT_T1>(cache.values.as_ptr().wrapping_add(at - KEYS_AHEAD * cache.stride).cast());
            }
            let key = &cache.keys[t * cache.stride..][..head_dim];
            for (query_idx, q) in q.chunks_exact(head_dim).enumerate() {
                // SAFETY: the processor has this path.
                scores[query_idx * n_keys + t] = unsafe { dot_avx512(key, q) };
            }
        }
        weigh(n_keys, softcap, maxima, sums, scores);
        for (weights, weighted) in scores.chunks_exact(n_keys).zip(weighted.chunks_exact_mut(head_dim)) {
            let (blocks, rest) = weighted.as_chunks_mut::<64>();
            let n_blocks = blocks.len();
            for (block_idx, out) in blocks.iter_mut().enumerate() {
                // SAFETY: value t lies in what the caller vouches for, and `out` has 64 places.
                unsafe {
                    let values = cache.values.as_ptr().add(block_idx * 64);
                    let mut sums = [_mm512_setzero_ps(); 4];
                    for (t, weight) in weights.iter().enumerate() {
                        let (value, weight) = (values.add(t * cache.stride), _mm512_set1_ps(*weight));
                        for (lane, sum) in sums.iter_mut().enumerate() {
                            *sum = _mm512_fmadd_ps(weight, _mm512_loadu_ps(value.add(16 * lane)), *sum);
                        }
                    }
                    for (lane, sum) in sums.into_iter().enumerate() {
                        _mm512_storeu_ps(out.as_mut_ptr().add(16 * lane), sum);
                    }
                }
            }
            for (lane, out) in rest.chunks_mut(16).enumerate() {
                let (at, mask) = (n_blocks * 64 + 16 * lane, first_lanes(out.len()));
                // SAFETY: masked loads and the store touch places of this head alone.
                unsafe {
                    let values = cache.values.as_ptr().add(at);
                    let value = |t: usize| _mm512_maskz_loadu_ps(mask, values.add(t * cache.stride));
                    let mut sums = [_mm512_setzero_ps(); 4];
                    let (quads, last) = weights.as_chunks::<4>();
                    for (quad_idx, quad) in quads.iter().enumerate() {
                        for (i, sum) in sums.iter_mut().enumerate() {
                            *sum = _mm512_fmadd_ps(_mm512_set1_ps(quad[i]), value(4 * quad_idx + i), *sum);
                        }
                    }
                    for (i, weight) in last.iter().enumerate() {
                        sums[0] = _mm512_fmadd_ps(_mm512_set1_ps(*weight), value(4 * quads.len() + i), sums[0]);
                    }
                    let [s0, s1, s2, s3] = sums;
                    let sum = _mm512_add_ps(_mm512_add_ps(s0, s1), _mm512_add_ps(s2, s3));
                    _mm512_mask_storeu_ps(out.as_mut_ptr(), mask, sum);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::available;

    #[test]
    fn exponentials_are_those_of_f64() {
        for i in -8700..8800 {
            let x = i as f32 * 0.01;
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) / exact - 1.0).abs() < 2e-7, "{x}: {} {exact}", exp(x));
        }
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) < 1e-37 && exp(f32::INFINITY) > 1e38);
    }

    #[test]
    fn gates_are_those_of_their_definitions() {
        let gate: Vec<f32> = (0..203).map(|i| (i as f32 - 101.0) * 0.17).collect();
        let up: Vec<f32> = (0..203).map(|i| (i as f32 * 0.3).cos()).collect();
        for level in available() {
            for kind in [Gate::Silu, Gate::GeluTanh] {
                let mut out = gate.clone();
                gate_times_up(level, kind, &mut out, &up);
                for ((out, gate), up) in out.iter().zip(&gate).zip(&up) {
                    let x = f64::from(*gate);
                    let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
                    let exact = match kind {
                        Gate::Silu => x / (1.0 + (-x).exp()),
                        Gate::GeluTanh => 0.5 * x * (1.0 + inner.tanh()),
                    } * f64::from(*up);
                    assert!(
                        (f64::from(*out) - exact).abs() < 1e-6 * (1.0 + exact.abs()),
                        "{kind:?} {gate}: {out} {exact}"
                    );
                }
            }
        }
    }

    /// Attention of one query in f64, straight from the definition.
    fn exact(q: &[f32], keys: &[f32], values: &[f32], stride: usize, n_keys: usize, cap: Option<f32>) -> Vec<f64> {
        let dot = |t: usize| q.iter().zip(&keys[t * stride..]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let capped = |s: f64| cap.map_or(s, |cap| f64::from(cap) * (s / f64::from(cap)).tanh());
        let weights: Vec<f64> = (0..n_keys).map(|t| capped(dot(t)).exp()).collect();
        let total: f64 = weights.iter().sum();
        let value = |d: usize| (0..n_keys).map(|t| weights[t] * f64::from(values[t * stride + d])).sum::<f64>() / total;
        (0..q.len()).map(value).collect()
    }

    #[test]
    fn attention_in_parts_is_that_of_its_definition() {
        for (group, head_dim, n_keys, part, cap) in
            [(3, 64, 300, 128, None), (1, 8, 1, 128, None), (4, 80, 77, 16, Some(5.0)), (2, 128, 256, 128, None)]
        {
            let stride = head_dim + 24;
            let wave = |n: usize, f: f32| (0..n).map(|i| (i as f32 * f).sin()).collect::<Vec<f32>>();
            let q = wave(group * head_dim, 0.37);
            let (keys, values) = (wave(n_keys * stride, 0.11), wave(n_keys * stride, 0.23));
            for level in available() {
                let part_len = part_len(group, head_dim, part);
                let mut parts = vec![f32::NAN; n_keys.div_ceil(part) * part_len];
                for (i, out) in parts.chunks_mut(part_len).enumerate() {
                    let (keys, values) = (&keys[i * part * stride..], &values[i * part * stride..]);
                    let cache = HeadCache { keys, values, stride, n_keys: part.min(n_keys - i * part) };
                    attend(level, group, &q, cache, cap, out);
                }
                let mut out = vec![f32::NAN; group * head_dim];
                merge(group, &parts, part_len, &mut out);
                for (q, out) in q.chunks(head_dim).zip(out.chunks(head_dim)) {
                    let expected = exact(q, &keys, &values, stride, n_keys, cap);
                    for (out, expected) in out.iter().zip(expected) {
                        assert!(
                            (f64::from(*out) - expected).abs() < 1e-5,
                            "{level:?} {group} {head_dim}: {out} {expected}"
                        );
                    }
                }
            }
        }
    }
}
