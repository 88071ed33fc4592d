//! What another person needs to repeat a run, beside the pipeline's text: every stage as it was understood, and every file
//! that was read.

use crate::plan::Plan;
use serde_json::{Map, Value, json};

/// Returns each stage with its canonical parameters (defaults filled in, variables substituted) and its inputs, in the order
/// of execution.
pub fn planned_stages(plan: &Plan) -> Value {
    let stage = |node: &petgraph::graph::NodeIndex| {
        let node = &plan.graph[*node];
        json!({
            "stage": node.stage.address,
            "kind": node.stage.kind,
            "stage_version": node.description.version,
            "params": node.stage.params,
            "inputs": node.stage.inputs,
            "after": node.stage.after,
        })
    };
    plan.order.iter().map(stage).collect()
}

/// Returns every file outside the cache that a parameter names, as the pipeline writes it: content hash and size. Model
/// folders stand file by file.
pub fn external_files(plan: &Plan) -> Value {
    let mut files = Map::new();
    for file in plan.graph.node_weights().flat_map(|node| &node.sources).flat_map(|source| &source.files) {
        let bytes = file.path.as_ref().and_then(|path| std::fs::metadata(path).ok()).map(|meta| meta.len());
        let entry = match file.hash.strip_prefix("sha256:") {
            Some(sha256) => json!({ "sha256": sha256, "bytes": bytes }),
            None => json!({ "blake3": file.hash, "bytes": bytes }),
        };
        files.insert(file.name.clone(), entry);
    }
    files.sort_keys();
    Value::Object(files)
}
