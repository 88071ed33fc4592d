//! The cache: `cache/<key>/{manifest.json, record.json, …}`.

use super::error::StoreError;
use super::file_hash::hash_file;
use super::fs::{create_dirs, files_below, sync_dir, write_atomically};
use crate::artifact::{FORMAT_VERSION, Key, KeyFields, Record};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub const MANIFEST: &str = "manifest.json";
const RECORD: &str = "record.json";
const LOCK_POLL: Duration = Duration::from_millis(50);

/// Artifacts in a folder.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

/// A committed artifact.
#[derive(Debug, Clone)]
pub struct Artifact {
    pub key: Key,
    /// Holds the manifest, the record and the stage's own files.
    pub dir: PathBuf,
    pub manifest: Manifest,
    pub record: Record,
}

/// What an artifact's folder holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format_version: u32,
    pub key: String,
    pub pipeline: String,
    pub stage: String,
    pub kind: String,
    /// RFC 3339, UTC.
    pub created_at: String,
    /// blake3 over the files' hashes and the record's body: what consumers of a measurement have in their key.
    pub digest: String,
    /// Every file but this one.
    pub files: Vec<FileEntry>,
    /// What the key was made of.
    pub fields: KeyFields,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Relative to the artifact's folder, with `/`.
    pub name: String,
    pub bytes: u64,
    pub blake3: String,
}

/// What a stage hands over when it commits.
#[derive(Debug, Clone)]
pub struct ManifestDraft {
    pub record: Record,
    pub fields: KeyFields,
}

/// A folder that becomes an artifact when committed and vanishes when dropped. Holds the key's lock.
#[derive(Debug)]
pub struct Staging {
    store: Store,
    key: Key,
    dir: PathBuf,
    /// Released when closed, also by the death of the process.
    _lock: File,
}

impl Store {
    /// Opens a cache, making its folders.
    ///
    /// # Errors
    /// `Io` where they can't be made.
    pub fn open(dir: &Path) -> Result<Store, StoreError> {
        for sub in ["tmp", "locks", "index"] {
            create_dirs(&dir.join(sub))?;
        }
        Ok(Store { dir: dir.to_owned() })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn artifact_dir(&self, key: &Key) -> PathBuf {
        self.dir.join(&key.0)
    }

    /// Returns the artifact of a key if it is whole: manifest and record readable, every file there with its size.
    /// Anything else counts as missing; the stage is computed again and replaces it.
    pub fn get(&self, key: &Key) -> Option<Artifact> {
        let dir = self.artifact_dir(key);
        let manifest: Manifest = serde_json::from_slice(&fs::read(dir.join(MANIFEST)).ok()?).ok()?;
        let is_whole = manifest.key == key.0
            && manifest.format_version == FORMAT_VERSION
            && manifest
                .files
                .iter()
                .all(|file| fs::metadata(dir.join(&file.name)).is_ok_and(|meta| meta.len() == file.bytes));
        if !is_whole {
            return None;
        }
        let record = serde_json::from_slice(&fs::read(dir.join(RECORD)).ok()?).ok()?;
        Some(Artifact { key: key.clone(), dir, manifest, record: Record::from_json(record).ok()? })
    }

    /// Waits for the key's lock and returns a staging folder. After it returns, ask [`Store::get`] again: another process
    /// may have computed the stage meanwhile.
    ///
    /// # Errors
    /// `Cancelled` once `keep_waiting` returns false; `Io`.
    pub fn begin(&self, key: &Key, keep_waiting: &dyn Fn() -> bool) -> Result<Staging, StoreError> {
        let path = self.dir.join("locks").join(&key.0);
        let lock = File::create(&path).map_err(StoreError::io("create", &path))?;
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if keep_waiting() => std::thread::sleep(LOCK_POLL),
                Err(TryLockError::WouldBlock) => return Err(StoreError::Cancelled { key: key.short().to_owned() }),
                Err(TryLockError::Error(source)) => return Err(StoreError::Io { verb: "lock", path, source }),
            }
        }
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let n = COUNTER.fetch_add(1, Ordering::Relaxed);
        self.clear_leftovers(key)?;
        let dir = self.dir.join("tmp").join(format!("{}.{}.{n}", key.0, std::process::id()));
        create_dirs(&dir)?;
        Ok(Staging { store: self.clone(), key: key.clone(), dir, _lock: lock })
    }

    /// Removes what killed runs left of a key whose lock is held. In a container every process has the same id: a leftover would
    /// otherwise become part of the next artifact.
    fn clear_leftovers(&self, key: &Key) -> Result<(), StoreError> {
        let tmp = self.dir.join("tmp");
        let prefix = format!("{}.", key.0);
        for entry in fs::read_dir(&tmp).map_err(StoreError::io("list", &tmp))?.filter_map(Result::ok) {
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                fs::remove_dir_all(entry.path()).map_err(StoreError::io("remove", &entry.path()))?;
            }
        }
        Ok(())
    }

    /// Returns the artifact that a stage of a pipeline last had: what a miss is explained against.
    pub fn last(&self, pipeline: &str, stage: &str) -> Option<(Key, KeyFields)> {
        let entry: IndexEntry = serde_json::from_slice(&fs::read(self.index_path(pipeline, stage)).ok()?).ok()?;
        Some((Key(entry.key), entry.fields))
    }

    /// Notes that a stage of a pipeline has this artifact now.
    ///
    /// # Errors
    /// `Io`.
    pub fn note_use(&self, pipeline: &str, stage: &str, key: &Key, fields: &KeyFields) -> Result<(), StoreError> {
        let path = self.index_path(pipeline, stage);
        if self.last(pipeline, stage).is_some_and(|(last, _)| last == *key) {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            create_dirs(parent)?;
        }
        let entry = IndexEntry { key: key.0.clone(), stage: stage.to_owned(), fields: fields.clone() };
        write_atomically(&path, &to_json(&entry, &path)?)
    }

    fn index_path(&self, pipeline: &str, stage: &str) -> PathBuf {
        self.dir.join("index").join(pipeline).join(format!("{}.json", &blake3::hash(stage.as_bytes()).to_hex()[..16]))
    }
}

