//! The table at a run's end.

use super::table::table;
use crate::artifact::StageStatus;
use crate::units::format_seconds;

/// Returns the stages of a run as a table: stage, outcome, time, what came out.
pub fn summary_table(stages: &[StageStatus]) -> String {
    let mut table = table(["stage", "kind", "outcome", "time", "result"]);
    for stage in stages {
        let text = match (&stage.error, &stage.summary) {
            (Some(error), _) if stage.outcome.as_deref() == Some("failed") => format!("failed to {error}"),
            (Some(error), _) => error.clone(),
            (None, Some(summary)) => summary.clone(),
            (None, None) => String::new(),
        };
        let outcome = stage.outcome.clone().unwrap_or_else(|| "not started".to_owned());
        let time = stage.duration_s.map(format_seconds).unwrap_or_default();
        table.add_row([stage.stage.clone(), stage.kind.clone(), outcome, time, text]);
    }
    table.to_string()
}
