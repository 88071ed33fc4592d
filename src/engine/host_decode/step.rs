//! One token's step: from its id to the logits behind it.

use super::Unsupported;
use super::team::{Leader, Team};
use super::weights::{HostBlock, HostWeights, Projection};
use crate::engine::forward::Executor;
use crate::engine::kv_cache::HostLayer;
use crate::engine::rope::RopeSpec;
use crate::engine::spec::{AttentionSpec, ModelSpec};
use crate::inference::InferenceError;
use labpipe_kernels::simd::{self, Level};
use labpipe_kernels::token::{HeadCache, attend, gate_times_up, merge, part_len, rms_norm};

/// Keys that one chunk of attention handles.
const PART_KEYS: usize = 128;

/// Multiply-adds of a product that are worth a chunk: handing it out costs about a hundredth of them.
const CHUNK_MACS: usize = 1 << 16;

/// Rows of the up projection that are on the stack at once.
const UP_ROWS: usize = 256;

/// Decodes one model.
pub struct HostDecoder {
    weights: HostWeights,
    /// One for each kind of attention; `None` where it does not rotate.
    ropes: Vec<Option<Rope>>,
    buffers: Buffers,
    level: Level,
}

/// Activations of a step.
struct Buffers {
    x: Vec<f32>,       // [hidden], the residual stream
    normed: Vec<f32>,  // [hidden]
    qkv: Vec<f32>,     // [q_width + 2 · kv_width]
    attn: Vec<f32>,    // [q_width]
    delta: Vec<f32>,   // [hidden]
    product: Vec<f32>, // [ffn]
    logits: Vec<f32>,  // [vocab]
    /// What attention over each part of each head's keys leaves; grows with the context.
    parts: Vec<f32>,
}

/// Cosines and sines of one position.
struct Rope {
    frequencies: Vec<f64>, // [rotary_dim / 2]
    cos: Vec<f32>,         // [rotary_dim / 2]
    sin: Vec<f32>,         // [rotary_dim / 2]
}

impl Rope {
    fn new(spec: &RopeSpec) -> Rope {
        let frequencies = spec.inverse_frequencies(1);
        let zeros = vec![0.0; frequencies.len()];
        Rope { frequencies, cos: zeros.clone(), sin: zeros }
    }

    fn set(&mut self, spec: &RopeSpec, position: usize) {
        if spec.depends_on_length() {
            self.frequencies = spec.inverse_frequencies(position + 1);
        }
        let factor = spec.attention_factor() as f32;
        for ((frequency, cos), sin) in self.frequencies.iter().zip(&mut self.cos).zip(&mut self.sin) {
            // The angle in f32, as the reference implementation takes it.
            let angle = position as f32 * *frequency as f32;
            (*sin, *cos) = (factor * angle.sin(), factor * angle.cos());
        }
    }

    /// Rotates a head in place; values beyond the rotary dimensions stay.
    fn rotate(&self, head: &mut [f32]) {
        let (low, high) = head[..2 * self.cos.len()].split_at_mut(self.cos.len());
        for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(&self.cos).zip(&self.sin) {
            (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
        }
    }
}

impl HostDecoder {
    /// Prepares what steps need, or returns why they can't compute this model.
    ///
    /// # Errors
    /// Where a tensor can't be read.
    pub fn new(executor: &Executor) -> Result<Result<HostDecoder, Unsupported>, InferenceError> {
        let weights = match HostWeights::new(executor)? {
            Ok(weights) => weights,
            Err(reason) => return Ok(Err(reason)),
        };
        let spec = &executor.spec;
        let zeros = |n: usize| vec![0.0f32; n];
        let buffers = Buffers {
            x: zeros(spec.hidden_size),
            normed: zeros(spec.hidden_size),
            qkv: zeros(spec.q_width() + 2 * spec.kv_width()),
            attn: zeros(spec.q_width()),
            delta: zeros(spec.hidden_size),
            product: zeros(spec.ffn_size),
            logits: zeros(spec.vocab_size),
            parts: Vec::new(),
        };
        let ropes = spec.attentions.iter().map(|attention| attention.rope.as_ref().map(Rope::new)).collect();
        Ok(Ok(HostDecoder { weights, ropes, buffers, level: simd::level() }))
    }

    /// Runs `token` at position `n_past`, appends its keys and values to `layers` and returns the logits behind it, `[vocab]`.
    ///
    /// `layers` have room for the position.
    pub fn step(&mut self, spec: &ModelSpec, layers: &mut [HostLayer], n_past: usize, token: u32) -> &[f32] {
        Team::lead(|leader| self.run(leader, spec, layers, n_past, token));
        &self.buffers.logits
    }

