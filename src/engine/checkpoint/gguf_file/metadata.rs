//! Typed access to the metadata of an architecture: every error names the key.

use super::tensors::GgufCheckpoint;
use crate::gguf::MetaValue;
use crate::inference::InferenceError;

impl GgufCheckpoint {
    /// Returns the whole key: `attention.head_count` becomes `llama.attention.head_count`.
    pub(super) fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture.name)
    }

    /// Returns the value of a key of the architecture.
    pub(super) fn value(&self, name: &str) -> Option<&MetaValue> {
        self.file.get(&self.key(name))
    }

    /// Returns an error that names a key of the architecture.
    pub(super) fn wrong(&self, name: &str, reason: impl Into<String>) -> InferenceError {
        self.file.metadata_error(&self.key(name), reason).into()
    }

    /// Returns a whole number; an array of equal ones, one per layer, counts as one.
    ///
    /// # Errors
    /// `File` where layers differ or it is something else.
    pub(super) fn whole(&self, name: &str) -> Result<Option<usize>, InferenceError> {
        let value = match self.value(name) {
            None => return Ok(None),
            Some(MetaValue::Array(_)) => {
                let values = self.file.numbers(&self.key(name))?.unwrap_or_default();
                match values.split_first() {
                    Some((first, rest)) if rest.iter().all(|value| value == first) => first.clone(),
                    Some(_) => return Err(self.wrong(name, "its layers differ, which is not supported")),
                    None => return Err(self.wrong(name, "the array is empty")),
                }
            }
            Some(value) => value.clone(),
        };
        let whole = value.as_u64().and_then(|value| usize::try_from(value).ok());
        whole.map(Some).ok_or_else(|| self.wrong(name, "expected a whole number"))
    }

    /// Returns a whole number that no file may leave out.
    ///
    /// # Errors
    /// `File`, as [`whole`](Self::whole).
    pub(super) fn required(&self, name: &str) -> Result<usize, InferenceError> {
        self.whole(name)?.ok_or_else(|| self.wrong(name, "it is missing"))
    }

    /// Returns a finite number.
    ///
    /// # Errors
    /// `File` where it is something else.
    pub(super) fn number(&self, name: &str) -> Result<Option<f64>, InferenceError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let number = value.as_f64().filter(|number| number.is_finite());
        number.map(Some).ok_or_else(|| self.wrong(name, "expected a finite number"))
    }

    /// Returns a number above 0.
    ///
    /// # Errors
    /// `File` where it is something else.
    pub(super) fn positive(&self, name: &str) -> Result<Option<f64>, InferenceError> {
        match self.number(name)? {
            Some(value) if value <= 0.0 => Err(self.wrong(name, format!("expected a number above 0, found {value}"))),
            value => Ok(value),
        }
    }

    /// Returns a text.
    ///
    /// # Errors
    /// `File` where it is something else.
    pub(super) fn text(&self, name: &str) -> Result<Option<&str>, InferenceError> {
        match self.value(name) {
            None => Ok(None),
            Some(MetaValue::Text(_)) => Ok(self.file.text(&self.key(name))),
            Some(_) => Err(self.wrong(name, "expected a text")),
        }
    }
}

/// Returns the number that an f32 of the metadata means: 1e-5 where 9.99999974e-6 stands.
pub(super) fn as_written(value: f64) -> f64 {
    (value as f32).to_string().parse().unwrap_or(value)
}
