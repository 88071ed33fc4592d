//! A config.json with typed, checked access: every error names the file and the field.

use crate::engine::spec::{Activation, BlockSpec, ModelSpec, RopeScaling, RopeSpec};
use crate::inference::InferenceError;
use crate::units::DType;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Larger dimensions than this are taken for damage: they would ask for absurd allocations.
const MAX_DIM: usize = 1 << 24;
/// More layers than this are taken for damage: every one is described by name.
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

    fn present(&self, field: &str) -> Option<&Value> {
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

    fn finite(&self, field: &str, value: &Value) -> Result<f64, InferenceError> {
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

    /// Returns the rotary embedding, from `rope_theta` and `rope_scaling` or from `rope_parameters` (transformers 5).
    pub fn rope(&self, default_theta: f64) -> Result<RopeSpec, InferenceError> {
        let parameters = self.present("rope_parameters");
        let theta = match parameters.and_then(|p| p.get("rope_theta")) {
            Some(value) => self.finite("rope_parameters.rope_theta", value)?,
            None => self.number("rope_theta")?.unwrap_or(default_theta),
        };
        let scaling = match parameters.or_else(|| self.present("rope_scaling")) {
            None => RopeScaling::None,
            Some(scaling) => self.rope_scaling(scaling)?,
        };
        Ok(RopeSpec { theta, scaling })
    }

    fn rope_scaling(&self, scaling: &Value) -> Result<RopeScaling, InferenceError> {
        let kind =
            scaling.get("rope_type").or_else(|| scaling.get("type")).and_then(Value::as_str).unwrap_or("default");
        let field = |name: &str| {
            let value =
                scaling.get(name).ok_or_else(|| self.error(format!("rope scaling {kind}: {name} is missing")))?;
            self.finite(name, value)
        };
        match kind {
            "default" => Ok(RopeScaling::None),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: field("factor")?,
                low_freq_factor: field("low_freq_factor")?,
                high_freq_factor: field("high_freq_factor")?,
                original_max_position: field("original_max_position_embeddings")?,
            }),
            other => {
                Err(self
                    .error(format!("rope scaling {other:?} is not supported yet; labpipe knows default and llama3")))
            }
        }
    }

    /// Builds the spec from the fields that all families share.
    pub fn model_spec(&self, family: &'static str, block: BlockSpec) -> Result<ModelSpec, InferenceError> {
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
        if head_dim % 2 != 0 {
            return Err(self.error(format!("head_dim {head_dim} is odd; rotary embeddings need pairs")));
        }
        let n_layers = self.required_size("num_hidden_layers")?;
        if n_layers > MAX_LAYERS {
            return Err(self.error(format!("num_hidden_layers: {n_layers} is more than {MAX_LAYERS}")));
        }
        Ok(ModelSpec {
            family,
            n_layers,
            hidden_size,
            n_heads,
            n_kv_heads,
            head_dim,
            ffn_size: self.required_size("intermediate_size")?,
            vocab_size: self.required_size("vocab_size")?,
            n_ctx_max: self.required_size("max_position_embeddings")?,
            tied_embeddings: self.flag("tie_word_embeddings")?.unwrap_or(false),
            bos_token_id: self.bos_token_id(),
            block,
        })
    }

    fn bos_token_id(&self) -> Option<u32> {
        self.root.get("bos_token_id").and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::super::spec_of;
    use super::ConfigFile;
    use crate::engine::spec::RopeScaling;
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
        assert!(matches!(spec.block.rope.scaling, RopeScaling::Llama3 { factor: 32.0, .. }));
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
        assert!(spec.block.qkv_bias && !spec.block.o_bias);
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
    }
}
