//! What a report is made from and what it consists of.

use crate::event::Progress;
use crate::stage::StageInput;
use std::path::PathBuf;
use std::sync::Arc;

/// Names of the formats.
pub const FORMATS: &[&str] = &["md", "csv", "json"];

/// Pairs of values (reference, candidate) by module, in execution order.
pub type Scatter = Vec<(String, Vec<(f32, f32)>)>;

/// What to report on.
pub struct ReportRequest<'a> {
    pub title: String,
    /// Records of kinds load, quantize, prefill-bench, decode-bench, ppl, diff, each with its lineage.
    pub inputs: &'a [Arc<StageInput>],
    /// Addresses of inputs that failed.
    pub missing: &'a [String],
    /// Some of [`FORMATS`].
    pub formats: Vec<String>,
    /// Reads the sampled pairs of a diff.
    pub scatter: &'a dyn Fn(&StageInput) -> Result<Scatter, String>,
    pub progress: &'a dyn Progress,
}

/// One file of a report.
#[derive(Debug, Clone, PartialEq)]
pub struct ReportFile {
    /// Relative to the report's folder.
    pub path: PathBuf,
    pub bytes: Vec<u8>,
}

/// Why a report can't be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    #[error("read the record of {address}: {reason}")]
    Record { address: String, reason: String },
    #[error("read the scatter points of {address}: {reason}")]
    Scatter { address: String, reason: String },
    #[error("draw {path}: {reason}")]
    Plot { path: PathBuf, reason: String },
}
