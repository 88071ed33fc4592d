//! One stage: from the cache, or computed and committed.

use super::JobError;
use super::progress::StageProgress;
use super::run_file::timestamp;
use super::runner::{RunnerError, StageRunner, StageTask};
use super::sources::{Sources, Stamps};
use crate::artifact::{Execution, FORMAT_VERSION, Record, RecordHead};
use crate::event::{Level, Progress};
use crate::plan::{Key, KeyFields, PlanNode, Source};
use crate::stage::{Stage, StageError, StageInput, StageOutput, Start};
use crate::store::{Artifact, ManifestDraft, Part, Staging, Store, StoreError};
use serde_json::Value;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

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
    /// Name of the device.
    pub device: &'a str,
    pub runner: &'a dyn StageRunner,
    pub progress: StageProgress,
}

/// A stage whose key is claimed.
pub enum Begun {
    /// The artifact is there: another process may have computed it while this one waited.
    Cached(Box<Artifact>),
    Work(Box<Work>),
}

/// What a stage has done so far.
pub struct Work {
    staging: Staging,
    /// Which commit of each input is read.
    commits: Vec<(Key, String, String)>,
    stamps: Stamps,
    started_at: String,
    /// Time that its starts took together.
    pub took: Duration,
    outputs: Vec<StageOutput>,
    /// A measurement was made again and was disturbed again: later starts don't try.
    repeated_in_vain: bool,
}

