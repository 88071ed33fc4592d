//! Builds a plan: graph, order, keys, reasons.

use super::keys::{own_fields, resolve_key};
use super::select::{Remeasure, Selection, all_addresses};
use super::types::{Key, KeyFields, Plan, PlanEdge, PlanNode, Reason};
use crate::inference::EngineInfo;
use crate::pipeline::Pipeline;
use crate::stage::Catalogue;
use petgraph::Direction;
use petgraph::graph::{DiGraph, NodeIndex};
use petgraph::visit::EdgeRef;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What a plan must know of the world.
pub trait Facts {
    /// Returns the content hash of a file.
    fn file_hash(&self, path: &Path) -> Result<String, String>;
    /// Returns the digest of the artifact under a key, if there is a whole one.
    fn artifact(&self, key: &Key) -> Option<String>;
    /// Returns what a stage of this pipeline last had.
    fn last(&self, stage: &str) -> Option<(Key, KeyFields)>;
    fn engine(&self) -> EngineInfo;
}

/// Why there is no plan (exit code 2).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    #[error("find the files that {} parameter(s) name, the first of stage {}: {}", .0.len(), .0[0].stage, .0[0].reason)]
    MissingFiles(Vec<MissingFile>),
    #[error("plan stage {stage}: {reason}")]
    Hash { stage: String, reason: String },
    #[error("find stage {name:?}{}", hint.as_ref().map(|hint| format!(" ({hint})")).unwrap_or_default())]
    UnknownStage { name: String, hint: Option<String> },
    #[error("find kind {kind:?} of stage {stage} in the catalogue")]
    UnknownKind { stage: String, kind: String },
    #[error("order the stages: {stage} is part of a cycle")]
    Cycle { stage: String },
    #[error("reuse stage {stage} from the cache: {why}; {remedy}")]
    Stale { stage: String, why: String, remedy: &'static str },
}

/// A parameter that names a file which isn't there.
#[derive(Debug, Clone, PartialEq)]
pub struct MissingFile {
    pub stage: String,
    /// Where the stage stands in the pipeline file, counted from 1.
    pub line: usize,
    pub param: String,
    pub reason: String,
}

/// Builds the plan of a pipeline.
///
/// # Errors
/// `MissingFiles` where parameters name files that aren't there (each stage's first), `Stale` where `--from` or `--only` need what the cache
/// doesn't hold, `UnknownStage`.
pub fn build(
    pipeline: &Pipeline,
    catalogue: &Catalogue,
    root: &Path,
    facts: &dyn Facts,
    selection: &Selection,
) -> Result<Plan, PlanError> {
    let mut graph = graph(pipeline, catalogue)?;
    let order = order(&graph)?;
    let chosen = Chosen::new(pipeline, &graph, selection)?;
    let mut missing = Vec::new();
    for &node in &order {
        match own_fields(&graph[node].stage, graph[node].description, root, facts) {
            Ok(own) => decide(&mut graph, node, own, facts, &chosen),
            Err(PlanError::MissingFiles(found)) => missing.extend(found),
            Err(error) => return Err(error),
        }
    }
    if !missing.is_empty() {
        return Err(PlanError::MissingFiles(missing));
    }
    let plan = Plan { pipeline: pipeline.name.clone(), device: pipeline.device.clone(), graph, order };
    chosen.check_upstream(&plan)?;
    Ok(plan)
}

fn graph(pipeline: &Pipeline, catalogue: &Catalogue) -> Result<DiGraph<PlanNode, PlanEdge>, PlanError> {
    let mut graph = DiGraph::new();
    let mut nodes = BTreeMap::new();
    for stage in &pipeline.stages {
        let kind = catalogue.get(&stage.kind);
        let kind =
            kind.ok_or_else(|| PlanError::UnknownKind { stage: stage.address.clone(), kind: stage.kind.clone() })?;
        let node = PlanNode {
            stage: stage.clone(),
            description: kind.description(),
            key: None,
            fields: KeyFields::new(),
            reason: Reason::New,
            runs: true,
            selected: true,
        };
        nodes.insert(stage.address.clone(), graph.add_node(node));
    }
    for stage in &pipeline.stages {
        let to = nodes[&stage.address];
        for (param, addresses) in &stage.inputs {
            let gathers = stage.gathers.contains(param);
            for from in addresses.iter().filter_map(|address| nodes.get(address)) {
                graph.add_edge(*from, to, PlanEdge { param: param.clone(), gathers, data: true });
            }
        }
        for from in stage.after.iter().filter_map(|address| nodes.get(address)) {
            graph.add_edge(*from, to, PlanEdge { param: "after".to_owned(), gathers: false, data: false });
        }
    }
    Ok(graph)
}

