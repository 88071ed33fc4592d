//! The account of a model's files, put together: a function per kind of source, which adds the parts that such a source has.

use super::checkpoint::{Checkpoint, GgufCheckpoint, SafetensorsFolder, folder_parts};
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

fn of_folder(spec: &ModelSpec, folder: &SafetensorsFolder) -> Result<SourceAccount, InferenceError> {
    let config = ConfigFile::read(&folder.dir().join("config.json"))?;
    config.note_quantization(true);
    let (tensors, element_types) = folder_parts(folder, spec)?;
    let parts = std::iter::once(families::account_of(&config)?).chain(tensors).collect();
    Ok(SourceAccount { parts, element_types })
}

fn of_gguf(spec: &ModelSpec, file: &GgufCheckpoint) -> Result<SourceAccount, InferenceError> {
    let (parts, element_types) = file.account(spec)?;
    Ok(SourceAccount { parts, element_types })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn stories(edit: impl Fn(&mut Value)) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/stories260k");
        let text = std::fs::read_to_string(model.join("config.json")).expect("its config");
        let mut config: Value = serde_json::from_str(&text).expect("JSON");
        edit(&mut config);
        std::fs::write(dir.path().join("config.json"), config.to_string()).expect("a copy");
        std::fs::copy(model.join("model.safetensors"), dir.path().join("model.safetensors")).expect("a copy");
        dir
    }

    fn config_part(source: &ModelSource) -> crate::inference::AccountPart {
        let account = account_of(source).expect("an account");
        account.parts.into_iter().find(|part| part.source == "config.json").expect("its part")
    }

    #[test]
    fn a_folders_fields_are_all_accounted_for() {
        let dir = stories(|_| {});
        let part = config_part(&ModelSource::Path(dir.path().to_owned()));
        // The file has 24 fields; nothing is made of seven of them (names, ids, training, and the type it was saved in).
        assert_eq!((part.n_used, part.n_harmless), (17, 7));
        assert!(part.all_warnings().is_empty());
        let dir = stories(|config| config["residual_multiplier"] = json!(0.22));
        let part = config_part(&ModelSource::Path(dir.path().to_owned()));
        assert_eq!(part.all_warnings(), ["config.json: 1 not used: residual_multiplier"]);
    }

    #[test]
    fn random_weights_are_not_stored_as_a_config_says() {
        let dir = stories(|config| config["quantization_config"] = json!({ "quant_method": "bitsandbytes" }));
        let part = config_part(&ModelSource::Random { config: dir.path().join("config.json"), seed: 1 });
        assert_eq!(part.unused, ["quantization_config"]);
    }
}
