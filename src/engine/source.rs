//! Where a recipe's model lies, what it is, and its tensors: a folder, a GGUF file, something on the hub, or a seed.

use super::checkpoint::{Checkpoint, is_gguf};
use super::families::{ConfigFile, spec_of};
use super::spec::ModelSpec;
use crate::hub::{HubReference, HubSettings, locate};
use crate::inference::{InferenceError, ModelSource};
use crate::units::DType;
use std::path::{Path, PathBuf};

/// Reads a model's config and opens its tensors; loads no weights.
///
/// # Errors
/// Whatever is wrong with its files.
pub fn open_source(source: &ModelSource) -> Result<(ModelSpec, Checkpoint), InferenceError> {
    let path = match source {
        ModelSource::Random { config, seed } => {
            let file = ConfigFile::read(config)?;
            let dtype = file.saved_dtype().unwrap_or(DType::F32);
            return Ok((spec_of(&file)?, Checkpoint::Random { seed: *seed, dtype, config: config.clone() }));
        }
        ModelSource::Path(path) => path.clone(),
        ModelSource::Hub(id) => on_disk(id)?,
    };
    if is_gguf(&path) { open_gguf(&path) } else { open_folder(&path) }
}

/// Returns the folder, or the GGUF file, that holds a source's tokenizer.
pub fn tokenizer_path(source: &ModelSource) -> Option<PathBuf> {
    match source {
        ModelSource::Path(path) => Some(path.clone()),
        ModelSource::Hub(id) => on_disk(id).ok(),
        ModelSource::Random { .. } => None,
    }
}

fn open_folder(dir: &Path) -> Result<(ModelSpec, Checkpoint), InferenceError> {
    // What lies there instead of a model, and what it was quantized with, is said before a config is asked for.
    let mut checkpoint = Checkpoint::open_folder(dir)?;
    let mut spec = spec_of(&ConfigFile::read(&dir.join("config.json"))?)?;
    checkpoint.settle_tied_head(&mut spec)?;
    Ok((spec, checkpoint))
}

fn open_gguf(path: &Path) -> Result<(ModelSpec, Checkpoint), InferenceError> {
    let checkpoint = Checkpoint::open_gguf(path)?;
    let Checkpoint::Gguf(file) = &checkpoint else { unreachable!("open_gguf opens a GGUF file") };
    let mut spec = spec_of(&ConfigFile::of(path, file.config()?))?;
    file.complete(&mut spec)?;
    Ok((spec, checkpoint))
}

/// The hub is asked for nothing here: what a run needs was downloaded before it was planned.
fn on_disk(id: &str) -> Result<PathBuf, InferenceError> {
    let settings = HubSettings::from_env();
    let found = HubReference::parse(id).map(|reference| locate(&reference, &settings));
    let reason = match found {
        Ok(Some(path)) => return Ok(path),
        Ok(None) => "it is not in the Hugging Face cache any more; run the pipeline again to download it".to_owned(),
        Err(error) => error.to_string(),
    };
    Err(InferenceError::File { path: PathBuf::from(id), reason })
}
