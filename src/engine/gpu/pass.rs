//! The forward pass over whole sequences: an interpreter of the spec over buffers on the device.

use super::cache::GpuCache;
use super::products::Products;
use super::rows::Rows;
use super::weights::{GpuWeights, Projection};
use crate::engine::spec::{Activation, ModelSpec, NormRole};
use crate::engine::tap::{Source, Tap, Values};
use crate::inference::InferenceError;
use crate::units::DType;
use cubecl::client::Client;
use cubecl::server::Handle;
use labpipe_kernels::cube::ops::{Gate, STATE_POSITION};
use labpipe_kernels::cube::{self, Element, Residual};

/// Bytes of gate and up rows beyond which a pass computes them panel by panel.
const GATED_BYTES: usize = 32 << 20;

/// Returns the kernels' name for an activation.
pub fn gate(activation: Activation) -> Gate {
    match activation {
        Activation::Silu => Gate::Silu,
        Activation::Gelu => Gate::Gelu,
        Activation::GeluTanh => Gate::GeluTanh,
    }
}

/// A model on the device, ready for passes.
pub struct Passes {
    pub spec: ModelSpec,
    pub weights: GpuWeights,
    pub products: Products,
    pub compute: DType,
}

/// Buffers of one pass of `n` tokens.
struct Buffers {
    n: usize,
    x: Handle,       // [n, hidden] f32, the residual stream
    normed: Handle,  // [n, hidden]; what attention puts out too, once the norm's rows are used
    qkv: Handle,     // [n, q + 2 kv]
    q: Handle,       // [n, q]; what a half-block adds too, once the queries are used
    gate_up: Handle, // [n, 2 ffn], or narrower where the MLP runs panel by panel
    product: Handle, // [n, ffn]
    state: Handle,   // position of the first token
    /// The MLP runs panel by panel: nobody looks at what is before the activation.
    is_gated: bool,
}

impl Passes {
    pub fn client(&self) -> &Client {
        &self.products.client
    }

    /// Runs `tokens` behind those that the cache holds and returns the residual stream after the last block, normed for the head.
    ///
    /// # Shapes
    /// Result `[n, hidden]` in the activations' type.
    ///
    /// # Errors
    /// `ContextTooLong`, `TokenOutOfRange`, the device's failures, and what `tap` returns.
    pub fn hidden_states(
        &mut self,
        tokens: &[u32],
        cache: &mut GpuCache,
        tap: &mut Tap<'_>,
    ) -> Result<Handle, InferenceError> {
        let n = tokens.len();
        self.check(tokens, cache)?;
        let client = self.products.client.clone();
        for rope in &mut cache.ropes {
            rope.prepare(&client, cache.n_tokens + n);
        }
        let buffers = self.buffers(&client, n, cache.n_tokens, tap.is_closed());
        let token_bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        let tokens_device = client.create_from_slice(&token_bytes);
        let scale = self.spec.embedding_scale as f32;
        cube::embed(&client, &self.weights.embedding, &tokens_device, n, [0, n], scale, &buffers.x);
        let hidden = self.spec.hidden_size;
        tap.output("model.embed_tokens", None, "embedding", &self.rows(&client, &buffers.x, Element::F32, n, hidden))?;
        let mut delta: Option<(bool, usize)> = None;
        for layer_idx in 0..self.spec.n_layers {
            self.block(layer_idx, &buffers, cache, &mut delta, tap)?;
        }
        cache.n_tokens += n;
        let last = self.spec.n_layers.saturating_sub(1);
        self.step(&client, &buffers, delta.take(), Some(&self.weights.final_norm));
        if self.spec.n_layers > 0 && tap.wants(&format!("model.layers.{last}")) {
            let rows = self.rows(&client, &buffers.x, Element::F32, n, hidden);
            tap.output(&format!("model.layers.{last}"), Some(last), "block", &rows)?;
        }
        tap.output("model.norm", None, "norm", &self.rows(&client, &buffers.normed, self.products.element, n, hidden))?;
        Ok(buffers.normed)
    }

