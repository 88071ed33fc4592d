//! One stage: from the cache, or computed and committed.

use super::JobError;
use super::progress::StageProgress;
use super::run_file::timestamp;
use super::runner::{StageRunner, StageTask};
use crate::artifact::{FORMAT_VERSION, Record, RecordHead};
use crate::event::{Level, Progress};
use crate::plan::{Key, KeyFields, PlanNode};
use crate::stage::{Stage, StageError, StageInput};
use crate::store::{Artifact, ManifestDraft, Store};
use std::cell::Cell;
use std::collections::BTreeMap;
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
    /// Name of the device.
    pub device: &'a str,
    pub runner: &'a dyn StageRunner,
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
        let (started_at, start) = (timestamp(), Instant::now());
        let task = StageTask {
            address: &self.node.stage.address,
            params: &self.node.stage.params,
            root: self.root,
            inputs: &self.inputs,
            missing_inputs: &self.missing,
            out_dir: staging.dir(),
            progress: self.progress,
        };
        let output = self.runner.run(self.stage.as_ref(), &task)?;
        if self.progress.is_cancelled() {
            return Err(StageError::Cancelled.into());
        }
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
            duration_s: start.elapsed().as_secs_f64(),
            device: computes.then(|| self.device.to_owned()),
            params: self.node.stage.params.clone(),
        };
        let mut body = output.body;
        body.insert("summary".to_owned(), output.summary.clone().into());
        let draft = ManifestDraft { record: Record { head, body }, fields: self.fields.clone() };
        Ok((staging.commit(draft)?, false, output.summary))
    }
}
