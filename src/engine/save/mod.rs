//! Writes a quantized model as a folder in Hugging Face layout that transformers and bitsandbytes 0.50 open as pre-quantized.
//!
//! Tensors are quantized and written one module at a time, so that memory is bounded by the largest.

mod packed;
mod tensor_file;

use super::checkpoint::{Checkpoint, SafetensorsFolder};
use super::weights::{WeightReader, compute_dtype, pack};
use crate::event::Progress;
use crate::inference::{InferenceError, SavedModel};
use crate::json_file::parse_json;
use crate::units::DType;
use labpipe_kernels::SchemeSpec;
use labpipe_kernels::weight::HostWeight;
use packed::{dtype_name, packed_entries, packed_tensors, quantization_config};
use safetensors::Dtype;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use tensor_file::{Entry, TensorFile};

/// Files beside weights and config that belong to a model, besides `tokenizer*`.
const SIDE_FILES: [&str; 7] = [
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];

/// A linear that is written quantized.
struct Module<'a> {
    name: &'a str,
    shape: [usize; 2],
    scheme: &'a SchemeSpec,
}

/// Writes the model of a reader into a new folder.
///
/// # Errors
/// `Unsupported` where the source is no folder or a scheme has no place in bitsandbytes' format; `Write`; whatever is wrong with a
/// tensor.
pub fn save_model(
    reader: &WeightReader<'_>,
    dir: &Path,
    progress: &dyn Progress,
) -> Result<SavedModel, InferenceError> {
    let (source, folder) = source_folder(reader)?;
    let linears = reader.spec.linears();
    let modules = quantized_modules(reader, &linears);
    let Some(first) = modules.first() else {
        return Err(unsupported("its config quantizes nothing"));
    };
    modules.iter().try_for_each(|module| writable(module, first.scheme))?;
    let kept: Vec<&str> = linears
        .iter()
        .map(|(name, _)| name.as_str())
        .filter(|name| !modules.iter().any(|module| module.name == *name))
        .collect();
    std::fs::create_dir_all(dir).map_err(|error| write_error(dir, &error))?;
    let bytes = write_tensors(reader, folder, &modules, &dir.join("model.safetensors"), progress)?;
    let quantization = quantization_config(first.scheme, compute_dtype(reader.recipe), &kept);
    write_config(&source, dir, reader, quantization)?;
    copy_side_files(&source, dir)?;
    Ok(SavedModel { format: "bitsandbytes".to_owned(), bytes, n_quantized: modules.len() })
}

fn unsupported(reason: &str) -> InferenceError {
    InferenceError::Unsupported(format!("save as a bitsandbytes folder: {reason}"))
}

fn write_error(path: &Path, error: &dyn std::fmt::Display) -> InferenceError {
    InferenceError::Write { path: path.to_owned(), reason: error.to_string() }
}

fn source_folder<'a>(reader: &WeightReader<'a>) -> Result<(PathBuf, &'a SafetensorsFolder), InferenceError> {
    match reader.checkpoint {
        Checkpoint::Folder(folder) if folder.is_inner() => Err(unsupported("the model is part of a larger one")),
        Checkpoint::Folder(folder) => Ok((folder.dir().to_owned(), folder)),
        _ => Err(unsupported("only a model that was loaded from a folder of safetensors can be saved")),
    }
}

fn quantized_modules<'a>(reader: &'a WeightReader<'_>, linears: &'a [(String, [usize; 2])]) -> Vec<Module<'a>> {
    let config = reader.recipe.quantization.as_ref();
    linears
        .iter()
        .filter(|(name, _)| !(name == "lm_head" && reader.spec.tied_embeddings))
        .filter_map(|(name, shape)| Some(Module { name, shape: *shape, scheme: config?.scheme_for(name)? }))
        .collect()
}

/// Checks that a module's scheme can stand in one folder with the first module's.
fn writable(module: &Module<'_>, first: &SchemeSpec) -> Result<(), InferenceError> {
    let is_4bit = |spec: &SchemeSpec| ["nf4", "fp4"].contains(&spec.scheme.as_str());
    let name = module.scheme.scheme.as_str();
    if !is_4bit(module.scheme) && name != "int8" {
        return Err(unsupported(&format!("{} is {name}; the format has nf4, fp4 and int8", module.name)));
    }
    if is_4bit(module.scheme) != is_4bit(first) || (name == "int8" && module.scheme != first) {
        let reason = format!(
            "{} is {name}, other modules are {}; a folder is all 4-bit, or all int8 alike",
            module.name, first.scheme
        );
        return Err(unsupported(&format!("{reason}; use keep instead of an override")));
    }
    Ok(())
}

