//! Whether what stages will read from the cache is what was committed there: hashed before the run begins, outside of any stage's
//! time.

use crate::plan::{Key, Plan};
use crate::store::{Damage, Part, Store};
use petgraph::Direction;
use petgraph::visit::EdgeRef;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

/// What was verified.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Verified {
    pub n_files: usize,
    pub bytes: u64,
    pub duration_s: f64,
    /// By the stage's address: what counts as missing now. Plan again, so that it is computed again.
    pub damaged: BTreeMap<String, (Key, Damage)>,
}

impl Verified {
    /// Adds what a later plan had verified.
    pub fn extend(&mut self, later: Verified) {
        self.n_files += later.n_files;
        self.bytes += later.bytes;
        self.duration_s += later.duration_s;
        self.damaged.extend(later.damaged);
    }

    /// Returns what `run.json` says of it.
    pub fn to_json(&self) -> Value {
        let damaged: Vec<Value> = self
            .damaged
            .iter()
            .map(|(stage, (key, damage))| json!({ "stage": stage, "key": key.0, "file": damage.file, "reason": damage.reason }))
            .collect();
        json!({ "n_files": self.n_files, "bytes": self.bytes, "duration_s": self.duration_s, "damaged": damaged })
    }
}

/// Hashes what a run of this plan will take from the cache: of stages that are cached what is copied into the results, and every
/// file of the inputs of stages that run. The plan itself has looked at manifests, sizes and records.
pub fn verify_cached(plan: &Plan, store: &Store) -> Verified {
    let start = Instant::now();
    let mut wanted: BTreeMap<Key, (Part, String)> = BTreeMap::new();
    let mut damaged = BTreeMap::new();
    for node in &plan.order {
        let data = &plan.graph[*node];
        let Some(key) = data.key.clone().filter(|_| data.selected) else { continue };
        if !data.runs {
            wanted.entry(key).or_insert((Part::ForPeople, data.stage.address.clone()));
        } else if let Some(damage) = store.damage(&key) {
            // It is planned to run because of that.
            damaged.insert(data.stage.address.clone(), (key, damage));
        }
    }
    for node in plan.order.iter().filter(|node| plan.graph[**node].runs && plan.graph[**node].selected) {
        for edge in plan.graph.edges_directed(*node, Direction::Incoming).filter(|edge| edge.weight().data) {
            let input = &plan.graph[edge.source()];
            if let Some(key) = input.key.clone().filter(|_| !input.runs) {
                wanted.insert(key, (Part::All, input.stage.address.clone()));
            }
        }
    }
    let mut verified = Verified::default();
    for (key, (part, address)) in wanted {
        // It is never cancelled: signals end the process while nothing runs yet.
        let check = store.check(&key, part, &|| true).unwrap_or_default();
        verified.n_files += check.n_files;
        verified.bytes += check.bytes;
        verified.damaged.extend(check.damage.map(|damage| (address, (key, damage))));
    }
    verified.damaged.extend(damaged);
    verified.duration_s = start.elapsed().as_secs_f64();
    verified
}

/// Returns the keys that a plan knows: what its run is going to use.
pub fn planned_keys(plan: &Plan) -> BTreeSet<Key> {
    plan.graph.node_weights().filter_map(|node| node.key.clone()).collect()
}
