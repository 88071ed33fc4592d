//! Which files of a folder hold a model's weights: those that transformers 5.24 takes. What else lies there is named.

use super::fail;
use crate::inference::InferenceError;
use crate::json_file::parse_json;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

pub const SINGLE: &str = "model.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";
/// An index has some hundred bytes per tensor, and a safetensors header is limited to 100 MB.
const MAX_INDEX_BYTES: u64 = 256 << 20;
/// Names shown in a message.
const MAX_NAMED: usize = 3;

/// The files that a model's weights are read from.
#[derive(Debug)]
pub struct WeightFiles {
    pub paths: Vec<PathBuf>,
    /// The index and the shard of each tensor that it names; `None` for a single file.
    pub index: Option<(PathBuf, BTreeMap<String, String>)>,
    /// A sentence for each kind of file that lies beside them and is not read.
    pub warnings: Vec<String>,
}

/// Finds `model.safetensors`, or the shards of `model.safetensors.index.json` where that is missing.
///
/// # Errors
/// `File` where neither is there: it names what lies there instead and how to convert it. Also where the index is damaged.
pub fn find_weight_files(dir: &Path) -> Result<WeightFiles, InferenceError> {
    if dir.is_file() {
        return Err(fail(dir, "it is a file; name the folder it lies in, which holds config.json too".to_owned()));
    }
    let names = list(dir)?;
    let has = |name: &str| names.contains(name);
    let (paths, index) = if has(SINGLE) {
        (vec![dir.join(SINGLE)], None)
    } else if has(INDEX) {
        let weight_map = read_index(&dir.join(INDEX))?;
        let shards: BTreeSet<&String> = weight_map.values().collect();
        (shards.into_iter().map(|shard| dir.join(shard)).collect(), Some((dir.join(INDEX), weight_map)))
    } else {
        let expected = format!("expected {SINGLE}, or {INDEX} and its shards; neither is there");
        let found = instead(dir, &names).map_or(String::new(), |found| format!(": {found}"));
        return Err(fail(dir, format!("{expected}{found}")));
    };
    let warnings = left_aside(&names, &paths);
    Ok(WeightFiles { paths, index, warnings })
}