/// Orders topologically; where that leaves a choice, a stage on the model used last comes first, then file order.
fn order(graph: &DiGraph<PlanNode, PlanEdge>) -> Result<Vec<NodeIndex>, PlanError> {
    let mut waiting: BTreeMap<NodeIndex, usize> =
        graph.node_indices().map(|node| (node, graph.edges_directed(node, Direction::Incoming).count())).collect();
    let mut order = Vec::with_capacity(graph.node_count());
    let mut model = None;
    while !waiting.is_empty() {
        let ready = || waiting.iter().filter(|(_, n)| **n == 0).map(|(node, _)| *node);
        let next = ready().find(|node| model.is_some() && model_of(graph, *node) == model).or_else(|| ready().next());
        let Some(next) = next else {
            let stage = waiting.keys().next().map(|node| graph[*node].stage.address.clone()).unwrap_or_default();
            return Err(PlanError::Cycle { stage });
        };
        waiting.remove(&next);
        model = model_of(graph, next).or(model);
        for edge in graph.edges_directed(next, Direction::Outgoing) {
            if let Some(n) = waiting.get_mut(&edge.target()) {
                *n -= 1;
            }
        }
        order.push(next);
    }
    Ok(order)
}

/// Returns the stage that makes the model which a stage computes with.
pub fn model_of(graph: &DiGraph<PlanNode, PlanEdge>, node: NodeIndex) -> Option<NodeIndex> {
    if !graph[node].description.computes || ["load", "quantize"].contains(&graph[node].stage.kind.as_str()) {
        return None;
    }
    graph
        .edges_directed(node, Direction::Incoming)
        .find(|edge| edge.weight().param == "model")
        .map(|edge| edge.source())
}

/// What the selection means for each stage.
struct Chosen {
    selected: BTreeSet<String>,
    forced: BTreeSet<String>,
    remeasured: BTreeSet<String>,
    /// Stages outside the selection must be in the cache.
    strict: bool,
    /// What to do where one isn't.
    remedy: &'static str,
}

impl Chosen {
    fn new(
        pipeline: &Pipeline,
        graph: &DiGraph<PlanNode, PlanEdge>,
        selection: &Selection,
    ) -> Result<Chosen, PlanError> {
        let stages = &pipeline.stages;
        let all: BTreeSet<String> = stages.iter().map(|stage| stage.address.clone()).collect();
        let mut selected = all.clone();
        let mut forced = BTreeSet::new();
        if !selection.until.is_empty() {
            selected = reach(graph, &all_addresses(stages, &selection.until)?, Direction::Incoming);
        }
        if !selection.only.is_empty() {
            selected = all_addresses(stages, &selection.only)?;
        }
        if !selection.from.is_empty() {
            forced = reach(graph, &all_addresses(stages, &selection.from)?, Direction::Outgoing);
            selected = if selection.rebuild_upstream { all } else { forced.clone() };
        }
        if selection.force {
            forced.extend(selected.iter().cloned());
        }
        let remeasured = match &selection.remeasure {
            Remeasure::No => BTreeSet::new(),
            Remeasure::All => {
                stages.iter().map(|stage| stage.address.clone()).filter(|address| selected.contains(address)).collect()
            }
            Remeasure::Stages(names) => all_addresses(stages, names)?,
        };
        let strict = (!selection.only.is_empty() || !selection.from.is_empty()) && !selection.rebuild_upstream;
        let remedy = if selection.from.is_empty() {
            "with --until in place of --only it is computed too"
        } else {
            "add --rebuild-upstream to compute it again"
        };
        Ok(Chosen { selected, forced, remeasured, strict, remedy })
    }

