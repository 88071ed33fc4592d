//! What a tokenizer.json may ask for: bounds that are checked before the tokenizers crate sees the file, and a time limit for encoding.

use crate::event::Progress;
use serde::Deserialize;
use serde_json::Value;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

/// The fields of tokenizer.json that labpipe reads itself.
#[derive(Debug, Default, Deserialize)]
pub struct Head {
    #[serde(default)]
    pub added_tokens: Vec<Value>,
    #[serde(default)]
    pub normalizer: Value,
    #[serde(default)]
    pub pre_tokenizer: Value,
    #[serde(default)]
    pub model: ModelHead,
}

/// The fields of tokenizer.json's `model` that labpipe reads itself.
#[derive(Debug, Default, Deserialize)]
pub struct ModelHead {
    #[serde(default)]
    pub dropout: Option<f64>,
}

/// Bytes that a normalizer may make of one byte: added tokens are normalized when the file is read, before a text is there to
/// compare with. The composed forms that Unicode defines stay below 20, replacing spaces takes 3.
const MAX_FACTOR: f64 = 4096.0;
/// Most bytes that Unicode's compatible decomposition makes of one (U+FDFA: 3 to 33).
const NFKD_FACTOR: f64 = 11.0;
/// Most bytes that Unicode's canonical decomposition makes of one.
const NFD_FACTOR: f64 = 3.0;

/// Returns what is wrong with the parts of tokenizer.json that are not the tokenizers crate's to judge.
pub fn complaint(head: &Head) -> Option<String> {
    if let Some(dropout) = head.model.dropout.filter(|dropout| *dropout > 0.0) {
        return Some(format!(
            "its model drops merges at random (dropout {dropout}): no text has the same tokens twice; set it to null"
        ));
    }
    let bound = growth(&head.normalizer, Bound { factor: 1.0, added: 0.0 });
    (bound.factor + bound.added > MAX_FACTOR).then(|| {
        format!(
            "its normalizer may make {:.1e} bytes of one; labpipe reads normalizers that stay below {MAX_FACTOR:.0}",
            bound.factor + bound.added
        )
    })
}

/// Most bytes that come of a piece of n: factor * n + added.
#[derive(Clone, Copy)]
struct Bound {
    factor: f64,
    added: f64,
}

impl Bound {
    fn times(self, factor: f64) -> Bound {
        Bound { factor: self.factor * factor, added: self.added * factor }
    }
}

fn growth(normalizer: &Value, bound: Bound) -> Bound {
    let bytes = |value: &Value| value.as_str().map_or(0.0, |text| text.len() as f64);
    match normalizer["type"].as_str().unwrap_or_default() {
        "Sequence" => {
            normalizer["normalizers"].as_array().into_iter().flatten().fold(bound, |bound, one| growth(one, bound))
        }
        "Prepend" => Bound { added: bound.added + bytes(&normalizer["prepend"]), ..bound },
        "Replace" => {
            let content = bytes(&normalizer["content"]);
            match normalizer["pattern"]["String"].as_str() {
                Some(pattern) if !pattern.is_empty() => bound.times((content / pattern.len() as f64).max(1.0)),
                // It may match between any two bytes.
                _ => Bound { added: bound.added + content, ..bound.times(1.0 + content) },
            }
        }
        "NFKC" | "NFKD" => bound.times(NFKD_FACTOR),
        "NFC" | "NFD" | "BertNormalizer" => bound.times(NFD_FACTOR),
        // Every byte becomes a character of at most two.
        "ByteLevel" => bound.times(2.0),
        "Precompiled" => bound.times(NFKD_FACTOR),
        _ => bound,
    }
}

/// How often a waiting thread looks for Ctrl-C.
const POLL: Duration = Duration::from_millis(20);
/// Time that any text may take.
const FREE_TIME: Duration = Duration::from_secs(120);
/// Time per MiB of text beside it. Tokenizers do one to ten MiB per second.
const TIME_PER_MIB: Duration = Duration::from_secs(20);

/// Memory that rendering a chat may take. Templates can double lists without paying for it in steps.
pub const CHAT_MEMORY_BYTES: u64 = 1 << 30;

/// Why background work has no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Abandoned {
    Cancelled,
    TimedOut(Duration),
    /// The process's resident memory grew by more than these bytes meanwhile.
    OutOfBudget(u64),
    /// The thread ended without a result: it panicked, or there was none.
    Failed,
}

/// Does work on a thread of its own, so that Ctrl-C is heard meanwhile. A thread that is given up is told to stop; it ends at its next
/// look at the flag, or with the process.
pub fn in_background<T: Send + 'static>(
    progress: &dyn Progress,
    n_bytes: usize,
    work: impl FnOnce(&AtomicBool) -> T + Send + 'static,
) -> Result<T, Abandoned> {
    wait(progress, time_limit(n_bytes), u64::MAX, work)
}

/// Does work as [`in_background`] does, and gives it up where the process grows by more than `memory_bytes` meanwhile.
pub fn in_background_within<T: Send + 'static>(
    progress: &dyn Progress,
    n_bytes: usize,
    memory_bytes: u64,
    work: impl FnOnce(&AtomicBool) -> T + Send + 'static,
) -> Result<T, Abandoned> {
    wait(progress, time_limit(n_bytes), memory_bytes, work)
}

