//! Launches of the kernels that every runtime has.

use super::attention::{ATTENTION_UNITS, Scoring, attention_kernel};
use super::decode::{Affine4, Codebook4, DenseBf16, DenseF16, DenseF32, Int8};
use super::decode_attention::{MAX_GROUP, Split, combine_kernel, decode_attention_kernel};
use super::dequantize::{VECTOR_VALUES, dequantize_kernel, dequantize_vectors_kernel};
use super::linear::{CUBE_UNITS, TILE_ROWS, linear_kernel};
use super::ops::{
    AddNorm, Gate, Heads, ROW_UNITS, add_bias_kernel, add_norm_kernel, choose_kernel, embed_kernel, gate_kernel,
    nll_kernel, rope_append_kernel, soft_cap_kernel, stamp_kernel,
};
use super::{DeviceMatrix, Kind};
use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use half::{bf16, f16};

/// Element type of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Element {
    F32,
    F16,
    Bf16,
}

impl Element {
    pub fn size_bytes(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::F16 | Element::Bf16 => 2,
        }
    }
}

/// Calls `$call!(Decoder)` with the decoder of a kind.
macro_rules! with_decoder {
    ($kind:expr, $call:ident) => {
        match $kind {
            Kind::F32 => $call!(DenseF32),
            Kind::F16 => $call!(DenseF16),
            Kind::Bf16 => $call!(DenseBf16),
            Kind::Codebook4 => $call!(Codebook4),
            Kind::Affine4 => $call!(Affine4),
            Kind::Int8 => $call!(Int8),
        }
    };
}

/// Where in its buffers a product reads and writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// First row of x.
    pub x_row: usize,
    /// First column of y.
    pub y_first: usize,
    /// Width of y's rows.
    pub y_stride: usize,
}

impl Place {
    /// All of x into all of an output as wide as the matrix has rows.
    pub fn whole(matrix: &DeviceMatrix) -> Place {
        Place { x_row: 0, y_first: 0, y_stride: matrix.n_rows }
    }
}

/// Writes `y = x · Wᵀ + bias`.
///
/// # Shapes
/// `x` `[m, n_cols]`, `bias` `[n_rows]` in f32, `y` `[m, y_stride]`.
#[expect(clippy::too_many_arguments, reason = "a product's operands and sizes")]
pub fn linear(
    client: &Client,
    matrix: &DeviceMatrix,
    [x_element, y_element]: [Element; 2],
    x: &Handle,
    bias: Option<&Handle>,
    y: &Handle,
    place: Place,
    m: usize,
) {
    let plane = client.properties().hardware.plane_size_max.max(1);
    let units = CUBE_UNITS.max(plane);
    let rows_a_cube = (units / plane) as usize;
    let count = CubeCount::Static(matrix.n_rows.div_ceil(rows_a_cube) as u32, m.div_ceil(TILE_ROWS as usize) as u32, 1);
    let (n_rows, n_cols) = (matrix.n_rows, matrix.n_cols);
    macro_rules! call {
        ($decoder:ty, $x:ty, $y:ty) => {
            // SAFETY: the buffers have the lengths given, and the kernel stays inside them.
            unsafe {
                linear_kernel::launch_unchecked::<$decoder, $x, $y>(
                    client,
                    count,
                    CubeDim::new_1d(units),
                    matrix.argument(),
                    BufferArg::from_raw_parts(x.clone(), (place.x_row + m) * n_cols),
                    BufferArg::from_raw_parts(bias.unwrap_or(x).clone(), if bias.is_some() { n_rows } else { 1 }),
                    BufferArg::from_raw_parts(y.clone(), m * place.y_stride),
                    m as u32,
                    n_rows as u32,
                    place.x_row as u32,
                    place.y_first as u32,
                    place.y_stride as u32,
                    matrix.format,
                    bias.is_some(),
                )
            }
        };
    }
    macro_rules! by_element {
        ($decoder:ty) => {
            match (x_element, y_element) {
                (Element::F32, _) => call!($decoder, f32, f32),
                (Element::F16, Element::F32) => call!($decoder, f16, f32),
                (Element::F16, _) => call!($decoder, f16, f16),
                (Element::Bf16, Element::F32) => call!($decoder, bf16, f32),
                (Element::Bf16, _) => call!($decoder, bf16, bf16),
            }
        };
    }
    with_decoder!(matrix.kind, by_element);
}

