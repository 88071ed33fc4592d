//! A GGUF file as a checkpoint: tensors under Hugging Face's names, in Hugging Face's order of rows, and the `config.json` that
//! its metadata stands for.
//!
//! Block-quantized tensors are decoded to f32 when they are asked for, which is exact; plain floats are read in place.

use super::StoredTensor;
use crate::event::Progress;
use crate::gguf::{GgufError, GgufFile, GgufTensor, MetaValue};
use crate::inference::InferenceError;
use crate::units::DType;
use labpipe_kernels::weight::SharedBytes;
use serde_json::{Map, Value, json};
use std::path::Path;

/// How files of one architecture differ from the checkpoints that they were made from.
#[derive(Debug)]
struct Architecture {
    /// `general.architecture`, and `model_type` in config.json.
    name: &'static str,
    /// Rows of the query and key projections are in the order that rotates neighbouring pairs; Hugging Face's rotates halves.
    has_interleaved_rope: bool,
}

static ARCHITECTURES: &[Architecture] = &[
    Architecture { name: "llama", has_interleaved_rope: true },
    Architecture { name: "qwen2", has_interleaved_rope: false },
];

/// Hugging Face's name of a tensor of a block, and GGUF's.
static BLOCK_NAMES: &[(&str, &str)] = &[
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// Divides the rotary frequencies one by one: how files hold Llama 3.1's scaling.
const ROPE_DIVISORS: &str = "rope_freqs.weight";

/// A GGUF file that holds a model.
#[derive(Debug)]
pub struct GgufCheckpoint {
    file: GgufFile,
    architecture: &'static Architecture,
    n_heads: usize,
    n_kv_heads: usize,
}

impl From<GgufError> for InferenceError {
    fn from(error: GgufError) -> InferenceError {
        match error {
            GgufError::File { path, reason } => InferenceError::File { path, reason },
            GgufError::Metadata { path, key, reason } => {
                InferenceError::File { path, reason: format!("metadata {key}: {reason}") }
            }
            GgufError::Tensor { path, tensor, reason } => {
                InferenceError::File { path, reason: format!("tensor {tensor}: {reason}") }
            }
            other => InferenceError::Unsupported(other.to_string()),
        }
    }
}

impl GgufCheckpoint {
    /// Maps the file and checks its header.
    ///
    /// # Errors
    /// `File` where the file is damaged or in parts, `UnknownArchitecture`.
    pub fn open(path: &Path) -> Result<GgufCheckpoint, InferenceError> {
        let file = GgufFile::open(path)?;
        let found = file.text("general.architecture").unwrap_or_default();
        let architecture = ARCHITECTURES.iter().find(|architecture| architecture.name == found).ok_or_else(|| {
            let known = ARCHITECTURES.iter().map(|architecture| architecture.name).collect::<Vec<_>>().join(", ");
            InferenceError::UnknownArchitecture { path: path.to_owned(), found: found.to_owned(), known }
        })?;
        if file.get("split.count").and_then(MetaValue::as_u64).is_some_and(|n| n > 1) {
            return Err(file.metadata_error("split.count", "it is one part of several; merge them first").into());
        }
        let mut checkpoint = GgufCheckpoint { file, architecture, n_heads: 1, n_kv_heads: 1 };
        checkpoint.n_heads = checkpoint.whole("attention.head_count")?.unwrap_or(1);
        checkpoint.n_kv_heads = checkpoint.whole("attention.head_count_kv")?.unwrap_or(checkpoint.n_heads);
        Ok(checkpoint)
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture.name)
    }

    /// Returns a whole number of the architecture's metadata; an array of equal ones (one a layer) counts as one.
    fn whole(&self, name: &str) -> Result<Option<usize>, InferenceError> {
        let key = self.key(name);
        let value = match self.file.get(&key) {
            None => return Ok(None),
            Some(MetaValue::Array(_)) => {
                let values = self.file.numbers(&key)?.unwrap_or_default();
                match values.split_first() {
                    Some((first, rest)) if rest.iter().all(|value| value == first) => first.clone(),
                    _ => return Err(self.file.metadata_error(&key, "layers that differ are not supported").into()),
                }
            }
            Some(value) => value.clone(),
        };
        let whole = value.as_u64().and_then(|value| usize::try_from(value).ok());
        whole.map(Some).ok_or_else(|| self.file.metadata_error(&key, "expected a whole number").into())
    }

    fn number(&self, name: &str) -> Result<Option<f64>, InferenceError> {
        let key = self.key(name);
        let error = || self.file.metadata_error(&key, "expected a finite number").into();
        self.file.get(&key).map(|value| value.as_f64().filter(|n| n.is_finite()).ok_or_else(error)).transpose()
    }

    /// Returns the `config.json` that the metadata stands for: what a family reads.
    ///
    /// # Errors
    /// `File` where something is of the wrong type or asks for what labpipe doesn't have.
    pub fn config(&self) -> Result<Value, InferenceError> {
        if self.whole("expert_count")?.is_some_and(|n| n > 0) {
            return Err(self
                .file
                .metadata_error(&self.key("expert_count"), "mixtures of experts are not supported")
                .into());
        }
        let mut config = Map::new();
        config.insert("model_type".to_owned(), self.architecture.name.into());
        for (field, name) in [
            ("hidden_size", "embedding_length"),
            ("intermediate_size", "feed_forward_length"),
            ("num_hidden_layers", "block_count"),
            ("num_attention_heads", "attention.head_count"),
            ("num_key_value_heads", "attention.head_count_kv"),
            ("max_position_embeddings", "context_length"),
            ("head_dim", "attention.key_length"),
        ] {
            if let Some(value) = self.whole(name)? {
                config.insert(field.to_owned(), value.into());
            }
        }
        for (field, name) in [("rms_norm_eps", "attention.layer_norm_rms_epsilon"), ("rope_theta", "rope.freq_base")] {
            if let Some(value) = self.number(name)? {
                // Metadata has f32: 1e-5 is meant where 9.99999974e-6 stands.
                let short = (value as f32).to_string().parse::<f64>().unwrap_or(value);
                config.insert(field.to_owned(), json!(short));
            }
        }
        let embedding = self.file.tensor("token_embd.weight").map(|tensor| tensor.shape[0]);
        if let Some(vocab_size) = embedding.or(self.whole("vocab_size")?) {
            config.insert("vocab_size".to_owned(), vocab_size.into());
        }
        config.insert("tie_word_embeddings".to_owned(), self.file.tensor("output.weight").is_none().into());
        let has = |name: &str| self.file.tensor(name).is_some();
        config.insert("attention_bias".to_owned(), (has("blk.0.attn_q.bias") && has("blk.0.attn_output.bias")).into());
        config.insert("mlp_bias".to_owned(), has("blk.0.ffn_gate.bias").into());
        if let Some(bos) = self.file.get("tokenizer.ggml.bos_token_id").and_then(MetaValue::as_u64) {
            config.insert("bos_token_id".to_owned(), bos.into());
        }
        if let Some(scaling) = self.rope_scaling()? {
            config.insert("rope_scaling".to_owned(), scaling);
        }
        self.check_rope(&config)?;
        Ok(Value::Object(config))
    }

    fn rope_scaling(&self) -> Result<Option<Value>, InferenceError> {
        let kind = self.file.text(&self.key("rope.scaling.type")).unwrap_or("none").to_owned();
        // Llama 3.1's scaling is in ROPE_DIVISORS.
        if kind == "none" || self.file.tensor(ROPE_DIVISORS).is_some() {
            return Ok(None);
        }
        let mut scaling = Map::new();
        scaling.insert("rope_type".to_owned(), kind.into());
        if let Some(factor) = self.number("rope.scaling.factor")? {
            scaling.insert("factor".to_owned(), json!(factor));
        }
        if let Some(n) = self.whole("rope.scaling.original_context_length")? {
            scaling.insert("original_max_position_embeddings".to_owned(), n.into());
        }
        Ok(Some(Value::Object(scaling)))
    }

    /// Rotary embeddings over part of a head would be computed wrongly.
    fn check_rope(&self, config: &Map<String, Value>) -> Result<(), InferenceError> {
        let size = |field: &str| config.get(field).and_then(Value::as_u64);
        let head_dim =
            size("head_dim").or(size("hidden_size").zip(size("num_attention_heads")).map(|(h, n)| h / n.max(1)));
        let rotated = self.whole("rope.dimension_count")?.map(|n| n as u64);
        match (head_dim, rotated) {
            (Some(head_dim), Some(rotated)) if head_dim != rotated => {
                let reason = format!("{rotated} of {head_dim} dimensions are rotated; only whole heads are supported");
                Err(self.file.metadata_error(&self.key("rope.dimension_count"), reason).into())
            }
            _ => Ok(()),
        }
    }

    /// Returns what each rotary frequency is divided by, where the file says so.
    ///
    /// # Errors
    /// `Tensor` where there are not `rotary_dim / 2` of them.
    pub fn rope_divisors(&self, rotary_dim: usize) -> Result<Option<Vec<f64>>, InferenceError> {
        let Some(tensor) = self.file.tensor(ROPE_DIVISORS) else { return Ok(None) };
        let stored = self.stored(ROPE_DIVISORS, tensor, &[rotary_dim / 2], None)?;
        let values = super::to_f32(stored.dtype, stored.bytes.as_slice());
        match values.iter().find(|value| !value.is_finite() || **value <= 0.0) {
            None => Ok(Some(values.into_iter().map(f64::from).collect())),
            Some(value) => {
                let expected = "positive numbers".to_owned();
                Err(self.error(ROPE_DIVISORS, expected, value.to_string()))
            }
        }
    }

    fn error(&self, name: &str, expected: String, found: String) -> InferenceError {
        InferenceError::Tensor { path: self.file.path().to_owned(), tensor: name.to_owned(), expected, found }
    }

    /// Returns true where no tensor is block-quantized, so that none has to be decoded.
    pub fn is_mapped(&self) -> bool {
        self.file.tensors().all(|(_, tensor)| tensor.ty.dtype.is_some())
    }

    /// Returns the element type that a tensor is handed out in.
    pub fn dtype_of(&self, name: &str) -> Option<DType> {
        let tensor = self.file.tensor(&gguf_name(name)?)?;
        Some(tensor.ty.dtype.unwrap_or(DType::F32))
    }

    /// Returns the tensor under Hugging Face's name if it has that shape and can be read.
    ///
    /// # Errors
    /// `Tensor` otherwise.
    pub fn checked(&self, name: &str, shape: &[usize]) -> Result<&GgufTensor, InferenceError> {
        let found = gguf_name(name);
        let tensor = found.as_ref().and_then(|found| self.file.tensor(found));
        match tensor {
            None => {
                let found = found.map_or("no name for it".to_owned(), |found| format!("no tensor {found}"));
                Err(self.error(name, format!("shape {shape:?}"), found))
            }
            Some(tensor) => self.check_shape(name, tensor, shape).map(|()| tensor),
        }
    }

    fn check_shape(&self, name: &str, tensor: &GgufTensor, shape: &[usize]) -> Result<(), InferenceError> {
        if tensor.shape != shape {
            return Err(self.error(name, format!("shape {shape:?}"), format!("shape {:?}", tensor.shape)));
        }
        if !tensor.ty.is_readable() {
            let readable = crate::gguf::GgmlType::readable_names();
            return Err(self.error(name, format!("one of the types {readable}"), tensor.ty.name.to_owned()));
        }
        Ok(())
    }

    /// Returns a tensor under Hugging Face's name, rows in Hugging Face's order.
    ///
    /// # Errors
    /// `Tensor` where it is missing, shaped otherwise or of a type that can't be read.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<StoredTensor, InferenceError> {
        let tensor = self.checked(name, shape)?;
        let is = |part: &str| name.contains(part);
        let n_heads = match self.architecture.has_interleaved_rope {
            true if is("self_attn.q_proj") => Some(self.n_heads),
            true if is("self_attn.k_proj") => Some(self.n_kv_heads),
            _ => None,
        };
        self.stored(name, tensor, shape, n_heads)
    }

    /// Checks that all tensors that can be read hold finite values; places are those of the file's own order of rows.
    ///
    /// # Errors
    /// `NotFinite`; `File` where one could not be read; `Cancelled`.
    pub fn check_values(&self, progress: &dyn Progress) -> Result<(), InferenceError> {
        progress.begin(Some(self.file.tensors().count() as u64), "tensors");
        for (name, tensor) in self.file.tensors() {
            if progress.is_cancelled() {
                return Err(InferenceError::Cancelled);
            }
            let path = self.file.path().to_owned();
            if let Some(dtype) = tensor.ty.dtype {
                let (shape, bytes) = (tensor.shape.clone(), self.file.bytes(tensor));
                StoredTensor { dtype, shape, bytes, path }.check_values(name)?;
            } else if let Some((index, value)) = self.file.first_not_finite(tensor) {
                return Err(InferenceError::NotFinite { path, tensor: name.to_owned(), index, value });
            }
            progress.advance(1);
        }
        Ok(())
    }

    /// Reads a tensor; `n_heads` asks for the rows of each head in the order that rotates halves.
    fn stored(
        &self,
        name: &str,
        tensor: &GgufTensor,
        shape: &[usize],
        n_heads: Option<usize>,
    ) -> Result<StoredTensor, InferenceError> {
        self.check_shape(name, tensor, shape)?;
        let n_rows = shape[0];
        let head_dim = n_heads.map(|n_heads| n_rows / n_heads.max(1));
        if let (Some(head_dim), Some(n_heads)) = (head_dim, n_heads)
            && (head_dim % 2 != 0 || head_dim == 0 || head_dim * n_heads != n_rows)
        {
            return Err(self.error(name, format!("rows of {n_heads} heads of even size"), format!("{n_rows} rows")));
        }
        let path = self.file.path().to_owned();
        let row_of = |row_idx: usize| head_dim.map_or(row_idx, |head_dim| interleaved_row(row_idx, head_dim));
        let bytes = match (tensor.ty.dtype, head_dim) {
            (Some(_), None) => self.file.bytes(tensor),
            (Some(_), Some(_)) => reordered(self.file.bytes(tensor).as_slice(), n_rows, &row_of),
            (None, _) => SharedBytes::from_values(self.file.values(name, tensor, &row_of)?),
        };
        Ok(StoredTensor { dtype: tensor.ty.dtype.unwrap_or(DType::F32), shape: shape.to_vec(), bytes, path })
    }
}

