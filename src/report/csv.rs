//! `report.csv`: a tidy row for each number.

use super::model::Model;
use super::request::{ReportError, ReportFile};
use super::{Evidence, Exporter};
use crate::artifact::RecordHead;
use crate::inference::stored_words;
use crate::stage::StageInput;
use crate::units::non_finite;
use std::collections::BTreeSet;
use std::path::PathBuf;

pub const EXPORTER: Exporter = Exporter { name: "csv", export };

const FILE: &str = "report.csv";
/// Before a column for each variable of a matrix.
const HEADER: [&str; 18] = [
    "model",
    "metric",
    "label",
    "value",
    "unit",
    "n",
    "spread",
    "spread_kind",
    "low",
    "high",
    "method",
    "stage",
    "model_file",
    "model_blake3",
    "source_types",
    "device",
    "run_id",
    "disturbance",
];

fn number(value: f64) -> String {
    non_finite(value).map_or_else(|| value.to_string(), str::to_owned)
}

/// Returns the record's head of a stage: an input, or what one was made from.
fn head_of<'a>(input: &'a StageInput, stage: &str) -> Option<&'a RecordHead> {
    if input.address == stage {
        return Some(&input.record.head);
    }
    input.inputs.values().flatten().find_map(|parent| head_of(parent, stage))
}

fn export(evidence: &Evidence<'_>) -> Result<Vec<ReportFile>, ReportError> {
    let failed = |reason: String| ReportError::Encode { path: PathBuf::from(FILE), reason };
    let mut writer = csv::Writer::from_writer(Vec::new());
    let variables: BTreeSet<&str> =
        evidence.models.iter().flat_map(|model| model.variables()).map(|(name, _)| name).collect();
    let header =
        HEADER.iter().map(|name| (*name).to_owned()).chain(variables.iter().map(|name| format!("cell.{name}")));
    writer.write_record(header).map_err(|error| failed(error.to_string()))?;
    for measure in &evidence.measures {
        let model = evidence.models.iter().find(|model| model.address == measure.model);
        let head = evidence.inputs.iter().find_map(|input| head_of(input, &measure.stage));
        let value_of = |variable: &str| {
            let found = model.into_iter().flat_map(Model::variables).find(|(name, _)| *name == variable);
            found.map(|(_, value)| value.to_owned()).unwrap_or_default()
        };
        let row = [
            measure.model.clone(),
            measure.metric.to_owned(),
            measure.label.clone(),
            number(measure.value),
            measure.unit.to_owned(),
            measure.n.to_string(),
            measure.spread.map(number).unwrap_or_default(),
            measure.spread_kind.map(|kind| kind.name().to_owned()).unwrap_or_default(),
            measure.low.map(number).unwrap_or_default(),
            measure.high.map(number).unwrap_or_default(),
            measure.method.clone(),
            measure.stage.clone(),
            model.map(|model| model.file.clone()).unwrap_or_default(),
            model.and_then(|model| model.file_blake3.clone()).unwrap_or_default(),
            model.and_then(|model| stored_words(&model.source_types)).unwrap_or_default(),
            head.and_then(|head| head.device.clone()).unwrap_or_default(),
            head.map(|head| head.produced_by_run.clone()).unwrap_or_default(),
            measure.disturbance.clone().unwrap_or_default(),
        ];
        let row = row.into_iter().chain(variables.iter().map(|variable| value_of(variable)));
        writer.write_record(row).map_err(|error| failed(error.to_string()))?;
    }
    let bytes = writer.into_inner().map_err(|error| failed(error.to_string()))?;
    Ok(vec![ReportFile { path: PathBuf::from(FILE), bytes }])
}
