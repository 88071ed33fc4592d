//! `y = W · x` for decoding, on tensor cores: 16 weight rows a plane, dequantized into the fragments of `mma.m16n8k16`.
//!
//! A block of planes shares a tile of 16 rows and splits its columns, 64 at a time: a lane reads the 16 columns of a 64-column block
//! that are its own (so that all lanes of one product share a quantization block), turns them into eight pairs of halves, and
//! multiplies with the same columns of x, which lie in shared memory in the order the scheme's pairs come in. Sums are fp32, scaled
//! block by block. Columns of the product beyond x's rows are copies and ignored: at one row, a matrix product costs no more
//! instructions than a dot product would, and decodes nothing twice.
//!
//! The norm before a projection, its bias, the residual behind it and SiLU·up are fused here, since a token is bound by launches.
//! NVIDIA only (sm_80 on): other runtimes take [`linear`](super::linear).

use super::decode::f16_bits_to_f32;
use cubecl::prelude::*;

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
    /// Steps whose codes a lane has in flight.
    pub unroll: u32,
    /// Copies of the code table in shared memory: 32 have no bank conflicts.
    pub copies: u32,
}

/// Turns stored words into pairs of halves.
#[cube]
pub trait Fragments: Send + Sync + 'static {
    /// Words of codes that hold 16 columns.
    fn words() -> comptime_type!(u32);
    /// Scales: one a block of columns, or one a row.
    fn row_scale() -> comptime_type!(bool);
    fn block_scale() -> comptime_type!(bool);
    /// Codes have a zero point a group.
    fn has_zero() -> comptime_type!(bool);
    /// Codes are looked up in a table of pairs.
    fn has_table() -> comptime_type!(bool);
    /// Pairs take every other column of four: (0, 2), (1, 3).
    fn interleaved() -> comptime_type!(bool);
    /// Halves are bf16.
    fn is_bf16() -> comptime_type!(bool);
    /// Returns pair `index` (0 to 7) of the 16 columns in `codes`.
    fn pair<V: Size>(
        codes: &Array<Vector<u32, V>>,
        table: &Shared<[u32]>,
        lane_copy: u32,
        #[comptime] first: u32,
        #[comptime] index: u32,
        #[comptime] copies: u32,
    ) -> u32;
}

/// Returns word `index` of those that a lane loaded from vector `first` on.
#[cube]
fn word<V: Size>(codes: &Array<Vector<u32, V>>, #[comptime] first: u32, #[comptime] index: u32) -> u32 {
    let width = V::value().comptime() as u32;
    codes[comptime!((first + index / width) as usize)].extract(comptime!((index % width) as usize))
}

/// NF4 and FP4: a byte, two codes, is looked up as a pair.
pub struct Codebook4Pairs;

#[cube]
impl Fragments for Codebook4Pairs {
    fn words() -> comptime_type!(u32) {
        2u32
    }
    fn row_scale() -> comptime_type!(bool) {
        false
    }
    fn block_scale() -> comptime_type!(bool) {
        true
    }
    fn has_zero() -> comptime_type!(bool) {
        false
    }
    fn has_table() -> comptime_type!(bool) {
        true
    }
    fn interleaved() -> comptime_type!(bool) {
        false
    }
    fn is_bf16() -> comptime_type!(bool) {
        false
    }
    fn pair<V: Size>(
        codes: &Array<Vector<u32, V>>,
        table: &Shared<[u32]>,
        lane_copy: u32,
        #[comptime] first: u32,
        #[comptime] index: u32,
        #[comptime] copies: u32,
    ) -> u32 {
        let word = word::<V>(codes, first, comptime!(index / 4));
        let byte = (word >> comptime!((index % 4) * 8)) & 0xffu32;
        table[(byte * copies + lane_copy) as usize]
    }
}

/// INT4 with a zero point: the code itself as a half; the zero point is taken off the sum.
pub struct Affine4Pairs;

