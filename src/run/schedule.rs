//! The executor: walks the DAG with workers, gives a measuring stage its device alone, and lets what doesn't depend on a
//! failed stage go on.

use super::JobError;
use super::job::Job;
use super::progress::StageProgress;
use super::run_file::RunFile;
use super::runner::StageRunner;
use super::show_as::show_as;
use super::sources::Sources;
use crate::artifact::{Record, StageStatus};
use crate::event::{Event, EventSink, Level, Outcome};
use crate::inference::ModelRecipe;
use crate::plan::{InputKey, Key, Plan, PlanNode, Reason, resolve_key};
use crate::stage::{Catalogue, StageError, StageInput};
use crate::store::{ActiveRun, Artifact, Part, RunDir, Store, StoreError, take_notes};
use petgraph::Direction;
use petgraph::graph::NodeIndex;
use petgraph::visit::EdgeRef;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What to run, and with what.
pub struct RunRequest<'a> {
    pub plan: &'a Plan,
    pub catalogue: &'a Catalogue,
    pub root: &'a Path,
    pub store: &'a Store,
    /// Lists this run's keys for gc.
    pub active: &'a ActiveRun,
    /// Looks after the files outside the cache that the plan was made from.
    pub sources: &'a Sources,
    pub run_dir: &'a RunDir,
    pub run_file: RunFile,
    pub runner: Arc<dyn StageRunner>,
    pub events: Arc<dyn EventSink>,
    /// Set from outside to stop.
    pub cancel: Arc<AtomicBool>,
    /// Stages that may run at once.
    pub jobs: usize,
}

/// How a run ended.
#[derive(Debug)]
pub struct RunOutcome {
    /// In execution order.
    pub stages: Vec<StageStatus>,
    /// Inputs of every stage that has a result, by address.
    pub results: BTreeMap<String, Arc<StageInput>>,
    pub exit_code: u8,
    pub was_cancelled: bool,
    pub duration_s: f64,
}

const NOT_SELECTED: &str = "not selected";

enum State {
    Pending,
    Running,
    Ended { outcome: Outcome, result: Option<Arc<StageInput>> },
}

struct Shared {
    states: BTreeMap<NodeIndex, State>,
    statuses: BTreeMap<NodeIndex, StageStatus>,
    n_running: usize,
    is_measuring: bool,
    exit_codes: Vec<u8>,
    run_file: RunFile,
}

struct Executor<'a> {
    request: &'a RunRequest<'a>,
    shared: Mutex<Shared>,
    changed: Condvar,
    start: Instant,
}

/// Runs a plan to its end; failures of stages are in the outcome.
///
/// # Errors
/// Where the run's own files can't be written.
pub fn execute(request: &RunRequest<'_>) -> Result<RunOutcome, StoreError> {
    let plan = request.plan;
    let shared = Shared {
        states: plan.order.iter().map(|node| (*node, State::Pending)).collect(),
        statuses: BTreeMap::new(),
        n_running: 0,
        is_measuring: false,
        exit_codes: Vec::new(),
        run_file: request.run_file.clone(),
    };
    let n_cached = plan.graph.node_weights().filter(|node| !node.runs).count();
    request.events.emit(Event::RunStarted {
        run_id: request.run_file.run_id.clone(),
        pipeline: plan.pipeline.clone(),
        device: request.run_file.device.clone(),
        n_stages: plan.graph.node_weights().filter(|node| node.selected || !node.runs).count(),
        n_cached,
    });
    let executor = Executor { request, shared: Mutex::new(shared), changed: Condvar::new(), start: Instant::now() };
    executor.save(&mut executor.lock())?;
    std::thread::scope(|scope| {
        for worker_idx in 1..request.jobs.max(1) {
            let name = format!("stage-{worker_idx}");
            // With fewer workers than asked for the run is slower, not wrong.
            let _ = std::thread::Builder::new().name(name).spawn_scoped(scope, || executor.work());
        }
        executor.work();
    });
    executor.finish()
}

