//! The engine that this build has, and the workers that run it.

use super::error::CliError;
use crate::inference::{Engine, ExecutionChoice, GpuIdentity, InferenceError};
use crate::run::{Launch, WorkerError, Workers, serve};
use crate::stages::catalogue;
use std::sync::Arc;

/// What a command asks of the engine.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// As `--device` names it.
    pub device: &'a str,
    /// What models keep below, in bytes.
    pub memory_limit: Option<u64>,
    /// Which path models take through the device.
    pub execution: ExecutionChoice,
}

/// Builds the engine that is asked for, and says why it is on that device.
///
/// # Errors
/// Where this build or this machine has no such device, or the device no such path.
#[cfg(feature = "cpu")]
pub fn build(asked: &Asked<'_>) -> Result<(Arc<dyn Engine>, String), InferenceError> {
    crate::engine::build_within(asked.device, asked.memory_limit, asked.execution)
}

/// Builds the engine for a device and says why it is that one.
///
/// # Errors
/// Always: this build has none.
#[cfg(not(feature = "cpu"))]
pub fn build(asked: &Asked<'_>) -> Result<(Arc<dyn Engine>, String), InferenceError> {
    let reason = "this labpipe was built without an engine; build it with its default features".to_owned();
    Err(InferenceError::Device { device: asked.device.to_owned(), reason })
}

/// Runs stages for the parent process until it closes stdin. `processor_speeds` is what the parent knows of the processors.
pub fn work(asked: &Asked<'_>, accept_disturbed: bool, processor_speeds: Option<&str>) -> u8 {
    #[cfg(feature = "cpu")]
    {
        crate::engine::keep_freed_memory();
        // Before the engine is built, which starts the threads.
        crate::engine::pin_threads();
        // A parent of the same program wrote it; without it the worker learns by itself.
        let _ = processor_speeds.map(crate::engine::know_processor_speeds);
    }
    #[cfg(not(feature = "cpu"))]
    let _ = processor_speeds;
    serve(&catalogue(), asked.device, accept_disturbed, || build(asked))
}

/// Returns the machine's GPUs; `None` where this build or this machine has no driver to ask.
pub fn gpus() -> Option<Vec<GpuIdentity>> {
    #[cfg(feature = "cuda")]
    return crate::engine::gpus();
    #[cfg(not(feature = "cuda"))]
    None
}

/// Starts the workers of a device.
///
/// # Errors
/// Where the device can't be used, or this program can't start itself again.
pub fn workers(asked: &Asked<'_>) -> Result<Workers, CliError> {
    let program = std::env::current_exe().map_err(|error| CliError::Usage {
        message: format!("failed to find this program's own file, which workers are started from: {error}"),
        hint: None,
    })?;
    #[cfg(feature = "cpu")]
    let processor_speeds = {
        // As workers' threads will be.
        crate::engine::pin_threads();
        Some(crate::engine::processor_speeds())
    };
    #[cfg(not(feature = "cpu"))]
    let processor_speeds = None;
    let Asked { device, memory_limit, execution } = *asked;
    let device = device.to_owned();
    let launch = Launch { program, device, memory_limit, execution, accept_disturbed: false, processor_speeds };
    Workers::start(launch).map_err(|error| match error {
        WorkerError::Device(error) => CliError::Device(error),
        other => CliError::Worker(other),
    })
}