#[cube]
impl Fragments for Affine4Pairs {
    fn words() -> comptime_type!(u32) {
        2u32
    }
    fn row_scale() -> comptime_type!(bool) {
        false
    }
    fn block_scale() -> comptime_type!(bool) {
        true
    }
    fn has_zero() -> comptime_type!(bool) {
        true
    }
    fn has_table() -> comptime_type!(bool) {
        false
    }
    fn interleaved() -> comptime_type!(bool) {
        false
    }
    fn is_bf16() -> comptime_type!(bool) {
        false
    }
    fn pair<V: Size>(
        codes: &Array<Vector<u32, V>>,
        _table: &Shared<[u32]>,
        _lane_copy: u32,
        #[comptime] first: u32,
        #[comptime] index: u32,
        #[comptime] _copies: u32,
    ) -> u32 {
        // 0x6400 is 1024 in fp16, whose last bits count ones: or-ing a code in adds it exactly.
        let byte = word::<V>(codes, first, comptime!(index / 4)) >> comptime!((index % 4) * 8);
        let biased = ((byte >> 4u32) & 15u32) | ((byte & 15u32) << 16u32) | 0x6400_6400u32;
        subtract_halves(biased, 0x6400_6400u32)
    }
}

/// INT8: bytes become halves by the same trick, two of four at a time.
pub struct Int8Pairs;

#[cube]
impl Fragments for Int8Pairs {
    fn words() -> comptime_type!(u32) {
        4u32
    }
    fn row_scale() -> comptime_type!(bool) {
        true
    }
    fn block_scale() -> comptime_type!(bool) {
        false
    }
    fn has_zero() -> comptime_type!(bool) {
        false
    }
    fn has_table() -> comptime_type!(bool) {
        false
    }
    fn interleaved() -> comptime_type!(bool) {
        true
    }
    fn is_bf16() -> comptime_type!(bool) {
        false
    }
    fn pair<V: Size>(
        codes: &Array<Vector<u32, V>>,
        _table: &Shared<[u32]>,
        _lane_copy: u32,
        #[comptime] first: u32,
        #[comptime] index: u32,
        #[comptime] _copies: u32,
    ) -> u32 {
        let word = word::<V>(codes, first, comptime!(index / 2)) ^ 0x8080_8080u32;
        let biased = ((word >> comptime!((index % 2) * 8)) & 0x00ff_00ffu32) | 0x6400_6400u32;
        // 0x6480 is 1024 + 128.
        subtract_halves(biased, 0x6480_6480u32)
    }
}

/// fp16 as it is.
pub struct F16Pairs;

/// bf16 as it is.
pub struct Bf16Pairs;

macro_rules! dense_pairs {
    ($name:ident, $is_bf16:literal) => {
        #[cube]
        impl Fragments for $name {
            fn words() -> comptime_type!(u32) {
                8u32
            }
            fn row_scale() -> comptime_type!(bool) {
                false
            }
            fn block_scale() -> comptime_type!(bool) {
                false
            }
            fn has_zero() -> comptime_type!(bool) {
                false
            }
            fn has_table() -> comptime_type!(bool) {
                false
            }
            fn interleaved() -> comptime_type!(bool) {
                false
            }
            fn is_bf16() -> comptime_type!(bool) {
                $is_bf16
            }
            fn pair<V: Size>(
                codes: &Array<Vector<u32, V>>,
                _table: &Shared<[u32]>,
                _lane_copy: u32,
                #[comptime] first: u32,
                #[comptime] index: u32,
                #[comptime] _copies: u32,
            ) -> u32 {
                word::<V>(codes, first, index)
            }
        }
    };
}

dense_pairs!(F16Pairs, false);
dense_pairs!(Bf16Pairs, true);

/// Reads a variable: assembly would be given its address.
#[cube]
fn read_word(word: u32) -> u32 {
    word | 0u32
}

/// As [`read_word`].
#[cube]
fn read_float(value: f32) -> f32 {
    f32::reinterpret(u32::reinterpret(value))
}

#[cube]
fn subtract_halves(a: u32, b: u32) -> u32 {
    let out: u32;
    gpu_asm!("sub.f16x2 {}, {}, {};", out(_) out, in(_) a, in(_) b, options(pure, nomem));
    read_word(out)
}

