//! Which files outside the cache a stage's parameters name.

use crate::dataset::locate;
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
/// `Missing` where a path leads nowhere.
pub fn external_files(
    description: &StageDescription,
    params: &Params,
    root: &Path,
) -> Result<Vec<ExternalFile>, Missing> {
    let mut files = Vec::new();
    for param in description.params {
        let value = params.get(param.name).unwrap_or(&Value::Null);
        let missing = |reason: String| Missing { param: param.name.to_owned(), reason };
        let not_there =
            |written: &str, what: &str| missing(format!("{written}: {what} (looked in {})", root.display()));
        let path = match &param.ty {
            ParamType::Model | ParamType::QuantizationConfig => value.as_str(),
            ParamType::TextSource => {
                for written in text_sources(value) {
                    let path = locate(written, root).map_err(|error| missing(error.to_string()))?;
                    files.push(ExternalFile { written: written.to_owned(), path });
                }
                continue;
            }
            ParamType::RandomModel => value["config"].as_str(),
            _ => None,
        };
        let Some(written) = path else { continue };
        let path = root.join(written);
        if param.ty == ParamType::Model {
            if !path.is_dir() {
                return Err(not_there(written, "no such model folder"));
            }
            files.extend(model_files(written, &path));
        } else if path.is_file() {
            files.push(ExternalFile { written: written.to_owned(), path });
        } else {
            return Err(not_there(written, "no such file"));
        }
    }
    Ok(files)
}

/// Returns the files of a text: `source` is one or a list of them.
fn text_sources(value: &Value) -> Vec<&str> {
    match &value["source"] {
        Value::Array(sources) => sources.iter().filter_map(Value::as_str).collect(),
        one => one.as_str().into_iter().collect(),
    }
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
