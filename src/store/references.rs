//! What runs refer to: the keys in every `run.json` of the results folders that used a cache.

use super::cache::Store;
use super::error::StoreError;
use super::fs::write_atomically;
use super::results::{LATEST, RUN};
use crate::artifact::FORMAT_VERSION;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const RESULTS_FOLDERS: &str = "results_folders.json";

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ResultsFolders {
    format_version: u32,
    folders: BTreeSet<PathBuf>,
}

/// What was found in the results.
#[derive(Debug, Default, PartialEq)]
pub struct References {
    pub keys: BTreeSet<String>,
    /// Names of the pipelines' folders.
    pub pipelines: BTreeSet<String>,
    /// What could not be read, with the reason: with `force` it counts as referring to nothing.
    pub unreadable: Vec<(PathBuf, String)>,
    /// Results folders that were read.
    pub folders: Vec<PathBuf>,
}

impl Store {
    /// Notes that runs in a results folder refer to this cache: gc reads every such folder.
    ///
    /// # Errors
    /// `Io`; `References` where the list is damaged.
    pub fn note_results(&self, results: &Path) -> Result<(), StoreError> {
        let folder = fs::canonicalize(results).map_err(StoreError::io("read", results))?;
        let mut known = self.results_folders()?;
        if known.insert(folder) { self.write_results_folders(known) } else { Ok(()) }
    }

    /// Forgets results folders that are gone.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn forget_results(&self, gone: &[(PathBuf, String)]) -> Result<(), StoreError> {
        let mut known = self.results_folders().unwrap_or_default();
        let n_before = known.len();
        known.retain(|folder| !gone.iter().any(|(path, _)| path == folder));
        if known.len() < n_before { self.write_results_folders(known) } else { Ok(()) }
    }

    fn write_results_folders(&self, folders: BTreeSet<PathBuf>) -> Result<(), StoreError> {
        let path = self.dir().join(RESULTS_FOLDERS);
        let known = ResultsFolders { format_version: FORMAT_VERSION, folders };
        write_atomically(&path, &super::staging::to_json(&known, &path)?)
    }

    fn results_folders(&self) -> Result<BTreeSet<PathBuf>, StoreError> {
        let path = self.dir().join(RESULTS_FOLDERS);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            Err(source) => return Err(StoreError::Io { verb: "read", path, source }),
        };
        match serde_json::from_slice::<ResultsFolders>(&bytes) {
            Ok(known) if known.format_version == FORMAT_VERSION => Ok(known.folders),
            Ok(known) => {
                let reason = format!("format_version {} is not {FORMAT_VERSION}", known.format_version);
                Err(StoreError::References { path, reason })
            }
            Err(error) => Err(StoreError::References { path, reason: error.to_string() }),
        }
    }

    /// Reads what the runs refer to, in a results folder and in all others that used this cache.
    pub(super) fn references(&self, results: &Path) -> References {
        let mut found = References::default();
        let mut folders = BTreeSet::from([fs::canonicalize(results).unwrap_or_else(|_| results.to_owned())]);
        match self.results_folders() {
            Ok(known) => folders.extend(known),
            Err(error) => found.unreadable.push((self.dir().join(RESULTS_FOLDERS), error.to_string())),
        }
        let own = fs::canonicalize(results).unwrap_or_else(|_| results.to_owned());
        for folder in folders {
            let n_before = (found.pipelines.len(), found.unreadable.len());
            read_results(&folder, &mut found);
            if folder != own && (found.pipelines.len(), found.unreadable.len()) == n_before {
                let reason = "it held runs and holds none now; is its disk mounted?".to_owned();
                found.unreadable.push((folder.clone(), reason));
            }
            found.folders.push(folder);
        }
        found
    }
}

/// Returns the entries of a folder; one that can't be listed is noted.
fn entries(dir: &Path, found: &mut References) -> Vec<PathBuf> {
    let listed = fs::read_dir(dir).and_then(|entries| entries.map(|entry| entry.map(|e| e.path())).collect());
    listed.unwrap_or_else(|error: std::io::Error| {
        found.unreadable.push((dir.to_owned(), error.to_string()));
        Vec::new()
    })
}

fn read_results(results: &Path, found: &mut References) {
    for pipeline in entries(results, found) {
        let name = pipeline.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let is_link = pipeline.is_symlink();
        match fs::metadata(&pipeline) {
            // The run that `latest` names is read where it lies; one that is gone refers to nothing.
            _ if is_link && name == LATEST => continue,
            Ok(meta) if meta.is_dir() => {}
            Ok(_) => continue,
            Err(error) => {
                found.unreadable.push((pipeline, error.to_string()));
                continue;
            }
        }
        found.pipelines.insert(name);
        // A copied `latest` is a run itself.
        if pipeline.join(RUN).exists() {
            read_run(&pipeline, found);
        }
        for run in entries(&pipeline, found) {
            match fs::metadata(&run) {
                Ok(meta) if meta.is_dir() => read_run(&run, found),
                Ok(_) => {}
                // A link whose target is away, or a folder that may not be looked into.
                Err(error) => found.unreadable.push((run, error.to_string())),
            }
        }
    }
}

