//! What is in the cache: `models--ORG--NAME/{refs/REVISION, snapshots/COMMIT/FILE, blobs/ETAG}`.

use super::reference::{HubReference, is_path};
use super::settings::HubSettings;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

pub const WEIGHTS: &str = "model.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";
pub const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";

/// Returns true for a file of a model folder that determines what is computed.
pub fn is_model_file(name: &str) -> bool {
    name.ends_with(".safetensors")
        || name.ends_with(".safetensors.index.json")
        || [CONFIG, "generation_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]
            .contains(&name)
        || (name.starts_with("tokenizer") && (name.ends_with(".json") || name.ends_with(".model")))
}

/// Returns where a model's folder, or the one file that `reference` names, lies on disk; nothing where it isn't, or where a model
/// lacks its config or some of its weights. It asks the disk alone.
pub fn locate(reference: &HubReference, settings: &HubSettings) -> Option<PathBuf> {
    let snapshot = snapshot_dir(reference, settings)?;
    match &reference.file {
        Some(file) => Some(snapshot.join(file)).filter(|path| path.is_file()),
        None => {
            let is_there = snapshot.join(CONFIG).is_file()
                && (snapshot.join(WEIGHTS).is_file()
                    || shards(&snapshot).is_some_and(|shards| shards.iter().all(|name| snapshot.join(name).is_file())));
            is_there.then_some(snapshot)
        }
    }
}

/// Returns true where nothing is left to fetch of what [`locate`] found.
pub fn is_whole(path: &Path) -> bool {
    path.is_file() || path.join(TOKENIZER).is_file()
}

/// Returns the commit that a revision stands for in the cache.
pub fn commit(reference: &HubReference, settings: &HubSettings) -> Option<String> {
    snapshot_dir(reference, settings)?.file_name().map(|name| name.to_string_lossy().into_owned())
}

fn snapshot_dir(reference: &HubReference, settings: &HubSettings) -> Option<PathBuf> {
    let repo = settings.cache_dir.join(reference.folder_name());
    let named = std::fs::read_to_string(repo.join("refs").join(&reference.revision)).ok();
    let commit = named.map_or_else(|| reference.revision.clone(), |commit| commit.trim().to_owned());
    // A damaged ref must not lead elsewhere.
    (is_path(&commit) && !commit.contains('/')).then(|| repo.join("snapshots").join(commit)).filter(|dir| dir.is_dir())
}

/// Returns the shards that a snapshot's index names; nothing where there is no readable index, or one that leads out of its folder.
pub fn shards(snapshot: &Path) -> Option<BTreeSet<String>> {
    let index: Value = serde_json::from_slice(&std::fs::read(snapshot.join(INDEX)).ok()?).ok()?;
    let shards = index.get("weight_map")?.as_object()?.values();
    shards.map(|name| name.as_str().filter(|name| is_path(name) && !name.contains('/')).map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(cache_dir: &Path) -> HubSettings {
        HubSettings {
            cache_dir: cache_dir.to_owned(),
            endpoint: "http://127.0.0.1:9".to_owned(),
            token: None,
            is_offline: true,
        }
    }

    fn write(path: PathBuf, text: &str) {
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        std::fs::write(path, text).expect("a file");
    }

    #[test]
    fn a_snapshot_counts_once_all_its_shards_are_there() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let repo = dir.path().join("models--org--name");
        let settings = settings(dir.path());
        let main = HubReference::parse("hf://org/name").expect("an id");
        let commit = HubReference::parse("hf://org/name@abc").expect("an id");
        assert_eq!(locate(&main, &settings), None);
        write(repo.join("refs/main"), "abc\n");
        write(repo.join("snapshots/abc/config.json"), "{}");
        write(
            repo.join("snapshots/abc").join(INDEX),
            r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#,
        );
        write(repo.join("snapshots/abc/1.safetensors"), "");
        assert_eq!(locate(&main, &settings), None);
        write(repo.join("snapshots/abc/2.safetensors"), "");
        assert_eq!(locate(&main, &settings), Some(repo.join("snapshots/abc")));
        assert_eq!(locate(&commit, &settings), Some(repo.join("snapshots/abc")));
        write(repo.join("refs/main"), "../../..");
        assert_eq!(locate(&main, &settings), None);
    }

    #[test]
    fn an_index_that_leads_out_of_its_folder_names_no_shards() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        write(dir.path().join(INDEX), r#"{"weight_map": {"a": "../1.safetensors"}}"#);
        assert_eq!(shards(dir.path()), None);
    }
}
