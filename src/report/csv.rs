//! `report.csv`: a tidy row for each number.

use super::request::{ReportError, ReportFile};
use super::{Evidence, Exporter};
use crate::units::non_finite;
use std::path::PathBuf;

pub const EXPORTER: Exporter = Exporter { name: "csv", export };

const FILE: &str = "report.csv";
const HEADER: [&str; 12] =
    ["model", "metric", "label", "value", "unit", "n", "spread", "spread_kind", "low", "high", "method", "stage"];

fn number(value: f64) -> String {
    non_finite(value).map_or_else(|| value.to_string(), str::to_owned)
}

fn export(evidence: &Evidence<'_>) -> Result<Vec<ReportFile>, ReportError> {
    let failed = |reason: String| ReportError::Encode { path: PathBuf::from(FILE), reason };
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(HEADER).map_err(|error| failed(error.to_string()))?;
    for measure in &evidence.measures {
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
        ];
        writer.write_record(row).map_err(|error| failed(error.to_string()))?;
    }
    let bytes = writer.into_inner().map_err(|error| failed(error.to_string()))?;
    Ok(vec![ReportFile { path: PathBuf::from(FILE), bytes }])
}
