//! From a staging folder to an artifact: files synced and hashed, record and manifest written, the folder moved in.

use super::cache::{Artifact, Part, Store};
use super::error::StoreError;
use super::exchange::replace;
use super::fs::{hash_pieces, sync, sync_dir, walk, write_atomically};
use super::lock::FileLock;
use super::manifest::{FileEntry, MANIFEST, Manifest, RECORD, digest, parse_record};
use crate::artifact::{FORMAT_VERSION, Key, KeyFields, Record};
use serde::Serialize;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// What a stage hands over when it commits.
#[derive(Debug, Clone)]
pub struct ManifestDraft {
    pub record: Record,
    pub fields: KeyFields,
}

/// A folder that becomes an artifact when committed and vanishes when dropped. Holds the key's lock.
#[derive(Debug)]
pub struct Staging {
    pub(super) store: Store,
    pub(super) key: Key,
    pub(super) dir: PathBuf,
    /// Released when closed, also by the death of the process.
    pub(super) _lock: FileLock,
}

impl Staging {
    /// Folder to write into.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Syncs and hashes the files, writes record and manifest, and moves the folder in, in one step where another artifact is there.
    ///
    /// # Errors
    /// `Io`, and `Write` where the stage left a link or a special file; nothing is committed then and what was there before stays.
    pub fn commit(self, draft: ManifestDraft) -> Result<Artifact, StoreError> {
        let head = &draft.record.head;
        let record_path = self.dir.join(RECORD);
        let record_bytes = to_json(&draft.record.to_json(), &record_path)?;
        write_atomically(&record_path, &record_bytes)?;
        // What readers will find: a number may differ in its last digit from what is in memory.
        let record = parse_record(&record_bytes)
            .map_err(|damage| StoreError::Write { path: record_path, reason: damage.to_string() })?;
        let (names, dirs) = walk(&self.dir)?;
        let files = names.iter().map(|name| self.entry(name)).collect::<Result<Vec<FileEntry>, StoreError>>()?;
        let manifest = Manifest {
            format_version: FORMAT_VERSION,
            key: self.key.0.clone(),
            pipeline: head.pipeline.clone(),
            stage: head.stage.clone(),
            kind: head.kind.clone(),
            created_at: head.started_at.clone(),
            digest: digest(&files, &record),
            files,
            fields: draft.fields,
        };
        let manifest_path = self.dir.join(MANIFEST);
        let manifest_bytes = to_json(&manifest, &manifest_path)?;
        // The same rules as for its readers.
        Manifest::parse(&manifest_bytes)
            .map_err(|damage| StoreError::Write { path: manifest_path.clone(), reason: damage.to_string() })?;
        write_atomically(&manifest_path, &manifest_bytes)?;
        for dir in dirs {
            sync_dir(&self.dir.join(dir))?;
        }
        let target = self.store.artifact_dir(&self.key);
        replace(&self.dir, &target)?;
        sync_dir(self.store.dir())?;
        // Written and hashed by this process: there is nothing to verify.
        let manifest_blake3 = blake3::hash(&manifest_bytes).to_hex().to_string();
        self.store.note_checked(&self.key, manifest_blake3, Part::All, None);
        self.store.note_use(&manifest.pipeline, &manifest.stage, &self.key, &manifest.fields);
        Ok(Artifact { key: self.key.clone(), dir: target, manifest, record })
    }

    /// Syncs and hashes one file.
    fn entry(&self, relative: &Path) -> Result<FileEntry, StoreError> {
        let path = self.dir.join(relative);
        let is_regular = fs::symlink_metadata(&path).map_err(StoreError::io("read", &path))?.is_file();
        let Some(name) = relative.to_str().filter(|_| is_regular) else {
            let reason = "an artifact holds regular files with names in UTF-8 only".to_owned();
            return Err(StoreError::Write { path, reason });
        };
        let file = File::open(&path).map_err(StoreError::io("open", &path))?;
        sync(&file, &path).map_err(StoreError::io("sync", &path))?;
        let bytes = file.metadata().map_err(StoreError::io("read", &path))?.len();
        let hash = hash_pieces(&path, |_| Ok(true)).map_err(StoreError::io("read", &path))?;
        Ok(FileEntry { name: name.to_owned(), bytes, blake3: hash.unwrap_or_default() })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After a commit it is gone already; after a failure gc would find it.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Serializes for a file.
pub fn to_json<T: Serialize>(value: &T, path: &Path) -> Result<Vec<u8>, StoreError> {
    let mut bytes = serde_json::to_vec_pretty(value)
        .map_err(|error| StoreError::Format { path: path.to_owned(), reason: error.to_string() })?;
    bytes.push(b'\n');
    Ok(bytes)
}
