//! Measurements taken together: their starts take turns over the models, so that what drifts meanwhile (clocks, temperature, neighbours)
//! falls on all models alike.

use super::job::{Begun, Work};
use super::prepare::Prepared;
use super::schedule::{Ended, Executor};
use crate::stage::Start;
use petgraph::graph::NodeIndex;
use std::collections::BTreeMap;
use std::time::Instant;

/// A stage of the group that is being measured.
struct Measured<'a> {
    prepared: Prepared<'a>,
    work: Box<Work>,
    n_starts: usize,
}

impl<'a> Executor<'a> {
    /// Measures a group of stages and notes how each ended.
    ///
    /// Start 1 of every model comes before start 2 of any; every other round goes through the models backwards, which cancels a steady
    /// drift. All stages of one model and start share a worker, which loads the model once.
    pub fn measure(&self, group: &[NodeIndex]) {
        let (prepared, twins) = self.prepare_group(group);
        let mut models: Vec<Vec<Measured<'a>>> = self.begin_group(prepared);
        let n_rounds = models.iter().flatten().map(|measured| measured.n_starts).max().unwrap_or(0);
        for idx in 0..n_rounds {
            let mut order: Vec<usize> = (0..models.len()).collect();
            if idx % 2 == 1 {
                order.reverse();
            }
            for model_idx in order {
                let session = self.new_session();
                let stages = std::mem::take(&mut models[model_idx]);
                models[model_idx] =
                    stages.into_iter().filter_map(|stage| self.measure_start(stage, idx, session)).collect();
            }
        }
        for Measured { prepared, work, .. } in models.into_iter().flatten() {
            self.record(prepared.node, self.commit(prepared.status, prepared.job, *work));
        }
        // What the first of two equal stages measured serves the second.
        for twin in twins {
            self.record(twin.node, self.complete(twin));
        }
    }

    /// Runs one start of a stage; a stage that fails is noted and gone.
    fn measure_start(&self, mut stage: Measured<'a>, idx: usize, session: u64) -> Option<Measured<'a>> {
        if idx >= stage.n_starts {
            return Some(stage);
        }
        let start = Start { idx, n: stage.n_starts };
        match stage.prepared.job.run_start(&mut stage.work, start, Some(session)) {
            Ok(()) => Some(stage),
            Err(error) => {
                let ended = self.failed(stage.prepared.status, &error, stage.work.took);
                self.record(stage.prepared.node, ended);
                None
            }
        }
    }

    /// Returns the stages that are to be measured, and those that have the key of another; notes those that need no work.
    fn prepare_group(&self, group: &[NodeIndex]) -> (Vec<Prepared<'a>>, Vec<Prepared<'a>>) {
        let (mut first, mut twins): (Vec<Prepared<'a>>, Vec<Prepared<'a>>) = (Vec::new(), Vec::new());
        for node in group {
            match self.prepare(*node) {
                Err(ended) => self.record(*node, *ended),
                Ok(prepared) if first.iter().any(|other| other.job.key == prepared.job.key) => twins.push(*prepared),
                Ok(prepared) => first.push(*prepared),
            }
        }
        (first, twins)
    }

    /// Claims the stages' keys, and returns what is left to measure by model, both in the plan's order.
    fn begin_group(&self, mut prepared: Vec<Prepared<'a>>) -> Vec<Vec<Measured<'a>>> {
        let order: BTreeMap<NodeIndex, usize> =
            prepared.iter().enumerate().map(|(idx, prepared)| (prepared.node, idx)).collect();
        // In the order of keys: two processes that want the same ones can't wait for each other.
        prepared.sort_by(|a, b| a.job.key.0.cmp(&b.job.key.0));
        let mut begun: Vec<Measured<'a>> = Vec::new();
        for prepared in prepared {
            let begin = Instant::now();
            let ended: Ended = match prepared.job.begin() {
                Ok(Begun::Work(work)) => {
                    let is_host = self.request.runner.is_host();
                    let n_starts = prepared.stage.n_starts(&prepared.job.node.stage.params, is_host).max(1);
                    begun.push(Measured { prepared, work, n_starts });
                    continue;
                }
                Ok(Begun::Cached(artifact)) => self.served(prepared.status, &prepared.job, &artifact, begin.elapsed()),
                Err(error) => self.failed(prepared.status, &error, begin.elapsed()),
            };
            self.record(prepared.node, ended);
        }
        begun.sort_by_key(|measured| order.get(&measured.prepared.node).copied());
        let mut models: Vec<(Option<NodeIndex>, Vec<Measured<'a>>)> = Vec::new();
        for measured in begun {
            let model = self.model_of(measured.prepared.node);
            match models.iter_mut().find(|(other, _)| *other == model) {
                Some((_, stages)) => stages.push(measured),
                None => models.push((model, vec![measured])),
            }
        }
        models.into_iter().map(|(_, stages)| stages).collect()
    }
}
