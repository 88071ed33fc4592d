//! A safetensors file that is written tensor by tensor: the header first, so every size is known before any value is.

use super::write_error;
use crate::inference::InferenceError;
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A tensor that will be written.
#[derive(Debug, Clone)]
pub struct Entry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

/// The file, with places for all tensors.
pub struct TensorFile {
    path: PathBuf,
    file: File,
    /// Places of tensors that were not yet written, in bytes from the file's start.
    places: BTreeMap<String, Range<u64>>,
    n_bytes: u64,
}

impl TensorFile {
    /// Makes the file and writes its header. Wide elements come first, so that each tensor is aligned for its type.
    ///
    /// # Errors
    /// `Write`.
    pub fn create(path: &Path, mut entries: Vec<Entry>) -> Result<TensorFile, InferenceError> {
        entries.sort_by(|a, b| b.dtype.bitsize().cmp(&a.dtype.bitsize()).then_with(|| a.name.cmp(&b.name)));
        let mut header = Map::new();
        header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
        let mut at = 0u64;
        let mut places = BTreeMap::new();
        for entry in &entries {
            let n_bytes = (entry.shape.iter().product::<usize>() * entry.dtype.bitsize() / 8) as u64;
            let tensor = json!({
                "dtype": format!("{:?}", entry.dtype), "shape": entry.shape, "data_offsets": [at, at + n_bytes],
            });
            header.insert(entry.name.clone(), tensor);
            places.insert(entry.name.clone(), at..at + n_bytes);
            at += n_bytes;
        }
        let mut text = Value::Object(header).to_string();
        text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
        let data_start = 8 + text.len() as u64;
        for place in places.values_mut() {
            *place = place.start + data_start..place.end + data_start;
        }
        let mut file = File::create(path).map_err(|error| write_error(path, &error))?;
        file.write_all(&(text.len() as u64).to_le_bytes())
            .and_then(|()| file.write_all(text.as_bytes()))
            .map_err(|error| write_error(path, &error))?;
        Ok(TensorFile { path: path.to_owned(), file, places, n_bytes: data_start + at })
    }

    /// Writes a tensor's bytes to its place.
    ///
    /// # Errors
    /// `Write`, also where the bytes don't fill the place or the tensor was not announced.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), InferenceError> {
        let place = self.places.remove(name);
        let Some(place) = place.filter(|place| place.end - place.start == bytes.len() as u64) else {
            return Err(write_error(&self.path, &format!("{} bytes don't fit the place of {name}", bytes.len())));
        };
        self.file
            .seek(SeekFrom::Start(place.start))
            .and_then(|_| self.file.write_all(bytes))
            .map_err(|error| write_error(&self.path, &error))
    }

    /// Returns the file's length once every tensor is there.
    ///
    /// # Errors
    /// `Write` where one is missing.
    pub fn finish(self) -> Result<u64, InferenceError> {
        match self.places.keys().next() {
            None => Ok(self.n_bytes),
            Some(name) => Err(write_error(&self.path, &format!("{name} was never written"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    #[test]
    fn tensors_are_aligned_whatever_their_order_and_all_must_be_written() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("model.safetensors");
        let entry = |name: &str, dtype, n: usize| Entry { name: name.to_owned(), dtype, shape: vec![n] };
        let entries = || {
            vec![
                entry("a", Dtype::U8, 3),
                entry("b", Dtype::F32, 2),
                entry("c", Dtype::F16, 1),
                entry("d", Dtype::I8, 1),
            ]
        };
        let mut file = TensorFile::create(&path, entries()).expect("a file");
        for (name, n) in [("a", 3), ("c", 2), ("d", 1), ("b", 8)] {
            file.write(name, &vec![n as u8; n]).expect("it fits");
        }
        let n_bytes = file.finish().expect("all written");
        let bytes = std::fs::read(&path).expect("the file");
        assert_eq!(bytes.len() as u64, n_bytes);
        let parsed = SafeTensors::deserialize(&bytes).expect("safetensors");
        for (name, n, align) in [("a", 3, 1), ("b", 8, 4), ("c", 2, 2), ("d", 1, 1)] {
            let data = parsed.tensor(name).expect("a tensor").data();
            assert!(data.len() == n && data.iter().all(|byte| usize::from(*byte) == n), "{name}");
            assert_eq!((data.as_ptr() as usize - bytes.as_ptr() as usize) % align, 0, "{name}");
        }
        let mut file = TensorFile::create(&path, entries()).expect("a file");
        assert!(file.write("a", &[0; 4]).is_err() && file.write("x", &[]).is_err());
        assert!(file.finish().is_err());
    }
}
