//! The models of a report: who they are, what they were made from, what they weigh.

use super::request::ReportError;
use crate::artifact::{QuantizedModule, RecordError};
use crate::inference::{
    LoadRecord, ModelInfo, ModelRecipe, ModelSource, QuantizeRecord, StoredQuantization, StoredType, stored_words,
};
use crate::quantization::ALWAYS_KEPT;
use crate::stage::StageInput;
use labpipe_kernels::SchemeSpec;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// A model that something was measured of, or that was reported on itself.
#[derive(Debug, Clone)]
pub struct Model {
    /// Address of the `load` or `quantize` stage.
    pub address: String,
    /// `config=int8`, where the stage belongs to a cell of a matrix.
    pub cell: Option<String>,
    /// `nf4, block 64, double quantized`; `f16` where nothing is quantized.
    pub scheme: String,
    pub is_quantized: bool,
    /// Address of the `load` stage that it comes from (its own, where it is one).
    pub loaded_by: String,
    /// Name of the file or folder that it was loaded from, or its id on the hub.
    pub file: String,
    /// blake3 of that file; of a folder, of its files' names and hashes. Null where the `load` record does not say.
    pub file_blake3: Option<String>,
    /// Number of all parameters, where the `load` stage recorded it.
    pub n_params: Option<u64>,
    /// Element types that the files store the weights in, largest share of bytes first; empty where the `load` record does not say.
    pub source_types: Vec<StoredType>,
    /// A `quantize` record's rows; empty for a `load` stage.
    pub modules: Vec<QuantizedModule>,
}

impl Model {
    /// Reads who a model is from its stage.
    ///
    /// # Errors
    /// Where its record, or that of the `load` stage, lacks what its kind promises.
    pub fn read(stage: &StageInput) -> Result<Model, RecordError> {
        let load = load_stage(stage);
        let n_params = match load.address == stage.address {
            true => None,
            false => Some(info(load)?.n_params),
        };
        let (recipe, info, modules) = match stage.kind.as_str() {
            "quantize" => {
                let record: QuantizeRecord = stage.record.read()?;
                (record.recipe, record.model, record.modules)
            }
            _ => {
                let record: LoadRecord = stage.record.read()?;
                (record.recipe, record.model, Vec::new())
            }
        };
        let source_types = source_types(load)?;
        let (scheme, is_quantized) =
            info.stored_quantization.as_ref().map_or_else(|| describe(&recipe, &source_types), describe_stored);
        Ok(Model {
            file: file_name(&recipe.source),
            file_blake3: file_hash(&load.record.head.read_files),
            address: stage.address.clone(),
            cell: cell_of(&stage.address).map(str::to_owned),
            scheme,
            is_quantized,
            loaded_by: load.address.clone(),
            n_params: n_params.or(Some(info.n_params)),
            source_types,
            modules,
        })
    }

    /// Returns how the files store the weights, where that is not as plain floats: then the model that was loaded is no unquantized one.
    pub fn lossy_source(&self) -> Option<String> {
        let is_lossy = self.source_types.iter().any(|one| !one.is_plain());
        stored_words(&self.source_types).filter(|_| is_lossy)
    }

    /// Returns how plots call the model: its cell (without the variable's name where there is only one), or its
    /// address.
    pub fn name(&self) -> String {
        match self.cell.as_deref() {
            None => self.address.clone(),
            Some(cell) => match cell.split_once('=') {
                Some((_, value)) if !cell.contains(',') => value.to_owned(),
                _ => cell.to_owned(),
            },
        }
    }

    /// Returns the variables of its cell, with their values.
    pub fn variables(&self) -> impl Iterator<Item = (&str, &str)> {
        self.cell.iter().flat_map(|cell| cell.split(',')).filter_map(|pair| pair.split_once('='))
    }

    /// Returns what it was loaded from, for tables: `stories260k 1a2b3c4d`.
    pub fn file_words(&self) -> String {
        let hash = self.file_blake3.as_deref().and_then(|hash| hash.get(..8));
        hash.map_or_else(|| self.file.clone(), |hash| format!("{} {hash}", self.file))
    }

    /// Returns bytes and parameters of the linears that the `quantize` stage went through, kept ones included.
    pub fn linears(&self) -> Option<(u64, u64)> {
        let bytes = self.modules.iter().map(|module| module.bytes).sum();
        let n_params = self.modules.iter().map(|module| module.n_params).sum();
        (n_params > 0).then_some((bytes, n_params))
    }
}

fn file_name(source: &ModelSource) -> String {
    let last = |path: &Path| {
        path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
    };
    match source {
        ModelSource::Path(path) => last(path),
        ModelSource::Hub(id) => id.clone(),
        ModelSource::Random { config, seed } => format!("random weights, {} (seed {seed})", last(config)),
    }
}

/// Returns the hash of a model's one file, or of all names and hashes where it has several.
fn file_hash(files: &BTreeMap<String, String>) -> Option<String> {
    match files.len() {
        0 => None,
        1 => files.values().next().cloned(),
        _ => {
            let mut hasher = blake3::Hasher::new();
            for (name, hash) in files {
                // The folder's own name is no part of what is in it.
                let name = name.rsplit('/').next().unwrap_or(name);
                hasher.update(format!("{name} {hash}\n").as_bytes());
            }
            Some(hasher.finalize().to_hex().to_string())
        }
    }
}

