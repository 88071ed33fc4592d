//! The matrix: variables, cells, and what `--matrix` keeps of them.

use super::cell_names::cell_names;
use super::diagnostics::Problems;
use super::node::{Key, Node, NodeValue, Place};
use super::suggest::did_you_mean;
use super::types::{Cell, Pipeline, matrix_value_name};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// More cells than this are taken for a mistake.
const MAX_CELLS: usize = 4096;

/// A cell with its values as they stand in the file.
pub type CellValues = Vec<(String, Node)>;

/// The matrix as the file has it: cells in file order.
#[derive(Debug, Default)]
pub struct Matrix {
    pub variables: Vec<String>,
    pub cells: Vec<CellValues>,
    /// By variable: how each value is named in addresses.
    names: BTreeMap<String, Vec<(Value, String)>>,
}

impl Matrix {
    /// Reads `matrix:` and narrows it.
    pub fn read(node: Option<&Node>, narrow: &[(String, Vec<String>)], problems: &mut Problems) -> Matrix {
        let Some(node) = node else {
            if let Some((key, _)) = narrow.first() {
                let hint = Some("add a matrix: to the pipeline, or leave --matrix out".to_owned());
                problems.add(Place::default(), format!("--matrix {key}: this pipeline has no matrix"), hint);
            }
            return Matrix { cells: vec![Vec::new()], ..Matrix::default() };
        };
        let Some(entries) = node.as_map() else {
            problems.add(
                node.at,
                format!("matrix: expected a mapping of variables to lists, found {}", node.describe()),
                None,
            );
            return Matrix::default();
        };
        let mut axes: Vec<(String, Vec<Node>)> = Vec::new();
        for (key, value) in entries.iter().filter(|(key, _)| key.text != "include" && key.text != "exclude") {
            if !is_variable(&key.text) {
                let hint = Some("it becomes part of a folder's name in the results".to_owned());
                let message = format!(
                    "matrix variable {:?}: expected letters, digits, -, _ and . after a letter, a digit or _ (64 at most)",
                    key.text
                );
                problems.add(key.at, message, hint);
            }
            axes.push((key.text.clone(), axis(key, value, problems)));
        }
        let variables: Vec<String> = axes.iter().map(|(name, _)| name.clone()).collect();
        let n_cells = axes.iter().fold(1usize, |n, (_, values)| n.saturating_mul(values.len()));
        if n_cells > MAX_CELLS {
            problems.add(node.at, format!("matrix: {n_cells} cells; at most {MAX_CELLS} are allowed"), None);
            return Matrix::default();
        }
        let mut cells = product(&axes);
        let excluded = combinations(node.get("exclude"), &variables, false, problems);
        cells.retain(|cell| !excluded.iter().any(|pattern| matches(cell, pattern)));
        cells.extend(combinations(node.get("include"), &variables, true, problems));
        let mut matrix = Matrix { names: value_names(&variables, &cells), variables, cells };
        for (variable, values) in &matrix.names {
            let names: BTreeSet<&String> = values.iter().map(|(_, name)| name).collect();
            if names.len() < values.len() {
                problems.add(node.at, format!("matrix.{variable}: two of its values have the same name"), None);
            }
        }
        matrix.narrow(narrow, problems);
        if matrix.cells.is_empty() && problems.is_empty() {
            problems.add(node.at, "matrix: no cell is left", None);
        }
        matrix
    }

    fn narrow(&mut self, narrow: &[(String, Vec<String>)], problems: &mut Problems) {
        for (key, kept) in narrow {
            let Some(known) = self.names.get(key) else {
                let hint = did_you_mean(key, self.variables.iter().map(String::as_str));
                problems.add(Place::default(), format!("--matrix {key}: the matrix has no such variable"), hint);
                continue;
            };
            let is = |value: &Value, name: &str, wanted: &str| name == wanted || plain(value) == wanted;
            for wanted in kept.iter().filter(|wanted| !known.iter().any(|(value, name)| is(value, name, wanted))) {
                let hint = did_you_mean(wanted, known.iter().map(|(_, name)| name.as_str()));
                problems.add(Place::default(), format!("--matrix {key}={wanted}: no cell has that value"), hint);
            }
            let known = known.clone();
            self.cells.retain(|cell| {
                cell.iter().filter(|(name, _)| name == key).all(|(_, node)| {
                    let value = node.to_json();
                    let name = known.iter().find(|(known, _)| *known == value).map_or("", |(_, name)| name);
                    kept.iter().any(|wanted| is(&value, name, wanted))
                })
            });
        }
    }

    /// Sets a variable to one value in every cell (`--set` on a matrix variable).
    pub fn fix(&mut self, variable: &str, node: &Node) {
        for (_, value) in self.cells.iter_mut().flatten().filter(|(name, _)| name == variable) {
            *value = node.clone();
        }
        let mut seen = Vec::new();
        self.cells.retain(|cell| {
            let values: Vec<Value> = cell.iter().map(|(_, node)| node.to_json()).collect();
            let is_new = !seen.contains(&values);
            seen.push(values);
            is_new
        });
        self.names = value_names(&self.variables, &self.cells);
    }

