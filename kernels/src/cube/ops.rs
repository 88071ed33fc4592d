//! The small operations between products: embedding, norm with residual, rotary embedding with the cache's new rows, activation,
//! argmax, negative log-likelihood. One cube a row, fp32 inside.

use super::decode::{Decode, Format, Stored};
use super::overlap::await_earlier;
use super::reduce::{cube_max, cube_sum};
use cubecl::prelude::*;

/// Units of a cube that works on a row.
pub const ROW_UNITS: u32 = 256;

/// Values that a unit loads before it looks at them.
const IN_FLIGHT: u32 = 8;

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

/// `x += delta; out = RMSNorm(x) · w`, a cube a row.
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

/// Writes the device's time as entry `entry` of a clock's readings, two words each.
#[cube]
fn read_clock(clock: &mut [u32], entry: u32) {
    let nanoseconds: u64;
    gpu_asm!("mov.u64 {}, %%globaltimer;", out(_) nanoseconds);
    clock[(2u32 * entry) as usize] = u32::cast_from(nanoseconds & 0xffff_ffffu64);
    clock[(2u32 * entry + 1u32) as usize] = u32::cast_from(nanoseconds >> 32u64);
}

/// Writes when it runs, in nanoseconds of the device's clock, as a clock's first reading. NVIDIA only.
#[cube(launch_unchecked, create_dummy_kernel)]
pub fn stamp_kernel(clock: &mut [u32]) {
    if ABSOLUTE_POS == 0 {
        read_clock(clock, 0u32);
    }
}

/// Finds the largest logit of the last row, remembers it as the next token and moves the position on: the end of a recorded step.
/// With a clock it writes when that was, behind the readings of the steps before.
///
/// Cubes look through parts of the row, and the last of them chooses; one cube does where cubes can't hand each other results.
///
/// # Shapes
/// `logits` `[n]`, `state` as the `STATE_` constants say, `clock` two words a reading, `found` `[n_cubes, 2]`: a part's largest logit
/// and where it is; `counter` one word, zero before and after.
#[cube(launch_unchecked, create_dummy_kernel)]
#[expect(clippy::too_many_arguments, reason = "a kernel's buffers and sizes")]
pub fn choose_kernel(
    logits: &[f32],
    state: &mut [u32],
    clock: &mut [u32],
    found: &mut [u32],
    counter: &mut [Atomic<u32>],
    n: u32,
    #[comptime] n_cubes: u32,
    #[comptime] units: u32,
    #[comptime] has_clock: bool,
    #[comptime] overlaps: bool,
) {
    if comptime!(overlaps) {
        await_earlier();
    }
    let mut best = Shared::<[f32]>::new_slice(comptime!(units as usize));
    let mut place = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let part = (n + comptime!(n_cubes - 1)) / n_cubes;
    let first = min(CUBE_POS_X * part, n);
    let (value, index) = best_of_row(logits, first, min(part, n - first));
    best[UNIT_POS_X as usize] = value;
    place[UNIT_POS_X as usize] = first + index;
    fold_best(&mut best, &mut place, units);
    if comptime!(n_cubes > 1) {
        let mut is_last = Shared::<[u32]>::new_slice(1usize);
        if UNIT_POS_X == 0 {
            found[(2u32 * CUBE_POS_X) as usize] = u32::reinterpret(best[0]);
            found[(2u32 * CUBE_POS_X + 1u32) as usize] = place[0];
        }
        sync_storage();
        if UNIT_POS_X == 0 {
            is_last[0] = u32::cast_from(counter[0].fetch_add(1u32) + 1u32 == n_cubes);
        }
        sync_cube();
        if is_last[0] == 0u32 {
            terminate!();
        }
        sync_storage();
        let from = min(UNIT_POS_X, comptime!(n_cubes - 1));
        best[UNIT_POS_X as usize] = f32::reinterpret(found[(2u32 * from) as usize]);
        place[UNIT_POS_X as usize] = found[(2u32 * from + 1u32) as usize];
        fold_best(&mut best, &mut place, units);
    }
    if UNIT_POS_X == 0 {
        if comptime!(n_cubes > 1) {
            counter[0].store(0u32);
        }
        let position = state[STATE_POSITION as usize];
        let n_chosen = state[STATE_HISTORY as usize];
        state[STATE_TOKEN as usize] = place[0];
        state[(STATE_HISTORY + 1u32 + n_chosen) as usize] = place[0];
        state[STATE_HISTORY as usize] = n_chosen + 1u32;
        state[STATE_POSITION as usize] = position + 1u32;
        if comptime!(has_clock) {
            read_clock(clock, n_chosen + 1u32);
        }
    }
}

