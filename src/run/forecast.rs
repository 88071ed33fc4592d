//! What each stage of a plan will take of memory, and whether that fits a limit.

use super::runner::RunnerError;
use crate::inference::{MemoryNeed, MemoryPrediction, ModelRecipe, Workload};
use crate::plan::{Plan, PlanNode};
use crate::stage::{Catalogue, Stage, StageError};
use crate::units::format_bytes;
use petgraph::Direction;
use petgraph::graph::NodeIndex;
use petgraph::visit::EdgeRef;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Who predicts what a stage takes with a model.
pub trait Forecaster {
    /// Most bytes that a model and all it needs may take.
    fn memory_limit(&self) -> Option<u64>;

    /// Returns the prediction; `None` where the engine makes none.
    ///
    /// # Errors
    /// What is wrong with the model.
    fn predict(&self, recipe: &ModelRecipe, work: Workload) -> Result<Option<MemoryPrediction>, RunnerError>;
}

/// What one stage will take.
#[derive(Debug, Clone, PartialEq)]
pub struct StageMemory {
    /// Address.
    pub stage: String,
    pub predicted: Predicted,
    /// It has to be computed.
    pub runs: bool,
    /// Its model is quantized already.
    pub is_quantized: bool,
}

/// A prediction, or why there is none.
#[derive(Debug, Clone, PartialEq)]
pub enum Predicted {
    Known(MemoryPrediction),
    Unknown(String),
}

impl StageMemory {
    /// Returns the predicted peak in bytes.
    pub fn peak_bytes(&self) -> Option<u64> {
        match &self.predicted {
            Predicted::Known(prediction) => Some(prediction.total_bytes()),
            Predicted::Unknown(_) => None,
        }
    }

    /// Returns true where the stage must be computed and takes more than the limit.
    pub fn exceeds(&self, limit_bytes: u64) -> bool {
        self.runs && self.peak_bytes().is_some_and(|peak| peak > limit_bytes)
    }

    /// Says by how much a stage exceeds a limit, and what helps.
    pub fn refusal(&self, limit_bytes: u64) -> Option<String> {
        let Predicted::Known(prediction) = &self.predicted else { return None };
        if !self.exceeds(limit_bytes) {
            return None;
        }
        let MemoryPrediction { weights_bytes, kv_cache_bytes, activations_bytes, program_bytes } = *prediction;
        let without_weights = kv_cache_bytes + activations_bytes + program_bytes;
        let remedy = match (weights_bytes + program_bytes > limit_bytes, kv_cache_bytes > activations_bytes) {
            (true, _) => "its weights alone need more",
            (false, true) => "lower n_depth, n_gen or n_prompt, whichever is longest",
            (false, false) => "lower n_prompt, n_depth, max_length or n_tokens",
        };
        let quantize = match (self.is_quantized, weights_bytes > without_weights) {
            (false, true) => ", or quantize the model",
            (true, true) => ", or quantize to fewer bits",
            (_, false) => "",
        };
        Some(format!(
            "{} does not fit: {} predicted ({} of weights, {} beside them), the limit is {}; {remedy}{quantize}",
            self.stage,
            format_bytes(prediction.total_bytes()),
            format_bytes(weights_bytes),
            format_bytes(without_weights),
            format_bytes(limit_bytes)
        ))
    }
}

