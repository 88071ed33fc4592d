//! A folder of safetensors files: `model.safetensors`, or shards with `model.safetensors.index.json`.

use super::folder_files::{WeightFiles, find_weight_files, named};
use super::foreign::{refuse_declared, refuse_inferred};
use super::tensor_names::canonical_name;
use super::{StoredTensor, fail};
use crate::inference::InferenceError;
use crate::json_file::parse_json;
use crate::units::DType;
use labpipe_kernels::weight::SharedBytes;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The tensors of a folder, mapped into memory.
#[derive(Debug)]
pub struct SafetensorsFolder {
    dir: PathBuf,
    /// Every tensor by its name in the causal language model, whatever its type.
    tensors: BTreeMap<String, FolderTensor>,
    /// config.json; null where it cannot be read, which is another reader's error.
    config: Value,
    /// What a user must hear of the files, a sentence each.
    warnings: Vec<String>,
    /// The files' maps, which tensors are parts of.
    maps: Vec<Arc<Mmap>>,
    /// Its tensors were part of a larger model and are named as if they weren't.
    is_inner: bool,
}

/// A tensor as its file stores it.
#[derive(Debug)]
pub struct FolderTensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: SharedBytes,
    pub path: Arc<Path>,
    /// Its name in the file, where that is another one.
    pub file_name: Option<Box<str>>,
}

impl FolderTensor {
    /// Reads the bytes as little-endian f32.
    pub fn floats(&self) -> Vec<f32> {
        self.bytes.as_slice().as_chunks::<4>().0.iter().map(|raw| f32::from_le_bytes(*raw)).collect()
    }

    /// Returns its element type where weights may have it.
    pub fn float_dtype(&self) -> Option<DType> {
        match self.dtype {
            Dtype::F32 => Some(DType::F32),
            Dtype::F16 => Some(DType::F16),
            Dtype::BF16 => Some(DType::Bf16),
            _ => None,
        }
    }

    fn stored(&self) -> Option<StoredTensor> {
        let dtype = self.float_dtype()?;
        Some(StoredTensor {
            dtype,
            shape: self.shape.clone(),
            bytes: self.bytes.clone(),
            path: self.path.to_path_buf(),
        })
    }
}

impl SafetensorsFolder {
    /// Maps every file of the folder and checks its header against its length. A quantization that labpipe does not read is refused
    /// here, before anything looks at shapes.
    ///
    /// # Errors
    /// `File`, naming the file and what is wrong with it; `ForeignQuantization`.
    pub fn open(dir: &Path) -> Result<SafetensorsFolder, InferenceError> {
        let config = parse_json(&std::fs::read(dir.join("config.json")).unwrap_or_default()).unwrap_or_default();
        refuse_declared(dir, &config)?;
        let WeightFiles { paths, index, warnings } = find_weight_files(dir)?;
        let mut folder = SafetensorsFolder {
            dir: dir.to_owned(),
            tensors: BTreeMap::new(),
            config,
            warnings,
            maps: Vec::new(),
            is_inner: false,
        };
        for path in &paths {
            folder.add_file(path)?;
        }
        if let Some((path, weight_map)) = index {
            folder.compare_with_index(&path, &weight_map)?;
        }
        refuse_inferred(dir, &folder.tensors)?;
        Ok(folder)
    }

    /// Fails where the index names a tensor that no shard holds, and warns of tensors that it does not name. Those are used, as in
    /// transformers.
    fn compare_with_index(&mut self, path: &Path, map: &BTreeMap<String, String>) -> Result<(), InferenceError> {
        if let Some((name, shard)) = map.iter().find(|(name, _)| !self.tensors.contains_key(&canonical_name(name).0)) {
            return Err(fail(path, format!("it says that {shard} holds {name}, but that file does not")));
        }
        let unlisted: Vec<String> = self
            .entries()
            .map(|(name, tensor)| file_name(name, tensor).to_owned())
            .filter(|name| !map.contains_key(name))
            .collect();
        if !unlisted.is_empty() {
            let index = path.file_name().unwrap_or_default().to_string_lossy();
            self.warnings.push(format!(
                "{index} leaves out {} of the tensors that its shards hold ({}); they are read all the same, as in transformers",
                unlisted.len(),
                named(&unlisted)
            ));
        }
        Ok(())
    }

    /// Returns a tensor of plain floats.
    pub fn get(&self, name: &str) -> Option<StoredTensor> {
        self.tensors.get(name)?.stored()
    }

