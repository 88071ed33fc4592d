//! Activations as Parquet: one file a tensor, one row a token, written as they come and read back in bounded pieces.

use super::error::StoreError;
use crate::artifact::FORMAT_VERSION;
use crate::units::DType;
use arrow::array::{
    Array, ArrayRef, AsArray, FixedSizeListArray, Float16Array, Float32Array, Int32Array, StringArray, UInt32Array,
};
use arrow::datatypes::{DataType, Field, Float16Type, Float32Type, Schema};
use arrow::record_batch::RecordBatch;
use half::f16;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use parquet::schema::types::ColumnPath;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Values of a row group take about this many bytes: bounds what writer and reader hold.
const GROUP_BYTES: usize = 4 << 20;

/// What a file's metadata says.
#[derive(Debug, Clone, PartialEq)]
pub struct ActivationFile {
    pub module: String,
    pub port: String,
    pub layer_idx: Option<usize>,
    pub op: String,
    pub width: usize,
    /// F32, or F16 where compute is f16.
    pub dtype: DType,
    /// The model, in words.
    pub model: String,
    /// Key of the stage that captured it.
    pub key: String,
}

/// Writes one tensor's file.
pub struct ActivationWriter {
    path: PathBuf,
    file: ActivationFile,
    schema: Arc<Schema>,
    writer: ArrowWriter<File>,
    n_rows: usize,
}

fn schema(file: &ActivationFile) -> Result<Arc<Schema>, String> {
    let value = if file.dtype == DType::F16 { DataType::Float16 } else { DataType::Float32 };
    let width = i32::try_from(file.width).map_err(|error| error.to_string())?;
    let list = DataType::FixedSizeList(Arc::new(Field::new("element", value, false)), width);
    Ok(Arc::new(Schema::new(vec![
        Field::new("layer_idx", DataType::Int32, true),
        Field::new("op", DataType::Utf8, false),
        Field::new("token_idx", DataType::UInt32, false),
        Field::new("token_id", DataType::UInt32, false),
        Field::new("values", list, false),
    ])))
}

fn properties(file: &ActivationFile) -> WriterProperties {
    let values = ColumnPath::from(vec!["values".to_owned(), "list".to_owned(), "element".to_owned()]);
    let metadata = [
        ("labpipe.format_version", FORMAT_VERSION.to_string()),
        ("labpipe.model", file.model.clone()),
        ("labpipe.key", file.key.clone()),
        ("labpipe.module", file.module.clone()),
        ("labpipe.port", file.port.clone()),
    ];
    let group_rows = (GROUP_BYTES / (file.width.max(1) * file.dtype.size_bytes())).max(1);
    let builder = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_max_row_group_row_count(Some(group_rows))
        .set_column_dictionary_enabled(values.clone(), false)
        .set_key_value_metadata(Some(metadata.map(|(key, value)| KeyValue::new(key.to_owned(), value)).to_vec()));
    // DuckDB refuses byte-stream-split on Float16.
    match file.dtype {
        DType::F32 => builder.set_column_encoding(values, Encoding::BYTE_STREAM_SPLIT).build(),
        _ => builder.build(),
    }
}

impl ActivationWriter {
    /// Creates the file.
    ///
    /// # Errors
    /// `Io`, `Parquet`.
    pub fn create(path: &Path, file: ActivationFile) -> Result<ActivationWriter, StoreError> {
        let fail = |reason: String| StoreError::Parquet { path: path.to_owned(), reason };
        let schema = schema(&file).map_err(fail)?;
        let out = File::create(path).map_err(StoreError::io("create", path))?;
        let writer = ArrowWriter::try_new(out, Arc::clone(&schema), Some(properties(&file)))
            .map_err(|error| fail(error.to_string()))?;
        Ok(ActivationWriter { path: path.to_owned(), file, schema, writer, n_rows: 0 })
    }

    /// Appends rows.
    ///
    /// # Shapes
    /// `values` `[token_ids.len(), width]`, row-major; `first_token_idx` is the position of the first row.
    ///
    /// # Errors
    /// `Parquet`, a full disk among them.
    pub fn append(&mut self, first_token_idx: usize, token_ids: &[u32], values: &[f32]) -> Result<(), StoreError> {
        let batch = self.batch(first_token_idx, token_ids, values);
        let batch = batch.map_err(|reason| StoreError::Parquet { path: self.path.clone(), reason })?;
        self.n_rows += token_ids.len();
        self.writer.write(&batch).map_err(|error| write_error(&self.path, error))
    }

