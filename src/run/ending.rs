//! How stages end: what the run's results keep of them, and what is told.

use super::JobError;
use super::schedule::{Ended, Executor, NOT_SELECTED, State};
use super::show_as::show_as;
use crate::artifact::{Record, StageStatus};
use crate::event::{Event, Outcome};
use crate::plan::PlanNode;
use crate::stage::StageInput;
use crate::store::{Artifact, StoreError};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

impl Executor<'_> {
    /// Writes a stage's record into the run's results, as this stage shows it: another may have computed it under another name. Returns
    /// it with the blake3 of its file.
    pub fn keep(&self, node: &PlanNode, artifact: &Artifact, cached: bool) -> Result<(Record, String), StoreError> {
        let mut record = artifact.record.clone();
        show_as(&mut record, node);
        record.head.pipeline.clone_from(&self.request.plan.pipeline);
        record.head.run_id.clone_from(&self.request.run_file.run_id);
        record.head.cached = cached;
        let blake3 = self.request.run_dir.write_stage(&record, artifact)?;
        Ok((record, blake3))
    }

    /// Ends a stage whose artifact was in the cache. `took` is the time that it cost.
    pub fn cached(
        &self,
        status: StageStatus,
        artifact: &Artifact,
        record: Record,
        inputs: BTreeMap<String, Vec<Arc<StageInput>>>,
        took: Duration,
    ) -> Ended {
        let summary = record.body.get("summary").and_then(|summary| summary.as_str()).unwrap_or_default().to_owned();
        self.ended(status, Outcome::Cached, Some(input_of(artifact, record, inputs)), took, summary, None)
    }

    /// Ends a stage that gave nothing.
    pub fn failed(&self, status: StageStatus, error: &JobError, took: Duration) -> Ended {
        if error.is_cancelled() {
            return self.ended(status, Outcome::Cancelled, None, took, "the run was stopped".to_owned(), None);
        }
        self.ended(status, Outcome::Failed, None, took, error.to_string(), Some(error.exit_code()))
    }

    /// Ends a stage, and tells it.
    pub fn ended(
        &self,
        mut status: StageStatus,
        outcome: Outcome,
        result: Option<Arc<StageInput>>,
        took: Duration,
        text: String,
        exit_code: Option<u8>,
    ) -> Ended {
        let duration_s = took.as_secs_f64();
        status.outcome = Some(outcome.name().to_owned());
        status.duration_s = Some(duration_s);
        match outcome {
            Outcome::Done | Outcome::Cached => status.summary = Some(text.clone()),
            Outcome::Failed | Outcome::Skipped | Outcome::Cancelled => status.error = Some(text.clone()),
        }
        // Nobody asked for what was not selected: the record lists it, the screen stays quiet.
        if text != NOT_SELECTED {
            self.request.events.emit(Event::StageFinished {
                stage: status.stage.clone(),
                kind: status.kind.clone(),
                outcome,
                duration_s,
                summary: text,
            });
        }
        Ended { status, state: State::Ended { outcome, result }, exit_code }
    }
}

/// Returns an artifact as stages read it.
pub fn input_of(
    artifact: &Artifact,
    record: Record,
    inputs: BTreeMap<String, Vec<Arc<StageInput>>>,
) -> Arc<StageInput> {
    Arc::new(StageInput {
        address: record.head.stage.clone(),
        kind: record.head.kind.clone(),
        key: artifact.key.0.clone(),
        dir: artifact.dir.clone(),
        record,
        inputs,
    })
}
