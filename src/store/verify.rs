//! Lists the cache and verifies all of it.

use super::cache::Store;
use super::error::StoreError;
use super::manifest::{Damage, FileEntry, Manifest, RECORD, check_contents, inspect, stranger};
use crate::artifact::Key;
use crate::event::Progress;
use rayon::prelude::*;
use std::fs;

/// What verification found of one artifact.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    pub key: String,
    pub stage: String,
    /// Nothing where it is whole; else the file and what is wrong.
    pub damage: Option<Damage>,
}

impl Store {
    /// Returns every artifact's manifest and size in bytes, in the order of keys. What has no readable manifest is left out.
    ///
    /// # Errors
    /// `Io` where the folder can't be listed.
    pub fn list(&self) -> Result<Vec<(Manifest, u64)>, StoreError> {
        let manifest = |key: Key| {
            let (manifest, _) = Manifest::read(&self.artifact_dir(&key)).ok()?;
            let bytes = manifest.files.iter().map(|file| file.bytes).sum();
            Some((manifest, bytes))
        };
        Ok(self.keys()?.into_iter().filter_map(manifest).collect())
    }

    /// Returns the keys under which something lies in the cache, sorted.
    ///
    /// # Errors
    /// `Io` where the folder can't be listed.
    pub(super) fn keys(&self) -> Result<Vec<Key>, StoreError> {
        let entries = fs::read_dir(self.dir()).map_err(StoreError::io("list", self.dir()))?;
        let mut keys = Vec::new();
        for entry in entries {
            let entry = entry.map_err(StoreError::io("list", self.dir()))?;
            keys.extend(entry.file_name().into_string().ok().map(Key).filter(Key::is_well_formed));
        }
        keys.sort();
        Ok(keys)
    }

    /// Verifies every artifact on all cores: that its folder is named by the hash of its key's fields, its digest, that no file lies
    /// beside those that the manifest lists, and the content of each file.
    ///
    /// # Errors
    /// `Io` where the folder can't be listed; damage is a verdict, no error. `Cancelled`.
    pub fn verify(&self, progress: &dyn Progress) -> Result<Vec<Verdict>, StoreError> {
        let keys = self.keys()?;
        progress.begin(Some(keys.len() as u64), "artifacts");
        let verdicts: Option<Vec<Verdict>> = keys
            .par_iter()
            .map(|key| {
                let verdict = self.verdict(key, &|| !progress.is_cancelled())?;
                progress.advance(1);
                Some(verdict)
            })
            .collect();
        verdicts.ok_or_else(|| StoreError::Cancelled { key: "every artifact".to_owned() })
    }

    fn verdict(&self, key: &Key, keep_going: &(dyn Fn() -> bool + Sync)) -> Option<Verdict> {
        let dir = self.artifact_dir(key);
        let (stage, damage) = match inspect(&dir, key) {
            Err(damage) => {
                let stage = Manifest::read(&dir).map_or_else(|_| "?".to_owned(), |(manifest, _)| manifest.stage);
                (stage, Some(damage))
            }
            Ok(found) => {
                let files: Vec<&FileEntry> = found.manifest.files.iter().filter(|file| file.name != RECORD).collect();
                let contents = check_contents(&dir, &files, keep_going)?;
                (found.manifest.stage.clone(), contents.err().or_else(|| stranger(&dir, &found.manifest)))
            }
        };
        Some(Verdict { key: key.0.clone(), stage, damage })
    }
}
