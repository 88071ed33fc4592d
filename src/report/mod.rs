//! Reports: records in, files as bytes out. The store writes them.
//!
//! This room reads no file and knows no engine. `evidence` puts records side by side, `findings` says in words what
//! they show, and each exporter is one file and one line in [`EXPORTERS`].

mod compare;
mod comparison;
mod csv;
mod details;
mod divergence;
mod evidence;
mod findings;
mod json;
mod layer_findings;
mod layers;
mod markdown;
mod md;
mod measure;
mod model;
mod numbers;
mod paired;
mod paths;
pub mod plot;
mod request;
mod speeds;

#[cfg(test)]
mod testing;

pub use compare::{Compared, Paired, SpeedBasis, SpeedRatio, Verdict, compare, measures};
pub use evidence::Evidence;
pub use measure::Measure;
pub use model::{Model, source_words};
pub use paired::{Differences, NoTokens, Scored, TokenSource, is_same_text, paired_differences};
pub use request::{
    NoScatter, ReportError, ReportFile, ReportRequest, ScatterFailure, ScatterPoints, ScatterSource, formats, render,
};
pub use speeds::{NoVerdict, Spreads, Starts};

/// A report format: its name in pipeline files, and what makes its files.
#[derive(Clone, Copy)]
pub struct Exporter {
    pub name: &'static str,
    pub export: fn(&Evidence<'_>) -> Result<Vec<ReportFile>, ReportError>,
}

/// Every format there is.
pub static EXPORTERS: &[Exporter] = &[md::EXPORTER, csv::EXPORTER, json::EXPORTER];
