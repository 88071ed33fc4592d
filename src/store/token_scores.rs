//! Scores of single tokens as Parquet: a row a scored token, in the order of scoring.

use super::error::StoreError;
use crate::artifact::FORMAT_VERSION;
use arrow::array::{ArrayRef, AsArray, Float64Array, UInt32Array};
use arrow::datatypes::{DataType, Field, Float64Type, Schema, UInt32Type};
use arrow::record_batch::RecordBatch;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

/// What is kept of every scored token.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TokenScores {
    /// Which window scored it.
    pub window_idx: Vec<u32>,
    /// The token itself.
    pub token_id: Vec<u32>,
    /// Negative log-likelihood in nats.
    pub nll: Vec<f64>,
    /// The model's own first choice.
    pub argmax: Vec<u32>,
    /// KL(base ‖ model) in nats; empty where there is no base.
    pub kl: Vec<f64>,
}

/// Writes the file.
///
/// # Errors
/// `Io`, `Parquet`.
pub fn write_token_scores(path: &Path, scores: &TokenScores) -> Result<(), StoreError> {
    let fail = |reason: String| StoreError::Parquet { path: path.to_owned(), reason };
    let mut fields = vec![
        Field::new("window_idx", DataType::UInt32, false),
        Field::new("token_id", DataType::UInt32, false),
        Field::new("nll", DataType::Float64, false),
        Field::new("argmax", DataType::UInt32, false),
    ];
    let mut columns: Vec<ArrayRef> = vec![
        Arc::new(UInt32Array::from(scores.window_idx.clone())),
        Arc::new(UInt32Array::from(scores.token_id.clone())),
        Arc::new(Float64Array::from(scores.nll.clone())),
        Arc::new(UInt32Array::from(scores.argmax.clone())),
    ];
    if !scores.kl.is_empty() {
        fields.push(Field::new("kl", DataType::Float64, false));
        columns.push(Arc::new(Float64Array::from(scores.kl.clone())));
    }
    let schema = Arc::new(Schema::new(fields));
    let batch = RecordBatch::try_new(Arc::clone(&schema), columns).map_err(|error| fail(error.to_string()))?;
    let version = KeyValue::new("labpipe.format_version".to_owned(), FORMAT_VERSION.to_string());
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_key_value_metadata(Some(vec![version]))
        .build();
    let out = File::create(path).map_err(StoreError::io("create", path))?;
    let mut writer = ArrowWriter::try_new(out, schema, Some(properties)).map_err(|error| fail(error.to_string()))?;
    writer.write(&batch).map_err(|error| fail(error.to_string()))?;
    writer.close().map(|_| ()).map_err(|error| fail(error.to_string()))
}

/// Reads the file.
///
/// # Errors
/// `Io`, `Format`.
pub fn read_token_scores(path: &Path) -> Result<TokenScores, StoreError> {
    let fail = |reason: String| StoreError::Format { path: path.to_owned(), reason };
    let file = File::open(path).map_err(StoreError::io("read", path))?;
    let reader = ParquetRecordBatchReaderBuilder::try_new(file).and_then(|builder| builder.build());
    let mut scores = TokenScores::default();
    for batch in reader.map_err(|error| fail(error.to_string()))? {
        let batch = batch.map_err(|error| fail(error.to_string()))?;
        let missing = |name: &str| fail(format!("no column {name} of its type"));
        let ids = |name: &str| {
            let column = batch.column_by_name(name).and_then(|column| column.as_primitive_opt::<UInt32Type>());
            column.map(|column| column.values().to_vec()).ok_or_else(|| missing(name))
        };
        let floats = |name: &str| {
            let column = batch.column_by_name(name).and_then(|column| column.as_primitive_opt::<Float64Type>());
            column.map(|column| column.values().to_vec())
        };
        scores.window_idx.extend(ids("window_idx")?);
        scores.token_id.extend(ids("token_id")?);
        scores.nll.extend(floats("nll").ok_or_else(|| missing("nll"))?);
        scores.argmax.extend(ids("argmax")?);
        scores.kl.extend(floats("kl").unwrap_or_default());
    }
    Ok(scores)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_round_trip_with_and_without_a_base() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("tokens.parquet");
        let mut scores = TokenScores {
            window_idx: vec![0, 0, 1],
            token_id: vec![5, 6, 7],
            nll: vec![0.1, 2.0, 1e-9],
            argmax: vec![5, 1, 7],
            kl: Vec::new(),
        };
        write_token_scores(&path, &scores).expect("a file");
        assert_eq!(read_token_scores(&path).expect("scores"), scores);
        scores.kl = vec![0.0, 0.5, 1e-7];
        write_token_scores(&path, &scores).expect("a file");
        assert_eq!(read_token_scores(&path).expect("scores"), scores);
        std::fs::write(&path, b"PAR1xxxx").expect("a file");
        assert!(read_token_scores(&path).is_err());
    }
}