/// Packs two numbers as halves, the first in the low half.
#[cube]
pub fn pack_pair(low: f32, high: f32, #[comptime] is_bf16: bool) -> u32 {
    let out: u32;
    let (low, high) = (read_float(low), read_float(high));
    if comptime!(is_bf16) {
        gpu_asm!("cvt.rn.bf16x2.f32 {}, {}, {};", out(_) out, in(_) high, in(_) low, options(pure, nomem));
    } else {
        gpu_asm!("cvt.rn.f16x2.f32 {}, {}, {};", out(_) out, in(_) high, in(_) low, options(pure, nomem));
    }
    read_word(out)
}

#[cube]
fn low_half(pair: u32, #[comptime] is_bf16: bool) -> f32 {
    if comptime!(is_bf16) { f32::reinterpret(pair << 16u32) } else { f16_bits_to_f32(pair & 0xffffu32) }
}

#[cube]
fn high_half(pair: u32, #[comptime] is_bf16: bool) -> f32 {
    if comptime!(is_bf16) { f32::reinterpret(pair & 0xffff_0000u32) } else { f16_bits_to_f32(pair >> 16u32) }
}

/// `d = a · b + c` of a 16×8×16 product: a four words, b two, c four floats a lane (PTX ISA, `mma.m16n8k16`).
#[cube]
#[allow(clippy::too_many_arguments)]
pub fn mma_16x8x16(
    a_0: u32,
    a_1: u32,
    a_2: u32,
    a_3: u32,
    b_0: u32,
    b_1: u32,
    c: Vector<f32, Const<4>>,
    #[comptime] is_bf16: bool,
) -> Vector<f32, Const<4>> {
    let d: Vector<f32, Const<4>>;
    // Taken apart: an operand that is a variable would be passed by its address.
    let (c_0, c_1, c_2, c_3) = (c.extract(0usize), c.extract(1usize), c.extract(2usize), c.extract(3usize));
    if comptime!(is_bf16) {
        gpu_asm!(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {d}, ",
            "{{{a_0}, {a_1}, {a_2}, {a_3}}}, {{{b_0}, {b_1}}}, {{{c_0}, {c_1}, {c_2}, {c_3}}};",
            a_0 = in(_) a_0, a_1 = in(_) a_1, a_2 = in(_) a_2, a_3 = in(_) a_3, b_0 = in(_) b_0, b_1 = in(_) b_1,
            c_0 = in(_) c_0, c_1 = in(_) c_1, c_2 = in(_) c_2, c_3 = in(_) c_3, d = out(_) d,
            options(pure, nomem),
        );
    } else {
        gpu_asm!(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {d}, ",
            "{{{a_0}, {a_1}, {a_2}, {a_3}}}, {{{b_0}, {b_1}}}, {{{c_0}, {c_1}, {c_2}, {c_3}}};",
            a_0 = in(_) a_0, a_1 = in(_) a_1, a_2 = in(_) a_2, a_3 = in(_) a_3, b_0 = in(_) b_0, b_1 = in(_) b_1,
            c_0 = in(_) c_0, c_1 = in(_) c_1, c_2 = in(_) c_2, c_3 = in(_) c_3, d = out(_) d,
            options(pure, nomem),
        );
    }
    d
}

/// Returns the first of the two weight rows that lane group `g` of a tile owns; the second follows `pair_distance` rows on.
#[cube]
fn tile_row(tile: u32, #[comptime] paired: bool) -> u32 {
    if comptime!(paired) { tile * 8u32 } else { tile * 16u32 }
}

