//! What killed runs left, and notes on keys that are gone.

use super::cache::Store;
use super::error::StoreError;
use super::exchange::remove_any;
use super::fs::{files_below, is_aside};
use super::gc::GcReport;
use super::lock::try_lock;
use super::references::References;
use super::results::RUN;
use super::usage::IndexEntry;
use crate::artifact::Key;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// A temporary file that has not changed for this long belongs to no running process.
const ABANDONED: Duration = Duration::from_secs(60);

impl Store {
    /// Removes staging folders of processes that are gone. What is not named like one is not labpipe's.
    pub(super) fn remove_staging(&self, dry_run: bool, report: &mut GcReport) -> Result<(), StoreError> {
        for path in list(&self.dir().join("tmp"))? {
            let name = name_of(&path);
            let key = Key(name.split('.').next().unwrap_or_default().to_owned());
            if !key.is_well_formed() || !name.contains('.') || !self.is_free(&key)? {
                continue;
            }
            let bytes = size(&path)?;
            if !dry_run {
                let Some(_lock) = try_lock(&self.lock_path(&key))? else { continue };
                remove_any(&path).map_err(StoreError::io("remove", &path))?;
            }
            report.removed.push((name, bytes, "left by a run that was killed".to_owned()));
        }
        Ok(())
    }

    /// Returns small files without a use.
    pub(super) fn leftovers(
        &self,
        kept: &BTreeSet<String>,
        references: &References,
        is_idle: bool,
        start: SystemTime,
    ) -> Result<Vec<PathBuf>, StoreError> {
        let mut found = Vec::new();
        for path in list(&self.dir().join("locks"))? {
            let name = name_of(&path);
            let key = Key(name.trim_end_matches(".held").to_owned());
            if key.is_well_formed() && !kept.contains(&key.0) && self.is_free(&key)? {
                found.push(path);
            }
        }
        let used = list(&self.dir().join("used"))?;
        found.extend(used.into_iter().filter(|path| !kept.contains(&name_of(path))));
        for pipeline in list(&self.dir().join("index"))? {
            let entries = if pipeline.is_dir() { list(&pipeline)? } else { Vec::new() };
            let has_artifact = entries.iter().any(|path| {
                let entry = fs::read(path).ok().and_then(|bytes| serde_json::from_slice::<IndexEntry>(&bytes).ok());
                entry.is_some_and(|entry| kept.contains(&entry.key))
            });
            if !has_artifact && !references.pipelines.contains(&name_of(&pipeline)) {
                found.push(pipeline);
            } else {
                found.extend(entries.into_iter().filter(|path| is_abandoned(path, is_idle, start)));
            }
        }
        let own = list(self.dir())?;
        found.extend(own.into_iter().filter(|path| is_abandoned(path, is_idle, start)));
        for folder in &references.folders {
            found.extend(abandoned_in_results(folder, start));
        }
        Ok(found)
    }
}

fn list(dir: &Path) -> Result<Vec<PathBuf>, StoreError> {
    match fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(StoreError::Io { verb: "list", path: dir.to_owned(), source }),
        Ok(entries) => {
            let mut paths: Vec<PathBuf> = entries.filter_map(Result::ok).map(|entry| entry.path()).collect();
            paths.sort();
            Ok(paths)
        }
    }
}

fn name_of(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

pub fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|meta| meta.modified()).ok()
}

pub fn size(path: &Path) -> Result<u64, StoreError> {
    let Ok(meta) = fs::symlink_metadata(path) else { return Ok(0) };
    if !meta.is_dir() {
        return Ok(meta.len());
    }
    Ok(files_below(path)?.iter().filter_map(|file| fs::symlink_metadata(path.join(file)).ok()).map(|m| m.len()).sum())
}

/// Returns true for a temporary file that a killed process left. With no run going on, and planning kept off by gc's lock, any that
/// is older than gc's start is one.
fn is_abandoned(path: &Path, is_idle: bool, start: SystemTime) -> bool {
    let Some(changed) = modified(path).filter(|_| is_aside(&name_of(path))) else { return false };
    let age = start.duration_since(changed).unwrap_or_default();
    if is_idle { changed < start } else { age >= ABANDONED }
}

/// Returns temporary files in a results folder: beside `latest`, and below the folders of runs.
fn abandoned_in_results(results: &Path, start: SystemTime) -> Vec<PathBuf> {
    let is_left = |path: &PathBuf| {
        let is_own_name = is_aside(&name_of(path));
        // A link's own time, not that of what it names.
        let changed = fs::symlink_metadata(path).and_then(|meta| meta.modified()).ok().filter(|_| is_own_name);
        changed.is_some_and(|changed| start.duration_since(changed).unwrap_or_default() >= ABANDONED)
    };
    let entries = |dir: &Path| list(dir).unwrap_or_default();
    let mut found: Vec<PathBuf> = entries(results).into_iter().filter(is_left).collect();
    for run in entries(results).iter().filter(|path| path.is_dir() && !path.is_symlink()).flat_map(|path| entries(path))
    {
        if run.join(RUN).is_file() {
            let files = files_below(&run).unwrap_or_default();
            found.extend(files.into_iter().map(|file| run.join(file)).filter(is_left));
        }
    }
    found
}
