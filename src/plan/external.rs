//! What a stage's parameters name outside the cache, and the fields that the content of it has in a key.

use super::build::Facts;
use super::keys::canonical;
use super::types::KeyFields;
use crate::pipeline::Pipeline;
use crate::quantization::{QuantizationConfig, from_value};
use crate::stage::{Catalogue, ParamDesc, ParamType, Params, StageDescription};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// What a parameter can name outside the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SourceKind {
    /// A model folder, a GGUF file, or a hub id of either.
    Model,
    /// A text file, or one of a data set on the hub.
    Text,
    QuantizationConfig,
    /// The `config.json` of a model with random weights.
    ModelConfig,
}

/// Where something lies that a parameter names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    /// The one spelling that all spellings of it have in common: `models/x` for `./models//x/`, `hf://org/name` for `org/name`.
    pub name: String,
    /// In a fixed order.
    pub files: Vec<LocatedFile>,
}

/// One file of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocatedFile {
    /// For messages and `run.json`: `models/x/config.json`.
    pub name: String,
    /// `None` for something on the hub that is not in the cache on disk yet.
    pub path: Option<PathBuf>,
}

/// Something outside the cache that a stage reads, as it was when the stage was planned.
#[derive(Debug, Clone, PartialEq)]
pub struct Source {
    pub param: &'static str,
    pub kind: SourceKind,
    /// As the pipeline file writes it.
    pub written: String,
    pub files: Vec<SourceFile>,
    /// What a quantization config means; `None` where it can't be read, and for everything else.
    pub config: Option<QuantizationConfig>,
}

/// A file with the hash that is in the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    pub name: String,
    pub path: Option<PathBuf>,
    pub hash: String,
    /// The key's field that holds the hash; empty for a readable quantization config, whose meaning is there instead.
    pub field: String,
}

/// What a stage reads, and what of it is in the key.
#[derive(Debug, Default)]
pub struct External {
    pub fields: KeyFields,
    pub sources: Vec<Source>,
    /// The stage's own name for the quantization that it applies.
    pub config_name: Option<String>,
}

/// Why a parameter's files can't be named in a key.
pub enum Unusable {
    /// The path leads nowhere.
    Missing { param: &'static str, reason: String },
    /// What is there can't be read.
    Unreadable { reason: String },
}

/// Hash of what is not on disk yet. No artifact has such a key: `run` downloads before it plans.
const NOT_DOWNLOADED: &str = "not downloaded yet";

/// Returns the fields of a stage's parameters and the files that they name.
///
/// # Errors
/// `Missing` and `Unreadable`, for the first parameter that has such a file.
pub fn external(description: &StageDescription, params: &Params, facts: &dyn Facts) -> Result<External, Unusable> {
    let mut external = External::default();
    for param in description.params {
        let value = params.get(param.name).unwrap_or(&Value::Null);
        match &param.ty {
            ParamType::StageRef(_) | ParamType::StageRefs(_) => {}
            ParamType::QuantizationConfig => external.config(param, value, facts)?,
            ParamType::Globs => external.param(param, &as_set(value)),
            ParamType::Model | ParamType::RandomModel | ParamType::TextSource => {
                external.files(param, value, facts)?;
            }
            _ => external.param(param, value),
        }
    }
    Ok(external)
}

impl External {
    fn param(&mut self, param: &ParamDesc, value: &Value) {
        self.fields.insert(format!("params.{}", param.name), canonical(value));
    }

    /// Adds a model or a text. A model's name is in the key: a recipe opens it again by that. Of a text the content is there, and the
    /// ending that says how to read it.
    fn files(&mut self, param: &ParamDesc, value: &Value, facts: &dyn Facts) -> Result<(), Unusable> {
        let mut meaning = value.clone();
        let mut endings = Vec::new();
        for (idx, (kind, written)) in named(&param.ty, value).into_iter().enumerate() {
            let located = facts.locate(kind, written);
            let located = located.map_err(|reason| Unusable::Missing { param: param.name, reason })?;
            match kind {
                SourceKind::Model => meaning = Value::from(located.name.as_str()),
                SourceKind::ModelConfig => meaning["config"] = Value::from(located.name.as_str()),
                _ => endings.push(Value::from(ending(written))),
            }
            let mut files = Vec::new();
            for file in located.files {
                let field = match kind {
                    SourceKind::Text => format!("files.{}[{idx}]", param.name),
                    _ => format!("files.{}", file.name),
                };
                let hash = hash_of(file.path.as_deref(), facts)?;
                self.fields.insert(field.clone(), hash.clone());
                files.push(SourceFile { name: file.name, path: file.path, hash, field });
            }
            self.sources.push(Source { param: param.name, kind, written: written.to_owned(), files, config: None });
        }
        if !endings.is_empty() {
            meaning["source"] = Value::Array(endings);
        }
        self.param(param, &meaning);
        Ok(())
    }

