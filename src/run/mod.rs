//! Runs a plan: who may run when, which model is loaded, what is committed, what the run leaves.
//!
//! `schedule` decides and waits, `prepare`, `job` and `ending` bring one stage to its end, `group` several that measure, `residency` lends
//! models. Nothing here prints.

mod ending;
mod environment;
mod facts;
mod forecast;
mod group;
mod inputs;
mod job;
mod metrics_rows;
mod prepare;
mod progress;
mod repeat;
mod residency;
mod run_file;
mod runner;
mod schedule;
mod show_as;
mod sources;
mod workers;

pub use environment::{environment, load_average};
pub use facts::StoreFacts;
pub use forecast::{Forecaster, Predicted, StageMemory, forecast};
pub use inputs::{Verified, planned_keys, verify_cached};
pub use metrics_rows::metrics_rows;
pub use progress::StageProgress;
pub use repeat::{external_files, planned_stages};
pub use residency::Residency;
pub use run_file::{RunFile, run_id, timestamp};
pub use runner::{InProcess, RunnerError, StageRunner, StageTask};
pub use schedule::{RunOutcome, RunRequest, execute};
pub use sources::{SourceError, Sources, hub_references};

pub use workers::{Launch, WorkerError, Workers, serve};

/// Why a stage did not give a result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JobError {
    #[error(transparent)]
    Stage(#[from] crate::stage::StageError),
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
    #[error("read its input {address}: the artifact was replaced by another labpipe meanwhile; run again")]
    InputReplaced { address: String },
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("go on: stage code panicked ({message}); this is a bug in labpipe, please report it")]
    Panic { message: String },
    #[error("finish: its worker process {reason}")]
    WorkerLost { reason: String },
}

impl From<RunnerError> for JobError {
    fn from(error: RunnerError) -> JobError {
        match error {
            RunnerError::Stage(error) => JobError::Stage(error),
            RunnerError::Panic { message } => JobError::Panic { message },
            RunnerError::WorkerLost { reason } => JobError::WorkerLost { reason },
        }
    }
}

impl JobError {
    /// Returns the exit code of a run in which this is the worst that happened.
    pub fn exit_code(&self) -> u8 {
        match self {
            JobError::Panic { .. } => 1,
            JobError::Stage(error) if error.is_device() => 4,
            JobError::Stage(_)
            | JobError::Store(_)
            | JobError::Source(_)
            | JobError::InputReplaced { .. }
            | JobError::WorkerLost { .. } => 3,
        }
    }

    fn is_cancelled(&self) -> bool {
        match self {
            JobError::Stage(error) => error.is_cancelled(),
            JobError::Store(error) => matches!(error, crate::store::StoreError::Cancelled { .. }),
            JobError::Source(_)
            | JobError::Panic { .. }
            | JobError::InputReplaced { .. }
            | JobError::WorkerLost { .. } => false,
        }
    }
}
