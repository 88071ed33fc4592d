//! Builds a plan: graph, order, keys, reasons.

use super::external::{External, Located, SourceKind};
use super::keys::{InputKey, own_fields, resolve_key, shown};
use super::select::{Remeasure, Selection, all_addresses};
use super::types::{Key, KeyFields, Plan, PlanEdge, PlanNode, Reason};
use crate::inference::EngineInfo;
use crate::pipeline::Pipeline;
use crate::quantization::QuantizationConfig;
use crate::stage::Catalogue;
use petgraph::Direction;
use petgraph::graph::{DiGraph, NodeIndex};
use petgraph::visit::EdgeRef;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What a plan must know of the world: of the disk, of the Hugging Face cache, of the machine. All of it is asked here.
pub trait Facts {
    /// Returns where something lies that a parameter names, file by file.
    ///
    /// # Errors
    /// Why it isn't there or can't be listed, in words.
    fn locate(&self, kind: SourceKind, written: &str) -> Result<Located, String>;
    /// Returns what a quantization config says; `None` where it can't be read: the stage that reads it reports that.
    fn quantization_config(&self, path: &Path) -> Option<QuantizationConfig>;
    /// Returns the content hash of a file.
    ///
    /// # Errors
    /// Why it can't be read, in words.
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
    facts: &dyn Facts,
    selection: &Selection,
) -> Result<Plan, PlanError> {
    let mut graph = graph(pipeline, catalogue)?;
    let order = order(&graph)?;
    let chosen = Chosen::new(pipeline, &graph, selection)?;
    let mut missing = Vec::new();
    for &node in &order {
        match own_fields(&pipeline.name, &graph[node].stage, graph[node].description, facts) {
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
            sources: Vec::new(),
            config_name: None,
            shown: String::new(),
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
    let models: Vec<Option<NodeIndex>> = graph.node_indices().map(|node| model_of(graph, node)).collect();
    let mut waits_for: Vec<usize> =
        graph.node_indices().map(|node| graph.edges_directed(node, Direction::Incoming).count()).collect();
    // Stages whose inputs are ordered, by the model that they compute with.
    let mut ready: BTreeSet<NodeIndex> = graph.node_indices().filter(|node| waits_for[node.index()] == 0).collect();
    let mut ready_on: BTreeSet<(NodeIndex, NodeIndex)> =
        ready.iter().filter_map(|node| Some((models[node.index()]?, *node))).collect();
    let mut order = Vec::with_capacity(graph.node_count());
    let mut model = None;
    loop {
        let same = model.and_then(|model| {
            let next = ready_on.range((model, NodeIndex::new(0))..).next();
            next.filter(|(of, _)| *of == model).map(|(_, node)| *node)
        });
        let Some(next) = same.or_else(|| ready.first().copied()) else { break };
        ready.remove(&next);
        if let Some(of) = models[next.index()] {
            ready_on.remove(&(of, next));
            model = Some(of);
        }
        for edge in graph.edges_directed(next, Direction::Outgoing) {
            let to = edge.target();
            waits_for[to.index()] -= 1;
            if waits_for[to.index()] == 0 {
                ready.insert(to);
                ready_on.extend(models[to.index()].map(|of| (of, to)));
            }
        }
        order.push(next);
    }
    match graph.node_indices().find(|node| waits_for[node.index()] > 0) {
        Some(node) => Err(PlanError::Cycle { stage: graph[node].stage.address.clone() }),
        None => Ok(order),
    }
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
fn decide(graph: &mut DiGraph<PlanNode, PlanEdge>, node: NodeIndex, own: External, facts: &dyn Facts, chosen: &Chosen) {
    let External { fields: own, sources, config_name } = own;
    let address = graph[node].stage.address.clone();
    let mut inputs = BTreeMap::new();
    let mut awaits = None;
    let shown = shown_of(graph, node, config_name.as_deref());
    for edge in graph.edges_directed(node, Direction::Incoming).filter(|edge| edge.weight().data) {
        let input = &graph[edge.source()];
        let known = match (&input.key, input.description.measures) {
            (Some(key), false) => Some((key.clone(), None)),
            (Some(key), true) if !input.runs => facts.artifact(key).map(|digest| (key.clone(), Some(digest))),
            _ => None,
        };
        match known {
            Some((key, digest)) => {
                let known = InputKey { key, digest, shown: input.shown.clone() };
                inputs.insert(input.stage.address.clone(), known);
            }
            None => awaits = Some(input.stage.address.clone()),
        }
    }
    let last = facts.last(&address);
    let is_selected = chosen.selected.contains(&address);
    let data = &mut graph[node];
    data.selected = is_selected;
    (data.sources, data.config_name, data.shown) = (sources, config_name, shown);
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
        named_by_files(miss_reason(&key, &fields, last), data)
    };
    data.runs = data.reason != Reason::Cached;
    data.key = Some(key);
    data.fields = fields;
}

fn shown_of(graph: &DiGraph<PlanNode, PlanEdge>, node: NodeIndex, config_name: Option<&str>) -> String {
    let edges = graph.edges_directed(node, Direction::Incoming).filter(|edge| edge.weight().data);
    let mut inputs: Vec<(&str, &str)> =
        edges.map(|edge| (edge.weight().param.as_str(), graph[edge.source()].shown.as_str())).collect();
    inputs.sort_unstable();
    let inputs: Vec<&str> = inputs.into_iter().map(|(_, shown)| shown).collect();
    shown(&graph[node].stage, graph[node].description, config_name, &inputs)
}

/// Lets a reason name files as the pipeline does, where the key's fields count them.
fn named_by_files(reason: Reason, node: &PlanNode) -> Reason {
    let Reason::Changed(changes) = reason else { return reason };
    let files: BTreeMap<&str, &str> = node
        .sources
        .iter()
        .flat_map(|source| source.files.iter().map(|file| (file.field.as_str(), file.name.as_str())))
        .collect();
    let named = changes.into_iter().map(|(field, before, now)| match files.get(field.as_str()) {
        Some(name) => (format!("files.{name}"), before, now),
        None => (field, before, now),
    });
    Reason::Changed(named.collect())
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
