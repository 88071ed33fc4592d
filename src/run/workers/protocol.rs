//! What parent and worker say to each other: one JSON object per line.

use crate::artifact::{Execution, Record, RecordError};
use crate::event::Level;
use crate::inference::{EngineInfo, MemoryPrediction, ModelRecipe, Workload};
use crate::run::runner::{RunnerError, StageTask};
use crate::stage::{Params, StageError, StageInput, Start};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

/// From the parent.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToWorker {
    Run(Box<Task>),
    /// What a stage would take with a model.
    Predict {
        recipe: Box<ModelRecipe>,
        work: Workload,
    },
    /// The stage that runs is to stop at its next step, and no other follows.
    Cancel,
}

/// A stage to run.
#[derive(Debug, Serialize, Deserialize)]
pub struct Task {
    pub kind: String,
    pub address: String,
    pub params: Params,
    pub root: PathBuf,
    pub inputs: BTreeMap<String, Vec<Input>>,
    pub missing_inputs: Vec<String>,
    pub out_dir: PathBuf,
    pub start: Start,
    pub may_repeat: bool,
}

/// A committed artifact that the stage reads, with its own inputs.
#[derive(Debug, Serialize, Deserialize)]
pub struct Input {
    address: String,
    kind: String,
    key: String,
    dir: PathBuf,
    record: Value,
    inputs: BTreeMap<String, Vec<Input>>,
}

/// From the worker.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromWorker {
    /// The engine is there; `reason` says why it is that one.
    Ready {
        info: EngineInfo,
        reason: String,
    },
    /// The device can't be used. The worker ends.
    NoDevice {
        device: String,
        reason: String,
    },
    Begin {
        total: Option<u64>,
        unit: String,
    },
    Advance {
        n: u64,
    },
    Note {
        level: Level,
        text: String,
    },
    Done {
        body: Map<String, Value>,
        summary: String,
        execution: Option<Execution>,
    },
    /// Null where the engine predicts nothing.
    Predicted {
        prediction: Option<MemoryPrediction>,
    },
    Failed {
        kind: FailureKind,
        text: String,
    },
}

/// What kind of failure ended a stage: it decides the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    Stage,
    /// The device is missing, lost or out of memory.
    Device,
    Cancelled,
    Panic,
    /// Work that was given up goes on in the worker.
    Unstoppable,
}

impl Task {
    /// Writes down what a stage is asked to do.
    pub fn of(kind: &str, task: &StageTask<'_>) -> Task {
        Task {
            kind: kind.to_owned(),
            address: task.address.to_owned(),
            params: task.params.clone(),
            root: task.root.to_owned(),
            inputs: task
                .inputs
                .iter()
                .map(|(param, list)| (param.clone(), list.iter().map(Input::of).collect()))
                .collect(),
            missing_inputs: task.missing_inputs.to_vec(),
            out_dir: task.out_dir.to_owned(),
            start: task.start,
            may_repeat: task.may_repeat,
        }
    }
}

impl Input {
    fn of(input: &Arc<StageInput>) -> Input {
        Input {
            address: input.address.clone(),
            kind: input.kind.clone(),
            key: input.key.clone(),
            dir: input.dir.clone(),
            record: input.record.to_json(),
            inputs: input
                .inputs
                .iter()
                .map(|(param, list)| (param.clone(), list.iter().map(Input::of).collect()))
                .collect(),
        }
    }

    /// Returns the input as stages read it.
    ///
    /// # Errors
    /// Where the record is not one.
    pub fn read(self) -> Result<Arc<StageInput>, RecordError> {
        let record = Record::from_json(self.record)?;
        let inputs = read_inputs(self.inputs)?;
        let Input { address, kind, key, dir, .. } = self;
        Ok(Arc::new(StageInput { address, kind, key, record, dir, inputs }))
    }
}

/// Returns a stage's inputs as stages read them.
///
/// # Errors
/// As [`Input::read`].
pub fn read_inputs(
    inputs: BTreeMap<String, Vec<Input>>,
) -> Result<BTreeMap<String, Vec<Arc<StageInput>>>, RecordError> {
    let read = |list: Vec<Input>| list.into_iter().map(Input::read).collect::<Result<Vec<_>, _>>();
    inputs.into_iter().map(|(param, list)| Ok((param, read(list)?))).collect()
}

impl FromWorker {
    /// Returns how a stage's failure is told to the parent.
    pub fn failure(error: &RunnerError) -> FromWorker {
        let kind = match error {
            RunnerError::Panic { .. } => FailureKind::Panic,
            RunnerError::Stage(error) if error.is_cancelled() => FailureKind::Cancelled,
            RunnerError::Stage(error) if error.is_device() => FailureKind::Device,
            RunnerError::Stage(StageError::Unstoppable(_)) => FailureKind::Unstoppable,
            RunnerError::Stage(_) | RunnerError::WorkerLost { .. } => FailureKind::Stage,
        };
        FromWorker::Failed { kind, text: error.to_string() }
    }
}

impl FailureKind {
    /// Returns the failure as the parent hands it on.
    pub fn error(self, text: String) -> RunnerError {
        match self {
            FailureKind::Stage => StageError::Other(text).into(),
            FailureKind::Device => StageError::Device(text).into(),
            FailureKind::Cancelled => StageError::Cancelled.into(),
            FailureKind::Panic => RunnerError::Panic { message: text },
            FailureKind::Unstoppable => StageError::Unstoppable(text).into(),
        }
    }
}
