//! The matrix: variables, cells, and what `--matrix` keeps of them.

use super::cell_names::cell_names;
use super::diagnostics::Problems;
use super::suggest::did_you_mean;
use super::types::{Cell, Pipeline, matrix_value_name};
use crate::yaml::{Key, Node, Place};
use serde_json::{Value, json};
use std::collections::{BTreeSet, HashMap};

/// More cells than this are taken for a mistake; so are more combinations to exclude.
const MAX_CELLS: usize = 4096;
/// Most variables: sets of them are bits of a word.
const MAX_VARIABLES: usize = 64;

/// A cell with its values as they stand in the file, variables in the file's order.
pub type CellValues = Vec<(String, Node)>;

/// A set of the matrix's variables: bit i is the i-th.
pub type VariableSet = u64;

/// The matrix as the file has it: cells in file order.
#[derive(Debug, Default)]
pub struct Matrix {
    pub variables: Vec<String>,
    pub cells: Vec<CellValues>,
    /// By cell and variable: the index of the value among the variable's values.
    ids: Vec<Vec<usize>>,
    /// By variable.
    values: Vec<Vec<NamedValue>>,
}

/// One value of a variable.
#[derive(Debug, Clone)]
struct NamedValue {
    json: Value,
    /// As it is written.
    text: String,
    /// In addresses.
    name: String,
}

impl NamedValue {
    fn is(&self, wanted: &str) -> bool {
        self.name == wanted || self.text == wanted || plain(&self.json) == wanted
    }
}

