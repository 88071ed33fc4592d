//! What is wrong with a GGUF file.

use std::path::PathBuf;

/// Why a GGUF file can't be used. The text fits "failed to {error}".
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    #[error("read model file {path}: {reason}")]
    File { path: PathBuf, reason: String },
    #[error("read model file {path}: metadata {key}: {reason}")]
    Metadata { path: PathBuf, key: String, reason: String },
    #[error("read model file {path}: tensor {tensor}: {reason}")]
    Tensor { path: PathBuf, tensor: String, reason: String },
    #[error("read the tokenizer in {path}: {reason}")]
    Tokenizer { path: PathBuf, reason: String },
}