/// Brings x into shared memory as pairs of halves, normed where the spec says so.
#[cube]
#[allow(clippy::too_many_arguments)]
fn stage_x<S: Fragments>(
    x: &[f32],
    norm_weight: &[f32],
    eps: f32,
    pairs: &mut Shared<[u32]>,
    partial: &mut Shared<[f32]>,
    #[comptime] spec: GemvSpec,
) {
    let units = comptime!(spec.planes * 32);
    let n_words = comptime!(spec.n_cols / 2);
    #[unroll]
    for row in 0..spec.m {
        let base = comptime!(row * spec.n_cols);
        let mut inverse = 1.0f32;
        if comptime!(spec.norm) {
            let mut squares = 0.0f32;
            let mut at = UNIT_POS;
            while at < spec.n_cols {
                let value = x[(base + at) as usize];
                squares += value * value;
                at += units;
            }
            let sum = plane_sum(squares);
            if UNIT_POS_PLANE == 0 {
                partial[(UNIT_POS / 32u32) as usize] = sum;
            }
            sync_cube();
            let mut total = 0.0f32;
            #[unroll]
            for plane in 0..spec.planes {
                total += partial[plane as usize];
            }
            inverse = (total / comptime!(spec.n_cols as f32) + eps).inverse_sqrt();
            sync_cube();
        }
        let mut at = UNIT_POS;
        while at < n_words {
            let mut low_at = at * 2u32;
            let mut high_at = at * 2u32 + 1u32;
            if comptime!(S::interleaved()) {
                low_at = (at / 2u32) * 4u32 + at % 2u32;
                high_at = low_at + 2u32;
            }
            let mut low = x[(base + low_at) as usize] * inverse;
            let mut high = x[(base + high_at) as usize] * inverse;
            if comptime!(spec.norm) {
                low *= norm_weight[low_at as usize];
                high *= norm_weight[high_at as usize];
            }
            pairs[(comptime!(row * n_words) + at) as usize] = pack_pair(low, high, S::is_bf16());
            at += units;
        }
    }
}

/// Decodes the scales of a tile's 16 rows into shared memory from `staged_at` on, `[16, n_blocks]`, and zero points behind them.
#[cube]
#[allow(clippy::too_many_arguments)]
fn stage_scales<S: Fragments>(
    scales: &[f32],
    aux: &[u32],
    tables: &[f32],
    map: &Shared<[f32]>,
    staged: &mut Shared<[f32]>,
    tile: u32,
    staged_at: u32,
    segment_1: u32,
    segment_2: u32,
    #[comptime] spec: GemvSpec,
) {
    let units = comptime!(spec.planes * 32);
    let n_blocks = comptime!(spec.n_cols.div_ceil(spec.block_size));
    let paired = comptime!(matches!(spec.epilogue, Epilogue::SiluMul | Epilogue::GeluMul));
    let distance = comptime!(if paired { spec.n_rows / 2 } else { 8 });
    let mut at = UNIT_POS;
    while at < comptime!(16 * n_blocks) {
        let within = at / n_blocks;
        let block = at % n_blocks;
        let row = tile_row(tile, paired) + within % 8u32 + (within / 8u32) * distance;
        let index = row * n_blocks + block;
        if comptime!(S::has_zero()) {
            let stat = aux[index as usize];
            staged[(staged_at + at) as usize] = f16_bits_to_f32(stat & 0xffffu32);
            staged[(staged_at + comptime!(16 * n_blocks) + at) as usize] = f32::cast_from(stat >> 16u32);
        } else if comptime!(spec.nested) {
            let code = (aux[(index / 4u32) as usize] >> ((index % 4u32) * 8u32)) & 0xffu32;
            let segment = u32::cast_from(row >= segment_1) + u32::cast_from(row >= segment_2);
            let scaled = map[code as usize] * scales[(index / 256u32) as usize];
            staged[(staged_at + at) as usize] = scaled + tables[(272u32 + segment) as usize];
        } else {
            staged[(staged_at + at) as usize] = scales[index as usize];
        }
        at += units;
    }
}

