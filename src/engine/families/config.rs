//! A config.json with typed, checked access: every error names the file and the field.

use crate::engine::rope::RopeScaling;
use crate::engine::spec::{Activation, AttentionSpec, BlockSpec, LinearBiases, ModelSpec};
use crate::inference::InferenceError;
use crate::units::DType;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Larger dimensions than this are taken for damage: they would ask for absurd allocations.
const MAX_DIM: usize = 1 << 24;
/// More layers than this are taken for damage.
const MAX_LAYERS: usize = 1 << 12;

/// A parsed config.json.
#[derive(Debug, Clone)]
pub struct ConfigFile {
    path: PathBuf,
    root: Value,
}

impl ConfigFile {
    /// Reads and parses the file.
    ///
    /// # Errors
    /// `File` where it is missing or no JSON object.
    pub fn read(path: &Path) -> Result<ConfigFile, InferenceError> {
        let fail = |reason: String| InferenceError::File { path: path.to_owned(), reason };
        let text = std::fs::read_to_string(path).map_err(|error| {
            let hint = "; a model folder in Hugging Face layout has config.json, tokenizer.json and *.safetensors";
            fail(format!("{error}{}", if error.kind() == std::io::ErrorKind::NotFound { hint } else { "" }))
        })?;
        let root: Value = serde_json::from_str(&text).map_err(|error| fail(format!("not valid JSON: {error}")))?;
        if !root.is_object() {
            return Err(fail("expected a JSON object".to_owned()));
        }
        Ok(ConfigFile { path: path.to_owned(), root })
    }