    fn run(
        &mut self,
        leader: &mut Leader<'_, '_>,
        spec: &ModelSpec,
        layers: &mut [HostLayer],
        n_past: usize,
        token: u32,
    ) {
        for (rope, attention) in self.ropes.iter_mut().zip(&spec.attentions) {
            if let (Some(rope), Some(spec)) = (rope, &attention.rope) {
                rope.set(spec, n_past);
            }
        }
        let HostDecoder { weights, ropes, buffers, level } = self;
        weights.embedding.unpack_rows(token as usize, &mut buffers.x);
        let scale = spec.embedding_scale as f32;
        buffers.x.iter_mut().for_each(|x| *x *= scale);
        let mut step = Step { leader, spec, weights, buffers, level: *level, n_past };
        for (layer_idx, (block, layer)) in weights.blocks.iter().zip(layers).enumerate() {
            let rope = ropes[spec.layer_attentions[layer_idx]].as_ref();
            step.attention(block, spec.attention(layer_idx), rope, layer);
            step.mlp(block);
        }
        step.logits();
    }
}

struct Step<'a, 'b, 'team> {
    leader: &'a mut Leader<'b, 'team>,
    spec: &'a ModelSpec,
    weights: &'a HostWeights,
    buffers: &'a mut Buffers,
    level: Level,
    /// Tokens before this one: its position.
    n_past: usize,
}

impl Step<'_, '_, '_> {
    fn attention(&mut self, block: &HostBlock, attention: &AttentionSpec, rope: Option<&Rope>, layer: &mut HostLayer) {
        self.norm(block.attn_norm.as_deref());
        let Buffers { normed, qkv, .. } = &mut *self.buffers;
        project(self.leader, &block.qkv, normed, qkv);
        self.rotate_and_append(block, rope, layer);
        self.attend(attention, layer);
        let Buffers { attn, delta, .. } = &mut *self.buffers;
        project(self.leader, &block.o, attn, delta);
        self.add(block.attn_out_norm.as_deref());
    }

    fn mlp(&mut self, block: &HostBlock) {
        self.norm(block.mlp_norm.as_deref());
        let Buffers { normed, product, delta, .. } = &mut *self.buffers;
        let (level, kind, gate_up) = (self.level, self.weights.gate, &block.gate_up);
        let ffn = self.spec.ffn_size;
        let chunk = chunk_rows(ffn, 2 * gate_up.n_cols());
        self.leader.fill(product, chunk, &|first, product| {
            let mut up = [0.0f32; UP_ROWS];
            for (part_idx, product) in product.chunks_mut(UP_ROWS).enumerate() {
                let (row, up) = (first + part_idx * UP_ROWS, &mut up[..product.len()]);
                gate_up.rows(row, normed, product);
                gate_up.rows(ffn + row, normed, up);
                gate_times_up(level, kind, product, up);
            }
        });
        project(self.leader, &block.down, product, delta);
        self.add(block.mlp_out_norm.as_deref());
    }

    fn logits(&mut self) {
        self.norm(Some(&self.weights.final_norm));
        let Buffers { normed, logits, .. } = &mut *self.buffers;
        let (head, cap) = (&self.weights.lm_head, self.spec.logit_softcap.map(|cap| cap as f32));
        self.leader.fill(logits, chunk_rows(head.n_rows(), head.n_cols()), &|first, logits| {
            head.rows(first, normed, logits);
            if let Some(cap) = cap {
                logits.iter_mut().for_each(|logit| *logit = cap * (*logit / cap).tanh());
            }
        });
    }

    /// Copies the residual stream into a buffer of its own, and normalizes it there where the model has a norm.
    fn norm(&mut self, weight: Option<&[f32]>) {
        let Buffers { x, normed, .. } = &mut *self.buffers;
        normed.copy_from_slice(x);
        if let Some(weight) = weight {
            rms_norm(self.level, weight, self.spec.block.norm_eps as f32, normed);
        }
    }

    /// Adds what a half of the block computed to the residual stream, through a norm of its own where the model has one.
    fn add(&mut self, out_norm: Option<&[f32]>) {
        let Buffers { x, delta, .. } = &mut *self.buffers;
        if let Some(weight) = out_norm {
            rms_norm(self.level, weight, self.spec.block.norm_eps as f32, delta);
        }
        x.iter_mut().zip(&*delta).for_each(|(x, delta)| *x += delta);
    }

    /// Normalizes and rotates queries and keys where the model does, scales queries, and caches keys and values.
    fn rotate_and_append(&mut self, block: &HostBlock, rope: Option<&Rope>, layer: &mut HostLayer) {
        let (spec, level, eps) = (self.spec, self.level, self.spec.block.norm_eps as f32);
        let (q, kv) = self.buffers.qkv.split_at_mut(spec.q_width());
        let (k, v) = kv.split_at_mut(spec.kv_width());
        for (values, weight) in [(&mut *q, &block.q_norm), (&mut *k, &block.k_norm)] {
            if let Some(weight) = weight {
                // A head at a time, or all of them.
                values.chunks_exact_mut(weight.len()).for_each(|values| rms_norm(level, weight, eps, values));
            }
            if let Some(rope) = rope {
                values.chunks_exact_mut(spec.head_dim).for_each(|head| rope.rotate(head));
            }
        }
        let scale = spec.block.attn_scale as f32;
        q.iter_mut().for_each(|q| *q *= scale);
        let at = self.n_past * spec.kv_width();
        layer.keys[at..at + k.len()].copy_from_slice(k);
        layer.values[at..at + v.len()].copy_from_slice(v);
    }

    /// Attends to all cached keys in the window: each chunk takes some keys of one head, for all queries that share them.
    fn attend(&mut self, attention: &AttentionSpec, layer: &HostLayer) {
        let (spec, level) = (self.spec, self.level);
        let (head_dim, stride, end) = (spec.head_dim, spec.kv_width(), self.n_past + 1);
        let group = spec.n_heads / spec.n_kv_heads;
        let first_key = attention.window.map_or(0, |window| end.saturating_sub(window));
        let n_parts = (end - first_key).div_ceil(PART_KEYS);
        let part_len = part_len(group, head_dim, PART_KEYS);
        let cap = spec.block.attn_softcap.map(|cap| cap as f32);
        let Buffers { qkv, attn, parts, .. } = &mut *self.buffers;
        let n_values = spec.n_kv_heads * n_parts * part_len;
        parts.resize(n_values.max(parts.len()), 0.0);
        let parts = &mut parts[..n_values];
        let is_little = 2 * spec.q_width() * (end - first_key) < CHUNK_MACS;
        let chunk_len = if is_little { n_values } else { part_len };
        self.leader.fill(parts, chunk_len, &|first, parts| {
            for (i, part) in parts.chunks_exact_mut(part_len).enumerate() {
                let part_idx = first / part_len + i;
                let (head, key) = (part_idx / n_parts, first_key + part_idx % n_parts * PART_KEYS);
                let at = key * stride + head * head_dim;
                let (keys, values) = (&layer.keys[at..], &layer.values[at..]);
                let cache = HeadCache { keys, values, stride, n_keys: PART_KEYS.min(end - key) };
                attend(level, group, &qkv[head * group * head_dim..][..group * head_dim], cache, cap, part);
            }
        });
        for (parts, out) in parts.chunks_exact(n_parts * part_len).zip(attn.chunks_exact_mut(group * head_dim)) {
            merge(group, parts, part_len, out);
        }
    }
}

