//! Attention of one token over a long cache, in one launch: rotates its queries and key, appends key and value, and attends, the
//! keys split over cubes. Where the device lets cubes hand each other results, the last of them combines what all found; elsewhere a
//! second launch does.
//!
//! Each group of eight lanes scores a key at a time for all query heads that share it, so that keys and values are read once.

mod keys;

use super::ops::{Heads, STATE_POSITION};
use super::overlap::{await_earlier, let_later_begin};
use cubecl::prelude::*;
use keys::{freshen, key_batch, load_keys, load_values, score_keys};

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
    /// Units of a cube.
    pub units: u32,
    /// Keys of a cube.
    pub chunk: u32,
    pub n_splits: u32,
    /// The last cube combines.
    pub combines: bool,
    /// The launch may begin before the one in front of it ends: see [`overlap`](super::overlap).
    pub overlaps: bool,
}

/// A value that no score reaches: what an empty chunk's maximum is.
#[cube]
fn lowest() -> f32 {
    f32::reinterpret(0xff7f_ffffu32)
}

/// Writes the outputs of a cube's heads from the shares of `n_shares` chunks, the first of them `first_share`.
///
/// # Shapes
/// `partial` `[n_splits, n_heads, head_dim + 2]`: a chunk's unnormalized sum, its maximum and its total; `out` `[n_heads·head_dim]`.
#[cube]
fn combine(
    partial: &mut [f32],
    out: &mut [f32],
    first_head: u32,
    first_share: u32,
    n_shares: u32,
    #[comptime] split: Split,
) {
    let head_dim = comptime!(split.heads.head_dim);
    let group = comptime!(split.group);
    let width = comptime!(split.heads.head_dim + 2);
    let stride = comptime!(split.heads.n_heads * (split.heads.head_dim + 2));
    // All maxima and totals at once: one after the other, each would cost a trip to memory.
    let mut stats = Shared::<[f32]>::new_slice(comptime!((2 * split.n_splits * split.group) as usize));
    let mut i = UNIT_POS_X;
    while i < n_shares * group {
        let at = (first_share + i / group) * stride + (first_head + i % group) * width + head_dim;
        stats[(2u32 * i) as usize] = partial[at as usize];
        stats[(2u32 * i + 1u32) as usize] = partial[(at + 1u32) as usize];
        i += split.units;
    }
    sync_cube();
    let mut i = UNIT_POS_X;
    while i < comptime!(split.group * split.heads.head_dim) {
        let head = i / head_dim;
        let mut largest = lowest();
        for s in 0..n_shares {
            largest = max(largest, stats[(2u32 * (s * group + head)) as usize]);
        }
        let mut at = first_share * stride + (first_head + head) * width + i % head_dim;
        let mut sum = 0.0f32;
        let mut total = 0.0f32;
        for s in 0..n_shares {
            let stat = 2u32 * (s * group + head);
            let weight = (stats[stat as usize] - largest).exp();
            sum += weight * partial[at as usize];
            total += weight * stats[(stat + 1u32) as usize];
            at += stride;
        }
        out[(first_head * head_dim + i) as usize] = sum / total;
        i += split.units;
    }
}

/// Rotates the cube's queries into shared memory, scaled.
#[cube]
fn rotate_queries(
    qkv: &[f32],
    table: &[f32],
    query: &mut Shared<[f32]>,
    first_head: u32,
    position: u32,
    scale: f32,
    #[comptime] split: Split,
) {
    let head_dim = comptime!(split.heads.head_dim);
    let half = comptime!(split.heads.head_dim / 2);
    let mut i = UNIT_POS_X;
    while i < comptime!(split.group * half) {
        let from = (first_head + i / half) * head_dim + i % half;
        let (low, high) = (qkv[from as usize], qkv[(from + half) as usize]);
        let angle = (position * half + i % half) * 2u32;
        let (cos, sin) = (table[angle as usize], table[(angle + 1u32) as usize]);
        let to = (i / half) * head_dim + i % half;
        query[to as usize] = (low * cos - high * sin) * scale;
        query[(to + half) as usize] = (high * cos + low * sin) * scale;
        i += split.units;
    }
}

