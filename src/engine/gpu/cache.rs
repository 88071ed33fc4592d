//! Keys and values on the device.

use super::products::element;
use super::rope::RopeTable;
use super::weights::GpuBlock;
use crate::engine::footprint::cache_bytes;
use crate::engine::rope::RopeSpec;
use crate::engine::spec::{AttentionSpec, ModelSpec};
use crate::units::DType;
use cubecl::client::Client;
use cubecl::server::Handle;
use labpipe_kernels::cube::ops::Heads;
use labpipe_kernels::cube::{self, Element, LayerCache};

/// Keys and values of the tokens seen so far, and the tables that go with their positions.
pub struct GpuCache {
    /// Keys and values of each layer, `[n_kv_heads, capacity, head_dim]`.
    layers: Vec<(Handle, Handle)>,
    pub ropes: Vec<RopeTable>,
    pub element: Element,
    pub capacity: usize,
    pub n_tokens: usize,
    n_bytes: u64,
}

impl GpuCache {
    pub fn new(client: &Client, spec: &ModelSpec, compute: DType, capacity: usize) -> GpuCache {
        let n_bytes = capacity * spec.kv_width() * compute.size_bytes();
        let layers = (0..spec.n_layers).map(|_| (cube::kept(client, n_bytes), cube::kept(client, n_bytes))).collect();
        let ropes = spec.attentions.iter().map(|kind| RopeTable::new(client, rope(kind), capacity)).collect();
        let n_bytes = GpuCache::bytes_of(spec, compute, capacity);
        GpuCache { layers, ropes, element: element(compute), capacity, n_tokens: 0, n_bytes }
    }

    /// Returns the bytes that keys and values of `capacity` tokens take.
    pub fn bytes_of(spec: &ModelSpec, compute: DType, capacity: usize) -> u64 {
        cache_bytes(spec, compute, capacity)
    }

    pub fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    /// Returns every buffer of keys and values.
    pub fn handles(&self) -> impl Iterator<Item = &Handle> {
        self.layers.iter().flat_map(|(keys, values)| [keys, values])
    }

    /// Returns what the attention of one layer reads.
    pub fn layer<'a>(&'a self, spec: &ModelSpec, block: &'a GpuBlock, layer_idx: usize) -> LayerCache<'a> {
        let kind = spec.layer_attentions[layer_idx];
        let attention = &spec.attentions[kind];
        LayerCache {
            element: self.element,
            keys: &self.layers[layer_idx].0,
            values: &self.layers[layer_idx].1,
            capacity: self.capacity,
            rope: &self.ropes[kind].handle,
            qk_norm: block.qk_norm.as_ref().map(|norm| (&norm.q, &norm.k)),
            eps: spec.block.norm_eps as f32,
            heads: Heads {
                n_heads: spec.n_heads as u32,
                n_kv_heads: spec.n_kv_heads as u32,
                head_dim: spec.head_dim as u32,
                qk_norm: block.qk_norm.is_some(),
                rotary_dim: rope(attention).rotary_dim as u32,
            },
            window: attention.window.map_or(u32::MAX, |window| window as u32),
            scale: spec.block.attn_scale as f32,
            soft_cap: spec.block.attn_softcap.map(|cap| cap as f32),
        }
    }
}

fn rope(attention: &AttentionSpec) -> &RopeSpec {
    attention.rope.as_ref().expect("the engine asked `fused_path_lacks`")
}
