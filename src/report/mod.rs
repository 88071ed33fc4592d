//! Reports: records and artifacts in, bytes out; the stage writes them. Pure.
//!
//! An exporter is one file and one line in [`EXPORTERS`].

mod types;

pub use types::{FORMATS, ReportError, ReportFile, ReportRequest, Scatter};
