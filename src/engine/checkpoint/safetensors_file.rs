//! A folder of safetensors files: `model.safetensors`, or shards with `model.safetensors.index.json`.

use super::StoredTensor;
use super::bitsandbytes::is_packed;
use crate::event::Progress;
use crate::inference::InferenceError;
use crate::json_file::parse_json;
use crate::units::DType;
use labpipe_kernels::weight::SharedBytes;
use memmap2::Mmap;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Indexes have some hundred bytes a tensor.
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// The tensors of a folder, mapped into memory.
#[derive(Debug)]
pub struct SafetensorsFolder {
    dir: PathBuf,
    tensors: BTreeMap<String, StoredTensor>,
    /// Tensors of a type that no weight has here (integers, f64, f8): name, type and file, for error messages.
    others: BTreeMap<String, String>,
    /// Every tensor as bytes, whatever its type: what packed weights are made of.
    raw: BTreeMap<String, RawTensor>,
    quantization_config: OnceLock<Value>,
    /// Its tensors were part of a larger model and are named as if they weren't.
    is_inner: bool,
}

/// A tensor as bytes.
#[derive(Debug)]
pub struct RawTensor {
    /// As the header names it: `U8`, `I8`, `F32`.
    pub dtype: String,
    pub shape: Vec<usize>,
    pub bytes: SharedBytes,
    pub path: PathBuf,
}

impl RawTensor {
    fn of(view: &TensorView<'_>, bytes: &SharedBytes, path: &Path) -> RawTensor {
        let dtype = format!("{:?}", view.dtype());
        RawTensor { dtype, shape: view.shape().to_vec(), bytes: bytes.clone(), path: path.to_owned() }
    }

    /// Reads the bytes as little-endian f32.
    pub fn floats(&self) -> Vec<f32> {
        self.bytes.as_slice().as_chunks::<4>().0.iter().map(|raw| f32::from_le_bytes(*raw)).collect()
    }
}

impl SafetensorsFolder {
    /// Maps every file of the folder and checks its header against its length.
    ///
    /// # Errors
    /// `File`, naming the file and what is wrong with it.
    pub fn open(dir: &Path) -> Result<SafetensorsFolder, InferenceError> {
        let mut folder = SafetensorsFolder {
            dir: dir.to_owned(),
            tensors: BTreeMap::new(),
            others: BTreeMap::new(),
            raw: BTreeMap::new(),
            quantization_config: OnceLock::new(),
            is_inner: false,
        };
        let index = dir.join(INDEX);
        let single = dir.join(SINGLE);
        if single.is_file() {
            folder.add_file(&single)?;
        } else if index.is_file() {
            let weight_map = read_index(&index)?;
            for shard in weight_map.values().collect::<BTreeSet<_>>() {
                folder.add_file(&dir.join(shard))?;
            }
            if let Some((name, shard)) = weight_map.iter().find(|(name, _)| !folder.names(name)) {
                return Err(fail(&index, format!("it says that {shard} holds {name}, but that file does not")));
            }
        } else {
            let expected = format!("expected {SINGLE}, or {INDEX} and its shards; neither is there");
            return Err(fail(dir, if dir.is_dir() { expected } else { format!("no such folder; {expected}") }));
        }
        folder.rename_inner_model();
        Ok(folder)
    }

    /// Gives the tensors of a text model that is part of a larger one the names that they have alone. transformers 4 writes
    /// `language_model.model.…`, transformers 5 `model.language_model.…`.
    fn rename_inner_model(&mut self) {
        if self.tensors.keys().any(|name| name.starts_with("model.layers.")) {
            return;
        }
        let roots = [("language_model.model.", "model."), ("model.language_model.", "model."), ("language_model.", "")];
        let rename = |name: String| match roots.iter().find_map(|(root, own)| Some((name.strip_prefix(root)?, own))) {
            Some((rest, own)) => format!("{own}{rest}"),
            None => name,
        };
        let tensors = std::mem::take(&mut self.tensors);
        self.tensors = tensors.into_iter().map(|(name, tensor)| (rename(name), tensor)).collect();
        let others = std::mem::take(&mut self.others);
        self.others = others.into_iter().map(|(name, dtype)| (rename(name), dtype)).collect();
        let raw = std::mem::take(&mut self.raw);
        self.raw = raw.into_iter().map(|(name, tensor)| (rename(name), tensor)).collect();
        self.is_inner = true;
    }

