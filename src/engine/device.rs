//! Which device an engine runs on, and why.

use super::burn_engine::BurnEngine;
use crate::inference::{Engine, InferenceError};
use std::sync::Arc;

/// Builds the engine for a device: `auto`, `cpu`, `cuda`, `cuda:N`, `wgpu`. Returns it with the reason for the choice.
///
/// # Errors
/// `Device` where the device is unknown or this build can't drive it.
pub fn build(device: &str) -> Result<(Arc<dyn Engine>, String), InferenceError> {
    let unavailable = |reason: &str| {
        Err(InferenceError::Device { device: device.to_owned(), reason: format!("{reason}; try --device cpu") })
    };
    match device {
        "auto" => Ok((Arc::new(BurnEngine::cpu()), "cpu: this build has no GPU backend".to_owned())),
        "cpu" => Ok((Arc::new(BurnEngine::cpu()), "cpu: asked for".to_owned())),
        "wgpu" => unavailable("this labpipe was built without the wgpu backend"),
        cuda if cuda == "cuda" || cuda.starts_with("cuda:") => {
            unavailable("this labpipe was built without the CUDA backend")
        }
        _ => unavailable("no such device; labpipe knows auto, cpu, cuda, cuda:N and wgpu"),
    }
}

/// Returns what identifies this machine's processor in records and keys: model, threads and vector instructions.
pub fn cpu_identity() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let model = field("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let stepping = match (field("cpu family"), field("model")) {
        (Some(family), Some(model_number)) => format!(" (family {family} model {model_number})"),
        _ => String::new(),
    };
    format!("cpu: {model}{stepping}, {} threads, {}", rayon::current_num_threads(), vector_instructions())
}

#[cfg(target_arch = "x86_64")]
fn vector_instructions() -> &'static str {
    if std::arch::is_x86_feature_detected!("avx512f") {
        "avx512f"
    } else if std::arch::is_x86_feature_detected!("avx2") {
        "avx2"
    } else {
        "sse2"
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn vector_instructions() -> &'static str {
    std::env::consts::ARCH
}
