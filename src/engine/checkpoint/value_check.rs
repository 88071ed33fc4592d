//! Checks the values of a folder's tensors before any of them is used: all finite, in the type that they are to be kept in too.

use super::StoredTensor;
use super::bitsandbytes::{check_statistics, is_packed};
use super::convert::read_narrowed;
use super::safetensors_file::SafetensorsFolder;
use crate::event::{Level, Progress};
use crate::inference::InferenceError;
use crate::units::DType;

/// Checks the tensors of those names; a missing one is another check's error. Warns of values that become 0 in `base`.
///
/// # Errors
/// `NotFinite`; `BeyondRange`; `File` where one could not be read; `Cancelled`.
pub fn check_values(
    folder: &SafetensorsFolder,
    used: &[String],
    base: Option<DType>,
    progress: &dyn Progress,
) -> Result<(), InferenceError> {
    progress.begin(Some(used.len() as u64), "tensors");
    let mut zeroed = Zeroed::default();
    for name in used {
        if progress.is_cancelled() {
            return Err(InferenceError::Cancelled);
        }
        if is_packed(folder, name) {
            // Packed codes may lie in a container of floats.
            check_statistics(folder, name)?;
        } else if let Some(tensor) = folder.get(name) {
            zeroed.add(name, check_tensor(name, &tensor, base.unwrap_or(tensor.dtype))?);
        }
        progress.advance(1);
    }
    if let (Some(base), Some(text)) = (base, zeroed.warning()) {
        progress.note(Level::Warning, &format!("dtype {base}: {text}"));
    }
    Ok(())
}

/// Checks that values are finite, and stay so in `base`; returns how many become 0 in it.
fn check_tensor(name: &str, tensor: &StoredTensor, base: DType) -> Result<u64, InferenceError> {
    let StoredTensor { dtype, bytes, path, .. } = tensor;
    let narrowed = read_narrowed(*dtype, base, bytes).map_err(|error| tensor.unreadable(name, &error))?;
    match narrowed.beyond {
        None => Ok(narrowed.n_zeroed),
        Some((index, value)) if value.is_finite() => {
            Err(InferenceError::BeyondRange { tensor: name.to_owned(), dtype: base, index, value })
        }
        Some((index, value)) => {
            Err(InferenceError::NotFinite { path: path.clone(), tensor: name.to_owned(), index, value })
        }
    }
}

/// Counts values that become 0 in a narrower type.
#[derive(Default)]
struct Zeroed {
    n: u64,
    n_tensors: usize,
    /// The tensor with the most of them.
    most: (u64, String),
}

impl Zeroed {
    fn add(&mut self, name: &str, n: u64) {
        if n > self.most.0 {
            self.most = (n, name.to_owned());
        }
        self.n += n;
        self.n_tensors += usize::from(n > 0);
    }

    fn warning(&self) -> Option<String> {
        let (n_most, name) = &self.most;
        let (n, n_tensors) = (self.n, self.n_tensors);
        (n > 0).then(|| {
            format!("{n} values of {n_tensors} tensors are too small for it and become 0, the most of them, {n_most}, in {name}")
        })
    }
}
