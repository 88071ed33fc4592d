//! A step of a tile: its codes from memory, and their product.

use super::fragments::{Fragments, mma_16x8x16};
use super::scale::add_product;
use super::{GemvSpec, STEP};
use cubecl::prelude::*;

/// Loads the codes of a plane's step `k` for the two rows of each lane, into their place in the ring of steps in flight.
#[cube]
#[expect(clippy::too_many_arguments, reason = "a step's buffers and where it lies")]
pub(super) fn load_step<S: Fragments, V: Size>(
    codes: &[Vector<u32, V>],
    words_0: &mut Array<Vector<u32, V>>,
    words_1: &mut Array<Vector<u32, V>>,
    tile: u32,
    plane: u32,
    lane: u32,
    #[comptime] k: u32,
    #[comptime] spec: GemvSpec,
) {
    let width = V::value().comptime() as u32;
    let vectors = comptime!(S::layout().words * spec.slots / width);
    let row_vectors = comptime!(spec.n_cols / 16 * S::layout().words / width);
    let row_0 = tile * comptime!(spec.tile_outputs()) + lane / 4u32;
    let base_0 = row_0 * row_vectors + (lane % 4u32) * vectors;
    let base_1 = base_0 + comptime!(spec.distance() * row_vectors);
    // Past the end, step 0 is read and its product left out.
    let mut step = comptime!(k * spec.planes) + plane;
    if comptime!(!spec.is_whole(k)) {
        step = select(step < comptime!(spec.n_steps()), step, 0u32);
    }
    #[unroll]
    for v in 0..vectors {
        let at = comptime!((k % spec.unroll * vectors + v) as usize);
        words_0[at] = codes[(base_0 + step * comptime!(4 * vectors) + v) as usize];
        words_1[at] = codes[(base_1 + step * comptime!(4 * vectors) + v) as usize];
    }
}

/// Returns true where a lane has something in its column of x: the columns of an instruction beyond x's rows are zero, and so are
/// those of its lanes whose columns of weights belong to the other block of a step.
#[cube]
pub(super) fn has_part(lane: u32, #[comptime] spec: GemvSpec) -> bool {
    let (group, quarter) = (lane / 4u32, lane % 4u32);
    if comptime!(spec.is_spread()) {
        // Within eight lanes, whose reads are one.
        group < 2u32 && quarter / 2u32 == group
    } else {
        group < spec.m
    }
}

/// Multiplies a plane's step `k` and adds it, scaled, to the sums of the lane.
///
/// `x_words` are zero where a lane has no part and stay so.
#[cube]
#[expect(clippy::too_many_arguments, reason = "a step's buffers and where it lies")]
pub(super) fn multiply_step<S: Fragments, V: Size>(
    words_0: &Array<Vector<u32, V>>,
    words_1: &Array<Vector<u32, V>>,
    sums: &mut Array<f32>,
    x_words: &mut Array<Vector<u32, Const<4>>>,
    pairs: &Shared<[Vector<u32, Const<4>>]>,
    table: &Shared<[u32]>,
    map: &Shared<[f32]>,
    sums_of_x: &Shared<[f32]>,
    raw_scales: &Array<f32>,
    raw_words: &Array<u32>,
    row_offsets: &Array<f32>,
    x_at: u32,
    tile: u32,
    plane: u32,
    lane: u32,
    has_part: bool,
    #[comptime] k: u32,
    #[comptime] spec: GemvSpec,
) {
    let width = V::value().comptime() as u32;
    let vectors = comptime!(S::layout().words * spec.slots / width);
    let mut lane_copy = lane;
    if comptime!(spec.copies < 32) {
        lane_copy = lane % spec.copies;
    }
    let step = comptime!(k * spec.planes) + plane;
    let first = comptime!(k % spec.unroll * vectors);
    if comptime!(spec.is_whole(k)) || step < comptime!(spec.n_steps()) {
        if has_part {
            #[unroll]
            for half in 0..comptime!(2 * spec.slots) {
                let at = x_at + comptime!(k * spec.planes * (STEP / 8 * spec.slots) + half);
                x_words[half as usize] = pairs[at as usize];
            }
        }
        let mut product = Vector::<f32, Const<4>>::new(0.0f32);
        #[unroll]
        for half in 0..comptime!(2 * spec.slots) {
            #[unroll]
            for j in 0..2u32 {
                let p0 = comptime!(4 * half + 2 * j);
                let p1 = comptime!(4 * half + 2 * j + 1);
                product = mma_16x8x16(
                    S::pair::<V>(words_0, table, lane_copy, first, p0, spec.copies),
                    S::pair::<V>(words_1, table, lane_copy, first, p0, spec.copies),
                    S::pair::<V>(words_0, table, lane_copy, first, p1, spec.copies),
                    S::pair::<V>(words_1, table, lane_copy, first, p1, spec.copies),
                    x_words[half as usize].extract(comptime!((2 * j) as usize)),
                    x_words[half as usize].extract(comptime!((2 * j + 1) as usize)),
                    product,
                    S::layout().is_bf16,
                );
            }
        }
        add_product::<S>(product, sums, map, sums_of_x, raw_scales, raw_words, row_offsets, tile, plane, lane, k, spec);
    }
}
