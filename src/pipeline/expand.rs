//! From stages in the file to stages in the plan: one copy a cell where a stage depends on the matrix, references resolved.

use super::diagnostics::Problems;
use super::matrix::{CellValues, Matrix};
use super::node::{Key, Node, Place};
use super::parse::Variables;
use super::read::{Draft, read_stage};
use super::suggest::did_you_mean;
use super::types::{Cell, PipelineStage};
use super::variables::{Scope, mentioned};
use crate::stage::Catalogue;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// A stage as it stands in the file.
#[derive(Debug, Clone)]
pub struct RawStage {
    pub name: Key,
    pub node: Node,
}

struct Expansion<'a> {
    stages: &'a [RawStage],
    matrix: &'a Matrix,
    /// By stage: its draft in each cell, in the matrix's order.
    drafts: Vec<Vec<Option<Draft>>>,
    /// By stage: the matrix variables it depends on.
    depends: Vec<BTreeSet<String>>,
    index: BTreeMap<&'a str, usize>,
}

/// Expands all stages; problems are noted, and what can't be read is left out.
pub fn expand(
    stages: &[RawStage],
    matrix: &Matrix,
    variables: &Variables,
    catalogue: &Catalogue,
    env: &BTreeMap<String, String>,
    problems: &mut Problems,
) -> Vec<PipelineStage> {
    let variable_needs = variable_needs(variables, matrix);
    let mut drafts = vec![Vec::with_capacity(matrix.cells.len()); stages.len()];
    let mut depends = Vec::with_capacity(stages.len());
    for (raw, drafts) in stages.iter().zip(&mut drafts) {
        let own = needs(&raw.node, &variable_needs, matrix);
        for cell in &matrix.cells {
            let scope = scope(variables, &variable_needs, cell, &own, env, problems);
            let node = scope.substitute(&raw.node, problems);
            drafts.push(read_stage(&raw.name, &node, catalogue, problems));
        }
        depends.push(own);
    }
    let index = stages.iter().enumerate().map(|(i, raw)| (raw.name.text.as_str(), i)).collect();
    let mut expansion = Expansion { stages, matrix, drafts, depends, index };
    expansion.check_references(problems);
    expansion.check_cycles(problems);
    if !problems.is_empty() {
        return Vec::new();
    }
    expansion.spread_dependence();
    expansion.copies()
}

/// By variable: the matrix variables that its value mentions, directly or through earlier variables.
fn variable_needs(variables: &Variables, matrix: &Matrix) -> BTreeMap<String, BTreeSet<String>> {
    let mut needed = BTreeMap::new();
    for (name, node) in variables {
        let own = needs(node, &needed, matrix);
        needed.insert(name.clone(), own);
    }
    needed
}

fn needs(node: &Node, variable_needs: &BTreeMap<String, BTreeSet<String>>, matrix: &Matrix) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    mentioned(node, &mut names);
    let mut needed = BTreeSet::new();
    for name in names {
        if matrix.variables.contains(&name) {
            needed.insert(name);
        } else if let Some(through) = variable_needs.get(&name) {
            needed.extend(through.iter().cloned());
        }
    }
    needed
}

/// Builds the names a stage may use in a cell; variables that need other matrix variables are left out.
fn scope(
    variables: &Variables,
    variable_needs: &BTreeMap<String, BTreeSet<String>>,
    cell: &CellValues,
    needed: &BTreeSet<String>,
    env: &BTreeMap<String, String>,
    problems: &mut Problems,
) -> Scope {
    let values = cell.iter().filter(|(name, _)| needed.contains(name)).cloned().collect();
    let declared = variable_needs.keys().chain(cell.iter().map(|(name, _)| name)).cloned().collect();
    let mut scope = Scope { values, env: env.clone(), declared };
    for (name, node) in variables {
        if variable_needs.get(name).is_none_or(|through| through.is_subset(needed)) {
            let value = scope.substitute(node, problems);
            scope.values.insert(name.clone(), value);
        }
    }
    scope
}

