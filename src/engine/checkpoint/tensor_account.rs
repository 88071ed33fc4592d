//! Which tensors of a folder a model is made from, and which are left out.

use super::bitsandbytes::{is_packed, side_tensors, stored_size};
use super::safetensors_file::{FolderTensor, SafetensorsFolder, file_name};
use super::tensor_names::is_vision;
use crate::engine::spec::ModelSpec;
use crate::inference::{AccountPart, InferenceError, StoredType};
use safetensors::Dtype;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

pub const EMBEDDING: &str = "model.embed_tokens.weight";
pub const HEAD: &str = "lm_head.weight";

/// Fields of bitsandbytes' `quantization_config` that say how to open a folder.
const QUANTIZATION_USED: [&str; 4] = ["quant_method", "load_in_8bit", "load_in_4bit", "llm_int8_threshold"];

/// Fields that repeat what tensors say themselves (types, tables, which modules are packed), or say where and in what type transformers
/// computes, which is `compute_dtype`'s to say here.
const QUANTIZATION_HARMLESS: [&str; 9] = [
    "_load_in_8bit",
    "_load_in_4bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_quant_storage",
    "bnb_4bit_compute_dtype",
    "llm_int8_skip_modules",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
];

/// Returns the names of the tensors that a model is made from: weights, norms and biases; a packed weight stands for its statistics too.
/// Some may be missing from the folder.
pub fn used_tensors(folder: &SafetensorsFolder, spec: &ModelSpec) -> Vec<String> {
    let is_head_alone = spec.tied_embeddings && folder.raw(EMBEDDING).is_none() && folder.dtype_of(HEAD).is_some();
    let mut names = vec![if is_head_alone { HEAD } else { EMBEDDING }.to_owned(), "model.norm.weight".to_owned()];
    let linears = spec.linears().into_iter().map(|(module, _)| format!("{module}.weight"));
    names.extend(linears.filter(|name| name != HEAD || !spec.tied_embeddings));
    let (norms, linears) = (spec.block_norms(), spec.block_linears());
    for layer_idx in 0..spec.n_layers {
        names.extend(norms.iter().map(|norm| format!("model.layers.{layer_idx}.{}.weight", norm.name)));
        let biased = linears.iter().filter(|linear| linear.bias);
        names.extend(biased.map(|linear| format!("model.layers.{layer_idx}.{}.bias", linear.name)));
    }
    names
}

/// Returns what of a folder's tensors, and of its `quantization_config`, was used, and the element types of what was.
///
/// # Errors
/// `Tensor` where a packed weight's parts do not fit.
pub fn folder_parts(
    folder: &SafetensorsFolder,
    spec: &ModelSpec,
) -> Result<(Vec<AccountPart>, Vec<StoredType>), InferenceError> {
    let names = used_tensors(folder, spec);
    let mut used: BTreeSet<String> = names.iter().cloned().collect();
    let mut n_packed = 0;
    for name in names.iter().filter(|name| is_packed(folder, name)) {
        used.extend(side_tensors(folder, name));
        n_packed += 1;
    }
    let mut part = AccountPart { source: "tensors".to_owned(), ..AccountPart::default() };
    let mut left = LeftOut::default();
    for (name, tensor) in folder.entries() {
        if used.contains(name) {
            part.n_used += 1;
        } else if folder.is_inner() && is_vision(name) {
            left.n_vision += 1;
        } else if is_harmless(name, tensor) || name == HEAD && tensor.float_dtype().is_some() {
            // A head that is not used is one that equals the embedding it is tied to.
            part.n_harmless += 1;
        } else {
            left.note(name, spec.n_layers);
            part.unused.push(file_name(name, tensor).to_owned());
        }
    }
    part.n_harmless += left.n_vision;
    part.unused.sort();
    part.warnings = folder.warnings().to_vec();
    part.warnings.extend(left.warnings(spec.n_layers));
    let mut parts = vec![part];
    parts.extend(quantization_part(folder.quantization_config(), n_packed));
    Ok((parts, element_types(folder, spec, &names)?))
}

/// Returns true for buffers that old versions of transformers saved and every version computes anew.
fn is_harmless(name: &str, tensor: &FolderTensor) -> bool {
    let buffers = ["rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", ".masked_bias"];
    let is_mask = matches!(tensor.dtype, Dtype::BOOL | Dtype::U8)
        && (name.ends_with("attn.bias") || name.ends_with("attention.bias"));
    buffers.iter().any(|buffer| name.ends_with(buffer)) || is_mask || name.ends_with("position_ids")
}

