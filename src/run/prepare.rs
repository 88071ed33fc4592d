//! One stage up to where its work begins: whether it can run, with what, and whether the cache has it.

use super::JobError;
use super::ending::input_of;
use super::job::{Begun, Job, Work};
use super::progress::StageProgress;
use super::schedule::{Ended, Executor, NOT_SELECTED, State};
use crate::artifact::StageStatus;
use crate::event::{Event, Level, Outcome};
use crate::plan::{InputKey, Key, PlanNode, Reason, resolve_key};
use crate::stage::{Stage, StageError, StageInput, Start};
use crate::store::{Artifact, Part};
use petgraph::Direction;
use petgraph::graph::NodeIndex;
use petgraph::visit::EdgeRef;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A stage that has its inputs and is not in the cache.
pub struct Prepared<'a> {
    pub node: NodeIndex,
    pub status: StageStatus,
    pub stage: &'a Arc<dyn Stage>,
    pub job: Job<'a>,
}

impl<'a> Executor<'a> {
    /// Brings one stage to its end.
    pub fn one(&self, node: NodeIndex) -> Ended {
        match self.prepare(node) {
            Ok(prepared) => self.complete(*prepared),
            Err(ended) => *ended,
        }
    }

    /// Runs a stage that is prepared, in one start.
    pub fn complete(&self, prepared: Prepared<'a>) -> Ended {
        let Prepared { status, job, .. } = prepared;
        let begin = Instant::now();
        match job.begin() {
            Err(error) => self.failed(status, &error, begin.elapsed()),
            Ok(Begun::Cached(artifact)) => self.served(status, &job, &artifact, begin.elapsed()),
            Ok(Begun::Work(mut work)) => match job.run_start(&mut work, Start::ONLY, None) {
                Err(error) => self.failed(status, &error, begin.elapsed()),
                Ok(()) => self.commit(status, job, *work),
            },
        }
    }

    /// Ends a stage whose artifact another labpipe, or another stage of this run, computed meanwhile.
    pub fn served(&self, mut status: StageStatus, job: &Job<'_>, artifact: &Artifact, took: Duration) -> Ended {
        match self.keep(job.node, artifact, true) {
            Ok((record, blake3)) => {
                status.record_blake3 = Some(blake3);
                self.cached(status, artifact, record, job.inputs.clone(), took)
            }
            Err(error) => self.failed(status, &error.into(), took),
        }
    }

    /// Commits what all starts of a stage gave.
    pub fn commit(&self, mut status: StageStatus, job: Job<'a>, work: Work) -> Ended {
        let took = work.took;
        let done = job
            .finish(work)
            .and_then(|(artifact, summary)| Ok((self.keep(job.node, &artifact, false)?, artifact, summary)));
        match done {
            Err(error) => self.failed(status, &error, took),
            Ok(((record, blake3), artifact, summary)) => {
                status.record_blake3 = Some(blake3);
                let result = input_of(&artifact, record, job.inputs);
                self.ended(status, Outcome::Done, Some(result), took, summary, None)
            }
        }
    }

