//! Launches of the tensor-core kernels: what fits them, and how wide they go.

use super::flash::{self, flash_attention_kernel};
use super::gemv::{
    Affine4Pairs, Bf16Pairs, Codebook4Pairs, Epilogue, F16Pairs, GemvSpec, Int8Pairs, MAX_ROWS, STEP, gemv_kernel,
};
use super::{DeviceMatrix, Element, Kind, LayerCache, overlap};
use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

/// RMSNorm in front of a projection.
#[derive(Debug, Clone)]
pub struct Norm<'a> {
    /// `[n_cols]` in f32.
    pub weight: &'a Handle,
    pub eps: f32,
}

/// One `y = W · x` with what is fused to it.
#[derive(Debug, Clone)]
pub struct Gemv<'a> {
    pub x: &'a Handle,
    pub y: &'a Handle,
    /// Rows of x, 1 to 8.
    pub m: usize,
    pub norm: Option<Norm<'a>>,
    pub bias: Option<&'a Handle>,
    pub epilogue: Epilogue,
}

/// How a launch is spread out; [`Tuning::of`] is what was measured to be best.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    pub planes: u32,
    pub unroll: u32,
    pub copies: u32,
    /// Cubes for each multiprocessor; tiles beyond them are taken in turn.
    pub cubes_a_processor: u32,
}

impl Tuning {
    /// Returns the settings for a matrix: wide rows are split over more planes, and tall matrices keep few cubes busy for long.
    pub fn of(matrix: &DeviceMatrix) -> Tuning {
        let is_wide = matrix.n_cols >= 6144;
        let is_tall = matrix.n_rows >= 8192;
        let (planes, unroll, cubes_a_processor) = match (matrix.kind, is_wide, is_tall) {
            (Kind::Codebook4 | Kind::Affine4, true, _) => (16, 4, 1),
            (Kind::Codebook4 | Kind::Affine4, false, _) => (8, 3, 2),
            (Kind::Int8, true, _) => (16, 4, 2),
            (Kind::Int8, false, _) => (8, 3, 3),
            (_, true, _) => (16, 4, 1),
            (_, false, true) => (8, 3, 2),
            (_, false, false) => (8, 3, 3),
        };
        let copies = if matrix.kind == Kind::Codebook4 { 32 } else { 8 };
        Tuning { planes, unroll, copies, cubes_a_processor }
    }
}

/// Bytes of shared memory that a launch takes: x, the table of pairs and the map, sums of x, two tiles' sums.
fn shared_bytes(matrix: &DeviceMatrix, m: usize) -> usize {
    let tuning = Tuning::of(matrix);
    let tables = match matrix.kind {
        Kind::Codebook4 => 256 * (tuning.copies as usize + 1),
        Kind::Affine4 => m * matrix.n_cols / STEP as usize,
        _ => 0,
    };
    2 * m * matrix.n_cols + 4 * (tables + 2 * tuning.planes as usize * 16 * m) + 64
}

/// Returns true where [`gemv`] takes this matrix on this device.
pub fn gemv_fits(client: &Client, matrix: &DeviceMatrix, m: usize, paired: bool) -> bool {
    let rows = if paired { matrix.n_rows / 2 } else { matrix.n_rows };
    let tile_rows = if paired { 8 } else { 16 };
    let block = matrix.format.block_size as usize;
    let blocks_fit = match matrix.kind {
        Kind::Codebook4 => block.is_multiple_of(STEP as usize) && matrix.n_cols.is_multiple_of(block),
        Kind::Affine4 => block.is_multiple_of(STEP as usize),
        Kind::Int8 | Kind::F16 | Kind::Bf16 => true,
        Kind::F32 => false,
    };
    client.name() == "cuda"
        && blocks_fit
        && (1..=MAX_ROWS as usize).contains(&m)
        && matrix.n_cols.is_multiple_of(STEP as usize)
        && rows.is_multiple_of(tile_rows)
        && shared_bytes(matrix, m) <= client.properties().hardware.max_shared_memory_size
}

