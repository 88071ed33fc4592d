//! A pipeline as it was read: checked stage by stage, matrix expanded, variables substituted.

use crate::inference::ExecutionChoice;
use crate::stage::Params;
use std::collections::BTreeMap;

/// What the command line adds to a pipeline file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ParseOptions {
    /// `--set name=value`, the value as it was given; the parameter that takes the variable decides its type. Overrides `vars`.
    pub set: Vec<(String, String)>,
    /// `--matrix key=a,b`: keeps only those values.
    pub matrix: Vec<(String, Vec<String>)>,
    /// Environment for `${env:NAME}`.
    pub env: BTreeMap<String, String>,
    /// `--device`, over the file's `device:`.
    pub device: Option<String>,
    /// `--execution`, over the file's `execution:`.
    pub execution: Option<ExecutionChoice>,
    /// `--memory-limit` in bytes, over the file's `memory_limit:`.
    pub memory_limit: Option<u64>,
}

/// A pipeline, ready to be planned.
#[derive(Debug, Clone, PartialEq)]
pub struct Pipeline {
    pub name: String,
    /// Where the text came from; shown in errors.
    pub origin: String,
    /// `auto`, `cpu`, `cuda`, `cuda:1`, `wgpu`.
    pub device: String,
    /// Which path models take through the device.
    pub execution: ExecutionChoice,
    /// Most bytes of memory that a model and all it needs may take; null without a limit.
    pub memory_limit: Option<u64>,
    /// In file order; a matrix stage stands once per cell, cells in expansion order.
    pub stages: Vec<PipelineStage>,
    /// The cells in expansion order; empty without a matrix.
    pub cells: Vec<Cell>,
}

/// One cell of the matrix: a value for each variable.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Cell {
    /// Variable and the value as text, in the matrix's order.
    pub values: Vec<(String, String)>,
}

impl Cell {
    /// Returns `config=int8,seed=1`.
    pub fn label(&self) -> String {
        let parts: Vec<String> = self.values.iter().map(|(name, value)| format!("{name}={value}")).collect();
        parts.join(",")
    }
}

/// One stage of a pipeline (one cell's copy of it, where it depends on the matrix).
#[derive(Debug, Clone, PartialEq)]
pub struct PipelineStage {
    /// `nf4`, or `nf4[config=int8]`.
    pub address: String,
    /// The name in the file.
    pub name: String,
    pub kind: String,
    /// The cell this copy belongs to, cut down to the variables it depends on; null if it depends on none.
    pub cell: Option<Cell>,
    /// Canonical: every parameter of the kind, defaults filled in; stage references are addresses.
    pub params: Params,
    /// Addresses of inputs by parameter name.
    pub inputs: BTreeMap<String, Vec<String>>,
    /// Parameters (by name) whose inputs gather over the matrix: a failed one does not stop this stage.
    pub gathers: Vec<String>,
    /// Addresses from `after:`.
    pub after: Vec<String>,
    /// Where it stands in the file, for messages: line, counted from 1.
    pub line: usize,
}

/// One problem in a pipeline file.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Diagnostic {
    /// Counted from 1; null where the problem has no place (`--set`).
    pub line: Option<usize>,
    pub column: Option<usize>,
    /// Lowercase, says what was expected and what was found.
    pub message: String,
    /// `did you mean "block_size"?`
    pub hint: Option<String>,
}

/// Every problem found in a pipeline file. Its Display shows each with `file:line:column`, snippet, caret and hint.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{}", self.render())]
pub struct PipelineError {
    pub origin: String,
    /// The whole text, for snippets.
    pub text: String,
    pub diagnostics: Vec<Diagnostic>,
}

/// Longest name of a pipeline, a stage or a variable, in bytes.
pub const MAX_NAME: usize = 64;

/// Returns true for a word that is safe as a folder's name and in addresses.
pub fn is_word(text: &str) -> bool {
    let mut chars = text.chars();
    chars.next().is_some_and(|first| first.is_ascii_alphanumeric())
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
        && text.len() <= MAX_NAME
}

/// A value of a matrix variable may be any scalar; this is how it is named in addresses and on the command line:
/// a path's file stem where it looks like a path (`experiments/nf4.yaml` -> `nf4`), else its text.
pub fn matrix_value_name(text: &str) -> String {
    let file_name = text.rsplit('/').next().unwrap_or(text);
    match file_name.rsplit_once('.') {
        Some((stem, extension)) if !stem.is_empty() && extension.chars().all(|c| c.is_ascii_alphabetic()) => {
            stem.to_owned()
        }
        _ => file_name.to_owned(),
    }
}
