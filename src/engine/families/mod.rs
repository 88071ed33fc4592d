//! Model families: each maps a `config.json` to a [`ModelSpec`]. One file and one line in [`FAMILIES`] a family; none has a
//! forward pass of its own.

mod config;
mod gemma2;
mod gemma3;
mod llama;
mod mistral;
mod phi3;
mod qwen2;
mod qwen3;
mod rope_config;

pub use config::ConfigFile;

use super::spec::ModelSpec;
use crate::inference::InferenceError;

/// A family of models.
pub struct Family {
    /// `model_type` in config.json.
    pub model_type: &'static str,
    /// Maps a config to a spec.
    pub spec: fn(&ConfigFile) -> Result<ModelSpec, InferenceError>,
}

/// Every family labpipe knows.
pub static FAMILIES: &[Family] = &[
    llama::FAMILY,
    qwen2::FAMILY,
    qwen3::FAMILY,
    mistral::FAMILY,
    gemma2::FAMILY,
    gemma3::FAMILY,
    gemma3::WITH_VISION,
    phi3::FAMILY,
];

/// Returns the spec that a config stands for.
///
/// # Errors
/// `File` where a field is missing or absurd, `UnknownArchitecture` where no family claims it.
pub fn spec_of(config: &ConfigFile) -> Result<ModelSpec, InferenceError> {
    let model_type = config.text("model_type").unwrap_or_default();
    let known = || FAMILIES.iter().map(|family| family.model_type).collect::<Vec<_>>().join(", ");
    let family = FAMILIES.iter().find(|family| family.model_type == model_type).ok_or_else(|| {
        let found = match config.architecture() {
            Some(architecture) if model_type.is_empty() => architecture,
            _ => model_type.clone(),
        };
        InferenceError::UnknownArchitecture { path: config.path().to_owned(), found, known: known() }
    })?;
    (family.spec)(config)
}