/// Writes `y = epilogue(W · norm(x) + bias)`; the caller has asked [`gemv_fits`].
///
/// # Shapes
/// As [`gemv_kernel`].
pub fn gemv(client: &Client, matrix: &DeviceMatrix, call: &Gemv<'_>, tuning: Tuning) {
    let paired = matches!(call.epilogue, Epilogue::SiluMul | Epilogue::GeluMul);
    let n_tiles = (matrix.n_rows / 16) as u32;
    let processors = client.properties().hardware.num_streaming_multiprocessors.unwrap_or(64);
    let count = CubeCount::Static(n_tiles.min(processors * tuning.cubes_a_processor), 1, 1);
    let four_bit = matches!(matrix.kind, Kind::Codebook4 | Kind::Affine4);
    let slots = if four_bit && call.m == 1 && matrix.n_cols.is_multiple_of(2 * STEP as usize) { 2 } else { 1 };
    let plane_steps = (matrix.n_cols as u32 / (STEP * slots)).div_ceil(tuning.planes);
    let unroll = (1..=tuning.unroll).rev().find(|unroll| plane_steps % unroll == 0).unwrap_or(1);
    let spec = GemvSpec {
        n_rows: matrix.n_rows as u32,
        n_cols: matrix.n_cols as u32,
        m: call.m as u32,
        block_size: matrix.format.block_size.min(matrix.n_cols as u32),
        nested: matrix.format.nested,
        norm: call.norm.is_some(),
        has_bias: call.bias.is_some(),
        epilogue: call.epilogue,
        planes: tuning.planes,
        unroll,
        copies: tuning.copies,
        slots,
        overlaps: overlap::is_known(client),
    };
    let [n_codes, n_scales, n_aux, n_tables] = matrix.lens;
    let n_outputs = call.m * if paired { matrix.n_rows / 2 } else { matrix.n_rows };
    let norm_weight = call.norm.as_ref().map_or(call.x, |norm| norm.weight);
    let eps = call.norm.as_ref().map_or(0.0, |norm| norm.eps);
    macro_rules! launch {
        ($pairs:ty, $width:literal) => {
            // SAFETY: `gemv_fits` was asked, so rows and columns fill whole tiles and steps, and the buffers have these lengths.
            unsafe {
                gemv_kernel::launch_unchecked::<$pairs>(
                    client,
                    count,
                    CubeDim::new_1d(tuning.planes * 32),
                    $width,
                    BufferArg::from_raw_parts(matrix.codes.clone(), n_codes / $width),
                    BufferArg::from_raw_parts(matrix.scales.clone(), n_scales),
                    BufferArg::from_raw_parts(matrix.aux.clone(), n_aux),
                    BufferArg::from_raw_parts(matrix.tables.clone(), n_tables),
                    BufferArg::from_raw_parts(call.x.clone(), call.m * matrix.n_cols / 4),
                    BufferArg::from_raw_parts(norm_weight.clone(), matrix.n_cols / 4),
                    BufferArg::from_raw_parts(call.bias.unwrap_or(call.x).clone(), matrix.n_rows),
                    BufferArg::from_raw_parts(call.y.clone(), n_outputs),
                    n_tiles,
                    eps,
                    matrix.segments[0],
                    matrix.segments[1],
                    spec,
                )
            }
        };
    }
    match matrix.kind {
        Kind::Codebook4 if slots == 2 => launch!(Codebook4Pairs, 4),
        Kind::Codebook4 => launch!(Codebook4Pairs, 2),
        Kind::Affine4 if slots == 2 => launch!(Affine4Pairs, 4),
        Kind::Affine4 => launch!(Affine4Pairs, 2),
        Kind::Int8 => launch!(Int8Pairs, 4),
        Kind::F16 => launch!(F16Pairs, 4),
        Kind::Bf16 => launch!(Bf16Pairs, 4),
        Kind::F32 => unreachable!("gemv_fits refuses f32"),
    }
}

/// Returns true where [`flash_attention`] knows a layer's attention.
pub fn flash_fits(client: &Client, element: Element, layer: &LayerCache<'_>) -> bool {
    client.name() == "cuda"
        && element != Element::F32
        && layer.element == element
        && layer.soft_cap.is_none()
        && matches!(layer.heads.head_dim, 64 | 128)
}

/// Attention of `n` queries over the cache, on tensor cores; the caller has asked [`flash_fits`].
///
/// # Shapes
/// `q`, `out` `[n, n_heads·head_dim]`.
pub fn flash_attention(
    client: &Client,
    element: Element,
    layer: &LayerCache<'_>,
    q: &Handle,
    out: &Handle,
    state: &Handle,
    n: usize,
) {
    let heads = layer.heads;
    let n_words = n * (heads.n_heads * heads.head_dim / 2) as usize;
    let n_vectors = layer.capacity * (heads.n_kv_heads * heads.head_dim / 8) as usize;
    macro_rules! launch {
        ($float:ty) => {
            // SAFETY: `flash_fits` was asked, and the buffers have these lengths.
            unsafe {
                flash_attention_kernel::launch_unchecked::<$float>(
                    client,
                    CubeCount::Static(n.div_ceil(flash::TILE as usize) as u32, heads.n_heads, 1),
                    CubeDim::new_1d(flash::UNITS),
                    BufferArg::from_raw_parts(q.clone(), n_words),
                    BufferArg::from_raw_parts(layer.keys.clone(), n_vectors),
                    BufferArg::from_raw_parts(layer.values.clone(), n_vectors),
                    BufferArg::from_raw_parts(out.clone(), n_words),
                    BufferArg::from_raw_parts(state.clone(), 1),
                    n as u32,
                    layer.capacity as u32,
                    layer.window.min(1 << 30),
                    layer.scale * std::f32::consts::LOG2_E,
                    heads,
                    element == Element::Bf16,
                )
            }
        };
    }
    match element {
        Element::F16 => launch!(half::f16),
        Element::Bf16 => launch!(half::bf16),
        Element::F32 => unreachable!("flash_fits refuses f32"),
    }
}
