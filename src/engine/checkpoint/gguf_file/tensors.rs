//! The file's tensors under Hugging Face's names. Block-quantized tensors are decoded to f32 when they are asked for, which is exact;
//! plain floats are read in place.

use super::architecture::Architecture;
use crate::engine::checkpoint::StoredTensor;
use crate::event::Progress;
use crate::gguf::{GgmlType, GgufError, GgufFile, GgufTensor, MetaValue};
use crate::inference::InferenceError;
use crate::units::DType;
use labpipe_kernels::weight::SharedBytes;
use std::collections::BTreeSet;
use std::path::Path;

/// A GGUF file that holds a model.
#[derive(Debug)]
pub struct GgufCheckpoint {
    pub(super) file: GgufFile,
    pub(super) architecture: &'static Architecture,
    n_heads: usize,
    n_kv_heads: usize,
    /// GGUF's names of the modules that have a bias in some block.
    pub(super) biased_modules: BTreeSet<String>,
}

impl GgufCheckpoint {
    /// Gives back the resident pages of the file.
    pub fn drop_pages(&self) {
        self.file.drop_pages();
    }
}

impl From<GgufError> for InferenceError {
    fn from(error: GgufError) -> InferenceError {
        match error {
            GgufError::File { path, reason } => InferenceError::File { path, reason },
            GgufError::Metadata { path, key, reason } => {
                InferenceError::File { path, reason: format!("metadata {key}: {reason}") }
            }
            GgufError::Tensor { path, tensor, reason } => {
                InferenceError::File { path, reason: format!("tensor {tensor}: {reason}") }
            }
            other => InferenceError::Unsupported(other.to_string()),
        }
    }
}

impl GgufCheckpoint {
    /// Maps the file and checks its header.
    ///
    /// # Errors
    /// `File` where the file is damaged, in parts or no model, `UnknownArchitecture`.
    pub fn open(path: &Path) -> Result<GgufCheckpoint, InferenceError> {
        let file = GgufFile::open(path)?;
        if let Some(kind) = file.text("general.type").filter(|kind| *kind != "model") {
            let reason = format!("the file holds a part of another kind, {kind:?}, and no model");
            return Err(file.metadata_error("general.type", reason).into());
        }
        let found = file.text("general.architecture").unwrap_or_default();
        let architecture = Architecture::named(found).ok_or_else(|| {
            let known = Architecture::known_names();
            InferenceError::UnknownArchitecture { path: path.to_owned(), found: found.to_owned(), known }
        })?;
        if file.get("split.count").and_then(MetaValue::as_u64).is_some_and(|n| n > 1) {
            let reason = "it is one part of several; merge them first (llama-gguf-split --merge)";
            return Err(file.metadata_error("split.count", reason).into());
        }
        let module = |name: &str| {
            let (_, module) = name.strip_prefix("blk.")?.strip_suffix(".bias")?.split_once('.')?;
            Some(module.to_owned())
        };
        let biased_modules = file.tensors().filter_map(|(name, _)| module(name)).collect();
        let mut checkpoint = GgufCheckpoint { file, architecture, n_heads: 1, n_kv_heads: 1, biased_modules };
        checkpoint.n_heads = checkpoint.whole("attention.head_count")?.unwrap_or(1);
        checkpoint.n_kv_heads = checkpoint.whole("attention.head_count_kv")?.unwrap_or(checkpoint.n_heads);
        Ok(checkpoint)
    }

    pub(super) fn tensor_error(&self, name: &str, expected: String, found: String) -> InferenceError {
        InferenceError::Tensor { path: self.file.path().to_owned(), tensor: name.to_owned(), expected, found }
    }

    /// Returns true where no tensor is block-quantized, so that none has to be decoded.
    pub fn is_mapped(&self) -> bool {
        self.file.tensors().all(|(_, tensor)| tensor.ty.dtype.is_some())
    }

