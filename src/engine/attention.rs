//! Rotary embedding and causal attention over grouped heads, a chunk of queries at a time.

use super::kv_cache::float_dtype;
use super::rope::RopeSpec;
use super::spec::{AttentionSpec, ModelSpec};
use crate::units::DType;
use burn::tensor::{Device, Int, Tensor, TensorData, activation};
use labpipe_kernels::burn_ext::exact_matmul;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
use labpipe_kernels::burn_ext::row_ops::Attention;

/// Queries handled at once: bounds the scores to n_heads · 128 · n_keys values.
pub const QUERY_CHUNK: usize = 128;

/// What all layers of one kind share in one pass: rotary tables of its positions and masks of its query chunks.
pub struct AttentionPlan {
    /// `None` where queries and keys are not rotated.
    rotation: Option<Rotation>,
    chunks: Vec<QueryChunk>,
    /// Where the pass's one token belongs, where only the device knows it.
    position: Option<Tensor<1, Int>>,
    /// Position of the first token, `[1]`.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    first_position: Tensor<1, Int>,
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    window: Option<usize>,
}

/// Cosines and sines of a pass's positions.
struct Rotation {
    cos: Tensor<3>, // [n, 1, rotary_dim]
    sin: Tensor<3>, // [n, 1, rotary_dim], negated in its first half
}

/// What layers of one kind need to run a token whose position is a tensor: rotary tables of every position.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub struct StepTables {
    /// `None` where queries and keys are not rotated; else of `capacity` positions.
    rotation: Option<Rotation>,
    window: Option<usize>,
}

#[cfg(any(feature = "cuda", feature = "wgpu"))]
impl StepTables {
    /// Prepares steps up to `capacity` tokens.
    pub fn new(spec: &AttentionSpec, capacity: usize, device: &Device) -> StepTables {
        let rotation = spec.rope.as_ref().map(|rope| Rotation::new(rope, 0, capacity, device));
        StepTables { rotation, window: spec.window }
    }
}

struct QueryChunk {
    first: usize,
    n: usize,
    /// First key that its first query sees.
    first_key: usize,
    /// End of the keys that its last query sees.
    end_key: usize,
    mask: Option<Tensor<4>>, // [1, 1, n, end_key - first_key], 0 or −∞; none for a single query
}

impl AttentionPlan {
    /// Prepares a pass of `n` tokens after `n_past` cached ones.
    pub fn new(spec: &AttentionSpec, n_past: usize, n: usize, device: &Device) -> AttentionPlan {
        let chunk = |first| QueryChunk::new(n_past, first, n, spec.window, device);
        let chunks = (0..n).step_by(QUERY_CHUNK).map(chunk).collect();
        let rotation = spec.rope.as_ref().map(|rope| Rotation::new(rope, n_past, n, device));
        AttentionPlan {
            rotation,
            chunks,
            position: None,
            #[cfg(any(feature = "cuda", feature = "wgpu"))]
            first_position: Tensor::from_data(TensorData::new(vec![n_past as i32], [1]), device),
            #[cfg(any(feature = "cuda", feature = "wgpu"))]
            window: spec.window,
        }
    }

    /// Prepares a pass of one token at `position`, `[1]`, over a whole cache: nothing of it depends on the host, so that it can be
    /// recorded and replayed.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    pub fn of_step(tables: &StepTables, position: &Tensor<1, Int>) -> AttentionPlan {
        let row = |table: &Tensor<3>| table.clone().select(0, position.clone());
        let rotation = tables.rotation.as_ref();
        AttentionPlan {
            rotation: rotation.map(|rotation| Rotation { cos: row(&rotation.cos), sin: row(&rotation.sin) }),
            chunks: Vec::new(),
            position: Some(position.clone()),
            first_position: position.clone(),
            window: tables.window,
        }
    }

    /// Returns the position of the first token, `[1]`.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    pub fn first_position(&self) -> Tensor<1, Int> {
        self.first_position.clone()
    }

    /// Returns cosines and sines of the pass's positions, each `[n, 1, rotary_dim]`; `None` where nothing is rotated.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    pub fn tables(&self) -> Option<[Tensor<3>; 2]> {
        self.rotation.as_ref().map(|rotation| [rotation.cos.clone(), rotation.sin.clone()])
    }

    /// Returns what the kernel for attention needs to know.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    pub fn kernel(&self, spec: &ModelSpec) -> Attention {
        Attention {
            n_heads: spec.n_heads,
            n_kv_heads: spec.n_kv_heads,
            head_dim: spec.head_dim,
            scale: spec.block.attn_scale as f32,
            soft_cap: spec.block.attn_softcap.map(|cap| cap as f32),
            window: self.window,
        }
    }

    /// Returns where the pass's one token belongs, where only the device knows it.
    pub fn position(&self) -> Option<&Tensor<1, Int>> {
        self.position.as_ref()
    }
}

impl Rotation {
    fn new(rope: &RopeSpec, n_past: usize, n: usize, device: &Device) -> Rotation {
        let frequencies = rope.inverse_frequencies(n_past + n);
        let factor = rope.attention_factor() as f32;
        let half = frequencies.len();
        let (mut cos, mut sin) = (vec![0.0f32; n * 2 * half], vec![0.0f32; n * 2 * half]);
        for i in 0..n {
            for (j, frequency) in frequencies.iter().enumerate() {
                // The angle in f32, as the reference implementation takes it.
                let angle = (n_past + i) as f32 * *frequency as f32;
                let (s, c) = (factor * angle.sin(), factor * angle.cos());
                let at = i * 2 * half + j;
                (cos[at], cos[at + half]) = (c, c);
                (sin[at], sin[at + half]) = (-s, s);
            }
        }
        let table = |values| Tensor::<3>::from_data(TensorData::new(values, [n, 1, 2 * half]), device);
        Rotation { cos: table(cos), sin: table(sin) }
    }
}