    fn check(&self, tokens: &[u32], cache: &GpuCache) -> Result<(), InferenceError> {
        let asked = cache.n_tokens + tokens.len();
        if asked > cache.capacity {
            return Err(InferenceError::ContextTooLong { asked, n_ctx_max: cache.capacity });
        }
        let vocab_size = self.spec.vocab_size;
        match tokens.iter().find(|token| **token as usize >= vocab_size) {
            Some(&token) => Err(InferenceError::TokenOutOfRange { token, vocab_size }),
            None => Ok(()),
        }
    }

    fn buffers(&self, client: &Client, n: usize, n_past: usize, is_unseen: bool) -> Buffers {
        let size = self.products.element.size_bytes();
        let spec = &self.spec;
        let (q, hidden, ffn) = (spec.q_width(), spec.hidden_size, spec.ffn_size);
        let mut state = [0u8; 16];
        state[4 * STATE_POSITION as usize..][..4].copy_from_slice(&(n_past as u32).to_le_bytes());
        let widths: Option<Vec<usize>> =
            self.weights.blocks.iter().map(|block| self.products.gated_width(&block.gate_up)).collect();
        // Panels mean more launches: short passes have no need of them.
        let is_large = n * 2 * ffn * size > GATED_BYTES;
        let gated_width = widths.filter(|_| is_unseen && is_large).and_then(|widths| widths.into_iter().max());
        Buffers {
            n,
            x: client.empty(n * hidden * 4),
            normed: client.empty(n * hidden.max(q) * size),
            qkv: client.empty(n * (q + 2 * spec.kv_width()) * size),
            q: client.empty(n * hidden.max(q) * size),
            gate_up: client.empty(n * gated_width.unwrap_or(2 * ffn) * size),
            product: client.empty(n * ffn * size),
            state: client.create_from_slice(&state),
            is_gated: gated_width.is_some(),
        }
    }

    fn rows<'a>(&self, client: &'a Client, handle: &'a Handle, element: Element, n: usize, width: usize) -> Rows<'a> {
        Rows { client, handle, element, n, stride: width, first: 0, width }
    }

    /// Adds what the last half-block left (`delta`: whether it has a norm of its own, and its layer) and norms for the next.
    fn step(&self, client: &Client, buffers: &Buffers, delta: Option<(bool, usize)>, norm: Option<&Handle>) {
        let delta_norm = delta.and_then(|(is_mlp, layer_idx)| {
            let block = &self.weights.blocks[layer_idx];
            if is_mlp { block.mlp_out_norm.as_ref() } else { block.attn_out_norm.as_ref() }
        });
        let step = Residual {
            x: &buffers.x,
            delta: delta.map(|_| &buffers.q),
            delta_norm,
            norm: norm.map(|norm| (norm, &buffers.normed)),
            eps: self.spec.block.norm_eps as f32,
        };
        cube::add_norm(client, self.products.element, &step, buffers.n, self.spec.hidden_size);
    }

