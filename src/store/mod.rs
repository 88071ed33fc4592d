//! The store: what stages produced, kept under keys, and what runs leave for people. It does I/O and nothing else; it knows
//! records and folders, no stage and no engine.
//!
//! Artifacts are written aside, synced and renamed in, so that nothing half-written is ever visible; each key has an advisory
//! lock that dies with its process.

mod activations;
mod cache;
mod error;
mod file_hash;
mod file_memory;
mod fs;
mod gc;
mod log_probs;
mod metrics_csv;
mod results;
mod scatter;
mod stamp;
mod text_column;
mod token_scores;

pub use activations::{ActivationFile, ActivationReader, ActivationWriter};
pub use cache::{Artifact, FileEntry, Manifest, ManifestDraft, Staging, Store};
pub use error::StoreError;
pub use file_memory::FileHashes;
pub use fs::write_atomically;
pub use gc::{GcReport, Verdict};
pub use log_probs::{LogProbReader, LogProbWriter};
pub use metrics_csv::{MetricsRow, append_metrics_csv};
pub use results::{Results, RunDir};
pub use scatter::{ScatterWriter, read_scatter};
pub use stamp::Stamp;
pub use text_column::read_text_column;
pub use token_scores::{TokenScores, read_token_scores, write_token_scores};
