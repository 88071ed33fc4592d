//! Progress bars on a terminal: one for the run, one for every running stage.

use super::lines::{is_warning, line, said};
use crate::event::{Event, EventSink, Level, Outcome};
use crate::units::format_seconds;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

const RUN: &str = "{prefix:.bold} [{bar:32}] {pos}/{len} stages  {elapsed_precise}";
const COUNTED: &str = "  {spinner} {prefix} [{bar:24}] {pos}/{len} {msg}  {per_sec}  ETA {eta}";
const UNCOUNTED: &str = "  {spinner} {prefix} {pos} {msg}  {per_sec}  {elapsed}";
const TICK: Duration = Duration::from_millis(120);

/// Draws bars with indicatif; they redraw themselves, on stderr.
pub struct Bars {
    level: Level,
    all: MultiProgress,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    run: Option<ProgressBar>,
    stages: BTreeMap<String, ProgressBar>,
}

impl Bars {
    pub fn new(level: Level) -> Bars {
        Bars { level, all: MultiProgress::new(), state: Mutex::default() }
    }

    fn say(&self, text: &str) {
        // A terminal that is gone can't be told anything.
        let _ = self.all.println(text);
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}

fn mark(outcome: Outcome) -> console_style::Painted {
    match outcome {
        Outcome::Done => console_style::paint("✓", 32),
        Outcome::Cached => console_style::paint("=", 36),
        Outcome::Failed => console_style::paint("✗", 31),
        Outcome::Skipped | Outcome::Cancelled => console_style::paint("-", 33),
    }
}

impl EventSink for Bars {
    fn emit(&self, event: Event) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &event {
            Event::RunStarted { pipeline, n_stages, .. } => {
                if let Some(text) = line(&event, self.level) {
                    self.say(&text);
                }
                let bar = self.all.add(ProgressBar::new(*n_stages as u64));
                bar.set_style(style(RUN));
                bar.set_prefix(pipeline.clone());
                bar.enable_steady_tick(TICK);
                state.run = Some(bar);
            }
            Event::StageStarted { stage, .. } => {
                let bar = self.all.add(ProgressBar::new_spinner());
                bar.set_style(style(UNCOUNTED));
                bar.set_prefix(stage.clone());
                bar.enable_steady_tick(TICK);
                state.stages.insert(stage.clone(), bar);
            }
            Event::StageProgress { stage, done, total, unit } => {
                if let Some(bar) = state.stages.get(stage) {
                    if *done == 0 {
                        bar.reset();
                        bar.set_style(style(if total.is_some() { COUNTED } else { UNCOUNTED }));
                    }
                    bar.set_message(unit.clone());
                    bar.set_length(total.unwrap_or(0));
                    bar.set_position(*done);
                }
            }
            Event::Note { .. } => {
                if let Some(text) = line(&event, self.level) {
                    self.say(&text);
                }
            }
            Event::StageFinished { stage, outcome, duration_s, summary, .. } => {
                if let Some(bar) = state.stages.remove(stage) {
                    bar.finish_and_clear();
                }
                if self.level < Level::Warning || is_warning(&event) {
                    self.say(&format!(
                        "{} {stage}  {}  {}",
                        mark(*outcome),
                        format_seconds(*duration_s),
                        said(stage, *outcome, summary)
                    ));
                }
                if let Some(run) = &state.run {
                    run.inc(1);
                }
            }
            Event::RunFinished { .. } => {
                if let Some(run) = state.run.take() {
                    run.finish_and_clear();
                }
                if let Some(text) = line(&event, self.level) {
                    self.say(&text);
                }
            }
        }
    }
}

/// Colour, unless `NO_COLOR` asks for none.
mod console_style {
    use std::fmt;

    pub struct Painted {
        text: &'static str,
        colour: Option<u8>,
    }

    pub fn paint(text: &'static str, colour: u8) -> Painted {
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Painted { text, colour: (!plain).then_some(colour) }
    }

    impl fmt::Display for Painted {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            match self.colour {
                Some(colour) => write!(f, "\u{1b}[{colour}m{}\u{1b}[0m", self.text),
                None => f.write_str(self.text),
            }
        }
    }
}
