//! Events as lines: for people reading a log, and for machines.

use crate::event::{Event, EventSink, Level, Outcome};
use crate::units::format_seconds;
use std::io::Write;

/// One line of text an event that matters.
pub struct PlainLines {
    pub level: Level,
}

impl EventSink for PlainLines {
    fn emit(&self, event: Event) {
        if let Some(line) = line(&event, self.level) {
            // Nobody is left to tell if stderr is closed.
            let _ = writeln!(std::io::stderr(), "{line}");
        }
    }
}

/// One JSON object an event.
pub struct JsonLines;

impl EventSink for JsonLines {
    fn emit(&self, event: Event) {
        let line = serde_json::to_string(&event).unwrap_or_default();
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}

/// Returns an event as a line; nothing for events that need none, or that say nothing bad where only warnings are wanted.
pub fn line(event: &Event, level: Level) -> Option<String> {
    match event {
        event if level == Level::Warning && !is_warning(event) => None,
        Event::RunStarted { run_id, pipeline, device, n_stages, n_cached } => {
            Some(format!("run {run_id} of {pipeline} on {device}: {n_stages} stages, {n_cached} cached"))
        }
        Event::StageStarted { stage, kind } => Some(format!("start  {stage} ({kind})")),
        Event::StageProgress { .. } => None,
        Event::Note { stage, level: of, text } if *of >= level => {
            let stage = stage.as_ref().map(|stage| format!("{stage}: ")).unwrap_or_default();
            let word = if *of == Level::Warning { "warning: " } else { "" };
            Some(format!("{word}{stage}{text}"))
        }
        Event::Note { .. } => None,
        Event::StageFinished { stage, outcome, duration_s, summary, .. } => Some(format!(
            "{:<6} {stage} ({}): {}",
            word(*outcome),
            format_seconds(*duration_s),
            said(stage, *outcome, summary)
        )),
        Event::RunFinished { n_done, n_cached, n_failed, n_skipped, duration_s, .. } => Some(format!(
            "{n_done} done, {n_cached} cached, {n_failed} failed, {n_skipped} skipped in {}",
            format_seconds(*duration_s)
        )),
    }
}

/// Returns true for what a user who asked for quiet still wants to know.
pub fn is_warning(event: &Event) -> bool {
    match event {
        Event::Note { level, .. } => *level == Level::Warning,
        Event::StageFinished { outcome, .. } => !matches!(outcome, Outcome::Done | Outcome::Cached),
        Event::RunStarted { .. }
        | Event::StageStarted { .. }
        | Event::StageProgress { .. }
        | Event::RunFinished { .. } => false,
    }
}

/// Returns the word for an outcome.
pub fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Done => "done",
        Outcome::Cached => "cached",
        Outcome::Failed => "FAILED",
        Outcome::Skipped => "skip",
        Outcome::Cancelled => "stop",
    }
}

/// Returns what is said of a stage's end.
pub fn said(stage: &str, outcome: Outcome, summary: &str) -> String {
    match outcome {
        Outcome::Failed => format!("{stage} failed to {summary}"),
        _ => summary.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quiet_leaves_failures_and_warnings_only() {
        let finished = |outcome| Event::StageFinished {
            stage: "ppl".to_owned(),
            kind: "ppl".to_owned(),
            outcome,
            duration_s: 0.5,
            summary: "read text.txt: the text is empty".to_owned(),
        };
        let note = |level| Event::Note { stage: None, level, text: "careful".to_owned() };
        assert_eq!(line(&finished(Outcome::Done), Level::Warning), None);
        assert!(line(&finished(Outcome::Done), Level::Info).is_some());
        let failed = line(&finished(Outcome::Failed), Level::Warning).expect("a line");
        assert!(failed.contains("ppl failed to read text.txt"), "{failed}");
        assert_eq!(line(&note(Level::Info), Level::Warning), None);
        assert_eq!(line(&note(Level::Warning), Level::Warning).as_deref(), Some("warning: careful"));
    }
}