impl Expansion<'_> {
    fn each_draft(&self) -> impl Iterator<Item = (usize, &Draft)> {
        self.drafts.iter().enumerate().flat_map(|(i, drafts)| drafts.iter().flatten().map(move |draft| (i, draft)))
    }

    fn check_references(&self, problems: &mut Problems) {
        for (i, draft) in self.each_draft() {
            let stage = &self.stages[i].name.text;
            let after = draft.after.iter().map(|(name, at)| ("after", None, name, *at));
            let params = draft.refs.iter().flat_map(|reference| {
                reference.targets.iter().map(|(name, at)| (reference.param, Some(reference.kinds), name, *at))
            });
            for (param, kinds, name, at) in after.chain(params) {
                self.check_reference(stage, param, kinds, name, at, problems);
            }
        }
    }

    fn check_reference(
        &self,
        stage: &str,
        param: &str,
        kinds: Option<&'static [&'static str]>,
        name: &str,
        at: Place,
        problems: &mut Problems,
    ) {
        let Some(target) = self.index.get(name) else {
            let hint = did_you_mean(name, self.index.keys().copied().filter(|known| *known != stage));
            problems.add(at, format!("stage {stage:?}: {param} names {name:?}, but there is no such stage"), hint);
            return;
        };
        let kind = self.stages[*target].node.get("kind").and_then(Node::as_text).unwrap_or_default();
        if let Some(kinds) = kinds.filter(|kinds| !kinds.contains(&kind)) {
            let message = format!("stage {stage:?}: {param} names {name:?}, which is of kind {kind}");
            problems.add(at, message, Some(format!("expected a stage of kind {}", kinds.join(" or "))));
        }
    }

    /// Returns the stages that a stage names, in any cell; `gathering` tells whether gathering parameters count.
    fn targets(&self, i: usize, gathering: bool) -> BTreeSet<usize> {
        let drafts = self.drafts[i].iter().flatten();
        drafts
            .flat_map(|draft| {
                let refs = draft.refs.iter().filter(move |reference| gathering || !reference.gathers);
                let named = refs.flat_map(|reference| &reference.targets);
                let after = draft.after.iter().filter(move |_| gathering);
                named.chain(after).filter_map(|(name, _)| self.index.get(name.as_str()).copied())
            })
            .collect()
    }

    fn check_cycles(&self, problems: &mut Problems) {
        let mut done = BTreeSet::new();
        for start in 0..self.stages.len() {
            let mut path = Vec::new();
            if let Some(cycle) = self.find_cycle(start, &mut path, &mut done) {
                let names: Vec<&str> = cycle.iter().map(|i| self.stages[*i].name.text.as_str()).collect();
                let message = format!("stages form a cycle: {}", names.join(" -> "));
                problems.add(
                    self.stages[cycle[0]].name.at,
                    message,
                    Some("a stage can't need its own result".to_owned()),
                );
            }
        }
    }

    fn find_cycle(&self, i: usize, path: &mut Vec<usize>, done: &mut BTreeSet<usize>) -> Option<Vec<usize>> {
        if let Some(first) = path.iter().position(|on_path| *on_path == i) {
            // The path runs from consumer to input; shown the other way round it reads as data flows.
            let mut cycle: Vec<usize> = path[first..].iter().copied().chain([i]).collect();
            cycle.reverse();
            return Some(cycle);
        }
        if !done.insert(i) {
            return None;
        }
        path.push(i);
        let found = self.targets(i, true).into_iter().find_map(|target| self.find_cycle(target, path, done));
        path.pop();
        found
    }

    /// A stage depends on whatever its inputs depend on, except through gathering parameters.
    fn spread_dependence(&mut self) {
        let targets: Vec<BTreeSet<usize>> = (0..self.stages.len()).map(|i| self.targets(i, false)).collect();
        loop {
            let before: usize = self.depends.iter().map(BTreeSet::len).sum();
            for (i, targets) in targets.iter().enumerate() {
                let inherited: BTreeSet<String> =
                    targets.iter().flat_map(|target| self.depends[*target].clone()).collect();
                self.depends[i].extend(inherited);
            }
            if self.depends.iter().map(BTreeSet::len).sum::<usize>() == before {
                return;
            }
        }
    }

    fn copies(&self) -> Vec<PipelineStage> {
        let mut copies = Vec::new();
        for (i, drafts) in self.drafts.iter().enumerate() {
            let mut seen = BTreeSet::new();
            for (cell, draft) in self.matrix.cells.iter().zip(drafts) {
                let own_cell = self.matrix.project(cell, &self.depends[i]);
                if let (Some(draft), true) = (draft, seen.insert(own_cell.clone())) {
                    copies.push(self.copy(i, draft, own_cell));
                }
            }
        }
        copies
    }

    fn copy(&self, i: usize, draft: &Draft, cell: Cell) -> PipelineStage {
        let raw = &self.stages[i];
        let mut params = draft.params.clone();
        let mut inputs = BTreeMap::new();
        for reference in &draft.refs {
            let addresses: Vec<String> =
                reference.targets.iter().flat_map(|(name, _)| self.addresses(name, &cell)).collect();
            let value = if reference.gathers {
                addresses.iter().map(|address| Value::from(address.as_str())).collect()
            } else {
                addresses.first().map_or(Value::Null, |address| Value::from(address.as_str()))
            };
            params.insert(reference.param.to_owned(), value);
            inputs.insert(reference.param.to_owned(), addresses);
        }
        let gathering = draft.refs.iter().filter(|reference| reference.gathers);
        PipelineStage {
            address: address(&raw.name.text, &cell),
            name: raw.name.text.clone(),
            kind: draft.kind.clone(),
            params,
            inputs,
            gathers: gathering.map(|reference| reference.param.to_owned()).collect(),
            after: draft.after.iter().flat_map(|(name, _)| self.addresses(name, &cell)).collect(),
            line: raw.name.at.line,
            cell: (!cell.values.is_empty()).then_some(cell),
        }
    }

    /// Returns the addresses of a stage's copies that agree with a cell where both have a value.
    fn addresses(&self, name: &str, cell: &Cell) -> Vec<String> {
        let Some(&target) = self.index.get(name) else { return Vec::new() };
        let agrees = |other: &Cell| {
            other.values.iter().all(|(name, value)| {
                cell.values.iter().all(|(own_name, own_value)| own_name != name || own_value == value)
            })
        };
        let mut addresses = Vec::new();
        for other in self.matrix.cells.iter().map(|values| self.matrix.project(values, &self.depends[target])) {
            let address = address(name, &other);
            if agrees(&other) && !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        addresses
    }
}

fn address(name: &str, cell: &Cell) -> String {
    if cell.values.is_empty() { name.to_owned() } else { format!("{name}[{}]", cell.label()) }
}
