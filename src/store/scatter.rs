//! Pairs of values, reference against candidate, sampled for plots: one Parquet file for all modules.

use super::error::StoreError;
use arrow::array::{ArrayRef, AsArray, Float32Array, StringArray};
use arrow::datatypes::{DataType, Field, Float32Type, Schema};
use arrow::record_batch::RecordBatch;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Writes the file, a module at a time.
pub struct ScatterWriter {
    path: PathBuf,
    schema: Arc<Schema>,
    writer: ArrowWriter<File>,
}

impl ScatterWriter {
    /// Creates the file.
    ///
    /// # Errors
    /// `Io`, `Parquet`.
    pub fn create(path: &Path) -> Result<ScatterWriter, StoreError> {
        let schema = Arc::new(Schema::new(vec![
            Field::new("module", DataType::Utf8, false),
            Field::new("reference", DataType::Float32, false),
            Field::new("candidate", DataType::Float32, false),
        ]));
        let properties = WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::default())).build();
        let out = File::create(path).map_err(StoreError::io("create", path))?;
        let writer = ArrowWriter::try_new(out, Arc::clone(&schema), Some(properties));
        let fail = |error: parquet::errors::ParquetError| StoreError::Parquet {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        Ok(ScatterWriter { path: path.to_owned(), schema, writer: writer.map_err(fail)? })
    }

    /// Appends a module's pairs.
    ///
    /// # Errors
    /// `Parquet`.
    pub fn append(&mut self, module: &str, pairs: &[(f32, f32)]) -> Result<(), StoreError> {
        let fail = |reason: String| StoreError::Parquet { path: self.path.clone(), reason };
        let columns: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from(vec![module; pairs.len()])),
            Arc::new(Float32Array::from_iter_values(pairs.iter().map(|(reference, _)| *reference))),
            Arc::new(Float32Array::from_iter_values(pairs.iter().map(|(_, candidate)| *candidate))),
        ];
        let batch = RecordBatch::try_new(Arc::clone(&self.schema), columns).map_err(|error| fail(error.to_string()))?;
        self.writer.write(&batch).map_err(|error| fail(error.to_string()))
    }

    /// Writes the footer.
    ///
    /// # Errors
    /// `Parquet`.
    pub fn finish(self) -> Result<(), StoreError> {
        let path = self.path;
        self.writer.close().map(|_| ()).map_err(|error| StoreError::Parquet { path, reason: error.to_string() })
    }
}

/// A module's name and its pairs (reference, candidate).
pub type ModulePairs = (String, Vec<(f32, f32)>);

/// Returns every module's pairs, in the order in which they were written.
///
/// # Errors
/// `Io`, `Format`.
pub fn read_scatter(path: &Path) -> Result<Vec<ModulePairs>, StoreError> {
    let fail = |reason: String| StoreError::Format { path: path.to_owned(), reason };
    let file = File::open(path).map_err(StoreError::io("read", path))?;
    let reader = ParquetRecordBatchReaderBuilder::try_new(file).and_then(|builder| builder.build());
    let mut found: Vec<ModulePairs> = Vec::new();
    for batch in reader.map_err(|error| fail(error.to_string()))? {
        let batch = batch.map_err(|error| fail(error.to_string()))?;
        let modules = batch.column(0).as_string_opt::<i32>().ok_or_else(|| fail("module is no text".to_owned()))?;
        let numbers = |column: usize| batch.column(column).as_primitive_opt::<Float32Type>();
        let (Some(reference), Some(candidate)) = (numbers(1), numbers(2)) else {
            return Err(fail("reference or candidate is no Float32".to_owned()));
        };
        for (row, module) in modules.iter().flatten().enumerate() {
            if found.last().is_none_or(|(last, _)| last != module) {
                found.push((module.to_owned(), Vec::new()));
            }
            if let Some((_, pairs)) = found.last_mut() {
                pairs.push((reference.value(row), candidate.value(row)));
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_come_back_by_module_in_their_order() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("scatter.parquet");
        let mut writer = ScatterWriter::create(&path).expect("a writer");
        writer.append("b", &[(1.0, 2.0), (3.0, 4.0)]).expect("pairs");
        writer.append("a", &[(5.0, 6.0)]).expect("pairs");
        writer.finish().expect("a footer");
        let found = read_scatter(&path).expect("pairs");
        assert_eq!(found, [("b".to_owned(), vec![(1.0, 2.0), (3.0, 4.0)]), ("a".to_owned(), vec![(5.0, 6.0)])]);
    }
}