    pub fn get(&self, name: &str) -> Option<&StoredTensor> {
        self.tensors.get(name)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns true where the text model was taken out of a larger one, so that names are not those of the files.
    pub fn is_inner(&self) -> bool {
        self.is_inner
    }

    /// Returns the tensors of plain floats, by name.
    pub fn floats(&self) -> impl Iterator<Item = (&String, &StoredTensor)> {
        self.tensors.iter()
    }

    /// Returns a tensor of any type as bytes.
    pub fn raw(&self, name: &str) -> Option<&RawTensor> {
        self.raw.get(name)
    }

    /// Returns what `config.json` says of the weights' quantization; null where it says nothing.
    pub fn quantization_config(&self) -> &Value {
        self.quantization_config.get_or_init(|| {
            let bytes = std::fs::read(self.dir.join("config.json")).unwrap_or_default();
            let config = parse_json(&bytes).unwrap_or_default();
            config["quantization_config"].clone()
        })
    }

    fn names(&self, name: &str) -> bool {
        self.tensors.contains_key(name) || self.others.contains_key(name)
    }

    /// Returns the tensor if it has that shape.
    ///
    /// # Errors
    /// `Tensor` otherwise.
    pub fn checked(&self, name: &str, shape: &[usize]) -> Result<&StoredTensor, InferenceError> {
        let error = |path: &Path, found: String| InferenceError::Tensor {
            path: path.to_owned(),
            tensor: name.to_owned(),
            expected: format!("shape {shape:?}"),
            found,
        };
        match self.tensors.get(name) {
            Some(tensor) if tensor.shape == shape => Ok(tensor),
            Some(tensor) => Err(error(&tensor.path, format!("shape {:?}", tensor.shape))),
            None => {
                let found = self.others.get(name).map_or("no such tensor".to_owned(), |dtype| {
                    format!("element type {dtype}, which is not supported (f32, f16 and bf16 are)")
                });
                Err(error(&self.dir, found))
            }
        }
    }

    /// Checks that all weights and biases hold finite values. Other tensors (buffers that some exporters save) are never used.
    ///
    /// # Errors
    /// `NotFinite`; `File` where one could not be read; `Cancelled`.
    pub fn check_values(&self, progress: &dyn Progress) -> Result<(), InferenceError> {
        progress.begin(Some(self.tensors.len() as u64), "tensors");
        for (name, tensor) in &self.tensors {
            if progress.is_cancelled() {
                return Err(InferenceError::Cancelled);
            }
            // Packed codes may lie in a container of floats.
            let is_used = name.ends_with(".bias") || name.ends_with(".weight") && !is_packed(self, name);
            if is_used {
                tensor.check_values(name)?;
            }
            progress.advance(1);
        }
        Ok(())
    }

    fn add_file(&mut self, path: &Path) -> Result<(), InferenceError> {
        let file = Arc::new(File::open(path).map_err(|error| fail(path, error.to_string()))?);
        // SAFETY: labpipe never writes model files; a file cut short by somebody else while it is mapped raises SIGBUS, as
        // with every program that maps models.
        let map = unsafe { Mmap::map(&*file) }.map_err(|error| fail(path, error.to_string()))?;
        let owner: Arc<Mmap> = Arc::new(map);
        let parsed = SafeTensors::deserialize(&owner).map_err(|error| {
            fail(path, format!("its header does not fit the file ({error}); was the download cut short?"))
        })?;
        let base = owner.as_ptr() as usize;
        for (name, view) in parsed.iter() {
            if name.contains("..") || name.contains(char::is_control) {
                return Err(fail(path, format!("no tensor is named {name:?}; the file is damaged")));
            }
            let first = view.data().as_ptr() as usize - base;
            let bytes = SharedBytes::mapped(owner.clone(), Arc::clone(&file), first..first + view.data().len());
            self.raw.insert(name.to_owned(), RawTensor::of(&view, &bytes, path));
            let dtype = match view.dtype() {
                Dtype::F32 => DType::F32,
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::Bf16,
                other => {
                    self.others.insert(name.to_owned(), format!("{other:?}"));
                    continue;
                }
            };
            let tensor = StoredTensor { dtype, shape: view.shape().to_vec(), bytes, path: path.to_owned() };
            if self.tensors.insert(name.to_owned(), tensor).is_some() {
                return Err(fail(path, format!("tensor {name} is in more than one shard")));
            }
        }
        Ok(())
    }
}

fn fail(path: &Path, reason: String) -> InferenceError {
    InferenceError::File { path: path.to_owned(), reason }
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>, InferenceError> {
    let n_bytes = std::fs::metadata(path).map_err(|error| fail(path, error.to_string()))?.len();
    if n_bytes > MAX_INDEX_BYTES {
        return Err(fail(path, format!("{n_bytes} bytes are no index")));
    }
    let bytes = std::fs::read(path).map_err(|error| fail(path, error.to_string()))?;
    let index = parse_json(&bytes).map_err(|error| fail(path, error))?;
    let map = index.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| fail(path, "weight_map is missing".to_owned()))?;
    map.iter()
        .map(|(name, file)| {
            let file = file.as_str().unwrap_or_default();
            let is_plain = !file.is_empty() && !file.contains(['/', '\\']) && file != "..";
            if is_plain {
                Ok((name.clone(), file.to_owned()))
            } else {
                Err(fail(path, format!("{name}: expected the name of a file in the same folder, found {file:?}")))
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::tensor::serialize_to_file;

    fn write(path: &Path, names: &[&str]) {
        let data: Vec<u8> = [1.0f32, 2.0, 3.0, 4.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let views: Vec<(&str, TensorView<'_>)> =
            names.iter().map(|name| (*name, TensorView::new(Dtype::F32, vec![2, 2], &data).expect("a view"))).collect();
        serialize_to_file(views, None, path).expect("a file");
    }

    #[test]
    fn shards_are_found_through_the_index() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        write(&dir.path().join("a.safetensors"), &["x"]);
        write(&dir.path().join("b.safetensors"), &["y"]);
        let index = r#"{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}"#;
        std::fs::write(dir.path().join(INDEX), index).expect("an index");
        let folder = SafetensorsFolder::open(dir.path()).expect("a folder");
        assert!(folder.checked("x", &[2, 2]).is_ok() && folder.checked("y", &[2, 2]).is_ok());
        let error = folder.checked("x", &[4, 1]).expect_err("a wrong shape").to_string();
        assert!(error.contains("[4, 1]") && error.contains("[2, 2]") && error.contains("a.safetensors"), "{error}");
    }

    #[test]
    fn a_text_model_inside_another_bears_the_names_that_it_has_alone() {
        for root in ["language_model.model.", "model.language_model."] {
            let dir = tempfile::tempdir().expect("a temporary folder");
            let names = [format!("{root}layers.0.x"), format!("{root}norm"), "vision_tower.y".to_owned()];
            write(&dir.path().join(SINGLE), &names.each_ref().map(String::as_str));
            let folder = SafetensorsFolder::open(dir.path()).expect("a folder");
            for name in ["model.layers.0.x", "model.norm", "vision_tower.y"] {
                assert!(folder.get(name).is_some(), "{root}: {name}");
            }
        }
    }

    #[test]
    fn an_index_that_points_outside_its_folder_is_refused() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(dir.path().join(INDEX), r#"{"weight_map": {"x": "../a.safetensors"}}"#).expect("an index");
        let error = SafetensorsFolder::open(dir.path()).expect_err("an error").to_string();
        assert!(error.contains("same folder"), "{error}");
    }

    #[test]
    fn truncated_files_and_lying_headers_end_in_an_error_that_names_the_file() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join(SINGLE);
        write(&path, &["x"]);
        let whole = std::fs::read(&path).expect("the file");
        let mut lying = whole.clone();
        lying[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        let text = String::from_utf8_lossy(&whole).replace("[2,2]", "[2,9]");
        for damaged in [&whole[..whole.len() - 3], &whole[..5], &[], lying.as_slice(), text.as_bytes()] {
            std::fs::write(&path, damaged).expect("a damaged file");
            let error = SafetensorsFolder::open(dir.path()).expect_err("an error").to_string();
            assert!(error.contains(SINGLE), "{error}");
        }
    }
}
