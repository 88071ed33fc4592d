//! `results/metrics.csv`: one row per model measured in a run, appended whole under a lock.

use super::error::StoreError;
use super::fs::create_dirs;
use super::quirks::{is_unsupported, note_once};
use crate::artifact::number;
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

/// One row; empty cells are what was not measured.
#[derive(Debug, Clone, PartialEq, Serialize, Default)]
pub struct MetricsRow {
    /// RFC 3339, UTC.
    pub ts: String,
    pub model: String,
    pub quant_method: String,
    pub load_8bit: bool,
    pub load_4bit: bool,
    pub quant_type: String,
    /// Tokens.
    pub prompt_length: Option<u64>,
    /// Tokens per second.
    #[serde(serialize_with = "number::optional::serialize")]
    pub avg_prefill_tps: Option<f64>,
    /// Tokens per second.
    #[serde(serialize_with = "number::optional::serialize")]
    pub avg_decode_tps: Option<f64>,
    /// 10⁹ bytes of device memory; empty on a CPU.
    pub max_vram_gb: Option<f64>,
    /// `inf` and `nan` where it is not finite.
    #[serde(serialize_with = "number::optional::serialize")]
    pub perplexity: Option<f64>,
    pub gpu_name: String,
    /// The most that it took to run the model; empty where it was not measured.
    pub memory_bytes: Option<u64>,
}

/// Appends rows, with a header where the file is new.
///
/// # Errors
/// `Io`, `Format`.
pub fn append_metrics_csv(path: &Path, rows: &[MetricsRow]) -> Result<(), StoreError> {
    if let Some(parent) = path.parent() {
        create_dirs(parent)?;
    }
    let mut file = OpenOptions::new().create(true).append(true).open(path).map_err(StoreError::io("open", path))?;
    // Two processes may end at once: the lock keeps their rows, and the one header, whole.
    match file.lock() {
        Err(error) if is_unsupported(&error) => note_once(
            "flock",
            format!(
                "the file system of {} has no locks ({error}): two runs that end at once may mix their rows",
                path.display()
            ),
        ),
        other => other.map_err(StoreError::io("lock", path))?,
    }
    let ending = last_byte(path).map_err(StoreError::io("read", path))?;
    let is_new = ending.is_none();
    let mut writer = csv::WriterBuilder::new().has_headers(is_new).from_writer(Vec::new());
    let format = |error: String| StoreError::Format { path: path.to_owned(), reason: error };
    for row in rows {
        writer.serialize(row).map_err(|error| format(error.to_string()))?;
    }
    let mut bytes = writer.into_inner().map_err(|error| format(error.to_string()))?;
    if ending.is_some_and(|byte| byte != b'\n') {
        // A last line without its end: an editor left it so, or a disk was full.
        bytes.insert(0, b'\n');
    }
    file.write_all(&bytes).map_err(StoreError::io("append to", path))
}

/// Returns a file's last byte; `None` where it is empty.
fn last_byte(path: &Path) -> std::io::Result<Option<u8>> {
    let mut file = File::open(path)?;
    if file.metadata()?.len() == 0 {
        return Ok(None);
    }
    file.seek(SeekFrom::End(-1))?;
    let mut byte = [0];
    file.read_exact(&mut byte)?;
    Ok(Some(byte[0]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_two_writers_stay_whole_under_one_header() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("metrics.csv");
        std::thread::scope(|scope| {
            for model in ["a", "b"] {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..50 {
                        let row = MetricsRow { model: model.to_owned(), ..MetricsRow::default() };
                        append_metrics_csv(path, &[row]).expect("a row");
                    }
                });
            }
        });
        let text = std::fs::read_to_string(&path).expect("the file");
        assert_eq!(text.lines().count(), 101);
        assert_eq!(text.lines().filter(|line| line.starts_with("ts,model,quant_method")).count(), 1);
    }

    #[test]
    fn numbers_that_are_not_finite_have_their_words() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("metrics.csv");
        let (avg_decode_tps, perplexity) = (Some(f64::NAN), Some(f64::INFINITY));
        append_metrics_csv(&path, &[MetricsRow { avg_decode_tps, perplexity, ..MetricsRow::default() }])
            .expect("a row");
        let text = std::fs::read_to_string(&path).expect("the file");
        assert!(text.trim_end().ends_with(",,nan,,inf,,"), "{text}");
    }

    #[test]
    fn a_row_is_not_appended_to_a_line_that_was_cut() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("metrics.csv");
        append_metrics_csv(&path, &[MetricsRow::default()]).expect("a row");
        let whole = std::fs::read_to_string(&path).expect("the file");
        std::fs::write(&path, whole.trim_end()).expect("an edit");
        append_metrics_csv(&path, &[MetricsRow { model: "b".to_owned(), ..MetricsRow::default() }]).expect("a row");
        let text = std::fs::read_to_string(&path).expect("the file");
        assert!(text.starts_with(&whole) && text.lines().count() == 3 && text.ends_with('\n'), "{text}");
    }
}
