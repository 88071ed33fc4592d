//! Attention of one token over a long cache, in one launch: rotates its queries and key, appends key and value, and attends, the
//! keys split over cubes. Where the device lets cubes hand each other results, the last of them combines what all found; elsewhere a
//! second launch does.
//!
//! Each group of eight lanes scores a key at a time for all query heads that share it, so that keys and values are read once.

use super::ops::{Heads, STATE_POSITION};
use super::reduce::{cube_max, cube_sum};
use cubecl::prelude::*;

/// Units of a cube.
pub const UNITS: u32 = 128;

/// Lanes that score a key together.
const LANES: u32 = 8;

/// Most query heads that a cube serves at once: their queries are in registers.
pub const MAX_GROUP: u32 = 4;

/// What a launch fixes when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Split {
    pub heads: Heads,
    /// Query heads of a cube.
    pub group: u32,
    /// Keys of a cube.
    pub chunk: u32,
    pub n_splits: u32,
    /// The last cube combines.
    pub combines: bool,
}

/// A value that no score reaches: what an empty chunk's maximum is.
#[cube]
fn lowest() -> f32 {
    f32::reinterpret(0xff7f_ffffu32)
}

/// Writes the outputs of a cube's heads from all chunks' shares.
///
/// # Shapes
/// `partial` `[n_splits, n_heads, head_dim + 2]`: a chunk's unnormalized sum, its maximum and its total; `out` `[n_heads·head_dim]`.
#[cube]
fn combine(partial: &mut [f32], out: &mut [f32], first_head: u32, #[comptime] split: Split) {
    let head_dim = comptime!(split.heads.head_dim);
    let width = comptime!(split.heads.head_dim + 2);
    let stride = comptime!(split.heads.n_heads * (split.heads.head_dim + 2));
    let mut i = UNIT_POS_X;
    while i < comptime!(split.group * split.heads.head_dim) {
        let head = first_head + i / head_dim;
        let dim = i % head_dim;
        let base = head * width;
        let mut largest = lowest();
        for s in 0..split.n_splits {
            largest = max(largest, partial[(s * stride + base + head_dim) as usize]);
        }
        let mut sum = 0.0f32;
        let mut total = 0.0f32;
        for s in 0..split.n_splits {
            let at = s * stride + base;
            let weight = (partial[(at + head_dim) as usize] - largest).exp();
            sum += weight * partial[(at + dim) as usize];
            total += weight * partial[(at + head_dim + 1u32) as usize];
        }
        out[(head * head_dim + dim) as usize] = sum / total;
        i += UNITS;
    }
}