    /// Returns a cell cut down to some variables, values named as in addresses.
    pub fn project(&self, cell: &CellValues, variables: &BTreeSet<String>) -> Cell {
        let values = cell.iter().filter(|(name, _)| variables.contains(name)).map(|(variable, node)| {
            let value = node.to_json();
            let names = self.names.get(variable).map_or(&[][..], Vec::as_slice);
            let name = names.iter().find(|(known, _)| *known == value).map(|(_, name)| name.clone());
            (variable.clone(), name.unwrap_or_else(|| matrix_value_name(&value)))
        });
        Cell { values: values.collect() }
    }
}

fn is_variable(name: &str) -> bool {
    name.starts_with(|first: char| first.is_ascii_alphanumeric() || first == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        && name.len() <= 64
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn axis(key: &Key, value: &Node, problems: &mut Problems) -> Vec<Node> {
    let Some(items) = value.as_list() else {
        problems.add(
            value.at,
            format!("matrix.{}: expected a list of values, found {}", key.text, value.describe()),
            None,
        );
        return Vec::new();
    };
    if items.is_empty() {
        problems.add(value.at, format!("matrix.{}: the list is empty", key.text), None);
    }
    for item in items.iter().filter(|item| item.scalar_text().is_none()) {
        problems.add(item.at, format!("matrix.{}: expected scalars, found {}", key.text, item.describe()), None);
    }
    items.iter().filter(|item| item.scalar_text().is_some()).cloned().collect()
}

fn product(axes: &[(String, Vec<Node>)]) -> Vec<CellValues> {
    axes.iter().fold(vec![Vec::new()], |cells, (name, values)| {
        let extend = |cell: CellValues| {
            values
                .iter()
                .map(move |value| cell.iter().cloned().chain([(name.clone(), value.clone())]).collect::<CellValues>())
        };
        cells.into_iter().flat_map(extend).collect()
    })
}

/// Reads `include:` (whole cells) or `exclude:` (patterns).
fn combinations(node: Option<&Node>, variables: &[String], whole: bool, problems: &mut Problems) -> Vec<CellValues> {
    let Some(node) = node else { return Vec::new() };
    let Some(items) = node.as_list() else {
        problems.add(node.at, format!("expected a list of mappings, found {}", node.describe()), None);
        return Vec::new();
    };
    let mut found = Vec::new();
    for item in items {
        let Some(entries) = item.as_map() else {
            problems.add(item.at, format!("expected a mapping of matrix variables, found {}", item.describe()), None);
            continue;
        };
        for (key, _) in entries.iter().filter(|(key, _)| !variables.contains(&key.text)) {
            let hint = did_you_mean(&key.text, variables.iter().map(String::as_str));
            problems.add(key.at, format!("{:?} is no matrix variable", key.text), hint);
        }
        let cell: CellValues =
            variables.iter().filter_map(|name| item.get(name).map(|node| (name.clone(), node.clone()))).collect();
        if whole && cell.len() < variables.len() {
            problems.add(item.at, format!("include: a cell needs every variable ({})", variables.join(", ")), None);
        } else {
            found.push(cell);
        }
    }
    found
}

fn matches(cell: &CellValues, pattern: &CellValues) -> bool {
    pattern.iter().all(|(name, wanted)| {
        cell.iter().any(|(variable, value)| variable == name && value.to_json() == wanted.to_json())
    })
}

fn value_names(variables: &[String], cells: &[CellValues]) -> BTreeMap<String, Vec<(Value, String)>> {
    let mut names = BTreeMap::new();
    for variable in variables {
        let mut values: Vec<Value> = Vec::new();
        for (_, node) in cells.iter().flatten().filter(|(name, _)| name == variable) {
            let value = node.to_json();
            if !values.contains(&value) {
                values.push(value);
            }
        }
        let short: Vec<String> = values.iter().map(matrix_value_name).collect();
        let unique = short.iter().collect::<BTreeSet<_>>().len() == short.len();
        let long = |value: &Value| plain(value).replace(['/', '[', ']', ',', '='], "-");
        let named = values.iter().zip(&short).map(|(value, short)| {
            let name = if unique { long(&Value::from(short.as_str())) } else { long(value) };
            (plain(value), name)
        });
        let named = cell_names(&named.collect::<Vec<_>>());
        names.insert(variable.clone(), values.into_iter().zip(named).collect());
    }
    names
}

/// Returns the JSON that a GitHub Actions `strategy.matrix` takes: `{"include": [{"label", "narrow", variables…}]}`, where
/// `narrow` is ready to be passed to `labpipe run` as it is.
pub fn github_matrix(pipeline: &Pipeline) -> Value {
    let include: Vec<Value> = pipeline
        .cells
        .iter()
        .map(|cell| {
            let narrow: Vec<String> =
                cell.values.iter().map(|(name, value)| format!("--matrix {name}={value}")).collect();
            let mut entry = json!({ "label": cell.label(), "narrow": narrow.join(" ") });
            for (name, value) in &cell.values {
                entry[name.as_str()] = Value::from(value.as_str());
            }
            entry
        })
        .collect();
    json!({ "include": include })
}

/// Returns true for values that can't be told apart from nothing.
pub fn is_null(node: &Node) -> bool {
    node.value == NodeValue::Null
}
