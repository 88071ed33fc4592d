//! What a cube brings into shared memory before it multiplies: x, the code table, the map of second-level scales.
//!
//! Everything is fetched before anything is waited for: a launch of a token is short, and each trip to memory shows.

use super::fragments::{Fragments, high_half, low_half, pack_pair};
use super::{GemvSpec, STEP};
use crate::cube::decode::{MAP, OFFSETS};
use cubecl::prelude::*;

/// Columns of x that a unit packs at once.
const UNIT_COLUMNS: u32 = 8;

/// Copies of a pair that a unit writes in one turn.
const TABLE_PART: u32 = 8;

/// Returns how often each unit takes a share of `n` things.
pub(super) fn turns(n: u32, spec: GemvSpec) -> u32 {
    n.div_ceil(spec.planes * 32)
}

/// Fetches a row of x, or the weights of the norm on it, eight columns a turn.
#[cube]
pub(super) fn fetch_row(
    from: &[Vector<f32, Const<4>>],
    row: &mut Array<Vector<f32, Const<4>>>,
    #[comptime] base: u32,
    #[comptime] spec: GemvSpec,
) {
    let n_units = comptime!(spec.n_cols / UNIT_COLUMNS);
    #[unroll]
    for turn in 0..comptime!(turns(n_units, spec)) {
        let at = min(UNIT_POS + comptime!(turn * spec.planes * 32), n_units - 1);
        row[comptime!((2 * turn) as usize)] = from[(base / 4 + at * 2u32) as usize];
        row[comptime!((2 * turn + 1) as usize)] = from[(base / 4 + at * 2u32 + 1u32) as usize];
    }
}

#[cube]
fn sum_of_squares(row: &Array<Vector<f32, Const<4>>>, #[comptime] spec: GemvSpec) -> f32 {
    let n_units = comptime!(spec.n_cols / UNIT_COLUMNS);
    let mut sum = 0.0f32;
    #[unroll]
    for turn in 0..comptime!(turns(n_units, spec)) {
        if UNIT_POS + comptime!(turn * spec.planes * 32) < n_units {
            #[unroll]
            for e in 0..8usize {
                let value = row[comptime!((2 * turn) as usize + e / 4)].extract(comptime!(e % 4));
                sum += value * value;
            }
        }
    }
    sum
}

/// Leaves each plane's share of the sum of a row's squares in `partial`.
#[cube]
pub(super) fn start_norm(row: &Array<Vector<f32, Const<4>>>, partial: &mut Shared<[f32]>, #[comptime] spec: GemvSpec) {
    let sum = plane_sum(sum_of_squares(row, spec));
    if UNIT_POS_PLANE == 0 {
        partial[(UNIT_POS / 32u32) as usize] = sum;
    }
}

/// Returns what a row is multiplied with, once the planes' shares are there.
#[cube]
pub(super) fn inverse_norm(partial: &Shared<[f32]>, eps: f32, #[comptime] spec: GemvSpec) -> f32 {
    let mut total = 0.0f32;
    #[unroll]
    for plane in 0..spec.planes {
        total += partial[plane as usize];
    }
    (total / comptime!(spec.n_cols as f32) + eps).inverse_sqrt()
}

/// Writes a row as pairs of halves, in the order the scheme's pairs come in.
#[cube]
pub(super) fn pack_row<S: Fragments>(
    row: &Array<Vector<f32, Const<4>>>,
    norm_row: &Array<Vector<f32, Const<4>>>,
    inverse: f32,
    pairs: &mut Shared<[Vector<u32, Const<4>>]>,
    #[comptime] first: u32,
    #[comptime] spec: GemvSpec,
) {
    let n_units = comptime!(spec.n_cols / UNIT_COLUMNS);
    let interleaved = comptime!(S::layout().interleaved);
    #[unroll]
    for turn in 0..comptime!(turns(n_units, spec)) {
        let at = UNIT_POS + comptime!(turn * spec.planes * 32);
        if at < n_units {
            let mut words = Vector::<u32, Const<4>>::new(0u32);
            #[unroll]
            for word in 0..4usize {
                let half = comptime!((2 * turn) as usize + word / 2);
                let low_at = comptime!(if interleaved { word % 2 } else { word % 2 * 2 });
                let high_at = comptime!(if interleaved { word % 2 + 2 } else { word % 2 * 2 + 1 });
                let mut low = row[half].extract(low_at) * inverse;
                let mut high = row[half].extract(high_at) * inverse;
                if comptime!(spec.norm) {
                    low *= norm_row[half].extract(low_at);
                    high *= norm_row[half].extract(high_at);
                }
                words.insert(word, pack_pair(low, high, S::layout().is_bf16));
            }
            pairs[(first + at) as usize] = words;
        }
    }
}