fn time_limit(n_bytes: usize) -> Duration {
    let mib = u32::try_from(n_bytes >> 20).unwrap_or(u32::MAX);
    FREE_TIME.saturating_add(TIME_PER_MIB.saturating_mul(mib))
}

/// Returns the process's resident memory; 0 on systems that have no /proc.
fn resident_bytes() -> u64 {
    const PAGE_BYTES: u64 = 4096;
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    text.split_whitespace().nth(1).and_then(|pages| pages.parse().ok()).map_or(0, |pages: u64| pages * PAGE_BYTES)
}

fn wait<T: Send + 'static>(
    progress: &dyn Progress,
    limit: Duration,
    memory_bytes: u64,
    work: impl FnOnce(&AtomicBool) -> T + Send + 'static,
) -> Result<T, Abandoned> {
    let (sender, receiver) = sync_channel(1);
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    let thread = std::thread::Builder::new().name("tokenize".to_owned());
    let spawned = thread.spawn(move || _ = sender.send(work(&flag)));
    if spawned.is_err() {
        return Err(Abandoned::Failed);
    }
    let (start, resident_before) = (Instant::now(), resident_bytes());
    let has_grown = || memory_bytes < u64::MAX && resident_bytes().saturating_sub(resident_before) > memory_bytes;
    loop {
        let abandoned = match receiver.recv_timeout(POLL) {
            Ok(result) => return Ok(result),
            Err(RecvTimeoutError::Disconnected) => return Err(Abandoned::Failed),
            Err(RecvTimeoutError::Timeout) if progress.is_cancelled() => Abandoned::Cancelled,
            Err(RecvTimeoutError::Timeout) if start.elapsed() > limit => Abandoned::TimedOut(limit),
            Err(RecvTimeoutError::Timeout) if has_grown() => Abandoned::OutOfBudget(memory_bytes),
            Err(RecvTimeoutError::Timeout) => continue,
        };
        stop.store(true, Ordering::Relaxed);
        return Err(abandoned);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Level, NullProgress};
    use serde_json::json;

    fn complaint_of(normalizer: Value) -> Option<String> {
        complaint(&Head { normalizer, ..Head::default() })
    }

    fn sequence(step: &Value, n: usize) -> Value {
        json!({ "type": "Sequence", "normalizers": vec![step.clone(); n] })
    }

    #[test]
    fn normalizers_that_double_are_refused_and_usual_ones_are_not() {
        let double = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
        let by_regex = json!({"type": "Replace", "pattern": {"Regex": "a"}, "content": "aa"});
        let bytes = json!({"type": "ByteLevel"});
        for step in [&double, &by_regex, &bytes] {
            assert!(complaint_of(sequence(step, 40)).is_some_and(|reason| reason.contains("bytes of one")), "{step}");
            assert_eq!(complaint_of(sequence(&sequence(step, 1), 3)), None, "{step}");
        }
        // Each adds to the piece, none multiplies it.
        let prepend = json!({"type": "Prepend", "prepend": "▁"});
        assert_eq!(complaint_of(sequence(&prepend, 100)), None);
        let llama = json!({"type": "Sequence", "normalizers": [prepend, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
        assert_eq!(complaint_of(llama), None);
        let albert = json!({"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": "``"}, "content": "\""}, {"type": "NFKD"}, {"type": "StripAccents"},
            {"type": "Lowercase"}, {"type": "Precompiled"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]});
        assert_eq!(complaint_of(albert), None);
        let random = Head { model: ModelHead { dropout: Some(0.1) }, ..Head::default() };
        assert!(complaint(&random).is_some_and(|reason| reason.contains("dropout 0.1")));
    }

    struct Stopped;

    impl Progress for Stopped {
        fn begin(&self, _total: Option<u64>, _unit: &str) {}
        fn advance(&self, _n: u64) {}
        fn note(&self, _level: Level, _text: &str) {}
        fn is_cancelled(&self) -> bool {
            true
        }
    }

    /// Ends only when it is told to, and says so.
    fn endless(ended: std::sync::mpsc::Sender<()>) -> impl FnOnce(&AtomicBool) + Send {
        move |stop| {
            while !stop.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            _ = ended.send(());
        }
    }

    #[test]
    fn work_is_given_up_on_ctrl_c_and_when_its_time_is_over() {
        let (sender, ended) = std::sync::mpsc::channel();
        assert_eq!(wait(&Stopped, FREE_TIME, u64::MAX, endless(sender.clone())), Err(Abandoned::Cancelled));
        assert_eq!(ended.recv(), Ok(()));
        let limit = Duration::ZERO;
        assert_eq!(wait(&NullProgress, limit, u64::MAX, endless(sender.clone())), Err(Abandoned::TimedOut(limit)));
        assert_eq!(ended.recv(), Ok(()));
        let hungry = move |stop: &AtomicBool| {
            // 64 MiB that are really written.
            let held = vec![1u8; 64 << 20];
            endless(sender)(stop);
            held.len()
        };
        assert_eq!(wait(&NullProgress, FREE_TIME, 32 << 20, hungry), Err(Abandoned::OutOfBudget(32 << 20)));
        assert_eq!(ended.recv(), Ok(()));
        assert_eq!(in_background(&NullProgress, 1, |_| 7), Ok(7));
        assert_eq!(in_background(&NullProgress, 1, |_| panic!("on purpose")), Err::<(), _>(Abandoned::Failed));
    }
}
