//! Log-probabilities of a base model as Parquet: a row a scored token, written as they are computed and read back in order,
//! a bounded piece at a time.
//!
//! Columns: `log_probs` (f32, `[vocab_size]` or `[k]`) or `below_max` (f16, max ln p − ln p, `[vocab_size]`); for the top k
//! also `ids` and `tail` (probability of all other tokens). zstd, row groups of at most 4 MiB before compression.

use super::error::StoreError;
use crate::artifact::FORMAT_VERSION;
use crate::inference::{LogProbFormat, LogProbRows, LogProbSink, LogProbSource};
use arrow::array::{Array, ArrayRef, AsArray, FixedSizeListArray, Float16Array, Float32Array, UInt32Array};
use arrow::datatypes::{DataType, Field, Float16Type, Float32Type, Schema, UInt32Type};
use arrow::record_batch::RecordBatch;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bounds what writer and reader hold.
const GROUP_BYTES: u64 = 4 << 20;

/// Writes one file.
pub struct LogProbWriter {
    path: PathBuf,
    schema: Arc<Schema>,
    width: usize,
    writer: ArrowWriter<File>,
    n_rows: usize,
}

impl LogProbWriter {
    /// Creates the file.
    ///
    /// # Errors
    /// `Io`, `Parquet`.
    pub fn create(path: &Path, format: LogProbFormat, vocab_size: usize) -> Result<LogProbWriter, StoreError> {
        let fail = |reason: String| StoreError::Parquet { path: path.to_owned(), reason };
        let width = width(format, vocab_size);
        let size = i32::try_from(width).map_err(|error| fail(error.to_string()))?;
        let list = |name: &str, ty: DataType| {
            Field::new(name, DataType::FixedSizeList(Arc::new(Field::new("element", ty, false)), size), false)
        };
        let fields = match format {
            LogProbFormat::F32 => vec![list("log_probs", DataType::Float32)],
            LogProbFormat::F16 => vec![list("below_max", DataType::Float16)],
            LogProbFormat::TopK(_) => vec![
                list("ids", DataType::UInt32),
                list("log_probs", DataType::Float32),
                Field::new("tail", DataType::Float32, false),
            ],
        };
        let schema = Arc::new(Schema::new(fields));
        let metadata = [
            ("labpipe.format_version", FORMAT_VERSION.to_string()),
            ("labpipe.log_probs", format.name().to_owned()),
            ("labpipe.vocab_size", vocab_size.to_string()),
        ];
        let group_rows = (GROUP_BYTES / format.bytes_per_token(vocab_size).max(1)).max(1);
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .set_dictionary_enabled(false)
            // Nobody filters by them, and a smallest f16 would hold on to the whole page that it is a slice of.
            .set_statistics_enabled(EnabledStatistics::None)
            .set_max_row_group_row_count(usize::try_from(group_rows).ok())
            .set_key_value_metadata(Some(metadata.map(|(key, value)| KeyValue::new(key.to_owned(), value)).to_vec()))
            .build();
        let out = File::create(path).map_err(StoreError::io("create", path))?;
        let writer = ArrowWriter::try_new(out, Arc::clone(&schema), Some(properties))
            .map_err(|error| fail(error.to_string()))?;
        Ok(LogProbWriter { path: path.to_owned(), schema, width, writer, n_rows: 0 })
    }

    fn append(&mut self, rows: LogProbRows) -> Result<(), String> {
        let n_rows = rows.n_rows(self.width);
        let columns: Vec<ArrayRef> = match rows {
            LogProbRows::F32(values) => vec![self.list(0, Arc::new(Float32Array::from(values)))?],
            LogProbRows::F16(values) => vec![self.list(0, Arc::new(Float16Array::from(values)))?],
            LogProbRows::TopK { ids, log_probs, tail, .. } => vec![
                self.list(0, Arc::new(UInt32Array::from(ids)))?,
                self.list(1, Arc::new(Float32Array::from(log_probs)))?,
                Arc::new(Float32Array::from(tail)),
            ],
        };
        let batch = RecordBatch::try_new(Arc::clone(&self.schema), columns).map_err(|error| error.to_string())?;
        self.writer.write(&batch).map_err(|error| error.to_string())?;
        self.n_rows += n_rows;
        Ok(())
    }

    fn list(&self, column_idx: usize, elements: ArrayRef) -> Result<ArrayRef, String> {
        let DataType::FixedSizeList(field, size) = self.schema.field(column_idx).data_type() else {
            return Err("the rows are of another format than the file".to_owned());
        };
        let list = FixedSizeListArray::try_new(Arc::clone(field), *size, elements, None);
        Ok(Arc::new(list.map_err(|error| error.to_string())?))
    }