    /// Returns the element type that a tensor is handed out in.
    pub fn dtype_of(&self, name: &str) -> Option<DType> {
        let tensor = self.file.tensor(&self.architecture.tensor_name(name)?)?;
        Some(tensor.ty.dtype.unwrap_or(DType::F32))
    }

    /// Finds the tensor under Hugging Face's name; `None` for a bias that the file leaves out in this layer and has in another.
    ///
    /// # Errors
    /// `Tensor` where it is missing.
    fn find(&self, name: &str) -> Result<Option<&GgufTensor>, InferenceError> {
        let found = self.architecture.tensor_name(name);
        if let Some(tensor) = found.as_ref().and_then(|found| self.file.tensor(found)) {
            return Ok(Some(tensor));
        }
        let module =
            found.as_ref().and_then(|found| found.strip_prefix("blk.")?.strip_suffix(".bias")?.split_once('.'));
        if module.is_some_and(|(_, module)| self.biased_modules.contains(module)) {
            return Ok(None);
        }
        let found = found.map_or("no name for it".to_owned(), |found| format!("no tensor {found}"));
        Err(self.tensor_error(name, "a tensor".to_owned(), found))
    }

    /// Checks that the tensor under Hugging Face's name has that shape and can be read.
    ///
    /// # Errors
    /// `Tensor` otherwise.
    pub fn check(&self, name: &str, shape: &[usize]) -> Result<(), InferenceError> {
        match self.find(name)? {
            Some(tensor) => self.check_shape(name, tensor, shape),
            None => Ok(()),
        }
    }

    fn check_shape(&self, name: &str, tensor: &GgufTensor, shape: &[usize]) -> Result<(), InferenceError> {
        if tensor.shape != shape {
            return Err(self.tensor_error(name, format!("shape {shape:?}"), format!("shape {:?}", tensor.shape)));
        }
        if !tensor.ty.is_readable() {
            let readable = GgmlType::readable_names();
            return Err(self.tensor_error(name, format!("one of the types {readable}"), tensor.ty.name.to_owned()));
        }
        Ok(())
    }

