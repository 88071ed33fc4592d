//! A stage's progress, told as events: at most twenty a second.

use crate::event::{Event, EventSink, Level, Progress};
use crate::stage::Start;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

const PERIOD: Duration = Duration::from_millis(50);

/// Progress of one stage.
pub struct StageProgress {
    stage: String,
    events: Arc<dyn EventSink>,
    cancel: Arc<AtomicBool>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    done: u64,
    total: Option<u64>,
    unit: String,
    told: Option<Instant>,
    start: Option<Start>,
}

impl StageProgress {
    pub fn new(stage: &str, events: Arc<dyn EventSink>, cancel: Arc<AtomicBool>) -> StageProgress {
        StageProgress { stage: stage.to_owned(), events, cancel, state: Mutex::default() }
    }

    /// Says which of a stage's starts runs: the count of steps begins anew in each.
    pub fn start(&self, start: Start) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).start = Some(start);
    }

    fn tell(&self, state: &mut State) {
        state.told = Some(Instant::now());
        self.events.emit(Event::StageProgress {
            stage: self.stage.clone(),
            done: state.done,
            total: state.total,
            unit: state.unit.clone(),
        });
    }
}

impl Progress for StageProgress {
    fn begin(&self, total: Option<u64>, unit: &str) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let start = state.start;
        let unit = match start.filter(|start| start.n > 1) {
            Some(Start { idx, n }) => format!("{unit}, start {} of {n}", idx + 1),
            None => unit.to_owned(),
        };
        *state = State { done: 0, total, unit, told: None, start };
        self.tell(&mut state);
    }

    fn advance(&self, n: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.done += n;
        let is_last = state.total == Some(state.done);
        if is_last || state.told.is_none_or(|told| told.elapsed() >= PERIOD) {
            self.tell(&mut state);
        }
    }

    fn note(&self, level: Level, text: &str) {
        self.events.emit(Event::Note { stage: Some(self.stage.clone()), level, text: text.to_owned() });
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }
}
