//! The forward pass: interprets a [`BlockSpec`](super::spec::BlockSpec) over burn tensors, for whole sequences and single
//! tokens alike. It knows no files and no clock.

use super::attention::{AttentionPlan, attend, rotate, softcap};
use super::kv_cache::{KvCache, float_dtype};
use super::spec::{Activation, ModelSpec, NormRole};
use super::tap::{Source, Tap};
use super::weights::{Block, GateUpLinears, Linear, QkvLinears, Weights};
use crate::inference::InferenceError;
use crate::units::DType;
use burn::backend::ExecutionError;
use burn::tensor::{Device, Int, Tensor, TensorData, activation};
#[cfg(any(feature = "cuda", feature = "wgpu"))]
use labpipe_kernels::burn_ext::row_ops;
use labpipe_kernels::burn_ext::{ProductError, stored_linear, stored_rows};
use std::ops::Range;

/// What every pass needs.
pub struct Executor {
    pub spec: ModelSpec,
    pub weights: Weights,
    pub device: Device,
    pub compute: DType,
}

/// What the projections of a sublayer read, and where it is captured.
struct SublayerInput {
    x: Tensor<2>, // [n, hidden]
    /// The norm whose output it is, or the sublayer itself where the block has no norm before it.
    name: String,
    is_normed: bool,
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
        let ids: Vec<i32> = tokens.iter().map(|token| *token as i32).collect();
        let ids = Tensor::from_data(TensorData::new(ids, [tokens.len()]), &self.device);
        let x = self.embed(ids, self.compute)?;
        tap.output("model.embed_tokens", None, "embedding", &x)?;
        let plans = self.plans(n_past, tokens.len());
        let x = self.run_layers(0..self.spec.n_layers, x, &plans, cache.as_deref_mut(), tap)?;
        if let Some(cache) = cache {
            cache.advance(tokens.len());
        }
        let x = self.norm(x, &self.weights.final_norm);
        tap.output("model.norm", None, "norm", &x)?;
        Ok(x)
    }

    /// Prepares the attention of a pass of `n` tokens after `n_past` cached ones: a plan for each of the spec's attentions.
    pub fn plans(&self, n_past: usize, n: usize) -> Vec<AttentionPlan> {
        let plan = |attention| AttentionPlan::new(attention, n_past, n, &self.device);
        self.spec.attentions.iter().map(plan).collect()
    }

    /// Runs the blocks `layers` over the residual stream.
    ///
    /// # Shapes
    /// `x` and result `[n, hidden]`.
    ///
    /// # Errors
    /// What `tap` returns.
    pub fn run_layers(
        &self,
        layers: Range<usize>,
        mut x: Tensor<2>,
        plans: &[AttentionPlan],
        mut cache: Option<&mut KvCache>,
        tap: &mut Tap<'_>,
    ) -> Result<Tensor<2>, InferenceError> {
        for layer_idx in layers {
            let plan = &plans[self.spec.layer_attentions[layer_idx]];
            x = self.block(layer_idx, &self.weights.blocks[layer_idx], x, plan, cache.as_deref_mut(), tap)?;
        }
        Ok(x)
    }

    /// Runs one token, whose id `[1]` and place are tensors (see [`AttentionPlan::of_step`]), and returns its logits, `[1, vocab]` f32.
    /// Activations stay in f32 whatever the compute dtype: products round what they take.
    ///
    /// # Errors
    /// `Device` where weights are elsewhere.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    pub fn step(
        &self,
        token: Tensor<1, Int>,
        plans: &[AttentionPlan],
        cache: &mut KvCache,
    ) -> Result<Tensor<2>, InferenceError> {
        let x = self.embed(token, DType::F32)?;
        let x = self.run_layers(0..self.spec.n_layers, x, plans, Some(cache), &mut Tap::closed())?;
        self.logits(self.norm(x, &self.weights.final_norm))
    }

    /// Returns logits in f32.
    ///
    /// # Shapes
    /// `hidden` `[n, hidden]`, result `[n, vocab]`.
    ///
    /// # Errors
    /// As [`head`](Self::head).
    pub fn logits(&self, hidden: Tensor<2>) -> Result<Tensor<2>, InferenceError> {
        let logits = self.head(hidden)?;
        Ok(match self.spec.logit_softcap {
            None => logits,
            Some(cap) => softcap(logits, cap),
        })
    }

    /// Returns the output of the module `lm_head`, in f32: logits before their soft cap, where the model has one.
    ///
    /// # Shapes
    /// `hidden` `[n, hidden]`, result `[n, vocab]`.
    ///
    /// # Errors
    /// `Device` where the head is not where `hidden` is.
    pub fn head(&self, hidden: Tensor<2>) -> Result<Tensor<2>, InferenceError> {
        Ok(linear(hidden, &self.weights.lm_head)?.cast(float_dtype(DType::F32)))
    }

    /// Waits until the device is idle.
    ///
    /// # Errors
    /// `Device` where it has failed.
    pub fn synchronize(&self) -> Result<(), InferenceError> {
        self.device.sync().map_err(|error| self.failure(&error))
    }

    /// Returns a failure of the model's device.
    pub fn failure(&self, error: &ExecutionError) -> InferenceError {
        InferenceError::Device { device: "the model's device".to_owned(), reason: format!("{error:?}") }
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

    /// Returns embeddings in `dtype`, in which they are scaled where the model does, `[n, hidden]`.
    fn embed(&self, ids: Tensor<1, Int>, dtype: DType) -> Result<Tensor<2>, InferenceError> {
        let x = stored_rows(ids, &self.weights.embedding)
            .map_err(|error| failed_product(&error.into()))?
            .cast(float_dtype(dtype));
        Ok(if self.spec.embedding_scale == 1.0 { x } else { x.mul_scalar(self.spec.embedding_scale) })
    }

    /// RMSNorm (Zhang and Sennrich 2019), computed in f32.
    fn norm(&self, x: Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
        let (dtype, eps) = (x.dtype(), self.spec.block.norm_eps);
        #[cfg(any(feature = "cuda", feature = "wgpu"))]
        if self.is_on_device() {
            return row_ops::rms_norm(x, weight.clone(), eps as f32);
        }
        let x = x.cast(float_dtype(DType::F32));
        let scale = x.clone().square().mean_dim(1).add_scalar(eps).sqrt().recip();
        x.mul(scale).mul(weight.clone()).cast(dtype)
    }

    /// Returns true where the weights are on a device of burn's cubecl backend, which has kernels for operations over rows.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    fn is_on_device(&self) -> bool {
        self.weights.embedding.as_host().is_none()
    }

    /// Returns attention in the type of the queries.
    ///
    /// # Shapes
    /// As [`attend`].
    fn attend(&self, q: Tensor<2>, k: Tensor<2>, v: Tensor<2>, plan: &AttentionPlan) -> Tensor<2> {
        // In f32 the kernel for many queries is slower than products of matrices.
        #[cfg(any(feature = "cuda", feature = "wgpu"))]
        if self.is_on_device() && (q.dims()[0] == 1 || self.compute != DType::F32) {
            return row_ops::attention(q, k, v, plan.first_position(), plan.kernel(&self.spec));
        }
        let dtype = q.dtype();
        attend(q, k, v, &self.spec, plan, self.compute == DType::F32).cast(dtype)
    }

    /// Rotates each head by its position.
    ///
    /// # Shapes
    /// As [`rotate`].
    fn rotate(&self, x: Tensor<2>, n_heads: usize, plan: &AttentionPlan) -> Tensor<2> {
        #[cfg(any(feature = "cuda", feature = "wgpu"))]
        if self.is_on_device() {
            return match plan.tables() {
                Some([cos, sin]) => row_ops::rotate(x, cos, sin, self.spec.head_dim),
                None => x,
            };
        }
        rotate(x, n_heads, plan)
    }

    /// Normalizes as many values at a time as there are weights: each head, or the whole projection.
    ///
    /// # Shapes
    /// `x` and result `[n, n_heads · head_dim]`, `weight` `[1, head_dim]` or `[1, n_heads · head_dim]`.
    fn norm_heads(&self, x: Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
        let ([n, width], [_, n_weights]) = (x.dims(), weight.dims());
        self.norm(x.reshape([n * width / n_weights, n_weights]), weight).reshape([n, width])
    }

    /// Returns what the projections of a sublayer read: the residual stream, normalized where the block has a norm before the sublayer.
    fn sublayer_input(
        &self,
        layer_idx: usize,
        (role, sublayer): (NormRole, &str),
        norm: Option<&Tensor<2>>,
        x: &Tensor<2>,
        tap: &mut Tap<'_>,
    ) -> Result<SublayerInput, InferenceError> {
        let name = |leaf: &str| format!("model.layers.{layer_idx}.{leaf}");
        let Some(weight) = norm else {
            return Ok(SublayerInput { x: x.clone(), name: name(sublayer), is_normed: false });
        };
        let (x, name) = (self.norm(x.clone(), weight), name(self.spec.norm_name(role)));
        tap.output(&name, Some(layer_idx), "norm", &x)?;
        Ok(SublayerInput { x, name, is_normed: true })
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
        let name = |role| format!("model.layers.{layer_idx}.{}", self.spec.norm_name(role));
        let at = (NormRole::Attn, "self_attn");
        let input = self.sublayer_input(layer_idx, at, block.attn_norm.as_ref(), &x, tap)?;
        let mut attended = self.attention(layer_idx, block, input, plan, cache, tap)?;
        if let Some(weight) = &block.attn_out_norm {
            attended = self.norm(attended, weight);
            tap.output(&name(NormRole::AttnOut), layer, "norm", &attended)?;
        }
        let x = x.add(attended);

        let at = (NormRole::Mlp, "mlp");
        let input = self.sublayer_input(layer_idx, at, block.mlp_norm.as_ref(), &x, tap)?;
        let mut out = self.mlp(layer_idx, block, input, tap)?;
        if let Some(weight) = &block.mlp_out_norm {
            out = self.norm(out, weight);
            tap.output(&name(NormRole::MlpOut), layer, "norm", &out)?;
        }
        let x = x.add(out);
        tap.output(&format!("model.layers.{layer_idx}"), layer, "block", &x)?;
        Ok(x)
    }

    fn mlp(
        &self,
        layer_idx: usize,
        block: &Block,
        input: SublayerInput,
        tap: &mut Tap<'_>,
    ) -> Result<Tensor<2>, InferenceError> {
        let layer = Some(layer_idx);
        let name = |leaf: &str| format!("model.layers.{layer_idx}.{leaf}");
        let project = |tap: &mut Tap<'_>, leaf, weights| project(layer_idx, leaf, &input, weights, tap);
        let activate = |tap: &mut Tap<'_>, gate| {
            let activated = activate(self.spec.block.activation, gate);
            tap.output(&name("mlp.act_fn"), layer, "act", &activated)?;
            Ok::<_, InferenceError>(activated)
        };
        let (activated, up) = match &block.gate_up {
            GateUpLinears::Apart { gate, up } => {
                let gate = project(tap, "mlp.gate_proj", gate)?;
                (activate(tap, gate)?, project(tap, "mlp.up_proj", up)?)
            }
            GateUpLinears::Fused(weights) => {
                let both = project(tap, "mlp.gate_up_proj", weights)?;
                let ffn = self.spec.ffn_size;
                (activate(tap, columns(&both, 0, ffn))?, columns(&both, ffn, 2 * ffn))
            }
        };
        let product = activated.mul(up);
        tap.input(&name("mlp.down_proj"), layer, "down_proj", &product)?;
        let down = linear(product, &block.down)?;
        tap.output(&name("mlp.down_proj"), layer, "down_proj", &down)?;
        Ok(down)
    }

    fn attention(
        &self,
        layer_idx: usize,
        block: &Block,
        input: SublayerInput,
        plan: &AttentionPlan,
        cache: Option<&mut KvCache>,
        tap: &mut Tap<'_>,
    ) -> Result<Tensor<2>, InferenceError> {
        let layer = Some(layer_idx);
        let name = |leaf: &str| format!("model.layers.{layer_idx}.{leaf}");
        let (mut q, mut k, v) = self.queries_keys_values(layer_idx, block, input, tap)?;
        if let (Some(q_norm), Some(k_norm)) = (&block.q_norm, &block.k_norm) {
            q = self.norm_heads(q, q_norm);
            tap.output(&name(self.spec.norm_name(NormRole::Q)), layer, "norm", &q)?;
            k = self.norm_heads(k, k_norm);
            tap.output(&name(self.spec.norm_name(NormRole::K)), layer, "norm", &k)?;
        }
        let q = self.rotate(q, self.spec.n_heads, plan);
        let k = self.rotate(k, self.spec.n_kv_heads, plan);
        let (k, v) = match cache {
            Some(cache) => cache.append(layer_idx, k, v, plan.position()),
            None => (k, v),
        };
        let attended = self.attend(q, k, v, plan);
        let (attn_name, o_name) = (name("self_attn.attn"), name("self_attn.o_proj"));
        tap.output(&attn_name, layer, "attn", &attended)?;
        tap.shared_input(&o_name, layer, "o_proj", &Source { module: &attn_name, op: "attn" }, &attended)?;
        let out = linear(attended, &block.o)?;
        tap.output(&o_name, layer, "o_proj", &out)?;
        Ok(out)
    }

    /// Projects to queries `[n, n_heads · head_dim]`, keys and values `[n, n_kv_heads · head_dim]`.
    fn queries_keys_values(
        &self,
        layer_idx: usize,
        block: &Block,
        input: SublayerInput,
        tap: &mut Tap<'_>,
    ) -> Result<(Tensor<2>, Tensor<2>, Tensor<2>), InferenceError> {
        let mut project = |leaf, weights| project(layer_idx, leaf, &input, weights, tap);
        match &block.qkv {
            QkvLinears::Apart { q, k, v } => {
                Ok((project("self_attn.q_proj", q)?, project("self_attn.k_proj", k)?, project("self_attn.v_proj", v)?))
            }
            QkvLinears::Fused(weights) => {
                let all = project("self_attn.qkv_proj", weights)?;
                let (q, kv) = (self.spec.q_width(), self.spec.kv_width());
                Ok((columns(&all, 0, q), columns(&all, q, q + kv), columns(&all, q + kv, q + 2 * kv)))
            }
        }
    }
}

