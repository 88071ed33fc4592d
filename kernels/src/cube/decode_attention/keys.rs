//! A chunk's keys and values: brought into registers batch by batch, and scored.

use super::{LANES, Split, lowest};
use cubecl::prelude::*;

/// Returns the key that is read for a place of a chunk: what is not seen is read from a key that is.
#[cube]
fn safe_key(key: u32, begin: u32, end: u32) -> u32 {
    select(key >= begin && key < end, key, end - 1u32)
}

/// Returns how many steps of keys a unit takes at a time.
pub(super) fn key_batch(split: Split) -> u32 {
    (split.chunk / (split.units / LANES)).min(4)
}

/// Loads one batch of a unit's key vectors, all on their way before the first is used.
#[cube]
#[expect(clippy::too_many_arguments, reason = "a batch's buffers and where it lies")]
pub(super) fn load_keys<C: Float, W: Size>(
    keys: &mut [Vector<C, W>],
    loaded: &mut Array<Vector<C, W>>,
    base: u32,
    start: u32,
    begin: u32,
    end: u32,
    #[comptime] batch: u32,
    #[comptime] split: Split,
) {
    let width = W::value().comptime() as u32;
    let row_vectors = comptime!(split.heads.head_dim / width);
    let lane_vectors = comptime!(row_vectors / LANES);
    let rows = comptime!(split.units / LANES);
    let n_batch = comptime!(key_batch(split));
    #[unroll]
    for step in 0..n_batch {
        let key = start + comptime!((batch * n_batch + step) * rows) + UNIT_POS_X / LANES;
        let at = base + safe_key(key, begin, end) * row_vectors + UNIT_POS_X % LANES;
        #[unroll]
        for v in 0..lane_vectors {
            loaded[comptime!((step * lane_vectors + v) as usize)] = keys[(at + comptime!(v * LANES)) as usize];
        }
    }
}

/// Puts the token's own key and value where the first batches were loaded before it was there.
#[cube]
#[expect(clippy::too_many_arguments, reason = "a batch's buffers and where it lies")]
pub(super) fn freshen<C: Float, W: Size>(
    fresh: &Shared<[Vector<C, W>]>,
    loaded_keys: &mut Array<Vector<C, W>>,
    loaded_values: &mut Array<Vector<C, W>>,
    position: u32,
    start: u32,
    begin: u32,
    end: u32,
    #[comptime] n_values: u32,
    #[comptime] split: Split,
) {
    let width = W::value().comptime() as u32;
    let row_vectors = comptime!(split.heads.head_dim / width);
    let lane_vectors = comptime!(row_vectors / LANES);
    #[unroll]
    for step in 0..comptime!(key_batch(split)) {
        let key = start + comptime!(step * (split.units / LANES)) + UNIT_POS_X / LANES;
        if safe_key(key, begin, end) == position {
            #[unroll]
            for v in 0..lane_vectors {
                loaded_keys[comptime!((step * lane_vectors + v) as usize)] =
                    fresh[(UNIT_POS_X % LANES + comptime!(v * LANES)) as usize];
            }
        }
    }
    #[unroll]
    for j in 0..n_values {
        let key = start + j * comptime!(split.units / row_vectors) + UNIT_POS_X / row_vectors;
        if safe_key(key, begin, end) == position {
            loaded_values[j as usize] = fresh[(row_vectors + UNIT_POS_X % row_vectors) as usize];
        }
    }
}

/// Scores the chunk's keys, whose first batch is loaded, for all of the cube's heads; keys that are not seen score lowest.
#[cube]
#[expect(clippy::too_many_arguments, reason = "a kernel's buffers and sizes")]
pub(super) fn score_keys<C: Float, W: Size>(
    keys: &mut [Vector<C, W>],
    loaded: &mut Array<Vector<C, W>>,
    query: &Shared<[f32]>,
    scores: &mut Shared<[f32]>,
    base: u32,
    start: u32,
    begin: u32,
    end: u32,
    #[comptime] split: Split,
) {
    let width = W::value().comptime() as u32;
    let group = comptime!(split.group);
    let row_vectors = comptime!(split.heads.head_dim / width);
    let lane_vectors = comptime!(row_vectors / LANES);
    let rows = comptime!(split.units / LANES);
    let n_steps = comptime!(split.chunk / rows);
    let n_batch = comptime!(key_batch(split));
    let lane = UNIT_POS_X % LANES;
    let row = UNIT_POS_X / LANES;
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
    for batch in 0..comptime!(n_steps / n_batch) {
        // Batches behind the last key are not looked at.
        if start + comptime!(batch * n_batch * rows) < end {
            if comptime!(batch > 0) {
                load_keys::<C, W>(keys, loaded, base, start, begin, end, batch, split);
            }
            #[unroll]
            for step in 0..n_batch {
                let key = start + comptime!((batch * n_batch + step) * rows) + row;
                let is_seen = key >= begin && key < end;
                let mut dots = Array::<f32>::new(comptime!(split.group as usize));
                #[unroll]
                for h in 0..group {
                    dots[h as usize] = 0.0;
                }
                #[unroll]
                for v in 0..lane_vectors {
                    let vector = loaded[comptime!((step * lane_vectors + v) as usize)];
                    #[unroll]
                    for e in 0..width {
                        let value = f32::cast_from(vector.extract(comptime!(e as usize)));
                        #[unroll]
                        for h in 0..group {
                            dots[h as usize] += value * q[comptime!(((h * lane_vectors + v) * width + e) as usize)];
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
                        let at = comptime!(h * split.chunk + (batch * n_batch + step) * rows) + row;
                        scores[at as usize] = select(is_seen, dot, lowest());
                    }
                }
            }
        }
    }
}

/// Loads one batch of a unit's value vectors.
#[cube]
#[expect(clippy::too_many_arguments, reason = "a batch's buffers and where it lies")]
pub(super) fn load_values<C: Float, W: Size>(
    values: &mut [Vector<C, W>],
    loaded: &mut Array<Vector<C, W>>,
    base: u32,
    start: u32,
    begin: u32,
    end: u32,
    #[comptime] batch: u32,
    #[comptime] n_batch: u32,
    #[comptime] split: Split,
) {
    let width = W::value().comptime() as u32;
    let row_vectors = comptime!(split.heads.head_dim / width);
    let n_row_groups = comptime!(split.units / row_vectors);
    #[unroll]
    for j in 0..n_batch {
        let key = start + comptime!((batch * n_batch + j) * n_row_groups) + UNIT_POS_X / row_vectors;
        let at = base + safe_key(key, begin, end) * row_vectors + UNIT_POS_X % row_vectors;
        loaded[j as usize] = values[at as usize];
    }
}
