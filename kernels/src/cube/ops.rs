//! The small operations between products: embedding, norm with residual, rotary embedding with the cache's new rows, activation,
//! argmax, negative log-likelihood. One cube a row, fp32 inside.

use super::decode::{Decode, Format, Stored};
use super::reduce::cube_sum;
use cubecl::prelude::*;

/// Units of a cube that works on a row.
pub const ROW_UNITS: u32 = 256;

/// Words of the state that a recorded decode keeps on the device.
pub const STATE_POSITION: u32 = 0;
pub const STATE_TOKEN: u32 = 1;
/// Tokens generated so far start here.
pub const STATE_HISTORY: u32 = 2;

/// Writes the rows of a table that `tokens` name, times `scale`.
///
/// # Shapes
/// `tokens` `[n]` from `first` on, `x` `[n, n_cols]`.
#[cube(launch_unchecked)]
pub fn embed_kernel<D: Decode>(
    table: Stored,
    tokens: &[u32],
    x: &mut [f32],
    first: u32,
    scale: f32,
    #[comptime] format: Format,
) {
    let token = tokens[(first + CUBE_POS_X) as usize];
    let n_cols = table.n_cols;
    let mut col = UNIT_POS_X;
    while col < n_cols {
        x[(CUBE_POS_X * n_cols + col) as usize] = D::value(&table, token, col, format) * scale;
        col += CUBE_DIM_X;
    }
}

/// What [`add_norm_kernel`] does; fixed when it is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AddNorm {
    /// `x += delta` first.
    pub add: bool,
    /// The delta goes through a norm of its own before (Gemma).
    pub norm_delta: bool,
    /// The normed row is written.
    pub norm: bool,
}

/// `x += delta; out = RMSNorm(x) · w`, one cube per row.
///
/// # Shapes
/// `x`, `delta`, `out` `[n, n_cols]`, `weight`, `delta_weight` `[n_cols]`.
#[cube(launch_unchecked)]
pub fn add_norm_kernel<A: Float>(
    x: &mut [f32],
    delta: &[A],
    delta_weight: &[f32],
    weight: &[f32],
    out: &mut [A],
    n_cols: u32,
    eps: f32,
    #[comptime] spec: AddNorm,
) {
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(ROW_UNITS as usize));
    let base = CUBE_POS_X * n_cols;
    let mut delta_scale = 1.0f32;
    if comptime!(spec.norm_delta) {
        let mut squares = 0.0f32;
        let mut col = UNIT_POS_X;
        while col < n_cols {
            let value = f32::cast_from(delta[(base + col) as usize]);
            squares += value * value;
            col += CUBE_DIM_X;
        }
        let total = cube_sum(squares, &mut scratch);
        delta_scale = (total / f32::cast_from(n_cols) + eps).inverse_sqrt();
    }
    let mut squares = 0.0f32;
    let mut col = UNIT_POS_X;
    while col < n_cols {
        let at = (base + col) as usize;
        let mut value = x[at];
        if comptime!(spec.add) {
            let mut change = f32::cast_from(delta[at]);
            if comptime!(spec.norm_delta) {
                change = change * delta_scale * delta_weight[col as usize];
            }
            value += change;
            x[at] = value;
        }
        squares += value * value;
        col += CUBE_DIM_X;
    }
    if comptime!(spec.norm) {
        let total = cube_sum(squares, &mut scratch);
        let scale = (total / f32::cast_from(n_cols) + eps).inverse_sqrt();
        let mut col = UNIT_POS_X;
        while col < n_cols {
            let at = (base + col) as usize;
            out[at] = A::cast_from(x[at] * scale * weight[col as usize]);
            col += CUBE_DIM_X;
        }
    }
}

/// Between gate and down projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Gate {
    Silu,
    Gelu,
    GeluTanh,
}

/// Returns the activation of one value.
#[cube]
pub fn activate(x: f32, #[comptime] gate: Gate) -> f32 {
    match gate {
        Gate::Silu => x / (1.0f32 + (-x).exp()),
        Gate::Gelu => 0.5f32 * x * (1.0f32 + cubecl::frontend::Erf::erf(x * core::f32::consts::FRAC_1_SQRT_2)),
        Gate::GeluTanh => {
            let inner = 0.797_884_6f32 * (x + 0.044_715f32 * x * x * x);
            // (1 + tanh u) / 2 is a logistic of 2u, and exp is exact where CUDA's tanh may be an approximation.
            x / (1.0f32 + (-2.0f32 * inner).exp())
        }
    }
}

/// `out = act(gate) · up`; without `multiply`, `out = act(gate)` alone.
///
/// # Shapes
/// `gate_up` `[n, 2·n_cols]`, gate first; `out` columns `first..first + n_cols` of `[n, out_stride]`.
#[cube(launch_unchecked)]
pub fn gate_kernel<A: Float>(
    gate_up: &[A],
    out: &mut [A],
    n_cols: u32,
    n_values: u32,
    first: u32,
    out_stride: u32,
    #[comptime] gate: Gate,
    #[comptime] multiply: bool,
) {
    let at = ABSOLUTE_POS as u32;
    if at < n_values {
        let (row, col) = (at / n_cols, at % n_cols);
        let gate_at = row * 2u32 * n_cols + col;
        let mut value = activate(f32::cast_from(gate_up[gate_at as usize]), gate);
        if comptime!(multiply) {
            value *= f32::cast_from(gate_up[(gate_at + n_cols) as usize]);
        }
        out[(row * out_stride + first + col) as usize] = A::cast_from(value);
    }
}

