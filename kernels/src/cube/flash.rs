//! Causal attention of whole sequences on tensor cores (FlashAttention-2, Dao 2023): 64 queries a cube, 16 a plane, keys 64 at a time
//! through shared memory, a running softmax in fp32. NVIDIA only (sm_80 on), fp16 and bf16, heads of 64 or 128.

use super::gemv::{mma_16x8x16, pack_pair};
use super::ops::{Heads, STATE_POSITION};
use cubecl::cmma::MmaDefinition;
use cubecl::ir::types::matrix::MatrixIdent;
use cubecl::prelude::*;

/// Units of a cube: four planes.
pub const UNITS: u32 = 128;

/// Queries of a cube, and keys it takes at a time.
pub const TILE: u32 = 64;

/// A score below every other, and far enough from the end of the range to be subtracted from.
const LOWEST: f32 = -1e30;

/// 2^x, to 2 ulp.
#[cube]
fn exp2(x: f32) -> f32 {
    let out: f32;
    let x = f32::reinterpret(u32::reinterpret(x));
    gpu_asm!("ex2.approx.ftz.f32 {}, {};", out(_) out, in(_) x, options(pure, nomem));
    f32::reinterpret(u32::reinterpret(out))
}

/// Copies a tile of keys or values into shared memory, zeros where the sequence ends.
#[cube]
fn stage<A: Float>(
    from: &[Vector<A, Const<8>>],
    to: &mut Shared<[Vector<A, Const<8>>]>,
    base: u32,
    first: u32,
    end: u32,
    #[comptime] row_vectors: u32,
) {
    #[unroll]
    for i in 0..comptime!(TILE * row_vectors / UNITS) {
        let at = UNIT_POS_X + comptime!(i * UNITS);
        let (row, column) = (at / row_vectors, at % row_vectors);
        let key = first + row;
        let is_there = key < end;
        let vector = from[(base + select(is_there, key, 0u32) * row_vectors + column) as usize];
        let zero = Vector::<A, Const<8>>::new(A::new(0.0f32));
        to[(row * comptime!(row_vectors + 1) + column) as usize] = select(is_there, vector, zero);
    }
}

