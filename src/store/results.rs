//! What runs leave for people: `results/<pipeline>/<run_id>/[<cell>/]<stage>/`, and `results/latest`.

use super::cache::{Artifact, to_json};
use super::error::StoreError;
use super::fs::{aside, create_dirs, write_atomically};
use crate::artifact::Record;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

const RUN: &str = "run.json";
const LATEST: &str = "latest";

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

    /// Makes a run's folder with its first `run.json`, and lets `latest` name it.
    ///
    /// # Errors
    /// `Io` where the folder can't be written: nothing has run yet then.
    pub fn start(&self, pipeline: &str, run_id: &str, run: &Value) -> Result<RunDir, StoreError> {
        let dir = RunDir { path: self.dir.join(pipeline).join(run_id) };
        create_dirs(&dir.path)?;
        dir.write_run(run)?;
        self.point_latest(Path::new(pipeline).join(run_id).as_path())?;
        Ok(dir)
    }

    #[cfg(unix)]
    fn point_latest(&self, target: &Path) -> Result<(), StoreError> {
        let latest = self.dir.join(LATEST);
        let temporary = aside(&latest);
        // A killed run of the same process id may have left its own; a link can't replace one that is there.
        let _ = fs::remove_file(&temporary);
        std::os::unix::fs::symlink(target, &temporary).map_err(StoreError::io("link", &temporary))?;
        fs::rename(&temporary, &latest).map_err(StoreError::io("link", &latest))
    }

    /// Returns the newest started run's folder and its `run.json`.
    ///
    /// # Errors
    /// `Io` where there is none yet, `Format` where it can't be read.
    pub fn latest(&self) -> Result<(RunDir, Value), StoreError> {
        self.open(&self.dir.join(LATEST))
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

impl RunDir {
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
        match address.strip_suffix(']').and_then(|rest| rest.split_once('[')) {
            Some((stage, cell)) => self.path.join(cell).join(stage),
            None => self.path.join(address),
        }
    }

    /// Writes a stage's record, and links or copies what of its artifact a person reads (all but Parquet and weights).
    ///
    /// # Errors
    /// `Io`.
    pub fn write_stage(&self, record: &Record, artifact: &Artifact) -> Result<PathBuf, StoreError> {
        let dir = self.stage_dir(&record.head.stage);
        create_dirs(&dir)?;
        for file in &artifact.manifest.files {
            let is_for_people = !file.name.ends_with(".parquet") && !file.name.ends_with(".safetensors");
            if is_for_people && file.name != "record.json" {
                place(&artifact.dir.join(&file.name), &dir.join(&file.name))?;
            }
        }
        let path = dir.join("record.json");
        write_atomically(&path, &to_json(&record.to_json(), &path)?)?;
        Ok(dir)
    }

    /// Reads a stage's record.
    ///
    /// # Errors
    /// `Io`, `Format`.
    pub fn record(&self, address: &str) -> Result<Value, StoreError> {
        let path = self.stage_dir(address).join("record.json");
        let bytes = fs::read(&path).map_err(StoreError::io("read", &path))?;
        serde_json::from_slice(&bytes).map_err(|error| StoreError::Format { path, reason: error.to_string() })
    }
}

/// Copies a file: a person may edit a report without changing what the cache holds.
fn place(from: &Path, to: &Path) -> Result<(), StoreError> {
    if let Some(parent) = to.parent() {
        create_dirs(parent)?;
    }
    fs::copy(from, to).map(|_| ()).map_err(|source| {
        // Half a picture would look like a whole one; the error that matters is the one being reported.
        let _ = fs::remove_file(to);
        StoreError::Io { verb: "copy", path: to.to_owned(), source }
    })
}