/// Fetches the code values of a unit's places in the table: a pair a turn.
#[cube]
pub(super) fn fetch_table(tables: &[f32], values: &mut Array<f32>, #[comptime] spec: GemvSpec) {
    let parts = comptime!(spec.copies / TABLE_PART);
    #[unroll]
    for turn in 0..comptime!(turns(256 * parts, spec)) {
        let entry = min((UNIT_POS + comptime!(turn * spec.planes * 32)) / parts, 255u32);
        values[comptime!((2 * turn) as usize)] = tables[(entry >> 4u32) as usize];
        values[comptime!((2 * turn + 1) as usize)] = tables[(entry & 15u32) as usize];
    }
}

/// Writes the table of pairs, `copies` of it side by side: a lane that keeps to its own has no bank conflicts.
#[cube]
pub(super) fn write_table<S: Fragments>(values: &Array<f32>, table: &mut Shared<[u32]>, #[comptime] spec: GemvSpec) {
    let parts = comptime!(spec.copies / TABLE_PART);
    #[unroll]
    for turn in 0..comptime!(turns(256 * parts, spec)) {
        let at = UNIT_POS + comptime!(turn * spec.planes * 32);
        if at < comptime!(256 * parts) {
            let entry = at / parts;
            let (low, high) = (values[comptime!((2 * turn) as usize)], values[comptime!((2 * turn + 1) as usize)]);
            let pair = pack_pair(low, high, S::layout().is_bf16);
            #[unroll]
            for copy in 0..TABLE_PART {
                // Lanes write different banks.
                let place = entry * spec.copies + (at % parts) * TABLE_PART + (copy + entry) % TABLE_PART;
                table[place as usize] = pair;
            }
        }
    }
}

/// Writes the sum of x over each step, for the zero points.
#[cube]
pub(super) fn write_sums<S: Fragments>(
    pairs: &Shared<[Vector<u32, Const<4>>]>,
    sums_of_x: &mut Shared<[f32]>,
    #[comptime] spec: GemvSpec,
) {
    let mut at = UNIT_POS;
    while at < comptime!(spec.m * spec.n_cols / STEP) {
        let mut sum = 0.0f32;
        #[unroll]
        for i in 0..comptime!(STEP / 8) {
            let words = pairs[(at * comptime!(STEP / 8) + i) as usize];
            #[unroll]
            for e in 0..4usize {
                let word = words.extract(e);
                sum += low_half(word, S::layout().is_bf16) + high_half(word, S::layout().is_bf16);
            }
        }
        sums_of_x[at as usize] = sum;
        at += comptime!(spec.planes * 32);
    }
}

/// Fetches what decodes second-level scales: offsets of up to three segments, and a unit's places in the dynamic map.
#[cube]
pub(super) fn fetch_map(tables: &[f32], offsets: &mut Array<f32>, values: &mut Array<f32>, #[comptime] spec: GemvSpec) {
    #[unroll]
    for segment in 0..3u32 {
        offsets[segment as usize] = tables[(OFFSETS + segment) as usize];
    }
    #[unroll]
    for turn in 0..comptime!(turns(256, spec)) {
        let at = min(UNIT_POS + comptime!(turn * spec.planes * 32), 255u32);
        values[turn as usize] = tables[(MAP + at) as usize];
    }
}

/// Writes the dynamic map.
#[cube]
pub(super) fn write_map(values: &Array<f32>, map: &mut Shared<[f32]>, #[comptime] spec: GemvSpec) {
    #[unroll]
    for turn in 0..comptime!(turns(256, spec)) {
        let at = UNIT_POS + comptime!(turn * spec.planes * 32);
        if at < 256u32 {
            map[at as usize] = values[turn as usize];
        }
    }
}