impl Job<'_> {
    /// Claims the stage's key and checks what the stage will read. Waits while another process computes the same.
    ///
    /// # Errors
    /// What keeps the stage from being run.
    pub fn begin(&self) -> Result<Begun, JobError> {
        let told = Cell::new(false);
        let keep_waiting = || {
            if !told.replace(true) {
                self.progress.note(Level::Info, "another labpipe computes this stage: waiting for it");
            }
            !self.progress.is_cancelled()
        };
        let staging = self.store.begin(&self.key, &keep_waiting)?;
        // Two stages of one run may have the same key: what the first computed serves the second also where all is computed anew.
        let serves = |artifact: &Artifact| !self.forced || artifact.record.head.produced_by_run == self.run_id;
        if let Some(artifact) = self.store.get(&self.key).filter(serves) {
            return Ok(Begun::Cached(Box::new(artifact)));
        }
        let commits = self.verify_inputs()?;
        let stamps = self.sources.verify(&self.reads)?;
        let (started_at, took) = (timestamp(), Duration::ZERO);
        Ok(Begun::Work(Box::new(Work {
            staging,
            commits,
            stamps,
            started_at,
            took,
            outputs: Vec::new(),
            repeated_in_vain: false,
        })))
    }

    /// Runs one start; `session` as in [`StageTask::session`].
    ///
    /// # Errors
    /// Whatever stopped it; nothing is to be committed then.
    pub fn run_start(&self, work: &mut Work, start: Start, session: Option<u64>) -> Result<(), JobError> {
        let begin = Instant::now();
        self.progress.start(start);
        let task = StageTask {
            address: &self.node.stage.address,
            params: &self.node.stage.params,
            root: self.root,
            inputs: &self.inputs,
            missing_inputs: &self.missing,
            out_dir: work.staging.dir(),
            start,
            session,
            may_repeat: !work.repeated_in_vain,
            progress: &self.progress,
        };
        let output = self.runner.run(self.stage.as_ref(), &task);
        work.took += begin.elapsed();
        let output = output.map_err(|error| self.failure(error, &work.stamps))?;
        work.repeated_in_vain |= was_repeated_in_vain(&output);
        work.outputs.push(output);
        if self.progress.is_cancelled() {
            return Err(StageError::Cancelled.into());
        }
        Ok(())
    }

    /// Commits what the starts gave; returns the artifact and its summary.
    ///
    /// # Errors
    /// Where what the stage read has changed meanwhile, or the disk refuses.
    pub fn finish(&self, work: Work) -> Result<(Artifact, String), JobError> {
        let Work { staging, commits, stamps, started_at, took, mut outputs, .. } = work;
        let execution = execution_of(&outputs);
        let output = match outputs.pop() {
            Some(only) if outputs.is_empty() => only,
            last => self.stage.combine(outputs.into_iter().chain(last).collect())?,
        };
        self.check_not_replaced(&commits)?;
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
            duration_s: took.as_secs_f64(),
            device: computes.then(|| self.device.to_owned()),
            params: self.node.stage.params.clone(),
            read_files: self.read_files(),
            execution,
        };
        let mut body = output.body;
        body.insert("summary".to_owned(), output.summary.clone().into());
        let draft = ManifestDraft { record: Record { head, body }, fields: self.fields.clone() };
        Ok((staging.commit(draft)?, output.summary))
    }

    /// Returns the files that the stage reads, as its key names them.
    fn read_files(&self) -> BTreeMap<String, String> {
        let files = self.fields.iter().filter_map(|(field, hash)| Some((field.strip_prefix("files.")?, hash)));
        files.map(|(name, hash)| (name.to_owned(), hash.clone())).collect()
    }

    /// Hashes those inputs that this process has neither committed nor verified yet: others than the plan knew of, or committed by
    /// another process. Returns which commit of each the stage is about to read.
    fn verify_inputs(&self) -> Result<Vec<(Key, String, String)>, JobError> {
        let keep_going = || !self.progress.is_cancelled();
        let mut commits = Vec::new();
        for input in self.inputs.values().flatten() {
            let key = Key(input.key.clone());
            let check = self.store.check(&key, Part::All, &keep_going).ok_or(StageError::Cancelled)?;
            if let Some(damage) = check.damage {
                let error = StoreError::Damaged { key: key.short().to_owned(), stage: input.address.clone(), damage };
                return Err(error.into());
            }
            // The record came from one commit: the files must be of the same.
            let made = |record: &Record| (record.head.produced_by_run.clone(), record.head.started_at.clone());
            if self.store.get(&key).is_none_or(|now| made(&now.record) != made(&input.record)) {
                return Err(JobError::InputReplaced { address: input.address.clone() });
            }
            let manifest_blake3 = self.store.commit_of(&key).unwrap_or_default();
            commits.push((key, manifest_blake3, input.address.clone()));
        }
        Ok(commits)
    }

    /// Makes sure that what the stage read is one commit of each input: the one that its key goes by.
    fn check_not_replaced(&self, commits: &[(Key, String, String)]) -> Result<(), JobError> {
        let replaced = commits.iter().find(|(key, before, _)| self.store.commit_of(key).as_ref() != Some(before));
        match replaced {
            Some((_, _, address)) => Err(JobError::InputReplaced { address: address.clone() }),
            None => Ok(()),
        }
    }

    /// Checks that the stage read what its key says. The model is dropped where it did not: other stages must not compute with it.
    fn unchanged(&self, stamps: &Stamps) -> Result<(), JobError> {
        self.sources.verify_since(stamps, &self.reads).map_err(|error| {
            self.runner.retain(&[]);
            error.into()
        })
    }

    /// Returns why a stage failed: a file that was changed meanwhile explains what the stage made of it.
    fn failure(&self, error: RunnerError, stamps: &Stamps) -> JobError {
        let may_be_the_file = match &error {
            RunnerError::Stage(error) => !error.is_device() && !error.is_cancelled(),
            RunnerError::Panic { .. } | RunnerError::WorkerLost { .. } => false,
        };
        match self.unchanged(stamps) {
            Err(change) if may_be_the_file => change,
            _ => error.into(),
        }
    }
}

/// Returns true if a row of a benchmark was measured again and disturbed again.
/// Returns how the starts' model was run: a start that was slower than the device allows stands for all.
fn execution_of(starts: &[StageOutput]) -> Option<Execution> {
    let mut found = starts.iter().filter_map(|start| start.execution.as_ref());
    let first = found.next()?;
    let slow = std::iter::once(first).chain(found).find(|execution| !execution.slow.is_empty());
    Some(slow.unwrap_or(first).clone())
}

fn was_repeated_in_vain(output: &StageOutput) -> bool {
    let rows = output.body.get("results").and_then(Value::as_array).into_iter().flatten();
    rows.map(|row| &row["disturbance"]).any(|seen| seen["repeated"] == true && !seen["disturbed"].is_null())
}
