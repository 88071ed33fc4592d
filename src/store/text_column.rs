//! Texts in a column of a Parquet file.

use super::error::StoreError;
use arrow::array::{Array, AsArray};
use arrow::datatypes::DataType;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::file::metadata::{ColumnChunkMetaData, RowGroupMetaData};
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Rows that are in memory at once.
const BATCH_ROWS: usize = 1024;

/// Hands over a column's texts row by row, null as an empty one, until `take` returns false.
///
/// # Errors
/// `Io`; `Format` where there is no such column, it holds no text, or the file is damaged.
pub fn read_text_column(path: &Path, column: &str, take: &mut dyn FnMut(&str) -> bool) -> Result<(), StoreError> {
    // The file is somebody else's, and the parquet crate (60.1) panics over some damaged levels and pages.
    catch_unwind(AssertUnwindSafe(|| read_rows(path, column, take))).unwrap_or_else(|_| {
        Err(StoreError::Format {
            path: path.to_owned(),
            reason: "its pages are damaged; fetch the file again".to_owned(),
        })
    })
}

fn read_rows(path: &Path, column: &str, take: &mut dyn FnMut(&str) -> bool) -> Result<(), StoreError> {
    let fail = |reason: String| StoreError::Format { path: path.to_owned(), reason };
    let file = File::open(path).map_err(StoreError::io("read", path))?;
    let n_bytes = file.metadata().map_err(StoreError::io("read", path))?.len();
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|error| fail(error.to_string()))?;
    let Some(index) = builder.schema().fields().iter().position(|field| field.name() == column) else {
        let names: Vec<&str> = builder.schema().fields().iter().map(|field| field.name().as_str()).collect();
        return Err(fail(format!("no column {column:?}; it has {} (choose one with column:)", names.join(", "))));
    };
    let mut chunks = builder.metadata().row_groups().iter().flat_map(RowGroupMetaData::columns);
    if !chunks.all(|chunk| lies_within(chunk, n_bytes)) {
        return Err(fail("its footer places a column outside the file; was the download cut short?".to_owned()));
    }
    let mask = ProjectionMask::roots(builder.parquet_schema(), [index]);
    let reader = builder.with_projection(mask).with_batch_size(BATCH_ROWS).build();
    for batch in reader.map_err(|error| fail(error.to_string()))? {
        let batch = batch.map_err(|error| fail(error.to_string()))?;
        if !each(batch.column(0).as_ref(), take).map_err(|ty| fail(format!("column {column:?} holds {ty}, no text")))? {
            break;
        }
    }
    Ok(())
}

/// Returns true where a column's bytes are some of the file's: the parquet crate (60.1) panics over places below zero.
fn lies_within(chunk: &ColumnChunkMetaData, n_bytes: u64) -> bool {
    let first = chunk.dictionary_page_offset().unwrap_or_else(|| chunk.data_page_offset());
    let (first, n) = (u64::try_from(first), u64::try_from(chunk.compressed_size()));
    matches!((first, n), (Ok(first), Ok(n)) if first.checked_add(n).is_some_and(|end| end <= n_bytes))
}

/// Returns false once `take` had enough; the type where it is no text.
fn each(column: &dyn Array, take: &mut dyn FnMut(&str) -> bool) -> Result<bool, DataType> {
    Ok(match column.data_type() {
        DataType::Utf8 => column.as_string::<i32>().iter().all(|row| take(row.unwrap_or_default())),
        DataType::LargeUtf8 => column.as_string::<i64>().iter().all(|row| take(row.unwrap_or_default())),
        DataType::Utf8View => column.as_string_view().iter().all(|row| take(row.unwrap_or_default())),
        other => return Err(other.clone()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{ArrayRef, Int32Array, LargeStringArray, StringArray};
    use arrow::record_batch::RecordBatch;
    use parquet::arrow::ArrowWriter;
    use parquet::basic::Compression;
    use parquet::file::properties::WriterProperties;
    use proptest::prelude::*;
    use std::sync::Arc;

    fn write(path: &Path, compression: Compression) {
        let label: ArrayRef = Arc::new(Int32Array::from(vec![1, 2, 3]));
        let text: ArrayRef = Arc::new(StringArray::from(vec![Some("a"), None, Some("grüße")]));
        let page: ArrayRef = Arc::new(LargeStringArray::from(vec!["x", "y", "z"]));
        let batch = RecordBatch::try_from_iter_with_nullable([
            ("label", label, false),
            ("text", text, true),
            ("page", page, false),
        ])
        .expect("a batch");
        let properties = WriterProperties::builder().set_compression(compression).build();
        let file = File::create(path).expect("a file");
        let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).expect("a writer");
        writer.write(&batch).expect("rows");
        writer.close().expect("a footer");
    }

    fn texts(path: &Path, column: &str) -> Result<Vec<String>, StoreError> {
        let mut found = Vec::new();
        read_text_column(path, column, &mut |text| {
            found.push(text.to_owned());
            found.len() < 3
        })?;
        Ok(found)
    }

    #[test]
    fn rows_are_read_in_order_from_what_hubs_compress_with() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("t.parquet");
        for compression in [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::ZSTD(Default::default())] {
            write(&path, compression);
            assert_eq!(texts(&path, "text").expect("texts"), ["a", "", "grüße"]);
            assert_eq!(texts(&path, "page").expect("texts"), ["x", "y", "z"]);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn damaged_files_end_in_texts_or_an_error(at in 0usize..2000, byte in any::<u8>(), cut in 0usize..400) {
            let dir = tempfile::tempdir().expect("a temporary folder");
            let path = dir.path().join("t.parquet");
            write(&path, Compression::SNAPPY);
            let mut bytes = std::fs::read(&path).expect("the file");
            let at = at % bytes.len();
            bytes[at] = byte;
            if cut > 200 {
                bytes.truncate(bytes.len() - (cut - 200));
            }
            std::fs::write(&path, bytes).expect("a file");
            let _ = texts(&path, "text");
        }
    }

    #[test]
    fn missing_and_unfit_columns_are_errors_that_name_what_there_is() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("t.parquet");
        write(&path, Compression::UNCOMPRESSED);
        let error = texts(&path, "content").expect_err("no such column").to_string();
        assert!(error.contains("it has label, text, page"), "{error}");
        let error = texts(&path, "label").expect_err("no text").to_string();
        assert!(error.contains("Int32"), "{error}");
        std::fs::write(&path, b"PAR1").expect("a file");
        assert!(texts(&path, "text").is_err());
    }
}
