//! Launches of what runs on every runtime around a layer's cache: rotation and appending, attention of many queries and of one token.

use super::attention::{ATTENTION_UNITS, Scoring, attention_kernel};
use super::decode_attention::{MAX_GROUP, Split, combine_kernel, decode_attention_kernel};
use super::launch::{Element, buffer, with_elements};
use super::ops::{Heads, ROW_UNITS, rope_append_kernel};
use super::overlap;
use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use half::{bf16, f16};

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
        let overlaps = overlap::is_known(client);
        let split = Split { heads, group, units, chunk: chunk as u32, n_splits, combines, overlaps };
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
