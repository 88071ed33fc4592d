//! Where tensors come from: safetensors files or a GGUF file, memory-mapped, or a seed. It knows names, shapes and element types;
//! a model only where it accounts for what of a folder the model uses.

mod bitsandbytes;
mod convert;
mod folder_files;
mod foreign;
mod gguf_file;
mod random;
mod safetensors_file;
mod tensor_account;
mod tensor_names;
mod tied_head;
mod value_check;

#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub use convert::first_beyond;
pub use convert::{dense_type, first_not_finite, read_first_not_finite, to_dtype, to_f32};
pub use gguf_file::{GgufCheckpoint, is_gguf};
pub use random::random_values;
pub use safetensors_file::SafetensorsFolder;
pub use tensor_account::{EMBEDDING, HEAD, folder_parts};

use crate::engine::spec::ModelSpec;
use crate::event::Progress;
use crate::inference::{InferenceError, StoredQuantization};
use crate::units::DType;
use labpipe_kernels::Packed;
use labpipe_kernels::weight::SharedBytes;
use std::path::{Path, PathBuf};
use tensor_account::used_tensors;

/// A tensor as its file stores it.
#[derive(Debug, Clone)]
pub struct StoredTensor {
    pub dtype: DType,
    pub shape: Vec<usize>,
    /// Row-major, little-endian; may be misaligned for the element type.
    pub bytes: SharedBytes,
    pub path: PathBuf,
}

impl StoredTensor {
    /// Checks that all values are finite. They are read, not mapped: the check alone has no use for a tensor's pages.
    ///
    /// # Errors
    /// `NotFinite`, `File`.
    pub fn check_values(&self, name: &str) -> Result<(), InferenceError> {
        match read_first_not_finite(self.dtype, &self.bytes) {
            Ok(None) => Ok(()),
            Ok(Some((index, value))) => {
                let (path, tensor) = (self.path.clone(), name.to_owned());
                Err(InferenceError::NotFinite { path, tensor, index, value })
            }
            Err(error) => Err(self.unreadable(name, &error)),
        }
    }

    /// Returns the error of a tensor whose bytes could not be read.
    pub fn unreadable(&self, name: &str, error: &std::io::Error) -> InferenceError {
        let reason = match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                format!("it ends within tensor {name}: it was cut short while it was read")
            }
            _ => format!("tensor {name}: {error}"),
        };
        InferenceError::File { path: self.path.clone(), reason }
    }
}

/// A source of tensors.
#[derive(Debug)]
pub enum Checkpoint {
    Folder(SafetensorsFolder),
    Gguf(GgufCheckpoint),
    /// Values drawn from the seed and the tensor's name, stored in `dtype`.
    Random {
        seed: u64,
        dtype: DType,
        config: PathBuf,
    },
}

impl Checkpoint {
    /// Maps a folder's safetensors files and reads their headers; loads nothing.
    ///
    /// # Errors
    /// `File` where files are missing, cut short or their headers lie.
    pub fn open_folder(dir: &Path) -> Result<Checkpoint, InferenceError> {
        Ok(Checkpoint::Folder(SafetensorsFolder::open(dir)?))
    }

    /// Maps a GGUF file and reads its header; loads nothing.
    ///
    /// # Errors
    /// `File` where it is damaged, `UnknownArchitecture`.
    pub fn open_gguf(path: &Path) -> Result<Checkpoint, InferenceError> {
        Ok(Checkpoint::Gguf(GgufCheckpoint::open(path)?))
    }

    /// Gives the spec a head of its own where a folder holds one that differs from the embedding its config ties it to.
    ///
    /// # Errors
    /// `File` where one of the two could not be read.
    pub fn settle_tied_head(&mut self, spec: &mut ModelSpec) -> Result<(), InferenceError> {
        match self {
            Checkpoint::Folder(folder) => tied_head::settle_tied_head(folder, spec),
            _ => Ok(()),
        }
    }

    /// Returns true where tensors in their stored type are read in place: no memory is taken for them.
    pub fn is_mapped(&self) -> bool {
        match self {
            Checkpoint::Folder(_) => true,
            Checkpoint::Gguf(file) => file.is_mapped(),
            Checkpoint::Random { .. } => false,
        }
    }

    /// Gives back the resident pages of the files: what was converted or quantized is not needed as the files have it.
    pub fn drop_pages(&self) {
        match self {
            Checkpoint::Folder(folder) => folder.drop_pages(),
            Checkpoint::Gguf(file) => file.drop_pages(),
            Checkpoint::Random { .. } => {}
        }
    }

