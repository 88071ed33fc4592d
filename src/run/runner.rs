//! Where a stage's code runs: in this process, or in a worker.

use super::residency::Residency;
use crate::artifact::{Execution, QuantizedModule};
use crate::event::{Level, Progress};
use crate::inference::{Engine, EngineInfo, InferenceError, MemoryProbe, Model, ModelInfo, ModelRecipe};
use crate::stage::{ModelLease, ModelPool, Params, Stage, StageContext, StageError, StageInput, StageOutput, Start};
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// What a stage is asked to do.
pub struct StageTask<'a> {
    pub address: &'a str,
    pub params: &'a Params,
    pub root: &'a Path,
    pub inputs: &'a BTreeMap<String, Vec<Arc<StageInput>>>,
    pub missing_inputs: &'a [String],
    /// Staging folder.
    pub out_dir: &'a Path,
    pub start: Start,
    /// Stages of one session run in one process with one copy of the model; a session begins in a fresh process. Without one any process
    /// will do.
    pub session: Option<u64>,
    /// A disturbed measurement may be made once more; not where that was in vain in an earlier start.
    pub may_repeat: bool,
    pub progress: &'a dyn Progress,
}

/// Why a stage gave no output.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunnerError {
    #[error(transparent)]
    Stage(#[from] StageError),
    #[error("{message}")]
    Panic { message: String },
    /// The worker ended before the stage did.
    #[error("finish: its worker process {reason}")]
    WorkerLost { reason: String },
}

/// Runs stages, and decides where the models that they need are held.
pub trait StageRunner: Send + Sync {
    /// Runs one stage.
    ///
    /// # Errors
    /// Whatever stopped it.
    fn run(&self, stage: &dyn Stage, task: &StageTask<'_>) -> Result<StageOutput, RunnerError>;

    /// Drops the model that is held unless it is one of `needed`, or in use.
    fn retain(&self, needed: &[ModelRecipe]);

    /// Returns true if the device is the host's processor.
    fn is_host(&self) -> bool;
}

/// Runs every stage in this process.
pub struct InProcess {
    engine: Arc<dyn Engine>,
    models: Residency,
    /// The last one that began.
    session: Mutex<Option<u64>>,
    accept_disturbed: bool,
    /// Warnings that were given.
    told: Mutex<BTreeSet<String>>,
}

/// Remembers which model a stage was lent.
struct Watched<'a> {
    models: &'a Residency,
    lent: Mutex<Option<ModelRecipe>>,
}

impl ModelPool for Watched<'_> {
    fn acquire(&self, recipe: &ModelRecipe, progress: &dyn Progress) -> Result<ModelLease<'_>, InferenceError> {
        *self.lent.lock().unwrap_or_else(PoisonError::into_inner) = Some(recipe.clone());
        self.models.acquire(recipe, progress)
    }
}

impl InProcess {
    pub fn new(engine: Arc<dyn Engine>) -> InProcess {
        InProcess {
            models: Residency::new(Arc::clone(&engine)),
            engine,
            session: Mutex::new(None),
            accept_disturbed: false,
            told: Mutex::default(),
        }
    }

    /// Sets whether disturbed measurements are kept as they are.
    #[must_use]
    pub fn accepting_disturbed(self, accept_disturbed: bool) -> InProcess {
        InProcess { accept_disturbed, ..self }
    }

    /// Drops the model where a session begins.
    fn enter(&self, session: Option<u64>) {
        let mut last = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if session.is_some() && session != *last {
            self.models.retain(&[]);
            *last = session;
        }
    }

    /// Tells once in a process what made a model slower than the device allows.
    fn warn(&self, execution: Option<&Execution>, progress: &dyn Progress) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        for text in execution.into_iter().flat_map(|execution| execution.fallback.iter().chain(&execution.slow)) {
            if told.insert(text.clone()) {
                progress.note(Level::Warning, text);
            }
        }
    }

    /// Adds the device's name and its free memory to a device failure. The model is dropped: a failed allocation may have left it
    /// half written.
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

