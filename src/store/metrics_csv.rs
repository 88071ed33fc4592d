//! `results/metrics.csv`: one row per model measured in a run, appended whole under a lock.

use super::error::StoreError;
use super::fs::create_dirs;
use super::quirks::{is_unsupported, note_once};
use crate::artifact::number;
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::io::Write;
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
    /// `config=int8`, where the model belongs to a cell of a matrix.
    pub cell: String,
    /// CPU or GPU that measured it.
    pub device: String,
    pub run_id: String,
    pub pipeline: String,
    /// Name of what the model was loaded from, its hash, and the element types in it.
    pub model_file: String,
    pub model_blake3: String,
    pub source_types: String,
    /// The most that it took to run the model; empty where it was not measured.
    pub memory_bytes: Option<u64>,
}

/// Appends rows, with a header where the file is new. A file of an earlier labpipe, which had fewer columns, gets the new header and
/// empty cells in its rows.
///
/// # Errors
/// `Io`; `Format` for a file with other columns, which is left as it is.
pub fn append_metrics_csv(path: &Path, rows: &[MetricsRow]) -> Result<(), StoreError> {
    if let Some(parent) = path.parent() {
        create_dirs(parent)?;
    }
    let mut file = open_locked(path)?;
    let header = header();
    let format = |reason: String| StoreError::Format { path: path.to_owned(), reason };
    let before = std::fs::read(path).map_err(StoreError::io("read", path))?;
    let ending = before.last().copied();
    if !before.is_empty() && !before.starts_with(format!("{header}\n").as_bytes()) {
        let widened = widened(&before, &header).map_err(format)?;
        let new = path.with_extension("csv.new");
        replace(&new, path, &widened)?;
        drop(file);
        file = open_locked(path)?;
    }
    let mut writer = csv::WriterBuilder::new().has_headers(before.is_empty()).from_writer(Vec::new());
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

/// Opens the file and locks it. Two processes may end at once: the lock keeps their rows, and the one header, whole.
fn open_locked(path: &Path) -> Result<File, StoreError> {
    loop {
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(StoreError::io("open", path))?;
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
        // While this one waited another process may have put a wider file in its place.
        if is_at(&file, path) {
            return Ok(file);
        }
    }
}

/// Returns true if a file is still the one at a path.
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(opened), Ok(there)) => (opened.dev(), opened.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

fn replace(new: &Path, path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let written = File::create(new).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(StoreError::io("write", new))?;
    std::fs::rename(new, path).map_err(StoreError::io("rename to", path))
}

/// Returns the first line, without its end.
fn header() -> String {
    let mut writer = csv::Writer::from_writer(Vec::new());
    // A row of plain values serializes, and its bytes are what was written.
    let _ = writer.serialize(MetricsRow::default());
    let bytes = writer.into_inner().unwrap_or_default();
    String::from_utf8_lossy(&bytes).lines().next().unwrap_or_default().to_owned()
}

/// Returns a file with the new header in place of a shorter one, its rows filled up with empty cells.
fn widened(before: &[u8], header: &str) -> Result<Vec<u8>, String> {
    let mut reader = csv::ReaderBuilder::new().flexible(true).has_headers(false).from_reader(before);
    let mut records = reader.records();
    let first = records.next().and_then(Result::ok).unwrap_or_default();
    let names: Vec<&str> = header.split(',').collect();
    if first.len() >= names.len() || !first.iter().eq(names.iter().copied().take(first.len())) {
        return Err("its columns are not those that labpipe writes; move it away and run again".to_owned());
    }
    let mut writer = csv::Writer::from_writer(Vec::new());
    let failed = |error: csv::Error| error.to_string();
    writer.write_record(&names).map_err(failed)?;
    for record in records {
        let record = record.map_err(failed)?;
        let empty = std::iter::repeat_n("", names.len().saturating_sub(record.len()));
        writer.write_record(record.iter().chain(empty)).map_err(failed)?;
    }
    writer.into_inner().map_err(|error| error.to_string())
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
        assert!(text.trim_end().ends_with(",,nan,,inf,,,,,,,,,"), "{text}");
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

    #[test]
    fn a_file_with_fewer_columns_is_widened_and_one_with_others_left_alone() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("metrics.csv");
        let old = "ts,model,quant_method,load_8bit,load_4bit,quant_type,prompt_length,avg_prefill_tps,avg_decode_tps,max_vram_gb,perplexity,gpu_name";
        std::fs::write(&path, format!("{old}\n2026,a,none,false,false,,,,1.5,,9.06,\n")).expect("a file");
        append_metrics_csv(&path, &[MetricsRow { model: "b".to_owned(), ..MetricsRow::default() }]).expect("a row");
        let mut reader = csv::Reader::from_path(&path).expect("the file");
        let n_columns = reader.headers().expect("a header").len();
        let rows: Vec<csv::StringRecord> = reader.records().map(|row| row.expect("a whole row")).collect();
        assert_eq!((rows.len(), rows[0].len(), rows[1].len()), (2, n_columns, n_columns));
        assert_eq!((&rows[0][1], &rows[0][8], &rows[1][1]), ("a", "1.5", "b"));
        assert!(!path.with_extension("csv.new").exists());
        std::fs::write(&path, "mine,yours\n1,2\n").expect("a file");
        let error = append_metrics_csv(&path, &[MetricsRow::default()]).expect_err("other columns").to_string();
        assert!(error.contains("metrics.csv") && error.contains("move it away"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).expect("the file"), "mine,yours\n1,2\n");
    }
}
