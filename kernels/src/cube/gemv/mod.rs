//! `y = W · x` for decoding, on tensor cores: 16 weight rows a plane, dequantized into the fragments of `mma.m16n8k16`.
//!
//! A block of planes shares a tile of 16 rows and splits its columns, 64 at a time: a lane reads the 16 columns of a 64-column block
//! that are its own (so that all lanes of one product share a quantization block), turns them into eight pairs of halves, and
//! multiplies with the same columns of x, which lie in shared memory in the order the scheme's pairs come in. Sums are fp32, scaled
//! block by block. Columns of the product beyond x's rows are zero and ignored: at one row, a matrix product costs no more
//! instructions than a dot product would, and decodes nothing twice.
//!
//! Memory is waited for as little as can be: codes, scales, x and what the results are added to are on their way before the first
//! barrier; as soon as a step's codes are multiplied, those of a later one take their registers.
//!
//! The norm before a projection, its bias, the residual behind it and SiLU·up are fused here, since a token is bound by launches.
//! NVIDIA only (sm_80 on): other runtimes take [`linear`](super::linear).

mod fragments;
mod multiply;
mod scale;
mod stage;
mod tail;

pub use fragments::{
    Affine4Pairs, Bf16Pairs, Codebook4Pairs, F16Pairs, Fragments, Int8Pairs, Layout, mma_16x8x16, pack_pair,
};

use super::overlap::{await_earlier, await_earlier_with, let_later_begin};
use cubecl::prelude::*;
use multiply::{has_part, load_step, multiply_step};
use scale::{choose_offsets, fetch_scales};
use stage::{
    fetch_map, fetch_row, fetch_table, inverse_norm, pack_row, start_norm, turns, write_map, write_sums, write_table,
};
use tail::{fetch_tail, write_sums_of_plane, write_tile};

/// Columns that a plane handles in one step; block sizes are multiples of it.
pub const STEP: u32 = 64;

/// Most rows of x that one launch takes.
pub const MAX_ROWS: u32 = 8;

/// What is done with the rows' sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Epilogue {
    /// Written as they are.
    Store,
    /// Added to what `y` holds: the residual stream.
    Add,
    /// Rows come in pairs (gate i, up i), rows `n_rows / 2` apart; silu(gate)·up is written.
    SiluMul,
    /// As above with GELU in its tanh form.
    GeluMul,
}

/// Everything a launch fixes when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GemvSpec {
    pub n_rows: u32,
    pub n_cols: u32,
    /// Rows of x, 1 to 8.
    pub m: u32,
    pub block_size: u32,
    pub nested: bool,
    pub norm: bool,
    pub has_bias: bool,
    pub epilogue: Epilogue,
    pub planes: u32,
    /// Steps whose codes a lane has in flight: a divisor of a plane's steps.
    pub unroll: u32,
    /// Copies of the code table in shared memory, a multiple of 8: 32 have no bank conflicts.
    pub copies: u32,
    /// Blocks of 64 columns in a step. A product has eight columns for x's rows: where x is a single row, two blocks' sums have columns
    /// of their own, and lanes read codes 16 bytes at a time.
    pub slots: u32,
    /// The launch may begin before the one in front of it ends: see [`overlap`](super::overlap).
    pub overlaps: bool,
}

impl GemvSpec {
    fn is_paired(self) -> bool {
        matches!(self.epilogue, Epilogue::SiluMul | Epilogue::GeluMul)
    }

    /// Rows from a tile's first eight to its second.
    fn distance(self) -> u32 {
        if self.is_paired() { self.n_rows / 2 } else { 8 }
    }

    /// Results of a tile.
    fn tile_outputs(self) -> u32 {
        if self.is_paired() { 8 } else { 16 }
    }

    fn n_steps(self) -> u32 {
        self.n_cols / (STEP * self.slots)
    }

    /// Steps of a plane, the last of which may lie past the end.
    fn n_plane_steps(self) -> u32 {
        self.n_steps().div_ceil(self.planes)
    }

    /// Returns true where step `k` of every plane exists.
    fn is_whole(self, k: u32) -> bool {
        (k + 1) * self.planes <= self.n_steps()
    }

