//! What a file says beyond config.json, written into the spec: rotary embeddings, windows, biases, fused projections, scales and caps.

use super::architecture::Sliding;
use super::tensors::GgufCheckpoint;
use crate::engine::spec::{AttentionSpec, LinearBiases, ModelSpec};
use crate::gguf::MetaValue;
use crate::inference::InferenceError;

impl GgufCheckpoint {
    /// Completes the spec that [`config`](Self::config) gave.
    ///
    /// # Errors
    /// `File` where a key is of the wrong type or value, or asks for what labpipe does not compute; `Tensor` where a tensor of rotary
    /// divisors does not fit.
    pub fn complete(&self, spec: &mut ModelSpec) -> Result<(), InferenceError> {
        // Converters add the 1 of Gemma's 1 + w.
        spec.block.norm_unit_offset = false;
        spec.block.fused_qkv = self.has("blk.0.attn_qkv.weight");
        spec.block.fused_gate_up = self.architecture.may_fuse_gate_up && !self.has("blk.0.ffn_gate.weight");
        spec.block.biases = self.biases(spec);
        if let Some(n_layers) = self.architecture.wide_scale_layers {
            let width = if spec.n_layers == n_layers { spec.hidden_size / spec.n_heads } else { spec.head_dim };
            spec.block.attn_scale = 1.0 / (width as f64).sqrt();
        }
        spec.block.attn_softcap = self.softcap("attn_logit_softcapping", self.architecture.attn_softcap)?;
        spec.logit_softcap = self.softcap("final_logit_softcapping", self.architecture.logit_softcap)?;
        let rope = self.rope(spec.head_dim)?;
        spec.n_ctx_max = self.n_ctx_max(&rope)?;
        let sliding_rope = self.sliding_rope(&rope)?;
        let rotated: Vec<bool> = (0..spec.n_layers).map(|layer_idx| spec.attention(layer_idx).rope.is_some()).collect();
        spec.attentions = vec![AttentionSpec { window: None, rope: Some(rope) }];
        spec.layer_attentions = vec![0; spec.n_layers];
        if let Some(window) = self.window(spec.n_ctx_max)? {
            spec.set_sliding(&self.sliding_layers(spec.n_layers)?, Some(window), Some(sliding_rope));
        }
        // The file holds one rotary embedding; the family decides which layers use it.
        let layers = rotated.iter().enumerate().map(|(layer_idx, is_rotated)| {
            let AttentionSpec { window, rope } = spec.attention(layer_idx).clone();
            AttentionSpec { window, rope: rope.filter(|_| *is_rotated) }
        });
        spec.set_attentions(layers.collect());
        self.check_neutral(spec)
    }

    fn has(&self, tensor: &str) -> bool {
        self.file.tensor(tensor).is_some()
    }

    /// Returns the projections that have a bias in some layer; in layers without it the bias is zero.
    fn biases(&self, spec: &ModelSpec) -> LinearBiases {
        let has =
            |module: &str| self.architecture.block_name(module).is_some_and(|name| self.biased_modules.contains(name));
        let fused_qkv = spec.block.fused_qkv && has("self_attn.qkv_proj");
        let apart = |module: &str| !spec.block.fused_qkv && has(module);
        LinearBiases {
            q: fused_qkv || apart("self_attn.q_proj"),
            k: fused_qkv || apart("self_attn.k_proj"),
            v: fused_qkv || apart("self_attn.v_proj"),
            o: has("self_attn.o_proj"),
            gate: has("mlp.gate_proj"),
            up: has("mlp.up_proj"),
            down: has("mlp.down_proj"),
        }
    }

    /// Returns a soft cap: the file's, the architecture's, or none where either is 0 or the architecture has no such cap.
    fn softcap(&self, name: &str, default: Option<f64>) -> Result<Option<f64>, InferenceError> {
        let Some(default) = default else { return Ok(None) };
        match self.number(name)?.unwrap_or(default) {
            cap if cap < 0.0 => Err(self.wrong(name, format!("expected a number above 0, found {cap}"))),
            cap => Ok((cap > 0.0).then_some(cap)),
        }
    }

    /// Returns how many keys a query of a sliding layer sees, where that is less than the context.
    pub(super) fn window(&self, n_ctx_max: usize) -> Result<Option<usize>, InferenceError> {
        let window = self.whole("attention.sliding_window")?.or(self.architecture.default_window);
        // 0 stands for none.
        Ok(window.filter(|window| *window > 0 && (*window < n_ctx_max || self.architecture.has_out_norms)))
    }

    /// Returns for each layer whether its attention slides: the file's pattern (a period, or a truth value per layer), or the
    /// architecture's.
    fn sliding_layers(&self, n_layers: usize) -> Result<Vec<bool>, InferenceError> {
        const PATTERN: &str = "attention.sliding_window_pattern";
        let every = |period: usize| (0..n_layers).map(|i| period == 0 || i % period < period - 1).collect();
        match self.value(PATTERN) {
            _ if self.architecture.sliding == Sliding::Never => Err(self.wrong(
                "attention.sliding_window",
                "models of this family have no window; files with one are of OLMo 3, which is not supported",
            )),
            Some(MetaValue::Array(_)) => {
                let values = self.file.numbers(&self.key(PATTERN))?.unwrap_or_default();
                if values.len() != n_layers {
                    return Err(self.wrong(PATTERN, format!("{} entries for {n_layers} layers", values.len())));
                }
                let flag = |value: &MetaValue| match value {
                    MetaValue::Bool(flag) => Some(*flag),
                    number => number.as_u64().filter(|n| *n <= 1).map(|n| n == 1),
                };
                let flags: Option<Vec<bool>> = values.iter().map(flag).collect();
                flags.ok_or_else(|| self.wrong(PATTERN, "expected a truth value per layer"))
            }
            Some(_) => Ok(every(self.required(PATTERN)?)),
            None => match self.architecture.sliding {
                Sliding::All => Ok(vec![true; n_layers]),
                Sliding::AllButEvery(period) => Ok(every(period)),
                Sliding::Unstated | Sliding::Never => Err(self.wrong(
                    "attention.sliding_window",
                    "the file does not say which layers slide (attention.sliding_window_pattern); llama.cpp ignores the \
                     window of this architecture: remove the key to compute as it does",
                )),
            },
        }
    }
}
