//! Notes on what is used: by which stage of which pipeline, and when. No number depends on them.

use super::cache::Store;
use super::error::StoreError;
use super::folders::folder_name;
use super::fs::{create_dirs, write_atomically};
use super::quirks::note_once;
use super::staging::to_json;
use crate::artifact::{Key, KeyFields};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::PathBuf;

impl Store {
    /// Returns the artifact that a stage of a pipeline last had: what a miss is explained against.
    pub fn last(&self, pipeline: &str, stage: &str) -> Option<(Key, KeyFields)> {
        let entry: IndexEntry = serde_json::from_slice(&fs::read(self.index_path(pipeline, stage)).ok()?).ok()?;
        Some((Key(entry.key), entry.fields))
    }

    /// Notes that a run uses an artifact now, and that a stage of a pipeline has it: `cache gc --max-size` and the reasons in a
    /// plan go by that. No number depends on it, so a failure is a warning.
    pub fn note_use(&self, pipeline: &str, stage: &str, key: &Key, fields: &KeyFields) {
        let index = || -> Result<(), StoreError> {
            let path = self.index_path(pipeline, stage);
            if self.last(pipeline, stage).is_some_and(|(last, _)| last == *key) {
                return Ok(());
            }
            if let Some(parent) = path.parent() {
                create_dirs(parent)?;
            }
            let entry = IndexEntry { key: key.0.clone(), stage: stage.to_owned(), fields: fields.clone() };
            write_atomically(&path, &to_json(&entry, &path)?)
        };
        let used = self.used_path(key);
        let touch = || fs::write(&used, b"\n").map_err(StoreError::io("write", &used));
        if let Err(error) = index().and_then(|()| touch()) {
            note_once(
                "use",
                format!(
                    "failed to note in the cache what is in use ({error}): plans explain a miss less well, and cache gc --max-size goes by \
                     when artifacts were made"
                ),
            );
        }
    }

    /// The modification time of this file is when the artifact was last used.
    pub(super) fn used_path(&self, key: &Key) -> PathBuf {
        self.dir().join("used").join(&key.0)
    }

    fn index_path(&self, pipeline: &str, stage: &str) -> PathBuf {
        let name = format!("{}.json", &blake3::hash(stage.as_bytes()).to_hex()[..16]);
        self.dir().join("index").join(folder_name(pipeline)).join(name)
    }
}

#[derive(Serialize, Deserialize)]
pub(super) struct IndexEntry {
    pub key: String,
    stage: String,
    fields: KeyFields,
}
