//! What runs leave for people: `results/<pipeline>/<run_id>/[<cell>/]<stage>/`, and `results/latest`.

use super::cache::Artifact;
use super::error::StoreError;
use super::folders::{folder_name, stage_folders};
use super::fs::{aside, copy_hashing, create_dirs, write_atomically};
use super::manifest::Damage;
use super::quirks::note_once;
use super::staging::to_json;
use crate::artifact::Record;
use serde_json::Value;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

pub const RUN: &str = "run.json";
pub const LATEST: &str = "latest";
/// Runs of one pipeline that may start in the same second with the same id.
const MAX_SAME_ID: usize = 1000;

/// The folder of all results.
#[derive(Debug, Clone)]
pub struct Results {
    dir: PathBuf,
}

/// One run's folder.
#[derive(Debug, Clone)]
pub struct RunDir {
    pub path: PathBuf,
}

impl Results {
    pub fn new(dir: &Path) -> Results {
        Results { dir: dir.to_owned() }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes a run's folder, which no other run has: where `run_id` is taken, `run_id-2` and so on. The id is in
    /// [`RunDir::run_id`].
    ///
    /// # Errors
    /// `Io` where the folder can't be written: nothing has run yet then.
    pub fn reserve(&self, pipeline: &str, run_id: &str) -> Result<RunDir, StoreError> {
        let parent = self.dir.join(folder_name(pipeline));
        create_dirs(&parent)?;
        for n in 1..=MAX_SAME_ID {
            let path = parent.join(if n == 1 { run_id.to_owned() } else { format!("{run_id}-{n}") });
            match fs::create_dir(&path) {
                Ok(()) => return Ok(RunDir { path }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(source) => return Err(StoreError::Io { verb: "create", path, source }),
            }
        }
        let reason = format!("there are {MAX_SAME_ID} runs with this id");
        Err(StoreError::Write { path: parent.join(run_id), reason })
    }

    /// Writes a run's first `run.json`, and lets `latest` name the run.
    ///
    /// # Errors
    /// `Io` where the folder can't be written. A `latest` that can't be made is a warning.
    pub fn start(&self, run_dir: &RunDir, run: &Value) -> Result<(), StoreError> {
        run_dir.write_run(run)?;
        let Ok(target) = run_dir.path.strip_prefix(&self.dir) else { return Ok(()) };
        let latest = self.dir.join(LATEST);
        if fs::symlink_metadata(&latest).is_ok() && !is_own_link(&latest) {
            let text = format!(
                "{} is not a link that labpipe made: it stays as it is; show and rerun take the newest run by its id",
                latest.display()
            );
            note_once("latest", text);
        } else if let Err(error) = point(&latest, target) {
            let text = format!(
                "failed to make the link {} ({error}): show and rerun take the newest run by its id",
                latest.display()
            );
            note_once("latest", text);
        }
        Ok(())
    }

    /// Returns the newest started run's folder and its `run.json`: the one that `latest` names, or, where that is no link of
    /// labpipe's to a run, the one with the newest id.
    ///
    /// # Errors
    /// `Io` where there is none yet, `Format` where it can't be read.
    pub fn latest(&self) -> Result<(RunDir, Value), StoreError> {
        let latest = self.dir.join(LATEST);
        if is_own_link(&latest) && latest.join(RUN).is_file() {
            return self.open(&latest);
        }
        let newest = self.runs().into_iter().max_by_key(|path| {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            // Ids begin with the second; within one the folder made last.
            let second = name.split('-').next().unwrap_or_default().to_owned();
            (second, fs::metadata(path).and_then(|meta| meta.created().or_else(|_| meta.modified())).ok(), name)
        });
        self.open(&newest.unwrap_or(latest))
    }

    /// Returns the folders of all runs.
    fn runs(&self) -> Vec<PathBuf> {
        let pipelines = fs::read_dir(&self.dir).into_iter().flatten().filter_map(Result::ok);
        let runs = pipelines
            .filter(|entry| entry.file_name() != LATEST)
            .flat_map(|entry| fs::read_dir(entry.path()).into_iter().flatten().filter_map(Result::ok));
        runs.map(|entry| entry.path()).filter(|path| path.join(RUN).is_file()).collect()
    }

    /// Returns a run by its id, wherever it lies, and its `run.json`.
    ///
    /// # Errors
    /// As [`Results::latest`].
    pub fn run(&self, run_id: &str) -> Result<(RunDir, Value), StoreError> {
        let pipelines = fs::read_dir(&self.dir).map_err(StoreError::io("list", &self.dir))?;
        let found = pipelines
            .filter_map(Result::ok)
            .map(|entry| entry.path().join(run_id))
            .find(|path| path.join(RUN).is_file());
        self.open(&found.unwrap_or_else(|| self.dir.join(run_id)))
    }

    /// Returns the run whose folder that is, and its `run.json`.
    ///
    /// # Errors
    /// As [`Results::latest`].
    pub fn open(&self, path: &Path) -> Result<(RunDir, Value), StoreError> {
        let file = path.join(RUN);
        let bytes = fs::read(&file).map_err(StoreError::io("read", &file))?;
        let json = serde_json::from_slice(&bytes)
            .map_err(|error| StoreError::Format { path: file, reason: error.to_string() })?;
        Ok((RunDir { path: fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()) }, json))
    }
}

/// Returns true for a link as labpipe makes them: to `<pipeline>/<run_id>` beside it.
fn is_own_link(latest: &Path) -> bool {
    let Ok(target) = fs::read_link(latest) else { return false };
    let parts: Vec<Component<'_>> = target.components().collect();
    matches!(parts[..], [Component::Normal(_), Component::Normal(_)])
}

fn point(latest: &Path, target: &Path) -> io::Result<()> {
    let temporary = aside(latest);
    // A killed run of the same process id may have left its own; a link can't replace one that is there.
    let _ = fs::remove_file(&temporary);
    std::os::unix::fs::symlink(target, &temporary)?;
    fs::rename(&temporary, latest).inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

impl RunDir {
    /// Returns the run's id: its folder's name.
    pub fn run_id(&self) -> String {
        self.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// Replaces `run.json`.
    ///
    /// # Errors
    /// `Io`.
    pub fn write_run(&self, run: &Value) -> Result<(), StoreError> {
        let path = self.path.join(RUN);
        write_atomically(&path, &to_json(run, &path)?)
    }

    /// Returns the folder of a stage: `<stage>`, or `<cell>/<stage>` for a copy that belongs to a cell.
    pub fn stage_dir(&self, address: &str) -> PathBuf {
        stage_folders(address).iter().fold(self.path.clone(), |path, folder| path.join(folder))
    }

    /// Writes a stage's record, and copies what of its artifact a person reads (all but Parquet and weights).
    ///
    /// # Errors
    /// `Damaged` where a file is not as it was committed; `Io`.
    pub fn write_stage(&self, record: &Record, artifact: &Artifact) -> Result<String, StoreError> {
        let dir = self.stage_dir(&record.head.stage);
        create_dirs(&dir)?;
        for file in artifact.manifest.files.iter().filter(|file| file.is_for_people()) {
            let (from, to) = (artifact.dir.join(&file.name), dir.join(&file.name));
            if let Some(parent) = to.parent() {
                create_dirs(parent)?;
            }
            // A copy: a person may edit a report without changing what the cache holds.
            if !copy_hashing(&from, &to, |hash| hash == file.blake3)? {
                let damage = Damage { file: file.name.clone(), reason: "its content changed".to_owned() };
                let key = artifact.key.short().to_owned();
                return Err(StoreError::Damaged { key, stage: record.head.stage.clone(), damage });
            }
        }
        let path = dir.join("record.json");
        let bytes = to_json(&record.to_json(), &path)?;
        write_atomically(&path, &bytes)?;
        Ok(blake3::hash(&bytes).to_hex().to_string())
    }

    /// Reads a stage's record and verifies it against the hash that the run's `run.json` has of it.
    ///
    /// # Errors
    /// `Io`, `Format`.
    pub fn record(&self, address: &str, run: &Value) -> Result<Value, StoreError> {
        let path = self.stage_dir(address).join("record.json");
        let bytes = fs::read(&path).map_err(StoreError::io("read", &path))?;
        let status = run["stages"].as_array().into_iter().flatten().find(|stage| stage["stage"] == address);
        let expected = status.and_then(|status| status["record_blake3"].as_str());
        if expected.is_some_and(|expected| expected != blake3::hash(&bytes).to_hex().as_str()) {
            let reason = "it is not what the run wrote; run the pipeline again, and it is written anew from the cache"
                .to_owned();
            return Err(StoreError::Format { path, reason });
        }
        serde_json::from_slice(&bytes).map_err(|error| StoreError::Format { path, reason: error.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn results() -> (tempfile::TempDir, Results) {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let results = Results::new(&dir.path().join("results"));
        (dir, results)
    }

    #[test]
    fn two_runs_with_one_id_get_folders_of_their_own() {
        let (_dir, results) = results();
        let ids: std::collections::BTreeSet<String> = std::thread::scope(|scope| {
            let start = || results.reserve("p", "20260101T000000Z-abcd").expect("a folder").run_id();
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
            threads.into_iter().map(|thread| thread.join().expect("an id")).collect()
        });
        assert_eq!(ids.len(), 8, "{ids:?}");
        assert!(ids.contains("20260101T000000Z-abcd") && ids.contains("20260101T000000Z-abcd-8"));
    }

    #[test]
    fn a_latest_that_a_person_made_stays_and_the_newest_run_is_found_without_it() {
        for make in [
            (|path: &Path| fs::create_dir(path).expect("a folder")) as fn(&Path),
            |path| fs::write(path, "mine").expect("a file"),
            |path| std::os::unix::fs::symlink("/somewhere/else", path).expect("a link"),
        ] {
            let (_dir, results) = results();
            create_dirs(results.dir()).expect("a folder");
            let latest = results.dir().join(LATEST);
            make(&latest);
            let before = fs::symlink_metadata(&latest).expect("it is there").file_type();
            for id in ["20260101T000001Z-ffff", "20260101T000002Z-0000"] {
                let run = results.reserve("p", id).expect("a folder");
                results.start(&run, &json!({ "run_id": id })).expect("a run");
            }
            assert_eq!(fs::symlink_metadata(&latest).expect("it is there").file_type(), before);
            assert_eq!(results.latest().expect("a run").1["run_id"], "20260101T000002Z-0000");
        }
    }

    #[test]
    fn latest_names_the_run_started_last() {
        let (_dir, results) = results();
        assert!(results.latest().is_err());
        for id in ["20260101T000002Z-aaaa", "20260101T000001Z-bbbb"] {
            let run = results.reserve("p", id).expect("a folder");
            results.start(&run, &json!({ "run_id": id })).expect("a run");
            assert_eq!(results.latest().expect("a run").1["run_id"], id);
        }
        fs::remove_dir_all(results.dir().join("p/20260101T000001Z-bbbb")).expect("the latest run's folder");
        assert_eq!(results.latest().expect("a run").1["run_id"], "20260101T000002Z-aaaa");
    }
}