    fn batch(&self, first_token_idx: usize, token_ids: &[u32], values: &[f32]) -> Result<RecordBatch, String> {
        let (n, width) = (token_ids.len(), self.file.width);
        if values.len() != n * width {
            return Err(format!("{} values do not fill {n} rows of {width}", values.len()));
        }
        let elements: ArrayRef = match self.file.dtype {
            DType::F16 => Arc::new(Float16Array::from_iter_values(values.iter().map(|v| f16::from_f32(*v)))),
            _ => Arc::new(Float32Array::from(values.to_vec())),
        };
        let DataType::FixedSizeList(field, size) = self.schema.field(4).data_type() else {
            return Err("the values column is no list".to_owned());
        };
        let list = FixedSizeListArray::try_new(Arc::clone(field), *size, elements, None).map_err(|e| e.to_string())?;
        let layer_idx = self.file.layer_idx.and_then(|idx| i32::try_from(idx).ok());
        let first = u32::try_from(first_token_idx).map_err(|error| error.to_string())?;
        let columns: Vec<ArrayRef> = vec![
            Arc::new(Int32Array::from(vec![layer_idx; n])),
            Arc::new(StringArray::from(vec![self.file.op.as_str(); n])),
            Arc::new(UInt32Array::from_iter_values((first..).take(n))),
            Arc::new(UInt32Array::from(token_ids.to_vec())),
            Arc::new(list),
        ];
        RecordBatch::try_new(Arc::clone(&self.schema), columns).map_err(|error| error.to_string())
    }

    /// Writes the footer; returns the number of rows.
    ///
    /// # Errors
    /// `Parquet`.
    pub fn finish(self) -> Result<usize, StoreError> {
        self.writer.close().map_err(|error| write_error(&self.path, error))?;
        Ok(self.n_rows)
    }
}

fn write_error(path: &Path, error: parquet::errors::ParquetError) -> StoreError {
    match error {
        parquet::errors::ParquetError::External(source) => match source.downcast::<std::io::Error>() {
            Ok(source) => StoreError::Io { verb: "write", path: path.to_owned(), source: *source },
            Err(other) => StoreError::Parquet { path: path.to_owned(), reason: other.to_string() },
        },
        other => StoreError::Parquet { path: path.to_owned(), reason: other.to_string() },
    }
}

/// Reads one tensor's file a piece at a time.
pub struct ActivationReader {
    path: PathBuf,
    reader: ParquetRecordBatchReader,
    n_rows: usize,
}

impl ActivationReader {
    /// Opens the file; pieces hold `rows_at_once` rows.
    ///
    /// # Errors
    /// `Io`, `Format`.
    pub fn open(path: &Path, rows_at_once: usize) -> Result<ActivationReader, StoreError> {
        let fail = |error: parquet::errors::ParquetError| StoreError::Format {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        let file = File::open(path).map_err(StoreError::io("read", path))?;
        let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(fail)?;
        let n_rows = usize::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or(0);
        let reader = builder.with_batch_size(rows_at_once.max(1)).build().map_err(fail)?;
        Ok(ActivationReader { path: path.to_owned(), reader, n_rows })
    }

    /// Number of rows (tokens) in the file.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Returns the next rows' values, row-major, or nothing at the end.
    ///
    /// # Errors
    /// `Format`.
    pub fn next_rows(&mut self) -> Result<Option<Vec<f32>>, StoreError> {
        let fail = |reason: String| StoreError::Format { path: self.path.clone(), reason };
        let Some(batch) = self.reader.next() else { return Ok(None) };
        let batch = batch.map_err(|error| fail(error.to_string()))?;
        let column = batch.column_by_name("values").ok_or_else(|| fail("no column values".to_owned()))?;
        let list = column.as_fixed_size_list_opt().ok_or_else(|| fail("values is no fixed-size list".to_owned()))?;
        let elements = list.values();
        let values = match elements.data_type() {
            DataType::Float32 => elements.as_primitive::<Float32Type>().values().to_vec(),
            DataType::Float16 => elements.as_primitive::<Float16Type>().values().iter().map(|v| v.to_f32()).collect(),
            other => return Err(fail(format!("values of type {other}"))),
        };
        Ok(Some(values))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(width: usize, dtype: DType) -> ActivationFile {
        ActivationFile {
            module: "model.layers.3.mlp.up_proj".to_owned(),
            port: "output".to_owned(),
            layer_idx: Some(3),
            op: "up_proj".to_owned(),
            width,
            dtype,
            model: "test".to_owned(),
            key: "k".to_owned(),
        }
    }

    proptest! {
        #[test]
        fn values_round_trip_in_any_chunks(width in 1usize..40, chunks in prop::collection::vec(1usize..20, 1..5), half in any::<bool>()) {
            let dir = tempfile::tempdir().expect("a temporary folder");
            let path = dir.path().join("a.parquet");
            let dtype = if half { DType::F16 } else { DType::F32 };
            let mut writer = ActivationWriter::create(&path, file(width, dtype)).expect("a writer");
            let (mut expected, mut n_rows) = (Vec::new(), 0);
            for n in chunks {
                let values: Vec<f32> = (0..n * width).map(|i| (i as f32 - 50.0) / 8.0).collect();
                let ids: Vec<u32> = (0..n as u32).collect();
                writer.append(n_rows, &ids, &values).expect("rows");
                expected.extend(values);
                n_rows += n;
            }
            prop_assert_eq!(writer.finish().expect("a footer"), n_rows);
            let mut reader = ActivationReader::open(&path, 7).expect("a reader");
            prop_assert_eq!(reader.n_rows(), n_rows);
            let mut found = Vec::new();
            while let Some(values) = reader.next_rows().expect("values") {
                found.extend(values);
            }
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn a_cut_file_is_an_error() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("a.parquet");
        std::fs::write(&path, b"PAR1xxxx").expect("a file");
        assert!(ActivationReader::open(&path, 1).is_err());
    }
}
