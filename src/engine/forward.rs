//! The forward pass: interprets a [`BlockSpec`](super::spec::BlockSpec) over burn tensors, for whole sequences and single
//! tokens alike. It knows no files and no clock.

use super::attention::{AttentionPlan, attend, rotate};
use super::kv_cache::{KvCache, float_dtype};
use super::spec::{Activation, ModelSpec};
use super::tap::{Source, Tap};
use super::weights::{Block, Linear, Weights};
use crate::inference::InferenceError;
use crate::units::DType;
use burn::tensor::{Device, Tensor, TensorData, activation};
use labpipe_kernels::burn_ext::stored_linear;
use labpipe_kernels::weight::HostWeight;

/// What every pass needs.
pub struct Executor {
    pub spec: ModelSpec,
    pub weights: Weights,
    pub device: Device,
    pub compute: DType,
}

impl Executor {
    /// Runs `tokens` and returns the hidden states after the final norm, `[n, hidden]`, in the compute dtype.
    ///
    /// With a cache, the tokens follow those it holds and are appended to it.
    ///
    /// # Errors
    /// `TokenOutOfRange`, `ContextTooLong`, and what `tap` returns.
    pub fn hidden_states(
        &self,
        tokens: &[u32],
        mut cache: Option<&mut KvCache>,
        tap: &mut Tap<'_>,
    ) -> Result<Tensor<2>, InferenceError> {
        let n_past = cache.as_ref().map_or(0, |cache| cache.n_tokens());
        self.check(tokens, n_past)?;
        let mut x = self.embed(tokens);
        tap.output("model.embed_tokens", None, "embedding", &x)?;
        let plan = AttentionPlan::new(&self.spec, n_past, tokens.len(), &self.device);
        for (layer_idx, block) in self.weights.blocks.iter().enumerate() {
            x = self.block(layer_idx, block, x, &plan, cache.as_deref_mut(), tap)?;
        }
        if let Some(cache) = cache {
            cache.advance(tokens.len());
        }
        let x = self.norm(x, &self.weights.final_norm);
        tap.output("model.norm", None, "norm", &x)?;
        Ok(x)
    }

