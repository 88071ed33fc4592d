//! The engine that this build has.

use super::error::CliError;
use crate::inference::{Engine, GpuIdentity};
use std::sync::Arc;

/// Builds the engine for a device and tells why it is that one.
///
/// # Errors
/// Where this build or this machine has no such device.
#[cfg(feature = "cpu")]
pub fn build(device: &str) -> Result<(Arc<dyn Engine>, String), CliError> {
    Ok(crate::engine::build(device)?)
}

/// Builds the engine for a device and tells why it is that one.
///
/// # Errors
/// Always: this build has none.
#[cfg(not(feature = "cpu"))]
pub fn build(device: &str) -> Result<(Arc<dyn Engine>, String), CliError> {
    let reason = "this labpipe was built without an engine; build it with its default features".to_owned();
    Err(crate::inference::InferenceError::Device { device: device.to_owned(), reason }.into())
}

/// Returns the machine's GPUs; nothing where this build or this machine has nobody to ask.
pub fn gpus() -> Option<Vec<GpuIdentity>> {
    #[cfg(feature = "cuda")]
    return crate::engine::gpus();
    #[cfg(not(feature = "cuda"))]
    None
}