fn list(dir: &Path) -> Result<BTreeSet<String>, InferenceError> {
    let failed = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            fail(dir, format!("no such folder; expected one with config.json, and {SINGLE} or {INDEX}"))
        }
        _ => fail(dir, format!("the folder cannot be listed ({error})")),
    };
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        names.insert(entry.map_err(failed)?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

/// Says what lies in a folder without safetensors under transformers' names, and how a model is made of it.
fn instead(dir: &Path, names: &BTreeSet<String>) -> Option<String> {
    let found = |is: &dyn Fn(&str) -> bool| -> Vec<String> { names.iter().filter(|name| is(name)).cloned().collect() };
    let ends = |suffix: &'static str| move |name: &str| name.ends_with(suffix);
    let starts = |prefix: &'static str, suffix: &'static str| {
        move |name: &str| name.starts_with(prefix) && name.ends_with(suffix)
    };
    if names.contains("adapter_config.json") || names.contains("adapter_model.safetensors") {
        return Some(adapter(dir));
    }
    let save = "convert it with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)";
    let is_variant =
        |name: &str| name.starts_with("model.") && name.ends_with(".safetensors") && name.matches('.').count() == 2;
    type Kind<'a> = (&'a dyn Fn(&str) -> bool, &'a str);
    let kinds: [Kind<'_>; 11] = [
        (&starts("model-0", ".safetensors"), "shards without their index; download model.safetensors.index.json too"),
        (
            &starts("consolidated", ".safetensors"),
            "weights under Mistral's own names; convert them with transformers' convert_mistral_weights_to_hf.py",
        ),
        (&is_variant, "a variant; rename it to model.safetensors to use it"),
        (
            &ends(".safetensors"),
            "not the name that transformers reads; rename it to model.safetensors if it is the model",
        ),
        (&starts("pytorch_model", ".bin"), save),
        (&ends(".gguf"), "a GGUF file; name the file itself, FOLDER/FILE.gguf"),
        (&ends(".pth"), "Meta's own format; convert it with transformers' convert_llama_weights_to_hf.py"),
        (&ends(".npz"), "arrays of MLX or NumPy; take the model that they were made from, in Hugging Face layout"),
        (
            &starts("tf_model", ".h5"),
            "TensorFlow weights; convert them with transformers 4 (from_tf=True, save_pretrained)",
        ),
        (&ends(".msgpack"), "Flax weights; convert them with transformers 4 (from_flax=True, save_pretrained)"),
        (&ends(".onnx"), "an ONNX graph; take the model that it was made from, in Hugging Face layout"),
    ];
    kinds.iter().find_map(|(is, what)| {
        let files = found(is);
        (!files.is_empty()).then(|| format!("it holds {}: {what}", named(&files)))
    })
}

/// Says what an adapter's folder is: changes to another model's weights.
fn adapter(dir: &Path) -> String {
    let bytes = std::fs::read(dir.join("adapter_config.json")).unwrap_or_default();
    let config = parse_json(&bytes).unwrap_or_default();
    let kind = config["peft_type"].as_str().unwrap_or("PEFT");
    let base = config["base_model_name_or_path"].as_str().map_or(String::new(), |base| format!(" for {base}"));
    format!(
        "it holds a {kind} adapter{base} (adapter_config.json), which is no model; merge both with peft: \
         AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW_FOLDER)"
    )
}

/// Says which files that could hold weights are not read. Copies in other formats, which hub repositories hold often, are not named.
fn left_aside(names: &BTreeSet<String>, read: &[PathBuf]) -> Vec<String> {
    let is_read = |name: &str| read.iter().any(|path| path.file_name().is_some_and(|read| read == name));
    let mut warnings = Vec::new();
    let is_single = is_read(SINGLE);
    if is_single && names.contains(INDEX) {
        warnings.push(format!("{SINGLE} is read and {INDEX} is not, as in transformers"));
    }
    let others: Vec<String> = names
        .iter()
        .filter(|name| name.ends_with(".safetensors") && !is_read(name))
        .filter(|name| !name.starts_with("consolidated") && !name.starts_with("adapter_"))
        .cloned()
        .collect();
    if !others.is_empty() {
        let why = if is_single { format!("{SINGLE} is there") } else { format!("{INDEX} does not name them") };
        warnings.push(format!("not read: {}, since {why}, as in transformers", named(&others)));
    }
    if names.contains("adapter_config.json") {
        let how = "merge it (peft: merge_and_unload, save_pretrained) to use it";
        warnings.push(format!("the adapter beside the model (adapter_config.json) is not applied; {how}"));
    }
    warnings
}

/// Lists the first of some names.
pub fn named(names: &[String]) -> String {
    let more = match names.len().saturating_sub(MAX_NAMED) {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    format!("{}{more}", names[..names.len().min(MAX_NAMED)].join(", "))
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

    fn folder(files: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a temporary folder");
        for file in files {
            std::fs::write(dir.path().join(file), "{}").expect("a file");
        }
        dir
    }

    #[test]
    fn a_folder_without_safetensors_says_what_it_holds_and_how_to_convert_it() {
        let cases = [
            (&["pytorch_model.bin", "config.json"][..], "pytorch_model.bin", "save_pretrained"),
            (&["pytorch_model-00001-of-00002.bin"][..], "pytorch_model-00001-of-00002.bin", "save_pretrained"),
            (&["consolidated.safetensors", "params.json"][..], "consolidated.safetensors", "convert_mistral"),
            (&["consolidated.00.pth"][..], "consolidated.00.pth", "convert_llama"),
            (&["model.Q4_K_M.gguf", "other.gguf"][..], "model.Q4_K_M.gguf, other.gguf", "name the file itself"),
            (&["weights.npz"][..], "weights.npz", "MLX"),
            (&["model.fp16.safetensors"][..], "model.fp16.safetensors", "a variant"),
            (&["model-00001-of-00002.safetensors"][..], "model-00001-of-00002.safetensors", "index"),
            (&["output.safetensors"][..], "output.safetensors", "rename"),
            (&["adapter_model.safetensors"][..], "adapter", "merge_and_unload"),
        ];
        for (files, what, how) in cases {
            let error = find_weight_files(folder(files).path()).expect_err("no weights").to_string();
            assert!(error.contains(what) && error.contains(how), "{files:?}: {error}");
        }
        let dir = folder(&[]);
        let config = r#"{"peft_type": "LORA", "base_model_name_or_path": "x/y"}"#;
        std::fs::write(dir.path().join("adapter_config.json"), config).expect("a file");
        let error = find_weight_files(dir.path()).expect_err("no weights").to_string();
        assert!(error.contains("a LORA adapter for x/y (adapter_config.json)"), "{error}");
        let error = find_weight_files(&dir.path().join("none")).expect_err("no folder").to_string();
        assert!(error.contains("no such folder"), "{error}");
    }

    #[test]
    fn the_single_file_is_read_before_shards_and_what_lies_beside_is_named() {
        let beside = ["model.safetensors.index.json", "model-00001-of-00001.safetensors", "model.fp16.safetensors"];
        let dir = folder(&[&[SINGLE, "adapter_config.json", "pytorch_model.bin"][..], &beside[..]].concat());
        let found = find_weight_files(dir.path()).expect("weights");
        assert_eq!(found.paths, [dir.path().join(SINGLE)]);
        let warnings = found.warnings.join("\n");
        for name in beside.iter().chain(&["adapter_config.json"]) {
            assert!(warnings.contains(name), "{name}: {warnings}");
        }
        assert!(!warnings.contains("pytorch_model.bin"), "{warnings}");
    }

    #[test]
    fn shards_that_the_index_does_not_name_are_not_read() {
        let dir = folder(&["model-00001-of-00001.safetensors", "model-00001-of-00002.safetensors"]);
        let index = r#"{"weight_map": {"x": "model-00001-of-00001.safetensors"}}"#;
        std::fs::write(dir.path().join(INDEX), index).expect("an index");
        let found = find_weight_files(dir.path()).expect("weights");
        assert_eq!(found.paths, [dir.path().join("model-00001-of-00001.safetensors")]);
        let expected =
            ["not read: model-00001-of-00002.safetensors, since model.safetensors.index.json does not name them, \
                         as in transformers"];
        assert_eq!(found.warnings, expected);
    }

    #[test]
    fn an_index_that_points_outside_its_folder_is_refused() {
        let dir = folder(&[]);
        std::fs::write(dir.path().join(INDEX), r#"{"weight_map": {"x": "../a.safetensors"}}"#).expect("an index");
        let error = find_weight_files(dir.path()).expect_err("an error").to_string();
        assert!(error.contains("same folder"), "{error}");
    }
}