    /// A step has two blocks of a single row of x.
    fn is_spread(self) -> bool {
        self.slots == 2
    }

    /// Block scales that a lane fetches for a step.
    fn lane_scales(self) -> u32 {
        if self.is_spread() { 1 } else { 2 }
    }

    fn n_blocks(self) -> u32 {
        self.n_cols.div_ceil(self.block_size)
    }
}

/// Cubes take tiles of 16 rows in turn, one barrier a tile: scales and sums of two tiles have their places in shared memory.
///
/// # Shapes
/// `codes` the packed matrix `[n_rows, n_cols]` in vectors of words, `x` `[m, n_cols]`, `norm_weight` `[n_cols]` in vectors, `bias`
/// `[n_rows]`, `y` `[m, n_rows]` (`[m, n_rows / 2]` where rows are paired).
#[cube(launch_unchecked)]
#[expect(clippy::too_many_arguments, reason = "a kernel's buffers and sizes")]
pub fn gemv_kernel<S: Fragments, V: Size>(
    codes: &[Vector<u32, V>],
    scales: &[f32],
    aux: &[u32],
    tables: &[f32],
    x: &[Vector<f32, Const<4>>],
    norm_weight: &[Vector<f32, Const<4>>],
    bias: &[f32],
    y: &mut [f32],
    n_tiles: u32,
    eps: f32,
    segment_1: u32,
    segment_2: u32,
    #[comptime] spec: GemvSpec,
) {
    let layout = comptime!(S::layout());
    let width = V::value().comptime() as u32;
    let vectors = comptime!(layout.words * spec.slots / width);
    let n_plane_steps = comptime!(spec.n_plane_steps());
    let half_sums = comptime!(spec.planes * 16 * spec.m);
    let row_turns = comptime!(turns(spec.n_cols / 8, spec));

    let mut pairs = Shared::<[Vector<u32, Const<4>>]>::new_slice(comptime!((spec.m * spec.n_cols / 8) as usize));
    let mut partial = Shared::<[f32]>::new_slice(comptime!((2 * half_sums) as usize));
    let mut table =
        Shared::<[u32]>::new_slice(comptime!(if layout.has_table { (256 * spec.copies) as usize } else { 1 }));
    let mut map = Shared::<[f32]>::new_slice(comptime!(if spec.nested { 256usize } else { 1 }));
    let mut sums_of_x =
        Shared::<[f32]>::new_slice(comptime!(if layout.has_zero { (spec.m * spec.n_cols / STEP) as usize } else { 1 }));

    let plane = UNIT_POS / 32u32;
    let lane = fragments::opaque(UNIT_POS % 32u32);
    let n_words = comptime!((spec.unroll * vectors) as usize);
    let mut words_0 = Array::<Vector<u32, V>>::new(n_words);
    let mut words_1 = Array::<Vector<u32, V>>::new(n_words);
    let n_raw = comptime!((n_plane_steps * spec.lane_scales()) as usize);
    let mut raw_scales = Array::<f32>::new(n_raw);
    let mut raw_words = Array::<u32>::new(n_raw);
    let mut offsets = Array::<f32>::new(3usize);
    let mut row_offsets = Array::<f32>::new(comptime!(spec.lane_scales() as usize));
    let mut tail = Array::<f32>::new(5usize);
    let mut row = Array::<Vector<f32, Const<4>>>::new(comptime!((2 * row_turns) as usize));
    let mut norm_row = Array::<Vector<f32, Const<4>>>::new(comptime!((2 * row_turns) as usize));

    #[unroll]
    for k in 0..spec.unroll {
        load_step::<S, V>(codes, &mut words_0, &mut words_1, CUBE_POS_X, plane, lane, k, spec);
    }
    if comptime!(layout.block_scale) {
        #[unroll]
        for k in 0..n_plane_steps {
            fetch_scales::<S>(scales, aux, &mut raw_scales, &mut raw_words, CUBE_POS_X, plane, lane, k, spec);
        }
    }
    if comptime!(spec.norm) {
        fetch_row(norm_weight, &mut norm_row, 0u32, spec);
    }
    if comptime!(!spec.overlaps) {
        fetch_row(x, &mut row, 0u32, spec);
    }
    if comptime!(layout.has_table) {
        let mut values = Array::<f32>::new(comptime!((2 * turns(32 * spec.copies, spec)) as usize));
        fetch_table(tables, &mut values, spec);
        write_table::<S>(&values, &mut table, spec);
    }
    if comptime!(spec.nested) {
        let mut values = Array::<f32>::new(comptime!(turns(256, spec) as usize));
        fetch_map(tables, &mut offsets, &mut values, spec);
        write_map(&values, &mut map, spec);
    }
    // So far nothing was touched that a launch before this one writes.
    if comptime!(spec.overlaps) {
        if comptime!(layout.has_table) {
            // The table's stores keep what is fetched in front.
            await_earlier();
        } else {
            await_earlier_with(words_1[comptime!(n_words - 1)].extract(0usize));
        }
        let_later_begin();
        fetch_row(x, &mut row, 0u32, spec);
    }
    #[unroll]
    for x_row in 0..spec.m {
        let mut inverse = 1.0f32;
        if comptime!(x_row > 0) {
            fetch_row(x, &mut row, comptime!(x_row * spec.n_cols), spec);
        }
        if comptime!(spec.norm) {
            if comptime!(x_row > 0) {
                sync_cube();
            }
            start_norm(&row, &mut partial, spec);
            sync_cube();
            inverse = inverse_norm(&partial, eps, spec);
        }
        pack_row::<S>(&row, &norm_row, inverse, &mut pairs, comptime!(x_row * spec.n_cols / 8), spec);
    }
    sync_cube();
    if comptime!(layout.has_zero) {
        write_sums::<S>(&pairs, &mut sums_of_x, spec);
        sync_cube();
    }

    let (group, quarter) = (lane / 4u32, lane % 4u32);
    let has_part = has_part(lane, spec);
    let mut x_at = plane * comptime!(STEP / 8 * spec.slots) + quarter * comptime!(2 * spec.slots);
    if comptime!(spec.m > 1) {
        x_at += group % spec.m * comptime!(spec.n_cols / 8);
    }
    let mut x_words = Array::<Vector<u32, Const<4>>>::new(2usize);
    #[unroll]
    for half in 0..2usize {
        x_words[half] = Vector::<u32, Const<4>>::new(0u32);
    }
    let mut parity = 0u32;
    let mut tile = CUBE_POS_X;
    while tile < n_tiles {
        let next = tile + CUBE_COUNT_X;
        fetch_tail::<S>(scales, bias, y, &mut tail, tile, spec);
        if comptime!(spec.nested) {
            choose_offsets(&offsets, &mut row_offsets, tile, lane, segment_1, segment_2, spec);
        }
        let mut sums = Array::<f32>::new(5usize);
        #[unroll]
        for c in 0..5usize {
            sums[c] = 0.0;
        }
        #[unroll]
        for k in 0..n_plane_steps {
            multiply_step::<S, V>(
                &words_0,
                &words_1,
                &mut sums,
                &mut x_words,
                &pairs,
                &table,
                &map,
                &sums_of_x,
                &raw_scales,
                &raw_words,
                &row_offsets,
                x_at,
                tile,
                plane,
                lane,
                has_part,
                k,
                spec,
            );
            let ahead = comptime!(k + spec.unroll);
            if comptime!(ahead < n_plane_steps) {
                load_step::<S, V>(codes, &mut words_0, &mut words_1, tile, plane, lane, ahead, spec);
            } else if next < n_tiles {
                let ahead = comptime!(ahead - n_plane_steps);
                load_step::<S, V>(codes, &mut words_0, &mut words_1, next, plane, lane, ahead, spec);
            }
            if comptime!(layout.block_scale) {
                if next < n_tiles {
                    fetch_scales::<S>(scales, aux, &mut raw_scales, &mut raw_words, next, plane, lane, k, spec);
                }
            }
        }
        let partial_at = parity * half_sums;
        write_sums_of_plane::<S>(&sums, &mut partial, partial_at, plane, lane, spec);
        sync_cube();
        write_tile::<S>(&partial, &tail, y, tile, partial_at, spec);
        parity = 1u32 - parity;
        tile += CUBE_COUNT_X;
    }
}
