//! The parent's side of one worker: starting it, driving it, ending it.

use super::protocol::{FromWorker, Task, ToWorker};
use crate::event::Progress;
use crate::inference::{EngineInfo, ExecutionChoice, InferenceError, MemoryPrediction, ModelRecipe, Workload};
use crate::run::runner::RunnerError;
use crate::stage::{StageError, StageOutput};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often a cancellation is looked for.
const POLL: Duration = Duration::from_millis(25);
/// How long a stage may take to stop after a cancellation: with the rest, less than 2 s.
const GRACE: Duration = Duration::from_millis(1500);
/// How long a worker may take to end by itself once its stdin is closed.
const FAREWELL: Duration = Duration::from_millis(1000);
/// What is kept of a worker's stderr.
const MAX_STDERR_BYTES: usize = 4096;

/// Why there is no worker.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    #[error("start a worker process ({program}): {source}")]
    Spawn { program: String, source: std::io::Error },
    #[error("start a worker process: it {reason}")]
    Lost { reason: String },
    #[error(transparent)]
    Device(#[from] InferenceError),
}

/// A running worker.
#[derive(Debug)]
pub struct Worker {
    child: Child,
    /// Null once the worker was told to end.
    stdin: Option<ChildStdin>,
    messages: Receiver<FromWorker>,
    stderr: Arc<Mutex<Vec<u8>>>,
}

/// What a worker says of its device.
#[derive(Debug, Clone)]
pub struct Greeting {
    pub info: EngineInfo,
    /// Why it computes on that device.
    pub reason: String,
}

/// How workers are started.
#[derive(Debug, Clone)]
pub struct Launch {
    /// This program's own file.
    pub program: PathBuf,
    pub device: String,
    /// What a worker's model keeps below, in bytes.
    pub memory_limit: Option<u64>,
    /// Which path its model takes through the device.
    pub execution: ExecutionChoice,
    /// Disturbed measurements are kept as they are.
    pub accept_disturbed: bool,
    /// What is known of the processors, as the engine writes it.
    pub processor_speeds: Option<String>,
}

impl Launch {
    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["worker", "--device", &self.device, "--execution", self.execution.name()]);
        command.args(self.accept_disturbed.then_some("--accept-disturbed"));
        if let Some(bytes) = self.memory_limit {
            command.arg("--memory-limit").arg(bytes.to_string());
        }
        if let Some(speeds) = &self.processor_speeds {
            command.arg("--processor-speeds").arg(speeds);
        }
        command
    }
}

impl Worker {
    /// Starts a worker and waits until its engine is there.
    ///
    /// # Errors
    /// `Spawn`, `Lost`; `Device` where the device can't be used.
    pub fn start(launch: &Launch) -> Result<(Worker, Greeting), WorkerError> {
        let mut command = launch.command();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let spawn = |source| WorkerError::Spawn { program: launch.program.display().to_string(), source };
        let mut child = command.spawn().map_err(spawn)?;
        let stdin = child.stdin.take();
        let messages = child.stdout.take().map_or_else(|| channel().1, listen);
        let stderr = Arc::new(Mutex::new(Vec::new()));
        if let Some(pipe) = child.stderr.take() {
            keep_tail(pipe, Arc::clone(&stderr));
        }
        let mut worker = Worker { child, stdin, messages, stderr };
        match worker.messages.recv() {
            Ok(FromWorker::Ready { info, reason }) => Ok((worker, Greeting { info, reason })),
            Ok(FromWorker::NoDevice { device, reason }) => Err(InferenceError::Device { device, reason }.into()),
            Ok(_) | Err(_) => Err(WorkerError::Lost { reason: worker.end() }),
        }
    }

    /// Runs one stage and passes its progress on. After an error of the kind `WorkerLost` or a cancellation the worker is of no more use.
    ///
    /// # Errors
    /// What stopped the stage; `WorkerLost`.
    pub fn run(&mut self, task: Task, progress: &dyn Progress) -> Result<StageOutput, RunnerError> {
        if !self.say(&ToWorker::Run(Box::new(task))) {
            return Err(self.lost());
        }
        let mut deadline: Option<Instant> = None;
        loop {
            match self.messages.recv_timeout(POLL) {
                Ok(FromWorker::Begin { total, unit }) => progress.begin(total, &unit),
                Ok(FromWorker::Advance { n }) => progress.advance(n),
                Ok(FromWorker::Note { level, text }) => progress.note(level, &text),
                Ok(FromWorker::Done { body, summary, execution }) => {
                    return Ok(StageOutput { body, summary, execution });
                }
                Ok(FromWorker::Failed { kind, text }) => return Err(kind.error(text)),
                Ok(FromWorker::Ready { .. } | FromWorker::NoDevice { .. } | FromWorker::Predicted { .. }) => {}
                Err(RecvTimeoutError::Disconnected) if progress.is_cancelled() => {
                    return Err(StageError::Cancelled.into());
                }
                Err(RecvTimeoutError::Disconnected) => return Err(self.lost()),
                Err(RecvTimeoutError::Timeout) => {}
            }
            match deadline {
                None if progress.is_cancelled() => {
                    self.say(&ToWorker::Cancel);
                    deadline = Some(Instant::now() + GRACE);
                }
                Some(deadline) if Instant::now() >= deadline => {
                    let _ = self.child.kill();
                    return Err(StageError::Cancelled.into());
                }
                _ => {}
            }
        }
    }

