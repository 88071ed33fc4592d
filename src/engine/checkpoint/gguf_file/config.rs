//! The `config.json` that a file's metadata stands for: sizes, norms and embedding. What it has no field for is written into the
//! spec afterwards (see `spec.rs`).

use super::metadata::as_written;
use super::tensors::GgufCheckpoint;
use crate::gguf::MetaValue;
use crate::inference::InferenceError;
use serde_json::{Map, Value, json};

/// What llama.cpp takes where `rope.freq_base` is missing.
pub(super) const DEFAULT_THETA: f64 = 10_000.0;

impl GgufCheckpoint {
    /// Returns the `config.json` that the metadata stands for, without rotary scaling, windows and biases.
    ///
    /// # Errors
    /// `File` where a key is missing, of the wrong type, or asks for what labpipe does not compute.
    pub fn config(&self) -> Result<Value, InferenceError> {
        let n_heads = self.required("attention.head_count")?;
        let hidden_size = self.required("embedding_length")?;
        let mut config = Map::new();
        config.insert("model_type".to_owned(), self.architecture.model_type.into());
        for (field, value) in [
            ("hidden_size", hidden_size),
            ("intermediate_size", self.required("feed_forward_length")?),
            ("num_hidden_layers", self.required("block_count")?),
            ("num_attention_heads", n_heads),
            ("num_key_value_heads", self.whole("attention.head_count_kv")?.unwrap_or(n_heads)),
            ("max_position_embeddings", self.required("context_length")?),
            ("head_dim", self.head_dim()?),
        ] {
            config.insert(field.to_owned(), value.into());
        }
        let eps = "attention.layer_norm_rms_epsilon";
        let eps = self.number(eps)?.ok_or_else(|| self.wrong(eps, "it is missing"))?;
        config.insert("rms_norm_eps".to_owned(), json!(as_written(eps)));
        let theta = self.number("rope.freq_base")?.unwrap_or(DEFAULT_THETA);
        config.insert("rope_theta".to_owned(), json!(as_written(theta)));
        for field in ["hidden_act", "hidden_activation"] {
            config.insert(field.to_owned(), self.architecture.activation.into());
        }
        let embedding = self.file.tensor("token_embd.weight").map(|tensor| tensor.shape[0]);
        if let Some(vocab_size) = embedding.or(self.whole("vocab_size")?) {
            config.insert("vocab_size".to_owned(), vocab_size.into());
        }
        config.insert("tie_word_embeddings".to_owned(), self.file.tensor("output.weight").is_none().into());
        if let Some(bos) = self.file.get("tokenizer.ggml.bos_token_id").and_then(MetaValue::as_u64) {
            config.insert("bos_token_id".to_owned(), bos.into());
        }
        Ok(Value::Object(config))
    }

    /// Returns the size of a head: keys and values, and layers of all kinds, have the same.
    fn head_dim(&self) -> Result<usize, InferenceError> {
        let (hidden_size, n_heads) = (self.required("embedding_length")?, self.required("attention.head_count")?);
        let head_dim = self.whole("attention.key_length")?.unwrap_or(hidden_size / n_heads.max(1));
        for name in ["attention.value_length", "attention.key_length_swa", "attention.value_length_swa"] {
            if let Some(found) = self.whole(name)?.filter(|found| *found != head_dim) {
                let reason =
                    format!("it is {found} and keys have {head_dim}; heads of several sizes are not supported");
                return Err(self.wrong(name, reason));
            }
        }
        Ok(head_dim)
    }
}