/// Writes a projection of `x`, its rows split over the team.
fn project(leader: &mut Leader<'_, '_>, projection: &Projection, x: &[f32], out: &mut [f32]) {
    let chunk = chunk_rows(projection.n_rows(), projection.n_cols());
    leader.fill(out, chunk, &|first, out| projection.rows(first, x, out));
}

/// Returns how many of a product's rows a chunk takes: as many chunks for each thread, and few where there is little to do.
fn chunk_rows(n_rows: usize, n_cols: usize) -> usize {
    let n_threads = rayon::current_num_threads();
    let n_chunks = (n_rows * n_cols / CHUNK_MACS).next_multiple_of(n_threads).clamp(1, 16 * n_threads);
    // Kernels take four rows at a time.
    n_rows.div_ceil(n_chunks).next_multiple_of(4)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::BurnEngine;
    use crate::engine::kv_cache::KvCache;
    use crate::engine::spec::Activation;
    use crate::engine::tap::Tap;
    use crate::engine::weights::{WeightReader, compute_dtype};
    use crate::event::NullProgress;
    use crate::inference::{ModelRecipe, ModelSource};
    use crate::units::DType;
    use burn::tensor::Device;
    use std::path::Path;

    fn executor(case: &str, compute_dtype_asked: Option<DType>, config: Option<&str>) -> Executor {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families").join(case);
        let quantization = config.map(|text| crate::quantization::parse(text, "test", "test").expect("a config"));
        let source = ModelSource::Path(folder);
        let recipe = ModelRecipe { source, dtype: None, compute_dtype: compute_dtype_asked, quantization };
        let (spec, checkpoint) = BurnEngine::cpu().prepare(&recipe).expect("a model");
        let device = Device::flex();
        let reader = WeightReader { checkpoint: &checkpoint, spec: &spec, recipe: &recipe, device: &device };
        let weights = reader.read_all(&mut crate::engine::placing::OnHost, &NullProgress).expect("weights");
        Executor { spec, weights, device, compute: compute_dtype(&recipe) }
    }

    fn decoder(executor: &Executor) -> Result<HostDecoder, Unsupported> {
        HostDecoder::new(executor).expect("readable tensors")
    }

    /// Runs tokens through burn and returns the last one's logits.
    fn through_burn(executor: &Executor, cache: &mut KvCache, tokens: &[u32]) -> Vec<f32> {
        let hidden = executor.hidden_states(tokens, Some(cache), &mut Tap::closed()).expect("a pass");
        let [n, width] = hidden.dims();
        crate::engine::score::values(executor.logits(hidden.slice([n - 1..n, 0..width])).expect("logits"))
            .expect("logits")
    }

    /// Decodes after a prefill of `n_prompt` tokens both ways; returns the largest difference of any logit.
    fn largest_difference(executor: &Executor, n_prompt: usize, n_gen: usize) -> f32 {
        let spec = &executor.spec;
        let cache = || KvCache::new(spec.n_layers, n_prompt + n_gen, spec.kv_width(), DType::F32, &executor.device);
        let (mut burn_cache, mut host_cache) = (cache(), cache());
        let token = |i: usize| (i * 7 + 3) as u32 % spec.vocab_size as u32;
        let prompt: Vec<u32> = (0..n_prompt).map(token).collect();
        through_burn(executor, &mut burn_cache, &prompt);
        through_burn(executor, &mut host_cache, &prompt);
        let mut decoder = decoder(executor).expect("a model that it takes");
        let mut largest = 0.0f32;
        for position in n_prompt..n_prompt + n_gen {
            let expected = through_burn(executor, &mut burn_cache, &[token(position)]);
            let layers = host_cache.host_layers().expect("plain values");
            let found = decoder.step(spec, layers, position, token(position));
            assert_eq!(found.len(), expected.len());
            largest = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(largest, f32::max);
        }
        largest
    }

    #[test]
    fn every_family_decodes_as_it_does_through_burn() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families");
        let mut n_cases = 0;
        for entry in std::fs::read_dir(fixtures).expect("the fixtures").map(|entry| entry.expect("an entry")) {
            if !entry.path().is_dir() {
                continue;
            }
            let case = entry.file_name().to_string_lossy().into_owned();
            let executor = executor(&case, Some(DType::F32), None);
            // From a few keys to several parts of them, beyond sliding windows.
            for (n_prompt, n_gen) in [(1, 4), (40, 4), (140, 4)] {
                let difference = largest_difference(&executor, n_prompt, n_gen);
                println!("{case} after {n_prompt}: {difference:.1e}");
                assert!(difference < 2e-5, "{case} after {n_prompt}: {difference}");
            }
            n_cases += 1;
        }
        assert!(n_cases >= 16, "{n_cases} fixtures");
    }

    #[test]
    fn quantized_models_decode_as_they_do_through_burn() {
        for config in ["scheme: nf4\n", "scheme: int8\n", "scheme: int4\n", "scheme: mxfp4\n"] {
            let difference = largest_difference(&executor("llama", Some(DType::F32), Some(config)), 20, 4);
            assert!(difference < 2e-5, "{config}: {difference}");
        }
    }

    #[test]
    fn what_it_does_not_compute_is_named() {
        assert_eq!(decoder(&executor("llama", Some(DType::F16), None)).err(), Some(Unsupported::ComputeDtype));
        let llm_int8 = "scheme: int8\noutlier_threshold: 6.0\n";
        let found = decoder(&executor("llama", Some(DType::F32), Some(llm_int8))).err();
        assert_eq!(found, Some(Unsupported::QuantizedActivations));
        let mut exact_gelu = executor("llama", Some(DType::F32), None);
        exact_gelu.spec.block.activation = Activation::Gelu;
        assert_eq!(decoder(&exact_gelu).err(), Some(Unsupported::ExactGelu));
    }

    #[test]
    fn the_cache_moves_to_plain_values_and_back_without_a_copy() {
        let executor = executor("llama", Some(DType::F32), None);
        let spec = &executor.spec;
        let mut cache = KvCache::new(spec.n_layers, 64, spec.kv_width(), DType::F32, &executor.device);
        let n_bytes = cache.n_bytes();
        let first = through_burn(&executor, &mut cache, &[5, 6, 7]);
        let at = |cache: &mut KvCache| {
            let layers = cache.host_layers().expect("plain values");
            layers.iter().map(|layer| layer.keys.as_ptr() as usize).collect::<Vec<_>>()
        };
        let before = at(&mut cache);
        assert_eq!(cache.n_bytes(), n_bytes);
        cache.clear(&executor.device);
        assert_eq!(cache.n_bytes(), n_bytes);
        assert_eq!(through_burn(&executor, &mut cache, &[5, 6, 7]), first);
        assert_eq!(at(&mut cache), before);
    }
}
