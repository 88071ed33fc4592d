//! Which files outside the cache a stage's parameters name.

use crate::stage::{ParamType, Params, StageDescription};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Files of a model folder that determine what is computed.
fn is_model_file(name: &str) -> bool {
    name.ends_with(".safetensors")
        || name.ends_with(".safetensors.index.json")
        || ["config.json", "generation_config.json", "special_tokens_map.json"].contains(&name)
        || (name.starts_with("tokenizer") && (name.ends_with(".json") || name.ends_with(".model")))
}

/// A file that a parameter names.
pub struct ExternalFile {
    /// As the pipeline file writes it.
    pub written: String,
    pub path: PathBuf,
}

/// A parameter whose path leads nowhere.
pub struct Missing {
    pub param: String,
    pub reason: String,
}

/// Returns every external file.
///
/// # Errors
/// Every parameter whose path leads nowhere.
pub fn external_files(
    description: &StageDescription,
    params: &Params,
    root: &Path,
) -> Result<Vec<ExternalFile>, Vec<Missing>> {
    let (mut files, mut missing) = (Vec::new(), Vec::new());
    for param in description.params {
        let value = params.get(param.name).unwrap_or(&Value::Null);
        let path = match &param.ty {
            ParamType::Model | ParamType::QuantizationConfig => value.as_str(),
            ParamType::TextSource => value["source"].as_str(),
            ParamType::RandomModel => value["config"].as_str(),
            _ => None,
        };
        let Some(written) = path else { continue };
        let path = root.join(written);
        let is_model = param.ty == ParamType::Model;
        match (is_model, if is_model { path.is_dir() } else { path.is_file() }) {
            (true, true) => files.extend(model_files(written, &path)),
            (false, true) => files.push(ExternalFile { written: written.to_owned(), path }),
            (_, false) => {
                let what = if is_model { "no such model folder" } else { "no such file" };
                let reason = format!("{written}: {what} (looked in {})", root.display());
                missing.push(Missing { param: param.name.to_owned(), reason });
            }
        }
    }
    if missing.is_empty() { Ok(files) } else { Err(missing) }
}

fn model_files(written: &str, dir: &Path) -> Vec<ExternalFile> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| is_model_file(name));
    names.sort();
    let written = written.trim_end_matches('/');
    let file = |name: String| ExternalFile { written: format!("{written}/{name}"), path: dir.join(&name) };
    names.into_iter().map(file).collect()
}