    fn block(
        &mut self,
        layer_idx: usize,
        buffers: &Buffers,
        cache: &GpuCache,
        delta: &mut Option<(bool, usize)>,
        tap: &mut Tap<'_>,
    ) -> Result<(), InferenceError> {
        let client = self.products.client.clone();
        let (n, element, layer) = (buffers.n, self.products.element, Some(layer_idx));
        let hidden = self.spec.hidden_size;
        let name = |leaf: &str| format!("model.layers.{layer_idx}.{leaf}");
        let attn_norm_name = name(self.spec.norm_name(NormRole::Attn));
        let mlp_norm_name = name(self.spec.norm_name(NormRole::Mlp));

        self.step(&client, buffers, delta.take(), Some(&self.weights.blocks[layer_idx].attn_norm));
        if layer_idx > 0 {
            let before = layer_idx - 1;
            let rows = self.rows(&client, &buffers.x, Element::F32, n, hidden);
            tap.output(&format!("model.layers.{before}"), Some(before), "block", &rows)?;
        }
        let normed = self.rows(&client, &buffers.normed, element, n, hidden);
        tap.output(&attn_norm_name, layer, "norm", &normed)?;
        let block = &self.weights.blocks[layer_idx];
        self.products.project(&buffers.normed, &block.qkv, &buffers.qkv, n)?;
        let names: &[&str] = if self.spec.block.fused_qkv {
            &["self_attn.qkv_proj"]
        } else {
            &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
        };
        tap_projection(tap, layer_idx, names, &attn_norm_name, &normed, &block.qkv, &buffers.qkv)?;
        self.tap_head_norms(layer_idx, buffers, tap)?;
        let view = cache.layer(&self.spec, block, layer_idx);
        cube::rope_append(&client, element, &view, &buffers.qkv, &buffers.q, &buffers.state, n);
        if cube::flash_fits(&client, element, &view) {
            cube::flash_attention(&client, element, &view, &buffers.q, &buffers.normed, &buffers.state, n);
        } else {
            cube::attention(&client, element, &view, &buffers.q, &buffers.normed, &buffers.state, n);
        }
        let attended = self.rows(&client, &buffers.normed, element, n, self.spec.q_width());
        let (attn_name, o_name) = (name("self_attn.attn"), name("self_attn.o_proj"));
        tap.output(&attn_name, layer, "attn", &attended)?;
        tap.shared_input(&o_name, layer, "o_proj", &Source { module: &attn_name, op: "attn" }, &attended)?;
        self.products.project(&buffers.normed, &block.o, &buffers.q, n)?;
        let out = self.rows(&client, &buffers.q, element, n, hidden);
        tap.output(&o_name, layer, "o_proj", &out)?;
        self.tap_out_norm(layer_idx, NormRole::AttnOut, &out, tap)?;

        self.step(&client, buffers, Some((false, layer_idx)), Some(&self.weights.blocks[layer_idx].mlp_norm));
        tap.output(&mlp_norm_name, layer, "norm", &normed)?;
        self.gate_up(layer_idx, buffers, &mlp_norm_name, tap)?;
        let block = &self.weights.blocks[layer_idx];
        let ffn = self.spec.ffn_size;
        let product = self.rows(&client, &buffers.product, element, n, ffn);
        tap.input(&name("mlp.down_proj"), layer, "down_proj", &product)?;
        self.products.project(&buffers.product, &block.down, &buffers.q, n)?;
        let down = self.rows(&client, &buffers.q, element, n, hidden);
        tap.output(&name("mlp.down_proj"), layer, "down_proj", &down)?;
        self.tap_out_norm(layer_idx, NormRole::MlpOut, &down, tap)?;
        *delta = Some((true, layer_idx));
        Ok(())
    }

    /// Runs the MLP up to its product of activated gate and up.
    fn gate_up(
        &mut self,
        layer_idx: usize,
        buffers: &Buffers,
        mlp_norm_name: &str,
        tap: &mut Tap<'_>,
    ) -> Result<(), InferenceError> {
        let client = self.products.client.clone();
        let (n, element, layer) = (buffers.n, self.products.element, Some(layer_idx));
        let (hidden, ffn) = (self.spec.hidden_size, self.spec.ffn_size);
        let name = |leaf: &str| format!("model.layers.{layer_idx}.{leaf}");
        let act = gate(self.spec.block.activation);
        if buffers.is_gated {
            let block = &self.weights.blocks[layer_idx];
            let targets = [&buffers.gate_up, &buffers.product];
            return self.products.gated(&buffers.normed, &block.gate_up, act, targets, n);
        }
        let normed = self.rows(&client, &buffers.normed, element, n, hidden);
        let block = &self.weights.blocks[layer_idx];
        self.products.project(&buffers.normed, &block.gate_up, &buffers.gate_up, n)?;
        let names: &[&str] =
            if self.spec.block.fused_gate_up { &["mlp.gate_up_proj"] } else { &["mlp.gate_proj", "mlp.up_proj"] };
        tap_projection(tap, layer_idx, &names[..1], mlp_norm_name, &normed, &block.gate_up, &buffers.gate_up)?;
        if tap.wants(&name("mlp.act_fn")) {
            cube::gate(&client, element, act, false, &buffers.gate_up, &buffers.product, [n, ffn]);
            let activated = self.rows(&client, &buffers.product, element, n, ffn);
            tap.output(&name("mlp.act_fn"), layer, "act", &activated)?;
        }
        if names.len() > 1 {
            tap_columns(tap, layer_idx, names[1], mlp_norm_name, &normed, &buffers.gate_up, [ffn, ffn, 2 * ffn])?;
        }
        cube::gate(&client, element, act, true, &buffers.gate_up, &buffers.product, [n, ffn]);
        Ok(())
    }