/// Writes rows `first_row..first_row + n` as plain numbers.
///
/// # Shapes
/// `out` `[n, n_cols]`.
pub fn dequantize(client: &Client, matrix: &DeviceMatrix, element: Element, first_row: usize, n: usize, out: &Handle) {
    let n_values = n * matrix.n_cols;
    let units = 256;
    if matrix.n_cols.is_multiple_of(VECTOR_VALUES as usize) {
        return dequantize_vectors(client, matrix, element, first_row, n, out);
    }
    let count = cube_count(n_values.div_ceil(units));
    macro_rules! call {
        ($decoder:ty, $float:ty) => {
            // SAFETY: as above.
            unsafe {
                dequantize_kernel::launch_unchecked::<$decoder, $float>(
                    client,
                    count,
                    CubeDim::new_1d(units as u32),
                    matrix.argument(),
                    BufferArg::from_raw_parts(out.clone(), n_values),
                    first_row as u32,
                    n_values as u32,
                    matrix.format,
                )
            }
        };
    }
    macro_rules! by_element {
        ($decoder:ty) => {
            match element {
                Element::F32 => call!($decoder, f32),
                Element::F16 => call!($decoder, f16),
                Element::Bf16 => call!($decoder, bf16),
            }
        };
    }
    with_decoder!(matrix.kind, by_element);
}

fn dequantize_vectors(
    client: &Client,
    matrix: &DeviceMatrix,
    element: Element,
    first_row: usize,
    n: usize,
    out: &Handle,
) {
    let n_groups = n * matrix.n_cols / VECTOR_VALUES as usize;
    macro_rules! call {
        ($decoder:ty, $float:ty, $width:literal) => {
            // SAFETY: rows are whole groups of eight values, and the output holds all of them.
            unsafe {
                dequantize_vectors_kernel::launch_unchecked::<$decoder, $float>(
                    client,
                    cube_count(n_groups.div_ceil(256)),
                    CubeDim::new_1d(256),
                    $width,
                    matrix.argument(),
                    BufferArg::from_raw_parts(out.clone(), n * matrix.n_cols / $width),
                    first_row as u32,
                    n_groups as u32,
                    matrix.format,
                )
            }
        };
    }
    macro_rules! by_element {
        ($decoder:ty) => {
            match element {
                Element::F32 => call!($decoder, f32, 4),
                Element::F16 => call!($decoder, f16, 8),
                Element::Bf16 => call!($decoder, bf16, 8),
            }
        };
    }
    with_decoder!(matrix.kind, by_element);
}

/// Spreads cubes over two dimensions: some runtimes take no more than 65,535 in one.
pub fn cube_count(n: usize) -> CubeCount {
    let width = n.clamp(1, 32_768);
    CubeCount::Static(width as u32, n.div_ceil(width) as u32, 1)
}

/// Calls `$call!(float type)` with the type of an element.
macro_rules! with_element {
    ($element:expr, $call:ident) => {
        match $element {
            Element::F32 => $call!(f32),
            Element::F16 => $call!(f16),
            Element::Bf16 => $call!(bf16),
        }
    };
}

/// Calls `$call!(activation type, cache type)`.
macro_rules! with_elements {
    ($a:expr, $c:expr, $call:ident) => {
        match ($a, $c) {
            (Element::F32, Element::F32) => $call!(f32, f32),
            (Element::F32, Element::F16) => $call!(f32, f16),
            (Element::F32, Element::Bf16) => $call!(f32, bf16),
            (Element::F16, _) => $call!(f16, f16),
            (Element::Bf16, _) => $call!(bf16, bf16),
        }
    };
}

/// Buffer of a known number of elements.
///
/// # Safety
/// `handle` holds at least `n` elements of what the kernel reads it as.
unsafe fn buffer(handle: &Handle, n: usize) -> BufferArg {
    // SAFETY: the caller's promise.
    unsafe { BufferArg::from_raw_parts(handle.clone(), n) }
}

