//! A batch of a tile's steps: its codes from memory, and their products.

use super::fragments::{Fragments, mma_16x8x16};
use super::stage::SCALE_STRIDE;
use super::{GemvSpec, STEP};
use cubecl::prelude::*;

/// Loads the codes of one batch of steps, for the two rows of each lane.
#[cube]
#[expect(clippy::too_many_arguments, reason = "a batch's buffers and where it lies")]
pub(super) fn load_batch<S: Fragments, V: Size>(
    codes: &[Vector<u32, V>],
    words_0: &mut Array<Vector<u32, V>>,
    words_1: &mut Array<Vector<u32, V>>,
    tile: u32,
    plane: u32,
    lane: u32,
    #[comptime] batch: u32,
    #[comptime] spec: GemvSpec,
) {
    let width = V::value().comptime() as u32;
    let vectors = comptime!(S::layout().words * spec.slots / width);
    let row_vectors = comptime!(spec.n_cols / 16 * S::layout().words / width);
    let row_0 = tile * comptime!(spec.tile_outputs()) + lane / 4u32;
    let base_0 = row_0 * row_vectors + (lane % 4u32) * vectors;
    let base_1 = base_0 + comptime!(spec.distance() * row_vectors);
    #[unroll]
    for u in 0..spec.unroll {
        let step = comptime!((batch * spec.unroll + u) * spec.planes) + plane;
        let exact = comptime!((batch * spec.unroll + u + 1) * spec.planes <= spec.n_steps());
        // Past the end, step 0 is read and its product left out.
        let mut safe = step;
        if comptime!(!exact) {
            safe = select(step < comptime!(spec.n_steps()), step, 0u32);
        }
        #[unroll]
        for v in 0..vectors {
            let at = comptime!((u * vectors + v) as usize);
            words_0[at] = codes[(base_0 + safe * comptime!(4 * vectors) + v) as usize];
            words_1[at] = codes[(base_1 + safe * comptime!(4 * vectors) + v) as usize];
        }
    }
}

/// Multiplies one batch of steps and adds it, scaled, to the sums of the lane.
#[cube]
#[expect(clippy::too_many_arguments, reason = "a batch's buffers and where it lies")]
pub(super) fn multiply_batch<S: Fragments, V: Size>(
    words_0: &Array<Vector<u32, V>>,
    words_1: &Array<Vector<u32, V>>,
    sums: &mut Array<f32>,
    pairs: &Shared<[Vector<u32, Const<4>>]>,
    table: &Shared<[u32]>,
    staged: &Shared<[f32]>,
    sums_of_x: &Shared<[f32]>,
    staged_at: u32,
    plane: u32,
    lane: u32,
    #[comptime] batch: u32,
    #[comptime] spec: GemvSpec,
) {
    let n_steps = comptime!(spec.n_steps());
    let width = V::value().comptime() as u32;
    let vectors = comptime!(S::layout().words * spec.slots / width);
    let (group, quarter) = (lane / 4u32, lane % 4u32);
    let mut lane_copy = lane;
    if comptime!(spec.copies < 32) {
        lane_copy = lane % spec.copies;
    }
    // Which row of x this lane's column of the product is. The lane has something for it where its columns lie in the column's block;
    // all other lanes read nothing, which is most of what reading x would cost.
    let x_row = group % spec.m;
    let slot = (group / spec.m) % spec.slots;
    let is_mine = group < comptime!(spec.n_columns()) && quarter / comptime!(4 / spec.slots) == slot;
    #[unroll]
    for u in 0..spec.unroll {
        let step = comptime!((batch * spec.unroll + u) * spec.planes) + plane;
        let exact = comptime!((batch * spec.unroll + u + 1) * spec.planes <= n_steps);
        let first = comptime!(u * vectors);
        if exact || step < n_steps {
            let mut product = Vector::<f32, Const<4>>::new(0.0f32);
            let x_base = x_row * comptime!(spec.n_cols / 8)
                + step * comptime!(STEP / 8 * spec.slots)
                + quarter * comptime!(2 * spec.slots);
            #[unroll]
            for half in 0..comptime!(2 * spec.slots) {
                let mut x_words = Vector::<u32, Const<4>>::new(0u32);
                if is_mine {
                    x_words = pairs[(x_base + half) as usize];
                }
                #[unroll]
                for j in 0..2u32 {
                    let p0 = comptime!(4 * half + 2 * j);
                    let p1 = comptime!(4 * half + 2 * j + 1);
                    product = mma_16x8x16(
                        S::pair::<V>(words_0, table, lane_copy, first, p0, spec.copies),
                        S::pair::<V>(words_1, table, lane_copy, first, p0, spec.copies),
                        S::pair::<V>(words_0, table, lane_copy, first, p1, spec.copies),
                        S::pair::<V>(words_1, table, lane_copy, first, p1, spec.copies),
                        x_words.extract(comptime!((2 * j) as usize)),
                        x_words.extract(comptime!((2 * j + 1) as usize)),
                        product,
                        S::layout().is_bf16,
                    );
                }
            }
            add_product::<S>(product, sums, staged, sums_of_x, staged_at, step, lane, spec);
        }
    }
}

/// Scales a step's product by its block and adds it.
#[cube]
#[expect(clippy::too_many_arguments, reason = "a product's buffers and where it lies")]
fn add_product<S: Fragments>(
    product: Vector<f32, Const<4>>,
    sums: &mut Array<f32>,
    staged: &Shared<[f32]>,
    sums_of_x: &Shared<[f32]>,
    staged_at: u32,
    step: u32,
    lane: u32,
    #[comptime] spec: GemvSpec,
) {
    let (group, quarter) = (lane / 4u32, lane % 4u32);
    if comptime!(S::layout().block_scale) {
        #[unroll]
        for c in 0..2usize {
            let column = quarter * 2u32 + c as u32;
            let sixty_fourth = step * spec.slots + (column / spec.m) % spec.slots;
            let at_0 = staged_at + sixty_fourth / comptime!(spec.block_size / STEP) * SCALE_STRIDE + group;
            let at_1 = at_0 + 8u32;
            let mut top = product.extract(c);
            let mut bottom = product.extract(comptime!(c + 2));
            if comptime!(S::layout().has_zero) {
                let sum = sums_of_x[(column % spec.m * comptime!(spec.n_cols / STEP) + sixty_fourth) as usize];
                let zeros = comptime!(spec.n_blocks() * SCALE_STRIDE);
                top -= staged[(at_0 + zeros) as usize] * sum;
                bottom -= staged[(at_1 + zeros) as usize] * sum;
            }
            sums[c] += top * staged[at_0 as usize];
            sums[comptime!(c + 2)] += bottom * staged[at_1 as usize];
        }
    } else {
        #[unroll]
        for c in 0..4usize {
            sums[c] += product.extract(c);
        }
    }
}