    /// Takes the config that a file of another format stands for.
    pub fn of(path: &Path, root: Value) -> ConfigFile {
        ConfigFile { path: path.to_owned(), root }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the config with values for fields that it leaves out; a field that is null stays so.
    pub fn with_defaults(&self, defaults: &[(&str, Value)]) -> ConfigFile {
        let mut config = self.clone();
        if let Some(fields) = config.root.as_object_mut() {
            for (field, value) in defaults {
                fields.entry(*field).or_insert_with(|| value.clone());
            }
        }
        config
    }

    /// Returns the config that stands in a field of this one.
    pub fn section(&self, field: &str) -> Result<ConfigFile, InferenceError> {
        match self.root.get(field) {
            Some(section) if section.is_object() => Ok(ConfigFile { path: self.path.clone(), root: section.clone() }),
            _ => Err(self.error(format!("{field}: expected a mapping"))),
        }
    }

    /// Returns an error that names this file.
    pub fn error(&self, reason: impl Into<String>) -> InferenceError {
        InferenceError::File { path: self.path.clone(), reason: reason.into() }
    }

    pub fn text(&self, field: &str) -> Option<String> {
        self.root.get(field).and_then(Value::as_str).map(str::to_owned)
    }

    /// Returns the first of `architectures`.
    pub fn architecture(&self) -> Option<String> {
        self.root.get("architectures")?.get(0)?.as_str().map(str::to_owned)
    }

    pub(super) fn present(&self, field: &str) -> Option<&Value> {
        self.root.get(field).filter(|value| !value.is_null())
    }

    /// Returns a true/false field, or nothing where it is absent or null.
    pub fn flag(&self, field: &str) -> Result<Option<bool>, InferenceError> {
        self.present(field)
            .map(|value| {
                value.as_bool().ok_or_else(|| self.error(format!("{field}: expected true or false, found {value}")))
            })
            .transpose()
    }

    /// Returns a finite number.
    pub fn number(&self, field: &str) -> Result<Option<f64>, InferenceError> {
        self.present(field).map(|value| self.finite(field, value)).transpose()
    }

    pub(super) fn finite(&self, field: &str, value: &Value) -> Result<f64, InferenceError> {
        value
            .as_f64()
            .filter(|number| number.is_finite())
            .ok_or_else(|| self.error(format!("{field}: expected a number, found {value}")))
    }

    /// Returns a size of at least 1.
    pub fn size(&self, field: &str) -> Result<Option<usize>, InferenceError> {
        self.present(field)
            .map(|value| {
                value
                    .as_u64()
                    .and_then(|size| usize::try_from(size).ok())
                    .filter(|size| (1..=MAX_DIM).contains(size))
                    .ok_or_else(|| {
                        self.error(format!("{field}: expected a whole number from 1 to {MAX_DIM}, found {value}"))
                    })
            })
            .transpose()
    }

    fn required_size(&self, field: &str) -> Result<usize, InferenceError> {
        self.size(field)?.ok_or_else(|| self.error(format!("{field} is missing")))
    }

    /// Returns a soft cap: a number above 0, or nothing where it is absent or null.
    pub fn softcap(&self, field: &str) -> Result<Option<f64>, InferenceError> {
        match self.number(field)? {
            Some(cap) if cap <= 0.0 => Err(self.error(format!("{field}: expected a number above 0, found {cap}"))),
            cap => Ok(cap),
        }
    }

    /// Returns the element type that the checkpoint was saved in, where the config says it.
    pub fn saved_dtype(&self) -> Option<DType> {
        self.text("torch_dtype").or_else(|| self.text("dtype")).and_then(|name| DType::parse(&name))
    }

    /// Returns `hidden_act` (or `hidden_activation`).
    pub fn activation(&self) -> Result<Activation, InferenceError> {
        let name = self.text("hidden_activation").or_else(|| self.text("hidden_act"));
        match name.as_deref() {
            None | Some("silu" | "swish") => Ok(Activation::Silu),
            Some("gelu_pytorch_tanh" | "gelu_new" | "gelu_fast") => Ok(Activation::GeluTanh),
            Some("gelu") => Ok(Activation::Gelu),
            Some(other) => Err(self
                .error(format!("hidden_act {other:?} is not known; labpipe knows silu, gelu and gelu_pytorch_tanh"))),
        }
    }

    /// Builds the spec from the fields that all families share: that of a Llama without biases. Families change what is theirs.
    pub fn base_spec(&self, family: &'static str) -> Result<ModelSpec, InferenceError> {
        let hidden_size = self.required_size("hidden_size")?;
        let n_heads = self.required_size("num_attention_heads")?;
        let n_kv_heads = self.size("num_key_value_heads")?.unwrap_or(n_heads);
        if n_heads % n_kv_heads != 0 {
            return Err(
                self.error(format!("num_attention_heads {n_heads} is no multiple of num_key_value_heads {n_kv_heads}"))
            );
        }
        let head_dim = match self.size("head_dim")? {
            Some(head_dim) => head_dim,
            None if hidden_size % n_heads == 0 => hidden_size / n_heads,
            None => {
                return Err(
                    self.error(format!("hidden_size {hidden_size} is no multiple of num_attention_heads {n_heads}"))
                );
            }
        };
        let n_layers = self.required_size("num_hidden_layers")?;
        if n_layers > MAX_LAYERS {
            return Err(self.error(format!("num_hidden_layers {n_layers} is more than {MAX_LAYERS}")));
        }
        if n_heads.saturating_mul(head_dim) > MAX_DIM {
            return Err(self.error(format!("{n_heads} heads of {head_dim} are wider than {MAX_DIM}")));
        }
        let rope = self.rope(head_dim)?;
        Ok(ModelSpec {
            family,
            n_layers,
            hidden_size,
            n_heads,
            n_kv_heads,
            head_dim,
            ffn_size: self.required_size("intermediate_size")?,
            vocab_size: self.required_size("vocab_size")?,
            n_ctx_max: self.n_ctx_max(&rope.scaling)?,
            tied_embeddings: self.flag("tie_word_embeddings")?.unwrap_or(false),
            bos_token_id: self.bos_token_id(),
            embedding_scale: 1.0,
            logit_softcap: None,
            block: BlockSpec {
                biases: LinearBiases::default(),
                fused_qkv: false,
                fused_gate_up: false,
                activation: self.activation()?,
                norm_eps: self.number("rms_norm_eps")?.unwrap_or(1e-6),
                norm_unit_offset: false,
                out_norms: false,
                qk_norm: false,
                attn_scale: 1.0 / (head_dim as f64).sqrt(),
                attn_softcap: None,
            },
            attentions: vec![AttentionSpec { window: None, rope }],
            layer_attentions: vec![0; n_layers],
        })
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

    /// Returns for each layer whether its attention slides: `layer_types`, or what `is_sliding` says of the layer's index.
    pub fn sliding_layers(
        &self,
        n_layers: usize,
        is_sliding: impl Fn(usize) -> bool,
    ) -> Result<Vec<bool>, InferenceError> {
        let Some(types) = self.present("layer_types") else {
            return Ok((0..n_layers).map(is_sliding).collect());
        };
        let types = types.as_array().map(Vec::as_slice).unwrap_or_default();
        if types.len() != n_layers {
            return Err(self.error(format!("layer_types has {} entries for {n_layers} layers", types.len())));
        }
        types
            .iter()
            .map(|kind| match kind.as_str() {
                Some("full_attention") => Ok(false),
                Some("sliding_attention") => Ok(true),
                _ => {
                    Err(self.error(format!("layer_types: expected full_attention or sliding_attention, found {kind}")))
                }
            })
            .collect()
    }

    fn bos_token_id(&self) -> Option<u32> {
        self.root.get("bos_token_id").and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::super::spec_of;
    use super::ConfigFile;
    use crate::engine::rope::RopeScaling;
    use crate::engine::spec::LinearBiases;
    use crate::inference::InferenceError;
    use std::path::PathBuf;

    fn read_spec(path: &std::path::Path) -> Result<crate::engine::spec::ModelSpec, InferenceError> {
        spec_of(&ConfigFile::read(path)?)
    }

    fn config(text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("config.json");
        std::fs::write(&path, text).expect("a file in it");
        (dir, path)
    }

    #[test]
    fn llama_3_2_3b_is_read_with_its_rope_scaling() {
        let (_dir, path) = config(
            r#"{"model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
                "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
                "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": true,
                "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "bos_token_id": 128000}"#,
        );
        let spec = read_spec(&path).expect("a spec");
        assert_eq!(spec.n_params(), 3_212_749_824);
        assert!(matches!(spec.attentions[0].rope.scaling, RopeScaling::Llama3 { factor: 32.0, .. }));
    }

    #[test]
    fn qwen2_has_biases_on_query_key_and_value() {
        let (_dir, path) = config(
            r#"{"model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
                "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
                "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": true, "use_sliding_window": false}"#,
        );
        let spec = read_spec(&path).expect("a spec");
        assert_eq!(spec.n_params(), 3_085_938_688);
        assert!(spec.block.biases == LinearBiases::qkv(true));
    }

    #[test]
    fn an_unknown_architecture_is_named_with_those_that_are_known() {
        let (_dir, path) = config(r#"{"model_type": "mamba"}"#);
        let error = read_spec(&path).expect_err("an error");
        assert!(matches!(&error, InferenceError::UnknownArchitecture { found, .. } if found == "mamba"));
        assert!(error.to_string().contains("llama, qwen2"));
    }

    #[test]
    fn absurd_sizes_are_refused_before_anything_is_allocated() {
        let (_dir, path) = config(r#"{"model_type": "llama", "hidden_size": 99999999999, "num_attention_heads": 8}"#);
        assert!(read_spec(&path).expect_err("an error").to_string().contains("hidden_size"));
        let (_dir, path) = config(
            r#"{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 9000000}"#,
        );
        assert!(read_spec(&path).expect_err("an error").to_string().contains("num_hidden_layers"));
    }
}