impl QueryChunk {
    fn new(n_past: usize, first: usize, n_total: usize, window: Option<usize>, device: &Device) -> QueryChunk {
        let n = QUERY_CHUNK.min(n_total - first);
        let first_key_of = |query: usize| window.map_or(0, |window| (query + 1).saturating_sub(window));
        let (first_query, end_key) = (n_past + first, n_past + first + n);
        let first_key = first_key_of(first_query);
        let n_keys = end_key - first_key;
        let mask = (n > 1).then(|| {
            let mut values = vec![0.0f32; n * n_keys];
            for (i, row) in values.chunks_exact_mut(n_keys).enumerate() {
                let query = first_query + i;
                row[..first_key_of(query) - first_key].fill(f32::NEG_INFINITY);
                row[query + 1 - first_key..].fill(f32::NEG_INFINITY);
            }
            Tensor::from_data(TensorData::new(values, [1, 1, n, n_keys]), device)
        });
        QueryChunk { first, n, first_key, end_key, mask }
    }
}

/// Rotates each head of `x` by its position (rotate-half form); values beyond `rotary_dim` stay as they are, and so does all of `x`
/// in a layer without rotary embedding.
///
/// # Shapes
/// `x` and result `[n, n_heads · head_dim]`.
pub fn rotate(x: Tensor<2>, n_heads: usize, plan: &AttentionPlan) -> Tensor<2> {
    let Some(Rotation { cos, sin }) = &plan.rotation else { return x };
    let [n, width] = x.dims();
    let head_dim = width / n_heads;
    let rotary_dim = cos.dims()[2];
    let dtype = x.dtype();
    let x = x.cast(float_dtype(DType::F32)).reshape([n, n_heads, head_dim]);
    let part = |from: usize, to: usize| x.clone().slice([0..n, 0..n_heads, from..to]);
    let swapped = Tensor::cat(vec![part(rotary_dim / 2, rotary_dim), part(0, rotary_dim / 2)], 2);
    let rotated = part(0, rotary_dim).mul(cos.clone()).add(swapped.mul(sin.clone()));
    let whole =
        if rotary_dim == head_dim { rotated } else { Tensor::cat(vec![rotated, part(rotary_dim, head_dim)], 2) };
    whole.reshape([n, width]).cast(dtype)
}

/// Returns causal attention of the pass's queries over all keys, in f32. Where `is_exact` nothing is rounded on the way; otherwise
/// tensor cores may round what they multiply to ten bits (TF32), as values of f16 are anyway.
///
/// # Shapes
/// `q` `[n, n_heads · head_dim]`; `k`, `v` `[n_keys, n_kv_heads · head_dim]`; result like `q`.
pub fn attend(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    spec: &ModelSpec,
    plan: &AttentionPlan,
    is_exact: bool,
) -> Tensor<2> {
    let matmul = |a: Tensor<3>, b: Tensor<3>| if is_exact { exact_matmul(a, b) } else { a.matmul(b) };
    let f32_type = float_dtype(DType::F32);
    let (kv, head_dim) = (spec.n_kv_heads, spec.head_dim);
    let group = spec.n_heads / kv;
    let n_keys = k.dims()[0];
    // [kv, head_dim, n_keys] and [kv, n_keys, head_dim], strided views: gemm reads them as they lie.
    let k = k.cast(f32_type).reshape([n_keys, kv, head_dim]).permute([1, 2, 0]);
    let v = v.cast(f32_type).reshape([n_keys, kv, head_dim]).permute([1, 0, 2]);
    let q = q.cast(f32_type).mul_scalar(spec.block.attn_scale);
    let mut chunks: Vec<Tensor<2>> = Vec::with_capacity(plan.chunks.len());
    for chunk in &plan.chunks {
        let (n, keys) = (chunk.n, chunk.first_key..chunk.end_key);
        let q = q.clone().slice([chunk.first..chunk.first + n, 0..spec.n_heads * head_dim]);
        // Queries of one group share a key head: they go through one product as if they were more tokens.
        let q = q.reshape([n, kv, group, head_dim]).permute([1, 2, 0, 3]).reshape([kv, group * n, head_dim]);
        let scores = matmul(q, k.clone().slice([0..kv, 0..head_dim, keys.clone()]));
        let scores = match spec.block.attn_softcap {
            None => scores,
            Some(cap) => softcap(scores, cap),
        };
        let scores = match &chunk.mask {
            None => scores,
            Some(mask) => {
                let scores = scores.reshape([kv, group, n, keys.len()]).add(mask.clone());
                scores.reshape([kv, group * n, keys.len()])
            }
        };
        let out = matmul(activation::softmax(scores, 2), v.clone().slice([0..kv, keys, 0..head_dim]));
        let out = out.reshape([kv, group, n, head_dim]).permute([2, 0, 1, 3]);
        chunks.push(out.reshape([n, spec.n_heads * head_dim]));
    }
    if chunks.len() == 1 { chunks.remove(0) } else { Tensor::cat(chunks, 0) }
}

/// Returns cap · tanh(x / cap).
pub fn softcap<const D: usize>(x: Tensor<D>, cap: f64) -> Tensor<D> {
    x.div_scalar(cap).tanh().mul_scalar(cap)
}
