//! A plan: the DAG of a pipeline's stages, each with its key and the reason why it will or won't run.

pub use crate::artifact::{Key, KeyFields};
use crate::pipeline::PipelineStage;
use crate::stage::StageDescription;
use petgraph::graph::{DiGraph, NodeIndex};

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