/// Reads the keys that a run has used, and those that it planned to.
fn read_run(run: &Path, found: &mut References) {
    let path = run.join(RUN);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            // A folder of labpipe's with stages in it had one; any other folder is a person's.
            match has_records(run) {
                Ok(has_records) if !(is_run_id(run) && has_records) => {}
                Ok(_) => found.unreadable.push((path, error.to_string())),
                Err(error) => found.unreadable.push((run.to_owned(), error.to_string())),
            }
            return;
        }
        Err(error) => return found.unreadable.push((path, error.to_string())),
    };
    let json = match serde_json::from_slice::<serde_json::Value>(&bytes) {
        Ok(json) => json,
        Err(error) => return found.unreadable.push((path, error.to_string())),
    };
    let is_known = json["format_version"] == FORMAT_VERSION;
    let (Some(stages), true) = (json["stages"].as_array(), is_known) else {
        return found.unreadable.push((path, "it is no run.json of this version of labpipe".to_owned()));
    };
    let planned = json["plan"].as_array().into_iter().flatten();
    found.keys.extend(stages.iter().chain(planned).filter_map(|stage| stage["key"].as_str()).map(str::to_owned));
}

/// Returns true for a name like `20260102T030405Z-abcd`.
fn is_run_id(run: &Path) -> bool {
    let name = run.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let second = name.split('-').next().unwrap_or_default();
    second.len() == 16 && second.ends_with('Z') && second.as_bytes()[8] == b'T'
}

fn has_records(run: &Path) -> Result<bool, StoreError> {
    super::fs::files_below(run).map(|files| files.iter().any(|file| file.ends_with("record.json")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lab() -> (tempfile::TempDir, Store, PathBuf) {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(&dir.path().join("cache")).expect("a store");
        let results = dir.path().join("results");
        fs::create_dir_all(results.join("p/20260101T000000Z-abcd")).expect("a folder");
        (dir, store, results)
    }

    fn run(results: &Path, name: &str, text: &str) {
        fs::create_dir_all(results.join(name)).expect("a folder");
        fs::write(results.join(name).join(RUN), text).expect("run.json");
    }

    #[test]
    fn keys_that_were_used_and_that_were_planned_count_in_every_results_folder() {
        let (dir, store, results) = lab();
        run(&results, "p/a", r#"{"format_version":1,"stages":[{"key":"k1"},{"key":null}],"plan":[{"key":"k2"}]}"#);
        let other = dir.path().join("other");
        run(&other, "q/b", r#"{"format_version":1,"stages":[{"key":"k3"}]}"#);
        store.note_results(&other).expect("noted");
        store.note_results(&other).expect("noted once more");
        let found = store.references(&results);
        assert_eq!(found.keys, ["k1", "k2", "k3"].map(str::to_owned).into());
        assert!(found.unreadable.is_empty() && found.folders.len() == 2, "{found:?}");
    }

    #[test]
    fn what_can_t_be_read_is_named() {
        for text in ["", "{", "null", "[]", r#"{"format_version":2,"stages":[]}"#, r#"{"format_version":1}"#] {
            let (_dir, store, results) = lab();
            run(&results, "p/a", text);
            let found = store.references(&results);
            assert!(
                matches!(&found.unreadable[..], [(path, _)] if path.ends_with("p/a/run.json")),
                "{text}: {found:?}"
            );
        }
        let (_dir, store, results) = lab();
        assert!(
            store.references(&results).unreadable.is_empty(),
            "a kill before the first run.json leaves an empty folder"
        );
        fs::create_dir_all(results.join("p/20260101T000000Z-abcd/ppl")).expect("a folder");
        fs::write(results.join("p/20260101T000000Z-abcd/ppl/record.json"), "{}").expect("a record");
        assert_eq!(store.references(&results).unreadable.len(), 1, "its run.json is gone");
        let (dir, store, results) = lab();
        std::os::unix::fs::symlink(dir.path().join("away"), results.join("p/archived")).expect("a link");
        let found = store.references(&results);
        assert!(matches!(&found.unreadable[..], [(path, _)] if path.ends_with("p/archived")), "{found:?}");
        let (dir, store, results) = lab();
        let other = dir.path().join("other");
        run(&other, "q/b", r#"{"format_version":1,"stages":[]}"#);
        store.note_results(&other).expect("noted");
        fs::remove_dir_all(other.join("q")).expect("its disk is away");
        let found = store.references(&results);
        assert!(matches!(&found.unreadable[..], [(path, _)] if path.ends_with("other")), "{found:?}");
        let (_dir, store, results) = lab();
        fs::remove_dir_all(&results).expect("gone");
        assert_eq!(store.references(&results).unreadable.len(), 1);
        fs::write(store.dir().join(RESULTS_FOLDERS), "{").expect("damage");
        assert_eq!(store.references(&results).unreadable.len(), 2);
    }
}