/// # Shapes
/// `q`, `out` `[n, n_heads·head_dim]` as words of two, `keys`, `values` `[n_kv_heads, capacity, head_dim]` in vectors of eight;
/// `state` holds the position of the first query. A cube's y position is a head.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn flash_attention_kernel<A: Float>(
    q: &[u32],
    keys: &[Vector<A, Const<8>>],
    values: &[Vector<A, Const<8>>],
    out: &mut [u32],
    state: &[u32],
    n: u32,
    capacity: u32,
    window: u32,
    scale_log2: f32,
    #[comptime] heads: Heads,
    #[comptime] is_bf16: bool,
) {
    let head_dim = comptime!(heads.head_dim);
    let row_vectors = comptime!(heads.head_dim / 8);
    let stride = comptime!(heads.head_dim / 8 + 1);
    let n_steps = comptime!(heads.head_dim / 16);
    let mut key_tile = Shared::<[Vector<A, Const<8>>]>::new_aligned_slice(
        comptime!((TILE * (heads.head_dim / 8 + 1)) as usize),
        16usize,
    );
    let mut value_tile = Shared::<[Vector<A, Const<8>>]>::new_aligned_slice(
        comptime!((TILE * (heads.head_dim / 8 + 1)) as usize),
        16usize,
    );
    let mma = MmaDefinition::<A, A, f32>::new(16usize, 8usize, 16usize);

    let plane = UNIT_POS_X / 32u32;
    let lane = UNIT_POS_X % 32u32;
    let (group, quarter) = (lane / 4u32, lane % 4u32);
    let head = CUBE_POS_Y;
    let kv_head = head / comptime!(heads.n_heads / heads.n_kv_heads);
    let n_past = state[STATE_POSITION as usize];
    // The longest tiles first: they are what the launch waits for.
    let tile = n.div_ceil(TILE) - (CUBE_POS_X + 1u32);
    let row_0 = tile * TILE + plane * 16u32 + group;
    let row_1 = row_0 + 8u32;
    let position_0 = n_past + row_0;
    let position_1 = n_past + row_1;
    let q_words = comptime!(heads.n_heads * heads.head_dim / 2);
    let q_at_0 = min(row_0, n - 1u32) * q_words + head * comptime!(heads.head_dim / 2) + quarter;
    let q_at_1 = min(row_1, n - 1u32) * q_words + head * comptime!(heads.head_dim / 2) + quarter;
    let mut queries = Array::<u32>::new(comptime!((heads.head_dim / 4) as usize));
    #[unroll]
    for s in 0..n_steps {
        queries[comptime!((4 * s) as usize)] = q[(q_at_0 + comptime!(8 * s)) as usize];
        queries[comptime!((4 * s + 1) as usize)] = q[(q_at_1 + comptime!(8 * s)) as usize];
        queries[comptime!((4 * s + 2) as usize)] = q[(q_at_0 + comptime!(8 * s + 4)) as usize];
        queries[comptime!((4 * s + 3) as usize)] = q[(q_at_1 + comptime!(8 * s + 4)) as usize];
    }
    let mut sums = Array::<Vector<f32, Const<4>>>::new(comptime!((heads.head_dim / 8) as usize));
    #[unroll]
    for i in 0..row_vectors {
        sums[i as usize] = Vector::new(0.0f32);
    }
    let mut largest_0 = LOWEST.runtime();
    let mut largest_1 = LOWEST.runtime();
    let mut total_0 = 0.0f32;
    let mut total_1 = 0.0f32;

    let base = kv_head * capacity * row_vectors;
    let first_position = n_past + tile * TILE;
    let last_position = min(first_position + comptime!(TILE - 1), n_past + n - 1u32);
    let first_key = select(first_position + 1u32 > window, first_position + 1u32 - window, 0u32);
    let mut start = first_key / TILE * TILE;
    while start <= last_position {
        sync_cube();
        stage::<A>(keys, &mut key_tile, base, start, n_past + n, row_vectors);
        stage::<A>(values, &mut value_tile, base, start, n_past + n, row_vectors);
        sync_cube();

        let mut scores = Array::<Vector<f32, Const<4>>>::new(8usize);
        #[unroll]
        for j in 0..8u32 {
            let mut score = Vector::<f32, Const<4>>::new(0.0f32);
            #[unroll]
            for pair in 0..comptime!(n_steps / 2) {
                // Four 8x8 blocks: this key's neighbours by 32 values of the head.
                let at = (comptime!(j * 8) + lane % 8u32) * stride + comptime!(pair * 4) + lane / 8u32;
                let blocks = mma.load_matrix::<Vector<A, Const<8>>, Const<2>>(
                    &key_tile[at as usize..(at + 1u32) as usize],
                    MatrixIdent::B,
                    4usize,
                    false,
                );
                #[unroll]
                for s in 0..2u32 {
                    let first = comptime!(4 * (2 * pair + s));
                    score = mma_16x8x16(
                        queries[comptime!(first as usize)],
                        queries[comptime!((first + 1) as usize)],
                        queries[comptime!((first + 2) as usize)],
                        queries[comptime!((first + 3) as usize)],
                        u32::reinterpret(blocks[comptime!((2 * s) as usize)]),
                        u32::reinterpret(blocks[comptime!((2 * s + 1) as usize)]),
                        score,
                        is_bf16,
                    );
                }
            }
            scores[j as usize] = score;
        }

        // Scaled for 2^x; what a query does not see is out of every sum.
        let is_partial = start + comptime!(TILE - 1) > first_position || start + window <= last_position;
        let mut new_0 = largest_0;
        let mut new_1 = largest_1;
        #[unroll]
        for j in 0..8u32 {
            let mut score = scores[j as usize] * Vector::new(scale_log2);
            if is_partial {
                #[unroll]
                for c in 0..2u32 {
                    let key = start + comptime!(j * 8) + quarter * 2u32 + c;
                    let seen_0 = key <= position_0 && key + window > position_0;
                    let seen_1 = key <= position_1 && key + window > position_1;
                    score.insert(c as usize, select(seen_0, score.extract(c as usize), LOWEST.runtime()));
                    let below = comptime!((c + 2) as usize);
                    score.insert(below, select(seen_1, score.extract(below), LOWEST.runtime()));
                }
            }
            scores[j as usize] = score;
            new_0 = max(new_0, max(score.extract(0usize), score.extract(1usize)));
            new_1 = max(new_1, max(score.extract(2usize), score.extract(3usize)));
        }
        new_0 = max(new_0, plane_shuffle_xor(new_0, 1u32));
        new_0 = max(new_0, plane_shuffle_xor(new_0, 2u32));
        new_1 = max(new_1, plane_shuffle_xor(new_1, 1u32));
        new_1 = max(new_1, plane_shuffle_xor(new_1, 2u32));
        let rescale_0 = exp2(largest_0 - new_0);
        let rescale_1 = exp2(largest_1 - new_1);
        largest_0 = new_0;
        largest_1 = new_1;
        total_0 *= rescale_0;
        total_1 *= rescale_1;
        let mut shares = Array::<u32>::new(16usize);
        #[unroll]
        for j in 0..8u32 {
            let score = scores[j as usize];
            let a = exp2(score.extract(0usize) - new_0);
            let b = exp2(score.extract(1usize) - new_0);
            let c = exp2(score.extract(2usize) - new_1);
            let d = exp2(score.extract(3usize) - new_1);
            total_0 += a + b;
            total_1 += c + d;
            shares[comptime!((2 * j) as usize)] = pack_pair(a, b, is_bf16);
            shares[comptime!((2 * j + 1) as usize)] = pack_pair(c, d, is_bf16);
        }
        #[unroll]
        for i in 0..row_vectors {
            let mut sum = sums[i as usize];
            sum.insert(0usize, sum.extract(0usize) * rescale_0);
            sum.insert(1usize, sum.extract(1usize) * rescale_0);
            sum.insert(2usize, sum.extract(2usize) * rescale_1);
            sum.insert(3usize, sum.extract(3usize) * rescale_1);
            sums[i as usize] = sum;
        }
        #[unroll]
        for k in 0..comptime!(TILE / 16) {
            #[unroll]
            for pair in 0..comptime!(row_vectors / 2) {
                let row = comptime!(k * 16) + lane % 8u32 + 8u32 * ((lane / 8u32) % 2u32);
                let at = row * stride + comptime!(pair * 2) + lane / 16u32;
                let blocks = mma.load_matrix::<Vector<A, Const<8>>, Const<2>>(
                    &value_tile[at as usize..(at + 1u32) as usize],
                    MatrixIdent::B,
                    4usize,
                    true,
                );
                #[unroll]
                for s in 0..2u32 {
                    let column = comptime!((2 * pair + s) as usize);
                    sums[column] = mma_16x8x16(
                        shares[comptime!((4 * k) as usize)],
                        shares[comptime!((4 * k + 1) as usize)],
                        shares[comptime!((4 * k + 2) as usize)],
                        shares[comptime!((4 * k + 3) as usize)],
                        u32::reinterpret(blocks[comptime!((2 * s) as usize)]),
                        u32::reinterpret(blocks[comptime!((2 * s + 1) as usize)]),
                        sums[column],
                        is_bf16,
                    );
                }
            }
        }
        start += TILE;
    }

    total_0 += plane_shuffle_xor(total_0, 1u32);
    total_0 += plane_shuffle_xor(total_0, 2u32);
    total_1 += plane_shuffle_xor(total_1, 1u32);
    total_1 += plane_shuffle_xor(total_1, 2u32);
    #[unroll]
    for i in 0..row_vectors {
        let sum = sums[i as usize];
        let column = head * comptime!(head_dim / 2) + comptime!(i * 4) + quarter;
        if row_0 < n {
            out[(row_0 * q_words + column) as usize] =
                pack_pair(sum.extract(0usize) / total_0, sum.extract(1usize) / total_0, is_bf16);
        }
        if row_1 < n {
            out[(row_1 * q_words + column) as usize] =
                pack_pair(sum.extract(2usize) / total_1, sum.extract(3usize) / total_1, is_bf16);
        }
    }
}