    /// Adds what a quantization config means, wherever it is written down; a damaged file counts by its bytes, and the stage that reads
    /// it tells what is wrong.
    fn config(&mut self, param: &ParamDesc, value: &Value, facts: &dyn Facts) -> Result<(), Unusable> {
        let Some(written) = value.as_str() else {
            match from_value(value, "inline") {
                Ok(config) => self.meaning(param, &config),
                Err(_) => self.param(param, value),
            }
            return Ok(());
        };
        let kind = SourceKind::QuantizationConfig;
        let located = facts.locate(kind, written);
        let located = located.map_err(|reason| Unusable::Missing { param: param.name, reason })?;
        let mut source =
            Source { param: param.name, kind, written: written.to_owned(), files: Vec::new(), config: None };
        for file in located.files {
            let hash = hash_of(file.path.as_deref(), facts)?;
            source.config = file.path.as_deref().and_then(|path| facts.quantization_config(path));
            let field = match &source.config {
                Some(config) => {
                    self.meaning(param, config);
                    String::new()
                }
                None => {
                    let field = format!("files.{}", file.name);
                    self.fields.insert(field.clone(), hash.clone());
                    field
                }
            };
            source.files.push(SourceFile { name: file.name, path: file.path, hash, field });
        }
        self.sources.push(source);
        Ok(())
    }

    fn meaning(&mut self, param: &ParamDesc, config: &QuantizationConfig) {
        let canonical_config = config.canonical();
        let fields = [
            ("scheme", json!(canonical_config.scheme)),
            ("compute_dtype", json!(canonical_config.compute_dtype)),
            ("keep", json!(canonical_config.keep)),
            ("overrides", json!(canonical_config.overrides)),
        ];
        for (name, value) in fields {
            self.fields.insert(format!("params.{}.{name}", param.name), canonical(&value));
        }
        self.config_name = Some(config.name.clone());
    }
}

fn hash_of(path: Option<&Path>, facts: &dyn Facts) -> Result<String, Unusable> {
    match path {
        Some(path) => facts.file_hash(path).map_err(|reason| Unusable::Unreadable { reason }),
        None => Ok(NOT_DOWNLOADED.to_owned()),
    }
}

/// Returns a list sorted and each item once: patterns that select do so in any order.
fn as_set(value: &Value) -> Value {
    let Value::Array(items) = value else { return value.clone() };
    let mut items = items.clone();
    items.sort_by_key(Value::to_string);
    items.dedup();
    Value::Array(items)
}

/// Returns a file name's ending in lower case: it decides how a text is read.
fn ending(written: &str) -> String {
    let extension = Path::new(written).extension().map(|extension| extension.to_string_lossy().to_lowercase());
    extension.unwrap_or_default()
}

/// Returns what a parameter's value names outside the cache, quantization configs aside.
fn named<'a>(ty: &ParamType, value: &'a Value) -> Vec<(SourceKind, &'a str)> {
    let one = |kind, value: &'a Value| value.as_str().map(|written| (kind, written)).into_iter().collect();
    match ty {
        ParamType::Model => one(SourceKind::Model, value),
        ParamType::RandomModel => one(SourceKind::ModelConfig, &value["config"]),
        ParamType::TextSource => match &value["source"] {
            Value::Array(sources) => {
                sources.iter().filter_map(Value::as_str).map(|written| (SourceKind::Text, written)).collect()
            }
            written => one(SourceKind::Text, written),
        },
        _ => Vec::new(),
    }
}

/// Returns every model and text that a pipeline names, each once, in the order of its stages.
pub fn named_sources(pipeline: &Pipeline, catalogue: &Catalogue) -> Vec<(SourceKind, String)> {
    let mut found: Vec<(SourceKind, String)> = Vec::new();
    let mut known = std::collections::BTreeSet::new();
    for stage in &pipeline.stages {
        let Some(kind) = catalogue.get(&stage.kind) else { continue };
        for param in kind.description().params {
            for (kind, written) in named(&param.ty, stage.params.get(param.name).unwrap_or(&Value::Null)) {
                if known.insert((kind, written)) {
                    found.push((kind, written.to_owned()));
                }
            }
        }
    }
    found
}

/// Returns a path without what changes nothing of it: `./`, doubled slashes, a slash at its end. `..` stays: behind a link it leads
/// elsewhere than the text says.
pub fn tidy_path(written: &str) -> String {
    let root = if written.starts_with('/') { "/" } else { "" };
    let parts: Vec<&str> = written.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    match (root, parts.is_empty()) {
        ("", true) => ".".to_owned(),
        _ => format!("{root}{}", parts.join("/")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_one_path_become_one() {
        for (written, tidy) in [
            ("models/x", "models/x"),
            ("./models//x/", "models/x"),
            ("models/./x", "models/x"),
            ("/a//b/.", "/a/b"),
            ("../x", "../x"),
            ("a/../b", "a/../b"),
            (".", "."),
            ("./", "."),
            ("/", "/"),
        ] {
            assert_eq!(tidy_path(written), tidy, "{written}");
        }
    }

    #[test]
    fn a_list_of_globs_is_a_set() {
        assert_eq!(as_set(&json!(["b", "a", "b"])), json!(["a", "b"]));
        assert_eq!(as_set(&Value::Null), Value::Null);
        assert_eq!((ending("a/B.Parquet"), ending("a.b/text")), ("parquet".to_owned(), String::new()));
    }
}
