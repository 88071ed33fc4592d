//! Which stages a run is about.

use super::build::PlanError;
use crate::pipeline::{PipelineStage, did_you_mean};
use std::collections::BTreeSet;

/// What `run` and `rerun` were asked for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Selection {
    /// `rerun --from`: these stages and all after them run; others come from the cache.
    pub from: Vec<String>,
    pub rebuild_upstream: bool,
    /// Only these, with their inputs from the cache.
    pub only: Vec<String>,
    /// These and everything they need.
    pub until: Vec<String>,
    /// Run though cached.
    pub force: bool,
    pub remeasure: Remeasure,
}

/// Which measurements to repeat.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum Remeasure {
    #[default]
    No,
    All,
    Stages(Vec<String>),
}

/// Returns the addresses that a name stands for: one address, or every copy of a stage.
///
/// # Errors
/// `UnknownStage`.
pub fn addresses(stages: &[PipelineStage], name: &str) -> Result<Vec<String>, PlanError> {
    let found: Vec<String> = stages
        .iter()
        .filter(|stage| stage.address == name || stage.name == name)
        .map(|stage| stage.address.clone())
        .collect();
    if found.is_empty() {
        let known: BTreeSet<&str> = stages.iter().map(|stage| stage.name.as_str()).collect();
        return Err(PlanError::UnknownStage { name: name.to_owned(), hint: did_you_mean(name, known) });
    }
    Ok(found)
}

/// Returns all addresses that several names stand for.
pub fn all_addresses(stages: &[PipelineStage], names: &[String]) -> Result<BTreeSet<String>, PlanError> {
    let mut found = BTreeSet::new();
    for name in names {
        found.extend(addresses(stages, name)?);
    }
    Ok(found)
}
