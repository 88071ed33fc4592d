//! From stages in the file to stages in the plan: one copy a cell where a stage depends on the matrix, references resolved.

use super::diagnostics::Problems;
use super::graph::order;
use super::matrix::{Matrix, VariableSet};
use super::parse::Variables;
use super::read::{Draft, read_stage};
use super::suggest::did_you_mean;
use super::types::{Cell, PipelineStage};
use super::variables::{Scope, Surroundings, mentioned};
use crate::stage::Catalogue;
use crate::yaml::{Key, Node, Place};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// More copies of stages than this are taken for a mistake.
const MAX_COPIES: usize = 1 << 18;
/// Most stages of a cycle that are named.
const N_NAMED: usize = 20;

/// A stage as it stands in the file.
#[derive(Debug, Clone)]
pub struct RawStage {
    pub name: Key,
    pub node: Node,
}

/// What was read of a stage.
struct Drafts {
    /// One per combination of the values that the stage mentions itself.
    drafts: Vec<Option<Draft>>,
    /// By cell: its draft. Empty where all cells share one.
    of_cell: Vec<usize>,
}

impl Drafts {
    fn of_cell(&self, cell_idx: usize) -> Option<&Draft> {
        let draft_idx = self.of_cell.get(cell_idx).copied().unwrap_or(0);
        self.drafts.get(draft_idx)?.as_ref()
    }
}

struct Expansion<'a> {
    stages: &'a [RawStage],
    matrix: &'a Matrix,
    /// By stage.
    drafts: Vec<Drafts>,
    /// By stage: the matrix variables it depends on.
    depends: Vec<VariableSet>,
    index: HashMap<&'a str, usize>,
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
    let needed = variable_needs(variables, matrix);
    let declared = variables.iter().map(|(name, _)| name).chain(&matrix.variables).cloned().collect();
    let surroundings = Surroundings::new(env, declared);
    // What does not depend on the matrix is substituted once.
    let mut shared = Scope::new(&surroundings);
    for (name, node) in variables.iter().filter(|(name, _)| needed[name] == 0) {
        let value = shared.substitute(node, problems);
        shared.values.insert(name.clone(), value);
    }
    let mut drafts = Vec::with_capacity(stages.len());
    let mut depends = Vec::with_capacity(stages.len());
    for raw in stages {
        let own = needs(&raw.node, &needed, matrix);
        let distinct = matrix.distinct(own);
        let mut read = |cell_idx: &usize| {
            let scope = scope(&shared, variables, &needed, matrix, *cell_idx, own, problems);
            let node = scope.substitute(&raw.node, problems);
            read_stage(&raw.name, &node, catalogue, problems)
        };
        let of_distinct: Vec<Option<Draft>> = distinct.iter().map(&mut read).collect();
        let ids: HashMap<Vec<usize>, usize> =
            distinct.iter().enumerate().map(|(i, cell_idx)| (matrix.ids(*cell_idx, own), i)).collect();
        let of_cell = (0..matrix.cells.len()).filter(|_| own != 0).map(|cell_idx| ids[&matrix.ids(cell_idx, own)]);
        drafts.push(Drafts { drafts: of_distinct, of_cell: of_cell.collect() });
        depends.push(own);
    }
    let index = stages.iter().enumerate().map(|(i, raw)| (raw.name.text.as_str(), i)).collect();
    let mut expansion = Expansion { stages, matrix, drafts, depends, index };
    expansion.check_references(problems);
    let inputs_first = expansion.check_cycles(problems);
    if !problems.is_empty() {
        return Vec::new();
    }
    expansion.spread_dependence(&inputs_first);
    expansion.copies(problems)
}

/// By variable: the matrix variables that its value mentions, directly or through earlier variables.
fn variable_needs(variables: &Variables, matrix: &Matrix) -> HashMap<String, VariableSet> {
    let mut needed = HashMap::new();
    for (name, node) in variables {
        let own = needs(node, &needed, matrix);
        needed.insert(name.clone(), own);
    }
    needed
}

fn needs(node: &Node, variable_needs: &HashMap<String, VariableSet>, matrix: &Matrix) -> VariableSet {
    let mut names = BTreeSet::new();
    mentioned(node, &mut names);
    let of_name = |name: &String| match matrix.set_of(name) {
        0 => variable_needs.get(name).copied().unwrap_or(0),
        own => own,
    };
    names.iter().fold(0, |set, name| set | of_name(name))
}

/// Builds the names a stage may use in a cell; variables that need other matrix variables are left out.
fn scope<'a>(
    shared: &'a Scope<'a>,
    variables: &Variables,
    variable_needs: &HashMap<String, VariableSet>,
    matrix: &Matrix,
    cell_idx: usize,
    own: VariableSet,
    problems: &mut Problems,
) -> Scope<'a> {
    let mut scope = shared.inner();
    if own == 0 {
        return scope;
    }
    let of_cell = matrix.cells[cell_idx].iter().filter(|(name, _)| own & matrix.set_of(name) != 0);
    scope.values = of_cell.cloned().collect();
    for (name, node) in variables {
        let through = variable_needs[name];
        if through != 0 && through & !own == 0 {
            let value = scope.substitute(node, problems);
            scope.values.insert(name.clone(), value);
        }
    }
    scope
}

