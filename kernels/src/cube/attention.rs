//! Causal attention over the cache, for any head width and runtime: one cube per query and head, keys in chunks with a running softmax.

use super::ops::{Heads, STATE_POSITION};
use super::reduce::{cube_max, cube_sum};
use cubecl::prelude::*;

/// Units of a cube, and keys it scores at a time.
pub const ATTENTION_UNITS: u32 = 128;

/// What a model's attention adds to the plain one; fixed when a kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Scoring {
    /// Scores go through `cap · tanh(score / cap)` (Gemma 2).
    pub soft_cap: bool,
}

/// Queries from the state's position on against all keys up to their own, or the last `window` of them.
///
/// # Shapes
/// `q`, `out` `[n, n_heads·head_dim]`, `keys`, `values` `[n_kv_heads, capacity, head_dim]`.
#[cube(launch_unchecked)]
pub fn attention_kernel<A: Float, C: Float>(
    q: &[A],
    keys: &[C],
    values: &[C],
    out: &mut [A],
    state: &[u32],
    capacity: u32,
    window: u32,
    scale: f32,
    cap: f32,
    #[comptime] heads: Heads,
    #[comptime] scoring: Scoring,
) {
    let head_dim = comptime!(heads.head_dim);
    let units = ATTENTION_UNITS;
    let dims_a_unit = comptime!(heads.head_dim.div_ceil(ATTENTION_UNITS));
    let mut query = Shared::<[f32]>::new_slice(comptime!(heads.head_dim as usize));
    let mut shares = Shared::<[f32]>::new_slice(comptime!(ATTENTION_UNITS as usize));
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(ATTENTION_UNITS as usize));
    let token = CUBE_POS_X;
    let head = CUBE_POS_Y;
    let kv_head = head / comptime!(heads.n_heads / heads.n_kv_heads);
    let position = state[STATE_POSITION as usize] + token;
    let q_at = (token * comptime!(heads.n_heads) + head) * head_dim;
    let mut i = UNIT_POS_X;
    while i < head_dim {
        query[i as usize] = f32::cast_from(q[(q_at + i) as usize]) * scale;
        i += units;
    }
    sync_cube();
    let first = select(position + 1u32 > window, position + 1u32 - window, 0u32);
    let mut largest = f32::reinterpret(0xff7f_ffffu32);
    let mut total = 0.0f32;
    let mut sums = Array::<f32>::new(comptime!(dims_a_unit as usize));
    #[unroll]
    for d in 0..dims_a_unit {
        sums[d as usize] = 0.0;
    }
    let mut chunk = first;
    while chunk <= position {
        let key = chunk + UNIT_POS_X;
        let mut score = f32::reinterpret(0xff7f_ffffu32);
        if key <= position {
            let base = (kv_head * capacity + key) * head_dim;
            let mut dot = 0.0f32;
            for d in 0..head_dim {
                dot += query[d as usize] * f32::cast_from(keys[(base + d) as usize]);
            }
            if comptime!(scoring.soft_cap) {
                dot = cap * (dot / cap).tanh();
            }
            score = dot;
        }
        let new_largest = max(largest, cube_max(score, &mut scratch));
        let share = select(key <= position, (score - new_largest).exp(), 0.0f32);
        let rescale = (largest - new_largest).exp();
        total = total * rescale + cube_sum(share, &mut scratch);
        shares[UNIT_POS_X as usize] = share;
        sync_cube();
        let n_keys = min(units, position + 1u32 - chunk);
        #[unroll]
        for d in 0..dims_a_unit {
            let dim = UNIT_POS_X + d * units;
            if dim < head_dim {
                let mut sum = sums[d as usize] * rescale;
                for k in 0..n_keys {
                    let at = (kv_head * capacity + chunk + k) * head_dim + dim;
                    sum += shares[k as usize] * f32::cast_from(values[at as usize]);
                }
                sums[d as usize] = sum;
            }
        }
        sync_cube();
        largest = new_largest;
        chunk += units;
    }
    #[unroll]
    for d in 0..dims_a_unit {
        let dim = UNIT_POS_X + d * units;
        if dim < head_dim {
            out[(q_at + dim) as usize] = A::cast_from(sums[d as usize] / total);
        }
    }
}