/// Writes embeddings of `tokens[first..first + n]` times `scale`.
///
/// # Shapes
/// `x` `[n, n_cols]` f32.
pub fn embed(
    client: &Client,
    table: &DeviceMatrix,
    tokens: &Handle,
    n_tokens: usize,
    [first, n]: [usize; 2],
    scale: f32,
    x: &Handle,
) {
    macro_rules! call {
        ($decoder:ty) => {
            // SAFETY: the buffers have the lengths given; the caller checked the tokens against the vocabulary.
            unsafe {
                embed_kernel::launch_unchecked::<$decoder>(
                    client,
                    CubeCount::Static(n as u32, 1, 1),
                    CubeDim::new_1d(ROW_UNITS),
                    table.argument(),
                    buffer(tokens, n_tokens),
                    buffer(x, n * table.n_cols),
                    first as u32,
                    scale,
                    table.format,
                )
            }
        };
    }
    with_decoder!(table.kind, call);
}

/// One residual step: `x += norm?(delta)`, then `out = norm(x) · weight`.
#[derive(Debug, Clone, Copy)]
pub struct Residual<'a> {
    /// `[n, n_cols]` f32.
    pub x: &'a Handle,
    pub delta: Option<&'a Handle>,
    /// `[n_cols]` f32: a norm on the delta before it is added.
    pub delta_norm: Option<&'a Handle>,
    /// `[n_cols]` f32 and where the normed rows go.
    pub norm: Option<(&'a Handle, &'a Handle)>,
    pub eps: f32,
}

/// Runs a residual step over `n` rows.
pub fn add_norm(client: &Client, element: Element, step: &Residual<'_>, n: usize, n_cols: usize) {
    let spec = AddNorm { add: step.delta.is_some(), norm_delta: step.delta_norm.is_some(), norm: step.norm.is_some() };
    let n_values = n * n_cols;
    let (weight, out) = step.norm.unwrap_or((step.x, step.x));
    macro_rules! call {
        ($float:ty) => {
            // SAFETY: buffers that the spec leaves unused are never touched; the others have these lengths.
            unsafe {
                add_norm_kernel::launch_unchecked::<$float>(
                    client,
                    CubeCount::Static(n as u32, 1, 1),
                    CubeDim::new_1d(ROW_UNITS),
                    buffer(step.x, n_values),
                    buffer(step.delta.unwrap_or(weight), if spec.add { n_values } else { 1 }),
                    buffer(step.delta_norm.unwrap_or(weight), n_cols),
                    buffer(weight, n_cols),
                    buffer(out, n_values),
                    n_cols as u32,
                    step.eps,
                    spec,
                )
            }
        };
    }
    with_element!(element, call);
}

/// `out = act(gate) · up`, or `act(gate)` alone.
///
/// # Shapes
/// `gate_up` `[n, 2·n_cols]`, `out` `[n, n_cols]`.
pub fn gate(
    client: &Client,
    element: Element,
    gate: Gate,
    multiply: bool,
    gate_up: &Handle,
    out: &Handle,
    [n, n_cols]: [usize; 2],
) {
    gate_columns(client, element, gate, multiply, gate_up, out, [n, n_cols], [0, n_cols]);
}

/// As [`gate`], into columns `first..first + n_cols` of an output `out_stride` wide.
#[expect(clippy::too_many_arguments, reason = "a kernel's buffers and sizes")]
pub fn gate_columns(
    client: &Client,
    element: Element,
    gate: Gate,
    multiply: bool,
    gate_up: &Handle,
    out: &Handle,
    [n, n_cols]: [usize; 2],
    [first, out_stride]: [usize; 2],
) {
    let n_values = n * n_cols;
    macro_rules! call {
        ($float:ty) => {
            // SAFETY: the buffers have the lengths given.
            unsafe {
                gate_kernel::launch_unchecked::<$float>(
                    client,
                    cube_count(n_values.div_ceil(256)),
                    CubeDim::new_1d(256),
                    buffer(gate_up, 2 * n_values),
                    buffer(out, n * out_stride),
                    n_cols as u32,
                    n_values as u32,
                    first as u32,
                    out_stride as u32,
                    gate,
                    multiply,
                )
            }
        };
    }
    with_element!(element, call);
}

