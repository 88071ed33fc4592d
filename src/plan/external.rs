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

/// Returns (parameter, path as written, path to open) of every external file.
///
/// # Errors
/// (parameter, reason) where a path leads nowhere.
pub fn external_files(
    description: &StageDescription,
    params: &Params,
    root: &Path,
) -> Result<Vec<(String, String, PathBuf)>, (String, String)> {
    let mut files = Vec::new();
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
        let missing =
            |what: &str| Err((param.name.to_owned(), format!("{written}: {what} (looked in {})", root.display())));
        if param.ty == ParamType::Model {
            if !path.is_dir() {
                return missing("no such model folder");
            }
            files.extend(model_files(param.name, written, &path));
        } else if path.is_file() {
            files.push((param.name.to_owned(), written.to_owned(), path));
        } else {
            return missing("no such file");
        }
    }
    Ok(files)
}

fn model_files(param: &str, written: &str, dir: &Path) -> Vec<(String, String, PathBuf)> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| is_model_file(name));
    names.sort();
    let written = written.trim_end_matches('/');
    names.into_iter().map(|name| (param.to_owned(), format!("{written}/{name}"), dir.join(&name))).collect()
}
