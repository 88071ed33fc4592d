//! Events: what happens during a run. Work emits them; `ui` alone prints.

use serde::{Deserialize, Serialize};

/// How a stage ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It ran and its artifact was committed.
    Done,
    /// Its artifact was already in the cache.
    Cached,
    /// It ran and ended in an error.
    Failed,
    /// It did not run because a stage that it needs failed.
    Skipped,
    /// It was stopped by the user before it ended.
    Cancelled,
}

/// How much a note matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    Debug,
    Info,
    Warning,
}

/// One thing that happened. `stage` is a stage's address (`nf4`, `ppl[config=int8]`).
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    RunStarted {
        run_id: String,
        pipeline: String,
        device: String,
        n_stages: usize,
        n_cached: usize,
    },
    StageStarted {
        stage: String,
        kind: String,
    },
    /// `done` of `total` steps of `unit` are finished; `total` is absent where it isn't known.
    StageProgress {
        stage: String,
        done: u64,
        total: Option<u64>,
        unit: String,
    },
    Note {
        stage: Option<String>,
        level: Level,
        text: String,
    },
    StageFinished {
        stage: String,
        kind: String,
        outcome: Outcome,
        duration_s: f64,
        summary: String,
    },
    RunFinished {
        run_id: String,
        n_done: usize,
        n_cached: usize,
        n_failed: usize,
        n_skipped: usize,
        duration_s: f64,
    },
}

/// Takes events from any thread. It must not block for long: a measurement may be running.
pub trait EventSink: Send + Sync {
    fn emit(&self, event: Event);
}

/// Drops every event.
#[derive(Debug, Default, Clone, Copy)]
pub struct NullSink;

impl EventSink for NullSink {
    fn emit(&self, _event: Event) {}
}

/// What long work tells and asks while it goes on.
pub trait Progress: Send + Sync {
    /// Sets how many steps there are, and resets the count of those done.
    fn begin(&self, total: Option<u64>, unit: &str);
    /// Counts `n` more steps as done.
    fn advance(&self, n: u64);
    /// Tells the user something.
    fn note(&self, level: Level, text: &str);
    /// Returns true once the user asked to stop; work then returns its `Cancelled` error soon.
    fn is_cancelled(&self) -> bool;
}

/// Ignores what it is told and never cancels.
#[derive(Debug, Default, Clone, Copy)]
pub struct NullProgress;

impl Progress for NullProgress {
    fn begin(&self, _total: Option<u64>, _unit: &str) {}
    fn advance(&self, _n: u64) {}
    fn note(&self, _level: Level, _text: &str) {}
    fn is_cancelled(&self) -> bool {
        false
    }
}