    /// Asks what a stage would take with a model; `None` where the engine predicts nothing.
    ///
    /// # Errors
    /// What is wrong with the model; `WorkerLost`.
    pub fn predict(&mut self, recipe: &ModelRecipe, work: Workload) -> Result<Option<MemoryPrediction>, RunnerError> {
        if !self.say(&ToWorker::Predict { recipe: Box::new(recipe.clone()), work }) {
            return Err(self.lost());
        }
        loop {
            match self.messages.recv() {
                Ok(FromWorker::Predicted { prediction }) => return Ok(prediction),
                Ok(FromWorker::Failed { kind, text }) => return Err(kind.error(text)),
                Ok(_) => {}
                Err(_) => return Err(self.lost()),
            }
        }
    }

    /// Ends the process at once.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
    }

    fn say(&mut self, message: &ToWorker) -> bool {
        let Ok(mut line) = serde_json::to_vec(message) else { return false };
        line.push(b'\n');
        self.stdin.as_mut().is_some_and(|stdin| stdin.write_all(&line).and_then(|()| stdin.flush()).is_ok())
    }

    fn lost(&mut self) -> RunnerError {
        RunnerError::WorkerLost { reason: self.end() }
    }

    /// Ends the process and says how it ended, with the last line that it wrote to stderr.
    fn end(&mut self) -> String {
        let status = self.close();
        let how = status.map_or_else(|| "could not be ended".to_owned(), how_it_ended);
        let stderr = self.stderr.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&stderr);
        match text.lines().rev().find(|line| !line.trim().is_empty()) {
            Some(line) => format!("{how}; its last words: {}", line.trim()),
            None => how,
        }
    }

    /// Closes the worker's stdin, which tells it to end, and kills it where it does not.
    fn close(&mut self) -> Option<ExitStatus> {
        self.stdin = None;
        let deadline = Instant::now() + FAREWELL;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
                _ => {
                    let _ = self.child.kill();
                    return self.child.wait().ok();
                }
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.close();
    }
}

/// Reads messages on a thread of its own; the channel closes when the worker closes its stdout. A line that is no message comes from a
/// library that prints: it is left out.
fn listen(pipe: impl Read + Send + 'static) -> Receiver<FromWorker> {
    let (sender, messages) = channel();
    let read = move || {
        for line in BufReader::new(pipe).split(b'\n') {
            let Ok(line) = line else { return };
            if let Ok(message) = serde_json::from_slice(&line)
                && sender.send(message).is_err()
            {
                return;
            }
        }
    };
    // Without the thread the channel is closed at once, and the worker counts as lost.
    drop(std::thread::Builder::new().name("worker-messages".to_owned()).spawn(read));
    messages
}

fn keep_tail(mut pipe: impl Read + Send + 'static, kept: Arc<Mutex<Vec<u8>>>) {
    let read = move || {
        let mut buffer = [0; 1024];
        while let Ok(n @ 1..) = pipe.read(&mut buffer) {
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.extend_from_slice(&buffer[..n]);
            let excess = kept.len().saturating_sub(MAX_STDERR_BYTES);
            kept.drain(..excess);
        }
    };
    // Without the thread an error has no last words; the worker may then block on a full pipe only after 64 KiB.
    drop(std::thread::Builder::new().name("worker-stderr".to_owned()).spawn(read));
}

#[cfg(unix)]
fn how_it_ended(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.signal(), status.code()) {
        (Some(9), _) => "was killed (signal 9); did the system run out of memory?".to_owned(),
        (Some(signal), _) => format!("was ended by signal {signal}"),
        (None, Some(code)) => format!("ended with exit code {code}"),
        (None, None) => "ended".to_owned(),
    }
}

#[cfg(not(unix))]
fn how_it_ended(status: ExitStatus) -> String {
    status.code().map_or_else(|| "ended".to_owned(), |code| format!("ended with exit code {code}"))
}
