//! Reports: records and artifacts in, bytes out; the stage writes them. Pure.
//!
//! An exporter is one file and one line in [`EXPORTERS`].

mod types;

pub use types::{FORMATS, ReportError, ReportFile, ReportRequest, Scatter};

/// Placeholder until exporters land in this commit series.
pub fn render(_request: &ReportRequest<'_>) -> Result<Vec<ReportFile>, ReportError> {
    Ok(Vec::new())
}
