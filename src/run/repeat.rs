//! What another person needs to repeat a run, beside the pipeline's text: every stage as it was understood, and every file
//! that was read.

use crate::hub::{HubReference, HubSettings, locate};
use crate::plan::Plan;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// Returns each stage with its canonical parameters (defaults filled in, variables substituted) and its inputs, in the order
/// of execution.
pub fn planned_stages(plan: &Plan) -> Value {
    let stage = |node: &petgraph::graph::NodeIndex| {
        let node = &plan.graph[*node];
        json!({
            "stage": node.stage.address,
            "kind": node.stage.kind,
            "key": node.key.as_ref().map(|key| &key.0),
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
pub fn external_files(plan: &Plan, root: &Path) -> Value {
    let mut files = Map::new();
    for node in plan.graph.node_weights() {
        for (name, hash) in &node.fields {
            let Some(written) = name.strip_prefix("files.") else { continue };
            let bytes = on_disk(written, root).and_then(|path| std::fs::metadata(path).ok()).map(|meta| meta.len());
            let file = match hash.strip_prefix("sha256:") {
                Some(sha256) => json!({ "sha256": sha256, "bytes": bytes }),
                None => json!({ "blake3": hash, "bytes": bytes }),
            };
            files.insert(written.to_owned(), file);
        }
    }
    files.sort_keys();
    Value::Object(files)
}

/// Returns where a file lies: one of a model or a data set on the hub, or one below the root.
fn on_disk(written: &str, root: &Path) -> Option<PathBuf> {
    match written.starts_with("hf://") {
        true => locate(&HubReference::parse(written).ok()?, &HubSettings::from_env()),
        false => Some(root.join(written)),
    }
}