    /// Writes the footer; returns the number of rows.
    ///
    /// # Errors
    /// `Parquet`.
    pub fn finish(self) -> Result<usize, StoreError> {
        let path = self.path;
        self.writer.close().map_err(|error| StoreError::Parquet { path, reason: error.to_string() })?;
        Ok(self.n_rows)
    }
}

impl LogProbSink for LogProbWriter {
    fn take(&mut self, rows: LogProbRows) -> Result<(), String> {
        let path = self.path.display().to_string();
        self.append(rows).map_err(|reason| format!("write {path}: {reason}"))
    }
}

/// Values that one row has.
fn width(format: LogProbFormat, vocab_size: usize) -> usize {
    match format {
        LogProbFormat::F32 | LogProbFormat::F16 => vocab_size,
        LogProbFormat::TopK(k) => k.min(vocab_size),
    }
}

/// Reads one file from its beginning.
pub struct LogProbReader {
    path: PathBuf,
    reader: ParquetRecordBatchReader,
    /// Rows that were read and not yet given, from `next` on.
    batch: Option<RecordBatch>,
    next: usize,
}

impl LogProbReader {
    /// Opens a file, checking that it holds rows of that format over that vocabulary.
    ///
    /// # Errors
    /// `Io`, `Format`.
    pub fn open(path: &Path, format: LogProbFormat, vocab_size: usize) -> Result<LogProbReader, StoreError> {
        let fail = |reason: String| StoreError::Format { path: path.to_owned(), reason };
        let file = File::open(path).map_err(StoreError::io("read", path))?;
        let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|error| fail(error.to_string()))?;
        let metadata = builder.metadata().file_metadata().key_value_metadata();
        let value = |name: &str| {
            let entry = metadata.into_iter().flatten().find(|entry| entry.key == format!("labpipe.{name}"));
            entry.and_then(|entry| entry.value.clone()).unwrap_or_default()
        };
        for (name, expected) in [
            ("format_version", FORMAT_VERSION.to_string()),
            ("log_probs", format.name().to_owned()),
            ("vocab_size", vocab_size.to_string()),
        ] {
            let found = value(name);
            if found != expected {
                return Err(fail(format!("{name} is {found:?}, expected {expected:?}")));
            }
        }
        let batch_rows = (GROUP_BYTES / format.bytes_per_token(vocab_size).max(1)).clamp(1, 4096);
        let reader = builder.with_batch_size(batch_rows as usize).build().map_err(|error| fail(error.to_string()))?;
        Ok(LogProbReader { path: path.to_owned(), reader, batch: None, next: 0 })
    }

    fn read(&mut self, n_rows: usize) -> Result<LogProbRows, String> {
        let mut rows: Option<LogProbRows> = None;
        let mut n_missing = n_rows;
        while n_missing > 0 {
            let batch = match self.batch.take() {
                Some(batch) => batch,
                None => {
                    self.next = 0;
                    let next = self.reader.next().ok_or_else(|| format!("{n_missing} rows are missing at its end"))?;
                    next.map_err(|error| error.to_string())?
                }
            };
            let n_taken = n_missing.min(batch.num_rows() - self.next);
            let piece = unpack(&batch.slice(self.next, n_taken))?;
            match &mut rows {
                None => rows = Some(piece),
                Some(rows) => extend(rows, piece)?,
            }
            self.next += n_taken;
            n_missing -= n_taken;
            if self.next < batch.num_rows() {
                self.batch = Some(batch);
            }
        }
        rows.ok_or_else(|| "no rows were asked for".to_owned())
    }
}

impl LogProbSource for LogProbReader {
    fn next_rows(&mut self, n_rows: usize) -> Result<LogProbRows, String> {
        let path = self.path.display().to_string();
        self.read(n_rows).map_err(|reason| format!("read {path}: {reason}; run the base stage again with --force"))
    }
}

/// Returns the elements of a list column within the slice that `batch` is, and the width of a row.
fn elements(batch: &RecordBatch, name: &str) -> Result<Option<(ArrayRef, usize)>, String> {
    let Some(column) = batch.column_by_name(name) else { return Ok(None) };
    let list = column.as_fixed_size_list_opt().ok_or_else(|| format!("{name} is no fixed-size list"))?;
    let width = list.value_length() as usize;
    Ok(Some((list.values().slice(list.offset() * width, list.len() * width), width)))
}