/// Returns the row of a file that rotates neighbouring pairs which is row `row_idx` of one that rotates halves: within a head, rows
/// `i` and `i + head_dim / 2` of the one are `2 i` and `2 i + 1` of the other.
fn interleaved_row(row_idx: usize, head_dim: usize) -> usize {
    let (head_idx, within, half) = (row_idx / head_dim, row_idx % head_dim, head_dim / 2);
    head_idx * head_dim + 2 * (within % half) + within / half
}

fn reordered(bytes: &[u8], n_rows: usize, row_of: &dyn Fn(usize) -> usize) -> SharedBytes {
    let row_bytes = bytes.len() / n_rows.max(1);
    let rows = (0..n_rows).flat_map(|row_idx| &bytes[row_of(row_idx) * row_bytes..][..row_bytes]);
    SharedBytes::from_values(rows.copied().collect::<Vec<u8>>())
}

/// Returns GGUF's name for a tensor of Hugging Face's name.
fn gguf_name(name: &str) -> Option<String> {
    match name {
        "model.embed_tokens.weight" => return Some("token_embd.weight".to_owned()),
        "model.norm.weight" => return Some("output_norm.weight".to_owned()),
        "lm_head.weight" => return Some("output.weight".to_owned()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    let (_, gguf) = BLOCK_NAMES.iter().find(|(hf, _)| *hf == module)?;
    Some(format!("blk.{layer}.{gguf}.{kind}"))
}

/// Returns true where a model's path is that of a GGUF file.
pub fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "gguf")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_head_are_taken_from_pairs_to_halves() {
        let rows: Vec<usize> = (0..8).map(|row_idx| interleaved_row(row_idx, 8)).collect();
        assert_eq!(rows, [0, 2, 4, 6, 1, 3, 5, 7]);
        assert_eq!(interleaved_row(8 + 5, 8), 8 + 3);
    }

    #[test]
    fn names_are_translated() {
        let name = "model.layers.12.post_attention_layernorm.weight";
        assert_eq!(gguf_name(name).as_deref(), Some("blk.12.ffn_norm.weight"));
        assert_eq!(gguf_name("model.layers.0.self_attn.q_proj.bias").as_deref(), Some("blk.0.attn_q.bias"));
        assert_eq!(gguf_name("something.else"), None);
    }
}