/// Runs a linear that reads a sublayer's input.
fn project(
    layer_idx: usize,
    leaf: &str,
    input: &SublayerInput,
    weights: &Linear,
    tap: &mut Tap<'_>,
) -> Result<Tensor<2>, InferenceError> {
    let (module, layer) = (format!("model.layers.{layer_idx}.{leaf}"), Some(layer_idx));
    let op = leaf.rsplit('.').next().unwrap_or(leaf);
    if input.is_normed {
        tap.shared_input(&module, layer, op, &Source { module: &input.name, op: "norm" }, &input.x)?;
    } else {
        tap.common_input(&module, layer, op, &input.name, &input.x)?;
    }
    let y = linear(input.x.clone(), weights)?;
    tap.output(&module, layer, op, &y)?;
    Ok(y)
}

fn columns(x: &Tensor<2>, from: usize, to: usize) -> Tensor<2> {
    x.clone().slice([0..x.dims()[0], from..to])
}

fn linear(x: Tensor<2>, linear: &Linear) -> Result<Tensor<2>, InferenceError> {
    let dtype = x.dtype();
    let y = stored_linear(x, &linear.weight).map_err(|error| failed_product(&error))?;
    Ok(match &linear.bias {
        None => y,
        Some(bias) => y.add(bias.clone().cast(dtype)),
    })
}

fn failed_product(error: &ProductError) -> InferenceError {
    InferenceError::Device { device: "the model's device".to_owned(), reason: error.to_string() }
}

fn activate(kind: Activation, x: Tensor<2>) -> Tensor<2> {
    match kind {
        Activation::Silu => activation::silu(x),
        Activation::Gelu => activation::gelu(x),
        Activation::GeluTanh => activation::gelu_approximate(x),
    }
}