/// Keys and values of one layer, and what attention to them is.
#[derive(Debug, Clone)]
pub struct LayerCache<'a> {
    pub element: Element,
    /// `[n_kv_heads, capacity, head_dim]`.
    pub keys: &'a Handle,
    pub values: &'a Handle,
    pub capacity: usize,
    /// `[capacity, rotary_dim / 2, 2]` f32: cosines and sines.
    pub rope: &'a Handle,
    /// Weights of the norms on queries and keys.
    pub qk_norm: Option<(&'a Handle, &'a Handle)>,
    pub eps: f32,
    pub heads: Heads,
    /// Keys that a query sees.
    pub window: u32,
    pub scale: f32,
    pub soft_cap: Option<f32>,
}

impl LayerCache<'_> {
    fn n_values(&self) -> usize {
        self.capacity * (self.heads.n_kv_heads * self.heads.head_dim) as usize
    }
}

/// Rotates the queries and keys of `n` tokens into `q` and the cache, and appends their values.
pub fn rope_append(
    client: &Client,
    element: Element,
    layer: &LayerCache<'_>,
    qkv: &Handle,
    q: &Handle,
    state: &Handle,
    n: usize,
) {
    let heads = layer.heads;
    let n_all = heads.n_heads + 2 * heads.n_kv_heads;
    let (q_norm, k_norm) = layer.qk_norm.unwrap_or((layer.rope, layer.rope));
    let units = (heads.head_dim / 2).next_power_of_two().clamp(32, ROW_UNITS);
    macro_rules! call {
        ($a:ty, $c:ty) => {
            // SAFETY: the buffers have the lengths given, and the caller keeps positions below the capacity.
            unsafe {
                rope_append_kernel::launch_unchecked::<$a, $c>(
                    client,
                    CubeCount::Static(n as u32, n_all, 1),
                    CubeDim::new_1d(units),
                    buffer(qkv, n * (n_all * heads.head_dim) as usize),
                    buffer(layer.rope, layer.capacity * heads.rotary_dim as usize),
                    buffer(q_norm, heads.head_dim as usize),
                    buffer(k_norm, heads.head_dim as usize),
                    buffer(q, n * (heads.n_heads * heads.head_dim) as usize),
                    buffer(layer.keys, layer.n_values()),
                    buffer(layer.values, layer.n_values()),
                    buffer(state, 1),
                    layer.capacity as u32,
                    layer.eps,
                    heads,
                )
            }
        };
    }
    with_elements!(element, layer.element, call);
}

/// Attention of `n` queries over the cache.
///
/// # Shapes
/// `q`, `out` `[n, n_heads·head_dim]`.
pub fn attention(
    client: &Client,
    element: Element,
    layer: &LayerCache<'_>,
    q: &Handle,
    out: &Handle,
    state: &Handle,
    n: usize,
) {
    let heads = layer.heads;
    let n_values = n * (heads.n_heads * heads.head_dim) as usize;
    let scoring = Scoring { soft_cap: layer.soft_cap.is_some() };
    macro_rules! call {
        ($a:ty, $c:ty) => {
            // SAFETY: as above.
            unsafe {
                attention_kernel::launch_unchecked::<$a, $c>(
                    client,
                    CubeCount::Static(n as u32, heads.n_heads, 1),
                    CubeDim::new_1d(ATTENTION_UNITS),
                    buffer(q, n_values),
                    buffer(layer.keys, layer.n_values()),
                    buffer(layer.values, layer.n_values()),
                    buffer(out, n_values),
                    buffer(state, 1),
                    layer.capacity as u32,
                    layer.window,
                    layer.scale,
                    layer.soft_cap.unwrap_or(1.0),
                    heads,
                    scoring,
                )
            }
        };
    }
    with_elements!(element, layer.element, call);
}

/// Units that look for the largest logit.
const CHOOSE_UNITS: u32 = 256;

/// Returns true where steps can be timed by the device's own clock.
pub fn has_clock(client: &Client) -> bool {
    client.name() == "cuda"
}