/// What kinds of tensors are left out, for a sentence each.
#[derive(Default)]
struct LeftOut {
    n_vision: usize,
    n_biases: usize,
    n_lora: usize,
    /// The first and the last layer that the config does not count.
    layers: Option<(usize, usize)>,
}

impl LeftOut {
    fn note(&mut self, name: &str, n_layers: usize) {
        let layer_idx = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
        if let Some(layer_idx) = layer_idx.filter(|layer_idx| *layer_idx >= n_layers) {
            let (first, last) = self.layers.unwrap_or((layer_idx, layer_idx));
            self.layers = Some((first.min(layer_idx), last.max(layer_idx)));
        } else if name.contains(".lora_") {
            self.n_lora += 1;
        } else if name.ends_with(".bias") {
            self.n_biases += 1;
        }
    }

    fn warnings(&self, n_layers: usize) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.n_biases > 0 {
            warnings.push(format!(
                "{} biases of the files are left out, as in transformers: the config asks for none there (attention_bias, mlp_bias)",
                self.n_biases
            ));
        }
        if let Some((first, last)) = self.layers {
            warnings.push(format!(
                "layers {first} to {last} of the files are left out, as in transformers: num_hidden_layers is {n_layers}"
            ));
        }
        if self.n_lora > 0 {
            let how = "merge it (peft: merge_and_unload, save_pretrained) to use it";
            warnings.push(format!("{} tensors of a LoRA adapter are not applied; {how}", self.n_lora));
        }
        if self.n_vision > 0 {
            warnings.push(format!(
                "{} tensors of the vision model are not used: labpipe runs the text model",
                self.n_vision
            ));
        }
        warnings
    }
}

/// Returns the account of `quantization_config`; `None` where the config has none.
fn quantization_part(config: &Value, n_packed: usize) -> Option<AccountPart> {
    let fields = config.as_object().filter(|fields| !fields.is_empty())?;
    let mut part = AccountPart { source: "quantization_config".to_owned(), ..AccountPart::default() };
    for field in fields.keys().map(String::as_str) {
        if QUANTIZATION_USED.contains(&field) {
            part.n_used += 1;
        } else if QUANTIZATION_HARMLESS.contains(&field) {
            part.n_harmless += 1;
        } else {
            part.unused.push(field.to_owned());
        }
    }
    if n_packed == 0 {
        let text =
            "config.json declares bitsandbytes, but no linear is stored quantized: weights are used as they are stored";
        part.warnings.push(text.to_owned());
    }
    if config["llm_int8_has_fp16_weight"].as_bool() == Some(true) {
        let text = "llm_int8_has_fp16_weight has no effect: the stored 8-bit weights are used";
        part.warnings.push(text.to_owned());
    }
    Some(part)
}

/// Adds up the weights of each element type, largest share of bytes first.
fn element_types(
    folder: &SafetensorsFolder,
    spec: &ModelSpec,
    names: &[String],
) -> Result<Vec<StoredType>, InferenceError> {
    let shapes: BTreeMap<String, [usize; 2]> =
        spec.linears().into_iter().map(|(module, shape)| (format!("{module}.weight"), shape)).collect();
    let mut types: BTreeMap<String, StoredType> = BTreeMap::new();
    for name in names {
        let Some(tensor) = folder.raw(name) else { continue };
        let (stored, n_params, bytes) = match shapes.get(name).filter(|_| is_packed(folder, name)) {
            Some(shape) => {
                let (scheme, bytes) = stored_size(folder, name, shape)?;
                (format!("bitsandbytes {}", scheme.scheme), (shape[0] * shape[1]) as u64, bytes)
            }
            None => {
                let n_params = tensor.shape.iter().map(|size| *size as u64).product();
                (format!("{:?}", tensor.dtype), n_params, tensor.bytes.len() as u64)
            }
        };
        let empty = StoredType { name: stored.clone(), n_tensors: 0, n_params: 0, bytes: 0 };
        let total = types.entry(stored).or_insert(empty);
        total.n_tensors += 1;
        total.n_params += n_params;
        total.bytes += bytes;
    }
    let mut types: Vec<StoredType> = types.into_values().collect();
    types.sort_by_key(|stored| std::cmp::Reverse(stored.bytes));
    Ok(types)
}
