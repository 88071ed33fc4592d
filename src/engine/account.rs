//! The account of a model's files, put together: a function per kind of source, which adds the parts that such a source has.

use super::checkpoint::{Checkpoint, GgufCheckpoint, SafetensorsFolder};
use super::families::{self, ConfigFile};
use super::source::open_source;
use super::spec::ModelSpec;
use crate::inference::{InferenceError, ModelSource, SourceAccount};
use std::path::Path;

/// Returns which entries of a model's files were used and which were not.
///
/// # Errors
/// As opening the source.
pub fn account_of(source: &ModelSource) -> Result<SourceAccount, InferenceError> {
    let (spec, checkpoint) = open_source(source)?;
    match &checkpoint {
        Checkpoint::Random { config, .. } => of_random(config),
        Checkpoint::Folder(folder) => of_folder(&spec, folder),
        Checkpoint::Gguf(file) => of_gguf(&spec, file),
    }
}

fn of_random(config: &Path) -> Result<SourceAccount, InferenceError> {
    let config = ConfigFile::read(config)?;
    config.note_quantization(false);
    Ok(SourceAccount { parts: vec![families::account_of(&config)?], ..SourceAccount::default() })
}

fn of_folder(_spec: &ModelSpec, folder: &SafetensorsFolder) -> Result<SourceAccount, InferenceError> {
    let config = ConfigFile::read(&folder.dir().join("config.json"))?;
    config.note_quantization(true);
    Ok(SourceAccount { parts: vec![families::account_of(&config)?], ..SourceAccount::default() })
}

fn of_gguf(_spec: &ModelSpec, _file: &GgufCheckpoint) -> Result<SourceAccount, InferenceError> {
    Ok(SourceAccount::default())
}
