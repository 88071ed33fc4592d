//! Block scales of a tile: each lane keeps those of its own results in registers, fetched a tile ahead.
//!
//! A lane of a product has results of two rows (`mma.m16n8k16`: rows `lane / 4` and `lane / 4 + 8`, columns `lane % 4 · 2` and the
//! next). Where x is a single row and a step two blocks, the first of four lanes has all four results that count: each of the four
//! fetches and decodes one of their scales and hands it over. Elsewhere a lane needs the scales of both its rows.

use super::fragments::Fragments;
use super::{GemvSpec, STEP};
use crate::cube::decode::f16_bits_to_f32;
use cubecl::prelude::*;

/// Returns the matrix's row that a lane's scale `result` belongs to.
#[cube]
pub(super) fn result_row(tile: u32, lane: u32, #[comptime] result: u32, #[comptime] spec: GemvSpec) -> u32 {
    let top = tile * comptime!(spec.tile_outputs()) + lane / 4u32;
    if comptime!(spec.is_spread()) {
        top + (lane % 4u32) / 2u32 * comptime!(spec.distance())
    } else {
        top + comptime!(result * spec.distance())
    }
}

/// Returns the block that a lane's scales of step `k` belong to.
#[cube]
fn block_of(plane: u32, lane: u32, #[comptime] k: u32, #[comptime] spec: GemvSpec) -> u32 {
    let mut step = comptime!(k * spec.planes) + plane;
    if comptime!(!spec.is_whole(k)) {
        step = select(step < comptime!(spec.n_steps()), step, 0u32);
    }
    let mut sixty_fourth = step * spec.slots;
    if comptime!(spec.is_spread()) {
        sixty_fourth += lane % 2u32;
    }
    sixty_fourth / comptime!(spec.block_size / STEP)
}

/// Fetches a lane's scales of step `k` as they are stored: an fp32 number, a nested code or an fp16 scale with its zero point.
#[cube]
#[expect(clippy::too_many_arguments, reason = "a step's buffers and where it lies")]
pub(super) fn fetch_scales<S: Fragments>(
    scales: &[f32],
    aux: &[u32],
    raw_scales: &mut Array<f32>,
    raw_words: &mut Array<u32>,
    tile: u32,
    plane: u32,
    lane: u32,
    #[comptime] k: u32,
    #[comptime] spec: GemvSpec,
) {
    #[unroll]
    for result in 0..comptime!(spec.lane_scales()) {
        let at = comptime!((k * spec.lane_scales() + result) as usize);
        let index = result_row(tile, lane, result, spec) * comptime!(spec.n_blocks()) + block_of(plane, lane, k, spec);
        if comptime!(S::layout().has_zero) {
            raw_words[at] = aux[index as usize];
        } else if comptime!(spec.nested) {
            raw_words[at] = aux[(index / 4u32) as usize];
            raw_scales[at] = scales[(index / 256u32) as usize];
        } else {
            raw_scales[at] = scales[index as usize];
        }
    }
}

/// Leaves what the second level of a lane's scales is relative to.
#[cube]
pub(super) fn choose_offsets(
    offsets: &Array<f32>,
    row_offsets: &mut Array<f32>,
    tile: u32,
    lane: u32,
    segment_1: u32,
    segment_2: u32,
    #[comptime] spec: GemvSpec,
) {
    #[unroll]
    for result in 0..comptime!(spec.lane_scales()) {
        let row = result_row(tile, lane, result, spec);
        let offset = select(row >= segment_1, offsets[1], offsets[0]);
        row_offsets[result as usize] = select(row >= segment_2, offsets[2], offset);
    }
}

/// Decodes a scale that was fetched.
#[cube]
#[expect(clippy::too_many_arguments, reason = "a scale's buffers and where it lies")]
fn scale_of<S: Fragments>(
    map: &Shared<[f32]>,
    raw_scales: &Array<f32>,
    raw_words: &Array<u32>,
    row_offsets: &Array<f32>,
    tile: u32,
    plane: u32,
    lane: u32,
    #[comptime] k: u32,
    #[comptime] result: u32,
    #[comptime] spec: GemvSpec,
) -> f32 {
    let at = comptime!((k * spec.lane_scales() + result) as usize);
    if comptime!(S::layout().has_zero) {
        f16_bits_to_f32(raw_words[at] & 0xffffu32)
    } else if comptime!(spec.nested) {
        // Codes are four a word, in the order of rows and blocks; where whole words make a row, rows don't matter.
        let mut index = block_of(plane, lane, k, spec);
        if comptime!(spec.n_blocks() % 4 != 0) {
            index += comptime!(spec.n_blocks()) * result_row(tile, lane, result, spec);
        }
        let code = (raw_words[at] >> ((index % 4u32) * 8u32)) & 0xffu32;
        map[code as usize] * raw_scales[at] + row_offsets[result as usize]
    } else {
        raw_scales[at]
    }
}

/// Scales a step's product by its blocks and adds it.
#[cube]
#[expect(clippy::too_many_arguments, reason = "a product's buffers and where it lies")]
pub(super) fn add_product<S: Fragments>(
    product: Vector<f32, Const<4>>,
    sums: &mut Array<f32>,
    map: &Shared<[f32]>,
    sums_of_x: &Shared<[f32]>,
    raw_scales: &Array<f32>,
    raw_words: &Array<u32>,
    row_offsets: &Array<f32>,
    tile: u32,
    plane: u32,
    lane: u32,
    #[comptime] k: u32,
    #[comptime] spec: GemvSpec,
) {
    if comptime!(!S::layout().block_scale) {
        #[unroll]
        for c in 0..4usize {
            sums[c] += product.extract(c);
        }
    } else {
        let step = comptime!(k * spec.planes) + plane;
        #[unroll]
        for result in 0..comptime!(spec.lane_scales()) {
            let at = comptime!((k * spec.lane_scales() + result) as usize);
            let scale = scale_of::<S>(map, raw_scales, raw_words, row_offsets, tile, plane, lane, k, result, spec);
            if comptime!(spec.is_spread()) {
                if comptime!(S::layout().has_zero) {
                    // What the zero point takes off is summed by the lane that has it.
                    let zero = f32::cast_from(raw_words[at] >> 16u32);
                    sums[4] += zero * scale * sums_of_x[(step * spec.slots + lane % 2u32) as usize];
                }
                sums[0] += product.extract(0usize) * scale;
                sums[1] += product.extract(1usize) * plane_shuffle_xor(scale, 1u32);
                sums[2] += product.extract(2usize) * plane_shuffle_xor(scale, 2u32);
                sums[3] += product.extract(3usize) * plane_shuffle_xor(scale, 3u32);
            } else {
                #[unroll]
                for c in 0..2u32 {
                    let from = comptime!((2 * result + c) as usize);
                    let mut value = product.extract(from);
                    if comptime!(S::layout().has_zero) {
                        let column = (lane % 4u32 * 2u32 + c) % spec.m;
                        value -= f32::cast_from(raw_words[at] >> 16u32)
                            * sums_of_x[(column * comptime!(spec.n_cols / STEP) + step) as usize];
                    }
                    sums[from] += value * scale;
                }
            }
        }
    }
}
