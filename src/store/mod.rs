//! The store: what stages produced, kept under keys, and what runs leave for people. It does I/O and nothing else; it knows
//! records and folders, no stage and no engine.
//!
//! Artifacts are written aside, synced and renamed in, so that nothing half-written is ever visible; each key has an advisory
//! lock that dies with its process. What is read is verified against the hashes in the manifest, once per process.

mod activations;
mod active;
mod cache;
mod error;
mod exchange;
mod file_hash;
mod file_memory;
mod folders;
mod fs;
mod gc;
mod leftovers;
mod lock;
mod log_probs;
mod manifest;
mod metrics_csv;
mod quirks;
mod references;
mod results;
mod scatter;
mod staging;
mod stamp;
mod text_column;
mod token_scores;
mod usage;
mod verify;

pub use activations::{ActivationFile, ActivationReader, ActivationWriter};
pub use active::{ActiveRun, UseGuard};
pub use cache::{Artifact, Check, Part, Store};
pub use error::StoreError;
pub use file_memory::FileHashes;
pub use fs::write_atomically;
pub use gc::{GcReport, GcRequest};
pub use log_probs::{LogProbReader, LogProbWriter};
pub use manifest::{Damage, FileEntry, Manifest};
pub use metrics_csv::{MetricsRow, append_metrics_csv};
pub use quirks::{note_once, take_notes};
pub use results::{Results, RunDir};
pub use scatter::{ScatterWriter, read_scatter};
pub use staging::{ManifestDraft, Staging};
pub use stamp::Stamp;
pub use text_column::read_text_column;
pub use token_scores::{read_token_scores, write_token_scores};
pub use verify::Verdict;
