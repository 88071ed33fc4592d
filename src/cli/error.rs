//! Errors at the edge, with their exit codes and hints.

use crate::artifact::RecordError;
use crate::hub::HubError;
use crate::inference::InferenceError;
use crate::pipeline::PipelineError;
use crate::plan::PlanError;
use crate::store::StoreError;
use std::path::PathBuf;

/// Why a command ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CliError {
    #[error("{0}")]
    Pipeline(PipelineError),
    #[error("failed to read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("failed to {0}")]
    Plan(#[from] PlanError),
    #[error("failed to {0}")]
    Store(#[from] StoreError),
    /// A command that would do harm without what it can't read.
    #[error("failed to {0}")]
    Refused(StoreError),
    #[error("failed to {0}")]
    Device(#[from] InferenceError),
    #[error("failed to {0}")]
    Hub(#[from] HubError),
    #[error("failed to {0}")]
    Record(#[from] RecordError),
    #[error("failed to {0}")]
    Worker(crate::run::WorkerError),
    /// Stages that are predicted to take more memory than the limit allows, a sentence each.
    #[error("{}", refusals.join("\nerror: "))]
    DoesNotFit { refusals: Vec<String> },
    #[error("{message}")]
    Usage { message: String, hint: Option<String> },
    #[error("failed to write to stdout: {0}")]
    Output(std::io::Error),
}

impl CliError {
    /// Returns the documented exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            CliError::Device(_) | CliError::DoesNotFit { .. } => 4,
            CliError::Refused(_) => 5,
            CliError::Store(_) | CliError::Record(_) | CliError::Worker(_) => 3,
            CliError::Output(_) => 6,
            CliError::Pipeline(_)
            | CliError::Read { .. }
            | CliError::Plan(_)
            | CliError::Hub(_)
            | CliError::Usage { .. } => 2,
        }
    }

    /// Returns the error as a person reads it.
    pub fn render(&self) -> String {
        // A pipeline's diagnostics come with their own layout and hints.
        if let CliError::Pipeline(error) = self {
            return error.render();
        }
        let hint = match self {
            CliError::Usage { hint, .. } => hint.clone(),
            CliError::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                Some("the path starts where labpipe was started; ready-made files are in pipelines/".to_owned())
            }
            CliError::Output(source) if source.kind() == std::io::ErrorKind::StorageFull => {
                Some("the device that stdout goes to is full".to_owned())
            }
            CliError::DoesNotFit { .. } => Some(
                "nothing has run; --memory-limit SIZE allows more, --until STAGE and --only STAGE leave stages out"
                    .to_owned(),
            ),
            _ => None,
        };
        let hint = hint.map(|hint| format!("\n  = hint: {hint}")).unwrap_or_default();
        format!("error: {self}{hint}")
    }
}
