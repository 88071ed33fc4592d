//! Model families: each maps a `config.json` to a [`ModelSpec`]. One file and one line in [`FAMILIES`] a family; none has a
//! forward pass of its own.

mod config;
mod decoder;
mod fields;
mod gemma2;
mod gemma3;
mod llama;
mod mistral;
mod notes;
mod phi3;
mod qwen2;
mod qwen3;
mod rope_config;
mod rope_fields;

pub use config::ConfigFile;

use super::spec::ModelSpec;
use crate::inference::{AccountPart, InferenceError};
use notes::Rules;

/// A family of models.
pub struct Family {
    /// `model_type` in config.json.
    pub model_type: &'static str,
    /// The fields that it reads, and those that are known to change nothing.
    pub rules: Rules,
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
    let family = family_of(config)?;
    config.check_supported(family.rules.own)?;
    (family.spec)(config)
}

/// Returns what becomes of each field of a config.
///
/// # Errors
/// As [`spec_of`].
pub fn account_of(config: &ConfigFile) -> Result<AccountPart, InferenceError> {
    spec_of(config)?;
    config.saved_dtype();
    Ok(config.account(&family_of(config)?.rules))
}

fn family_of(config: &ConfigFile) -> Result<&'static Family, InferenceError> {
    let model_type = config.text("model_type")?.unwrap_or_default();
    FAMILIES.iter().find(|family| family.model_type == model_type).ok_or_else(|| {
        let known = FAMILIES.iter().map(|family| family.model_type).collect::<Vec<_>>().join(", ");
        let found = match config.architecture() {
            Some(architecture) if model_type.is_empty() => architecture,
            _ => model_type,
        };
        InferenceError::UnknownArchitecture { path: config.path().to_owned(), found, known }
    })
}
