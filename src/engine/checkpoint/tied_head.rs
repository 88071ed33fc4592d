//! Decides whether a model whose config ties its head to the embedding does so, as transformers 5.24 does (`tie_weights`): not where
//! the files hold both with different values.

use super::convert::to_f32;
use super::safetensors_file::{FolderTensor, SafetensorsFolder};
use super::tensor_account::{EMBEDDING, HEAD};
use crate::engine::spec::ModelSpec;
use crate::inference::InferenceError;
use rayon::prelude::*;
use std::io;

/// Values that are compared at a time.
const CHUNK: usize = 1 << 16;

/// Gives the spec a head of its own where the folder holds one that is not the embedding, and the folder a warning that says so.
///
/// # Errors
/// `File` where one of the two could not be read.
pub fn settle_tied_head(folder: &mut SafetensorsFolder, spec: &mut ModelSpec) -> Result<(), InferenceError> {
    if !spec.tied_embeddings {
        return Ok(());
    }
    let (Some(embedding), Some(head)) = (folder.raw(EMBEDDING), folder.raw(HEAD)) else { return Ok(()) };
    let unreadable = |error: io::Error| InferenceError::File {
        path: head.path.to_path_buf(),
        reason: format!("{HEAD} cannot be compared with {EMBEDDING}: {error}"),
    };
    if !are_equal(embedding, head).map_err(unreadable)? {
        spec.tied_embeddings = false;
        folder.warn(format!(
            "config.json ties {HEAD} to {EMBEDDING} (tie_word_embeddings), but the files hold both with different values: they are \
             not tied, as in transformers; set tie_word_embeddings: false to say so"
        ));
    }
    Ok(())
}

/// Returns true where two tensors of floats have the same shape and values. A NaN equals nothing.
fn are_equal(a: &FolderTensor, b: &FolderTensor) -> io::Result<bool> {
    let (Some(a_dtype), Some(b_dtype)) = (a.float_dtype(), b.float_dtype()) else { return Ok(false) };
    if a.shape != b.shape {
        return Ok(false);
    }
    let n_values = a.bytes.len() / a_dtype.size_bytes();
    let values = |tensor: &FolderTensor, dtype: crate::units::DType, first: usize, n: usize| {
        let mut bytes = vec![0u8; n * dtype.size_bytes()];
        tensor.bytes.read_into(first * dtype.size_bytes(), &mut bytes)?;
        io::Result::Ok(to_f32(dtype, &bytes))
    };
    let is_equal = |chunk_idx: usize| {
        let first = chunk_idx * CHUNK;
        let n = CHUNK.min(n_values - first);
        Ok(values(a, a_dtype, first, n)? == values(b, b_dtype, first, n)?)
    };
    let n_chunks = n_values.div_ceil(CHUNK);
    (0..n_chunks).into_par_iter().map(is_equal).find_any(|equal| !matches!(equal, Ok(true))).unwrap_or(Ok(true))
}