/// Appends the token's rotated key and its value to the cache, and leaves both in `fresh`.
///
/// # Shapes
/// `fresh` two rows of `head_dim` in vectors.
#[cube]
#[expect(clippy::too_many_arguments, reason = "a kernel's buffers and sizes")]
fn append<C: Float, W: Size>(
    qkv: &[f32],
    table: &[f32],
    keys: &mut [Vector<C, W>],
    values: &mut [Vector<C, W>],
    fresh: &mut Shared<[Vector<C, W>]>,
    kv_head: u32,
    position: u32,
    capacity: u32,
    #[comptime] split: Split,
) {
    let head_dim = comptime!(split.heads.head_dim);
    let half = comptime!(split.heads.head_dim / 2);
    let width = W::value().comptime() as u32;
    let row_vectors = comptime!(split.heads.head_dim / width);
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
        fresh[v as usize] = key;
        fresh[(row_vectors + v) as usize] = value;
        v += split.units;
    }
}

/// Turns scores into unnormalized shares, one head per plane; planes beyond the heads do a head's work again.
#[cube]
fn share_out(
    scores: &Shared<[f32]>,
    shares: &mut Shared<[f32]>,
    totals: &mut Shared<[f32]>,
    start: u32,
    begin: u32,
    end: u32,
    #[comptime] split: Split,
) {
    let chunk = comptime!(split.chunk);
    let n_keys = max(end, start) - start;
    let head = (UNIT_POS_X / PLANE_DIM) % split.group;
    let mut largest = lowest();
    let mut k = UNIT_POS_PLANE;
    while k < n_keys {
        largest = max(largest, scores[(head * chunk + k) as usize]);
        k += PLANE_DIM;
    }
    let largest = plane_max(largest);
    let mut total = 0.0f32;
    let mut k = UNIT_POS_PLANE;
    while k < chunk {
        let at = (head * chunk + k) as usize;
        let key = start + k;
        let share = select(key >= begin && key < end, (scores[at] - largest).exp(), 0.0f32);
        shares[at] = share;
        total += share;
        k += PLANE_DIM;
    }
    let total = plane_sum(total);
    if UNIT_POS_PLANE == 0 {
        totals[(2u32 * head) as usize] = largest;
        totals[(2u32 * head + 1u32) as usize] = total;
    }
}

