//! One stage: from the cache, or computed and committed.

use super::JobError;
use super::progress::StageProgress;
use super::residency::Residency;
use super::run_file::timestamp;
use super::sources::{Sources, Stamps};
use crate::artifact::{FORMAT_VERSION, Record, RecordHead};
use crate::event::{Level, Progress};
use crate::inference::{Engine, InferenceError};
use crate::plan::{Key, KeyFields, PlanNode, Source};
use crate::stage::{Stage, StageContext, StageError, StageInput};
use crate::store::{Artifact, ManifestDraft, Store};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// All that one stage's computation needs.
pub struct Job<'a> {
    pub node: &'a PlanNode,
    pub stage: &'a Arc<dyn Stage>,
    pub key: Key,
    pub fields: KeyFields,
    pub inputs: BTreeMap<String, Vec<Arc<StageInput>>>,
    pub missing: Vec<String>,
    /// Compute though cached.
    pub forced: bool,
    pub pipeline: &'a str,
    pub run_id: &'a str,
    pub root: &'a Path,
    pub store: &'a Store,
    /// What the stage reads outside the cache, with what is known of it.
    pub reads: Vec<&'a Source>,
    pub sources: &'a Sources,
    pub engine: &'a Arc<dyn Engine>,
    pub models: &'a Residency,
    pub progress: &'a StageProgress,
}

impl Job<'_> {
    /// Returns the artifact, and whether it was in the cache: another process may have computed it while this one waited.
    ///
    /// # Errors
    /// Whatever stopped the stage; nothing is committed then.
    pub fn run(&self) -> Result<(Artifact, bool, String), JobError> {
        let told = Cell::new(false);
        let keep_waiting = || {
            if !told.replace(true) {
                self.progress.note(Level::Info, "another labpipe computes this stage: waiting for it");
            }
            !self.progress.is_cancelled()
        };
        let staging = self.store.begin(&self.key, &keep_waiting)?;
        if !self.forced
            && let Some(artifact) = self.store.get(&self.key)
        {
            return Ok((artifact, true, String::new()));
        }
        let stamps = self.sources.verify(&self.reads)?;
        let (started_at, start) = (timestamp(), Instant::now());
        let context = StageContext {
            address: &self.node.stage.address,
            params: &self.node.stage.params,
            root: self.root,
            inputs: &self.inputs,
            missing_inputs: &self.missing,
            out_dir: staging.dir(),
            engine: self.engine.as_ref(),
            models: self.models,
            progress: self.progress,
        };
        let output = match catch_unwind(AssertUnwindSafe(|| self.stage.run(&context))) {
            Ok(Ok(output)) => output,
            Ok(Err(error)) => return Err(self.failure(error, &stamps)),
            Err(payload) => return Err(JobError::Panic { message: message(payload.as_ref()) }),
        };
        if self.progress.is_cancelled() {
            return Err(StageError::Cancelled.into());
        }
        let duration_s = start.elapsed().as_secs_f64();
        self.unchanged(&stamps)?;
        let computes = self.node.description.computes || self.node.description.measures;
        let head = RecordHead {
            format_version: FORMAT_VERSION,
            pipeline: self.pipeline.to_owned(),
            run_id: self.run_id.to_owned(),
            produced_by_run: self.run_id.to_owned(),
            stage: self.node.stage.address.clone(),
            kind: self.node.stage.kind.clone(),
            key: self.key.0.clone(),
            cached: false,
            started_at,
            duration_s,
            device: computes.then(|| self.engine.info().device),
            params: self.node.stage.params.clone(),
        };
        let mut body = output.body;
        body.insert("summary".to_owned(), output.summary.clone().into());
        let draft = ManifestDraft { record: Record { head, body }, fields: self.fields.clone() };
        Ok((staging.commit(draft)?, false, output.summary))
    }

    /// Checks that the stage read what its key says. The model goes where it did not: other stages must not compute with it.
    fn unchanged(&self, stamps: &Stamps) -> Result<(), JobError> {
        self.sources.verify_since(stamps, &self.reads).map_err(|error| {
            self.models.retain(&[]);
            error.into()
        })
    }

    /// Returns why a stage failed: a file that was changed under it goes before what the stage made of that.
    fn failure(&self, error: StageError, stamps: &Stamps) -> JobError {
        let is_device = matches!(&error, StageError::Inference(error) if error.is_device());
        match self.unchanged(stamps) {
            Err(change) if !is_device && !error.is_cancelled() => change,
            _ => self.device_failure(error).into(),
        }
    }

    /// Names the device that failed a stage and what was free on it. The model goes: memory that a failed allocation left
    /// half-filled must not be another stage's.
    fn device_failure(&self, error: StageError) -> StageError {
        match error {
            StageError::Inference(error) if error.is_device() => {
                let is_full = matches!(error, InferenceError::OutOfMemory { .. });
                let free_bytes = if is_full { self.engine.free_bytes() } else { None };
                self.models.retain(&[]);
                error.located(&self.engine.info().device, free_bytes).into()
            }
            other => other,
        }
    }
}

fn message(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str).or_else(|| payload.downcast_ref::<&str>().copied());
    text.unwrap_or("no message").lines().next().unwrap_or_default().to_owned()
}
