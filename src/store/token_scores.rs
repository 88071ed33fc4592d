//! Scores of single tokens as Parquet: a row a scored token, in the order of scoring.

use super::error::StoreError;
use crate::artifact::{FORMAT_VERSION, TokenScores};
use arrow::array::{ArrayRef, AsArray, BooleanArray, Float64Array, UInt32Array};
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

/// Writes the file.
///
/// # Errors
/// `Io`, `Parquet`.
pub fn write_token_scores(path: &Path, scores: &TokenScores) -> Result<(), StoreError> {
    let fail = |reason: String| StoreError::Parquet { path: path.to_owned(), reason };
    let ids = |ids: &[u32]| Arc::new(UInt32Array::from(ids.to_vec())) as ArrayRef;
    let floats = |values: &[f64]| Arc::new(Float64Array::from(values.to_vec())) as ArrayRef;
    let mut columns: Vec<(&str, DataType, ArrayRef)> = vec![
        ("window_idx", DataType::UInt32, ids(&scores.window_idx)),
        ("document_idx", DataType::UInt32, ids(&scores.document_idx)),
        ("token_id", DataType::UInt32, ids(&scores.token_id)),
        ("nll", DataType::Float64, floats(&scores.nll)),
        ("argmax", DataType::UInt32, ids(&scores.argmax)),
    ];
    if !scores.kl.is_empty() {
        let same_top: ArrayRef = Arc::new(BooleanArray::from(scores.same_top.clone()));
        columns.push(("kl", DataType::Float64, floats(&scores.kl)));
        columns.push(("base_nll", DataType::Float64, floats(&scores.base_nll)));
        columns.push(("same_top", DataType::Boolean, same_top));
    }
    let fields: Vec<Field> = columns.iter().map(|(name, ty, _)| Field::new(*name, ty.clone(), false)).collect();
    let columns: Vec<ArrayRef> = columns.into_iter().map(|(_, _, column)| column).collect();
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
        scores.document_idx.extend(ids("document_idx").unwrap_or_default());
        scores.kl.extend(floats("kl").unwrap_or_default());
        scores.base_nll.extend(floats("base_nll").unwrap_or_default());
        let same_top = batch.column_by_name("same_top").and_then(|column| column.as_boolean_opt());
        scores.same_top.extend(same_top.into_iter().flat_map(|column| (0..column.len()).map(|i| column.value(i))));
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
            document_idx: vec![0, 0, 1],
            token_id: vec![5, 6, 7],
            nll: vec![0.1, 2.0, 1e-9],
            argmax: vec![5, 1, 7],
            ..TokenScores::default()
        };
        write_token_scores(&path, &scores).expect("a file");
        assert_eq!(read_token_scores(&path).expect("scores"), scores);
        scores.kl = vec![0.0, 0.5, 1e-7];
        scores.base_nll = vec![0.1, 1.5, 1e-9];
        scores.same_top = vec![true, false, true];
        write_token_scores(&path, &scores).expect("a file");
        assert_eq!(read_token_scores(&path).expect("scores"), scores);
        std::fs::write(&path, b"PAR1xxxx").expect("a file");
        assert!(read_token_scores(&path).is_err());
    }
}