    /// Gives back the resident pages of the files' maps; they are read again when next used.
    pub fn drop_pages(&self) {
        #[cfg(unix)]
        for map in &self.maps {
            // SAFETY: the map is read-only and backed by its file: a dropped page is read from the file again when next used.
            let _ = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        }
    }

    /// Returns the element type of a tensor of plain floats.
    pub fn dtype_of(&self, name: &str) -> Option<DType> {
        self.tensors.get(name)?.float_dtype()
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns true where the text model was taken out of a larger one, so that names are not those of the files.
    pub fn is_inner(&self) -> bool {
        self.is_inner
    }

    /// Returns what a user must hear of the folder's files, a sentence each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Adds a sentence to [`warnings`](Self::warnings).
    pub fn warn(&mut self, text: String) {
        self.warnings.push(text);
    }

    /// Returns every tensor by its name in the causal language model.
    pub fn entries(&self) -> impl Iterator<Item = (&String, &FolderTensor)> {
        self.tensors.iter()
    }

    /// Returns the tensors of plain floats, by name.
    pub fn floats(&self) -> impl Iterator<Item = (&String, StoredTensor)> {
        self.tensors.iter().filter_map(|(name, tensor)| Some((name, tensor.stored()?)))
    }

    /// Returns a tensor of any type as bytes.
    pub fn raw(&self, name: &str) -> Option<&FolderTensor> {
        self.tensors.get(name)
    }

    /// Returns what `config.json` says of the weights' quantization; null where it says nothing.
    pub fn quantization_config(&self) -> &Value {
        match &self.config["quantization_config"] {
            Value::Null => &self.config["text_config"]["quantization_config"],
            section => section,
        }
    }

    /// Returns the tensor if it has that shape.
    ///
    /// # Errors
    /// `Tensor` otherwise.
    pub fn checked(&self, name: &str, shape: &[usize]) -> Result<StoredTensor, InferenceError> {
        let error = |path: &Path, found: String| InferenceError::Tensor {
            path: path.to_owned(),
            tensor: name.to_owned(),
            expected: format!("shape {shape:?}"),
            found,
        };
        let Some(tensor) = self.tensors.get(name) else {
            return Err(error(&self.dir, format!("no such tensor{}", self.similar(name))));
        };
        match tensor.stored() {
            Some(stored) if stored.shape == shape => Ok(stored),
            Some(stored) => Err(error(&tensor.path, format!("shape {:?}", stored.shape))),
            None => {
                let found = format!("element type {:?}, which is not supported (f32, f16 and bf16 are)", tensor.dtype);
                Err(error(&tensor.path, found))
            }
        }
    }

    /// Returns in brackets a name that ends as `name` does, or the first one of the files.
    fn similar(&self, name: &str) -> String {
        let ending = name.strip_prefix("model.").unwrap_or(name);
        let similar = self.tensors.iter().find(|(other, _)| other.ends_with(ending));
        match similar.or_else(|| self.tensors.iter().next()) {
            Some((other, tensor)) => {
                format!(" ({} tensors are there, among them {})", self.tensors.len(), file_name(other, tensor))
            }
            None => " (there are no tensors at all)".to_owned(),
        }
    }

    fn add_file(&mut self, path: &Path) -> Result<(), InferenceError> {
        let mut file = File::open(path).map_err(|error| fail(path, error.to_string()))?;
        refuse_pointer(path, &mut file)?;
        let file = Arc::new(file);
        // SAFETY: labpipe never writes model files; a file cut short by somebody else while it is mapped raises SIGBUS, as
        // with every program that maps models.
        let map = unsafe { Mmap::map(&*file) }.map_err(|error| fail(path, error.to_string()))?;
        let owner: Arc<Mmap> = Arc::new(map);
        self.maps.push(Arc::clone(&owner));
        let parsed = SafeTensors::deserialize(&owner).map_err(|error| {
            fail(path, format!("its header does not fit the file ({error}); was the download cut short?"))
        })?;
        let base = owner.as_ptr() as usize;
        let shared_path: Arc<Path> = Arc::from(path);
        for (name, view) in parsed.iter() {
            if name.contains("..") || name.contains(char::is_control) {
                return Err(fail(path, format!("no tensor is named {name:?}; the file is damaged")));
            }
            let first = view.data().as_ptr() as usize - base;
            let (own, is_inner) = canonical_name(name);
            self.is_inner |= is_inner;
            let tensor = FolderTensor {
                dtype: view.dtype(),
                shape: view.shape().to_vec(),
                bytes: SharedBytes::mapped(owner.clone(), Arc::clone(&file), first..first + view.data().len()),
                path: Arc::clone(&shared_path),
                file_name: (own != name).then(|| Box::from(name)),
            };
            match self.tensors.entry(own) {
                Entry::Vacant(entry) => {
                    entry.insert(tensor);
                }
                Entry::Occupied(entry) => return Err(twice(path, name, entry.key(), entry.get())),
            }
        }
        Ok(())
    }
}

/// Returns a tensor's name in its file.
pub fn file_name<'a>(name: &'a str, tensor: &'a FolderTensor) -> &'a str {
    tensor.file_name.as_deref().unwrap_or(name)
}

/// Returns the error of two tensors that are the same one of the model.
fn twice(path: &Path, name: &str, own: &str, other: &FolderTensor) -> InferenceError {
    let first = file_name(own, other);
    if first == name {
        return fail(path, format!("tensor {name} is in more than one shard"));
    }
    fail(path, format!("tensors {first} and {name} are both {own} of the model; keep one of them"))
}

/// Refuses the text that stands for a file in a Git repository whose large files were not fetched.
fn refuse_pointer(path: &Path, file: &mut File) -> Result<(), InferenceError> {
    const POINTER: &[u8] = b"version https://git-lfs";
    let mut start = Vec::with_capacity(POINTER.len());
    let read = file.take(POINTER.len() as u64).read_to_end(&mut start);
    read.map_err(|error| fail(path, error.to_string()))?;
    if start == POINTER {
        let reason = "it is a Git LFS pointer, not the file itself; run git lfs pull, or download the file";
        return Err(fail(path, reason.to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::folder_files::{INDEX, SINGLE};
    use super::super::value_check::check_values;
    use super::*;
    use crate::event::NullProgress;
    use safetensors::tensor::{TensorView, serialize_to_file};

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

    #[test]
    fn two_names_of_one_tensor_are_both_named() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        write(&dir.path().join(SINGLE), &["layers.0.x", "model.layers.0.x"]);
        let error = SafetensorsFolder::open(dir.path()).expect_err("an error").to_string();
        for part in ["model.layers.0.x of the model", "tensors ", " layers.0.x", SINGLE] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn tensors_that_the_index_leaves_out_are_read_with_a_warning() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        write(&dir.path().join("a.safetensors"), &["x", "y", "layers.0.z"]);
        std::fs::write(dir.path().join(INDEX), r#"{"weight_map": {"x": "a.safetensors"}}"#).expect("an index");
        let folder = SafetensorsFolder::open(dir.path()).expect("a folder");
        assert!(folder.get("y").is_some() && folder.get("model.layers.0.z").is_some());
        let [warning] = folder.warnings() else { panic!("{:?}", folder.warnings()) };
        assert!(warning.contains("leaves out 2 of the tensors") && warning.contains("(layers.0.z, y)"), "{warning}");
    }

    #[test]
    fn a_missing_tensor_is_reported_with_a_name_that_is_there() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        write(&dir.path().join(SINGLE), &["a", "transformer.layers.0.mlp.up_proj.weight"]);
        let folder = SafetensorsFolder::open(dir.path()).expect("a folder");
        let error = folder.checked("model.layers.0.mlp.up_proj.weight", &[2, 2]).expect_err("an error").to_string();
        assert!(error.contains("no such tensor (2 tensors are there, among them transformer.layers.0"), "{error}");
    }

    #[test]
    fn a_git_lfs_pointer_is_named_as_such() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(dir.path().join(SINGLE), "version https://git-lfs.github.com/spec/v1\n").expect("a file");
        let error = SafetensorsFolder::open(dir.path()).expect_err("an error").to_string();
        assert!(error.contains("git lfs pull") && error.contains(SINGLE), "{error}");
    }

    /// Every tensor is looked at a fixed number of times; with a scan per tensor these would take hours.
    #[test]
    fn a_folder_of_many_tensors_opens() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let n = 200_000;
        let entries = (0..n).map(|i| {
            let (first, last) = (4 * i, 4 * i + 4);
            format!(r#""layers.{i}.mlp.up_proj.weight":{{"dtype":"F32","shape":[1],"data_offsets":[{first},{last}]}}"#)
        });
        let header = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.into_bytes());
        bytes.resize(bytes.len() + 4 * n, 0);
        std::fs::write(dir.path().join(SINGLE), bytes).expect("a file");
        let folder = SafetensorsFolder::open(dir.path()).expect("a folder");
        assert_eq!(folder.entries().count(), n);
        let names: Vec<String> = folder.entries().map(|(name, _)| name.clone()).collect();
        check_values(&folder, &names, Some(DType::F16), &NullProgress).expect("finite values");
    }
}