/// # Shapes
/// `qkv` `[(n_heads + 2·n_kv_heads)·head_dim]` f32 before rotation, `table` `[capacity, head_dim / 2, 2]`, `keys`, `values`
/// `[n_kv_heads, capacity, head_dim]` in vectors, `partial` as [`combine`] reads it, `out` `[n_heads·head_dim]`, `counters`
/// `[cubes in x]`, zero before and after.
#[cube(launch_unchecked, create_dummy_kernel)]
#[allow(clippy::too_many_arguments)]
pub fn decode_attention_kernel<C: Float, W: Size>(
    qkv: &[f32],
    table: &[f32],
    keys: &mut [Vector<C, W>],
    values: &mut [Vector<C, W>],
    partial: &mut [f32],
    out: &mut [f32],
    counters: &mut [Atomic<u32>],
    state: &[u32],
    capacity: u32,
    window: u32,
    scale: f32,
    #[comptime] split: Split,
) {
    let head_dim = comptime!(split.heads.head_dim);
    let half = comptime!(split.heads.head_dim / 2);
    let group = comptime!(split.group);
    let width = W::value().comptime() as u32;
    let row_vectors = comptime!(split.heads.head_dim / width);
    let lane_vectors = comptime!(row_vectors / LANES);
    let heads_a_kv = comptime!(split.heads.n_heads / split.heads.n_kv_heads);
    let cubes_a_kv = comptime!(heads_a_kv / split.group);

    let mut query = Shared::<[f32]>::new_slice(comptime!((split.group * split.heads.head_dim) as usize));
    let mut scores = Shared::<[f32]>::new_slice(comptime!((split.group * split.chunk) as usize));
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(UNITS as usize));
    let n_row_groups = comptime!(UNITS / row_vectors);
    let mut sums = Shared::<[f32]>::new_slice(comptime!((n_row_groups * split.group * split.heads.head_dim) as usize));
    let mut totals = Shared::<[f32]>::new_slice(comptime!((2 * split.group) as usize));

    let kv_head = CUBE_POS_X / cubes_a_kv;
    let first_head = CUBE_POS_X * group;
    let position = state[STATE_POSITION as usize];
    let start = CUBE_POS_Y * comptime!(split.chunk);
    let first_key = select(position + 1u32 > window, position + 1u32 - window, 0u32);
    let begin = max(start, first_key);
    let end = min(start + comptime!(split.chunk), position + 1u32);

    let mut i = UNIT_POS_X;
    while i < comptime!(split.group * half) {
        let from = (first_head + i / half) * head_dim + i % half;
        let (low, high) = (qkv[from as usize], qkv[(from + half) as usize]);
        let angle = (position * half + i % half) * 2u32;
        let (cos, sin) = (table[angle as usize], table[(angle + 1u32) as usize]);
        let to = (i / half) * head_dim + i % half;
        query[to as usize] = (low * cos - high * sin) * scale;
        query[(to + half) as usize] = (high * cos + low * sin) * scale;
        i += UNITS;
    }
    if position >= start && position < start + comptime!(split.chunk) {
        let key_from = (comptime!(split.heads.n_heads) + kv_head) * head_dim;
        let value_from = key_from + comptime!(split.heads.n_kv_heads * split.heads.head_dim);
        let to = (kv_head * capacity + position) * row_vectors;
        let mut v = UNIT_POS_X;
        while v < row_vectors {
            let mut key = Vector::<C, W>::empty();
            let mut value = Vector::<C, W>::empty();
            #[unroll]
            for e in 0..width {
                let dim = v * width + e;
                let angle = (position * half + dim % half) * 2u32;
                let (cos, sin) = (table[angle as usize], table[(angle + 1u32) as usize]);
                let own = qkv[(key_from + dim) as usize];
                let other = qkv[(key_from + (dim + half) % head_dim) as usize];
                let rotated = own * cos + select(dim < half, -other, other) * sin;
                key.insert(e as usize, C::cast_from(rotated));
                value.insert(e as usize, C::cast_from(qkv[(value_from + dim) as usize]));
            }
            keys[(to + v) as usize] = key;
            values[(to + v) as usize] = value;
            v += UNITS;
        }
    }
    sync_storage();

    let lane = UNIT_POS_X % LANES;
    let row = UNIT_POS_X / LANES;
    let rows = comptime!(UNITS / LANES);
    let mut q = Array::<f32>::new(comptime!((split.group * lane_vectors * width) as usize));
    #[unroll]
    for h in 0..group {
        #[unroll]
        for v in 0..lane_vectors {
            #[unroll]
            for e in 0..width {
                let from = comptime!(h * split.heads.head_dim) + (lane + comptime!(v * LANES)) * width + e;
                q[comptime!(((h * lane_vectors + v) * width + e) as usize)] = query[from as usize];
            }
        }
    }
    #[unroll]
    for step in 0..comptime!(split.chunk / rows) {
        let key = start + comptime!(step * rows) + row;
        let is_seen = key >= begin && key < end;
        let base = (kv_head * capacity + select(is_seen, key, 0u32)) * row_vectors;
        let mut dots = Array::<f32>::new(comptime!(split.group as usize));
        #[unroll]
        for h in 0..group {
            dots[h as usize] = 0.0;
        }
        if is_seen {
            #[unroll]
            for v in 0..lane_vectors {
                let vector = keys[(base + lane + comptime!(v * LANES)) as usize];
                #[unroll]
                for e in 0..width {
                    let value = f32::cast_from(vector.extract(comptime!(e as usize)));
                    #[unroll]
                    for h in 0..group {
                        dots[h as usize] += value * q[comptime!(((h * lane_vectors + v) * width + e) as usize)];
                    }
                }
            }
        }
        #[unroll]
        for h in 0..group {
            let mut dot = dots[h as usize];
            dot += plane_shuffle_xor(dot, 4u32);
            dot += plane_shuffle_xor(dot, 2u32);
            dot += plane_shuffle_xor(dot, 1u32);
            if lane == 0u32 {
                let at = comptime!(h * split.chunk + step * rows) + row;
                scores[at as usize] = select(is_seen, dot, lowest());
            }
        }
    }
    sync_cube();
    #[unroll]
    for h in 0..group {
        let mut largest = lowest();
        let mut k = UNIT_POS_X;
        while k < comptime!(split.chunk) {
            largest = max(largest, scores[(comptime!(h * split.chunk) + k) as usize]);
            k += UNITS;
        }
        let largest = cube_max(largest, &mut scratch);
        let mut total = 0.0f32;
        let mut k = UNIT_POS_X;
        while k < comptime!(split.chunk) {
            let at = (comptime!(h * split.chunk) + k) as usize;
            let key = start + k;
            let share = select(key >= begin && key < end, (scores[at] - largest).exp(), 0.0f32);
            scores[at] = share;
            total += share;
            k += UNITS;
        }
        let total = cube_sum(total, &mut scratch);
        if UNIT_POS_X == 0 {
            totals[comptime!((2 * h) as usize)] = largest;
            totals[comptime!((2 * h + 1) as usize)] = total;
        }
    }
    sync_cube();

    let column = UNIT_POS_X % row_vectors;
    let row_group = UNIT_POS_X / row_vectors;
    let mut acc = Array::<f32>::new(comptime!((split.group * width) as usize));
    #[unroll]
    for i in 0..comptime!(split.group * width) {
        acc[i as usize] = 0.0;
    }
    let mut key = begin + row_group;
    while key < end {
        let vector = values[((kv_head * capacity + key) * row_vectors + column) as usize];
        #[unroll]
        for h in 0..group {
            let share = scores[(comptime!(h * split.chunk) + key - start) as usize];
            #[unroll]
            for e in 0..width {
                acc[comptime!((h * width + e) as usize)] +=
                    share * f32::cast_from(vector.extract(comptime!(e as usize)));
            }
        }
        key += n_row_groups;
    }
    #[unroll]
    for h in 0..group {
        #[unroll]
        for e in 0..width {
            let at = (row_group * group + h) * head_dim + column * width + e;
            sums[at as usize] = acc[comptime!((h * width + e) as usize)];
        }
    }
    sync_cube();
    let mut i = UNIT_POS_X;
    while i < comptime!(split.group * split.heads.head_dim) {
        let mut sum = 0.0f32;
        #[unroll]
        for r in 0..n_row_groups {
            sum += sums[(comptime!(r * split.group * split.heads.head_dim) + i) as usize];
        }
        let head = i / head_dim;
        if comptime!(split.n_splits == 1) {
            out[(first_head * head_dim + i) as usize] = sum / totals[(2u32 * head + 1u32) as usize];
        } else {
            let base =
                (CUBE_POS_Y * comptime!(split.heads.n_heads) + first_head + head) * comptime!(split.heads.head_dim + 2);
            partial[(base + i % head_dim) as usize] = sum;
            if i % head_dim == 0u32 {
                partial[(base + head_dim) as usize] = totals[(2u32 * head) as usize];
                partial[(base + head_dim + 1u32) as usize] = totals[(2u32 * head + 1u32) as usize];
            }
        }
        i += UNITS;
    }
    if comptime!(split.combines) {
        sync_storage();
        let mut is_last = Shared::<[u32]>::new_slice(1usize);
        if UNIT_POS_X == 0 {
            let before = counters[CUBE_POS_X as usize].fetch_add(1u32);
            is_last[0] = u32::cast_from(before + 1u32 == comptime!(split.n_splits));
        }
        sync_cube();
        if is_last[0] == 1u32 {
            sync_storage();
            combine(partial, out, first_head, split);
            if UNIT_POS_X == 0 {
                counters[CUBE_POS_X as usize].store(0u32);
            }
        }
    }
}

/// Combines in a launch of its own, a cube as many heads as one of the other kernel serves.
#[cube(launch_unchecked)]
pub fn combine_kernel(partial: &mut [f32], out: &mut [f32], #[comptime] split: Split) {
    combine(partial, out, CUBE_POS_X * comptime!(split.group), split);
}