/// Starts a clock: its first reading is now. The caller asked [`has_clock`].
///
/// # Shapes
/// `clock` two words a reading, `n_clock` words.
pub fn stamp(client: &Client, clock: &Handle, n_clock: usize) {
    // SAFETY: the buffer has room for a reading.
    unsafe {
        stamp_kernel::launch_unchecked(client, CubeCount::Static(1, 1, 1), CubeDim::new_1d(32), buffer(clock, n_clock))
    }
}

/// Chooses the next token greedily and moves the state on; with a clock, whose buffer has room for as many readings as the state for
/// tokens, it reads that too.
pub fn choose(client: &Client, logits: &Handle, vocab: usize, state: &Handle, n_state: usize, clock: Option<&Handle>) {
    let units = if client.name() == "cuda" { 1024 } else { CHOOSE_UNITS };
    // SAFETY: the buffers have the lengths given; without a clock, none is touched.
    unsafe {
        choose_kernel::launch_unchecked(
            client,
            CubeCount::Static(1, 1, 1),
            CubeDim::new_1d(units),
            buffer(logits, vocab),
            buffer(state, n_state),
            buffer(clock.unwrap_or(logits), if clock.is_some() { 2 * n_state } else { 1 }),
            vocab as u32,
            units,
            clock.is_some(),
        )
    }
}

/// Writes each row's negative log-likelihood of its target and its first choice.
///
/// # Shapes
/// `logits` `[n, vocab]` f32; `targets`, `nll`, `choice` `[n_targets]`, rows `first..first + n` of them.
#[expect(clippy::too_many_arguments, reason = "a kernel's buffers and sizes")]
pub fn score(
    client: &Client,
    logits: &Handle,
    targets: &Handle,
    nll: &Handle,
    choice: &Handle,
    n_targets: usize,
    [first, n]: [usize; 2],
    vocab: usize,
) {
    // SAFETY: the buffers have the lengths given.
    unsafe {
        nll_kernel::launch_unchecked(
            client,
            CubeCount::Static(n as u32, 1, 1),
            CubeDim::new_1d(CHOOSE_UNITS),
            buffer(logits, n * vocab),
            buffer(targets, n_targets),
            buffer(nll, n_targets),
            buffer(choice, n_targets),
            vocab as u32,
            first as u32,
            CHOOSE_UNITS,
        )
    }
}

/// Caps logits softly, in place.
pub fn soft_cap(client: &Client, logits: &Handle, n: usize, cap: f32) {
    // SAFETY: the buffer holds `n` values.
    unsafe {
        soft_cap_kernel::launch_unchecked(
            client,
            cube_count(n.div_ceil(256)),
            CubeDim::new_1d(256),
            buffer(logits, n),
            n as u32,
            cap,
        )
    }
}

/// Adds a row to each of `n` rows.
///
/// # Shapes
/// `y` `[n, n_cols]`, `bias` `[n_cols]` f32.
pub fn add_bias(client: &Client, element: Element, y: &Handle, bias: &Handle, n: usize, n_cols: usize) {
    let n_values = n * n_cols;
    macro_rules! call {
        ($float:ty) => {
            // SAFETY: the buffers have the lengths given.
            unsafe {
                add_bias_kernel::launch_unchecked::<$float>(
                    client,
                    cube_count(n_values.div_ceil(256)),
                    CubeDim::new_1d(256),
                    buffer(y, n_values),
                    buffer(bias, n_cols),
                    n_values as u32,
                    n_cols as u32,
                )
            }
        };
    }
    with_element!(element, call);
}

/// Scratch of [`decode_attention`]: made once for a cache.
#[derive(Debug, Clone)]
pub struct DecodeScratch {
    partial: Handle,
    counters: Handle,
    split: Split,
}

impl DecodeScratch {
    /// Returns true where the plan is that of another layer too.
    pub fn fits(&self, layer: &LayerCache<'_>) -> bool {
        self.split.heads == layer.heads && layer.soft_cap.is_none()
    }

