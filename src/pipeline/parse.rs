//! The entry: text to pipeline, every problem in it reported.

use super::diagnostics::Problems;
use super::expand::{RawStage, expand};
use super::matrix::Matrix;
use super::suggest::did_you_mean;
use super::types::{Cell, MAX_NAME, ParseOptions, Pipeline, PipelineError, is_word};
use crate::inference::ExecutionChoice;
use crate::stage::Catalogue;
use crate::units::parse_size;
use crate::yaml::{self, Key, Node, NodeValue, Place, Untyped};
use std::collections::BTreeMap;

const KEYS: [&str; 8] = ["version", "name", "vars", "device", "execution", "memory_limit", "matrix", "stages"];

/// The name in the results folder that no pipeline can have.
const LATEST: &str = "latest";

/// Variables in file order, with what `--set` made of them.
pub type Variables = Vec<(String, Node)>;

/// Reads a pipeline file. `origin` names it in messages.
///
/// # Errors
/// Every problem found, each with its place, snippet and hint.
pub fn parse(
    text: &str,
    origin: &str,
    catalogue: &Catalogue,
    options: &ParseOptions,
) -> Result<Pipeline, PipelineError> {
    let mut problems = Problems::default();
    let root = match yaml::parse(text) {
        Ok(root) => root,
        Err(error) => {
            problems.add_yaml(error);
            return Err(problems.into_error(origin, text));
        }
    };
    let pipeline = read(&root, origin, catalogue, options, &mut problems);
    match pipeline {
        Some(pipeline) if problems.is_empty() => Ok(pipeline),
        _ => Err(problems.into_error(origin, text)),
    }
}

fn read(
    root: &Node,
    origin: &str,
    catalogue: &Catalogue,
    options: &ParseOptions,
    problems: &mut Problems,
) -> Option<Pipeline> {
    let Some(entries) = root.as_map() else {
        let message = format!("expected a mapping with version, name and stages, found {}", root.describe());
        problems.add(root.at, message, None);
        return None;
    };
    for (key, _) in entries.iter().filter(|(key, _)| !KEYS.contains(&key.text.as_str())) {
        problems.add(key.at, format!("unknown key {:?}", key.text), did_you_mean(&key.text, KEYS));
    }
    match root.get("version") {
        None => problems.add(root.at, "version is missing", Some("begin the file with version: 1".to_owned())),
        Some(version) if version.as_int() != Some(1) => {
            problems.add(version.at, format!("version: expected 1, found {}", version.describe()), None);
        }
        Some(_) => {}
    }
    let name = name(root, problems);
    let device = device(root, options, problems);
    let execution = execution(root, options, problems);
    let memory_limit = memory_limit(root, options, problems);
    let mut matrix = Matrix::read(root.get("matrix"), &options.matrix, problems);
    let variables = variables(root, &options.set, &mut matrix, problems);
    let stages = stages(root, problems);
    if stages.is_empty() {
        return None;
    }
    let expanded = expand(&stages, &matrix, &variables, catalogue, &options.env, problems);
    let cells: Vec<Cell> = if matrix.variables.is_empty() {
        Vec::new()
    } else {
        (0..matrix.cells.len()).map(|cell_idx| matrix.project(cell_idx, matrix.all())).collect()
    };
    let origin = origin.to_owned();
    Some(Pipeline { name, origin, device, execution, memory_limit, stages: expanded, cells })
}

fn name(root: &Node, problems: &mut Problems) -> String {
    let Some(node) = root.get("name") else {
        problems.add(root.at, "name is missing", Some("results go to results/<name>/".to_owned()));
        return String::new();
    };
    let text = node.as_text().unwrap_or_default();
    let hint = match (node.as_text(), node.scalar_text()) {
        (None, Some(written)) if is_word(&written) => {
            format!("YAML reads {written} as no text; put it in quotes: name: \"{written}\"")
        }
        (None, _) if node.is_null() => "a name that is the word null needs quotes: name: \"null\"".to_owned(),
        _ => "it becomes a folder under results/".to_owned(),
    };
    if text.eq_ignore_ascii_case(LATEST) {
        let hint = format!("results/{LATEST} is the link to the newest run; choose another name");
        problems.add(node.at, format!("name: {text:?} is reserved"), Some(hint));
    } else if !is_word(text) {
        let message =
            format!("name: expected letters, digits, - and _ ({MAX_NAME} at most), found {}", node.describe());
        problems.add(node.at, message, Some(hint));
    }
    text.to_owned()
}

