//! `run.json`: what a run was asked, on what machine, and how each stage ended.

use super::environment::load_average;
use crate::artifact::{FORMAT_VERSION, StageStatus};
use jiff::{Timestamp, Unit};
use serde_json::{Value, json};
use std::path::PathBuf;

/// A run as `run.json` tells it.
#[derive(Debug, Clone)]
pub struct RunFile {
    pub run_id: String,
    pub pipeline: String,
    /// As given on the command line, and where relative paths started.
    pub pipeline_path: PathBuf,
    pub root: PathBuf,
    /// The command line, word by word.
    pub command: Vec<String>,
    /// Which stages were asked for, and how.
    pub selection: Value,
    /// Stages that might run at once.
    pub jobs: usize,
    /// Every stage with its canonical parameters.
    pub plan: Value,
    /// Every file that parameters name, with hash and size.
    pub files: Value,
    /// What was taken from the cache and verified before the first stage.
    pub inputs_verified: Value,
    pub pipeline_text: String,
    pub set: Vec<(String, String)>,
    pub matrix: Vec<(String, Vec<String>)>,
    /// `--memory-limit`, and the limit that held, in bytes; null without one.
    pub memory_limit_asked: Option<u64>,
    pub memory_limit_bytes: Option<u64>,
    /// As asked for (`auto`), as found, and why.
    pub device_asked: Option<String>,
    pub device: String,
    pub device_reason: String,
    /// `--execution`, and the path that was asked for in the end.
    pub execution_asked: Option<String>,
    pub execution: String,
    pub environment: Value,
    pub started_at: String,
    pub ended_at: Option<String>,
    /// Processes that wanted to run, averaged over a minute, at the end; `environment` has it from the start.
    pub load_average_after: Option<f64>,
    pub status: String,
    pub stages: Vec<StageStatus>,
}

/// Returns the time now, RFC 3339 in UTC, to the second.
pub fn timestamp() -> String {
    Timestamp::now().round(Unit::Second).unwrap_or(Timestamp::UNIX_EPOCH).to_string()
}

/// Returns a new run's id: sortable by time, different for runs started in the same second.
pub fn run_id() -> String {
    let compact: String = timestamp().chars().filter(char::is_ascii_alphanumeric).collect();
    let unique = blake3::hash(format!("{:?} {}", Timestamp::now(), std::process::id()).as_bytes());
    format!("{compact}-{}", &unique.to_hex()[..4])
}

impl RunFile {
    /// Notes how the run ended.
    pub fn end(&mut self, status: &str) {
        self.status = status.to_owned();
        self.ended_at = Some(timestamp());
        self.load_average_after = load_average();
    }

    /// Returns the file's content.
    pub fn to_json(&self) -> Value {
        let set: Vec<Value> = self.set.iter().map(|(name, value)| json!({ "name": name, "value": value })).collect();
        let matrix: Vec<Value> =
            self.matrix.iter().map(|(name, values)| json!({ "name": name, "values": values })).collect();
        json!({
            "format_version": FORMAT_VERSION,
            "run_id": self.run_id,
            "pipeline": self.pipeline,
            "status": self.status,
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "pipeline_path": self.pipeline_path,
            "pipeline_blake3": blake3::hash(self.pipeline_text.as_bytes()).to_hex().to_string(),
            "root": self.root,
            "command": self.command,
            "selection": self.selection,
            "jobs": self.jobs,
            "set": set,
            "matrix": matrix,
            "device_asked": self.device_asked,
            "memory_limit_asked": self.memory_limit_asked,
            "memory_limit_bytes": self.memory_limit_bytes,
            "execution_asked": self.execution_asked,
            "execution": self.execution,
            "device": self.device,
            "device_reason": self.device_reason,
            "environment": self.environment,
            "load_average_after": self.load_average_after,
            "files": self.files,
            "inputs_verified": self.inputs_verified,
            "stages": self.stages,
            "plan": self.plan,
            "pipeline_text": self.pipeline_text,
        })
    }
}