    /// Plans the split of a layer's keys, or returns nothing where the kernel does not know the layer's attention.
    pub fn new(client: &Client, layer: &LayerCache<'_>) -> Option<DecodeScratch> {
        let heads = layer.heads;
        let width = vector_width(layer.element);
        let heads_a_kv = heads.n_heads / heads.n_kv_heads;
        // Where the last cube combines, few long chunks beat many short ones: handing over costs more than keys do. Elsewhere cubes
        // are small, for the sake of devices with 16 KiB of shared memory.
        let hands_over = client.features().device_memory_scope;
        let units = if hands_over { 256 } else { 128 };
        // A plane turns the scores of a head into shares.
        let n_planes = units / client.properties().hardware.plane_size_max.max(1);
        let group = (1..=MAX_GROUP.min(n_planes)).rev().find(|group| heads_a_kv.is_multiple_of(*group))?;
        let fits = !heads.qk_norm
            && layer.soft_cap.is_none()
            && heads.rotary_dim == heads.head_dim
            && heads.head_dim.is_multiple_of(8 * width)
            && (units * width).is_multiple_of(heads.head_dim)
            && client.properties().hardware.plane_size_min >= 8;
        let chunk = match layer.capacity {
            0..=4096 if hands_over => 128,
            _ if hands_over => 256,
            0..=2048 => 64,
            2049..=16_384 => 128,
            _ => 256,
        };
        let n_splits = layer.capacity.div_ceil(chunk) as u32;
        let combines = n_splits > 1 && hands_over;
        let split = Split { heads, group, units, chunk: chunk as u32, n_splits, combines };
        let n_partial = n_splits * heads.n_heads * (heads.head_dim + 2);
        let n_cubes = heads.n_heads / group;
        fits.then(|| DecodeScratch {
            partial: client.empty(4 * n_partial as usize),
            counters: client.create_from_slice(&vec![0u8; 4 * n_cubes as usize]),
            split,
        })
    }
}

fn vector_width(element: Element) -> u32 {
    16 / element.size_bytes() as u32
}

/// Rotates, appends and attends for the one token at the state's position.
///
/// # Shapes
/// `qkv` `[(n_heads + 2·n_kv_heads)·head_dim]`, `out` `[n_heads·head_dim]`, both f32.
pub fn decode_attention(
    client: &Client,
    layer: &LayerCache<'_>,
    scratch: &DecodeScratch,
    qkv: &Handle,
    out: &Handle,
    state: &Handle,
) {
    let (heads, split) = (layer.heads, scratch.split);
    let n_cubes = heads.n_heads / split.group;
    let n_out = (heads.n_heads * heads.head_dim) as usize;
    let n_partial = (split.n_splits * heads.n_heads * (heads.head_dim + 2)) as usize;
    macro_rules! call {
        ($c:ty, $width:literal) => {
            // SAFETY: `DecodeScratch::new` planned this split, and the buffers have these lengths.
            unsafe {
                decode_attention_kernel::launch_unchecked::<$c>(
                    client,
                    CubeCount::Static(n_cubes, split.n_splits, 1),
                    CubeDim::new_1d(split.units),
                    $width,
                    buffer(qkv, ((heads.n_heads + 2 * heads.n_kv_heads) * heads.head_dim) as usize),
                    buffer(layer.rope, layer.capacity * heads.rotary_dim as usize),
                    buffer(layer.keys, layer.n_values() / $width),
                    buffer(layer.values, layer.n_values() / $width),
                    buffer(&scratch.partial, n_partial),
                    buffer(out, n_out),
                    buffer(&scratch.counters, n_cubes as usize),
                    buffer(state, 1),
                    layer.capacity as u32,
                    layer.window,
                    layer.scale,
                    split,
                )
            }
        };
    }
    match layer.element {
        Element::F32 => call!(f32, 4),
        Element::F16 => call!(f16, 8),
        Element::Bf16 => call!(bf16, 8),
    }
    if split.n_splits > 1 && !split.combines {
        // SAFETY: as above.
        unsafe {
            combine_kernel::launch_unchecked(
                client,
                CubeCount::Static(n_cubes, 1, 1),
                CubeDim::new_1d(split.units),
                buffer(&scratch.partial, n_partial),
                buffer(out, n_out),
                split,
            )
        }
    }
}
