//! The executor: walks the DAG with workers, gives a measuring stage its device alone, and lets what doesn't depend on a
//! failed stage go on.

use super::run_file::RunFile;
use super::runner::StageRunner;
use super::sources::Sources;
use crate::artifact::StageStatus;
use crate::event::{Event, EventSink, Level, Outcome};
use crate::inference::ModelRecipe;
use crate::plan::Plan;
use crate::stage::{Catalogue, StageInput};
use crate::store::{ActiveRun, RunDir, Store, StoreError, take_notes};
use petgraph::Direction;
use petgraph::graph::NodeIndex;
use petgraph::visit::{Dfs, EdgeRef};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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

pub const NOT_SELECTED: &str = "not selected";

/// Models whose measurements are taken together at most.
const MAX_GROUP_MODELS: usize = 8;

/// What to start.
enum Next {
    One(NodeIndex),
    /// Stages that measure, whose starts take turns.
    Measure(Vec<NodeIndex>),
}

/// How a stage ended.
pub struct Ended {
    pub status: StageStatus,
    pub state: State,
    /// Of a failure.
    pub exit_code: Option<u8>,
}

pub enum State {
    Pending,
    Running,
    Ended { outcome: Outcome, result: Option<Arc<StageInput>> },
}

pub struct Shared {
    pub states: BTreeMap<NodeIndex, State>,
    statuses: BTreeMap<NodeIndex, StageStatus>,
    n_running: usize,
    is_measuring: bool,
    /// Makes the model that a stage used last.
    last_model: Option<NodeIndex>,
    exit_codes: Vec<u8>,
    run_file: RunFile,
}

pub struct Executor<'a> {
    pub request: &'a RunRequest<'a>,
    shared: Mutex<Shared>,
    changed: Condvar,
    start: Instant,
    /// Sessions so far, each a model's worker for one start.
    n_sessions: AtomicU64,
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
        last_model: None,
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
    let executor = Executor {
        request,
        shared: Mutex::new(shared),
        changed: Condvar::new(),
        start: Instant::now(),
        n_sessions: AtomicU64::new(0),
    };
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
    pub fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a number for a session that has not begun.
    pub fn new_session(&self) -> u64 {
        self.n_sessions.fetch_add(1, Ordering::Relaxed)
    }

    pub fn cancelled(&self) -> bool {
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
                match self.next(&shared) {
                    Some(next) => break next,
                    None => shared = self.changed.wait(shared).unwrap_or_else(PoisonError::into_inner),
                }
            };
            let nodes = match &next {
                Next::One(node) => std::slice::from_ref(node),
                Next::Measure(group) => group.as_slice(),
            };
            shared.states.extend(nodes.iter().map(|node| (*node, State::Running)));
            shared.n_running += 1;
            shared.is_measuring |= matches!(next, Next::Measure(_));
            drop(shared);
            match &next {
                Next::One(node) => self.record(*node, self.one(*node)),
                Next::Measure(group) => self.measure(group),
            }
            let mut shared = self.lock();
            shared.n_running -= 1;
            shared.is_measuring &= !matches!(next, Next::Measure(_));
            drop(shared);
            self.changed.notify_all();
        }
    }

    /// Notes how a stage ended, on disk too.
    pub fn record(&self, node: NodeIndex, ended: Ended) {
        let Ended { status, state, exit_code } = ended;
        let mut shared = self.lock();
        shared.last_model = self.model_of(node).or(shared.last_model);
        shared.states.insert(node, state);
        shared.statuses.insert(node, status);
        shared.exit_codes.extend(exit_code);
        self.request.runner.retain(&self.needed_models(&shared));
        self.tell_notes();
        if let Err(error) = self.save(&mut shared) {
            let text = format!("failed to {error}");
            self.request.events.emit(Event::Note { stage: None, level: Level::Warning, text });
        }
    }

    /// Tells what the file system of cache or results could not do.
    fn tell_notes(&self) {
        for text in take_notes() {
            self.request.events.emit(Event::Note { stage: None, level: Level::Warning, text });
        }
    }

    /// Returns what to start now: what measurements still wait for, then stages of the model that is loaded, then the plan's order. Measurements are taken together, and
    /// only while nothing else runs: on the host they need the whole machine, elsewhere their device, which other stages use too.
    fn next(&self, shared: &Shared) -> Option<Next> {
        if shared.is_measuring {
            return None;
        }
        let ready = self.ready(shared);
        let waited_for = ready.iter().find(|node| !self.measures(**node) && self.is_waited_for(shared, **node));
        let of_same_model =
            || ready.iter().find(|node| shared.last_model.is_some() && self.model_of(**node) == shared.last_model);
        let first = *waited_for.or_else(of_same_model).or(ready.first())?;
        if !self.measures(first) {
            return Some(Next::One(first));
        }
        (shared.n_running == 0).then(|| Next::Measure(self.group(&ready)))
    }

    /// Returns the stages, in the plan's order, whose inputs have ended.
    fn ready(&self, shared: &Shared) -> Vec<NodeIndex> {
        let graph = &self.request.plan.graph;
        let ended = |node: NodeIndex| matches!(shared.states[&node], State::Ended { .. });
        let is_ready = |node: &NodeIndex| {
            matches!(shared.states[node], State::Pending)
                && graph.neighbors_directed(*node, Direction::Incoming).all(ended)
        };
        self.request.plan.order.iter().copied().filter(is_ready).collect()
    }

    /// Returns true if a measurement that has not ended needs the stage, directly or not.
    fn is_waited_for(&self, shared: &Shared, node: NodeIndex) -> bool {
        let mut later = Dfs::new(&self.request.plan.graph, node);
        while let Some(consumer) = later.next(&self.request.plan.graph) {
            if self.measures(consumer) && matches!(shared.states[&consumer], State::Pending) {
                return true;
            }
        }
        false
    }

    /// Returns true if a stage will take its device for itself.
    fn measures(&self, node: NodeIndex) -> bool {
        let data = &self.request.plan.graph[node];
        data.description.measures && data.runs && data.selected
    }

    /// Returns those measurements that are taken together: of the first few models, so that a kill loses no more than theirs.
    fn group(&self, ready: &[NodeIndex]) -> Vec<NodeIndex> {
        let mut models = BTreeSet::new();
        let measuring = ready.iter().copied().filter(|node| self.measures(*node));
        measuring
            .take_while(|node| {
                models.insert(self.model_of(*node));
                models.len() <= MAX_GROUP_MODELS
            })
            .collect()
    }

    /// Returns the stage that makes a stage's model.
    pub fn model_of(&self, node: NodeIndex) -> Option<NodeIndex> {
        let edges = self.request.plan.graph.edges_directed(node, Direction::Incoming);
        edges.into_iter().find(|edge| edge.weight().param == "model").map(|edge| edge.source())
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
