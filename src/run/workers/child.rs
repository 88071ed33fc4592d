//! The worker's side: it reads tasks, runs them one after the other, and tells what happens.

use super::protocol::{FromWorker, Task, ToWorker, read_inputs};
use crate::event::{Level, Progress};
use crate::inference::{Engine, InferenceError, ModelRecipe, Workload};
use crate::run::runner::{InProcess, RunnerError, StageRunner, StageTask};
use crate::stage::{Catalogue, StageError, StageOutput};
use crate::store::take_notes;
use std::io::{BufRead, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Progress is told at most twenty times a second.
const PERIOD: Duration = Duration::from_millis(50);

/// How long a stage may take to stop once the parent is gone.
const GRACE: Duration = Duration::from_millis(1500);

/// Runs what the parent sends until it closes stdin. `build` makes the engine; `accept_disturbed` keeps disturbed measurements as they
/// are.
pub fn serve(
    catalogue: &Catalogue,
    device: &str,
    accept_disturbed: bool,
    build: impl FnOnce() -> Result<(Arc<dyn Engine>, String), InferenceError>,
) -> u8 {
    ignore_interrupts();
    let cancel = Arc::new(AtomicBool::new(false));
    let tasks = listen(&cancel);
    let (engine, reason) = match build() {
        Ok(built) => built,
        Err(error) => {
            let reason = match error {
                InferenceError::Device { reason, .. } => reason,
                other => other.to_string(),
            };
            tell(&FromWorker::NoDevice { device: device.to_owned(), reason });
            return 4;
        }
    };
    tell(&FromWorker::Ready { info: engine.info(), reason });
    let runner = InProcess::new(Arc::clone(&engine)).accepting_disturbed(accept_disturbed);
    while let Ok(request) = tasks.recv() {
        let task = match request {
            Request::Run(task) => *task,
            Request::Predict(recipe, work) => {
                let answer = match engine.predict_memory(&recipe, &work) {
                    Ok(prediction) => FromWorker::Predicted { prediction },
                    Err(error) => FromWorker::failure(&RunnerError::Stage(error.into())),
                };
                if !tell(&answer) {
                    break;
                }
                continue;
            }
        };
        let result = run(catalogue, &runner, task, &cancel);
        for text in take_notes() {
            tell(&FromWorker::Note { level: Level::Warning, text });
        }
        let answer = match result {
            Ok(StageOutput { body, summary, execution }) => FromWorker::Done { body, summary, execution },
            Err(error) => FromWorker::failure(&error),
        };
        if !tell(&answer) {
            break;
        }
    }
    0
}

/// What the parent asks for.
enum Request {
    Run(Box<Task>),
    Predict(Box<ModelRecipe>, Workload),
}

/// Ctrl-C reaches every process of a terminal's group; the parent decides what it means.
fn ignore_interrupts() {
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // Without the handler a worker ends at once: the parent reports its stage as lost.
        let _ = signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)));
    }
}

/// Reads what the parent says on a thread of its own, so that a cancellation is heard while a stage runs.
fn listen(cancel: &Arc<AtomicBool>) -> Receiver<Request> {
    let (sender, tasks) = channel();
    let cancel = Arc::clone(cancel);
    let spawned = std::thread::Builder::new().name("parent".to_owned()).spawn(move || {
        follow(std::io::stdin().lock(), &sender, &cancel);
        cancel.store(true, Ordering::Relaxed);
        drop(sender);
        // An idle worker has ended by then.
        std::thread::sleep(GRACE);
        std::process::exit(130);
    });
    // A machine that has no thread left runs no stage: the channel is closed, and the worker ends.
    drop(spawned);
    tasks
}

fn follow(lines: impl BufRead, tasks: &Sender<Request>, cancel: &AtomicBool) {
    for line in lines.lines() {
        let Ok(line) = line else { return };
        let request = match serde_json::from_str(&line) {
            Ok(ToWorker::Run(task)) => Request::Run(task),
            Ok(ToWorker::Predict { recipe, work }) => Request::Predict(recipe, work),
            Ok(ToWorker::Cancel) => {
                cancel.store(true, Ordering::Relaxed);
                continue;
            }
            // The parent is this same program: a line that is no message is half of one, and the parent is gone.
            Err(_) => return,
        };
        if tasks.send(request).is_err() {
            return;
        }
    }
}

fn run(
    catalogue: &Catalogue,
    runner: &InProcess,
    task: Task,
    cancel: &Arc<AtomicBool>,
) -> Result<StageOutput, RunnerError> {
    let other = |text: String| RunnerError::Stage(StageError::Other(text));
    let stage = catalogue.get(&task.kind).ok_or_else(|| other(format!("there is no kind {}", task.kind)))?;
    let inputs = read_inputs(task.inputs).map_err(|error| other(format!("read the inputs' records: {error}")))?;
    let progress = PipeProgress { cancel: Arc::clone(cancel), state: Mutex::default() };
    runner.run(
        stage.as_ref(),
        &StageTask {
            address: &task.address,
            params: &task.params,
            root: &task.root,
            inputs: &inputs,
            missing_inputs: &task.missing_inputs,
            out_dir: &task.out_dir,
            start: task.start,
            // A worker holds one session's model: the parent starts another for another.
            session: None,
            may_repeat: task.may_repeat,
            progress: &progress,
        },
    )
}

/// Writes a message; false where the parent is gone.
fn tell(message: &FromWorker) -> bool {
    let Ok(mut line) = serde_json::to_vec(message) else { return false };
    line.push(b'\n');
    let mut out = std::io::stdout().lock();
    out.write_all(&line).and_then(|()| out.flush()).is_ok()
}

struct PipeProgress {
    cancel: Arc<AtomicBool>,
    state: Mutex<Untold>,
}

/// Steps done since the parent was last told.
#[derive(Default)]
struct Untold {
    n: u64,
    left: Option<u64>,
    told: Option<Instant>,
}

impl Progress for PipeProgress {
    fn begin(&self, total: Option<u64>, unit: &str) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = Untold { n: 0, left: total, told: None };
        tell(&FromWorker::Begin { total, unit: unit.to_owned() });
    }

    fn advance(&self, n: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.n += n;
        state.left = state.left.map(|left| left.saturating_sub(n));
        if state.left == Some(0) || state.told.is_none_or(|told| told.elapsed() >= PERIOD) {
            tell(&FromWorker::Advance { n: state.n });
            state.n = 0;
            state.told = Some(Instant::now());
        }
    }

    fn note(&self, level: Level, text: &str) {
        tell(&FromWorker::Note { level, text: text.to_owned() });
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }
}