fn write_tensors(
    reader: &WeightReader<'_>,
    folder: &SafetensorsFolder,
    modules: &[Module<'_>],
    path: &Path,
    progress: &dyn Progress,
) -> Result<u64, InferenceError> {
    let packed: BTreeSet<String> = modules.iter().map(|module| format!("{}.weight", module.name)).collect();
    let dense: Vec<_> = folder.floats().filter(|(name, _)| !packed.contains(*name)).collect();
    let base_dtype =
        |name: &str| reader.recipe.dtype.or_else(|| reader.checkpoint.dtype_of(name)).unwrap_or(DType::F32);
    let mut entries: Vec<Entry> = dense
        .iter()
        .map(|(name, tensor)| {
            let dtype = file_dtype(base_dtype(name));
            Entry { name: (*name).clone(), dtype, shape: tensor.shape.clone() }
        })
        .collect();
    for module in modules {
        let dtype = base_dtype(&format!("{}.weight", module.name));
        entries.extend(packed_entries(module.name, module.scheme, module.shape, dtype));
    }
    let mut file = TensorFile::create(path, entries)?;
    progress.begin(Some((dense.len() + modules.len()) as u64), "tensors");
    for (name, tensor) in dense {
        file.write(name, reader.stored_bytes(name, &tensor.shape)?.as_slice())?;
        progress.advance(1);
    }
    for module in modules {
        if progress.is_cancelled() {
            return Err(InferenceError::Cancelled);
        }
        let [n_out, n_in] = module.shape;
        let name = format!("{}.weight", module.name);
        let values = reader.base_values(&name, &module.shape)?;
        let HostWeight::Packed(packed) = pack(module.name, module.scheme, &values, n_out, n_in)? else {
            return Err(InferenceError::Quantize {
                module: module.name.to_owned(),
                reason: "it was not packed".to_owned(),
            });
        };
        for (part, bytes) in packed_tensors(module.name, &packed, base_dtype(&name)) {
            file.write(&part, &bytes)?;
        }
        progress.advance(1);
    }
    file.finish()
}

fn file_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::Bf16 => Dtype::BF16,
    }
}

fn write_config(
    source: &Path,
    dir: &Path,
    reader: &WeightReader<'_>,
    quantization: Value,
) -> Result<(), InferenceError> {
    let from = source.join("config.json");
    let fail = |reason: String| InferenceError::File { path: from.clone(), reason };
    let bytes = std::fs::read(&from).map_err(|error| fail(error.to_string()))?;
    let Value::Object(mut config) = parse_json(&bytes).map_err(fail)? else {
        return Err(fail("expected a JSON object".to_owned()));
    };
    // A config that ties a head which the files hold beside another embedding would tie the packed one.
    if !reader.spec.tied_embeddings && config.get("tie_word_embeddings") != Some(&Value::Bool(false)) {
        config.insert("tie_word_embeddings".to_owned(), Value::Bool(false));
    }
    if let Some(dtype) = reader.recipe.dtype {
        // transformers 5 writes `dtype`, 4 wrote `torch_dtype`; each reads both.
        let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        config.insert(key.to_owned(), Value::from(dtype_name(dtype)));
    }
    config.insert("quantization_config".to_owned(), quantization);
    let path = dir.join("config.json");
    let text = serde_json::to_string_pretty(&config).map_err(|error| write_error(&path, &error))?;
    std::fs::write(&path, text + "\n").map_err(|error| write_error(&path, &error))
}

fn copy_side_files(source: &Path, dir: &Path) -> Result<(), InferenceError> {
    let list = |error: std::io::Error| InferenceError::File { path: source.to_owned(), reason: error.to_string() };
    for entry in std::fs::read_dir(source).map_err(list)? {
        let name = entry.map_err(list)?.file_name().to_string_lossy().into_owned();
        if name.starts_with("tokenizer") || SIDE_FILES.contains(&name.as_str()) {
            let path = dir.join(&name);
            std::fs::copy(source.join(&name), &path).map_err(|error| write_error(&path, &error))?;
        }
    }
    Ok(())
}
