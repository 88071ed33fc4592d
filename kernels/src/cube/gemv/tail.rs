//! The end of a tile: planes' shares are summed, and residuals, biases, row scales and activations meet them.

use super::fragments::Fragments;
use super::{Epilogue, GemvSpec};
use cubecl::prelude::*;

/// What is fetched early for the results of a tile: the residual, biases and row scales of a unit's one result.
#[cube]
pub(super) fn fetch_tail<S: Fragments>(
    scales: &[f32],
    bias: &[f32],
    y: &mut [f32],
    tail: &mut Array<f32>,
    tile: u32,
    #[comptime] spec: GemvSpec,
) {
    let n_outputs = comptime!(spec.tile_outputs());
    let second = comptime!(spec.n_rows / 2);
    if UNIT_POS < comptime!(spec.m * n_outputs) {
        let row = tile * n_outputs + UNIT_POS % n_outputs;
        if comptime!(spec.epilogue == Epilogue::Add) {
            tail[0] = y[(UNIT_POS / n_outputs * spec.n_rows + row) as usize];
        }
        if comptime!(spec.has_bias) {
            tail[1] = bias[row as usize];
            if comptime!(spec.is_paired()) {
                tail[2] = bias[(row + second) as usize];
            }
        }
        if comptime!(S::layout().row_scale) {
            tail[3] = scales[row as usize];
            if comptime!(spec.is_paired()) {
                tail[4] = scales[(row + second) as usize];
            }
        }
    }
}

/// Sums the planes' shares of a tile and finishes its rows.
#[cube]
pub(super) fn write_tile<S: Fragments>(
    partial: &Shared<[f32]>,
    tail: &Array<f32>,
    y: &mut [f32],
    tile: u32,
    partial_at: u32,
    #[comptime] spec: GemvSpec,
) {
    let n_outputs = comptime!(spec.tile_outputs());
    if UNIT_POS < comptime!(spec.m * n_outputs) {
        let column = UNIT_POS / n_outputs;
        let within = UNIT_POS % n_outputs;
        let row = tile * n_outputs + within;
        let mut sum = 0.0f32;
        let mut second = 0.0f32;
        #[unroll]
        for share in 0..spec.planes {
            let at = partial_at + (comptime!(share * spec.m) + column) * 16u32 + within;
            sum += partial[at as usize];
            if comptime!(spec.is_paired()) {
                second += partial[(at + 8u32) as usize];
            }
        }
        if comptime!(S::layout().row_scale) {
            sum *= tail[3] * (1.0f32 / 127.0f32);
            if comptime!(spec.is_paired()) {
                second *= tail[4] * (1.0f32 / 127.0f32);
            }
        }
        if comptime!(spec.has_bias) {
            sum += tail[1];
            if comptime!(spec.is_paired()) {
                second += tail[2];
            }
        }
        match comptime!(spec.epilogue) {
            Epilogue::Store => y[(column * spec.n_rows + row) as usize] = sum,
            Epilogue::Add => y[(column * spec.n_rows + row) as usize] = tail[0] + sum,
            Epilogue::SiluMul => {
                y[(column * comptime!(spec.n_rows / 2) + row) as usize] = sum / (1.0f32 + (-sum).exp()) * second;
            }
            Epilogue::GeluMul => {
                let inner = 0.797_884_6f32 * (sum + 0.044_715f32 * sum * sum * sum);
                // (1 + tanh u) / 2 is a logistic of 2u, and exp is exact where CUDA's tanh may be an approximation.
                y[(column * comptime!(spec.n_rows / 2) + row) as usize] =
                    sum / (1.0f32 + (-2.0f32 * inner).exp()) * second;
            }
        }
    }
}

/// Leaves a plane's share of a tile's results in `partial`.
///
/// # Shapes
/// `partial` `[planes, m, 16]` from `partial_at` on.
#[cube]
pub(super) fn write_sums_of_plane<S: Fragments>(
    sums: &Array<f32>,
    partial: &mut Shared<[f32]>,
    partial_at: u32,
    plane: u32,
    lane: u32,
    #[comptime] spec: GemvSpec,
) {
    let (group, quarter) = (lane / 4u32, lane % 4u32);
    if comptime!(spec.is_spread()) {
        // The first of four lanes has the sums of row `group` and of the row eight below, for the two blocks of all steps.
        let mut top = sums[0] + sums[1];
        let mut bottom = sums[2] + sums[3];
        if comptime!(S::layout().has_zero) {
            let zeros = sums[4] + plane_shuffle_xor(sums[4], 1u32);
            top -= zeros;
            bottom -= plane_shuffle_xor(zeros, 2u32);
        }
        if quarter == 0u32 {
            let at = partial_at + plane * 16u32 + group;
            partial[at as usize] = top;
            partial[(at + 8u32) as usize] = bottom;
        }
    } else {
        #[unroll]
        for c in 0..2usize {
            let column = quarter * 2u32 + c as u32;
            if column < spec.m {
                let at = partial_at + (plane * spec.m + column) * 16u32 + group;
                partial[at as usize] = sums[c];
                partial[(at + 8u32) as usize] = sums[comptime!(c + 2)];
            }
        }
    }
}