fn device(root: &Node, options: &ParseOptions, problems: &mut Problems) -> String {
    let (device, at) = match (&options.device, root.get("device")) {
        (Some(device), _) => (device.clone(), Place::default()),
        (None, Some(node)) => (node.scalar_text().unwrap_or_default(), node.at),
        (None, None) => ("auto".to_owned(), Place::default()),
    };
    let is_index = |index: &str| !index.is_empty() && index.len() < 4 && index.chars().all(|c| c.is_ascii_digit());
    let known = ["auto", "cpu", "cuda", "wgpu"].contains(&device.as_str())
        || device.strip_prefix("cuda:").is_some_and(is_index);
    if !known {
        let hint = did_you_mean(&device, ["auto", "cpu", "cuda", "cuda:0", "wgpu"]);
        problems.add(at, format!("device: unknown device {device:?}"), hint);
    }
    device
}

fn execution(root: &Node, options: &ParseOptions, problems: &mut Problems) -> ExecutionChoice {
    let Some(node) = root.get("execution") else { return options.execution.unwrap_or_default() };
    let written = node.scalar_text().unwrap_or_default();
    let read = written.parse::<ExecutionChoice>();
    if read.is_err() {
        let hint = did_you_mean(&written, ExecutionChoice::ALL.map(ExecutionChoice::name));
        problems.add(node.at, format!("execution: expected auto, burn or fused, found {}", node.describe()), hint);
    }
    options.execution.unwrap_or(read.unwrap_or_default())
}

fn memory_limit(root: &Node, options: &ParseOptions, problems: &mut Problems) -> Option<u64> {
    let Some(node) = root.get("memory_limit").filter(|node| !node.is_null_word()) else {
        return options.memory_limit;
    };
    let limit = node.scalar_text().and_then(|text| parse_size(&text)).filter(|bytes| *bytes > 0);
    if limit.is_none() {
        let message = format!("memory_limit: expected a size, found {}", node.describe());
        problems.add(node.at, message, Some("write it as 7.5GiB, 8GB or in bytes".to_owned()));
    }
    options.memory_limit.or(limit)
}

fn variables(root: &Node, set: &[(String, String)], matrix: &mut Matrix, problems: &mut Problems) -> Variables {
    let mut variables: Variables = match root.get("vars") {
        None => Vec::new(),
        Some(node) => match node.as_map() {
            Some(entries) => entries.iter().map(|(key, value)| (key.text.clone(), value.clone())).collect(),
            None => {
                problems.add(node.at, format!("vars: expected a mapping, found {}", node.describe()), None);
                Vec::new()
            }
        },
    };
    for (name, text) in set {
        let outside = Untyped::new(text, format!("--set {name}"));
        let value = Node::new(NodeValue::Untyped(outside), Place::default());
        if let Some((_, slot)) = variables.iter_mut().find(|(known, _)| known == name) {
            *slot = value;
        } else if matrix.variables.contains(name) {
            matrix.fix(name, &value);
        } else {
            let known =
                variables.iter().map(|(known, _)| known.as_str()).chain(matrix.variables.iter().map(String::as_str));
            let hint = did_you_mean(name, known).or_else(|| Some("declare it under vars:".to_owned()));
            problems.add(Place::default(), format!("--set {name}: the pipeline declares no such variable"), hint);
        }
    }
    variables
}

fn stages(root: &Node, problems: &mut Problems) -> Vec<RawStage> {
    let Some(node) = root.get("stages") else {
        problems.add(root.at, "stages is missing", None);
        return Vec::new();
    };
    let Some(entries) = node.as_map().filter(|entries| !entries.is_empty()) else {
        let message = format!("stages: expected a mapping of names to stages, found {}", node.describe());
        problems.add(node.at, message, None);
        return Vec::new();
    };
    for (key, _) in entries.iter().filter(|(key, _)| !is_word(&key.text)) {
        problems.add(key.at, stage_name_problem(key), Some("it becomes a folder in the results".to_owned()));
    }
    let mut seen = BTreeMap::new();
    for (key, _) in entries {
        // Names that are equal letter by letter are the YAML reader's to report.
        let other = seen.insert(key.text.to_lowercase(), key.text.as_str()).filter(|other| *other != key.text);
        if let Some(other) = other {
            let message = format!("stage names {other:?} and {:?} differ in case only", key.text);
            let hint = "file systems that ignore case would keep both in one folder; rename one".to_owned();
            problems.add(key.at, message, Some(hint));
        }
    }
    entries.iter().map(|(name, node)| RawStage { name: name.clone(), node: node.clone() }).collect()
}

fn stage_name_problem(key: &Key) -> String {
    format!("stage name {:?}: expected a letter or digit, then letters, digits, - and _ ({MAX_NAME} at most)", key.text)
}