/// # Shapes
/// `qkv` `[(n_heads + 2·n_kv_heads)·head_dim]` f32 before rotation, `table` `[capacity, head_dim / 2, 2]`, `keys`, `values`
/// `[n_kv_heads, capacity, head_dim]` in vectors, `partial` as [`combine`] reads it, `out` `[n_heads·head_dim]`, `counters`
/// `[cubes in x]`, zero before and after.
#[cube(launch_unchecked)]
#[expect(clippy::too_many_arguments, reason = "a kernel's buffers and sizes")]
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
    let group = comptime!(split.group);
    let width = W::value().comptime() as u32;
    let row_vectors = comptime!(split.heads.head_dim / width);
    let cubes_a_kv = comptime!(split.heads.n_heads / split.heads.n_kv_heads / split.group);
    let n_row_groups = comptime!(split.units / row_vectors);
    let n_turns = comptime!(split.chunk / n_row_groups);
    let n_batch = comptime!(n_turns.min(8));

    let mut query = Shared::<[f32]>::new_slice(comptime!((split.group * split.heads.head_dim) as usize));
    let mut scores = Shared::<[f32]>::new_slice(comptime!((split.group * split.chunk) as usize));
    let mut shares = Shared::<[f32]>::new_slice(comptime!((split.group * split.chunk) as usize));
    let mut sums = Shared::<[f32]>::new_slice(comptime!((n_row_groups * split.group * split.heads.head_dim) as usize));
    let mut totals = Shared::<[f32]>::new_slice(comptime!((2 * split.group) as usize));
    let mut fresh = Shared::<[Vector<C, W>]>::new_slice(comptime!((2 * row_vectors) as usize));

    let kv_head = CUBE_POS_X / cubes_a_kv;
    let first_head = CUBE_POS_X * group;
    let base = kv_head * capacity * row_vectors;
    let position = state[STATE_POSITION as usize];
    let start = CUBE_POS_Y * comptime!(split.chunk);
    let first_key = select(position + 1u32 > window, position + 1u32 - window, 0u32);
    let begin = max(start, first_key);
    let end = min(start + comptime!(split.chunk), position + 1u32);
    let mut first_share = 0u32;
    let mut n_shares = comptime!(split.n_splits).runtime();
    if comptime!(split.combines) {
        // Chunks without keys take no part: a cache may be far longer than what is in it.
        if begin >= end {
            terminate!();
        }
        first_share = first_key / comptime!(split.chunk);
        n_shares = position / comptime!(split.chunk) + 1u32 - first_share;
    }

    // State and cache are older than the step; the token's own query, key and value are of the launch before.
    let mut loaded_keys = Array::<Vector<C, W>>::new(comptime!((key_batch(split) * (row_vectors / LANES)) as usize));
    let mut loaded = Array::<Vector<C, W>>::new(n_batch as usize);
    load_keys::<C, W>(keys, &mut loaded_keys, base, start, begin, end, 0u32, split);
    load_values::<C, W>(values, &mut loaded, base, start, begin, end, 0u32, n_batch, split);
    if comptime!(split.overlaps) {
        await_earlier();
        let_later_begin();
    }
    rotate_queries(qkv, table, &mut query, first_head, position, scale, split);
    if position >= start && position < start + comptime!(split.chunk) {
        append::<C, W>(qkv, table, keys, values, &mut fresh, kv_head, position, capacity, split);
    }
    // On CUDA a barrier shows a cube its own writes; elsewhere storage has one of its own.
    if comptime!(split.combines) {
        sync_cube();
    } else {
        sync_storage();
    }

    freshen::<C, W>(&fresh, &mut loaded_keys, &mut loaded, position, start, begin, end, n_batch, split);
    score_keys::<C, W>(keys, &mut loaded_keys, &query, &mut scores, base, start, begin, end, split);
    sync_cube();
    share_out(&scores, &mut shares, &mut totals, start, begin, end, split);
    sync_cube();

    let row_group = UNIT_POS_X / row_vectors;
    let mut acc = Array::<f32>::new(comptime!((split.group * width) as usize));
    #[unroll]
    for i in 0..comptime!(split.group * width) {
        acc[i as usize] = 0.0;
    }
    #[unroll]
    for batch in 0..comptime!(n_turns / n_batch) {
        if start + comptime!(batch * n_batch * n_row_groups) < end {
            if comptime!(batch > 0) {
                load_values::<C, W>(values, &mut loaded, base, start, begin, end, batch, n_batch, split);
            }
            #[unroll]
            for j in 0..n_batch {
                let vector = loaded[j as usize];
                let key = comptime!((batch * n_batch + j) * n_row_groups) + row_group;
                #[unroll]
                for h in 0..group {
                    let share = shares[(comptime!(h * split.chunk) + key) as usize];
                    #[unroll]
                    for e in 0..width {
                        acc[comptime!((h * width + e) as usize)] +=
                            share * f32::cast_from(vector.extract(comptime!(e as usize)));
                    }
                }
            }
        }
    }
    #[unroll]
    for h in 0..group {
        #[unroll]
        for e in 0..width {
            let at = (row_group * group + h) * head_dim + UNIT_POS_X % row_vectors * width + e;
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
        if n_shares == 1u32 {
            out[(first_head * head_dim + i) as usize] = sum / totals[(2u32 * head + 1u32) as usize];
        } else {
            let at =
                (CUBE_POS_Y * comptime!(split.heads.n_heads) + first_head + head) * comptime!(split.heads.head_dim + 2);
            partial[(at + i % head_dim) as usize] = sum;
            if i % head_dim == 0u32 {
                partial[(at + head_dim) as usize] = totals[(2u32 * head) as usize];
                partial[(at + head_dim + 1u32) as usize] = totals[(2u32 * head + 1u32) as usize];
            }
        }
        i += split.units;
    }
    if comptime!(split.combines) {
        if n_shares > 1u32 {
            sync_storage();
            let mut is_last = Shared::<[u32]>::new_slice(1usize);
            if UNIT_POS_X == 0 {
                let before = counters[CUBE_POS_X as usize].fetch_add(1u32);
                is_last[0] = u32::cast_from(before + 1u32 == n_shares);
            }
            sync_cube();
            if is_last[0] == 1u32 {
                sync_storage();
                combine(partial, out, first_head, first_share, n_shares, split);
                if UNIT_POS_X == 0 {
                    counters[CUBE_POS_X as usize].store(0u32);
                }
            }
        }
    }
}

/// Combines in a launch of its own, a cube as many heads as one of the other kernel serves.
#[cube(launch_unchecked)]
pub fn combine_kernel(partial: &mut [f32], out: &mut [f32], #[comptime] split: Split) {
    let n_shares = comptime!(split.n_splits).runtime();
    combine(partial, out, CUBE_POS_X * comptime!(split.group), 0u32, n_shares, split);
}