impl Matrix {
    /// Reads `matrix:` and narrows it.
    pub fn read(node: Option<&Node>, narrow: &[(String, Vec<String>)], problems: &mut Problems) -> Matrix {
        let Some(node) = node else {
            if let Some((key, _)) = narrow.first() {
                let hint = Some("add a matrix: to the pipeline, or leave --matrix out".to_owned());
                problems.add(Place::default(), format!("--matrix {key}: this pipeline has no matrix"), hint);
            }
            return Matrix { cells: vec![Vec::new()], ids: vec![Vec::new()], ..Matrix::default() };
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
        let n_included = node.get("include").and_then(Node::as_list).map_or(0, <[Node]>::len);
        let n_excluded = node.get("exclude").and_then(Node::as_list).map_or(0, <[Node]>::len);
        let n_cells =
            axes.iter().fold(1usize, |n, (_, values)| n.saturating_mul(values.len())).saturating_add(n_included);
        for (n, what, most) in [
            (variables.len(), "variables", MAX_VARIABLES),
            (n_cells, "cells", MAX_CELLS),
            (n_excluded, "excluded combinations", MAX_CELLS),
        ] {
            if n > most {
                problems.add(node.at, format!("matrix: {n} {what}; at most {most} are allowed"), None);
                return Matrix::default();
            }
        }
        let mut cells = product(&axes);
        let excluded = combinations(node.get("exclude"), &variables, false, problems);
        cells.retain(|cell| !excluded.iter().any(|pattern| matches(cell, pattern)));
        cells.extend(combinations(node.get("include"), &variables, true, problems));
        let mut matrix = Matrix { variables, cells, ..Matrix::default() };
        matrix.index();
        for (variable, values) in matrix.variables.iter().zip(&matrix.values) {
            let names: BTreeSet<&String> = values.iter().map(|value| &value.name).collect();
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

    /// Finds the values of each variable, and which of them each cell has.
    fn index(&mut self) {
        let mut known: Vec<HashMap<(String, String), usize>> = vec![HashMap::new(); self.variables.len()];
        self.values = vec![Vec::new(); self.variables.len()];
        self.ids = Vec::with_capacity(self.cells.len());
        for cell in &self.cells {
            let mut ids = Vec::with_capacity(cell.len());
            for (i, (_, node)) in cell.iter().enumerate() {
                let (json, text) = (node.to_json(), node.scalar_text().unwrap_or_default());
                let values = &mut self.values[i];
                let id = *known[i].entry((json.to_string(), text.clone())).or_insert(values.len());
                if id == values.len() {
                    values.push(NamedValue { json, text, name: String::new() });
                }
                ids.push(id);
            }
            self.ids.push(ids);
        }
        self.values.iter_mut().for_each(|values| give_names(values));
    }

    fn narrow(&mut self, narrow: &[(String, Vec<String>)], problems: &mut Problems) {
        for (key, kept) in narrow {
            let Some(variable_idx) = self.variables.iter().position(|variable| variable == key) else {
                let hint = did_you_mean(key, self.variables.iter().map(String::as_str));
                problems.add(Place::default(), format!("--matrix {key}: the matrix has no such variable"), hint);
                continue;
            };
            let values = &self.values[variable_idx];
            let wanted = wanted_values(kept, |text| values.iter().any(|value| value.is(text)));
            for text in wanted.iter().filter(|text| !values.iter().any(|value| value.is(text))) {
                let hint = did_you_mean(text, values.iter().map(|value| value.name.as_str()));
                problems.add(Place::default(), format!("--matrix {key}={text}: no cell has that value"), hint);
            }
            let is_kept: Vec<bool> = values.iter().map(|value| wanted.iter().any(|text| value.is(text))).collect();
            let ids = std::mem::take(&mut self.ids);
            let mut at = ids.iter();
            self.cells.retain(|_| at.next().is_some_and(|ids| is_kept[ids[variable_idx]]));
            self.ids = ids.into_iter().filter(|ids| is_kept[ids[variable_idx]]).collect();
        }
    }

    /// Sets a variable to one value in every cell (`--set` on a matrix variable).
    pub fn fix(&mut self, variable: &str, node: &Node) {
        for (_, value) in self.cells.iter_mut().flatten().filter(|(name, _)| name == variable) {
            *value = node.clone();
        }
        self.index();
        let mut seen = BTreeSet::new();
        let ids = self.ids.clone();
        let mut at = ids.iter();
        self.cells.retain(|_| at.next().is_some_and(|ids| seen.insert(ids)));
        self.index();
    }

    /// Returns the set with that variable alone; empty where the matrix has no such variable.
    pub fn set_of(&self, variable: &str) -> VariableSet {
        self.variables.iter().position(|name| name == variable).map_or(0, |i| 1 << i)
    }

    /// Returns the set of all variables.
    pub fn all(&self) -> VariableSet {
        (0..self.variables.len()).fold(0, |set, i| set | 1 << i)
    }

    /// Returns which values a cell has of some variables: equal for cells that agree in them.
    pub fn ids(&self, cell_idx: usize, set: VariableSet) -> Vec<usize> {
        let ids = self.ids[cell_idx].iter().enumerate();
        ids.filter(|(i, _)| set & 1 << i != 0).map(|(_, id)| *id).collect()
    }

    /// Returns the first cell of each combination of values that some variables have.
    pub fn distinct(&self, set: VariableSet) -> Vec<usize> {
        if set == 0 {
            return (0..self.cells.len().min(1)).collect();
        }
        let mut seen = BTreeSet::new();
        (0..self.cells.len()).filter(|cell_idx| seen.insert(self.ids(*cell_idx, set))).collect()
    }

    /// Returns a cell cut down to some variables, values named as in addresses.
    pub fn project(&self, cell_idx: usize, set: VariableSet) -> Cell {
        let ids = self.ids[cell_idx].iter().enumerate().filter(|(i, _)| set & 1 << i != 0);
        let values = ids.map(|(i, id)| (self.variables[i].clone(), self.values[i][*id].name.clone()));
        Cell { values: values.collect() }
    }
}

/// Puts together again what was split at commas where the whole is a value: the longest that is known, from the left.
fn wanted_values(kept: &[String], is_known: impl Fn(&str) -> bool) -> Vec<String> {
    let mut wanted = Vec::new();
    let mut from = 0;
    while from < kept.len() {
        let joined = |to: usize| kept[from..to].join(",");
        let known = (from + 1..=kept.len()).rev().find(|to| is_known(&joined(*to)) || is_known(joined(*to).trim()));
        let to = known.unwrap_or(from + 1);
        let text = joined(to);
        wanted.push(if is_known(&text) { text } else { text.trim().to_owned() });
        from = to;
    }
    wanted
}

/// Names the values of a variable: by short names where these differ.
fn give_names(values: &mut [NamedValue]) {
    let short: Vec<String> = values.iter().map(|value| matrix_value_name(&value.text)).collect();
    let unique = short.iter().collect::<BTreeSet<_>>().len() == short.len();
    let is_special = |c: char| ['/', '[', ']', ',', '='].contains(&c) || c.is_control();
    let wished = values.iter().zip(short).map(|(value, short)| {
        let name = if unique { short } else { value.text.clone() };
        (value.text.clone(), name.replace(is_special, "-"))
    });
    let names = cell_names(&wished.collect::<Vec<_>>());
    for (value, name) in values.iter_mut().zip(names) {
        value.name = name;
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

/// Returns the JSON that a GitHub Actions `strategy.matrix` takes: `{"include": [{"label", "narrow", variables…}]}`, where
/// `narrow` is ready to be passed to `labpipe run` as it is.
pub fn github_matrix(pipeline: &Pipeline) -> Value {
    let include: Vec<Value> = pipeline
        .cells
        .iter()
        .map(|cell| {
            let narrow: Vec<String> = cell
                .values
                .iter()
                .map(|(name, value)| format!("--matrix {}", quoted(&format!("{name}={value}"))))
                .collect();
            let mut entry = json!({ "label": cell.label(), "narrow": narrow.join(" ") });
            for (name, value) in &cell.values {
                entry[name.as_str()] = Value::from(value.as_str());
            }
            entry
        })
        .collect();
    json!({ "include": include })
}

/// Quotes a word for a shell where it has other characters than names do.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "-_.=+:@%".contains(c);
    if word.chars().all(is_plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, narrow: &[(&str, &str)]) -> (Matrix, Problems) {
        let mut problems = Problems::default();
        let split = |values: &str| values.split(',').map(str::to_owned).collect();
        let narrow: Vec<(String, Vec<String>)> =
            narrow.iter().map(|(name, values)| ((*name).to_owned(), split(values))).collect();
        let node = crate::yaml::parse(text).expect("YAML");
        (Matrix::read(Some(&node), &narrow, &mut problems), problems)
    }

    fn labels(matrix: &Matrix) -> Vec<String> {
        (0..matrix.cells.len()).map(|i| matrix.project(i, matrix.all()).label()).collect()
    }

    #[test]
    fn values_are_named_as_they_are_written() {
        let (matrix, problems) = read("v: [3.10, 3.1, 0x10, a b, experiments/nf4.yaml]", &[]);
        assert!(problems.is_empty());
        assert_eq!(labels(&matrix), ["v=3.10", "v=3.1", "v=0x10", "v=a b", "v=nf4"]);
    }

    #[test]
    fn special_characters_can_be_asked_for_on_the_command_line() {
        let values = "v: ['a,b', 'a', ' lead', 'x=y', '[1].txt', 'it''s #2']";
        for (wanted, label) in [
            ("a,b", "v=a-b"),
            ("a", "v=a"),
            (" lead", "v= lead"),
            ("x=y", "v=x-y"),
            ("[1].txt", "v=-1-"),
            ("it's #2", "v=it's #2"),
        ] {
            let (matrix, problems) = read(values, &[("v", wanted)]);
            assert!(problems.is_empty(), "{wanted}");
            assert_eq!(labels(&matrix), [label]);
        }
        let (matrix, problems) = read(values, &[("v", "a,b, x=y")]);
        assert!(problems.is_empty());
        assert_eq!(labels(&matrix), ["v=a-b", "v=x-y"]);
        assert_eq!(quoted("v=it's #2"), r"'v=it'\''s #2'");
    }

    #[test]
    fn included_cells_count_and_names_stay_inside_the_results() {
        let list = |n: usize| (0..n).map(|i| format!("{{ a: x{i} }}")).collect::<Vec<_>>().join(", ");
        assert!(read(&format!("a: [y]\ninclude: [{}]", list(4095)), &[]).1.is_empty());
        assert!(!read(&format!("a: [y]\ninclude: [{}]", list(4096)), &[]).1.is_empty());
        assert!(!read(&format!("a: [y]\nexclude: [{}]", list(4097)), &[]).1.is_empty());
        assert!(!read("../../x: [1]", &[]).1.is_empty());
        let many: String = (0..65).map(|i| format!("v{i}: [1]\n")).collect();
        assert!(!read(&many, &[]).1.is_empty());
    }
}