    /// Returns logits in f32.
    ///
    /// # Shapes
    /// `hidden` `[n, hidden]`, result `[n, vocab]`.
    pub fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        linear(hidden, &self.weights.lm_head).cast(float_dtype(DType::F32))
    }

    fn check(&self, tokens: &[u32], n_past: usize) -> Result<(), InferenceError> {
        let (n_ctx_max, vocab_size) = (self.spec.n_ctx_max, self.spec.vocab_size);
        if n_past + tokens.len() > n_ctx_max {
            return Err(InferenceError::ContextTooLong { asked: n_past + tokens.len(), n_ctx_max });
        }
        match tokens.iter().find(|token| **token as usize >= vocab_size) {
            Some(&token) => Err(InferenceError::TokenOutOfRange { token, vocab_size }),
            None => Ok(()),
        }
    }

    fn embed(&self, tokens: &[u32]) -> Tensor<2> {
        let hidden = self.spec.hidden_size;
        let mut values = vec![0.0f32; tokens.len() * hidden];
        let table: &HostWeight = &self.weights.embedding;
        for (token, row) in tokens.iter().zip(values.chunks_exact_mut(hidden)) {
            table.unpack_rows(*token as usize, row);
        }
        let x = Tensor::from_data(TensorData::new(values, [tokens.len(), hidden]), &self.device);
        self.in_compute(x)
    }

    fn in_compute(&self, x: Tensor<2>) -> Tensor<2> {
        if self.compute == DType::F32 { x } else { x.cast(float_dtype(self.compute)) }
    }

    /// RMSNorm (Zhang and Sennrich 2019), computed in f32.
    fn norm(&self, x: Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
        let x = if self.compute == DType::F32 { x } else { x.cast(float_dtype(DType::F32)) };
        let mean_square = x.clone().square().mean_dim(1);
        let scale = mean_square.add_scalar(self.spec.block.norm_eps).sqrt().recip();
        self.in_compute(x.mul(scale).mul(weight.clone()))
    }

    fn block(
        &self,
        layer_idx: usize,
        block: &Block,
        x: Tensor<2>,
        plan: &AttentionPlan,
        cache: Option<&mut KvCache>,
        tap: &mut Tap<'_>,
    ) -> Result<Tensor<2>, InferenceError> {
        let layer = Some(layer_idx);
        let name = |leaf: &str| format!("model.layers.{layer_idx}{leaf}");
        let normed = self.norm(x.clone(), &block.input_norm);
        tap.output(&name(".input_layernorm"), layer, "norm", &normed)?;
        let attended = self.attention(layer_idx, block, normed, plan, cache, tap)?;
        let x = x.add(attended);

        let normed = self.norm(x.clone(), &block.post_norm);
        let norm_name = name(".post_attention_layernorm");
        tap.output(&norm_name, layer, "norm", &normed)?;
        let source = Source { module: &norm_name, op: "norm" };
        tap.shared_input(&name(".mlp.gate_proj"), layer, "gate_proj", &source, &normed)?;
        let gate = linear(normed.clone(), &block.gate);
        tap.output(&name(".mlp.gate_proj"), layer, "gate_proj", &gate)?;
        let activated = activate(self.spec.block.activation, gate);
        tap.output(&name(".mlp.act_fn"), layer, "act", &activated)?;
        tap.shared_input(&name(".mlp.up_proj"), layer, "up_proj", &source, &normed)?;
        let up = linear(normed, &block.up);
        tap.output(&name(".mlp.up_proj"), layer, "up_proj", &up)?;
        let product = activated.mul(up);
        tap.input(&name(".mlp.down_proj"), layer, "down_proj", &product)?;
        let down = linear(product, &block.down);
        tap.output(&name(".mlp.down_proj"), layer, "down_proj", &down)?;
        let x = x.add(down);
        tap.output(&name(""), layer, "block", &x)?;
        Ok(x)
    }

    fn attention(
        &self,
        layer_idx: usize,
        block: &Block,
        normed: Tensor<2>,
        plan: &AttentionPlan,
        cache: Option<&mut KvCache>,
        tap: &mut Tap<'_>,
    ) -> Result<Tensor<2>, InferenceError> {
        let layer = Some(layer_idx);
        let name = |leaf: &str| format!("model.layers.{layer_idx}.{leaf}");
        let norm_name = name("input_layernorm");
        let mut project = |op: &str, weights: &Linear| {
            let module = name(&format!("self_attn.{op}"));
            tap.shared_input(&module, layer, op, &Source { module: &norm_name, op: "norm" }, &normed)?;
            let y = linear(normed.clone(), weights);
            tap.output(&module, layer, op, &y)?;
            Ok::<_, InferenceError>(y)
        };
        let q = project("q_proj", &block.q)?;
        let k = project("k_proj", &block.k)?;
        let v = project("v_proj", &block.v)?;
        let q = rotate(q, self.spec.n_heads, plan);
        let k = rotate(k, self.spec.n_kv_heads, plan);
        let (k, v) = match cache {
            Some(cache) => cache.append(layer_idx, k, v),
            None => (k, v),
        };
        let attended = self.in_compute(attend(q, k, v, &self.spec, plan));
        let (attn_name, o_name) = (name("self_attn.attn"), name("self_attn.o_proj"));
        tap.output(&attn_name, layer, "attn", &attended)?;
        tap.shared_input(&o_name, layer, "o_proj", &Source { module: &attn_name, op: "attn" }, &attended)?;
        let out = linear(attended, &block.o);
        tap.output(&o_name, layer, "o_proj", &out)?;
        Ok(out)
    }
}

fn linear(x: Tensor<2>, linear: &Linear) -> Tensor<2> {
    let dtype = x.dtype();
    let y = stored_linear(x, &linear.weight);
    match &linear.bias {
        None => y,
        Some(bias) => y.add(bias.clone().cast(dtype)),
    }
}

fn activate(kind: Activation, x: Tensor<2>) -> Tensor<2> {
    match kind {
        Activation::Silu => activation::silu(x),
        Activation::Gelu => activation::gelu(x),
        Activation::GeluTanh => activation::gelu_approximate(x),
    }
}