/// Predicts what every stage that holds a model takes, in the plan's order. No key depends on it.
pub fn forecast(plan: &Plan, catalogue: &Catalogue, root: &Path, forecaster: &dyn Forecaster) -> Vec<StageMemory> {
    let mut known: BTreeMap<(String, Workload), Predicted> = BTreeMap::new();
    let mut rows = Vec::new();
    for &node in &plan.order {
        let planned = &plan.graph[node];
        let Some(stage) = catalogue.get(&planned.stage.kind) else { continue };
        let base = input_of(plan, node, "base").map(|base| &plan.graph[base].stage.params);
        let work = match stage.memory_need(&planned.stage.params, base) {
            MemoryNeed::Nothing => continue,
            MemoryNeed::Known(work) => Ok(work),
            MemoryNeed::Unknown(why) => Err(StageError::Other(why.to_owned())),
        };
        let mut is_quantized = false;
        let predicted = work.and_then(|work| {
            let recipe = recipe_of(plan, node, catalogue, root)?;
            is_quantized = recipe.quantization.is_some();
            let name = serde_json::to_string(&recipe).unwrap_or_default();
            let found = known.entry((name, work)).or_insert_with(|| match forecaster.predict(&recipe, work) {
                Ok(Some(prediction)) => Predicted::Known(prediction),
                Ok(None) => Predicted::Unknown("this engine predicts no memory".to_owned()),
                Err(error) => Predicted::Unknown(error.to_string()),
            });
            Ok(found.clone())
        });
        rows.push(StageMemory {
            stage: planned.stage.address.clone(),
            predicted: predicted.unwrap_or_else(|error| Predicted::Unknown(error.to_string())),
            runs: planned.runs && planned.selected,
            is_quantized,
        });
    }
    rows
}

fn input_of(plan: &Plan, node: NodeIndex, param: &str) -> Option<NodeIndex> {
    let edges = plan.graph.edges_directed(node, Direction::Incoming);
    edges.filter(|edge| edge.weight().param == param).map(|edge| edge.source()).next()
}

/// Returns the recipe of the model that a stage computes with.
fn recipe_of(plan: &Plan, node: NodeIndex, catalogue: &Catalogue, root: &Path) -> Result<ModelRecipe, StageError> {
    let unknown = |why: &str| StageError::Other(why.to_owned());
    let mut chain: Vec<(&PlanNode, &Arc<dyn Stage>)> = Vec::new();
    let mut at = node;
    while let Some(model) = input_of(plan, at, "model") {
        let planned = &plan.graph[model];
        if planned.sources.iter().flat_map(|source| &source.files).any(|file| file.path.is_none()) {
            return Err(unknown("its model is not downloaded yet; run downloads it before it plans"));
        }
        let stage = catalogue.get(&planned.stage.kind).ok_or_else(|| unknown("its model is of no known kind"))?;
        chain.push((planned, stage));
        at = model;
    }
    let mut recipe = None;
    for (planned, stage) in chain.into_iter().rev() {
        recipe = stage.recipe(&planned.stage.params, root, recipe)?;
    }
    let recipe = recipe.ok_or_else(|| unknown("it has no model"))?;
    Ok(recipe.rooted(root))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(parts: [u64; 4], runs: bool, is_quantized: bool) -> StageMemory {
        let [weights_bytes, kv_cache_bytes, activations_bytes, program_bytes] = parts.map(|mib| mib << 20);
        let prediction = MemoryPrediction { weights_bytes, kv_cache_bytes, activations_bytes, program_bytes };
        StageMemory { stage: "decode".to_owned(), predicted: Predicted::Known(prediction), runs, is_quantized }
    }

    #[test]
    fn what_exceeds_the_limit_is_told_with_a_remedy() {
        let stage = row([6000, 900, 100, 500], true, false);
        assert_eq!((stage.refusal(7500 << 20), stage.exceeds(7500 << 20)), (None, false));
        assert_eq!(
            stage.refusal(7400 << 20).expect("a refusal"),
            "decode does not fit: 7.32 GiB predicted (5.86 GiB of weights, 1.46 GiB beside them), the limit is 7.23 GiB; lower n_depth, \
             n_gen or n_prompt, whichever is longest, or quantize the model"
        );
        let heavy = row([8000, 9, 100, 500], true, true).refusal(7400 << 20).expect("a refusal");
        assert!(heavy.ends_with("its weights alone need more, or quantize to fewer bits"), "{heavy}");
    }

    #[test]
    fn a_stage_in_the_cache_needs_no_memory() {
        assert_eq!(row([6000, 900, 100, 500], false, false).refusal(1), None);
    }
}