fn unpack(batch: &RecordBatch) -> Result<LogProbRows, String> {
    let of = |name: &str| format!("{name} is of another type");
    if let Some((values, _)) = elements(batch, "below_max")? {
        let values = values.as_primitive_opt::<Float16Type>().ok_or_else(|| of("below_max"))?;
        return Ok(LogProbRows::F16(values.values().to_vec()));
    }
    let (values, k) = elements(batch, "log_probs")?.ok_or_else(|| "no column log_probs".to_owned())?;
    let log_probs = values.as_primitive_opt::<Float32Type>().ok_or_else(|| of("log_probs"))?.values().to_vec();
    let Some((ids, _)) = elements(batch, "ids")? else { return Ok(LogProbRows::F32(log_probs)) };
    let ids = ids.as_primitive_opt::<UInt32Type>().ok_or_else(|| of("ids"))?.values().to_vec();
    let tail = batch.column_by_name("tail").and_then(|column| column.as_primitive_opt::<Float32Type>());
    let tail = tail.ok_or_else(|| "no column tail".to_owned())?.values().to_vec();
    Ok(LogProbRows::TopK { k, ids, log_probs, tail })
}

fn extend(rows: &mut LogProbRows, more: LogProbRows) -> Result<(), String> {
    match (rows, more) {
        (LogProbRows::F32(rows), LogProbRows::F32(more)) => rows.extend(more),
        (LogProbRows::F16(rows), LogProbRows::F16(more)) => rows.extend(more),
        (
            LogProbRows::TopK { ids, log_probs, tail, .. },
            LogProbRows::TopK { ids: more_ids, log_probs: more_log_probs, tail: more_tail, .. },
        ) => {
            ids.extend(more_ids);
            log_probs.extend(more_log_probs);
            tail.extend(more_tail);
        }
        _ => return Err("its rows change their format".to_owned()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn logits(n_rows: usize, vocab_size: usize) -> Vec<f32> {
        (0..n_rows * vocab_size).map(|i| ((i * 31) % 97) as f32 / 9.0).collect()
    }

    proptest! {
        #[test]
        fn rows_come_back_in_order_however_they_are_taken(
            written in prop::collection::vec(1usize..9, 1..6), read in 1usize..7, format_idx in 0usize..3
        ) {
            let vocab_size = 40;
            let format = [LogProbFormat::F32, LogProbFormat::F16, LogProbFormat::TopK(5)][format_idx];
            let dir = tempfile::tempdir().expect("a temporary folder");
            let path = dir.path().join("log_probs.parquet");
            let n_rows: usize = written.iter().sum();
            let logits = logits(n_rows, vocab_size);
            let mut writer = LogProbWriter::create(&path, format, vocab_size).expect("a writer");
            let mut first = 0;
            for n in written {
                let rows = LogProbRows::pack(format, &logits[first * vocab_size..(first + n) * vocab_size], vocab_size);
                writer.take(rows.expect("finite logits")).expect("room");
                first += n;
            }
            prop_assert_eq!(writer.finish().expect("a footer"), n_rows);
            let mut reader = LogProbReader::open(&path, format, vocab_size).expect("a reader");
            let mut found = LogProbRows::empty(format);
            let mut left = n_rows;
            while left > 0 {
                let n = left.min(read);
                extend(&mut found, reader.next_rows(n).expect("rows")).expect("the same format");
                left -= n;
            }
            prop_assert_eq!(found, LogProbRows::pack(format, &logits, vocab_size).expect("finite logits"));
            prop_assert!(reader.next_rows(1).expect_err("the end").contains("1 rows are missing"));
        }
    }

    #[test]
    fn other_formats_vocabularies_and_cut_files_are_errors() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("log_probs.parquet");
        let mut writer = LogProbWriter::create(&path, LogProbFormat::F16, 10).expect("a writer");
        let other = LogProbRows::pack(LogProbFormat::F32, &[0.0; 10], 10).expect("finite logits");
        assert!(writer.take(other).is_err());
        writer.finish().expect("a footer");
        assert!(LogProbReader::open(&path, LogProbFormat::F16, 10).is_ok());
        assert!(LogProbReader::open(&path, LogProbFormat::F32, 10).is_err());
        assert!(LogProbReader::open(&path, LogProbFormat::F16, 11).is_err());
        std::fs::write(&path, b"PAR1xxxx").expect("a file");
        assert!(LogProbReader::open(&path, LogProbFormat::F16, 10).is_err());
    }
}