/// Returns a unit's own largest value of a row and where it is; the first of equals.
#[cube]
fn best_of_row(logits: &[f32], base: u32, n: u32) -> (f32, u32) {
    let mut value = f32::reinterpret(0xff7f_ffffu32);
    let mut index = 0u32;
    let mut at = UNIT_POS_X;
    while at < n {
        // Several loads are on their way at once: the row is read at memory's speed, not at its latency.
        let mut some = Array::<f32>::new(IN_FLIGHT as usize);
        #[unroll]
        for i in 0..IN_FLIGHT {
            let place = at + i * CUBE_DIM_X;
            some[i as usize] = logits[(base + select(place < n, place, at)) as usize];
        }
        #[unroll]
        for i in 0..IN_FLIGHT {
            if some[i as usize] > value {
                value = some[i as usize];
                let place = at + i * CUBE_DIM_X;
                index = select(place < n, place, at);
            }
        }
        at += IN_FLIGHT * CUBE_DIM_X;
    }
    (value, index)
}

/// Returns a unit's own part of the sum over a row of e^(logit - largest).
#[cube]
fn exp_sum_of_row(logits: &[f32], base: u32, n: u32, largest: f32) -> f32 {
    let mut sum = 0.0f32;
    let mut at = UNIT_POS_X;
    while at < n {
        let mut some = Array::<f32>::new(IN_FLIGHT as usize);
        #[unroll]
        for i in 0..IN_FLIGHT {
            let place = at + i * CUBE_DIM_X;
            some[i as usize] = logits[(base + select(place < n, place, at)) as usize];
        }
        #[unroll]
        for i in 0..IN_FLIGHT {
            sum += select(at + i * CUBE_DIM_X < n, (some[i as usize] - largest).exp(), 0.0f32);
        }
        at += IN_FLIGHT * CUBE_DIM_X;
    }
    sum
}

/// Leaves the best of all units in slot 0, the first of equals.
#[cube]
fn fold_best(best: &mut Shared<[f32]>, place: &mut Shared<[u32]>, #[comptime] units: u32) {
    let unit = UNIT_POS_X;
    let width = RuntimeCell::<u32>::new(comptime!(units / 2));
    sync_cube();
    while width.read() > 0u32 {
        let reach = width.read();
        if unit < reach {
            let other = best[(unit + reach) as usize];
            let own = best[unit as usize];
            let other_place = place[(unit + reach) as usize];
            if other > own || (other == own && other_place < place[unit as usize]) {
                best[unit as usize] = other;
                place[unit as usize] = other_place;
            }
        }
        sync_cube();
        width.store(reach / 2u32);
    }
}

/// Negative log-likelihood of each row's target, and the row's own first choice.
///
/// # Shapes
/// `logits` `[n, vocab]`, `targets` from `first` on, `nll` and `choice` likewise.
#[cube(launch_unchecked)]
pub fn nll_kernel(
    logits: &[f32],
    targets: &[u32],
    nll: &mut [f32],
    choice: &mut [u32],
    vocab: u32,
    first: u32,
    #[comptime] units: u32,
) {
    let mut best = Shared::<[f32]>::new_slice(comptime!(units as usize));
    let mut place = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(units as usize));
    let base = CUBE_POS_X * vocab;
    let (value, index) = best_of_row(logits, base, vocab);
    let largest = cube_max(value, &mut scratch);
    let total = cube_sum(exp_sum_of_row(logits, base, vocab, largest), &mut scratch);
    best[UNIT_POS_X as usize] = value;
    place[UNIT_POS_X as usize] = index;
    fold_best(&mut best, &mut place, units);
    if UNIT_POS_X == 0 {
        let row = (first + CUBE_POS_X) as usize;
        nll[row] = largest + total.ln() - logits[(base + targets[row]) as usize];
        choice[row] = place[0];
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