    /// Stages that are not selected but needed must come from the cache.
    fn check_upstream(&self, plan: &Plan) -> Result<(), PlanError> {
        if !self.strict {
            return Ok(());
        }
        let chosen: BTreeSet<String> =
            plan.graph.node_weights().filter(|n| n.selected).map(|n| n.stage.address.clone()).collect();
        let needed = reach(&plan.graph, &chosen, Direction::Incoming);
        for node in plan.order.iter().map(|node| &plan.graph[*node]) {
            if !node.selected && node.runs && needed.contains(&node.stage.address) {
                let why = match &node.reason {
                    Reason::Changed(_) => format!("it changed ({})", node.reason.explain()),
                    _ => "it is not there".to_owned(),
                };
                return Err(PlanError::Stale { stage: node.stage.address.clone(), why, remedy: self.remedy });
            }
        }
        Ok(())
    }
}

fn reach(graph: &DiGraph<PlanNode, PlanEdge>, from: &BTreeSet<String>, direction: Direction) -> BTreeSet<String> {
    let mut found = from.clone();
    let mut open: Vec<NodeIndex> =
        graph.node_indices().filter(|node| from.contains(&graph[*node].stage.address)).collect();
    while let Some(node) = open.pop() {
        for next in graph.neighbors_directed(node, direction) {
            if found.insert(graph[next].stage.address.clone()) {
                open.push(next);
            }
        }
    }
    found
}

/// Gives a node its key, if it is known yet, and its reason; its inputs have theirs.
fn decide(
    graph: &mut DiGraph<PlanNode, PlanEdge>,
    node: NodeIndex,
    own: KeyFields,
    facts: &dyn Facts,
    chosen: &Chosen,
) {
    let address = graph[node].stage.address.clone();
    let mut inputs = BTreeMap::new();
    let mut awaits = None;
    for edge in graph.edges_directed(node, Direction::Incoming).filter(|edge| edge.weight().data) {
        let input = &graph[edge.source()];
        let known = match (&input.key, input.description.measures) {
            (Some(key), false) => Some((key.clone(), None)),
            (Some(key), true) if !input.runs => facts.artifact(key).map(|digest| (key.clone(), Some(digest))),
            _ => None,
        };
        match known {
            Some(known) => {
                inputs.insert(input.stage.address.clone(), known);
            }
            None => awaits = Some(input.stage.address.clone()),
        }
    }
    let last = facts.last(&address);
    let is_selected = chosen.selected.contains(&address);
    let data = &mut graph[node];
    data.selected = is_selected;
    if let Some(input) = awaits {
        data.fields = own;
        data.reason = if is_selected { Reason::Awaits(input) } else { Reason::NotSelected };
        data.runs = true;
        return;
    }
    let (key, fields) = resolve_key(&data.stage, &own, &|address| inputs.get(address).cloned());
    let is_cached = facts.artifact(&key).is_some();
    let remeasure = data.description.measures && chosen.remeasured.contains(&address);
    data.reason = if is_selected && chosen.forced.contains(&address) {
        Reason::Forced
    } else if is_selected && remeasure {
        Reason::Remeasure
    } else if is_cached {
        Reason::Cached
    } else {
        miss_reason(&key, &fields, last)
    };
    data.runs = data.reason != Reason::Cached;
    data.key = Some(key);
    data.fields = fields;
}

/// Says why a key is not in the cache.
pub fn miss_reason(key: &Key, fields: &KeyFields, last: Option<(Key, KeyFields)>) -> Reason {
    let Some((last_key, last_fields)) = last else { return Reason::New };
    if last_key == *key {
        return Reason::Missing;
    }
    let names: BTreeSet<&String> = fields.keys().chain(last_fields.keys()).collect();
    let absent = "absent".to_owned();
    let changes = names.into_iter().filter_map(|name| {
        let (before, now) = (last_fields.get(name).unwrap_or(&absent), fields.get(name).unwrap_or(&absent));
        (before != now).then(|| (name.clone(), before.clone(), now.clone()))
    });
    Reason::Changed(changes.collect())
}