    /// Returns a tensor under Hugging Face's name, rows in Hugging Face's order; zeros for a bias that only other layers have.
    ///
    /// # Errors
    /// `Tensor` where it is missing, shaped otherwise or of a type that can't be read.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<StoredTensor, InferenceError> {
        let Some(tensor) = self.find(name)? else {
            let bytes = SharedBytes::from_values(vec![0.0f32; shape.iter().product()]);
            return Ok(StoredTensor {
                dtype: DType::F32,
                shape: shape.to_vec(),
                bytes,
                path: self.file.path().to_owned(),
            });
        };
        let is = |part: &str| name.contains(part);
        let n_rows = shape[0];
        let per_head = |n_heads: usize| RowOrder { head_dim: n_rows / n_heads.max(1), n_heads };
        let order = match self.architecture.has_interleaved_rope {
            true if is("self_attn.q_proj") => Some(per_head(self.n_heads)),
            true if is("self_attn.k_proj") => Some(per_head(self.n_kv_heads)),
            true if is("self_attn.qkv_proj") => {
                let head_dim = n_rows / (self.n_heads + 2 * self.n_kv_heads).max(1);
                Some(RowOrder { head_dim, n_heads: self.n_heads + self.n_kv_heads })
            }
            _ => None,
        };
        self.stored(name, tensor, shape, order)
    }

    /// Checks that all tensors that can be read hold finite values; places are those of the file's own order of rows.
    ///
    /// # Errors
    /// `NotFinite`; `File` where one could not be read; `Cancelled`.
    pub fn check_values(&self, progress: &dyn Progress) -> Result<(), InferenceError> {
        progress.begin(Some(self.file.tensors().count() as u64), "tensors");
        for (name, tensor) in self.file.tensors() {
            if progress.is_cancelled() {
                return Err(InferenceError::Cancelled);
            }
            let path = self.file.path().to_owned();
            if let Some(dtype) = tensor.ty.dtype {
                let (shape, bytes) = (tensor.shape.clone(), self.file.bytes(tensor));
                StoredTensor { dtype, shape, bytes, path }.check_values(name)?;
            } else if let Some((index, value)) = self.file.first_not_finite(tensor) {
                return Err(InferenceError::NotFinite { path, tensor: name.to_owned(), index, value });
            }
            progress.advance(1);
        }
        Ok(())
    }

    /// Reads a tensor; `order` asks for the rows of each head in the order that rotates halves.
    pub(super) fn stored(
        &self,
        name: &str,
        tensor: &GgufTensor,
        shape: &[usize],
        order: Option<RowOrder>,
    ) -> Result<StoredTensor, InferenceError> {
        self.check_shape(name, tensor, shape)?;
        let n_rows = shape[0];
        if let Some(RowOrder { head_dim, n_heads }) = order
            && (head_dim % 2 != 0 || head_dim == 0 || head_dim * n_heads > n_rows)
        {
            let expected = format!("rows of {n_heads} heads of even size");
            return Err(self.tensor_error(name, expected, format!("{n_rows} rows")));
        }
        let path = self.file.path().to_owned();
        let row_of = |row_idx: usize| order.map_or(row_idx, |order| order.stored_row(row_idx));
        let bytes = match (tensor.ty.dtype, order) {
            (Some(_), None) => self.file.bytes(tensor),
            (Some(_), Some(_)) => reordered(self.file.bytes(tensor).as_slice(), n_rows, &row_of),
            // The values of a bias lie in one row of blocks.
            (None, Some(_)) if shape.len() == 1 => {
                let values = self.file.values(name, tensor, &|row_idx| row_idx)?;
                SharedBytes::from_values((0..n_rows).map(|row_idx| values[row_of(row_idx)]).collect::<Vec<f32>>())
            }
            (None, _) => SharedBytes::from_values(self.file.values(name, tensor, &row_of)?),
        };
        Ok(StoredTensor { dtype: tensor.ty.dtype.unwrap_or(DType::F32), shape: shape.to_vec(), bytes, path })
    }
}

/// The rows of a projection whose first heads rotate neighbouring pairs; further rows (values) are in place.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowOrder {
    head_dim: usize,
    n_heads: usize,
}

impl RowOrder {
    /// Returns the row of the file that is row `row_idx` of a projection that rotates halves: within a head, rows `i` and
    /// `i + head_dim / 2` of the one are `2 i` and `2 i + 1` of the other.
    fn stored_row(self, row_idx: usize) -> usize {
        let (head_idx, within, half) = (row_idx / self.head_dim, row_idx % self.head_dim, self.head_dim / 2);
        match head_idx < self.n_heads {
            true => head_idx * self.head_dim + 2 * (within % half) + within / half,
            false => row_idx,
        }
    }
}

fn reordered(bytes: &[u8], n_rows: usize, row_of: &dyn Fn(usize) -> usize) -> SharedBytes {
    let row_bytes = bytes.len() / n_rows.max(1);
    let rows = (0..n_rows).flat_map(|row_idx| &bytes[row_of(row_idx) * row_bytes..][..row_bytes]);
    SharedBytes::from_values(rows.copied().collect::<Vec<u8>>())
}

/// Returns true where a model's path is that of a GGUF file.
pub fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "gguf")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_head_are_taken_from_pairs_to_halves() {
        let order = RowOrder { head_dim: 8, n_heads: 2 };
        let rows: Vec<usize> = (0..8).map(|row_idx| order.stored_row(row_idx)).collect();
        assert_eq!(rows, [0, 2, 4, 6, 1, 3, 5, 7]);
        assert_eq!(order.stored_row(8 + 5), 8 + 3);
        assert_eq!(order.stored_row(16 + 5), 16 + 5, "rows of values stay in place");
    }
}
