//! The spec of a decoder from the fields that all families share.

use super::config::{ConfigFile, MAX_DIM, shown};
use super::notes::Mark;
use crate::engine::rope::{RopeScaling, RopeSpec};
use crate::engine::spec::{Activation, AttentionSpec, BlockSpec, LinearBiases, ModelSpec};
use crate::inference::InferenceError;
use crate::units::DType;
use serde_json::Value;

/// More layers than this are taken for damage.
const MAX_LAYERS: usize = 1 << 12;

/// What families call the same thing.
pub struct BaseNames {
    pub family: &'static str,
    /// The field that names the activation.
    pub activation: &'static str,
    /// Reads the rotary embedding of heads of that size.
    pub rope: fn(&ConfigFile, usize) -> Result<RopeSpec, InferenceError>,
}

struct HeadSizes {
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
}

impl ConfigFile {
    /// Builds the spec from the fields that all families share: that of a Llama without biases. Families change what is theirs.
    pub fn base_spec(&self, names: &BaseNames) -> Result<ModelSpec, InferenceError> {
        let hidden_size = self.required_size("hidden_size")?;
        let HeadSizes { n_heads, n_kv_heads, head_dim } = self.head_sizes(hidden_size)?;
        let n_layers = self.required_size("num_hidden_layers")?;
        if n_layers > MAX_LAYERS {
            return Err(self.error(format!("num_hidden_layers {n_layers} is more than {MAX_LAYERS}")));
        }
        let rope = (names.rope)(self, head_dim)?;
        let norm_eps = self.number("rms_norm_eps")?.unwrap_or(1e-6);
        if norm_eps < 0.0 {
            return Err(self.error(format!("rms_norm_eps: expected a number of at least 0, found {norm_eps}")));
        }
        let vocab_size = self.required_size("vocab_size")?;
        Ok(ModelSpec {
            family: names.family,
            n_layers,
            hidden_size,
            n_heads,
            n_kv_heads,
            head_dim,
            ffn_size: self.required_size("intermediate_size")?,
            vocab_size,
            n_ctx_max: self.n_ctx_max(&rope.scaling)?,
            tied_embeddings: self.flag("tie_word_embeddings", false)?,
            bos_token_id: self.bos_token_id(vocab_size)?,
            embedding_scale: 1.0,
            logit_softcap: None,
            block: BlockSpec {
                biases: LinearBiases::default(),
                fused_qkv: false,
                fused_gate_up: false,
                activation: self.activation(names.activation)?,
                norm_eps,
                norm_unit_offset: false,
                in_norms: true,
                out_norms: false,
                qk_norm: None,
                attn_scale: 1.0 / (head_dim as f64).sqrt(),
                attn_softcap: None,
            },
            attentions: vec![AttentionSpec { window: None, rope: Some(rope) }],
            layer_attentions: vec![0; n_layers],
        })
    }

    fn head_sizes(&self, hidden_size: usize) -> Result<HeadSizes, InferenceError> {
        let n_heads = self.required_size("num_attention_heads")?;
        let n_kv_heads = self.size("num_key_value_heads")?.unwrap_or(n_heads);
        if !n_heads.is_multiple_of(n_kv_heads) {
            let source =
                if self.has("num_key_value_heads") { "" } else { ", transformers' default for this model_type" };
            return Err(self.error(format!(
                "num_attention_heads {n_heads} is no multiple of num_key_value_heads {n_kv_heads}{source}"
            )));
        }
        let head_dim = match self.size("head_dim")? {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(n_heads) => hidden_size / n_heads,
            None => {
                return Err(
                    self.error(format!("hidden_size {hidden_size} is no multiple of num_attention_heads {n_heads}"))
                );
            }
        };
        if n_heads.saturating_mul(head_dim) > MAX_DIM {
            return Err(self.error(format!("{n_heads} heads of {head_dim} are wider than {MAX_DIM}")));
        }
        Ok(HeadSizes { n_heads, n_kv_heads, head_dim })
    }