/// Returns the model that a measurement was made of: its `model` input, or itself for `load` and `quantize`.
pub fn measured_model(stage: &StageInput) -> Option<&StageInput> {
    match stage.kind.as_str() {
        "load" | "quantize" => Some(stage),
        _ => stage.input("model").map(Arc::as_ref),
    }
}

/// Returns the models behind a `diff`: of its `reference` and `candidate` captures.
pub fn compared_models(diff: &StageInput) -> (Option<&StageInput>, Option<&StageInput>) {
    let of = |param| diff.input(param).and_then(|capture| measured_model(capture));
    (of("reference"), of("candidate"))
}

/// Returns the text between the brackets of `nf4[config=int8]`.
pub fn cell_of(address: &str) -> Option<&str> {
    let (_, rest) = address.split_once('[')?;
    rest.strip_suffix(']').filter(|cell| !cell.is_empty())
}

/// Returns what the record of a `load` or `quantize` stage says of its model.
fn info(stage: &StageInput) -> Result<ModelInfo, RecordError> {
    match stage.kind.as_str() {
        "quantize" => stage.record.read::<QuantizeRecord>().map(|record| record.model),
        _ => stage.record.read::<LoadRecord>().map(|record| record.model),
    }
}

fn load_stage(stage: &StageInput) -> &StageInput {
    let mut current = stage;
    while let Some(parent) = current.input("model") {
        current = parent;
    }
    current
}

/// Returns how the files of a `load` stage's model store its weights, in words; `None` where its record does not say.
///
/// # Errors
/// As [`Model::read`].
pub fn source_words(load: &StageInput) -> Result<Option<String>, ReportError> {
    Ok(source_types(load).map(|types| stored_words(&types))?)
}

/// Returns the element types of a model's files; none in records that were made without an account.
fn source_types(load: &StageInput) -> Result<Vec<StoredType>, RecordError> {
    if load.kind != "load" {
        // The lineage is not at hand: `compare` reads one record at a time.
        return Ok(Vec::new());
    }
    let record: LoadRecord = load.record.read()?;
    Ok(record.account.map_or_else(Vec::new, |account| account.element_types))
}

/// Returns how weights are stored, in words, and whether any are quantized.
fn describe(recipe: &ModelRecipe, source_types: &[StoredType]) -> (String, bool) {
    let dtype = describe_dtype(recipe, source_types);
    let Some(config) = &recipe.quantization else {
        return (dtype, false);
    };
    let n_quantizing = config.overrides.iter().filter(|one| one.scheme.is_some()).count();
    let Some(spec) = &config.scheme else {
        return match n_quantizing {
            0 => (dtype, false),
            n => (format!("{dtype}, {n} override(s) quantized"), true),
        };
    };
    let mut words = spec_words(spec);
    let keeps_more = config.keep.iter().any(|pattern| !ALWAYS_KEPT.contains(&pattern.as_str()));
    if !config.overrides.is_empty() || keeps_more {
        words.push("mixed".to_owned());
    }
    let source = stored_words(source_types).filter(|_| source_types.iter().any(|one| !one.is_plain()));
    words.extend(source.map(|source| format!("from {source}")));
    (words.join(", "), true)
}

/// Returns the type that unquantized weights are kept in, and what they were made from where the files have another.
fn describe_dtype(recipe: &ModelRecipe, source_types: &[StoredType]) -> String {
    let has_blocks = source_types.iter().any(|one| !one.is_plain());
    let kept = recipe.dtype.map(|dtype| dtype.name()).or(has_blocks.then_some("f32"));
    match (kept, stored_words(source_types)) {
        (None, None) => "the file's own dtype".to_owned(),
        (None, Some(source)) => source,
        (Some(kept), Some(source)) if kept != source => format!("{kept} from {source}"),
        (Some(kept), _) => kept.to_owned(),
    }
}

/// Returns how a model's files store its linears, in words.
fn describe_stored(stored: &StoredQuantization) -> (String, bool) {
    let mut words: Vec<String> = stored.schemes.iter().flat_map(spec_words).collect();
    words.push(format!("as {} stored it", stored.format));
    (words.join(", "), true)
}

fn spec_words(spec: &SchemeSpec) -> Vec<String> {
    let mut words = vec![spec.scheme.clone()];
    words.extend(spec.block_size.map(|block_size| format!("block {block_size}")));
    words.extend(spec.double_quant.then(|| "double quantized".to_owned()));
    words.extend(spec.symmetric.then(|| "symmetric".to_owned()));
    words.extend(spec.outlier_threshold.map(|threshold| format!("outliers from {threshold}")));
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_known_by_its_files_and_not_by_where_it_lies() {
        let files = |dir: &str, hash: &str| {
            BTreeMap::from([
                (format!("{dir}/config.json"), "aa".to_owned()),
                (format!("{dir}/model.safetensors"), hash.to_owned()),
            ])
        };
        assert_eq!(file_hash(&files("models/a", "bb")), file_hash(&files("elsewhere/b", "bb")));
        assert_ne!(file_hash(&files("models/a", "bb")), file_hash(&files("models/a", "cc")));
        assert_eq!(file_hash(&BTreeMap::from([("m.gguf".to_owned(), "dd".to_owned())])).as_deref(), Some("dd"));
        assert_eq!(file_hash(&BTreeMap::new()), None);
    }

    #[test]
    fn a_cell_is_what_stands_in_brackets() {
        assert_eq!(cell_of("nf4[config=int8,seed=1]"), Some("config=int8,seed=1"));
        assert_eq!(cell_of("nf4"), None);
        assert_eq!(cell_of("odd[]"), None);
    }
}