/// Heads and cache of one layer; fixed when a kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Heads {
    pub n_heads: u32,
    pub n_kv_heads: u32,
    pub head_dim: u32,
    /// Query and key heads go through an RMSNorm of their own first (Qwen3, Gemma 3).
    pub qk_norm: bool,
    /// Leading values of a head that are rotated; the rest pass as they are.
    pub rotary_dim: u32,
}

/// Rotates queries and keys (rotate-half), norms them before where the model does, and appends keys and values to the cache. A cube
/// a token and head: queries, then keys, then values.
///
/// # Shapes
/// `qkv` `[n, (n_heads + 2·n_kv_heads)·head_dim]`, `table` `[positions, rotary_dim / 2, 2]` cos and sin, `q` `[n, n_heads·head_dim]`,
/// `keys`, `values` `[n_kv_heads, capacity, head_dim]`, `q_norm`, `k_norm` `[head_dim]`; `state` holds the position of the first token.
#[cube(launch_unchecked)]
pub fn rope_append_kernel<A: Float, C: Float>(
    qkv: &[A],
    table: &[f32],
    q_norm: &[f32],
    k_norm: &[f32],
    q: &mut [A],
    keys: &mut [C],
    values: &mut [C],
    state: &[u32],
    capacity: u32,
    eps: f32,
    #[comptime] heads: Heads,
) {
    let half = comptime!(heads.rotary_dim / 2);
    let head_dim = comptime!(heads.head_dim);
    let n_all = comptime!(heads.n_heads + 2 * heads.n_kv_heads);
    let token = CUBE_POS_X;
    let head = CUBE_POS_Y;
    let position = state[STATE_POSITION as usize] + token;
    let from = (token * n_all + head) * head_dim;
    if head >= comptime!(heads.n_heads + heads.n_kv_heads) {
        let to = ((head - comptime!(heads.n_heads + heads.n_kv_heads)) * capacity + position) * head_dim;
        let mut i = UNIT_POS_X;
        while i < head_dim {
            values[(to + i) as usize] = C::cast_from(qkv[(from + i) as usize]);
            i += CUBE_DIM_X;
        }
    } else {
        let is_query = head < comptime!(heads.n_heads);
        let mut scale = 1.0f32;
        if comptime!(heads.qk_norm) {
            let mut scratch = Shared::<[f32]>::new_slice(comptime!(ROW_UNITS as usize));
            let mut squares = 0.0f32;
            let mut i = UNIT_POS_X;
            while i < head_dim {
                let value = f32::cast_from(qkv[(from + i) as usize]);
                squares += value * value;
                i += CUBE_DIM_X;
            }
            let total = cube_sum(squares, &mut scratch);
            scale = (total / comptime!(heads.head_dim as f32) + eps).inverse_sqrt();
        }
        let mut i = UNIT_POS_X;
        while i < half {
            let mut low = f32::cast_from(qkv[(from + i) as usize]);
            let mut high = f32::cast_from(qkv[(from + half + i) as usize]);
            if comptime!(heads.qk_norm) {
                let low_weight = select(is_query, q_norm[i as usize], k_norm[i as usize]);
                let high_weight = select(is_query, q_norm[(half + i) as usize], k_norm[(half + i) as usize]);
                low *= scale * low_weight;
                high *= scale * high_weight;
            }
            let angle = (position * half + i) * 2u32;
            let (cos, sin) = (table[angle as usize], table[(angle + 1u32) as usize]);
            let first = low * cos - high * sin;
            let second = high * cos + low * sin;
            if is_query {
                let to = (token * comptime!(heads.n_heads) + head) * head_dim;
                q[(to + i) as usize] = A::cast_from(first);
                q[(to + half + i) as usize] = A::cast_from(second);
            } else {
                let to = ((head - comptime!(heads.n_heads)) * capacity + position) * head_dim;
                keys[(to + i) as usize] = C::cast_from(first);
                keys[(to + half + i) as usize] = C::cast_from(second);
            }
            i += CUBE_DIM_X;
        }
        if comptime!(heads.rotary_dim < heads.head_dim) {
            let mut i = UNIT_POS_X + comptime!(heads.rotary_dim);
            while i < head_dim {
                let mut value = f32::cast_from(qkv[(from + i) as usize]);
                if comptime!(heads.qk_norm) {
                    value *= scale * select(is_query, q_norm[i as usize], k_norm[i as usize]);
                }
                if is_query {
                    q[((token * comptime!(heads.n_heads) + head) * head_dim + i) as usize] = A::cast_from(value);
                } else {
                    let to = ((head - comptime!(heads.n_heads)) * capacity + position) * head_dim;
                    keys[(to + i) as usize] = C::cast_from(value);
                }
                i += CUBE_DIM_X;
            }
        }
    }
}

/// `l = cap · tanh(l / cap)` in place.
#[cube(launch_unchecked)]
pub fn soft_cap_kernel(logits: &mut [f32], n: u32, cap: f32) {
    let at = ABSOLUTE_POS;
    if at < n as usize {
        logits[at] = cap * (logits[at] / cap).tanh();
    }
}

/// Adds a row to every row.
///
/// # Shapes
/// `y` `[n, n_cols]`, `bias` `[n_cols]`.
#[cube(launch_unchecked)]
pub fn add_bias_kernel<A: Float>(y: &mut [A], bias: &[f32], n_values: u32, n_cols: u32) {
    let at = ABSOLUTE_POS as u32;
    if at < n_values {
        y[at as usize] = A::cast_from(f32::cast_from(y[at as usize]) + bias[(at % n_cols) as usize]);
    }
}