impl StageRunner for InProcess {
    fn run(&self, stage: &dyn Stage, task: &StageTask<'_>) -> Result<StageOutput, RunnerError> {
        self.enter(task.session);
        let models = Watched { models: &self.models, lent: Mutex::new(None) };
        let mut result = run_here(stage, task, self.engine.as_ref(), &models, self.accept_disturbed);
        if let (Ok(output), Some(recipe)) = (&mut result, models.lent.into_inner().unwrap_or_default()) {
            output.execution = self.models.execution_of(&recipe);
            self.warn(output.execution.as_ref(), task.progress);
        }
        result.map_err(|error| match error {
            RunnerError::Stage(error) => RunnerError::Stage(self.device_failure(error)),
            other => other,
        })
    }

    fn retain(&self, needed: &[ModelRecipe]) {
        self.models.retain(needed);
    }

    fn is_host(&self) -> bool {
        self.engine.info().is_host
    }
}

/// Runs a stage that uses no model.
///
/// # Errors
/// Whatever stopped it.
pub fn run_without_models(stage: &dyn Stage, task: &StageTask<'_>) -> Result<StageOutput, RunnerError> {
    run_here(stage, task, &NoEngine, &NoEngine, false)
}

fn run_here(
    stage: &dyn Stage,
    task: &StageTask<'_>,
    engine: &dyn Engine,
    models: &dyn ModelPool,
    accept_disturbed: bool,
) -> Result<StageOutput, RunnerError> {
    let context = StageContext {
        address: task.address,
        params: task.params,
        root: task.root,
        inputs: task.inputs,
        missing_inputs: task.missing_inputs,
        out_dir: task.out_dir,
        start: task.start,
        engine,
        models,
        progress: task.progress,
        accept_disturbed,
        may_repeat: task.may_repeat,
    };
    match catch_unwind(AssertUnwindSafe(|| stage.run(&context))) {
        Ok(output) => Ok(output?),
        Err(payload) => Err(RunnerError::Panic { message: panic_message(payload.as_ref()) }),
    }
}

fn panic_message(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str).or_else(|| payload.downcast_ref::<&str>().copied());
    text.unwrap_or("no message").lines().next().unwrap_or_default().to_owned()
}

/// Stands where an engine would, for stages that use none.
struct NoEngine;

impl NoEngine {
    fn refuse<T>() -> Result<T, InferenceError> {
        Err(InferenceError::Unsupported("open a model: this kind of stage says that it computes nothing".to_owned()))
    }
}

impl ModelPool for NoEngine {
    fn acquire(&self, _recipe: &ModelRecipe, _progress: &dyn Progress) -> Result<ModelLease<'_>, InferenceError> {
        NoEngine::refuse()
    }
}

impl Engine for NoEngine {
    fn info(&self) -> EngineInfo {
        EngineInfo {
            backend: "none".to_owned(),
            device: "none".to_owned(),
            numerics_version: 0,
            clock: "none".to_owned(),
            is_host: true,
            computed_with: BTreeMap::new(),
        }
    }

    fn inspect(&self, _recipe: &ModelRecipe) -> Result<ModelInfo, InferenceError> {
        NoEngine::refuse()
    }

    fn open(&self, _recipe: &ModelRecipe, _progress: &dyn Progress) -> Result<Box<dyn Model>, InferenceError> {
        NoEngine::refuse()
    }

    fn survey(
        &self,
        _recipe: &ModelRecipe,
        _progress: &dyn Progress,
        _each: &mut dyn FnMut(QuantizedModule),
    ) -> Result<(), InferenceError> {
        NoEngine::refuse()
    }

    fn memory_probe(&self) -> Box<dyn MemoryProbe> {
        struct Nothing;
        impl MemoryProbe for Nothing {
            fn finish(self: Box<Self>) -> crate::artifact::MemoryFigures {
                crate::artifact::MemoryFigures::default()
            }
        }
        Box::new(Nothing)
    }
}