    /// Returns true if there is a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        match self {
            Checkpoint::Folder(folder) => folder.dtype_of(name).is_some(),
            Checkpoint::Gguf(file) => file.dtype_of(name).is_some(),
            Checkpoint::Random { .. } => true,
        }
    }

    /// Returns the element type of that tensor as stored.
    pub fn dtype_of(&self, name: &str) -> Option<DType> {
        match self {
            Checkpoint::Folder(folder) => folder.dtype_of(name),
            Checkpoint::Gguf(file) => file.dtype_of(name),
            Checkpoint::Random { dtype, .. } => Some(*dtype),
        }
    }

    /// Checks that a tensor is there with that shape, reading no values.
    ///
    /// # Errors
    /// `Tensor` that names what was expected and what was found.
    pub fn check(&self, name: &str, shape: &[usize]) -> Result<(), InferenceError> {
        match self {
            Checkpoint::Folder(folder) if bitsandbytes::is_packed(folder, name) => {
                bitsandbytes::check(folder, name, shape)
            }
            Checkpoint::Folder(folder) => folder.checked(name, shape).map(|_| ()),
            Checkpoint::Gguf(file) => file.check(name, shape),
            Checkpoint::Random { .. } => Ok(()),
        }
    }

    /// Returns true where a linear's weight is stored packed.
    pub fn is_packed(&self, name: &str) -> bool {
        matches!(self, Checkpoint::Folder(folder) if bitsandbytes::is_packed(folder, name))
    }

    /// Returns a linear's weight that is stored packed; nothing where it is stored as plain floats.
    ///
    /// # Errors
    /// `Tensor` where a part of it is missing or does not fit, `NotFinite` where a statistic is NaN or infinite.
    pub fn packed(&self, name: &str, shape: &[usize; 2]) -> Result<Option<Packed>, InferenceError> {
        match self {
            Checkpoint::Folder(folder) if bitsandbytes::is_packed(folder, name) => {
                bitsandbytes::read(folder, name, shape).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Returns what of these linears is stored packed; nothing where all are plain floats.
    ///
    /// # Errors
    /// `Tensor` as [`Checkpoint::packed`], `Unsupported` where they were packed in a way that labpipe does not know.
    pub fn stored_quantization(
        &self,
        linears: &[(String, [usize; 2])],
    ) -> Result<Option<StoredQuantization>, InferenceError> {
        match self {
            Checkpoint::Folder(folder) => bitsandbytes::stored(folder, linears),
            _ => Ok(None),
        }
    }

    /// Checks that all weights and biases that the model uses hold finite values, in `base` too where it is given; random ones do.
    ///
    /// # Errors
    /// `NotFinite`, `BeyondRange`; `Cancelled`.
    pub fn check_values(
        &self,
        spec: &ModelSpec,
        base: Option<DType>,
        progress: &dyn Progress,
    ) -> Result<(), InferenceError> {
        match self {
            Checkpoint::Folder(folder) => {
                value_check::check_values(folder, &used_tensors(folder, spec), base, progress)
            }
            Checkpoint::Gguf(file) => file.check_values(progress),
            Checkpoint::Random { .. } => Ok(()),
        }
    }

    /// Returns a tensor of the given shape in its stored type; all its values are finite.
    ///
    /// # Errors
    /// `Tensor` where it is missing or shaped otherwise, `NotFinite` where it holds NaN or an infinity.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<StoredTensor, InferenceError> {
        let tensor = self.unread(name, shape)?;
        if let Checkpoint::Random { .. } = self { Ok(tensor) } else { finite(name, tensor) }
    }

    /// Returns a tensor of the given shape in its stored type. Nobody has looked at its values: where it is mapped they may still lie
    /// on the disk.
    ///
    /// # Errors
    /// `Tensor` where it is missing or shaped otherwise.
    pub fn unread(&self, name: &str, shape: &[usize]) -> Result<StoredTensor, InferenceError> {
        match self {
            Checkpoint::Folder(folder) => folder.checked(name, shape),
            Checkpoint::Gguf(file) => file.tensor(name, shape),
            Checkpoint::Random { seed, dtype, config } => {
                let values = random_values(*seed, name, shape.iter().product());
                Ok(StoredTensor {
                    dtype: *dtype,
                    shape: shape.to_vec(),
                    bytes: to_dtype(&values, *dtype),
                    path: config.clone(),
                })
            }
        }
    }
}

fn finite(name: &str, tensor: StoredTensor) -> Result<StoredTensor, InferenceError> {
    match first_not_finite(tensor.dtype, tensor.bytes.as_slice()) {
        None => Ok(tensor),
        Some((index, value)) => {
            Err(InferenceError::NotFinite { path: tensor.path, tensor: name.to_owned(), index, value })
        }
    }
}

/// Returns an error about a file or a folder.
fn fail(path: &Path, reason: String) -> InferenceError {
    InferenceError::File { path: path.to_owned(), reason }
}