    /// Finds a stage's inputs and its key, or how it has ended without work.
    pub fn prepare(&self, node: NodeIndex) -> Result<Box<Prepared<'a>>, Box<Ended>> {
        let request = self.request;
        let data = &request.plan.graph[node];
        let address = data.stage.address.clone();
        let start = Instant::now();
        let (inputs, missing, blocked_by) = self.inputs(node);
        let mut status = StageStatus {
            stage: address.clone(),
            kind: data.stage.kind.clone(),
            key: None,
            outcome: None,
            duration_s: None,
            summary: None,
            error: None,
            record_blake3: None,
        };
        let blocked = match (&blocked_by, data.selected || !data.runs, self.cancelled()) {
            (_, _, true) => Some((Outcome::Cancelled, "the run was stopped".to_owned())),
            (_, false, _) => Some((Outcome::Skipped, NOT_SELECTED.to_owned())),
            (Some(input), ..) => Some((Outcome::Skipped, format!("it needs {input}, which has no result"))),
            _ => None,
        };
        if let Some((outcome, why)) = blocked {
            return Err(Box::new(self.ended(status, outcome, None, start.elapsed(), why, None)));
        }
        let own = &data.fields;
        let lookup = |address: &str| {
            let found = inputs.values().flatten().find(|(input, _)| input.address == address)?;
            let shown = self.input_node(node, address).map(|input| input.shown.clone()).unwrap_or_default();
            Some(InputKey { key: Key(found.0.key.clone()), digest: found.1.clone(), shown })
        };
        let (key, fields) = resolve_key(&data.stage, own, &lookup);
        status.key = Some(key.0.clone());
        let forced = matches!(data.reason, Reason::Forced | Reason::Remeasure);
        let inputs: BTreeMap<String, Vec<Arc<StageInput>>> = inputs
            .into_iter()
            .map(|(param, list)| (param, list.into_iter().map(|(input, _)| input).collect()))
            .collect();
        match self.find(&address, &key, data.key.is_none(), forced) {
            Err(error) => return Err(Box::new(self.failed(status, &error, start.elapsed()))),
            Ok(Some(artifact)) => {
                self.request.store.note_use(&self.request.plan.pipeline, &address, &key, &fields);
                return Err(Box::new(match self.keep(data, &artifact, true) {
                    Ok((record, blake3)) => {
                        status.record_blake3 = Some(blake3);
                        self.cached(status, &artifact, record, inputs, start.elapsed())
                    }
                    Err(error) => self.failed(status, &error.into(), start.elapsed()),
                }));
            }
            Ok(None) => {}
        }
        let Some(stage) = request.catalogue.get(&data.stage.kind) else {
            let why = format!("there is no kind {}", data.stage.kind);
            return Err(Box::new(self.ended(status, Outcome::Skipped, None, start.elapsed(), why, None)));
        };
        self.request.events.emit(Event::StageStarted { stage: address.clone(), kind: data.stage.kind.clone() });
        self.request.events.emit(Event::Note {
            stage: Some(address.clone()),
            level: Level::Debug,
            text: format!("key {}; why: {}", key.short(), data.reason.explain()),
        });
        let progress = StageProgress::new(&address, Arc::clone(&request.events), Arc::clone(&request.cancel));
        let job = Job {
            node: data,
            stage,
            key,
            fields,
            inputs,
            missing,
            forced,
            pipeline: &request.plan.pipeline,
            run_id: &request.run_file.run_id,
            root: request.root,
            store: request.store,
            reads: request.plan.reads(node),
            sources: request.sources,
            device: &request.run_file.device,
            runner: request.runner.as_ref(),
            progress,
        };
        Ok(Box::new(Prepared { node, status, stage, job }))
    }

    /// Looks a key up in the cache. One that only became known now is listed first, so that gc leaves it, and its files are verified:
    /// the plan could not.
    fn find(&self, address: &str, key: &Key, is_new: bool, forced: bool) -> Result<Option<Artifact>, JobError> {
        let _guard = self.request.active.add(key, &|| !self.cancelled())?;
        if forced {
            return Ok(None);
        }
        let store = self.request.store;
        if is_new && store.get(key).is_some() {
            let check = store.check(key, Part::All, &|| !self.cancelled()).ok_or(StageError::Cancelled)?;
            if let Some(damage) = check.damage {
                let text = format!("its artifact {} is damaged ({damage}): it is computed again", key.short());
                let stage = Some(address.to_owned());
                self.request.events.emit(Event::Note { stage, level: Level::Warning, text });
            }
        }
        Ok(store.get(key))
    }

    fn input_node(&self, node: NodeIndex, address: &str) -> Option<&PlanNode> {
        let graph = &self.request.plan.graph;
        let inputs = graph.neighbors_directed(node, Direction::Incoming);
        inputs.map(|input| &graph[input]).find(|input| input.stage.address == address)
    }

    /// Returns a stage's inputs with the digests of measurements, the addresses that are missing from gathering parameters,
    /// and the input that keeps it from running, if one does.
    #[expect(clippy::type_complexity, reason = "three answers of one walk over the edges")]
    fn inputs(
        &self,
        node: NodeIndex,
    ) -> (BTreeMap<String, Vec<(Arc<StageInput>, Option<String>)>>, Vec<String>, Option<String>) {
        let graph = &self.request.plan.graph;
        let shared = self.lock();
        let by_address: BTreeMap<&str, NodeIndex> = graph
            .edges_directed(node, Direction::Incoming)
            .map(|edge| (graph[edge.source()].stage.address.as_str(), edge.source()))
            .collect();
        let result = |address: &str| match by_address.get(address).map(|input| &shared.states[input]) {
            Some(State::Ended { result, .. }) => result.clone(),
            _ => None,
        };
        let stage = &graph[node].stage;
        let (mut inputs, mut missing, mut blocked_by) = (BTreeMap::new(), Vec::new(), None);
        for (param, addresses) in &stage.inputs {
            let mut found = Vec::new();
            for address in addresses {
                match result(address) {
                    Some(input) => {
                        let measures =
                            by_address.get(address.as_str()).is_some_and(|input| graph[*input].description.measures);
                        let digest = measures.then(|| self.digest(&input)).flatten();
                        found.push((input, digest));
                    }
                    None if stage.gathers.contains(param) => missing.push(address.clone()),
                    None => blocked_by = blocked_by.or(Some(address.clone())),
                }
            }
            if found.is_empty() && !addresses.is_empty() {
                blocked_by = blocked_by.or_else(|| addresses.first().cloned());
            }
            inputs.insert(param.clone(), found);
        }
        for address in stage.after.iter().filter(|address| result(address).is_none()) {
            blocked_by = blocked_by.or(Some(address.clone()));
        }
        (inputs, missing, blocked_by)
    }

    fn digest(&self, input: &StageInput) -> Option<String> {
        self.request.store.get(&Key(input.key.clone())).map(|artifact| artifact.manifest.digest)
    }
}
