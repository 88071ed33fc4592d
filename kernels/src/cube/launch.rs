//! Launches of the kernels that every runtime has.

use super::decode::{Affine4, Codebook4, DenseBf16, DenseF16, DenseF32, Int8};
use super::linear::{CUBE_UNITS, TILE_ROWS, linear_kernel};
use super::ops::{
    AddNorm, Gate, ROW_UNITS, add_bias_kernel, add_norm_kernel, embed_kernel, gate_kernel, soft_cap_kernel,
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
pub(super) use with_decoder;

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
    elements: [Element; 2],
    x: &Handle,
    bias: Option<&Handle>,
    y: &Handle,
    place: Place,
    m: usize,
) {
    launch_linear(client, matrix, elements, x, bias, y, place, m, false);
}

/// Adds `x · Wᵀ` to y.
///
/// # Shapes
/// As [`linear`].
pub fn linear_add(
    client: &Client,
    matrix: &DeviceMatrix,
    elements: [Element; 2],
    [x, y]: [&Handle; 2],
    place: Place,
    m: usize,
) {
    launch_linear(client, matrix, elements, x, None, y, place, m, true);
}

#[expect(clippy::too_many_arguments, reason = "a product's operands and sizes")]
fn launch_linear(
    client: &Client,
    matrix: &DeviceMatrix,
    [x_element, y_element]: [Element; 2],
    x: &Handle,
    bias: Option<&Handle>,
    y: &Handle,
    place: Place,
    m: usize,
    adds: bool,
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
                    adds,
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
pub(super) use {with_element, with_elements};

/// Buffer of a known number of elements.
///
/// # Safety
/// `handle` holds at least `n` elements of what the kernel reads it as.
pub(super) unsafe fn buffer(handle: &Handle, n: usize) -> BufferArg {
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