impl Executor<'_> {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cancelled(&self) -> bool {
        self.request.cancel.load(Ordering::Relaxed)
    }

    /// Takes stages as they become ready until none is left.
    fn work(&self) {
        loop {
            let mut shared = self.lock();
            let next = loop {
                let pending = self.request.plan.order.iter().any(|node| matches!(shared.states[node], State::Pending));
                if !pending {
                    return;
                }
                match self.ready(&shared) {
                    Some(node) if self.may_start(&shared, node) => break node,
                    _ => shared = self.changed.wait(shared).unwrap_or_else(PoisonError::into_inner),
                }
            };
            let measures = self.measures(next);
            shared.states.insert(next, State::Running);
            shared.n_running += 1;
            shared.is_measuring |= measures;
            drop(shared);
            let (status, state, exit_code) = self.one(next);
            let mut shared = self.lock();
            shared.n_running -= 1;
            shared.is_measuring &= !measures;
            shared.states.insert(next, state);
            shared.statuses.insert(next, status);
            shared.exit_codes.extend(exit_code);
            self.request.runner.retain(&self.needed_models(&shared));
            self.tell_notes();
            if let Err(error) = self.save(&mut shared) {
                self.request.events.emit(Event::Note {
                    stage: None,
                    level: Level::Warning,
                    text: format!("failed to {error}"),
                });
            }
            drop(shared);
            self.changed.notify_all();
        }
    }

    /// Tells what the file system of cache or results could not do.
    fn tell_notes(&self) {
        for text in take_notes() {
            self.request.events.emit(Event::Note { stage: None, level: Level::Warning, text });
        }
    }

    /// Returns the first stage, in the plan's order, whose inputs have ended.
    fn ready(&self, shared: &Shared) -> Option<NodeIndex> {
        let graph = &self.request.plan.graph;
        let ended = |node: NodeIndex| matches!(shared.states[&node], State::Ended { .. });
        self.request.plan.order.iter().copied().find(|node| {
            matches!(shared.states[node], State::Pending)
                && graph.neighbors_directed(*node, Direction::Incoming).all(ended)
        })
    }

    /// Returns true if a stage will take its device for itself.
    fn measures(&self, node: NodeIndex) -> bool {
        let data = &self.request.plan.graph[node];
        data.description.measures && data.runs && data.selected
    }

    /// On the host a measurement needs the whole machine; elsewhere its device, which other computing stages use too.
    fn may_start(&self, shared: &Shared, node: NodeIndex) -> bool {
        if self.measures(node) { shared.n_running == 0 } else { !shared.is_measuring }
    }

    fn needed_models(&self, shared: &Shared) -> Vec<ModelRecipe> {
        let graph = &self.request.plan.graph;
        let open = self.request.plan.order.iter().filter(|node| !matches!(shared.states[node], State::Ended { .. }));
        let sources = open
            .flat_map(|node| graph.edges_directed(*node, Direction::Incoming))
            .filter(|edge| edge.weight().param == "model");
        sources
            .filter_map(|edge| match &shared.states[&edge.source()] {
                State::Ended { result: Some(result), .. } => {
                    result.recipe().ok().map(|recipe| recipe.rooted(self.request.root))
                }
                _ => None,
            })
            .collect()
    }

    /// Brings one stage to its end.
    fn one(&self, node: NodeIndex) -> (StageStatus, State, Option<u8>) {
        let data = &self.request.plan.graph[node];
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
            return self.ended(status, outcome, None, start, why, None);
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
            Err(error) => return self.failed(status, &error, start),
            Ok(Some(artifact)) => {
                self.request.store.note_use(&self.request.plan.pipeline, &address, &key, &fields);
                return match self.keep(data, &artifact, true) {
                    Ok((record, blake3)) => {
                        status.record_blake3 = Some(blake3);
                        self.cached(status, &artifact, record, inputs, start)
                    }
                    Err(error) => self.failed(status, &error.into(), start),
                };
            }
            Ok(None) => {}
        }
        let Some(stage) = self.request.catalogue.get(&data.stage.kind) else {
            let why = format!("there is no kind {}", data.stage.kind);
            return self.ended(status, Outcome::Skipped, None, start, why, None);
        };
        self.request.events.emit(Event::StageStarted { stage: address.clone(), kind: data.stage.kind.clone() });
        self.request.events.emit(Event::Note {
            stage: Some(address.clone()),
            level: Level::Debug,
            text: format!("key {}; why: {}", key.short(), data.reason.explain()),
        });
        let progress = StageProgress::new(&address, Arc::clone(&self.request.events), Arc::clone(&self.request.cancel));
        let job = Job {
            node: data,
            stage,
            key,
            fields,
            inputs,
            missing,
            forced,
            pipeline: &self.request.plan.pipeline,
            run_id: &self.request.run_file.run_id,
            root: self.request.root,
            store: self.request.store,
            reads: self.request.plan.reads(node),
            sources: self.request.sources,
            device: &self.request.run_file.device,
            runner: self.request.runner.as_ref(),
            progress: &progress,
        };
        let done = job.run().and_then(|(artifact, was_cached, summary)| {
            Ok((self.keep(data, &artifact, was_cached)?, artifact, was_cached, summary))
        });
        match done {
            Err(error) => self.failed(status, &error, start),
            Ok(((record, blake3), artifact, true, _)) => {
                status.record_blake3 = Some(blake3);
                self.cached(status, &artifact, record, job.inputs, start)
            }
            Ok(((record, blake3), artifact, false, summary)) => {
                status.record_blake3 = Some(blake3);
                let result = input_of(&artifact, record, job.inputs);
                self.ended(status, Outcome::Done, Some(result), start, summary, None)
            }
        }
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

    /// Writes a stage's record into the run's results, as this stage shows it: another may have computed it under another name. Returns
    /// it with the blake3 of its file.
    fn keep(&self, node: &PlanNode, artifact: &Artifact, cached: bool) -> Result<(Record, String), StoreError> {
        let mut record = artifact.record.clone();
        show_as(&mut record, node);
        record.head.pipeline.clone_from(&self.request.plan.pipeline);
        record.head.run_id.clone_from(&self.request.run_file.run_id);
        record.head.cached = cached;
        let blake3 = self.request.run_dir.write_stage(&record, artifact)?;
        Ok((record, blake3))
    }

    fn cached(
        &self,
        status: StageStatus,
        artifact: &Artifact,
        record: Record,
        inputs: BTreeMap<String, Vec<Arc<StageInput>>>,
        start: Instant,
    ) -> (StageStatus, State, Option<u8>) {
        let summary = record.body.get("summary").and_then(|summary| summary.as_str()).unwrap_or_default().to_owned();
        self.ended(status, Outcome::Cached, Some(input_of(artifact, record, inputs)), start, summary, None)
    }

    fn failed(&self, status: StageStatus, error: &JobError, start: Instant) -> (StageStatus, State, Option<u8>) {
        if error.is_cancelled() {
            return self.ended(status, Outcome::Cancelled, None, start, "the run was stopped".to_owned(), None);
        }
        self.ended(status, Outcome::Failed, None, start, error.to_string(), Some(error.exit_code()))
    }

    fn ended(
        &self,
        mut status: StageStatus,
        outcome: Outcome,
        result: Option<Arc<StageInput>>,
        start: Instant,
        text: String,
        exit_code: Option<u8>,
    ) -> (StageStatus, State, Option<u8>) {
        let duration_s = start.elapsed().as_secs_f64();
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
        (status, State::Ended { outcome, result }, exit_code)
    }

    /// Writes `run.json` as things stand.
    fn save(&self, shared: &mut Shared) -> Result<(), StoreError> {
        shared.run_file.stages = self.statuses(shared);
        self.request.run_dir.write_run(&shared.run_file.to_json())
    }

    fn statuses(&self, shared: &Shared) -> Vec<StageStatus> {
        self.request.plan.order.iter().filter_map(|node| shared.statuses.get(node).cloned()).collect()
    }

    fn finish(&self) -> Result<RunOutcome, StoreError> {
        let mut shared = self.lock();
        let was_cancelled = self.cancelled();
        // Of several the worst, in the documented order.
        let worst = [1, 4, 3].into_iter().find(|code| shared.exit_codes.contains(code));
        let exit_code = if was_cancelled { 130 } else { worst.unwrap_or(0) };
        let count = |wanted: Outcome| {
            shared
                .states
                .values()
                .filter(|state| matches!(state, State::Ended { outcome, .. } if *outcome == wanted))
                .count()
        };
        let duration_s = self.start.elapsed().as_secs_f64();
        let finished = Event::RunFinished {
            run_id: self.request.run_file.run_id.clone(),
            n_done: count(Outcome::Done),
            n_cached: count(Outcome::Cached),
            n_failed: count(Outcome::Failed),
            n_skipped: count(Outcome::Skipped) + count(Outcome::Cancelled),
            duration_s,
        };
        shared.run_file.end(if was_cancelled {
            "cancelled"
        } else if exit_code == 0 {
            "succeeded"
        } else {
            "failed"
        });
        self.save(&mut shared)?;
        self.tell_notes();
        self.request.events.emit(finished);
        let results = shared.states.iter().filter_map(|(node, state)| match state {
            State::Ended { result: Some(result), .. } => {
                Some((self.request.plan.graph[*node].stage.address.clone(), Arc::clone(result)))
            }
            _ => None,
        });
        let results = results.collect();
        Ok(RunOutcome { stages: self.statuses(&shared), results, exit_code, was_cancelled, duration_s })
    }
}

fn input_of(artifact: &Artifact, record: Record, inputs: BTreeMap<String, Vec<Arc<StageInput>>>) -> Arc<StageInput> {
    Arc::new(StageInput {
        address: record.head.stage.clone(),
        kind: record.head.kind.clone(),
        key: artifact.key.0.clone(),
        dir: artifact.dir.clone(),
        record,
        inputs,
    })
}