impl Expansion<'_> {
    fn each_draft(&self) -> impl Iterator<Item = (usize, &Draft)> {
        self.drafts.iter().enumerate().flat_map(|(i, of)| of.drafts.iter().flatten().map(move |draft| (i, draft)))
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
            let known: BTreeSet<&str> = self.index.keys().copied().filter(|known| *known != stage).collect();
            let hint = did_you_mean(name, known);
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
    fn targets(&self, i: usize, gathering: bool) -> Vec<usize> {
        let drafts = self.drafts[i].drafts.iter().flatten();
        let targets: BTreeSet<usize> = drafts
            .flat_map(|draft| {
                let refs = draft.refs.iter().filter(move |reference| gathering || !reference.gathers);
                let named = refs.flat_map(|reference| &reference.targets);
                let after = draft.after.iter().filter(move |_| gathering);
                named.chain(after).filter_map(|(name, _)| self.index.get(name.as_str()).copied())
            })
            .collect();
        targets.into_iter().collect()
    }

    /// Returns an order in which inputs come first.
    fn check_cycles(&self, problems: &mut Problems) -> Vec<usize> {
        let targets: Vec<Vec<usize>> = (0..self.stages.len()).map(|i| self.targets(i, true)).collect();
        let found = order(&targets);
        for cycle in &found.cycles {
            let mut names: Vec<&str> = cycle.iter().take(N_NAMED).map(|i| self.stages[*i].name.text.as_str()).collect();
            if cycle.len() > N_NAMED {
                names.push("...");
            }
            let message = format!("stages form a cycle: {}", names.join(" -> "));
            let hint = Some("a stage can't need its own result".to_owned());
            problems.add(self.stages[cycle[0]].name.at, message, hint);
        }
        found.inputs_first
    }

    /// A stage depends on whatever its inputs depend on, except through gathering parameters.
    fn spread_dependence(&mut self, inputs_first: &[usize]) {
        for i in inputs_first {
            let inherited = self.targets(*i, false).iter().fold(0, |set, target| set | self.depends[*target]);
            self.depends[*i] |= inherited;
        }
    }

    fn copies(&self, problems: &mut Problems) -> Vec<PipelineStage> {
        let n_dependent = self.depends.iter().filter(|set| **set != 0).count();
        let n_copies = n_dependent.saturating_mul(self.matrix.cells.len());
        if n_copies > MAX_COPIES {
            let n_cells = self.matrix.cells.len();
            let message = format!(
                "{n_dependent} stages in each of {n_cells} cells are {n_copies} copies; at most {MAX_COPIES} are allowed"
            );
            problems.add(Place::default(), message, Some("split the matrix, or narrow it with --matrix".to_owned()));
            return Vec::new();
        }
        // By stage: the first cell of each of its copies.
        let mut cells_of: HashMap<VariableSet, Vec<usize>> = HashMap::new();
        for set in &self.depends {
            cells_of.entry(*set).or_insert_with(|| self.matrix.distinct(*set));
        }
        let mut copies = Vec::new();
        for (i, drafts) in self.drafts.iter().enumerate() {
            for cell_idx in &cells_of[&self.depends[i]] {
                let Some(draft) = drafts.of_cell(*cell_idx) else { continue };
                copies.push(self.copy(i, draft, *cell_idx, &cells_of));
            }
        }
        copies
    }

    fn copy(
        &self,
        i: usize,
        draft: &Draft,
        cell_idx: usize,
        cells_of: &HashMap<VariableSet, Vec<usize>>,
    ) -> PipelineStage {
        let raw = &self.stages[i];
        let own = self.depends[i];
        let cell = self.matrix.project(cell_idx, own);
        let mut params = draft.params.clone();
        let mut inputs = BTreeMap::new();
        let addresses = |targets: &[(String, Place)]| -> Vec<String> {
            targets.iter().flat_map(|(name, _)| self.addresses(name, cell_idx, own, cells_of)).collect()
        };
        for reference in &draft.refs {
            let addresses = addresses(&reference.targets);
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
            after: addresses(&draft.after),
            line: raw.name.at.line,
            cell: (!cell.values.is_empty()).then_some(cell),
        }
    }

    /// Returns the addresses of a stage's copies that agree with a cell where both have a value.
    fn addresses(
        &self,
        name: &str,
        cell_idx: usize,
        own: VariableSet,
        cells_of: &HashMap<VariableSet, Vec<usize>>,
    ) -> Vec<String> {
        let Some(&target) = self.index.get(name) else { return Vec::new() };
        let set = self.depends[target];
        let of_cell = |cell_idx: usize| address(name, &self.matrix.project(cell_idx, set));
        let shared = set & own;
        if shared == set {
            return vec![of_cell(cell_idx)];
        }
        let wanted = self.matrix.ids(cell_idx, shared);
        let agreeing = cells_of[&set].iter().filter(|other| self.matrix.ids(**other, shared) == wanted);
        agreeing.map(|other| of_cell(*other)).collect()
    }
}

fn address(name: &str, cell: &Cell) -> String {
    if cell.values.is_empty() { name.to_owned() } else { format!("{name}[{}]", cell.label()) }
}