#[derive(Serialize, Deserialize)]
struct IndexEntry {
    key: String,
    stage: String,
    fields: KeyFields,
}

/// Serializes for a file.
pub fn to_json<T: Serialize>(value: &T, path: &Path) -> Result<Vec<u8>, StoreError> {
    let mut bytes = serde_json::to_vec_pretty(value)
        .map_err(|error| StoreError::Format { path: path.to_owned(), reason: error.to_string() })?;
    bytes.push(b'\n');
    Ok(bytes)
}

impl Staging {
    /// Folder to write into.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Syncs and hashes the files, writes record and manifest, and renames the folder in.
    ///
    /// # Errors
    /// `Io`; nothing is committed then and what was there before stays.
    pub fn commit(self, draft: ManifestDraft) -> Result<Artifact, StoreError> {
        let head = &draft.record.head;
        let record_path = self.dir.join(RECORD);
        write_atomically(&record_path, &to_json(&draft.record.to_json(), &record_path)?)?;
        let mut files = Vec::new();
        for relative in files_below(&self.dir)? {
            let path = self.dir.join(&relative);
            let file = File::open(&path).map_err(StoreError::io("open", &path))?;
            file.sync_all().map_err(StoreError::io("sync", &path))?;
            let bytes = file.metadata().map_err(StoreError::io("read", &path))?.len();
            let name = relative.to_string_lossy().replace('\\', "/");
            files.push(FileEntry { name, bytes, blake3: hash_file(&path)? });
        }
        let manifest = Manifest {
            format_version: FORMAT_VERSION,
            key: self.key.0.clone(),
            pipeline: head.pipeline.clone(),
            stage: head.stage.clone(),
            kind: head.kind.clone(),
            created_at: head.started_at.clone(),
            digest: digest(&files, &draft.record),
            files,
            fields: draft.fields,
        };
        let manifest_path = self.dir.join(MANIFEST);
        write_atomically(&manifest_path, &to_json(&manifest, &manifest_path)?)?;
        sync_dir(&self.dir)?;
        let target = self.store.artifact_dir(&self.key);
        if target.exists() {
            // Renamed away first: a reader sees the old artifact, none, or the new one, never a mixture.
            let old = self.dir.with_extension("old");
            fs::rename(&target, &old).map_err(StoreError::io("replace", &target))?;
            fs::rename(&self.dir, &target).map_err(StoreError::io("commit", &target))?;
            let _ = fs::remove_dir_all(&old);
        } else {
            fs::rename(&self.dir, &target).map_err(StoreError::io("commit", &target))?;
        }
        sync_dir(&self.store.dir)?;
        self.store.note_use(&manifest.pipeline, &manifest.stage, &self.key, &manifest.fields)?;
        Ok(Artifact { key: self.key.clone(), dir: target, manifest, record: draft.record.clone() })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After a commit it is gone already; after a failure gc would find it.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Hashes what an artifact says, leaving out when and in which run it was made.
fn digest(files: &[FileEntry], record: &Record) -> String {
    let mut hasher = blake3::Hasher::new();
    for file in files.iter().filter(|file| file.name != RECORD) {
        hasher.update(file.name.as_bytes()).update(b"\0").update(file.blake3.as_bytes()).update(b"\n");
    }
    hasher.update(serde_json::to_string(&record.body).unwrap_or_default().as_bytes());
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::RecordHead;
    use serde_json::Map;

    pub fn draft(stage: &str) -> ManifestDraft {
        let head = RecordHead {
            format_version: FORMAT_VERSION,
            pipeline: "p".to_owned(),
            run_id: "r1".to_owned(),
            produced_by_run: "r1".to_owned(),
            stage: stage.to_owned(),
            kind: "load".to_owned(),
            key: String::new(),
            cached: false,
            started_at: "2026-01-01T00:00:00Z".to_owned(),
            duration_s: 0.5,
            device: None,
            params: Map::new(),
        };
        ManifestDraft {
            record: Record { head, body: Map::new() },
            fields: KeyFields::from([("kind".into(), "load".into())]),
        }
    }

    fn store() -> (tempfile::TempDir, Store, Key) {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(dir.path()).expect("a store");
        (dir, store, Key("ab".repeat(32)))
    }

    #[test]
    fn what_is_committed_is_found_and_what_is_dropped_is_not() {
        let (_dir, store, key) = store();
        drop(store.begin(&key, &|| true).expect("a staging folder"));
        assert!(store.get(&key).is_none());
        let staging = store.begin(&key, &|| true).expect("a staging folder");
        fs::write(staging.dir().join("data.bin"), b"abc").expect("a file");
        let artifact = staging.commit(draft("s")).expect("a commit");
        assert_eq!(artifact.manifest.files.len(), 2);
        assert_eq!(store.get(&key).expect("the artifact").manifest, artifact.manifest);
        assert_eq!(store.last("p", "s").expect("an entry").0, key);
    }

    #[test]
    fn a_cut_file_makes_the_artifact_count_as_missing_and_a_commit_replaces_it() {
        let (_dir, store, key) = store();
        for content in [b"one".as_slice(), b"other"] {
            let staging = store.begin(&key, &|| true).expect("a staging folder");
            fs::write(staging.dir().join("data.bin"), content).expect("a file");
            let artifact = staging.commit(draft("s")).expect("a commit");
            assert!(store.get(&key).is_some());
            fs::write(artifact.dir.join("data.bin"), b"x").expect("damage");
            assert!(store.get(&key).is_none());
        }
    }

    #[test]
    fn what_a_killed_run_left_of_a_key_is_not_part_of_the_next_artifact() {
        let (dir, store, key) = store();
        for name in [format!("{}.1.0", key.0), format!("{}.1.old", key.0)] {
            let left = dir.path().join("tmp").join(name);
            fs::create_dir(&left).expect("a folder");
            fs::write(left.join("half.parquet"), b"PAR1").expect("a file");
        }
        let other = dir.path().join("tmp").join("notes");
        fs::create_dir(&other).expect("a folder");
        let artifact = store.begin(&key, &|| true).expect("a staging folder").commit(draft("s")).expect("a commit");
        assert_eq!(artifact.manifest.files.len(), 1);
        let left: Vec<_> = fs::read_dir(dir.path().join("tmp")).expect("the folder").collect();
        assert!(left.len() == 1 && other.is_dir(), "{left:?}");
        // What is not named like a staging folder is not labpipe's to remove.
        let report = store.gc(dir.path(), Duration::ZERO, false).expect("a report");
        assert!(other.is_dir() && report.removed.len() == 1, "{report:?}");
    }

    #[test]
    fn a_second_process_waits_for_the_key_or_gives_up_when_told() {
        let (_dir, store, key) = store();
        let staging = store.begin(&key, &|| true).expect("a staging folder");
        assert!(matches!(store.begin(&key, &|| false), Err(StoreError::Cancelled { .. })));
        drop(staging);
        assert!(store.begin(&key, &|| false).is_ok());
    }
}
