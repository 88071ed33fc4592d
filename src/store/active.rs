//! Which artifacts runs are about to use, so that `cache gc` beside them leaves those alone.
//!
//! `cache/gc.lock` is held alone while gc removes, and shared while a process finds out what is cached. `cache/runs/<run_id>` is
//! locked as long as its run lasts and lists the keys that the run plans to use, one per line after a line about the process; keys
//! that become known later are added before the run looks for their artifacts.

use super::cache::{LOCK_POLL, Store};
use super::error::StoreError;
use super::fs::create_dirs;
use super::lock::{FileLock, Holder, try_lock, try_lock_shared};
use super::quirks::{is_read_only, note_once};
use crate::artifact::{FORMAT_VERSION, Key};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

const LOCK_SUFFIX: &str = ".lock";

/// Keeps gc waiting while it lives.
#[derive(Debug)]
pub struct UseGuard(#[expect(dead_code, reason = "held for its Drop")] Option<FileLock>);

/// A run that goes on, as gc sees it.
#[derive(Debug)]
pub struct ActiveRun {
    store: Store,
    listed: Mutex<Listed>,
}

#[derive(Debug)]
struct Listed {
    keys: BTreeSet<Key>,
    /// `None` if the cache is read-only.
    marker: Option<Marker>,
}

#[derive(Debug)]
struct Marker {
    path: PathBuf,
    file: File,
    lock: Option<FileLock>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MarkerHead {
    format_version: u32,
    pipeline: String,
    holder: Holder,
}

impl Store {
    /// Keeps gc from removing anything until the guard is dropped; waits for one that is at it.
    ///
    /// # Errors
    /// `Cancelled` once `keep_waiting` returns false; `Io`.
    pub fn hold_off_gc(&self, keep_waiting: &dyn Fn() -> bool) -> Result<UseGuard, StoreError> {
        loop {
            match try_lock_shared(&self.gc_lock_path()) {
                Ok(Some(lock)) => return Ok(UseGuard(lock)),
                // gc can't work there either.
                Err(StoreError::Io { source, .. }) if is_read_only(&source) => return Ok(UseGuard(None)),
                Err(error) => return Err(error),
                Ok(None) if keep_waiting() => std::thread::sleep(LOCK_POLL),
                Ok(None) => return Err(StoreError::Cancelled { key: "the cache's gc".to_owned() }),
            }
        }
    }

    pub(super) fn gc_lock_path(&self) -> PathBuf {
        self.dir().join("gc.lock")
    }

    /// Lists a run with the keys that it plans to use. Call it before the guard under which they were planned is dropped.
    ///
    /// # Errors
    /// `Io`; a cache that can only be read is none.
    pub fn list_run(&self, run_id: &str, pipeline: &str, keys: BTreeSet<Key>) -> Result<ActiveRun, StoreError> {
        let marker = match Marker::create(self.dir(), run_id, pipeline) {
            Ok(mut marker) => {
                marker.add(keys.iter())?;
                Some(marker)
            }
            Err(StoreError::Io { source, .. }) if is_read_only(&source) => {
                let dir = self.dir().display();
                note_once("runs", format!("the cache {dir} can only be read ({source}): new results can't be kept"));
                None
            }
            Err(error) => return Err(error),
        };
        Ok(ActiveRun { store: self.clone(), listed: Mutex::new(Listed { keys, marker }) })
    }

    /// Returns the keys that running runs plan to use, and the markers of runs that ended without removing theirs.
    ///
    /// # Errors
    /// `References` where a running run's marker can't be read.
    pub(super) fn active_keys(&self) -> Result<(BTreeSet<String>, Vec<PathBuf>), StoreError> {
        let dir = self.dir().join("runs");
        let (mut keys, mut ended) = (BTreeSet::new(), Vec::new());
        let Ok(entries) = fs::read_dir(&dir) else { return Ok((keys, ended)) };
        for entry in entries {
            let path = entry.map_err(StoreError::io("list", &dir))?.path();
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            if let Some(run) = name.strip_suffix(LOCK_SUFFIX) {
                if !dir.join(run).exists() && try_lock(&path)?.is_some() {
                    ended.push(path);
                }
                continue;
            }
            if name.ends_with(".held") {
                continue;
            }
            let lock_path = dir.join(format!("{name}{LOCK_SUFFIX}"));
            if try_lock(&lock_path)?.is_some() {
                ended.extend([path, lock_path]);
                continue;
            }
            let unreadable = |reason: String| StoreError::References { path: path.clone(), reason };
            let text = fs::read_to_string(&path).map_err(|error| unreadable(error.to_string()))?;
            let (head, lines) = text.split_once('\n').unwrap_or((&text, ""));
            serde_json::from_str::<MarkerHead>(head).map_err(|error| unreadable(error.to_string()))?;
            keys.extend(lines.lines().map(str::to_owned));
        }
        Ok((keys, ended))
    }
}

impl Marker {
    fn create(cache: &Path, run_id: &str, pipeline: &str) -> Result<Marker, StoreError> {
        let dir = cache.join("runs");
        create_dirs(&dir)?;
        // Runs of several results folders may share an id.
        let mut n = 0;
        let (path, lock) = loop {
            n += 1;
            let name = if n == 1 { run_id.to_owned() } else { format!("{run_id}-{n}") };
            let path = dir.join(&name);
            if let Some(lock) = try_lock(&dir.join(format!("{name}{LOCK_SUFFIX}")))? {
                break (path, lock);
            }
        };
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .map_err(StoreError::io("create", &path))?;
        let head = MarkerHead {
            format_version: FORMAT_VERSION,
            pipeline: pipeline.to_owned(),
            holder: Holder::this_process(),
        };
        let mut line = serde_json::to_string(&head).unwrap_or_default();
        line.push('\n');
        file.write_all(line.as_bytes()).map_err(StoreError::io("write", &path))?;
        Ok(Marker { path, file, lock: Some(lock) })
    }

    fn add<'a>(&mut self, keys: impl Iterator<Item = &'a Key>) -> Result<(), StoreError> {
        let lines: String = keys.map(|key| format!("{}\n", key.0)).collect();
        self.file.write_all(lines.as_bytes()).map_err(StoreError::io("write", &self.path))
    }
}

impl ActiveRun {
    /// Lists one more key; look for its artifact before the guard is dropped.
    ///
    /// # Errors
    /// As [`Store::hold_off_gc`].
    pub fn add(&self, key: &Key, keep_waiting: &dyn Fn() -> bool) -> Result<UseGuard, StoreError> {
        let is_listed = |listed: &Listed| listed.keys.contains(key) || listed.marker.is_none();
        if is_listed(&self.lock()) {
            return Ok(UseGuard(None));
        }
        let guard = self.store.hold_off_gc(keep_waiting)?;
        let mut listed = self.lock();
        if listed.keys.insert(key.clone())
            && let Some(marker) = &mut listed.marker
        {
            marker.add(std::iter::once(key))?;
        }
        Ok(guard)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Listed> {
        self.listed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Marker {
    fn drop(&mut self) {
        // gc removes what could not be removed here: its lock is free.
        let _ = fs::remove_file(&self.path);
        let mut lock_path = self.path.clone().into_os_string();
        lock_path.push(LOCK_SUFFIX);
        let _ = fs::remove_file(lock_path);
        self.lock = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> Key {
        Key(format!("{n:02x}").repeat(32))
    }

    #[test]
    fn a_run_s_keys_are_listed_while_it_lasts_also_those_found_later() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(dir.path()).expect("a store");
        let run = store.list_run("r", "p", BTreeSet::from([key(1)])).expect("a run");
        let twin = store.list_run("r", "q", BTreeSet::from([key(2)])).expect("a run of the same id");
        drop(run.add(&key(3), &|| true).expect("a guard"));
        let (keys, ended) = store.active_keys().expect("keys");
        assert_eq!((keys.len(), ended.len()), (3, 0), "{keys:?} {ended:?}");
        drop((run, twin));
        assert_eq!(store.active_keys().expect("keys"), (BTreeSet::new(), Vec::new()));
        assert_eq!(fs::read_dir(dir.path().join("runs")).expect("a folder").count(), 0);
    }

    #[test]
    fn what_a_killed_run_lists_counts_no_more_and_what_can_t_be_read_of_a_running_one_is_an_error() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(dir.path()).expect("a store");
        fs::write(dir.path().join("runs/killed"), format!("{{}}\n{}\n", key(1).0)).expect("a marker");
        let (keys, ended) = store.active_keys().expect("keys");
        assert!(keys.is_empty() && ended.len() == 2, "{keys:?} {ended:?}");
        let _run = store.list_run("r", "p", BTreeSet::new()).expect("a run");
        fs::write(dir.path().join("runs/r"), "{\"format_vers").expect("cut");
        let error = store.active_keys().expect_err("unreadable").to_string();
        assert!(error.contains("runs/r"), "{error}");
    }

    #[test]
    fn gc_and_planning_exclude_each_other() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(dir.path()).expect("a store");
        let planning = [store.hold_off_gc(&|| true).expect("one"), store.hold_off_gc(&|| true).expect("another")];
        assert!(try_lock(&store.gc_lock_path()).expect("an answer").is_none());
        drop(planning);
        let _gc = try_lock(&store.gc_lock_path()).expect("an answer").expect("free");
        assert!(matches!(store.hold_off_gc(&|| false), Err(StoreError::Cancelled { .. })));
    }
}
