//! `report.json`: everything, for programs.

use super::findings::paragraph;
use super::measure::Measure;
use super::request::{ReportError, ReportFile};
use super::{Evidence, Exporter};
use crate::artifact::FORMAT_VERSION;
use crate::inference::StoredType;
use serde::Serialize;
use serde_json::Value;
use std::path::PathBuf;

pub const EXPORTER: Exporter = Exporter { name: "json", export };

const FILE: &str = "report.json";

#[derive(Serialize)]
struct Document<'a> {
    format_version: u32,
    title: &'a str,
    pipeline: &'a str,
    /// Markdown.
    summary: String,
    models: Vec<ModelEntry<'a>>,
    measures: &'a [Measure],
    /// Addresses of inputs that failed or were skipped.
    missing: &'a [String],
    /// The inputs' whole records.
    records: Vec<Value>,
}

#[derive(Serialize)]
struct ModelEntry<'a> {
    model: &'a str,
    cell: Option<&'a str>,
    scheme: &'a str,
    quantized: bool,
    loaded_by: &'a str,
    file: &'a str,
    file_blake3: Option<&'a str>,
    baseline: Option<&'a str>,
    n_params: Option<u64>,
    weights_bytes: Option<u64>,
    /// Element types of the files that the model was made from.
    source_types: &'a [StoredType],
}

fn export(evidence: &Evidence<'_>) -> Result<Vec<ReportFile>, ReportError> {
    let entry = |model| -> ModelEntry<'_> {
        let model: &super::model::Model = model;
        ModelEntry {
            model: &model.address,
            cell: model.cell.as_deref(),
            scheme: &model.scheme,
            quantized: model.is_quantized,
            loaded_by: &model.loaded_by,
            file: &model.file,
            file_blake3: model.file_blake3.as_deref(),
            baseline: evidence.baseline_of(model).map(|baseline| baseline.address.as_str()),
            n_params: model.n_params,
            weights_bytes: evidence.weights_bytes(&model.address),
            source_types: &model.source_types,
        }
    };
    let document = Document {
        format_version: FORMAT_VERSION,
        title: evidence.request.title,
        pipeline: evidence.request.pipeline,
        summary: paragraph(evidence),
        models: evidence.models.iter().map(entry).collect(),
        measures: &evidence.measures,
        missing: evidence.request.missing,
        records: evidence.inputs.iter().map(|input| input.record.to_json()).collect(),
    };
    let mut text = serde_json::to_string_pretty(&document)
        .map_err(|error| ReportError::Encode { path: PathBuf::from(FILE), reason: error.to_string() })?;
    text.push('\n');
    Ok(vec![ReportFile::text(FILE, text)])
}