    /// Returns the longest context. Llama's configs keep the original length in `max_position_embeddings` where they scale
    /// linearly or dynamically, and Qwen's where they use YaRN: the factor stretches it.
    fn n_ctx_max(&self, scaling: &RopeScaling) -> Result<usize, InferenceError> {
        let stated = self.required_size("max_position_embeddings")?;
        let stretched = match scaling {
            RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor, .. } => stated as f64 * factor,
            RopeScaling::Yarn { factor, original_max_position, .. } => factor * original_max_position,
            RopeScaling::None
            | RopeScaling::Divided { .. }
            | RopeScaling::Llama3 { .. }
            | RopeScaling::LongRope { .. } => stated as f64,
        };
        Ok((stretched.min(MAX_DIM as f64) as usize).max(stated))
    }

    /// Returns a soft cap: a number above 0, or `None` if it is missing or null.
    pub fn softcap(&self, field: &str) -> Result<Option<f64>, InferenceError> {
        match self.present(field).map(|value| self.finite(field, value)).transpose()? {
            Some(cap) if cap <= 0.0 => {
                Err(self.error(format!("{}: expected a number above 0, found {cap}", self.path_of(field))))
            }
            cap => Ok(cap),
        }
    }

    /// Returns the element type that the checkpoint was saved in, where the config says it: `dtype`, or else `torch_dtype`.
    pub fn saved_dtype(&self) -> Option<DType> {
        let (new, old) = (self.peek("dtype"), self.peek("torch_dtype"));
        if let (Some(new), Some(old)) = (new.filter(|new| !new.is_null()), old) {
            self.overrule("torch_dtype", old, "dtype", new);
        }
        let named = new.filter(|new| !new.is_null()).or(old)?;
        DType::parse(named.as_str()?.trim_start_matches("torch."))
    }

    /// Notes whether `quantization_config` says how the weights are stored.
    pub fn note_quantization(&self, is_used: bool) {
        let field = "quantization_config";
        if self.peek(field).is_some_and(|config| !config.is_null()) {
            self.mark(field, if is_used { Mark::Used } else { Mark::Ignored });
        }
    }

    /// Returns the activation that a field names: `hidden_act`, or `hidden_activation` in Gemma's configs.
    pub fn activation(&self, field: &'static str) -> Result<Activation, InferenceError> {
        match self.get(field).unwrap_or(&Value::from("silu")) {
            Value::String(name) => match name.as_str() {
                "silu" | "swish" => Ok(Activation::Silu),
                "gelu_pytorch_tanh" | "gelu_python_tanh" | "gelu_new" | "gelu_fast" | "gelu_accurate" => {
                    Ok(Activation::GeluTanh)
                }
                "gelu" | "gelu_python" => Ok(Activation::Gelu),
                other => Err(self.error(format!(
                    "{} {other:?} is not known; labpipe knows silu, gelu and gelu_pytorch_tanh",
                    self.path_of(field)
                ))),
            },
            other => Err(self.wrong_type(field, "the name of an activation", other)),
        }
    }

    /// Returns for each layer whether its attention slides: `layer_types`, or what `is_sliding` says of the layer's index.
    pub fn sliding_layers(
        &self,
        n_layers: usize,
        is_sliding: impl Fn(usize) -> bool,
    ) -> Result<Vec<bool>, InferenceError> {
        let Some(types) = self.present("layer_types") else {
            return Ok((0..n_layers).map(is_sliding).collect());
        };
        let path = self.path_of("layer_types");
        let types =
            types.as_array().ok_or_else(|| self.error(format!("{path}: expected a list, found {}", shown(types))))?;
        if types.len() != n_layers {
            return Err(self.error(format!("{path} has {} entries for {n_layers} layers", types.len())));
        }
        let is_sliding = |kind: &Value| match kind.as_str() {
            // transformers renames the short form.
            Some("full_attention" | "attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => {
                let expected = "expected full_attention or sliding_attention";
                Err(self.error(format!("{path}: {expected}, found {}", shown(kind))))
            }
        };
        types.iter().map(is_sliding).collect()
    }

    /// Notes that `layer_types` changes nothing in a family whose layers all see everything, where it says just that.
    pub fn note_full_layers(&self) {
        let is_full = |kind: &Value| matches!(kind.as_str(), Some("full_attention" | "attention"));
        if self.peek("layer_types").and_then(Value::as_array).is_some_and(|types| types.iter().all(is_full)) {
            self.mark(&self.path_of("layer_types"), Mark::Harmless);
        }
    }

    /// Returns the window of the layers that slide.
    ///
    /// # Errors
    /// `File` where layers slide and there is no window: transformers can't run such a model either.
    pub fn window(&self, sliding: &[bool]) -> Result<Option<usize>, InferenceError> {
        let window = self.size("sliding_window")?;
        if window.is_none() && sliding.contains(&true) {
            let path = self.path_of("sliding_window");
            return Err(self.error(format!("{path} is null, and some layers are of the type sliding_attention")));
        }
        Ok(window)
    }

    /// Returns the id of the token that begins a text. One beyond the vocabulary is none, with a warning, as in transformers.
    fn bos_token_id(&self, vocab_size: usize) -> Result<Option<u32>, InferenceError> {
        let Some(value) = self.present("bos_token_id") else { return Ok(None) };
        let path = self.path_of("bos_token_id");
        let id = value
            .as_i64()
            .ok_or_else(|| self.error(format!("{path}: expected the id of a token, found {}", shown(value))))?;
        let known = u32::try_from(id).ok().filter(|id| (*id as usize) < vocab_size);
        if known.is_none() {
            self.mark(&path, Mark::Ignored);
            self.warn(format!("{path} {id} is no token: the vocabulary has {vocab_size}"));
        }
        Ok(known)
    }
}
