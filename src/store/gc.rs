//! Looking after the cache: what is there, whether it is whole, what nobody refers to any more.

use super::cache::{MANIFEST, Manifest, Store};
use super::error::StoreError;
use super::file_hash::hash_file;
use crate::artifact::Key;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// What verification found of one artifact.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    pub key: String,
    pub stage: String,
    /// Nothing where it is whole; else the file and what is wrong.
    pub damage: Option<String>,
}

/// What gc removed, or would remove.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GcReport {
    /// (name in the cache, bytes, why)
    pub removed: Vec<(String, u64, String)>,
    pub n_kept: usize,
}

impl Store {
    /// Returns every artifact's manifest and size in bytes, in the order of keys.
    ///
    /// # Errors
    /// `Io` where the folder can't be listed.
    pub fn list(&self) -> Result<Vec<(Manifest, u64)>, StoreError> {
        let mut found = Vec::new();
        for dir in self.artifact_dirs()? {
            let manifest =
                fs::read(dir.join(MANIFEST)).ok().and_then(|bytes| serde_json::from_slice::<Manifest>(&bytes).ok());
            if let Some(manifest) = manifest {
                let bytes = manifest.files.iter().map(|file| file.bytes).sum();
                found.push((manifest, bytes));
            }
        }
        Ok(found)
    }

    fn artifact_dirs(&self) -> Result<Vec<PathBuf>, StoreError> {
        let entries = fs::read_dir(self.dir()).map_err(StoreError::io("list", self.dir()))?;
        let mut dirs: Vec<PathBuf> = entries
            .filter_map(Result::ok)
            .map(|entry| entry.path())
            .filter(|path| path.is_dir() && path.file_name().is_some_and(|name| is_key(&name.to_string_lossy())))
            .collect();
        dirs.sort();
        Ok(dirs)
    }

    /// Hashes every file of every artifact again.
    ///
    /// # Errors
    /// `Io` where the folder can't be listed; damage is a verdict, no error.
    pub fn verify(&self) -> Result<Vec<Verdict>, StoreError> {
        let mut verdicts = Vec::new();
        for dir in self.artifact_dirs()? {
            let key = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let manifest = fs::read(dir.join(MANIFEST)).map_err(|error| error.to_string());
            let manifest =
                manifest.and_then(|b| serde_json::from_slice::<Manifest>(&b).map_err(|error| error.to_string()));
            verdicts.push(match manifest {
                Err(reason) => Verdict { key, stage: "?".to_owned(), damage: Some(format!("{MANIFEST}: {reason}")) },
                Ok(manifest) => Verdict { key, damage: damage(&dir, &manifest), stage: manifest.stage },
            });
        }
        Ok(verdicts)
    }

    /// Removes artifacts that no run in `results_dir` refers to and that are older than `older_than`, and staging folders of
    /// processes that are gone.
    ///
    /// # Errors
    /// `Io`.
    pub fn gc(&self, results_dir: &Path, older_than: Duration, dry_run: bool) -> Result<GcReport, StoreError> {
        let referred = referred_keys(results_dir);
        let mut report = GcReport::default();
        for dir in self.artifact_dirs()? {
            let name = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            if referred.contains(&name) || age(&dir) < older_than || !self.is_free(&Key(name.clone())) {
                report.n_kept += 1;
            } else {
                remove(&dir, "no run refers to it", dry_run, &mut report)?;
            }
        }
        let tmp = self.dir().join("tmp");
        for entry in fs::read_dir(&tmp).map_err(StoreError::io("list", &tmp))?.filter_map(Result::ok) {
            let name = entry.file_name().to_string_lossy().into_owned();
            let key = name.split('.').next().unwrap_or_default().to_owned();
            if is_key(&key) && entry.path().is_dir() && self.is_free(&Key(key)) {
                remove(&entry.path(), "left by a run that was killed", dry_run, &mut report)?;
            }
        }
        Ok(report)
    }

    /// Returns true if no process holds the key's lock.
    fn is_free(&self, key: &Key) -> bool {
        match File::open(self.dir().join("locks").join(&key.0)) {
            Ok(lock) => lock.try_lock().is_ok(),
            Err(_) => true,
        }
    }
}

fn is_key(name: &str) -> bool {
    name.len() == 64 && name.chars().all(|c| c.is_ascii_hexdigit())
}

fn damage(dir: &Path, manifest: &Manifest) -> Option<String> {
    manifest.files.iter().find_map(|file| {
        let path = dir.join(&file.name);
        match fs::metadata(&path) {
            Err(error) => Some(format!("{}: {error}", file.name)),
            Ok(meta) if meta.len() != file.bytes => {
                Some(format!("{}: expected {} bytes, found {}", file.name, file.bytes, meta.len()))
            }
            Ok(_) => match hash_file(&path) {
                Ok(hash) if hash == file.blake3 => None,
                Ok(_) => Some(format!("{}: its content changed", file.name)),
                Err(error) => Some(error.to_string()),
            },
        }
    })
}

/// Collects every key that a run's `run.json` names.
fn referred_keys(results_dir: &Path) -> BTreeSet<String> {
    let mut keys = BTreeSet::new();
    let runs = fs::read_dir(results_dir).into_iter().flatten().filter_map(Result::ok);
    for run in runs.flat_map(|pipeline| fs::read_dir(pipeline.path()).into_iter().flatten().filter_map(Result::ok)) {
        let Ok(bytes) = fs::read(run.path().join("run.json")) else { continue };
        let Ok(json) = serde_json::from_slice::<serde_json::Value>(&bytes) else { continue };
        for stage in json["stages"].as_array().into_iter().flatten() {
            keys.extend(stage["key"].as_str().map(str::to_owned));
        }
    }
    keys
}

fn age(dir: &Path) -> Duration {
    let modified = fs::metadata(dir.join(MANIFEST)).and_then(|meta| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    SystemTime::now().duration_since(modified).unwrap_or_default()
}

fn remove(dir: &Path, why: &str, dry_run: bool, report: &mut GcReport) -> Result<(), StoreError> {
    let bytes =
        super::fs::files_below(dir)?.iter().filter_map(|file| fs::metadata(dir.join(file)).ok()).map(|m| m.len()).sum();
    if !dry_run {
        fs::remove_dir_all(dir).map_err(StoreError::io("remove", dir))?;
    }
    let name = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    report.removed.push((name, bytes, why.to_owned()));
    Ok(())
}
