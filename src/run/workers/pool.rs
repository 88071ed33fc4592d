//! The workers that are there: one that holds a model, one for stages that hold none.

use super::process::{Greeting, Launch, Worker, WorkerError};
use super::protocol::Task;
use crate::inference::{EngineInfo, MemoryPrediction, ModelRecipe, Workload};
use crate::run::forecast::Forecaster;
use crate::run::runner::{RunnerError, StageRunner, StageTask, run_without_models};
use crate::stage::{Stage, StageError, StageOutput};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Runs stages that compute in workers, and the others in this process.
///
/// A model has a worker of its own, which runs all its stages, so that its memory is its own; of stages that measure, all of one start.
/// There is one such worker at a time: a model and its baseline never share a device.
pub struct Workers {
    launch: Launch,
    greeting: Greeting,
    /// Lent to one stage at a time.
    holder: Mutex<Option<Holder>>,
    /// For `load` and `quantize`; it ends when a model's worker starts.
    general: Mutex<Option<Worker>>,
}

struct Holder {
    model: ModelRecipe,
    session: Option<u64>,
    worker: Worker,
}

impl Holder {
    /// Returns true if a stage can run in it: any stage of its model, or one of the same session.
    fn serves(&self, model: &ModelRecipe, session: Option<u64>) -> bool {
        self.model == *model && (session.is_none() || session == self.session)
    }
}

impl Workers {
    /// Starts the first worker, which says what the device is. It holds no model and measures nothing.
    ///
    /// # Errors
    /// `Spawn`, `Lost`, `Device`.
    pub fn start(launch: Launch) -> Result<Workers, WorkerError> {
        let (worker, greeting) = Worker::start(&launch)?;
        Ok(Workers { launch, greeting, holder: Mutex::new(None), general: Mutex::new(Some(worker)) })
    }

    /// Sets whether workers that are started from here on keep disturbed measurements as they are.
    #[must_use]
    pub fn accepting_disturbed(self, accept_disturbed: bool) -> Workers {
        Workers { launch: Launch { accept_disturbed, ..self.launch }, ..self }
    }

    pub fn info(&self) -> &EngineInfo {
        &self.greeting.info
    }

    /// Says why the device is that one.
    pub fn reason(&self) -> &str {
        &self.greeting.reason
    }

    fn start_one(&self) -> Result<Worker, RunnerError> {
        match Worker::start(&self.launch) {
            Ok((worker, _)) => Ok(worker),
            Err(WorkerError::Device(error)) => Err(StageError::from(error).into()),
            Err(error) => Err(StageError::Other(error.to_string()).into()),
        }
    }

    fn run_with_model(
        &self,
        task: Task,
        model: ModelRecipe,
        asked: &StageTask<'_>,
    ) -> Result<StageOutput, RunnerError> {
        let mut holder = lock(&self.holder);
        if asked.progress.is_cancelled() {
            return Err(StageError::Cancelled.into());
        }
        if holder.as_ref().is_some_and(|holder| !holder.serves(&model, asked.session)) {
            // The old model goes before the new one comes.
            *holder = None;
        }
        let Holder { model, session, mut worker } = match holder.take() {
            Some(held) => held,
            None => {
                if let Ok(mut general) = self.general.try_lock() {
                    *general = None;
                }
                Holder { model, session: asked.session, worker: self.start_one()? }
            }
        };
        let result = worker.run(task, asked.progress);
        if is_usable(&result) {
            *holder = Some(Holder { model, session, worker });
        } else {
            worker.kill();
        }
        result
    }

    fn run_general(&self, task: Task, asked: &StageTask<'_>) -> Result<StageOutput, RunnerError> {
        let mut general = lock(&self.general);
        if asked.progress.is_cancelled() {
            return Err(StageError::Cancelled.into());
        }
        let mut worker = match general.take() {
            Some(worker) => worker,
            None => self.start_one()?,
        };
        let result = worker.run(task, asked.progress);
        if is_usable(&result) {
            *general = Some(worker);
        } else {
            worker.kill();
        }
        result
    }
}

impl Forecaster for Workers {
    fn memory_limit(&self) -> Option<u64> {
        self.launch.memory_limit
    }

    fn predict(&self, recipe: &ModelRecipe, work: Workload) -> Result<Option<MemoryPrediction>, RunnerError> {
        let mut general = lock(&self.general);
        let mut worker = match general.take() {
            Some(worker) => worker,
            None => self.start_one()?,
        };
        let result = worker.predict(recipe, work);
        if !matches!(result, Err(RunnerError::WorkerLost { .. })) {
            *general = Some(worker);
        }
        result
    }
}

impl StageRunner for Workers {
    fn run(&self, stage: &dyn Stage, task: &StageTask<'_>) -> Result<StageOutput, RunnerError> {
        let description = stage.description();
        if !description.computes && !description.measures {
            return run_without_models(stage, task);
        }
        let wire = Task::of(description.kind, task);
        match model_of(description.kind, task)? {
            Some(model) => self.run_with_model(wire, model, task),
            None => self.run_general(wire, task),
        }
    }

    fn retain(&self, needed: &[ModelRecipe]) {
        if let Ok(mut holder) = self.holder.try_lock()
            && holder.as_ref().is_some_and(|holder| !needed.contains(&holder.model))
        {
            *holder = None;
        }
    }

    fn is_host(&self) -> bool {
        self.greeting.info.is_host
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns true if the worker can run another stage: it is there, and its device and its model are whole.
fn is_usable(result: &Result<StageOutput, RunnerError>) -> bool {
    match result {
        Ok(_) => true,
        Err(RunnerError::Stage(StageError::Unstoppable(_))) => false,
        Err(RunnerError::Stage(error)) => !error.is_cancelled() && !error.is_device(),
        Err(RunnerError::Panic { .. } | RunnerError::WorkerLost { .. }) => false,
    }
}

/// Returns the model that a stage computes with; `load` and `quantize` make one and hold none.
fn model_of(kind: &str, task: &StageTask<'_>) -> Result<Option<ModelRecipe>, StageError> {
    if ["load", "quantize"].contains(&kind) {
        return Ok(None);
    }
    let input = task.inputs.get("model").and_then(|inputs| inputs.first());
    input.map(|input| Ok(input.recipe()?.rooted(task.root))).transpose()
}
