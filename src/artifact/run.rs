//! What `run.json` says of a stage.

use super::number;
use crate::event::Outcome;
use serde::{Deserialize, Serialize};

/// One stage of a run as `run.json` lists it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageStatus {
    pub stage: String,
    pub kind: String,
    pub key: Option<String>,
    pub outcome: Option<String>,
    #[serde(default, with = "number::optional")]
    pub duration_s: Option<f64>,
    pub summary: Option<String>,
    pub error: Option<String>,
    /// blake3 of the stage's `record.json` in the run's folder; null where it left none.
    #[serde(default)]
    pub record_blake3: Option<String>,
}

impl Outcome {
    /// Returns the word used in `run.json`.
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Done => "done",
            Outcome::Cached => "cached",
            Outcome::Failed => "failed",
            Outcome::Skipped => "skipped",
            Outcome::Cancelled => "cancelled",
        }
    }
}
