//! What a report is asked for, and what comes back.

use super::plot::PlotError;
use super::{EXPORTERS, Evidence};
use crate::stage::StageInput;
use std::path::PathBuf;
use std::sync::Arc;

/// Where the points of scatter plots come from: what a `diff` stage kept beside its record.
pub trait ScatterSource: Sync {
    /// Hands over each module's `(reference, candidate)` pairs, module by module; modules without points are left out.
    ///
    /// # Errors
    /// Whatever kept it from reading them, in words.
    fn read(
        &self,
        diff: &StageInput,
        take: &mut dyn FnMut(&str, Vec<(f32, f32)>),
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;
}

/// No scatter plots.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoScatter;

impl ScatterSource for NoScatter {
    fn read(
        &self,
        _diff: &StageInput,
        _take: &mut dyn FnMut(&str, Vec<(f32, f32)>),
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(())
    }
}

/// What a report is made of.
pub struct ReportRequest<'a> {
    pub title: &'a str,
    pub pipeline: &'a str,
    /// Stages to report on, with their lineage; order is kept, a stage named twice counts once.
    pub inputs: &'a [Arc<StageInput>],
    /// Addresses of inputs that failed or were skipped.
    pub missing: &'a [String],
    /// Names of exporters; see [`formats`].
    pub formats: &'a [String],
    pub scatter: &'a dyn ScatterSource,
}

/// A file of a report.
#[derive(Debug, Clone, PartialEq)]
pub struct ReportFile {
    /// Relative to the report's folder.
    pub path: PathBuf,
    pub bytes: Vec<u8>,
}

impl ReportFile {
    /// Returns a text file.
    pub fn text(path: impl Into<PathBuf>, text: String) -> ReportFile {
        ReportFile { path: path.into(), bytes: text.into_bytes() }
    }
}

/// Why a report could not be made. The text fits "failed to {error}".
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    #[error("write format {found:?}: labpipe knows {known}")]
    Format { found: String, known: String },
    #[error("read the record of {stage}: field {field}: {reason}; run the stage again with --force")]
    Record { stage: String, field: &'static str, reason: String },
    #[error("read the scatter points of {stage}: {reason}; run the stage again with --force")]
    Scatter { stage: String, reason: String },
    #[error("make {}: {source}", path.display())]
    Plot { path: PathBuf, source: PlotError },
    #[error("encode {}: {reason}", path.display())]
    Encode { path: PathBuf, reason: String },
}

/// Returns the names of all report formats.
pub fn formats() -> Vec<&'static str> {
    EXPORTERS.iter().map(|exporter| exporter.name).collect()
}

/// Makes a report's files. The same request gives the same bytes.
///
/// # Errors
/// An unknown format, a record without its contract's fields, scatter points that can't be read, a plot that can't be drawn.
pub fn render(request: &ReportRequest<'_>) -> Result<Vec<ReportFile>, ReportError> {
    let mut exporters = Vec::new();
    for name in request.formats {
        let exporter = EXPORTERS.iter().find(|exporter| exporter.name == name);
        exporters.push(exporter.ok_or_else(|| ReportError::Format { found: name.clone(), known: formats().join(", ") })?);
    }
    let evidence = Evidence::gather(request)?;
    let mut files = Vec::new();
    for (idx, exporter) in exporters.iter().enumerate() {
        if exporters[..idx].iter().all(|earlier| earlier.name != exporter.name) {
            files.extend((exporter.export)(&evidence)?);
        }
    }
    Ok(files)
}
