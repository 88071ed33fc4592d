//! Which files outside the cache a stage's parameters name.

use crate::dataset;
use crate::hub::{HubReference, HubSettings, ModelLocation, dataset_reference, is_model_file, locate};
use crate::pipeline::Pipeline;
use crate::stage::{Catalogue, ParamType, Params, StageDescription};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A file that a parameter names.
pub struct ExternalFile {
    /// As the pipeline file writes it.
    pub written: String,
    /// None for something on the hub that is not in the cache on disk yet.
    pub path: Option<PathBuf>,
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
        let written = match &param.ty {
            ParamType::Model | ParamType::QuantizationConfig => value.as_str(),
            ParamType::TextSource => {
                for written in text_sources(value) {
                    let path = dataset::locate(written, root).map_err(|error| missing(error.to_string()))?;
                    files.push(ExternalFile { written: written.to_owned(), path });
                }
                continue;
            }
            ParamType::RandomModel => value["config"].as_str(),
            _ => None,
        };
        let Some(written) = written else { continue };
        if let Some(reference) = hub_reference(&param.ty, written, root).map_err(missing)? {
            files.extend(hub_files(&reference, locate(&reference, &HubSettings::from_env())));
            continue;
        }
        let path = root.join(written);
        let nowhere = |what: &str| missing(format!("{written}: {what} (looked in {})", root.display()));
        let is_gguf = path.is_file() && path.extension().is_some_and(|extension| extension == "gguf");
        if param.ty == ParamType::Model && !is_gguf {
            if !path.is_dir() {
                return Err(nowhere("no such model folder or GGUF file"));
            }
            files.extend(model_files(written, &path));
        } else if path.is_file() {
            files.push(ExternalFile { written: written.to_owned(), path: Some(path) });
        } else {
            return Err(nowhere("no such file"));
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

/// Returns what on the hub a parameter names: a model by its id, a text only where it begins with `hf://`.
///
/// # Errors
/// What is wrong with a text that begins with `hf://`.
pub fn hub_reference(ty: &ParamType, written: &str, root: &Path) -> Result<Option<HubReference>, String> {
    match ty {
        ParamType::Model => match ModelLocation::parse(written, root) {
            Ok(ModelLocation::Hub(reference)) => Ok(Some(reference)),
            Ok(ModelLocation::Path(_)) => Ok(None),
            Err(error) => Err(error.to_string()),
        },
        ParamType::TextSource if written.starts_with("hf://") => {
            dataset_reference(written).map(Some).map_err(|error| error.to_string())
        }
        _ => Ok(None),
    }
}

fn hub_files(reference: &HubReference, found: Option<PathBuf>) -> Vec<ExternalFile> {
    let written = reference.to_string();
    match found {
        Some(dir) if dir.is_dir() => model_files(&written, &dir),
        path => vec![ExternalFile { written, path }],
    }
}

fn model_files(written: &str, dir: &Path) -> Vec<ExternalFile> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| is_model_file(name));
    names.sort();
    let written = written.trim_end_matches('/');
    let file = |name: String| ExternalFile { written: format!("{written}/{name}"), path: Some(dir.join(&name)) };
    names.into_iter().map(file).collect()
}

/// Returns everything that a pipeline names on the hub, each once.
pub fn hub_references(pipeline: &Pipeline, catalogue: &Catalogue, root: &Path) -> Vec<HubReference> {
    let mut found: Vec<HubReference> = Vec::new();
    for stage in &pipeline.stages {
        let Some(kind) = catalogue.get(&stage.kind) else { continue };
        for param in kind.description().params {
            let mut texts = Vec::new();
            texts_of(stage.params.get(param.name).unwrap_or(&Value::Null), &mut texts);
            // What is wrong with an id is told by the plan, with its stage.
            for reference in texts.into_iter().filter_map(|text| hub_reference(&param.ty, text, root).ok().flatten()) {
                if !found.contains(&reference) {
                    found.push(reference);
                }
            }
        }
    }
    found
}

fn texts_of<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
    match value {
        Value::String(text) => found.push(text),
        Value::Array(items) => items.iter().for_each(|item| texts_of(item, found)),
        Value::Object(fields) => fields.values().for_each(|field| texts_of(field, found)),
        _ => {}
    }
}