/// Loads the codes of one batch of steps, for the two rows of each lane.
#[cube]
#[allow(clippy::too_many_arguments)]
fn load_batch<S: Fragments, V: Size>(
    codes: &[Vector<u32, V>],
    words_0: &mut Array<Vector<u32, V>>,
    words_1: &mut Array<Vector<u32, V>>,
    tile: u32,
    plane: u32,
    lane: u32,
    #[comptime] batch: u32,
    #[comptime] spec: GemvSpec,
) {
    let n_steps = comptime!(spec.n_cols / STEP);
    let width = V::value().comptime() as u32;
    let vectors = comptime!(S::words() / width);
    let row_vectors = comptime!(spec.n_cols / 16 * S::words() / width);
    let paired = comptime!(matches!(spec.epilogue, Epilogue::SiluMul | Epilogue::GeluMul));
    let distance = comptime!(if paired { spec.n_rows / 2 } else { 8 });
    let row_0 = tile_row(tile, paired) + lane / 4u32;
    let base_0 = row_0 * row_vectors + (lane % 4u32) * vectors;
    let base_1 = base_0 + comptime!(distance * row_vectors);
    #[unroll]
    for u in 0..spec.unroll {
        let step = comptime!((batch * spec.unroll + u) * spec.planes) + plane;
        let exact = comptime!((batch * spec.unroll + u + 1) * spec.planes <= n_steps);
        // Past the end, step 0 is read and its product left out.
        let mut safe = step;
        if comptime!(!exact) {
            safe = select(step < n_steps, step, 0u32);
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
#[allow(clippy::too_many_arguments)]
fn multiply_batch<S: Fragments, V: Size>(
    words_0: &Array<Vector<u32, V>>,
    words_1: &Array<Vector<u32, V>>,
    sums: &mut Array<f32>,
    pairs: &Shared<[u32]>,
    table: &Shared<[u32]>,
    staged: &Shared<[f32]>,
    sums_of_x: &Shared<[f32]>,
    staged_at: u32,
    plane: u32,
    lane: u32,
    #[comptime] batch: u32,
    #[comptime] spec: GemvSpec,
) {
    let n_steps = comptime!(spec.n_cols / STEP);
    let n_blocks = comptime!(spec.n_cols.div_ceil(spec.block_size));
    let width = V::value().comptime() as u32;
    let vectors = comptime!(S::words() / width);
    let (group, quarter) = (lane / 4u32, lane % 4u32);
    let lane_copy = lane % spec.copies;
    // Which row of x this lane's column of the product is.
    let x_row = group % spec.m;
    #[unroll]
    for u in 0..spec.unroll {
        let step = comptime!((batch * spec.unroll + u) * spec.planes) + plane;
        let exact = comptime!((batch * spec.unroll + u + 1) * spec.planes <= n_steps);
        let first = comptime!(u * vectors);
        if exact || step < n_steps {
            let mut product = Vector::<f32, Const<4>>::new(0.0f32);
            let x_base = x_row * comptime!(spec.n_cols / 2) + step * comptime!(STEP / 2) + quarter * 8u32;
            #[unroll]
            for j in 0..4u32 {
                let p0 = comptime!(2 * j);
                let p1 = comptime!(2 * j + 1);
                product = mma_16x8x16(
                    S::pair::<V>(words_0, table, lane_copy, first, p0, spec.copies),
                    S::pair::<V>(words_1, table, lane_copy, first, p0, spec.copies),
                    S::pair::<V>(words_0, table, lane_copy, first, p1, spec.copies),
                    S::pair::<V>(words_1, table, lane_copy, first, p1, spec.copies),
                    pairs[(x_base + p0) as usize],
                    pairs[(x_base + p1) as usize],
                    product,
                    S::is_bf16(),
                );
            }
            if comptime!(S::block_scale()) {
                let block = step / comptime!(spec.block_size / STEP);
                let at_0 = staged_at + group * n_blocks + block;
                let at_1 = at_0 + comptime!(8 * n_blocks);
                let (scale_0, scale_1) = (staged[at_0 as usize], staged[at_1 as usize]);
                #[unroll]
                for c in 0..2usize {
                    let mut top = product.extract(c);
                    let mut bottom = product.extract(comptime!(c + 2));
                    if comptime!(S::has_zero()) {
                        let column = (quarter * 2u32 + c as u32) % spec.m;
                        let sum = sums_of_x[(column * n_steps + step) as usize];
                        let zeros = comptime!(16 * n_blocks);
                        top -= staged[(at_0 + zeros) as usize] * sum;
                        bottom -= staged[(at_1 + zeros) as usize] * sum;
                    }
                    sums[c] += top * scale_0;
                    sums[comptime!(c + 2)] += bottom * scale_1;
                }
            } else {
                #[unroll]
                for c in 0..4usize {
                    sums[c] += product.extract(c);
                }
            }
        }
    }
}

/// Cubes take tiles of 16 rows in turn. While a tile is multiplied, the first codes of the next are on their way and its scales are
/// decoded into the other half of their buffer: one barrier a tile.
///
/// # Shapes
/// `codes` the packed matrix `[n_rows, n_cols]` in vectors of words, `x` `[m, n_cols]`, `norm_weight` `[n_cols]`, `bias` `[n_rows]`,
/// `y` `[m, n_rows]` (`[m, n_rows / 2]` where rows are paired).
#[cube(launch_unchecked, create_dummy_kernel)]
#[allow(clippy::too_many_arguments)]
pub fn gemv_kernel<S: Fragments, V: Size>(
    codes: &[Vector<u32, V>],
    scales: &[f32],
    aux: &[u32],
    tables: &[f32],
    x: &[f32],
    norm_weight: &[f32],
    bias: &[f32],
    y: &mut [f32],
    n_tiles: u32,
    eps: f32,
    segment_1: u32,
    segment_2: u32,
    #[comptime] spec: GemvSpec,
) {
    let units = comptime!(spec.planes * 32);
    let n_steps = comptime!(spec.n_cols / STEP);
    let n_blocks = comptime!(spec.n_cols.div_ceil(spec.block_size));
    let width = V::value().comptime() as u32;
    let vectors = comptime!(S::words() / width);
    let n_batches = comptime!(n_steps.div_ceil(spec.planes).div_ceil(spec.unroll));
    let tile_scales = comptime!(16 * n_blocks * if S::has_zero() { 2 } else { 1 });
    let tile_sums = comptime!(spec.planes * 16 * spec.m);

    let mut pairs = Shared::<[u32]>::new_aligned_slice(comptime!((spec.m * spec.n_cols / 2) as usize), 16usize);
    let mut partial = Shared::<[f32]>::new_slice(comptime!((2 * tile_sums) as usize));
    let mut table =
        Shared::<[u32]>::new_slice(comptime!(if S::has_table() { (256 * spec.copies) as usize } else { 1 }));
    let mut map = Shared::<[f32]>::new_slice(comptime!(if spec.nested { 256usize } else { 1 }));
    let mut sums_of_x =
        Shared::<[f32]>::new_slice(comptime!(if S::has_zero() { (spec.m * n_steps) as usize } else { 1 }));
    let mut staged =
        Shared::<[f32]>::new_slice(comptime!(if S::block_scale() { (2 * tile_scales) as usize } else { 1 }));

    let plane = UNIT_POS / 32u32;
    let lane = UNIT_POS % 32u32;
    let mut words_0 = Array::<Vector<u32, V>>::new(comptime!((spec.unroll * vectors) as usize));
    let mut words_1 = Array::<Vector<u32, V>>::new(comptime!((spec.unroll * vectors) as usize));
    load_batch::<S, V>(codes, &mut words_0, &mut words_1, CUBE_POS_X, plane, lane, 0u32, spec);

    if comptime!(S::has_table()) {
        let mut at = UNIT_POS;
        while at < 256u32 {
            let pair = pack_pair(tables[(at >> 4u32) as usize], tables[(at & 15u32) as usize], S::is_bf16());
            #[unroll]
            for copy in 0..spec.copies {
                // Lanes write different banks.
                table[(at * spec.copies + (copy + at) % spec.copies) as usize] = pair;
            }
            at += units;
        }
    }
    if comptime!(spec.nested) {
        let mut at = UNIT_POS;
        while at < 256u32 {
            map[at as usize] = tables[(16u32 + at) as usize];
            at += units;
        }
        sync_cube();
    }
    if comptime!(S::block_scale()) {
        stage_scales::<S>(scales, aux, tables, &map, &mut staged, CUBE_POS_X, 0u32, segment_1, segment_2, spec);
    }
    stage_x::<S>(x, norm_weight, eps, &mut pairs, &mut partial, spec);
    sync_cube();
    if comptime!(S::has_zero()) {
        let mut at = UNIT_POS;
        while at < comptime!(spec.m * n_steps) {
            let mut sum = 0.0f32;
            for i in 0..comptime!(STEP / 2) {
                let pair = pairs[(at * comptime!(STEP / 2) + i) as usize];
                sum += low_half(pair, S::is_bf16()) + high_half(pair, S::is_bf16());
            }
            sums_of_x[at as usize] = sum;
            at += units;
        }
        sync_cube();
    }

    let mut parity = 0u32;
    let mut tile = CUBE_POS_X;
    while tile < n_tiles {
        let mut sums = Array::<f32>::new(4usize);
        #[unroll]
        for c in 0..4usize {
            sums[c] = 0.0;
        }
        let staged_at = parity * tile_scales;
        // Past the last tile, this one is loaded again and ignored.
        let next = select(tile + CUBE_COUNT_X < n_tiles, tile + CUBE_COUNT_X, tile);
        multiply_batch::<S, V>(
            &words_0, &words_1, &mut sums, &pairs, &table, &staged, &sums_of_x, staged_at, plane, lane, 0u32, spec,
        );
        #[unroll]
        for batch in 1..n_batches {
            load_batch::<S, V>(codes, &mut words_0, &mut words_1, tile, plane, lane, batch, spec);
            multiply_batch::<S, V>(
                &words_0, &words_1, &mut sums, &pairs, &table, &staged, &sums_of_x, staged_at, plane, lane, batch, spec,
            );
        }
        load_batch::<S, V>(codes, &mut words_0, &mut words_1, next, plane, lane, 0u32, spec);
        if comptime!(S::block_scale()) {
            let other = (1u32 - parity) * tile_scales;
            stage_scales::<S>(scales, aux, tables, &map, &mut staged, next, other, segment_1, segment_2, spec);
        }
        // Column c of the product is row c of x: lane (group, quarter) has columns 2·quarter and 2·quarter + 1.
        let (group, quarter) = (lane / 4u32, lane % 4u32);
        let partial_at = parity * tile_sums;
        #[unroll]
        for c in 0..2usize {
            let column = quarter * 2u32 + c as u32;
            if column < spec.m {
                let at = partial_at + (plane * spec.m + column) * 16u32 + group;
                partial[at as usize] = sums[c];
                partial[(at + 8u32) as usize] = sums[comptime!(c + 2)];
            }
        }
        sync_cube();
        write_tile::<S>(&partial, scales, bias, y, tile, partial_at, spec);
        parity = 1u32 - parity;
        tile += CUBE_COUNT_X;
    }
}

/// Sums the planes' shares of a tile and finishes its rows.
#[cube]
fn write_tile<S: Fragments>(
    partial: &Shared<[f32]>,
    scales: &[f32],
    bias: &[f32],
    y: &mut [f32],
    tile: u32,
    partial_at: u32,
    #[comptime] spec: GemvSpec,
) {
    let paired = comptime!(matches!(spec.epilogue, Epilogue::SiluMul | Epilogue::GeluMul));
    let n_outputs = comptime!(if paired { 8 } else { 16 });
    if UNIT_POS < comptime!(spec.m * n_outputs) {
        let column = UNIT_POS / n_outputs;
        let within = UNIT_POS % n_outputs;
        let row = tile * n_outputs + within;
        let mut sum = 0.0f32;
        let mut second = 0.0f32;
        #[unroll]
        for plane in 0..spec.planes {
            let at = partial_at + (comptime!(plane * spec.m) + column) * 16u32 + within;
            sum += partial[at as usize];
            if comptime!(paired) {
                second += partial[(at + 8u32) as usize];
            }
        }
        if comptime!(S::row_scale()) {
            sum *= scales[row as usize] * (1.0f32 / 127.0f32);
            if comptime!(paired) {
                second *= scales[(row + comptime!(spec.n_rows / 2)) as usize] * (1.0f32 / 127.0f32);
            }
        }
        if comptime!(spec.has_bias) {
            sum += bias[row as usize];
            if comptime!(paired) {
                second += bias[(row + comptime!(spec.n_rows / 2)) as usize];
            }
        }
        match comptime!(spec.epilogue) {
            Epilogue::Store => y[(column * spec.n_rows + row) as usize] = sum,
            Epilogue::Add => y[(column * spec.n_rows + row) as usize] += sum,
            Epilogue::SiluMul => {
                y[(column * comptime!(spec.n_rows / 2) + row) as usize] = sum / (1.0f32 + (-sum).exp()) * second;
            }
            Epilogue::GeluMul => {
                let inner = 0.797_884_6f32 * (sum + 0.044_715f32 * sum * sum * sum);
                y[(column * comptime!(spec.n_rows / 2) + row) as usize] =
                    0.5f32 * sum * (1.0f32 + inner.tanh()) * second;
            }
        }
    }
}