    /// Gives the tap what the norms on queries and keys put out. The kernel that rotates norms on its way and stores no such values,
    /// so they are computed here from the projections', in the same precision.
    fn tap_head_norms(&self, layer_idx: usize, buffers: &Buffers, tap: &mut Tap<'_>) -> Result<(), InferenceError> {
        let Some(norm) = &self.weights.blocks[layer_idx].qk_norm else { return Ok(()) };
        let (q, kv) = (self.spec.q_width(), self.spec.kv_width());
        for (role, weight, first, width) in [(NormRole::Q, &norm.q_host, 0, q), (NormRole::K, &norm.k_host, q, kv)] {
            let module = format!("model.layers.{layer_idx}.{}", self.spec.norm_name(role));
            if tap.wants(&module) {
                let rows = Rows {
                    client: self.client(),
                    handle: &buffers.qkv,
                    element: self.products.element,
                    n: buffers.n,
                    stride: q + 2 * kv,
                    first,
                    width,
                };
                let normed = Normed { values: norm_rows(rows.read()?, weight, self.spec.block.norm_eps), width };
                tap.output(&module, Some(layer_idx), "norm", &normed)?;
            }
        }
        Ok(())
    }

    /// As [`tap_head_norms`](Self::tap_head_norms), for a norm before the residual sum.
    fn tap_out_norm(
        &self,
        layer_idx: usize,
        role: NormRole,
        delta: &Rows<'_>,
        tap: &mut Tap<'_>,
    ) -> Result<(), InferenceError> {
        let block = &self.weights.blocks[layer_idx];
        let weight = if role == NormRole::MlpOut { &block.mlp_out_norm } else { &block.attn_out_norm };
        let module = format!("model.layers.{layer_idx}.{}", self.spec.norm_name(role));
        if let Some(weight) = weight.as_ref().filter(|_| tap.wants(&module)) {
            let weight = super::rows::read(self.client(), weight, Element::F32, self.spec.hidden_size)?;
            let normed = Normed {
                values: norm_rows(delta.read()?, &weight, self.spec.block.norm_eps),
                width: self.spec.hidden_size,
            };
            tap.output(&module, Some(layer_idx), "norm", &normed)?;
        }
        Ok(())
    }
}

/// Gives the tap the input and the outputs of linears that are one product here.
fn tap_projection(
    tap: &mut Tap<'_>,
    layer_idx: usize,
    names: &[&str],
    norm_name: &str,
    normed: &Rows<'_>,
    projection: &Projection,
    y: &Handle,
) -> Result<(), InferenceError> {
    let mut first = 0;
    for (leaf, width) in names.iter().zip(&projection.widths) {
        tap_columns(tap, layer_idx, leaf, norm_name, normed, y, [first, *width, projection.n_out])?;
        first += width;
    }
    Ok(())
}

fn tap_columns(
    tap: &mut Tap<'_>,
    layer_idx: usize,
    leaf: &str,
    norm_name: &str,
    normed: &Rows<'_>,
    y: &Handle,
    [first, width, stride]: [usize; 3],
) -> Result<(), InferenceError> {
    let module = format!("model.layers.{layer_idx}.{leaf}");
    let op = leaf.rsplit('.').next().unwrap_or(leaf);
    tap.shared_input(&module, Some(layer_idx), op, &Source { module: norm_name, op: "norm" }, normed)?;
    let rows = Rows { client: normed.client, handle: y, element: normed.element, n: normed.n, stride, first, width };
    tap.output(&module, Some(layer_idx), op, &rows)
}

/// Values that a fused kernel does not store.
struct Normed {
    values: Vec<f32>,
    width: usize,
}

impl Values for Normed {
    fn width(&self) -> usize {
        self.width
    }

    fn read(&self) -> Result<Vec<f32>, InferenceError> {
        Ok(self.values.clone())
    }
}

/// RMSNorm over rows as wide as `weight`.
fn norm_rows(mut values: Vec<f32>, weight: &[f32], eps: f64) -> Vec<f32> {
    for row in values.chunks_exact_mut(weight.len()) {
        let squares: f32 = row.iter().map(|value| value * value).sum();
        let scale = 1.0 / (squares / row.len() as f32 + eps as f32).sqrt();
        row.iter_mut().zip(weight).for_each(|(value, weight)| *value *= scale * weight);
    }
    values
}
