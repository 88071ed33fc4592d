//! A plan: the DAG of a pipeline's stages, each with its key and the reason why it will or won't run.

use super::external::{Source, SourceKind};
pub use crate::artifact::{Key, KeyFields};
use crate::pipeline::PipelineStage;
use crate::stage::StageDescription;
use petgraph::Direction;
use petgraph::graph::{DiGraph, NodeIndex};
use petgraph::visit::EdgeRef;

/// Why a stage will run, or won't.
#[derive(Debug, Clone, PartialEq)]
pub enum Reason {
    /// Its artifact is in the cache.
    Cached,
    /// Never computed before under this name.
    New,
    /// These fields differ from the last artifact of this stage: (field, before, now).
    Changed(Vec<(String, String, String)>),
    /// Its key was computed before, but the artifact is gone or damaged.
    Missing,
    /// `--force` or `rerun --from`.
    Forced,
    /// `--remeasure`.
    Remeasure,
    /// Its key depends on what this stage is going to measure.
    Awaits(String),
    /// An input is going to run, which may change what it reads.
    InputRuns(String),
    /// Left out by `--only`, `--until` or `rerun --from`.
    NotSelected,
}

/// One stage in the plan.
#[derive(Debug, Clone)]
pub struct PlanNode {
    pub stage: PipelineStage,
    pub description: &'static StageDescription,
    /// Null while it depends on a measurement that has not been made.
    pub key: Option<Key>,
    pub fields: KeyFields,
    /// What it reads outside the cache, with the hashes that are in its key.
    pub sources: Vec<Source>,
    /// The name that its quantization config has here: another stage's config may mean the same and be called otherwise.
    pub config_name: Option<String>,
    /// Hash of what a report may show of the stage beside its numbers; in the key of what gathers.
    pub shown: String,
    pub reason: Reason,
    /// True if the executor has to run it, or cannot know yet.
    pub runs: bool,
    /// Selected by `--only`/`--until`/`--from`; others are used from the cache but never run.
    pub selected: bool,
}

/// An edge: the parameter that names the input, or `after`.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanEdge {
    pub param: String,
    pub gathers: bool,
    /// False for `after:` edges, which carry no data.
    pub data: bool,
}

/// The DAG, edges from input to consumer.
#[derive(Debug, Clone)]
pub struct Plan {
    pub pipeline: String,
    pub device: String,
    pub graph: DiGraph<PlanNode, PlanEdge>,
    /// Topological, file order among equals, grouped by model where the order is free.
    pub order: Vec<NodeIndex>,
}

impl Plan {
    /// Returns what a stage reads outside the cache: what it names itself, and the files of the model that it computes with, which the
    /// engine opens again.
    pub fn reads(&self, node: NodeIndex) -> Vec<&Source> {
        let mut reads: Vec<&Source> = self.graph[node].sources.iter().collect();
        let mut open = vec![node];
        while let Some(node) = open.pop() {
            for edge in
                self.graph.edges_directed(node, Direction::Incoming).filter(|edge| edge.weight().param == "model")
            {
                let is_model = |source: &&Source| matches!(source.kind, SourceKind::Model | SourceKind::ModelConfig);
                reads.extend(self.graph[edge.source()].sources.iter().filter(is_model));
                open.push(edge.source());
            }
        }
        reads
    }
}
