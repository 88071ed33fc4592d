//! Why an engine could not do what was asked.

use crate::units::{DType, format_bytes};
use std::path::PathBuf;

/// Why an engine could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InferenceError {
    #[error("read model file {path}: {reason}")]
    File { path: PathBuf, reason: String },
    #[error("write model file {path}: {reason}")]
    Write { path: PathBuf, reason: String },
    #[error("read {path}: architecture {found:?} is not known; labpipe knows {known}")]
    UnknownArchitecture { path: PathBuf, found: String, known: String },
    #[error("load tensor {tensor}: expected {expected}, found {found} in {path}")]
    Tensor { path: PathBuf, tensor: String, expected: String, found: String },
    #[error(
        "load tensor {tensor} from {path}: value {value} at index {index}; the file is damaged or was saved from a diverged run"
    )]
    NotFinite { path: PathBuf, tensor: String, index: usize, value: f32 },
    #[error("load tensor {tensor} from {path}: it is not there; {reason}")]
    MissingTensor { path: PathBuf, tensor: String, reason: String },
    #[error("store {tensor} as {dtype}: the value {value} at index {index} is beyond its range; use dtype: {}", wider(*dtype))]
    BeyondRange { tensor: String, dtype: DType, index: usize, value: f32 },
    /// `evidence` fits "its weights are quantized with … (…)".
    #[error(
        "open {path}: its weights are quantized with {method} ({evidence}); labpipe reads plain f32, f16 and bf16 weights, \
         bitsandbytes' folders and GGUF files: name the model that this one was made from, or a GGUF file of it"
    )]
    ForeignQuantization { path: PathBuf, method: String, evidence: String },
    #[error("compute {what}: the result is not finite")]
    NotFiniteResult { what: String },
    #[error("decode disagrees with prefill: {reason}")]
    DecodeMismatch { reason: String },
    #[error("quantize {module}: {reason}")]
    Quantize { module: String, reason: String },
    #[error("run {asked} tokens: the model's context holds {n_ctx_max}")]
    ContextTooLong { asked: usize, n_ctx_max: usize },
    #[error("run token id {token}: the vocabulary has {vocab_size} entries; does the tokenizer belong to this model?")]
    TokenOutOfRange { token: u32, vocab_size: usize },
    /// `what` fits "make room for …".
    #[error(
        "make room for {what} on {device}: {} asked for, {}; close other processes that hold memory there, quantize the model, or \
         run shorter contexts",
        format_bytes(*asked_bytes),
        free(*free_bytes)
    )]
    OutOfMemory { what: String, device: String, asked_bytes: u64, free_bytes: Option<u64> },
    /// `what` fits "make room for …".
    #[error(
        "make room for {what}: {} asked for, {} of the memory limit of {} left; raise the limit, quantize the model, or run shorter \
         contexts",
        format_bytes(*asked_bytes),
        format_bytes(*left_bytes),
        format_bytes(*limit_bytes)
    )]
    OverLimit { what: String, asked_bytes: u64, left_bytes: u64, limit_bytes: u64 },
    #[error(
        "go on with device {device}: it is lost ({reason}), and nothing more can run on it in this process; run labpipe again, \
         and see the driver's log where that fails too"
    )]
    DeviceLost { device: String, reason: String },
    #[error("use device {device}: {reason}")]
    Device { device: String, reason: String },
    #[error("{0}")]
    Unsupported(String),
    #[error("pass values on: {0}")]
    Sink(String),
    #[error("cancelled")]
    Cancelled,
}

/// Returns the element types that reach further.
fn wider(dtype: DType) -> &'static str {
    if dtype == DType::F16 { "bf16 or f32" } else { "f32" }
}

fn free(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "how much is free is not known".to_owned(), |bytes| format!("{} free", format_bytes(bytes)))
}

/// What a device is called where a failure was met before its name is known.
const UNNAMED: &str = "gpu";

impl InferenceError {
    /// Returns true where the device is missing, lost or out of memory (exit code 4).
    pub fn is_device(&self) -> bool {
        use InferenceError::{Device, DeviceLost, OutOfMemory, OverLimit};
        matches!(self, OutOfMemory { .. } | OverLimit { .. } | DeviceLost { .. } | Device { .. })
    }

    /// Returns a failure of a device that has no name yet; [`located`](InferenceError::located) gives it one.
    pub fn device(reason: String) -> InferenceError {
        InferenceError::Device { device: UNNAMED.to_owned(), reason }
    }

    /// Returns an allocation's failure on a device that has no name yet.
    pub fn out_of_memory(what: &str, asked_bytes: u64, free_bytes: Option<u64>) -> InferenceError {
        InferenceError::OutOfMemory { what: what.to_owned(), device: UNNAMED.to_owned(), asked_bytes, free_bytes }
    }

    /// Returns the refusal of what a memory limit leaves no room for.
    pub fn over_limit(what: &str, asked_bytes: u64, left_bytes: u64, limit_bytes: u64) -> InferenceError {
        InferenceError::OverLimit { what: what.to_owned(), asked_bytes, left_bytes, limit_bytes }
    }

    /// Returns a lost device that has no name yet.
    pub fn lost(reason: String) -> InferenceError {
        InferenceError::DeviceLost { device: UNNAMED.to_owned(), reason }
    }

    /// Names the device that failed, and what was free on it, where the failure doesn't.
    #[must_use]
    pub fn located(self, device: &str, free_bytes: Option<u64>) -> InferenceError {
        let name = |found: String| if found == UNNAMED { device.to_owned() } else { found };
        match self {
            InferenceError::OutOfMemory { what, device, asked_bytes, free_bytes: found } => {
                InferenceError::OutOfMemory {
                    free_bytes: if device == UNNAMED { found.or(free_bytes) } else { found },
                    device: name(device),
                    what,
                    asked_bytes,
                }
            }
            InferenceError::DeviceLost { device, reason } => {
                InferenceError::DeviceLost { device: name(device), reason }
            }
            InferenceError::Device { device, reason } => InferenceError::Device { device: name(device), reason },
            other => other,
        }
    }

    /// Names the case of a stage (`pp512`, `tg128 @ d512`) in which a result was not finite.
    #[must_use]
    pub fn in_case(self, case: &str) -> InferenceError {
        match self {
            InferenceError::NotFiniteResult { what } => {
                InferenceError::NotFiniteResult { what: format!("{what} ({case})") }
            }
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_named_after_its_device_once_and_says_what_was_asked_and_free() {
        let error = InferenceError::out_of_memory("a buffer", 3 << 30, None).located("cuda:0: a card", Some(1 << 30));
        let text = error.to_string();
        assert!(text.contains("a buffer on cuda:0: a card: 3.00 GiB asked for, 1.00 GiB free"), "{text}");
        assert!(error.is_device());
        let InferenceError::OutOfMemory { device, free_bytes, .. } = error.located("another", Some(7)) else {
            panic!("it stays what it is")
        };
        assert_eq!((device.as_str(), free_bytes), ("cuda:0: a card", Some(1 << 30)));
        let lost = InferenceError::lost("an illegal address".to_owned()).located("cuda:1", None);
        assert!(lost.is_device() && lost.to_string().contains("cuda:1: it is lost (an illegal address)"), "{lost}");
    }

    #[test]
    fn only_results_that_are_not_finite_are_given_a_case() {
        let error = InferenceError::NotFiniteResult { what: "logits".to_owned() }.in_case("pp512");
        assert_eq!(error.to_string(), "compute logits (pp512): the result is not finite");
        assert!(matches!(InferenceError::Cancelled.in_case("pp512"), InferenceError::Cancelled));
    }
}
